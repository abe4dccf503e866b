"""A part of the GPU benchmark: decoding whole weights, alone and for the library's products of many rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lowbit_format.kernels import naive
from lowbit_format.kernels.gpu import backend, launch
from lowbit_format.schema import Scheme

from .bench import Bench, let_go, median, micro, poisoned
from .data import random_matrix
from .predict import PREFILL_AIMS, bcq, name
from .products import checked, library_time, linear, made_input, met, ragged_table, rate, share_cells


def prefill(bench: Bench) -> Iterator[str]:
    """Many rows of x, beside the library."""
    rows = []
    for size in bench.sizes:
        if bench.late():
            rows.append([name(size), "skipped: the part's time is over"])
            continue
        matrix = random_matrix(bench, bcq(4), *size)
        for n in bench.prefills:
            x = made_input(bench, n, size[1])
            error = checked(bench, matrix, x[: max(64, launch.choose(matrix.tiled[0]).most_rows + 1)], linear)
            times = bench.measure(lambda i, x=x, w=matrix.tiled: linear(x, w[i]), min(2, len(matrix.tiled)), budget=0.1)
            library = library_time(bench, size, n, copies=2)
            share = median(library) / median(times)
            expected = bench.limits.library(*size, n) + bench.limits.decoding(bcq(4), *size)
            speed = 2e-6 * size[0] * size[1] * n / median(times)
            aim = PREFILL_AIMS.get(n)
            rows.append(
                [name(size), str(n), micro(times), f"{expected:.0f}", micro(library), f"{speed:.0f}", f"{share:.3f}",
                 error, "" if aim is None else f">= {aim}: {met(share >= aim)}"]
            )  # fmt: skip
        del matrix
        let_go()
    yield "## Many rows of x, 4 bits (prefill)\n\n" + ragged_table(
        ["rows x cols", "rows of x", "us", "predicted", "library, bf16, us", "TFLOP/s", "share of the library's speed",
         "relative error", "aim"], rows,
    )  # fmt: skip


def dequantize(bench: Bench) -> Iterator[str]:
    """Decoding whole weights; bits must be those of the naive decoder."""
    rows, size = [], bench.sizes[0]
    dtypes = (torch.float16, torch.float32) if bench.tiny else (torch.bfloat16, torch.float16, torch.float32)
    for bits in (4,) if bench.tiny else (4, 2):
        for scheme in (bcq(bits), Scheme("uniform", bits, 128), Scheme("codebook", bits, 128)):
            if bench.late():
                rows.append([scheme.codec, str(bits), "skipped: the part's time is over"])
                continue
            matrix = random_matrix(bench, scheme, *size)
            expected = naive.decode(matrix.plain)
            for dtype in dtypes:
                with poisoned():
                    found = backend.dequantize(matrix.tiled[0], None, dtype)
                exact = torch.equal(found, expected.to(dtype))
                if not exact:
                    bench.wrong.append(f"dequantize {scheme.codec} {bits} bits to {dtype}: other bits than expected")
                moved = matrix.nbytes + found.nbytes
                times = bench.measure(
                    lambda i, w=matrix.tiled, dtype=dtype: backend.dequantize(w[i], None, dtype), len(matrix.tiled)
                )
                share = rate(moved, times) / bench.limits.copy
                rows.append(
                    [scheme.codec, str(bits), str(dtype)[6:], micro(times), f"{1e6 * moved / bench.limits.copy:.1f}",
                     *share_cells(bench, moved, times), "yes" if exact else "**no**", f">= 85%: {met(share >= 0.85)}"]
                )  # fmt: skip
                del found
            del matrix, expected
            let_go()
    yield f"## Decoding {name(size)} (dequantize)\n\n" + ragged_table(
        ["codec", "bits", "to", "us", "predicted", "GB/s, read and written", "share of copy", "exact", "aim"], rows
    )
