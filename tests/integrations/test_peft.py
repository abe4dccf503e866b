"""LoRA over a lowbit model: PEFT accepts the modules as they are, and merging is refused with a named error."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from support.building import write_model
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

import lowbit_format
from lowbit_format.errors import UnsupportedOperationError
from lowbit_format.schema import Scheme

peft = pytest.importorskip("peft")
IDS = torch.tensor([[5, 9, 2, 33, 17]])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=1)
    path = write_model(GPT2LMHeadModel(config), tmp_path_factory.mktemp("m") / "m", lambda p, m: Scheme("bcq", 2, 8))
    loaded: PreTrainedModel = lowbit_format.from_pretrained(path)
    return loaded


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", [["c_attn", "c_fc"], ["c_proj", "wte"]])
def test_lora(model: PreTrainedModel, targets: list[str], tmp_path: Path) -> None:
    tuned = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=targets, lora_dropout=0.0))
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], 1.0)
    for _ in range(2):
        loss = tuned(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
    assert tuned(input_ids=IDS, labels=IDS).loss < loss
    tuned.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert torch.equal(again.eval()(input_ids=IDS).logits, tuned.eval()(input_ids=IDS).logits)
    with tuned.disable_adapter():
        assert torch.equal(tuned(input_ids=IDS).logits, model(input_ids=IDS).logits)
    with pytest.raises(UnsupportedOperationError, match="dequantize"):
        tuned.merge_and_unload()


def test_add_adapter_saves_the_adapter_only(model: PreTrainedModel, tmp_path: Path) -> None:
    twin = copy.deepcopy(model)
    twin.add_adapter(peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    twin.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "model.safetensors").exists()
