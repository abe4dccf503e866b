"""The kernels of a GPU: weights bit for bit, and products as the naive way gives them in float64, but for rounding.

Without a GPU they run in Triton's interpreter, which is slow: matrices here are small.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gpu_device import DEVICE, FLOATS, on_device
from support.products import (
    ROUNDINGS,
    Call,
    absolute,
    assert_near,
    drawn,
    exact,
    magnitude,
    random_call,
    same_bits,
    stored,
)
from torch import Tensor

from lowbit_format.kernels import naive, operators
from lowbit_format.kernels.batch import each_task
from lowbit_format.kernels.gpu import backend, decoding, launch, products, tiles
from lowbit_format.kernels.gpu.launch import Config
from lowbit_format.kernels.matrix import PlaneMatrix
from lowbit_format.matrix import StoredMatrix
from lowbit_format.schema import SCALE_DTYPES, Scheme
from lowbit_format.testing.decoding import F32, DecoderConformance
from tests.kernels.test_operators import KINDS

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

WHOLE = [k for k in KINDS if not k.row_bits]  # ragged rows have no packed form
CODECS = [k for k in WHOLE if k.offset or k.codec != "bcq"]  # one kind of each codec, the richest
NAMES_OF = {"ids": lambda kind: f"{kind.codec}-offset" if kind.offset else kind.codec}
GROUPS = [32, 64, 96, 128, 256, 0]
PLANES = Config(2, 1 << 30)  # always straight from planes
HALF = [dtype for dtype in FLOATS if dtype != torch.float32]
MOST = {torch.float32: 266338304, torch.float16: 16319, torch.bfloat16: 16319}  # the largest integer of a block


def units(x: Tensor, block: int) -> Tensor:
    """What the integers that stand for x ``[n, cols]`` are worth: the largest value of a block over MOST."""
    blocks = F.pad(x.double().abs(), (0, -x.shape[1] % block)).reshape(len(x), -1, block)
    worth = blocks.amax(-1, keepdim=True).expand_as(blocks).reshape(len(x), -1)
    return worth[:, : x.shape[1]] / MOST[x.dtype]


def terms_of(w: PlaneMatrix) -> PlaneMatrix:
    """As :func:`products.absolute`; a codebook is summed from its Walsh coefficients, which are at most so large."""
    w = absolute(w)
    if w.codebook is None:
        return w
    total = w.codebook.square().mean().sqrt() * 2 ** (w.bits / 2)
    return w._replace(codebook=torch.full_like(w.codebook, float(total)))


def weights_of(w: PlaneMatrix, deltas: Tensor | None, task_ids: Tensor | None, n: int) -> Tensor:
    """Absolute values of the weights that each of n rows of x is multiplied by: float64 ``[n, rows, cols]``."""
    out = torch.empty(n, w.scales.shape[1], w.cols, dtype=torch.float64)
    for rows, mine in each_task(exact(w), deltas, task_ids):
        out[rows] = naive.decode(mine).abs()
    return out


def assert_product(found: Tensor, call: Call) -> None:
    """A product straight from planes is within its bound of the true one. All tensors are on the CPU.

    Three errors, each with its own part of the bound: activations are off by half a unit of their block, sums of
    float32 by their roundings, and a result in half precision by one rounding more.
    """
    x, w, bias, deltas, task_ids = call
    flat = x.reshape(-1, w.cols)
    want = naive.linear(flat.double(), exact(w), bias, deltas, task_ids)
    terms = naive.linear(flat.double().abs(), terms_of(w), magnitude(bias), magnitude(deltas), task_ids)
    off = 0.5001 * units(flat, 32 * tiles.steps(w))
    at_most = ROUNDINGS * terms + (weights_of(w, deltas, task_ids, len(flat)) @ off[..., None])[..., 0]
    if x.dtype != torch.float32:
        least = torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
        at_most += torch.finfo(x.dtype).eps / 2 * (want.abs() + at_most) + least / 2
    assert (found.dtype, found.shape) == (x.dtype, (*x.shape[:-1], w.scales.shape[1]))
    worst = ((found.cpu().double().reshape(want.shape) - want).abs() / at_most).max()
    assert worst <= 1, f"off by {worst} times what is allowed"


def multiply(call: Call, config: Config = PLANES) -> Tensor:
    """The product of packed `call.w`, on the device and from planes."""
    x, w, *rest = on_device(call)
    return products.multiply(x, w if w.is_tiled else tiles.tile(w), *rest, config)


def check_linear(call: Call) -> Tensor:
    """The product of the operator is right, whichever way it goes, and whatever form the planes have."""
    x, w, bias, deltas, task_ids = call
    packed = backend.can_tile(w)
    there = on_device(call)
    found = backend.linear(*there._replace(w=backend.tile(there.w) if packed else there.w))
    served = packed and products.has_product_kernel(tiles.tile(w))
    if served and x.numel() // w.cols <= launch.choose(backend.tile(there.w)).most_rows:
        assert_product(found, call)
    else:
        want = naive.linear(x.double(), exact(w), bias, deltas, task_ids)
        terms = naive.linear(x.double().abs(), absolute(w), magnitude(bias), magnitude(deltas), task_ids)
        assert found.dtype == x.dtype
        assert_near(found.cpu(), want, terms, one_rounding=False)
    return found


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Any product from planes."""
    kind = draw(st.sampled_from(WHOLE))
    w = drawn(
        kind,
        draw(st.integers(1, 3)),
        draw(st.sampled_from(GROUPS)),
        draw(st.integers(1, 20)),
        draw(st.integers(1, 300)),
        draw(st.integers(0, 2**32 - 1)),
        draw(st.sampled_from(SCALE_DTYPES)),
    )
    dtype = draw(st.sampled_from(FLOATS))
    return random_call(
        w,
        draw(st.integers(1, 6) | st.just(17)),
        dtype=dtype,
        layout=draw(st.sampled_from(["rows", "columns", "every second", "leading"])),
        bias=draw(st.sampled_from([None, torch.float32, dtype])),
        tasks=draw(st.sampled_from([None, "mul", "add"])),
        count=draw(st.integers(1, 4)),
        ids=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


# --- weights ---------------------------------------------------------------------------------------


class TestPackedForm(DecoderConformance):
    """Decoding by way of the packed form, where there is one."""

    def decode(self, matrix: StoredMatrix, bits: int | None) -> F32:
        w = on_device(stored(matrix, bits))
        w = backend.tile(w) if backend.can_tile(w) else w
        out: F32 = backend.dequantize(w, None, torch.float32).cpu().numpy()
        return out


@pytest.mark.parametrize("kind", WHOLE, **NAMES_OF)
@pytest.mark.parametrize("group_size", GROUPS)
def test_tiles_and_groups(kind: Scheme, group_size: int) -> None:
    """Rows that fill no tile, columns that fill no block, several macro blocks, scales of every dtype."""
    shapes = ((1, 1, 1), (17, 300, 3), (33, 70, 5))
    for (rows, cols, bits), dtype in zip(shapes, SCALE_DTYPES, strict=True):
        w = drawn(kind, bits, group_size, rows, cols, seed=rows, dtype=dtype)
        found = backend.dequantize(backend.tile(on_device(w)), None, torch.float32)
        assert same_bits(found.cpu(), naive.decode(w))


@pytest.mark.parametrize("kind", WHOLE, **NAMES_OF)
def test_dequantize_to_other_dtypes(kind: Scheme) -> None:
    """One rounding (DEC-5); of task 0 where there are deltas; from either form."""
    w = drawn(kind, 4, 64, 20, 130, dtype="F16")
    for dtype in (*FLOATS, torch.float64):
        for tasks in (None, "mul", "add"):
            deltas = random_call(w, 1, tasks=tasks).deltas
            want = naive.dequantize(w, deltas, dtype)
            there, delta = on_device(w), on_device(deltas)
            found = backend.dequantize(backend.tile(there), delta, dtype)
            assert found.dtype == dtype
            assert torch.equal(found.cpu(), want)
        assert torch.equal(backend.dequantize(there, delta, dtype), found)


def test_rounding_to_half_of_values_at_its_edges() -> None:
    """Ties to even, what is subnormal, and what is too large (DEC-5)."""
    w = drawn(Scheme("uniform"), 1, 32, 16, 32)._replace(zeros=None)
    values = [1 + 2**-11, 1 + 3 * 2**-11, 2.0**-24, 2.0**-25, 1.5 * 2**-24, 2.0**-26, 65519.0, 65520.0, 1e30]
    w = w._replace(scales=torch.tensor(values + [-1e30] * 7).reshape(1, 16, 1))
    for dtype in HALF:
        found = backend.dequantize(on_device(w), None, dtype)
        assert same_bits(found.cpu(), naive.decode(w).to(dtype))


@pytest.mark.parametrize("kind", WHOLE, **NAMES_OF)
def test_some_rows(kind: Scheme) -> None:
    """From a tile's first row to any row."""
    w = drawn(kind, 3, 64, 70, 100, dtype="F16")
    whole, packed = naive.decode(w), backend.tile(on_device(w))
    for start, stop in ((16, 17), (32, 64), (64, 70), (0, 1), (16, 16)):
        assert same_bits(decoding.decode(packed, torch.float32, start, stop).cpu(), whole[start:stop])


# --- chosen rows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WHOLE, **NAMES_OF)
@pytest.mark.parametrize("group_size", [0, 32])
def test_embedding(kind: Scheme, group_size: int) -> None:
    """Bit for bit, in any order and number, of any integers."""
    w = drawn(kind, 3, group_size, 37, 100, dtype="F16")
    packed = backend.tile(on_device(w))
    for ids, dtype in (
        (torch.tensor([0, 36, 36, 5, 0]), torch.float16),
        (torch.randint(0, 37, (3, 1, 7), dtype=torch.int32), torch.float32),
        (torch.randint(0, 37, (4, 6)).t(), torch.float32),
        (torch.tensor([9, 8, 9, 8])[::2], torch.float32),
        (torch.tensor(17), torch.float32),
        (torch.empty(2, 0, dtype=torch.int64), torch.float32),
    ):
        found = backend.embedding(on_device(ids), packed, None, None, dtype)
        assert same_bits(found.cpu(), naive.embedding(ids, w, None, None, dtype))


@pytest.mark.parametrize("kind", WHOLE, **NAMES_OF)
@pytest.mark.parametrize("tasks", ["mul", "add"])
def test_embedding_with_tasks(kind: Scheme, tasks: str) -> None:
    """Of each row, -1 being the base, and of all rows at once; for some planes and for all (TSK-6, TSK-8)."""
    w = drawn(kind, 3, 32, 37, 70, dtype="F16")
    packed = backend.tile(on_device(w))
    ids = torch.tensor([3, 36, 3, 0, 17, 3])
    for seed in (0, 2):  # one plane, and all of bcq's three
        deltas = random_call(w, 6, tasks=tasks, seed=seed).deltas
        for task_ids in (torch.tensor([0, -1, 2, 1, 1, 0]), None):
            found = backend.embedding(*on_device((ids, packed, deltas, task_ids)), torch.float32)
            assert same_bits(found.cpu(), naive.embedding(ids, w, deltas, task_ids, torch.float32))
    base = backend.embedding(*on_device((ids, packed, deltas, torch.full((6,), -1))), torch.float32)
    assert same_bits(base.cpu(), naive.embedding(ids, w, None, None, torch.float32))
    tuned = backend.embedding(*on_device((ids, packed, deltas, None)), torch.float32)
    assert not torch.allclose(tuned, base)


@pytest.mark.parametrize("kind", WHOLE, **NAMES_OF)
@pytest.mark.parametrize("bad", [37, 48, 1 << 40, -1, -38])
def test_embedding_of_no_row(kind: Scheme, bad: int) -> None:
    """Not a number, also of rows that only pad a tile; the other rows are what they are."""
    w = drawn(kind, 2, 32, 37, 50)
    packed = backend.tile(on_device(w))
    for dtype, tasks in zip(FLOATS, ("mul", None, None), strict=False):
        deltas = random_call(w, 3, tasks=tasks).deltas
        good, ids = torch.tensor([0, 5, 36]), torch.tensor([0, bad, 36])
        found = backend.embedding(*on_device((ids, packed, deltas, None)), dtype).cpu()
        want = naive.embedding(good, w, deltas, None, dtype)
        assert found[1].isnan().all()
        assert same_bits(found[::2], want[::2])


# --- products --------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(calls())
def test_any_product(call: Call) -> None:
    check_linear(call)


@pytest.mark.parametrize("kind", CODECS, **NAMES_OF)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_codec_and_bits(kind: Scheme, bits: int) -> None:
    w = drawn(kind, bits, 32, 11, 40, seed=bits, dtype="F16")
    assert products.has_product_kernel(backend.tile(w)) == (kind.codec != "codebook" or bits <= products.MOST_LEVELS)
    for batch, dtype in ((2, torch.float32), (3, torch.float16)):
        check_linear(random_call(w, batch, dtype=dtype, seed=bits))


@pytest.mark.parametrize("kind", WHOLE, **NAMES_OF)
@pytest.mark.parametrize("group_size", GROUPS)
def test_every_group_size(kind: Scheme, group_size: int) -> None:
    """Blocks of every length, groups of several blocks, and a last group that is short."""
    w = drawn(kind, 2, group_size, 16, 490, seed=group_size)
    assert tiles.steps(w) == (1 if group_size in (32, 96) else 2)
    check_linear(random_call(w, 2, dtype=torch.float16))


@pytest.mark.parametrize("kind", CODECS, **NAMES_OF)
@pytest.mark.parametrize("group_size", [0, 128, 512])
def test_long_blocks(kind: Scheme, group_size: int) -> None:
    """Of 128 columns, which is four steps."""
    w = drawn(kind, 1, group_size, 5, 1000)
    assert tiles.steps(w) == 4
    check_linear(random_call(w, 2))
    check_linear(random_call(w, 2, dtype=torch.float16, tasks="add"))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 40])
def test_every_batch(dtype: torch.dtype, batch: int) -> None:
    """Chunks of every size, one and several."""
    w = drawn(Scheme("uniform"), 1, 32, 3, 40, dtype="F16")
    call = random_call(w, batch, dtype=dtype, seed=batch)
    assert_product(multiply(call), call)


@pytest.mark.parametrize("kind", CODECS, **NAMES_OF)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_more_rows_than_planes_are_for(kind: Scheme, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library multiplies by the decoded weight, all of it at once or a tile at a time, with tasks and without."""
    config = Config(2, 4)
    monkeypatch.setattr(launch, "choose", lambda w: config)
    monkeypatch.setattr(products, "multiply", None)
    w = drawn(kind, 2, 32, 20, 50, dtype="F16")
    for tile, tasks, ids in ((1, None, False), (1, "mul", True), (1 << 27, "add", True), (1 << 27, "mul", False)):
        monkeypatch.setattr(backend, "CHUNK", tile)
        bias = None if ids else torch.float32
        check_linear(random_call(w, 5, dtype=dtype, tasks=tasks, ids=ids, count=5, bias=bias))


@pytest.mark.parametrize("kind", CODECS, **NAMES_OF)
@pytest.mark.parametrize("tasks", ["mul", "add"])
def test_tasks(kind: Scheme, tasks: str) -> None:
    """Of each row, -1 being the base, and of all rows at once; for some planes and for all (TSK-6, TSK-8)."""
    w = drawn(kind, 2, 32, 5, 40, dtype="F16")
    for seed in range(w.scales.shape[0]):
        call = random_call(w, 5, tasks=tasks, seed=seed, count=3)
        mixed = call._replace(task_ids=torch.tensor([2, -1, 0, 1, -1]))
        found = check_linear(mixed)
        base = check_linear(call._replace(deltas=None, task_ids=None))
        first = check_linear(call._replace(task_ids=None))
        assert torch.equal(found[[1, 4]], base[[1, 4]])
        torch.testing.assert_close(found[2], first[2], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(first, base)


@pytest.mark.parametrize("layout", ["rows", "columns", "every second", "leading"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strides_of_x(layout: str, dtype: torch.dtype) -> None:
    """No row of x is copied by hand here: the same numbers in other places give the same bits."""
    w = drawn(Scheme("uniform"), 2, 32, 5, 70)
    call = random_call(w, 6, dtype=dtype, layout=layout)
    found = check_linear(call)
    again = check_linear(call._replace(x=call.x.contiguous()))
    assert same_bits(found.cpu(), again.cpu())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_bias_of_any_dtype_and_strides(dtype: torch.dtype) -> None:
    w = drawn(Scheme("bcq"), 1, 32, 5, 40)
    for bias in (
        torch.randn(5).half(),
        torch.randn(5).double(),
        torch.randn(10)[::2],
        torch.randn(1).expand(5),
        torch.randn(5, 4)[:, 1],
    ):
        check_linear(random_call(w, 2, dtype=dtype)._replace(bias=bias))


def test_deltas_and_ids_with_strides() -> None:
    w = drawn(Scheme("bcq", offset=True), 3, 32, 5, 100)
    call = random_call(w, 6, dtype=torch.float16)
    ids = torch.tensor([0, 9, 1, 9, -1, 9, 0, 9, 0, 9, 1, 9])[::2]
    few = torch.tensor([0, 1, -1], dtype=torch.int32)[:, None].expand(3, 2).reshape(-1)
    for task_ids in (ids, few):
        check_linear(call._replace(deltas=torch.randn(5, 2, 2).permute(1, 2, 0), task_ids=task_ids))
        check_linear(call._replace(deltas=torch.randn(2, 4, 3, 5).permute(0, 2, 3, 1), task_ids=task_ids))
    check_linear(call._replace(deltas=torch.randn(2, 3, 5).half(), task_ids=ids))
    check_linear(call._replace(deltas=torch.randn(1, 3, 5).expand(2, 3, 5), task_ids=ids))


def test_empty_batches() -> None:
    w = on_device(drawn(KINDS[1], 4, 32, 33, 100))
    for form in (w, backend.tile(w)):
        for shape in ((0, 100), (2, 0, 100), (0, 0, 100)):
            for dtype in FLOATS:
                x = torch.empty(shape, dtype=dtype, device=DEVICE)
                found = backend.linear(x, form, torch.randn(33, device=DEVICE), None, None)
                assert (found.shape, found.dtype) == ((*shape[:-1], 33), dtype)


def test_one_row_without_a_batch() -> None:
    call = random_call(drawn(KINDS[1], 2, 32, 20, 100), 1)
    found = check_linear(call)
    alone = backend.linear(*on_device(call._replace(x=call.x[0])))
    assert alone.shape == (20,)
    assert same_bits(alone.cpu(), found[0].cpu())


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_what_kernels_do_not_multiply_goes_the_naive_way(dtype: torch.dtype) -> None:
    """x in float64; and a matrix without a packed form."""
    w = on_device(drawn(KINDS[1], 3, 32, 20, 70))
    x = torch.randn(3, 70, dtype=torch.float64, device=DEVICE)
    if dtype == torch.float64:
        want = naive.linear(x, w, None, None, None)
        assert torch.equal(backend.linear(x, backend.tile(w), None, None, None), want)
    odd = on_device(drawn(KINDS[1], 3, 24, 20, 70))
    assert torch.equal(backend.linear(x.float(), odd, None, None, None), naive.linear(x.float(), odd, None, None, None))


# --- bits that have to be the same -----------------------------------------------------------------


@pytest.mark.parametrize("kind", CODECS, **NAMES_OF)
def test_the_same_call_has_the_same_bits(kind: Scheme) -> None:
    for dtype, tasks in zip(FLOATS, ("mul", "add", None), strict=False):
        call = random_call(drawn(kind, 2, 32, 5, 40), 3, dtype=dtype, tasks=tasks)
        assert same_bits(multiply(call).cpu(), multiply(call).cpu())


@pytest.mark.parametrize("kind", CODECS, **NAMES_OF)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_row_does_not_depend_on_the_others(kind: Scheme, dtype: torch.dtype) -> None:
    """Nor on which row of its chunk it is."""
    w = tiles.tile(drawn(kind, 1, 32, 5, 70))
    n = 32 // products.SLICES[dtype]  # a whole chunk
    call = random_call(w, 2 * n + 1, dtype=dtype, tasks="mul")
    together = multiply(call).cpu()
    order = torch.randperm(n + 3)
    assert call.task_ids is not None
    some = multiply(call._replace(x=call.x[order], task_ids=call.task_ids[order])).cpu()
    assert same_bits(some, together[order])
    other = call.x.clone()
    other[1:] *= 1000
    assert same_bits(multiply(call._replace(x=other)).cpu()[0], together[0])


@pytest.mark.parametrize("kind", CODECS, **NAMES_OF)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_number_of_warps(kind: Scheme, dtype: torch.dtype) -> None:
    """With as many macro blocks as warps, fewer, and a number that they do not divide."""
    for cols in (40, 700):
        call = random_call(drawn(kind, 2, 32, 5, cols), 2, dtype=dtype, tasks="mul")
        for warps in launch.WARPS:
            assert_product(multiply(call, Config(warps, 16)), call)


@pytest.mark.parametrize("kind", CODECS, **NAMES_OF)
def test_both_forms_give_the_same(kind: Scheme) -> None:
    call = on_device(random_call(drawn(kind, 2, 32, 20, 40), 2))
    packed = call._replace(w=backend.tile(call.w))
    assert same_bits(backend.linear(*call).cpu(), backend.linear(*packed).cpu())


@pytest.mark.parametrize("kind", CODECS, **NAMES_OF)
def test_padding_bits_do_not_matter(kind: Scheme) -> None:
    """BIT-3, in weights, products and gradients."""
    w = drawn(kind, 3, 32, 20, 37)
    dirty = w.planes.clone()
    dirty[..., 5:] = 255
    dirty[..., 4] |= 0b11100000
    clean, dirty_form = (backend.tile(on_device(form)) for form in (w, w._replace(planes=dirty)))
    x, grad = torch.randn(3, 37, device=DEVICE), torch.randn(3, 20, device=DEVICE)
    for function in (
        lambda w: backend.linear(x, w, None, None, None),
        lambda w: backend.dequantize(w, None, torch.float32),
        lambda w: backend.linear_param_grads(grad, x, w, None, None)[0],
        lambda w: backend.linear_input_grad(grad, w, None, None),
    ):
        assert same_bits(function(dirty_form).cpu(), function(clean).cpu())


# --- activations of all sizes ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", CODECS, **NAMES_OF)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden(kind: Scheme, value: float) -> None:
    """Its row is not finite, and no other row changes."""
    for group, column, dtype, tasks in ((32, 0, torch.float32, "mul"), (64, 69, torch.float16, None)):
        call = random_call(drawn(kind, 2, group, 20, 70), 4, dtype=dtype, tasks=tasks)
        before = multiply(call).cpu()
        x = call.x.clone()
        x[2, column] = value
        found = multiply(call._replace(x=x)).cpu()
        assert not torch.isfinite(found[2]).any()
        assert same_bits(found[[0, 1, 3]], before[[0, 1, 3]])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_activations_that_are_zero(dtype: torch.dtype) -> None:
    """All of a row, all of a block, all but one."""
    w = drawn(Scheme("uniform"), 2, 32, 5, 100)
    call = random_call(w, 4, dtype=dtype)
    x = call.x.clone()
    x[0] = 0
    x[1, 32:64] = 0
    x[2] = 0
    x[2, 99] = -1.5
    call = call._replace(x=x)
    found = multiply(call)
    assert_product(found, call)
    assert call.bias is not None
    assert same_bits(found[0].cpu(), call.bias.to(dtype))
    assert not multiply(call._replace(x=torch.zeros_like(x), bias=None)).any()


MAGNITUDES = {  # of x
    torch.float32: [1e-27, 1e-10, 1e30, 1e36],
    torch.float16: [2.0**-24, 2.0**-20, 2.0**-15, 1e-3, 1e3, 15000.0],
    torch.bfloat16: [1e-27, 1e-10, 1e30],
}


@pytest.mark.parametrize(("dtype", "size"), [(dtype, size) for dtype in FLOATS for size in MAGNITUDES[dtype]], ids=str)
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3]], ids=["bcq", "uniform"])
def test_magnitudes_of_x(kind: Scheme, dtype: torch.dtype, size: float) -> None:
    """No activation is lost or overflows, except for what the dtype itself cannot hold."""
    w = drawn(kind, 2, 32, 5, 70)
    x = (torch.rand(2, 70, generator=torch.Generator().manual_seed(0)) * 2 - 1) * size
    x = x.to(dtype)
    assert x.any()
    found, want = multiply(Call(x, w)).cpu().double(), naive.linear(x.double(), exact(w), None, None, None)
    terms = naive.linear(x.double().abs(), terms_of(w), None, None, None)
    off = (weights_of(w, None, None, 2) @ (0.5001 * units(x, 32))[..., None])[..., 0]
    info = torch.finfo(dtype)
    at_most = ROUNDINGS * terms + off + info.smallest_normal * info.eps * (terms / size + 1)  # float32 subnormals, too
    at_most += info.eps / 2 * want.abs() if dtype != torch.float32 else 0
    assert ((found - want).abs() <= at_most).all()


@pytest.mark.parametrize("kind", CODECS, **NAMES_OF)
def test_an_outlier_costs_its_own_block_only(kind: Scheme) -> None:
    """The other blocks are as precise as without it."""
    w = drawn(kind, 2, 32, 5, 96)
    w = w._replace(
        scales=w.scales * torch.tensor([0.0, 1, 1]),  # the outlier itself does not count
        offsets=None if w.offsets is None else w.offsets * torch.tensor([0.0, 1, 1]),
    )
    x = torch.randn(2, 96).half()
    without = Call(x, w)
    want = multiply(without).cpu()
    assert_product(want, without)
    x = x.clone()
    x[0, 7] = 1000 * x[0].abs().max()
    assert same_bits(multiply(Call(x, w)).cpu(), want)


@pytest.mark.parametrize("slices", [2, 4])
def test_the_largest_integers(slices: int) -> None:
    """Blocks of which every activation is the largest, of one sign: no digit and no sum overflows."""
    dtype = torch.float16 if slices == 2 else torch.float32
    w = drawn(Scheme("bcq"), 2, 0, 5, 1000, seed=1)
    assert tiles.steps(w) == 4
    w = w._replace(planes=torch.full_like(w.planes, 255))
    for x in (torch.ones(2, 1000), -torch.ones(2, 1000), torch.tensor([1.0, -1]).repeat(2, 500)):
        call = Call((x * 0.7).to(dtype), w)
        assert_product(multiply(call), call)


@pytest.mark.parametrize(
    ("bits", "table"),
    {
        "FP4": (4, [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]),
        "ternary": (2, [0.0, 1, 0, -1]),
        "signs": (1, [-1.0, 1]),
        "one level": (3, [0.25] * 8),
        "nothing": (2, [0.0] * 4),
        "one of many": (4, [0.0] * 11 + [1.0] + [0.0] * 4),
        "far apart": (3, [1e-6, 1, -1e4, 1e3, -1, 0, 1e-3, 1e4]),
    }.values(),
    ids=["FP4", "ternary", "signs", "one level", "nothing", "one of many", "far apart"],
)
def test_codebooks(bits: int, table: list[float]) -> None:
    """Also ones of which combinations of planes do not count."""
    w = drawn(Scheme("codebook"), bits, 32, 5, 40)._replace(codebook=torch.tensor(table))
    check_linear(random_call(w, 2))
    check_linear(random_call(w, 2, dtype=torch.float16, tasks="mul"))


def test_uniform_codes_without_zeros() -> None:
    w = drawn(Scheme("uniform"), 4, 32, 11, 40)._replace(zeros=None)
    check_linear(random_call(w, 3))
    assert torch.equal(backend.dequantize(on_device(w), None, torch.float32).cpu(), naive.decode(w))


# --- gradients -------------------------------------------------------------------------------------


Grads = tuple[Tensor | None, ...]


def assert_grads(found: Grads, want: Grads, terms: Grads) -> None:
    """Of scales, offsets, zeros and deltas, each within float32 rounding of its sum."""
    assert len(found) == len(want) == 4
    for a, b, t in zip(found, want, terms, strict=True):
        assert (a is None) == (b is None)
        if a is None or b is None or t is None:
            continue
        assert a.dtype == torch.float32
        assert b.any()
        assert_near(a.cpu(), b, t.abs())


@pytest.mark.parametrize("kind", WHOLE, **NAMES_OF)
@pytest.mark.parametrize("tasks", [None, "mul", "add"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_of_parameters(kind: Scheme, tasks: str | None, dtype: torch.dtype) -> None:
    """In a product, of all rows' tasks and of each row's."""
    for bits, group_size, batch, ids in ((3, 32, 5, True), (2, 64, 40, False)):
        w = drawn(kind, bits, group_size, 20, 70, dtype="F16")
        x, _, _, deltas, task_ids = random_call(w, batch, dtype=dtype, layout="columns", tasks=tasks, ids=ids)
        grad = torch.randn(20, batch).to(dtype).t()
        want = naive.linear_param_grads(grad.double(), x.double(), exact(w), deltas, task_ids)
        terms = naive.linear_param_grads(magnitude(grad), magnitude(x), absolute(w), magnitude(deltas), task_ids)
        found = backend.linear_param_grads(*on_device((grad, x, w, deltas, task_ids)))
        assert_grads(found, want, terms)


@pytest.mark.parametrize("kind", WHOLE, **NAMES_OF)
@pytest.mark.parametrize("group_size", GROUPS)
def test_gradients_of_groups(kind: Scheme, group_size: int) -> None:
    """More rows than one program has; groups of several blocks; a last group that is short; a sum of nothing."""
    w = drawn(kind, 1, group_size, 70, 700)
    x, grad = torch.randn(3, 700), torch.randn(3, 70)
    want = naive.linear_param_grads(grad.double(), x.double(), exact(w), None, None)
    terms = naive.linear_param_grads(magnitude(grad), magnitude(x), absolute(w), None, None)
    found = backend.linear_param_grads(*on_device((grad, x, w, None, None)))
    assert_grads(found, want, terms)
    nothing = backend.linear_param_grads(*on_device((grad[:0], x[:0], w, None, None)))
    assert not nothing[0].any()
    assert nothing[0].shape == w.scales.shape


def test_gradients_of_two_dtypes() -> None:
    """As under autocast: x and the gradient need not have the same."""
    w = drawn(KINDS[1], 2, 32, 20, 40)
    grad, x = torch.randn(2, 3, 20), torch.randn(2, 3, 40).half()
    for a, b in ((grad, x), (grad.half(), x.float())):
        want = naive.linear_param_grads(a.double(), b.double(), exact(w), None, None)
        terms = naive.linear_param_grads(magnitude(a), magnitude(b), absolute(w), None, None)
        assert_grads(backend.linear_param_grads(*on_device((a, b, w, None, None))), want, terms)


@pytest.mark.parametrize("kind", WHOLE, **NAMES_OF)
@pytest.mark.parametrize("tasks", [None, "mul", "add"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradient_of_the_input(
    kind: Scheme, tasks: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the weight decoded at once, and 16 rows at a time."""
    w = drawn(kind, 3, 32, 37, 70, dtype="F16")
    for tile, ids in ((1 << 27, False), (1, True)):
        monkeypatch.setattr(backend, "CHUNK", tile)
        _, _, _, deltas, task_ids = random_call(w, 6, tasks=tasks, ids=ids)
        grad = torch.randn(2, 3, 37).to(dtype)
        want = naive.linear_input_grad(grad.double(), exact(w), deltas, task_ids)
        terms = naive.linear_input_grad(grad.double().abs(), absolute(w), magnitude(deltas), task_ids)
        found = backend.linear_input_grad(*on_device((grad, backend.tile(w), deltas, task_ids)))
        assert found.dtype == dtype
        assert_near(found.cpu(), want, terms, one_rounding=False)


@pytest.mark.parametrize("kind", WHOLE, **NAMES_OF)
@pytest.mark.parametrize("tasks", [None, "mul", "add"])
def test_gradients_of_an_embedding(kind: Scheme, tasks: str | None) -> None:
    """Rows that come several times, with the same task and with others."""
    w = drawn(kind, 3, 32, 37, 70, dtype="F16")
    ids = torch.tensor([[3, 36, 3, 0], [3, 36, 17, 3]])
    for dtype, each in zip(FLOATS, (True, False, True), strict=False):
        _, _, _, deltas, task_ids = random_call(w, 8, tasks=tasks, ids=each)
        grad = torch.randn(2, 4, 70).to(dtype)
        want = naive.embedding_param_grads(grad.double(), ids, exact(w), deltas, task_ids)
        terms = naive.embedding_param_grads(magnitude(grad), ids, absolute(w), magnitude(deltas), task_ids)
        found = backend.embedding_param_grads(*on_device((grad, ids, backend.tile(w), deltas, task_ids)))
        assert_grads(found, want, terms)
        assert not found[0][:, 1].any()  # a row that nobody asked for


@pytest.mark.parametrize("kind", WHOLE, **NAMES_OF)
@pytest.mark.parametrize("tasks", [None, "mul", "add"])
def test_gradients_of_dequantize(kind: Scheme, tasks: str | None) -> None:
    w = drawn(kind, 3, 64, 37, 70, dtype="F16")
    deltas = random_call(w, 1, tasks=tasks).deltas
    for dtype, layout in zip(FLOATS, (lambda t: t, lambda t: t.t().contiguous().t(), lambda t: t), strict=False):
        grad = layout(torch.randn(37, 70).to(dtype))
        want = naive.dequantize_param_grads(grad.double(), exact(w), deltas)
        terms = naive.dequantize_param_grads(magnitude(grad), absolute(w), magnitude(deltas))
        assert_grads(backend.dequantize_param_grads(*on_device((grad, backend.tile(w), deltas))), want, terms)


def test_gradients_have_the_same_bits_every_time() -> None:
    """Also where a row comes several times."""
    w = drawn(KINDS[1], 2, 32, 20, 70)
    ids, grad = torch.tensor([3, 3, 3, 0, 3]), torch.randn(5, 70)
    args = on_device((grad, ids, backend.tile(w), None, None))
    first, again = backend.embedding_param_grads(*args), backend.embedding_param_grads(*args)
    assert same_bits(first[0].cpu(), again[0].cpu())


# --- what kernels do not look at is refused before -------------------------------------------------


def part(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros, with more of them behind: what is read there is harmless."""
    return torch.zeros(10000, dtype=dtype)[: torch.Size(shape).numel()].reshape(shape)


IDS = part((2,), torch.int64)
WRONG = {  # bias, deltas, task_ids
    "a bias that is too short": (part((20,)), None, None),
    "a bias that is too long": (part((48,)), None, None),
    "too few ids": (None, part((2, 1, 33)), IDS[:1]),
    "too few rows": (None, part((2, 1, 32)), IDS),
    "too many planes": (None, part((2, 4, 33)), IDS),
    "too few groups": (None, part((2, 1, 33, 3)), IDS),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_shapes(wrong: str) -> None:
    """Without a look at them, kernels would read memory that is not theirs."""
    w = backend.tile(drawn(KINDS[1], 3, 32, 33, 100))
    bias, deltas, task_ids = WRONG[wrong]
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        backend.linear(*on_device((torch.randn(2, 100), w, bias, deltas, task_ids)))
    if bias is None:
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            backend.embedding(*on_device((torch.tensor([0, 32]), w, deltas, task_ids)), torch.float32)


@pytest.mark.parametrize("most_rows", [16, 0], ids=["planes", "library"])
@pytest.mark.parametrize("kind", [KINDS[1], KINDS[3]], ids=["bcq", "uniform"])
def test_a_task_that_is_not_there_is_nan(kind: Scheme, most_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for the device to refuse it; other rows are as without it."""
    monkeypatch.setattr(launch, "choose", lambda w: Config(4, most_rows))
    call = on_device(random_call(drawn(kind, 3, 32, 33, 100), 6, tasks="mul", count=4))
    call = call._replace(w=backend.tile(call.w), task_ids=torch.tensor([0, 4, -1, 3, 9, 1], device=DEVICE))
    found = backend.linear(*call).cpu()
    assert found.isnan().all(1).tolist() == [False, True, False, False, True, False]
    assert found[[0, 2, 3, 5]].isfinite().all()
    rows = backend.embedding(torch.tensor([1, 1, 1], device=DEVICE), *call[1:2], call.deltas,
                             torch.tensor([4, 0, -1], device=DEVICE), torch.float32)  # fmt: skip
    assert rows.isnan().all(1).tolist() == [True, False, False]


def test_gradients_of_rows_that_are_not_there_are_nothing() -> None:
    w = backend.tile(on_device(drawn(KINDS[1], 3, 32, 33, 100)))
    grad = torch.randn(4, 100, device=DEVICE)
    ids = torch.tensor([5, -1, 33, 5], device=DEVICE)
    found = backend.embedding_param_grads(grad, ids, w, None, None)
    want = backend.embedding_param_grads(grad[[0, 3]], ids[[0, 3]], w, None, None)
    for one, other in zip(found, want, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


# --- on a GPU only ---------------------------------------------------------------------------------


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Interpreted, it would take too long or mean nothing."""
    return pytest.mark.gpu(pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")(test))


def large_call(kind: Scheme, dtype: torch.dtype, tasks: str | None = "mul", batch: int = 4) -> Call:
    call = on_device(random_call(drawn(kind, 3, 64, 500, 1000, dtype="F16"), batch, dtype=dtype, tasks=tasks))
    return call._replace(w=backend.tile(call.w))


@on_gpu
@pytest.mark.parametrize("kind", CODECS, **NAMES_OF)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("batch", [1, 4, 16, 33])
def test_large_products(kind: Scheme, dtype: torch.dtype, batch: int) -> None:
    """Of every codec and dtype, bfloat16 among them."""
    for bits, group_size in ((1, 32), (4, 128), (3, 0)):
        w = drawn(kind, bits, group_size, 500, 2000, dtype="BF16")
        for tasks in (None, "mul", "add"):
            call = random_call(w, batch, dtype=dtype, tasks=tasks)
            for warps in launch.WARPS:
                assert_product(multiply(call, Config(warps, 16)), call)


@on_gpu
@pytest.mark.parametrize("kind", CODECS, **NAMES_OF)
@pytest.mark.parametrize("tasks", ["mul", "add"])
def test_a_captured_graph(kind: Scheme, tasks: str) -> None:
    """Replayed with other activations and other tasks in the same memory."""
    call = large_call(kind, torch.float16, tasks)
    other = large_call(kind, torch.float16, tasks)
    assert call.task_ids is not None
    assert call.deltas is not None
    with torch.no_grad():
        backend.linear(*call)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = backend.linear(*call)
        for factor in (1.0, -0.5):
            call.x.copy_(other.x.flip(0) * factor)
            call.task_ids.copy_(call.task_ids.roll(1))
            call.deltas.mul_(1.5)
            graph.replay()
            assert same_bits(found, backend.linear(*call))


@on_gpu
def test_another_stream() -> None:
    """What is launched stays on the current stream, in order."""
    call = large_call(KINDS[1], torch.float16)
    want = backend.linear(*call)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        x = torch.empty_like(call.x).fill_(float("nan"))
        torch.cuda._sleep(10_000_000)
        x.copy_(call.x)
        found = backend.linear(x, *call[1:])
        rows = backend.embedding(torch.arange(9, device=DEVICE), call.w, None, None, torch.float16)
    stream.synchronize()
    assert same_bits(found, want)
    assert same_bits(rows, backend.dequantize(call.w, None, torch.float16)[:9])


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_another_device() -> None:
    """That of the tensors, whichever is the current one."""
    plain = random_call(drawn(KINDS[1], 3, 64, 50, 100), 2, tasks="mul")
    call = Call(*(t.to("cuda:1") if isinstance(t, Tensor) else t for t in plain))
    w = PlaneMatrix(*(t.to("cuda:1") if isinstance(t, Tensor) else t for t in plain.w))
    found = backend.linear(*call._replace(w=backend.tile(w)))
    assert found.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    assert_product(found, plain)


@on_gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_compiled_into_a_graph() -> None:
    x, w, bias, *_ = large_call(KINDS[1], torch.float16, None)
    compiled = torch.compile(lambda x: operators.linear(x * 2, w, bias).relu(), mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for seed in range(5):
            x = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)
            assert torch.equal(compiled(x).clone(), operators.linear(x * 2, w, bias).relu())


@on_gpu
def test_the_gradient_of_the_weight_is_never_in_memory() -> None:
    rows = cols = 4096
    w = backend.tile(on_device(drawn(KINDS[1], 2, 128, rows, cols)))
    grad, x = torch.randn(64, rows, device=DEVICE).half(), torch.randn(64, cols, device=DEVICE).half()
    backend.linear_param_grads(grad, x, w, None, None)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    backend.linear_param_grads(grad, x, w, None, None)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < rows * cols * 4 / 2


@on_gpu
@pytest.mark.parametrize("kind", CODECS, **NAMES_OF)
def test_twenty_runs_have_the_same_bits(kind: Scheme) -> None:
    for dtype in FLOATS:
        call = large_call(kind, dtype, batch=33)
        ids = torch.randint(0, 9, (200,), device=DEVICE)
        grad, row_grad = torch.randn(33, 500, device=DEVICE).to(dtype), torch.randn(200, 1000, device=DEVICE)

        def results(call: Call = call, grad: Tensor = grad, ids: Tensor = ids, of: Tensor = row_grad) -> list[Tensor]:
            of_product = backend.linear_param_grads(grad, call.x, call.w, call.deltas, call.task_ids)
            of_rows = backend.embedding_param_grads(of, ids, call.w, None, None)
            return [multiply(call), of_product[0], of_rows[0]]

        first = results()
        for _ in range(19):
            assert all(same_bits(a, b) for a, b in zip(results(), first, strict=True))
