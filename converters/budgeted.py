"""Choose the bits of every module for a size: what a recipe leaves open is filled in, so that the damage is least."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BudgetError
from ..matrix import F32
from ..quantize import Target
from .budget import Allocation
from .candidates import MOST_BITS, PROBE, Candidate, by_rows, candidates, kind_of, targets
from .finalists import Finalist, best_first
from .items import Items
from .plan import Plan, Step, unsaid_words
from .recipe import Recipe, Rule
from .source import Source

if TYPE_CHECKING:
    from .sensitivity import Divergences  # imports torch

WORDS_LEAST = 4  # bits of embeddings and output heads, where the effect on predictions was not measured
DIVERGENCE, WEIGHTS, OUTPUTS = "divergence", "error of weights", "error of outputs"


@dataclass(frozen=True)
class Budget:
    """A size for the tensors of the whole file, parameters and what is not quantized included.

    Attributes:
        bits_per_weight: average of all weights of the model; or
        nbytes: bytes of all tensors. Just one of the two is given.
        fused_equal: layers that others fuse (query, key and value; gate and up) get the same bits.
        rows: single rows of a Linear or Conv1D may have more or fewer bits than others.
    """

    bits_per_weight: float | None = None
    nbytes: int | None = None
    fused_equal: bool = False
    rows: bool = False

    def __post_init__(self) -> None:
        if self.fused_equal and self.rows:
            raise BudgetError("layers that others fuse cannot have bits for each row: leave fused_equal or rows out")
        if (self.bits_per_weight is None) == (self.nbytes is None):
            raise BudgetError("a budget has either bits_per_weight or nbytes, give just one of them")
        if not 0 < (self.bits_per_weight or self.nbytes or 0) < 2**60:
            raise BudgetError(f"the budget is {self.bits_per_weight or self.nbytes or 0}, expected a number above 0")

    def of(self, weights: int) -> int:
        """In bytes, for a model of so many weights."""
        return int(self.bits_per_weight * weights / 8) if self.bits_per_weight is not None else self.nbytes or 0


@dataclass(frozen=True)
class Choice:
    """What was chosen for a budget.

    Attributes:
        recipe: which makes it: a rule for every module whose bits were open.
        bits: those of these modules, by path; of rows that differ, the most.
        weights: of the model, in all tensors.
        fixed: bytes of what is not open.
        budget: in bytes, of all tensors.
        finalists: allocations of the bytes beyond `fixed`, of which the first was chosen.
        measure: what damage is: DIVERGENCE, or the relative squared error of WEIGHTS or OUTPUTS, summed over modules.
    """

    recipe: Recipe
    bits: dict[str, int]
    weights: int
    fixed: int
    budget: int
    finalists: tuple[Finalist, ...]
    measure: str

    @property
    def allocation(self) -> Allocation:
        """The one that was chosen."""
        return self.finalists[0].allocation

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.fixed + self.allocation.cost

    def bits_per_weight(self, nbytes: int) -> float:
        """Of a file of so many bytes."""
        return 8 * nbytes / self.weights

    @property
    def curve(self) -> list[tuple[float, float]]:
        """Bits a weight of the whole file, and the damage that is expected at them."""
        return [(self.bits_per_weight(self.fixed + cost), damage) for cost, damage in self.allocation.curve]

    def to_dict(self) -> dict[str, Any]:
        """For ``conversion_report.json``: sizes in bits a weight of the whole file; damages as :mod:`.candidates`."""
        return {
            "target": self.bits_per_weight(self.budget),
            "reached": self.bits_per_weight(self.nbytes),
            "damage": self.allocation.damage,
            "lower_bound": self.allocation.bound,
            "measure": self.measure,
            "finalists": [[one.allocation.damage, one.measured] for one in self.finalists],
            "curve": [list(point) for point in self.curve],
        }


@dataclass(frozen=True)
class _Open:
    """A module whose bits are open."""

    step: Step
    targets: list[Target]


def choose_bits(
    source: Source,
    plan: Plan,
    recipe: Recipe,
    budget: Budget,
    importances: Mapping[str, F32] | None = None,
    divergences: Divergences | None = None,
    report: Callable[[Step, int], None] = lambda step, total: None,
    shares: Mapping[str, NDArray[np.float64]] | None = None,
) -> Choice:
    """Choose the bits of all modules that a recipe leaves open.

    Without `divergences`, embeddings and output heads get at least WORDS_LEAST bits, where no rule says otherwise:
    their error counts as that of any matrix then, and a large table of few bits would seem a good choice.

    Open is what neither a rule nor a target for ``embeddings`` or ``lm_head`` decides, and what a rule with
    ``at_least`` or ``at_most`` is for. A codebook has the bits of its table.

    Args:
        source: the checkpoint.
        plan: of a conversion by `recipe`.
        recipe: the codec and all else but the bits; the modules to keep.
        budget: the size.
        importances: of columns by path, with data; see :mod:`.importance`.
        divergences: of the model with some of its modules quantized; None: all modules count the same.
        report: called after the candidates of each open module with its step and the number of all.
        shares: of rows in the damage of their module, by path, see :mod:`.row_shares`: these rows may differ.

    Raises:
        BudgetError: it is less than the least, nothing is open, or layers to fuse have no bits in common.
    """
    weights = sum(s.tensor.numel for s in plan.steps)
    wanted = budget.of(weights)
    words_least = 1 if divergences is not None else WORDS_LEAST
    found = [one for step in plan.quantized if (one := _open(step, plan, recipe, words_least)) is not None]
    if not found:
        raise BudgetError(
            "no module has bits to choose: the recipe's rules say all of them, or they come from a codebook's table"
        )
    paths = {one.step.path for one in found}
    fixed = sum(step.output_bytes() for step in plan.steps if step.target is None or step.path not in paths)
    options: dict[str, list[Candidate]] = {}
    for one in found:
        weighed = None if importances is None else importances.get(one.step.path)
        options[one.step.path] = candidates(source, one.step, one.targets, weighed)
        report(one.step, len(found))
    measured = {} if divergences is None else divergences.by_kind(_probes(options))
    if divergences is not None and not measured:  # then words need their least
        return choose_bits(source, plan, recipe, budget, importances, None, report, shares)
    options = _in_nats(options, measured)
    for one in found:
        if shares is not None and (own := shares.get(one.step.path)) is not None:
            options[one.step.path] += by_rows(one.step, options[one.step.path], own)
    items = Items(options, fused_equal=budget.fused_equal)
    if wanted < fixed + items.least:
        raise BudgetError(_too_small(weights, wanted, fixed, items.least, plan))

    def measure_whole(allocation: Allocation) -> float:
        lossy = {path: c.target for path, c in items.chosen(allocation).items() if c.damage > 0}
        return divergences.with_targets(lossy) if divergences is not None else math.nan

    allocations = items.allocations(wanted - fixed)
    asked = divergences is not None and divergences.tells(allocations[0].damage)
    ranked = best_first(allocations, measure_whole if asked else None)
    chosen = items.chosen(ranked[0].allocation)
    targets_of = {path: c.target for path, c in chosen.items()}
    bits = {path: c.bits for path, c in chosen.items()}
    measure = DIVERGENCE if measured else WEIGHTS if importances is None else OUTPUTS
    return Choice(_filled_in(recipe, plan, targets_of), bits, weights, fixed, wanted, tuple(ranked), measure)


def _probes(options: Mapping[str, Sequence[Candidate]]) -> dict[str, Target]:
    """The target of each module with which the divergence is measured: of PROBE bits, or near that.

    Modules that are stored without loss are not there.
    """
    probes = {path: _probe(found) for path, found in options.items()}
    return {path: probe.target for path, probe in probes.items() if probe.damage > 0}


def _probe(found: Sequence[Candidate]) -> Candidate:
    return min(found, key=lambda c: (c.damage == 0, abs(c.bits - PROBE), c.bits))


def _in_nats(options: Mapping[str, Sequence[Candidate]], measured: Mapping[str, float]) -> dict[str, list[Candidate]]:
    """Damages as divergences: those of each kind by the factor that was measured for it.

    Without a measurement nothing changes; a kind that did no harm counts as the one that did least.
    """
    harm: dict[str, float] = defaultdict(float)
    for path, found in options.items():
        harm[kind_of(path)] += _probe(found).damage
    factors = {kind: nats / harm[kind] for kind, nats in measured.items() if harm[kind] > 0}
    least = min(factors.values(), default=1.0)
    return {
        path: [replace(c, damage=c.damage * factors.get(kind_of(path), least)) for c in found]
        for path, found in options.items()
    }


def _open(step: Step, plan: Plan, recipe: Recipe, words_least: int) -> _Open | None:
    """The targets that a module can have; None if there is nothing to choose.

    Embeddings and output heads have at least `words_least` bits, unless a rule sets other limits.
    """
    target = step.to_fit
    if target is None or target.codec == "codebook" or target.row_bits is not None:
        return None
    least = words_least if _is_words(step) else 1
    places = _places(step, plan)
    rule = next((rule for place in places if (rule := recipe.rule_for(place)) is not None), None)
    if rule is not None:
        if not rule.is_open:
            return None
        most = rule.at_most or MOST_BITS
        return _Open(step, targets(target, rule.at_least or min(least, most), most))
    if step.by_default:
        return _Open(step, targets(unsaid_words(recipe), least, MOST_BITS, words=True))
    if _is_said(step, target, recipe):
        return None
    is_default = replace(target, recognise=recipe.default.recognise) == recipe.default  # --requantize sets that
    return _Open(step, targets(target, least, MOST_BITS)) if is_default else None


def _is_words(step: Step) -> bool:
    """Whether it is an embedding or an output head."""
    return step.destination.kind == "embedding" or step.destination.head


def _is_said(step: Step, target: Target, recipe: Recipe) -> bool:
    """Whether the recipe gives an embedding or an output head a target of its own, be it equal to the default."""
    if not _is_words(step):
        return False
    said = [value for value in (recipe.embeddings, recipe.lm_head) if value is not None]
    is_there = any(isinstance(s, Target) and replace(target, recognise=s.recognise) == s for s in said)
    return is_there and True not in said


def _places(step: Step, plan: Plan) -> list[str]:
    return [step.path, *(place for place, owner in plan.tied.items() if owner == step.path)]


def _too_small(weights: int, wanted: int, fixed: int, least: int, plan: Plan) -> str:
    def size(nbytes: int) -> str:
        return f"{8 * nbytes / weights:.3f} bits a weight ({nbytes / 1e6:,.3f} MB)"

    kept = sum(s.tensor.nbytes for s in plan.steps if s.target is None)
    return (
        f"the budget is {size(wanted)}, and the least is {size(fixed + least)}, of which {kept / 1e6:,.3f} MB are kept "
        f"in full precision and {(fixed - kept) / 1e6:,.3f} MB have bits that rules say; take at least that, keep "
        "less, or take larger groups (--group-size)"
    )


def _filled_in(recipe: Recipe, plan: Plan, chosen: Mapping[str, Target]) -> Recipe:
    """The recipe with a rule for each module that was open, in the place of the rules that left it so."""
    own = tuple(Rule(re.sub(r"([*?[])", r"[\1]", path), target) for path, target in chosen.items())
    return replace(recipe, rules=(*own, *(rule for rule in recipe.rules if not rule.is_open)))
