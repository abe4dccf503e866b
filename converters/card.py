"""The model card of a converted model: how to load it, what was done, and what it cost."""

from __future__ import annotations

import re
from pathlib import Path

from .journal import Outcome
from .plan import Plan
from .source import Source
from .summary import Totals


def model_card(source: Source, plan: Plan, outcomes: dict[str, Outcome], *, name: str) -> str:
    """``README.md`` in Markdown, with the front matter that the Hub reads."""
    original = source.repo_id or _original_name(source.directory)
    license_line = _license(source.directory)
    totals = Totals.of(plan, outcomes)
    front = ["---", "library_name: transformers", "tags:", "- lowbit", "- quantized"]
    if original:
        front += [f"base_model: {original}", "base_model_relation: quantized"]
    if license_line:
        front.append(license_line)
    front.append("---")
    codecs = ", ".join(sorted({_scheme_text(o) for o in outcomes.values()}))
    return (
        "\n".join(front)
        + f"""

# {name}

{f"[{original}](https://huggingface.co/{original})" if original else "A model"} with its weights in bit-planes, in the
lowbit format 1.0.

## Loading

```
pip install lowbit-format
```
```python
import lowbit_format  # registers the format with transformers; without this line the weights would be RANDOM

model = lowbit_format.from_pretrained("PATH_OR_REPO")  # a {plan.architecture}
```

After the import, `from_pretrained` of transformers' own classes works too.

## What was done

| | |
|---|---|
| quantized | {codecs} |
| modules | {len(outcomes)} |
| bits per quantized weight | {totals.bits_per_weight:.2f} |
| size | {totals.output_bytes / 1e6:.1f} MB ({totals.ratio:.2f} x smaller) |
| coverage of Linear, Conv1D and expert weights | {plan.coverage:.1%} |
| relative error of the quantized weights | {totals.relative_error:.4f} |
| source revision | {source.revision or "unknown"} |
| kept in full precision | {_kept_text(plan)} |

Tensors carry SHA-256 digests: `lowbit verify PATH` checks them.
"""
    )


def _scheme_text(o: Outcome) -> str:
    scheme = o.module.scheme
    group = f"groups of {scheme.group_size}" if scheme.group_size else "one group a row"
    return f"{scheme.label or scheme.codec} {scheme.bits} bits, {group}"


def _kept_text(plan: Plan) -> str:
    kept = plan.kept()
    text = ", ".join(f"`{s.destination.path}` ({s.reason})" for s in kept[:8])
    return text + (f" and {len(kept) - 8} more" if len(kept) > 8 else "") if kept else "norms and biases only"


def _original_name(directory: Path) -> str | None:
    """The Hub id that a directory of the local cache belongs to, if it is one."""
    for part in directory.parts:
        if match := re.fullmatch(r"models--([\w.-]+)--([\w.-]+)", part):
            return f"{match[1]}/{match[2]}"
    return None


def _license(directory: Path) -> str | None:
    """The license line of the original card's front matter."""
    try:
        text = (directory / "README.md").read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    match = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    line = re.search(r"^license: *[\w.-]+ *$", match[1], re.MULTILINE) if match else None
    return line[0] if line else None
