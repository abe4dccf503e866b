"""The allocation of a budget: never overrun, exact where units allow, and between the bound and brute force."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit_format.converters.budget import Option, allocate, least_cost, lower_bound

options = st.builds(Option, st.integers(0, 40), st.floats(0, 100, allow_subnormal=False))
problems = st.lists(st.lists(options, min_size=1, max_size=4), min_size=1, max_size=5)


def best(items: list[list[Option]], budget: int) -> float:
    """By trying everything."""
    choices = itertools.product(*items)
    return min(sum(o.damage for o in choice) for choice in choices if sum(o.cost for o in choice) <= budget)


@given(problems, st.integers(0, 200))
def test_it_is_the_best_of_all_choices(items: list[list[Option]], more: int) -> None:
    budget = least_cost(items) + more
    found = allocate(items, budget)
    picked = [options[i] for options, i in zip(items, found.chosen, strict=True)]
    assert found.cost == sum(o.cost for o in picked) <= budget
    assert found.damage == pytest.approx(sum(o.damage for o in picked))
    assert found.damage == pytest.approx(best(items, budget))
    assert found.bound <= found.damage


@given(problems, st.integers(0, 200), st.integers(1, 6))
def test_in_rough_units_it_stays_within_the_budget_and_above_the_bound(
    items: list[list[Option]], more: int, units: int
) -> None:
    budget = least_cost(items) + more
    found = allocate(items, budget, units=units)
    assert found.cost <= budget
    assert lower_bound(items, budget) <= best(items, budget) + 1e-9
    assert found.damage >= best(items, budget) - 1e-9
    for cost, damage in found.curve:
        assert damage >= best(items, cost) - 1e-9


def test_the_curve_has_the_damage_of_every_cost() -> None:
    items = [[Option(1, 8.0), Option(2, 2.0), Option(3, 0.5)], [Option(10, 4.0), Option(12, 1.0)]]
    found = allocate(items, 13)
    assert found.curve == ((11, 12.0), (12, 6.0), (13, 4.5), (14, 3.0), (15, 1.5))
    assert (found.chosen, found.cost, found.damage) == ((2, 0), 13, 4.5)
    assert found.bound == pytest.approx(4.5)


def test_many_items_are_near_the_bound() -> None:
    items = [[Option((7 + n % 5) * b * 1009, (1 + n % 13) * 4.0**-b) for b in range(1, 9)] for n in range(200)]
    budget = least_cost(items) * 3
    found = allocate(items, budget)
    assert found.cost <= budget
    assert found.bound <= found.damage < 1.01 * found.bound


def test_less_than_the_least_is_refused() -> None:
    with pytest.raises(ValueError, match="the budget is 2, less than the least cost 3"):
        allocate([[Option(3, 1.0), Option(4, 0.0)]], 2)
