"""Rows of different bits in no order beside equal rows of as many bytes, on one thread.

    OMP_NUM_THREADS=1 LOWBIT_NUM_THREADS=1 python -m tools.benchmarks.cpu.ragged

Milliseconds of processor time, best of many: products with 1, 8 and 64 rows of x, and a look-up of 512 rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from lowbit_format.bits import to_ragged
from lowbit_format.kernels import operators
from lowbit_format.kernels.matrix import PlaneMatrix
from lowbit_format.schema import Scheme
from lowbit_format.testing.matrices import random_matrix
from lowbit_format.testing.products import plane_matrix

SHAPES = ((6144, 576), (1536, 576), (576, 576))
ROWS = (1, 8, 64)


def main() -> None:
    """Print a table in Markdown."""
    print("| rows x columns | codec | rows of x | 3 bits | 4, 3, 2 bits | ratio |")
    print("|---" * 6 + "|")
    for rows, cols in SHAPES:
        for codec in ("uniform", "bcq"):
            equal, mixed = operators.tile(matrix(codec, 3, rows, cols)), operators.tile(ragged(codec, rows, cols))
            for count in ROWS:
                x = torch.randn(count, cols)
                a, b = (best(lambda w=w, x=x: operators.linear(x, w)) for w in (equal, mixed))  # type: ignore[misc]
                print(f"| {rows} x {cols} | {codec} | {count} | {a:.3f} | {b:.3f} | {b / a:.2f} |", flush=True)
            ids = torch.randint(0, rows, (512,))
            a, b = (best(lambda w=w, ids=ids: operators.embedding(ids, w)) for w in (equal, mixed))  # type: ignore[misc]
            print(f"| {rows} x {cols} | {codec} | look-up of 512 | {a:.3f} | {b:.3f} | {b / a:.2f} |", flush=True)


def matrix(codec: str, bits: int, rows: int, cols: int) -> PlaneMatrix:
    """Equal rows, in groups of 128."""
    return plane_matrix(random_matrix(Scheme(codec, bits, 128, "F16", offset=codec == "bcq"), rows, cols, 1))


def ragged(codec: str, rows: int, cols: int) -> PlaneMatrix:
    """Rows of 4, 3 and 2 bits, a third each, in random order."""
    w = matrix(codec, 4, rows, cols)
    bits = np.random.default_rng(0).permutation(np.resize(np.array([4, 3, 2], np.uint8), rows))
    return w._replace(planes=torch.from_numpy(to_ragged(w.planes.numpy(), bits)), row_bits=torch.from_numpy(bits))


def best(work: Callable[[], object], seconds: float = 0.4) -> float:
    """Milliseconds of processor time of the fastest run."""
    found, end = [], time.perf_counter() + seconds
    with torch.no_grad():
        work()
        while time.perf_counter() < end or len(found) < 5:
            began = time.process_time()
            work()
            found.append(time.process_time() - began)
    return 1e3 * min(found)


if __name__ == "__main__":
    main()
