"""Bits of single rows: a recipe that says them, and what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lowbit_format
from lowbit_format.container.reader import ModelReader
from lowbit_format.converters import Recipe, Rule, convert_hf_to_lowbit, load_recipe, plan_conversion
from lowbit_format.converters.recipe import write_recipe
from lowbit_format.errors import RecipeError
from lowbit_format.quantize import Target

Checkpoint = Callable[..., Path]


def rows_of(source: Path, end: str) -> dict[str, int]:
    """Rows of the modules whose path ends so."""
    found = plan_conversion(str(source), Recipe(), min_coverage=0)[1].quantized
    return {s.path: s.module().rows for s in found if s.path.endswith(end)}


@pytest.mark.parametrize("codec", ["bcq", "uniform"])
def test_a_recipe_says_the_bits_of_rows(checkpoint: Checkpoint, tmp_path: Path, codec: str) -> None:
    source = checkpoint("llama")
    path, rows = next(iter(rows_of(source, "k_proj").items()))
    row_bits = tuple(1 + (i * 5) % 4 for i in range(rows))
    recipe = Recipe(Target(codec, 3, group_size=32), (Rule(path, Target(codec, 4, 32, row_bits=row_bits)),))
    write_recipe(tmp_path / "recipe.json", recipe)
    assert load_recipe(tmp_path / "recipe.json") == recipe
    convert_hf_to_lowbit(str(source), tmp_path / "out", recipe)
    matrix = ModelReader(tmp_path / "out").matrix(path)
    assert matrix.row_bits is not None
    assert tuple(matrix.row_bits.tolist()) == row_bits
    model = lowbit_format.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(5)[None]
    with torch.no_grad():
        plain = model.dequantize()(ids).logits
        torch.testing.assert_close(model(ids).logits, plain, rtol=1e-3, atol=1e-3)


def test_bits_of_another_matrix(checkpoint: Checkpoint) -> None:
    recipe = Recipe(rules=(Rule("*.k_proj", Target(row_bits=(4, 3, 4))),))
    with pytest.raises(RecipeError, match=r"k_proj: has \d+ rows, and row_bits says the bits of 3; is the recipe of"):
        plan_conversion(str(checkpoint("llama")), recipe)


def test_experts_have_equal_rows(checkpoint: Checkpoint) -> None:
    recipe = Recipe(rules=(Rule("*.down_proj", Target(row_bits=(4, 3, 4))),))
    with pytest.raises(RecipeError, match="is a stack of experts, whose rows cannot differ"):
        plan_conversion(str(checkpoint("mixtral")), recipe)
