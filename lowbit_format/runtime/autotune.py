"""Measuring, on the GPU at hand, how products with a model's matrices are best launched: on request, kept in a file.

For each matrix of another shape: the number of warps with the least time for one row and for eight, then the number of
rows of x from which decoding the weight for the library's product takes less time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..container.atomic import write_json
from ..errors import UnsupportedOperationError
from ..kernels.gpu import backend, launch, products
from ..kernels.gpu.launch import Config
from ..kernels.matrix import PlaneMatrix
from .modules import LowbitModule

BATCHES = (1, 8)  # rows of x that warps are chosen for
STEP = 16  # rows of x between the sizes at which both ways are compared
MOST = 512

Timer = Callable[[Callable[[], Any]], float]


def autotune(model: nn.Module, *, dtype: torch.dtype | None = None, timer: Timer | None = None) -> dict[str, Config]:
    """Measure the products of a model on its GPU, and use what was found from now on, in later processes too.

    Takes some seconds for each shape of matrix, after Triton's compilation. The file is
    :func:`.configs.cache_file`; what it holds of other models and devices stays.

    Args:
        model: with lowbit modules on a GPU.
        dtype: of activations; None: what each module computes in.
        timer: milliseconds that a function takes; None: ``triton.testing.do_bench``, median, with a cold cache.

    Returns:
        What was found, by device and matrix.

    Raises:
        UnsupportedOperationError: no module is on a GPU in a form that kernels multiply by.
    """
    time = timer or _bench
    found: dict[str, Config] = {}
    for module in model.modules():
        if not isinstance(module, LowbitModule) or module.kind == "embedding":
            continue
        module.tile()
        w = module.plane_matrix
        key = launch.key(w.planes.device, w.codec, w.bits, w.rows, w.cols, w.group_size)
        if key not in found and products.has_product_kernel(w) and (w.planes.is_cuda or timer is not None):
            with backend.device_of(w.planes):
                found[key] = _measure(w, dtype or module.compute_dtype, time)
    if not found:
        raise UnsupportedOperationError(
            "nothing to tune: the model has no matrix on a GPU that is multiplied straight from planes; "
            "move it there first, with model.to('cuda')"
        )
    path = launch.cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    launch.forget()
    write_json(path, {**launch.measured(), **found})
    launch.forget()
    return found


def _measure(w: PlaneMatrix, dtype: torch.dtype, time: Timer) -> Config:
    def planes(rows: int, warps: int) -> float:
        x = _activations(rows, w, dtype)
        return time(lambda: products.multiply(x, w, None, None, None, Config(warps, rows)))

    def library(rows: int) -> float:
        x = _activations(rows, w, dtype)
        return time(lambda: backend.decoded_linear(x, w, None, None))

    warps = min(launch.WARPS, key=lambda n: sum(planes(rows, n) for rows in BATCHES))
    most = 0
    for rows in range(STEP, MOST + 1, STEP):
        if planes(rows, warps) > library(rows):
            break
        most = rows
    return Config(warps, most)


def _activations(rows: int, w: PlaneMatrix, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, w.cols, device=w.planes.device).to(dtype)


def _bench(function: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(function, return_mode="median"))
