"""GGUF files: converted bit for bit, as the package gguf and transformers decode them, or refused by name."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from support.conversions import assert_nothing_looks_finished
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("gguf")

import gguf
from support.gguf_files import TEMPLATE, VOCABULARY, blocks, of_config, write_gguf

from lowbit_format.container.reader import ModelReader
from lowbit_format.converters import Recipe, convert_hf_to_lowbit
from lowbit_format.converters.calibration_data import Calibration
from lowbit_format.converters.gguf.blocks import TYPES
from lowbit_format.converters.gguf.rope import scaled_rope
from lowbit_format.converters.gguf.weight import GgufWeight
from lowbit_format.converters.huggingface import open_checkpoint
from lowbit_format.converters.quantized.packed import Raw
from lowbit_format.converters.source import SourceTensor
from lowbit_format.errors import CalibrationError, QuantizedSourceError, SourceError
from lowbit_format.quantize import Target
from lowbit_format.reference import decode
from lowbit_format.testing.vectors import assert_same_bits

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
EXPERTS = {"moe_intermediate_size": 256, "num_experts": 3, "num_experts_per_tok": 2}
MIXED = ("Q4_K", "Q6_K", "Q4_1", "Q8_0")


def llama(**more: Any) -> hf.LlamaConfig:
    return hf.LlamaConfig(**{**SIZES, "tie_word_embeddings": True, **more})


def write(file: Path, config: Any, kinds: tuple[str, ...] = MIXED, parts: int = 1) -> Path:
    """A model of this config, its matrices of these types in turn; stacks of experts Q4_K, routers F32."""
    turn = itertools.cycle(kinds)

    def choose(name: str, shape: tuple[int, ...]) -> str:
        return "F32" if "ffn_gate_inp" in name else "Q4_K" if "_exps" in name else next(turn)

    write_gguf(file, *of_config(config), choose, parts)
    return file


def convert(source: Path, out: Path, recipe: Recipe | None = None, **options: Any) -> Any:
    return convert_hf_to_lowbit(str(source), out, recipe or Recipe(), **options)


def assert_as_transformers(file: Path, out: Path, config: Any = None) -> None:
    """Every parameter is that of transformers' own loading of the file, bit for bit."""
    given = {} if config is None else {"config": config}
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **given).eval()
    ours = AutoModelForCausalLM.from_pretrained(out).eval()
    assert ours.dtype == torch.float32
    assert type(ours).__name__ == type(theirs).__name__
    ours.dequantize()
    found, wanted = ours.state_dict(), theirs.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_same_bits(found[name].numpy(), value.numpy())
    ids = torch.tensor([[1, 5, 9, 250]])
    if config is None:
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("order", [False, True])
def test_every_type_decodes_as_the_package_gguf_does(kind: str, order: bool) -> None:
    """Also with rows in another order, over several files' worth of rows."""
    first, second = blocks(kind, 5, 512, seed=1), blocks(kind, 3, 512, seed=2)
    parts = {str(i): SourceTensor(str(i), "U8", part.shape, part.nbytes) for i, part in enumerate((first, second))}
    rows = np.random.default_rng(3).permutation(8) if order else np.arange(8)
    nbytes = gguf.constants.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    one = GgufWeight(
        "w", (8, 512), "F32", TYPES[kind].scheme, parts, kind=kind, block_bytes=nbytes, order=rows if order else None
    )
    matrix = one.matrix(Raw(parts, {"0": first, "1": second}))
    expected = gguf.quants.dequantize(np.concatenate([first, second]), gguf.GGMLQuantizationType[kind])
    assert_same_bits(decode(matrix), np.ascontiguousarray(expected[rows]))


def test_a_model_of_every_type(tmp_path: Path) -> None:
    """Llama, whose queries and keys have rows in another order; tokenizer, chat template and config come along."""
    file = write(tmp_path / "model.gguf", llama(num_hidden_layers=2), tuple(TYPES))
    done = convert(file, tmp_path / "out")
    assert {o.lossless for o in done.outcomes.values()} == {True}
    assert len(done.outcomes) == 15
    assert_as_transformers(file, tmp_path / "out")
    config = ModelReader(tmp_path / "out").config
    assert config.format_version == "1.1"
    assert config.tied == {"lm_head": "model.embed_tokens"}
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    ours = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "the thé <s> hé, and more"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.chat_template == theirs.chat_template == TEMPLATE
    assert ours.eos_token_id == theirs.eos_token_id == 259
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "gguf: 15 modules" in card
    assert "lowbit format 1.1" in card


OTHERS = {
    "qwen2": lambda: hf.Qwen2Config(**SIZES),  # biases, a head of its own
    "gemma2": lambda: hf.Gemma2Config(**SIZES, head_dim=64, tie_word_embeddings=True),  # norms plus one
    "bloom": lambda: hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=256, n_layer=1, n_head=4),  # q, k, v in one
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=64),  # gate and up are one stack of experts
    "qwen2_moe": lambda: hf.Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=256),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(name: str, tmp_path: Path) -> None:
    config = OTHERS[name]()
    file = write(tmp_path / "model.gguf", config)
    convert(file, tmp_path / "out")
    assert_as_transformers(file, tmp_path / "out", config)


def test_a_model_in_several_files(tmp_path: Path) -> None:
    """Any of them may be given, or their directory; the head stands in the last one."""
    config = hf.Qwen2Config(**SIZES)
    whole = write(tmp_path / "whole.gguf", config)
    convert(whole, tmp_path / "one")
    room = tmp_path / "several"
    room.mkdir()
    write(room / "model-00001-of-00003.gguf", config, parts=3)
    found = convert(room, tmp_path / "three")
    for path in found.outcomes:
        assert np.array_equal(ModelReader(tmp_path / "one").decode(path), ModelReader(tmp_path / "three").decode(path))
    (room / "model-00002-of-00003.gguf").unlink()
    with pytest.raises(SourceError, match=r"model-00002-of-00003\.gguf is missing; download it too"):
        convert(room / "model-00003-of-00003.gguf", tmp_path / "out")


def test_floats_are_quantized_as_any_checkpoint(tmp_path: Path) -> None:
    """F16 and BF16 matrices, with queries and keys in llama.cpp's order."""
    file = write(tmp_path / "model.gguf", llama(), ("F16", "BF16"))
    done = convert(file, tmp_path / "out", Recipe(Target("uniform", bits=8, group_size=64)))
    assert done.plan.release == ""
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name)
    for path in done.outcomes:
        weight = theirs.get_submodule(path).weight.detach()
        found = torch.from_numpy(ModelReader(tmp_path / "out").decode(path))
        assert (found - weight).norm() < 0.01 * weight.norm()
    with pytest.raises(SourceError, match="is not quantized yet"):
        convert(file, tmp_path / "again", requantize=True)


def test_quantized_anew(tmp_path: Path) -> None:
    """At other bits from what it decodes to; said to be second-hand; the embedding keeps its grid."""
    file = write(tmp_path / "model.gguf", llama(), ("Q8_0", "Q4_0", "Q4_1"))
    done = convert(file, tmp_path / "out", Recipe(Target(bits=3, group_size=64)), requantize=True)
    schemes = {path: o.module.scheme for path, o in done.outcomes.items()}
    assert schemes.pop("model.embed_tokens").bits == 8
    assert {(s.codec, s.bits) for s in schemes.values()} == {("bcq", 3)}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name)
    for path in schemes:
        weight = theirs.get_submodule(path).weight.detach()
        error = (torch.from_numpy(ModelReader(tmp_path / "out").decode(path)) - weight).norm() / weight.norm()
        assert 0.01 < error < 0.3
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "second-hand" in card
    assert "7 modules are quantized anew from what the release (gguf) decodes to" in card


def test_quantized_anew_with_data(tmp_path: Path) -> None:
    """The float model is what the file decodes to."""
    file = write(tmp_path / "model.gguf", llama(**SMALL), ("Q8_0", "Q4_1"))
    text = tmp_path / "text.txt"
    text.write_text("the other, then he; " * 60, "utf-8")
    data = Calibration(str(text), "fast", 4, 16)
    with pytest.raises(CalibrationError, match="--requantize"):
        convert(file, tmp_path / "out", calibration=data)
    done = convert(
        file, tmp_path / "out", Recipe(Target(bits=3, group_size=64)), requantize=True, calibration=data, measured=True
    )
    assert done.calibrated
    assert done.comparison is not None
    assert done.comparison.tokens > 0
    assert {o.module.scheme.bits for o in done.outcomes.values()} == {3, 8}


def test_a_type_that_is_no_grid(tmp_path: Path) -> None:
    """It is refused, and can be quantized anew."""
    file = write(tmp_path / "model.gguf", llama(), ("Q8_0", "Q4_0", "IQ2_XXS"))
    with pytest.raises(QuantizedSourceError, match="its type IQ2_XXS is none of those that are stored without loss"):
        convert(file, tmp_path / "out")
    assert_nothing_looks_finished(tmp_path / "out")
    done = convert(file, tmp_path / "out", Recipe(Target(bits=4, group_size=64)), requantize=True)
    assert {o.module.scheme.bits for o in done.outcomes.values()} == {4, 8}
    file = write(tmp_path / "other.gguf", llama(), ("Q8_0", "Q4_0", "Q8_K"))
    with pytest.raises(QuantizedSourceError, match="has the type Q8_K, which the package gguf cannot decode"):
        convert(file, tmp_path / "again", requantize=True)


def test_rope_factors_become_the_config(tmp_path: Path) -> None:
    """Llama 3.1 and later: the file has the factors of frequencies, which transformers' own loading leaves out."""
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    config = llama(rope_parameters=rope, max_position_embeddings=131072)
    plain = llama(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, max_position_embeddings=131072)
    frequencies = [
        hf.models.llama.modeling_llama.LlamaRotaryEmbedding(c).inv_freq.double().numpy() for c in (plain, config)
    ]
    factors = (frequencies[0] / frequencies[1]).astype(np.float32)
    base = {"freq_base": 500000.0}
    assert scaled_rope(plain, base, factors, "x") == rope
    with pytest.raises(SourceError, match="no known parameters"):
        scaled_rope(plain, base, factors * np.float32(1.5), "x")
    with pytest.raises(SourceError, match=r"has both rope_freqs\.weight and rope\.scaling\.type 'linear'"):
        scaled_rope(plain, {**base, "scaling.factor": 2.0}, factors, "x")


def test_scaled_positions_become_the_config() -> None:
    """Or are refused: nothing of them is left out."""
    plain = llama(rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    front = "scaling."
    given = {f"{front}type": "yarn", f"{front}factor": 4.0, f"{front}original_context_length": 32768}
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32768}
    assert scaled_rope(plain, given, None, "x") == yarn
    assert scaled_rope(plain, {**given, f"{front}yarn_beta_fast": 32.0}, None, "x") == yarn
    for none in ({f"{front}type": "none"}, {f"{front}factor": 1.0}, {"scale_linear": 0.0}, {"dimension_count": 64}):
        assert scaled_rope(plain, none, None, "x") == plain.rope_parameters
    for old in ({"scale_linear": 4.0}, {f"{front}factor": 4.0}):  # llama.cpp takes both as linear
        linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
        assert scaled_rope(plain, old, None, "x") == linear
    for bad in (
        {f"{front}type": "longrope"},
        {**given, f"{front}attn_factor": 2.0},
        {f"{front}type": "linear"},
        {"dimension_sections": 3},
        {"scale_linear": -4.0},
    ):
        with pytest.raises(SourceError, match="scales rotary positions by"):
            scaled_rope(plain, bad, None, "x")
    with pytest.raises(SourceError, match="dimension_count is 32, but this model in transformers rotates all 64"):
        scaled_rope(plain, {"dimension_count": 32}, None, "x")
    gemma = hf.Gemma3TextConfig(**SIZES, head_dim=64)
    linear = {"freq_base": 1e6, "scaling.type": "linear", "scaling.factor": 8.0}
    scaled = scaled_rope(gemma, linear, None, "x")
    assert scaled["full_attention"]["factor"] == 8.0
    assert scaled["full_attention"]["rope_theta"] == 1e6
    assert scaled["sliding_attention"] == gemma.rope_parameters["sliding_attention"]
    with pytest.raises(SourceError, match=r"has rope\.freq_base, but 'bloom' in transformers has no rotary positions"):
        scaled_rope(hf.BloomConfig(), {"freq_base": 1e4}, None, "x")


def test_what_is_not_the_model(tmp_path: Path) -> None:
    """Several models in one place; an architecture that is not known; a tensor without a place."""
    file = write(tmp_path / "a.gguf", llama())
    write(tmp_path / "b.gguf", llama())
    with pytest.raises(SourceError, match=r"holds several GGUF files \(a\.gguf, b\.gguf\); give one of them"):
        open_checkpoint(str(tmp_path))
    _, shapes, fields = of_config(llama())
    write_gguf(file, "mamba", shapes, fields, lambda name, shape: "Q8_0")
    with pytest.raises(SourceError, match="has the architecture 'mamba', expected one of llama, qwen2"):
        open_checkpoint(str(file))
    write_gguf(file, "llama", {**shapes, "blk.0.strange.weight": (4, 256)}, fields, lambda name, shape: "Q8_0")
    with pytest.raises(SourceError, match=r"blk\.0\.strange\.weight: transformers gives it no place in the model"):
        open_checkpoint(str(file))
