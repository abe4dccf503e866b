"""The operators of a CPU under the conformance tests, and a compact set of checks for other machines."""

from __future__ import annotations

import random
from collections.abc import Iterator

from torch import Tensor

from lowbit_format.kernels import naive
from lowbit_format.kernels.cpu import backend, products
from lowbit_format.kernels.matrix import INT8
from lowbit_format.schema import SCALE_DTYPES
from lowbit_format.testing import products as truth
from lowbit_format.testing.operators import OperatorConformance
from lowbit_format.testing.products import (
    KINDS,
    Call,
    absolute,
    assert_within,
    drawn,
    magnitude,
    random_call,
    rounding_error,
    same_bits,
)

WHOLE, ODD = [0, 16, 32, 64, 96, 128], [5, 24, 100]  # group sizes that have a tiled layout, and that have none


def from_planes(call: Call) -> bool:
    """Whether the product is computed without decoding the weight."""
    x, w, mixed = call.x, call.w, call.task_ids is not None
    return products.plan(w) is not None and x.numel() // w.cols <= products.most_rows(w.bits, x.dtype, mixed)


class CpuOperators(OperatorConformance):
    backend = backend
    group_sizes = (*WHOLE, *ODD)
    many = 2000
    examples = 100

    def allowed(self, call: Call, want: Tensor, terms: Tensor) -> Tensor:
        """From planes, products are float32 sums, rounded once."""
        return rounding_error(want, terms, call.x.dtype, one_rounding=from_planes(call))

    def check_linear(self, call: Call) -> Tensor:
        """Computed from planes, a product has the same bits whatever layout they are in."""
        found, plain = self.linear(call), self.linear(call, tiled=False)
        self.judge(call, found, plain)
        assert not from_planes(call) or same_bits(found, plain)
        return found


check_linear = CpuOperators().check_linear


def fixed_calls() -> Iterator[Call]:
    """A few of every kind, large enough for several strips, chunks and threads."""
    for i, kind in enumerate(KINDS):
        # Few groups of 16: torch copies the deltas of many with threads, which a forked child waits for in vain.
        for j, (bits, group, cols, dtype) in enumerate(
            [(4, 64, 330, "F16"), (2, 0, 330, "BF16"), (3, 96, 330, "F32"), (3, 16, 100, "F16")]
        ):
            w = drawn(kind, bits, group, 300 + 7 * i, cols, seed=i, dtype=dtype)
            for batch, tasks in ((1, None), (7, ("mul", "add", None)[(i + j) % 3])):
                yield random_call(w, batch, tasks=tasks, seed=batch)


def check_everything() -> None:
    """A compact set of checks of all kernels."""
    rng = random.Random(0)
    for kind in KINDS:
        for bits in range(1, 9):
            dtype = rng.choice(SCALE_DTYPES)
            w = drawn(kind, bits, rng.choice(WHOLE), rng.randint(1, 90), rng.randint(1, 300), bits, dtype)
            assert same_bits(backend.decode(backend.tile(w)), truth.decode(w))
            for batch, tasks in ((1, None), (rng.randint(2, 16), rng.choice(["mul", "add"])), (20, None)):
                check_linear(random_call(w, batch, dtype=rng.choice(CpuOperators.dtypes), tasks=tasks, seed=bits))
    for call in fixed_calls():
        check_linear(call)


# --- 8-bit activations -----------------------------------------------------------------------------


def rounds(call: Call) -> bool:
    """Whether the product is computed with 8-bit activations, if they are asked for."""
    x, w, mixed = call.x, call.w, call.task_ids is not None
    plan = products.plan(w)
    if plan is None or not plan.can_round:
        return False
    return x.numel() // w.cols <= products.most_rows(plan.bits, x.dtype, mixed, rounds=True)


def check_rounded(call: Call) -> Tensor:
    """A product with 8-bit activations, which must be that of :mod:`.kernels.rounded_sums`, but for float32 sums."""
    given = call._replace(w=call.w._replace(activations=INT8))
    found = backend.linear(given.x, backend.tile(given.w), *given[2:])
    plain = backend.linear(*given)
    assert same_bits(found, plain)
    if not rounds(call):
        assert same_bits(found, CpuOperators().linear(call))
        return found
    want = naive.linear(*given._replace(x=given.x.float())).double()
    x, w = call.x.double().abs(), absolute(call.w)
    terms = truth.linear(x, w, magnitude(call.bias), magnitude(call.deltas), call.task_ids)
    assert found.dtype == call.x.dtype
    # Rounded sums may be larger than those of x: by a step for each four.
    assert_within(found, want, rounding_error(want, 2 * terms, call.x.dtype, one_rounding=True))
    return found


def check_rounded_everything() -> None:
    """A compact set of checks of products with 8-bit activations."""
    rng, calls = random.Random(0), list(fixed_calls())
    for kind in KINDS:
        for bits in range(1, 9):
            w = drawn(kind, bits, rng.choice(WHOLE), rng.randint(1, 90), rng.randint(1, 300), bits, "F16")
            for batch, tasks in ((1, None), (rng.randint(2, 16), rng.choice(["mul", "add"]))):
                calls.append(random_call(w, batch, dtype=rng.choice(CpuOperators.dtypes), tasks=tasks, seed=bits))
    rounding = [call for call in calls if rounds(call)]
    assert len(rounding) > len(calls) / 2
    for call in rounding:
        check_rounded(call)
