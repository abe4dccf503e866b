"""``module.weight`` of a lowbit module: a tensor with shape, dtype and device, but no data.

Model code reads ``weight.dtype``, ``weight.device`` and ``weight.shape``, which work; reading values is an error that
says what to do. A plain ``meta`` tensor would name a wrong device, and let some code compute nonsense without an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..errors import UnsupportedOperationError


class WeightPlaceholder(Tensor):
    """Shape, dtype and device of a weight that is stored as bit-planes; every operation on it is an error.

    Attributes:
        path: of the module in its model.
        cls: name of the module's class.
    """

    path: str
    cls: str

    @staticmethod
    def of(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, path: str, cls: str) -> Tensor:
        """A placeholder for the weight of the module at `path`, of class `cls`; transformers does not initialise it."""
        if torch.compiler.is_compiling():  # a graph cannot hold this class, and needs only shape and dtype
            return torch.empty(shape, dtype=dtype, device="meta")
        weight: Tensor = torch.Tensor._make_wrapper_subclass(WeightPlaceholder, shape, dtype=dtype, device=device)
        weight._is_hf_initialized = True  # type: ignore[attr-defined]
        weight.path, weight.cls = path, cls  # type: ignore[attr-defined]
        return weight

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = (x for x in tree_leaves((args, kwargs)) if isinstance(x, WeightPlaceholder))
        path, name = next(((x.path, x.cls) for x in given), ("a module", "PlaneModule"))
        raise UnsupportedOperationError(
            f"{path} ({name}): {func} needs the values of its weight, which is stored as bit-planes; some code around "
            f"the module reads the weight itself. Convert again with this module kept in full precision (--keep "
            f"'{path}'), or call model.dequantize() for a float model, module.dequantize() for this weight alone"
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"WeightPlaceholder({tuple(self.shape)}, dtype={self.dtype}, device={self.device})"
