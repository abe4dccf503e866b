"""The plan: defaults, options for embeddings and head, coverage, sizes; and that a dry run tells the truth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers as hf

from lowbit_format.converters import Recipe, Rule, convert_hf_to_lowbit, plan_conversion
from lowbit_format.converters.names import Destination, Names
from lowbit_format.converters.plan import BASE_MEMORY, Plan, Step, make_plan
from lowbit_format.converters.recipe import WORDS
from lowbit_format.converters.source import SourceTensor
from lowbit_format.errors import CoverageError, NothingToQuantizeError, RecipeError
from lowbit_format.quantize import Target

Checkpoint = Callable[..., Path]

TARGET = Target(bits=2, group_size=32)


@pytest.fixture
def planned(checkpoint: Checkpoint) -> Callable[..., Plan]:
    def plan(name: str, min_coverage: float = 0.9, **options: object) -> Plan:
        recipe = Recipe(**{"default": TARGET, **options})
        return plan_conversion(str(checkpoint(name)), recipe, min_coverage=min_coverage)[1]

    return plan


def quantized(plan: Plan) -> set[str]:
    return {step.path for step in plan.quantized}


def kept(plan: Plan) -> dict[str, str]:
    return {step.destination.path: step.reason for step in plan.kept()}


def test_by_default_embeddings_and_head_are_rounded_to_8_bits(planned: Callable[..., Plan]) -> None:
    plan = planned("llama")
    assert kept(plan) == {}
    assert {s.path for s in plan.quantized if s.target == WORDS} == {"model.embed_tokens", "lm_head"}
    assert len(quantized(plan)) == 16
    assert plan.coverage == 1.0
    assert plan.tied == {}


def test_only_what_the_recipe_says_nothing_of_is_rounded_by_default(planned: Callable[..., Plan]) -> None:
    """A target says nothing of who chose it: a layer, or an embedding by the recipe, may have the same."""
    rounded = {s.path for s in planned("llama", rules=(Rule("*.o_proj", WORDS),), embeddings=WORDS).steps if s.rounded}
    assert rounded == {"lm_head"}


def test_they_are_kept_where_8_bits_would_not_serve(planned: Callable[..., Plan], tmp_path: Path) -> None:
    """A model is read at a precision as a whole (NST-3), and padding makes narrow matrices larger."""
    plan = planned("llama", default=Target(bits=4, group_size=32, nested=(2,)))
    assert set(kept(plan)) == {"model.embed_tokens", "lm_head"}
    assert "embedding; in 8 bits it could not be read at a nested precision" in kept(plan).values()
    assert set(kept(planned("bert")).values()) == {"embedding"}  # an encoder, behind which programs put other layers
    narrow = hf.GPT2Config(vocab_size=96, n_positions=64, n_embd=8, n_layer=1, n_head=1)
    hf.GPT2LMHeadModel(narrow).save_pretrained(tmp_path)
    why = kept(plan_conversion(str(tmp_path), Recipe(TARGET))[1])["transformer.wte"]
    assert why == "embedding, tied to the output head, which 8 bits would not make smaller"


def test_what_is_not_one_row_for_each_word_is_kept(planned: Callable[..., Plan], tmp_path: Path) -> None:
    """Positions and types of tokens, even where a vocabulary is as small as they are; and all of a model for masks."""
    assert kept(planned("gpt2")) == {"transformer.wpe": "embedding"}
    sizes = {"vocab_size": 64, "n_positions": 64, "n_embd": 64, "n_layer": 1, "n_head": 4}
    hf.GPT2LMHeadModel(hf.GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    assert kept(plan_conversion(str(tmp_path / "gpt2"), Recipe(TARGET))[1]) == {"transformer.wpe": "embedding"}
    layers = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96}
    hf.BertForMaskedLM(hf.BertConfig(vocab_size=96, **layers)).save_pretrained(tmp_path / "bert")
    plan = plan_conversion(str(tmp_path / "bert"), Recipe(TARGET))[1]
    tables = {f"bert.embeddings.{name}_embeddings" for name in ("word", "position", "token_type")}
    assert tables <= set(kept(plan))
    assert not [s.path for s in plan.quantized if s.rounded]


def test_both_sides_of_an_encoder_and_decoder_have_words(planned: Callable[..., Plan]) -> None:
    assert {s.path for s in planned("mbart", default=Target(bits=4, group_size=32)).steps if s.rounded} == {
        "model.shared"
    }


def test_what_a_recipe_says_of_one_of_them_leaves_the_other(planned: Callable[..., Plan]) -> None:
    six = Target("uniform", 6)
    plan = planned("llama", embeddings=six, lm_head=False)
    assert {s.path: s.target for s in plan.quantized}["model.embed_tokens"] == six
    assert kept(plan) == {"lm_head": "output head"}
    assert kept(planned("llama-tied", embeddings=False)) == {"model.embed_tokens": "embedding, tied to the output head"}


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"embeddings": False, "lm_head": False}, {"model.embed_tokens": "embedding", "lm_head": "output head"}),
        ({"embeddings": True, "lm_head": False}, {"lm_head": "output head"}),
        ({"embeddings": False, "lm_head": True}, {"model.embed_tokens": "embedding"}),
        ({"embeddings": True, "lm_head": True}, {}),
    ],
)
def test_options_quantize_embeddings_and_head(planned: Callable[..., Plan], options: dict, left: dict) -> None:
    assert kept(planned("llama", **options)) == left


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("bert", "lm_head", "lm_head, or --lm-head: BertModel has no output head; leave it out"),
        ("dinov3", "embeddings", "embeddings, or --embeddings: DINOv3ViTModel has no embedding; leave it out"),
    ],
)
def test_what_the_model_does_not_have_is_not_asked_for(
    planned: Callable[..., Plan], name: str, option: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        planned(name, **{option: True})


@pytest.mark.parametrize("option", ["embeddings", "lm_head"])
def test_a_tied_embedding_is_quantized_by_either_option(planned: Callable[..., Plan], option: str) -> None:
    plan = planned("llama-tied", **{option: True})
    assert {s.path: s.target for s in plan.quantized}["model.embed_tokens"] == TARGET
    assert kept(plan) == {}
    assert plan.tied == {"lm_head": "model.embed_tokens"}


@pytest.mark.parametrize("place", ["lm_head", "model.embed_tokens"])
def test_a_rule_for_either_place_of_a_tied_matrix_decides(planned: Callable[..., Plan], place: str) -> None:
    assert "model.embed_tokens" in quantized(planned("llama-tied", rules=(Rule(place, TARGET),)))
    plan = planned("llama-tied", embeddings=True, rules=(Rule(place, None),))
    assert kept(plan) == {"model.embed_tokens": f"kept by the pattern {place!r}"}


def test_the_first_rule_that_matches_decides(planned: Callable[..., Plan]) -> None:
    five, eight = Target(bits=5), Target("uniform", 8)
    rules = (Rule("*.0.mlp.up_proj", None), Rule("*.mlp.*", five), Rule("*.up_proj", eight), Rule("lm_head", eight))
    plan = planned("llama", min_coverage=0.5, rules=rules)
    targets = {step.path: step.target for step in plan.quantized}
    assert "model.layers.0.mlp.up_proj" not in targets
    assert targets["model.layers.1.mlp.up_proj"] == five
    assert targets["model.layers.1.self_attn.q_proj"] == TARGET
    assert targets["lm_head"] == eight


def test_a_pattern_that_matches_nothing_is_refused(planned: Callable[..., Plan]) -> None:
    with pytest.raises(RecipeError, match=r"'\*\.up_prj' matches no module; modules are named like .*model\."):
        planned("llama", rules=(Rule("*.up_prj", None),))


def test_coverage_counts_matrices_of_the_base_model_only(planned: Callable[..., Plan]) -> None:
    rule = Rule("*.mlp.*", None)
    mlp, attention = 3 * 96 * 64, (64 + 32 + 32 + 64) * 64
    expected = attention / (mlp + attention)
    for options in ({}, {"embeddings": True, "lm_head": True}):
        assert planned("llama", min_coverage=0, rules=(rule,), **options).coverage == pytest.approx(expected)


def test_the_coverage_that_an_error_suggests_is_accepted(planned: Callable[..., Plan]) -> None:
    rule = Rule("*.mlp.*", None)
    with pytest.raises(CoverageError, match=r"only 40\.0% .* expected at least 90%.*mlp.*\(kept by the pattern") as e:
        planned("llama", rules=(rule, Rule("lm_head", TARGET)))
    assert planned("llama", min_coverage=_suggested(e), rules=(rule,)).coverage == pytest.approx(0.4)
    rules = (Rule("*.0.output.dense", None), Rule("pooler.dense", None))  # 80.77%: two digits would round it up
    with pytest.raises(CoverageError) as e:
        planned("bert", rules=rules)
    assert planned("bert", _suggested(e), rules=rules).coverage < 0.9


def test_nothing_to_quantize_is_refused_whatever_the_coverage(planned: Callable[..., Plan]) -> None:
    with pytest.raises(NothingToQuantizeError, match=r"14 kept: kept by the pattern '\*'|kept by the pattern '\*'"):
        planned("llama", min_coverage=0, rules=(Rule("*", None),))


def test_a_model_without_matrices_has_nothing_to_quantize(tmp_path: Path) -> None:
    hf.ResNetModel(hf.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1])).save_pretrained(tmp_path)
    for rules in ((), (Rule("*", TARGET),)):
        with pytest.raises(NothingToQuantizeError, match="ResNetModel: has no Linear"):
            plan_conversion(str(tmp_path), Recipe(TARGET, rules))


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_the_planned_size_is_the_real_one(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    recipe = Recipe(Target(bits=4, group_size=32, nested=(2,)), embeddings=True)
    done = convert_hf_to_lowbit(str(checkpoint(name)), tmp_path / "out", recipe)
    header = (tmp_path / "out" / "model.safetensors").read_bytes()[:8]
    written = (tmp_path / "out" / "model.safetensors").stat().st_size - 8 - int.from_bytes(header, "little")
    assert done.plan.output_bytes() == written


def _suggested(error: pytest.ExceptionInfo[CoverageError]) -> float:
    return float(str(error.value).split("--min-coverage ")[1].split()[0])


def test_a_matrix_without_weights_is_kept() -> None:
    """Some detectors have a Linear without outputs where they have one level of features."""
    shapes = {"a": (0, 64), "b": (8, 64)}
    tensors = {f"{p}.weight": SourceTensor(f"{p}.weight", "F32", s, 4 * s[0] * s[1]) for p, s in shapes.items()}
    names = Names({f"{p}.weight": Destination(f"{p}.weight", p, "linear") for p in shapes})
    plan = make_plan(SimpleNamespace(tensors=tensors), names, Recipe(TARGET))  # type: ignore[arg-type]
    assert quantized(plan) == {"b"}
    assert kept(plan) == {"a": "has no weights"}


def test_two_large_tensors_that_follow_each_other_are_in_memory_together() -> None:
    """While one is worked on, the next is read: head and embeddings stand side by side in many files."""
    steps = [
        Step(SourceTensor(name, "BF16", shape, 2 * shape[0] * shape[1]), Destination(name, name, "embedding"))
        for name, shape in (("a", (1000, 900)), ("b", (1000, 800)), ("c", (1, 8)), ("d", (1000, 950)))
    ]
    assert Plan(tuple(steps)).peak_memory() == BASE_MEMORY + 2 * 1_700_000
