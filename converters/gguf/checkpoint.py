"""A GGUF file as a checkpoint to convert: its tensors under transformers' names, and a directory with what is beside.

transformers makes the config, the tokenizer and the chat template from the file's metadata; they stand in a directory
that lives as long as the source. A weight is decoded to float32, as ggml and transformers do it, so that is the dtype
of the model; whoever loads it may ask for another.
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import QuantizedSourceError, SourceError
from ...schema import Scheme
from ..quantized.packed import Packed
from ..quantized.release import Release
from ..quantized.source import QuantizedSource
from ..source import Source, SourceTensor
from .blocks import FLOATS, TYPES
from .container import BlockSize, GgufFile, Tensor, read_gguf
from .files import Files, joined
from .names import Naming, Placed, check_architecture
from .parts import all_parts
from .rope import FACTORS
from .settings import apply_settings, settings_of
from .weight import GgufWeight

_LAYER = re.compile(r"blk\.(\d{1,9})\.")


def open_gguf(file: Path) -> Source:
    """Open a model of one file, or of the files ``…-00001-of-0000N.gguf``, any of which may be given.

    Raises:
        SourceError: it is no valid file, of an architecture that is not known, or a package is missing.
    """
    types = block_sizes()
    files = [read_gguf(path, types) for path in all_parts(file)]
    first, places = files[0], dict[str, GgufFile]()
    for one in files:
        for name in one.tensors:
            if name in places:
                raise SourceError(f"{one.path}: has the tensor {name!r}, which {places[name].path.name} has too")
            places[name] = one
    architecture = check_architecture(first.metadata.get("general.architecture"), first.path)
    tensors = {name: one.tensors[name] for name, one in places.items()}
    if not tensors:
        raise SourceError(f"{first.path}: has no tensors; it holds a vocabulary alone")
    for name, tensor in tensors.items():
        if types[tensor.type].name not in FLOATS and (len(tensor.shape) < 2 or types[tensor.type].weights == 1):
            raise SourceError(
                f"{places[name].path}: {name}: is {types[tensor.type].name} of shape {list(tensor.shape)}, expected a "
                "vector of floats, or a matrix of floats or blocks"
            )
    _check_layers(first, architecture, tensors)
    room = _Room(file.name)
    raw = Files(room.path, {name: (places[name].path, tensor) for name, tensor in tensors.items()}, files)
    raw.kept = room  # the directory goes with the source
    config = _write_directory(first, room, architecture, raw)
    naming = Naming(_one_layer(config, first.path), architecture, config, first.path)
    packed = dict[str, Packed]()
    for placed in naming.places({name: tensor.shape for name, tensor in tensors.items()}):
        kinds = {types[tensors[part].type].name for part in placed.parts}
        if kinds <= FLOATS.keys():
            raw.place(placed, naming)
        elif len(kinds) > 1:
            raise QuantizedSourceError(
                f"{first.path}: {' and '.join(placed.parts)} have different types ({', '.join(sorted(kinds))}), "
                "and are one matrix in the model; convert the original checkpoint"
            )
        else:
            weight = _weight(placed, [tensors[part] for part in placed.parts], types)
            packed[weight.name] = weight
            raw.tensors.update({part.name: part for part in weight.parts.values()})
    if not packed:
        return raw
    found = QuantizedSource(Release(raw, {"quant_method": "gguf"}, "F32"), packed)
    found.shown_as = raw.shown_as
    return found


def block_sizes() -> dict[int, BlockSize]:
    """All types that the package gguf knows."""
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ModuleNotFoundError as e:
        raise SourceError("a .gguf file needs the package gguf: pip install 'lowbit-format[gguf]'") from e
    return {int(kind): BlockSize(kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


@dataclass
class _Room:
    """A temporary directory, named as the file is: messages name it. It lives as long as this object."""

    name: str
    _whole: Any = field(default_factory=lambda: tempfile.TemporaryDirectory(prefix="lowbit-"))

    def __post_init__(self) -> None:
        self.path = Path(self._whole.name, "model", self.name)
        self.path.mkdir(parents=True)

    def alone(self, file: Path) -> str:
        """A directory with a link to the file and nothing else: transformers reads what stands beside it too."""
        place = Path(self._whole.name, "alone")
        place.mkdir()
        (place / file.name).symlink_to(file.absolute())
        return str(place)


def _weight(placed: Placed, tensors: list[Tensor], types: dict[int, BlockSize]) -> Packed:
    """A weight of blocks, as it is stored, or the reason why it cannot be."""
    size = types[tensors[0].type]
    parts = {}
    for i, tensor in enumerate(tensors):
        *lead, cols = tensor.shape
        if tensor.shape[:-2] != tensors[0].shape[:-2] or cols != tensors[0].shape[-1] or len(tensor.shape) > 3:
            raise QuantizedSourceError(
                f"{tensor.name}: has the shape {list(tensor.shape)} beside {tensors[0].name} of "
                f"{list(tensors[0].shape)}, expected matrices, or stacks of as many, of as many columns"
            )
        shape = (*lead, cols // size.weights * size.nbytes)
        parts[str(i)] = SourceTensor(tensor.name, "U8", shape, tensor.nbytes)
    shape = joined([tensor.shape for tensor in tensors])
    form = TYPES.get(size.name)
    refusal = ""
    if form is None:
        _check_decoded(tensors[0], size)
        refusal = f"its type {size.name} is none of those that are stored without loss ({', '.join(TYPES)})"
    scheme = form.scheme if form is not None else Scheme("uniform", 8, 0, "F32")  # the second is never used
    return GgufWeight(
        placed.name, (shape[-2], shape[-1]), "F32", scheme, parts,
        experts=shape[0] if len(shape) == 3 else None, refusal=refusal,
        kind=size.name, block_bytes=size.nbytes, order=placed.order,
    )  # fmt: skip


def _check_decoded(tensor: Tensor, size: BlockSize) -> None:
    """Raise QuantizedSourceError unless the package gguf can decode blocks of this type."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        dequantize(np.zeros((1, size.nbytes), np.uint8), GGMLQuantizationType[size.name])
    except NotImplementedError as e:
        raise QuantizedSourceError(
            f"{tensor.name}: has the type {size.name}, which the package gguf cannot decode; convert the original "
            "checkpoint"
        ) from e


def _check_layers(file: GgufFile, architecture: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise SourceError unless the tensors are of as many layers as the file says: models are built of that many."""
    key = f"{architecture}.block_count"
    numbers = {int(found[1]) for name in tensors if (found := _LAYER.match(name))}
    if file.metadata.get(key) != len(numbers) or numbers != set(range(len(numbers))):
        most = max(numbers, default=-1)
        raise SourceError(
            f"{file.path}: {key} is {file.metadata.get(key)!r}, but its tensors are of {len(numbers)} layers, up to "
            f"blk.{most}; download it again"
        )


def _write_directory(file: GgufFile, room: _Room, architecture: str, raw: Files) -> Any:
    """Write config, tokenizer and chat template as transformers makes them from the metadata; gives the config."""
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    given = settings_of(file, architecture)
    directory, place = room.path, {"pretrained_model_name_or_path": room.alone(file.path), "gguf_file": file.path.name}
    what = "config"
    try:
        config = AutoConfig.from_pretrained(**place)
        if config.model_type == "mistral":  # so it is of the general.name alone; to llama.cpp it is as any llama
            without = ("model_type", "sliding_window")
            config = AutoConfig.for_model("llama", **{k: v for k, v in config.to_dict().items() if k not in without})
        if "tokenizer.ggml.tokens" in file.metadata:
            what = "tokenizer"
            AutoTokenizer.from_pretrained(**place).save_pretrained(directory)
    except Exception as e:  # whatever transformers meets in metadata that are not what it expects
        raise SourceError(f"{file.path}: transformers cannot make a {what} of it: {type(e).__name__}: {e}") from e
    classes = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if config.model_type not in classes:
        raise SourceError(f"{file.path}: transformers has no causal language model for {config.model_type!r}")
    config.architectures, config.dtype = [classes[config.model_type]], "float32"
    # By the tensors of all files: transformers looks at those of the first, and ties heads that a file has.
    config.tie_word_embeddings = not raw.has("output.weight")
    if architecture == "stablelm":
        config.use_qkv_bias = raw.has("blk.0.attn_q.bias")
        config.use_parallel_residual = not raw.has("blk.0.ffn_norm.weight")
    factors = raw.vector(FACTORS) if raw.has(FACTORS) else None
    apply_settings(config, given, architecture, factors, file.path)
    vars(config).pop("_model_name_or_path", None)
    config.save_pretrained(directory)
    return config


def _one_layer(config: Any, where: Path) -> Any:
    """The model on the meta device with one layer alone: the others have the same names."""
    import torch
    from transformers import AutoModelForCausalLM

    own = copy.deepcopy(config)
    try:
        if getattr(own, "layer_types", None):
            own.layer_types = own.layer_types[:1]
        own.num_hidden_layers = 1
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(own)  # type: ignore[no-untyped-call]
    except Exception as e:  # of many kinds, since sizes may be anything
        raise SourceError(f"{where}: transformers cannot build its model: {type(e).__name__}: {e}") from e
