"""Bits of single rows: a recipe that says them, a budget that chooses them, and what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.checkpoints import with_tokenizer
from support.conversions import content

import lowbit_format
from lowbit_format.container.reader import ModelReader
from lowbit_format.converters import (
    Budget,
    Calibration,
    Recipe,
    Rule,
    convert_hf_to_lowbit,
    fit_budget,
    load_recipe,
    plan_conversion,
    write_recipe,
)
from lowbit_format.converters.candidates import Candidate, by_rows, targets
from lowbit_format.converters.row_shares import row_shares
from lowbit_format.errors import BudgetError, RecipeError
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


def test_shares_are_those_of_the_whole_models_gradients(checkpoint: Checkpoint) -> None:
    """Block by block, and computed again on the way back, they are what autograd gives with all weights in memory."""
    source = str(checkpoint("llama"))
    opened, plan, _ = plan_conversion(source, Recipe())
    batches = [
        {"input_ids": torch.randint(0, 90, (1, 9), generator=torch.Generator().manual_seed(i))} for i in range(2)
    ]
    found = row_shares(opened, plan, batches, torch.device("cpu"))
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    path = next(path for path in found if path.endswith("0.mlp.up_proj"))
    layer, generator = model.get_submodule(path), torch.Generator().manual_seed(0)
    kept = list[torch.Tensor]()
    layer.register_forward_hook(lambda module, args, out: kept.extend([args[0], out]))
    inputs, outputs = torch.zeros(layer.in_features).double(), torch.zeros(layer.out_features).double()
    for batch in batches:
        kept.clear()
        logits = model(**batch).logits[0]
        words = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        loss = torch.nn.functional.cross_entropy(logits, words, reduction="sum")
        [grad] = torch.autograd.grad(loss, kept[1])
        inputs += kept[0][0].detach().double().square().sum(0)
        outputs += grad[0].double().square().sum(0)
    counts = outputs * (layer.weight.detach().double().square() @ inputs)
    np.testing.assert_allclose(found[path], (counts / counts.sum()).numpy(), rtol=1e-3)
    assert all(abs(shares.sum() - 1) < 1e-9 for shares in found.values())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_budget_gives_rows_bits_of_their_own(name: str, own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """It is kept, expects less damage than equal rows, and its recipe makes the same bytes."""
    source = str(with_tokenizer(own_checkpoint(name)))
    recipe = Recipe(Target("uniform", group_size=32))
    equal = fit_budget(source, Budget(5.5), recipe)
    done = convert_hf_to_lowbit(source, tmp_path / "out", recipe, budget=Budget(5.5, rows=True))
    assert done.choice is not None
    assert any(rule.target is not None and rule.target.row_bits for rule in done.choice.recipe.rules)
    assert (
        sum(t.nbytes for h in ModelReader(tmp_path / "out").headers.values() for t in h.tensors.values())
        == done.choice.nbytes
    )
    assert done.choice.nbytes <= done.choice.budget
    assert done.choice.allocation.damage <= equal.allocation.damage
    write_recipe(tmp_path / "recipe.json", done.choice.recipe)
    convert_hf_to_lowbit(source, tmp_path / "again", load_recipe(tmp_path / "recipe.json"))
    again, out = (content(tmp_path / name) for name in ("again", "out"))
    assert {
        name: digest for name, digest in out.items() if name.endswith((".safetensors", "config.json"))
    }.items() <= again.items()


def test_what_a_budget_of_rows_needs(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = str(checkpoint("llama"))  # which has no tokenizer
    with pytest.raises(BudgetError, match="need the gradients of a causal model"):
        fit_budget(source, Budget(5.0, rows=True))
    with pytest.raises(BudgetError, match="quantized without data, and --calibrate gives data"):
        fit_budget(source, Budget(5.0, rows=True), calibration=Calibration("text.txt", "fast"))
    with pytest.raises(BudgetError, match="leave fused_equal or rows out"):
        Budget(5.0, fused_equal=True, rows=True)


def test_rows_of_one_matrix_are_of_one_codec() -> None:
    """The open bits of an output head are bcq, and at 8 bits uniform: what rows do at both cannot be put together."""
    choices = targets(Target("bcq", group_size=32), 6, 8, words=True)
    found = [Candidate(target, target.bits, 10 * target.bits, 4.0**-target.bits) for target in choices]
    step: Any = None  # is not looked at
    assert by_rows(step, found, np.full(4, 0.25)) == []
