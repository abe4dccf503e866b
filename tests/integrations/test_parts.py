"""Parts of a lowbit model by their own class, other classes, and other options: as from a float directory, or refused.

Never with weights that transformers has drawn at random in the place of the file's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from support.composites import COMPOSITES, assert_equal_to, converted, missing_classes
from support.config_files import edit_config
from transformers import initialization

import lowbit_format
from lowbit_format import Recipe, Target
from lowbit_format.container.writer import seal
from lowbit_format.errors import FingerprintError, LoadError, UnsupportedOperationError
from lowbit_format.runtime.modules import LowbitModule

IDS = torch.tensor([[5, 9, 2, 33], [8, 8, 40, 3]])

Directories = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Directories:
    """The lowbit directory of a composite, and the float one with the decoded weights."""
    made = dict[str, tuple[Path, Path]]()

    def make(name: str) -> tuple[Path, Path]:
        if missing_classes(name):
            pytest.skip(f"transformers {hf.__version__} has no {name}")
        if name not in made:
            made[name] = converted(COMPOSITES[name](), tmp_path_factory.mktemp(name))
        return made[name]

    return make


def lowbit_modules(model: Any) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, LowbitModule)]


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("clip", "CLIPVisionModel"),
        ("clip", "CLIPTextModelWithProjection"),
        ("siglip", "SiglipVisionModel"),
        ("siglip", "SiglipTextModel"),
        ("qwen2_5_vl", "AutoModel"),
        ("qwen2_5_vl", "Qwen2_5_VLTextModel"),
        ("qwen3_5", "Qwen3_5ForCausalLM"),
        ("qwen3_5", "AutoModelForCausalLM"),
        ("mllama", "MllamaForCausalLM"),
        ("mllama", "MllamaVisionModel"),
        ("deepseek_ocr2", "DeepseekOcr2Model"),
    ],
)
def test_a_part_is_as_from_the_decoded_directory(name: str, cls: str, directories: Directories, tmp_path: Path) -> None:
    """Also from a directory that ``save_pretrained`` wrote of the part, and with ``verify``."""
    out, decoded = directories(name)
    model_class = getattr(hf, cls)
    want, info = model_class.from_pretrained(decoded, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"]
    model, info = model_class.from_pretrained(out, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"]
    assert lowbit_modules(model)
    assert_equal_to(want, model)
    model.save_pretrained(tmp_path)
    again = lowbit_format.from_pretrained(tmp_path, verify=True, dtype=torch.float32)
    assert lowbit_modules(again) == lowbit_modules(model)
    assert_equal_to(want, again)


@pytest.mark.parametrize(
    ("name", "cls"), [("clip", "CLIPTextModel"), ("qwen2_5_vl", "Qwen2_5_VLTextModel"), ("mllama", "MllamaForCausalLM")]
)
def test_a_part_of_what_was_saved_again(name: str, cls: str, directories: Directories, tmp_path: Path) -> None:
    """All tensors have the names of the whole model."""
    out, decoded = directories(name)
    lowbit_format.from_pretrained(out).save_pretrained(tmp_path)
    model = lowbit_format.from_pretrained(tmp_path, model_class=getattr(hf, cls), verify=True)
    assert lowbit_modules(model)
    assert_equal_to(getattr(hf, cls).from_pretrained(decoded), model)


def test_a_part_computes_what_the_decoded_part_computes(directories: Directories) -> None:
    out, decoded = directories("clip")
    pixels = torch.randn(2, 3, 16, 16)
    for cls, inputs in ((hf.CLIPVisionModel, {"pixel_values": pixels}), (hf.CLIPTextModel, {"input_ids": IDS})):
        with torch.no_grad():
            want = cls.from_pretrained(decoded)(**inputs).last_hidden_state
            found = cls.from_pretrained(out)(**inputs).last_hidden_state
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_what_a_class_computes_is_not_missing(tmp_path: Path) -> None:
    """Positions of waves are in no file, and transformers computes them when it initialises a model."""
    heads = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 16}
    config = hf.MarianConfig(vocab_size=64, pad_token_id=1, decoder_start_token_id=1, **heads, **sizes)
    out, decoded = converted(hf.MarianMTModel(config), tmp_path)
    for cls in (hf.MarianMTModel, hf.MarianModel):
        assert_equal_to(cls.from_pretrained(decoded), cls.from_pretrained(out))


def test_a_model_that_initialises_its_layers_itself(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    convolutions = {"conv_dim": (16,), "conv_kernel": (3,), "conv_stride": (2,), "num_feat_extract_layers": 1}
    heads = {"codevector_dim": 32, "proj_codevector_dim": 32, "num_codevectors_per_group": 4}
    config = hf.Wav2Vec2Config(vocab_size=32, num_conv_pos_embeddings=4, **sizes, **convolutions, **heads)
    out, decoded = converted(hf.Wav2Vec2ForPreTraining(config), tmp_path)
    assert_equal_to(hf.Wav2Vec2ForPreTraining.from_pretrained(decoded), hf.Wav2Vec2ForPreTraining.from_pretrained(out))


@pytest.mark.parametrize(("own", "expected"), [(None, "bfloat16"), ("float32", "float32")])
@pytest.mark.parametrize("cls", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_the_dtype_of_a_part(cls: str, own: Any, expected: str, directories: Directories, tmp_path: Path) -> None:
    """It is the part's own, else that of the whole; never that of the file's first tensor, a scale."""
    out, _ = directories("clip")
    shutil.copytree(out, tmp_path / "out")
    edit_config(tmp_path / "out", lambda c: (c.update(dtype="bfloat16"), c["text_config"].update(dtype=own)))
    load = getattr(hf, cls).from_pretrained
    assert load(tmp_path / "out").dtype == getattr(torch, expected)
    assert load(tmp_path / "out", dtype="auto").dtype == getattr(torch, expected)
    assert load(tmp_path / "out", dtype=torch.float16).dtype == torch.float16
    config = hf.CLIPTextConfig.from_pretrained(tmp_path / "out")
    assert load(tmp_path / "out", config=config).dtype == getattr(torch, expected)


def test_the_dtype_of_a_text_model_by_its_auto_class(directories: Directories, tmp_path: Path) -> None:
    """transformers takes its config out of the whole's, and gives it the ``quantization_config`` itself."""
    out, decoded = directories("qwen3_5")
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert config["text_config"].get("dtype") is None
    model = hf.AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.float32
    assert_equal_to(hf.AutoModelForCausalLM.from_pretrained(decoded), model)


def test_tasks_of_a_part(directories: Directories, tmp_path: Path) -> None:
    """A part with names of its own is a base of its own, from whichever directory; another head is not."""
    out, _ = directories("qwen2_5_vl")
    part = hf.Qwen2_5_VLTextModel.from_pretrained(out)
    lowbit_format.prepare_scale_tuning(part, "peqa")
    lowbit_format.save_task(part, tmp_path / "task")
    hf.Qwen2_5_VLTextModel.from_pretrained(out).save_pretrained(tmp_path / "part")
    for directory in (out, tmp_path / "part"):
        again = hf.Qwen2_5_VLTextModel.from_pretrained(directory)
        lowbit_format.load_task(again, tmp_path / "task")
        assert lowbit_format.list_tasks(again)[0].numbers
    whole = lowbit_format.from_pretrained(out)
    with pytest.raises(FingerprintError):
        lowbit_format.load_task(whole, tmp_path / "task")
    lowbit_format.prepare_scale_tuning(whole, "peqa")
    lowbit_format.save_task(whole, tmp_path / "whole")
    with pytest.raises(FingerprintError):
        lowbit_format.load_task(again, tmp_path / "whole")
    headless = hf.AutoModel.from_pretrained(out)
    lowbit_format.load_task(headless, tmp_path / "whole")
    assert lowbit_format.list_tasks(headless)[0].numbers


def test_with_the_config_of_the_part(directories: Directories) -> None:
    """As an object, into which ``quantization_config`` has to be put by hand."""
    out, decoded = directories("clip")
    config = hf.AutoConfig.from_pretrained(out)
    model = hf.CLIPVisionModel.from_pretrained(out, config=config.vision_config)
    assert_equal_to(hf.CLIPVisionModel.from_pretrained(decoded), model)
    assert not hasattr(config.vision_config, "quantization_config")
    read = hf.CLIPVisionConfig.from_pretrained(out)
    assert_equal_to(model.dequantize(), hf.CLIPVisionModel.from_pretrained(out, config=read))


def test_tensors_without_their_config_are_refused(directories: Directories, tmp_path: Path) -> None:
    out, _ = directories("clip")
    file = tmp_path / "model.safetensors"
    file.write_bytes((out / file.name).read_bytes())
    config = hf.CLIPVisionConfig.from_pretrained(out)
    for arguments in ({"pretrained_model_name_or_path": tmp_path}, {"state_dict": load_file(file)}):
        with pytest.raises(LoadError, match=r"without its config\.json"):
            hf.CLIPVisionModel.from_pretrained(**{"pretrained_model_name_or_path": None, **arguments}, config=config)


def test_a_part_without_quantized_modules(tmp_path: Path) -> None:
    recipe = Recipe(default=Target(codec="uniform", bits=8, group_size=16)).keeping(["vision_model.*"])
    out, decoded = converted(COMPOSITES["clip"](), tmp_path, recipe)
    model = hf.CLIPVisionModel.from_pretrained(out)
    assert not lowbit_modules(model)
    assert_equal_to(hf.CLIPVisionModel.from_pretrained(decoded), model)
    with pytest.raises(lowbit_format.errors.TaskError, match="none of its own modules is quantized"):
        lowbit_format.prepare_scale_tuning(model)


def test_another_quantizer_is_refused(directories: Directories) -> None:
    config = hf.QuantoConfig(weights="int8") if hasattr(hf, "QuantoConfig") else None
    out, _ = directories("clip")
    with pytest.raises((LoadError, ImportError), match=r"cannot quantize again|quanto"):
        hf.CLIPVisionModel.from_pretrained(out, quantization_config=config)


@pytest.mark.parametrize(
    ("name", "cls", "lost"),
    [
        ("qwen3_5", "Qwen3_5VisionModel", "blocks.0"),  # nor does transformers find it in the float directory
        ("clip", "ViTModel", "embeddings"),
        ("instructblip", "InstructBlipModel", "language_model.*layers.0"),  # its other parts are found
    ],
)
def test_what_would_be_random_is_refused(name: str, cls: str, lost: str, directories: Directories) -> None:
    out, _ = directories(name)
    with pytest.raises(LoadError, match=rf"{cls} has '{lost}.*random: they were written for \w+; load"):
        getattr(hf, cls).from_pretrained(out)


def test_a_lost_tensor_of_a_part_is_refused(directories: Directories, tmp_path: Path) -> None:
    out, _ = directories("clip")
    (tmp_path / "config.json").write_text((out / "config.json").read_text())
    tensors = load_file(out / "model.safetensors")
    del tensors["vision_model.encoder.layers.1.layer_norm1.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoadError, match=r"CLIPVisionModel has '.*encoder\.layers\.1\.layer_norm1\.weight'"):
        hf.CLIPVisionModel.from_pretrained(tmp_path)


def test_a_new_head_over_a_part(directories: Directories) -> None:
    """Only the head is new, which transformers warns of."""
    out, decoded = directories("clip")
    model, info = hf.CLIPForImageClassification.from_pretrained(out, output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert_equal_to(hf.CLIPForImageClassification.from_pretrained(decoded), model, info["missing_keys"])


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    config = hf.BertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, vocab_size=64
    )
    return converted(hf.BertForMaskedLM(config), tmp_path_factory.mktemp("bert"))


def test_fewer_layers(bert: tuple[Path, Path], tmp_path: Path) -> None:
    """Asked for when loading; a config.json that contradicts itself is refused."""
    out, decoded = bert
    for cls in (hf.BertForMaskedLM, hf.AutoModelForSequenceClassification):
        model, info = cls.from_pretrained(out, num_hidden_layers=2, output_loading_info=True)
        assert max(int(p.split(".")[3]) for p in lowbit_modules(model) if ".layer." in p) == 1
        assert_equal_to(cls.from_pretrained(decoded, num_hidden_layers=2), model, info["missing_keys"])
        model.save_pretrained(tmp_path / cls.__name__)
        assert_equal_to(model.dequantize(), type(model).from_pretrained(tmp_path / cls.__name__))
    with pytest.raises(LoadError, match=r"layer\.3.*options given to from_pretrained"):
        hf.BertForMaskedLM.from_pretrained(out, num_hidden_layers=4)


def test_new_parts_in_every_layer(bert: tuple[Path, Path]) -> None:
    """A decoder's cross attention is new over an encoder, in the float case too."""
    out, _ = bert
    model, info = hf.BertLMHeadModel.from_pretrained(
        out, is_decoder=True, add_cross_attention=True, output_loading_info=True
    )
    assert info["missing_keys"]
    assert all("crossattention" in name for name in info["missing_keys"])
    assert lowbit_modules(model)


def test_a_part_that_the_source_never_had(bert: tuple[Path, Path], tmp_path: Path) -> None:
    """Digests tell of all that was written; a pooler is not among it."""
    out, _ = bert
    (tmp_path / "config.json").write_text((out / "config.json").read_text())
    edit_config(tmp_path, lambda c: c.update(architectures=["BertModel"]))
    renamed = json.loads((tmp_path / "config.json").read_text().replace('"bert.', '"'))
    renamed["quantization_config"]["base_model_prefix"] = ""
    modules = renamed["quantization_config"]["modules"]
    own = ("encoder.", "embeddings.")
    renamed["quantization_config"]["modules"] = {p: m for p, m in modules.items() if p.startswith(own)}
    renamed["quantization_config"].pop("tied")  # of the head
    (tmp_path / "config.json").write_text(json.dumps(renamed))
    tensors = load_file(out / "model.safetensors")
    save_file(
        {n.removeprefix("bert."): t for n, t in tensors.items() if not n.startswith("cls.")},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(LoadError, match="BertModel has 'pooler"):
        hf.BertModel.from_pretrained(tmp_path)
    seal(tmp_path / "model.safetensors")
    model, info = hf.BertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"pooler.dense.weight", "pooler.dense.bias"}
    _, info = hf.BertForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert {name.rpartition(".")[0] for name in info["missing_keys"]} == {"bert.pooler.dense", "classifier"}
    assert lowbit_modules(model)


def test_a_tied_matrix_under_the_name_that_the_file_has(tmp_path: Path) -> None:
    """A decoder's file has the embedding of the whole under the decoder's name, not under that of its owner."""
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 64, "max_position_embeddings": 32}
    sizes |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    recipe = Recipe(default=Target(codec="uniform", bits=8, group_size=16), embeddings=True)
    out, decoded = converted(hf.BlenderbotForCausalLM(hf.BlenderbotConfig(**sizes)), tmp_path, recipe)
    want, info = hf.BlenderbotModel.from_pretrained(decoded, output_loading_info=True)
    model = hf.BlenderbotModel.from_pretrained(out)
    assert all(name.startswith("encoder.") for name in info["missing_keys"])
    assert_equal_to(want, model, info["missing_keys"])
    assert len({m.matrix_id for p, m in model.named_modules() if p.endswith(("embed_tokens", "shared"))}) == 1


class Initialising(hf.BertModel):
    """Gives a row of its embedding a value."""

    def _init_weights(self, module: torch.nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "word_embeddings"):
            initialization.zeros_(module.word_embeddings.weight[0])


def test_a_part_of_a_weight_is_initialised(tmp_path: Path) -> None:
    """As transformers does with the padding of some models; what the file has stays as it is."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    recipe = Recipe(default=Target(codec="uniform", bits=8, group_size=16), embeddings=True)
    out, decoded = converted(hf.BertModel(hf.BertConfig(**sizes, vocab_size=64)), tmp_path, recipe)
    model = Initialising.from_pretrained(out)
    assert_equal_to(hf.BertModel.from_pretrained(decoded), model)
    with pytest.raises(UnsupportedOperationError, match="word_embeddings"):
        model.embeddings.word_embeddings.weight[0].zero_()


class Computed(hf.BertForMaskedLM):
    """Computes the names of its tied weights, as a detector does whose layers may share a head."""

    @property
    def _tied_weights_keys(self) -> Any:
        return dict(hf.BertForMaskedLM._tied_weights_keys)


def test_the_first_parameter_of_a_part_tells_its_dtype(bert: tuple[Path, Path]) -> None:
    """Swin v2 makes a table in it that is not saved; in the dtype of planes the table would be of integers."""
    model = hf.BertForMaskedLM.from_pretrained(bert[0], dtype=torch.bfloat16)
    assert lowbit_modules(model.bert.encoder.layer[0].intermediate)
    assert next(model.bert.encoder.layer[0].intermediate.parameters()).dtype == torch.bfloat16


def test_tied_names_that_a_class_computes(bert: tuple[Path, Path]) -> None:
    out, decoded = bert
    assert_equal_to(hf.BertForMaskedLM.from_pretrained(decoded), Computed.from_pretrained(out))


@pytest.mark.parametrize("first", ["save", "dequantize"])
def test_saved_and_dequantized(first: str, bert: tuple[Path, Path], tmp_path: Path) -> None:
    out, decoded = bert
    want = hf.BertForMaskedLM.from_pretrained(decoded)
    model = hf.BertForMaskedLM.from_pretrained(out)
    if first == "save":
        model.save_pretrained(tmp_path / "lowbit")
        assert_equal_to(want, hf.BertForMaskedLM.from_pretrained(tmp_path / "lowbit"))
    plain = model.dequantize()
    assert_equal_to(want, plain)
    plain.save_pretrained(tmp_path / "float")
    assert_equal_to(want, hf.BertForMaskedLM.from_pretrained(tmp_path / "float"))


def test_a_dequantized_model_is_saved_under_the_names_of_its_checkpoints(
    directories: Directories, tmp_path: Path
) -> None:
    out, decoded = directories("qwen2_5_vl")
    lowbit_format.from_pretrained(out).dequantize().save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(decoded / "model.safetensors").keys()
