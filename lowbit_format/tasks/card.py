"""The model card of a task bundle: which base it belongs to, what was trained, what it reached, how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..hub import is_hub_id
from .bundle import TaskBundle
from .metrics import checked_metrics, printable
from .repository import TAGS, base_tag

_MARKDOWN = re.compile(r"([\\`*_\[\]<>|~$&#])")
_PIPELINES = {  # the Hub's words for kinds of tasks
    "classification": "text-classification",
    "token-classification": "token-classification",
    "regression": "text-classification",
    "language-modelling": "text-generation",
}
_REVISION = re.compile(r"[\w.-]{1,100}", re.ASCII)


def task_card(
    bundle: TaskBundle,
    *,
    metrics: Mapping[str, float] | None = None,
    dataset: str | None = None,
    language: str | Sequence[str] | None = None,
    license: str | None = None,
    repo_id: str | None = None,
    subfolder: str | None = None,
    nbytes: int | None = None,
    notes: str | None = None,
    model_class: str | None = None,
    num_labels: int | None = None,
) -> str:
    """``README.md`` in Markdown, with the front matter that the Hub reads; the same text for the same arguments.

    Text of the bundle and of the metrics is escaped. A base's path on this machine is not written.

    Args:
        bundle: what the card is about.
        metrics: what the task reached, by name, such as ``{"accuracy": 0.91}``; by default what the bundle says.
        dataset: Hub id of the data it was tuned on.
        language: code or codes, such as ``"en"``.
        license: identifier, such as ``"apache-2.0"``.
        repo_id, subfolder: where the bundle will be, for the example of loading it.
        nbytes: size of the file of scales; by default that of its tensors, deltas taken as float32.
        notes: a section of your own, in Markdown, taken as it is.
        model_class, num_labels: how to load the base where that takes more than its name: a class of transformers.

    Raises TaskError for a metric that is not a number with a name.
    """
    from huggingface_hub import ModelCard, ModelCardData

    config, task = bundle.config, bundle.config.task
    metrics = checked_metrics(metrics or (task.metrics if task else {}))
    base = config.base_model_name_or_path if is_hub_id(config.base_model_name_or_path) else None
    data = ModelCardData(
        library_name="lowbit-format",
        tags=[*TAGS, *_method_tag(config.method), base_tag(config.base_fingerprint)],
        base_model=base,
        datasets=None if dataset is None else [dataset],
        language=language if language is None or isinstance(language, str) else list(language),
        license=license,
        pipeline_tag=_PIPELINES.get(task.kind) if task else None,
        metrics=list(metrics) or None,
        base_model_relation=None if base is None else "adapter",
    )
    name = (subfolder or repo_id or "").rstrip("/").rpartition("/")[2]
    sections = [
        f"# {_escaped(name) or 'A task'}",
        f"A task of {f'[{base}](https://huggingface.co/{base})' if base else 'a lowbit base'}: the scales of that "
        "base, tuned for one task. The base's bit-planes stay as they are, so one copy of it serves many tasks.",
        _loading(bundle, base, repo_id, subfolder, model_class, num_labels),
        _facts(bundle, base, dataset, nbytes),
    ]
    if metrics:
        sections.append("## Results\n\n| metric | value |\n|---|---|\n" + _rows(_values(metrics)))
    if notes:
        sections.append(f"## Notes\n\n{printable(notes).strip()}")
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def _loading(
    bundle: TaskBundle,
    base: str | None,
    repo_id: str | None,
    subfolder: str | None,
    model_class: str | None,
    num_labels: int | None,
) -> str:
    config = bundle.config
    revision = config.revision if config.revision and _REVISION.fullmatch(config.revision) else None
    name = re.sub(r"\W", "-", (subfolder or repo_id or "task").rpartition("/")[2])
    place, known = base or "PATH_OR_REPO_OF_THE_BASE", model_class is not None and model_class.isidentifier()
    options: dict[str, Any] = {"revision": revision, "bits": config.bits, "num_labels": num_labels}
    load = _call("lb.from_pretrained", place, **options, model_class=_Code(model_class) if known else None)
    imported = f"\nfrom transformers import {model_class}" if known else ""
    task = _call("lb.load_task", repo_id or "PATH_OR_REPO_OF_THIS_TASK", first="model", subfolder=subfolder, name=name)
    return f"""## Loading

```
pip install lowbit-format
```
```python
import lowbit_format as lb{imported}

model = {load}
{task}
lb.set_task(model, {_literal(name)})
```

A base with another fingerprint is refused, wherever it came from."""


def _facts(bundle: TaskBundle, base: str | None, dataset: str | None, nbytes: int | None) -> str:
    config = bundle.config
    deltas, saved, size = bundle.delta_values, bundle.saved_values, bundle.nbytes if nbytes is None else nbytes
    labels = config.task.labels if config.task else ()
    facts = {
        "base": f"`{base}`" if base else "see the fingerprint",
        "base fingerprint": f"`{config.base_fingerprint}`",
        "method": _escaped(config.method),
        "precision": f"the base's first {config.bits} bits" if config.bits else "all bits of the base",
        "trained numbers for scales": f"{deltas:,} in {len(bundle.deltas):,} tensors",
        "numbers kept in full precision": f"{saved:,}" + (f" ({_listed(config.modules_to_save)})" if saved else ""),
        **({"labels": _listed(labels)} if labels else {}),
        "size": f"{size:,} bytes",
        **({} if dataset is None else {"tuned on": _escaped(dataset)}),
    }
    return "## What it is\n\n| | |\n|---|---|\n" + _rows(facts)


def _values(metrics: Mapping[str, float]) -> dict[str, str]:
    return {_escaped(name): f"{value:.6g}" for name, value in metrics.items()}


def _rows(facts: Mapping[str, str]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in facts.items())


def _listed(paths: Sequence[str]) -> str:
    shown = ", ".join(map(_escaped, paths[:8]))
    return f"{shown} and {len(paths) - 8} more" if len(paths) > 8 else shown


def _method_tag(method: str) -> list[str]:
    """The method as a tag, if it can be one."""
    tag = re.sub(r"[^a-z0-9]+", "-", method.lower()).strip("-")
    return [tag] if 1 <= len(tag) <= 40 and tag not in TAGS else []


def _call(function: str, place: str, *, first: str | None = None, **options: str | int | None) -> str:
    """Python code of a call; options that are None are left out."""
    arguments = [*([first] if first else []), _literal(place)]
    arguments += [f"{key}={_literal(value)}" for key, value in options.items() if value is not None]
    return f"{function}({', '.join(arguments)})"


class _Code(str):
    """A name in code, not a text."""


def _literal(value: str | int) -> str:
    if isinstance(value, _Code):
        return value
    return json.dumps(value)  # of ASCII alone, and valid Python for text and numbers


def _escaped(text: str) -> str:
    """`text` on one line, so that Markdown shows it as it is and a table's row stays one."""
    return _MARKDOWN.sub(r"\\\1", printable(" ".join(text.split()))[:200])
