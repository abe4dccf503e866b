"""Tensors of torch as bytes of a file, and back."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..container.writer import StoredTensor

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def to_torch(tensor: StoredTensor) -> Tensor:
    """A torch tensor of its own, on the CPU; KeyError for a dtype that torch lacks or this package does not carry."""
    raw = np.ascontiguousarray(tensor.data).reshape(-1).view(np.uint8).copy()
    return torch.from_numpy(raw).view(TORCH_DTYPES[tensor.dtype]).reshape(tensor.shape)


def from_torch(name: str, tensor: Tensor) -> StoredTensor:
    """What a file holds of `tensor`; KeyError for a dtype that this package does not carry."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return StoredTensor(name, _NAMES[tensor.dtype], tuple(tensor.shape), raw)
