"""Checkpoints: a directory or a Hub id; safetensors, sharded or not, old PyTorch files; GGUF files."""

from __future__ import annotations

import difflib
import glob
import json
import logging
import re
import shutil
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..container.header import read_header
from ..errors import FormatError, SourceError
from ..hub import Listing
from ..schema import QUANT_METHOD
from ..tasks.bundle_config import TASK_CONFIG_FILE
from .gguf.parts import models_in
from .side import PICKLES, PYTORCH, SAFETENSORS, sort_files
from .source import Source, identity_of, placed_tensors, read_range
from .streamed import StreamedSource

log = logging.getLogger(__name__)


def open_checkpoint(
    source: str, *, revision: str | None = None, leave_out: Iterable[str] = (), stream: bool | None = None
) -> Source:
    """Open SOURCE for reading: an existing directory, or a repository on the Hub, without the files `leave_out` there.

    A GGUF file, or a directory that holds one and no other model, is read too.

    Args:
        source: the directory, or the repository's id.
        revision: branch, tag or commit on the Hub.
        leave_out: patterns of files beside the weights that are not wanted.
        stream: fetch weights when they are read, and do not keep their files; None: where they do not fit the disk.

    Raises:
        SourceError: it is neither, or its files are missing or ill-formed.
        HubError: the headers of streamed files cannot be had.
    """
    directory, listing = Path(source), None
    if (file := _gguf_file(directory)) is not None:
        if revision is not None or stream:
            raise SourceError(f"{source}: is a file on this machine; leave --revision and --stream out")
        from .gguf.checkpoint import open_gguf  # a leaf that imports torch and gguf

        return open_gguf(file)
    _check_local(directory, source)
    if not directory.is_dir():
        directory, listing = _download(source, revision, leave_out, stream)
        _check_local(directory, source)
        if listing is not None:
            return StreamedSource(directory, _weight_files(directory, listing.sizes), source, listing)
        return _open_files(directory, source, directory.name)  # the commit that a branch or tag was resolved to
    if revision is not None:
        raise SourceError(f"{source}: is a directory, which has no revisions; leave --revision out")
    if stream:
        raise SourceError(f"{source}: is a directory on this machine, not a repository; leave --stream out")
    return _open_files(directory, None, None)


def _open_files(directory: Path, repo_id: str | None, revision: str | None) -> Source:
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
        self.files = (*files, f"{SAFETENSORS}.index.json")
        try:
            headers = {file: read_header(directory / file) for file in files}
        except FormatError as e:
            raise SourceError(f"cannot read the checkpoint: {e}") from e
        self.tensors, self._place = placed_tensors(headers, files, directory)
        self.identity = identity_of(directory, files, repo_id, revision)

    def read(self, name: str, begin: int = 0, nbytes: int | None = None) -> NDArray[np.uint8]:
        file, place = self._place[name]
        whole = self.tensors[name].nbytes - begin
        return read_range(self.directory / file, place + begin, whole if nbytes is None else nbytes, name)


def read_model_config(directory: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{path}: is missing; SOURCE must be a Hugging Face model directory") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
        raise SourceError(f"{path}: is not valid JSON: {e}") from e
    if not isinstance(config, dict):
        raise SourceError(f"{path}: is not a JSON object")
    return _without_empty(config)


def quantized_by(config: dict[str, Any], directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The ``quantization_config`` of a release that is quantized already, and its config without; empty if it is not.

    Some have it in the config of a part, such as ``text_config``. Raises SourceError for a lowbit model.
    """
    path = directory / "config.json"
    places = [config, *(part for part in config.values() if isinstance(part, dict))]
    sections = [place[key] for key in _SECTIONS for place in places if place.get(key)]
    if not sections:
        return {}, config
    section = sections[0]
    if not isinstance(section, dict):
        raise SourceError(f"{path}: quantization_config is {type(section).__name__}, expected an object")
    method = section.get("quant_method")
    if method == QUANT_METHOD:
        raise SourceError(
            f"{path}: the checkpoint is quantized already (quant_method {method!r}); convert the original, or run "
            "`lowbit dequantize` first"
        )
    if any(other != section for other in sections):
        raise SourceError(
            f"{path}: has several sections that say how it is quantized, which differ; leave the one that is true"
        )
    return section, _without(config, _SECTIONS)


_SECTIONS = ("quantization_config", "compression_config")  # the second of older releases of compressed-tensors


def _without(config: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """The config without some keys, its own and those of its parts."""
    kept = {key: value for key, value in config.items() if key not in keys}
    return {key: _without(value, keys) if isinstance(value, dict) else value for key, value in kept.items()}


def _without_empty(config: dict[str, Any]) -> dict[str, Any]:
    """The config without an empty ``quantization_config``, its own and those of its parts: the weights are floats."""
    kept = {key: value for key, value in config.items() if key != "quantization_config" or value}
    return {key: _without_empty(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _check_local(place: Path, source: str) -> None:
    """Raise SourceError if `place` exists and is no checkpoint; the message says what it is and what to do."""
    if place.is_file():
        if place.name.endswith((".safetensors", *PICKLES, ".index.json", "config.json")):
            advice = f"is a file; SOURCE is the directory of the model: {place.parent}"
        else:
            advice = "is a file, expected the directory of a Hugging Face model"
        raise SourceError(f"{source}: {advice}")
    if not place.is_dir() or (place / "config.json").is_file():
        return
    if (place / TASK_CONFIG_FILE).is_file():
        raise SourceError(f"{source}: is a task bundle, not a model; look at it with `lowbit task inspect`")
    below = [f.parent for depth in ("*", "*/*") for f in sorted(place.glob(f"{depth}/config.json")) if _is_whole(f)]
    if below:
        more = f" (or another of the {len(below)} there)" if len(below) > 1 else ""
        raise SourceError(f"{source}: holds no model itself, but {below[0]} does{more}; give that as SOURCE")
    if advice := _instead([f.name for f in sorted(place.iterdir())], place):
        raise SourceError(f"{source}: {advice}")


def _is_whole(config: Path) -> bool:
    """Whether a ``config.json`` is that of a model, and not of a layer behind it."""
    try:
        return "model_type" in json.loads(config.read_text("utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def _instead(names: list[str], place: Path) -> str:
    """What files of these names are, if no checkpoint to convert, and what to do with them; empty if unknown."""
    if "adapter_config.json" in names:
        return (
            "is an adapter (PEFT), not a whole model; load its base with transformers, attach the adapter, call "
            "merge_and_unload() and save_pretrained(), and convert that directory"
        )
    if gguf := [name for name in names if name.endswith(".gguf")]:
        how = f"give that file as SOURCE: {place / gguf[0]}"
        if not place.is_dir():
            how = f"download one (hf download {place} {gguf[0]} --local-dir DIR) and give it as SOURCE: DIR/{gguf[0]}"
        return f"holds {len(gguf)} GGUF file{'s' * (len(gguf) > 1)}; {how}"
    if "model_index.json" in names:
        return "is a pipeline of several models (diffusers); give the folder of one that transformers loads as SOURCE"
    other = [name for name in names if name.endswith((".h5", ".msgpack", ".ot", ".onnx", ".tflite"))]
    if other:
        return (
            f"holds weights of another framework only ({other[0]}); get the checkpoint with {SAFETENSORS}, or save it "
            "as that from its own framework"
        )
    own = (SAFETENSORS, PYTORCH)
    if strange := [name for name in names if name.endswith((".safetensors", *PICKLES)) and name not in own]:
        return (
            f"holds weights under other names only, such as {strange[0]}; the model's own are read from {SAFETENSORS} "
            f"or {PYTORCH}, or from the shards of an index: rename the file if it holds the whole model"
        )
    return ""


def _gguf_file(place: Path) -> Path | None:
    """The GGUF file at `place`, or in a directory that holds one and no other model; None if there is none.

    Raises SourceError if there are several to choose from.
    """
    if place.is_file():
        return place if place.suffix == ".gguf" else None
    if not place.is_dir() or (place / "config.json").is_file():
        return None
    files = list(models_in(place))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise SourceError(f"{place}: holds several GGUF files ({names}); give one of them as SOURCE")
    return files[0] if files else None


def _not_here(source: str) -> str:
    """A message: there is no such directory, and which one beside it has a similar name."""
    place = Path(source).expanduser()
    if not place.parent.is_dir() or place.parent == Path("."):
        return f"{source}: no such directory"
    names = [entry.name for entry in place.parent.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    near = difflib.get_close_matches(place.name, sorted(names), 1)
    return f"{source}: no such directory" + (f" (did you mean {place.parent / near[0]}?)" if near else "")


def _weight_files(directory: Path, there: Container[str] | None = None) -> dict[str, list[str]]:
    """Names of the weight files, safetensors first, with the tensors that an index puts into each.

    `there` are the files of the repository, where those of the weights are not in the directory.
    """
    for single in (SAFETENSORS, PYTORCH):
        if (directory / single).is_file() if there is None else single in there:
            return {single: []}
        index = directory / f"{single}.index.json"
        if index.is_file():
            return _indexed_files(index, there)
    names = [f.name for f in sorted(directory.iterdir())]
    what = _instead(names, directory)
    raise SourceError(
        f"{directory}: has neither {SAFETENSORS} nor {PYTORCH}, nor an index of either"
        + (f"; it {what}" if what else "")
    )


def _indexed_files(index: Path, there: Container[str] | None) -> dict[str, list[str]]:
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
        if not ((index.parent / file).is_file() if there is None else file in there):
            what = "the download is incomplete" if there is None else "the repository lacks it"
            raise SourceError(f"{index}: the shard {file} is missing; {what}")
    for name, file in weight_map.items():
        files[file].append(name)
    return files


def _download(
    repo_id: str, revision: str | None, leave_out: Iterable[str], stream: bool | None
) -> tuple[Path, Listing | None]:
    """The repository's files in the local cache, those that a conversion reads or carries over.

    Where weights are to be streamed theirs are not among them, and the listing of the commit is given.
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if repo_id.startswith((".", "/", "~")):
        raise SourceError(_not_here(repo_id))
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo_id):
        raise SourceError(f"{_not_here(repo_id)}, and not the id of a Hub repository")
    try:
        try:
            info = hub.HfApi().model_info(repo_id, revision=revision, files_metadata=True)
        except (HfHubHTTPError, HFValidationError):
            raise
        except Exception as e:  # the Hub cannot be reached (each HTTP client has its own errors): use the cache
            try:
                return Path(hub.snapshot_download(repo_id, revision=revision, local_files_only=True)), None
            except LocalEntryNotFoundError:
                raise OSError(str(e)) from e
        names, listing = [sibling.rfilename for sibling in info.siblings or ()], Listing.of(info)
        wanted = _wanted(repo_id, listing.commit, names, leave_out)
        weights = [name for name in wanted if _OWN[0].fullmatch(name) and name.endswith(".safetensors")]
        if stream and not weights:
            raise SourceError(
                f"{repo_id}: has its weights in {PYTORCH} only, and a pickle cannot be read in parts; leave "
                "--stream out"
            )
        streamed = bool(weights) and (_is_short(repo_id, weights, listing) if stream is None else stream)
        patterns = [glob.escape(name) for name in wanted if not streamed or name not in weights]
        directory = Path(hub.snapshot_download(repo_id, revision=listing.commit, allow_patterns=patterns))
        return directory, listing if streamed else None
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
        at = f" at revision {revision}" if revision else ""
        raise SourceError(f"{_not_here(repo_id)}, and not to be had from the Hub{at}: {e}") from e


def _is_short(repo_id: str, weights: list[str], listing: Listing) -> bool:
    """Whether the disk of the Hub's cache has no room for those of the weight files that it does not hold; says so."""
    from huggingface_hub import constants, try_to_load_from_cache

    cached = {name for name in weights if try_to_load_from_cache(repo_id, name, revision=listing.commit)}
    needed = sum(listing.sizes.get(name, 0) for name in weights if name not in cached)
    cache = Path(constants.HF_HUB_CACHE).absolute()
    place = next(parent for parent in (cache, *cache.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        log.warning(
            "%s: its weights take %.1f GB, and the disk of the Hub's cache (%s) has %.1f GB left: they are streamed, "
            "and their files are not kept (--no-stream: try to download them)",
            repo_id, needed / 1e9, cache, free / 1e9,
        )  # fmt: skip
    return needed > free


def _wanted(repo_id: str, commit: str, names: list[str], leave_out: Iterable[str]) -> list[str]:
    """Those of the files of a repository that a conversion reads or carries over.

    Raises SourceError if it is no checkpoint, or has files that a conversion would lose.
    """
    import huggingface_hub as hub

    def read(name: str) -> Any:
        if name not in names:
            return None
        return json.loads(Path(hub.hf_hub_download(repo_id, name, revision=commit)).read_text("utf-8"))

    top = [name for name in names if "/" not in name]
    if "config.json" not in names:
        below = [name.rpartition("/")[0] for name in names if name.endswith("/config.json")]
        what = _instead(top, Path(repo_id))
        if below and not what:
            what = f"holds no model itself, but its folder {below[0]} does; download it and give the folder as SOURCE"
        raise SourceError(f"{repo_id}: {what or 'has no config.json, and is no Hugging Face model'}")
    own: list[str] = next(filter(None, ([n for n in top if kind.fullmatch(n)] for kind in _OWN)), [])
    if not own:
        what = _instead(top, Path(repo_id))
        raise SourceError(
            f"{repo_id}: has neither {SAFETENSORS} nor {PYTORCH}, nor an index of either"
            + (f"; it {what}" if what else "")
        )
    try:
        found = sort_files(names, own, read, leave_out)
    except ValueError as e:
        raise SourceError(f"{repo_id}: has a file of settings that is not valid JSON: {e}") from e
    found.refuse_loss(repo_id)
    beside = ["config.json", "README.md"] if "README.md" in names else ["config.json"]
    return [*beside, *own, *found.copied, *found.without_code, *found.converted]


_OWN = (  # the files of a checkpoint's own weights, those that are taken first
    re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"),
    re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?"),
)
