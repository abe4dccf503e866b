"""Conversion of mixtures of experts with data: nearer than without, loaded as decoded, resumable, and said truly."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import edit_weights, weights
from support.conversions import content
from support.experts import build
from transformers import AutoModelForCausalLM

import lowbit_format as lb
from lowbit_format.calibration.data import Data
from lowbit_format.calibration.effort import Effort
from lowbit_format.calibration.ladder import BlockResult
from lowbit_format.container.reader import ModelReader
from lowbit_format.converters import Calibration, Conversion, Recipe, Rule, convert_hf_to_lowbit, plan_conversion
from lowbit_format.converters.calibrated import Calibrated
from lowbit_format.converters.plan import BASE_MEMORY
from lowbit_format.converters.steps import load_step
from lowbit_format.export import dequantize_directory
from lowbit_format.quantize import Target, quantize
from lowbit_format.reference import decode

QUICK = Effort(sweeps=2, steps=0, learning_rate=0.0, drift=True, samples=8)
TARGET = Target(bits=3, group_size=32)
RECIPE = Recipe(TARGET)
STACKS = ["gate_up_proj", "down_proj"]
Source = Callable[[str], Path]


def batches(count: int = 8, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(4, 90, (4, 24), generator=generator)} for _ in range(count)]


def convert(source: Path, out: Path, recipe: Recipe = RECIPE, effort: Effort = QUICK, **options: Any) -> Conversion:
    data = options.pop("data", Data.of(batches(), held_out=2))
    return convert_hf_to_lowbit(str(source), out, recipe, calibration=Calibration(data, effort), **options)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A checkpoint of a family of experts; made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "source"
            build(name).save_pretrained(made[name])
        return made[name]

    return make


def load(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, **options).eval()


def hidden(model: Any, data: list[dict[str, torch.Tensor]], layer: int) -> torch.Tensor:
    """The hidden states behind a layer."""
    with torch.no_grad():
        found = [model(**batch, output_hidden_states=True).hidden_states[layer] for batch in data]
    return torch.cat(found)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_blocks_are_nearer_than_without_data_and_load_as_decoded(name: str, source: Source, tmp_path: Path) -> None:
    data = batches()
    done = convert(source(name), tmp_path / "with")
    convert_hf_to_lowbit(str(source(name)), tmp_path / "without", RECIPE)
    plain, model, without = (load(at) for at in (source(name), tmp_path / "with", tmp_path / "without"))
    for layer in (1, 2):
        wanted = hidden(plain, data[:6], layer)
        errors = [float((hidden(m, data[:6], layer) - wanted).square().sum()) for m in (model, without)]
        assert errors[0] < 0.7 * errors[1]
    assert sum(o.module.experts is not None for o in done.outcomes.values()) == 4
    assert done.comparison is not None
    reader = ModelReader(tmp_path / "with")
    assert reader.verify() == 0
    dequantize_directory(reader, tmp_path / "float")
    decoded = load(tmp_path / "float")
    torch.testing.assert_close(hidden(model, data[6:], 2), hidden(decoded, data[6:], 2), rtol=1e-3, atol=1e-4)
    routers = [key for key in weights(source(name)) if re.search(r"(gate|router)\.(weight|bias)$", key)]
    assert len(routers) >= 2
    for key in routers:
        assert bytes(reader.raw(key)) == weights(source(name))[key].numpy().tobytes()


def test_stacks_in_the_checkpoint_give_the_same(source: Source, tmp_path: Path) -> None:
    each = source("qwen3-moe")
    assert any(".experts.2.up_proj" in key for key in weights(each))
    whole = tmp_path / "source"
    whole.mkdir()
    (whole / "config.json").write_bytes((each / "config.json").read_bytes())
    save_file(load(each).state_dict(), whole / "model.safetensors", {"format": "pt"})
    assert any(key.endswith(".experts.gate_up_proj") for key in weights(whole))
    for at, out in ((each, "each"), (whole, "whole")):
        convert(at, tmp_path / out)
    prints = [ModelReader(tmp_path / name).fingerprint() for name in ("each", "whole")]
    assert prints[0] == prints[1]


def test_an_expert_without_data_is_named_and_quantized_as_without(source: Source, tmp_path: Path) -> None:
    def never(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.router.weight"] *= 0.02
        tensors["model.layers.1.mlp.router.bias"].zero_()[2] = -1e4

    own = tmp_path / "source"
    build("gpt-oss").save_pretrained(own)
    edit_weights(own, never)
    done = convert(own, tmp_path / "out", effort=Effort(sweeps=1, steps=2, learning_rate=0.01, drift=False, samples=8))
    assert done.unseen == ("model.layers.1.mlp.experts (1 of 4 experts)",)
    reader, plain = ModelReader(tmp_path / "out"), weights(own)
    for name in STACKS:
        path = f"model.layers.1.mlp.experts.{name}"
        for expert in (1, 2):
            alone = quantize(np.ascontiguousarray(plain[path][expert].T.numpy()), TARGET).matrix
            same = np.array_equal(decode(reader.matrix(path, expert)), decode(alone))
            assert same == (expert == 2)


def test_a_module_that_no_data_reaches(source: Source, tmp_path: Path) -> None:
    few = Data.of([{"input_ids": torch.arange(4, 10)[None]}])
    done = convert(source("mixtral"), tmp_path / "out", data=few)
    convert_hf_to_lowbit(str(source("mixtral")), tmp_path / "without", RECIPE)
    assert "model.layers.1.mlp.experts (4 of 4 experts)" in done.unseen
    prints = [ModelReader(tmp_path / name).fingerprint() for name in ("out", "without")]
    assert prints[0] == prints[1]


def test_kept_stacks_and_those_on_a_grid(source: Source, tmp_path: Path) -> None:
    def round_experts(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if "layers.0." in name and "experts" in name and "w2" in name:
                tensors[name] = tensors[name].sign() * 0.0625

    own = tmp_path / "source"
    build("mixtral").save_pretrained(own)
    edit_weights(own, round_experts)
    rules = Rule("*.1.mlp.experts.gate_up_proj", None), Rule("*.self_attn.*", None)
    recipe = Recipe(TARGET, rules, embeddings=False, lm_head=False)
    done = convert(own, tmp_path / "out", recipe, min_coverage=0.0)
    stacks = {path: o.lossless for path, o in done.outcomes.items()}
    at = "model.layers.{}.mlp.experts.{}"
    assert stacks == {
        at.format(0, "gate_up_proj"): False,
        at.format(0, "down_proj"): True,
        at.format(1, "down_proj"): False,
    }
    assert done.comparison is not None
    assert done.comparison.mean_divergence < 0.05


def test_nested_precisions(source: Source, tmp_path: Path) -> None:
    recipe, data = Recipe(Target(bits=3, group_size=32, nested=(2,))), batches()
    convert(source("mixtral"), tmp_path / "with", recipe)
    convert_hf_to_lowbit(str(source("mixtral")), tmp_path / "without", recipe)
    wanted, errors = hidden(load(source("mixtral")), data[:6], 2), []
    for name in ("with", "without"):
        model = lb.from_pretrained(tmp_path / name, bits=2).eval()
        errors.append(float((hidden(model, data[:6], 2) - wanted).square().sum()))
    assert errors[0] < 0.8 * errors[1]


def test_training_lowers_the_error_of_a_block(source: Source, tmp_path: Path) -> None:
    results: list[BlockResult] = []
    effort = Effort(sweeps=2, steps=24, learning_rate=0.01, drift=False, samples=8, codes=True)
    only_experts = Recipe(TARGET, (Rule("*.self_attn.*", None),))
    report: Callable[[str, BlockResult], None] = lambda path, result: results.append(result)  # noqa: E731
    convert(source("llama4"), tmp_path / "out", only_experts, effort, min_coverage=0.0, report_block=report)
    assert len(results) == 2
    for result in results:
        assert result.errors[result.last] < result.errors["layer by layer"]


def test_interrupted_it_goes_on_to_the_same_bytes(source: Source, tmp_path: Path) -> None:
    effort = Effort(sweeps=1, steps=2, learning_rate=0.01, drift=True, samples=8)
    convert(source("mixtral"), tmp_path / "whole" / "out", effort=effort)
    _, plan, _ = plan_conversion(str(source("mixtral")), RECIPE)
    quantizer = Calibrated(*plan_conversion(str(source("mixtral")), RECIPE)[:2], Data.of(batches()), QUICK,
                           device=torch.device("cpu"))  # fmt: skip
    stacks = [i for i, step in enumerate(quantizer.steps) if step.stack is not None]
    assert len(plan.steps) == len(quantizer.steps)
    for moment in (stacks[0], stacks[-1]):
        calls = 0

        def stop(*_: object, moment: int = moment) -> None:
            nonlocal calls
            calls += 1
            if calls == moment + 1:
                raise KeyboardInterrupt

        out = tmp_path / f"at {moment}" / "out"
        with pytest.raises(KeyboardInterrupt):
            convert(source("mixtral"), out, effort=effort, report=stop)
        convert(source("mixtral"), out, effort=effort, resume=True)
        assert content(out) == content(tmp_path / "whole" / "out")


def test_only_one_block_is_in_memory_and_its_stacks_are_counted(source: Source, tmp_path: Path) -> None:
    opened, plan, _ = plan_conversion(str(source("gpt-oss")), RECIPE)
    quantizer = Calibrated(opened, plan, Data.of(batches()), QUICK, device=torch.device("cpu"))
    inside = sum(s.tensor.numel for s in plan.steps if "layers.1." in s.tensor.name)
    assert sum(s.tensor.numel for s in plan.steps if s.stack is not None) > inside  # experts of both layers
    assert quantizer.peak_memory() > BASE_MEMORY + 8 * inside
    quantizer.begin(tmp_path, 0)
    layers = quantizer._float.model.model.layers
    for step in quantizer.steps:
        if step.stack is not None:
            quantizer.quantize_stack(opened, step)
        elif step.target is not None:
            quantizer.quantize(step, load_step(opened, step))
        assert all(p.is_meta for p in layers.parameters())
