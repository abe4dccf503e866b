"""Gradients of scales, offsets and zeros, without the gradient of the weight in memory.

The gradient of the weight of a product is ``grad.T @ x``. A program computes one part of it in registers and sums it
over the columns at once, with the signs of each plane, and without. The gradients of the parameters are made of these
sums (:func:`..batch.grads_of_sums`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..matrix import PlaneMatrix
from ..parameter_order import TILE_ROWS
from . import tiles
from .tiles import PIECE, STEP, place_of_column, place_of_row

# Rows of the weight whose gradients one program has in registers; more do not fit.
PROGRAM_ROWS = {torch.float16: 64, torch.bfloat16: 64, torch.float32: 32}

Sums = tuple[Tensor, Tensor]  # with the signs of planes (a codebook's levels), [bits or 1, rows, groups], and without


def of_product(grad: Tensor, x: Tensor, w: PlaneMatrix, planes: int | None = None) -> Sums:
    """Sums over each group of ``grad.T @ x``, the gradient of the weight.

    Args:
        grad: float ``[n, rows]``, any strides.
        x: float ``[n, cols]``, any strides, of the same dtype: float16, bfloat16 or float32.
        w: tiled.
        planes: of bcq, only the sums of the first so many planes are wanted.

    Returns:
        float32 ``[bits (or planes), rows, groups]`` (of a codebook ``[1, rows, groups]``), and ``[rows, groups]``.
    """
    return _launch(grad, grad.stride(), x, w, None, w.rows, len(x), planes)


def of_rows(grad: Tensor, w: PlaneMatrix, rows: Tensor) -> Sums:
    """Sums over each group of `grad` ``[n, cols]``, the gradients of the weight's rows `rows` (int64 ``[n]``).

    A row may be chosen more than once; the sums of one that `w` does not have are zero.

    Returns sums for each of the n chosen rows: float32 ``[bits, n, groups]`` and ``[n, groups]``.
    """
    return _launch(grad, (0, 0), grad, w, rows.contiguous(), len(rows), 0)


def _launch(
    grad: Tensor,
    stride: tuple[int, ...],
    x: Tensor,
    w: PlaneMatrix,
    chosen: Tensor | None,
    rows: int,
    depth: int,
    planes: int | None = None,
) -> Sums:
    steps, macros = tiles.steps(w), w.planes.shape[1]
    sums = 1 if w.codec == "codebook" else planes if planes is not None and w.scale_per_plane else w.bits
    out = torch.empty((sums + 1, rows, macros * 8), dtype=torch.float32, device=x.device)
    if rows:
        unused = w.planes  # stands for a tensor that a variant of the kernel does not read
        _signed_sums[(macros * 8, triton.cdiv(rows, PROGRAM_ROWS[x.dtype]))](
            # pointers
            grad,
            x,
            w.planes,
            unused if w.codebook is None else w.codebook,
            unused if chosen is None else chosen,
            out,
            # sizes
            depth,
            rows,
            w.rows,
            w.cols,
            macros,
            w.bits,
            sums,
            # strides
            *stride,
            *x.stride(),
            # what makes a variant of the kernel
            STEPS=steps,
            PROGRAM_ROWS=PROGRAM_ROWS[x.dtype],
            DEPTH=32,
            CODEBOOK=w.codec == "codebook",
            CHOSEN=chosen is not None,
            num_warps=4,
            num_stages=3,
            enable_fp_fusion=True,
        )
    out = _of_groups(out, tiles.blocks_of_group(w, steps), w.groups)
    return out[:-1], out[-1]


def _of_groups(sums: Tensor, blocks: int, groups: int) -> Tensor:
    """Sums over groups ``[..., groups]`` from those over blocks ``[..., blocks]``; blocks of padding hold zeros."""
    if blocks == 0:
        return sums.sum(-1, keepdim=True)
    sums = F.pad(sums, (0, blocks * groups - sums.shape[-1]))  # or cuts off
    added: Tensor = sums.unflatten(-1, (groups, blocks)).sum(-1)
    return added


@triton.jit(do_not_specialize=("n", "rows", "weight_rows", "macros", "bits", "sums"))
def _signed_sums(
    # Pointers.
    grad_ptr,  # float [n, rows]: gradient of the product; not read if CHOSEN
    x_ptr,  # float [n, cols]: activations; if CHOSEN [rows, cols]: gradients of the chosen rows
    planes_ptr,  # uint8 [tiles, macros, bits * STEPS, PIECE], see tiles.py
    codebook_ptr,  # float32 [2**bits]
    chosen_ptr,  # int64 [rows]: rows of the weight
    out_ptr,  # float32 [sums + 1, rows, macros * 8]: sums over blocks; those without signs come last
    # Sizes, in elements of their dimension.
    n,  # rows of x, over which the product sums
    rows,  # of the result
    weight_rows,  # of the weight
    cols,
    macros,  # macro blocks of a row
    bits,  # planes
    sums,  # planes whose sums are wanted, the first ones; a codebook has 1
    # Strides, in elements.
    stride_grad_n,
    stride_grad_row,
    stride_x_n,
    stride_x_col,
    # What makes a variant.
    STEPS: tl.constexpr,  # of STEP columns in a block: 1, 2, 4
    PROGRAM_ROWS: tl.constexpr,  # rows of the result that one program makes
    DEPTH: tl.constexpr,  # rows of x in one step of the sum
    CODEBOOK: tl.constexpr,  # whether codes look up a codebook; otherwise planes have signs
    CHOSEN: tl.constexpr,  # whether rows are chosen, and the gradient of the weight is given
    # The tiled layout.
    TILE_ROWS: tl.constexpr = TILE_ROWS,
    STEP: tl.constexpr = STEP,
    PIECE: tl.constexpr = PIECE,
):
    """One block of PROGRAM_ROWS rows."""
    BLOCK: tl.constexpr = STEPS * STEP  # columns
    PLANE_BYTES: tl.constexpr = PIECE * STEPS  # bytes of a plane in a macro block
    block = tl.program_id(0)
    m, s = block // 8, block % 8
    r = tl.program_id(1).to(tl.int64) * PROGRAM_ROWS + tl.arange(0, PROGRAM_ROWS)
    c = tl.arange(0, BLOCK)
    column = block.to(tl.int64) * BLOCK + c
    depth = tl.arange(0, DEPTH)
    in_rows, in_cols = (r < rows)[:, None], (column < cols)[None, :]

    # ---- the gradient of the weight -------------------------------------------------------------------------------
    if CHOSEN:
        at_x = x_ptr + r[:, None] * stride_x_n + column[None, :] * stride_x_col
        acc = tl.load(at_x, mask=in_rows & in_cols, other=0.0).to(tl.float32)
        of = tl.load(chosen_ptr + r, mask=r < rows, other=0)
        known = (of >= 0) & (of < weight_rows)
        of = tl.where(known, of, 0)
        acc = tl.where(known[:, None], acc, 0.0)
    else:
        acc = tl.zeros((PROGRAM_ROWS, BLOCK), tl.float32)
        for start in range(0, n, DEPTH):
            i = start + depth.to(tl.int64)
            inside = i < n
            at_grad = grad_ptr + i[None, :] * stride_grad_n + r[:, None] * stride_grad_row
            left = tl.load(at_grad, mask=in_rows & inside[None, :], other=0.0)
            at_x = x_ptr + i[:, None] * stride_x_n + column[None, :] * stride_x_col
            right = tl.load(at_x, mask=in_cols & inside[:, None], other=0.0)
            acc = tl.dot(left, right, acc, input_precision="ieee")
        of = tl.minimum(r, rows - 1)

    # ---- its sums, with the signs of each plane (the levels of a codebook), and without ---------------------------
    at_row = ((of // TILE_ROWS) * macros + m) * (bits * PLANE_BYTES) + place_of_row(of)
    at = planes_ptr + at_row[:, None] + place_of_column(c)[None, :]
    at_out = out_ptr + r * (macros * 8) + block
    stride_out_plane = tl.cast(rows, tl.int64) * (macros * 8)
    if CODEBOOK:
        code = tl.zeros((PROGRAM_ROWS, BLOCK), tl.int32)
        for p in range(bits):
            code = code * 2 + ((tl.load(at + p * PLANE_BYTES) >> s) & 1).to(tl.int32)
        tl.store(at_out, tl.sum(acc * tl.load(codebook_ptr + code), 1), mask=r < rows)
        at_out += stride_out_plane
    else:
        for p in range(sums):
            bit = (tl.load(at + p * PLANE_BYTES) >> s) & 1
            tl.store(at_out, tl.sum(tl.where(bit == 1, acc, -acc), 1), mask=r < rows)
            at_out += stride_out_plane
    tl.store(at_out, tl.sum(acc, 1), mask=r < rows)
