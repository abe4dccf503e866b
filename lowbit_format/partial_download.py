"""One precision of a model on the Hub, fetched by ranges into a model directory of the cache.

The Hub's cache gets the config and the files beside the weights, as always. The weights of precision k are written to
``lowbit/COMMIT/k-bits/model`` in the repository's folder of that cache: an ordinary lowbit model.
"""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from .container.atomic import atomic_directory, disk_errors, write_json
from .container.fingerprint import Identity
from .container.header import Header
from .container.reader import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, ModelReader
from .errors import FormatError, HubError
from .hub import Listing, download_files, list_files, place_of
from .integrations.quantizer import Origin
from .precision import Verified, comes_along, copy_precision, pieces
from .remote import RemoteFiles
from .schema import QuantizationConfig

if TYPE_CHECKING:
    from .hub import Token

log = logging.getLogger(__name__)

MODEL, FACTS = "model", "fetched.json"  # in the folder of a precision


@dataclass(frozen=True)
class Fetched:
    """A directory with one precision of a model on the Hub.

    Attributes:
        directory: a lowbit model, of at most `bits` bits. Not to be changed.
        repo_id, commit: where it is from.
        bits: the precision.
        nbytes: bytes of weight files that were fetched for it; 0 if it was in the cache.
        requests: ranges that were asked for.
        total: bytes of all weight files there.
        verified: of its tensors, those that have a digest and all their bytes. Planes that were cut have none: that
            their bytes are right rests on the sizes and ETags of the files.
        origin: the base on the Hub, for tasks; None if its files lack digests, by which alone it would be known.
    """

    directory: Path
    repo_id: str
    commit: str
    bits: int
    nbytes: int
    requests: int
    total: int
    verified: Verified
    origin: Origin | None


class RemoteReader(ModelReader):
    """A model whose config and index are in `directory`, and whose weights are on the Hub; checked when it is opened.

    Raises FormatError, one of its subclasses, and HubError.

    Attributes:
        files: those on the Hub.
    """

    def __init__(self, directory: Path, files: RemoteFiles) -> None:
        self.files = files
        self._row_bits_of = dict[str, NDArray[np.uint8] | None]()
        super().__init__(directory)

    def _header(self, file: str) -> Header | None:
        return self.files.read_header(file) if file in self.files.listing.sizes else None

    def row_bits(self, path: str) -> NDArray[np.uint8] | None:
        """As of any model; fetched once."""
        if path not in self._row_bits_of:
            self._row_bits_of[path] = super().row_bits(path)
        return self._row_bits_of[path]

    def ranges(self, file: str, ranges: Sequence[tuple[int, int]]) -> Iterator[NDArray[np.uint8]]:
        return self.files.read_all(file, ranges)


def fetch_precision(
    repo_id: str,
    bits: int,
    *,
    revision: str | None = None,
    token: Token = None,
    cache_dir: str | os.PathLike[str] | None = None,
    force_download: bool = False,
) -> Fetched:
    """Fetch one precision of a lowbit model on the Hub: of each matrix its first `bits` planes (BIT-4).

    Args:
        repo_id: the repository.
        bits: the precision; the model needs parameters for it (``--nested``), as for ``from_pretrained(bits=…)``.
        revision: branch, tag or commit; the main branch by default.
        token: of the Hub; by default the saved one.
        cache_dir: by default that of huggingface_hub.
        force_download: fetch it again, whatever the cache holds.

    Returns:
        The directory, and what it cost.

    Raises:
        HubError: the repository cannot be had, or changed in between; nothing is left behind.
        FormatError: it is no lowbit model, or is damaged; PrecisionError: it does not have this precision.
    """
    listing = list_files(repo_id, revision=revision, token=token)
    found = _fetched(repo_id, listing, bits, token, cache_dir, force_download)
    _remember(repo_id, revision, listing.commit, cache_dir)
    return found


def find_part(
    repo_id: str,
    bits: int,
    *,
    revision: str | None = None,
    token: Token = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Fetched | None:
    """As :func:`fetch_precision`; None where the whole model is at hand. Without the Hub, what the cache has serves."""
    try:
        if local_files_only:
            raise HubError(f"{place_of(repo_id, revision, None)}: is to be loaded from the cache alone")
        listing = list_files(repo_id, revision=revision, token=token)
    except HubError:
        commit = _commit_in_cache(repo_id, revision, cache_dir)
        found = commit and _recorded(_place(repo_id, commit, bits, cache_dir))
        if found:
            return found
        if local_files_only or commit:  # transformers finds the whole model there, or says what is amiss
            return None
        raise
    if not force_download and _whole_in_cache(repo_id, listing, cache_dir):
        return None
    found = _fetched(repo_id, listing, bits, token, cache_dir, force_download)
    _remember(repo_id, revision, listing.commit, cache_dir)
    return found


def _fetched(
    repo_id: str,
    listing: Listing,
    bits: int,
    token: Token,
    cache_dir: str | os.PathLike[str] | None,
    again: bool,
) -> Fetched:
    place = _place(repo_id, listing.commit, bits, cache_dir)
    if not again and (there := _recorded(place)) is not None:
        return there
    reader = open_remote(repo_id, listing, token=token, cache_dir=cache_dir)
    pieces(reader, bits)  # raises before anything is made
    origin, traffic = _origin(reader, bits), reader.files.traffic
    total = sum(listing.sizes[file] for file in reader.headers)
    with _locked(place):
        if not again and (there := _recorded(place)) is not None:  # another process has fetched it meanwhile
            return there
        new = place.with_name(f"{place.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        with progress(reader, bits) as bar, atomic_directory(new) as work:
            verified = copy_precision(reader, bits, work / MODEL, report=bar.update)
            found = Fetched(
                place / MODEL, repo_id, listing.commit, bits, traffic.nbytes, traffic.requests, total, verified, origin
            )
            _record(found, work / FACTS)
        shutil.rmtree(place, ignore_errors=True)
        with disk_errors(place):
            new.replace(place)
    log.info(
        "%s at %d bits: fetched %s, of %.1f MB in all; the digests of %d of %d tensors agree, cut planes have none",
        repo_id, bits, traffic, total / 1e6, verified.agreed, verified.tensors,
    )  # fmt: skip
    return found


def open_remote(
    repo_id: str, listing: Listing, *, token: Token = None, cache_dir: str | os.PathLike[str] | None = None
) -> RemoteReader:
    """Open the model of a commit; its files beside the weights are then in the cache.

    Raises FormatError, one of its subclasses, and HubError.
    """

    def downloaded(names: Iterable[str]) -> Path:
        patterns = [glob.escape(name) for name in names]
        return download_files(patterns, repo_id, revision=listing.commit, token=token, cache_dir=cache_dir)

    reader = RemoteReader(downloaded([CONFIG_FILE, INDEX_FILE]), RemoteFiles(repo_id, listing, token=token))
    if beside := [name for name in listing.sizes if comes_along(name, reader.headers)]:
        downloaded(beside)
    return reader


def progress(reader: RemoteReader, bits: int) -> Any:
    """A bar of huggingface_hub's, which counts the bytes that a precision is made from; its ``update`` takes some."""
    from huggingface_hub import utils

    hub: Any = utils  # which has no types
    most = max((m.scheme.bits for m in reader.config), default=bits)
    total = sum(piece.nbytes for some in pieces(reader, bits).values() for piece in some)
    return hub.tqdm(total=total, unit="B", unit_scale=True, desc=f"{reader.files.repo_id}, {bits} of {most} bits")


def _origin(reader: ModelReader, bits: int) -> Origin | None:
    """The whole base, by the digests of its headers (FPR-5)."""
    if any(reader.stored_digest(name) is None for name in reader.lowbit_names()):
        log.warning(
            "%s: its files have no digests (`lowbit verify --seal` writes them), so that tasks of this base cannot be "
            "told to fit its precision of %d bits alone; they need the whole model",
            reader.directory, bits,
        )  # fmt: skip
        return None
    return Origin(reader.identity(), bits)


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Let one process, or thread, after the other write to a place. The lock's file stays, as those of the Hub do."""
    from huggingface_hub import utils

    hub: Any = utils  # which has no types
    folder = place.parents[2]  # of the repository, in the cache
    lock = folder.parent / ".locks" / folder.name / f"lowbit-{place.parent.name}-{place.name}.lock"
    with disk_errors(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
    with hub.WeakFileLock(lock):
        yield


# --- the cache --------------------------------------------------------------------------------------


def _place(repo_id: str, commit: str, bits: int, cache_dir: str | os.PathLike[str] | None) -> Path:
    return _folder(repo_id, cache_dir) / "lowbit" / commit / f"{bits}-bits"


def _folder(repo_id: str, cache_dir: str | os.PathLike[str] | None) -> Path:
    """Of a repository in the cache."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(cache_dir or constants.HF_HUB_CACHE).absolute()
    return cache / repo_folder_name(repo_id=repo_id, repo_type="model")


def _remember(repo_id: str, revision: str | None, commit: str, cache_dir: str | os.PathLike[str] | None) -> None:
    """Write which commit a branch or tag is, for when the Hub cannot be asked."""
    file = _ref(repo_id, revision, cache_dir)
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(commit, "utf-8")


def _ref(repo_id: str, revision: str | None, cache_dir: str | os.PathLike[str] | None) -> Path:
    return _folder(repo_id, cache_dir) / "lowbit" / "refs" / quote(revision or "main", safe="")


def _commit_in_cache(repo_id: str, revision: str | None, cache_dir: str | os.PathLike[str] | None) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    with contextlib.suppress(OSError):
        return _ref(repo_id, revision, cache_dir).read_text("utf-8")
    config = try_to_load_from_cache(repo_id, CONFIG_FILE, cache_dir=_path(cache_dir), revision=revision)
    return Path(config).parent.name if isinstance(config, str) else None


def _whole_in_cache(repo_id: str, listing: Listing, cache_dir: str | os.PathLike[str] | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    def path_of(name: str) -> object:
        return try_to_load_from_cache(repo_id, name, cache_dir=_path(cache_dir), revision=listing.commit)

    if WEIGHTS_FILE in listing.sizes:
        return isinstance(path_of(WEIGHTS_FILE), str)
    shards = [name for name in listing.sizes if "/" not in name and name.endswith(".safetensors")]
    return all(isinstance(path_of(name), str) for name in (INDEX_FILE, *shards))


def _path(cache_dir: str | os.PathLike[str] | None) -> Path | None:
    return None if cache_dir is None else Path(cache_dir)


def _record(found: Fetched, file: Path) -> None:
    """Write what is known of a directory beside it: of what base it is a part, and what of it is verified."""
    origin = None
    if found.origin is not None:
        identity = found.origin.identity
        tensors = {name: [identity.digests[name], list(shape)] for name, shape in sorted(identity.shapes.items())}
        origin = {"quantization_config": identity.config.to_dict(), "tensors": tensors}
    write_json(
        file,
        {
            "repo_id": found.repo_id, "commit": found.commit, "bits": found.bits, "total": found.total,
            "tensors": found.verified.tensors, "agreed": found.verified.agreed, "origin": origin,
        },
    )  # fmt: skip


def _recorded(place: Path) -> Fetched | None:
    """What was fetched to a place before; None if nothing was, or what is there is damaged."""
    try:
        facts = json.loads((place / FACTS).read_text("utf-8"))
        origin, bits = None, facts["bits"]
        if (whole := facts["origin"]) is not None:
            digests = {name: digest for name, (digest, _) in whole["tensors"].items()}
            shapes = {name: tuple(shape) for name, (_, shape) in whole["tensors"].items()}
            config = QuantizationConfig.from_dict(whole["quantization_config"])
            origin = Origin(Identity(config, digests, shapes), bits)
        if not (place / MODEL / CONFIG_FILE).is_file():
            return None
        verified = Verified(facts["tensors"], facts["agreed"])
        return Fetched(place / MODEL, facts["repo_id"], facts["commit"], bits, 0, 0, facts["total"], verified, origin)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, FormatError):
        return None
