"""What the metadata of a GGUF file say of the model: set in the config, known to change nothing, or refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("gguf")

import gguf
from support.gguf_files import VOCABULARY, of_config, write_gguf

from lowbit_format.converters import convert_hf_to_lowbit
from lowbit_format.converters.convert import plan_conversion
from lowbit_format.converters.gguf.names import Naming
from lowbit_format.converters.huggingface import open_checkpoint
from lowbit_format.errors import SourceError
from lowbit_format.testing.vectors import assert_same_bits

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 3, "num_experts_per_tok": 2}
CONFIGS: dict[str, Any] = {
    "llama": lambda: hf.LlamaConfig(**SIZES),
    "qwen2": lambda: hf.Qwen2Config(**SIZES),
    "qwen2moe": lambda: hf.Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=32),
    "qwen3": lambda: hf.Qwen3Config(**SIZES, head_dim=32),
    "qwen3moe": lambda: hf.Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=32),
    "phi3": lambda: hf.Phi3Config(**SIZES, pad_token_id=0),
    "gemma2": lambda: hf.Gemma2Config(**SIZES, head_dim=16),
    "gemma3": lambda: hf.Gemma3TextConfig(**SIZES, head_dim=16),
    "bloom": lambda: hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4),
    "falcon": lambda: hf.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_hidden_size=96
    ),
    "stablelm": lambda: hf.StableLmConfig(**SIZES, partial_rotary_factor=0.5, use_qkv_bias=True),
    "starcoder2": lambda: hf.Starcoder2Config(**SIZES),
    "nemotron": lambda: hf.NemotronConfig(**SIZES, head_dim=16),
}


def write(file: Path, name: str, **more: Any) -> Path:
    """A file of F32 with further metadata; a dot in a key is given as ``__``, None takes a key out."""
    architecture, shapes, fields = of_config(CONFIGS[name]())
    given = {key.replace("__", "."): value for key, value in more.items()}
    kept = {key: value for key, value in {**fields, **given}.items() if value is not None}
    write_gguf(file, architecture, shapes, kept, lambda name, shape: "F32")
    return file


def config_of(file: Path) -> Any:
    source = open_checkpoint(str(file))
    found = AutoConfig.from_pretrained(source.directory)
    found._name_or_path = ""
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_names_from_one_layer_are_those_of_all(name: str) -> None:
    """transformers' own map of the whole model, which takes time that grows with the square of its layers."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    config = CONFIGS[name]()
    one = CONFIGS[name]()
    if getattr(one, "layer_types", None):
        one.layer_types = one.layer_types[:1]
    one.num_hidden_layers = 1
    with torch.device("meta"):
        whole, small = (AutoModelForCausalLM.from_config(c) for c in (config, one))
    processor = TENSOR_PROCESSORS.get(name, TensorProcessor)(config=config.to_dict())
    wanted = get_gguf_hf_weights_map(whole, processor)
    assert {"blk.0.ffn_norm.weight", "blk.1.ffn_norm.weight", "blk.1.attn_norm.weight"} & wanted.keys()
    assert Naming(small, name, config, "x")._names == wanted


def test_what_is_set(tmp_path: Path) -> None:
    """Of each setting that transformers' own loading leaves out, and a config has."""
    file = tmp_path / "model.gguf"
    gemma = write(file, "gemma2", attn_logit_softcapping=30.0, final_logit_softcapping=0.0)
    found = config_of(gemma)
    assert (found.attn_logit_softcapping, found.final_logit_softcapping) == (30.0, None)
    assert config_of(write(file, "gemma3", final_logit_softcapping=20.0)).final_logit_softcapping == 20.0
    for architecture in ("phi3", "starcoder2"):
        assert config_of(write(file, architecture, attention__sliding_window=31)).sliding_window == 31
        assert config_of(write(file, architecture, attention__sliding_window=0)).sliding_window is None
    for architecture in ("phi3", "stablelm", "nemotron"):
        half = write(file, architecture, rope__dimension_count=8)
        assert config_of(half).rope_parameters["partial_rotary_factor"] == 0.5
        whole = write(file, architecture, rope__dimension_count=None)  # as llama.cpp reads it
        assert config_of(whole).rope_parameters["partial_rotary_factor"] == 1.0
    assert config_of(write(file, "starcoder2", rope__freq_base=5e5)).rope_parameters["rope_theta"] == 5e5
    assert config_of(write(file, "falcon", attention__layer_norm_epsilon=0.5)).layer_norm_epsilon == 0.5
    scaled = config_of(write(file, "llama", rope__scale_linear=4.0)).rope_parameters
    assert (scaled["rope_type"], scaled["factor"]) == ("linear", 4.0)
    local = write(file, "gemma3", rope__freq_base=5e5, rope__freq_base_swa=2e4)
    found = config_of(local).rope_parameters
    assert (found["full_attention"]["rope_theta"], found["sliding_attention"]["rope_theta"]) == (5e5, 2e4)


@pytest.mark.parametrize(("name", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_queries_of_the_27b(name: str, layers: int, tmp_path: Path) -> None:
    """It scales them by its width by its heads, all others by the columns of a head."""
    from lowbit_format.converters.gguf import settings

    assert settings._LAYERS_OF_27B[name] == layers
    file = write(tmp_path / "model.gguf", name, attention__key_length=16)
    assert config_of(file).query_pre_attn_scalar == 16
    config = CONFIGS[name]()
    config.num_hidden_layers = layers
    config.head_dim = 8
    given = {"attention.key_length": 8}
    settings.apply_settings(config, given, name, None, "x")
    assert config.query_pre_attn_scalar == 64 // 4


def test_what_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    harmless = {
        "attention.value_length": 16, "attention.key_length": 16, "rope.dimension_count": 16, "logit_scale": 0.0,
        "attention.causal": True, "tensor_data_layout": "Meta AI original pth", "expert_count": 0, "pooling_type": 0,
        "attention.sliding_window": 0, "rope.scaling.finetuned": False, "rope.scaling.original_context_length": 64,
    }  # fmt: skip
    plain = config_of(write(file, "llama"))
    assert config_of(write(file, "llama", **harmless)).to_dict() == plain.to_dict()
    config_of(write(file, "bloom", attention__max_alibi_bias=8.0, feed_forward_length=256, context_length=99))
    config_of(write(file, "falcon", attention__head_count_kv=1, tensor_data_layout="jploski"))
    config_of(write(file, "stablelm", use_parallel_residual=True))


REFUSED: list[tuple[str, str, Any]] = [
    ("llama", "attention.sliding_window", 64),
    ("qwen2", "attention.sliding_window", 64),
    ("gemma2", "attention.sliding_window", 0),
    ("gemma3", "attention.sliding_window_pattern", 2),
    ("llama", "attn_logit_softcapping", 30.0),
    ("llama", "attention.clamp_kqv", 1.0),
    ("llama", "attention.max_alibi_bias", 8.0),
    ("bloom", "attention.max_alibi_bias", 4.0),
    ("bloom", "feed_forward_length", 99),
    ("llama", "attention.value_length", 8),
    ("llama", "attention.causal", False),
    ("llama", "logit_scale", 0.5),
    ("llama", "expert_count", 8),
    ("falcon", "attention.head_count_kv", 2),
    ("qwen3moe", "expert_weights_norm", False),
    ("llama", "of.the.future", 7),
    ("llama", "of.the.future", "a word"),
]


@pytest.mark.parametrize(("name", "key", "value"), REFUSED)
def test_what_is_refused(name: str, key: str, value: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "model.gguf", name, **{key: value})
    with pytest.raises(SourceError, match=rf"model\.gguf: {name}\.{key} is {value!r}, which is not known"):
        open_checkpoint(str(file))


def test_numbers_for_each_layer(tmp_path: Path) -> None:
    file = write(tmp_path / "model.gguf", "llama", attention__head_count_kv=[2, 2])
    with pytest.raises(SourceError, match=r"llama\.attention\.head_count_kv is an array of 2 values, expected one for"):
        open_checkpoint(str(file))


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.freq_base", "attention.layer_norm_rms_epsilon"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_none(key: str, value: float, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=rf"llama\.{key} is (nan|inf), expected a finite number"):
        open_checkpoint(str(write(tmp_path / "model.gguf", "llama", **{key: value})))


def test_layers_that_the_file_has_not(tmp_path: Path) -> None:
    """Found before anything is built of so many."""
    for claimed in (1, 3, 4_000_000_000):
        file = write(tmp_path / "model.gguf", "gemma3", block_count=claimed)
        with pytest.raises(SourceError, match=rf"gemma3\.block_count is {claimed}, but its tensors are of 2 layers"):
            open_checkpoint(str(file))


@pytest.mark.parametrize("name", ["bloom", "falcon"])
def test_a_head_of_its_own(name: str, tmp_path: Path) -> None:
    """transformers' own loading ties the head of these and drops the file's."""
    architecture, shapes, fields = of_config(CONFIGS[name]())
    fields.setdefault("feed_forward_length", 96 if name == "falcon" else 256)
    file = tmp_path / "model.gguf"
    for tied in (True, False):
        tensors = {**shapes} if tied else {**shapes, "output.weight": (VOCABULARY, 64)}
        write_gguf(file, architecture, tensors, fields, lambda name, shape: "Q8_0")
        out = tmp_path / f"out-{tied}"
        convert_hf_to_lowbit(str(file), out)
        model = AutoModelForCausalLM.from_pretrained(out)
        model.dequantize()
        assert model.config.tie_word_embeddings == tied
        written = {t.name: t for t in gguf.GGUFReader(file).tensors}
        wanted = written["token_embd.weight" if tied else "output.weight"]
        values = gguf.quants.dequantize(wanted.data, wanted.tensor_type)
        assert_same_bits(model.get_output_embeddings().weight.detach().numpy(), values)


def test_a_model_that_is_named_mistral(tmp_path: Path) -> None:
    """transformers makes another class of it, by its name alone, with a window that llama.cpp has not."""
    named = config_of(write(tmp_path / "model.gguf", "llama", general__name="mistral"))
    plain = config_of(write(tmp_path / "model.gguf", "llama"))
    assert named.to_dict() == plain.to_dict()


def test_files_beside_it_are_not_read(tmp_path: Path) -> None:
    file = write(tmp_path / "model.gguf", "llama")
    alone = open_checkpoint(str(file))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "model_max_length": 7})
    )
    (tmp_path / "chat_template.jinja").write_text("another")
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "the"}')
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.1}')
    beside = open_checkpoint(str(file))
    names = sorted(path.name for path in alone.directory.iterdir())
    assert sorted(path.name for path in beside.directory.iterdir()) == names
    for name in names:
        assert (beside.directory / name).read_bytes() == (alone.directory / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(beside.directory)
    assert tokenizer("the thé")["input_ids"] == AutoTokenizer.from_pretrained(alone.directory)("the thé")["input_ids"]


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_messages_name_the_file(kind: str, tmp_path: Path) -> None:
    """Not the temporary directory of its config, which is gone when they are read."""
    architecture, shapes, fields = of_config(CONFIGS["llama"]())
    file = tmp_path / "model.gguf"
    cut = {**shapes, "blk.0.ffn_down.weight": (64, 64)}
    write_gguf(file, architecture, cut, fields, lambda name, shape: kind)
    for convert in (lambda: convert_hf_to_lowbit(str(file), tmp_path / "out"), lambda: plan_conversion(str(file))):
        with pytest.raises(SourceError, match="has shape") as raised:
            convert()
        assert str(raised.value).startswith(f"{file}: tensor ")
