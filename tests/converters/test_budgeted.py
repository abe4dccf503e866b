"""A budget: kept, reproduced by its recipe, within limits, and refused truly where it cannot be kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.checkpoints import edit_weights, with_tokenizer
from support.conversions import content
from support.quantized_releases import gptq, write_release
from typer.testing import CliRunner

from lowbit_format.calibration.compare import Comparison
from lowbit_format.calibration.data import Data
from lowbit_format.calibration.effort import Effort
from lowbit_format.container.reader import ModelReader
from lowbit_format.converters import (
    Budget,
    Calibration,
    Recipe,
    Rule,
    command,
    convert_hf_to_lowbit,
    fit_budget,
    load_recipe,
    plan_conversion,
    write_recipe,
)
from lowbit_format.converters.candidates import kind_of
from lowbit_format.converters.recipe import WORDS
from lowbit_format.converters.sensitivity import Divergences
from lowbit_format.converters.summary import budget_tables
from lowbit_format.errors import BudgetError, RecipeError
from lowbit_format.quantize import Target, quantize
from lowbit_format.reference import decode

Checkpoint = Callable[..., Path]
RECIPE = Recipe(Target(bits=4, group_size=32))
LAYERS = Rule("model.layers.*", Target("uniform", 4, solver="minmax", group_size=32))  # which leaves little to search


def tensor_bytes(directory: Path) -> int:
    return sum(t.nbytes for h in ModelReader(directory).headers.values() for t in h.tensors.values())


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral"])
@pytest.mark.parametrize("bits", [4.5, 7.0])
def test_the_file_is_within_the_budget_and_its_recipe_makes_it_again(
    name: str, bits: float, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = str(checkpoint(name))
    done = convert_hf_to_lowbit(source, tmp_path / "out", RECIPE, budget=Budget(bits))
    assert done.choice is not None
    assert tensor_bytes(tmp_path / "out") == done.choice.nbytes
    assert done.choice.bits_per_weight(done.choice.nbytes) <= bits
    assert len(set(done.choice.bits.values())) > 1
    write_recipe(tmp_path / "recipe.json", done.choice.recipe)
    convert_hf_to_lowbit(source, tmp_path / "again", load_recipe(tmp_path / "recipe.json"))
    first, second = (content(tmp_path / name) for name in ("out", "again"))
    assert {
        k: v for k, v in first.items() if k not in ("README.md", "conversion_report.json")
    }.items() <= second.items()
    budget = json.loads((tmp_path / "out" / "conversion_report.json").read_text())["budget"]
    assert budget["reached"] <= budget["target"] == pytest.approx(bits, rel=1e-3)
    assert budget["lower_bound"] <= budget["damage"]
    assert [x for x, _ in budget["curve"]] == sorted(x for x, _ in budget["curve"])


def test_bits_go_where_the_error_is(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A matrix of two values needs one bit, whatever its size."""

    def two_valued(tensors: dict[str, torch.Tensor]) -> None:
        for key in ("q_proj", "o_proj"):
            name = f"model.layers.0.self_attn.{key}.weight"
            tensors[name] = torch.sign(tensors[name]) * 0.03 + torch.randn_like(tensors[name]) * 1e-4

    source = edit_weights(own_checkpoint("llama"), two_valued)
    choice = fit_budget(str(source), Budget(6.0), RECIPE)
    assert choice.bits["model.layers.0.self_attn.q_proj"] == choice.bits["model.layers.0.self_attn.o_proj"] == 1
    assert choice.bits["model.layers.1.self_attn.q_proj"] > 2


def test_limits_and_equal_bits_are_kept(checkpoint: Checkpoint) -> None:
    rules = (
        Rule("*.1.*.down_proj", Target(bits=3, group_size=32)),
        Rule("*.v_proj", RECIPE.default, at_least=5),
        Rule("*.o_proj", RECIPE.default, at_least=2, at_most=2),
    )
    choice = fit_budget(str(checkpoint("llama")), Budget(5.5, fused_equal=True), Recipe(RECIPE.default, rules))
    for layer in "01":
        at = f"model.layers.{layer}."
        names = [f"{at}self_attn.{name}_proj" for name in "qkvo"]
        q, k, v, o = (choice.bits[name] for name in names)
        assert q == k == v >= 5
        assert o == 2
        assert choice.bits[f"{at}mlp.gate_proj"] == choice.bits[f"{at}mlp.up_proj"]
    assert "model.layers.1.mlp.down_proj" not in choice.bits
    assert not [rule for rule in choice.recipe.rules if rule.is_open]


def test_with_data_columns_count_by_what_they_are_multiplied_with(checkpoint: Checkpoint, tmp_path: Path) -> None:
    data = Data.of([{"input_ids": torch.randint(4, 90, (2, 16))} for _ in range(4)], held_out=1)
    calibration = Calibration(data, Effort(sweeps=1, steps=0, learning_rate=0.0, drift=False, samples=8))
    source = str(checkpoint("llama"))
    choice = fit_budget(source, Budget(5.0), RECIPE, calibration=calibration)
    assert choice.measure == "divergence"
    assert choice.allocation.damage != fit_budget(source, Budget(5.0), RECIPE).allocation.damage
    done = convert_hf_to_lowbit(source, tmp_path / "out", RECIPE, budget=choice, calibration=calibration)
    assert tensor_bytes(tmp_path / "out") == choice.nbytes
    assert done.calibrated


def test_the_divergence_of_a_kind_is_what_the_model_gives(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = own_checkpoint("llama-tied")
    opened, plan, _ = plan_conversion(str(source), RECIPE)
    target = Target(bits=1, group_size=32)
    probes = {s.path: target for s in plan.quantized if s.path.endswith(("v_proj", "embed_tokens"))}
    batch = {"input_ids": torch.randint(4, 90, (2, 16))}
    measure = Divergences(opened, plan, batch, torch.device("cpu"))
    found = measure.by_kind(probes)
    assert set(found) == {"v_proj", "embed_tokens"}
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for kind, value in found.items():
        other: Any = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        expected = Comparison()
        with torch.no_grad():
            for path in (path for path in probes if path.endswith(kind)):
                weight = other.get_submodule(path).weight
                weight.copy_(torch.from_numpy(decode(quantize(weight.numpy(), target).matrix)))
            expected.add(other(**batch), plain(**batch), batch)
        assert value == pytest.approx(expected.mean_divergence, rel=1e-4)


def test_what_harms_predictions_gets_more_bits(own_checkpoint: Checkpoint) -> None:
    """A matrix behind which nothing comes through does no harm, however large its error is."""

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        for layer in "01":
            tensors[f"model.layers.{layer}.self_attn.o_proj.weight"] *= 1e-6

    source = with_tokenizer(edit_weights(own_checkpoint("llama"), cut))
    choice = fit_budget(str(source), Budget(6.0), RECIPE)
    assert choice.measure == "divergence"
    v, down = (choice.bits[f"model.layers.0.{name}_proj"] for name in ("self_attn.v", "mlp.down"))
    assert v == 1 < down


def test_the_model_chooses_among_the_finalists(own_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is measured as the whole model, and the least divergence wins, whatever was expected."""
    source = str(with_tokenizer(own_checkpoint("llama")))
    asked: list[dict[str, int]] = []

    def whole(self: Divergences, targets: Mapping[str, Target]) -> float:
        if len({kind_of(path) for path in targets}) > 1:
            asked.append({path: target.bits for path, target in targets.items()})
            return 1.0 / len(asked)
        return plain(self, targets)

    plain = Divergences.with_targets
    monkeypatch.setattr(Divergences, "with_targets", whole)
    choice = fit_budget(source, Budget(5.0), RECIPE)
    assert len(asked) > 1
    assert choice.bits == asked[-1]
    assert [one.measured for one in choice.finalists] == sorted(1.0 / (i + 1) for i in range(len(asked)))
    assert choice.allocation.damage >= min(one.allocation.damage for one in choice.finalists)
    assert "others: " in " ".join(str(cell) for cell in budget_tables(choice)[1].columns[1].cells)
    assert len(choice.to_dict()["finalists"]) == len(asked)


def on_grid(tensor: torch.Tensor, steps: int) -> torch.Tensor:
    return (tensor * steps / tensor.abs().max()).round() / 128


@pytest.mark.parametrize(("name", "most"), [("llama", 1.0), ("bert", 0.25)])
def test_whole_choices_are_measured_where_that_tells_something(name: str, most: float, checkpoint: Checkpoint) -> None:
    opened, plan, _ = plan_conversion(str(checkpoint(name)), RECIPE)
    measure = Divergences(opened, plan, {"input_ids": torch.randint(4, 90, (2, 16))}, torch.device("cpu"))
    assert measure.tells(0.99 * most)
    assert not measure.tells(1.01 * most)


def test_a_matrix_on_a_grid_may_have_fewer_bits(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Without loss as long as the budget allows it; then it is quantized, as any other. The recipe says which."""

    def rounded(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"] = on_grid(tensors["model.embed_tokens.weight"], 127)

    source, path = str(edit_weights(own_checkpoint("llama-tied"), rounded)), "model.embed_tokens"
    recipe = replace(RECIPE, rules=(LAYERS,), embeddings=True)
    reached = {}
    for bits in (6.5, 5.55):
        out = tmp_path / f"{bits}"
        done = convert_hf_to_lowbit(source, out, recipe, budget=Budget(bits), measured=False)
        assert done.choice is not None
        assert tensor_bytes(out) == done.choice.nbytes
        assert done.choice.bits_per_weight(done.choice.nbytes) <= bits
        assert done.choice.bits[path] == ModelReader(out).module(path).scheme.bits
        reached[bits] = done.outcomes[path].relative_error
        write_recipe(tmp_path / f"{bits}.json", done.choice.recipe)
        again = tmp_path / f"{bits} again"
        convert_hf_to_lowbit(source, again, load_recipe(tmp_path / f"{bits}.json"), measured=False)
        assert content(again)["model.safetensors"] == content(out)["model.safetensors"]
    assert reached[6.5] == 0 < reached[5.55]


@pytest.mark.parametrize("bits", [4.0, 6.0, 8.0])
def test_fused_layers_get_the_same_bits_also_where_some_lie_on_grids(bits: float, own_checkpoint: Checkpoint) -> None:
    """Of which one has 3 bits, another 5, and the third none."""

    def rounded(tensors: dict[str, torch.Tensor]) -> None:
        for layer, (name, steps) in ((n, each) for n in "01" for each in (("q_proj", 3), ("k_proj", 15))):
            key = f"model.layers.{layer}.self_attn.{name}.weight"
            tensors[key] = on_grid(tensors[key], steps)

    source = edit_weights(own_checkpoint("llama"), rounded)
    choice = fit_budget(str(source), Budget(bits, fused_equal=True), RECIPE)
    plan = plan_conversion(str(source), choice.recipe)[1]
    for layer in "01":
        paths = [f"model.layers.{layer}.self_attn.{name}_proj" for name in "qkv"]
        assert len({choice.bits[path] for path in paths}) == 1
        stored = {s.path: s.module().scheme.bits for s in plan.quantized if s.path in paths and not s.to_fit.recognise}
        assert set(stored.values()) <= {choice.bits[paths[0]]}


def test_what_fails_on_a_text_of_our_own_counts_as_not_measured(
    own_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words have their least then, as where nothing is tried."""
    source = with_tokenizer(own_checkpoint("llama-tied"))

    def fail(self: Divergences, targets: Mapping[str, Target]) -> float:
        raise RuntimeError("the model's own code")

    monkeypatch.setattr(Divergences, "with_targets", fail)
    choice = fit_budget(str(source), Budget(6.0), replace(RECIPE, embeddings=True))
    assert choice.measure == "error of weights"
    assert choice.bits["model.embed_tokens"] >= 4


def test_bits_are_open_where_a_release_is_requantized(tmp_path: Path) -> None:
    """Its own grids are not looked for then, which makes no target of the recipe's."""
    write_release(tmp_path / "release", *gptq(bits=4))
    assert fit_budget(str(tmp_path / "release"), Budget(8.0), RECIPE, requantize=True).bits


def test_less_than_the_least_is_refused_with_the_least(checkpoint: Checkpoint) -> None:
    source = str(checkpoint("llama"))
    with pytest.raises(BudgetError, match=r"the budget is 1\.000 bits .* the least is ([\d.]+) bits a weight") as e:
        fit_budget(source, Budget(1.0), RECIPE)
    least = float(str(e.value).split("the least is ")[1].split()[0])
    bits = fit_budget(source, Budget(least + 0.001), RECIPE).bits
    words = {"model.embed_tokens", "lm_head"}
    assert {path: n for path, n in bits.items() if n != 1} == dict.fromkeys(words, 4)  # nothing was measured


@pytest.mark.parametrize(
    ("limits", "bits"), [({}, 4), ({"at_least": 2}, 2), ({"at_most": 3}, 3), ({"at_most": 6}, 4), ({"at_least": 5}, 5)]
)
def test_words_have_4_bits_where_nothing_was_measured_unless_a_rule_sets_limits(
    limits: dict[str, int], bits: int, checkpoint: Checkpoint
) -> None:
    source = checkpoint("llama-tied")
    rules = (Rule("lm_head", RECIPE.default, **limits), LAYERS) if limits else (LAYERS,)
    recipes = [replace(RECIPE, rules=rules), *([] if limits else [replace(RECIPE, embeddings=True)])]
    for recipe in recipes:
        with pytest.raises(BudgetError) as e:
            fit_budget(str(source), Budget(0.1), recipe)
        least = Budget(float(str(e.value).split("the least is ")[1].split()[0]) + 0.001)
        choice = fit_budget(str(source), least, recipe)
        assert choice.bits["model.embed_tokens"] == bits
        assert "the error of weights alone" in " ".join(str(cell) for cell in budget_tables(choice)[1].columns[1].cells)


def test_measured_words_may_have_fewer_than_4_bits(own_checkpoint: Checkpoint) -> None:
    source = with_tokenizer(own_checkpoint("llama-tied"))
    recipe = replace(RECIPE, rules=(LAYERS,))
    with pytest.raises(BudgetError) as e:
        fit_budget(str(source), Budget(0.1), recipe)
    choice = fit_budget(str(source), Budget(float(str(e.value).split("the least is ")[1].split()[0]) + 0.001), recipe)
    assert choice.bits["model.embed_tokens"] == 1
    assert "warning" not in [str(cell) for cell in budget_tables(choice)[1].columns[0].cells]


@pytest.mark.parametrize(
    ("recipe", "budget", "message"),
    [
        (
            Recipe(
                RECIPE.default, (Rule("*.q_proj", RECIPE.default, at_most=2), Rule("*.k_proj", Target(), at_least=3))
            ),
            Budget(5.0, fused_equal=True),
            r"layers\.0\.self_attn\.k_proj, .*q_proj.*: are to have the same bits",
        ),
        (Recipe(rules=(Rule("*", Target(bits=3)),)), Budget(5.0), "no module has bits to choose"),
        (Recipe(Target("codebook"), embeddings=False, lm_head=False), Budget(5.0), "no module has bits to choose"),
    ],
)
def test_what_cannot_be_chosen_is_refused(recipe: Recipe, budget: Budget, message: str, checkpoint: Checkpoint) -> None:
    with pytest.raises(BudgetError, match=message):
        fit_budget(str(checkpoint("llama")), budget, recipe)


def test_words_are_open_beside_a_codebook_and_then_uniform(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, recipe = str(checkpoint("llama")), Recipe(Target("codebook", group_size=32))
    done = convert_hf_to_lowbit(source, tmp_path / "out", recipe, budget=Budget(6.6), measured=False)
    assert done.choice is not None
    assert set(done.choice.bits) == {"model.embed_tokens", "lm_head"}
    assert tensor_bytes(tmp_path / "out") == done.choice.nbytes
    targets = {s.path: s.to_fit for s in done.plan.quantized}
    assert {targets[path].codec for path in done.choice.bits} == {"uniform"}  # type: ignore[union-attr]
    assert targets["model.layers.0.mlp.up_proj"] == recipe.default
    write_recipe(str(tmp_path / "recipe.json"), done.choice.recipe)
    again = plan_conversion(source, load_recipe(str(tmp_path / "recipe.json")))[1]
    assert {s.path: s.to_fit for s in again.quantized} == targets


@pytest.mark.parametrize("said", [WORDS, RECIPE.default, replace(WORDS, bits=6)])
def test_a_target_that_the_recipe_gives_words_is_not_chosen(said: Target, checkpoint: Checkpoint) -> None:
    choice = fit_budget(str(checkpoint("llama-tied")), Budget(8.0), replace(RECIPE, embeddings=said))
    assert "model.embed_tokens" not in choice.bits


def test_words_like_the_rest_are_chosen_like_the_rest(checkpoint: Checkpoint) -> None:
    choice = fit_budget(str(checkpoint("llama-tied")), Budget(8.0), replace(RECIPE, embeddings=True))
    assert "model.embed_tokens" in choice.bits


@pytest.mark.parametrize(
    "options", [{}, {"bits_per_weight": 3.0, "nbytes": 5}, {"nbytes": -1}, {"bits_per_weight": 0.0}]
)
def test_a_budget_is_one_number(options: Any) -> None:
    with pytest.raises(BudgetError):
        Budget(**options)


def test_limits_without_a_budget_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    recipe = Recipe(RECIPE.default, (Rule("*.q_proj", RECIPE.default, at_least=3),))
    with pytest.raises(RecipeError, match=r"'\*\.q_proj' leaves its bits open, which needs a budget"):
        convert_hf_to_lowbit(str(checkpoint("llama")), tmp_path / "out", recipe)


def run(*args: object, code: int = 0) -> str:
    result = CliRunner().invoke(command.app, [str(a) for a in args], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output


def test_the_command_shows_the_curve_and_writes_the_recipe(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, recipe = checkpoint("llama"), tmp_path / "recipe.json"
    options = ("--group-size", 32, "--no-eval")
    dry = run(source, "--dry-run", "--bits-budget", 5, *options, "--write-recipe", recipe)
    assert "expected damage" in dry
    assert "no choice has less than" in dry
    run(source, tmp_path / "a", "--recipe", recipe, "--no-eval")
    assert "exists already" in run(source, tmp_path / "b", "--size", "1MB", *options, "--write-recipe", recipe, code=2)
    nbytes = tensor_bytes(tmp_path / "a")
    run(source, tmp_path / "b", "--size", f"{(nbytes + 1) / 1000}KB", *options)
    assert tensor_bytes(tmp_path / "b") == nbytes
    assert "needs a budget" in run(source, tmp_path / "c", "--fused-equal", code=2)
    assert "give one of them" in run(source, tmp_path / "c", "--bits", 3, "--bits-budget", 5, code=2)
