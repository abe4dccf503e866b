"""Modules that a model keeps in places of its own, beside torch's registry, as MaskFormer does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM

import lowbit_format as lb
from lowbit_format.integrations.references import set_modules
from lowbit_format.runtime.modules import LowbitModule


class Listed(LlamaForCausalLM):
    """A llama whose first block calls the layers of a list."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        mlp = self.model.layers[0].mlp
        mlp.listed = [mlp.up_proj, mlp.down_proj]
        mlp.forward = lambda x: mlp.listed[1](mlp.act_fn(mlp.gate_proj(x)) * mlp.listed[0](x))


def test_a_model_that_calls_the_layers_of_a_list(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    out = lb.convert_hf_to_lowbit(str(checkpoint("llama")), tmp_path / "lowbit", lb.Recipe(lb.Target(group_size=32)))
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        want = lb.from_pretrained(out.directory)(ids).logits
        model = lb.from_pretrained(out.directory, model_class=Listed)
        torch.testing.assert_close(model(ids).logits, want)
        mlp = model.model.layers[0].mlp
        assert mlp.listed == [mlp.up_proj, mlp.down_proj]
        assert all(isinstance(module, LowbitModule) for module in mlp.listed)
        model = model.dequantize()
        assert mlp.listed == [mlp.up_proj, mlp.down_proj]
        assert {type(module) for module in mlp.listed} == {nn.Linear}
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)


def test_lists_tuples_dictionaries_and_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    old, new, inner = model[0], nn.Linear(2, 2), nn.Linear(2, 2)
    kept, shared = (1, "two"), [old]
    model.nested, model.kept = {"a": [(old, 3)], "b": None}, kept
    object.__setattr__(model[1], "named", old)
    object.__setattr__(model, "first", shared)
    object.__setattr__(model[1], "second", shared)
    set_modules(model, {"0": new, "1.0": inner})
    assert (model[0], model[1][0], model[1].named) == (new, inner, new)
    assert model.nested == {"a": [(new, 3)], "b": None}
    assert model.kept is kept
    assert model.first is model[1].second is shared
    assert shared == [new]
