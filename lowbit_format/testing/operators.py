"""What every backend of kernels must do: inherit :class:`OperatorConformance`, name yours, and its tests run for it.

Weights have to be right bit for bit, products and gradients within the rounding of float32 sums. The truth is
:mod:`.products` in float64, which shares no code with any backend.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ..errors import ShapeError
from ..kernels.batch import Factor, Share
from ..kernels.matrix import PlaneMatrix
from ..schema import SCALE_DTYPES, Scheme
from . import products as truth
from .matrices import random_matrix
from .products import (
    KINDS,
    LAYOUTS,
    NAMES,
    ROUNDINGS,
    Call,
    absolute,
    assert_grads,
    assert_within,
    drawn,
    exact,
    magnitude,
    on_device,
    plane_matrix,
    random_call,
    rounding_error,
    same_bits,
)


def pairwise(*axes: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    """Combinations of values of all axes in which every pair of values of two axes occurs: far fewer than all."""
    everything = list(itertools.product(*axes))
    random.Random(0).shuffle(everything)
    seen = set[tuple[int, int, Any, Any]]()
    for values in everything:
        at = list(enumerate(values))
        pairs = {(i, j, a, b) for (i, a), (j, b) in itertools.combinations(at, 2)} or {(0, 0, values[0], None)}
        if not pairs <= seen:
            seen |= pairs
            yield values


def each_value(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """As many combinations as the longest axis has values, in which every value of every axis occurs."""
    lists = [list(axis) for axis in axes]
    return [tuple(axis[i % len(axis)] for axis in lists) for i in range(max(map(len, lists)))]


class OperatorConformance:
    """Tests of a backend's operators; a subclass says which backend, and what it can do.

    Attributes:
        backend: a module or an object with the functions of :class:`lowbit_format.kernels.operators.Backend`.
        device: type of the device that it computes on, such as ``"cuda"``.
        dtypes: of x that it multiplies.
        kinds: schemes to try, without bits and group size; by default all that the format has.
        group_sizes: to try.
        batches: numbers of rows of x to try; `many` is one for which no backend multiplies from planes.
        shape: rows and columns of most matrices. Large enough for two tiles of the backend is best.
        combine: how kinds, dtypes and tasks are combined: ``itertools.product``; :func:`pairwise` or :func:`each_value`
            where one call takes long.
        examples: random products to try.
        tolerance: error of a float32 sum, of the sum of its terms' absolute values.
        unknown: what a row or a task that does not exist gives: IndexError, or NaN in the rows of the result.
        errors: what wrong shapes give.
    """

    backend: Any
    device: str = "cpu"
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float16, torch.bfloat16)
    kinds: Sequence[Scheme] = KINDS
    group_sizes: Sequence[int] = (0, 16, 32, 64, 96, 128, 24)
    batches: Sequence[int] = (1, 2, 3, 5, 8, 16, 17, 40)
    many: int = 200
    shape: tuple[int, int] = (37, 100)
    combine: ClassVar[Callable[..., Iterable[tuple[Any, ...]]]] = itertools.product
    examples: int = 50
    tolerance: float = ROUNDINGS
    unknown: Literal["raises", "nan"] = "raises"
    errors: tuple[type[Exception], ...] = (ShapeError,)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Parameters of these names have the values that the class has."""
        axes: dict[str, Iterable[Any]] = {
            "kind": self.kinds,
            "bits": range(1, 9),
            "group_size": self.group_sizes,
            "dtype": self.dtypes,
            "tasks": (None, "mul", "add"),
            "batch": self.batches,
            "layout": LAYOUTS,
            "value": (float("nan"), float("inf"), -float("inf")),
        }
        given = {name for mark in metafunc.definition.iter_markers("parametrize") for name in _names(mark.args[0])}
        names = [name for name in axes if name in metafunc.fixturenames and name not in given]
        if names:
            combined = [tuple(values) for values in type(self).combine(*(axes[name] for name in names))]
            metafunc.parametrize(names, combined, ids=_name)

    # --- what a subclass may refine ---

    def allowed(self, call: Call, want: Tensor, terms: Tensor) -> Tensor:
        """How far a product may be off; `terms` are the sums of absolute values, both float64 ``[..., rows]``."""
        return rounding_error(want, terms, call.x.dtype, one_rounding=False, tolerance=self.tolerance)

    def check_linear(self, call: Call) -> Tensor:
        """The product of a call on the CPU, which must be right."""
        found = self.linear(call)
        self.judge(call, found)
        return found

    # --- helpers ---

    def tile(self, w: PlaneMatrix) -> PlaneMatrix:
        """`w` in the backend's layout, where it has one for it."""
        out: PlaneMatrix = self.backend.tile(w) if self.backend.can_tile(w) else w
        return out

    def run(self, name: str, *args: Any, tiled: bool = True) -> Any:
        """A function of the backend, on its device and in its layout; what it gives, on the CPU."""
        there = [self.tile(a) if tiled and hasattr(a, "planes") else a for a in on_device(args, self.device)]
        with torch.no_grad():
            found = getattr(self.backend, name)(*there)
        if isinstance(found, Tensor):
            return found.cpu()
        return tuple(None if t is None else t.cpu() for t in found)

    def linear(self, call: Call, *, tiled: bool = True) -> Tensor:
        out: Tensor = self.run("linear", *call, tiled=tiled)
        return out

    def judge(self, call: Call, *found: Tensor) -> None:
        """Each of `found` is the product of `call`, within what is allowed."""
        x, w, bias, deltas, task_ids = call
        want = truth.linear(x.double(), exact(w), bias, deltas, task_ids)
        terms = truth.linear(x.double().abs(), absolute(w), magnitude(bias), magnitude(deltas), task_ids)
        at_most = self.allowed(call, want, terms)
        for product in found:
            assert (product.dtype, product.shape) == (x.dtype, want.shape)
            assert_within(product, want, at_most)

    def draw(self, kind: Scheme, bits: int = 3, group_size: int = 32, *, dtype: str = "F16") -> PlaneMatrix:
        return drawn(kind, bits, group_size, *self.shape, seed=bits, dtype=dtype)

    def calls(self) -> st.SearchStrategy[Call]:
        """Any product."""

        @st.composite
        def calls(draw: st.DrawFn) -> Call:
            few = self.shape != OperatorConformance.shape
            w = drawn(
                draw(st.sampled_from(list(self.kinds))),
                draw(st.integers(1, 3 if few else 8)),
                draw(st.sampled_from(list(self.group_sizes))),
                draw(st.integers(1, 20 if few else 200)),
                draw(st.integers(1, 300 if few else 400)),
                draw(st.integers(0, 2**32 - 1)),
                draw(st.sampled_from(SCALE_DTYPES)),
            )
            dtype = draw(st.sampled_from(list(self.dtypes)))
            return random_call(
                w,
                draw(st.integers(1, 16) | st.sampled_from([1, 17, 50, 130][: 2 if few else 4])),
                dtype=dtype,
                layout=draw(st.sampled_from(LAYOUTS)),
                bias=draw(st.sampled_from([None, torch.float32, dtype])),
                tasks=draw(st.sampled_from([None, "mul", "add"])),
                count=draw(st.integers(1, 4)),
                ids=draw(st.booleans()),
                seed=draw(st.integers(0, 1000)),
            )

        return calls()

    # --- weights ---

    def test_dequantize(self, kind: Scheme, tasks: str | None) -> None:
        """Bit for bit in float32, one rounding to any other dtype (DEC-5); of task 0 where there are deltas."""
        w = self.draw(kind, 4, 64, dtype="BF16")
        deltas = random_call(w, 1, tasks=tasks).deltas
        want = truth.dequantize(w, deltas)
        for dtype in (torch.float32, *self.dtypes, torch.float64):
            for tiled in (True, False):
                found = self.run("dequantize", w, deltas, dtype, tiled=tiled)
                assert same_bits(found, want.to(dtype))
                assert found.is_contiguous()

    def test_ragged_rows_at_a_lower_precision(self) -> None:
        """MIX-4, NST-1: ``row_bits`` may say more than there is to read."""
        for name, group_size in (("bcq", 0), ("uniform", 0), ("bcq", 32)):
            scheme = Scheme(name, 4, group_size, "F32", row_bits=True, nested=(2,))
            w = plane_matrix(random_matrix(scheme, 40, 100), 2)
            assert w.row_bits is not None
            assert int(w.row_bits.max()) > w.bits
            assert same_bits(self.run("dequantize", w, None, torch.float32), truth.decode(w))
            self.check_linear(random_call(w, 3))

    # --- chosen rows ---

    def test_embedding(self, kind: Scheme, tasks: str | None) -> None:
        """Bit for bit, rows in any order and number, of any integers; each of its task, -1 being the base."""
        ids = [
            torch.tensor([0, 36, 36, 5, 0]),
            torch.randint(0, 37, (3, 1, 7), dtype=torch.int32),
            torch.randint(0, 37, (4, 6)).t(),
            torch.tensor([9, 8, 9, 8])[::2],
            torch.tensor(17),
            torch.empty(2, 0, dtype=torch.int64),
        ]
        for i, some in enumerate(ids):
            w = drawn(kind, 3, (0, 32)[i % 2], 37, 100, dtype="F16")
            call = random_call(w, some.numel(), tasks=tasks, ids=i % 3 != 2, seed=i)
            dtype = self.dtypes[i % len(self.dtypes)]
            found = self.run("embedding", some, w, call.deltas, call.task_ids, dtype)
            assert same_bits(found, truth.embedding(some, w, call.deltas, call.task_ids).to(dtype))

    @pytest.mark.parametrize("bad", [37, 48, 1 << 40, -38])
    def test_a_row_that_is_not_there(self, kind: Scheme, bad: int) -> None:
        """Also one that only pads a tile."""
        w = drawn(kind, 2, 32, 37, 50)
        arguments = torch.tensor([0, bad, 36]), w, None, None, torch.float32
        if self.unknown == "raises":
            for tiled in (True, False):
                with pytest.raises(IndexError):
                    self.run("embedding", *arguments, tiled=tiled)
        elif self.backend.can_tile(on_device(w, self.device)):
            found = self.run("embedding", *arguments)
            assert found[1].isnan().all()
            assert same_bits(found[::2], truth.decode(w)[[0, 36]])

    # --- products ---

    def test_any_product(self) -> None:
        @settings(max_examples=self.examples, deadline=None)
        @given(self.calls())
        def check(call: Call) -> None:
            self.check_linear(call)

        check()

    def test_every_codec_and_bits(self, kind: Scheme, bits: int) -> None:
        w = self.draw(kind, bits)
        for batch, dtype in zip((2, 3, 5), self.dtypes, strict=False):
            self.check_linear(random_call(w, batch, dtype=dtype, seed=bits))

    def test_every_batch(self, dtype: torch.dtype, batch: int) -> None:
        self.check_linear(random_call(self.draw(Scheme("uniform"), 1), batch, dtype=dtype, seed=batch))

    def test_every_group_size(self, kind: Scheme, group_size: int) -> None:
        """Groups of several blocks, and a last group that is short."""
        w = drawn(kind, 2, group_size, 16, 490, seed=group_size)
        self.check_linear(random_call(w, 2, dtype=self.dtypes[-1]))

    def test_many_rows(self, kind: Scheme, dtype: torch.dtype, tasks: str | None) -> None:
        """More than are multiplied from planes; fewer tasks than parts of the weight, and more."""
        w = self.draw(kind)
        for count, ids in ((1, False), (9, True)):
            call = random_call(w, self.many, dtype=dtype, layout="leading", tasks=tasks, count=count, ids=ids)
            self.check_linear(call)

    def test_tasks(self, kind: Scheme, tasks: str | None) -> None:
        """Of each row, -1 being the base, and of all rows at once; of some planes and of all (TSK-6, TSK-8)."""
        if tasks is None:
            return
        w = self.draw(kind, 2)
        for seed in range(w.scales.shape[0]):
            call = random_call(w, 5, tasks=tasks, seed=seed, count=3)
            found = self.check_linear(call._replace(task_ids=torch.tensor([2, -1, 0, 1, -7])))
            base = self.check_linear(call._replace(deltas=None, task_ids=None))
            first = self.check_linear(call._replace(task_ids=None))
            torch.testing.assert_close(found[[1, 4]], base[[1, 4]], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found[2], first[2], rtol=1e-5, atol=1e-5)
            assert not torch.allclose(first, base)

    def test_a_task_that_is_not_there(self, kind: Scheme) -> None:
        w = self.draw(kind)
        for batch in (3, self.many):
            call = random_call(w, batch, tasks="mul", count=4)
            ids = torch.arange(batch) % 4
            ids[[0, 2]] = torch.tensor([4, 9])
            if self.unknown == "raises":
                with pytest.raises(IndexError):
                    self.linear(call._replace(task_ids=ids))
            elif self.backend.can_tile(on_device(w, self.device)):
                found = self.linear(call._replace(task_ids=ids))
                assert found[[0, 2]].isnan().all()
                assert same_bits(found[1], self.linear(call._replace(task_ids=ids % 4))[1])
        if self.unknown == "nan" and self.backend.can_tile(on_device(w, self.device)):
            rows = self.run("embedding", torch.tensor([1, 1]), w, call.deltas, torch.tensor([4, -1]), torch.float32)
            assert rows.isnan().all(1).tolist() == [True, False]

    def test_strides_of_x(self, layout: str, dtype: torch.dtype) -> None:
        """The same numbers in other places give the same product."""
        call = random_call(self.draw(Scheme("uniform"), 2), 6, dtype=dtype, layout=layout)
        found, again = self.check_linear(call), self.check_linear(call._replace(x=call.x.contiguous()))
        torch.testing.assert_close(found, again)

    def test_a_bias_of_any_dtype_and_strides(self) -> None:
        w, rows = self.draw(Scheme("bcq"), 1), self.shape[0]
        for i, bias in enumerate((
            torch.randn(rows).half(),
            torch.randn(rows).double(),
            torch.randn(2 * rows)[::2],
            torch.randn(1).expand(rows),
            torch.randn(rows, 4)[:, 1],
        )):  # fmt: skip
            self.check_linear(random_call(w, 2, dtype=self.dtypes[i % len(self.dtypes)])._replace(bias=bias))

    def test_deltas_and_ids_with_strides(self) -> None:
        w = self.draw(Scheme("bcq", offset=True))
        call, (p, rows, groups) = random_call(w, 6), w.scales.shape
        ids = torch.tensor([0, 9, 1, 9, -1, 9, 0, 9, 0, 9, 1, 9])[::2]
        few = torch.tensor([0, 1, -1], dtype=torch.int32)[:, None].expand(3, 2).reshape(-1)
        for deltas, task_ids in (
            (torch.randn(rows, 2, 2).permute(1, 2, 0), few),
            (torch.randn(2, groups, p, rows).permute(0, 2, 3, 1), ids),
            (torch.randn(2, p, rows).half(), ids),
            (torch.randn(1, p, rows).expand(2, p, rows), ids),
        ):
            self.check_linear(call._replace(deltas=deltas, task_ids=task_ids))

    def test_empty_batches(self) -> None:
        rows, cols = self.shape
        for tiled, shape in itertools.product((True, False), ((0, cols), (2, 0, cols), (0, 0, cols))):
            for dtype in self.dtypes:
                call = Call(torch.empty(shape, dtype=dtype), self.draw(KINDS[1]), torch.randn(rows))
                found = self.linear(call, tiled=tiled)
                assert (found.shape, found.dtype) == ((*shape[:-1], rows), dtype)

    def test_one_row_without_a_batch(self) -> None:
        call = random_call(self.draw(KINDS[1]), 1)
        found = self.linear(call._replace(x=call.x[0]))
        torch.testing.assert_close(found, self.check_linear(call)[0])

    def test_several_matrices(self, kind: Scheme, dtype: torch.dtype, tasks: str | None) -> None:
        """Each with its rows of x, also none, gives the bits that it gives alone."""
        x, ids = torch.randn(8, self.shape[1], dtype=dtype), torch.tensor([1, 0, -1, 1, 0, 0, 1, 1])
        shares = []
        for seed, (begin, end) in enumerate(((0, 3), (3, 3), (3, 4), (4, 8))):
            w = self.tile(on_device(drawn(kind, 2, 32, *self.shape, seed=seed), self.device))
            deltas = None if seed == 2 else random_call(w, 1, tasks=tasks, count=2, seed=seed).deltas
            shares.append(Share(w, begin, end, None if deltas is None else deltas.to(self.device)))
        task_ids = None if tasks is None else ids.to(self.device)
        found = self.run("linear_each", x, shares, task_ids)
        assert (found.shape, found.dtype) == ((8, self.shape[0]), dtype)
        for w, begin, end, deltas in shares:
            own = None if deltas is None else ids[begin:end]
            assert same_bits(found[begin:end], self.run("linear", x[begin:end], w, None, deltas, own))

    def test_the_same_rows_with_several_matrices(self, kind: Scheme, dtype: torch.dtype, tasks: str | None) -> None:
        """Of different sizes and bits, each with its own bias and tasks, gives the bits that it gives alone."""
        rows, cols = self.shape
        x, factors = torch.randn(2, 2, cols, dtype=dtype), []
        for seed, (bits, count) in enumerate(((2, rows), (3, 5))):
            w = self.tile(on_device(drawn(kind, bits, 32, count, cols, seed=seed), self.device))
            call = random_call(w, 4, tasks=None if seed == 1 else tasks, seed=seed, bias=None if seed == 0 else dtype)
            factors.append(on_device(Factor(w, call.bias, call.deltas, call.task_ids), self.device))
        found = self.run("linear_together", x, factors)
        assert len(found) == len(factors)
        for out, factor in zip(found, factors, strict=True):
            assert same_bits(out, self.run("linear", x, *factor))

    def test_several_matrices_that_do_not_fit(self) -> None:
        """Kernels check no bounds: what would read or write beside a tensor is refused."""
        w, other = (self.tile(on_device(drawn(KINDS[0], 2, 32, rows, 64), self.device)) for rows in (16, 32))
        x = torch.randn(4, 64)
        for shares in (
            [Share(w, 0, 2), Share(other, 2, 4)],
            [Share(w, 0, 2), Share(w, 3, 4)],
            [Share(w, 0, 2), Share(w, 1, 4)],
            [Share(w, 0, 5)],
            [Share(w, 0, 3)],
            [],
        ):
            with pytest.raises(self.errors):
                self.run("linear_each", x, shares, None)
        with pytest.raises(self.errors):
            self.run("linear_each", x[:, :32], [Share(w, 0, 4)], None)

    def test_both_layouts_give_the_same(self, kind: Scheme) -> None:
        call = random_call(self.draw(kind, 2), 2)
        torch.testing.assert_close(self.check_linear(call), self.linear(call, tiled=False), rtol=1e-5, atol=1e-5)

    def test_x_in_float64(self) -> None:
        call = random_call(self.draw(KINDS[1]), 3)
        call = call._replace(x=call.x.double(), bias=None)
        torch.testing.assert_close(self.linear(call), truth.linear(call.x, exact(call.w)))

    def test_uniform_codes_without_zeros(self) -> None:
        w = self.draw(Scheme("uniform"))._replace(zeros=None)
        self.check_linear(random_call(w, 3))
        assert same_bits(self.run("dequantize", w, None, torch.float32), truth.decode(w))

    @pytest.mark.parametrize(
        ("width", "table"),
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
    def test_codebooks(self, width: int, table: list[float]) -> None:
        """Also ones of which combinations of planes do not count."""
        w = self.draw(Scheme("codebook"), width)._replace(codebook=torch.tensor(table))
        dtype, tasks = (self.dtypes[-1], "mul") if width % 2 else (torch.float32, None)
        self.check_linear(random_call(w, 2, dtype=dtype, tasks=tasks))

    # --- what must make no difference, and what must show ---

    def test_padding_bits_do_not_matter(self, kind: Scheme) -> None:
        """BIT-3, in weights, products and gradients."""
        w = drawn(kind, 3, 32, 20, 37)
        dirty = w.planes.clone()
        dirty[..., 5:] = 255
        dirty[..., 4] |= 0b11100000
        x, grad = torch.randn(3, 37), torch.randn(3, 20)
        functions: tuple[Callable[[PlaneMatrix], Tensor], ...] = (
            lambda w: self.run("linear", x, w, None, None, None),
            lambda w: self.run("dequantize", w, None, torch.float32),
            lambda w: self.run("linear_param_grads", grad, x, w, None, None)[0],
            lambda w: self.run("linear_input_grad", grad, w, None, None),
        )
        for function in functions:
            assert same_bits(function(w._replace(planes=dirty)), function(w))

    def test_scales_of_missing_planes_do_not_matter(self) -> None:
        """MIX-3: scales of planes that a row does not have."""
        w = drawn(Scheme("bcq", offset=True, row_bits=True), 4, 32, 50, 100)
        assert w.row_bits is not None
        scales = w.scales.clone()
        scales[w.row_bits[None, :] <= torch.arange(4)[:, None]] = 1e30
        assert (scales == 1e30).any()
        call = random_call(w, 3)
        for tiled in (True, False):
            found = self.linear(call._replace(w=w._replace(scales=scales)), tiled=tiled)
            assert same_bits(found, self.linear(call, tiled=tiled))

    def test_what_is_not_finite_is_not_hidden(self, kind: Scheme, value: float) -> None:
        """Its row is not finite, and no other row changes."""
        rows, cols = self.shape
        places = zip((32, 64, 0), (0, cols - 1, cols // 2), ("mul", None, "add"), strict=True)
        for i, (group, column, tasks) in enumerate(places):
            if self.combine is not itertools.product and i != self.kinds.index(kind) % 3:
                continue
            call = random_call(drawn(kind, 2, group, rows, cols), 4, dtype=self.dtypes[i % 2], tasks=tasks)
            before = self.linear(call)
            x = call.x.clone()
            x[2, column] = value
            found = self.linear(call._replace(x=x))
            assert not torch.isfinite(found[2]).any()
            assert torch.isfinite(found[[0, 1, 3]]).all()
            torch.testing.assert_close(found[[0, 1, 3]], before[[0, 1, 3]])
            if value != value:
                assert found[2].isnan().all()

    @pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, "meta"])
    def test_defaults_of_the_process_do_not_matter(self, default: torch.dtype | str) -> None:
        """Another thread may change them at any time: transformers sets the dtype while it makes a model."""
        w = self.draw(KINDS[1], 2)
        call, many = random_call(w, 3, tasks="mul"), random_call(w, self.many)
        grad, ids = torch.randn(3, w.rows), torch.tensor([1, 0])

        def results() -> list[Tensor | None]:
            found = [self.linear(call), self.linear(many), self.run("dequantize", w, call.deltas, torch.float32)]
            found.append(self.run("linear_each", call.x, [Share(self.tile(on_device(w, self.device)), 0, 3)], None))
            found.append(self.run("embedding", ids, w, None, None, torch.float32))
            return [*found, *self.run("linear_param_grads", grad, call.x, w, call.deltas, call.task_ids)]

        want = results()
        before = torch.get_default_dtype()
        if isinstance(default, str):
            with torch.device(default):
                found = results()
        else:
            torch.set_default_dtype(default)
            try:
                found = results()
            finally:
                torch.set_default_dtype(before)
        for a, b in zip(found, want, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert a.dtype == b.dtype
                assert same_bits(a, b)

    def test_the_same_call_has_the_same_bits(self, kind: Scheme) -> None:
        call = random_call(self.draw(kind, 2), 3, dtype=self.dtypes[-1], tasks="mul")
        assert same_bits(self.linear(call), self.linear(call))

    # --- gradients ---

    def check_grads(self, found: Any, result: Callable[..., Tensor], w: Any, deltas: Any, grad: Tensor) -> None:
        """`result` of a function ``f(w, deltas)`` whose absolute values are ``f(absolute(w), |deltas|, absolute)``."""
        want = truth.param_grads(result, w, deltas, grad)
        terms = truth.param_grads(partial(result, terms=True), absolute(w), magnitude(deltas), grad.double().abs())
        assert want[0] is not None
        assert want[0].any()
        assert_grads(found, want, terms, self.tolerance)

    def test_gradient_of_the_input(self, kind: Scheme, dtype: torch.dtype, tasks: str | None) -> None:
        w = self.draw(kind)
        for batch, ids in ((2, False), (6, True)):
            _, _, _, deltas, task_ids = random_call(w, batch, tasks=tasks, ids=ids)
            grad = torch.randn(2, batch // 2, w.rows).to(dtype)
            want = truth.linear_input_grad(grad.double(), exact(w), deltas, task_ids)
            terms = truth.linear_input_grad(grad.double().abs(), absolute(w), magnitude(deltas), task_ids)
            found = self.run("linear_input_grad", grad, w, deltas, task_ids)
            assert found.dtype == dtype
            at_most = rounding_error(want, terms, dtype, one_rounding=False, tolerance=self.tolerance)
            assert_within(found, want, at_most)

    def check_product_grads(self, grad: Tensor, call: Call) -> None:
        x, w, _, deltas, task_ids = call

        def product(w: Any, deltas: Any, terms: bool = False) -> Tensor:
            return truth.linear(x.double().abs() if terms else x.double(), w, None, deltas, task_ids)

        found = self.run("linear_param_grads", grad, x, w, deltas, task_ids)
        self.check_grads(found, product, w, deltas, grad)
        if deltas is not None:
            *others, alone = self.run("linear_param_grads", grad, x, w, deltas, task_ids, True)
            assert others == [None, None, None]
            assert same_bits(alone, found[3])

    def test_gradients_of_a_product(self, kind: Scheme, tasks: str | None, dtype: torch.dtype) -> None:
        """Of all rows' tasks, and of each row's."""
        for bits, group_size, batch, ids in ((3, 32, 5, True), (2, 64, 40, False)):
            w = self.draw(kind, bits, group_size)
            call = random_call(w, batch, dtype=dtype, layout="columns", tasks=tasks, ids=ids)
            self.check_product_grads(torch.randn(w.rows, batch).to(dtype).t(), call)

    def test_gradients_of_groups(self, kind: Scheme, group_size: int) -> None:
        """Groups of several blocks; a last group that is short; a sum of nothing."""
        w = drawn(kind, 1, group_size, self.shape[0], 300)
        call = random_call(w, 3)
        self.check_product_grads(torch.randn(3, w.rows), call)
        nothing = self.run("linear_param_grads", torch.randn(0, w.rows), torch.randn(0, 300), w, None, None)
        assert not nothing[0].any()
        assert nothing[0].shape == w.scales.shape

    def test_gradients_of_two_dtypes(self) -> None:
        """As under autocast: x and the gradient need not have the same."""
        call = random_call(drawn(KINDS[1], 2, 32, 20, 40), 6)
        grad = torch.randn(6, 20)
        self.check_product_grads(grad, call._replace(x=call.x.half()))
        self.check_product_grads(grad.half(), call)

    def test_gradients_of_an_embedding(self, kind: Scheme, tasks: str | None) -> None:
        """Rows that come several times, with the same task and with others; none for a row that nobody asked for."""
        w = drawn(kind, 3, 32, 37, 70, dtype="F16")
        ids = torch.tensor([[3, 36, 3, 0], [3, 36, 17, 3]])
        for dtype, each in zip(self.dtypes, (True, False, True), strict=False):
            _, _, _, deltas, task_ids = random_call(w, 8, tasks=tasks, ids=each)
            grad = torch.randn(2, 4, 70).to(dtype)

            def rows(w: Any, deltas: Any, task_ids: Any = task_ids, terms: bool = False) -> Tensor:
                return truth.embedding(ids, w, deltas, task_ids)

            found = self.run("embedding_param_grads", grad, ids, w, deltas, task_ids)
            self.check_grads(found, rows, w, deltas, grad)
            assert not found[0][:, 1].any()
            again = self.run("embedding_param_grads", grad, ids, w, deltas, task_ids)
            assert same_bits(found[0], again[0])

    def test_gradients_of_dequantize(self, kind: Scheme, tasks: str | None) -> None:
        w = drawn(kind, 3, 64, 37, 70, dtype="F16")
        deltas = random_call(w, 1, tasks=tasks).deltas

        def weight(w: Any, deltas: Any, terms: bool = False) -> Tensor:
            return truth.dequantize(w, deltas)

        for i, dtype in enumerate(self.dtypes):
            grad = torch.randn(37, 70).to(dtype) if i % 2 == 0 else torch.randn(70, 37).to(dtype).t()
            self.check_grads(self.run("dequantize_param_grads", grad, w, deltas), weight, w, deltas, grad)

    # --- what kernels do not look at is refused before ---

    @pytest.mark.parametrize(
        "wrong", ["columns", "bias short", "bias one", "bias long", "ids", "rows", "planes", "groups"]
    )
    def test_wrong_shapes(self, wrong: str) -> None:
        """Without a look at them, kernels would read memory that is not theirs, or broadcast."""
        w = drawn(KINDS[1], 3, 32, 33, 100)
        for n in (2, self.many):
            cols, bias, deltas, task_ids = {
                "columns": (50, None, None, None),
                "bias short": (100, _part((20,)), None, None),
                "bias one": (100, _part((1,)), None, None),
                "bias long": (100, _part((48,)), None, None),
                "ids": (100, None, _part((2, 1, 33)), _part((1,), torch.int64)),
                "rows": (100, None, _part((2, 1, 32)), _part((n,), torch.int64)),
                "planes": (100, None, _part((2, 4, 33)), _part((n,), torch.int64)),
                "groups": (100, None, _part((2, 1, 33, 3)), _part((n,), torch.int64)),
            }[wrong]
            for tiled in (True, False):
                with pytest.raises(self.errors):
                    self.run("linear", torch.randn(n, cols), w, bias, deltas, task_ids, tiled=tiled)
                if deltas is None:
                    continue
                with pytest.raises(self.errors):
                    self.run("embedding", torch.zeros(n, dtype=torch.int64), w, deltas, task_ids, torch.float32)
                if wrong != "ids":
                    with pytest.raises(self.errors):
                        self.run("dequantize", w, deltas, torch.float32, tiled=tiled)


def _part(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros, with more of them behind: what is read there is harmless."""
    return torch.zeros(10000, dtype=dtype)[: torch.Size(shape).numel()].reshape(shape)


def _names(argnames: str | Sequence[str]) -> list[str]:
    return [name.strip() for name in argnames.split(",")] if isinstance(argnames, str) else list(argnames)


def _name(value: Any) -> str | None:
    """How a parameter is called in the name of a test."""
    if isinstance(value, Scheme):
        return NAMES[KINDS.index(value)] if value in KINDS else str(value)
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None
