"""Gradients of scales, offsets and zeros, without the gradient of the weight in memory.

In a product, the gradient of a tile of the weight, ``grad.T @ x``, is computed in registers and summed at once: with
the signs of each plane, and without. Scales' gradients are made of these sums (:func:`..batch.grads_of_sums`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..matrix import PlaneMatrix
from . import tiles
from .decoding import place_of_column, place_of_row

ROWS = {torch.float16: 64, torch.bfloat16: 64, torch.float32: 32}  # of a program's tile; more do not fit registers


Sums = tuple[Tensor, Tensor]  # with the signs of planes (a codebook's levels), [bits or 1, rows, groups], and without


def of_product(grad: Tensor, x: Tensor, w: PlaneMatrix) -> Sums:
    """Sums over each group of ``grad.T @ x``, the gradient of the weight.

    Args:
        grad: float ``[n, rows]``, any strides.
        x: float ``[n, cols]``, any strides, of the same dtype: float16, bfloat16 or float32.
        w: packed.

    Returns:
        float32 ``[bits, rows, groups]`` (of a codebook ``[1, rows, groups]``), and ``[rows, groups]``.
    """
    return _launch(grad, grad.stride(), x, w, None, w.rows, len(x))


def of_rows(grad: Tensor, w: PlaneMatrix, rows: Tensor) -> Sums:
    """Sums over each group of `grad` ``[n, cols]``, the gradients of the weight's rows `rows` (int64 ``[n]``).

    A row may come more than once; the sums of one that is not there are zero.

    Returns sums for each of the n: float32 ``[bits, n, groups]``, ``[n, groups]``.
    """
    return _launch(grad, (0, 0), grad, w, rows.contiguous(), len(rows), 0)


def _launch(
    grad: Tensor, stride: tuple[int, ...], x: Tensor, w: PlaneMatrix, chosen: Tensor | None, rows: int, depth: int
) -> Sums:
    steps, macros = tiles.steps(w), w.planes.shape[1]
    sums = 1 if w.codec == "codebook" else w.bits
    out = torch.empty((sums + 1, rows, macros * 8), dtype=torch.float32, device=x.device)
    if rows:
        _signed_sums[(macros * 8, triton.cdiv(rows, ROWS[x.dtype]))](
            grad, x, w.planes, w.planes if w.codebook is None else w.codebook, w.planes if chosen is None else chosen,
            out, depth, rows, w.rows, w.cols, macros, w.bits, *stride, *x.stride(),
            STEPS=steps, ROWS=ROWS[x.dtype], DEPTH=32, CODEBOOK=w.codec == "codebook", CHOSEN=chosen is not None,
            num_warps=4, num_stages=3, enable_fp_fusion=True,
        )  # fmt: skip
    out = _of_groups(out, tiles.blocks_of_group(w, steps), w.groups)
    return out[:-1], out[-1]


def _of_groups(sums: Tensor, blocks: int, groups: int) -> Tensor:
    """Sums of blocks ``[..., blocks]`` added up to those of groups; blocks of padding hold zeros."""
    if blocks == 0:
        return sums.sum(-1, keepdim=True)
    sums = F.pad(sums, (0, blocks * groups - sums.shape[-1]))  # or cuts off
    added: Tensor = sums.unflatten(-1, (groups, blocks)).sum(-1)
    return added


@triton.jit(do_not_specialize=("n", "rows", "every", "macros", "bits"))
def _signed_sums(
    grad, x, planes, codebook, chosen, out, n, rows, every, cols, macros, bits, grad_n, grad_row, x_n, x_col,
    STEPS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, CODEBOOK: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    """One block of ROWS rows."""
    block = tl.program_id(0)
    m, s = block // 8, block % 8
    BLOCK: tl.constexpr = STEPS * 32
    PIECES: tl.constexpr = 512 * STEPS
    r = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    column = block.to(tl.int64) * BLOCK + c
    depth = tl.arange(0, DEPTH)
    in_rows, in_cols = (r < rows)[:, None], (column < cols)[None, :]
    if CHOSEN:
        acc = tl.load(x + r[:, None] * x_n + column[None, :] * x_col, mask=in_rows & in_cols, other=0.0).to(tl.float32)
        of = tl.load(chosen + r, mask=r < rows, other=0)
        known = (of >= 0) & (of < every)
        of = tl.where(known, of, 0)
        acc = tl.where(known[:, None], acc, 0.0)
    else:
        acc = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, n, DEPTH):
            i = start + depth.to(tl.int64)
            inside = i < n
            left = tl.load(
                grad + i[None, :] * grad_n + r[:, None] * grad_row, mask=in_rows & inside[None, :], other=0.0
            )
            right = tl.load(x + i[:, None] * x_n + column[None, :] * x_col, mask=in_cols & inside[:, None], other=0.0)
            acc = tl.dot(left, right, acc, input_precision="ieee")
        of = tl.minimum(r, rows - 1)

    at = (
        planes + (((of // 16) * macros + m) * (bits * PIECES) + place_of_row(of))[:, None] + place_of_column(c)[None, :]
    )
    at_out = out + r * (macros * 8) + block
    plane = tl.cast(rows, tl.int64) * (macros * 8)
    if CODEBOOK:
        code = tl.zeros((ROWS, BLOCK), tl.int32)
        for p in range(bits):
            code = code * 2 + ((tl.load(at + p * PIECES) >> s) & 1).to(tl.int32)
        sums = tl.sum(acc * tl.load(codebook + code), 1)
        tl.store(at_out, sums, mask=r < rows)
        at_out += plane
    else:
        for p in range(bits):
            bit = (tl.load(at + p * PIECES) >> s) & 1
            tl.store(at_out, tl.sum(tl.where(bit == 1, acc, -acc), 1), mask=r < rows)
            at_out += plane
    tl.store(at_out, tl.sum(acc, 1), mask=r < rows)
