"""A GGUF file as a checkpoint to convert: its tensors under transformers' names, and a directory with what is beside.

transformers makes the config, the tokenizer and the chat template from the file's metadata; they stand in a directory
that lives as long as the source. A weight is decoded to float32, as ggml and transformers do it, so that is the dtype
of the model; whoever loads it may ask for another.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...dtypes import DTYPES, stored, to_float32
from ...errors import QuantizedSourceError, SourceError
from ...schema import Scheme
from ..quantized.packed import Packed
from ..quantized.release import Release
from ..quantized.source import QuantizedSource
from ..source import Source, SourceTensor, file_identity
from .blocks import FLOATS, TYPES
from .container import BlockSize, GgufFile, Tensor, read_gguf
from .names import ROPE, Naming, Placed, check_architecture, llama3_rope
from .parts import all_parts
from .weight import GgufWeight

# Metadata, behind the architecture, that transformers leaves to the defaults of its configs.
_MORE = {
    "attention.key_length": "head_dim",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}


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
    room = _Room(file.name)
    raw = _Files(room, {name: (places[name].path, tensor) for name, tensor in tensors.items()}, files)
    config = _write_directory(first, room.path, architecture, raw)
    naming = Naming(_meta_model(room.path), architecture, config.to_dict(), first.path)
    packed = {}
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
            one = _weight(placed, [tensors[part] for part in placed.parts], types)
            packed[one.name] = one
            raw.tensors.update({part.name: part for part in one.parts.values()})
    if not packed:
        return raw
    return QuantizedSource(Release(raw, {"quant_method": "gguf"}, "F32"), packed)


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
        self.path = Path(self._whole.name) / self.name
        self.path.mkdir()


class _Files:
    """The tensors of the files: packed ones under their own names, as bytes, others under the model's."""

    def __init__(self, room: _Room, places: dict[str, tuple[Path, Tensor]], files: list[GgufFile]) -> None:
        self._room, self._places = room, places
        self.directory, self.repo_id, self.revision = room.path, None, None
        self.files = tuple(one.path.name for one in files)
        self.tensors: dict[str, SourceTensor] = {}
        self.identity = file_identity([one.path for one in files])
        self._values: dict[str, tuple[Placed, Naming]] = {}
        self._kinds = _float_ids()

    def place(self, placed: Placed, naming: Naming) -> None:
        """Enter tensors of floats under the model's name: vectors in float32, others in their own dtype."""
        parts = [self._places[part][1] for part in placed.parts]
        dtypes = {self._kinds[part.type] for part in parts}
        dtype = dtypes.pop() if len(dtypes) == 1 and len(parts[0].shape) > 1 else "F32"
        shape = _joined([part.shape for part in parts])
        if len(shape) == 1:
            shape = naming.values(parts[0].name, np.ones(shape, np.float32)).shape
        nbytes = int(np.prod(shape, dtype=object)) * DTYPES[dtype].nbytes
        self.tensors[placed.name] = SourceTensor(placed.name, dtype, shape, nbytes)
        self._values[placed.name] = placed, naming

    def vector(self, name: str) -> NDArray[np.float32]:
        """A tensor of the file as float32."""
        path, tensor = self._places[name]
        kind = self._kinds[tensor.type]
        return to_float32(stored(_bytes(path, tensor, 0, tensor.nbytes), kind, tensor.shape), kind)

    def has(self, name: str) -> bool:
        return name in self._places

    def read(self, name: str, begin: int = 0, nbytes: int | None = None) -> NDArray[np.uint8]:
        if name not in self._values:
            path, tensor = self._places[name]
            return _bytes(path, tensor, begin, tensor.nbytes - begin if nbytes is None else nbytes)
        whole = self._whole(*self._values[name], self.tensors[name])
        return whole[begin : len(whole) if nbytes is None else begin + nbytes]

    def _whole(self, placed: Placed, naming: Naming, tensor: SourceTensor) -> NDArray[np.uint8]:
        if len(self._places[placed.parts[0]][1].shape) == 1:
            found = naming.values(placed.parts[0], self.vector(placed.parts[0]))
            return found.astype("<f4", copy=False).reshape(-1).view(np.uint8)
        parts = []
        for part in placed.parts:
            path, there = self._places[part]
            raw, kind = _bytes(path, there, 0, there.nbytes), self._kinds[there.type]
            if kind != tensor.dtype:  # parts of different dtypes, which are one tensor
                raw = to_float32(stored(raw, kind, there.shape), kind).astype("<f4").reshape(-1).view(np.uint8)
            parts.append(raw.reshape(*there.shape[:-1], -1))
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-2)
        return (whole if placed.order is None else whole[placed.order]).reshape(-1)


def _float_ids() -> dict[int, str]:
    from gguf.constants import GGMLQuantizationType

    return {int(GGMLQuantizationType[name]): dtype for name, dtype in FLOATS.items()}


def _joined(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of matrices with the rows of all, one behind the other."""
    if len(shapes) == 1:
        return shapes[0]
    return (*shapes[0][:-2], sum(shape[-2] for shape in shapes), shapes[0][-1])


def _bytes(path: Path, tensor: Tensor, begin: int, nbytes: int) -> NDArray[np.uint8]:
    out = np.empty(nbytes, np.uint8)
    try:
        with open(path, "rb", buffering=0) as f:
            f.seek(tensor.begin + begin)
            done = 0
            while done < nbytes:  # one read call gives at most 2 GiB
                n = f.readinto(out[done:].data)
                if not n:
                    raise SourceError(f"{path}: ends inside tensor {tensor.name!r}; it changed while it was read")
                done += n
    except OSError as e:
        raise SourceError(f"{path}: cannot be read: {e.strerror}") from e
    return out


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
    shape = _joined([tensor.shape for tensor in tensors])
    form = TYPES.get(size.name)
    refusal = ""
    if form is None:
        refusal = f"its type {size.name} chooses several weights at once from a table, which a lowbit model cannot do"
    return GgufWeight(
        placed.name, shape[-2:], "F32", form.scheme if form is not None else Scheme("uniform", 8, 0, "F32"), parts,
        experts=shape[0] if len(shape) == 3 else None, refusal=refusal,
        kind=size.name, block_bytes=size.nbytes, order=placed.order,
    )  # fmt: skip


def _write_directory(file: GgufFile, directory: Path, architecture: str, raw: _Files) -> Any:
    """Write config, tokenizer and chat template as transformers makes them from the metadata; gives the config."""
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    place = {"pretrained_model_name_or_path": str(file.path.parent), "gguf_file": file.path.name}
    what = "config"
    try:
        config = AutoConfig.from_pretrained(**place)
        if "tokenizer.ggml.tokens" in file.metadata:
            what = "tokenizer"
            AutoTokenizer.from_pretrained(**place).save_pretrained(directory)
    except Exception as e:  # whatever transformers meets in metadata that are not what it expects
        raise SourceError(f"{file.path}: transformers cannot make a {what} of it: {type(e).__name__}: {e}") from e
    classes = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if config.model_type not in classes:
        raise SourceError(f"{file.path}: transformers has no causal language model for {config.model_type!r}")
    config.architectures, config.dtype = [classes[config.model_type]], "float32"
    for key, attribute in _MORE.items():
        value = file.metadata.get(f"{architecture}.{key}")
        fixed = isinstance(getattr(type(config), attribute, None), property)
        if isinstance(value, int) and hasattr(config, attribute) and not fixed:
            setattr(config, attribute, value)
    # By the tensors of all files: transformers looks at those of the first.
    config.tie_word_embeddings = not raw.has("output.weight") or architecture in ("falcon", "bloom")
    if raw.has(ROPE):
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        base = config.rope_parameters["rope_theta"]
        config.rope_parameters = llama3_rope(raw.vector(ROPE), base, head_dim, file.path)
    vars(config).pop("_model_name_or_path", None)
    config.save_pretrained(directory)
    return config


def _meta_model(directory: Path) -> Any:
    from ..architecture import meta_model

    return meta_model(directory)
