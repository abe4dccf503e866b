"""Without data, a causal model is compared with its checkpoint on a short text; what is printed is true."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.checkpoints import with_tokenizer
from typer.testing import CliRunner

import lowbit_format
from lowbit_format.calibration.blocks import find_blocks
from lowbit_format.calibration.compare import Comparison
from lowbit_format.calibration.data import Data
from lowbit_format.converters import Recipe, command, convert_hf_to_lowbit, measure, plan_conversion
from lowbit_format.converters.calibration_data import SENTENCES, load_tokenizer
from lowbit_format.converters.float_model import FloatModel
from lowbit_format.converters.sensitivity import probe_batch
from lowbit_format.converters.student import Student
from lowbit_format.quantize import Target

Checkpoint = Callable[..., Path]


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "qwen3"])
def test_it_is_what_the_loaded_model_gives(
    name: str, own_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = with_tokenizer(own_checkpoint(name))
    recipe = Recipe(Target(bits=4, group_size=32, nested=(2,)), embeddings=True)
    ids = load_tokenizer(source)(SENTENCES.read_text("utf-8"), return_tensors="pt")["input_ids"][0]
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    length = min(measure.LENGTH, plain.config.max_position_embeddings)
    monkeypatch.setattr(measure, "SAMPLES", len(ids) // length)
    done = convert_hf_to_lowbit(str(source), tmp_path / "out", recipe, measured=True)
    assert done.unmeasured == ""
    assert list(done.quality) == [None, 2]
    for bits, quality in done.quality.items():
        model = lowbit_format.from_pretrained(tmp_path / "out", bits=bits, dtype=torch.float32).eval()
        found = Comparison()
        with torch.no_grad():
            for one in ids[: measure.SAMPLES * length].reshape(-1, 1, length):
                found.add(model(one), plain(one), {"input_ids": one})
        assert quality.after.tokens == found.tokens
        assert quality.after.mean_divergence == pytest.approx(found.mean_divergence, rel=1e-3)
        assert quality.after.reference_perplexity == pytest.approx(found.reference_perplexity, rel=1e-3)
    assert done.quality[2].after.mean_divergence > done.quality[None].after.mean_divergence


def test_an_encoder_has_no_such_line_and_python_asks_for_it(checkpoint: Checkpoint, tmp_path: Path) -> None:
    done = convert_hf_to_lowbit(str(checkpoint("bert")), tmp_path / "bert", measured=True)
    assert (done.quality, done.unmeasured) == ({}, "")
    done = convert_hf_to_lowbit(str(checkpoint("llama")), tmp_path / "llama")
    assert (done.quality, done.unmeasured) == ({}, "")


def run(*args: object) -> str:
    result = CliRunner().invoke(command.app, [str(a) for a in args], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


def test_the_summary_ends_with_it(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = with_tokenizer(own_checkpoint("llama"))
    printed = run(source, tmp_path / "out", "--bits", 4, "--group-size", 32, "--nested", 2)
    assert "tokens of a short text of our own" in printed
    assert "divergence from the float model at 2 bits" in printed
    assert "perplexity" not in run(source, tmp_path / "two", "--no-eval")


def test_what_keeps_it_from_measuring_is_said(
    own_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = own_checkpoint("llama")
    printed = run(source, tmp_path / "out")
    assert "Note: how well it predicts was not measured" in printed
    assert "has no tokenizer" in printed
    with_tokenizer(source)
    monkeypatch.setattr(measure, "_WORKING", 1 << 40)
    assert "GB of memory" in run(source, tmp_path / "large")


def test_blocks_that_are_not_called_are_not_decoded(checkpoint: Checkpoint) -> None:
    source, plan, _ = plan_conversion(str(checkpoint("t5")), Recipe(Target(bits=4, group_size=32), embeddings=True))
    model = FloatModel(source, plan, torch.device("cpu"))
    encoder, decoder = find_blocks(model.model)
    one = Student(model, [encoder], torch.device("cpu"), plan.quantized, {}, lambda path: [])
    assert set(one._inside) == {encoder.path_of(0), encoder.path_of(1)}
    assert not any(name.startswith((encoder.path, decoder.path)) for name in one._outside)
    assert "shared.weight" in one._outside


def test_what_of_the_data_is_probed() -> None:
    """As many samples, however they lie in batches; inputs that do not say how many they are stay as they are."""
    ids = torch.arange(24).reshape(6, 4)
    for size in (1, 2, 3):
        batches = [{"input_ids": ids[i : i + size], "mask": ids[i : i + size] + 1} for i in range(0, 6, size)]
        found = probe_batch(Data.of(batches))
        assert torch.equal(found["input_ids"], ids[:2])
        assert torch.equal(found["mask"], ids[:2] + 1)
    assert torch.equal(probe_batch(Data.of([{"input_ids": ids[:1]}, {"input_ids": ids[:1, :3]}]))["input_ids"], ids[:1])
    images = torch.rand(6, 3, 2)
    found = probe_batch(Data.of([{"pixel_values": images[i : i + 1]} for i in range(6)]))
    assert torch.equal(found["pixel_values"], images[:4])
    odd = {"pixel_values": images, "size": torch.tensor(2)}
    assert probe_batch(Data.of([odd]))["pixel_values"] is images
