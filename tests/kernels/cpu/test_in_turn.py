"""Kernels that follow one another in one call, and those between the products of a decoder layer."""

from __future__ import annotations

import ctypes

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit_format.kernels.cpu import between_products, parallel
from lowbit_format.kernels.cpu.between_products import AdditionJob, GateJob, NormJob, RotationJob

SHAPES = [(1, 1), (2, 15), (3, 64), (8, 100)]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("pool", ["OpenMP", "Python"])
def test_a_kernel_begins_when_that_before_it_is_done(threads: int, pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of the same numbers in many pieces and in one, in turn: each reads what all pieces before it wrote."""
    if pool == "Python":
        monkeypatch.setattr(parallel, "_openmp", lambda: None)
    a, b = torch.ones(64, 32), torch.ones(64, 32)
    work = []
    for i in range(12):
        x, y = (a, b) if i % 2 else (b, a)
        rows = 64 if i % 2 else 1
        job = AdditionJob(rows=rows, columns=a.numel() // rows, x=x.data_ptr(), y=y.data_ptr())
        work.append((between_products.add, job))
    steps = parallel.steps_of(work)
    for _ in range(50):
        a.fill_(1)
        b.fill_(1)
        for _, job in work:
            job.taken = 0
        parallel.run_in_turn(steps[0], threads)
        assert torch.equal(a, torch.full_like(a, 377))
        assert torch.equal(b, torch.full_like(b, 233))
        assert all(step.inside == 0 for step in steps)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("adds", [False, True])
def test_norm(rows: int, columns: int, adds: bool) -> None:
    torch.manual_seed(rows)
    x, added, weight = torch.randn(rows, columns), torch.randn(rows, columns), torch.randn(columns)
    out, total, epsilon = torch.full((rows, columns + 3), 7.0), torch.empty(rows, columns), ctypes.c_float(1e-3)
    before = x.clone()
    job = NormJob(
        rows=rows, columns=columns, x=x.data_ptr(), weight=weight.data_ptr(), epsilon=ctypes.addressof(epsilon),
        out=out.data_ptr(), stride=4 * (columns + 3),
    )  # fmt: skip
    if adds:
        job.added, job.sum = added.data_ptr(), total.data_ptr()
    between_products.norm(job, 2)
    want = x + added if adds else x
    torch.testing.assert_close(out[:, :columns], F.rms_norm(want, (columns,), weight, 1e-3))
    assert torch.equal(out[:, columns:], torch.full((rows, 3), 7.0))
    assert torch.equal(x, before)
    assert not adds or torch.equal(total, want)


@pytest.mark.parametrize("angles", [1, 3])
def test_rotation(angles: int) -> None:
    torch.manual_seed(0)
    q, k, turn = torch.randn(3, 4 * 6), torch.randn(3, 2 * 6), torch.randn(angles, 6)
    cos, sin = turn.cos(), turn.sin()

    def turned(x: Tensor) -> Tensor:
        heads = x.view(3, -1, 6)
        half = torch.cat([-heads[..., 3:], heads[..., :3]], -1)
        return (heads * cos[:, None] + half * sin[:, None]).view(3, -1)

    want = turned(q), turned(k)
    job = RotationJob(
        rows=3, dim=6, x=q.data_ptr(), x_heads=4, y=k.data_ptr(), y_heads=2, cos=cos.data_ptr(), sin=sin.data_ptr(),
        stride=0 if angles == 1 else 24,
    )  # fmt: skip
    between_products.rotate(job, 2)
    torch.testing.assert_close(q, want[0])
    torch.testing.assert_close(k, want[1])


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_gate(rows: int, columns: int) -> None:
    """Also of numbers so large that their exponential is not to be had in float32."""
    torch.manual_seed(rows)
    gate, up = 20 * torch.randn(rows, columns), torch.randn(rows, columns)
    gate.view(-1)[: min(5, gate.numel())] = torch.tensor([0.0, -1e4, 1e4, -88.5, 87.5])[: min(5, gate.numel())]
    out = torch.full((rows, columns + 1), 7.0)
    job = GateJob(
        rows=rows, columns=columns, gate=gate.data_ptr(), up=up.data_ptr(), out=out.data_ptr(), stride=4 * (columns + 1)
    )
    between_products.gate(job, 2)
    torch.testing.assert_close(out[:, :columns], F.silu(gate) * up, rtol=2e-6, atol=1e-33)
    assert torch.equal(out[:, columns:], torch.full((rows, 1), 7.0))
