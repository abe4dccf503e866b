"""``module.weight`` of a lowbit module: a tensor that is decoded when its values are read, and cannot be written.

Model code and PEFT ask a weight for its shape, dtype and device, some of them at every call: that costs nothing. Others
read its values: a method that begins with the weight, such as DoRA, or a model that multiplies by the weight itself.
They get it decoded, with the active task, at each reading. Writing to it is an error that says what to do: planes
cannot hold the result, and a decoded copy would drop it without a word.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import UnsupportedOperationError

log = logging.getLogger(__name__)

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
    """A weight that is stored as bit-planes; views of what it decodes to are of this class, too.

    Attributes:
        module: path and class of the module, for messages.
        read: gives the decoded weight, or the view.
        facts: shape, dtype and device.
    """

    module: str
    read: Callable[[], Tensor]
    facts: tuple[torch.Size, torch.dtype, torch.device]

    @staticmethod
    def of(
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        module: str,
        read: Callable[[], Tensor],
        strides: Sequence[int] | None = None,
    ) -> Tensor:
        """A placeholder, marked as initialised so that transformers does not initialise it."""
        weight: Any = torch.Tensor._make_wrapper_subclass(
            WeightPlaceholder, tuple(shape), strides=strides, dtype=dtype, device=device
        )
        weight._is_hf_initialized = True
        weight.module, weight.read, weight.facts = module, read, (torch.Size(shape), dtype, device)
        return weight  # type: ignore[no-any-return]

    # What models ask at every call, without the detour over __torch_function__.
    shape = property(lambda self: self.facts[0])
    dtype = property(lambda self: self.facts[1])
    device = property(lambda self: self.facts[2])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, accessed = getattr(func, "__name__", ""), getattr(getattr(func, "__self__", None), "__name__", None)
        if name in _FACTS or (name == "__get__" and accessed not in _VALUES):
            with torch._C.DisableTorchFunctionSubclass():
                return args[0].detached() if accessed == "data" else func(*args, **kwargs)
        if _initialising.get():
            args, kwargs = tree_map(_on_meta, (args, kwargs))
            return tree_map(_on_meta, func(*args, **kwargs))
        mine = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, WeightPlaceholder))
        if _is_harmless(name, accessed, args, kwargs):
            return None if name == "__set__" else args[0]
        if name == "__set__" or name in _REFUSED:
            raise _no_values_to_change(mine.module, accessed or name)
        return _computed(func, args, kwargs, mine.module)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Where torch calls an operator without asking for ``__torch_function__``."""
        module = next(x.module for x in tree_leaves((args, kwargs)) if isinstance(x, WeightPlaceholder))
        raise UnsupportedOperationError(
            f"{module}: {func} needs the values of its weight, which is stored as bit-planes. Give it "
            "module.dequantize(), or call model.dequantize() for a float model"
        )

    def detached(self) -> Tensor:
        """What ``.data`` is: the same weight without gradients; writing to it is an error, too."""
        with torch._C.DisableTorchFunctionSubclass():
            read = functools.partial(_detached, self.read)
            return WeightPlaceholder.of(self.shape, self.dtype, self.device, self.module, read, self.stride())

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            return f"WeightPlaceholder({tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


# What is answered without decoding. All attributes are, but for those of _VALUES.
_FACTS = frozenset(
    (
        "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "get_device",
        "is_floating_point", "is_complex", "is_contiguous", "is_inference", "__len__", "__hash__",
    )
)  # fmt: skip
_VALUES = frozenset(("T", "mT", "H", "mH", "real", "imag"))
_REFUSED = frozenset(
    ("data_ptr", "__dlpack__", "set_", "requires_grad_", "share_memory_", "register_hook", "retain_grad")
)


def _is_harmless(name: str, accessed: str | None, args: Any, kwargs: Any) -> bool:
    """Whether this asks for what is so already: a weight that gets no gradients."""
    value = args[1] if len(args) > 1 else kwargs.get("requires_grad", True)
    if name == "__set__":
        return (accessed == "requires_grad" and value is False) or (accessed == "grad" and value is None)
    return name == "requires_grad_" and value is False


def _computed(func: Any, args: Any, kwargs: Any, module: str) -> Any:
    """The result of `func` with decoded weights; a placeholder, if that is a view of one of them."""
    _tell_once(module)
    decoded = dict[int, Tensor]()

    def read(value: Any) -> Any:
        if not isinstance(value, WeightPlaceholder):
            return value
        if id(value) not in decoded:
            decoded[id(value)] = _counting_versions(value.read)
        return decoded[id(value)]

    args, kwargs = tree_map(read, (args, kwargs))
    before = [t._version for t in decoded.values()]
    result = func(*args, **kwargs)
    if [t._version for t in decoded.values()] != before:
        raise _no_values_to_change(module, getattr(func, "__name__", str(func)))
    storages = {t.untyped_storage()._cdata for t in decoded.values()}

    def wrapped(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            value.flags.writeable = False  # what is written there would be lost
        is_plain = type(value) is Tensor and value.layout is torch.strided
        if not is_plain or value.untyped_storage()._cdata not in storages:
            return value
        return WeightPlaceholder.of(value.shape, value.dtype, value.device, module, lambda: value, value.stride())

    return tree_map(wrapped, result)


def _tell_once(module: str, told: list[str] = []) -> None:  # noqa: B006 - kept for the life of the process
    if not told:
        told.append(module)
        log.warning(
            "%s: code around the module reads its weight, which is decoded in full at each reading. That is right but "
            "slow if it happens at every call, as with some adapters (DoRA, BOFT, HRA); this is told once",
            module,
        )


def _counting_versions(read: Callable[[], Tensor]) -> Tensor:
    """What `read` gives, as a tensor that counts changes: one that is made in inference mode does not."""
    if not torch.is_inference_mode_enabled():
        return read()
    with torch.inference_mode(False), torch.no_grad():
        return read()


def _detached(read: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return read().detach()


def _no_values_to_change(module: str, what: str) -> UnsupportedOperationError:
    return UnsupportedOperationError(
        f"{module}: {what} would change its weight, which is stored as bit-planes and cannot hold the result. To merge "
        "an adapter, call model.dequantize() first: the adapter stays, over a float model, and merges into that. A "
        "method that starts by changing the weight (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ) needs model.dequantize() "
        "before the adapter is added"
    )


def _on_meta(value: Any) -> Any:
    """The tensor without data, marked as initialised, if `value` is a placeholder or without data."""
    if isinstance(value, WeightPlaceholder):
        value = torch.empty(value.shape, dtype=value.dtype, device="meta")
    if isinstance(value, Tensor) and value.is_meta:
        value._is_hf_initialized = True  # type: ignore[attr-defined]
    return value
