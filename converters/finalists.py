"""Several allocations of one budget, of which the model itself is asked which one harms its predictions least.

An allocation adds up damages that were measured for one kind of modules at a time. Where they are large they do not
add up: what one module spoils, another cannot spoil again, or the other way round. So there are more finalists: with
damages to a power, which above 1 spreads bits more evenly and below 1 less, and with the same bits everywhere. So the
choice is not worse than those, as far as a short text says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .budget import Allocation, Option, allocate, improved

POWERS = (0.75, 1.5)


@dataclass(frozen=True)
class Finalist:
    """An allocation, and what the model says of it.

    Attributes:
        allocation: with the damage that was expected.
        measured: the divergence of the whole model; None if it was not measured.
    """

    allocation: Allocation
    measured: float | None = None


def best_first(found: Sequence[Allocation], measure: Callable[[Allocation], float] | None) -> list[Finalist]:
    """The finalists in the order of what `measure` gives; not numbers come last, and equals stay in their order."""
    if measure is None:
        return [Finalist(found[0])]
    measured = [Finalist(one, measure(one)) for one in found]
    return sorted(measured, key=lambda f: math.inf if f.measured is None or math.isnan(f.measured) else f.measured)


def finalists(items: Sequence[Sequence[Option]], bits: Sequence[Sequence[int]], budget: int) -> list[Allocation]:
    """The allocation of least damage, and others, without those that are equal.

    Args:
        items: the options of each.
        bits: of each option of each item.
        budget: most cost of all of them, at least the least cost.
    """
    best = allocate(items, budget)
    found = {best.chosen: best}
    bent = [[[o._replace(damage=o.damage**power) for o in each] for each in items] for power in POWERS]
    others = [list(allocate(one, budget).chosen) for one in bent]
    if (flat := _flat(items, bits, budget)) is not None:
        others.append(flat)
    for one in others:
        picked = [options[i] for options, i in zip(items, one, strict=True)]
        cost, damage = sum(o.cost for o in picked), float(sum(o.damage for o in picked))
        found.setdefault(tuple(one), replace(best, chosen=tuple(one), cost=cost, damage=damage))
    return list(found.values())


def _flat(items: Sequence[Sequence[Option]], bits: Sequence[Sequence[int]], budget: int) -> list[int] | None:
    """The most bits that all items can have, or what is next to it in their limits, and what is left over spent."""
    for most in sorted({b for each in bits for b in each}, reverse=True):
        chosen = [min(range(len(each)), key=lambda i: (abs(each[i] - most), each[i])) for each in bits]
        if sum(options[i].cost for options, i in zip(items, chosen, strict=True)) <= budget:
            return improved(items, chosen, budget)
    return None
