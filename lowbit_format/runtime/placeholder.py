"""``module.weight`` of a lowbit module: a tensor with shape, dtype and device, but no data.

Model code reads ``weight.dtype``, ``weight.device`` and ``weight.shape``, which work; reading values is an error that
says what to do. A plain ``meta`` tensor would name a wrong device, and let some code compute nonsense without an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import UnsupportedOperationError

_initialising: ContextVar[bool] = ContextVar("lowbit_initialising", default=False)


@contextlib.contextmanager
def initialising() -> Iterator[None]:
    """While a model gives values to parameters that its files lack, which may go through a part of a weight.

    Then operations on placeholders give ``meta`` tensors that are marked as initialised. Values that were taken from
    them are an error still: torch does not copy out of ``meta`` tensors.
    """
    token = _initialising.set(True)
    try:
        yield
    finally:
        _initialising.reset(token)


class WeightPlaceholder(Tensor):
    """Shape, dtype and device of a weight that is stored as bit-planes; every operation on it is an error.

    Attributes:
        module: path and class of the module, for the message.
    """

    module: str

    @staticmethod
    def of(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, module: str) -> Tensor:
        """A placeholder, marked as initialised so that transformers does not initialise it."""
        if torch.compiler.is_compiling():  # a graph cannot hold this class, and needs only shape and dtype
            return torch.empty(shape, dtype=dtype, device="meta")
        weight: Tensor = torch.Tensor._make_wrapper_subclass(WeightPlaceholder, shape, dtype=dtype, device=device)
        weight._is_hf_initialized = True  # type: ignore[attr-defined]
        weight.module = module  # type: ignore[attr-defined]
        return weight

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if _initialising.get():
            args, kwargs = tree_map(_on_meta, (args, kwargs or {}))
            return tree_map(_on_meta, func(*args, **kwargs))
        module = next(x.module for x in tree_leaves((args, kwargs)) if isinstance(x, WeightPlaceholder))
        raise UnsupportedOperationError(
            f"{module}: {func} needs the values of its weight, which is stored as bit-planes: code around the module "
            f"reads the weight itself. Convert again with this module kept in full precision (--keep "
            f"{module.split()[0]!r}), or call model.dequantize() for a float model, module.dequantize() for this weight"
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"WeightPlaceholder({tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


def _on_meta(value: Any) -> Any:
    """The tensor without data, marked as initialised, if `value` is a placeholder or without data."""
    if isinstance(value, WeightPlaceholder):
        value = torch.empty(value.shape, dtype=value.dtype, device="meta")
    if isinstance(value, Tensor) and value.is_meta:
        value._is_hf_initialized = True  # type: ignore[attr-defined]
    return value
