"""``lowbit task push``, ``pull`` and ``list``: task bundles on the Hub."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..container.atomic import atomic_directory, disk_errors, files_together
from ..container.reader import ModelReader
from ..errors import FormatError, HubError
from ..hub import list_files, looks_like_id
from ..tasks import repository
from ..tasks.bundle import CARD_FILE, SCALES_FILE, StoredBundle
from ..tasks.bundle_config import TASK_CONFIG_FILE
from ..tasks.finding import local_first
from ..tasks.repository import TaskInfo, TaskRepository
from . import console
from .console import columns, plain
from .task_options import Force, Revision, Subfolder, check_out


def push(
    directory: Annotated[Path, typer.Argument(help="A bundle's directory.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub; it is made where it is missing.")],
    subfolder: Annotated[str | None, typer.Option(help="Folder of the bundle inside of the repository.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="For a new repository; the default is the account's.")
    ] = None,
    tag: Annotated[str | None, typer.Option(help="Tag the new commit.")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    base_model: Annotated[str | None, typer.Option(help="Repository of the base, for the model card.")] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="`name=value` for the model card, such as `accuracy=0.91`.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Hub id of the data it was tuned on, for the card.")] = None,
    language: Annotated[str | None, typer.Option(help="For the card, such as `en`.")] = None,
    license: Annotated[str | None, typer.Option(help="For the card, such as `apache-2.0`.")] = None,
) -> None:
    """Put a task bundle on the Hub, in one commit.

    The bundle is read and checked first. Files with other names in the directory stay at home.

    Example: `lowbit task push ./sst2-scales user/sst2-scales --metric accuracy=0.91`
    """
    with console.named_errors():
        metrics = _metrics(metric or [])
        facts = {"dataset": dataset, "language": language, "license": license}
        card = {name: value for name, value in facts.items() if value is not None}
        from ..tasks.sharing import push_task_to_hub

        url = push_task_to_hub(
            directory, repo, subfolder=subfolder, revision=revision, private=private, commit_message=message,
            create_pr=create_pr, tag=tag, base_model=base_model, metrics=metrics or None, **card,
        )  # fmt: skip
    console.out.print(f"Pushed {directory} to {repo}: {url}", soft_wrap=True, highlight=False, markup=False)


def pull(
    repo: Annotated[str, typer.Argument(help="Repository on the Hub.")],
    out: Annotated[Path, typer.Argument(help="Directory to make. It appears only when it is complete.")],
    revision: Revision = None,
    subfolder: Subfolder = None,
    force: Force = False,
) -> None:
    """Copy a task bundle from the Hub into a directory of its own, checked by every rule that needs no base.

    Example: `lowbit task pull user/sst2-scales ./sst2-scales`
    """
    with console.named_errors():
        check_out(out, force)
        stored = repository.fetch_task(repo, revision=revision, subfolder=subfolder)
        _copy(stored, out)
    console.out.print(
        f"Wrote {out}: {len(stored.bundle.deltas)} deltas, {stored.bundle.delta_values:,} values",
        soft_wrap=True, highlight=False, markup=False,
    )  # fmt: skip


def list_tasks(
    place: Annotated[str | None, typer.Argument(help="A repository on the Hub, or a directory.")] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Search the Hub for tasks of this base: its repository, its directory or its fingerprint."),
    ] = None,
    author: Annotated[str | None, typer.Option(help="Search the Hub for tasks of this user or organization.")] = None,
    revision: Revision = None,
    limit: Annotated[int, typer.Option(min=1, help="Find at most so many repositories.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")] = False,
) -> None:
    """List the tasks in a repository or directory, or search the Hub for repositories with tasks.

    Exits with 2 if a task is ill-formed, after it has listed all of them.

    Examples: `lowbit task list user/my-tasks`, `lowbit task list --base user/llama-4bit`
    """
    if (place is None) == (base is None and author is None):
        raise typer.BadParameter("give either a place, or --base or --author to search the Hub")
    if place is None and revision is not None:
        raise typer.BadParameter("--revision is for a repository; a search looks at the newest")
    bad = list[tuple[str | None, FormatError]]()
    with console.named_errors():
        if place is not None:
            with local_first(place, revision):
                tasks = repository.find_tasks(place, revision=revision, on_error=lambda *found: bad.append(found))
            facts, table = [_task_facts(t) for t in tasks], _task_table(tasks, bad)
            facts += [{"source": place, "subfolder": folder, "error": str(error)} for folder, error in bad]
        else:
            base = None if base is None else _known_by(base)
            found = repository.search_tasks(base=base, author=author, limit=limit)
            facts, table = [_repository_facts(r) for r in found], _repository_table(found)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        if facts:
            console.out.print(table)
        more = " (there may be more: see --limit)" if place is None and len(facts) == limit else ""
        one, many = ("task", "tasks") if place is not None else ("repository with tasks", "repositories with tasks")
        what = one if len(facts) == 1 else many
        ill = f", {len(bad)} of them ill-formed" if bad else ""
        console.out.print(f"{len(facts) or 'no'} {what}{more}{ill}", highlight=False, markup=False)
    for _, error in bad:
        console.print_error(error)
    if bad:
        raise typer.Exit(2)


def _known_by(base: str) -> str:
    """The fingerprint of a base in a directory or on the Hub, by which tasks are found whatever it is called.

    Of one on the Hub only headers are read. Where these have no digests, or the base is gone, its id has to do.
    """
    if Path(base).is_dir():
        return ModelReader(base).fingerprint().body
    if not looks_like_id(base):
        return base
    from ..partial_download import open_remote

    try:
        reader = open_remote(base, list_files(base))
    except (HubError, FormatError):
        return base
    known = all(reader.stored_digest(name) is not None for name in reader.lowbit_names())
    return reader.fingerprint().body if known else base


def _task_facts(task: TaskInfo) -> dict[str, Any]:
    where = {"source": task.source, "commit": task.revision, "subfolder": task.subfolder, "bytes": task.nbytes}
    return {**task.config.to_dict(), **where}  # no key of the file takes the place of one of ours


def _task_table(tasks: Sequence[TaskInfo], bad: Sequence[tuple[str | None, FormatError]]) -> Table:
    table = Table(*columns("folder", "base", "method", numbers=("fingerprint", "bits", "bytes")))
    for t in tasks:
        c = t.config
        table.add_row(
            plain(t.subfolder or "(root)"), plain(c.base_model_name_or_path or "unnamed"),
            plain(c.method), c.base_fingerprint[:16], str(c.bits or "-"), f"{t.nbytes:,}",
        )  # fmt: skip
    for folder, error in bad:
        table.add_row(plain(folder or "(root)"), f"ill-formed \\[{error.rule}]", *["-"] * 4)
    return table


def _repository_facts(found: TaskRepository) -> dict[str, Any]:
    facts = {"repo": found.repo_id, "private": found.private, "downloads": found.downloads}
    return {**facts, "base": _bases(found.tags), "tags": list(found.tags)}


def _repository_table(found: Sequence[TaskRepository]) -> Table:
    table = Table(*columns("repository", "base", numbers=("private", "downloads")))
    for r in found:
        downloads = "-" if r.downloads is None else f"{r.downloads:,}"
        table.add_row(
            plain(r.repo_id), plain(", ".join(_bases(r.tags)) or "-"), "yes" if r.private else "no", downloads
        )
    return table


def _bases(tags: Sequence[str]) -> list[str]:
    """Repositories of bases among the Hub's tags: ``base_model:user/name``, and ``base_model:adapter:user/name``."""
    named = (tag.rpartition(":")[2] for tag in tags if tag.startswith("base_model:"))
    return sorted(set(named))


def _copy(stored: StoredBundle, out: Path) -> None:
    """Copy the files of a bundle, all of them or none; a card that is there and not among them goes."""
    names = [SCALES_FILE, CARD_FILE, TASK_CONFIG_FILE]
    into = files_together(out, names) if (out / TASK_CONFIG_FILE).is_file() else atomic_directory(out)
    with into as work, disk_errors(out):
        for name, path in stored.files().items():
            shutil.copyfile(path, work / name)


def _metrics(pairs: list[str]) -> dict[str, float]:
    """``name=value`` options as numbers by name."""
    out = dict[str, float]()
    for pair in pairs:
        name, _, value = (part.strip() for part in pair.partition("="))
        try:
            out[name] = float(value)
        except ValueError:
            out[name] = math.nan
        if not name or not math.isfinite(out[name]):
            raise typer.BadParameter(f"--metric is {pair!r}, expected name=value with a number, such as accuracy=0.91")
    return out
