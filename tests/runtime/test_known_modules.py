"""Subclasses of Linear and Embedding: which of them are known, and that their lowbit modules compute the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding, BartScaledWordEmbedding
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from lowbit_format.container.reader import ModelReader
from lowbit_format.converters import Recipe, convert_hf_to_lowbit
from lowbit_format.export import dequantize_directory
from lowbit_format.quantize import Target
from lowbit_format.runtime.known_modules import Known, known
from lowbit_format.runtime.modules import LowbitEmbedding, LowbitLinear

Checkpoint = Callable[..., Path]

IDS = torch.arange(1, 13).reshape(2, 6)


class Plain(nn.Linear):
    """Computes what its base does."""


class Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class OwnScaledWordEmbedding(nn.Embedding):
    """Named like the known ones, but it adds."""

    def __init__(self, rows: int, cols: int, padding_idx: int | None, embed_scale: float = 1.0) -> None:
        super().__init__(rows, cols, padding_idx)
        self.embed_scale = embed_scale

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + self.embed_scale


def test_a_class_is_known_by_what_it_computes() -> None:
    assert known(nn.Linear(4, 3)) == known(Plain(4, 3)) == known(FalconLinear(4, 3)) == Known("linear", (3, 4))
    assert known(Gemma3TextScaledWordEmbedding(5, 4, 0, 2.5)) == Known("embedding", (5, 4), 2.5, rounds_scale=True)
    assert known(BartScaledWordEmbedding(5, 4, 0, 2.5)) == Known("embedding", (5, 4), 2.5, rounds_scale=False)
    strange = [
        Doubled(4, 3), OwnScaledWordEmbedding(5, 4, 0), BartLearnedPositionalEmbedding(5, 4), nn.Conv1d(3, 3, 1),
        nn.Embedding(5, 4, max_norm=1.0), nn.MultiheadAttention(4, 1).out_proj,
    ]  # fmt: skip
    assert [known(module) for module in strange] == [None] * len(strange)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["falcon", "gemma2", "mbart"])
def test_they_compute_what_the_float_model_computes(
    name: str, dtype: torch.dtype, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    recipe = Recipe(Target(bits=4, group_size=16), embeddings=True, lm_head=True)
    convert_hf_to_lowbit(str(checkpoint(name, dtype=dtype)), tmp_path / "out", recipe)
    dequantize_directory(ModelReader(tmp_path / "out"), tmp_path / "float")
    load = transformers.AutoModelForSeq2SeqLM if name == "mbart" else transformers.AutoModelForCausalLM
    model, plain = (load.from_pretrained(tmp_path / d).eval() for d in ("out", "float"))
    assert isinstance(model.get_input_embeddings(), LowbitEmbedding)
    assert torch.equal(model.get_input_embeddings()(IDS), plain.get_input_embeddings()(IDS))
    assert any(isinstance(m, LowbitLinear) for m in model.modules())
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.05}
    with torch.no_grad():
        expected = plain(input_ids=IDS).logits
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, **tolerance)
        back = model.dequantize()
        assert type(back.get_input_embeddings()) is type(plain.get_input_embeddings())
        torch.testing.assert_close(back(input_ids=IDS).logits, expected, **tolerance)
