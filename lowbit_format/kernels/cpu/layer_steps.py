"""A decoding step of a decoder layer in two calls: what comes before attention, and what comes after.

Each is a row of kernels that threads go through together (:func:`.parallel.run_in_turn`). Jobs are made once for a
layer and a number of rows, and used again as long as nothing has changed that they were made of. What may change from
one step to the next is looked at in each: a stale address would be a silently wrong result.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch import Factor, check_linear
from ..ragged import changes
from . import backend, between_products, parallel, products
from .parallel import Job, Kernel, Step
from .products import Product, Together
from .tiles import WORD


class Norm(NamedTuple):
    """A root mean square norm: its weight, float ``[columns]``, and what is added to the mean of squares."""

    weight: Tensor
    epsilon: float


class Parts(NamedTuple):
    """What a layer is made of at this step.

    Attributes:
        factors: its products by Llama's names, ``q_proj`` to ``down_proj``.
        norms: before attention, before the MLP.
        head_norms: of each head of q, of each head of k; empty if there are none.
        dim: columns of a head.
    """

    factors: Mapping[str, Factor]
    norms: tuple[Norm, Norm]
    head_norms: tuple[Norm, ...]
    dim: int


class LayerSteps:
    """The kernels of a layer for a number of rows; for one thread at a time.

    Args:
        parts: of the layer.
        batch: rows of x.
    """

    def __init__(self, parts: Parts, batch: int) -> None:
        factors, dim = parts.factors, parts.dim
        self._batch, self._sizes = batch, [factors[name].w.rows for name in ("q_proj", "k_proj", "v_proj")]
        hidden, inner = factors["q_proj"].w.cols, factors["down_proj"].w.cols
        normed, self._seen, gated = (_whole_words(batch, n) for n in (hidden, factors["o_proj"].w.cols, inner))
        gate, up = _floats(batch, inner), _floats(batch, inner)
        added, last = _floats(batch, hidden), _floats(batch, hidden)

        self._norms = [_NormStep(batch, hidden, normed), _NormStep(batch, hidden, normed)]
        self._norms[1].job.added = added.data_ptr()
        self._first = _Products(normed, ("q_proj", "k_proj", "v_proj"), [_floats(batch, size) for size in self._sizes])
        self._head_norms = [_NormStep(batch * n // dim, dim) for n in self._sizes[: len(parts.head_norms)]]
        q_heads, k_heads, _ = (size // dim for size in self._sizes)
        self._rotation = between_products.RotationJob(rows=batch, dim=dim, x_heads=q_heads, y_heads=k_heads)
        self._before = _Call(
            [self._norms[0], self._first, *self._head_norms, _Between(between_products.rotate, self._rotation)]
        )

        self._attended = _Products(self._seen, ("o_proj",), [added])
        gating = between_products.GateJob(
            rows=batch, columns=inner, gate=gate.data_ptr(), up=up.data_ptr(), out=gated.data_ptr(),
            stride=4 * gated.shape[1],
        )  # fmt: skip
        gating.alive = gate, up, gated
        self._addition = between_products.AdditionJob(rows=batch, columns=hidden, y=last.data_ptr())
        self._after = _Call(
            [
                self._attended,
                self._norms[1],
                _Products(normed, ("gate_proj", "up_proj"), [gate, up]),
                _Between(between_products.gate, gating),
                _Products(gated, ("down_proj",), [last]),
                _Between(between_products.add, self._addition),
            ]
        )

    def before(self, x: Tensor, parts: Parts, cos: Tensor, sin: Tensor) -> list[Tensor]:
        """q, k and v of a step, float32 ``[batch, heads * dim]``.

        Args:
            x: float32 ``[batch, columns]``, contiguous.
            parts: of the layer, of the same shapes as in the beginning.
            cos, sin: float32 ``[1 or batch, dim]``, contiguous: of the rotary positions.
        """
        found = [_floats(self._batch, size) for size in self._sizes]
        self._norms[0].set(parts.norms[0], x=x)
        self._first.outs = found
        for step, norm, heads in zip(self._head_norms, parts.head_norms, found, strict=False):
            step.set(norm, x=heads, out=heads)
        rotation = self._rotation
        rotation.x, rotation.y = found[0].data_ptr(), found[1].data_ptr()
        rotation.cos, rotation.sin = cos.data_ptr(), sin.data_ptr()
        rotation.stride = 0 if cos.shape[0] == 1 else 4 * cos.shape[1]
        self._before(parts.factors)
        return found

    def after(self, x: Tensor, seen: Tensor, parts: Parts) -> Tensor:
        """The layer's result, float32 ``[batch, columns]``.

        Args:
            x: as of :meth:`before`.
            seen: float32 ``[batch, heads * dim]``: what attention has found.
            parts: as of :meth:`before`.
        """
        self._attended.x = products.padded(seen)
        found = _floats(*x.shape)
        self._norms[1].set(parts.norms[1], x=x)
        self._norms[1].job.sum = self._addition.x = found.data_ptr()
        self._after(parts.factors)
        return found


class _Between:
    """A kernel that is no product, and its job."""

    def __init__(self, kernel: Kernel, job: Job) -> None:
        self.kernel, self.job = kernel, job


class _NormStep(_Between):
    """A norm; its result goes to `out`, whose rows may be longer."""

    def __init__(self, rows: int, columns: int, out: Tensor | None = None) -> None:
        self.job: between_products.NormJob
        super().__init__(between_products.norm, between_products.NormJob(rows=rows, columns=columns))
        self.job.stride = 4 * (columns if out is None else out.shape[1])
        self.job.out = 0 if out is None else out.data_ptr()
        self._epsilon, self._out = ctypes.c_float(), out
        self.job.epsilon = ctypes.addressof(self._epsilon)

    def set(self, norm: Norm, x: Tensor, out: Tensor | None = None) -> None:
        """Take this x from now on, and write to `out`, if it is given; both have to live until the step is done."""
        self._weight = weight = norm.weight.detach().float().contiguous()
        self.job.x, self.job.weight, self._epsilon.value = x.data_ptr(), weight.data_ptr(), norm.epsilon
        if out is not None:
            self.job.out = out.data_ptr()


class _Products:
    """Products of the same x, from planes if they can be.

    Attributes:
        x: float32 ``[batch, columns padded to whole words]``, contiguous.
        outs: float32 ``[batch, rows]`` for each, contiguous.
        together: the kernels; None where other code has to multiply.
        threads: that are worth waking.
    """

    def __init__(self, x: Tensor, names: Sequence[str], outs: Sequence[Tensor]) -> None:
        self.x, self.outs, self._names = x, outs, names
        self.together: Together | None = None
        self.threads = 1
        self._made_of: tuple[object, ...] = ()
        self._factors: list[Factor] = []
        self._alive: object = None

    def set(self, factors: Mapping[str, Factor], most_threads: int) -> bool:
        """Take these matrices, and the present x and outs. Whether the kernels are others than before."""
        self._factors = [factors[name] for name in self._names]
        plans = [products.plan(f.w) for f in self._factors]
        biases = [backend.readable(f.bias) for f in self._factors]
        made_of = (most_threads, *map(_identity, plans, self._factors, biases))
        is_same = made_of == self._made_of
        if not is_same:
            self._make(plans, biases)
            self._made_of = made_of
        elif self.together is not None:
            self.together.reset()
            self.together.read_from(self.x)
            self.together.write_to(self.outs)
            self.together.add(biases)
        self._alive = plans, biases
        return not is_same

    def _make(self, plans: Sequence[products.Plan | None], biases: Sequence[Tensor | None]) -> None:
        rows = self.x.shape[0]
        found = []
        for plan, bias, (w, _, deltas, task_ids) in zip(plans, biases, self._factors, strict=True):
            check_linear(self.x[:, : w.cols], w, bias, deltas, task_ids)
            if plan is not None and rows <= backend.most_rows(plan, w, torch.float32, task_ids):
                found.append(Product(plan, bias, deltas, task_ids, w.activations))
        self.together = None
        if len(found) == len(plans):
            self.threads = products.threads_for(found, rows)
            self.together = Together(self.x, found, self.outs, self.threads)

    def compute(self) -> None:
        """Without kernels of this module."""
        for factor, out in zip(self._factors, self.outs, strict=True):
            out.copy_(backend.linear(self.x[:, : factor.w.cols], *factor))


class _Call:
    """Steps in their order, run with as few launches as possible."""

    def __init__(self, steps: Sequence[_Between | _Products]) -> None:
        self._products = [step for step in steps if isinstance(step, _Products)]
        self._jobs = [step.job for step in steps if isinstance(step, _Between)]
        self._steps = steps
        self._launches: list[list[Step] | _Products] = []
        self._threads = 1

    def __call__(self, factors: Mapping[str, Factor]) -> None:
        """Run all steps with these matrices."""
        threads = parallel.num_threads()
        changed = [products.set(factors, threads) for products in self._products]
        if any(changed):
            self._prepare()
        for job in self._jobs:
            job.taken = 0
        for launch in self._launches:
            if isinstance(launch, _Products):
                launch.compute()
            else:
                parallel.run_in_turn(launch[0], self._threads)

    def _prepare(self) -> None:
        self._threads = max(products.threads for products in self._products)
        self._launches = []
        work: list[tuple[Kernel, Job]] = []
        for step in self._steps:
            if isinstance(step, _Between):
                work.append((step.kernel, step.job))
            elif step.together is not None:
                work += step.together.work
            else:
                self._launches += [parallel.steps_of(work), step] if work else [step]
                work = []
        if work:
            self._launches.append(parallel.steps_of(work))


def _identity(plan: products.Plan | None, factor: Factor, bias: Tensor | None) -> tuple[object, ...]:
    """What the kernels of a product were made of. They read deltas from where these are, unless they took a copy."""
    deltas, ids = factor.deltas, factor.task_ids
    found = (plan, factor.w.activations, None if bias is None else bias.shape)
    if deltas is None:
        return found
    if deltas.dtype != torch.float32 or deltas.dim() == 4 or not deltas.is_contiguous():
        return (*found, object())  # a copy, which is made anew
    place = deltas.data_ptr(), deltas.shape
    return (*found, place) if ids is None else (*found, place, ids.data_ptr(), ids.shape, ids.dtype, changes(ids))


def _floats(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _whole_words(rows: int, columns: int) -> Tensor:
    """Room for an x, whose columns beyond its own are 0."""
    return torch.zeros(rows, -(-columns // WORD) * WORD, dtype=torch.float32, device="cpu")
