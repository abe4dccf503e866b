"""Weights that a model reads without calling their module stay in full precision by themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.checkpoints import SPECIAL
from torch import nn

from lowbit_format.converters import Recipe, Rule, convert_hf_to_lowbit
from lowbit_format.converters.reads import READ, weights_read
from lowbit_format.quantize import Target

Checkpoint = Callable[..., Path]

RECIPE = Recipe(rules=(Rule("*", Target(bits=3, group_size=16)),))
SOUND = {"input_values": torch.linspace(-1, 1, 2000).reshape(1, -1)}
TEXT = {"input_ids": torch.arange(1, 7)[None]}
PICTURE = {"pixel_values": torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)}

READS = {
    "mamba": (transformers.AutoModelForCausalLM, TEXT, {"dt_proj"}),
    "bloom-exact": (transformers.AutoModelForCausalLM, TEXT, {"dense", "dense_4h_to_h"}),
    "bloom": (transformers.AutoModelForCausalLM, TEXT, set()),
    "detr": (transformers.DetrForSegmentation, PICTURE, {"k_proj", "query_position_embeddings"}),
    "wavlm": (transformers.AutoModel, SOUND, {"q_proj", "k_proj", "v_proj", "out_proj"}),
}


@pytest.mark.parametrize("name", READS)
def test_they_are_kept_by_name_and_the_first_call_works(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    load, inputs, kept = READS[name]
    done = convert_hf_to_lowbit(str(checkpoint(name)), tmp_path / "out", RECIPE)
    assert {s.destination.path.split(".")[-1] for s in done.plan.kept() if s.reason == READ} == kept
    with torch.no_grad():
        load.from_pretrained(tmp_path / "out").eval()(**inputs)


class Reader(nn.Module):
    """Reads one weight, calls one module, looks at the dtype of a third, and never comes to the last."""

    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.config = transformers.PreTrainedConfig()
        self.read, self.called, self.looked, self.never = (nn.Linear(4, 4, device="meta") for _ in range(4))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.called(input_ids[..., None].expand(1, input_ids.shape[1], 4).to(self.looked.weight.dtype))
        return self.looked(nn.functional.linear(x, self.read.weight))


@pytest.mark.parametrize("main", ["input_ids", ["input_ids", "task_inputs"]], ids=["one", "several"])
def test_only_what_meets_an_operation_outside_of_its_module_is_read(main: Any) -> None:
    """Some models, such as OneFormer, have a list of main inputs."""
    model = Reader()
    model.main_input_name = main
    modules: dict[str, Any] = {name: m for name, m in model.named_modules() if name}
    assert weights_read(model, modules) == {"read"}


def test_where_no_forward_can_be_run_the_source_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = SPECIAL["mamba"]()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr(type(model), "forward", fail)
    monkeypatch.setattr(type(model.backbone), "forward", fail)
    modules = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert weights_read(model, modules) == {"backbone.layers.0.mixer.dt_proj"}


def test_a_list_of_modules_is_looked_at_too() -> None:
    """The points of a prompt, which a forward without points does not come to."""
    config = transformers.SamPromptEncoderConfig(
        hidden_size=32, image_size=32, patch_size=8, image_embedding_size=4, mask_input_channels=4
    )
    with torch.device("meta"):
        model = transformers.SamModel(transformers.SamConfig(prompt_encoder_config=config.to_dict()))
    modules = {name: m for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    assert {f"prompt_encoder.point_embed.{i}" for i in range(4)} <= weights_read(model, modules)
