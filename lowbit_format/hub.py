"""The Hugging Face Hub: files in one commit there, files of one commit here, and errors that say what to do.

huggingface_hub moves, caches and retries. A push is one commit on a known parent, and a download comes from one commit,
so that nothing is published or loaded by halves. What the Hub refuses is a HubError. What the files mean is not known
here: for tasks see :mod:`.tasks.repository`.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import HubError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    Token = str | bool | None  # False sends none, True demands the one that `hf auth login` has saved

CARD_FILE = "README.md"  # what the Hub shows as a repository's page, and reads tags from

_PART = re.compile(r"\w[\w .+=@,-]*")  # of a folder: neither `..` nor hidden, and no sign that means a pattern
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_MAX_SAID = 300  # characters of the Hub's own words in a message


@dataclass(frozen=True)
class Listing:
    """The files of one commit: its id, and by path the size of each file and its ETag.

    The ETag is the SHA-256 of a file in the Hub's store for large files, and git's id of another.
    """

    commit: str
    sizes: Mapping[str, int]
    etags: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, info: Any) -> Listing:
        """By what the Hub says of a repository with ``files_metadata``; files of unknown size have none."""
        files = [file for file in info.siblings or () if file.size is not None]
        etags = {f.rfilename: f.lfs.sha256 if f.lfs is not None else f.blob_id for f in files}
        known = {path: str(etag) for path, etag in etags.items() if etag}
        return cls(str(info.sha), {f.rfilename: int(f.size) for f in files}, known)


@dataclass(frozen=True)
class Found:
    """A repository that a search found; `downloads` are the Hub's count, None if unknown."""

    repo_id: str
    tags: tuple[str, ...]
    private: bool
    downloads: int | None


def commit_files(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    *,
    message: str,
    folder: str | None = None,
    root_card: Callable[[str | None], str | None] | None = None,
    revision: str | None = None,
    private: bool | None = None,
    token: Token = None,
    create_pr: bool = False,
    tag: str | None = None,
) -> str:
    """Publish files in one commit, which holds all of them or does not happen.

    A repository or branch that is missing is made first, and stays (without the files) where the commit fails.

    Args:
        files: content, or path on this machine, by name.
        repo_id: ``"user/name"``, or ``"name"`` in the token's own namespace.
        message: of the commit.
        folder: of the repository to put them into.
        root_card: makes the card in the repository's root from the one there (None: there is none); None leaves it.
        revision: branch to commit to, made from the main one where it is missing.
        private: for a repository that is made now; an existing public one is refused where this is True.
        token: of the Hub; by default the saved one.
        create_pr: open a pull request instead of committing to the branch.
        tag: name for the new commit.

    Returns:
        The URL of the commit, or of the pull request.

    Raises:
        HubError: the Hub refused, could not be reached, or somebody else pushed in the meantime.
    """
    from huggingface_hub import CommitOperationAdd

    if create_pr and tag is not None:
        raise HubError(f"{repo_id}: a pull request cannot be tagged; leave out the tag, and set it after the merge")
    where, api = place_of(repo_id, revision, folder), _api(token)
    with hub_errors(where, "Nothing was published"):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.repo_info(repo_id).private:
            raise HubError(f"{where}: is public already, but private=True; make it private on the Hub, then push")
        if tag is not None and any(t.name == tag for t in api.list_repo_refs(repo_id).tags):
            raise HubError(f"{where}: has the tag {tag!r} already; choose another. Nothing was published")
        _make_branch(api, repo_id, revision, create_pr)
        # The parent makes the Hub refuse a race. Without it the client, which leaves out files that have not changed,
        # could put one of our files beside another of somebody else's.
        parent = api.repo_info(repo_id, revision=revision).sha
        contents = {path_in(folder, name): content for name, content in files.items()}
        if root_card is not None and (card := root_card(_read_card(api, repo_id, parent))) is not None:
            contents[CARD_FILE] = card.encode()
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(path, content) for path, content in contents.items()],
            commit_message=message,
            revision=revision,
            parent_commit=parent,
            create_pr=create_pr,
        )
    if tag is not None:
        with hub_errors(where, f"The files were published as {commit.commit_url}; set the tag there"):
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
    """Publish all files of a model's directory in one commit; see :func:`commit_files` for most arguments.

    Args:
        card: text of ``README.md``, unless the repository has one already.

    Returns the URL of the commit, or of the pull request. Raises HubError.
    """
    where, api = place_of(repo_id, revision, None), _api(token)
    with hub_errors(where, "Nothing was published"):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        _make_branch(api, repo_id, revision, create_pr)
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


def download_files(
    names: Sequence[str],
    repo_id: str,
    *,
    folder: str | None = None,
    revision: str | None = None,
    token: Token = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """Those files of a folder of a repository that are there, all from one commit.

    Where the Hub cannot be reached, what it last gave for that revision serves again.

    Args:
        names: of the files.
        repo_id: the repository.
        folder: of the repository; None is its root.
        revision: branch, tag or commit; the main branch by default.
        token: of the Hub; by default the saved one.
        cache_dir: by default that of huggingface_hub.
        local_files_only: take them from the cache and do not ask the Hub.
        force_download: get them from the Hub again, whatever the cache holds.

    Returns:
        A directory of the cache, not to be changed, that stands for the root of the repository; its name is the commit.

    Raises:
        HubError: there is no such repository or revision, or it cannot be had.
    """
    from huggingface_hub import snapshot_download

    where, api = place_of(repo_id, revision, folder), _api(token)
    if force_download and local_files_only:
        raise HubError(f"{where}: force_download and local_files_only exclude each other")
    with hub_errors(where, "Nothing was loaded"):
        if force_download:
            api.repo_info(repo_id, revision=revision)  # where this fails, snapshot_download would turn to the cache
        snapshot = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=[path_in(folder, name) for name in names],
            token=token,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=local_files_only,
            force_download=force_download,
        )
    return Path(snapshot)


def list_files(repo_id: str, *, revision: str | None = None, token: Token = None) -> Listing:
    """All files of a repository at one commit. Raises HubError."""
    with hub_errors(place_of(repo_id, revision, None), "Nothing was listed"):
        return Listing.of(_api(token).repo_info(repo_id, revision=revision, files_metadata=True))


def download_file(path: str, repo_id: str, commit: str, token: Token = None) -> Path:
    """One file of a commit, in the cache. Raises HubError."""
    from huggingface_hub import hf_hub_download

    with hub_errors(place_of(repo_id, commit, None), "Nothing was loaded"):
        return Path(hf_hub_download(repo_id, path, revision=commit, token=token))


def search_models(
    tags: Sequence[str], *, author: str | None = None, token: Token = None, limit: int | None = None
) -> tuple[Found, ...]:
    """Repositories of models that carry all of `tags`. Raises HubError where the Hub does not answer."""
    with hub_errors(f"search for {', '.join(tags)}", "Nothing was found"):
        found = list(_api(token).list_models(filter=list(tags), author=author, limit=limit))
    return tuple(Found(m.id, tuple(m.tags or ()), bool(m.private), m.downloads) for m in found)


def looks_like_id(name: str) -> bool:
    """Whether `name` has the shape of a repository's id, ``"user/name"``."""
    return len(name) <= 96 and bool(_HUB_ID.fullmatch(name))


def is_hub_id(name: str | None) -> bool:
    """Whether `name` is the id of a repository, ``"user/name"``, and not a directory here that is called so."""
    return name is not None and looks_like_id(name) and not Path(name).exists()


def full_repo_id(repo_id: str, token: Token = None) -> str:
    """`repo_id` with the namespace that the Hub would give it; raises HubError where the token has no owner."""
    if "/" in repo_id:
        return repo_id
    with hub_errors(repo_id, "Nothing was published"):
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


def is_plain_folder(folder: str) -> bool:
    """Whether :func:`check_subfolder` would take the path of a folder in a repository; its root is ``""``."""
    return not folder or all(map(_PART.fullmatch, folder.split("/")))


def path_in(folder: str | None, name: str) -> str:
    """Path in a repository of the file `name` in `folder`; None or ``""`` is the root."""
    return f"{folder}/{name}" if folder else name


def place_of(repo_id: str, revision: str | None, folder: str | None) -> str:
    """A place on the Hub as messages name it."""
    at = f" at revision {revision!r}" if revision is not None else ""
    return f"{repo_id}{at}{f' in {folder!r}' if folder is not None else ''}"


def _api(token: Token) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="lowbit-format")


def _make_branch(api: HfApi, repo_id: str, revision: str | None, create_pr: bool) -> None:
    if revision is not None and not create_pr and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)


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
    416: "the file is shorter than it was",
    429: "the Hub wants fewer requests; wait some minutes, or log in",
}


@contextlib.contextmanager
def hub_errors(where: str, outcome: str) -> Iterator[None]:
    """Turn all that huggingface_hub raises into a HubError that says where, why, what to do, and the outcome."""
    from huggingface_hub import errors

    transport = transport_error()  # Xet's transfers raise RuntimeError, and LFS' are wrapped in one
    try:
        yield
    except (transport, OSError, ValueError, RuntimeError, errors.EntryNotFoundError) as e:
        cause: Any = e
        while not isinstance(cause, transport) and isinstance(cause.__cause__, Exception):
            cause = cause.__cause__
        said = "".join(c for c in " ".join(str(cause).split()) if c.isprintable())[:_MAX_SAID]
        raise HubError(f"{where}: {_advice(cause, isinstance(cause, transport))}. {outcome}. ({said})") from e


def transport_error() -> Any:
    """The base class of the HTTP client's errors: httpx's with huggingface_hub 1.x, httpx2's with 2.x."""
    from huggingface_hub import errors

    return errors.HfHubHTTPError.__bases__[0]


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
