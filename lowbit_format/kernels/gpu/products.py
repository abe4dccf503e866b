"""Products of few rows of x, straight from the planes, with int8 tensor cores.

A byte of a tile masked to bit s is an int8 operand of 0 and 2**s for the columns of block s. The int8 slices of x are
the other operand, so the tensor core gives the exact sum of x over the bits that are 1. Per block and plane::

    y += scale * (2 * sum over ones - sum of all)        which is scale * sum of +x and -x

README.md explains the layout, the codecs, and how many instructions it takes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..matrix import PlaneMatrix
from ..parameter_order import TILE_ROWS, group_major
from . import tiles
from .activations import SLICES, to_slices
from .launch import Config
from .tiles import PIECE, STEP, group_of

MOST_LEVELS = 4  # bits of a codebook up to which its products are made of 2**bits - 1 combinations of planes


def has_product_kernel(w: PlaneMatrix) -> bool:
    """Whether products with `w` can be computed from planes: it is tiled, and of a supported codec."""
    return w.is_tiled and (w.codec != "codebook" or w.bits <= MOST_LEVELS)


def panel_rows(n: int, count: int) -> int:
    """Rows of x in a panel, `count` slices each: their columns fill 8 or 16 of the tensor core.

    32 columns were tried: 1.47 instructions for a bit and 16 rows, against twice 0.94, but 254 registers and so half
    the warps.
    """
    least = 16 if torch.version.hip is not None else 8
    wanted = 1 << (n * count - 1).bit_length()
    return min(16, max(least, wanted)) // count


def multiply(
    x: Tensor, w: PlaneMatrix, bias: Tensor | None, deltas: Tensor | None, task_ids: Tensor | None, config: Config
) -> Tensor:
    """``x @ weight.T + bias`` as :func:`..naive.linear`, for x ``[n, cols]`` and tiled `w`; summed in float32."""
    n, rows = x.shape[0], w.rows
    steps, count = tiles.steps(w), SLICES[x.dtype]
    panel = panel_rows(n, count)
    operand = to_slices(x, steps, panel)
    panels = len(operand.slices)
    out = torch.empty((n, rows), dtype=x.dtype, device=x.device)
    shift = w.shift
    if deltas is not None:
        deltas = deltas.float()
    ids = None if task_ids is None else task_ids.long().contiguous()
    padded_rows = w.planes.shape[0] * TILE_ROWS
    asm = x.is_cuda and torch.version.hip is None
    # Left to itself, the assembler spills a few registers of the largest variants, for more warps.
    is_large = panel * count == 16 and (deltas is not None or count == 4)
    registers = {"maxnreg": 255} if asm and is_large else {}
    unused = w.planes  # stands for a tensor that a variant of the kernel does not read
    _multiply[(w.planes.shape[0] * panels,)](
        # pointers
        w.planes,
        group_major(w.scales),
        unused if shift is None else group_major(shift),
        unused if w.codebook is None else w.codebook,
        operand.slices,
        operand.units,
        unused if bias is None else bias.contiguous(),
        unused if deltas is None else deltas,
        unused if ids is None else ids,
        out,
        # sizes
        n,
        rows,
        panels,
        w.planes.shape[1],
        w.bits,
        w.groups,
        # strides of scales and shift
        padded_rows * w.groups,
        padded_rows,
        # sizes and strides of deltas
        *delta_sizes(deltas),
        # what makes a variant of the kernel
        STEPS=steps,
        PANEL=panel,
        SLICES=count,
        WARPS=config.warps,
        BLOCKS=tiles.blocks_of_group(w, steps),
        CODEC=w.codec,
        SHIFT=shift is not None,
        BIAS=bias is not None,
        DELTAS=delta_kind(deltas),
        IDS=ids is not None,
        ASM=asm,
        num_warps=config.warps,
        num_stages=1,
        enable_fp_fusion=True,
        **registers,
    )
    return out


def delta_kind(deltas: Tensor | None) -> str:
    """What deltas are of: ``"none"``, ``"rows"`` (factors of all scales of a row) or ``"groups"`` (added to scales)."""
    return "none" if deltas is None else "rows" if deltas.dim() == 3 else "groups"


def delta_sizes(deltas: Tensor | None) -> tuple[int, ...]:
    """Tasks, planes with deltas, and strides over tasks, planes, rows and groups, as kernels take them."""
    if deltas is None:
        return 0, 0, 0, 0, 0, 0
    strides = deltas.stride()
    return *deltas.shape[:2], *strides, *(0,) * (4 - len(strides))


# Sizes for which the kernel is not compiled anew when they are 1 or divide by 16: nothing here is faster for it.
_SIZES = (
    "n", "rows", "panels", "macros", "bits", "groups", "stride_scale_plane", "stride_scale_group",
    "tasks", "tuned_planes", "stride_delta_task", "stride_delta_plane", "stride_delta_row", "stride_delta_group",
)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _multiply(
    # Pointers. The last dimension is contiguous unless a stride below says otherwise.
    planes_ptr,  # uint8 [tiles, macros, bits * STEPS, PIECE], see tiles.py
    scales_ptr,  # float [bits (bcq) or 1, groups, rows padded to whole tiles]
    shift_ptr,  # float [groups, rows padded to whole tiles]: offsets (bcq, affine) or zeros (uniform)
    codebook_ptr,  # float32 [2**bits]
    slices_ptr,  # int8 [panels, macros, 8, STEPS * STEP * PANEL * SLICES], see activations.py
    units_ptr,  # float32 [panels * macros + 1, 8, PANEL, 2], see activations.py
    bias_ptr,  # float [rows]
    deltas_ptr,  # float32 [tasks, tuned_planes, rows] or [tasks, tuned_planes, rows, groups], any strides
    task_ids_ptr,  # int64 [n]: the task of each row of x, -1 for the base
    out_ptr,  # float [n, rows]
    # Sizes, in elements of their dimension.
    n,  # rows of x
    rows,  # of the weight
    panels,  # of PANEL rows of x
    macros,  # macro blocks of a row of the weight
    bits,  # planes
    groups,  # of a row of the weight
    # Strides, in elements.
    stride_scale_plane,
    stride_scale_group,  # rows padded to whole tiles; of shift as well
    # Deltas: how many tasks, how many planes have deltas, and strides in elements.
    tasks,
    tuned_planes,
    stride_delta_task,
    stride_delta_plane,
    stride_delta_row,
    stride_delta_group,
    # What makes a variant.
    STEPS: tl.constexpr,  # of STEP columns in a block: 1, 2, 4
    PANEL: tl.constexpr,  # rows of x that one program multiplies
    SLICES: tl.constexpr,  # of an element of x: 2, 4
    WARPS: tl.constexpr,
    BLOCKS: tl.constexpr,  # in a group; 0: a row has one group
    CODEC: tl.constexpr,  # "bcq", "uniform", "affine", "codebook"
    SHIFT: tl.constexpr,  # whether there are offsets or zeros
    BIAS: tl.constexpr,  # whether there is a bias
    DELTAS: tl.constexpr,  # "none", "rows", "groups": see delta_kind
    IDS: tl.constexpr,  # whether rows of x have tasks of their own; otherwise all have task 0
    ASM: tl.constexpr,  # whether NVIDIA's assembly may be used
    # The tiled layout.
    TILE_ROWS: tl.constexpr = TILE_ROWS,
    STEP: tl.constexpr = STEP,
    PIECE: tl.constexpr = PIECE,
):
    """A tile of the weight times a panel of x. Each warp has a range of macro blocks, whose sums are added last."""
    COLUMNS: tl.constexpr = PANEL * SLICES  # of the right operand
    PLANE_BYTES: tl.constexpr = PIECE * STEPS  # bytes of a plane in a macro block

    # ---- which rows of the weight, which rows of x, which macro blocks --------------------------------------------
    pid = tl.program_id(0)
    tile, panel = pid // panels, pid % panels  # panels of one tile run together: planes come from memory once
    warp = tl.arange(0, WARPS)
    r = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    b = tl.arange(0, PANEL)
    columns = tl.minimum(n * SLICES, COLUMNS)
    xs = panel * PANEL + b
    share = (macros + WARPS - 1) // WARPS  # macro blocks of a warp
    first = warp * share
    stop = tl.minimum(first + share, macros)

    # ---- the task of each row of x --------------------------------------------------------------------------------
    if DELTAS != "none":
        task = tl.load(task_ids_ptr + xs, mask=xs < n, other=-1) if IDS else tl.zeros((PANEL,), tl.int64)
        known = task < tasks
        task = tl.where(known, task, 0)
        last = tl.where(task >= 0, tuned_planes, 0)  # planes before this one have deltas
        at_task = tl.maximum(task, 0) * stride_delta_task
        at_row = tl.minimum(r, rows - 1).to(tl.int64) * stride_delta_row

    if CODEC == "uniform" or CODEC == "affine":
        level = ((1 << bits) - 1) * 0.5
    if CODEC == "codebook":
        level = _coefficient(codebook_ptr, 0, bits)
    acc = tl.zeros((WARPS, TILE_ROWS, PANEL), tl.float32)

    # ---- what all columns of a group have in common, times the sum of x -------------------------------------------
    if SHIFT or CODEC != "bcq":
        for i in range(share):
            m = tl.minimum(first + i, macros - 1)
            at_unit = units_ptr + _unit_at(first + i, stop, m, panel, macros, panels, PANEL)
            for s in tl.static_range(8):
                group = group_of(m, s, groups, BLOCKS)
                at_group = (group * stride_scale_group)[:, None] + r[None, :]
                if SHIFT:
                    moved = tl.load(shift_ptr + at_group).to(tl.float32)[:, :, None]
                if CODEC != "bcq":
                    scale = tl.load(scales_ptr + at_group).to(tl.float32)[:, :, None]
                    if DELTAS == "groups":
                        at_delta = deltas_ptr + at_task[None, :] + at_row[:, None]
                        scale += _group_delta(at_delta, group, stride_delta_group, last > 0)
                    if CODEC == "affine":
                        top = scale * level
                        if DELTAS == "rows":  # which leave the offset as it is
                            top += top * _row_delta(deltas_ptr, at_task, at_row, last > 0)[None, :, :]
                        moved = top + moved if SHIFT else top
                    else:
                        moved = scale * (level - moved) if SHIFT else scale * level
                _, total = _units(at_unit + s * (PANEL * 2))
                acc += moved * total[:, None, :]

    # ---- planes, or for a codebook all combinations of planes -----------------------------------------------------
    # One flat loop: in a nested one everything of x that does not depend on the plane would be kept in registers,
    # which costs more warps than it saves instructions.
    combinations = bits if CODEC != "codebook" else (1 << bits) - 1
    i = 0
    p = 0
    for _ in range(share * combinations):
        m = tl.minimum(first + i, macros - 1)
        at = (
            planes_ptr
            + ((tile.to(tl.int64) * macros + m) * (bits * PLANE_BYTES))[:, None]
            + tl.arange(0, PIECE)[None, :]
        )
        plane = p if CODEC == "bcq" else 0
        at_scale = scales_ptr + tl.cast(plane, tl.int64) * stride_scale_plane + r
        at_unit = units_ptr + _unit_at(first + i, stop, m, panel, macros, panels, PANEL)
        x = slices_ptr + (panel * macros + m).to(tl.int64) * (8 * STEPS * STEP * COLUMNS)
        if DELTAS != "none":
            at_plane = at_task + tl.cast(plane, tl.int64) * stride_delta_plane
        if DELTAS == "groups":
            at_delta = deltas_ptr + at_plane[None, :] + at_row[:, None]
            if plane < tuned_planes:
                part = _plane(
                    at, at_scale, at_unit, x, at_delta, p, m, columns, groups, stride_scale_group, stride_delta_group,
                    plane < last, STEPS, PANEL, SLICES, WARPS, BLOCKS, CODEC, ASM, True,
                )  # fmt: skip
            else:
                part = _plane(
                    at, at_scale, at_unit, x, at_delta, p, m, columns, groups, stride_scale_group, stride_delta_group,
                    plane < last, STEPS, PANEL, SLICES, WARPS, BLOCKS, CODEC, ASM, False,
                )  # fmt: skip
        else:
            part = _plane(
                at, at_scale, at_unit, x, deltas_ptr, p, m, columns, groups, stride_scale_group, stride_delta_group,
                columns, STEPS, PANEL, SLICES, WARPS, BLOCKS, CODEC, ASM, False,
            )  # fmt: skip
        if CODEC == "uniform" or CODEC == "affine":
            part *= 0.5 * (1 << (bits - 1 - p)).to(tl.float32)
        if CODEC == "codebook":
            part *= -_coefficient(codebook_ptr, p + 1, bits)
        if DELTAS == "rows" and (CODEC == "bcq" or CODEC == "affine"):
            part += part * _row_delta(deltas_ptr, at_plane, at_row, plane < last)[None, :, :]
        acc += part
        p += 1
        i = tl.where(p == combinations, i + 1, i)
        p = tl.where(p == combinations, 0, p)

    # ---- the sums of all warps, as rows of the result -------------------------------------------------------------
    y = tl.sum(acc, 0)
    if DELTAS == "rows" and CODEC != "bcq" and CODEC != "affine":
        y += y * _row_delta(deltas_ptr, at_task, at_row, last > 0)
    if DELTAS != "none":
        y = tl.where(known[None, :], y, float("nan"))
    if BIAS:
        y += tl.load(bias_ptr + r, mask=r < rows, other=0.0).to(tl.float32)[:, None]
    at_out = out_ptr + xs.to(tl.int64)[None, :] * rows + r[:, None]
    tl.store(at_out, y.to(out_ptr.dtype.element_ty), mask=(r < rows)[:, None] & (xs < n)[None, :])


@triton.jit
def _plane(
    # Pointers: to what this plane of the macro blocks `m` reads.
    at,  # uint8 [WARPS, PIECE]: the first piece of the plane 0
    at_scale,  # float [TILE_ROWS]: scales of group 0
    at_unit,  # float32 [WARPS, PANEL]: units of block 0
    x,  # int8 [WARPS]: slices of block 0
    at_delta,  # float32 [TILE_ROWS, PANEL]: deltas of group 0, if GROUP_DELTAS
    # Which plane, and sizes.
    p,  # the plane, or the combination of planes
    m,  # int32 [WARPS]: the macro blocks
    columns,  # of the right operand that are no padding
    groups,
    # Strides, in elements.
    stride_scale_group,
    stride_delta_group,
    is_tuned,  # bool [PANEL]: whether the row's task has deltas of this plane, if GROUP_DELTAS
    # What makes a variant, as in _multiply.
    STEPS: tl.constexpr,
    PANEL: tl.constexpr,
    SLICES: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    CODEC: tl.constexpr,
    ASM: tl.constexpr,
    GROUP_DELTAS: tl.constexpr,
    # The tiled layout.
    TILE_ROWS: tl.constexpr = TILE_ROWS,
    STEP: tl.constexpr = STEP,
    PIECE: tl.constexpr = PIECE,
):
    """What plane `p` of a macro block for each warp adds to the product: float32 ``[WARPS, TILE_ROWS, PANEL]``."""
    COLUMNS: tl.constexpr = PANEL * SLICES
    PLANE_BYTES: tl.constexpr = PIECE * STEPS
    a0 = _left(at, p, 0, PLANE_BYTES, WARPS, CODEC, ASM)
    if STEPS > 1:
        a1 = _left(at, p, 1, PLANE_BYTES, WARPS, CODEC, ASM)
    if STEPS > 2:
        a2 = _left(at, p, 2, PLANE_BYTES, WARPS, CODEC, ASM)
        a3 = _left(at, p, 3, PLANE_BYTES, WARPS, CODEC, ASM)
    part = tl.zeros((WARPS, TILE_ROWS, PANEL), tl.float32)
    for s in tl.static_range(8):
        at_x = x + s * (STEPS * STEP * COLUMNS)
        sums = tl.dot(_bit(a0, s, ASM), _right(at_x, columns, WARPS, COLUMNS), out_dtype=tl.int32)
        if STEPS > 1:
            right = _right(at_x + STEP * COLUMNS, columns, WARPS, COLUMNS)
            sums = tl.dot(_bit(a1, s, ASM), right, sums, out_dtype=tl.int32)
        if STEPS > 2:
            right = _right(at_x + 2 * STEP * COLUMNS, columns, WARPS, COLUMNS)
            sums = tl.dot(_bit(a2, s, ASM), right, sums, out_dtype=tl.int32)
            right = _right(at_x + 3 * STEP * COLUMNS, columns, WARPS, COLUMNS)
            sums = tl.dot(_bit(a3, s, ASM), right, sums, out_dtype=tl.int32)
        unit, total = _units(at_unit + s * (PANEL * 2))
        signed = _whole(sums, WARPS, PANEL, SLICES) * unit[:, None, :] - total[:, None, :]
        group = group_of(m, s, groups, BLOCKS)
        scale = tl.load(at_scale[None, :] + (group * stride_scale_group)[:, None]).to(tl.float32)[:, :, None]
        if GROUP_DELTAS:
            scale += _group_delta(at_delta, group, stride_delta_group, is_tuned)
        part += scale * signed
    return part


# ---- operands of the tensor core ----------------------------------------------------------------------------------


@triton.jit
def _left(
    at,  # pointers to uint8 [WARPS, PIECE]: the first piece of the plane 0
    p,
    step: tl.constexpr,
    PLANE_BYTES: tl.constexpr,  # bytes of a plane in a macro block
    WARPS: tl.constexpr,
    CODEC: tl.constexpr,
    ASM: tl.constexpr,
    TILE_ROWS: tl.constexpr = TILE_ROWS,
    STEP: tl.constexpr = STEP,
    PIECE: tl.constexpr = PIECE,
):
    """The piece `step` of plane `p`, as a matrix: uint8 ``[WARPS, TILE_ROWS, STEP]``.

    For a codebook, of the exclusive or of the planes whose bits are set in ``p + 1``.
    """
    at += step * PIECE
    if CODEC == "codebook":
        a, b = _chosen(at, p, 0, PLANE_BYTES), _chosen(at, p, 1, PLANE_BYTES)
        c, d = _chosen(at, p, 2, PLANE_BYTES), _chosen(at, p, 3, PLANE_BYTES)
        if ASM:
            c = tl.inline_asm_elementwise("lop3.b32 $0, $1, $2, $3, 0x96;", "=r,r,r,r", [b, c, d], tl.uint8, True, 4)
            piece = tl.inline_asm_elementwise("xor.b32 $0, $1, $2;", "=r,r,r", [a, c], tl.uint8, True, 4)
        else:
            piece = a ^ b ^ c ^ d
    else:
        piece = tl.load(at + p * PLANE_BYTES, cache_modifier=".cg")  # read once: the nearest cache is for x and scales
    piece = tl.reshape(piece, (WARPS, 8, 4, 2, 2, 4))  # row % 8, byte // 4 % 4, byte // 16, row // 8, byte % 4
    return tl.reshape(tl.permute(piece, (0, 4, 1, 3, 2, 5)), (WARPS, TILE_ROWS, STEP))


@triton.jit
def _chosen(at, p, plane: tl.constexpr, PLANE_BYTES: tl.constexpr):
    """A piece of `plane` if the combination `p` has it, otherwise zeros: uint8 ``[WARPS, PIECE]``."""
    wanted = tl.full(at.shape, 1, tl.int1) & (((p + 1) >> plane) & 1 != 0)
    return tl.load(at + plane * PLANE_BYTES, mask=wanted, other=0)


@triton.jit
def _right(at, columns, WARPS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr = STEP):
    """A step of the slices of x, as a matrix: int8 ``[WARPS, STEP, COLUMNS]`` (activations.py has the order)."""
    PAIR: tl.constexpr = COLUMNS // 8
    i = tl.arange(0, STEP * COLUMNS)
    if PAIR == 1:  # lanes of columns that are padding read what another lane reads: nothing is fetched for them
        i = tl.max_contiguous(tl.multiple_of(tl.minimum(i // STEP, columns - 1) * STEP + i % STEP, 8), 8)
    at = at[:, None] + i[None, :]
    operand = tl.reshape(
        tl.load(at), (WARPS, 8, 4, PAIR, 2, 4)
    )  # column % 8, byte // 4 % 4, column // 8, byte // 16, …
    return tl.reshape(tl.permute(operand, (0, 4, 2, 5, 3, 1)), (WARPS, STEP, COLUMNS))


@triton.jit
def _bit(left, s: tl.constexpr, ASM: tl.constexpr):
    """Bit `s` of each byte, in its place, as int8: one instruction for four bytes."""
    if ASM:
        mask = tl.full(left.shape, 1 << s, tl.uint8)
        left = tl.inline_asm_elementwise("and.b32 $0, $1, $2;", "=r,r,r", [left, mask], tl.int8, True, 4)
    else:
        left = (left & (1 << s)).to(tl.int8, bitcast=True)
    return left


@triton.jit
def _whole(sums, WARPS: tl.constexpr, PANEL: tl.constexpr, SLICES: tl.constexpr, TILE_ROWS: tl.constexpr = TILE_ROWS):
    """Sums of x in units, float32 ``[WARPS, TILE_ROWS, PANEL]``, from those of its slices, int32 ``[.., COLUMNS]``."""
    if SLICES == 2:
        low, high = tl.split(tl.reshape(sums, (WARPS, TILE_ROWS, PANEL, 2)))
        whole = (low + high * 128).to(tl.float32)
    else:
        even, odd = tl.split(tl.reshape(sums, (WARPS, TILE_ROWS, PANEL, 2, 2)))
        low, high = tl.split((even + odd * 128).to(tl.float32))
        whole = low + high * 16384.0
    return whole


# ---- units, deltas and coefficients --------------------------------------------------------------------------------


@triton.jit
def _unit_at(wanted, stop, m, panel, macros, panels, PANEL: tl.constexpr):
    """Where the units of block 0 of each warp's macro block are: int64 ``[WARPS, PANEL]``.

    Where a warp has no macro block left, ``wanted >= stop``, these are the zeros at the end of the units.
    """
    m = tl.where(wanted < stop, panel * macros + m, panels * macros).to(tl.int64) * (8 * PANEL * 2)
    return m[:, None] + 2 * tl.arange(0, PANEL)[None, :]


@triton.jit
def _units(at):
    """Units and sums of a block, for each row of x: two of float32 ``[WARPS, PANEL]``."""
    return tl.split(tl.load(at[:, :, None] + tl.arange(0, 2)[None, None, :]))


@triton.jit
def _group_delta(at, group, stride_delta_group, is_tuned):
    """Deltas of a group's scales for each row of x, 0 where it has none: float32 ``[WARPS, TILE_ROWS, PANEL]``.

    `at` ``[TILE_ROWS, PANEL]`` points to those of group 0.
    """
    at = at[None, :, :] + (group * stride_delta_group)[:, None, None]
    return tl.load(at, mask=is_tuned[None, None, :], other=0.0)


@triton.jit
def _row_delta(deltas_ptr, at_task, at_row, is_tuned):
    """Deltas of a tile's rows for each row of x, 0 where it has none: float32 ``[TILE_ROWS, PANEL]``."""
    return tl.load(deltas_ptr + at_task[None, :] + at_row[:, None], mask=is_tuned[None, :], other=0.0)


@triton.jit
def _coefficient(codebook_ptr, planes, bits):
    """The Walsh coefficient of a set of planes in a codebook, float32; bit p of `planes` says whether plane p is in it.

    With signs +1 for a bit 0 and -1 for 1, any table of 2**bits levels is a sum over sets of planes of a coefficient
    times the product of their signs. That product is the sign of the exclusive or of their bits.
    """
    code = tl.arange(0, 16)
    levels = tl.load(codebook_ptr + code, mask=code < (1 << bits), other=0.0)
    # Planes count from the most significant bit of a code, sets of planes from the first plane.
    odd = tl.zeros((16,), tl.int32)
    for p in tl.static_range(4):
        odd ^= (planes >> p) & (code >> tl.maximum(bits - 1 - p, 0)) & 1
    return tl.sum(tl.where(odd == 1, -levels, levels), 0) / (1 << bits)
