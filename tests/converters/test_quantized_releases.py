"""Releases that are published only quantized: imported bit for bit, or refused by name."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.checkpoints import SPECIAL, weights
from support.conversions import assert_nothing_looks_finished, content
from support.quantized_releases import (
    Encoder,
    Tensors,
    auto_round,
    awq,
    bitnet,
    bitsandbytes,
    change,
    compressed_fp4,
    compressed_fp8,
    compressed_integers,
    deepseek_fp8,
    fbgemm_fp8,
    gptq,
    mistral_fp8,
    modelopt_fp8,
    modelopt_nvfp4,
    write_gpt_oss,
    write_release,
)
from transformers import AutoModelForCausalLM

import lowbit_format
from lowbit_format.container.reader import ModelReader
from lowbit_format.converters import Recipe, Rule, convert_hf_to_lowbit
from lowbit_format.converters.huggingface import SafetensorsSource, open_checkpoint
from lowbit_format.converters.quantized import open_quantized
from lowbit_format.errors import CalibrationError, QuantizedSourceError, RecipeError
from lowbit_format.quantize import Target
from lowbit_format.reference import decode

Kind = tuple[Encoder, dict[str, Any]]
RECIPE = Recipe()
LAYER = "model.layers.0"
UP = f"{LAYER}.mlp.up_proj"


def convert(source: Path, out: Path, recipe: Recipe = RECIPE, **options: Any) -> Any:
    return convert_hf_to_lowbit(str(source), out, recipe, **options)


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def assert_imported(out: Path, expected: Tensors) -> None:
    """Every packed weight decodes to just what its library gives, from the file and in the loaded model."""
    reader = ModelReader(out)
    assert reader.verify() == 0
    assert set(reader.config.modules) == set(expected)
    model = AutoModelForCausalLM.from_pretrained(out)
    model.dequantize()
    for path, weight in expected.items():
        found = torch.from_numpy(decode(reader.matrix(path))).to(weight.dtype)
        assert torch.equal(bits_of(found), bits_of(weight)), path
        loaded = model.get_submodule(path).weight.detach().to(weight.dtype)
        assert torch.equal(bits_of(loaded), bits_of(weight)), path
    assert torch.isfinite(model(input_ids=torch.tensor([[1, 5, 9]])).logits).all()


def test_a_release_can_be_quantized_anew(tmp_path: Path) -> None:
    """With the recipe's bits from what it decodes to; its own grid is not found again."""
    expected = write_release(tmp_path / "release", *gptq(bits=4))
    done = convert(tmp_path / "release", tmp_path / "out", Recipe(Target(bits=2, group_size=32)), requantize=True)
    assert done.plan.requantized
    assert {o.module.scheme.bits for o in done.outcomes.values()} == {2}
    for path, weight in expected.items():
        found = torch.from_numpy(ModelReader(tmp_path / "out").decode(path))
        assert 0.05 < (found - weight.float()).norm() / weight.float().norm() < 0.7


def refused(source: Path, out: Path, match: str, recipe: Recipe = RECIPE, **options: Any) -> None:
    """The conversion ends in a QuantizedSourceError and leaves nothing that looks finished."""
    with pytest.raises(QuantizedSourceError, match=match):
        convert(source, out, recipe, **options)
    assert_nothing_looks_finished(out)


# --- every kind of release --------------------------------------------------------------------------

KINDS: dict[str, tuple[Kind, torch.dtype]] = {
    "gptq-2-bits": (gptq(2), torch.float16),
    "gptq-3-bits": (gptq(3), torch.float16),
    "gptq-4-bits-sym": (gptq(4, sym=True), torch.float16),
    "gptq-8-bits-bf16": (gptq(8, 64, dtype=torch.bfloat16), torch.bfloat16),
    "gptq-v2-rows": (gptq(4, -1, minus_one=False), torch.float16),
    "awq": (awq(), torch.float16),
    "awq-rows-bf16": (awq(-1, dtype=torch.bfloat16), torch.bfloat16),
    "int4": (compressed_integers(), torch.bfloat16),
    "int4-zeros": (compressed_integers(symmetric=False, dtype=torch.float16), torch.float16),
    "int3-rows-zeros": (compressed_integers(3, strategy="channel", symmetric=False), torch.bfloat16),
    "int3-padded-words": (compressed_integers(3, strategy="channel", symmetric=False, padded=True), torch.bfloat16),
    "int6-padded-words": (compressed_integers(6, symmetric=False, padded=True, dtype=torch.float16), torch.float16),
    "int8-zeros": (compressed_integers(8, strategy="channel", symmetric=False), torch.bfloat16),
    "int8-matrix-zero": (compressed_integers(8, strategy="tensor", symmetric=False), torch.bfloat16),
    "int8-unpacked": (compressed_integers(8, strategy="channel", packed=False), torch.bfloat16),
    "fp8-blocks": (deepseek_fp8(), torch.bfloat16),
    "fp8-blocks-bf16-scales": (deepseek_fp8((64, 64), scale_dtype=torch.bfloat16), torch.bfloat16),
    "fp8-blocks-exponents": (deepseek_fp8((64, 64), scale_dtype=torch.float8_e8m0fnu), torch.bfloat16),
    "fp8-matrix": (mistral_fp8(), torch.bfloat16),
    "fp8-fbgemm": (fbgemm_fp8(), torch.bfloat16),
    "fp8-compressed-rows": (compressed_fp8(), torch.bfloat16),
    "fp8-compressed-matrix": (compressed_fp8("tensor", shape=lambda rows, cols: (1,)), torch.bfloat16),
    "fp8-compressed-blocks": (compressed_fp8("block"), torch.bfloat16),
    "auto-round": (auto_round(gptq(4)), torch.float16),
    "auto-round-zeros": (auto_round(gptq(2, minus_one=False), "auto_round"), torch.float16),
    "auto-round-awq": (auto_round(awq(), "auto_round:auto_awq"), torch.float16),
    "modelopt-fp8": (modelopt_fp8(), torch.bfloat16),
    "modelopt-nvfp4": (modelopt_nvfp4(), torch.bfloat16),
    "nvfp4": (compressed_fp4(), torch.bfloat16),
    "mxfp4": (compressed_fp4("mxfp4"), torch.bfloat16),
    "bitnet": (bitnet(), torch.bfloat16),
    "bitnet-divided": (bitnet("bitlinear", torch.float16), torch.float16),
    "bnb-nf4": (bitsandbytes(), torch.bfloat16),
    "bnb-nf4-nested": (bitsandbytes(nested=True, dtype=torch.float16), torch.float16),
    "bnb-nf4-stored-as-bf16": (bitsandbytes(storage=torch.bfloat16), torch.bfloat16),
    "bnb-fp4-nested-of-rows": (bitsandbytes("fp4", 256, nested=True), torch.bfloat16),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_imported_bit_for_bit(kind: str, tmp_path: Path) -> None:
    (encode, section), dtype = KINDS[kind]
    expected = write_release(tmp_path / "source", encode, section, dtype=dtype)
    done = convert(tmp_path / "source", tmp_path / "out")
    assert_imported(tmp_path / "out", expected)
    assert all(o.lossless and o.squared_error == 0 for o in done.outcomes.values())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "lowbit"
    floats = load_file(tmp_path / "source" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(weights(tmp_path / "out")["lm_head.weight"], floats)


# --- what they have in common -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPTQ release whose gate is in floats; not to be changed."""
    directory = tmp_path_factory.mktemp("release") / "source"
    encode, section = gptq()
    write_release(directory, encode, section, floats=("lm_head", "gate_proj"))
    return directory


def test_what_the_release_left_in_floats_stays_so(release: Path, tmp_path: Path) -> None:
    done = convert(release, tmp_path / "out", Recipe(Target(bits=2)))
    kept = {s.destination.path: s.reason for s in done.plan.kept()}
    assert kept["model.layers.0.mlp.gate_proj"] == "left in full precision by the release"
    assert {o.module.scheme.bits for o in done.outcomes.values()} == {4}


def test_what_is_asked_for_is_quantized(release: Path, tmp_path: Path) -> None:
    recipe = Recipe(Target("uniform", bits=2, group_size=32), lm_head=True).keeping(["*.up_proj"])
    done = convert(release, tmp_path / "out", recipe, min_coverage=0.5)
    assert done.outcomes["lm_head"].module.scheme.bits == 2
    assert UP not in done.outcomes
    found = weights(tmp_path / "out")[f"{UP}.weight"]
    source = load_file(release / "model.safetensors")
    assert found.dtype == torch.float16
    assert found.shape == (source[f"{UP}.scales"].shape[1], len(source[f"{UP}.g_idx"]))


def test_calibration_of_it_is_refused(release: Path, tmp_path: Path) -> None:
    from lowbit_format.converters.calibration_data import Calibration

    with pytest.raises(CalibrationError, match=r"quantized already \(gptq\).*leave --calibrate out"):
        convert(release, tmp_path / "out", calibration=Calibration("self"))


def test_interrupted_it_goes_on_to_the_same_bytes(release: Path, tmp_path: Path) -> None:
    convert(release, tmp_path / "whole")

    def stop(step: Any, total: int) -> None:
        if step.path == UP:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(release, tmp_path / "out", report=stop)
    assert_nothing_looks_finished(tmp_path / "out", killed=True)
    convert(release, tmp_path / "out", resume=True)
    a, b = content(tmp_path / "whole"), content(tmp_path / "out")
    assert {k: v for k, v in a.items() if k != "README.md"} == {k: v for k, v in b.items() if k != "README.md"}


def _mixtral() -> Any:
    return hf.MixtralForCausalLM(
        hf.MixtralConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=96, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=64,
        )
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["fp8-blocks-bf16-scales", "int4-zeros"])
def test_experts_are_imported(kind: str, tmp_path: Path) -> None:
    """A checkpoint has a tensor for each expert and projection; the model has all of them in two."""
    (encode, section), dtype = KINDS[kind]
    expected = write_release(
        tmp_path / "source", encode, section, model=_mixtral, dtype=dtype, floats=("head", ".gate.")
    )
    done = convert(tmp_path / "source", tmp_path / "out")
    assert all(o.lossless and o.squared_error == 0 for o in done.outcomes.values())
    reader = ModelReader(tmp_path / "out")
    assert reader.verify() == 0
    stack = f"{LAYER}.mlp.experts"
    for expert in range(3):
        w1, w2, w3 = (expected[f"{LAYER}.block_sparse_moe.experts.{expert}.{w}"] for w in ("w1", "w2", "w3"))
        for path, weight in {"gate_up_proj": torch.cat([w1, w3]), "down_proj": w2}.items():
            found = torch.from_numpy(decode(reader.matrix(f"{stack}.{path}", expert))).to(dtype)
            assert torch.equal(bits_of(found), bits_of(weight))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(model(input_ids=torch.tensor([[1, 5, 9]])).logits).all()


def test_experts_of_gpt_oss_are_imported(tmp_path: Path) -> None:
    expected = write_gpt_oss(tmp_path / "source")
    done = convert(tmp_path / "source", tmp_path / "out")
    assert set(done.outcomes) == set(expected)
    reader = ModelReader(tmp_path / "out")
    assert reader.verify() == 0
    for path, weight in expected.items():
        for expert, one in enumerate(weight):
            found = torch.from_numpy(decode(reader.matrix(path, expert))).to(weight.dtype)
            assert torch.equal(bits_of(found), bits_of(one.T))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(model(input_ids=torch.tensor([[1, 5, 9]])).logits).all()
    kept = RECIPE.keeping(["*.down_proj"])
    convert(tmp_path / "source", tmp_path / "kept", kept, min_coverage=0)
    name = f"{LAYER}.mlp.experts.down_proj"
    assert torch.equal(weights(tmp_path / "kept")[name], expected[name])


def test_experts_of_which_some_are_floats_are_refused(tmp_path: Path) -> None:
    encode, section = deepseek_fp8((32, 32))
    write_release(tmp_path / "source", encode, section, model=_mixtral, floats=("head", ".gate.", "experts.1.w2"))
    refused(tmp_path / "source", tmp_path / "out", r"\.w2\.weight: the release has quantized some of its experts")


def test_a_section_in_the_config_of_a_part(tmp_path: Path) -> None:
    encode, section = deepseek_fp8((16, 16))
    expected = write_release(
        tmp_path / "source", encode, section, model=SPECIAL["gemma3"], dtype=torch.bfloat16, under="text_config",
        floats=("head", "vision"),
    )  # fmt: skip
    done = convert(tmp_path / "source", tmp_path / "out")
    assert len(done.outcomes) == len(expected)
    assert all(o.lossless for o in done.outcomes.values())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]


def test_the_command_says_what_it_does(release: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from lowbit_format.converters.command import app

    options = ["--bits", "3", "--no-eval"]
    for arguments in (["--dry-run", "--modules"], [str(tmp_path / "out")]):
        done = CliRunner(env={"COLUMNS": "250"}).invoke(app, [str(release), *arguments, *options])
        assert done.exit_code == 0
        assert "gptq: 6 modules of 4 bits are imported without loss, with their own grid" in done.output
        assert "its own grid is kept, and --bits applies to other weights only" in done.output
        assert "left in full precision by the release" in done.output
        if "--modules" in arguments:
            assert "uniform 4 bits, group 32, F16, imported" in done.output
    card = (tmp_path / "out" / "README.md").read_text()
    assert "imported without loss" in card


# --- refused ----------------------------------------------------------------------------------------


def test_columns_out_of_order_are_refused_and_can_be_kept(tmp_path: Path) -> None:
    encode, section = gptq(order=True)
    expected = write_release(tmp_path / "source", encode, section)
    refused(tmp_path / "source", tmp_path / "out", r"_proj\.weight: its columns.*desc_act.*--keep")
    anew = Rule("*.up_proj", Target("uniform", bits=8, group_size=0))
    recipe = Recipe(rules=(anew,)).keeping(["*.[qkvo]_proj", "*.gate_proj", "*.down_proj"])
    done = convert(tmp_path / "source", tmp_path / "out", recipe, min_coverage=0)
    assert list(done.outcomes) == [UP]
    assert not done.outcomes[UP].lossless
    for path, weight in expected.items():
        if path != UP:
            assert torch.equal(weights(tmp_path / "out")[f"{path}.weight"], weight)


def test_columns_out_of_order_with_one_group_are_no_matter(tmp_path: Path) -> None:
    encode, section = gptq(4, -1, order=True)
    expected = write_release(tmp_path / "source", encode, section)
    convert(tmp_path / "source", tmp_path / "out")
    assert_imported(tmp_path / "out", expected)


def _set(role: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    name = f"{UP}.{role}"
    return lambda tensors: tensors.update({name: make(tensors[name]).contiguous()})


def _nan(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    t.view(-1)[3] = torch.nan
    return t


def _with(kind: Kind, more: dict[str, Any]) -> Kind:
    return kind[0], {**kind[1], **more}


_STATE = "weight.quant_state.bitsandbytes__nf4"
_INT4 = compressed_integers()
_NO_ZEROS = f"{UP}.weight_zero_point"
LIES: dict[str, tuple[Kind, Callable[[Tensors], object], str]] = {
    "gptq-nan": (gptq(), _set("scales", _nan), r"up_proj\.scales: holds 1 NaN or infinite values"),
    "gptq-short": (gptq(), _set("qweight", lambda t: t[:-1]), r"up_proj.*(groups|shape)"),
    "gptq-zeros": (gptq(), _set("qzeros", lambda t: t[:-1]), r"up_proj\.scales: has shape \[4, 256\], expected \[3, 2"),
    "gptq-no-groups": (gptq(), _set("qzeros", lambda t: t[:0]), r"up_proj\.qzeros: has shape \[0, 32\]"),
    "gptq-float": (gptq(), _set("qweight", lambda t: t.float()), r"up_proj\.qweight: has dtype F32, expected I32"),
    "gptq-lacks": (gptq(), lambda t: t.pop(f"{UP}.scales"), r"lacks the tensor '.*up_proj\.scales'"),
    "gptq-group": (gptq(), _set("g_idx", lambda t: t + 1), r"up_proj\.g_idx: has groups 1 to 4, expected 0 to 3"),
    "gptq-overflow": (gptq(), _set("qzeros", lambda t: t * 0 - 1), r"up_proj\.qzeros: holds 15, which stands for"),
    "gptq-twice": (
        gptq(), lambda t: t.update({f"{UP}.weight": torch.zeros(256, 128)}), r"up_proj\.weight: stands beside",
    ),
    "gptq-bits": (_with(gptq(), {"bits": 5}), lambda t: None, r"bits 5, expected one of 2, 3, 4, 8"),
    "gptq-format": (
        _with(gptq(), {"checkpoint_format": "marlin"}), lambda t: None, r"checkpoint_format 'marlin'",
    ),
    "gptq-size": (_with(gptq(), {"group_size": 0}), lambda t: None, r"group_size 0, expected"),
    "awq-nan": (awq(), _set("scales", _nan), r"up_proj\.scales: holds 1 NaN or infinite values"),
    "awq-zeros": (awq(), _set("qzeros", lambda t: t[:-1]), r"up_proj\.qzeros: has shape \[3, 32\], expected \[4, 32\]"),
    "awq-order": (_with(awq(), {"version": "gemv"}), lambda t: None, r"version 'gemv', expected 'gemm'"),
    "awq-bits": (_with(awq(), {"bits": 8}), lambda t: None, r"bits 8, expected one of 4"),
    "int4-shape": (
        _INT4, _set("weight_shape", lambda t: t * 2**40), r"up_proj\.weight_packed: has.*weight_shape",
    ),
    "int3-two-ways": (
        compressed_integers(3, strategy="channel"),
        lambda t: t.update({
            f"{UP}.weight_packed": torch.zeros(256, 15, dtype=torch.int32),
            f"{UP}.weight_shape": torch.tensor([256, 150]),
        }),
        r"up_proj\.weight_packed: 150 codes of 3 bits take as many words in both",
    ),
    "int4-negative": (_INT4, _set("weight_shape", lambda t: -t), r"up_proj\.weight_packed: has shape"),
    "int4-groups": (_INT4, _set("weight_scale", lambda t: t[:, :-1]), r"up_proj\.weight_scale: has shape"),
    "int4-lacks": (
        compressed_integers(symmetric=False), lambda t: t.pop(_NO_ZEROS), r"lacks.*up_proj\.weight_zero",
    ),
    "int4-no-weight": (_INT4, lambda t: t.pop(f"{UP}.weight_packed"), r"up_proj: has scales and nothing"),
    "int4-no-scale": (_INT4, lambda t: t.pop(f"{UP}.weight_scale"), r"lacks.*up_proj\.weight_scale"),
    "int4-sparse": (
        _with(_INT4, {"sparsity_config": {"format": "sparse-24-bitmask"}}),
        lambda t: None, r"has a sparsity_config",
    ),
    "int4-rotated": (
        _with(_INT4, {"transform_config": {"config_groups": {"a": {}}}}),
        lambda t: None, r"has a transform_config",
    ),
    "int4-no-groups": (
        _with(_INT4, {"config_groups": {}}), lambda t: None, r"no config_groups",
    ),
    "fp8-nan": (
        deepseek_fp8(), _set("weight", lambda t: torch.full_like(t, torch.nan)), r"up_proj\.weight: decodes to NaN",
    ),
    "fp8-nan-scale": (deepseek_fp8(), _set("weight_scale_inv", _nan), r"up_proj\.weight_scale_inv: holds 1 NaN"),
    "fp8-blocks": (
        deepseek_fp8(), _set("weight_scale_inv", lambda t: t[:1]), r"up_proj\.weight_scale_inv: has shape \[1, 2\]",
    ),
    "fp8-lacks": (deepseek_fp8(), lambda t: t.pop(f"{UP}.weight_scale_inv"), r"lacks.*up_proj\.weight_scale_inv"),
    "fp8-overflow": (
        deepseek_fp8(), _set("weight_scale_inv", lambda t: t * 1e39), r"up_proj\.weight_scale_inv: holds 8 NaN or inf",
    ),
    "fp8-alone": (
        deepseek_fp8(), lambda t: t.update({"more": t[f"{UP}.weight"].clone()}), r"more: has dtype F8_E4M3, and bel",
    ),
    "fp8-stack": (
        deepseek_fp8(), lambda t: t.update({"experts.up_proj": t[f"{UP}.weight"].clone()[None]}),
        r"experts\.up_proj: is a stack of experts in F8_E4M3, which is not imported",
    ),
    "fp8-kind": (_with(deepseek_fp8(), {"fmt": "e5m2"}), lambda t: None, r"fmt 'e5m2', expected"),
    "fp8-block": (
        _with(deepseek_fp8(), {"weight_block_size": [0, 4]}), lambda t: None, r"weight_block_size \[0",
    ),
    "nvfp4-global": (
        compressed_fp4(), _set("weight_global_scale", lambda t: t * 0), r"up_proj\.weight_global_scale: is 0\.0, and",
    ),
    "modelopt-smoothed": (
        modelopt_nvfp4(), lambda t: t.update({f"{UP}.pre_quant_scale": torch.ones(128)}),
        r"up_proj\.pre_quant_scale: the release changes activations",
    ),
    "modelopt-kind": (
        modelopt_fp8(), _set("weight", lambda t: t.view(torch.uint8)), r"up_proj: has scales and a weight of U8; of",
    ),
    "modelopt-global": (
        modelopt_nvfp4(), _set("weight_scale_2", lambda t: t * torch.inf), r"up_proj\.weight_scale_2: holds 1 NaN",
    ),
    "auto-round-data-type": (
        _with(auto_round(gptq()), {"data_type": "nv_fp"}), lambda t: None, r"data_type 'nv_fp', expected 'int'",
    ),
    "auto-round-packing": (
        auto_round(gptq(), "auto_round:mlx"), lambda t: None, r"packing_format 'auto_round:mlx', expected one of auto_",
    ),
    "nvfp4-scale": (compressed_fp4(), _set("weight_scale", lambda t: t.float()), r"weight_scale: has dtype F32"),
    "mxfp4-nan": (
        compressed_fp4("mxfp4"), _set("weight_scale", lambda t: t * 0 + 255), r"up_proj\.weight_scale: holds 1024 NaN",
    ),
    "mxfp4-overflow": (
        compressed_fp4("mxfp4"), _set("weight_scale", lambda t: t * 0 + 254), r"up_proj\.weight: decodes to NaN or inf",
    ),
    "bitnet-code": (bitnet(), _set("weight", lambda t: t * 0 + 255), r"up_proj\.weight: holds codes that stand for no"),
    "bitnet-scale": (
        bitnet("bitlinear"), _set("weight_scale", lambda t: t * 0), r"up_proj\.weight_scale: is so small that",
    ),
    "bitnet-norm": (_with(bitnet(), {"use_rms_norm": True}), lambda t: None, r"has use_rms_norm"),
    "hqq": (_with(gptq(), {"quant_method": "hqq"}), lambda t: None, r"'hqq'\), whose library rounds each weight twice"),
    "bnb-rows": (bitsandbytes(block=96), lambda t: None, r"proj\.weight: blocks of 96 weights run over the ends"),
    "bnb-8-bits": (_with(bitsandbytes(), {"load_in_8bit": True}), lambda t: None, r"8 bits, whose library rounds"),
    "bnb-state": (
        bitsandbytes(), _set(_STATE, lambda t: t[:-1]), r"up_proj\.weight\.quant_state\.bitsandbytes__nf4: is not JSON",
    ),
    "bnb-shape": (
        bitsandbytes(), _set(_STATE, lambda t: torch.tensor(list(b'{"shape": [99999999999, 1]}'), dtype=torch.uint8)),
        r"quant_state\.bitsandbytes__nf4: says shape \[99999999999, 1\]",
    ),
    "bnb-table": (bitsandbytes(), _set("weight.quant_map", lambda t: t + 1), r"quant_map: is not the table of nf4"),
    "bnb-lacks": (bitsandbytes(), lambda t: t.pop(f"{UP}.weight.absmax"), r"lacks.*up_proj\.weight\.absmax"),
    "bnb-short": (bitsandbytes(), _set("weight", lambda t: t[:-1]), r"up_proj\.weight: has 16383 bytes, which"),
    "bnb-nan": (bitsandbytes(), _set("weight.absmax", _nan), r"up_proj\.weight\.absmax: holds 1 NaN"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_what_does_not_fit_is_refused(lie: str, tmp_path: Path) -> None:
    (encode, section), edit, match = LIES[lie]
    write_release(tmp_path / "source", encode, section)
    change(tmp_path / "source", edit)
    refused(tmp_path / "source", tmp_path / "out", match)


JUNK = [None, 0, -1, 3, 2**40, 0.5, "", "x", [], [1], {}, {"a": 1}, True]


@settings(max_examples=100)
@given(st.data())
def test_whatever_is_in_the_file_it_is_exact_or_refused(data: st.DataObject) -> None:
    """One module of 32 x 64, of which a tensor or a key of the section is something else."""
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    (encode, section), _ = KINDS[kind]
    torch.manual_seed(1)
    tensors = {f"m.{role}": tensor.contiguous() for role, tensor in encode(32, 64)[0].items()}
    name = data.draw(st.sampled_from(sorted(tensors)))
    raw = tensors[name].reshape(-1).view(torch.uint8)
    match data.draw(st.sampled_from(["drop", "cut", "flat", "bytes", "dtype", "section"])):
        case "drop":
            del tensors[name]
        case "cut" if tensors[name].ndim:
            tensors[name] = tensors[name][: data.draw(st.integers(0, len(tensors[name])))].contiguous()
        case "flat":
            tensors[name] = tensors[name].reshape(-1)
        case "bytes":
            seed = data.draw(st.integers(0, 1000))
            noise = torch.randint(0, 256, raw.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
            tensors[name] = noise.view(tensors[name].dtype).reshape(tensors[name].shape)
        case "dtype":
            dtypes = [torch.float32, torch.float16, torch.int8, torch.uint8, torch.int32, torch.int64]
            tensors[name] = tensors[name].float().to(data.draw(st.sampled_from(dtypes)))
        case "section":
            section = {**section, data.draw(st.sampled_from(sorted(section))): data.draw(st.sampled_from(JUNK))}
    with tempfile.TemporaryDirectory() as directory:
        save_file(tensors, Path(directory) / "model.safetensors", {"format": "pt"})
        source = SafetensorsSource(Path(directory), {"model.safetensors": []}, None, None)
        try:
            found = open_quantized(source, section, {"dtype": "bfloat16"}).tensors["m.weight"].grid
            matrix = None if found is None else found.matrix(None)  # compared with the formula
        except QuantizedSourceError:
            return
        assert matrix is not None
        assert np.isfinite(matrix.params.scales).all()


def test_a_section_without_packed_weights_is_refused(tmp_path: Path) -> None:
    write_release(tmp_path / "source", gptq()[0], gptq()[1], floats=("",))
    refused(tmp_path / "source", tmp_path / "out", "it has no packed weights")


def test_another_reading_of_the_release_is_another_source(tmp_path: Path) -> None:
    """So that a conversion which was begun with the first reading does not go on with the second."""
    encoder, section = gptq()
    write_release(tmp_path / "release", encoder, section)
    opened, config = (
        open_checkpoint(str(tmp_path / "release")),
        json.loads((tmp_path / "release/config.json").read_text()),
    )
    identities = {
        open_quantized(opened, {**section, "checkpoint_format": form}, config).identity for form in ("gptq", "gptq_v2")
    }
    assert len(identities) == 2


def test_a_grid_that_is_kept_does_not_take_a_precision_away(tmp_path: Path) -> None:
    """--requantize --nested: what keeps its own grid would leave the model without the precision that was asked for."""
    write_release(tmp_path / "source", *gptq(), floats=())
    nested = Recipe(Target(bits=4, nested=(2,)))
    with pytest.raises(RecipeError, match=r"lm_head: keeps its own grid of 4 bits, which has no precision of 2 bits"):
        convert(tmp_path / "source", tmp_path / "out", nested, requantize=True)
    convert(tmp_path / "source", tmp_path / "out", replace(nested, lm_head=True), requantize=True)
    assert lowbit_format.from_pretrained(tmp_path / "out", bits=2) is not None
