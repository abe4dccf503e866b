"""Products with 8-bit activations: what :mod:`lowbit_format.kernels.rounded_sums` says, and how far from exact."""

from __future__ import annotations

import llvmlite.binding
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite import ir
from support.cpu_kernels import WHOLE, CpuOperators, check_rounded, rounds
from torch import Tensor

from lowbit_format.kernels import naive, operators, rounded_sums
from lowbit_format.kernels.batch import Factor, Share
from lowbit_format.kernels.cpu import backend, byte_tables, products, rounded
from lowbit_format.kernels.matrix import EXACT, INT8, PlaneMatrix
from lowbit_format.machine.llvm import I64, features
from lowbit_format.schema import Scheme
from lowbit_format.testing.products import (
    KINDS,
    NAMES,
    Call,
    absolute,
    assert_within,
    drawn,
    exact,
    random_call,
    same_bits,
)
from lowbit_format.testing.products import linear as true_product

SUMS = [kind for kind in KINDS if kind.codec != "codebook"]  # whose products are sums over planes
needs_lookup = pytest.mark.skipif(not byte_tables.has_byte_lookup(features()), reason="bytes are not looked up here")


def rounding(w: PlaneMatrix) -> PlaneMatrix:
    return backend.tile(w._replace(activations=INT8))


def product(x: Tensor, w: PlaneMatrix) -> Tensor:
    return backend.linear(x, w, None, None, None)


def defined(x: Tensor, w: PlaneMatrix) -> Tensor:
    """What a product with 8-bit activations is."""
    return naive.linear(x, w._replace(activations=INT8), None, None, None)


# --- the kernel beside the truth -------------------------------------------------------------------


@given(call=CpuOperators().calls())
@settings(max_examples=60, deadline=None)
def test_any_product(call: Call) -> None:
    check_rounded(call)


@needs_lookup
@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_codec_and_bits(kind: Scheme, bits: int) -> None:
    """Groups of half a word, of words, of several blocks, and of a block and a part."""
    for group, columns in ((16, 100), (32, 100), (512, 600), (320, 650)):
        w = drawn(kind, bits, group, 81, columns, dtype="F16")
        for batch in (1, 2, 7):
            call = random_call(w, batch)
            assert rounds(call) == (kind.codec != "codebook")
            check_rounded(call)


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@pytest.mark.parametrize("tasks", ["mul", "add"])
def test_tasks(kind: Scheme, tasks: str) -> None:
    w = drawn(kind, 4, 32, 70, 100, dtype="F16")
    for batch in (1, 5, 16):
        for p in range(w.scales.shape[0]):
            check_rounded(random_call(w, batch, tasks=tasks, count=3, seed=p))
        check_rounded(random_call(w, batch, tasks=tasks, ids=False))


@needs_lookup
@pytest.mark.parametrize("kind", SUMS, ids=str)
def test_rows_do_not_depend_on_each_other_or_on_threads(kind: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    w = rounding(drawn(kind, 4, 64, 300, 200))
    x = random_call(w, 11).x
    together = product(x, w)
    for i in range(len(x)):
        assert same_bits(together[i], product(x[i], w))
    monkeypatch.setattr(products, "ONE_THREAD_BELOW", 0)
    monkeypatch.setattr(rounded, "ONE_THREAD_BELOW", 0)
    for threads in ("1", "3"):
        monkeypatch.setenv("LOWBIT_NUM_THREADS", threads)
        assert same_bits(together, product(x, w))


def test_several_matrices_in_one_call() -> None:
    """Matrices that are grouped alike share the tables of x; others, codebooks and exact ones have their own way."""
    groups = [*WHOLE, 64]
    ws = [drawn(kind, 3, groups[i], 50, 128, seed=i) for i, kind in enumerate(KINDS)]
    ws = [w._replace(activations=EXACT if i == 1 else INT8) for i, w in enumerate(ws)]
    x = random_call(ws[0], 5).x
    for found, w in zip(backend.linear_together(x, [Factor(backend.tile(w)) for w in ws]), ws, strict=True):
        assert same_bits(found, product(x, backend.tile(w)))
    begin, shares = 0, []
    for w, count in zip(ws, (2, 0, 1, 0, 1, 1, 0), strict=True):
        shares.append(Share(backend.tile(w), begin, begin + count))
        begin += count
    found = backend.linear_each(x, shares, None)
    for share in shares:
        rows = slice(share.begin, share.end)
        assert same_bits(found[rows], product(x[rows], share.w))


@needs_lookup
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_activations_that_are_not_finite(value: float) -> None:
    """Their rows are NaN, and no others."""
    w = rounding(drawn(Scheme("bcq"), 3, 32, 40, 100))
    x = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    x[1, 70] = value
    found = product(x, w)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


def test_rows_for_which_the_weight_is_decoded_stay_exact() -> None:
    w = drawn(Scheme("bcq", offset=True), 8, 64, 40, 100)
    x = random_call(w, 400).x
    assert same_bits(product(x, rounding(w)), product(x, backend.tile(w)))


# --- how far from exact ----------------------------------------------------------------------------


def most_off(x: Tensor, w: PlaneMatrix) -> Tensor:
    """What rounding may do: half a step for each four columns and plane, times the scale. float64 ``[n, rows]``."""
    _, multipliers, unit = rounded_sums._steps(rounded_sums._quads(rounded_sums._grouped(x.float(), w)))
    half_steps = (multipliers.double() * unit[..., None] / 2).sum((-1, -2))
    scales = rounded_sums._as_bcq(w)[1]
    return torch.einsum("ng,rg->nr", half_steps, sum(scale.abs() for scale in scales))  # type: ignore[arg-type, misc]


@given(
    kind=st.sampled_from(SUMS), bits=st.integers(1, 8), group=st.sampled_from(WHOLE), rows=st.integers(1, 70),
    cols=st.integers(1, 400), outlier=st.sampled_from([1.0, 30.0, 1000.0]), seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_error(kind: Scheme, bits: int, group: int, rows: int, cols: int, outlier: float, seed: int) -> None:
    w = drawn(kind, bits, group, rows, cols, seed)
    x = random_call(w, 3, seed=seed).x
    x[:, 0] *= outlier
    want, terms = true_product(x.double(), exact(w)), true_product(x.double().abs(), absolute(w))
    for found in (product(x, rounding(w)), defined(x, w)):
        assert_within(found, want, 1.0001 * most_off(x, w) + 3e-6 * terms)


@needs_lookup
def test_error_of_gaussian_activations() -> None:
    """Half a percent of the norm, whatever the bits; a large activation in a group does not make it worse."""
    for bits in (1, 2, 4, 8):
        w = drawn(Scheme("bcq"), bits, 128, 256, 1024)
        for outlier in (1.0, 100.0):
            x = random_call(w, 4, seed=bits).x
            x[:, ::128] *= outlier
            want = product(x, backend.tile(w))
            off = float((product(x, rounding(w)) - want).norm() / want.norm())
            assert 1e-4 < off < 0.01


def test_sums_that_need_no_rounding_are_exact() -> None:
    """Integers in quads of absolute sum 127: all steps are 1."""
    w = drawn(Scheme("bcq", offset=True), 4, 64, 50, 192)
    parts = torch.randint(1, 40, (3, 48, 3), generator=torch.Generator().manual_seed(0))
    x = torch.cat([parts, 127 - parts.sum(-1, keepdim=True)], -1).reshape(3, 192).float()
    x *= torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    want, terms = true_product(x.double(), exact(w)), true_product(x.double().abs(), absolute(w))
    for found in (product(x, rounding(w)), defined(x, w)):
        assert_within(found, want, 2e-6 * terms)


# --- around the kernel -----------------------------------------------------------------------------


def test_gradients_are_those_of_the_exact_product() -> None:
    w = drawn(Scheme("bcq", offset=True), 3, 32, 40, 96)
    grads = []
    for given_w in (rounding(w), backend.tile(w)):
        x = random_call(w, 3).x.requires_grad_()
        out = operators.linear(x, given_w)
        out.backward(torch.ones_like(out))
        grads.append(x.grad)
    assert same_bits(*grads)  # type: ignore[arg-type]


def test_the_operator_and_its_fast_door_agree() -> None:
    w = rounding(drawn(Scheme("uniform"), 3, 32, 40, 96))
    call = random_call(w, 3)
    slow = torch.ops.lowbit.linear(call.x, *w[:6], call.bias, None, None, *w[6:])
    assert same_bits(slow, operators.linear(call.x, w, call.bias))


def test_code_for_neon() -> None:
    """The lookups of sixteen entries, compiled for a machine that cannot be run here."""
    llvmlite.binding.initialize_all_targets()
    llvmlite.binding.initialize_all_asmprinters()
    try:
        target = llvmlite.binding.Target.from_triple("aarch64-unknown-linux-gnu")
    except RuntimeError:
        pytest.skip("this LLVM knows no aarch64")
    module = ir.Module()
    module.triple = "aarch64-unknown-linux-gnu"
    function = ir.Function(module, ir.FunctionType(ir.VectorType(ir.IntType(32), 4), [I64] * 8), "sums")
    builder = ir.IRBuilder(function.append_basic_block())
    *words, tables, multipliers, count, ahead = function.args
    sums = byte_tables._sums_by_16(builder, words, [(tables, multipliers)], count, ahead, 4, frozenset({"neon"}))
    total = builder.add(builder.add(sums[0, 0], sums[0, 1]), builder.add(sums[0, 2], sums[0, 3]))
    builder.ret(total)
    parsed = llvmlite.binding.parse_assembly(str(module))
    parsed.verify()
    text = target.create_target_machine(features="+neon", opt=2).emit_assembly(parsed)
    assert text.count("tbl\t") >= 8  # a word has eight tables
