"""A part of the GPU benchmark: single products, a batch of several tasks, and decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit_format.kernels.gpu import activations, backend, launch, products, tiles
from lowbit_format.kernels.matrix import PlaneMatrix
from lowbit_format.schema import Scheme

from ..common import spread, table
from .bench import Bench, let_go, median, micro, poisoned
from .data import Matrix, random_matrix, random_plane_matrix
from .predict import GEMV_AIMS, bcq, crossing, name


def copy(bench: Bench) -> Iterator[str]:
    """The limits that all other parts are compared with."""
    limits = bench.limits
    clock = "read under load" if bench.sm_clock else "assumed"
    yield "## Limits, measured in this run (copy)\n\n" + table(
        ["what", "", "unit"],
        [
            ["device copy, read and written", spread([r / 1e9 for r in bench.copy_rates], 0), "GB/s"],
            ["matrix product, half precision", spread([r / 1e12 for r in bench.matmul_rates], 1), "TFLOP/s"],
            [f"multiprocessors ({limits.multiprocessors}), {clock}", f"{limits.clock / 1e9:.3f}", "GHz"],
        ],
    )


# --- one row of x ------------------------------------------------------------------------------------


def gemv(bench: Bench) -> Iterator[str]:
    """Batch 1: all bits, then other schemes and dtypes, how many warps, and what slices x."""
    head = ["rows x cols", "bits", "us", "predicted, us (instructions / bytes)", "GB/s", "share of copy",
            "to library, bf16", "relative error", "aim"]  # fmt: skip
    rows = []
    for size in bench.sizes:
        library = library_time(bench, size, 1)
        rows.append(
            [name(size), "library", micro(library), "", *share_cells(bench, 2 * size[0] * size[1], library), "1"]
        )
        for bits in bench.bits:
            if bench.late():
                rows.append([name(size), str(bits), "skipped: the part's time is over"])
                continue
            rows.append(_gemv_row(bench, bcq(bits), size, library, bench.half))
    yield (
        "## One row of x (gemv)\n\nBCQ with offsets, groups of 128, x in half precision. Bytes are those that must be "
        "read. The prediction is the larger of its two numbers, without the kernel that slices x (last table).\n\n"
        + ragged_table(head, rows)
    )
    yield "### Other schemes and dtypes\n\n" + ragged_table(
        ["scheme, dtype of x", *head[:1], *head[2:]], list(_other_rows(bench, bench.sizes[:2]))
    )
    yield (
        "### Warps of a program, 4 bits\n\nMicroseconds; in bold what the rule chooses (`launch.predicted`).\n\n"
        + table(
            ["rows x cols", *map(str, launch.WARPS)],
            [_warps_row(bench, size) for size in bench.sizes if not bench.late()],
        )
    )
    yield "### The kernel that slices x\n\n" + table(
        ["rows of x", "cols", "us"],
        [[str(n), str(cols), micro(_slicing(bench, n, cols))] for n in (1, 8) for cols in _columns(bench)],
    )


def _gemv_row(
    bench: Bench, scheme: Scheme, size: tuple[int, int], library: list[float], dtype: torch.dtype
) -> list[str]:
    matrix, x = random_matrix(bench, scheme, *size), made_input(bench, 1, size[1], dtype)
    error = checked(bench, matrix, x, lambda x, w: backend.linear(x, w, None, None, None))
    times = bench.measure(lambda i: backend.linear(x, matrix.tiled[i], None, None, None), len(matrix.tiled))
    ratio = median(library) / median(times)
    aim = ""
    if scheme == bcq(scheme.bits) and size == bench.sizes[0] and dtype == bench.half and scheme.bits in GEMV_AIMS:
        reached = ratio >= GEMV_AIMS[scheme.bits]
        aim = f">= {GEMV_AIMS[scheme.bits]} x library: {met(reached)}"
        if scheme.bits == 4:
            aim += f"; >= 70% of copy: {met(rate(matrix.nbytes, times) >= 0.7 * bench.limits.copy)}"
    instructions, moving = bench.limits.straight(scheme, *size, 1)
    predicted = f"{max(instructions, moving):.1f} ({instructions:.1f} / {moving:.1f})"
    shares = share_cells(bench, matrix.nbytes, times)
    return [name(size), str(scheme.bits), micro(times), predicted, *shares, f"{ratio:.2f}", error, aim]


def _other_rows(bench: Bench, sizes: Sequence[tuple[int, int]]) -> Iterator[list[str]]:
    others = {
        "uniform 4 bits": Scheme("uniform", 4, 128),
        "codebook 4 bits": Scheme("codebook", 4, 128),
        "BCQ 4 bits, a group per row": bcq(4, 0),
        "BCQ 4 bits, float16 x": bcq(4),
        "BCQ 4 bits, float32 x": bcq(4),
    }
    for size in sizes:
        library = library_time(bench, size, 1)
        for what, scheme in list(others.items())[:: 2 if bench.tiny else 1]:
            if bench.late():
                yield [what, name(size), "skipped: the part's time is over"]
                continue
            dtype = next((d for d in (torch.float16, torch.float32) if str(d)[6:] in what), bench.half)
            if dtype == torch.float32 and size != sizes[0]:
                continue
            row = _gemv_row(bench, scheme, size, library, dtype)
            if dtype == torch.float32:
                row[3] = "not counted"  # four slices instead of two
            yield [what, row[0], *row[2:]]


def _warps_row(bench: Bench, size: tuple[int, int]) -> list[str]:
    matrix, x = random_matrix(bench, bcq(4), *size), made_input(bench, 1, size[1])
    config, cells = launch.choose(matrix.tiled[0]), []
    for warps in launch.WARPS:
        mine = config._replace(warps=warps)
        times = bench.measure(lambda i, c=mine: _straight(x, matrix.tiled[i], config=c), len(matrix.tiled))
        cells.append(f"**{micro(times)}**" if warps == config.warps else micro(times))
    return [name(size), *cells]


def _slicing(bench: Bench, n: int, cols: int) -> list[float]:
    x = made_input(bench, n, cols)
    chunk = products.panel_rows(n, activations.SLICES[x.dtype])
    steps = tiles.steps(random_plane_matrix(bcq(4), tiles.TILE_ROWS, cols, bench.device))
    return bench.measure(lambda _: activations.to_slices(x, steps, chunk), 1 if bench.tiny else 50)


def _columns(bench: Bench) -> list[int]:
    return sorted({cols for _, cols in bench.sizes})


# --- few rows of x -----------------------------------------------------------------------------------


def batch(bench: Bench) -> Iterator[str]:
    """Rows of x by both code paths, and where their times cross."""
    crossings = []
    for size in bench.sizes:
        for bits in (4, 2):
            if bench.late():
                yield f"{name(size)}, {bits} bits: skipped, the part's time is over."
                continue
            text, found = _batch_table(bench, size, bits)
            crossings.append([name(size), str(bits), *found])
            yield text
            let_go()
    yield (
        "### Where decoding becomes faster\n\nRows of x times planes, between two measured ones by a straight line. "
        f"`launch.FAMILIES` should follow these; it has {launch.family(bench.device).row_planes} for this device.\n\n"
        + table(["rows x cols", "bits", "measured: rows x planes", "predicted"], crossings)
    )


def _batch_table(bench: Bench, size: tuple[int, int], bits: int) -> tuple[str, list[str]]:
    matrix, limits = random_matrix(bench, bcq(bits), *size), bench.limits
    rows, measured, predicted, one = [], [], [], 0.0
    for n in bench.batches:
        x = made_input(bench, n, size[1])
        errors = [checked(bench, matrix, x, path) for path in (_straight, _decoded)]
        straight, decoded = (
            bench.measure(lambda i, path=path, x=x: path(x, matrix.tiled[i]), len(matrix.tiled), budget=0.08)
            for path in (_straight, _decoded)
        )
        library = library_time(bench, size, n)
        one = one or median(straight)
        aim = f"<= 1.6: {met(median(straight) <= 1.6 * one)}" if n == 8 else ""
        expected = max(limits.straight(bcq(bits), *size, n))
        expected_decoded = limits.decoding(bcq(bits), *size) + limits.library(*size, n)
        measured.append((n, median(straight), median(decoded)))
        predicted.append((n, expected, expected_decoded))
        rows.append(
            [str(n), micro(straight), f"{expected:.1f}", f"{median(straight) / one:.2f}", micro(decoded),
             f"{expected_decoded:.1f}", micro(library), " / ".join(errors), aim]
        )  # fmt: skip
    text = f"## Rows of x, {bits} bits, {name(size)} (batch)\n\n" + table(
        ["rows of x", "from planes, us", "predicted", "to one row", "decoded, library, us", "predicted",
         "library, bf16, us", "relative errors", "aim"], rows,
    )  # fmt: skip
    found = [crossing(measured), crossing(predicted)]
    return text, [f"more than {bench.batches[-1] * bits}" if f is None else f"{f * bits:.0f}" for f in found]


def _straight(
    x: Tensor,
    w: PlaneMatrix,
    deltas: Tensor | None = None,
    ids: Tensor | None = None,
    config: launch.Config | None = None,
) -> Tensor:
    return products.multiply(x, w, None, deltas, ids, config or launch.choose(w))


def _decoded(x: Tensor, w: PlaneMatrix) -> Tensor:
    return backend.decoded_linear(x, w, None, None)


# --- tasks -------------------------------------------------------------------------------------------


def tasks(bench: Bench) -> Iterator[str]:
    """A batch of 8 rows: the base, one task, eight tasks."""
    rows = []
    for size in bench.sizes:
        if bench.late():
            rows.append([name(size), "skipped: the part's time is over"])
            continue
        rows += _task_rows(bench, size)
        let_go()
    yield (
        "## Several tasks in a batch of 8 rows (tasks)\n\n4 bits, BCQ with offsets, groups of 128; deltas on the first "
        "plane. Deltas of groups are float32 and have to be read: `bytes` says how much more that is.\n\n"
        + ragged_table(
            ["rows x cols", "tasks", "us", "to the base", "bytes, to the base", "relative error", "aim"], rows
        )
    )


def _task_rows(bench: Bench, size: tuple[int, int]) -> Iterator[list[str]]:
    matrix, x = random_matrix(bench, bcq(4), *size), made_input(bench, 8, size[1])
    groups, count = matrix.scheme.groups(size[1]), len(matrix.tiled)
    eight = torch.arange(8, device=bench.device).roll(3)
    base = 0.0
    for what, shape, ids, aim in (
        ("base", None, None, None),
        ("one task, a delta per row", (1, 1, size[0]), None, None),
        ("8 tasks, a delta per row", (8, 1, size[0]), eight, 1.1),
        ("one task, a delta per group", (1, 1, size[0], groups), None, None),
        ("8 tasks, a delta per group", (8, 1, size[0], groups), eight, 1.5),
    ):
        size_of_delta = 0.1 if shape is None or len(shape) == 3 else 0.01  # factors, or addends to a scale of 0.05
        drawn = [None if shape is None else torch.randn(shape, device=bench.device) for _ in range(count)]
        deltas = [None if d is None else d * size_of_delta for d in drawn]
        error = checked(bench, matrix, x, partial(linear, deltas=deltas[0], ids=ids), deltas[0], ids)
        times = bench.measure(lambda i, d=deltas, t=ids: linear(x, matrix.tiled[i], d[i], t), count)
        base = base or median(times)
        more = 0 if deltas[0] is None else 4 * deltas[0].numel()
        ratio = median(times) / base
        yield [
            name(size), what, micro(times), f"{ratio:.2f}", f"{1 + more / matrix.nbytes:.2f}", error,
            "" if aim is None else f"<= {aim}: {met(ratio <= aim)}",
        ]  # fmt: skip


def linear(x: Tensor, w: PlaneMatrix, deltas: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
    return backend.linear(x, w, None, deltas, ids)


# --- shared ------------------------------------------------------------------------------------------


def checked(
    bench: Bench, matrix: Matrix, x: Tensor, path: Callable[[Tensor, PlaneMatrix], Tensor], *tasks: Tensor | None
) -> str:
    """The error of one code path with copy 0, its result in memory that held NaN."""
    with poisoned():
        found = path(x, matrix.tiled[0])
    s = matrix.scheme
    what = f"{s.codec} {s.bits} bits, {found.shape[1]} x {x.shape[1]}, {len(x)} rows of {x.dtype}, {tasks and 'tasks'}"
    return bench.check_product(what, x, matrix.plain, found, *tasks)


def made_input(bench: Bench, n: int, cols: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(n, cols, device=bench.device, dtype=torch.float32).to(dtype or bench.half)


def library_time(bench: Bench, size: tuple[int, int], n: int, copies: int | None = None) -> list[float]:
    """Of the library's product with a weight in half precision, rotated as ours are."""
    count = copies or bench.copies(2 * size[0] * size[1])
    weights = [torch.randn(size, device=bench.device, dtype=bench.half) for _ in range(count)]
    x = made_input(bench, n, size[1])
    return bench.measure(lambda i: F.linear(x, weights[i]), count, budget=0.08)


def rate(moved: float, times: list[float]) -> float:
    """Bytes per second."""
    return 1e6 * moved / median(times)


def share_cells(bench: Bench, moved: float, times: list[float]) -> list[str]:
    speed = rate(moved, times)
    return [f"{speed / 1e9:.0f}", f"{speed / bench.limits.copy:.0%}"]


def met(yes: bool) -> str:
    return "met" if yes else "**missed**"


def ragged_table(head: list[str], rows: list[list[str]]) -> str:
    """A table whose rows may end early."""
    return table(head, [[*row, *[""] * (len(head) - len(row))] for row in rows])
