"""Checkpoints that lack tensors: refused with true advice, or converted as what they hold, what is absent named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from support.checkpoints import edit_weights, weights
from support.config_files import edit_config

import lowbit_format
from lowbit_format.container.reader import ModelReader
from lowbit_format.converters import Recipe, convert_hf_to_lowbit, plan_conversion
from lowbit_format.errors import SourceError
from lowbit_format.quantize import Target

Checkpoint = Callable[..., Path]

RECIPE = Recipe(Target(bits=2, group_size=32))


def renamed(directory: Path, name: Callable[[str], str]) -> Path:
    """The checkpoint with other names; a tensor whose name becomes empty is taken away."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        found = {name(key): tensor for key, tensor in tensors.items()}
        tensors.clear()
        tensors.update({key: tensor for key, tensor in found.items() if key})

    return edit_weights(directory, change)


def refusal(source: Path) -> str:
    with pytest.raises(SourceError) as e:
        plan_conversion(str(source), RECIPE)
    message = str(e.value)
    assert "load it with transformers" not in message
    assert "completes" not in message
    return message


# --- names ------------------------------------------------------------------------------------------

FRONT = ["_orig_mod.", "module.", "base_model.model.", "somebodys.own."]


@pytest.mark.parametrize("prefix", FRONT)
def test_a_prefix_is_named_and_taken_off_on_request(prefix: str, own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    plain = set(weights(own_checkpoint("llama")))
    source = renamed(tmp_path / "source", lambda key: prefix + key)
    assert f"pass --strip-prefix {prefix} to take it off" in refusal(source)
    done = convert_hf_to_lowbit(str(source), tmp_path / "out", RECIPE, strip_prefix=[prefix])
    assert done.plan.renamed == prefix
    assert {step.tensor.name for step in done.plan.steps} == plain
    assert ModelReader(tmp_path / "out").verify() == 0


def test_prefixes_of_several_wrappers_are_named(own_checkpoint: Checkpoint) -> None:
    source = renamed(
        own_checkpoint("llama"),
        lambda key: "module." + key.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
    )
    options = ["module.", "_checkpoint_wrapped_module."]
    assert " ".join(f"--strip-prefix {p}" for p in options) in refusal(source)
    plan = plan_conversion(str(source), RECIPE, strip_prefix=options)[1]
    assert len([step for step in plan.quantized if ".layers." in step.path]) == 14


def test_a_prefix_that_no_name_has_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(SourceError, match=r"no tensor has a name with 'x\.' in front; they are named like"):
        plan_conversion(str(checkpoint("llama")), RECIPE, strip_prefix=["x"])


def test_names_that_would_meet_are_refused(own_checkpoint: Checkpoint) -> None:
    source = edit_weights(
        own_checkpoint("llama"), lambda t: t.update({"x.lm_head.weight": t["lm_head.weight"].clone()})
    )
    with pytest.raises(SourceError, match=r"would both be 'lm_head\.weight'"):
        plan_conversion(str(source), RECIPE, strip_prefix=["x."])


def test_an_adapter_that_is_not_merged_is_named(own_checkpoint: Checkpoint) -> None:
    source = renamed(own_checkpoint("llama"), lambda key: key.replace("q_proj.weight", "q_proj.base_layer.weight"))
    assert "adapter that is not merged" in refusal(source)


def test_names_that_the_class_does_not_know_are_told(own_checkpoint: Checkpoint) -> None:
    source = renamed(own_checkpoint("llama"), lambda key: key.replace("up_proj", "up_projection"))
    assert "2 tensors that this class does not know, such as 'model.layers.0.mlp.up_projection" in refusal(source)


# --- what is absent ---------------------------------------------------------------------------------


def test_a_bare_model_under_the_name_of_a_class_with_a_head(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = edit_config(own_checkpoint("mpnet"), architectures=["MPNetForMaskedLM"])
    done = convert_hf_to_lowbit(str(source), tmp_path / "out", RECIPE)
    assert (done.plan.architecture, done.plan.named) == ("MPNetModel", "MPNetForMaskedLM")
    assert "lm_head.bias" in done.plan.absent
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["MPNetModel"]
    assert type(lowbit_format.from_pretrained(tmp_path / "out")).__name__ == "MPNetModel"


def test_a_causal_model_without_its_head_is_the_bare_model(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = renamed(own_checkpoint("llama"), lambda key: "" if key == "lm_head.weight" else key)
    plan = convert_hf_to_lowbit(str(source), tmp_path / "out", RECIPE).plan
    assert (plan.architecture, plan.absent) == ("LlamaModel", ("lm_head.weight",))


def test_a_head_of_which_a_part_is_there_is_refused(own_checkpoint: Checkpoint) -> None:
    source = edit_config(own_checkpoint("bert"), architectures=["BertForSequenceClassification"])
    edit_weights(source, lambda tensors: tensors.update({"classifier.weight": torch.ones(2, 64)}))
    assert "lacks 1 tensors of BertForSequenceClassification, such as 'classifier.bias'" in refusal(source)


def test_a_pooler_that_a_head_needs_must_be_there(own_checkpoint: Checkpoint) -> None:
    source = edit_config(own_checkpoint("bert"), architectures=["BertForSequenceClassification"])

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({"classifier.weight": torch.ones(2, 64), "classifier.bias": torch.ones(2)})
        del tensors["pooler.dense.weight"]

    assert "lacks 1 tensors" in refusal(edit_weights(source, change))


@pytest.mark.parametrize(
    ("name", "absent", "load"),
    [
        ("bert-without-pooler", {"pooler.dense.weight", "pooler.dense.bias"}, transformers.AutoModel),
        ("wav2vec2", {"wav2vec2.masked_spec_embed"}, transformers.AutoModelForCTC),
    ],
)
def test_what_the_use_does_not_need_may_be_absent(
    name: str, absent: set[str], load: type, own_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = renamed(own_checkpoint(name), lambda key: "" if key in absent else key)
    done = convert_hf_to_lowbit(str(source), tmp_path / "out", RECIPE)
    assert set(done.plan.absent) == absent
    model = load.from_pretrained(tmp_path / "out")  # type: ignore[attr-defined]
    model.save_pretrained(tmp_path / "saved")
    lowbit_format.from_pretrained(tmp_path / "saved")


def test_a_part_that_has_a_class_of_its_own_is_converted_as_that(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = renamed(own_checkpoint("t5"), lambda key: "" if key.startswith(("decoder.", "lm_head.")) else key)
    plan = convert_hf_to_lowbit(str(source), tmp_path / "out", RECIPE).plan
    assert (plan.architecture, plan.named) == ("T5EncoderModel", "T5ForConditionalGeneration")
    assert type(lowbit_format.from_pretrained(tmp_path / "out")).__name__ == "T5EncoderModel"


def test_a_pickle_with_a_state_dict_further_down_is_named(own_checkpoint: Checkpoint) -> None:
    source = own_checkpoint("llama", pickled=True)
    state = torch.load(source / "pytorch_model.bin", weights_only=True)
    torch.save({"state_dict": state, "epoch": 3}, source / "pytorch_model.bin")
    assert "holds no tensors, but 'state_dict', 'epoch'" in refusal(source)
