"""Old PyTorch checkpoints (``pytorch_model.bin``): pickles, read with ``weights_only=True`` only."""

from __future__ import annotations

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES
from ..errors import SourceError
from .side import PYTORCH
from .source import SourceTensor, check_index, identity_of

SAFE_TORCH = (2, 6)  # an older torch can be made to run code despite weights_only=True: CVE-2025-32434

_DTYPES = {f"torch.{d.torch}": d.name for d in DTYPES.values() if d.torch is not None}


class PytorchSource:
    """A source over ``.bin`` files. Zip files are memory-mapped; older files are read into memory as a whole.

    Args:
        directory: of the checkpoint.
        files: names of the tensors that the index lists for each file.
        repo_id, revision: of the Hub, or None.

    Raises:
        SourceError: torch is too old to read pickles safely, or a file is damaged, unsafe or lacks a tensor.
    """

    def __init__(self, directory: Path, files: dict[str, list[str]], repo_id: str | None, revision: str | None) -> None:
        import torch

        found = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
        if found < SAFE_TORCH:
            raise SourceError(
                f"{directory / min(files)}: torch {torch.__version__} cannot read a pickle safely (CVE-2025-32434); "
                "install torch 2.6 or newer, or get the checkpoint as safetensors"
            )
        self.directory, self.repo_id, self.revision = directory, repo_id, revision
        self.files = (*files, f"{PYTORCH}.index.json")
        self._loaded: dict[str, Any] = {}
        self.other: list[str] = []  # names of what is no tensor
        self.tensors: dict[str, SourceTensor] = {}
        for file in files:
            state = _load(directory / file)
            check_index(directory / file, files[file], state)
            for name, value in state.items():
                if not isinstance(value, torch.Tensor):
                    self.other.append(name)
                    continue
                dtype = _DTYPES.get(str(value.dtype))
                if dtype is None:
                    raise SourceError(f"{directory / file}: tensor {name!r} has the unknown dtype {value.dtype}")
                self._loaded[name] = value
                self.tensors[name] = SourceTensor(name, dtype, tuple(value.shape), value.numel() * value.element_size())
        if not self.tensors and self.other:
            raise SourceError(
                f"{directory / min(files)}: holds no tensors, but {', '.join(map(repr, self.other[:5]))}; save the "
                "model's state dict alone"
            )
        self.identity = identity_of(directory, files, repo_id, revision)

    def read(self, name: str, begin: int = 0, nbytes: int | None = None) -> NDArray[np.uint8]:
        import torch

        flat = self._loaded[name].contiguous().reshape(-1)
        if not flat.numel():
            return np.empty(0, np.uint8)
        end = None if nbytes is None else begin + nbytes
        return np.array(flat.view(torch.uint8)[begin:end].numpy())


def _load(path: Path) -> dict[str, Any]:
    import torch

    try:
        with open(path, "rb") as f:
            zipped = f.read(4) == b"PK\x03\x04"
        if not zipped:
            warnings.warn(
                f"{path}: an old checkpoint that is not a zip file; it is read into memory as a whole", stacklevel=2
            )
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as e:
        raise SourceError(f"{path}: is damaged, or holds more than tensors and is refused: {str(e)[:200]}") from e
    if not isinstance(state, dict):
        raise SourceError(f"{path}: holds a {type(state).__name__}, expected a state dict")
    return state
