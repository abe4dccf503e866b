"""Blocks of real models: found, called as the model calls them, and put together again to the model's own output."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from support.checkpoints import ARCHITECTURES, SPECIAL
from torch import nn

from lowbit_format.calibration.activations import Activations
from lowbit_format.calibration.blocks import Outputs, arguments, find_blocks, order_of_execution
from lowbit_format.calibration.effort import EFFORTS
from lowbit_format.calibration.hessians import Call, collect, find_stages
from lowbit_format.calibration.walk import Walk, places_of

IDS = torch.arange(2, 26).reshape(2, 12)
TEXT = {"input_ids": IDS}
PADDED = {"input_ids": IDS, "attention_mask": (torch.arange(12) < torch.tensor([[12], [7]])).long()}
BOTH = {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}
MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any], list[str]]] = {
    "llama": (ARCHITECTURES["llama"], TEXT, ["model.layers"]),
    "gpt2": (ARCHITECTURES["gpt2"], TEXT, ["transformer.h"]),
    "opt": (ARCHITECTURES["opt"], PADDED, ["model.decoder.layers"]),
    "bert": (ARCHITECTURES["bert"], PADDED, ["encoder.layer"]),
    "t5": (ARCHITECTURES["t5"], BOTH, ["encoder.block", "decoder.block"]),  # position biases go from block to block
    "vit": (
        lambda: hf.ViTModel(hf.ViTConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=16,
                                         intermediate_size=48, patch_size=8)),
        {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)},
        ["layers"],
    ),
    "gemma3": (  # layers with a window and layers without get other masks and positions
        lambda: hf.Gemma3ForCausalLM(
            hf.Gemma3TextConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                                head_dim=8, intermediate_size=48, vocab_size=96, sliding_window=4,
                                layer_types=["sliding_attention", "full_attention", "sliding_attention"])
        ),
        TEXT,
        ["model.layers"],
    ),
    "falcon": (SPECIAL["falcon"], TEXT, []),  # one block only
}  # fmt: skip


def built(name: str) -> tuple[Any, dict[str, Any], list[str]]:
    torch.manual_seed(0)
    make, batch, paths = MODELS[name]
    model = make().eval()
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return model, batch, paths


@pytest.mark.parametrize("name", MODELS)
def test_lists_of_blocks_are_found_in_the_order_of_execution(name: str) -> None:
    model, batch, paths = built(name)
    lists = find_blocks(model)
    assert sorted(blocks.path.removeprefix("vit.") for blocks in lists) == sorted(paths) or name == "vit"
    if paths:
        called = order_of_execution(model.to("meta"), lists, {k: v.to("meta") for k, v in batch.items()})
        assert [blocks.path for blocks in called] == [blocks.path for blocks in lists]


@pytest.mark.parametrize("name", [name for name, (*_, paths) in MODELS.items() if paths])
def test_block_by_block_the_model_gives_what_it_gives_at_once(name: str, tmp_path: Path) -> None:
    model, batch, _ = built(name)
    with torch.no_grad():
        want = model(**batch)[0]
    lists = find_blocks(model)
    walk = Walk(model, lists, [batch], Activations(tmp_path), torch.device("cpu"))
    for place in places_of(lists):
        walk.quantize(place, {}, EFFORTS["fast"])
    for kind in ("float", "quantized"):
        torch.testing.assert_close(walk.output(0, kind)[0], want)
    kept = {int(path.name[:5]) for path in tmp_path.iterdir()}
    assert len(kept) <= 2 * len(lists)  # what is not needed is gone


def test_layers_with_the_same_input_are_one_stage() -> None:
    model, batch, _ = built("llama")
    block = model.model.layers[0]
    found = arguments(model, block, batch, {}, {})
    assert found is not None
    args, kwargs = found
    names = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]

    def call() -> Any:
        with torch.no_grad():
            return block(*args, **kwargs)

    stages = [stage.layers for stage in find_stages(block, names, call)]
    assert stages == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]


def test_padding_does_not_count() -> None:
    model, batch, _ = built("bert")
    block = model.encoder.layer[0]
    stage = find_stages(block, ["attention.self.query"], lambda: model(**batch))[0]
    with torch.no_grad():
        padded = collect(block, stage, [Call(lambda: model(**batch), None, batch["attention_mask"])])
        whole = collect(block, stage, [Call(lambda: model(input_ids=batch["input_ids"]), None, None)])
    assert (padded.rows, whole.rows) == (19, 24)
    assert not torch.allclose(padded.hessian, whole.hessian)


def test_a_block_that_the_model_does_not_call_is_told() -> None:
    model, batch, _ = built("t5")
    assert arguments(model, nn.Linear(2, 2), batch, {}, {}) is None


def test_what_a_block_gave_survives_the_disk(tmp_path: Path) -> None:
    store = Activations(tmp_path)
    given = Outputs.of((torch.randn(2, 3), None, torch.arange(4), {"cache": 1}))
    store.save(3, "float", 1, given)
    back = store.load(3, "float", 1)
    assert back.is_tuple
    assert [None if v is None else v.tolist() for v in back.values] == [
        None if v is None else v.tolist() for v in given.values
    ]
    store.save(4, "float", 1, Outputs.of(torch.ones(2)))
    assert isinstance(store.load(4, "float", 1).given(), torch.Tensor)
    store.drop(3)
    assert [path.name for path in tmp_path.iterdir()] == ["00004-float-00001.safetensors"]
