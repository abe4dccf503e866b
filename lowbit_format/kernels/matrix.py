"""One quantized matrix as the kernels take it: torch tensors and the scheme, in the file's or the tiled layout."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..codecs import CODECS

FILE, TILED = "file", "tiled"  # layouts: that of spec section 4, and the one that a backend's kernels read
EXACT, INT8 = "exact", "int8"  # activations: as they are, or rounded (see rounded_sums)


class PlaneMatrix(NamedTuple):
    """One matrix ``[rows, cols]`` (spec section 4), read at precision `bits`.

    Attributes:
        planes: uint8. In the file's layout ``[>= bits, rows, bytes]``, or ragged ``[>= sum of row_bits, bytes]``
            (MIX-2); the backend of the device defines the shape in the tiled layout.
        scales: float ``[bits, rows, groups]`` (bcq) or ``[1, rows, groups]``.
        offsets: float ``[rows, groups]`` (bcq, affine), or None.
        zeros: float ``[rows, groups]`` (uniform), or None.
        codebook: float32 ``[2**bits]``, or None.
        row_bits: uint8 ``[rows]``, or None.
        codec, group_size: of the scheme.
        bits: the precision.
        cols: columns; the planes of the file's layout are padded to whole 64-bit words.
        layout: :data:`FILE` or :data:`TILED`.
        activations: :data:`EXACT` or :data:`INT8`: what a product may do with x.
    """

    planes: Tensor
    scales: Tensor
    offsets: Tensor | None
    zeros: Tensor | None
    codebook: Tensor | None
    row_bits: Tensor | None
    codec: str
    bits: int
    group_size: int
    cols: int
    layout: str = FILE
    activations: str = EXACT

    @property
    def rows(self) -> int:
        """Rows of the matrix: output features of a linear layer."""
        return self.scales.shape[1]

    @property
    def groups(self) -> int:
        """Groups in a row; the last one may be short."""
        return self.scales.shape[2]

    @property
    def group_columns(self) -> int:
        """Columns of a full group."""
        return self.cols if self.group_size == 0 else min(self.group_size, self.cols)

    @property
    def is_tiled(self) -> bool:
        """Whether the planes are in the tiled layout."""
        return self.layout == TILED

    @property
    def is_in_memory(self) -> bool:
        """Whether kernels can read the planes by address: the tensor has data, and no subclass handles it."""
        return type(self.planes) in (Tensor, torch.nn.Parameter) and not self.planes.is_meta

    @property
    def scale_per_plane(self) -> bool:
        """Whether each plane has its own scales (bcq); else one scale applies to the whole level."""
        return CODECS[self.codec].scale_per_plane

    @property
    def has_offsets(self) -> bool:
        """Whether the codec's shift is added behind the scales (bcq, affine), which then do not change it."""
        return CODECS[self.codec].shift == "offsets"

    @property
    def shift(self) -> Tensor | None:
        """The additive parameter ``[rows, groups]``: offsets of bcq and affine, zeros of uniform."""
        return self.offsets if self.has_offsets else self.zeros

    def with_shift(self, values: Tensor) -> PlaneMatrix:
        """This matrix with another :attr:`shift`."""
        return self._replace(offsets=values) if self.has_offsets else self._replace(zeros=values)

    @property
    def work_dtype(self) -> torch.dtype:
        """float32 (DEC-1), or float64 for double-precision scales, which only tests of gradients have."""
        return torch.promote_types(self.scales.dtype, torch.float32)


TENSORS, SCHEME = 6, 6  # numbers of fields of a PlaneMatrix: its tensors come first, then the scheme's values


def with_delta(w: PlaneMatrix, delta: Tensor) -> PlaneMatrix:
    """`w` with a task's scales, in :attr:`PlaneMatrix.work_dtype` (TSK-6, TSK-8).

    Args:
        delta: of the first p planes' scales: ``[p, rows]``: multiply by ``1 + delta``; ``[p, rows, groups]``: add.
    """
    scales = w.scales.to(w.work_dtype)
    delta = delta.to(scales.dtype)
    first = scales[: delta.shape[0]]
    tuned = first * (1 + delta)[..., None] if delta.dim() == 2 else first + delta
    return w._replace(scales=torch.cat([tuned, scales[delta.shape[0] :]]))


def select_rows(w: PlaneMatrix, rows: Tensor) -> PlaneMatrix:
    """The matrix of rows `rows` (int64 ``[n]``, repetition allowed) of `w`, which is in the file's layout.

    Its planes are full (``[bits, n, bytes]``), also where those of `w` are ragged.
    """
    present = present_rows(w)
    if present is None or w.planes.dim() == 3:
        planes = w.planes[: w.bits, rows]
    else:
        planes = w.planes[_plane_rows(present)[:, rows]]
    return w._replace(
        planes=planes,
        scales=w.scales[:, rows],
        offsets=None if w.offsets is None else w.offsets[rows],
        zeros=None if w.zeros is None else w.zeros[rows],
        row_bits=None if w.row_bits is None else w.row_bits[rows],
    )


def full_planes(w: PlaneMatrix) -> Tensor:
    """The planes as ``[bits, rows, bytes]``; rows that a ragged plane lacks are arbitrary (:func:`present_rows`)."""
    present = present_rows(w)
    if present is None or w.planes.dim() == 3:
        return w.planes[: w.bits]
    return w.planes[_plane_rows(present)]


def present_rows(w: PlaneMatrix) -> Tensor | None:
    """Which rows each plane has: bool ``[bits, rows]``, or None if every plane has every row (MIX-1)."""
    if w.row_bits is None:
        return None
    return w.row_bits[None, :] > torch.arange(w.bits, dtype=torch.uint8, device=w.row_bits.device)[:, None]


def _plane_rows(present: Tensor) -> Tensor:
    """Index of each row of each plane in ragged planes (MIX-2): int64 ``[bits, rows]``; arbitrary if it is absent."""
    return (present.reshape(-1).cumsum(0) - 1).clamp(min=0).reshape(present.shape)
