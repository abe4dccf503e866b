"""The tensors of a GGUF file in the names and the order of rows that transformers has, by transformers' own support.

llama.cpp names tensors in its own way, orders the rows of some (Llama's queries and keys), and adds one to some norms.
transformers knows how to undo that; here its processors are asked what they do to a weight, which is applied to packed
rows. Tensors that hold values are given to them as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import SourceError
from .rope import FACTORS

# Architectures of transformers whose loading changes names, orders of rows, and values of vectors alone.
_KNOWN = (
    "llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "phi3", "gemma2", "gemma3", "bloom", "falcon", "stablelm",
    "starcoder2", "nemotron",
)  # fmt: skip
_FIRST = "blk.0."
_HALF_OF_EXPERTS = re.compile(r"(?P<path>.*\.ffn_)(gate|up)_exps(?P<rest>\.weight)?")
_UNUSED = re.compile(r"blk\.\d+\.(attn_rot_embd|attn\.rotary_emb\.inv_freq)(\.weight)?")  # computed by the model


@dataclass(frozen=True)
class Placed:
    """What a tensor of the model is made of.

    Attributes:
        name: in the model.
        parts: names in the file; of several, their rows one behind the other (gate and up of stacked experts).
        order: of the parts' rows, int64 ``[rows]``; None is as they are.
    """

    name: str
    parts: tuple[str, ...]
    order: NDArray[np.int64] | None = None


class Naming:
    """Names and orders of a file's tensors.

    Args:
        model: of transformers, on the meta device, with one layer: all have the same names, but for the number.
        architecture: that the file gives.
        config: of the whole model.
        where: the file, for messages.

    Raises:
        SourceError: the architecture is not known.
    """

    def __init__(self, model: Any, architecture: str, config: Any, where: object) -> None:
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        self._where = where
        make: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
        self._processor = make(config=config.to_dict())
        # Of one layer, since the time that this takes grows with the square of their number.
        self._names = _of_all_layers(get_gguf_hf_weights_map(model, self._processor), config.num_hidden_layers)

    def places(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Placed]:
        """All tensors of the model, from the shapes of those in the file.

        Raises SourceError for one that has no place in the model.
        """
        found: dict[str, Placed] = {}
        for name, shape in shapes.items():
            if _UNUSED.fullmatch(name) or name == FACTORS:
                continue
            place = self._names.get(name) or self._names.get(name.removesuffix(".weight"))
            if place is None:
                raise SourceError(
                    f"{self._where}: {name}: transformers gives it no place in the model, so that what it does would "
                    "be lost; convert the original checkpoint"
                )
            half = _HALF_OF_EXPERTS.fullmatch(name)
            if half is not None:  # gate first, then up, as transformers stacks them
                rest = half["rest"] or ""
                parts = tuple(f"{half['path']}{which}_exps{rest}" for which in ("gate", "up"))
                if missing := [part for part in parts if part not in shapes]:
                    raise SourceError(f"{self._where}: lacks the tensor {missing[0]!r}; download the file again")
                found[place] = Placed(place, parts)
            elif place in found:
                raise SourceError(f"{self._where}: {name} and {found[place].parts[0]} are both {place!r}")
            else:
                found[place] = Placed(place, (name,), self._order(name, shape))
        return list(found.values())

    def values(self, name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """A vector as transformers has it, float32, perhaps of another shape."""
        return np.ascontiguousarray(self._processor.process(weights=values, name=name).weights)

    def _order(self, name: str, shape: tuple[int, ...]) -> NDArray[np.int64] | None:
        """The order of the rows of a matrix: what happens to a matrix in which each row holds its own number."""
        if len(shape) != 2:
            return None
        numbers = np.broadcast_to(np.arange(shape[0], dtype=np.int32)[:, None], shape)
        moved = self._processor.process(weights=numbers, name=name)
        if moved.weights is numbers:
            return None
        order: NDArray[np.int64] = moved.weights[:, 0].astype(np.int64)
        whole = moved.weights.shape == shape and np.array_equal(np.sort(order), np.arange(shape[0]))
        if moved.name != name or not whole or not (moved.weights == moved.weights[:, :1]).all():
            raise SourceError(
                f"{self._where}: {name}: transformers changes more than the order of its rows, which is not known for "
                "packed weights; convert the original checkpoint"
            )
        return order


def _of_all_layers(names: Mapping[str, str], layers: int) -> dict[str, str]:
    """Names in the model by those in the file, from those of layer 0 and of what is in no layer."""
    found = {}
    for name, place in names.items():
        if not name.startswith(_FIRST):
            found[name] = place
            continue
        for n in range(layers):
            found[name.replace(_FIRST, f"blk.{n}.", 1)] = place.replace(".0.", f".{n}.", 1)
    return found


def check_architecture(architecture: object, where: object) -> str:
    """The architecture; raises SourceError for one that is not known."""
    if not isinstance(architecture, str) or architecture not in _KNOWN:
        raise SourceError(
            f"{where}: has the architecture {architecture!r}, expected one of {', '.join(_KNOWN)}, whose names and "
            "orders transformers can undo; convert the original checkpoint"
        )
    return architecture
