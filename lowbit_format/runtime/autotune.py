"""Measures on request how products with a model's matrices are launched best on this GPU, and keeps it in a file.

For each shape of matrix it finds the number of warps with the least time for one row of x and for eight together, then
the most rows of x for which the product straight from planes is as fast as decoding the weight for the library's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..container.atomic import write_json
from ..errors import UnsupportedOperationError
from ..kernels.gpu import backend, launch, products
from ..kernels.gpu.launch import ROW_STEP, Config
from ..kernels.matrix import PlaneMatrix
from .modules import LowbitModule

WARPS_BATCHES = (1, 8)  # rows of x that warps are chosen for
LARGEST_BATCH = 512  # rows of x up to which both code paths are compared, every ROW_STEP rows

Timer = Callable[[Callable[[], Any]], float]


def autotune(model: nn.Module, *, dtype: torch.dtype | None = None, timer: Timer | None = None) -> dict[str, Config]:
    """Measure the products of a model on its GPU, and use the result from now on, in later processes too.

    Takes some seconds for each shape of matrix, after Triton's compilation. The file is
    :func:`..kernels.gpu.launch.cache_file`; entries of other matrices and devices stay in it.

    Args:
        model: a model with lowbit modules on a GPU.
        dtype: of activations; None for the dtype that each module computes in.
        timer: gives the milliseconds that a function takes; None for ``triton.testing.do_bench``, median, with a cold
            cache.

    Returns:
        The configurations that were found, by device and matrix (:func:`..kernels.gpu.launch.key`).

    Raises:
        UnsupportedOperationError: no module is on a GPU with a matrix that kernels multiply straight from planes.
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
    def from_planes(rows: int, warps: int) -> float:
        x = _activations(rows, w, dtype)
        return time(lambda: products.multiply(x, w, None, None, None, Config(warps, rows)))

    def decoded(rows: int) -> float:
        x = _activations(rows, w, dtype)
        return time(lambda: backend.decoded_linear(x, w, None, None))

    warps = min(launch.WARPS, key=lambda n: sum(from_planes(rows, n) for rows in WARPS_BATCHES))
    most = 0
    for rows in range(ROW_STEP, LARGEST_BATCH + 1, ROW_STEP):
        if from_planes(rows, warps) > decoded(rows):
            break
        most = rows
    return Config(warps, most)


def _activations(rows: int, w: PlaneMatrix, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, w.cols, device=w.planes.device).to(dtype)


def _bench(function: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(function, return_mode="median"))
