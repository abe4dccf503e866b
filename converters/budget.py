"""How to spend a budget: one option for each item, so that costs stay within it and the damage is least.

Pure numbers: an item is a list of options, each with a cost (an integer, such as bytes) and a damage. This is the
multiple-choice knapsack problem (Sinha and Zoltners 1979). It is solved by dynamic programming over the cost beyond the
least, in units of the costs' common divisor, and exact. Where these are too many, it takes larger units, to which costs
are rounded up; then the steps along the convex hulls of the items, largest gain for its cost first, are tried beside
it, and what is left over is spent by a local search. So a budget is never overrun, and the whole curve of least damage
by cost comes with it. The Lagrangian bound says how far from the optimum the result can be.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

UNITS = 1 << 13  # at most, into which costs are divided: 200 items of 8 options take a tenth of a second


class Option(NamedTuple):
    """A way to store an item.

    Attributes:
        cost: an integer >= 0.
        damage: >= 0; damages of items add up.
    """

    cost: int
    damage: float


@dataclass(frozen=True)
class Allocation:
    """The options that were chosen.

    Attributes:
        chosen: index of the option of each item.
        cost, damage: of them together.
        bound: no choice within the budget has less damage than this (the Lagrangian bound).
        curve: pairs of a cost and of a damage that can be had for it, in ascending order of cost, up to the most that
            any choice costs.
    """

    chosen: tuple[int, ...]
    cost: int
    damage: float
    bound: float
    curve: tuple[tuple[int, float], ...]


def least_cost(items: Sequence[Sequence[Option]]) -> int:
    """What the cheapest choice costs."""
    return sum(min(option.cost for option in options) for options in items)


def allocate(items: Sequence[Sequence[Option]], budget: int, *, units: int = UNITS) -> Allocation:
    """Choose an option of each item, of least damage within a budget.

    Args:
        items: the options of each; at least one.
        budget: most cost of all of them, at least :func:`least_cost`.
        units: into how many the range of costs is divided at most.

    Raises:
        ValueError: the budget is less than the least cost.
    """
    base, most = least_cost(items), sum(max(option.cost for option in options) for options in items)
    if budget < base:
        raise ValueError(f"the budget is {budget}, less than the least cost {base}")
    above = [[option.cost - min(o.cost for o in options) for option in options] for options in items]
    common = math.gcd(*(cost for costs in above for cost in costs)) or 1
    unit = max(common, -(-(most - base) // units))
    size = -(-(most - base) // unit) + 1
    best, taken = _tables(items, [[-(-cost // unit) for cost in costs] for costs in above], size)
    starts = [_read(taken, above, unit, min(size - 1, (budget - base) // unit))]
    if unit > common:
        starts.append(_by_hulls(items, budget))
    found = [improved(items, chosen, budget) for chosen in starts]
    chosen = min(found, key=lambda chosen: sum(o[i].damage for o, i in zip(items, chosen, strict=True)))
    picked = [options[i] for options, i in zip(items, chosen, strict=True)]
    damage = float(sum(option.damage for option in picked))
    bound = min(damage, lower_bound(items, budget))
    curve = tuple((base + int(k) * unit, float(best[k])) for k in np.unique(np.linspace(0, size - 1, 65).astype(int)))
    return Allocation(tuple(chosen), sum(option.cost for option in picked), damage, bound, curve)


def lower_bound(items: Sequence[Sequence[Option]], budget: int) -> float:
    """Less damage is impossible: the largest Lagrangian bound, sum of min(damage + m * cost) - m * budget over m >= 0.

    It is the damage of the best mixture of options, which has fractions of them where the optimum may not.
    """
    hulls = [lower_hull(options) for options in items]
    damage, left = sum(hull[0].damage for hull in hulls), float(budget - sum(hull[0].cost for hull in hulls))
    steps = [(b.cost - a.cost, a.damage - b.damage) for hull in hulls for a, b in itertools.pairwise(hull)]
    for cost, gain in sorted(steps, key=lambda step: -step[1] / step[0]):
        part = min(1.0, left / cost)
        if part <= 0:
            break
        damage, left = damage - part * gain, left - part * cost
    return damage


def lower_hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of damage over cost, of falling damage, cheapest first."""
    hull = list[Option]()
    for option in sorted(options):
        if hull and (option.cost == hull[-1].cost or option.damage >= hull[-1].damage):
            continue
        while len(hull) > 1 and _slope(hull[-2], option) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _slope(a: Option, b: Option) -> float:
    return (b.damage - a.damage) / (b.cost - a.cost)


def _tables(
    items: Sequence[Sequence[Option]], costs: Sequence[Sequence[int]], size: int
) -> tuple[NDArray[np.float64], NDArray[np.uint16]]:
    """Least damage for each number of units, and of each item the option that it takes there."""
    best = np.zeros(size)
    taken = np.zeros((len(items), size), np.uint16)
    for n, (options, units) in enumerate(zip(items, costs, strict=True)):
        new = np.full(size, np.inf)
        for i, (option, cost) in enumerate(zip(options, units, strict=True)):
            with_it = best[: size - cost] + option.damage
            better = with_it < new[cost:]
            new[cost:][better] = with_it[better]
            taken[n, cost:][better] = i
        best = new
    return best, taken


def _read(taken: NDArray[np.uint16], above: Sequence[Sequence[int]], unit: int, units: int) -> list[int]:
    """The options that lead to a number of units."""
    chosen = list[int]()
    for choices, costs in zip(taken[::-1], above[::-1], strict=True):
        i = int(choices[units])
        chosen.append(i)
        units -= -(-costs[i] // unit)
    return chosen[::-1]


def _by_hulls(items: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """The options that the steps along the hulls lead to, of which those are taken that the budget allows."""
    hulls = [lower_hull(options) for options in items]
    at, left = [0] * len(items), budget - sum(hull[0].cost for hull in hulls)
    steps = [(_slope(a, b), n, k) for n, hull in enumerate(hulls) for k, (a, b) in enumerate(itertools.pairwise(hull))]
    for _, n, k in sorted(steps):  # the hull is convex: the steps of an item come in their order
        cost = hulls[n][k + 1].cost - hulls[n][k].cost
        if at[n] == k and cost <= left:
            at[n], left = k + 1, left - cost
    return [list(options).index(hull[k]) for options, hull, k in zip(items, hulls, at, strict=True)]


def improved(items: Sequence[Sequence[Option]], chosen: list[int], budget: int) -> list[int]:
    """Spend what rounding has left over: again and again the change of one item that gains most for its cost."""
    left = budget - sum(options[i].cost for options, i in zip(items, chosen, strict=True))
    while True:
        best: tuple[float, int, int] | None = None
        for n, options in enumerate(items):
            now = options[chosen[n]]
            for i, option in enumerate(options):
                cost, gain = option.cost - now.cost, now.damage - option.damage
                if cost <= left and (gain > 0 or (gain == 0 and cost < 0)):
                    rate = math.inf if cost <= 0 else gain / cost
                    if best is None or rate > best[0]:
                        best = rate, n, i
        if best is None:
            return chosen
        _, n, i = best
        left -= items[n][i].cost - items[n][chosen[n]].cost
        chosen[n] = i
