"""LoRA over a lowbit model: PEFT accepts the modules as they are, and merging is refused with a named error."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.building import write_model
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel, PreTrainedModel

import lowbit_format
from lowbit_format import Recipe, Target
from lowbit_format.errors import TaskError, UnsupportedOperationError
from lowbit_format.runtime.modules import LowbitEmbedding
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


@pytest.mark.filterwarnings("ignore")
def test_preparing_for_training_changes_no_file(model: PreTrainedModel, tmp_path: Path) -> None:
    """PEFT casts every float16 parameter to float32 there; the planes' parameters have a dtype in the file."""
    twin = peft.prepare_model_for_kbit_training(copy.deepcopy(model))
    assert torch.equal(twin(input_ids=IDS).logits, model(input_ids=IDS).logits)
    twin.save_pretrained(tmp_path)
    again = lowbit_format.from_pretrained(tmp_path, verify=True)
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert {p.dtype for p in twin.transformer.h[0].mlp.c_fc.matrix_parameters().values()} == {
        torch.uint8,
        torch.float16,
    }


@pytest.mark.filterwarnings("ignore")
def test_adapter_and_task_together(model: PreTrainedModel, tmp_path: Path) -> None:
    """The scales of a task lie under an adapter; each is chosen by itself, and both merge into a float model."""
    base = copy.deepcopy(model)
    lowbit_format.prepare_scale_tuning(base, method="scales", name="task")
    for name, p in base.named_parameters():
        if ".tuned." in name:
            nn.init.normal_(p, std=0.1)
    lowbit_format.save_task(base, tmp_path / "task", name="task")
    bundle, config = tmp_path / "task", peft.LoraConfig(target_modules=["c_attn", "c_fc"], init_lora_weights=False)

    def logits(tuned: PreTrainedModel, rows: torch.Tensor = IDS) -> torch.Tensor:
        with torch.no_grad():
            return tuned(input_ids=rows).logits  # type: ignore[no-any-return]

    first = copy.deepcopy(model)  # the task, then the adapter
    lowbit_format.load_task(first, bundle)
    lowbit_format.set_task(first, "task")
    with_task = logits(first)
    torch.manual_seed(1)
    tuned = peft.get_peft_model(first, config).eval()
    found = logits(tuned)
    torch.manual_seed(1)
    other = peft.get_peft_model(copy.deepcopy(model), config).eval()  # the adapter, then the task
    without_task = logits(other)
    lowbit_format.load_task(other, bundle)
    lowbit_format.set_task(other, "task")
    assert torch.equal(logits(other), found)
    lowbit_format.set_task(other, None)
    assert torch.equal(logits(other), without_task)
    with other.disable_adapter(), lowbit_format.use_tasks(other, "task"):
        assert torch.equal(logits(other), with_task)
    with lowbit_format.use_tasks(other, ["task", None]):
        rows = logits(other, IDS.repeat(2, 1))
    torch.testing.assert_close(rows, torch.cat([found, without_task]), rtol=1e-4, atol=1e-5)
    lowbit_format.save_task(tuned, tmp_path / "again", name="task")
    assert (tmp_path / "again" / "task_scales.safetensors").read_bytes() == (
        bundle / "task_scales.safetensors"
    ).read_bytes()

    tuned.dequantize()
    merged = tuned.merge_and_unload()
    torch.testing.assert_close(logits(merged), found, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_scales_in_training_get_gradients_through_a_method_that_reads_the_weight(model: PreTrainedModel) -> None:
    """HRA multiplies by the weight itself; ``.data`` hides gradients there, as in a float model."""
    base = copy.deepcopy(model)
    lowbit_format.prepare_scale_tuning(base, method="scales")
    module = base.transformer.h[0].mlp.c_fc
    assert torch.equal(module.weight, module.dequantize())
    (module.weight**2).sum().backward()
    assert module.tuned.scales.grad.abs().sum() > 0
    assert not (module.weight.data**2).requires_grad


@pytest.mark.filterwarnings("ignore")
def test_rows_of_several_tasks_have_several_weights(model: PreTrainedModel, tmp_path: Path) -> None:
    base = copy.deepcopy(model)
    lowbit_format.prepare_scale_tuning(base, method="scales", name="task")
    lowbit_format.save_task(base, tmp_path, name="task")
    tuned = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["c_fc"], use_dora=True)).eval()
    lowbit_format.load_task(tuned, tmp_path, name="task")
    with lowbit_format.use_tasks(tuned, "task"):
        tuned(input_ids=IDS)
    with (
        lowbit_format.use_tasks(tuned, ["task", None]),
        pytest.raises(TaskError, match=r"c_fc: its weight is read.*separate batch"),
    ):
        tuned(input_ids=IDS.repeat(2, 1))


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_a_scaled_embedding(tmp_path: Path) -> None:
    """Gemma multiplies what it looks up; PEFT then multiplies what the adapter adds, too."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "num_hidden_layers": 1}
    config = Gemma3TextConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    Gemma3ForCausalLM(config).save_pretrained(tmp_path / "float")
    recipe = Recipe(Target(bits=4, group_size=16), embeddings=True)
    lowbit_format.convert_hf_to_lowbit(str(tmp_path / "float"), tmp_path / "out", recipe)
    lowbit = lowbit_format.from_pretrained(tmp_path / "out")
    assert isinstance(lowbit.get_input_embeddings(), LowbitEmbedding)
    found = []
    for base in (lowbit, copy.deepcopy(lowbit).dequantize()):
        torch.manual_seed(1)
        adapter = peft.LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False)
        found.append(peft.get_peft_model(base, adapter).eval()(input_ids=IDS).logits)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_add_adapter_saves_the_adapter_only(model: PreTrainedModel, tmp_path: Path) -> None:
    twin = copy.deepcopy(model)
    twin.add_adapter(peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    twin.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "model.safetensors").exists()
