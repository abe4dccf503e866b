"""The tiled layout on a GPU: each bit where its definition says, and in place of the file's while a model runs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.gpu_device import DEVICE, FLOATS, on_device
from support.modules import filled
from torch import Tensor, nn

from lowbit_format.kernels import naive, operators
from lowbit_format.kernels.gpu import backend, tiles
from lowbit_format.kernels.gpu.activations import to_slices
from lowbit_format.kernels.matrix import PlaneMatrix
from lowbit_format.runtime.deltas import Delta
from lowbit_format.runtime.modules import LowbitEmbedding, LowbitLinear, LowbitModule
from lowbit_format.schema import Scheme
from lowbit_format.testing.layouts import LayoutConformance
from lowbit_format.testing.matrices import random_matrix
from lowbit_format.testing.products import KINDS, drawn, plane_matrix, random_call

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

ROWS, COLS = 20, 70  # two tiles, the last one short; three blocks, the last one short
SCHEMES = [replace(k, bits=2, group_size=32, scale_dtype="F16") for k in KINDS if not k.row_bits]
CODECS = SCHEMES[1:]  # one scheme of each codec
NAMES_OF = {"ids": lambda s: f"{s.codec}-offset" if s.offset else s.codec}
LOADED = "planes", "scales", "offsets", "zeros", "codebook"


# --- planes ----------------------------------------------------------------------------------------


class TestLayout(LayoutConformance):
    """What every tiled layout must do."""

    backend = backend
    device = DEVICE
    kinds = tuple(k for k in KINDS if not k.row_bits)


@pytest.mark.parametrize(
    ("group_size", "cols", "steps", "macros"),
    [
        (32, 600, 1, 3),
        (96, 600, 1, 3),
        (64, 500, 2, 1),
        (128, 1000, 4, 1),
        (256, 1000, 4, 1),
        (64, 1000, 2, 2),
        (0, 500, 2, 1),
        (0, 70, 1, 1),
        (128, 200, 1, 1),
        (128, 465, 1, 2),  # blocks of 64 would pad a tenth and more
        (128, 466, 2, 1),
        (1024, 1030, 1, 5),
        (2048, 1000, 4, 1),  # one group is as if there were none
    ],
)
def test_lengths_of_blocks(group_size: int, cols: int, steps: int, macros: int) -> None:
    """The longest that divide a group and pad few columns."""
    w = drawn(KINDS[0], 2, group_size, 17, cols)
    packed = tiles.tile(w)
    assert (tiles.steps(w), tiles.steps(packed)) == (steps, steps)
    assert packed.planes.shape == (2, macros, 2 * steps, 512)
    assert tiles.blocks_of_group(w, steps) == (0 if group_size in (0, 2048) else group_size // (32 * steps))


@pytest.mark.parametrize(
    ("rows", "cols", "group_size", "bits"), [(17, 70, 32, 3), (5, 300, 96, 2), (20, 250, 64, 1), (16, 480, 128, 2)]
)
def test_where_each_bit_lies(rows: int, cols: int, group_size: int, bits: int) -> None:
    """As the definition in tiles.py says; and what only pads is zero."""
    w = drawn(KINDS[0], bits, group_size, rows, cols)
    steps = tiles.steps(w)
    block = 32 * steps
    planes, packed = w.planes.tolist(), tiles.tile(w).planes
    ones = 0
    for t, m, piece, at in torch.cartesian_prod(*(torch.arange(n) for n in packed.shape)).tolist():
        value = int(packed[t, m, piece, at])
        p, k = divmod(piece, steps)
        row = 16 * t + at // 64 + 8 * (at // 4 % 2)  # at is (row % 8, byte // 4 % 4, byte // 16, row // 8, byte % 4)
        byte = 4 * (at // 16 % 4) + 16 * (at // 8 % 2) + at % 4
        for s in range(8):
            column = 8 * block * m + block * s + 32 * k + byte
            inside = row < rows and column < cols
            bit = planes[p][row][column // 8] >> (column % 8) & 1 if inside else 0
            assert value >> s & 1 == bit
            ones += bit
    assert ones == sum(bin(byte).count("1") for byte in w.planes.flatten().tolist())


@pytest.mark.parametrize("at_once", [1, 1 << 13])
def test_large_matrices_in_parts(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for group_size, rows, cols in ((32, 70, 300), (128, 100, 480)):
        w = on_device(drawn(KINDS[1], 3, group_size, rows, cols))
        want = tiles.tile(w).planes
        monkeypatch.setattr(tiles, "_AT_ONCE", at_once)
        assert len(tiles._parts(tuple(want.shape))) > 2
        packed = tiles.tile(w)
        assert torch.equal(packed.planes, want)
        assert torch.equal(tiles.untile(packed).planes, w.planes)
        monkeypatch.undo()


def without_tiles() -> dict[str, PlaneMatrix]:
    more = drawn(Scheme("bcq", offset=True), 4, 32, 20, 70)
    double = drawn(KINDS[1], 3, 32, 20, 70)
    assert double.offsets is not None
    return {
        **{f"groups of {size}": drawn(KINDS[1], 3, size, 20, 120) for size in (5, 24, 48, 100)},
        "ragged rows": drawn(Scheme("uniform", row_bits=True), 3, 32, 20, 70),
        "float64": double._replace(scales=double.scales.double(), offsets=double.offsets.double()),
        "more planes than bits": more._replace(bits=3, scales=more.scales[:3]),
    }


@pytest.mark.parametrize("which", without_tiles())
def test_what_has_no_tiled_layout(which: str) -> None:
    """Its products are computed all the same."""
    w = without_tiles()[which]
    assert not backend.can_tile(w)
    there = on_device(w)
    call = random_call(w, 3, tasks="mul")
    rounding = {"rtol": 1e-5, "atol": 1e-5}
    x, ids, grad = call.x, torch.tensor([0, 19, 19]), torch.randn(3, 20)
    for name, args, same in (
        ("dequantize", (w, call.deltas, torch.float32), True),
        ("embedding", (ids, w, call.deltas, call.task_ids, torch.float32), True),
        ("linear", (x, w, *call[2:]), False),
        ("linear_input_grad", (grad, w, *call[3:]), False),
    ):
        found, want = getattr(backend, name)(*on_device(args)), getattr(naive, name)(*args)
        torch.testing.assert_close(found.cpu(), want, **({"rtol": 0, "atol": 0} if same else rounding), msg=name)
    for name, args in (
        ("linear_param_grads", (grad, x, there, *call[3:])),
        ("embedding_param_grads", (x, ids, there, *call[3:])),
        ("dequantize_param_grads", (torch.randn(20, w.cols), there, call.deltas)),
    ):
        for found, want in zip(
            getattr(backend, name)(*on_device(args)), getattr(naive, name)(*on_device(args)), strict=True
        ):
            assert (found is None) == (want is None)
            if want is not None:
                torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4, msg=name)


# --- modules ---------------------------------------------------------------------------------------


@pytest.fixture
def gpu_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules and operators compute with the kernels of a GPU, wherever they are."""
    monkeypatch.setattr(operators, "BACKENDS", {DEVICE: "gpu.backend"})


def module_of(scheme: Scheme, kind: type[LowbitModule] = LowbitLinear) -> LowbitModule:
    """A module as it is loaded, with the matrix that :func:`of_file` has."""
    torch.manual_seed(0)  # of the bias
    module = filled(kind(scheme, ROWS, COLS, **({} if kind is LowbitEmbedding else {"bias": True})))
    return module.to(DEVICE)


def of_file(scheme: Scheme) -> PlaneMatrix:
    return plane_matrix(random_matrix(scheme, ROWS, COLS))


def some_input(module: LowbitModule) -> Tensor:
    ids, x = torch.tensor([[0, 19, 5]]), torch.randn(2, 1, COLS, generator=torch.Generator().manual_seed(1))
    return (ids if module.kind == "embedding" else x).to(DEVICE)


def is_tiled(module: LowbitModule) -> bool:
    return module.is_tiled


def assert_same_tensors(found: dict[str, Any], scheme: Scheme) -> None:
    file = {role: t for role in LOADED if (t := getattr(of_file(scheme), role)) is not None}
    found = {role: t for role, t in found.items() if role != "bias"}
    assert found.keys() == file.keys()
    for role, t in file.items():
        assert found[role].dtype == t.dtype, role
        assert torch.equal(found[role].cpu(), t), role


ACCESSES: dict[str, Callable[[LowbitModule], dict[str, Any]]] = {  # to the tensors of a module
    "state_dict": lambda m: m.state_dict(),
    "planes": lambda m: {"planes": m.planes, **m.matrix_parameters()},
    "to": lambda m: m.to(torch.float64).to(torch.float32).state_dict(),
    "half": lambda m: m.half().float().state_dict(),
    "to another device": lambda m: m.cpu().to(DEVICE).state_dict(),
    "deepcopy": lambda m: copy.deepcopy(m).state_dict(),
    "pickle": lambda m: pickle.loads(pickle.dumps(m)).state_dict(),
    "untile": lambda m: m.untile() or m.matrix_parameters(),
}


@pytest.mark.usefixtures("gpu_backend")
@pytest.mark.parametrize("scheme", CODECS, **NAMES_OF)
@pytest.mark.parametrize("kind", [LowbitLinear, LowbitEmbedding])
def test_the_files_bytes_come_back(scheme: Scheme, kind: type[LowbitModule]) -> None:
    """By every access to a module's tensors; the module computes the same afterwards."""
    module = module_of(scheme, kind)
    x = some_input(module)
    with torch.no_grad():
        if module.bias is not None:
            module.bias.copy_(module.bias.half())  # a cast and back changes nothing
        want = module(x)
        for name, access in ACCESSES.items():
            module.tile()
            assert is_tiled(module)
            assert_same_tensors(access(module), scheme)
            if name not in ("deepcopy", "pickle", "to another device"):
                assert not is_tiled(module), name
        assert torch.equal(module(x), want)
        assert is_tiled(module)


@pytest.mark.usefixtures("gpu_backend")
@pytest.mark.parametrize("scheme", SCHEMES, **NAMES_OF)
def test_forward_of_modules(scheme: Scheme) -> None:
    """As the naive backend computes it, with and without a task."""
    w = of_file(scheme)
    for kind in (LowbitLinear, LowbitEmbedding):
        module = module_of(scheme, kind)
        x = some_input(module)
        delta = Delta(scales=torch.randn(1, ROWS, device=DEVICE) * 0.1)
        module.deltas["task"] = delta
        for task, deltas in ((None, None), ("task", delta.scales[None].cpu())):  # type: ignore[index]
            module.set_task(task)
            with torch.no_grad():
                found = module(x).cpu()
            if kind is LowbitEmbedding:
                assert torch.equal(found, naive.embedding(x.cpu(), w, deltas, None, torch.float32))
            else:
                assert module.bias is not None
                want = naive.linear(x.cpu(), w, module.bias.detach().cpu(), deltas, None)
                torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("gpu_backend")
@pytest.mark.parametrize("dtype", [d for d in FLOATS if d != torch.float32], ids=str)
def test_casts_between_forwards(dtype: torch.dtype) -> None:
    """The compute dtype changes, the declared dtypes do not."""
    module = module_of(SCHEMES[1])
    x = some_input(module)
    with torch.no_grad():
        want = module(x)
        found = module.to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), want, rtol=0.02, atol=0.02)
    assert is_tiled(module)
    assert module.scales.dtype == torch.float16


@pytest.mark.usefixtures("gpu_backend")
def test_copies_are_independent() -> None:
    module = module_of(SCHEMES[1])
    x = some_input(module)
    with torch.no_grad():
        want = module(x)
        twin = copy.deepcopy(module)
        assert torch.equal(twin(x), want)
        for p in twin.matrix_parameters().values():
            p.zero_()
        assert torch.equal(module(x), want)
    assert_same_tensors(module.state_dict(), SCHEMES[1])


@pytest.mark.usefixtures("gpu_backend")
def test_a_tied_head_stays_tied() -> None:
    """TIE-1: one matrix, whichever of the two packs it or gives its bytes."""
    embedding, head = module_of(SCHEMES[1], LowbitEmbedding), module_of(SCHEMES[1])
    head.tie_to(embedding)
    with torch.no_grad():
        rows = embedding(some_input(embedding))
        assert is_tiled(head)
        y = head(some_input(head))
        head.untile()
        assert not is_tiled(embedding)
        assert torch.equal(embedding(some_input(embedding)), rows)
        assert torch.equal(head(some_input(head)), y)


# --- gradients and graphs --------------------------------------------------------------------------


def leaves_of(w: PlaneMatrix, call: Any) -> tuple[PlaneMatrix, dict[str, Tensor]]:
    """`w` and what gradients flow to, by name."""
    names = [n for n in ("scales", "offsets", "zeros") if getattr(w, n) is not None]
    leaves = {n: getattr(w, n).detach().float().requires_grad_() for n in names}
    w = w._replace(**leaves)
    for name in ("x", "bias", "deltas"):
        value = getattr(call, name)
        if value is not None:
            leaves[name] = value.detach().clone().requires_grad_()
    return w, leaves


@pytest.mark.usefixtures("gpu_backend")
@pytest.mark.parametrize("scheme", SCHEMES, **NAMES_OF)
@pytest.mark.parametrize("tasks", [None, "mul", "add"])
def test_autograd(scheme: Scheme, tasks: str | None) -> None:
    """Through the operators, over the tiled layout: as torch differentiates the product with a decoded weight."""
    w = of_file(scheme)
    call = random_call(w, 3, tasks=tasks)
    rows = torch.tensor([0, 19, 19])
    seeds = torch.randn(3, ROWS), torch.randn(3, COLS), torch.randn(ROWS, COLS)
    grads = []
    for module in (backend, naive):
        form, leaves = leaves_of(backend.tile(on_device(w)) if module is backend else w, on_device(call))
        x, bias, deltas = leaves["x"], leaves["bias"], leaves.get("deltas")
        there = on_device if module is backend else (lambda t: t)
        if module is backend:
            ids = there(call.task_ids)
            results = (
                operators.linear(x, form, bias, deltas, ids),
                operators.embedding(there(rows), form, deltas, ids),
                operators.dequantize(form, deltas),
            )
        else:
            x, bias = x.cpu(), bias.cpu()
            leaves = {n: t.detach().cpu().double().requires_grad_() for n, t in leaves.items()}
            form = w._replace(**{n: t for n, t in leaves.items() if n in ("scales", "offsets", "zeros")})
            deltas = leaves.get("deltas")
            weights = [differentiable(form, None if deltas is None else deltas[i]) for i in range(3)]
            base = differentiable(form, None)
            ids = torch.zeros(3, dtype=torch.int64) if call.task_ids is None else call.task_ids
            each = [base if deltas is None or i < 0 else weights[i] for i in ids.tolist()]
            results = (
                torch.stack([m @ row for m, row in zip(each, leaves["x"], strict=True)]) + leaves["bias"],
                torch.stack([m[r] for m, r in zip(each, rows.tolist(), strict=True)]),
                base if deltas is None else weights[0],
            )
        sum((r * there(s).to(r.dtype)).sum() for r, s in zip(results, seeds, strict=True)).backward()
        grads.append({n: t.grad for n, t in leaves.items()})
    for name, want in grads[1].items():
        found = grads[0][name]
        assert found is not None
        assert want is not None
        assert want.any()
        torch.testing.assert_close(found.cpu().double(), want, rtol=1e-4, atol=1e-5 * float(want.abs().max()), msg=name)


def differentiable(w: PlaneMatrix, delta: Tensor | None) -> Tensor:
    """The weight, which torch can differentiate by parameters and a delta."""
    size = w.group_size
    bits = ((w.planes[..., None] >> torch.arange(8)) & 1).flatten(-2)[..., : w.cols].double()
    group = torch.arange(w.cols) // size
    scales = w.scales
    if delta is not None:
        first = scales[: len(delta)]
        scales = torch.cat(
            [first * (1 + delta[..., None]) if delta.dim() == 2 else first + delta, scales[len(delta) :]]
        )
    if w.codec == "bcq":
        out = ((2 * bits - 1) * scales[..., group]).sum(0)
        return out if w.offsets is None else out + w.offsets[:, group]
    code = sum(bits[p] * 2 ** (w.bits - 1 - p) for p in range(w.bits))
    level = code if w.codebook is None else w.codebook.double()[code.long()]
    out = (level if w.zeros is None else level - w.zeros[:, group]) * scales[0][:, group]
    return out if w.offsets is None else out + w.offsets[:, group]


@pytest.mark.usefixtures("gpu_backend")
def test_training_a_module() -> None:
    """Scales and x get gradients from the tiled layout, and a state_dict in between changes nothing."""
    found = []
    for look in (False, True):
        module = module_of(SCHEMES[1])
        module.scales.requires_grad_()
        x = some_input(module).requires_grad_()
        y = module(x)
        assert is_tiled(module)
        if look:
            assert_same_tensors(module.state_dict(), SCHEMES[1])
        y.square().sum().backward()
        assert module.scales.grad is not None
        assert x.grad is not None
        found.append((module.scales.grad.cpu(), x.grad.cpu()))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.usefixtures("gpu_backend")
def test_compiled_modules() -> None:
    """In one graph, with gradients."""
    embedding, head = module_of(SCHEMES[1], LowbitEmbedding), module_of(SCHEMES[2])
    model = nn.Sequential(embedding, head)
    ids = torch.tensor([[0, 19, 5]], device=DEVICE)
    head.scales.requires_grad_()
    want = model(ids)
    want.sum().backward()
    grad, head.scales.grad = head.scales.grad, None
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(ids)
    torch.testing.assert_close(found, want)
    found.sum().backward()
    torch.testing.assert_close(head.scales.grad, grad)


@pytest.mark.usefixtures("gpu_backend")
@pytest.mark.parametrize(("name", "scheme"), list(zip(("linear", "embedding", "dequantize"), CODECS, strict=False)))
def test_opcheck(name: str, scheme: Scheme) -> None:
    w = backend.tile(on_device(plane_matrix(random_matrix(replace(scheme, bits=1, scale_dtype="F32"), 4, 40))))
    w = w._replace(scales=w.scales.requires_grad_())
    deltas = torch.randn(2, 1, 4, device=DEVICE, requires_grad=True)
    task_ids = torch.tensor([0, 1, -1], device=DEVICE)
    x, ids = torch.randn(1, 3, 40, device=DEVICE, requires_grad=True), torch.tensor([[0, 1, 3]], device=DEVICE)
    arguments = {
        "linear": (x, *w[:6], torch.randn(4, device=DEVICE), deltas, task_ids, *w[6:]),
        "embedding": (ids, *w[:6], deltas, task_ids, torch.float16, *w[6:]),
        "dequantize": (*w[:6], deltas, torch.float16, *w[6:]),
    }
    torch.library.opcheck(getattr(torch.ops.lowbit, name), arguments[name])


# --- lanes -----------------------------------------------------------------------------------------
# Operands of mma.m16n8k32 for int8, as the PTX ISA has them ("Matrix Fragments for mma.m16n8k32"): lane 4 * g + t has
# in its register i of the left one row g (i even) or g + 8, columns 4 * t to 4 * t + 3 (i < 2) or those 16 further on;
# of the right one, rows 4 * t to 4 * t + 3 (i = 0) or those 16 further on, of column g.


def left_operand(lanes: Tensor) -> Tensor:
    """``[16, 32]`` of the 16 bytes of each lane, ``[32, 16]``."""
    out = torch.empty(16, 32, dtype=lanes.dtype)
    for lane, (g, t) in enumerate((g, t) for g in range(8) for t in range(4)):
        for i, word in enumerate(lanes[lane].view(4, 4)):
            column = 4 * t + 16 * (i // 2)
            out[g + 8 * (i % 2), column : column + 4] = word
    return out


def right_operand(lanes: Tensor) -> Tensor:
    """``[32, 8]`` of the 8 bytes of each lane, ``[32, 8]``."""
    out = torch.empty(32, 8, dtype=lanes.dtype)
    for lane, (g, t) in enumerate((g, t) for g in range(8) for t in range(4)):
        for i, word in enumerate(lanes[lane].view(2, 4)):
            out[4 * t + 16 * i : 4 * t + 16 * i + 4, g] = word
    return out


@pytest.mark.parametrize("rows", [3, 7], ids=["8 columns", "16 columns"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_lanes_hold_operands_of_the_matrix_instruction(rows: int, group_size: int) -> None:
    """The instruction, done by hand with what lanes find in memory, gives the signed sums of x over a block."""
    w = drawn(KINDS[0], 2, group_size, 20, 1990)
    x = torch.randn(rows, w.cols, generator=torch.Generator().manual_seed(0)).half()
    form, steps, chunk = backend.tile(w).planes, group_size // 32, 4 if rows <= 4 else 8
    operand = to_slices(x.to(DEVICE), steps, chunk)
    slices, units = operand.slices.cpu(), operand.units.cpu()
    signs = torch.nn.functional.pad(
        bits_of(w.planes) * 2 - 1, (0, 8 * 32 * steps * form.shape[1] - w.planes.shape[2] * 8)
    )
    wide = torch.nn.functional.pad(x, (0, signs.shape[2] - w.cols)).double()
    for t, m, p, s in ((0, 0, 0, 0), (1, 0, 1, 3), (0, form.shape[1] - 1, 1, 1), (1, 0, 0, 7)):
        sums = torch.zeros(16, 2 * chunk, dtype=torch.int64)
        for k in range(steps):
            piece = form[t, m, p * steps + k].view(32, 16).cpu()
            left = left_operand((piece & (1 << s)).view(torch.int8))
            lanes = slices[0, m, s].view(steps, 32, chunk // 4, 8)[k]
            right = torch.cat([right_operand(lanes[:, i]) for i in range(chunk // 4)], 1)
            sums += left.long() @ right.long()
        whole = (sums[:, 0::2] + 128 * sums[:, 1::2]).double()
        unit, total = units[m, s, :, 0].double(), units[m, s, :, 1].double()
        found = (whole * unit - total)[:, :rows]
        block = slice((8 * m + s) * 32 * steps, (8 * m + s + 1) * 32 * steps)
        of_tile = torch.zeros(16, 32 * steps, dtype=torch.float64)
        there = signs[p, 16 * t : 16 * t + 16, block].double()
        of_tile[: len(there)] = there
        want = of_tile @ wide[:, block].T
        rounding = 32 * steps * wide[:, block].abs().amax(1) / 16319
        assert ((found - want).abs()[: len(there)] <= rounding + 1e-6).all()
        assert want.abs().max() > 100 * rounding.max()


def bits_of(planes: Tensor) -> Tensor:
    """Bits of plain planes, ``[bits, rows, 8 * bytes]`` (BIT-2)."""
    return ((planes[..., None] >> torch.arange(8)) & 1).flatten(-2).to(torch.int8)
