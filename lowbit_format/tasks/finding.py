"""Where a bundle is: in a directory here, or else in a repository of the Hub."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import HubError
from ..hub import is_hub_id
from . import repository
from .bundle import StoredBundle, read_stored_bundle
from .bundle_config import read_task_config


def find_bundle(
    source: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    **hub: Any,
) -> StoredBundle:
    """The bundle in the directory `source`, if there is one, or else in the Hub's repository of this id.

    Args:
        source: directory, or Hub id.
        subfolder: of either.
        revision: of the Hub's.
        **hub: ``token``, ``cache_dir``, ``local_files_only`` and ``force_download`` of :func:`.repository.fetch_task`.

    Raises:
        FormatError: no such directory, or no valid bundle in it. HubError: what the Hub does not give.
    """
    place = os.fspath(source)
    with local_first(place, revision):
        if Path(place).is_dir():
            return read_stored_bundle(Path(place, subfolder or ""))
        return repository.fetch_task(place, revision=revision, subfolder=subfolder, **hub)


@contextlib.contextmanager
def local_first(place: str, revision: str | None) -> Iterator[None]:
    """Check `place` before the block looks for it, and let an error there say that it is no directory here.

    Raises BundleError for what is neither a directory nor the id of a repository, and HubError for a revision of a
    directory.
    """
    path = Path(place)
    if path.is_dir():
        if revision is not None:
            raise HubError(f"{place}: is a directory on this machine and has no revision {revision!r}")
    elif not is_hub_id(place):
        read_task_config(path)  # raises: there is no such directory
    try:
        yield
    except HubError as e:
        if path.is_dir() or e.__cause__ is None:  # without a cause, the Hub has the repository
            raise
        raise HubError(f"{place}: there is no such directory here. On the Hub: {e}") from e
