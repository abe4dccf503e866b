"""Models with experts, from the checkpoint to the packed module: every family, and what can be done with one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.experts import FAMILIES, build
from transformers import AutoModelForCausalLM

import lowbit_format as lb
from lowbit_format.container.reader import ModelReader
from lowbit_format.converters import Recipe, Rule, convert_hf_to_lowbit
from lowbit_format.errors import LoadError, UnsupportedOperationError
from lowbit_format.export import dequantize_directory
from lowbit_format.integrations.model import trained_state_dict
from lowbit_format.integrations.placement import Placement, refuse_offloaded_experts
from lowbit_format.quantize import Target
from lowbit_format.runtime.experts import LowbitExperts
from lowbit_format.schema import ModuleEntry, Scheme

IDS = torch.arange(1, 13).reshape(2, 6)
RECIPE = Recipe(Target(bits=3, group_size=32, nested=(2,)))


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.eval()(ids).logits
    return out


def load(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, **options).eval()


def names(directory: Path) -> set[str]:
    return {key for file in directory.glob("*.safetensors") for key in safe_open(file, "pt").keys()}  # noqa: SIM118


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # sums in another order


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A directory with ``source``, ``lowbit`` and ``float``, which is decoded, of a family; made once."""
    done: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in done:
            at = tmp_path_factory.mktemp(name)
            build(name).save_pretrained(at / "source")
            convert_hf_to_lowbit(str(at / "source"), at / "lowbit", RECIPE)
            dequantize_directory(ModelReader(at / "lowbit"), at / "float")
            done[name] = at
        return done[name]

    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_computes_what_the_decoded_model_computes(name: str, made: Callable[[str], Path]) -> None:
    at = made(name)
    reader = ModelReader(at / "lowbit")
    assert reader.verify() == 0
    stacks = [m for m in reader.config if m.experts is not None]
    assert len(stacks) in (2, 4)
    assert names(at / "float") == names(at / "source")  # each expert's tensors, where the checkpoint had those
    model, expected = load(at / "lowbit"), load(at / "float")
    assert sum(isinstance(m, LowbitExperts) for m in model.modules()) == len(stacks)
    assert_close(logits(model), logits(expected))
    assert_close(logits(model, IDS[:1, :1]), logits(expected, IDS[:1, :1]))  # one token: most experts get none


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "llama4", "nemotron-h"])
def test_saves_and_dequantizes(name: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    at = made(name)
    model = load(at / "lowbit")
    expected = logits(model)
    model.save_pretrained(tmp_path / "saved")
    assert ModelReader(tmp_path / "saved").verify() == 0
    assert ModelReader(tmp_path / "saved").fingerprint() == ModelReader(at / "lowbit").fingerprint()
    assert torch.equal(logits(load(tmp_path / "saved")), expected)
    plain = model.dequantize()
    assert_close(logits(plain), logits(load(at / "float")))
    plain.save_pretrained(tmp_path / "plain")
    assert names(tmp_path / "plain") == names(at / "source")
    assert_close(logits(load(tmp_path / "plain")), expected)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_a_lower_precision_is_that_of_the_decoded_prefix(
    name: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    at = made(name)
    model = lb.from_pretrained(at / "lowbit", bits=2, verify=True)
    stack = next(m for m in model.modules() if isinstance(m, LowbitExperts))
    assert stack.planes.shape[:2] == (4, 2)
    dequantize_directory(ModelReader(at / "lowbit"), tmp_path / "float", bits=2)
    assert_close(logits(model), logits(load(tmp_path / "float")))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_generates_copies_and_pickles(made: Callable[[str], Path]) -> None:
    at = made("mixtral")
    model, expected = load(at / "lowbit"), load(at / "float")
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(IDS, **options), expected.generate(IDS, **options))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), logits(model))
    state = model.state_dict()
    assert "model.layers.0.mlp.experts.gate_up_proj_planes" in state
    fresh = load(at / "lowbit")
    for parameter in fresh.parameters():
        parameter.data.zero_()
    fresh.load_state_dict(state)
    assert torch.equal(logits(fresh), logits(model))
    with pytest.raises(RuntimeError, match="gate_up_proj_scales"):
        fresh.load_state_dict({k: v for k, v in state.items() if not k.endswith("0.mlp.experts.gate_up_proj_scales")})
    with pytest.raises(RuntimeError, match="gate_up_proj_nothing"):
        fresh.load_state_dict({**state, "model.layers.0.mlp.experts.gate_up_proj_nothing": IDS})
    half = model.to(torch.bfloat16)
    assert next(m for m in half.modules() if isinstance(m, LowbitExperts)).scales.dtype == torch.float16
    torch.testing.assert_close(logits(half).float(), logits(expected.to(torch.bfloat16)).float(), rtol=0.1, atol=0.1)


def test_one_of_two_stacks_may_stay_in_full_precision(made: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("mixtral", "gpt-oss"):
        source, out = made(name) / "source", tmp_path / name
        rule = Rule("*.experts.down_proj", None)
        convert_hf_to_lowbit(str(source), out / "lowbit", Recipe(RECIPE.default, (rule,)), min_coverage=0.5)
        dequantize_directory(ModelReader(out / "lowbit"), out / "float")
        assert names(out / "float") == names(source)
        assert {n for n in names(source) if "down_proj" in n or ".w2." in n} <= names(out / "lowbit")
        model = load(out / "lowbit")
        assert sum(isinstance(m, LowbitExperts) for m in model.modules()) == 2
        assert_close(logits(model), logits(load(out / "float")))
        model.save_pretrained(out / "saved")
        assert torch.equal(logits(load(out / "saved")), logits(model))


def test_weights_for_other_experts_than_were_chosen_are_refused(made: Callable[[str], Path]) -> None:
    """As a router of transformers 5.0 gives them."""
    model = load(made("mixtral") / "lowbit")
    experts = model.model.layers[0].mlp.experts
    hidden, index = torch.ones(3, 32), torch.tensor([[0, 1]] * 3)
    assert experts(hidden, index, torch.ones(3, 2)).shape == (3, 32)
    with pytest.raises(
        UnsupportedOperationError, match=r"Experts gets weights \[3, 4\] for chosen experts \[3, 2\].*newer"
    ):
        experts(hidden, index, torch.ones(3, 4))


def test_a_config_of_other_experts_is_refused(made: Callable[[str], Path]) -> None:
    with pytest.raises(LoadError, match=r"parameter \[4, 32, 48\]; .* is \[5, 32, 48\]"):
        load(made("mixtral") / "lowbit", num_local_experts=5)


def test_what_a_checkpoint_of_training_holds_is_read_back(made: Callable[[str], Path]) -> None:
    model, twin = load(made("mixtral") / "lowbit"), load(made("mixtral") / "lowbit")
    for one in (model, twin):
        lb.prepare_scale_tuning(one)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    state = trained_state_dict(model)
    assert any("experts.gate_up_proj.tuned" in name for name in state)
    twin.load_state_dict(state, strict=False)
    assert torch.equal(logits(twin), logits(model))


@pytest.mark.parametrize("other", ["disk", "cpu beside a GPU"])
def test_offloading_by_a_device_map_is_refused(other: str) -> None:
    entry = ModuleEntry("model.layers.1.mlp.experts.up_proj", Scheme(), "experts", (4, 8, 8))
    placed = Placement({entry.path: entry, "lm_head": ModuleEntry("lm_head", Scheme(), "linear", (8, 8))})
    away, main = (other, "cpu") if other == "disk" else ("cpu", 0)
    refuse_offloaded_experts(placed, {"": away, "model.layers.1": main})
    refuse_offloaded_experts(placed, {"model.layers.1": main, "lm_head": away})
    refuse_offloaded_experts(placed, {"": "cpu"})
    for device_map in ({"": main, "model.layers.1.mlp": away}, {"model.layers": away, "lm_head": main}):
        with pytest.raises(LoadError, match="cannot be offloaded"):
            refuse_offloaded_experts(placed, device_map)


def test_offloading_is_refused(made: Callable[[str], Path], tmp_path: Path) -> None:
    devices = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    devices |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    at = made("mixtral") / "lowbit"
    with pytest.raises(LoadError, match="cannot be offloaded"):
        load(at, device_map=devices, offload_folder=tmp_path)
    assert torch.equal(logits(load(at, device_map={"": "cpu"})), logits(load(at)))
