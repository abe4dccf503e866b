"""The model card of a base: what its source's card says of it, how to load it, and what its writer knows besides."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..schema import Scheme, lowest_version

_KEPT = {  # keys of a source's front matter that hold for the base too, and what their values may be
    "license": r"[\w.-]+",
    "license_name": r"[\w.-]+",
    "license_link": r"[\w./:%~-]+",
    "pipeline_tag": r"[\w-]+",
    "base_model": r"[\w.-]+/[\w.-]+",
}


def base_card(
    name: str,
    place: str,
    what: str,
    schemes: Iterable[Scheme],
    *,
    source: Mapping[str, str] | None = None,
    tags: Sequence[str] = (),
    loaded: str = "",
    sections: str = "",
) -> str:
    """``README.md`` in Markdown, with the front matter that the Hub reads; it says how not to get random weights.

    Args:
        name: heading of the card.
        place: directory or Hub id, for the example of loading it.
        what: what the model is, such as ``"A LlamaForCausalLM"``.
        schemes: of its quantized matrices.
        source: facts from :func:`source_facts`; ``base_model`` is the float model.
        tags: more tags for the Hub.
        loaded: the class that loading gives, if it is known.
        sections: more Markdown.
    """
    facts = dict(source or {})
    front = ["library_name: transformers", "tags:", *(f"- {tag}" for tag in ("lowbit", "quantized", *tags))]
    front += [f"{key}: {value}" for key, value in facts.items()]
    if "base_model" in facts:
        front.append("base_model_relation: quantized")
    schemes = list(schemes)
    kinds = ", ".join(sorted({scheme_text(scheme) for scheme in schemes}))
    comment = f"  # a {loaded}" if loaded else ""
    return (
        "\n".join(["---", *front, "---"])
        + f"""

# {name}

{what} with its weights in bit-planes ({kinds}), in the lowbit format {lowest_version(schemes)}.

## Loading

```
pip install lowbit-format
```
```python
import lowbit_format

model = lowbit_format.from_pretrained("{place}"){comment}
```

`from_pretrained` of transformers' own classes works too, without that import: torch registers the format by itself.
Only where `TORCH_DEVICE_BACKEND_AUTOLOAD=0` is set, `import lowbit_format` before loading: without it transformers
would load **random** weights.

{sections}"""
    ).rstrip() + "\n"


def model_base_card(model: Any, repo_id: str, tags: Sequence[str] = ()) -> str:
    """The card of a base that is pushed from memory. The converter writes a fuller one beside what it converts."""
    fingerprint = model.lowbit_base.fingerprint.body
    return base_card(
        repo_id,
        repo_id,
        f"A {type(model).__name__}",
        (m.scheme for m in model.config.quantization_config.parsed),
        source=source_facts(Path(model.name_or_path)) if model.name_or_path else None,
        tags=tags,
        sections=f"Tasks for this base have the fingerprint `{fingerprint}` in their `task_config.json`.",
    )


def source_facts(directory: Path) -> dict[str, str]:
    """What the front matter of the card in `directory` says of license, task and float model; empty without a card."""
    try:
        text = (directory / "README.md").read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    front = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    found = dict[str, str]()
    for key, value in _KEPT.items() if front else ():
        if line := re.search(rf"^{key}: *({value})\s*$", front[1] if front else "", re.MULTILINE):
            found[key] = line[1]
    return found


def scheme_text(scheme: Scheme) -> str:
    """A scheme in a few words, such as ``nf4 4 bits, groups of 64``."""
    group = f"groups of {scheme.group_size}" if scheme.group_size else "one group a row"
    return f"{scheme.label or scheme.codec} {scheme.bits} bits, {group}"
