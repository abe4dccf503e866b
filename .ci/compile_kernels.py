"""Compile the kernels of the quantizers and of the reference decoder into Numba's cache; torch is not needed.

PYTHONPATH=. NUMBA_CACHE_DIR=DIR python .ci/compile_kernels.py
"""

from __future__ import annotations

import numpy as np

from lowbit_format.quantize import Target, quantize
from lowbit_format.reference import decode

TARGETS = (
    Target("bcq", 4, 32),
    Target("bcq", 3, 32, nested=(2,)),
    Target("bcq", 2),
    Target("uniform", 4, 32),
    Target("uniform", 2),
    Target("codebook", group_size=32),
)

weight = np.random.default_rng(0).standard_normal((40, 256), np.float32)
on_a_grid = np.round(weight * 2) / 4
for target in TARGETS:
    for matrix, importance in ((weight, None), (weight, np.ones(256, np.float32)), (on_a_grid, None)):
        decode(quantize(matrix, target, importance=importance).matrix)
