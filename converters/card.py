"""The model card of a converted model: how to load it, what was done, and what it cost."""

from __future__ import annotations

import re
from pathlib import Path

from ..integrations.card import base_card, scheme_text, source_facts
from .journal import Outcome
from .plan import Plan
from .source import Source
from .summary import Totals, remarks, times


def model_card(source: Source, plan: Plan, outcomes: dict[str, Outcome], *, name: str) -> str:
    """``README.md`` in Markdown, with the front matter that the Hub reads."""
    original, facts = source.repo_id or _original_name(source.directory), source_facts(source.directory)
    facts.pop("base_model", None)  # the original is what this base was made from, and not what that one was tuned from
    if original:
        facts["base_model"] = original
    schemes = [o.module.scheme for o in outcomes.values()]
    totals = Totals.of(plan, outcomes)
    more = "".join(f"| {what} | {text} |\n" for what, text in remarks(plan))
    sections = f"""## What was done

| | |
|---|---|
| quantized | {", ".join(sorted(set(map(scheme_text, schemes))))} |
| modules | {len(outcomes)} |
| bits per quantized weight | {totals.bits_per_weight:.2f} |
| size | {totals.output_bytes / 1e6:.1f} MB ({times(totals.ratio)}) |
| coverage of Linear, Conv1D and expert weights | {plan.coverage:.1%} |
| relative error of the quantized weights | {totals.relative_error:.4f} |
| source revision | {source.revision or "unknown"} |
| kept in full precision | {_kept_text(plan)} |
{more}
Tensors carry SHA-256 digests: `lowbit verify PATH` checks them."""
    return base_card(
        name,
        "PATH_OR_REPO",
        f"[{original}](https://huggingface.co/{original})" if original else "A model",
        schemes,
        source=facts,
        loaded=plan.architecture,
        sections=sections,
    )


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
