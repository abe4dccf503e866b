"""What a budget of bits chooses for: single modules, or groups of modules that have to have the same bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import BudgetError
from .budget import Allocation, Option
from .candidates import Candidate
from .finalists import finalists

# Layers that kernels and servers such as vLLM make one of: names of the last part of their paths.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


class Items:
    """The items of an allocation.

    Args:
        options: candidates of each module, by path.
        fused_equal: layers that others fuse are one item.

    Attributes:
        least: bytes of the cheapest choice.

    Raises:
        BudgetError: layers to fuse have no bits in common.
    """

    def __init__(self, options: Mapping[str, Sequence[Candidate]], *, fused_equal: bool) -> None:
        self._groups = _groups(list(options)) if fused_equal else [[path] for path in options]
        self._ways = [_ways(group, options) for group in self._groups]
        self.least = sum(min(option.cost for option, _ in ways) for ways in self._ways)

    def allocations(self, budget: int) -> list[Allocation]:
        """Allocations of at most so many bytes, that of the least damage first; see :func:`.finalists.finalists`."""
        bits = [[own[0].bits for _, own in ways] for ways in self._ways]
        return finalists([[option for option, _ in ways] for ways in self._ways], bits, budget)

    def chosen(self, allocation: Allocation) -> dict[str, Candidate]:
        """What an allocation makes of each module, by path."""
        found: dict[str, Candidate] = {}
        for group, ways, i in zip(self._groups, self._ways, allocation.chosen, strict=True):
            found |= zip(group, ways[i][1], strict=True)
        return found


def _groups(paths: Sequence[str]) -> list[list[str]]:
    """Paths in their order, those of layers that others fuse together."""
    found: dict[tuple[str, int], list[str]] = {}
    for n, path in enumerate(paths):
        parent, _, name = path.rpartition(".")
        kind = next((i for i, names in enumerate(FUSED) if name in names), None)
        found.setdefault((path, n) if kind is None else (parent, -1 - kind), []).append(path)
    return list(found.values())


def _ways(
    group: Sequence[str], options: Mapping[str, Sequence[Candidate]]
) -> list[tuple[Option, tuple[Candidate, ...]]]:
    """The options of modules that have the same bits, and what each of them is then."""
    if len(group) == 1:
        return [(Option(c.nbytes, c.damage), (c,)) for c in options[group[0]]]
    by_bits = [{c.bits: c for c in sorted(options[path], key=lambda c: -c.damage)} for path in group]
    common = sorted(set.intersection(*(set(each) for each in by_bits)), reverse=True)
    if not common:
        raise BudgetError(
            f"{', '.join(group)}: are to have the same bits, and the limits that rules set them have no number in "
            "common; leave --fused-equal out, or change these rules"
        )
    found = []
    for bits in common:
        own = tuple(each[bits] for each in by_bits)
        found.append((Option(sum(c.nbytes for c in own), sum(c.damage for c in own)), own))
    return found
