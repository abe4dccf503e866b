"""Models of several parts: the names of the original come back, heads of parts stay, ties of any kind are kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from support.checkpoints import edit_weights, weights

from lowbit_format.container.reader import ModelReader
from lowbit_format.converters import Recipe, Rule, convert_hf_to_lowbit, plan_conversion
from lowbit_format.export import dequantize_directory
from lowbit_format.integrations.conversion_record import KEY
from lowbit_format.quantize import Target

Checkpoint = Callable[..., Path]

RECIPE = Recipe(Target(bits=3, group_size=16))
ALL = Recipe(rules=(Rule("*", Target(bits=3, group_size=16)),))
RENAMED = ["gemma3", "qwen2-vl", "qwen2.5-vl", "llava-onevision", "internvl", "dinov3"]


@pytest.mark.parametrize("name", RENAMED)
def test_dequantize_gives_the_names_of_the_original(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint(name)
    convert_hf_to_lowbit(str(source), tmp_path / "out", ALL)
    reader = ModelReader(tmp_path / "out")
    assert KEY in reader.model_config
    dequantize_directory(reader, tmp_path / "float")
    plain, back = weights(source), weights(tmp_path / "float")
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in plain.items()}
    assert KEY not in (tmp_path / "float" / "config.json").read_text()
    model, info = transformers.AutoModel.from_pretrained(tmp_path / "float", output_loading_info=True)
    assert not info["missing_keys"]
    for path in reader.config.modules:
        bare = path.removeprefix("model.")
        if bare in dict(model.named_modules()):
            assert np.array_equal(model.get_submodule(bare).weight.detach().numpy(), reader.decode(path))


def test_the_names_survive_saving(checkpoint: Checkpoint, tmp_path: Path) -> None:
    convert_hf_to_lowbit(str(checkpoint("gemma3")), tmp_path / "out", RECIPE)
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "saved")
    dequantize_directory(ModelReader(tmp_path / "saved"), tmp_path / "float")
    assert weights(tmp_path / "float").keys() == weights(checkpoint("gemma3")).keys()


def test_a_tied_matrix_that_stood_there_twice_stands_there_twice_again(
    own_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = own_checkpoint("llama-tied")
    edit_weights(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    convert_hf_to_lowbit(str(source), tmp_path / "out", ALL)
    dequantize_directory(ModelReader(tmp_path / "out"), tmp_path / "float")
    back = weights(tmp_path / "float")
    assert back.keys() == weights(source).keys()
    assert torch.equal(back["lm_head.weight"], back["model.embed_tokens.weight"])


HEADS = {
    "qwen2.5-omni": {"lm_head"},
    "bark": {"semantic.lm_head", "coarse_acoustics.lm_head"},
    "parakeet": {"joint.head"},
    "rt-detr": {"model.decoder.class_embed.0", "model.decoder.class_embed.1", "model.enc_score_head"},
}


@pytest.mark.parametrize("name", HEADS)
def test_output_heads_of_parts_are_heads(name: str, checkpoint: Checkpoint) -> None:
    """They can be kept in full precision, and those that do not give the words of the vocabulary always are."""
    plan = plan_conversion(str(checkpoint(name)), replace(RECIPE, embeddings=False, lm_head=False))[1]
    assert {s.destination.path for s in plan.kept() if s.reason == "output head"} == HEADS[name]
    assert plan.coverage == 1.0


def test_a_linear_tied_to_a_linear_is_quantized_once(checkpoint: Checkpoint, tmp_path: Path) -> None:
    done = convert_hf_to_lowbit(str(checkpoint("rt-detr")), tmp_path / "out", RECIPE)
    reader = ModelReader(tmp_path / "out")
    boxes = {place: owner for place, owner in reader.config.tied.items() if "bbox_embed" in place}
    assert boxes["bbox_embed.0.layers.0"] == "model.decoder.bbox_embed.0.layers.0"
    model = transformers.RTDetrV2ForObjectDetection.from_pretrained(tmp_path / "out")
    for place, owner in boxes.items():
        assert model.get_submodule(place).planes is model.get_submodule(owner).planes
        assert model.get_submodule(place).bias is model.get_submodule(owner).bias
    assert done.plan.coverage == 1.0
