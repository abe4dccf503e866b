"""The float model of a checkpoint, of which only those weights are in memory that are asked for."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..dtypes import stored
from ..errors import CalibrationError
from .architecture import build_model
from .experts import Stack
from .plan import Plan
from .source import FLOATS, Source, as_float32


class FloatModel:
    """A model in float32 whose weights are loaded module by module.

    Args:
        source: the checkpoint.
        plan: says which tensor is which parameter.
        device: where weights are loaded to.

    Raises:
        CalibrationError: transformers makes parameters of several tensors, which needs all of them at once.
    """

    def __init__(self, source: Source, plan: Plan, device: torch.device) -> None:
        self._source, self._device = source, device
        with _parameters_on_meta():
            self.model: Any = build_model(source.directory, torch.device("cpu"))
        if type(self.model).__name__ != plan.architecture:  # the checkpoint holds the base model alone
            self.model = self.model.base_model
        self.model.eval()
        for module in self.model.modules():  # each may have a config of its own, as T5's decoder
            if hasattr(getattr(module, "config", None), "use_cache"):
                module.config.use_cache = False
        self._keys: dict[str, str | Stack] = {}
        for step in plan.steps:
            target, stack = step.destination.target, step.destination.stack
            if stack is not None:
                self._keys[stack.path] = stack
                continue
            if not target:
                raise CalibrationError(
                    f"{step.tensor.name}: transformers makes a parameter of {plan.architecture} of several tensors "
                    "like this one, which calibration cannot do block by block; save the model with transformers' "
                    "save_pretrained and convert that, or convert without --calibrate"
                )
            self._keys[target] = step.tensor.name
        state = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        self._names = [name for name in self._keys if name in state]

    def load(self, prefix: str, leave: tuple[str, ...] = ()) -> None:
        """Load the parameters and buffers of the module `prefix` (``""``: of all) but for modules below `leave`."""
        for name in self._names:
            if _is_in(name, prefix) and not any(_is_in(name, other) for other in leave):
                self._set(name, self._read(self._keys[name]).to(self._device))
        if prefix == "":
            for name, buffer in self.model.named_buffers():
                if not buffer.is_meta:
                    self._set(name, buffer.to(self._device))
            self.model.tie_weights()

    def read(self, prefix: str, leave: Container[str] = ()) -> dict[str, Tensor]:
        """The parameters and buffers of the module `prefix` by name within it, but for those whose name is in `leave`;
        the model stays as it is."""
        return {
            name.removeprefix(f"{prefix}."): self._read(self._keys[name]).to(self._device)
            for name in self._names
            if _is_in(name, prefix) and name not in leave
        }

    @contextmanager
    def on_meta(self) -> Iterator[Any]:
        """The model with its buffers on the meta device too, to run without data; before :meth:`load`."""
        buffers = {name: buffer for name, buffer in self.model.named_buffers() if not buffer.is_meta}
        for name, buffer in buffers.items():
            self._set(name, buffer.to("meta"))
        try:
            yield self.model
        finally:
            for name, buffer in buffers.items():
                self._set(name, buffer)

    def release(self, prefix: str) -> None:
        """Forget the parameters of the module `prefix`."""
        for name in self._names:
            if _is_in(name, prefix):
                self._set(name, self._value(name).to("meta"))

    def _read(self, key: str | Stack) -> Tensor:
        """A tensor of the checkpoint, or what a stack comes to; floats in float32."""
        if isinstance(key, Stack):
            return torch.from_numpy(key.parameter(self._source))
        tensor = self._source.tensors[key]
        raw = self._source.read(key)
        if tensor.dtype in FLOATS:
            return torch.from_numpy(as_float32(raw, tensor))
        return torch.from_numpy(stored(raw, tensor.dtype, tensor.shape).copy())

    def _value(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        value = getattr(self.model.get_submodule(path), leaf)
        assert isinstance(value, Tensor)  # noqa: S101 - the names are those of parameters and buffers
        return value

    def _set(self, name: str, value: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        module: nn.Module = self.model.get_submodule(path)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[leaf] = value


def _is_in(name: str, prefix: str) -> bool:
    return prefix == "" or name.startswith(f"{prefix}.")


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """New parameters are on the meta device; buffers, which a constructor computes, are real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None:
            module._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=False)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
