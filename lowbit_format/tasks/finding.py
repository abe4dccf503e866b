"""Where a bundle is: a directory, or a repository of the Hub."""

from __future__ import annotations

import os
from pathlib import Path

from ..bundle import TaskBundle, read_bundle
from ..errors import BundleError


def find_bundle(
    source: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> TaskBundle:
    """The bundle at `source`, checked by every rule that needs no base; see :func:`bundle_directory`."""
    return read_bundle(
        bundle_directory(
            source,
            subfolder=subfolder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    )


def bundle_directory(
    source: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The directory `source`, if there is one, or what is fetched from the Hub under this id.

    Raises BundleError for a path that is not there, HubError for what the Hub does not give.
    """
    local = Path(source).expanduser()
    if local.is_dir():
        return local / subfolder if subfolder else local
    if local.is_absolute() or str(source).startswith(".") or str(source).count("/") > 1:
        raise BundleError("TSK-1", "there is no such directory, and this is no Hub id", file=source)
    from ..hub import fetch_task

    return fetch_task(
        str(source),
        revision=revision,
        subfolder=subfolder,
        token=token,
        cache_dir=None if cache_dir is None else os.fspath(cache_dir),
        local_files_only=local_files_only,
    )
