"""The repeated blocks of a model, and the arguments with which the model itself calls them.

A model's own ``forward`` runs up to the block in question: it makes embeddings, masks and positions as that model does.
The blocks before are not computed again: each gives the outputs that were stored for the last of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

Batch = Mapping[str, Any]
# A tensor on the meta device has no value to decide by: any will do to go on.
ANSWERS = {"__bool__": True, "__int__": 1, "__index__": 1, "__float__": 1.0, "item": 1}


@dataclass(frozen=True)
class Blocks:
    """A list of blocks of one class, which the model calls one after the other.

    Attributes:
        path: of the list in the model.
        modules: the blocks.
    """

    path: str
    modules: tuple[nn.Module, ...]

    def path_of(self, index: int) -> str:
        return f"{self.path}.{index}"


@dataclass(frozen=True)
class Outputs:
    """What a block gave for one batch.

    Attributes:
        values: its output, or the members of its output; what is neither a tensor nor None is not kept.
        is_tuple: whether it gave a tuple.
    """

    values: tuple[Tensor | None, ...]
    is_tuple: bool

    @classmethod
    def of(cls, found: Any) -> Outputs:
        is_tuple = isinstance(found, (tuple, list))
        members = tuple(found) if is_tuple else (found,)
        return cls(tuple(m.detach() if isinstance(m, Tensor) else None for m in members), is_tuple)

    @property
    def hidden(self) -> Tensor:
        """The hidden states ``[batch, tokens, columns]`` that the next block gets."""
        first = self.values[0]
        if first is None:
            raise TypeError("a block's first output is no tensor")
        return first

    def given(self) -> Any:
        """As the block gave it."""
        return self.values if self.is_tuple else self.values[0]


def first_output(output: Any) -> Tensor:
    """The hidden states in what a block gives."""
    found = output[0] if isinstance(output, (tuple, list)) else output
    assert isinstance(found, Tensor)  # noqa: S101 - a block's first output is its hidden states
    return found


class _Reached(Exception):
    """The model has called the block in question."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = args, kwargs


def find_blocks(model: nn.Module) -> list[Blocks]:
    """The outermost lists of at least two modules of one class that have parameters, in the order of the model."""
    found: list[Blocks] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2 or any(_is_below(path, b.path) for b in found):
            continue
        if len({type(m) for m in module}) == 1 and any(True for _ in module[0].parameters()):
            found.append(Blocks(path, tuple(module)))
    return found


def _is_below(path: str, other: str) -> bool:
    return path.startswith(f"{other}.")


@contextmanager
def replaced_forward(modules: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Give modules another ``forward`` for a while; all else of them, which their parents may read, stays."""
    for module, forward in modules.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def run(model: nn.Module, batch: Batch, known: Mapping[nn.Module, Outputs], weights: Mapping[str, Tensor]) -> Any:
    """The model's output for a batch.

    Args:
        known: blocks that give stored outputs.
        weights: parameters to use in place of the model's, by name.
    """
    with replaced_forward({module: _giving(outputs) for module, outputs in known.items()}):
        return functional_call(model, dict(weights), kwargs=dict(batch))


def arguments(
    model: nn.Module,
    block: nn.Module,
    batch: Batch,
    known: Mapping[nn.Module, Outputs],
    weights: Mapping[str, Tensor],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments with which the model calls `block` for a batch; None if it does not.

    Args:
        known: outputs of the blocks that are called before.
        weights: parameters to use in place of the model's, by name.
    """

    def reached(*args: Any, **kwargs: Any) -> Any:
        raise _Reached(args, kwargs)

    forwards = {module: _giving(outputs) for module, outputs in known.items()}
    with replaced_forward({**forwards, block: reached}):
        try:
            functional_call(model, dict(weights), kwargs=dict(batch))
        except _Reached as here:
            return here.arguments
    return None


def _giving(outputs: Outputs) -> Callable[..., Any]:
    return lambda *args, **kwargs: outputs.given()


def order_of_execution(model: nn.Module, lists: list[Blocks], batch: Batch) -> list[Blocks]:
    """The lists whose first block the model calls for a batch, in the order of these calls.

    Args:
        model: on the meta device.
        lists: of its blocks.
        batch: its arguments, on the meta device too.
    """
    called: list[Blocks] = []

    def call(blocks: Blocks) -> Callable[..., None]:
        return lambda module, args: called.append(blocks)

    hooks = [blocks.modules[0].register_forward_pre_hook(call(blocks)) for blocks in lists]
    try:
        with torch.no_grad(), torch.device("meta"), _AnyValue():
            model(**batch)
    except Exception:  # whatever a model's code does without values; the others then stand in the model's order
        called += [blocks for blocks in lists if blocks not in called]
    finally:
        for hook in hooks:
            hook.remove()
    return list(dict.fromkeys(called))


class _AnyValue(TorchFunctionMode):
    """Tensors on the meta device, which have no values, answer as if they had one: code that asks then goes on."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = ANSWERS.get(getattr(func, "__name__", ""))
        if answer is not None and isinstance(args[0], Tensor) and args[0].is_meta:
            return answer
        return func(*args, **(kwargs or {}))
