"""Tensors of a checkpoint that transformers cuts into several of the model's, such as a fused query, key and value.

Seen through :func:`split`, a checkpoint has the parts instead, under the model's names, so that each can be quantized.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .architecture import Renamer, meta_model
from .source import Source, SourceTensor


def split(source: Source) -> tuple[Source, dict[str, list[str]]]:
    """The source with such tensors cut as transformers would cut them, and the names of the parts of each.

    Only cuts into blocks of equal numbers of rows are made: their bytes are a range of the tensor's.

    Raises SourceError if the architecture is unknown.
    """
    model = meta_model(source.directory)
    rename = Renamer(model)
    parts = {key: cut for key, tensor in source.tensors.items() if (cut := list(_cut(rename, model, tensor)))}
    names = [part.name for cut in parts.values() for part in cut]
    if not parts or len({*names, *(source.tensors.keys() - parts)}) < len(names) + len(source.tensors) - len(parts):
        return source, {}
    return SplitSource(source, parts), {key: [part.name for part in cut] for key, cut in parts.items()}


class SplitSource:
    """A source with `parts` in the place of some tensors: blocks of rows from the first to the last."""

    def __init__(self, source: Source, parts: dict[str, list[SourceTensor]]) -> None:
        self.directory, self.repo_id, self.revision = source.directory, source.repo_id, source.revision
        self.files = source.files
        self._source = source
        self._places: dict[str, tuple[str, int]] = {}  # of a part: its tensor, and its first byte in there
        self.tensors: dict[str, SourceTensor] = {}
        for key, tensor in source.tensors.items():
            begin = 0
            for part in parts.get(key, [tensor]):
                self._places[part.name], self.tensors[part.name] = (key, begin), part
                begin += part.nbytes
        self.identity = hashlib.sha256("\n".join([source.identity, *self._places]).encode()).hexdigest()

    def read(self, name: str, begin: int = 0, nbytes: int | None = None) -> NDArray[np.uint8]:
        """As of any source; or `nbytes` of the tensor's bytes from `begin`."""
        key, first = self._places[name]
        return self._source.read(key, first + begin, self.tensors[name].nbytes - begin if nbytes is None else nbytes)


def _cut(rename: Renamer, model: Any, tensor: SourceTensor) -> Iterator[SourceTensor]:
    """The parts of a tensor; nothing, unless it is cut into blocks of rows that the model has."""
    operations, targets = rename.operations(tensor.name), rename.targets(tensor.name)
    if len(operations) != 1 or type(operations[0]).__name__ != "Chunk" or operations[0].dim != 0 or len(targets) < 2:
        return
    if not tensor.shape:
        return
    state = model.state_dict()
    shapes = [tuple(state[name].shape) if name in state else () for name in targets]
    rows, *rest = tensor.shape
    if any(shape != (rows // len(targets), *rest) for shape in shapes) or rows % len(targets):
        return
    if any(rename(name) != (name, False) for name in targets):
        return
    size = rows // len(targets)
    for i, name in enumerate(targets):
        grid = None if tensor.grid is None else tensor.grid.rows(i * size, (i + 1) * size, rows)
        yield replace(tensor, name=name, shape=shapes[0], nbytes=tensor.nbytes // len(targets), grid=grid)
