"""Scales, offsets and zeros in the order in which kernels read them: *group-major*, the rows of a group together.

Only strides change; shapes stay ``[..., rows, groups]``, so other code need not know. In memory the rows are padded
to whole tiles, so that a tile's parameters of one group are one contiguous vector.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .matrix import PlaneMatrix

TILE_ROWS = 16  # rows of a tile, in the tiled layout of every backend


def group_major(values: Tensor) -> Tensor:
    """`values` ``[..., rows, groups]``, group-major: a copy in padded memory, or itself if it is so already."""
    rows, padded = values.shape[-2], _padded(values)
    if is_group_major(values):
        return values
    room = values.new_zeros(*values.shape[:-2], values.shape[-1], padded)
    room[..., :rows] = values.detach().transpose(-1, -2)
    return room[..., :rows].transpose(-1, -2)


def is_group_major(values: Tensor) -> bool:
    """Whether `values` ``[..., rows, groups]`` are group-major, with the padding in their memory."""
    *_, rows, groups = values.shape
    padded = _padded(values)
    leading, expected = values.shape[:-2], padded * groups
    for size, stride in zip(reversed(leading), reversed(values.stride()[:-2]), strict=True):
        if size > 1 and stride != expected:
            return False
        expected *= size
    whole = values.storage_offset() + expected <= values.untyped_storage().nbytes() // values.element_size()
    return (rows == 1 or values.stride(-2) == 1) and (groups == 1 or values.stride(-1) == padded) and whole


def map_parameters(w: PlaneMatrix, fn: Callable[[Tensor], Tensor]) -> PlaneMatrix:
    """`w` with its scales, offsets and zeros replaced by ``fn`` of them."""
    offsets, zeros = (None if t is None else fn(t) for t in (w.offsets, w.zeros))
    return w._replace(scales=fn(w.scales), offsets=offsets, zeros=zeros)


def _padded(values: Tensor) -> int:
    return -(-values.shape[-2] // TILE_ROWS) * TILE_ROWS
