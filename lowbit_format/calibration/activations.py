"""What blocks gave, in files: memory need not hold it, and an interrupted calibration goes on from it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .blocks import Outputs


class Activations:
    """Outputs of blocks for every batch, in a directory.

    They are kept under a position: the number of the block among all blocks of the model. There are two kinds:
    ``"float"``, of the float blocks after float blocks, and ``"quantized"``, of the quantized after quantized ones.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def save(self, position: int, kind: str, batch: int, outputs: Outputs) -> None:
        tensors = {str(i): v.contiguous() for i, v in enumerate(outputs.values) if isinstance(v, Tensor)}
        shape = {"members": str(len(outputs.values)), "is_tuple": json.dumps(outputs.is_tuple)}
        path = self._path(position, kind, batch)
        save_file(tensors, path.with_suffix(".tmp"), shape)
        os.replace(path.with_suffix(".tmp"), path)

    def load(self, position: int, kind: str, batch: int) -> Outputs:
        with safe_open(self._path(position, kind, batch), "pt") as f:
            shape, names = f.metadata(), set(f.keys())
            values = tuple(f.get_tensor(str(i)) if str(i) in names else None for i in range(int(shape["members"])))
        return Outputs(values, json.loads(shape["is_tuple"]))

    def has(self, position: int, batches: int) -> bool:
        """Whether the outputs of all batches are there."""
        return all(self._path(position, kind, i).is_file() for kind in ("float", "quantized") for i in range(batches))

    def drop(self, position: int) -> None:
        """Remove the outputs of a block."""
        for path in self.directory.glob(f"{position:05d}-*"):
            path.unlink()

    def _path(self, position: int, kind: str, batch: int) -> Path:
        return self.directory / f"{position:05d}-{kind}-{batch:05d}.safetensors"
