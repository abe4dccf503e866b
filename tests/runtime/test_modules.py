"""Modules with a quantized matrix: declared dtypes, the stand-in for ``weight``, copies and compilation."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support.modules import filled
from torch import nn

from lowbit_format.errors import TensorError, UnsupportedOperationError
from lowbit_format.reference import decode_numpy
from lowbit_format.runtime.modules import LowbitConv1D, LowbitEmbedding, LowbitLinear, LowbitModule
from lowbit_format.schema import Scheme
from lowbit_format.testing.matrices import random_matrix

SCHEME = Scheme("bcq", 3, 8, "F16", offset=True, nested=(2,))
RAGGED = Scheme("uniform", 4, 0, "F32", row_bits=True, nested=(2,))


def linear(scheme: Scheme = SCHEME) -> LowbitModule:
    row_bits = random_matrix(scheme, 6, 20).row_bits
    return filled(LowbitLinear(scheme, 6, 20, bias=True, plane_rows=None if row_bits is None else int(row_bits.sum())))


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float64)])
def test_casts_reach_only_bias_and_compute_dtype(cast) -> None:  # type: ignore[no-untyped-def]
    module = linear(RAGGED)
    module.untile()
    before = {name: p.clone() for name, p in module.matrix_parameters().items()}
    cast(module)
    assert module.bias is not None
    assert module.bias.dtype == module.compute_dtype == module.weight.dtype != torch.float32
    for name, p in module.matrix_parameters().items():
        assert p.dtype == before[name].dtype
        assert torch.equal(p, before[name])
    assert module(torch.randn(2, 20, dtype=module.compute_dtype)).dtype == module.compute_dtype


def test_moves_reach_every_tensor() -> None:
    module = linear().to("meta")
    assert all(p.is_meta for p in module.parameters())
    assert module.weight.device.type == "meta"


def test_embedding_returns_the_model_dtype() -> None:
    module = filled(LowbitEmbedding(SCHEME, 6, 20, padding_idx=0, dtype=torch.bfloat16))
    assert module(torch.tensor([1, 2])).dtype == torch.bfloat16
    assert module.half()(torch.tensor([1, 2])).dtype == torch.float16


def test_weight_has_everything_but_data() -> None:
    module = linear()
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.shape, weight.dtype, weight.device) == ((6, 20), torch.float32, module.planes.device)
    assert weight._is_hf_initialized
    assert "WeightPlaceholder" in repr(weight)
    assert filled(LowbitConv1D(SCHEME, 6, 20)).weight.shape == (20, 6)
    for read in (lambda: weight + 1, lambda: weight.data, lambda: weight.t(), lambda: weight[0], weight.sum):
        with pytest.raises(UnsupportedOperationError, match="dequantize"):
            read()


def test_reading_the_weight_names_the_module() -> None:
    """As in models whose code multiplies by ``self.head.weight``."""
    module = linear()
    module.path = "mixer.dt_proj"
    expected = r"^mixer\.dt_proj \(LowbitLinear\): aten.*code around the module.*--keep 'mixer\.dt_proj'"
    with pytest.raises(UnsupportedOperationError, match=expected):
        torch.nn.functional.linear(torch.randn(2, 20), module.weight, module.bias)
    for read in (lambda: torch.cat([module.weight]), lambda: torch.zeros(6, 20).copy_(module.weight)):
        with pytest.raises(UnsupportedOperationError, match=expected):
            read()


@pytest.mark.parametrize("value", [torch.zeros(6, 20), nn.Parameter(torch.zeros(6, 20))])
def test_weight_cannot_be_assigned(value: torch.Tensor) -> None:
    with pytest.raises(UnsupportedOperationError, match="LowbitLinear has no weight"):
        linear().weight = value


@pytest.mark.parametrize("kind", [LowbitLinear, LowbitConv1D, LowbitEmbedding])
def test_stands_for_the_float_module(kind: type[LowbitModule]) -> None:
    module = filled(kind(SCHEME, 6, 20, **({} if kind is LowbitEmbedding else {"bias": True})))
    plain = module.float_module(nn.Parameter(module.dequantize()))
    x = torch.tensor([[0, 5, 1]]) if kind is LowbitEmbedding else torch.randn(2, 3, 20)
    torch.testing.assert_close(module(x), plain(x))
    assert plain.weight.shape == module.weight.shape


@pytest.mark.parametrize("scheme", [SCHEME, RAGGED], ids=["plain", "ragged"])
def test_lower_precision(scheme: Scheme) -> None:
    """NST-1, NST-2, BIT-4: the file's whole planes come in, the prefix stays, and the module is one of k bits."""
    matrix = random_matrix(scheme, 6, 20)
    rows = None if matrix.row_bits is None else int(matrix.row_bits.clip(max=2).sum())
    module = filled(LowbitLinear(scheme, 6, 20, bits=2, plane_rows=rows))
    assert module.dequantize().numpy().tobytes() == decode_numpy(matrix, 2).tobytes()
    assert module.scheme.bits == 2
    assert not any("_k" in name for name in module.matrix_parameters())
    assert module.planes.shape[0] == (rows or 2)


def test_finish_loading_refuses_forbidden_values() -> None:
    module = linear()
    module.scales.data[0, 0, 0] = float("nan")
    with pytest.raises(TensorError, match=r"TEN-3"):
        module.finish_loading("m")
    module = linear(RAGGED)
    assert module.row_bits is not None
    module.row_bits.data[0] = 9
    with pytest.raises(TensorError, match=r"m\.row_bits.*MIX-1"):
        module.finish_loading("m")


def test_copies() -> None:
    module, x = linear(), torch.randn(2, 20)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))
        twin.load_state_dict(module.state_dict())


def test_compiles_to_one_graph() -> None:
    module = linear()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (2, 3):
        x = torch.randn(n, 20, requires_grad=True)
        y = compiled(x)
        torch.testing.assert_close(y, module(x))
        y.sum().backward()
        assert x.grad is not None
