"""The libraries that write releases decode what our test encoders say, which is what the importer gives.

Each test is skipped where its library is not installed; none of them is needed for anything else here.

    pip install compressed-tensors bitsandbytes auto-round nvidia-modelopt omegaconf gptqmodel autoawq
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from packaging.version import Version
from support.quantized_releases import (
    Encoder,
    Tensors,
    awq,
    bitsandbytes,
    compressed_fp4,
    compressed_fp8,
    compressed_integers,
    gptq,
    modelopt_fp8,
    modelopt_nvfp4,
)

Kind = tuple[Encoder, dict[str, Any]]
ROWS, COLS = 128, 256


def encoded(encode: Encoder) -> tuple[Tensors, torch.Tensor]:
    torch.manual_seed(7)
    parts, weight = encode(ROWS, COLS)
    return {role: part.contiguous() for role, part in parts.items()}, weight


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Zeros may differ in their sign (ENC-3)."""
    assert found.dtype == expected.dtype
    assert torch.equal((found + 0.0).contiguous().view(torch.int16), (expected + 0.0).contiguous().view(torch.int16))


def module_of(package: str, path: str) -> ModuleType:
    """One file of an installed package, without the imports of the package around it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    file = Path(spec.origin).parent / path
    alone = importlib.util.spec_from_file_location(f"{package}_{file.stem}", file)
    assert alone is not None
    assert alone.loader is not None
    module = importlib.util.module_from_spec(alone)
    alone.loader.exec_module(module)
    return module


COMPRESSED: dict[str, tuple[str, Kind]] = {
    "int4": ("PackedQuantizationCompressor", compressed_integers()),
    "int4-zeros": ("PackedQuantizationCompressor", compressed_integers(symmetric=False, dtype=torch.float16)),
    "int3-rows": ("PackedQuantizationCompressor", compressed_integers(3, strategy="channel", symmetric=False)),
    "int8": ("NaiveQuantizationCompressor", compressed_integers(8, strategy="channel", packed=False)),
    "fp8-rows": ("NaiveQuantizationCompressor", compressed_fp8()),
    "fp8-blocks": ("NaiveQuantizationCompressor", compressed_fp8("block")),
    "nvfp4": ("NVFP4PackedCompressor", compressed_fp4()),
    "mxfp4": ("MXFP4PackedCompressor", compressed_fp4("mxfp4")),
}


@pytest.mark.parametrize("kind", COMPRESSED)
def test_compressed_tensors(kind: str) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    if kind in ("int3-rows", "mxfp4") and Version(version("compressed-tensors")) < Version("0.20"):
        pytest.skip("older versions pad words, and do not decode MXFP4")
    name, (encode, section) = COMPRESSED[kind]
    parts, weight = encoded(encode)
    group = next(iter(section["config_groups"].values()))
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**group["weights"])
    )
    assert_same_bits(getattr(compressors, name).decompress(parts, scheme)["weight"].to(weight.dtype), weight)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_compressed_tensors_before_version_0_20_pad_words(bits: int) -> None:
    """What the newer package reads too, where the shape says so, or does not at all."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    encode, _ = compressed_integers(bits, strategy="channel", padded=True)
    parts, _ = encoded(encode)
    codes = torch.randint(0, 2**bits, (ROWS, COLS)) - 2 ** (bits - 1)
    if helpers.pack_to_int32(codes.to(torch.int8), bits).shape != parts["weight_packed"].shape:
        pytest.skip("this version puts codes across the ends of words")
    found = helpers.unpack_from_int32(parts["weight_packed"], bits, torch.Size([ROWS, COLS]))
    assert torch.equal(helpers.pack_to_int32(found, bits), parts["weight_packed"])


@pytest.mark.parametrize(
    "options", [{}, {"nested": True, "dtype": torch.float16}, {"kind": "fp4", "block": 128}], ids=str
)
def test_bitsandbytes(options: dict[str, Any]) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    parts, weight = encoded(bitsandbytes(**options)[0])
    state = functional.QuantState.from_dict(
        {role: part for role, part in parts.items() if role != "weight"}, device=torch.device("cpu")
    )
    assert_same_bits(functional.dequantize_4bit(parts["weight"], state), weight)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("file", "minus_one"), [("qlinear_torch_zp", True), ("qlinear_torch", False)])
def test_auto_round(file: str, minus_one: bool, bits: int) -> None:
    pytest.importorskip("auto_round")
    layers = pytest.importorskip(f"auto_round_extension.torch.{file}")
    parts, weight = encoded(gptq(bits, minus_one=minus_one)[0])
    layer = layers.QuantLinear(bits, 32, COLS, ROWS, False)
    for role in ("qweight", "qzeros", "scales"):
        setattr(layer, role, parts[role])
    layer.post_init()
    assert_same_bits(layer(torch.eye(COLS, dtype=torch.float16)).T, weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("minus_one", [True, False], ids=["gptq", "gptq_v2"])
def test_gptqmodel(minus_one: bool, bits: int) -> None:
    layers = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
    convert = pytest.importorskip("gptqmodel.utils.model").convert_gptq_v1_to_v2_format_module
    parts, weight = encoded(gptq(bits, minus_one=minus_one)[0])
    layer = layers.TorchLinear(
        bits=bits, group_size=32, sym=False, desc_act=False, in_features=COLS, out_features=ROWS, bias=False,
        pack_dtype=torch.int32, register_buffers=True,
    )  # fmt: skip
    for role, part in parts.items():
        setattr(layer, role, part)
    if minus_one:
        convert(layer, bits, torch.int32)
    layer.post_init()
    assert_same_bits(layer.dequantize_weight().T.to(weight.dtype), weight)


def test_autoawq() -> None:
    packing = module_of("awq", "utils/packing_utils.py")
    parts, weight = encoded(awq()[0])
    found = packing.dequantize_gemm(parts["qweight"], parts["qzeros"], parts["scales"], 4, 32)
    assert_same_bits(found.T, weight)


def _nvfp4(parts: Tensors) -> torch.Tensor:
    tensors = pytest.importorskip("modelopt.torch.quantization.qtensor.nvfp4_tensor")
    packed = tensors.NVFP4QTensor(torch.Size([ROWS, COLS]), torch.bfloat16, parts["weight"])
    scales = {"scale": parts["weight_scale"], "double_scale": parts["weight_scale_2"], "block_sizes": {-1: 16}}
    return packed.dequantize(dtype=torch.bfloat16, **scales)


def _fp8(parts: Tensors) -> torch.Tensor:
    tensors = pytest.importorskip("modelopt.torch.quantization.qtensor.fp8_tensor")
    packed = tensors.FP8QTensor(torch.Size([ROWS, COLS]), torch.bfloat16, parts["weight"])
    return packed.dequantize(dtype=torch.bfloat16, scale=parts["weight_scale"])


@pytest.mark.parametrize(("kind", "decode"), [(modelopt_nvfp4, _nvfp4), (modelopt_fp8, _fp8)], ids=["nvfp4", "fp8"])
def test_modelopt(kind: Callable[[], Kind], decode: Callable[[Tensors], torch.Tensor]) -> None:
    parts, weight = encoded(kind()[0])
    assert_same_bits(decode(parts), weight)
