"""The codecs: what a code means (spec/FORMAT.md, sections 4 and 6). A codec is one row of :data:`CODECS`.

The arithmetic is in :mod:`lowbit_format.reference`, the tensors that a codec stores in :mod:`lowbit_format.tensors`,
and how codes are chosen is in :mod:`lowbit_format.quantize`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Codec:
    """Which parameters a codec has.

    Attributes:
        id: permanent name in the file.
        scale_per_plane: scales are ``[bits, rows, groups]``; otherwise ``[1, rows, groups]``.
        shift: role of the additive ``[rows, groups]`` parameter, or None.
        codebook: a table of ``2**bits`` levels exists.
        optional_shift: the shift exists only where a scheme says so (``Scheme.offset``).
        version: of the format that has it first (VER-3).
    """

    id: str
    scale_per_plane: bool
    shift: str | None
    codebook: bool
    optional_shift: bool = False
    version: str = "1.0"


CODECS = {
    "bcq": Codec("bcq", scale_per_plane=True, shift="offsets", codebook=False, optional_shift=True),
    "uniform": Codec("uniform", scale_per_plane=False, shift="zeros", codebook=False),
    "codebook": Codec("codebook", scale_per_plane=False, shift=None, codebook=True),
    "affine": Codec("affine", scale_per_plane=False, shift="offsets", codebook=False, version="1.1"),
}
