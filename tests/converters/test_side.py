"""Files beside the weights: copied, converted or left out; nothing is lost without a message."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.checkpoints import weights
from support.config_files import edit_config
from support.hub_server import running_hub

from lowbit_format.converters import Recipe, convert_hf_to_lowbit, plan_conversion
from lowbit_format.converters.side import SideFiles, side_files
from lowbit_format.errors import SourceError
from lowbit_format.quantize import Target

Checkpoint = Callable[..., Path]

RECIPE = Recipe(Target(bits=4, group_size=16))


def files(directory: Path) -> set[str]:
    return {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}


@pytest.fixture
def sorted_files(tmp_path: Path) -> Callable[..., SideFiles]:
    """The side files of a directory with files of these names (and contents)."""

    def make(contents: dict[str, Any], **options: Any) -> SideFiles:
        for name, content in contents.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return side_files(tmp_path, ("model.safetensors",), **options)

    return make


# --- a sentence encoder -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence encoder with a dense layer behind it, whose weights are a pickle."""
    models = pytest.importorskip("sentence_transformers.models")
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as tokens

    place = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh"]
    tokenizer = Tokenizer(tokens.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(place / "plain")
    config = transformers.BertConfig(
        vocab_size=12, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    transformers.BertModel(config).save_pretrained(place / "plain")
    body = models.Transformer(str(place / "plain"))
    whole = SentenceTransformer(modules=[body, models.Pooling(32), models.Dense(32, 16)], device="cpu")
    whole.save(str(place / "model"))
    dense = place / "model" / "2_Dense"
    torch.save(weights(dense), dense / "pytorch_model.bin")
    (dense / "model.safetensors").unlink()
    return place / "model"


def cosines(a: Path, b: Path) -> torch.Tensor:
    from sentence_transformers import SentenceTransformer

    found = [torch.tensor(SentenceTransformer(str(d), device="cpu").encode(["a b c", "d e f", "g h"])) for d in (a, b)]
    return torch.nn.functional.cosine_similarity(*found)


def test_a_layer_behind_an_encoder_comes_along_as_safetensors(encoder: Path, tmp_path: Path) -> None:
    done = convert_hf_to_lowbit(str(encoder), tmp_path / "out", Recipe(Target(bits=8, group_size=16)))
    assert done.plan.side.converted == {"2_Dense/pytorch_model.bin": "2_Dense/model.safetensors"}
    assert {"modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"} <= files(tmp_path / "out")
    assert not [name for name in files(tmp_path / "out") if name.endswith(".bin")]
    assert cosines(encoder, tmp_path / "out").min() > 0.999


def test_it_comes_along_from_the_hub_too(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside = {"onnx/model.onnx": b"x", "pytorch_model.bin": b"x", "optimizer.pt": b"x", "modeling_x.py": b"x"}
    with running_hub(tmp_path / "server", monkeypatch) as hub:
        hub.create("somebody/encoder")
        hub.commit("somebody/encoder", {n: (encoder / n).read_bytes() for n in files(encoder)} | beside)
        convert_hf_to_lowbit("somebody/encoder", tmp_path / "a", RECIPE)
        asked = [request.path for request in hub.log]
        hub.commit("somebody/encoder", {"sparse_linear.pt": b"x"})
        with pytest.raises(SourceError, match=r"somebody/encoder: sparse_linear\.pt: a pickle beside the model"):
            plan_conversion("somebody/encoder", RECIPE)
        plan_conversion("somebody/encoder", RECIPE, leave_out=["sparse_linear.pt"])
    assert not [path for path in asked for name in beside if re.search(rf"/resolve/\w+/{re.escape(name)}$", path)]
    convert_hf_to_lowbit(str(encoder), tmp_path / "b", RECIPE)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert cosines(tmp_path / "a", tmp_path / "b").min() > 0.9999


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "somebody/x: is an adapter .*merge_and_unload"),
        (["x.Q4.gguf", "README.md"], r"holds 1 GGUF file; download one \(hf download somebody/x x\.Q4\.gguf --local"),
        (["fp16/config.json", "fp16/model.safetensors"], "holds no model itself, but its folder fp16 does"),
        (["config.json", "tf_model.h5"], r"has neither model\.safetensors .* another framework only \(tf_model\.h5\)"),
        (["README.md"], r"has no config\.json"),
    ],
)
def test_a_repository_that_is_no_checkpoint_is_named_for_what_it_is(
    names: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_hub(tmp_path, monkeypatch) as hub:
        hub.create("somebody/x")
        hub.commit("somebody/x", dict.fromkeys(names, b"{}"))
        with pytest.raises(SourceError, match=message):
            plan_conversion("somebody/x", RECIPE)


# --- pickles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sparse_linear.pt", "model_head.pkl", "heads/x.bin", "value_head.pth"])
def test_a_pickle_that_would_be_lost_is_refused_by_name(name: str, sorted_files: Callable[..., SideFiles]) -> None:
    with pytest.raises(SourceError, match=rf"{name}: a pickle beside the model.*pass --leave-out {name} to convert"):
        sorted_files({name: "x"})
    assert sorted_files({name: "x"}, leave_out=[name]).left_out == {name: "left out on request"}


def test_a_pickle_beside_the_same_as_safetensors_is_a_copy(sorted_files: Callable[..., SideFiles]) -> None:
    found = sorted_files({"heads/x.safetensors": "x", "heads/x.pt": "x", "y.safetensors": "y", "y.bin": "x"})
    assert set(found.copied) == {"heads/x.safetensors", "y.safetensors"}


def test_a_pickle_that_holds_more_than_tensors_is_refused(encoder: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(encoder, tmp_path / "source"))
    torch.save({"linear.weight": torch.ones(2, 2), "step": 3}, source / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"'step' is no tensor.*--leave-out 2_Dense/pytorch_model\.bin"):
        plan_conversion(str(source), RECIPE)


# --- what does not belong to the model ----------------------------------------------------------------


def test_training_runs_copies_and_other_models_stay(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = own_checkpoint("llama")
    convert_hf_to_lowbit(str(source), tmp_path / "before", RECIPE)
    for folder in ("checkpoint-500", "global_step9", "original", "onnx", "openvino", "my-merge"):
        (source / folder).mkdir()
        for file in ("model.safetensors", "config.json"):
            shutil.copyfile(source / file, source / folder / file)
    shutil.copytree(tmp_path / "before", source / "4bit")
    for name in ("consolidated.safetensors", "model.fp16.safetensors", "somewhere.safetensors"):
        shutil.copyfile(source / "model.safetensors", source / name)
    for name in ("optimizer.pt", "rng_state_0.pth", "training_args.bin", "scheduler.pt", "tf_model.h5", "model.gguf"):
        (source / name).write_bytes(b"x")
    (source / "runs").mkdir()
    (source / "runs" / "events.out.tfevents.1").write_bytes(b"x")
    done = convert_hf_to_lowbit(str(source), tmp_path / "out", RECIPE)
    assert files(tmp_path / "out") == files(tmp_path / "before")
    left = done.plan.side.left_out
    assert left["checkpoint-500/"] == "of a training run or for another program"
    assert left["4bit/"] == left["my-merge/"] == "a model of its own"
    assert left["somewhere.safetensors"] == "another copy of the weights"


def test_weights_of_other_modules_come_along(sorted_files: Callable[..., SideFiles]) -> None:
    contents = {"head.safetensors": "x", "speech-lora/adapter_model.safetensors": "x", "tokenizer.json": {}}
    found = sorted_files(contents | {"speech-lora/adapter_config.json": {}, "spiece.model": "x"})
    assert set(found.copied) == {*contents, "speech-lora/adapter_config.json", "spiece.model"}


# --- code -------------------------------------------------------------------------------------------


def test_auto_map_goes_where_its_code_goes(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = edit_config(own_checkpoint("llama"), auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})
    (source / "own.py").write_text("raise RuntimeError\n")
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": {"AutoTokenizer": ["own.T", None]}}
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    done = convert_hf_to_lowbit(str(source), tmp_path / "out", RECIPE)
    assert done.plan.side.without_code == ("tokenizer_config.json",)
    assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()
    assert "auto_map" not in (tmp_path / "out" / "tokenizer_config.json").read_text()
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.T", None]}}),
        ("modules.json", [{"idx": 0, "name": "0", "path": "", "type": "own.Transformer"}]),
    ],
)
def test_code_that_something_beside_the_model_needs_comes_along(
    name: str, content: Any, sorted_files: Callable[..., SideFiles]
) -> None:
    assert set(sorted_files({name: content, "own.py": "", "lib.so": ""}).copied) == {name, "own.py"}


# --- configs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, {}])
def test_an_empty_quantization_config_is_none(value: Any, own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = own_checkpoint("llama")
    edit_config(
        source, lambda config: config.update({"quantization_config": value, "part": {"quantization_config": {}}})
    )
    convert_hf_to_lowbit(str(source), tmp_path / "out", RECIPE)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "lowbit"
    assert config["part"] == {}
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
