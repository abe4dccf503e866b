"""Task bundles in repositories of the Hub: publish one, fetch one, list those of a repository, search by base.

What travels, and how the Hub's errors are told, is the business of :mod:`lowbit_format.hub`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import hub
from ..errors import FormatError, HubError
from ..schema import is_sha256
from .bundle import CARD_FILE, SCALES_FILE, StoredBundle, read_stored_bundle
from .bundle_config import TASK_CONFIG_FILE, TaskConfig, read_task_config

if TYPE_CHECKING:
    from ..hub import Token

TASK_TAG = "lowbit-task"
TAGS = ("lowbit", TASK_TAG, "lowbit-format")

_OWN_CARD = "<!-- written by lowbit-format: edit freely, and take this line out to keep it as it is -->"


@dataclass(frozen=True)
class TaskInfo:
    """A task that a repository or directory holds.

    Attributes:
        source: id of the repository, or the directory that was searched.
        revision: commit of the repository; None for a directory.
        subfolder: where in `source` the bundle lies; None for its root.
        config: base, method and precision.
        nbytes: size of the file of scales.
    """

    source: str
    revision: str | None
    subfolder: str | None
    config: TaskConfig
    nbytes: int


TaskRepository = hub.Found


def push_task(
    files: Mapping[str, Path | bytes],
    config: TaskConfig,
    repo_id: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    token: Token = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
) -> str:
    """Publish the files of a bundle that has been checked, in one commit.

    Args:
        files: the bundle's files by name, see :meth:`StoredBundle.files`.
        config: what :data:`TASK_CONFIG_FILE` among them says.
        repo_id: ``"user/name"``, or ``"name"`` in the token's own namespace.
        subfolder: folder of the repository to put it into, such as ``"sst2"``: one repository can hold many tasks.
        revision, private, token, create_pr, tag: see :func:`lowbit_format.hub.commit_files`.
        commit_message: by default one that names the task.

    Returns:
        The URL of the commit, or of the pull request.

    Raises:
        HubError: the Hub refused, could not be reached, or somebody else pushed in the meantime.
    """
    subfolder = hub.check_subfolder(subfolder)
    return hub.commit_files(
        files,
        repo_id,
        message=commit_message or f"Task {subfolder or repo_id.split('/')[-1]} ({config.method})"[:100],
        folder=subfolder,
        root_card=None if subfolder is None else lambda old: _root_card(old, config),
        revision=revision,
        private=private,
        token=token,
        create_pr=create_pr,
        tag=tag,
    )


def fetch_task(
    repo_id: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: Token = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> StoredBundle:
    """A task bundle of the Hub, checked, all its files from one commit. They are in the cache and not to be changed.

    Args:
        repo_id: the repository.
        subfolder: where in the repository the bundle lies.
        revision, token, cache_dir, local_files_only, force_download: see :func:`lowbit_format.hub.download_files`.

    Raises:
        HubError: there is no such repository, revision or bundle, or it cannot be had.
        FormatError: what came is no valid bundle, or damaged (DigestError; get it again with `force_download`).
    """
    subfolder = hub.check_subfolder(subfolder)
    root = hub.download_files(
        (TASK_CONFIG_FILE, SCALES_FILE, CARD_FILE),
        repo_id,
        folder=subfolder,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        force_download=force_download,
    )
    directory = root / (subfolder or "")
    if not all((directory / name).is_file() for name in (TASK_CONFIG_FILE, SCALES_FILE)):
        where = hub.place_of(repo_id, revision, subfolder)
        if local_files_only:
            raise HubError(f"{where}: the cache holds no whole task there; fetch it once from the Hub")
        found = _task_folders(hub.list_files(repo_id, revision=root.name, token=token).sizes)
        names = ", ".join(repr(folder) if folder else "the root" for folder in sorted(found))
        advice = f"it has tasks in: {names[:500]}; choose one by subfolder" if names else "nor anywhere else in it"
        raise HubError(f"{where}: has no task there ({TASK_CONFIG_FILE} and {SCALES_FILE}); {advice}")
    return read_stored_bundle(directory)


def find_tasks(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: Token = None,
    on_error: Callable[[str | None, FormatError], None] | None = None,
) -> tuple[TaskInfo, ...]:
    """The tasks that a directory or a repository of the Hub holds, in its root and below, by subfolder.

    Only configurations are read.

    Args:
        source: directory, or Hub id.
        revision: branch, tag or commit on the Hub.
        token: of the Hub; by default the saved one.
        on_error: called with the subfolder of each ill-formed configuration and its error; by default that is raised.

    Raises:
        HubError: as for :func:`fetch_task`. FormatError: an ill-formed configuration, without `on_error`.
    """
    return tuple(_read_infos(source, revision, token, on_error))


def search_tasks(
    *, base: str | None = None, author: str | None = None, token: Token = None, limit: int = 100
) -> tuple[TaskRepository, ...]:
    """Repositories of the Hub whose card says that they hold tasks.

    Args:
        base: the base they belong to: its fingerprint, which finds them whatever the base is called, or its Hub id.
        author: user or organization.
        token: of the Hub; with one, private repositories of its owner are found too.
        limit: at most so many.

    Raises HubError where the Hub does not answer, or `base` is neither.
    """
    tags = [TASK_TAG]
    if base is not None and is_sha256(base):
        tags.append(base_tag(base))
    elif base is not None and hub.looks_like_id(base):
        tags.append(f"base_model:{base}")
    elif base is not None:
        raise HubError(f"{base!r} is neither a fingerprint (64 hexadecimal digits) nor the id of a Hub repository")
    return hub.search_models(tags, author=author, token=token, limit=limit)


def base_tag(fingerprint: str) -> str:
    """The tag that the cards of all tasks of one base carry, whatever its repository is called."""
    return f"lowbit-base-{fingerprint[:16]}"


def _read_infos(
    source: str | os.PathLike[str],
    revision: str | None,
    token: Token,
    on_error: Callable[[str | None, FormatError], None] | None,
) -> Iterator[TaskInfo]:
    root, name, commit = Path(source), os.fspath(source), None
    if root.is_dir():
        sizes: Mapping[str, int] = {
            p.relative_to(root).as_posix(): p.stat().st_size for p in root.rglob("*") if p.is_file()
        }
    else:
        listing = hub.list_files(name, revision=revision, token=token)
        sizes, commit = listing.sizes, listing.commit
    for folder, scales in sorted(_task_folders(sizes).items()):
        if commit is None:
            directory = root / folder
        else:
            directory = hub.download_file(hub.path_in(folder, TASK_CONFIG_FILE), name, commit, token).parent
        try:
            config = read_task_config(directory)
        except FormatError as e:
            if on_error is None:
                raise
            on_error(folder or None, e)
        else:
            yield TaskInfo(name, commit, folder or None, config, sizes[scales])


def _task_folders(sizes: Mapping[str, int]) -> dict[str, str]:
    """Folders (the root is ``""``) with a configuration, each with the path of its scales; `sizes` by path."""
    folders = (path.rpartition("/")[0] for path in sizes if path.rpartition("/")[2] == TASK_CONFIG_FILE)
    scales = {folder: hub.path_in(folder, SCALES_FILE) for folder in folders if hub.is_plain_folder(folder)}
    return {folder: path for folder, path in scales.items() if path in sizes}


def _root_card(old: str | None, config: TaskConfig) -> str | None:
    """Front matter by which the Hub finds the tasks in subfolders; None where the owner's own card stands there."""
    if old is not None and _OWN_CARD not in old:
        return None
    tags = {base_tag(config.base_fingerprint), *re.findall(r"^- (lowbit-base-[0-9a-f]{16})$", old or "", re.MULTILINE)}
    bases = {entry for entry in re.findall(r"^- (\S+/\S+)$", old or "", re.MULTILINE) if hub.looks_like_id(entry)}
    if config.base_model_name_or_path is not None and hub.is_hub_id(config.base_model_name_or_path):
        bases.add(config.base_model_name_or_path)
    front = ["library_name: lowbit-format", "tags:", *(f"- {tag}" for tag in (*TAGS, *sorted(tags)))]
    if bases:
        front += ["base_model:", *(f"- {base}" for base in sorted(bases)), "base_model_relation: adapter"]
    return "\n".join(["---", *front, "---", _OWN_CARD, "", _ROOT_TEXT])


_ROOT_TEXT = f"""# Tasks

Each subfolder with a `{TASK_CONFIG_FILE}` is a task bundle of lowbit-format: a base's scales, tuned for one task.
Its own `{CARD_FILE}` says which base it belongs to and how to load it.
"""
