"""The operators: bit-equal to the reference (DEC-1 to DEC-5), right gradients, and correct registration with torch."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import partial

import pytest
import torch
from support.interpreter import quicken

from lowbit_format.kernels import naive, operators
from lowbit_format.kernels.matrix import with_delta
from lowbit_format.reference import decode_numpy
from lowbit_format.schema import Scheme
from lowbit_format.testing import products as truth
from lowbit_format.testing.matrices import random_matrix
from lowbit_format.testing.products import KINDS, NAMES, plane_matrix

if not torch.cuda.is_available():
    quicken()

float32_matrix = partial(plane_matrix, dtype=torch.float32)  # parameters in float32, whatever the scheme says
SHAPES = [(1, 1, 0), (3, 5, 0), (4, 130, 64), (7, 70, 16), (5, 64, 7)]  # rows, cols, group size


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_decodes_as_the_reference(kind: Scheme, bits: int) -> None:
    for rows, cols, group_size in SHAPES:
        nested = (bits - 1,) if bits > 1 and kind.codec != "codebook" else ()
        matrix = random_matrix(replace(kind, bits=bits, group_size=group_size, nested=nested), rows, cols)
        for k in (None, *nested):
            want = decode_numpy(matrix, k)
            w = float32_matrix(matrix, k)
            assert operators.dequantize(w).numpy().tobytes() == want.tobytes()
            ids = torch.tensor([[rows - 1, 0], [0, rows - 1]])
            assert operators.embedding(ids, w).numpy().tobytes() == want[ids.numpy()].tobytes()
            half = operators.dequantize(w, dtype=torch.bfloat16)  # DEC-5
            assert torch.equal(half, torch.from_numpy(want).to(torch.bfloat16))


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@pytest.mark.parametrize("module", sorted({*operators.BACKENDS.values(), "naive"}))
def test_every_module_of_kernels_agrees_with_the_naive_one(kind: Scheme, module: str) -> None:
    """Weights bit for bit; products to rounding: ``torch.mm`` may depend on where its operands lie."""
    kernels = importlib.import_module(f"lowbit_format.kernels.{module}")
    for rows, cols, group_size in SHAPES:
        w = float32_matrix(random_matrix(replace(kind, bits=3, group_size=group_size), rows, cols))
        x, grad = torch.randn(4, cols), torch.randn(4, rows)
        deltas, tasks, ids = torch.randn(2, 1, rows), torch.tensor([1, -1, 0, 1]), torch.randint(0, rows, (4,))
        for name, args in {
            "dequantize": (w, None, torch.float16),
            "linear": (x, w, torch.randn(rows), deltas, tasks),
            "linear_input_grad": (grad, w, deltas, tasks),
            "embedding": (ids, w, deltas, tasks, torch.float32),
        }.items():
            found, want = getattr(kernels, name)(*args), getattr(naive, name)(*args)
            exact = name in ("dequantize", "embedding")
            torch.testing.assert_close(found, want, **({"rtol": 0, "atol": 0} if exact else {}), msg=name)


def test_padding_bits_do_not_matter() -> None:
    matrix = random_matrix(Scheme("bcq", 3, 4), 3, 11)
    w = float32_matrix(matrix)
    dirty = w.planes.clone()
    dirty[..., 1] |= 0b11111000
    dirty[..., 2:] = 255
    assert torch.equal(operators.dequantize(w), operators.dequantize(w._replace(planes=dirty)))


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@pytest.mark.parametrize("tasks", [None, "mul", "add"])
def test_gradients(kind: Scheme, tasks: str | None) -> None:
    matrix = random_matrix(replace(kind, bits=3, group_size=3), 4, 7)
    w = float32_matrix(matrix, dtype=torch.float64)
    p, rows, groups = w.scales.shape
    shape = {"mul": (2, min(p, 2), rows), "add": (2, p, rows, groups)}
    deltas = torch.randn(shape[tasks], dtype=torch.float64).mul(0.1).requires_grad_() if tasks else None
    task_ids = torch.tensor([0, 1, -1, 1, 0, 0]) if tasks else None
    names = [n for n in ("scales", "offsets", "zeros") if getattr(w, n) is not None]
    w = w._replace(**{n: getattr(w, n).requires_grad_() for n in names})
    x, bias = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True), torch.randn(4, dtype=torch.float64)
    ids = torch.tensor([[0, 3, 3], [1, 2, 0]])
    given = tuple(t for t in (w.scales, w.offsets, w.zeros, deltas) if t is not None)  # gradcheck changes them in place
    check = torch.autograd.gradcheck
    assert check(lambda *_: operators.linear(x, w, bias, deltas, task_ids), (x, bias.requires_grad_(), *given))
    assert check(lambda *_: operators.embedding(ids, w, deltas, task_ids, dtype=torch.float64), given)
    assert check(lambda *_: operators.dequantize(w, deltas, dtype=torch.float64), given)


@pytest.mark.parametrize("kind", [k for k in KINDS if not k.row_bits], ids=str)
def test_gradients_are_those_of_a_plain_decode(kind: Scheme) -> None:
    matrix = random_matrix(replace(kind, bits=4, group_size=16), 6, 40)
    names = [n for n in ("scales", "offsets", "zeros") if getattr(float32_matrix(matrix), n) is not None]
    x = torch.randn(3, 40)
    grads = []
    for decode in (lambda w: operators.linear(x, w), lambda w: x @ truth.decode(w).T):
        w = float32_matrix(matrix)
        w = w._replace(**{n: getattr(w, n).requires_grad_() for n in names})
        decode(w).square().sum().backward()
        grads.append([getattr(w, n).grad for n in names])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [k for k in KINDS if not k.row_bits], ids=str)
@pytest.mark.parametrize("module", sorted({*operators.BACKENDS.values(), "naive"}))
def test_gradients_of_parameters_are_contiguous(kind: Scheme, module: str) -> None:
    """As the operators' fakes say, though tiled parameters have other strides: compiled graphs rely on it."""
    kernels = importlib.import_module(f"lowbit_format.kernels.{module}")
    w = float32_matrix(random_matrix(replace(kind, bits=3, group_size=32), 32, 64))
    w = kernels.tile(w)
    assert module == "naive" or not w.scales.is_contiguous()
    grad, x, deltas, ids = torch.randn(4, 32), torch.randn(4, 64), torch.randn(2, 1, 32), torch.randint(0, 32, (4,))
    for grads in (
        kernels.linear_param_grads(grad, x, w, deltas, torch.tensor([1, 0, -1, 1])),
        kernels.embedding_param_grads(x, ids, w, None, None),
        kernels.dequantize_param_grads(torch.randn(32, 64), w, None),
    ):
        assert all(g is None or g.is_contiguous() for g in grads)


def test_tensors_without_data() -> None:
    w = float32_matrix(random_matrix(Scheme("bcq", 2, 32), 4, 64))
    w = w._replace(**{name: t.to("meta") for name, t in w._asdict().items() if isinstance(t, torch.Tensor)})
    assert operators.linear(torch.empty(3, 64, device="meta"), w).shape == (3, 4)


@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 64)])
def test_results_may_be_changed_in_place(shape: tuple[int, ...]) -> None:
    """Models add to what a layer gives; autograd refuses that for a view that a custom operator returns."""
    w = float32_matrix(random_matrix(Scheme("bcq", 2, 32), 64, 64))
    x = torch.randn(shape, requires_grad=True)
    deltas = torch.zeros(1, 1, 64, requires_grad=True)
    operators.linear(x, w, None, deltas).add_(1).sum().backward()
    operators.embedding(torch.zeros(shape[:-1], dtype=torch.int64), w, deltas).add_(1).sum().backward()
    assert x.grad is not None
    assert bool(deltas.grad.any())  # type: ignore[union-attr]


def test_planes_and_codebook_get_no_gradient() -> None:
    w = float32_matrix(random_matrix(Scheme("codebook", 2, 0), 3, 8))
    w = w._replace(scales=w.scales.requires_grad_(), codebook=w.codebook.requires_grad_())  # type: ignore[union-attr]
    operators.linear(torch.randn(2, 8), w).sum().backward()
    assert w.planes.grad is None
    assert w.codebook is not None
    assert w.codebook.grad is None
    assert w.scales.grad is not None


def test_frozen_scales_keep_no_activations() -> None:
    w = float32_matrix(random_matrix(Scheme("bcq", 2, 0), 3, 8))
    x = torch.randn(2, 8, requires_grad=True)
    y = operators.linear(x, w)
    assert not any(t is not None and t.shape == x.shape and t.dtype == x.dtype for t in y.grad_fn.saved_tensors)


def test_tasks() -> None:
    """TSK-8: factors 1 + delta on the first planes; -1 is the base (MAT-5); no ids: task 0."""
    w = float32_matrix(random_matrix(Scheme("bcq", 3, 8), 4, 20))
    x = torch.randn(5, 20)
    deltas = torch.randn(2, 1, 4) * 0.1
    tuned = [torch.cat([w.scales[:1] * (1 + d)[..., None], w.scales[1:]]) for d in deltas]
    want = [x @ operators.dequantize(w._replace(scales=s)).T for s in tuned]
    got = operators.linear(x, w, None, deltas, torch.tensor([1, 0, -1, 1, -1]))
    base = operators.linear(x, w)
    for row, expected in enumerate([want[1], want[0], base, want[1], base]):
        torch.testing.assert_close(got[row], expected[row])
    torch.testing.assert_close(operators.linear(x, w, None, deltas), want[0])
    ids = torch.tensor([0, 0, 3])
    rows = operators.embedding(ids, w, deltas, torch.tensor([1, -1, 0]))
    assert torch.equal(rows[0], operators.dequantize(w._replace(scales=tuned[1]))[0])
    assert torch.equal(rows[1], operators.dequantize(w)[0])
    assert torch.equal(rows[2], operators.dequantize(w, deltas)[3])


def test_worked_example_of_the_bundle_spec() -> None:
    scales = torch.tensor([[[1.0], [2.0]], [[0.5], [0.25]]])
    w = float32_matrix(random_matrix(Scheme("bcq", 2, 0), 2, 3))._replace(scales=scales)
    assert with_delta(w, torch.tensor([[0.125, -0.25]])).scales[0].flatten().tolist() == [1.125, 1.5]


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_opcheck(kind: Scheme) -> None:
    w = float32_matrix(random_matrix(replace(kind, bits=2, group_size=8), 4, 20))
    w = w._replace(scales=w.scales.requires_grad_())
    deltas, task_ids = torch.randn(2, 1, 4, requires_grad=True), torch.tensor([0, 1, -1, 1, 0, 0])
    x, ids = torch.randn(2, 3, 20, requires_grad=True), torch.tensor([[0, 1, 3], [3, 2, 2]])
    lowbit, check = torch.ops.lowbit, torch.library.opcheck
    check(lowbit.linear, (x, *w[:6], torch.randn(4), deltas, task_ids, *w[6:]))
    check(lowbit.linear, (x, *w[:6], None, None, None, *w[6:]))
    check(lowbit.embedding, (ids, *w[:6], deltas, task_ids, torch.float16, *w[6:]))
    check(lowbit.dequantize, (*w[:6], deltas, torch.bfloat16, *w[6:]))


def test_shapes_and_layouts() -> None:
    w = float32_matrix(random_matrix(Scheme("uniform", 4, 8), 6, 20))
    weight = operators.dequantize(w)
    assert operators.linear(torch.empty(0, 3, 20), w).shape == (0, 3, 6)
    assert operators.embedding(torch.empty(2, 0, dtype=torch.int32), w).shape == (2, 0, 20)
    x = torch.randn(20, 5).t()
    torch.testing.assert_close(operators.linear(x, w), x @ weight.T)
    torch.testing.assert_close(operators.linear(x[0], w), weight @ x[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_result_has_the_dtype_of_x(dtype: torch.dtype) -> None:
    w = float32_matrix(random_matrix(Scheme("bcq", 3, 8), 4, 20))
    x = torch.randn(2, 20, dtype=dtype)
    want = torch.nn.functional.linear(x, operators.dequantize(w, dtype=dtype))
    assert torch.equal(operators.linear(x, w), want)


def test_autocast() -> None:
    w = float32_matrix(random_matrix(Scheme("bcq", 3, 8), 4, 20))
    w = w._replace(scales=w.scales.requires_grad_())
    x = torch.randn(2, 20, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = operators.linear(x, w, torch.zeros(4))
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype == w.scales.grad.dtype == torch.float32  # type: ignore[union-attr]
