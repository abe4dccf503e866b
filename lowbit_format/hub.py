"""Task bundles on the Hub: publish one, fetch one, list those of a repository, search for those of a base.

Remote is local plus transport: huggingface_hub moves, caches and retries. A push is one commit on a known parent, and
a fetch comes from one commit, so that nothing is published or loaded by halves. What the Hub refuses is a HubError.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import HubError
from .tasks.bundle import CARD_FILE, SCALES_FILE, TASK_CONFIG_FILE, TaskConfig, read_bundle, read_task_config

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    Token = str | bool | None  # False sends none, True demands the one that `hf auth login` has saved

TASK_TAG = "lowbit-task"
TAGS = ("lowbit", TASK_TAG, "lowbit-format")

_OWN_CARD = "<!-- written by lowbit-format: edit freely, and take this line out to keep it as it is -->"
_PART = re.compile(r"\w[\w .+=@,-]*")  # of a subfolder: neither `..` nor hidden, and no sign that means a pattern
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_MAX_SAID = 300  # characters of the Hub's own words in a message


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


@dataclass(frozen=True)
class TaskRepository:
    """A repository with tasks, as :func:`search_tasks` finds it; `downloads` are the Hub's count, None if unknown."""

    repo_id: str
    tags: tuple[str, ...]
    private: bool
    downloads: int | None


def push_task_directory(
    directory: str | os.PathLike[str],
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
    """Publish a task bundle in one commit, which holds all of its files or does not happen.

    A repository or branch that is missing is made first, and stays (without the bundle) where the commit fails.

    Args:
        directory: the bundle; checked before anything is sent.
        repo_id: ``"user/name"``, or ``"name"`` in the token's own namespace.
        subfolder: folder of the repository to put it into, such as ``"sst2"``: one repository can hold many tasks.
        revision: branch to commit to, made from the main one where it is missing.
        private: for a repository that is made now; an existing public one is refused where this is True.
        token: of the Hub; by default the saved one.
        commit_message: by default one that names the task.
        create_pr: open a pull request instead of committing to the branch.
        tag: name for the new commit.

    Returns:
        The URL of the commit, or of the pull request.

    Raises:
        HubError: the Hub refused, could not be reached, or somebody else pushed in the meantime.
        FormatError: the directory holds no valid bundle.
    """
    from huggingface_hub import CommitOperationAdd

    directory, subfolder = Path(directory), check_subfolder(subfolder)
    config = read_bundle(directory).config
    if create_pr and tag is not None:
        raise HubError(f"{repo_id}: a pull request cannot be tagged; leave out the tag, and set it after the merge")
    where, api = _where(repo_id, revision, subfolder), _api(token)
    with _hub_errors(where, "Nothing was published"):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.repo_info(repo_id).private:
            raise HubError(f"{where}: is public already, but private=True; make it private on the Hub, then push")
        if tag is not None and any(t.name == tag for t in api.list_repo_refs(repo_id).tags):
            raise HubError(f"{where}: has the tag {tag!r} already; choose another. Nothing was published")
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        # The parent makes the Hub refuse a race. Without it the client, which leaves out files that have not changed,
        # could put our scales beside somebody else's configuration.
        parent = api.repo_info(repo_id, revision=revision).sha
        files: dict[str, Path | bytes] = {
            _path(subfolder, name): directory / name
            for name in (TASK_CONFIG_FILE, SCALES_FILE, CARD_FILE)
            if (directory / name).is_file()
        }
        if subfolder is not None and (card := _root_card(_read_card(api, repo_id, parent), config)) is not None:
            files[CARD_FILE] = card.encode()
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(path, content) for path, content in files.items()],
            commit_message=commit_message or f"Task {subfolder or repo_id.split('/')[-1]} ({config.method})"[:100],
            revision=revision,
            parent_commit=parent,
            create_pr=create_pr,
        )
    if tag is not None:
        with _hub_errors(where, f"The task itself was published as {commit.commit_url}; set the tag there"):
            api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return commit.pr_url or commit.commit_url


def push_model_directory(
    directory: str | os.PathLike[str],
    repo_id: str,
    *,
    card: str,
    commit_message: str,
    commit_description: str | None = None,
    private: bool | None = None,
    token: Token = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Publish all files of a model's directory in one commit; see :func:`push_task_directory` for most arguments.

    Args:
        card: text of ``README.md``, unless the repository has one already.

    Returns the URL of the commit, or of the pull request. Raises HubError.
    """
    where, api = _where(repo_id, revision, None), _api(token)
    with _hub_errors(where, "Nothing was published"):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if not api.file_exists(repo_id, CARD_FILE, revision=None if create_pr else revision):
            Path(directory, CARD_FILE).write_text(card, "utf-8", newline="\n")
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=Path(directory),
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
    return commit.pr_url or commit.commit_url


def fetch_task(
    repo_id: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: Token = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """A local directory with a task bundle of the Hub, checked, all its files from one commit.

    The directory is in the cache and not to be changed. Where the Hub cannot be reached, what it last gave for that
    revision serves again.

    Args:
        repo_id: the repository.
        revision: branch, tag or commit; the main branch by default.
        subfolder: where in the repository the bundle lies.
        token: of the Hub; by default the saved one.
        cache_dir: by default that of huggingface_hub.
        local_files_only: take it from the cache and do not ask the Hub.
        force_download: get it from the Hub again, whatever the cache holds.

    Raises:
        HubError: there is no such repository, revision or bundle, or it cannot be had.
        FormatError: what came is no valid bundle, or damaged (DigestError; get it again with `force_download`).
    """
    from huggingface_hub import snapshot_download

    subfolder = check_subfolder(subfolder)
    where, api = _where(repo_id, revision, subfolder), _api(token)
    if force_download and local_files_only:
        raise HubError(f"{where}: force_download and local_files_only exclude each other")
    with _hub_errors(where, "Nothing was loaded"):
        if force_download:
            api.repo_info(repo_id, revision=revision)  # where this fails, snapshot_download would turn to the cache
        snapshot = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=[_path(subfolder, name) for name in (TASK_CONFIG_FILE, SCALES_FILE, CARD_FILE)],
            token=token,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=local_files_only,
            force_download=force_download,
        )
    directory = Path(snapshot, subfolder or "")
    if not all((directory / name).is_file() for name in (TASK_CONFIG_FILE, SCALES_FILE)):
        if local_files_only:
            raise HubError(f"{where}: the cache holds no whole task there; fetch it once from the Hub")
        with _hub_errors(where, "Nothing was loaded"):
            found = _task_folders(dict.fromkeys(api.list_repo_files(repo_id, revision=Path(snapshot).name), 0))
        names = ", ".join(repr(folder) if folder else "the root" for folder in sorted(found))
        advice = f"it has tasks in: {names[:500]}; choose one by subfolder" if names else "nor anywhere else in it"
        raise HubError(f"{where}: has no task there ({TASK_CONFIG_FILE} and {SCALES_FILE}); {advice}")
    read_bundle(directory)
    return directory


def find_tasks(
    source: str | os.PathLike[str], *, revision: str | None = None, token: Token = None
) -> tuple[TaskInfo, ...]:
    """The tasks that a directory or a repository of the Hub holds, in its root and below, by subfolder.

    Only configurations are read. Raises HubError as :func:`fetch_task`, FormatError for one that is ill-formed.
    """
    if Path(source).is_dir():
        root = Path(source)
        sizes = {p.relative_to(root).as_posix(): p.stat().st_size for p in root.rglob("*") if p.is_file()}
        return tuple(
            TaskInfo(str(source), None, folder or None, read_task_config(root / folder), sizes[scales])
            for folder, scales in sorted(_task_folders(sizes).items())
        )
    from huggingface_hub import hf_hub_download

    repo_id, api, tasks = str(source), _api(token), list[TaskInfo]()
    with _hub_errors(_where(repo_id, revision, None), "Nothing was listed"):
        commit = api.repo_info(repo_id, revision=revision).sha
        tree = api.list_repo_tree(repo_id, recursive=True, revision=commit)
        sizes = {entry.path: int(entry.size) for entry in tree if hasattr(entry, "size")}  # a folder has none
        for folder, scales in sorted(_task_folders(sizes).items()):
            path = hf_hub_download(repo_id, _path(folder, TASK_CONFIG_FILE), revision=commit, token=token)
            tasks.append(TaskInfo(repo_id, commit, folder or None, read_task_config(Path(path).parent), sizes[scales]))
    return tuple(tasks)


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
    if base is not None and _FINGERPRINT.fullmatch(base):
        tags.append(base_tag(base))
    elif base is not None and _HUB_ID.fullmatch(base):
        tags.append(f"base_model:{base}")
    elif base is not None:
        raise HubError(f"{base!r} is neither a fingerprint (64 hexadecimal digits) nor the id of a Hub repository")
    with _hub_errors("search for tasks", "Nothing was found"):
        found = list(_api(token).list_models(filter=tags, author=author, limit=limit))
    return tuple(TaskRepository(m.id, tuple(m.tags or ()), bool(m.private), m.downloads) for m in found)


def base_tag(fingerprint: str) -> str:
    """The tag that the cards of all tasks of one base carry, whatever its repository is called."""
    return f"lowbit-base-{fingerprint[:16]}"


def is_hub_id(name: str | None) -> bool:
    """Whether `name` is the id of a repository, ``"user/name"``, and not a directory here that is called so."""
    return name is not None and len(name) <= 96 and bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def full_repo_id(repo_id: str, token: Token = None) -> str:
    """`repo_id` with the namespace that the Hub would give it; raises HubError where the token has no owner."""
    if "/" in repo_id:
        return repo_id
    with _hub_errors(repo_id, "Nothing was published"):
        return f"{_api(token).whoami()['name']}/{repo_id}"


def check_subfolder(subfolder: str | None) -> str | None:
    """`subfolder` without a slash at its end; raises HubError for one that is not a plain path inside a repository."""
    if subfolder is None:
        return None
    parts = subfolder.removesuffix("/").split("/")
    if len(subfolder) > 200 or not all(_PART.fullmatch(part) for part in parts):
        raise HubError(
            f"subfolder {subfolder[:80]!r} is not a plain path: use names of letters, digits and . _ - joined by /"
        )
    return "/".join(parts)


def _api(token: Token) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="lowbit-format")


def _path(folder: str | None, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _task_folders(sizes: dict[str, int]) -> dict[str, str]:
    """Folders (the root is ``""``) with a configuration, each with the path of its scales; `sizes` by path."""
    folders = (path.removesuffix(TASK_CONFIG_FILE) for path in sizes if path.rpartition("/")[2] == TASK_CONFIG_FILE)
    return {
        folder.removesuffix("/"): folder + SCALES_FILE
        for folder in folders
        if folder + SCALES_FILE in sizes and all(map(_PART.fullmatch, folder.split("/")[:-1]))
    }


# --- the card of a repository of many tasks --------------------------------------------------------


def _read_card(api: HfApi, repo_id: str, commit: str | None) -> str | None:
    """The card in the root of a repository, None if it has none."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        path = api.hf_hub_download(repo_id, CARD_FILE, revision=commit)
    except LocalEntryNotFoundError:
        raise  # the Hub could not be asked
    except EntryNotFoundError:
        return None
    return Path(path).read_text("utf-8", errors="replace")


def _root_card(old: str | None, config: TaskConfig) -> str | None:
    """Front matter by which the Hub finds the tasks in subfolders; None where the owner's own card stands there."""
    if old is not None and _OWN_CARD not in old:
        return None
    tags = {base_tag(config.base_fingerprint), *re.findall(r"^- (lowbit-base-[0-9a-f]{16})$", old or "", re.MULTILINE)}
    bases = set(re.findall(rf"^- ({_HUB_ID.pattern})$", old or "", re.MULTILINE | re.ASCII))
    if config.base_model_name_or_path is not None and is_hub_id(config.base_model_name_or_path):
        bases.add(config.base_model_name_or_path)
    front = ["library_name: lowbit-format", "tags:", *(f"- {tag}" for tag in (*TAGS, *sorted(tags)))]
    if bases:
        front += ["base_model:", *(f"- {base}" for base in sorted(bases)), "base_model_relation: adapter"]
    return "\n".join(["---", *front, "---", _OWN_CARD, "", _ROOT_TEXT])


_ROOT_TEXT = f"""# Tasks

Each subfolder with a `{TASK_CONFIG_FILE}` is a task bundle of lowbit-format: a base's scales, tuned for one task. Its own
`{CARD_FILE}` says which base it belongs to and how to load it.
"""


# --- errors ----------------------------------------------------------------------------------------

_WAIT = "the Hub has trouble of its own; try again later"
_RACE = "somebody else pushed in the meantime; look at what they did, then push again"
_BY_KIND = {  # by name of the exception's class, the particular before the general; names, as versions differ
    "OfflineModeIsEnabled": "looking on the Hub is switched off; unset HF_HUB_OFFLINE, or use what was fetched before",
    "LocalTokenNotFoundError": "no token is saved; log in with `hf auth login`, or pass one",
    "XetAuthenticationError": "the token may not move data; log in with `hf auth login`, or pass another",
    "GatedRepoError": "its owner must grant you access; ask for it on its page, and log in with `hf auth login`",
    "RepositoryNotFoundError": "there is no such repository, or this token may not see it; "
    "check the name, and log in with `hf auth login` if it is private",
    "RevisionNotFoundError": "the repository has no such branch, tag or commit",
    "EntryNotFoundError": "the file is not there",
    "HFValidationError": "this is not the id of a repository; expected user/name",
}
_BY_STATUS = {
    400: "the Hub does not accept this",
    401: "the token is missing or not valid; log in with `hf auth login`, or pass another",
    403: "this token may not do that; use one with the right to write, or open a pull request (create_pr)",
    404: "the Hub knows no such place",
    409: _RACE,
    412: _RACE,
    429: "the Hub wants fewer requests; wait some minutes, or log in",
}


@contextlib.contextmanager
def _hub_errors(where: str, outcome: str) -> Iterator[None]:
    """Turn all that huggingface_hub raises into a HubError that says where, why, what to do, and the outcome."""
    from huggingface_hub import errors

    # httpx's base of errors in 1.x, httpx2's in 2.x; Xet's transfers raise RuntimeError, and LFS' are wrapped in one.
    transport: Any = errors.HfHubHTTPError.__bases__[0]
    try:
        yield
    except (transport, OSError, ValueError, RuntimeError, errors.EntryNotFoundError) as e:
        cause: Any = e
        while not isinstance(cause, transport) and isinstance(cause.__cause__, Exception):
            cause = cause.__cause__
        said = "".join(c for c in " ".join(str(cause).split()) if c.isprintable())[:_MAX_SAID]
        raise HubError(f"{where}: {_advice(cause, isinstance(cause, transport))}. {outcome}. ({said})") from e


def _advice(e: Any, transport: bool) -> str:
    """What happened and what to do about it."""
    names = {kind.__name__ for kind in type(e).__mro__}
    if "LocalEntryNotFoundError" in names:
        return "the cache does not hold it, and the Hub was not asked; fetch it once with a connection"
    for name, advice in _BY_KIND.items():
        if name in names:
            return advice
    status = getattr(getattr(e, "response", None), "status_code", None)
    if status is not None:
        return _WAIT if status >= 500 else _BY_STATUS.get(status, "the Hub refused")
    if transport or isinstance(e, ConnectionError | TimeoutError):
        return "the Hub could not be reached, or the connection was cut; check the network, then try again"
    return "the transfer failed; see the cause, then try again"


def _where(repo_id: str, revision: str | None, subfolder: str | None) -> str:
    at = f" at revision {revision!r}" if revision is not None else ""
    return f"{repo_id}{at}{f' in {subfolder!r}' if subfolder is not None else ''}"
