"""Words by frequency: frequent ones have more bits, the written model works, and what does not fit is refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.checkpoints import with_tokenizer
from typer.testing import CliRunner

import lowbit_format
from lowbit_format.container.reader import ModelReader
from lowbit_format.converters import (
    Budget,
    Recipe,
    Words,
    command,
    convert_hf_to_lowbit,
    fit_budget,
    load_recipe,
    plan_conversion,
)
from lowbit_format.converters.words import by_frequency
from lowbit_format.errors import FrequencyError, RecipeError
from lowbit_format.quantize import Target

Checkpoint = Callable[..., Path]
WORDS = 96  # rows of the embedding


@pytest.fixture
def source(own_checkpoint: Checkpoint) -> Path:
    return with_tokenizer(own_checkpoint("llama-tied"))


def counts(directory: Path, rows: int = WORDS) -> Path:
    path = directory / "counts.json"
    path.write_text(json.dumps([(i * 37) % 101 for i in range(rows)]))
    return path


def test_words_are_uniform_where_the_default_is_a_codebook(source: Path) -> None:
    recipe = Recipe(Target("codebook", group_size=32), words=Words(str(counts(source)), (6, 4)))
    target = {s.path: s.to_fit for s in plan_conversion(str(source), recipe)[1].quantized}["model.embed_tokens"]
    assert target is not None
    assert (target.codec, target.solver, target.group_size) == ("uniform", "mse", 32)
    said = replace(recipe, embeddings=Target("uniform", 8, solver="minmax"))
    target = {s.path: s.to_fit for s in plan_conversion(str(source), said)[1].quantized}["model.embed_tokens"]
    assert target is not None
    assert (target.solver, target.group_size, target.bits) == ("minmax", 128, 6)


@pytest.mark.parametrize("codec", ["bcq", "uniform"])
def test_frequent_words_have_more_bits_and_the_model_computes_with_them(
    codec: str, source: Path, tmp_path: Path
) -> None:
    words = Words(str(counts(tmp_path)), (6, 4, 2), 2.0)
    recipe = Recipe(Target(codec, bits=4, group_size=32), words=words)
    done = convert_hf_to_lowbit(str(source), tmp_path / "out", recipe)
    reader = ModelReader(tmp_path / "out")
    assert reader.verify() == 0
    matrix = reader.matrix("model.embed_tokens")
    assert matrix.row_bits is not None
    frequencies = np.array(json.loads((tmp_path / "counts.json").read_text()))
    assert Counter(matrix.row_bits.tolist()) == {6: 14, 4: 27, 2: 55}
    assert frequencies[matrix.row_bits == 6].min() >= frequencies[matrix.row_bits == 4].max()
    assert frequencies[matrix.row_bits == 4].min() >= frequencies[matrix.row_bits == 2].max()
    planned = {step.path: step for step in done.plan.quantized}["model.embed_tokens"]
    assert planned.output_bytes() == done.outcomes["model.embed_tokens"].nbytes
    model: Any = lowbit_format.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        for path in done.outcomes:
            plain.get_submodule(path).weight.copy_(torch.from_numpy(reader.decode(path)))
        ids = torch.arange(24)[None]
        assert torch.allclose(model(ids).logits, plain(ids).logits, rtol=1e-3, atol=1e-4)


def test_the_order_is_that_of_the_tokenizer_of_a_text_or_of_a_list(source: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    text = tmp_path / "text.txt"
    text.write_text("the the the a a of " * 4)
    ids = Counter(tokenizer(text.read_text(), add_special_tokens=False)["input_ids"])
    by_text = by_frequency(str(text), source, WORDS)
    assert [ids[i] for i in by_text[: len(ids)]] == sorted(ids.values(), reverse=True)
    assert sorted(by_text) == list(range(WORDS))
    rank = by_frequency("rank", source, WORDS)
    assert sorted(rank) == list(range(WORDS))
    rest = [i for i in rank if i not in ids]
    assert list(by_text[len(ids) :]) == rest
    listed = by_frequency(str(counts(tmp_path)), source, WORDS)
    assert (listed[0], listed[-1]) == (30, 0)  # 37 * 30 % 101 is 100


def test_merges_and_probabilities_rank_words(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    model = {"vocab": {"a": 3, "b": 2, "ab": 0, "aba": 1}, "merges": ["a b", ["ab", "a"]]}
    file.write_text(json.dumps({"model": model, "added_tokens": [{"id": 4, "special": True}]}))
    assert by_frequency("rank", tmp_path, 6).tolist() == [4, 2, 3, 0, 1, 5]
    file.write_text(json.dumps({"model": {"vocab": [["x", -3.0], ["y", -1.0], ["z", -2.0]]}}))
    assert by_frequency("rank", tmp_path, 3).tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("rows", "message"), [(95, "has 95 entries, and the vocabulary of the embedding has 96"), (0, "has 0 entries")]
)
def test_frequencies_that_do_not_fit_are_refused(rows: int, message: str, source: Path, tmp_path: Path) -> None:
    recipe = Recipe(Target(bits=4, group_size=32), words=Words(str(counts(tmp_path, rows))))
    with pytest.raises(FrequencyError, match=message):
        convert_hf_to_lowbit(str(source), tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{}", "[1, null]", "[", '["a"]', "5", "null", '"12"'])
def test_what_is_no_list_of_numbers_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(FrequencyError, match=r"x\.json: "):
        by_frequency(str(tmp_path / "x.json"), tmp_path, 2)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FrequencyError, match=r"tokenizer\.json: has no vocabulary whose order could be read"):
        by_frequency("rank", tmp_path, 2)
    with pytest.raises(FrequencyError, match="cannot be read as a text"):
        by_frequency(str(tmp_path / "absent.txt"), tmp_path, 2)


@pytest.mark.parametrize("options", [{"bits": ()}, {"bits": (2, 4)}, {"bits": (9,)}, {"bits": (4, 4)}, {"ratio": 0.0}])
def test_bad_clusters_are_refused(options: Any) -> None:
    with pytest.raises(FrequencyError):
        Words(**options)


def test_a_model_without_words_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has no embedding; leave it out"):
        convert_hf_to_lowbit(str(checkpoint("dinov3")), tmp_path / "out", Recipe(words=Words()))


def test_a_recipe_and_the_command_take_them_and_a_budget_leaves_them(source: Path, tmp_path: Path) -> None:
    options = ("--group-size", 32, "--word-frequencies", "rank", "--word-bits", "5,3", "--word-ratio", 3)
    recipe = tmp_path / "recipe.json"

    def run(*args: object, code: int = 0) -> str:
        result = CliRunner().invoke(command.app, [str(a) for a in args], env={"COLUMNS": "200"})
        assert result.exit_code == code, result.output
        return result.output

    run(source, "--dry-run", "--bits-budget", 5, *options, "--write-recipe", recipe)
    written = load_recipe(recipe)
    assert written.words == Words("rank", (5, 3), 3.0)
    choice = fit_budget(str(source), Budget(5.0), Recipe(Target(group_size=32), words=written.words))
    assert "model.embed_tokens" not in choice.bits
    done = convert_hf_to_lowbit(str(source), tmp_path / "out", written)
    assert done.plan.output_bytes() == choice.nbytes
    assert "needs --word-frequencies" in run(source, "--dry-run", "--word-bits", "5", code=2)
