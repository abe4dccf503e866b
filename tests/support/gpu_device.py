"""Where tests of the GPU's kernels run: on a GPU, or without one in Triton's interpreter, on the CPU."""

from __future__ import annotations

from typing import TypeVar

import pytest
import torch
from support.interpreter import quicken
from torch import Tensor

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    quicken()
# The interpreter computes with bfloat16 as with 16 bits of an integer.
FLOATS = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]

Given = TypeVar("Given")


def on_device(given: Given) -> Given:
    """`given`, a tensor or a tuple with tensors in it (also a named one), on :data:`DEVICE`, strides and all."""
    if isinstance(given, Tensor):
        memory = given.detach().new_empty(0).set_(given.detach().untyped_storage())
        return memory.to(DEVICE).as_strided(given.shape, given.stride(), given.storage_offset())  # type: ignore[return-value]
    if isinstance(given, tuple):
        parts = [on_device(part) for part in given]
        return type(given)(*parts) if hasattr(given, "_fields") else tuple(parts)  # type: ignore[return-value]
    return given
