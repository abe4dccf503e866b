"""What a plan or a conversion amounts to, in numbers and in tables for the terminal."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..quantize import Target
from .budgeted import DIVERGENCE
from .candidates import kind_of
from .journal import Outcome
from .plan import EMBEDDING, HEAD, TIED, Plan, Step, Taken
from .recipe import WORDS

if TYPE_CHECKING:
    from rich.table import Table

    from ..calibration.ladder import BlockResult
    from .budgeted import Choice
    from .convert import Conversion
    from .student import Quality

POOR = 0.5  # nats of divergence from the float model from which a result is called poor
POOR_COSINE = 0.9
WORST = 5  # modules listed with the largest error
LARGE, FEWER = 0.2, Target("uniform", 4)  # part of the file from which the summary says what fewer bits would give
POINTS = 16  # of a curve that are listed
NAMED = 6  # tensors or files named before the rest is only counted


@dataclass(frozen=True)
class Totals:
    """Sums over a converted model.

    Attributes:
        weights: quantized weights.
        bits_per_weight: stored bits of quantized modules for each of their weights.
        source_bytes, output_bytes: of all tensors.
        relative_error: over all quantized weights.
    """

    weights: int
    bits_per_weight: float
    source_bytes: int
    output_bytes: int
    relative_error: float

    @property
    def ratio(self) -> float:
        return self.source_bytes / self.output_bytes

    @classmethod
    def of(cls, plan: Plan, outcomes: dict[str, Outcome]) -> Totals:
        weights = sum(o.module.numel for o in outcomes.values())
        stored = sum(o.nbytes for o in outcomes.values())
        kept = sum(s.tensor.nbytes for s in plan.steps if s.target is None)
        norm = sum(o.squared_norm for o in outcomes.values())
        error = sum(o.squared_error for o in outcomes.values())
        return cls(
            weights,
            8 * stored / weights,
            sum(s.tensor.nbytes_there for s in plan.steps),
            stored + kept,
            (error / norm) ** 0.5 if norm else 0.0,
        )


def times(ratio: float) -> str:
    """How much smaller something became, or larger: a release may have parameters in fewer bits than a lowbit model."""
    return f"{ratio:.2f} x smaller" if ratio >= 1 else f"{1 / ratio:.2f} x larger"


def module_lines(plan: Plan) -> list[str]:
    """One line for each module to quantize: path, kind, shape, scheme, bits for each weight."""
    rows = []
    for step in plan.quantized:
        m = step.module()
        bits = f"{step.stored_bits() / m.numel:.2f} bits/weight"
        rows.append((step.path, m.kind, "x".join(map(str, m.shape)), _scheme(step), bits))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def plan_tables(plan: Plan, memory: int) -> list[Table]:
    """Tables of ``--dry-run``: the modules by kind, what is kept, and last what it comes to.

    `memory` is the expected peak, in bytes.
    """
    from rich.table import Column, Table

    groups: dict[tuple[str, str, str], list[Step]] = defaultdict(list)
    for step in plan.quantized:
        shape = "x".join(map(str, step.module().shape))
        groups[kind_of(step.path), shape, _scheme(step)].append(step)
    modules = Table(Column("kind", no_wrap=True), "modules", "shape", "scheme", "bits/weight", title="Plan")
    for (kind, shape, scheme), steps in sorted(groups.items()):
        entries = [step.module() for step in steps]
        bits = sum(step.stored_bits() for step in steps) / sum(m.numel for m in entries)
        modules.add_row(kind, str(len(steps)), shape, scheme, f"{bits:.2f}")
    source = sum(s.tensor.nbytes_there for s in plan.steps)
    bits = sum(s.stored_bits() for s in plan.quantized) / sum(s.tensor.numel for s in plan.quantized)
    totals = _pairs(
        "Totals",
        [
            ("architecture", plan.architecture),
            *remarks(plan),
            ("quantized modules", str(len(plan.quantized))),
            *_coverage(plan),
            ("bits per quantized weight", f"{bits:.2f}"),
            ("expected peak memory", _mb(memory)),
            ("size now", _mb(source)),
            ("size then", f"{_mb(plan.output_bytes())} ({times(source / plan.output_bytes())})"),
        ],
    )
    return [modules, *_kept_table(plan), totals]


def budget_tables(choice: Choice) -> list[Table]:
    """What a budget came to, and the curve of sizes and damages that it was chosen from."""
    from rich.table import Table

    found, counts = choice.allocation, Counter(choice.bits.values())
    spread = ", ".join(f"{n} of {bits}" for bits, n in sorted(counts.items()))
    rows = [
        ("asked for", f"{choice.bits_per_weight(choice.budget):.3f} bits a weight ({_mb(choice.budget)})"),
        ("reached", f"{choice.bits_per_weight(choice.nbytes):.3f} bits a weight ({_mb(choice.nbytes)})"),
        ("bits of modules", spread),
        ("expected damage", f"{found.damage:.4f}"),
        ("no choice has less than", f"{found.bound:.4f}"),
    ]
    measured = [f"{one.measured:.4f}" for one in choice.finalists if one.measured is not None]
    if measured:
        others = f"; others: {', '.join(measured[1:])}" if measured[1:] else ""
        rows.append(("measured, without calibration", f"{measured[0]}{others}"))
    if choice.measure != DIVERGENCE:
        rows.append(
            (
                "warning",
                f"the effect on predictions was not measured: damage is the {choice.measure} alone, which ranks "
                "kinds of modules poorly; compare with the original (`lowbit eval`), or --calibrate with text",
            )
        )
    curve = Table("bits a weight", "size", "expected damage", title=f"Least damage by size ({choice.measure})")
    points = choice.curve
    for bits, damage in points[:: max(1, len(points) // POINTS)]:
        curve.add_row(f"{bits:.2f}", _mb(round(bits * choice.weights / 8)), f"{damage:.4f}")
    return [curve, _pairs("Budget", rows)]


def block_table(blocks: Sequence[tuple[str, BlockResult]]) -> Table:
    """The error of what each block gives, after each step of its calibration."""
    from rich.table import Column, Table

    steps = list(dict.fromkeys(step for _, result in blocks for step in result.errors))
    table = Table(Column("block", no_wrap=True), *steps, title="Squared error of outputs, relative to their variance")
    for path, result in blocks:
        table.add_row(path, *(f"{result.errors[step]:.4f}" if step in result.errors else "" for step in steps))
    return table


def remarks_on_quality(done: Conversion) -> list[str]:
    """Warnings about a result that is poor, or was made with too little data."""
    lines = []
    if done.unseen:
        lines.append(
            f"Note: too little of the data reached {_some(done.unseen)}, or it is of a kind that is not calibrated: "
            "quantized as without data."
        )
    if done.unmeasured:
        lines.append(f"Note: how well it predicts was not measured: {done.unmeasured}. `lowbit eval` does that.")
    better = "take more bits, or --calibrate with text"
    if done.calibrated:
        better = "take more bits, more --samples, or a higher --effort"
    for bits, quality in done.quality.items():
        found, at = quality.after, "" if bits is None else f" at {bits} bits"
        if found.is_causal and found.mean_divergence > POOR:
            lines.append(
                f"Warning: a divergence of {found.mean_divergence:.2f} nats{at} is large, the model writes noticeably "
                f"worse; {better}."
            )
        if not found.is_causal and found.mean_cosine < POOR_COSINE:
            lines.append(
                f"Warning: a cosine of {found.mean_cosine:.3f}{at} is low; take more bits, more --samples, or another "
                "--effort."
            )
    return lines


def result_tables(done: Conversion) -> list[Table]:
    """Tables at the end of a conversion; what it comes to is the last."""
    from rich.table import Column, Table

    plan, outcomes, seconds = done.plan, done.outcomes, done.seconds
    kinds: dict[str, list[Outcome]] = defaultdict(list)
    for o in outcomes.values():
        kinds[kind_of(o.module.path)].append(o)
    columns = (Column("kind", no_wrap=True), "modules", "weights", "bits/weight", "relative error")
    errors = Table(*columns, title="Error by module kind")
    for kind, group in sorted(kinds.items()):
        weights = sum(o.module.numel for o in group)
        norm = sum(o.squared_norm for o in group)
        error = (sum(o.squared_error for o in group) / norm) ** 0.5 if norm else 0.0
        bits = 8 * sum(o.nbytes for o in group) / weights
        errors.add_row(kind, str(len(group)), f"{weights:,}", f"{bits:.2f}", f"{error:.4f}")
    worst = Table(Column("module", no_wrap=True), "relative error", title="Worst modules")
    for o in sorted(outcomes.values(), key=lambda o: -o.relative_error)[:WORST]:
        worst.add_row(o.module.path, f"{o.relative_error:.4f}")
    totals, rows = Totals.of(plan, outcomes), []
    rows.append(("quantized weights", f"{totals.weights:,}"))
    rows.append(("bits per quantized weight", f"{totals.bits_per_weight:.2f}"))
    rows.append(("tensor data", f"{_mb(totals.source_bytes)} -> {_mb(totals.output_bytes)} ({times(totals.ratio)})"))
    rows.extend(_coverage(plan))
    rows.extend(remarks(plan))
    rows.append(("relative error", f"{totals.relative_error:.4f}"))
    rows.append(("time", f"{seconds:.1f} s ({totals.weights / seconds / 1e6:.1f} M weights/s)"))
    if done.traffic is not None:
        rows.append(("fetched of the weights", str(done.traffic)))
    if lossless := [o for o in outcomes.values() if o.lossless]:
        why = f"as the release has them ({plan.release})" if plan.release else "lay on a grid already"
        rows.append(("stored without loss", f"{len(lossless)} modules {why}"))
    if widened := [o for o in outcomes.values() if o.widened]:
        rows.append(("wider scales", f"{len(widened)} modules, such as {widened[0].module.path}: {widened[0].widened}"))
    for precision, quality in done.quality.items():
        rows.extend(_quality(quality, precision, done.calibrated))
    return [errors, worst, *_kept_table(plan), _pairs("Result", rows)]


def _quality(quality: Quality, bits: int | None, calibrated: bool) -> list[tuple[str, str]]:
    """What the held-out data say, at a nested precision or (None) at full."""
    found, before = quality.after, quality.before
    if not found.tokens:
        return []
    at = "" if bits is None else f" at {bits} bits"
    rows, text = [], "held-out tokens" if calibrated else "tokens of a short text of our own"
    if found.is_causal:
        change = f"{found.reference_perplexity:.2f} -> {found.perplexity:.2f} ({found.tokens:,} {text})"
        rows = [
            (f"perplexity{at}", change),
            (f"divergence from the float model{at}", f"{found.mean_divergence:.4f} nats a token"),
            (f"same prediction{at}", f"{found.agreement:.1%} of the tokens"),
        ]
    else:
        samples = f"(mean of {found.tokens:,} held-out samples)"
        rows = [(f"cosine to the float model{at}", f"{found.mean_cosine:.4f} {samples}")]
    if before != found:
        what, old = ("divergence", before.mean_divergence) if found.is_causal else ("cosine", before.mean_cosine)
        rows.append((f"before scales were trained together{at}", f"{what} {old:.4f}"))
    return rows


def remarks(plan: Plan) -> list[tuple[str, str]]:
    """What is absent from the checkpoint, and what becomes of the files beside the weights."""
    rows = []
    if plan.release:
        taken = [s for s in plan.quantized if isinstance(s.target, Taken)]
        if plan.requantized:
            again = [s for s in plan.quantized if s.tensor.grid is not None and not isinstance(s.target, Taken)]
            rows.append(
                (
                    "second-hand",
                    f"{len(again)} modules are quantized anew from what the release ({plan.release}) decodes to; the "
                    "original checkpoint would give a better model",
                )
            )
        bits = sorted({s.module().scheme.bits for s in taken})
        width = " and ".join(map(str, bits))
        if taken:
            what = f"{len(taken)} modules of {width} bits are imported without loss, with their own grid"
            rows.append(("quantized by the release", f"{plan.release}: {what}"))
    if plan.unused:
        rows.append(("not needed, since activations stay floats", _some(plan.unused)))
    if plan.architecture != plan.named:
        rows.append(("converted as", f"{plan.architecture}, which is all of {plan.named} that the checkpoint has"))
    if plan.absent:
        rows.append(("absent from the checkpoint", _some(plan.absent)))
    if (large := _large_words(plan)) is not None:
        rows.append(large)
    if plan.strange:
        rows.append((f"unknown to {plan.architecture}, kept as they are", _some(plan.strange)))
    if plan.renamed:
        rows.append(("taken off names", plan.renamed))
    for old, new in plan.side.converted.items():
        rows.append(("converted to safetensors", f"{old} -> {new}"))
    if plan.side.without_code:
        rows.append(("without auto_map", _some(plan.side.without_code)))
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, reason in plan.side.left_out.items():
        reasons[reason].append(name)
    rows.extend(("left out", f"{_some(names)}: {reason}") for reason, names in reasons.items())
    return rows


def _large_words(plan: Plan) -> tuple[str, str] | None:
    """What fewer bits for embeddings and output head would give, where they are a large part of the file."""
    reasons = (EMBEDDING, TIED, HEAD)
    steps = [s for s in plan.steps if s.by_default or (s.target is None and s.reason.startswith(reasons))]
    nbytes, whole = sum(s.output_bytes() for s in steps), plan.output_bytes()
    if nbytes < LARGE * whole:
        return None
    fewer = WORDS if any(s.target is None for s in steps) else FEWER
    then = whole - nbytes + sum(replace(s, target=fewer).output_bytes() for s in steps)
    return (
        "embeddings and output head",
        f"{nbytes / whole:.0%} of the file; in {fewer.bits} bits, by a recipe, it would have {_mb(then)}",
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _coverage(plan: Plan) -> list[tuple[str, str]]:
    """Coverage of the matrices, and what became of embeddings and output head beside them."""

    def share(steps: list[Step]) -> str:
        total = sum(s.tensor.numel for s in steps)
        done = sum(s.tensor.numel for s in steps if s.target is not None)
        return f"{done:,} of {total:,} weights quantized"

    rows = [("coverage of matrices", f"{plan.coverage:.1%}")]
    for name, steps in (
        ("embeddings", [s for s in plan.steps if s.destination.kind == "embedding"]),
        ("output head", [s for s in plan.steps if s.destination.head and s.destination.kind in ("linear", "conv1d")]),
    ):
        if steps:
            rows.append((name, share(steps)))
    return rows


def _kept_table(plan: Plan) -> list[Table]:
    """Matrices left in full precision by kind, and why; no table if there are none."""
    from rich.table import Column, Table

    if not plan.kept():
        return []
    groups: dict[tuple[str, str], list[Step]] = defaultdict(list)
    for step in plan.kept():
        groups[kind_of(step.destination.path), step.reason].append(step)
    table = Table(Column("kind", no_wrap=True), "modules", "weights", "reason", title="Kept in full precision")
    for (kind, reason), steps in groups.items():
        table.add_row(kind, str(len(steps)), f"{sum(s.tensor.numel for s in steps):,}", reason)
    return [table]


def _pairs(title: str, rows: list[tuple[str, str]]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, show_header=False)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _scheme(step: Step) -> str:
    scheme = step.module().scheme
    group = f"group {scheme.group_size}" if scheme.group_size else "group row"
    nested = f", nested {' '.join(map(str, scheme.nested))}" if scheme.nested else ""
    imported = ", imported" if isinstance(step.target, Taken) else ""
    most = "at most " if scheme.row_bits else ""
    return f"{scheme.label or scheme.codec} {most}{scheme.bits} bits, {group}, {scheme.scale_dtype}{nested}{imported}"


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"
