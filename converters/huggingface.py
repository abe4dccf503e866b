"""Hugging Face checkpoints: a directory or a Hub id; safetensors, sharded or not, and old PyTorch files."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..container.header import Header, read_header
from ..errors import FormatError, SourceError
from ..tasks.bundle_config import TASK_CONFIG_FILE
from .source import Source, SourceTensor, check_index, file_identity

SAFETENSORS = "model.safetensors"
PYTORCH = "pytorch_model.bin"

# Weights in any framework's format; everything else of a checkpoint is a side file.
WEIGHT_SUFFIXES = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".h5", ".msgpack",
    ".onnx", ".onnx_data", ".gguf", ".ot", ".tflite", ".mlmodel", ".npz",
)  # fmt: skip
# Never carried over: code is not run from a model directory, so it has no place in one either (DIR-5).
CODE_SUFFIXES = (".py", ".pyc", ".so", ".pkl", ".pickle")


def open_checkpoint(source: str, *, revision: str | None = None) -> Source:
    """Open SOURCE for reading: an existing directory, or a repository on the Hub.

    Raises:
        SourceError: it is neither, or its files are missing or ill-formed.
    """
    directory, repo_id = Path(source), None
    _check_local(directory, source)
    if not directory.is_dir():
        directory, repo_id = _download(source, revision), source
        revision = directory.name  # the commit that a branch or tag was resolved to
    elif revision is not None:
        raise SourceError(f"{source}: is a directory, which has no revisions; leave --revision out")
    files = _weight_files(directory)
    if next(iter(files)).endswith(".safetensors"):
        return SafetensorsSource(directory, files, repo_id, revision)
    from .pytorch import PytorchSource  # a leaf that imports torch

    return PytorchSource(directory, files, repo_id, revision)


class SafetensorsSource:
    """Safetensors files, read by byte range: nothing stays in memory between two reads.

    `files` maps their names to the tensors that an index puts into them.
    """

    def __init__(self, directory: Path, files: dict[str, list[str]], repo_id: str | None, revision: str | None) -> None:
        self.directory, self.repo_id, self.revision = directory, repo_id, revision
        headers: dict[str, Header] = {}
        for file in files:
            try:
                headers[file] = read_header(directory / file)
            except FormatError as e:
                raise SourceError(f"cannot read the checkpoint: {e}") from e
            check_index(directory / file, files[file], headers[file].tensors)
        self._place: dict[str, tuple[Path, int]] = {}
        self.tensors: dict[str, SourceTensor] = {}
        for file, header in headers.items():
            for t in header.tensors.values():
                if t.name in self.tensors:
                    raise SourceError(f"{directory / file}: tensor {t.name!r} stands in another shard too")
                self.tensors[t.name] = SourceTensor(t.name, t.dtype, t.shape, t.nbytes)
                self._place[t.name] = (directory / file, t.begin)
        self.identity = file_identity([directory / f for f in files])

    def read(self, name: str) -> NDArray[np.uint8]:
        path, begin = self._place[name]
        out = np.empty(self.tensors[name].nbytes, np.uint8)
        try:
            with open(path, "rb", buffering=0) as f:
                f.seek(begin)
                done = 0
                while done < len(out):  # one read call gives at most 2 GiB
                    n = f.readinto(out[done:].data)
                    if not n:
                        raise SourceError(f"{path}: ends inside tensor {name!r}; it changed while it was read")
                    done += n
        except OSError as e:
            raise SourceError(f"{path}: cannot be read: {e.strerror}") from e
        return out


def read_model_config(directory: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint that is not quantized yet."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{path}: is missing; SOURCE must be a Hugging Face model directory") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
        raise SourceError(f"{path}: is not valid JSON: {e}") from e
    if not isinstance(config, dict):
        raise SourceError(f"{path}: is not a JSON object")
    if "quantization_config" in config:
        found = config["quantization_config"]
        method = found.get("quant_method") if isinstance(found, dict) else None
        raise SourceError(
            f"{path}: the checkpoint is quantized already (quant_method {method!r}); convert the original, "
            + ("or run `lowbit dequantize` first" if method == "lowbit" else "or dequantize it first")
        )
    return config


def side_files(directory: Path) -> list[Path]:
    """Files to carry over (tokenizer, generation config, …), relative to `directory`, sorted."""
    found = []
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory)
        if any(part.startswith(".") for part in relative.parts) or not path.is_file():
            continue
        at_top = len(relative.parts) == 1
        # A subfolder's safetensors belong to a part of their own, such as a layer behind a sentence encoder.
        part_of_its_own = not at_top and relative.name.endswith(".safetensors")
        if relative.name.endswith((*WEIGHT_SUFFIXES, *CODE_SUFFIXES)) and not part_of_its_own:
            continue
        if str(relative) in ("config.json", "README.md"):
            continue
        found.append(relative)
    return found


def _check_local(place: Path, source: str) -> None:
    """Raise SourceError for what is on this machine and is not a checkpoint: it says what it is and what to do."""
    if place.is_file():
        if place.suffix == ".gguf":
            advice = (
                "is a GGUF file, which is quantized already; convert the float checkpoint that it was made from, or "
                f"load it with transformers, from_pretrained({str(place.parent)!r}, gguf_file={place.name!r}), save it "
                "with save_pretrained and convert that directory"
            )
        elif place.name.endswith((*WEIGHT_SUFFIXES, "config.json")):
            advice = f"is a file; SOURCE is the directory of the model: {place.parent}"
        else:
            advice = "is a file, expected the directory of a Hugging Face model"
        raise SourceError(f"{source}: {advice}")
    if not place.is_dir() or (place / "config.json").is_file():
        return
    if (place / "adapter_config.json").is_file():
        raise SourceError(
            f"{source}: is an adapter (PEFT), not a whole model; load its base with transformers, attach the adapter, "
            "call merge_and_unload() and save_pretrained(), and convert that directory"
        )
    if (place / TASK_CONFIG_FILE).is_file():
        raise SourceError(f"{source}: is a task bundle, not a model; look at it with `lowbit task inspect`")
    if below := [folder for folder in sorted(place.iterdir()) if (folder / "config.json").is_file()]:
        more = f" (or another of the {len(below)} there)" if len(below) > 1 else ""
        raise SourceError(f"{source}: holds no model itself, but {below[0]} does{more}; give that as SOURCE")
    if gguf := sorted(place.glob("*.gguf")):
        _check_local(gguf[0], str(gguf[0]))


def _not_here(source: str) -> str:
    """That there is no such directory, and which one beside it has a name like this."""
    place = Path(source).expanduser()
    if not place.parent.is_dir() or place.parent == Path("."):
        return f"{source}: no such directory"
    names = [entry.name for entry in place.parent.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    near = difflib.get_close_matches(place.name, sorted(names), 1)
    return f"{source}: no such directory" + (f" (did you mean {place.parent / near[0]}?)" if near else "")


def _weight_files(directory: Path) -> dict[str, list[str]]:
    """Names of the weight files, safetensors first, with the tensors that an index puts into each."""
    for single in (SAFETENSORS, PYTORCH):
        if (directory / single).is_file():
            return {single: []}
        index = directory / f"{single}.index.json"
        if index.is_file():
            return _indexed_files(index)
    raise SourceError(f"{directory}: has neither {SAFETENSORS} nor {PYTORCH}, nor an index of either")


def _indexed_files(index: Path) -> dict[str, list[str]]:
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        files: dict[str, list[str]] = {file: [] for file in weight_map.values()}
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as e:
        raise SourceError(f"{index}: is not an index with a weight_map: {e!r}") from e
    if not files:
        raise SourceError(f"{index}: names no files")
    for file in files:
        if not isinstance(file, str) or not re.fullmatch(r"[^./\\][^/\\]*", file):
            raise SourceError(f"{index}: file name {file!r} is not a plain name")
        if not (index.parent / file).is_file():
            raise SourceError(f"{index}: the shard {file} is missing; the download is incomplete")
    for name, file in weight_map.items():
        files[file].append(name)
    return files


def _download(repo_id: str, revision: str | None) -> Path:
    """The repository's files in the local cache; PyTorch files only where there is no safetensors."""
    import huggingface_hub as hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if repo_id.startswith((".", "/", "~")):
        raise SourceError(_not_here(repo_id))
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo_id):
        raise SourceError(f"{_not_here(repo_id)}, and not the id of a Hub repository")
    unwanted = ["*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.gguf", "*.ot", "*.py", "*.pt", "*.pth", "*.ckpt"]
    try:
        path = Path(hub.snapshot_download(repo_id, revision=revision, ignore_patterns=[*unwanted, "*.bin"]))
        if not any(path.glob("*.safetensors")):  # of the same commit, which names the folder
            path = Path(hub.snapshot_download(repo_id, revision=path.name, ignore_patterns=unwanted))
        return path
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
        at = f" at revision {revision}" if revision else ""
        raise SourceError(f"{_not_here(repo_id)}, and not to be had from the Hub{at}: {e}") from e
