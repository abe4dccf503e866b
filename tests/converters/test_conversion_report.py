"""The file that tells what a conversion did: true for every module, in its directory alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support.checkpoints import with_tokenizer

from lowbit_format.calibration.data import Data
from lowbit_format.calibration.effort import Effort
from lowbit_format.calibration.ladder import BlockResult
from lowbit_format.container.reader import ModelReader
from lowbit_format.converters import Calibration, Recipe, Rule, convert_hf_to_lowbit
from lowbit_format.export import dequantize_directory
from lowbit_format.integrations.conversion_record import REPORT_FILE
from lowbit_format.precision import copy_precision
from lowbit_format.quantize import Target

Checkpoint = Callable[..., Path]
RECIPE = Recipe(Target(bits=2, group_size=32, nested=(1,)), (Rule("*.q_proj", None),))


def read(directory: Path) -> Any:
    return json.loads((directory / REPORT_FILE).read_text())


def test_it_tells_of_every_matrix(checkpoint: Checkpoint, tmp_path: Path) -> None:
    done = convert_hf_to_lowbit(str(checkpoint("llama")), tmp_path / "out", RECIPE, min_coverage=0)
    report, reader = read(tmp_path / "out"), ModelReader(tmp_path / "out")
    assert report["version"] == 1
    assert set(report["modules"]) == set(reader.config.modules)
    for path, module in report["modules"].items():
        tensors = [t for header in reader.headers.values() for t in header.tensors.values()]
        nbytes = sum(t.nbytes for t in tensors if t.name.startswith(f"{path}."))
        assert module["nbytes"] == nbytes
        assert module["bits_per_weight"] == 8 * nbytes / module["numel"]
        assert module["relative_error"] == done.outcomes[path].relative_error
    assert "q_proj" in " ".join(report["kept"])
    kept = report["kept"]["model.layers.0.self_attn.q_proj.weight"]
    assert (kept["reason"], kept["nbytes"]) == ("kept by the pattern '*.q_proj'", 4 * 64 * 64)
    assert "evaluation" not in report


def test_it_has_the_comparison_that_was_made(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = with_tokenizer(own_checkpoint("llama"))
    done = convert_hf_to_lowbit(str(source), tmp_path / "out", RECIPE, min_coverage=0, measured=True)
    full, low = read(tmp_path / "out")["evaluation"]
    assert (full["bits"], low["bits"], full["text"]) == (None, 1, "a short text")
    assert full["perplexity"] == done.quality[None].after.perplexity
    assert low["divergence"] == done.quality[1].after.mean_divergence


def test_it_has_the_blocks_that_were_calibrated(checkpoint: Checkpoint, tmp_path: Path) -> None:
    batches = [{"input_ids": torch.randint(4, 90, (2, 16))} for _ in range(4)]
    effort = Effort(sweeps=1, steps=2, learning_rate=0.001, drift=False, samples=8)
    blocks: dict[str, BlockResult] = {}
    convert_hf_to_lowbit(
        str(checkpoint("llama")), tmp_path / "out", Recipe(Target(bits=2, group_size=32)),
        calibration=Calibration(Data.of(batches, held_out=1), effort), report_block=blocks.__setitem__,
    )  # fmt: skip
    report = read(tmp_path / "out")
    assert [path for path, *_ in report["blocks"]] == list(blocks)
    for path, before, after in report["blocks"]:
        assert [before, after] == list(blocks[path].errors.values())
    (evaluation,) = report["evaluation"]
    assert evaluation["text"] == "held-out data"


def test_it_stays_behind_where_it_would_be_untrue(checkpoint: Checkpoint, tmp_path: Path) -> None:
    convert_hf_to_lowbit(str(checkpoint("llama")), tmp_path / "out", RECIPE, min_coverage=0)
    reader = ModelReader(tmp_path / "out")
    dequantize_directory(reader, tmp_path / "float")
    copy_precision(reader, 1, tmp_path / "cut")
    for name in ("float", "cut"):
        assert (tmp_path / name / "config.json").exists()
        assert not (tmp_path / name / REPORT_FILE).exists()
