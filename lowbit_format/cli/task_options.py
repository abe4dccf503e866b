"""Options of the ``lowbit task`` commands, and what they check alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..container.atomic import check_absent
from ..errors import OutputError
from ..tasks.bundle_config import TASK_CONFIG_FILE

Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit, if it is on the Hub.")]
Subfolder = Annotated[str | None, typer.Option(help="Folder of the bundle inside of the repository or directory.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a task bundle that is at OUT already.")]


def check_out(out: Path, force: bool) -> None:
    """Raise OutputError if something is at `out`, unless that is a bundle and `force` allows to replace it."""
    if not (out / TASK_CONFIG_FILE).is_file():
        check_absent(out)
    elif not force:
        raise OutputError(f"{out}: holds a task bundle already; choose another name, or replace it with --force")
