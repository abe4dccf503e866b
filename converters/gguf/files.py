"""The tensors of GGUF files: packed ones under their own names, as bytes, those of floats under the model's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...dtypes import DTYPES, stored, to_float32
from ..source import SourceTensor, file_identity, read_range
from .blocks import FLOATS
from .container import GgufFile, Tensor
from .names import Naming, Placed


class Files:
    """A source (:class:`..source.Source`) of the tensors of files.

    Args:
        directory: of the config and what else is beside the weights.
        places: the file of each tensor and its description, by name in the files.
        files: all of them.

    Attributes:
        kept: what has to live as long as this.
        shown_as: the first file, which messages name.
    """

    kept: object = None

    def __init__(self, directory: Path, places: dict[str, tuple[Path, Tensor]], files: list[GgufFile]) -> None:
        self._places = places
        self.shown_as = files[0].path
        self.directory = directory
        self.repo_id: str | None = None
        self.revision: str | None = None
        self.files = tuple(one.path.name for one in files)
        self.tensors: dict[str, SourceTensor] = {}
        self.identity = file_identity([one.path for one in files])
        self._values: dict[str, tuple[Placed, Naming]] = {}
        self._kinds = _float_ids()

    def place(self, placed: Placed, naming: Naming) -> None:
        """Enter tensors of floats under the model's name: vectors in float32, others in their own dtype."""
        parts = [self._places[part][1] for part in placed.parts]
        dtypes = {self._kinds[part.type] for part in parts}
        dtype = dtypes.pop() if len(dtypes) == 1 and len(parts[0].shape) > 1 else "F32"
        shape = joined([part.shape for part in parts])
        if len(shape) == 1:
            shape = naming.values(parts[0].name, np.ones(shape, np.float32)).shape
        nbytes = int(np.prod(shape, dtype=object)) * DTYPES[dtype].nbytes
        self.tensors[placed.name] = SourceTensor(placed.name, dtype, shape, nbytes)
        self._values[placed.name] = placed, naming

    def vector(self, name: str) -> NDArray[np.float32]:
        """A tensor of the file as float32."""
        path, tensor = self._places[name]
        kind = self._kinds[tensor.type]
        return to_float32(stored(_bytes(path, tensor, 0, tensor.nbytes), kind, tensor.shape), kind)

    def has(self, name: str) -> bool:
        return name in self._places

    def read(self, name: str, begin: int = 0, nbytes: int | None = None) -> NDArray[np.uint8]:
        if name not in self._values:
            path, tensor = self._places[name]
            return _bytes(path, tensor, begin, tensor.nbytes - begin if nbytes is None else nbytes)
        whole = self._whole(*self._values[name], self.tensors[name])
        return whole[begin : len(whole) if nbytes is None else begin + nbytes]

    def _whole(self, placed: Placed, naming: Naming, tensor: SourceTensor) -> NDArray[np.uint8]:
        if len(self._places[placed.parts[0]][1].shape) == 1:
            found = naming.values(placed.parts[0], self.vector(placed.parts[0]))
            return found.astype("<f4", copy=False).reshape(-1).view(np.uint8)
        parts = []
        for part in placed.parts:
            path, there = self._places[part]
            raw, kind = _bytes(path, there, 0, there.nbytes), self._kinds[there.type]
            if kind != tensor.dtype:  # parts of different dtypes, which are one tensor
                raw = to_float32(stored(raw, kind, there.shape), kind).astype("<f4").reshape(-1).view(np.uint8)
            parts.append(raw.reshape(*there.shape[:-1], -1))
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-2)
        return (whole if placed.order is None else whole[placed.order]).reshape(-1)


def _float_ids() -> dict[int, str]:
    from gguf.constants import GGMLQuantizationType

    return {int(GGMLQuantizationType[name]): dtype for name, dtype in FLOATS.items()}


def joined(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of matrices with the rows of all, one behind the other."""
    if len(shapes) == 1:
        return shapes[0]
    return (*shapes[0][:-2], sum(shape[-2] for shape in shapes), shapes[0][-1])


def _bytes(path: Path, tensor: Tensor, begin: int, nbytes: int) -> NDArray[np.uint8]:
    return read_range(path, tensor.begin + begin, nbytes, tensor.name)
