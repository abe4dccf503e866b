"""Arithmetic on task bundles: sums are those of exact numbers, rounded; what cannot be added says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lowbit_format.container.reader import ModelReader
from lowbit_format.container.writer import StoredTensor
from lowbit_format.errors import BundleError, FingerprintError
from lowbit_format.tasks.arithmetic import compare_bundles, merge_bundles, same_saved, total_difference
from lowbit_format.tasks.bundle import TaskBundle, read_bundle, write_bundle
from lowbit_format.tasks.bundle_config import TaskConfig
from lowbit_format.tasks.matching import check_applies
from lowbit_format.tasks.operations import OPERATIONS
from lowbit_format.testing.vectors import VECTORS, assert_same_bits

ALL_DELTAS = VECTORS / "bundles" / "valid" / "all-deltas" / "bundle"
CONFIG = TaskConfig("ab" * 32, base_model_name_or_path="user/base", revision="v1")
SHAPES = {  # of the largest delta that each module takes
    "layers.0.fc.scales.mul": (3, 4),
    "layers.0.fc.offsets.add": (4, 2),
    "layers.1.fc.scales.add": (3, 2, 2),
    "layers.1.up.zeros.add": (3, 1),
    "experts.w.scales.mul": (2, 3, 2),
}
PLANES = {"layers.0.fc.scales.mul": 0, "layers.1.fc.scales.add": 0, "experts.w.scales.mul": 1}  # name -> axis
ANY = st.floats(width=32, allow_nan=False, allow_infinity=False)
WEIGHTS = st.floats(-4, 4)


@st.composite
def bundles(draw: st.DrawFn, elements: st.SearchStrategy[float] = ANY) -> TaskBundle:
    """A bundle of some of the modules, with some of the planes."""
    deltas = {}
    for name in draw(st.sets(st.sampled_from(sorted(SHAPES)), min_size=1)):
        shape = list(SHAPES[name])
        if name in PLANES:
            shape[PLANES[name]] = draw(st.integers(1, 3))
        deltas[name] = draw(hnp.arrays(np.float32, tuple(shape), elements=elements))
    return TaskBundle(CONFIG, deltas)


def bundle(name: str = "fc.scales.mul", values: object = ((0.5, -0.25),), **config: object) -> TaskBundle:
    """One delta."""
    return TaskBundle(replace(CONFIG, **config), {name: np.array(values, np.float32)})


def with_saved(found: TaskBundle, value: float) -> TaskBundle:
    tensor = StoredTensor("classifier.weight", "F32", (1,), np.array([value], "<f4"))
    return TaskBundle(replace(found.config, modules_to_save=("classifier",)), found.deltas, (tensor,))


def same(a: TaskBundle, b: TaskBundle) -> None:
    assert set(a.deltas) == set(b.deltas)
    for name, delta in a.deltas.items():
        assert_same_bits(delta, b.deltas[name])


# --- sums ------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(bundles())
def test_one_bundle_with_weight_one_stays_as_it_is(found: TaskBundle) -> None:
    same(merge_bundles([found], [1.0]), found)
    same(merge_bundles([found]), found)


def test_signs_of_zero_and_the_smallest_numbers_survive() -> None:
    found = bundle(values=((-0.0, 1e-45),))
    same(merge_bundles([found], [1.0]), found)
    same(merge_bundles([found, found], [0.5, 0.5]), found)


@settings(max_examples=60, deadline=None)
@given(bundles(), st.integers(2, 5))
def test_the_mean_of_equal_bundles_is_that_bundle(found: TaskBundle, n: int) -> None:
    same(merge_bundles([found, found], [0.5, 0.5]), found)
    same(merge_bundles([found] * n), found)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 4))
def test_sums_are_those_of_exact_numbers_rounded_once(data: st.DataObject, n: int) -> None:
    elements = st.floats(-(2.0**100), 2.0**100, width=32)
    parts = data.draw(st.lists(bundles(elements), min_size=n, max_size=n))
    weights = data.draw(st.lists(WEIGHTS, min_size=n, max_size=n))
    merged = merge_bundles(parts, weights)
    assert set(merged.deltas) == {name for part in parts for name in part.deltas}
    for name, delta in merged.deltas.items():
        assert delta.dtype == np.float32
        for index in np.ndindex(delta.shape):
            terms = [Fraction(w) * entry(part, name, index) for w, part in zip(weights, parts, strict=True)]
            slack = sum(map(abs, terms), Fraction(0)) * n / 2**52 + Fraction(1, 2**149)
            assert abs(Fraction(float(delta[index])) - sum(terms)) <= abs(sum(terms)) / 2**23 + slack


def entry(part: TaskBundle, name: str, index: tuple[int, ...]) -> Fraction:
    """A delta's value; 0 where the bundle has none."""
    delta = part.deltas.get(name)
    inside = delta is not None and all(i < n for i, n in zip(index, delta.shape, strict=True))
    return Fraction(float(delta[index])) if delta is not None and inside else Fraction(0)


@settings(max_examples=60, deadline=None)
@given(bundles(st.floats(-1, 1, width=16)), bundles(st.floats(-1, 1, width=16)))
def test_the_order_of_bundles_does_not_matter_where_nothing_is_rounded(a: TaskBundle, b: TaskBundle) -> None:
    one, two = merge_bundles([a, b], [0.5, 2.0]), merge_bundles([b, a], [2.0, 0.5])
    assert list(one.deltas) == list(two.deltas) == sorted(one.deltas)
    for name, delta in one.deltas.items():
        np.testing.assert_array_equal(delta, two.deltas[name])


@pytest.mark.parametrize("name", sorted(PLANES))
def test_planes_that_one_bundle_leaves_alone_count_as_zero(name: str) -> None:
    """TSK-7: by hand, with two planes and one."""
    axis, shape = PLANES[name], list(SHAPES[name])
    shape[axis] = 2
    two, one = np.full(shape, 4, np.float32), np.full(np.delete(shape, axis), 1, np.float32)
    parts = [TaskBundle(CONFIG, {name: two}), TaskBundle(CONFIG, {name: np.expand_dims(one, axis)})]
    found = merge_bundles(parts, [1, 10]).deltas[name]
    assert found.shape == two.shape
    assert np.all(np.take(found, 0, axis) == 14)
    assert np.all(np.take(found, 1, axis) == 4)


def test_the_inputs_stay_as_they_are() -> None:
    part = bundle()
    before = part.deltas["fc.scales.mul"].tobytes()
    merged = merge_bundles([part, part], [1, 1])
    assert part.deltas["fc.scales.mul"].tobytes() == before
    assert not np.shares_memory(merge_bundles([part], [1]).deltas["fc.scales.mul"], part.deltas["fc.scales.mul"])
    assert merged.deltas["fc.scales.mul"].tolist() == [[1.0, -0.5]]


def test_a_merged_bundle_applies_to_its_base(tmp_path: Path) -> None:
    found = read_bundle(ALL_DELTAS)
    merged = merge_bundles([found, found], [0.75, 0.25])
    write_bundle(tmp_path, merged)
    again = read_bundle(tmp_path)
    check_applies(again, ModelReader(VECTORS / "valid" / "bundle-base" / "model"))
    same(again, found)
    assert again.config == replace(found.config, method="merge")
    assert {name.split(".", name.count(".") - 1)[-1] for name in again.deltas} == set(OPERATIONS)


def test_the_base_is_named_by_the_first_bundle_that_knows_it() -> None:
    unnamed = bundle(base_model_name_or_path=None, revision="of nothing")
    config = merge_bundles([unnamed, bundle(revision="v1"), bundle(revision="v2")]).config
    assert (config.base_model_name_or_path, config.revision) == ("user/base", "v1")


# --- what cannot be added --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "kind", "rule", "parts"),
    [
        ({"base_fingerprint": "cd" * 32}, FingerprintError, "MAT-1", ["ab" * 32, "cd" * 32, "other/base"]),
        ({"bits": 2}, BundleError, "MAT-3", ["the base's own bits", "2 bits"]),
    ],
)
def test_bundles_of_different_bases_are_refused(
    changes: dict[str, object], kind: type[BundleError], rule: str, parts: list[str]
) -> None:
    with pytest.raises(kind) as caught:
        merge_bundles([bundle(), bundle(), bundle(base_model_name_or_path="other/base", **changes)])
    assert caught.value.rule == rule
    for part in ["bundle 0", "bundle 2", "user/base", *parts]:
        assert part in str(caught.value)


def test_bundles_of_different_heads_are_refused() -> None:
    """MAT-2: a bundle alone does not say which of its deltas are the head's."""
    parts = [bundle(), bundle(head_fingerprint="11" * 32), bundle(head_fingerprint="22" * 32)]
    with pytest.raises(FingerprintError, match=f"bundle 1.*{'11' * 32}.*bundle 2.*{'22' * 32}") as caught:
        merge_bundles(parts)
    assert caught.value.rule == "MAT-2"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_bundle_without_a_head_goes_with_any(order: Sequence[int]) -> None:
    parts = [bundle(), bundle(head_fingerprint="11" * 32)]
    assert merge_bundles([parts[i] for i in order]).config.head_fingerprint == "11" * 32


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_multiplied_and_added_scales_of_one_module_are_refused(order: Sequence[int]) -> None:
    parts = [bundle("fc.scales.mul"), bundle("fc.scales.add", (((0.5,), (1,)),))]
    mul, add = order
    with pytest.raises(
        BundleError, match=rf"'fc': bundle {mul} has scales\.mul.*bundle {add} has scales\.add"
    ) as caught:
        merge_bundles([parts[i] for i in order])
    assert caught.value.rule == "TSK-9"
    others = [bundle("fc.scales.mul"), bundle("up.scales.add", (((0.5,), (1,)),))]
    assert set(merge_bundles(others).deltas) == {"fc.scales.mul", "up.scales.add"}


@pytest.mark.parametrize(
    ("name", "a", "b"),
    [
        ("fc.scales.mul", (1, 2), (1, 3)),
        ("fc.scales.mul", (1, 2), (1, 1, 2)),
        ("fc.scales.mul", (2, 1, 2), (3, 1, 2)),
        ("fc.scales.add", (1, 2, 1), (1, 2, 2)),
        ("fc.offsets.add", (1, 2), (2, 2)),
    ],
)
def test_shapes_that_differ_in_more_than_planes_are_refused(name: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    parts = [bundle(name, np.ones(shape)) for shape in (a, b)]
    for refused in (lambda: merge_bundles(parts), lambda: compare_bundles(*parts), lambda: total_difference(*parts)):
        with pytest.raises(BundleError) as caught:
            refused()
        assert caught.value.rule == "TSK-7"
        assert all(str(list(shape)) in str(caught.value) for shape in (a, b))


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0], [1.0, float("nan")], [float("inf"), 1.0]])
def test_weights_must_be_a_finite_number_for_each(weights: list[float]) -> None:
    with pytest.raises(BundleError, match="expected 2 finite numbers"):
        merge_bundles([bundle(), bundle()], weights)


def test_a_sum_beyond_float32_names_the_tensor() -> None:
    big = bundle(values=((3e38, 0.0),))
    with pytest.raises(BundleError, match=r"'fc\.scales\.mul': the weighted sum is too large") as caught:
        merge_bundles([big, big], [1, 1])
    assert caught.value.rule == "TSK-9"
    assert merge_bundles([big, big], [1, -1]).deltas["fc.scales.mul"].tolist() == [[0.0, 0.0]]


def test_nothing_to_merge() -> None:
    with pytest.raises(BundleError, match="at least one"):
        merge_bundles([])


# --- whole modules ---------------------------------------------------------------------------------


def test_whole_modules_of_one_bundle_or_equal_ones_are_kept() -> None:
    one, other = with_saved(bundle(), 1.0), bundle()
    for parts in ([one, other], [other, one], [one, one], [one, other, one]):
        merged = merge_bundles(parts)
        assert same_saved(merged, one)
        assert merged.config.modules_to_save == ("classifier",)
    assert merge_bundles([other, other]).saved == ()


@pytest.mark.parametrize("value", [2.0, -0.0])
def test_different_whole_modules_must_be_chosen(value: float) -> None:
    """Bit for bit: +0.0 is not -0.0."""
    parts = [bundle(), with_saved(bundle(), 0.0), with_saved(bundle(), value)]
    with pytest.raises(BundleError, match=r"bundles 1 and 2 carry different modules .* saved_from=<index>"):
        merge_bundles(parts)
    for i in (1, 2):
        assert same_saved(merge_bundles(parts, saved_from=i), parts[i])
    assert merge_bundles(parts, saved_from=0).saved == merge_bundles(parts, saved_from=0).config.modules_to_save == ()
    for index in (-1, 3):
        with pytest.raises(BundleError, match="expected 0 to 2"):
            merge_bundles(parts, saved_from=index)


def test_saved_modules_are_compared_with_dtype_and_shape(tmp_path: Path) -> None:
    one = with_saved(bundle(), 1.0)
    write_bundle(tmp_path, one)
    assert same_saved(one, read_bundle(tmp_path))  # bytes here, float32 there
    for changed in (replace(one.saved[0], dtype="I32"), replace(one.saved[0], shape=(1, 1))):
        assert not same_saved(one, replace(one, saved=(changed,)))
    assert not same_saved(one, bundle())


# --- differences -----------------------------------------------------------------------------------


def test_differences_by_hand() -> None:
    a = TaskBundle(CONFIG, {"fc.scales.mul": np.array([[3, 0, 0], [0, 0, 4]], np.float32)})
    b = TaskBundle(CONFIG, {"fc.scales.mul": np.array([[0, 0, 2]], np.float32), "up.zeros.add": np.ones((2, 2), "f4")})
    fc, up = compare_bundles(a, b)
    assert (fc.module, fc.operation, fc.values, fc.where, fc.row) == ("fc", "scales.mul", 6, (1, 2), 2)
    assert [fc.rms_a, fc.rms_b, fc.rms] == pytest.approx([(25 / 6) ** 0.5, (4 / 6) ** 0.5, (29 / 6) ** 0.5])
    assert (fc.largest, fc.cosine) == (4.0, 0.0)
    assert (up.module, up.operation, up.rms_a, up.rms_b, up.largest, up.row, up.cosine) == (
        "up", "zeros.add", 0.0, 1.0, 1.0, 0, None,
    )  # fmt: skip
    total = total_difference(a, b)
    assert (total.module, total.values, total.largest, total.where, total.row) == ("total", 10, 4.0, (), None)
    assert [total.rms_a, total.rms_b, total.rms] == pytest.approx([2.5**0.5, 0.8**0.5, 3.3**0.5])


@pytest.mark.parametrize(
    ("name", "shape", "where", "row"),
    [
        ("fc.scales.mul", (2, 3), (1, 2), 2),
        ("fc.scales.add", (2, 3, 4), (1, 2, 3), 2),
        ("fc.offsets.add", (3, 4), (2, 3), 2),
        ("experts.w.scales.mul", (5, 2, 3), (4, 1, 2), 2),
        ("experts.w.zeros.add", (5, 3, 4), (4, 2, 3), 2),
    ],
)
def test_the_row_of_the_largest_difference(name: str, shape: tuple[int, ...], where: tuple[int, ...], row: int) -> None:
    delta = np.full(shape, 0.5, np.float32)
    delta[where] = -1
    (found,) = compare_bundles(bundle(name, delta))
    assert (found.where, found.row, found.largest) == (where, row, 1.0)


@settings(max_examples=60, deadline=None)
@given(bundles(), st.floats(0.125, 8))
def test_a_bundle_is_no_different_from_itself_and_parallel_to_its_multiples(found: TaskBundle, factor: float) -> None:
    for row in [*compare_bundles(found, found), total_difference(found, found)]:
        assert (row.rms, row.largest, row.where) == (0.0, 0.0, ())
        assert row.rms_a == row.rms_b
        assert row.cosine is None if row.rms_a == 0 else row.cosine == pytest.approx(1)
    small = {name: np.clip(delta, -1e30, 1e30).astype(np.float32) for name, delta in found.deltas.items()}
    scaled = TaskBundle(CONFIG, {name: delta * np.float32(factor) for name, delta in small.items()})
    for row in compare_bundles(TaskBundle(CONFIG, small), scaled):
        if row.rms_a > 1e-30:  # below, float32 has no digits left
            assert row.cosine == pytest.approx(1)
            assert row.rms_b == pytest.approx(factor * row.rms_a)


@settings(max_examples=40, deadline=None)
@given(bundles(), bundles())
def test_differences_are_symmetric_and_the_total_has_them_all(a: TaskBundle, b: TaskBundle) -> None:
    there, back = compare_bundles(a, b), compare_bundles(b, a)
    assert [(r.rms_a, r.rms_b, r.rms, r.largest) for r in there] == [(r.rms_b, r.rms_a, r.rms, r.largest) for r in back]
    total = total_difference(a, b)
    assert total.largest == max(r.largest for r in there)
    assert total.values == sum(r.values for r in there)
    assert total.rms == pytest.approx((sum(r.values * r.rms**2 for r in there) / total.values) ** 0.5)


def test_a_bundle_of_whole_modules_alone_has_no_differences() -> None:
    alone = with_saved(TaskBundle(CONFIG), 1.0)
    assert compare_bundles(alone) == []
    assert total_difference(alone).values == 0
    assert same_saved(merge_bundles([alone, bundle()]), alone)
