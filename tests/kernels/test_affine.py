"""The codec affine where backends differ from one another: ragged rows, groups without a tiled layout, tasks."""

from __future__ import annotations

import pytest
import torch

from lowbit_format.kernels import naive
from lowbit_format.kernels.cpu import backend as cpu
from lowbit_format.schema import Scheme
from lowbit_format.testing.products import decode, drawn, random_call, same_bits, with_task

BACKENDS = pytest.mark.parametrize("backend", [naive, cpu], ids=["naive", "cpu"])


@BACKENDS
@pytest.mark.parametrize("tasks", [None, "mul", "add"])
@pytest.mark.parametrize("batch", [1, 3, 70])
@pytest.mark.parametrize(("ragged", "group_size"), [(True, 32), (False, 16), (False, 0)])
def test_products(backend: object, tasks: str | None, batch: int, ragged: bool, group_size: int) -> None:
    """A task multiplies scales, or adds to them, and leaves offsets as they are (TSK-6, TSK-7)."""
    w = drawn(Scheme("affine", row_bits=ragged), 4, group_size, 50, 100)
    call = random_call(w, batch, tasks=tasks)
    tiled = backend.tile(w) if backend.can_tile(w) else w  # type: ignore[attr-defined]
    found = backend.linear(call.x, tiled, call.bias, call.deltas, call.task_ids)  # type: ignore[attr-defined]
    ids = [-1] * batch if call.task_ids is None else call.task_ids.tolist()
    weights = [decode(w if i < 0 or call.deltas is None else with_task(w, call.deltas[i])).double() for i in ids]
    assert call.bias is not None
    want = torch.stack([weight @ x for weight, x in zip(weights, call.x.double(), strict=True)]) + call.bias
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)


@BACKENDS
def test_without_offsets(backend: object) -> None:
    """As for parts of a product: the sign of a zero stays that of the product (DEC-7 without its sum)."""
    w = drawn(Scheme("affine"), 3, 32, 20, 70)
    w = w._replace(offsets=None, scales=torch.where(torch.rand(w.scales.shape) < 0.5, -w.scales, w.scales))
    tiled = backend.tile(w)  # type: ignore[attr-defined]
    assert same_bits(backend.dequantize(tiled, None, torch.float32), decode(w))  # type: ignore[attr-defined]
    x = torch.randn(2, 70)
    found = backend.linear(x, tiled, None, None, None)  # type: ignore[attr-defined]
    torch.testing.assert_close(found, x @ decode(w).T, rtol=1e-5, atol=1e-5)
