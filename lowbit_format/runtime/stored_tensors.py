"""Tensors of torch as bytes of a file, and back."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..container.writer import StoredTensor
from ..dtypes import DTYPES

TORCH_DTYPES: dict[str, torch.dtype] = {  # by the name in a file
    d.name: getattr(torch, d.torch) for d in DTYPES.values() if d.torch is not None
}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def to_torch(tensor: StoredTensor) -> Tensor:
    """A torch tensor of its own, on the CPU; KeyError for a dtype that torch lacks or this package does not carry."""
    raw = np.ascontiguousarray(tensor.data).reshape(-1).view(np.uint8).copy()
    return torch.from_numpy(raw).view(TORCH_DTYPES[tensor.dtype]).reshape(tensor.shape)


def whole(tensor: Tensor) -> Tensor:
    """`tensor` without its graph; one that processes share is gathered, for which all of them have to call this."""
    full_tensor = getattr(tensor, "full_tensor", None)  # of a DTensor, as fully_shard makes them
    gathered: Tensor = tensor if full_tensor is None else full_tensor()
    return gathered.detach()


def from_torch(name: str, tensor: Tensor) -> StoredTensor:
    """What a file holds of `tensor`, see :func:`whole`; KeyError for a dtype that this package does not carry."""
    raw = whole(tensor).cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return StoredTensor(name, _NAMES[tensor.dtype], tuple(tensor.shape), raw)
