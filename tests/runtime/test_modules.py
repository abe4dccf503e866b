"""Modules with a quantized matrix: declared dtypes, the stand-in for ``weight``, copies and compilation."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from functorch.compile import make_boxed_func
from support.modules import filled
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from transformers.pytorch_utils import Conv1D

from lowbit_format.errors import TensorError, UnsupportedOperationError
from lowbit_format.reference import decode_numpy
from lowbit_format.runtime import placeholder
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


def test_weight_has_what_is_asked_of_it() -> None:
    module = linear()
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.shape, weight.dtype, weight.device) == ((6, 20), torch.float32, module.planes.device)
    assert (len(weight), weight.size(1), weight.numel(), weight.requires_grad) == (6, 20, 120, False)
    assert weight._is_hf_initialized
    assert "WeightPlaceholder" in repr(weight)
    assert filled(LowbitConv1D(SCHEME, 6, 20)).weight.shape == (20, 6)
    weight.requires_grad = False  # as PEFT does


def test_is_the_module_that_it_replaces() -> None:
    """Without allocating the weight: 4 GB here, on a device that has no data at all."""
    assert isinstance(LowbitLinear(SCHEME, 32768, 32768, device="meta"), nn.Linear)
    assert isinstance(LowbitEmbedding(SCHEME, 32768, 32768, device="meta"), nn.Embedding)
    assert isinstance(LowbitConv1D(SCHEME, 32768, 32768, device="meta"), Conv1D)
    assert not isinstance(LowbitConv1D(SCHEME, 6, 20), nn.Linear)  # its weight is the other way around
    assert not {"weight", "in_features"} & dict(linear().named_parameters()).keys()


@pytest.mark.parametrize("kind", [LowbitLinear, LowbitConv1D, LowbitEmbedding])
def test_reading_the_weight_decodes_it(kind: type[LowbitModule]) -> None:
    """As in models whose code multiplies by ``self.head.weight``."""
    module = filled(kind(SCHEME, 6, 20))
    want = module.dequantize()
    for read in (
        lambda w: w + 0,
        lambda w: w.data.clone(),
        lambda w: w.t().t(),
        lambda w: torch.stack(list(w)),
        lambda w: torch.zeros(w.shape).copy_(w),
        lambda w: torch.cat([w[:1], w[1:]]),
        lambda w: w.detach().to(torch.float32).contiguous(),
        lambda w: torch.from_numpy(w.detach().cpu().numpy()),
        lambda w: copy.deepcopy(w),
        lambda w: w.view(-1).clone().view(w.shape),
    ):
        assert torch.equal(read(module.weight), want)
        with torch.inference_mode():
            assert torch.equal(read(module.weight), want)
    assert type(module.weight @ torch.ones(want.shape[1])) is torch.Tensor
    with pytest.raises(ValueError, match="read-only"):
        module.weight.data.numpy()[:] = 0


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.data.add_(1),
        lambda w: setattr(w, "data", torch.zeros(6, 20)),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: w[0].zero_(),
        lambda w: w.data.view(-1)[:3].fill_(1),
        lambda w: w.t().mul_(2),
        lambda w: w.detach().sub_(1),
        lambda w: w.to(torch.float32).data.sub_(1),
        lambda w: torch.mul(w, 2, out=w),
        lambda w: nn.init.normal_(w),
        lambda w: nn.Parameter(w),
        lambda w: w.requires_grad_(),
        lambda w: setattr(w, "requires_grad", True),
        lambda w: w.data_ptr(),
        lambda w: torch.from_dlpack(w.data),
    ],
)  # fmt: skip
def test_writing_to_the_weight_is_refused(write: Callable[[torch.Tensor], object]) -> None:
    """A decoded copy would take the values and drop them. Views are refused, too."""
    module = linear()
    module.path = "mixer.dt_proj"
    before = module.dequantize()
    expected = r"^mixer\.dt_proj \(LowbitLinear\): .*model\.dequantize\(\)"
    with pytest.raises(UnsupportedOperationError, match=expected):
        write(module.weight)
    with torch.inference_mode(), pytest.raises(UnsupportedOperationError, match=expected):
        write(module.weight)
    assert torch.equal(module.dequantize(), before)


def test_forward_mode_is_refused() -> None:
    """A kernel that is called directly would drop the tangents: a derivative of 0."""
    module, x = linear(), torch.randn(2, 20)
    with pytest.raises(UnsupportedOperationError, match="forward-mode"):
        torch.func.jvp(module, (x,), (x,))
    with forward_ad.dual_level():
        with pytest.raises(UnsupportedOperationError, match="forward-mode"):
            module(forward_ad.make_dual(x, x))
        module(x)


class AsksAndReads(nn.Module):
    """Asks the weight of one layer for its dtype, and multiplies by that of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.read = filled(LowbitLinear(SCHEME, 6, 20)), filled(LowbitLinear(SCHEME, 6, 20))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        asked: torch.Tensor = self.asked(x.to(self.asked.weight.dtype))
        return asked + x @ self.read.weight.t()


def test_a_compiled_graph_decodes_what_is_read_alone() -> None:
    graphs = list[torch.fx.GraphModule]()

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    module, x = AsksAndReads(), torch.randn(2, 20)
    with torch.no_grad():
        found = torch.compile(module, backend=aot_autograd(fw_compiler=keep), fullgraph=True)(x)
    torch.testing.assert_close(found, module(x))
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert sum("lowbit.dequantize" in target for target in called) == 1


def test_reading_the_weight_is_told_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placeholder._tell_once, "__defaults__", ([],))
    module = linear()
    assert (module.weight.shape, caplog.text) == ((6, 20), "")
    module.weight + module.weight
    module.weight.t()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


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
