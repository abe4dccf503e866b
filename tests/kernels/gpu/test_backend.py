"""The kernels of a GPU: what every backend must do, and what is particular to a GPU.

Without a GPU they run in Triton's interpreter, which is slow: matrices here are small.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.gpu_device import DEVICE, FLOATS, on_device
from torch import Tensor

from lowbit_format.kernels import naive, operators
from lowbit_format.kernels.gpu import backend, decoding, launch, products, tiles
from lowbit_format.kernels.gpu.launch import Config
from lowbit_format.kernels.matrix import PlaneMatrix
from lowbit_format.matrix import StoredMatrix
from lowbit_format.schema import SCALE_DTYPES, Scheme
from lowbit_format.testing import products as truth
from lowbit_format.testing.decoding import F32, DecoderConformance
from lowbit_format.testing.operators import OperatorConformance, each_value, pairwise
from lowbit_format.testing.products import (
    KINDS,
    ROUNDINGS,
    Call,
    absolute,
    assert_within,
    drawn,
    exact,
    magnitude,
    plane_matrix,
    random_call,
    same_bits,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

WHOLE = [k for k in KINDS if not k.row_bits]  # ragged rows have no tiled layout
CODECS = [k for k in WHOLE if k.offset or k.codec != "bcq"]  # one kind of each codec, the richest
NAMES_OF = {"ids": lambda kind: f"{kind.codec}-offset" if kind.offset else kind.codec}
GROUPS = [32, 64, 96, 128, 256, 0]
PLANES = Config(2, 1 << 30)  # always straight from planes
INTERPRETED = DEVICE == "cpu"
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
    """Absolute values of the weights for each of n rows of x: float64 ``[n, rows, cols]``."""
    out = torch.empty(n, w.scales.shape[1], w.cols, dtype=torch.float64)
    for rows, weight in truth.each_task(exact(w), deltas, task_ids, n):
        out[rows] = weight.abs()
    return out


def error_from_planes(call: Call, want: Tensor) -> Tensor:
    """How far a product from planes may be off: float64, of the shape of `want`.

    Three errors, each with its own part: activations are off by half a unit of their block, sums of float32 by their
    roundings, and a result in half precision by one rounding more.
    """
    x, w, bias, deltas, task_ids = call
    flat = x.reshape(-1, w.cols)
    terms = truth.linear(flat.double().abs(), terms_of(w), magnitude(bias), magnitude(deltas), task_ids)
    off = 0.5001 * units(flat, 32 * tiles.steps(w))
    at_most = ROUNDINGS * terms + (weights_of(w, deltas, task_ids, len(flat)) @ off[..., None])[..., 0]
    at_most = at_most.reshape(want.shape)
    if x.dtype != torch.float32:
        least = torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
        at_most += torch.finfo(x.dtype).eps / 2 * (want.abs() + at_most) + least / 2
    return at_most


class GpuOperators(OperatorConformance):
    """Interpreted, one product takes a second: each kind, dtype and way of tasks is tried, on one tile of rows."""

    backend = backend
    device = DEVICE
    dtypes = FLOATS
    kinds = [*CODECS, KINDS[4]] if INTERPRETED else KINDS
    group_sizes = (*GROUPS, 24)
    batches = (1, 4, 5, 17) if INTERPRETED else (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 40)
    shape = (5, 70) if INTERPRETED else (37, 100)
    combine = staticmethod(each_value if INTERPRETED else itertools.product)
    many = 500
    examples = 4 if INTERPRETED else 50
    unknown = "nan"

    def allowed(self, call: Call, want: Tensor, terms: Tensor) -> Tensor:
        there = self.tile(on_device(call.w))
        planes = there.is_tiled and products.has_product_kernel(there) and call.x.dtype in FLOATS
        if planes and call.x.numel() // call.w.cols <= launch.choose(there).most_rows:
            return error_from_planes(call, want)
        return super().allowed(call, want, terms)


check_linear = GpuOperators().check_linear


def assert_product(found: Tensor, call: Call) -> None:
    """A product from planes, of flattened x, is within its bound of the true one."""
    x, w, bias, deltas, task_ids = call._replace(x=call.x.reshape(-1, call.w.cols))
    want = truth.linear(x.double(), exact(w), bias, deltas, task_ids)
    assert found.dtype == x.dtype
    assert_within(found.cpu(), want, error_from_planes(Call(x, w, bias, deltas, task_ids), want))


def some_of(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Combinations to try: all on a GPU; interpreted, each value as often as the longest axis is long."""
    return each_value(*axes) if INTERPRETED else list(itertools.product(*axes))


def multiply(call: Call, config: Config = PLANES) -> Tensor:
    """The product of tiled `call.w`, on the device and from planes."""
    x, w, *rest = on_device(call)
    return products.multiply(x, w if w.is_tiled else tiles.tile(w), *rest, config)


# --- weights ---------------------------------------------------------------------------------------


class TestOperators(GpuOperators):
    """What every backend must do."""


if INTERPRETED:

    @pytest.mark.exhaustive
    class TestPairs(GpuOperators):
        """The same for every pair of a kind, a dtype and a way of tasks."""

        combine = staticmethod(pairwise)


class TestDecoding(DecoderConformance):
    """Decoding from tiles, where there is a tiled layout."""

    def decode(self, matrix: StoredMatrix, bits: int | None) -> F32:
        w = on_device(plane_matrix(matrix, bits))
        w = backend.tile(w) if backend.can_tile(w) else w
        out: F32 = backend.dequantize(w, None, torch.float32).cpu().numpy()
        return out


@pytest.mark.parametrize("kind", WHOLE, **NAMES_OF)
@pytest.mark.parametrize("group_size", GROUPS)
def test_tiles_and_groups(kind: Scheme, group_size: int) -> None:
    """Rows that fill no tile, columns that fill no block, several macro blocks, scales of every dtype."""
    shapes = list(zip(((1, 1, 1), (17, 300, 3), (33, 70, 5)), SCALE_DTYPES, strict=True))
    one = (WHOLE.index(kind) + GROUPS.index(group_size)) % 3
    for (rows, cols, bits), dtype in shapes[one : one + 1] if INTERPRETED else shapes:
        w = drawn(kind, bits, group_size, rows, cols, seed=rows, dtype=dtype)
        found = backend.dequantize(backend.tile(on_device(w)), None, torch.float32)
        assert same_bits(found.cpu(), truth.decode(w))


def test_rounding_to_half_of_values_at_its_edges() -> None:
    """Ties to even, what is subnormal, and what is too large (DEC-5)."""
    w = drawn(Scheme("uniform"), 1, 32, 16, 32)._replace(zeros=None)
    values = [1 + 2**-11, 1 + 3 * 2**-11, 2.0**-24, 2.0**-25, 1.5 * 2**-24, 2.0**-26, 65519.0, 65520.0, 1e30]
    w = w._replace(scales=torch.tensor(values + [-1e30] * 7).reshape(1, 16, 1))
    for dtype in HALF:
        found = backend.dequantize(on_device(w), None, dtype)
        assert same_bits(found.cpu(), truth.decode(w).to(dtype))


@pytest.mark.parametrize("kind", WHOLE, **NAMES_OF)
def test_some_rows(kind: Scheme) -> None:
    """From a tile's first row to any row."""
    w = drawn(kind, 3, 64, 70, 100, dtype="F16")
    whole, packed = truth.decode(w), backend.tile(on_device(w))
    for start, stop in ((16, 17), (32, 64), (64, 70), (0, 1), (16, 16)):
        assert same_bits(decoding.decode(packed, torch.float32, start, stop).cpu(), whole[start:stop])


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


@pytest.mark.parametrize("kind", CODECS, **NAMES_OF)
@pytest.mark.parametrize("group_size", [0, 128, 512])
def test_long_blocks(kind: Scheme, group_size: int) -> None:
    """Of 128 columns, which is four steps."""
    w = drawn(kind, 1, group_size, 5, 1000)
    assert tiles.steps(w) == 4
    half = {"dtype": torch.float16, "tasks": "add"}
    for more in [({}, half)[CODECS.index(kind) % 2]] if INTERPRETED else [{}, half]:
        check_linear(random_call(w, 2, **more))  # type: ignore[arg-type]


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


# --- bits that have to be the same -----------------------------------------------------------------


@pytest.mark.parametrize(("kind", "dtype"), some_of(CODECS, FLOATS), ids=str)
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


@pytest.mark.parametrize("warps", launch.WARPS)
@pytest.mark.parametrize(("kind", "dtype", "cols"), some_of(CODECS, FLOATS, (700, 40, 700)), ids=str)
def test_any_number_of_warps(kind: Scheme, dtype: torch.dtype, cols: int, warps: int) -> None:
    """With as many macro blocks as warps, fewer, and a number that they do not divide."""
    call = random_call(drawn(kind, 2, 32, 5, cols), 2, dtype=dtype, tasks="mul")
    assert_product(multiply(call, Config(warps, 16)), call)


# --- activations of all sizes ----------------------------------------------------------------------


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


SIZES = [(dtype, size) for dtype in FLOATS for size in MAGNITUDES[dtype]]


@pytest.mark.parametrize(("of", "kind"), some_of(SIZES, (KINDS[0], KINDS[3])), ids=str)
def test_magnitudes_of_x(of: tuple[torch.dtype, float], kind: Scheme) -> None:
    """No activation is lost or overflows, except for what the dtype itself cannot hold."""
    dtype, size = of
    w = drawn(kind, 2, 32, 5, 70)
    x = (torch.rand(2, 70, generator=torch.Generator().manual_seed(0)) * 2 - 1) * size
    x = x.to(dtype)
    assert x.any()
    found, want = multiply(Call(x, w)).cpu().double(), truth.linear(x.double(), exact(w))
    terms = truth.linear(x.double().abs(), terms_of(w))
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


# --- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "group_size"), some_of(CODECS, (32, 128, 0)), ids=str)
def test_gradients_of_large_matrices(kind: Scheme, group_size: int) -> None:
    """More rows than one program has; groups of several blocks."""
    call = random_call(drawn(kind, 1, group_size, 70, 700), 3)
    GpuOperators().check_product_grads(torch.randn(3, 70), call)


# --- what kernels do not look at is refused before -------------------------------------------------


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
