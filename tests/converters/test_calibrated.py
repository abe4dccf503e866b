"""Conversion with data: better than without, as streamed as promised, resumable, and refused truly."""

from __future__ import annotations

import filecmp
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.checkpoints import edit_weights, with_tokenizer

import lowbit_format
from lowbit_format.calibration.compare import Comparison
from lowbit_format.calibration.data import Data
from lowbit_format.calibration.effort import EFFORTS, Effort
from lowbit_format.calibration.ladder import BlockResult
from lowbit_format.container.reader import ModelReader
from lowbit_format.converters import (
    Calibration,
    Conversion,
    Recipe,
    Rule,
    convert_hf_to_lowbit,
    plan_conversion,
    together,
)
from lowbit_format.converters.calibrated import Calibrated
from lowbit_format.converters.calibration_data import read_data
from lowbit_format.converters.recipe import WORDS
from lowbit_format.converters.steps import load_step
from lowbit_format.errors import CalibrationError, OutputError
from lowbit_format.quantize import Target

QUICK = Effort(sweeps=2, steps=0, learning_rate=0.0, drift=False, samples=8)
RECIPE = Recipe(Target(bits=2, group_size=32))
TOGETHER = Effort(sweeps=1, steps=0, learning_rate=0.0, drift=False, samples=8, passes=8, end_rate=0.02)
Checkpoint = Callable[..., Path]


def batches(count: int = 6, seed: int = 0, **more: int) -> list[dict[str, torch.Tensor]]:
    """Random tokens; `more` gives lengths of other inputs."""
    generator = torch.Generator().manual_seed(seed)
    lengths = {"input_ids": 24, **more}
    return [{k: torch.randint(4, 90, (4, n), generator=generator) for k, n in lengths.items()} for _ in range(count)]


def convert(
    source: Path, out: Path, data: Data, recipe: Recipe = RECIPE, effort: Effort = QUICK, **options: Any
) -> Any:
    return convert_hf_to_lowbit(str(source), out, recipe, calibration=Calibration(data, effort), **options)


def divergence(directory: Path, source: Path, data: Data, bits: int | None = None) -> Comparison:
    """Of the loaded model on the batches held out."""
    import transformers

    model = lowbit_format.from_pretrained(directory, bits=bits).eval()
    plain = getattr(transformers, type(model).__name__.removeprefix("Lowbit")).from_pretrained(source).eval()
    found = Comparison()
    with torch.no_grad():
        for batch in data.batches[-data.held_out :]:
            found.add(model(**batch), plain(**batch), batch)
    return found


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "opt", "qwen3"])
def test_it_is_better_than_without_data_and_what_it_reports_is_true(
    name: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source, data = checkpoint(name), Data.of(batches(), held_out=2)
    done: Conversion = convert(source, tmp_path / "with", data)
    convert_hf_to_lowbit(str(source), tmp_path / "without", RECIPE)
    with_data = divergence(tmp_path / "with", source, data)
    without = divergence(tmp_path / "without", source, data)
    assert done.comparison is not None
    assert done.comparison.mean_divergence == pytest.approx(with_data.mean_divergence, rel=1e-2, abs=1e-5)
    assert done.comparison.perplexity == pytest.approx(with_data.perplexity, rel=1e-3)
    assert with_data.mean_divergence < 0.8 * without.mean_divergence
    assert done.unseen == ()
    assert not list(tmp_path.rglob("activations"))


def test_layers_of_the_target_that_embeddings_have_by_default_are_calibrated(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source, recipe = checkpoint("llama"), Recipe(WORDS)
    convert(source, tmp_path / "with", Data.of(batches(2)), recipe)
    convert_hf_to_lowbit(str(source), tmp_path / "without", recipe, measured=False)
    own, plain = (ModelReader(tmp_path / name) for name in ("with", "without"))
    same = {path for path in own.config.modules if np.array_equal(own.decode(path), plain.decode(path))}
    assert same == {"model.embed_tokens", "lm_head"}


def test_a_conversion_without_a_layer_to_fit_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    recipe = Recipe(rules=(Rule("model.layers.*", None),))
    with pytest.raises(CalibrationError, match="LlamaForCausalLM: no layer is fitted to data"):
        convert(checkpoint("llama"), tmp_path / "out", Data.of(batches(2)), recipe, min_coverage=0)


def test_encoders_and_pairs_of_encoder_and_decoder(checkpoint: Checkpoint, tmp_path: Path) -> None:
    data = Data.of(batches(), held_out=2)
    done = convert(checkpoint("bert"), tmp_path / "bert", data)
    found = divergence(tmp_path / "bert", checkpoint("bert"), data)
    assert done.comparison.mean_cosine == pytest.approx(found.mean_cosine, abs=1e-4)
    assert found.mean_cosine > 0.8
    data = Data.of(batches(decoder_input_ids=9), held_out=2)
    blocks: list[str] = []
    done = convert(checkpoint("t5"), tmp_path / "t5", data, report_block=lambda path, result: blocks.append(path))
    assert blocks == [f"{side}.block.{i}" for side in ("encoder", "decoder") for i in range(2)]
    assert done.unseen == ()


def test_training_of_scales_lowers_the_error_of_a_block(checkpoint: Checkpoint, tmp_path: Path) -> None:
    results: list[BlockResult] = []
    effort = Effort(sweeps=2, steps=30, learning_rate=0.01, drift=False, samples=8)
    for codec, bits in (("bcq", 2), ("uniform", 2), ("codebook", 4)):
        recipe = Recipe(
            Target(codec, bits=bits, group_size=32) if codec != "codebook" else Target(codec, group_size=32)
        )
        report: Callable[[str, BlockResult], None] = lambda path, result: results.append(result)  # noqa: E731
        convert(checkpoint("llama"), tmp_path / codec, Data.of(batches()), recipe, effort, report_block=report)
    for result in results:
        assert result.errors["scales together"] < result.errors["layer by layer"]


def test_layers_outside_of_blocks_have_their_place(checkpoint: Checkpoint, tmp_path: Path) -> None:
    recipe = Recipe(Target(bits=2, group_size=32), (Rule("lm_head", Target(bits=3, group_size=32)),))
    source, data = checkpoint("llama"), Data.of(batches(), held_out=2)
    done = convert(source, tmp_path / "with", data, recipe)
    assert "lm_head" in done.outcomes
    body = convert(source, tmp_path / "body", data)
    alone = convert_hf_to_lowbit(str(source), tmp_path / "without", recipe)
    assert done.outcomes["lm_head"].squared_error > alone.outcomes["lm_head"].squared_error  # of weights, not outputs
    assert body.comparison.mean_divergence < done.comparison.mean_divergence
    assert done.comparison.mean_divergence == pytest.approx(
        divergence(tmp_path / "with", source, data).mean_divergence, rel=1e-2
    )


def test_blocks_are_fitted_to_the_quantized_embeddings(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, data = checkpoint("llama-tied"), Data.of(batches(), held_out=2)
    done = convert(source, tmp_path / "out", data, Recipe(Target(bits=2, group_size=32), embeddings=True))
    found = divergence(tmp_path / "out", source, data)
    assert done.comparison.mean_divergence == pytest.approx(found.mean_divergence, rel=1e-2)


def test_nested_precisions(checkpoint: Checkpoint, tmp_path: Path) -> None:
    recipe = Recipe(Target(bits=4, group_size=32, nested=(2,)))
    source, data = checkpoint("llama"), Data.of(batches(), held_out=2)
    convert(source, tmp_path / "with", data, recipe)
    convert_hf_to_lowbit(str(source), tmp_path / "without", recipe)
    found = [divergence(tmp_path / name, source, data, bits=2).mean_divergence for name in ("with", "without")]
    assert found[0] < 0.9 * found[1]


def test_training_all_scales_together_lowers_the_divergence_and_is_stored(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    recipe = Recipe(
        Target(bits=3, group_size=32, nested=(2,)), (Rule("*.v_proj", Target(bits=2, group_size=32)),), embeddings=True
    )
    source, data = checkpoint("llama-tied"), Data.of(batches(), held_out=2)
    done = convert(source, tmp_path / "out", data, recipe, TOGETHER, max_shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert list(done.quality) == [None, 2]
    for bits, quality in done.quality.items():
        found = divergence(tmp_path / "out", source, data, bits=bits)
        assert found.mean_divergence == pytest.approx(quality.after.mean_divergence, rel=1e-3)
        assert quality.after.mean_divergence < 0.9 * quality.before.mean_divergence
    reader = ModelReader(tmp_path / "out")
    assert reader.verify() == 0
    for path, outcome in done.outcomes.items():
        weight = torch.from_numpy(reader.decode(path))
        assert outcome.squared_norm > 0
        assert outcome.squared_error == pytest.approx(float((weight - original(source, path)).square().sum()), rel=1e-4)


def original(source: Path, path: str) -> torch.Tensor:
    with safe_open(source / "model.safetensors", "pt") as f:
        weight: torch.Tensor = f.get_tensor(f"{path}.weight").float()
    return weight


def test_encoders_and_lossless_layers_are_trained_together_too(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    def round_block(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if "layer.0." in name and "query.weight" in name:
                tensors[name] = tensors[name].sign() * 0.0625

    source = edit_weights(own_checkpoint("bert"), round_block)
    done = convert(source, tmp_path / "out", Data.of(batches(), held_out=2), effort=TOGETHER)
    (lossless,) = [path for path, o in done.outcomes.items() if o.lossless]
    assert torch.equal(torch.from_numpy(ModelReader(tmp_path / "out").decode(lossless)), original(source, lossless))
    quality = done.quality[None]
    assert quality.after.mean_cosine > quality.before.mean_cosine


def test_only_one_block_is_in_memory(checkpoint: Checkpoint, tmp_path: Path) -> None:
    opened, plan, _ = plan_conversion(str(checkpoint("llama")), RECIPE)
    quantizer = Calibrated(opened, plan, Data.of(batches()), QUICK, device=torch.device("cpu"))
    quantizer.begin(tmp_path, 0)
    model = quantizer._float.model
    assert not model.model.embed_tokens.weight.is_meta
    assert all(p.is_meta for p in model.model.layers.parameters())
    for step in quantizer.steps:
        if step.target is not None:
            quantizer.quantize(step, load_step(opened, step))
            assert all(p.is_meta for p in model.model.layers.parameters())
    assert quantizer.peak_memory() > plan.peak_memory()


def test_a_block_that_lies_on_a_grid_already_is_stored_without_loss(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    def round_block(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if "layers.0." in name and "proj" in name:
                tensors[name] = tensors[name].sign() * 0.0625

    source = edit_weights(own_checkpoint("llama"), round_block)
    done = convert(source, tmp_path / "out", Data.of(batches()))
    assert {path for path, o in done.outcomes.items() if o.lossless} == {p for p in done.outcomes if "layers.0." in p}


# --- interrupted -----------------------------------------------------------------------------------


def same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    return (
        names == sorted(path.name for path in other.iterdir())
        and not filecmp.cmpfiles(one, other, [name for name in names if name != "README.md"], shallow=False)[1]
    )


TRAINED = Effort(sweeps=1, steps=4, learning_rate=0.01, drift=False, samples=8, codes=True)


@pytest.mark.parametrize(
    "effort", [pytest.param(QUICK, marks=pytest.mark.exhaustive), TRAINED], ids=["quick", "trained"]
)
def test_interrupted_anywhere_it_goes_on_to_the_same_bytes(
    effort: Effort, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source, data = checkpoint("llama"), Data.of(batches(), held_out=1)
    convert(source, tmp_path / "whole", data, effort=effort)
    count = len(plan_conversion(str(source), RECIPE)[1].steps)
    for moment in range(0, count, 4):
        calls = 0

        def stop(*_: object, moment: int = moment) -> None:
            nonlocal calls
            calls += 1
            if calls == moment + 1:
                raise KeyboardInterrupt

        out = tmp_path / f"at {moment}"
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, data, effort=effort, report=stop)
        assert not out.exists()
        convert(source, out, data, effort=effort, resume=True)
        assert same_files(tmp_path / "whole", out)


def test_interrupted_at_the_end_it_goes_on_to_the_same_bytes(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While scales are trained, are kept, and while the shards are written again."""
    source, data = checkpoint("llama"), Data.of(batches(), held_out=1)
    options: Any = {"effort": replace(TOGETHER, passes=1), "max_shard_bytes": 15_000}
    moments = ("tune", "save_file", "replace_tensors", "replace_tensors", "end")
    calls: list[str] = []
    never = 99
    stop_at = never

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) == stop_at + 1 and name == "save_file":
                raise KeyboardInterrupt
            found = function(*args, **kwargs)
            if len(calls) == stop_at + 1:
                raise KeyboardInterrupt
            return found

        return call

    for name in ("tune", "save_file", "replace_tensors"):
        monkeypatch.setattr(together, name, watched(name, getattr(together, name)))
    monkeypatch.setattr(Calibrated, "end", watched("end", Calibrated.end))
    convert(source, tmp_path / "whole", data, **options)
    assert tuple(calls) == moments
    for moment in range(len(moments)):
        calls.clear()
        stop_at, out = moment, tmp_path / f"at {moment}"
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, data, **options)
        assert not out.exists()
        stop_at = never
        done = convert(source, out, data, resume=True, **options)
        assert done.quality[None].after.tokens > 0
        assert same_files(tmp_path / "whole", out)


def test_other_data_are_refused_on_resuming(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def stop(path: str, result: BlockResult) -> None:
        raise KeyboardInterrupt

    source = checkpoint("llama")
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", Data.of(batches()), report_block=stop)
    with pytest.raises(OutputError, match="other options"):
        convert(source, tmp_path / "out", Data.of(batches(seed=1)), resume=True)


# --- data that cannot be used ----------------------------------------------------------------------


def test_a_layer_that_too_little_data_reaches_is_quantized_without(checkpoint: Checkpoint, tmp_path: Path) -> None:
    few = [{"input_ids": torch.arange(4, 10)[None]}]
    done = convert(checkpoint("llama"), tmp_path / "out", Data.of(few))
    rounded = {"model.embed_tokens", "lm_head"}  # which need no data
    assert set(done.unseen) == set(done.outcomes) - rounded


def test_values_that_are_not_finite_are_told(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.post_attention_layernorm.weight"] *= 1e30

    source = edit_weights(own_checkpoint("llama"), enlarge)
    with pytest.raises(CalibrationError, match=r"model\.layers\.1.*not finite"):
        convert(source, tmp_path / "out", Data.of(batches()))
    assert not (tmp_path / "out").exists()


def from_file(source: Path, text: object, tmp_path: Path, **options: Any) -> Conversion:
    return convert_hf_to_lowbit(
        str(source), tmp_path / "out", RECIPE, calibration=Calibration(str(text), QUICK, **options)
    )


def test_text_and_tensors_from_files(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = with_tokenizer(own_checkpoint("llama"))
    (tmp_path / "text.txt").write_text("\n\n".join(" ".join(f"w{i % 90}" for i in range(j, j + 40)) for j in range(40)))
    done = from_file(source, tmp_path / "text.txt", tmp_path, samples=4, length=16)
    assert done.comparison is not None
    assert done.comparison.tokens == 16 * 15
    save_file({"input_ids": torch.randint(4, 90, (32, 12))}, tmp_path / "inputs.safetensors")
    done = convert_hf_to_lowbit(
        str(source), tmp_path / "two", RECIPE, calibration=Calibration(str(tmp_path / "inputs.safetensors"), QUICK)
    )
    assert done.comparison is not None
    assert done.comparison.tokens == 2 * 4 * 11
    done = convert_hf_to_lowbit(str(source), tmp_path / "three", RECIPE,
                                calibration=Calibration("self", QUICK, samples=8, length=12))  # fmt: skip
    assert done.comparison is not None


def test_an_encoder_gets_as_many_tokens_as_a_causal_model(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Of short texts more are taken; those held out are the last ones, not the longest."""
    source = with_tokenizer(own_checkpoint("bert"))
    words = [["w1", "w2"], ["w3"] * 30] * 200
    (tmp_path / "text.txt").write_text("\n".join(map(" ".join, words)))
    data = read_data(Calibration(str(tmp_path / "text.txt"), samples=8, length=24), source)
    calibrated, held_out = (
        [int(row.sum()) for batch in part for row in batch["attention_mask"]]
        for part in (data.batches[: -data.held_out], data.batches[-data.held_out :])
    )
    assert sum(calibrated) > 0.9 * 8 * 24
    assert len(held_out) > 16
    for part in (calibrated, held_out):
        assert max(part) == 24
        assert part.count(24) == pytest.approx(len(part) / 2, abs=1)


def test_what_is_wrong_with_the_data_is_said(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = own_checkpoint("llama")
    text = tmp_path / "text.txt"
    text.write_text("w1 w2 w3\n" * 30)
    with pytest.raises(CalibrationError, match="has no tokenizer"):
        from_file(source, text, tmp_path)
    with_tokenizer(source)
    cases = {
        "no such file": from_file_error(source, tmp_path / "absent.txt", tmp_path),
        "expected 20 samples of 50": from_file_error(source, text, tmp_path, samples=4, length=50),
        "expected one of fast, default, high": _error(
            lambda: convert_hf_to_lowbit(str(source), tmp_path / "out", calibration=Calibration(str(text), "best"))
        ),
        "torch cannot use": from_file_error(source, text, tmp_path, samples=1, length=4, device="nowhere"),
    }
    (tmp_path / "lines.jsonl").write_text('{"text": "w1"}\n{"messages": [{"role": "user", "content": "w2"}]}\n')
    cases["line 2: has messages"] = from_file_error(source, tmp_path / "lines.jsonl", tmp_path)
    (tmp_path / "lines.jsonl").write_text('{"text": "w1"}\nno json\n')
    cases["line 2: is not JSON"] = from_file_error(source, tmp_path / "lines.jsonl", tmp_path)
    (tmp_path / "lines.jsonl").write_text('{"words": "w1"}\n')
    cases['expected an object with "text"'] = from_file_error(source, tmp_path / "lines.jsonl", tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    cases["holds no text"] = from_file_error(source, tmp_path / "empty.txt", tmp_path)
    save_file({"input_ids": torch.ones(3, 2), "attention_mask": torch.ones(2, 2)}, tmp_path / "odd.safetensors")
    cases["numbers of samples are"] = from_file_error(source, tmp_path / "odd.safetensors", tmp_path)
    for expected, message in cases.items():
        assert expected in message
    assert list(tmp_path.glob("*out*")) == []


def from_file_error(source: Path, text: Path, tmp_path: Path, **options: Any) -> str:
    return _error(lambda: from_file(source, text, tmp_path, **options))


def _error(act: Callable[[], object]) -> str:
    with pytest.raises(CalibrationError) as caught:
        act()
    return str(caught.value)


def test_a_tokenizer_of_another_model_is_told(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    import json

    source = with_tokenizer(own_checkpoint("llama"))
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["w1"] = 5000
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4\n" * 100)
    assert "knows 96 tokens" in from_file_error(source, tmp_path / "text.txt", tmp_path, samples=4, length=8)


def test_efforts_grow() -> None:
    assert [name for name, _ in sorted(EFFORTS.items(), key=lambda e: (e[1].steps, e[1].sweeps))] == [
        "fast",
        "default",
        "high",
    ]
