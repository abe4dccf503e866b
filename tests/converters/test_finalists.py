"""Finalists of an allocation: each within the budget, the first of the least damage, the same bits among them."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from lowbit_format.converters.budget import Option, allocate, least_cost
from lowbit_format.converters.finalists import best_first, finalists

BITS = (4, 3, 2, 1)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[Option]], int]:
    """Items of 4 to 1 bits, and a budget between the least and the most."""
    items = []
    for _ in range(draw(st.integers(1, 6))):
        size, harm = draw(st.integers(1, 50)), draw(st.floats(1e-6, 10))
        items.append([Option(size * bits, harm * 4.0**-bits) for bits in BITS])
    least, most = least_cost(items), sum(options[0].cost for options in items)
    return items, draw(st.integers(least, most))


@given(problems())
def test_finalists_keep_the_budget(problem: tuple[list[list[Option]], int]) -> None:
    items, budget = problem
    found = finalists(items, [BITS] * len(items), budget)
    assert found[0] == allocate(items, budget)
    assert len({one.chosen for one in found}) == len(found)
    for one in found:
        picked = [options[i] for options, i in zip(items, one.chosen, strict=True)]
        assert one.cost == sum(option.cost for option in picked) <= budget
        assert one.damage == sum(option.damage for option in picked) >= found[0].bound
    flat = max(b for b in BITS if sum(options[4 - b].cost for options in items) <= budget)
    assert any(all(BITS[i] >= flat for i in one.chosen) for one in found)


def test_the_least_divergence_comes_first_and_what_is_no_number_last() -> None:
    harms = ((9, 1.0), (1, 9.0), (5, 0.1), (7, 2.0), (3, 0.01), (8, 0.3))
    items = [[Option(bits * size, 4.0**-bits * harm) for bits in BITS] for size, harm in harms]
    found = finalists(items, [BITS] * len(items), 80)
    assert len(found) > 2
    values = iter([2.0, math.nan, 1.0, *([3.0] * len(found))])
    ranked = best_first(found, lambda one: next(values))
    assert [one.allocation for one in ranked[:2]] == [found[2], found[0]]
    assert math.isnan(ranked[-1].measured or 0.0)
    assert best_first(found, None)[0].measured is None
    assert [one.allocation for one in best_first(found, lambda one: 1.0)] == found
