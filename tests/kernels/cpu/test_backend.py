"""The kernels of a CPU: what every backend must do, and what is particular to a CPU."""

from __future__ import annotations

import itertools
import os
import platform
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.concurrency import at_once, forks, in_child
from support.cpu_kernels import WHOLE, CpuOperators, check_linear, fixed_calls, from_planes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowbit_format.kernels import naive, operators
from lowbit_format.kernels.batch import Share
from lowbit_format.kernels.cpu import backend, decoding, many_rows, parallel, products
from lowbit_format.kernels.matrix import PlaneMatrix
from lowbit_format.matrix import StoredMatrix
from lowbit_format.schema import SCALE_DTYPES, Scheme
from lowbit_format.testing.decoding import F32, DecoderConformance
from lowbit_format.testing.matrices import random_matrix
from lowbit_format.testing.products import (
    KINDS,
    NAMES,
    Call,
    absolute,
    assert_near,
    drawn,
    exact,
    magnitude,
    plane_matrix,
    random_call,
    same_bits,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks:DeprecationWarning")

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


# --- weights ---------------------------------------------------------------------------------------


class TestDecoding(DecoderConformance):
    """Decoding from tiles, where there is a tiled layout."""

    def decode(self, matrix: StoredMatrix, bits: int | None) -> F32:
        w = plane_matrix(matrix, bits)
        out: F32 = backend.decode(backend.tile(w) if backend.can_tile(w) else w).numpy()
        return out

    @pytest.mark.parametrize("kind", KINDS, ids=NAMES)
    @pytest.mark.parametrize("group_size", WHOLE)
    @pytest.mark.parametrize("dtype", SCALE_DTYPES)
    def test_tiles_and_groups(self, kind: Scheme, group_size: int, dtype: str) -> None:
        """Rows that fill no tile, columns that fill no word, groups of several words."""
        for rows, cols, bits in ((1, 1, 1), (16, 64, 8), (17, 33, 3), (50, 300, 4), (33, 129, 5)):
            matrix = random_matrix(
                replace(kind, bits=bits, group_size=group_size, scale_dtype=dtype), rows, cols, seed=rows
            )
            assert backend.can_tile(plane_matrix(matrix))
            self.check(matrix) if rows * cols < 3000 else None
            w = plane_matrix(matrix)
            assert same_bits(backend.decode(backend.tile(w)), naive.decode(w))

    @pytest.mark.parametrize("threads", ["1", "2", "5"])
    def test_threads(self, threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LOWBIT_NUM_THREADS", threads)
        monkeypatch.setattr(decoding, "ONE_THREAD_BELOW", 0)
        for kind in KINDS:
            w = drawn(kind, 4, 32, 203, 100)
            assert same_bits(backend.decode(backend.tile(w)), naive.decode(w))

    @pytest.mark.parametrize("kind", [k for k in KINDS if not k.row_bits], ids=str)
    def test_some_rows(self, kind: Scheme) -> None:
        """From a tile's first row to any row."""
        w = drawn(kind, 3, 64, 70, 100, dtype="F16")
        whole, tiled = naive.decode(w), backend.tile(w)
        for first, stop in ((0, 70), (16, 17), (32, 64), (64, 70), (0, 1), (16, 70)):
            assert same_bits(decoding.decode_rows(tiled, first, stop, 1), whole[first:stop])


# --- products --------------------------------------------------------------------------------------


class TestOperators(CpuOperators):
    """What every backend must do."""


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_codec_bits_and_batch(kind: Scheme, bits: int) -> None:
    w = drawn(kind, bits, 32, 81, 100, dtype="F16")
    for batch in range(1, 19):
        check_linear(random_call(w, batch))


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@pytest.mark.parametrize("rows", [1, 16, 70])
def test_many_rows_straight_from_planes(kind: Scheme, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large batches are multiplied in parts, with the task ids of their rows."""
    monkeypatch.setattr(products, "most_rows", lambda *_: float("inf"))
    w = drawn(kind, 3, 64, rows, 100, dtype="F16")
    for batch in (63, 64, 65, 128, 150):
        for dtype, tasks in zip(FLOATS, (None, "mul", "add"), strict=True):
            call = random_call(w, batch, dtype=dtype, layout="leading", tasks=tasks)
            found = check_linear(call)
            last = call._replace(x=call.x[0, -1], task_ids=None if call.task_ids is None else call.task_ids[-1:])
            assert not from_planes(call) or same_bits(found[0, -1, 0], operators.linear(*last)[0])


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@pytest.mark.parametrize("tasks", ["mul", "add"])
@pytest.mark.parametrize("batch", [1, 5, 16, 40])
def test_tasks(kind: Scheme, tasks: str, batch: int) -> None:
    """Tasks of all rows at once and of each row; -1 is the base (TSK-6, TSK-8)."""
    w = drawn(kind, 4, 32, 70, 100, dtype="F16")
    for p in range(w.scales.shape[0]):
        for count in (1, 2, 9):
            check_linear(random_call(w, batch, tasks=tasks, count=count, seed=p))
        call = random_call(w, batch, tasks=tasks, ids=False, seed=p)
        found = check_linear(call)
        all_base = torch.full((batch,), -1)
        torch.testing.assert_close(check_linear(call._replace(task_ids=all_base)), check_linear(Call(*call[:3])))
        assert not torch.allclose(found, check_linear(Call(*call[:3])))


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_a_row_does_not_depend_on_the_others(kind: Scheme) -> None:
    w = backend.tile(drawn(kind, 4, 64, 90, 200))
    call = random_call(w, 15)
    together = operators.linear(*call)
    for row, x in zip(together, call.x, strict=True):
        assert not from_planes(call._replace(x=x)) or same_bits(operators.linear(x, w, call.bias), row)


@pytest.mark.parametrize("batch", [2, 20])
def test_a_bias_with_strides(batch: int) -> None:
    w = drawn(KINDS[1], 4, 32, 33, 100)
    for bias in (torch.randn(66)[::2], torch.randn(1).expand(33), torch.randn(33, 4)[:, 1]):
        check_linear(random_call(w, batch)._replace(bias=bias))


# --- threads and pieces ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known() -> list[tuple[Call, Tensor]]:
    """Products and their results, in one piece."""
    return [(call._replace(w=backend.tile(call.w)), check_linear(call)) for call in fixed_calls()]


def assert_known(known: list[tuple[Call, Tensor]]) -> None:
    for call, want in known:
        found = operators.linear(*call)
        assert same_bits(found, want) if from_planes(call) else torch.allclose(found, want, 1e-4, 1e-4)


@pytest.mark.parametrize("threads", ["1", "2", "5"])
@pytest.mark.parametrize("pool", ["OpenMP", "Python"])
def test_the_number_of_threads(
    threads: str, pool: str, known: list[tuple[Call, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWBIT_NUM_THREADS", threads)
    monkeypatch.setattr(products, "ONE_THREAD_BELOW", 0)
    if pool == "Python":
        monkeypatch.setattr(parallel, "_openmp", lambda: None)
    assert_known(known)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SCRATCH", 1),
        ("SCRATCH", 1 << 20),
        ("CHUNKS_PER_THREAD", 1),
        ("CHUNKS_PER_THREAD", 1000),
        ("MOST_STRIPS", 1),
        ("MOST_STRIPS", 1000),
    ],
)
def test_the_size_of_chunks(
    name: str, value: int, known: list[tuple[Call, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWBIT_NUM_THREADS", "3")
    monkeypatch.setattr(products, "ONE_THREAD_BELOW", 0)
    monkeypatch.setattr(products, name, value)
    assert_known(known)


@pytest.mark.parametrize("pool", ["OpenMP", "Python"])
def test_several_matrices_on_several_threads(pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads go on to the next matrix when there is nothing left to take of one; many rows take another code path."""
    monkeypatch.setenv("LOWBIT_NUM_THREADS", "4")
    monkeypatch.setattr(products, "ONE_THREAD_BELOW", 0)
    if pool == "Python":
        monkeypatch.setattr(parallel, "_openmp", lambda: None)
    matrices = [backend.tile(drawn(KINDS[1], 4, 64, 300, 330, seed=seed)) for seed in range(12)]
    lengths = [1, 2, 70, 1, 500, 1, 0, 3, 1, 1, 17, 1]
    ends = list(itertools.accumulate(lengths))
    shares = [Share(w, end - n, end) for w, n, end in zip(matrices, lengths, ends, strict=True)]
    x = torch.randn(ends[-1], 330)
    want = torch.cat([operators.linear(x[s.begin : s.end], s.w) for s in shares])
    for _ in range(20):
        assert same_bits(operators.linear_each(x, shares), want)


def test_long_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their tables are made in parts."""
    for group, cols in ((128, 4000), (0, 4011), (1024, 2100), (0, 100)):
        for kind in KINDS:
            call = random_call(drawn(kind, 2, group, 33, cols), 7)
            want = check_linear(call)
            for threads in ("1", "2", "5"):
                monkeypatch.setenv("LOWBIT_NUM_THREADS", threads)
                assert not from_planes(call) or same_bits(operators.linear(call.x.clone(), *call[1:]), want)


def test_several_python_threads_at_once(known: list[tuple[Call, Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same matrices with different activations in each call."""
    monkeypatch.setenv("LOWBIT_NUM_THREADS", "2")
    monkeypatch.setattr(products, "ONE_THREAD_BELOW", 0)

    def work(factor: float) -> Callable[[], None]:
        mine = [
            (c._replace(x=c.x * factor, bias=None), operators.linear(c.x * factor, c.w, None, *c[3:])) for c, _ in known
        ]
        return lambda: [assert_known(mine) for _ in range(3)] and None

    at_once(*(work(factor) for factor in (1.0, 2.0, -0.5, 3.25)))


@forks
def test_in_a_forked_child(known: list[tuple[Call, Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP's threads are not there."""
    monkeypatch.setenv("LOWBIT_NUM_THREADS", "4")
    monkeypatch.setattr(products, "ONE_THREAD_BELOW", 0)
    few = [(call, want) for call, want in known if from_planes(call)]
    assert_known(few)

    def work() -> bool:
        assert_known(few)
        return True

    assert in_child(work)
    assert in_child(lambda: in_child(work))
    assert_known(few)


SHARED_MEMORY = """
from lowbit_format.kernels import operators
from lowbit_format.kernels.cpu import backend, products
from lowbit_format.testing.products import KINDS, drawn, random_call, same_bits

products.ONE_THREAD_BELOW = 0
for kind in KINDS:
    for batch, tasks in ((1, None), (7, "mul"), (7, "add")):
        call = random_call(backend.tile(drawn(kind, 3, 64, 1000, 500)), batch, tasks=tasks)
        want, weights = operators.linear(*call), backend.decode(call.w)
        assert all(same_bits(operators.linear(*call), want) for _ in range(20)), (kind, batch, tasks)
        assert all(same_bits(backend.decode(call.w), weights) for _ in range(20)), kind
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs a setting of glibc's malloc")
def test_no_kernel_uses_memory_that_it_has_freed() -> None:
    """Where all threads share one arena, memory that one has freed is the next that another gets."""
    environment = {
        **os.environ,
        "MALLOC_ARENA_MAX": "1",
        "LOWBIT_NUM_THREADS": "4",
    }
    done = subprocess.run([sys.executable, "-c", SHARED_MEMORY], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


# --- activations and matrices that change ----------------------------------------------------------


def by_item(x: Tensor) -> None:
    x[0, 3] += 1


def by_numpy(x: Tensor) -> None:
    x.numpy()[...] = 0.5 - x.numpy()


def by_data(x: Tensor) -> None:
    x.data.mul_(-1.5)


def by_order(x: Tensor) -> None:
    x.copy_(x.flip(-1).clone())


@pytest.mark.parametrize("change", [by_item, by_numpy, by_data, by_order])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_activations_changed_in_place(change: Callable[[Tensor], None], mode: Any) -> None:
    """Slices of activations that are cached between products are never used for other activations."""
    one, two = (backend.tile(drawn(KINDS[1], bits, 32, 40, 100)) for bits in (2, 3))
    with mode():
        x = torch.randn(2, 100)
        first = [operators.linear(x, w) for w in (one, one, two)]
        assert same_bits(first[0], first[1])
        change(x)
        for w, before in ((one, first[0]), (two, first[2])):
            found = operators.linear(x, w)
            assert same_bits(found, operators.linear(x.clone(), w))
            assert not torch.equal(found, before)
            torch.testing.assert_close(found, x @ naive.decode(backend.untile(w)).T, rtol=1e-4, atol=1e-4)


def test_other_activations_in_the_same_memory() -> None:
    """Of another dtype, width, number of rows or order, and with other groups."""
    memory = torch.randn(4 * 128).view(torch.uint8)
    matrices = [
        drawn(kind, 2, group, 20, cols)
        for kind in (KINDS[1], KINDS[3])
        for group in (0, 32, 64)
        for cols in (100, 105, 128)
    ]
    rng = random.Random(0)
    for _ in range(200):
        w, dtype = rng.choice(matrices), rng.choice(FLOATS)
        values = memory.view(dtype)
        batch = rng.choice([1, 2])
        x = rng.choice([
            values[: batch * w.cols].view(batch, w.cols),
            values[: batch * w.cols].view(w.cols, batch).t(),
        ])  # fmt: skip
        if not torch.isfinite(x).all() or dtype != torch.float32:
            memory.view(dtype).copy_(torch.randn(len(values)))
        check_linear(Call(x, w))
        memory.view(torch.float32).copy_(torch.randn(512))


def test_one_input_of_matrices_with_other_groups() -> None:
    x = torch.randn(3, 200)
    for group in (0, 32, 64, 96, 128, 0, 32):
        for kind in KINDS:
            check_linear(Call(x, drawn(kind, 2, group, 20, 200)))


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@pytest.mark.parametrize("rows", [32, 37])
@pytest.mark.parametrize("group_size", [0, 32])
def test_a_matrix_changed_in_place(kind: Scheme, rows: int, group_size: int) -> None:
    """What is cached with a matrix follows its current values."""
    w = backend.tile(drawn(kind, 4, group_size, rows, 100))
    x = torch.randn(2, 100)
    for name in ("scales", "offsets", "zeros", "codebook", "planes"):
        values = getattr(w, name)
        if values is None:
            continue
        before = operators.linear(x, w)
        values.copy_(255 - values if name == "planes" else values * 1.5 + 0.1)
        found = operators.linear(x, w)
        assert not torch.equal(found, before)
        torch.testing.assert_close(found, x @ naive.decode(backend.untile(w)).T, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@pytest.mark.parametrize("rows", [32, 37])
@pytest.mark.parametrize("group_size", [0, 32])
def test_a_matrix_with_other_tensors(kind: Scheme, rows: int, group_size: int) -> None:
    """The same planes with another tensor beside them, as a task's shift makes it."""
    w = backend.tile(drawn(kind, 4, group_size, rows, 100))
    x = torch.randn(2, 100)
    for name in ("scales", "offsets", "zeros", "codebook"):
        if getattr(w, name) is None:
            continue
        for form in (w, w._replace(**{name: getattr(w, name) * 1.5 + 0.1}), w):
            want = x @ naive.decode(backend.untile(form)).T
            torch.testing.assert_close(operators.linear(x, form), want, rtol=1e-4, atol=1e-4, msg=name)


def test_rows_with_other_bits() -> None:
    """The same memory holds ragged tiles of the same total size."""
    kind, (many, few) = Scheme("uniform", row_bits=True), (torch.full((16,), n, dtype=torch.uint8) for n in (4, 1))
    pair = []
    for seed, row_bits in enumerate((torch.cat([many, few]), torch.cat([few, many]))):
        matrix = random_matrix(replace(kind, bits=4), 32, 64, seed=seed)
        planes = torch.randint(0, 256, (int(row_bits.sum()), 8), dtype=torch.uint8)
        pair.append(plane_matrix(matrix)._replace(planes=planes, row_bits=row_bits))
    w, other = backend.tile(pair[0]), backend.tile(pair[1])
    x = torch.randn(2, 64)
    operators.linear(x, w)
    for name in ("planes", "scales", "zeros", "row_bits"):
        getattr(w, name).copy_(getattr(other, name))
    assert same_bits(operators.linear(x, w), operators.linear(x, pair[1]))


# --- larger batches --------------------------------------------------------------------------------


@pytest.fixture(
    params=[(1, 0, False), (16 * 128 * 2, 3, True), (1 << 18, 40, False)], ids=["16 rows", "32 rows", "all rows"]
)
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How much of the weight is decoded at a time, for how many rows of a task it is not decoded, and whether tasks
    share products."""
    size, few, shares = request.param
    monkeypatch.setattr(many_rows, "shares_products", lambda _: shares)
    monkeypatch.setattr(products, "most_rows", lambda *_: 0)
    monkeypatch.setattr(many_rows, "CHUNK", size)
    monkeypatch.setattr(many_rows, "FEW_ROWS", few)


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tasks", [None, "mul", "add"])
def test_a_large_batch(kind: Scheme, dtype: torch.dtype, tasks: str | None, tile: None) -> None:
    w = drawn(kind, 3, 32, 70, 100, dtype="F16")
    for count in (1, 9):  # fewer tasks than parts of the weight, and more
        for ids in (False, True):
            call = random_call(w, 33, dtype=dtype, layout="leading", tasks=tasks, count=count, ids=ids)
            check_linear(call)


@pytest.mark.parametrize("shares", [True, False])
def test_tasks_of_many_rows_and_of_few(shares: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one batch: tasks that share products or have a weight of their own, tasks of single rows, and the base."""
    monkeypatch.setattr(products, "most_rows", lambda *_: 0)
    monkeypatch.setattr(many_rows, "shares_products", lambda _: shares)
    few = many_rows.FEW_ROWS
    ids = torch.tensor([2] * 3 + [0] * (few + 1) + [1, -1] * 5 + [-1] * few + [3] * few + [0, 2])
    for planes, dtype in itertools.product((1, 3), FLOATS):
        w = drawn(KINDS[0], 3, 32, 70, 100, dtype="F16")
        call = random_call(w, len(ids), dtype=dtype)._replace(deltas=0.3 * torch.randn(4, planes, 70), task_ids=ids)
        check_linear(call)
        check_linear(call._replace(x=call.x[:-2], task_ids=ids[:-2].clamp(min=0)))
    with pytest.raises(IndexError, match="task 4 of 4"):
        operators.linear(*call._replace(task_ids=ids + 1))


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tasks", [None, "mul", "add"])
def test_gradient_of_the_input(kind: Scheme, dtype: torch.dtype, tasks: str | None, tile: None) -> None:
    w = drawn(kind, 3, 32, 70, 100, dtype="BF16")
    for batch, ids in ((2, False), (33, True)):
        _, _, _, deltas, task_ids = random_call(w, batch, tasks=tasks, ids=ids)
        grad = torch.randn(batch, 70).to(dtype)
        want = naive.linear_input_grad(grad.double(), exact(w), deltas, task_ids)
        terms = naive.linear_input_grad(grad.double().abs(), absolute(w), magnitude(deltas), task_ids)
        for form in (w, backend.tile(w)):
            found = backend.linear_input_grad(grad, form, deltas, task_ids)
            assert found.dtype == dtype
            assert_near(found, want, terms, one_rounding=False)


# --- with torch ------------------------------------------------------------------------------------


class Seen(TorchDispatchMode):
    """Notes every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.names = list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@pytest.mark.parametrize("batch", [1, 4])
def test_both_doors_to_the_kernel_give_the_same(kind: Scheme, batch: int) -> None:
    """Where no autograd, tracing or dispatch mode is active, the kernel is called directly."""
    call = random_call(drawn(kind, 4, 32, 33, 100), batch)
    x, w, *rest = call
    for form in (w, backend.tile(w)):
        with torch.no_grad():
            direct = operators.linear(x, form, *rest)
        through = operators.linear(x.clone().requires_grad_(), form, *rest)
        assert through.requires_grad
        assert not direct.requires_grad
        scales = form._replace(scales=form.scales.clone().requires_grad_())
        for found in (
            through,
            operators.linear(x, scales, *rest),
            torch.ops.lowbit.linear(x, *form[:6], *rest, *form[6:]),
        ):
            assert same_bits(found.detach(), direct) if from_planes(call) else torch.allclose(found, direct, 1e-4, 1e-4)


def test_modes_see_the_operator() -> None:
    w = backend.tile(drawn(KINDS[1], 4, 32, 33, 100))
    x = torch.randn(2, 100)
    with torch.no_grad(), Seen() as seen:
        found = operators.linear(x, w)
    assert "lowbit.linear.default" in seen.names
    assert same_bits(found, operators.linear(x, w))


def test_compiled_graphs_have_the_operator() -> None:
    w = backend.tile(drawn(KINDS[1], 4, 32, 33, 100))
    targets = list[str]()

    def record(module: torch.fx.GraphModule, inputs: Any) -> Any:
        targets.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    x = torch.randn(2, 100)
    with torch.no_grad():
        found = torch.compile(lambda x: operators.linear(x, w), fullgraph=True, backend=record)(x)
        assert same_bits(found, operators.linear(x, w))
    assert any("lowbit.linear" in target for target in targets)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traces_have_the_operator() -> None:
    w = backend.tile(drawn(KINDS[1], 4, 32, 33, 100))
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: operators.linear(x, w), torch.randn(2, 100))
    assert "lowbit::linear" in str(traced.graph)


def test_a_functional_transform_is_not_passed_by() -> None:
    """Custom operators have no such gradients: torch says so, where a call past them would give zeros."""
    tiled = backend.tile(drawn(KINDS[1], 4, 32, 33, 100))
    with torch.no_grad(), pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda x: operators.linear(x, tiled).sum())(torch.randn(100))


# --- what kernels do not look at is refused before ------------------------------------------------


def test_a_bias_of_another_length() -> None:
    with pytest.raises(ValueError, match="33"):
        operators.linear(torch.randn(2, 100), backend.tile(drawn(KINDS[1], 3, 32, 33, 100)), torch.zeros(20))


def test_tasks_in_other_dtypes() -> None:
    w, x = backend.tile(drawn(KINDS[1], 3, 32, 33, 100)), torch.randn(2, 100)
    deltas, ids = torch.randn(2, 1, 33).half(), torch.tensor([1, 0], dtype=torch.int32)
    want = operators.linear(x, w, None, deltas.float(), ids.long())
    assert same_bits(operators.linear(x, w, None, deltas, ids), want)


def test_every_negative_id_is_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = backend.tile(drawn(KINDS[1], 3, 32, 33, 100)), torch.randn(40, 100)
    monkeypatch.setattr(products, "most_rows", lambda *_: 0)
    ids = torch.arange(40) % 11 - 2
    found = operators.linear(x, w, None, torch.randn(9, 1, 33), ids)
    torch.testing.assert_close(found[ids < 0], operators.linear(x, w)[ids < 0], rtol=1e-4, atol=1e-4)


# --- codebooks of consecutive integers -------------------------------------------------------------


def linear_codebook(bits: int, first: float, group_size: int, rows: int = 70, cols: int = 150) -> PlaneMatrix:
    """A matrix whose weights are ``(code + first) * scale``, as those of several GGUF types."""
    w = drawn(Scheme("codebook"), bits, group_size, rows, cols, dtype="F32")
    return w._replace(codebook=first + torch.arange(2.0**bits))


@pytest.mark.parametrize(
    ("bits", "first", "group_size"), [(6, -32, 16), (3, -4, 16), (8, -128, 32), (4, -8, 32), (2, 0, 0)]
)
@pytest.mark.parametrize("tasks", [None, "mul", "add"])
def test_levels_that_count_are_multiplied_as_planes(
    bits: int, first: float, group_size: int, tasks: str | None
) -> None:
    """Of any number of bits, also where no register holds the levels."""
    w = linear_codebook(bits, first, group_size)
    assert products.zero_of(w) == -first
    for batch in (1, 5):
        call = random_call(w, batch, tasks=tasks)
        assert from_planes(call)
        check_linear(call)
    assert same_bits(backend.decode(backend.tile(w)), naive.decode(w))


def test_levels_with_another_step_are_no_counting() -> None:
    w = linear_codebook(5, -16, 32)
    assert w.codebook is not None
    for codebook in (w.codebook * 2, w.codebook.flip(0), w.codebook.masked_fill(w.codebook == 3, 9.0)):
        other = w._replace(codebook=codebook.contiguous())
        assert products.zero_of(other) is None
        assert products.plan(other) is None
        check_linear(random_call(other, 3))


def test_levels_that_stop_counting() -> None:
    """What is kept with the planes follows the codebook's values."""
    w = backend.tile(linear_codebook(4, -8, 32))
    x = torch.randn(2, w.cols)
    assert w.codebook is not None
    for change in (0.0, 0.25):
        w.codebook[3] += change
        torch.testing.assert_close(operators.linear(x, w), x @ naive.decode(backend.untile(w)).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("known", [{"sse2", "avx2"}, {"sse2", "avx512bf16", "avx512fp16"}, {"neon"}])
def test_the_dtype_of_products_of_many_rows(
    dtype: torch.dtype, known: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half precisions that the machine has no instructions for are multiplied in float32, and rounded once."""
    call = next(call for call in fixed_calls() if call.deltas is None)._replace(bias=None)
    x, w = torch.randn(300, call.w.cols).to(dtype), backend.tile(call.w)
    monkeypatch.setattr(backend, "features", lambda: frozenset(known))
    backend.product_dtype.cache_clear()
    emulated = known == {"sse2", "avx2"}
    assert backend.product_dtype(dtype) == (torch.float32 if emulated else dtype)
    assert backend.product_dtype(torch.float32) == torch.float32
    found = operators.linear(x, w, None, None, None)
    assert found.dtype == dtype
    if emulated:
        assert torch.equal(found, operators.linear(x.float(), w, None, None, None).to(dtype))
    backend.product_dtype.cache_clear()
