"""Where a bundle is: a directory, or a repository of the Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import HubError
from .bundle import TaskBundle, read_bundle, read_task_config


def find_bundle(
    source: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    **hub: Any,
) -> TaskBundle:
    """The bundle at `source`, checked by every rule that needs no base. Arguments as for :func:`bundle_directory`."""
    return read_bundle(bundle_directory(source, subfolder=subfolder, revision=revision, **hub))


def bundle_directory(
    source: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    **hub: Any,
) -> Path:
    """The directory `source`, if there is one, or what is fetched from the Hub under this id.

    Args:
        source: directory, or Hub id.
        subfolder: of either.
        revision: of the Hub's.
        **hub: ``token``, ``cache_dir``, ``local_files_only`` and ``force_download`` of :func:`.hub.fetch_task`.

    Raises BundleError for a path that is not there, HubError for what the Hub does not give.
    """
    place = os.fspath(source)
    check_place(place, revision)
    if Path(place).is_dir():
        return Path(place, subfolder or "")
    from ..hub import fetch_task

    return fetch_task(place, revision=revision, subfolder=subfolder, **hub)


def check_place(place: str, revision: str | None) -> None:
    """Raise for what is neither a directory nor can be on the Hub, and for a revision of a directory."""
    path = Path(place)
    if path.is_dir():
        if revision is not None:
            raise HubError(f"{place}: is a directory on this machine and has no revision {revision!r}")
    elif place.startswith((".", "/", "~")) or place.count("/") != 1 or path.exists():
        read_task_config(path)  # raises: no directory is there
