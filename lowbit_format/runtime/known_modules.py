"""Float modules that lowbit modules can replace: what each computes from its weight.

A subclass of ``nn.Linear`` may compute something else, so only those count whose forward is known: classes that
inherit it, and the few of :data:`_SCALED` and :data:`_PLAIN`, which are tried on small numbers before they are trusted.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

_PLAIN = ("FalconLinear",)  # the same product, with the bias added afterwards
_SCALED = "ScaledWordEmbedding"  # ends of names: Gemma's and BART's embeddings, which multiply what they look up


@dataclass(frozen=True)
class Known:
    """What a float module computes.

    Attributes:
        kind: ``linear``, ``conv1d`` or ``embedding``.
        shape: ``(rows, cols)`` of its matrix.
        scale: what an embedding multiplies its rows by; None for nothing.
        rounds_scale: it rounds the scale to the dtype of the rows first.
    """

    kind: str
    shape: tuple[int, int]
    scale: float | None = None
    rounds_scale: bool = False


def known(module: nn.Module) -> Known | None:
    """What `module` computes, or None if it is not known to compute a product or a look-up with its weight alone."""
    from transformers.pytorch_utils import Conv1D

    cls: Any = type(module)
    if isinstance(module, nn.Linear) and (
        cls is nn.Linear or _inherits(cls, nn.Linear) or (cls.__name__ in _PLAIN and _computes_product(cls))
    ):
        return Known("linear", (module.out_features, module.in_features)) if _only(module) else None
    if cls is Conv1D:
        conv: Any = module
        return Known("conv1d", (conv.nf, conv.nx))
    if isinstance(module, nn.Embedding) and module.max_norm is None and _only(module):
        shape = (module.num_embeddings, module.embedding_dim)
        if cls is nn.Embedding or _inherits(cls, nn.Embedding):
            return Known("embedding", shape)
        rounds = _rounds_scale(cls) if cls.__name__.endswith(_SCALED) else None
        scale = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", None))
        if rounds is not None and isinstance(scale, (int, float)):
            return Known("embedding", shape, float(scale), rounds)
    return None


def _only(module: nn.Module) -> bool:
    """Whether the module has no parameters but weight and bias: others would have to be computed with."""
    return {name for name, _ in module.named_parameters(recurse=False)} <= {"weight", "bias"}


def _inherits(cls: type[nn.Module], base: type[nn.Module]) -> bool:
    """Whether a subclass computes what its base does. Torch's own are not meant: their parents read their weights."""
    return not cls.__module__.startswith("torch.") and cls.forward is base.forward and cls.__call__ is base.__call__


@functools.cache
def _computes_product(cls: Any) -> bool:
    """Whether the class computes ``x @ weight.T + bias`` on small numbers."""
    with torch.no_grad(), torch.device("cpu"):
        x, module = torch.linspace(-1, 1, 6).reshape(2, 3), _made(cls, 3, 2)
        return module is not None and torch.allclose(module(x), F.linear(x, module.weight, module.bias))


@functools.cache
def _rounds_scale(cls: Any) -> bool | None:
    """Whether the class rounds its scale to the weight's dtype; None if it does not multiply its rows by a scale."""
    scale = 1.7  # is 1.703125 in bfloat16
    with torch.no_grad(), torch.device("cpu"):
        module = _made(cls, 4, 8, None, embed_scale=scale)
        if module is None:
            return None
        ids, module = torch.arange(4), module.to(torch.bfloat16)
        rows, found = F.embedding(ids, module.weight), module(ids)
        for rounds in (True, False):
            if torch.equal(found, scaled(rows, scale, rounds)):
                return rounds
    return None


def _made(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """A small instance with weights of its own, or None if the class is made otherwise."""
    try:
        module = cls(*args, **kwargs)
    except TypeError:
        return None
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module if _only(module) else None


def scaled(rows: torch.Tensor, scale: float, rounds: bool) -> torch.Tensor:
    """`rows` times `scale`, which is rounded to their dtype first if `rounds`."""
    return rows * rows.new_full((), scale) if rounds else rows * scale
