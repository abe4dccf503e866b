"""A quantized release seen as a checkpoint of floats: unpacked weights in the place of the tensors that make them.

So everything that knows names and shapes alone works as with any checkpoint. Whoever reads a weight gets what the
release's own library would decode; its :class:`..source.Grid` has it as it is stored without loss.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...dtypes import DTYPES
from ...errors import QuantizedSourceError
from ...matrix import StoredMatrix
from ..source import Grid, Source, SourceTensor
from . import auto_round, awq, bitnet, bitsandbytes, compressed_tensors, float4, float8, gptq, modelopt
from .packed import Packed
from .release import WRONG, Release, model_dtype

# Kinds of releases by quant_method: what finds their weights.
KINDS: dict[str, Callable[[Release], Iterator[Packed]]] = {
    "auto-round": auto_round.find,
    "awq": awq.find,
    "bitnet": bitnet.find,
    "bitsandbytes": bitsandbytes.find,
    "compressed-tensors": compressed_tensors.find,
    "fbgemm_fp8": float8.find,
    "fp8": float8.find,
    "gptq": gptq.find,
    "modelopt": modelopt.find,
    "mxfp4": float4.find,
}
# Kinds that are known, and cannot be stored without loss.
_INEXACT = {
    "hqq": "whose library rounds each weight twice, once before it is scaled: no lowbit model decodes to just the same",
}
# Tensors beside weights that say how activations are rounded, which a lowbit model does not do.
_OF_ACTIVATIONS = ("input_scale", "input_zero_point", "input_global_scale", "activation_scale", "k_scale", "v_scale")
_PACKED = ("qweight", "qzeros", "weight_packed", "weight_scale_inv")  # names that nothing else has


class QuantizedSource:
    """A source with the weights that a release has packed.

    Attributes:
        method: how the release is quantized, for people.
        unused: tensors of the release that nothing here needs.
        shown_as: what messages name instead of the directory, if that is a temporary one.
    """

    shown_as: Path | None = None

    def __init__(self, release: Release, packed: Mapping[str, Packed]) -> None:
        source = release.source
        self.directory, self.repo_id, self.revision = source.directory, source.repo_id, source.revision
        self.files, self.method = source.files, release.method
        self._source, self._packed = source, packed
        used = {part.name for one in packed.values() for part in one.parts.values()}
        of_activations = {name for name in source.tensors if name.rpartition(".")[2] in _OF_ACTIVATIONS}
        self.unused = tuple(sorted(of_activations - used))
        self.tensors = {
            name: t for name, t in source.tensors.items() if name not in used and name not in of_activations
        }
        for name, one in packed.items():
            if name in self.tensors:
                raise release.error(f"{name}: stands beside the packed weight of the same module; take one of both out")
            nbytes = int(np.prod(one.whole_shape, dtype=object)) * DTYPES[one.dtype].nbytes
            grid = Grid(one.scheme, one.nbytes, partial(self._matrix, one), one.refusal)
            self.tensors[name] = SourceTensor(name, one.dtype, one.whole_shape, nbytes, grid)
        meaning = json.dumps([release.section, release.dtype], sort_keys=True)  # which a user may correct in between
        self.identity = hashlib.sha256("\n".join([source.identity, meaning, *packed]).encode()).hexdigest()

    def read(self, name: str, begin: int = 0, nbytes: int | None = None) -> NDArray[np.uint8]:
        one = self._packed.get(name)
        if one is None:
            return self._source.read(name, begin, nbytes)
        end = self.tensors[name].nbytes if nbytes is None else begin + nbytes
        if one.experts is None:
            return one.floats(one.load(self._source.read))[begin:end]
        size = self.tensors[name].nbytes // one.experts
        out = np.empty(end - begin, np.uint8)
        for expert in range(begin // size, -(-end // size)):
            whole, first = one.floats(one.load(self._source.read, expert)), expert * size
            here = slice(max(begin, first), min(end, first + size))
            out[here.start - begin : here.stop - begin] = whole[here.start - first : here.stop - first]
        return out

    def _matrix(self, one: Packed, expert: int | None) -> StoredMatrix:
        return one.matrix(one.load(self._source.read, expert))


def open_quantized(source: Source, section: Mapping[str, Any], config: Mapping[str, Any]) -> QuantizedSource:
    """The source with its weights unpacked, by the ``quantization_config`` of its config.

    Raises:
        QuantizedSourceError: it is quantized in a way that is not known, or its tensors do not fit what it says.
    """
    release = Release(source, section, model_dtype(config))
    find = KINDS.get(release.method)
    if why := _INEXACT.get(release.method):
        raise release.error(f"is quantized already (quant_method {release.method!r}), {why}; convert the original")
    if find is None:
        raise QuantizedSourceError(
            f"{source.directory / 'config.json'}: the checkpoint is quantized already (quant_method "
            f"{section.get('quant_method')!r}), in none of the ways that are known ({', '.join(KINDS)}); convert the "
            "original, or dequantize it first"
        )
    packed = {one.name: one for one in find(release)}
    used = {part.name for one in packed.values() for part in one.parts.values()}
    for name, tensor in source.tensors.items():
        if name not in used and tensor.dtype.startswith("F8") and len(tensor.shape) == 3:
            raise release.error(
                f"{name}: is a stack of experts in {tensor.dtype}, which is not imported (experts in tensors of their "
                "own are); convert the original checkpoint"
            )
        if name not in used and (tensor.dtype.startswith("F8") or name.rpartition(".")[2] in _PACKED):
            raise release.error(
                f"{name}: has dtype {tensor.dtype}, and belongs to no packed weight of a known kind; {WRONG}, or "
                "convert the original checkpoint"
            )
    if not packed:
        raise release.error(
            f"config.json says that the checkpoint is quantized ({release.method}), but it has no packed weights; "
            "take quantization_config out of it if the weights are floats"
        )
    return QuantizedSource(release, packed)
