"""Layers of vLLM made of the file's matrices: linear layers, embeddings and output heads.

A layer gets one placeholder parameter for each role that its matrices have in the file, such as ``planes``. vLLM's
loaders find it by name and call its ``weight_loader``, which hands the tensor to the part that it belongs to. The
parts themselves are a list of modules in the layer, :data:`PARTS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearMethodBase, QKVParallelLinear
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from ..errors import LoadError
from ..schema import ModuleEntry
from .parts import FloatPart, Part, PlanePart, can_join, product
from .slices import Cut, Shard, Slice, ranges, shards_of

PARTS = "lowbit_parts"
_QKV = {"q": 0, "k": 1, "v": 2}  # vLLM's names of the shards of a fused attention layer


class LowbitLinearMethod(LinearMethodBase):
    """A linear layer, fused or not.

    Args:
        matrices: name and entry of each of the file's matrices in it, in order; no entry: kept in full precision.
        bits: precision to read at; None is the file's.
    """

    def __init__(self, matrices: Sequence[tuple[str, ModuleEntry | None]], bits: int | None) -> None:
        self.matrices, self.bits = matrices, bits

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make the parts for this process, without data; LoadError where a matrix does not fit the layer."""
        device = torch.empty(0).device  # vLLM makes layers with the device as torch's default
        start = layer.tp_rank * input_size_per_partition if input_size_per_partition < input_size else 0
        cols = start, start + input_size_per_partition
        shards = _shards(layer, output_partition_sizes)
        joined, places = list[list[Cut] | FloatPart](), dict[int, Place]()
        for number, (name, entry) in enumerate(self.matrices):
            first = len(output_partition_sizes) - len(shards)
            count = shards_of(entry, shards, len(self.matrices) - number - 1)
            mine, shards = shards[:count], shards[count:]
            rows, piece = sum(shard.full for shard in mine), Slice(ranges(mine), cols)
            if entry is None:
                joined.append(FloatPart(name, piece, dtype=params_dtype, device=device))
                places[first] = Place(len(joined) - 1, 0)
                continue
            if entry.shape != (rows, input_size):
                raise LoadError(f"{entry.path} is {list(entry.shape)} in the file, vLLM expects {[rows, input_size]}")
            cut, last = Cut(entry, piece), joined[-1] if joined else None
            if isinstance(last, list) and can_join(last[0], cut):
                last.append(cut)
            else:
                joined.append(last := [cut])
            places[first] = Place(len(joined) - 1, len(last) - 1)
        parts: list[Part] = [
            PlanePart(part, bits=self.bits, device=device) if isinstance(part, list) else part for part in joined
        ]
        _attach(layer, parts, places)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return product(getattr(layer, PARTS), x, bias)

    def process_weights_after_loading(self, layer: Any) -> None:
        _finish(layer)


class LowbitEmbeddingMethod(QuantizeMethodBase):
    """An embedding, or an output head: rows are tokens of the vocabulary.

    Args:
        entry: the file's matrix; of a tied head that of the embedding.
        bits: precision to read at; None is the file's.
    """

    def __init__(self, entry: ModuleEntry, bits: int | None) -> None:
        self.entry, self.bits = entry, bits

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """As for a linear layer; vLLM pads the vocabulary, this matrix has no rows for that."""
        expected = (layer.org_vocab_size, input_size)
        if self.entry.shape != expected:
            raise LoadError(f"{self.entry.path} is {list(self.entry.shape)} in the file, vLLM expects {list(expected)}")
        if layer.num_added_embeddings:
            raise LoadError(f"{self.entry.path}: tokens cannot be added to a quantized vocabulary")
        shard = layer.shard_indices
        piece = Slice(((shard.org_vocab_start_index, shard.org_vocab_end_index),), (0, input_size))
        layer.lowbit_dtype = params_dtype
        part = PlanePart([Cut(self.entry, piece)], bits=self.bits, device=torch.empty(0).device)
        _attach(layer, [part], {0: Place(0, 0)})

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        (part,) = getattr(layer, PARTS)
        rows: Tensor = part.lookup(ids, layer.lowbit_dtype)
        return rows

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        (part,) = getattr(layer, PARTS)
        padding = layer.num_embeddings_per_partition - part.rows
        out: Tensor = part.product(x, None if bias is None else bias[: part.rows], sampled=True)
        return F.pad(out, (0, padding)) if padding else out

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Let a head use the matrix of the embedding, and what tasks change there."""
        parts = getattr(embed_tokens, PARTS, None)
        if parts is None:
            raise LoadError(f"{self.entry.path} is quantized, but vLLM ties it to an embedding that is not")
        for name in [name for name, p in layer.named_parameters(recurse=False) if hasattr(p, "lowbit_role")]:
            setattr(layer, name, getattr(embed_tokens, name))
        setattr(layer, PARTS, parts)
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        _finish(layer)


class Place(NamedTuple):
    """Where one of the file's matrices is in a layer: number of the part, and its number there."""

    part: int
    member: int


def _attach(layer: Any, parts: list[Part], places: dict[int, Place]) -> None:
    """Give a layer its parts, and placeholders by which vLLM loads them.

    Args:
        layer: of vLLM.
        parts: without data.
        places: of the file's matrices, by number of the shard that each begins with.
    """
    setattr(layer, PARTS, nn.ModuleList(parts))

    def load(param: nn.Parameter, tensor: Tensor, shard_id: Any = None) -> None:
        shard_id = getattr(tensor, "shard_id", None) if shard_id is None else shard_id
        shard = shard_id[0] if isinstance(shard_id, tuple) else _QKV.get(shard_id, shard_id) or 0
        role: str = param.lowbit_role  # type: ignore[attr-defined]
        if shard not in places or (shard_id is None and len(places) > 1):
            raise LoadError(f"vLLM loads {role!r} of {parts[0].path} as shard {shard_id!r}, which the file has not")
        parts[places[shard].part].load(role, tensor, places[shard].member)

    roles = {role: dtype for part in parts for role, dtype in part.roles.items()}
    for role, dtype in roles.items():
        param = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        param.lowbit_role, param.weight_loader = role, load  # type: ignore[attr-defined]
        layer.register_parameter(role, param)


def _finish(layer: Any) -> None:
    """Check that all parts have their tensors, and take the placeholders away."""
    missing = [name for part in getattr(layer, PARTS) for name in part.missing]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise LoadError(f"vLLM's class of this model has not loaded {missing[0]!r}{more} from the files")
    for name in [name for name, p in layer.named_parameters(recurse=False) if hasattr(p, "lowbit_role")]:
        delattr(layer, name)


def _shards(layer: Any, sizes: Sequence[int]) -> list[Shard]:
    """The shards of a linear layer, of which this process has `sizes` rows."""
    if not isinstance(layer, ColumnParallelLinear):
        return [Shard(size, 0, size) for size in sizes]
    shards = []
    for number, size in enumerate(sizes):  # processes share heads of keys and values where there are too few
        copies = layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) and number > 0 else 1
        shards.append(Shard(size * layer.tp_size // copies, layer.tp_rank // copies * size, size))
    return shards
