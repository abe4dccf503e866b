"""Names: what each tensor of a checkpoint is in the model that transformers builds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from support.checkpoints import ARCHITECTURES, build, edit_weights, weights
from support.config_files import edit_config

from lowbit_format.container.reader import ModelReader
from lowbit_format.converters import Recipe, Rule, convert_hf_to_lowbit
from lowbit_format.converters.names import Names, map_names
from lowbit_format.errors import SourceError
from lowbit_format.quantize import Target
from lowbit_format.runtime import known_modules

Checkpoint = Callable[..., Path]

ALL = Recipe(rules=(Rule("*", Target(bits=2, group_size=32)),))

# architecture: model class, base_model_prefix, number of matrices of each kind
EXPECTED = {
    "gpt2": ("GPT2LMHeadModel", "transformer", {"conv1d": 8, "embedding": 2}),
    "opt": ("OPTForCausalLM", "model", {"linear": 12, "embedding": 2}),
    "llama": ("LlamaForCausalLM", "model", {"linear": 15, "embedding": 1}),
    "llama-tied": ("LlamaForCausalLM", "model", {"linear": 14, "embedding": 1}),
    "qwen3": ("Qwen3ForCausalLM", "model", {"linear": 15, "embedding": 1}),
    "bert": ("BertModel", "bert", {"linear": 13, "embedding": 3}),
    "t5": ("T5ForConditionalGeneration", "transformer", {"linear": 32, "embedding": 3}),
    "mixtral": ("MixtralForCausalLM", "model", {"linear": 9, "embedding": 1}),
}
TIED = {
    "gpt2": {"lm_head": "transformer.wte"},
    "opt": {"lm_head": "model.decoder.embed_tokens"},
    "llama-tied": {"lm_head": "model.embed_tokens"},
    "t5": dict.fromkeys(("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"), "shared"),
}


def names_of(directory: Path) -> Names:
    return map_names(directory, {name: tuple(t.shape) for name, t in weights(directory).items()})


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_kinds_ties_and_prefix(name: str, checkpoint: Checkpoint) -> None:
    names = names_of(checkpoint(name))
    architecture, prefix, kinds = EXPECTED[name]
    assert (names.architecture, names.base_model_prefix) == (architecture, prefix)
    found = Counter(destination.kind for destination in names.destinations.values())
    assert {kind: found[kind] for kind in ("linear", "conv1d", "embedding") if found[kind]} == kinds
    assert names.tied == TIED.get(name, {})


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_output_head_is_told_apart(name: str, checkpoint: Checkpoint) -> None:
    names = names_of(checkpoint(name))
    assert [destination.path for destination in names.destinations.values() if destination.head] == ["lm_head"]


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n != "mixtral"])
def test_config_of_the_output_has_names_ties_and_prefix(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint(name)
    convert_hf_to_lowbit(str(source), tmp_path / "out", ALL)
    config, names = ModelReader(tmp_path / "out").config, names_of(source)
    assert config.tied == TIED.get(name, {})
    assert config.base_model_prefix == names.base_model_prefix
    for module in config:
        destination = next(r for r in names.destinations.values() if r.path == module.path)
        shape = tuple(weights(source)[destination.key].shape)
        assert module.kind == destination.kind
        assert module.shape == (shape[::-1] if destination.kind == "conv1d" else shape)


def test_a_tied_matrix_that_the_checkpoint_holds_twice_is_stored_once(
    own_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = own_checkpoint("llama-tied")
    edit_weights(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    convert_hf_to_lowbit(str(source), tmp_path / "out", ALL)
    reader = ModelReader(tmp_path / "out")
    assert reader.config.tied == {"lm_head": "model.embed_tokens"}
    assert not [name for name in reader.names() if name.startswith("lm_head")]


def test_copies_of_a_tied_matrix_that_differ_are_refused(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = own_checkpoint("llama-tied")
    edit_weights(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(SourceError, match=r"lm_head\.weight: is tied to model\.embed_tokens\.weight .* differ"):
        convert_hf_to_lowbit(str(source), tmp_path / "out", ALL)
    assert not (tmp_path / "out").exists()


def test_keys_without_the_base_prefix_are_named_as_the_model_names_them(
    own_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Keys without the base model's prefix load into a model with a head: the output is named for that model."""

    def add_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({"classifier.weight": torch.ones(2, 64), "classifier.bias": torch.zeros(2)})

    source = edit_config(own_checkpoint("bert"), architectures=["BertForSequenceClassification"])
    edit_weights(source, add_head)
    names = names_of(source)
    assert names.architecture == "BertForSequenceClassification"
    assert {destination.path.split(".")[0] for destination in names.destinations.values()} == {"bert", "classifier"}
    convert_hf_to_lowbit(str(source), tmp_path / "out", ALL)
    assert {path.split(".")[0] for path in ModelReader(tmp_path / "out").config.modules} == {"bert", "classifier"}


@pytest.mark.parametrize(
    "missing", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_a_checkpoint_that_lacks_a_tensor_is_refused(missing: str, own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """transformers would load it with random values in place of the tensor."""
    source = edit_weights(own_checkpoint("llama"), lambda tensors: tensors.pop(missing))
    with pytest.raises(SourceError, match=f"lacks 1 tensors of LlamaForCausalLM, such as '{missing}'"):
        convert_hf_to_lowbit(str(source), tmp_path / "out", ALL)
    assert not (tmp_path / "out").exists()


def test_two_names_of_one_tensor_are_refused(own_checkpoint: Checkpoint) -> None:
    """transformers knows both, and loads one of them."""
    key = "encoder.layer.0.output.dense.weight"
    source = edit_weights(own_checkpoint("bert"), lambda t: t.update({f"bert.{key}": t[key] + 1}))
    with pytest.raises(SourceError, match=rf"'bert\.{key}' and '{key}' both become '{key}'|'{key}' and 'bert\.{key}'"):
        names_of(source)


def test_an_old_and_a_new_name_of_one_tensor_are_refused(own_checkpoint: Checkpoint) -> None:
    source = own_checkpoint("mixtral")
    key = "model.layers.0.block_sparse_moe.gate.weight"
    edit_weights(source, lambda t: t.update({"model.layers.0.mlp.gate.weight": t[key] + 1}))
    with pytest.raises(SourceError, match=r"both become 'model\.layers\.0\.mlp\.gate\.weight' of the model; take one"):
        names_of(source)


@pytest.mark.parametrize(
    ("name", "key"), [("llama", "model.norm.weight"), ("mixtral", "model.layers.1.block_sparse_moe.gate.weight")]
)
def test_what_is_kept_has_to_fit_too(name: str, key: str, own_checkpoint: Checkpoint) -> None:
    """transformers would refuse to load the result."""
    source = edit_weights(own_checkpoint(name), lambda t: t.update({key: torch.cat([t[key], t[key]])}))
    expected = rf"'{key}' has shape \[(128|8, 64)\], the model that config.json describes expects \[(64|4, 64)\]; get"
    with pytest.raises(SourceError, match=expected):
        names_of(source)


def test_what_the_class_does_not_know_is_kept_and_told(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = edit_config(own_checkpoint("llama"), num_hidden_layers=1)
    plan = convert_hf_to_lowbit(str(source), tmp_path / "out", ALL).plan
    assert len(plan.strange) == 9
    assert all(key.startswith("model.layers.1.") for key in plan.strange)
    assert "unknown to LlamaForCausalLM, kept as they are" in (tmp_path / "out" / "README.md").read_text()


def test_a_tied_tensor_may_be_absent_in_one_place(own_checkpoint: Checkpoint) -> None:
    source = own_checkpoint("llama-tied")
    assert "lm_head.weight" not in weights(source)
    assert names_of(source).tied == {"lm_head": "model.embed_tokens"}


def test_only_expert_modules_hold_experts(tmp_path: Path) -> None:
    """A vision transformer has parameters of three dimensions that are no experts."""
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=16
    )
    transformers.ViTModel(config, add_pooling_layer=True).save_pretrained(tmp_path / "vit")
    kinds = {destination.path: destination.kind for destination in names_of(tmp_path / "vit").destinations.values()}
    assert "expert" not in kinds.values()
    assert "linear" in kinds.values()


def test_an_unknown_architecture_name_falls_back_to_the_model_type(own_checkpoint: Checkpoint) -> None:
    assert names_of(edit_config(own_checkpoint("llama"), architectures=["SomebodysOwn"])).architecture == "LlamaModel"


def test_an_unknown_model_type_is_refused(own_checkpoint: Checkpoint) -> None:
    source = edit_config(own_checkpoint("llama"), model_type="no-such-model")
    with pytest.raises(SourceError, match=r"(?s)cannot read its config.*code from the checkpoint is never run"):
        names_of(source)


def test_a_part_without_a_model_type_is_refused(own_checkpoint: Checkpoint) -> None:
    """So transformers saves a part of Bark, whose class only the whole model knows."""
    source = edit_config(own_checkpoint("llama"), model_type=None, architectures=["BarkCausalModel"])
    with pytest.raises(SourceError, match=r"has no 'model_type'.* convert the directory of the whole model"):
        names_of(source)


def test_code_of_the_checkpoint_is_never_run(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    source = edit_config(
        own_checkpoint("llama"), model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModel": "own.Own"}
    )
    (source / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(SourceError, match=r"needs code of its own.*is never run") as e:
        names_of(source)
    assert "trust" not in str(e.value)  # the advice of transformers, to run it
    assert not marker.exists()


def test_a_shape_that_does_not_fit_the_config_is_refused(own_checkpoint: Checkpoint) -> None:
    source = edit_config(own_checkpoint("llama"), intermediate_size=128)
    with pytest.raises(SourceError, match=r"mlp\.\w+_proj\.weight' has shape .*config.json describes expects \["):
        names_of(source)


def test_a_config_that_builds_no_model_is_refused(tmp_path: Path) -> None:
    source = edit_config(build("llama", tmp_path / "source"), hidden_act="no-such-activation")
    with pytest.raises(SourceError, match="cannot build the architecture"):
        names_of(source)


def test_a_tied_matrix_is_kept_in_both_places_if_one_cannot_be_quantized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An embedding whose forward is not known stays; its copy under the head must not vanish or differ."""
    config = transformers.Gemma3TextConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    transformers.Gemma3ForCausalLM(config).save_pretrained(tmp_path / "source")
    edit_weights(tmp_path / "source", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    monkeypatch.setattr(known_modules, "_SCALED", "of no such class")
    done = convert_hf_to_lowbit(str(tmp_path / "source"), tmp_path / "out", ALL)
    assert not {"model.embed_tokens", "lm_head"} & set(done.outcomes)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(ModelReader(tmp_path / "out").names())


@pytest.mark.parametrize("change", [{"quantization_config": []}, {"hidden_size": "64"}, {"rope_parameters": 3}])
def test_a_config_of_strange_values_is_refused_or_read(change: dict, own_checkpoint: Checkpoint) -> None:
    """transformers has errors of many kinds for such a config."""
    source = edit_config(own_checkpoint("llama"), **change)
    with pytest.raises(SourceError, match=r"cannot (read its config|build the architecture)"):
        names_of(source)
