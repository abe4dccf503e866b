"""A part of the GPU benchmark: how long products should take, from counted instructions, bytes and the device's limits.

Nothing here needs a GPU. Measured values stand beside these in every run, so that each run confirms or refutes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lowbit_format.codecs import CODECS
from lowbit_format.kernels.gpu.launch import FAMILIES
from lowbit_format.schema import Scheme

from ..common import table

# Instructions of the product kernel for a plane bit, by columns of the tensor core's right operand, on sm_90: a warp's
# instructions times 32, over the bits that the warp multiplies by. tests/kernels/gpu/test_compiled.py counts them.
INSTRUCTIONS = {8: 0.74, 16: 0.94}
COMBINATION = 1.25  # of a codebook: a combination of planes takes that many instructions for each of a plane
LANES = 4 * 32  # of a multiprocessor: four schedulers with a warp each, every clock
SLICES = 2  # int8 slices of a float16 or bfloat16 activation

BIG = (8192, 28672)
SIZES = (BIG, (4096, 4096), (14336, 4096), (4096, 14336))  # rows, columns; the most telling first
BITS = (1, 2, 3, 4, 8)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
PREFILLS = (2048, 4096, 8192)
GEMV_AIMS = {4: 2.7, 2: 5.0}  # times as fast as the library with bfloat16, at the largest size
PREFILL_AIMS = {2048: 0.85, 4096: 0.92, 8192: 0.92}  # of the library's speed


@dataclass(frozen=True)
class Limits:
    """What a device can do at most.

    Attributes:
        multiprocessors: number.
        clock: Hz of the multiprocessors.
        copy: bytes per second that a device copy reads and writes.
        matmul: operations per second of the library's product in half precision.
    """

    multiprocessors: int
    clock: float
    copy: float
    matmul: float

    def straight(self, scheme: Scheme, rows: int, cols: int, n: int) -> tuple[float, float]:
        """Microseconds of instructions and of bytes, of a product with `n` rows of x straight from planes.

        The larger is the prediction. The kernel that slices x comes on top.
        """
        planes = scheme.bits if scheme.codec != "codebook" else COMBINATION * (2**scheme.bits - 1)
        chunk, count = chunks(n)
        lanes = self.multiprocessors * LANES * self.clock
        instructions = rows * cols * planes * INSTRUCTIONS[chunk * SLICES] * count / lanes
        return 1e6 * instructions, 1e6 * nbytes(scheme, rows, cols) / self.copy

    def decoding(self, scheme: Scheme, rows: int, cols: int, itemsize: int = 2) -> float:
        """Microseconds to decode a weight: bytes read and written."""
        return 1e6 * (nbytes(scheme, rows, cols) + itemsize * rows * cols) / self.copy

    def library(self, rows: int, cols: int, n: int) -> float:
        """Microseconds of the library's product with a weight in half precision: operations or bytes, the larger."""
        return 1e6 * max(2 * rows * cols * n / self.matmul, 2 * (rows * cols + n * (rows + cols)) / self.copy)


def nbytes(scheme: Scheme, rows: int, cols: int) -> int:
    """Bytes that a product must read: planes, scales, and offsets or zero points, without padding."""
    codec = CODECS[scheme.codec]
    params = (scheme.bits if codec.scale_per_plane else 1) + (scheme.shift is not None)
    itemsize = 4 if scheme.scale_dtype == "F32" else 2
    return rows * cols * scheme.bits // 8 + itemsize * params * rows * scheme.groups(cols)


def bcq(bits: int, group_size: int = 128) -> Scheme:
    """What most tables are about."""
    return Scheme("bcq", bits, group_size, "F16", offset=True)


def report(limits: Limits) -> Iterator[str]:
    """The tables of ``--predict``."""
    yield (
        f"# Predictions\n\n{limits.multiprocessors} multiprocessors at {limits.clock / 1e9:.3f} GHz, copy "
        f"{limits.copy / 1e12:.2f} TB/s, matrix products {limits.matmul / 1e12:.0f} TFLOP/s. Instructions for a plane "
        f"bit: {', '.join(f'{count} at {columns} columns' for columns, count in INSTRUCTIONS.items())}. BCQ with "
        "offsets, groups of 128, float16 scales; half-precision x. Times in microseconds; the kernel that slices x "
        "(a few microseconds) is not in them."
    )
    yield "## One row of x (gemv)\n\n" + table(
        ["rows x cols", "bits", "MB", "instructions", "bytes", "predicted", "bound by", "share of copy",
         "library, bf16", "ratio"],
        [_gemv_row(limits, size, bits) for size in SIZES for bits in BITS],
    )  # fmt: skip
    for bits in (4, 2):
        rows = [_batch_row(limits, size, bits, n) for size in SIZES for n in BATCHES]
        yield f"## Rows of x, {bits} bits (batch)\n\n" + table(
            ["rows x cols", "rows of x", "from planes", "to one row", "decoded, library", "faster", "library, bf16"],
            rows,
        )
    yield (
        "## Where decoding becomes faster (rows of x times planes)\n\n"
        f"The rule that ships has {FAMILIES['hopper'].row_planes} (`row_planes` of the family).\n\n"
        + table(["rows x cols", *(f"{bits} bits" for bits in BITS)], [_crossing_row(limits, size) for size in SIZES])
    )
    yield "## Many rows of x, 4 bits (prefill)\n\n" + table(
        ["rows x cols", "rows of x", "decoded, library", "library, bf16", "share of its speed", "aim"],
        [_prefill_row(limits, size, n) for size in SIZES for n in PREFILLS],
    )


def name(size: Sequence[int]) -> str:
    """``rows x cols``."""
    return f"{size[0]} x {size[1]}"


def crossing(times: Sequence[tuple[int, float, float]]) -> float | None:
    """Rows of x up to which the first code path is faster.

    Between two of the given ones, by a straight line through the differences. `times` are rows of x, time of the
    first code path, time of the second. None if the first is faster to the end.
    """
    last = 0.0, -1.0
    for n, first, second in times:
        if (lost := first - second) > 0:
            (before, gain) = last
            return before + (n - before) * -gain / (lost - gain) if before else 0.0
        last = float(n), lost
    return None


def chunks(n: int) -> tuple[int, int]:
    """Rows of x in a chunk, and chunks, as the product kernel has them."""
    chunk = min(max(INSTRUCTIONS), max(min(INSTRUCTIONS), 1 << (n * SLICES - 1).bit_length())) // SLICES
    return chunk, -(-n // chunk)


def _gemv_row(limits: Limits, size: tuple[int, int], bits: int) -> list[str]:
    instructions, moving = limits.straight(bcq(bits), *size, 1)
    most, library = max(instructions, moving), limits.library(*size, 1)
    return [
        name(size), str(bits), f"{nbytes(bcq(bits), *size) / 1e6:.1f}", f"{instructions:.1f}", f"{moving:.1f}",
        f"{most:.1f}", "bytes" if moving >= instructions else "instructions", f"{moving / most:.0%}",
        f"{library:.1f}", f"{library / most:.2f}",
    ]  # fmt: skip


def _batch_row(limits: Limits, size: tuple[int, int], bits: int, n: int) -> list[str]:
    one, straight = (max(limits.straight(bcq(bits), *size, rows)) for rows in (1, n))
    library = limits.library(*size, n)
    decoded = limits.decoding(bcq(bits), *size) + library
    faster = "planes" if straight <= decoded else "decoded"
    times = (f"{straight:.1f}", f"{straight / one:.2f}", f"{decoded:.1f}", faster, f"{library:.1f}")
    return [name(size), str(n), *times]


def _crossing_row(limits: Limits, size: tuple[int, int]) -> list[str]:
    cells = []
    for bits in BITS:
        times = []
        for n in (1, 4, 8, *range(16, 1025, 16)):
            decoded = limits.decoding(bcq(bits), *size) + limits.library(*size, n)
            times.append((n, max(limits.straight(bcq(bits), *size, n)), decoded))
        found = crossing(times)
        cells.append("-" if found is None else f"{found * bits:.0f}")
    return [name(size), *cells]


def _prefill_row(limits: Limits, size: tuple[int, int], n: int) -> list[str]:
    library = limits.library(*size, n)
    decoded = limits.decoding(bcq(4), *size) + library
    aim = f">= {PREFILL_AIMS[n]}" if n in PREFILL_AIMS else ""
    return [name(size), str(n), f"{decoded:.0f}", f"{library:.0f}", f"{library / decoded:.3f}", aim]
