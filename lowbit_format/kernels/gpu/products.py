"""Products of few rows, straight from planes, with int8 tensor cores.

A byte of a tile masked to bit s is an int8 operand of 0 and 2**s for the columns of block s, and the int8 slices of x
are the other: the tensor core gives the exact sum of x over the bits that are 1. With it, per block and plane::

    y += scale * (2 * sum over ones - sum of all)        which is scale * sum of +x and -x

See README.md for the layout, the codecs, and how many instructions it takes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..matrix import PlaneMatrix
from ..parameter_order import group_major
from . import tiles
from .activations import SLICES, to_slices
from .launch import Config

CODECS = {"bcq": 0, "uniform": 1, "codebook": 2}
MOST_LEVELS = 4  # bits of a codebook up to which its products are made of 2**bits - 1 combinations of planes


def has_product_kernel(w: PlaneMatrix) -> bool:
    """Whether products with packed `w` can be computed from planes."""
    return w.is_tiled and (w.codec != "codebook" or w.bits <= MOST_LEVELS)


def chunk_rows(n: int, count: int) -> int:
    """Rows of x that one program multiplies, `count` slices each: their columns fill 8 or 16 of the tensor core.

    32 were tried: 1.47 instructions for a bit and 16 rows, against twice 0.94, but 254 registers and so half the warps.
    """
    least = 16 if torch.version.hip is not None else 8
    wanted = 1 << (n * count - 1).bit_length()
    return min(16, max(least, wanted)) // count


def multiply(
    x: Tensor, w: PlaneMatrix, bias: Tensor | None, deltas: Tensor | None, task_ids: Tensor | None, config: Config
) -> Tensor:
    """``x @ weight.T + bias`` as :func:`..naive.linear`, for x ``[n, cols]`` and packed `w`; summed in float32."""
    n, rows = x.shape[0], w.rows
    steps, count = tiles.steps(w), SLICES[x.dtype]
    chunk = chunk_rows(n, count)
    operand = to_slices(x, steps, chunk)
    out = torch.empty((n, rows), dtype=x.dtype, device=x.device)
    shift = w.shift
    if deltas is not None:
        deltas = deltas.float()
    kind = 0 if deltas is None else deltas.dim() - 2  # 1: a factor for a row; 2: something added for a group
    ids = task_ids if task_ids is None else task_ids.long().contiguous()
    codebook = w.planes if w.codebook is None else w.codebook
    lanes = w.planes.shape[0] * tiles.ROWS
    asm = x.is_cuda and torch.version.hip is None
    # Left to itself, the assembler spills a few registers of the largest variants, for more warps.
    registers = {"maxnreg": 255} if asm and chunk * count == 16 and (kind or count == 4) else {}
    none = w.planes  # stands for what a variant of the kernel does not look at
    _multiply[(w.planes.shape[0] * len(operand.slices),)](
        w.planes, group_major(w.scales), none if shift is None else group_major(shift), codebook,
        operand.slices, operand.units, none if bias is None else bias.contiguous(),
        none if deltas is None else deltas, none if ids is None else ids, out,
        n, rows, len(operand.slices), w.planes.shape[1], w.bits, w.groups,
        lanes * w.groups, lanes, *delta_sizes(deltas),
        STEPS=steps, CHUNK=chunk, SLICES=count, WARPS=config.warps, BLOCKS=tiles.blocks_of_group(w, steps),
        CODEC=CODECS[w.codec], SHIFT=shift is not None, BIAS=bias is not None, DELTAS=kind, IDS=ids is not None,
        ASM=asm, num_warps=config.warps, num_stages=1, enable_fp_fusion=True, **registers,
    )  # fmt: skip
    return out


def delta_sizes(deltas: Tensor | None) -> tuple[int, ...]:
    """Tasks, planes with deltas, and strides over tasks, planes, rows and groups, as kernels take them."""
    if deltas is None:
        return 0, 0, 0, 0, 0, 0
    strides = deltas.stride()
    return *deltas.shape[:2], *strides, *(0,) * (4 - len(strides))


@triton.jit
def _left(at, p, step: tl.constexpr, PIECES: tl.constexpr, WARPS: tl.constexpr, CODEC: tl.constexpr, ASM: tl.constexpr):
    """A piece of plane `p` of the macro blocks at `at`, as a matrix: uint8 ``[WARPS, 16, 32]``.

    For a codebook, of the exclusive or of the planes whose bits are set in ``p + 1``.
    """
    at += step * 512
    if CODEC == 2:
        a, b = _chosen(at, p, 0, PIECES), _chosen(at, p, 1, PIECES)
        c, d = _chosen(at, p, 2, PIECES), _chosen(at, p, 3, PIECES)
        if ASM:
            c = tl.inline_asm_elementwise("lop3.b32 $0, $1, $2, $3, 0x96;", "=r,r,r,r", [b, c, d], tl.uint8, True, 4)
            lanes = tl.inline_asm_elementwise("xor.b32 $0, $1, $2;", "=r,r,r", [a, c], tl.uint8, True, 4)
        else:
            lanes = a ^ b ^ c ^ d
    else:
        lanes = tl.load(at + p * PIECES, cache_modifier=".cg")  # read once: the nearest cache is for x and scales
    lanes = tl.reshape(lanes, (WARPS, 8, 4, 2, 2, 4))  # row % 8, byte // 4 % 4, byte // 16, row // 8, byte % 4
    return tl.reshape(tl.permute(lanes, (0, 4, 1, 3, 2, 5)), (WARPS, 16, 32))


@triton.jit
def _chosen(at, p, plane: tl.constexpr, PIECES: tl.constexpr):
    wanted = tl.full(at.shape, 1, tl.int1) & (((p + 1) >> plane) & 1 != 0)
    return tl.load(at + plane * PIECES, mask=wanted, other=0)


@triton.jit
def _right(at, columns, WARPS: tl.constexpr, COLUMNS: tl.constexpr):
    """A step of the slices of x, as a matrix: int8 ``[WARPS, 32, COLUMNS]`` (activations.py has the order)."""
    PAIR: tl.constexpr = COLUMNS // 8
    i = tl.arange(0, 32 * COLUMNS)
    if PAIR == 1:  # lanes of columns that are padding read what another lane reads: nothing is fetched for them
        i = tl.max_contiguous(tl.multiple_of(tl.minimum(i // 32, columns - 1) * 32 + i % 32, 8), 8)
    at = at[:, None] + i[None, :]
    lanes = tl.reshape(tl.load(at), (WARPS, 8, 4, PAIR, 2, 4))  # column % 8, byte // 4 % 4, column // 8, byte // 16, …
    return tl.reshape(tl.permute(lanes, (0, 4, 2, 5, 3, 1)), (WARPS, 32, COLUMNS))


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
def _whole(sums, WARPS: tl.constexpr, CHUNK: tl.constexpr, SLICES: tl.constexpr):
    """Sums of slices, int32 ``[WARPS, 16, CHUNK * SLICES]``, as sums of x in units: float32 ``[WARPS, 16, CHUNK]``."""
    if SLICES == 2:
        low, high = tl.split(tl.reshape(sums, (WARPS, 16, CHUNK, 2)))
        whole = (low + high * 128).to(tl.float32)
    else:
        even, odd = tl.split(tl.reshape(sums, (WARPS, 16, CHUNK, 2, 2)))
        low, high = tl.split((even + odd * 128).to(tl.float32))
        whole = low + high * 16384.0
    return whole


# Not compiled anew for sizes that are 1 or divide by 16: nothing here is faster for it.
_SIZES = (
    "n", "rows", "chunks", "macros", "bits", "groups", "scale_plane", "lanes",
    "tasks", "tuned", "delta_task", "delta_plane", "delta_row", "delta_group",
)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _multiply(
    planes, scales, shift, codebook, slices, units, bias, deltas, task_ids, out,
    n, rows, chunks, macros, bits, groups,
    scale_plane, lanes, tasks, tuned, delta_task, delta_plane, delta_row, delta_group,
    STEPS: tl.constexpr, CHUNK: tl.constexpr, SLICES: tl.constexpr, WARPS: tl.constexpr, BLOCKS: tl.constexpr,
    CODEC: tl.constexpr, SHIFT: tl.constexpr, BIAS: tl.constexpr, DELTAS: tl.constexpr, IDS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """One tile of rows times one chunk of x. Each warp has a range of the macro blocks; their sums are added last."""
    pid = tl.program_id(0)
    tile, chunk = pid // chunks, pid % chunks  # chunks of one tile run together: planes come from memory once
    warp = tl.arange(0, WARPS)
    r = tile * 16 + tl.arange(0, 16)
    b = tl.arange(0, CHUNK)
    COLUMNS: tl.constexpr = CHUNK * SLICES
    columns = tl.minimum(n * SLICES, COLUMNS)
    PIECES: tl.constexpr = 512 * STEPS  # bytes of a plane
    xs = chunk * CHUNK + b
    if DELTAS:
        task = tl.load(task_ids + xs, mask=xs < n, other=-1) if IDS else tl.zeros((CHUNK,), tl.int64)
        known = task < tasks
        task = tl.where(known, task, 0)
        last = tl.where(task >= 0, tuned, 0)  # planes before this one have deltas
        task_at = tl.maximum(task, 0) * delta_task
        tuned_row = tl.minimum(r, rows - 1).to(tl.int64) * delta_row

    share = (macros + WARPS - 1) // WARPS
    first = warp * share
    stop = tl.minimum(first + share, macros)
    if CODEC == 1:
        level = ((1 << bits) - 1) * 0.5
    if CODEC == 2:
        level = _coefficient(codebook, 0, bits)
    acc = tl.zeros((WARPS, 16, CHUNK), tl.float32)

    # What all columns of a group have in common, times the sum of x.
    if SHIFT or CODEC != 0:
        for i in range(share):
            m = tl.minimum(first + i, macros - 1)
            at_unit = units + _unit_at(first + i, stop, m, chunk, macros, chunks, CHUNK)
            for s in tl.static_range(8):
                group = group_of(m, s, groups, BLOCKS)
                at_group = (group * lanes)[:, None] + r[None, :]
                if SHIFT:
                    moved = tl.load(shift + at_group).to(tl.float32)[:, :, None]
                if CODEC != 0:
                    scale = tl.load(scales + at_group).to(tl.float32)[:, :, None]
                    if DELTAS == 2:
                        at_delta = deltas + task_at[None, :] + tuned_row[:, None]
                        scale += _group_delta(at_delta, group, delta_group, last > 0)
                    moved = scale * (level - moved) if SHIFT else scale * level
                _, total = _units(at_unit + s * (CHUNK * 2))
                acc += moved * total[:, None, :]

    # Planes, or for a codebook all combinations of planes. One flat loop: in a nested one everything of x that does
    # not depend on the plane would be kept in registers, which costs more warps than it saves instructions.
    combinations = bits if CODEC != 2 else (1 << bits) - 1
    i = 0
    p = 0
    for _ in range(share * combinations):
        m = tl.minimum(first + i, macros - 1)
        at = planes + ((tile.to(tl.int64) * macros + m) * (bits * PIECES))[:, None] + tl.arange(0, 512)[None, :]
        plane = p if CODEC == 0 else 0
        at_scale = scales + tl.cast(plane, tl.int64) * scale_plane + r
        at_unit = units + _unit_at(first + i, stop, m, chunk, macros, chunks, CHUNK)
        x = slices + (chunk * macros + m).to(tl.int64) * (8 * STEPS * 32 * COLUMNS)
        if DELTAS:
            task_plane = task_at + tl.cast(plane, tl.int64) * delta_plane
        if DELTAS == 2:
            at_delta = deltas + task_plane[None, :] + tuned_row[:, None]
            if plane < tuned:
                part = _plane(
                    at, p, x, columns, at_unit, m, groups, at_scale, lanes, at_delta, delta_group, plane < last,
                    STEPS, CHUNK, SLICES, WARPS, BLOCKS, CODEC, ASM, True,
                )  # fmt: skip
            else:
                part = _plane(
                    at, p, x, columns, at_unit, m, groups, at_scale, lanes, at_delta, delta_group, plane < last,
                    STEPS, CHUNK, SLICES, WARPS, BLOCKS, CODEC, ASM, False,
                )  # fmt: skip
        else:
            part = _plane(
                at, p, x, columns, at_unit, m, groups, at_scale, lanes, deltas, delta_group, columns,
                STEPS, CHUNK, SLICES, WARPS, BLOCKS, CODEC, ASM, False,
            )  # fmt: skip
        if CODEC == 1:
            part *= 0.5 * (1 << (bits - 1 - p)).to(tl.float32)
        if CODEC == 2:
            part *= -_coefficient(codebook, p + 1, bits)
        if DELTAS == 1 and CODEC == 0:
            part += part * _row_delta(deltas, task_plane, tuned_row, plane < last)[None, :, :]
        acc += part
        p += 1
        i = tl.where(p == combinations, i + 1, i)
        p = tl.where(p == combinations, 0, p)

    y = tl.sum(acc, 0)
    if DELTAS == 1 and CODEC != 0:
        y += y * _row_delta(deltas, task_at, tuned_row, last > 0)
    if DELTAS:
        y = tl.where(known[None, :], y, float("nan"))
    if BIAS:
        y += tl.load(bias + r, mask=r < rows, other=0.0).to(tl.float32)[:, None]
    at_out = out + xs.to(tl.int64)[None, :] * rows + r[:, None]
    tl.store(at_out, y.to(out.dtype.element_ty), mask=(r < rows)[:, None] & (xs < n)[None, :])


@triton.jit
def _plane(
    at, p, x, columns, at_unit, m, groups, at_scale, lanes, at_delta, delta_group, tuned,
    STEPS: tl.constexpr, CHUNK: tl.constexpr, SLICES: tl.constexpr, WARPS: tl.constexpr, BLOCKS: tl.constexpr,
    CODEC: tl.constexpr, ASM: tl.constexpr, GROUP_DELTAS: tl.constexpr,
):  # fmt: skip
    """What plane `p` of a macro block for each warp adds to the product: float32 ``[WARPS, 16, CHUNK]``."""
    COLUMNS: tl.constexpr = CHUNK * SLICES
    PIECES: tl.constexpr = 512 * STEPS
    a0 = _left(at, p, 0, PIECES, WARPS, CODEC, ASM)
    if STEPS > 1:
        a1 = _left(at, p, 1, PIECES, WARPS, CODEC, ASM)
    if STEPS > 2:
        a2 = _left(at, p, 2, PIECES, WARPS, CODEC, ASM)
        a3 = _left(at, p, 3, PIECES, WARPS, CODEC, ASM)
    part = tl.zeros((WARPS, 16, CHUNK), tl.float32)
    for s in tl.static_range(8):
        at_x = x + s * (STEPS * 32 * COLUMNS)
        sums = tl.dot(_bit(a0, s, ASM), _right(at_x, columns, WARPS, COLUMNS), out_dtype=tl.int32)
        if STEPS > 1:
            right = _right(at_x + 32 * COLUMNS, columns, WARPS, COLUMNS)
            sums = tl.dot(_bit(a1, s, ASM), right, sums, out_dtype=tl.int32)
        if STEPS > 2:
            right = _right(at_x + 64 * COLUMNS, columns, WARPS, COLUMNS)
            sums = tl.dot(_bit(a2, s, ASM), right, sums, out_dtype=tl.int32)
            right = _right(at_x + 96 * COLUMNS, columns, WARPS, COLUMNS)
            sums = tl.dot(_bit(a3, s, ASM), right, sums, out_dtype=tl.int32)
        unit, total = _units(at_unit + s * (CHUNK * 2))
        signed = _whole(sums, WARPS, CHUNK, SLICES) * unit[:, None, :] - total[:, None, :]
        group = group_of(m, s, groups, BLOCKS)
        scale = tl.load(at_scale[None, :] + (group * lanes)[:, None]).to(tl.float32)[:, :, None]
        if GROUP_DELTAS:
            scale += _group_delta(at_delta, group, delta_group, tuned)
        part += scale * signed
    return part


@triton.jit
def group_of(m, s: tl.constexpr, groups, BLOCKS: tl.constexpr):
    """The group of block `s` of the macro blocks `m`; blocks that are padding belong to any."""
    if BLOCKS == 0:
        group = m * 0
    elif BLOCKS == 1:
        group = tl.minimum(m * 8 + s, groups - 1)
    else:
        group = tl.minimum((m * 8 + s) // BLOCKS, groups - 1)
    return group


@triton.jit
def _unit_at(wanted, stop, m, chunk, macros, chunks, CHUNK: tl.constexpr):
    """Where the units of a block 0 are: int64 ``[WARPS, CHUNK]``; past a warp's share, those of nothing."""
    m = tl.where(wanted < stop, chunk * macros + m, chunks * macros).to(tl.int64) * (8 * CHUNK * 2)
    return m[:, None] + 2 * tl.arange(0, CHUNK)[None, :]


@triton.jit
def _units(at):
    """Units and sums of a block: two of float32 ``[WARPS, CHUNK]``."""
    return tl.split(tl.load(at[:, :, None] + tl.arange(0, 2)[None, None, :]))


@triton.jit
def _group_delta(at, group, delta_group, tuned):
    """Deltas of a group and 16 rows for each row of x, 0 where it has none: float32 ``[WARPS, 16, CHUNK]``.

    `at` ``[16, CHUNK]`` points to those of the group 0.
    """
    at = at[None, :, :] + (group * delta_group)[:, None, None]
    return tl.load(at, mask=tuned[None, None, :], other=0.0)


@triton.jit
def _row_delta(deltas, task_at, row_at, tuned):
    """Deltas of 16 rows for each row of x, 0 where it has none: float32 ``[16, CHUNK]``."""
    return tl.load(deltas + task_at[None, :] + row_at[:, None], mask=tuned[None, :], other=0.0)


@triton.jit
def _coefficient(codebook, planes, bits):
    """How much the product of the signs of `planes` counts in a codebook: a Walsh coefficient, float32.

    With signs +1 for a bit 0 and -1 for 1, any table of 2**bits levels is a sum over sets of planes of a coefficient
    times the product of their signs, which is the sign of the exclusive or of their bits.
    """
    code = tl.arange(0, 16)
    levels = tl.load(codebook + code, mask=code < (1 << bits), other=0.0)
    # Planes count from the most significant bit of a code, sets of planes from the first plane.
    odd = tl.zeros((16,), tl.int32)
    for p in tl.static_range(4):
        odd ^= (planes >> p) & (code >> tl.maximum(bits - 1 - p, 0)) & 1
    return tl.sum(tl.where(odd == 1, -levels, levels), 0) / (1 << bits)
