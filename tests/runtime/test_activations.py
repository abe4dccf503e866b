"""``set_activations`` and ``from_pretrained(activations=…)``: what they reach, and what they leave alone."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support.building import write_model
from support.experts import FAMILIES
from support.models import llama_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import lowbit_format as lb
from lowbit_format.errors import UnsupportedOperationError
from lowbit_format.kernels.cpu.byte_tables import has_byte_lookup
from lowbit_format.machine.llvm import features
from lowbit_format.runtime.decoder_layer import DecoderLayer
from lowbit_format.runtime.experts import LowbitExperts
from lowbit_format.runtime.modules import LowbitLinear, LowbitModule
from lowbit_format.schema import Scheme

IDS = torch.tensor([[5, 9, 2, 33, 17, 60, 1], [8, 8, 40, 3, 21, 4, 50]])
needs_lookup = pytest.mark.skipif(not has_byte_lookup(features()), reason="bytes are not looked up here")


def planes(path: str, module: nn.Module) -> Scheme | None:
    return Scheme("bcq", 4, 16, "F16", offset=True, nested=(2,)) if isinstance(module, nn.Linear) else None


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_model(LlamaForCausalLM(llama_config(False)), tmp_path_factory.mktemp("llama") / "model", planes)


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def logits(model: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(IDS, **options).logits
    return out


def off(found: Tensor, want: Tensor) -> float:
    return float((found - want).norm() / want.norm())


@needs_lookup
def test_on_a_loaded_model_and_back(llama: Path) -> None:
    model = load(llama)
    exact = logits(model)
    lb.set_activations(model, "int8")
    rounded = logits(model)
    assert 1e-5 < off(rounded, exact) < 0.1
    assert torch.equal(logits(lb.from_pretrained(llama, dtype=torch.float32, activations="int8").eval()), rounded)
    assert torch.equal(logits(copy.deepcopy(model)), rounded)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), rounded)
    lb.set_activations(model, "exact")
    assert torch.equal(logits(model), exact)


@needs_lookup
def test_a_lower_precision(llama: Path) -> None:
    model = lb.from_pretrained(llama, bits=2, dtype=torch.float32).eval()
    exact = logits(model)
    lb.set_activations(model, "int8")
    rounded = logits(model)
    assert 1e-5 < off(rounded, exact) < 0.1


@needs_lookup
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_with_shortened_layers(llama: Path, dtype: torch.dtype) -> None:
    """Layers are compared exactly, so rounding does not leave them to their class."""
    model = lb.from_pretrained(llama, dtype=dtype, activations="int8").eval()
    found = model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert found.shape == (2, 12)
    layers = [m for m in model.modules() if isinstance(m, DecoderLayer)]
    assert layers
    assert all(layer.same_with for layer in layers)
    assert all(m.activations == "int8" for m in model.modules() if isinstance(m, LowbitLinear))


def test_a_saved_model_is_the_same(llama: Path, tmp_path: Path) -> None:
    model = load(llama)
    lb.set_activations(model, "int8")
    logits(model)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert all(m.activations == "exact" for m in again.modules() if isinstance(m, LowbitModule))
    assert torch.equal(logits(again), logits(load(llama)))


@pytest.mark.parametrize("activations", ["int4", "", "INT8", None])
def test_unknown_values(llama: Path, activations: Any) -> None:
    model = load(llama)
    with pytest.raises(UnsupportedOperationError, match="expected 'exact' or 'int8'"):
        lb.set_activations(model, activations)
    with pytest.raises(UnsupportedOperationError, match="expected 'exact' or 'int8'"):
        lb.from_pretrained(llama / "missing", activations=activations)


def test_a_model_without_planes() -> None:
    with pytest.raises(UnsupportedOperationError, match="no quantized matrix"):
        lb.set_activations(nn.Linear(2, 2), "int8")


def test_a_model_on_a_gpu(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(llama)
    monkeypatch.setattr(LowbitLinear, "device", torch.device("cuda", 0))
    with pytest.raises(UnsupportedOperationError, match=r"q_proj is on cuda:0, and activations='int8' is for a CPU"):
        lb.set_activations(model, "int8")
    lb.set_activations(model, "exact")


@needs_lookup
def test_experts(tmp_path: Path) -> None:
    """Also those whose matrices are tiled already."""
    torch.manual_seed(0)
    FAMILIES["qwen3-moe"]().save_pretrained(tmp_path / "source")
    lb.convert_hf_to_lowbit(tmp_path / "source", tmp_path / "model", lb.Recipe(lb.Target(bits=4, group_size=16)))
    model = load(tmp_path / "model")
    exact = logits(model)
    stacks = [m for m in model.modules() if isinstance(m, LowbitExperts)]
    assert stacks
    assert all(m.is_tiled for m in stacks)
    lb.set_activations(model, "int8")
    assert all(m.matrix_of(0).activations == "int8" for m in stacks)
    assert 1e-6 < off(logits(model), exact) < 0.1
    lb.set_activations(model, "exact")
    assert torch.equal(logits(model), exact)


@needs_lookup
def test_compiled_models(llama: Path) -> None:
    """A compiled graph computes with the activations that the model has when it runs."""
    model = load(llama)
    mlp, x = model.model.layers[0].mlp, torch.randn(3, 32)
    compiled = torch.compile(mlp, backend="eager", fullgraph=True)
    with torch.no_grad():
        exact = mlp(x)
        for activations in ("int8", "exact"):
            lb.set_activations(model, activations)
            assert torch.equal(mlp(x), exact) == (activations == "exact")
            assert torch.equal(compiled(x), mlp(x))
