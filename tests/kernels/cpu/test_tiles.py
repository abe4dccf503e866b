"""The tiled layout of the CPU kernels: exact, in place of the file's layout while a model runs, undone on request."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.concurrency import at_once
from support.modules import filled
from torch import Tensor, nn

from lowbit_format.kernels import matrix, naive, operators
from lowbit_format.kernels.cpu import backend, tiles
from lowbit_format.kernels.matrix import PlaneMatrix, with_delta
from lowbit_format.kernels.parameter_order import group_major
from lowbit_format.runtime.deltas import Delta, TunedDelta
from lowbit_format.runtime.modules import LowbitConv1D, LowbitEmbedding, LowbitLinear, LowbitModule
from lowbit_format.schema import SCALE_DTYPES, Scheme
from lowbit_format.testing.layouts import LayoutConformance
from lowbit_format.testing.matrices import random_matrix
from lowbit_format.testing.products import KINDS, NAMES, drawn, plane_matrix, random_call, same_bits

ROWS, COLS = 37, 100  # three tiles, the last one short; four words, the last one short
SCHEMES = [replace(kind, bits=3, group_size=32, scale_dtype="F16") for kind in KINDS]
LOADED = "planes", "scales", "offsets", "zeros", "codebook", "row_bits"


# --- planes ----------------------------------------------------------------------------------------


class TestLayout(LayoutConformance):
    """What every tiled layout must do."""

    backend = backend
    group_sizes = (*LayoutConformance.group_sizes, 16)


@given(TestLayout().matrices(), st.data())
def test_some_rows_of_tiles(w: PlaneMatrix, data: st.DataObject) -> None:
    """Any rows in any order."""
    assert tiles.can_tile(w)
    tiled = tiles.tile(w)
    assert tiled.is_tiled
    assert not w.is_tiled
    assert torch.equal(tiles.untile(tiled).planes, w.planes)
    count = w.scales.shape[1]
    rows = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), max_size=40)), dtype=torch.int64)
    some = tiles.untile(tiled, rows)
    picked = matrix.select_rows(w, rows)  # has all planes: those that a row lacks are to be left out
    present = matrix.present_rows(picked)
    assert torch.equal(some.planes, picked.planes if present is None else picked.planes[present])
    for name in ("scales", "offsets", "zeros", "row_bits"):
        values, of = getattr(some, name), getattr(w, name)
        assert (values is None) == (of is None)
        if of is not None:
            assert torch.equal(values, of[:, rows] if name == "scales" else of[rows])
    if len(rows):  # picked rows are a matrix of their own
        again = tiles.untile(tiles.tile(some), torch.arange(len(rows)))
        assert torch.equal(again.planes, some.planes)


def test_where_each_word_lies() -> None:
    """As the formula of tiles.py says, word by word."""
    for rows, cols, group, bits in ((20, 100, 32, 3), (16, 130, 96, 2), (5, 70, 0, 1), (18, 100, 16, 2)):
        w = drawn(KINDS[0], bits, group, rows, cols)
        words, whole = tiles.words(w), tiles.group_words(w)
        tiled = tiles.tile(w).planes
        assert tiled.shape == (-(-rows // 16), words * bits, 16, 4)
        source = w.planes.reshape(bits, rows, words, 4)
        for r, p, word in np.ndindex(rows, bits, words):
            g, j = divmod(word, whole)
            here = min(whole, words - g * whole)
            assert torch.equal(tiled[r // 16, g * whole * bits + p * here + j, r % 16], source[p, r, word])
        assert not tiled[-1, :, (rows - 1) % 16 + 1 :].any()  # rows that only pad


def test_ragged_rows_are_tiled_by_their_bits() -> None:
    """Those of equal bits side by side, most bits first: there are no planes that count for nothing."""
    w = drawn(Scheme("bcq", row_bits=True), 8, 0, 40, 64)
    row_bits = torch.tensor([1] * 15 + [5] + [2] * 16 + [3, 1] * 4, dtype=torch.uint8)
    w = w._replace(row_bits=row_bits, planes=torch.randint(0, 256, (int(row_bits.sum()), 8), dtype=torch.uint8))
    tiled = tiles.tile(w)
    assert tiled.planes.shape == ((5 + 3 + 2 + 2 * 1) * 2 * 64,)  # tiles of 5, 3, 2 bits, two of 1; of two vectors each
    assert torch.equal(tiles.untile(tiled).planes, w.planes)
    assert [(part.bits, part.rows.tolist()) for part in tiles.parts(tiled)] == [
        (bits, (row_bits == bits).nonzero().flatten().tolist()) for bits in (5, 3, 2, 1)
    ]
    for part in tiles.parts(tiled):
        own = matrix.select_rows(w, part.rows)
        assert torch.equal(
            part.planes, tiles.tile(own._replace(planes=own.planes[: part.bits], row_bits=None, bits=part.bits)).planes
        )


@pytest.mark.parametrize(
    ("group_size", "cols", "groups"), [(16, 17, 2), (16, 16, 1), (16, 8, 1), (32, 64, 1), (0, 64, 1)]
)
def test_groups_that_share_a_word(group_size: int, cols: int, groups: int) -> None:
    w = drawn(KINDS[0], 2, group_size, 3, cols)
    assert tiles.groups_in_word(w) == groups


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (16, 1), (3, 16, 1), (3, 17, 5), (2, 3, 40, 4), (1, 1, 1, 9), (20, 3)])
def test_lanes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The same values; the rows of a group stand together, padded to whole tiles."""
    values = torch.randn(shape).to(dtype)
    for given_values in (values, torch.stack([values, values], -1)[..., 0], values.transpose(-1, -2).clone().mT):
        lanes = group_major(given_values)
        assert lanes.dtype == dtype
        assert torch.equal(lanes, values)
        rows, groups = shape[-2:]
        padded = -(-rows // 16) * 16
        strides = [1 if rows > 1 else None, padded if groups > 1 else None]
        assert all(b is None or a == b for a, b in zip(lanes.stride()[-2:], strides, strict=True))
        room = lanes.untyped_storage().nbytes() // lanes.element_size() - lanes.storage_offset()
        assert room >= values.numel() // rows * padded  # whole tiles may be read
        assert group_major(lanes).data_ptr() == lanes.data_ptr()


def test_a_view_at_the_end_of_its_memory_is_not_in_lanes() -> None:
    """Its tile would be read from behind it."""
    memory = torch.randn(20)
    view = memory[16:].unsqueeze(-1)
    lanes = group_major(view)
    assert torch.equal(lanes, view)
    assert lanes.data_ptr() != view.data_ptr()
    assert lanes.untyped_storage().nbytes() >= 16 * 4


# --- modules ---------------------------------------------------------------------------------------


def module_of(scheme: Scheme, kind: type[LowbitModule] = LowbitLinear) -> LowbitModule:
    """A module as it is loaded, with the matrix that :func:`file_of` has."""
    torch.manual_seed(0)  # of the bias
    row_bits = random_matrix(scheme, ROWS, COLS).row_bits
    more = {} if kind is LowbitEmbedding else {"bias": True}
    return filled(kind(scheme, ROWS, COLS, plane_rows=None if row_bits is None else int(row_bits.sum()), **more))


def file_of(scheme: Scheme, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of the file, by role."""
    w = plane_matrix(random_matrix(scheme, ROWS, COLS, seed))
    return {role: t for role in LOADED if (t := getattr(w, role)) is not None}


def of_file(scheme: Scheme, seed: int = 0) -> PlaneMatrix:
    return plane_matrix(random_matrix(scheme, ROWS, COLS, seed))


def some_input(module: LowbitModule) -> Tensor:
    return torch.tensor([[0, 36, 5]]) if module.kind == "embedding" else torch.randn(2, 3, COLS)


def is_tiled(module: LowbitModule) -> bool:
    return module.is_tiled


def assert_same_tensors(found: dict[str, Any], file: dict[str, Tensor]) -> None:
    found = {role: t for role, t in found.items() if role != "bias"}
    assert found.keys() == file.keys()
    for role, t in file.items():
        assert found[role].dtype == t.dtype, role
        assert torch.equal(found[role], t), role


def saved(module: LowbitModule) -> dict[str, Tensor]:
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    state: dict[str, Tensor] = torch.load(buffer, weights_only=True)
    return state


WAYS: dict[str, Callable[[LowbitModule], dict[str, Any]]] = {  # to the tensors of a module
    "state_dict": lambda m: m.state_dict(),
    "state_dict of the model": lambda m: {k.removeprefix("0."): v for k, v in nn.Sequential(m).state_dict().items()},
    "torch.save": saved,
    "planes": lambda m: {"planes": m.planes, **m.matrix_parameters()},
    "to": lambda m: m.to(torch.float64).to(torch.float32).state_dict(),
    "half": lambda m: m.half().float().state_dict(),
    "to of the model": lambda m: nn.Sequential(m).to("cpu", torch.float32)[0].state_dict(),
    "deepcopy": lambda m: copy.deepcopy(m).state_dict(),
    "pickle": lambda m: pickle.loads(pickle.dumps(m)).state_dict(),
    "unpack": lambda m: m.untile() or m.matrix_parameters(),
}


@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
@pytest.mark.parametrize("kind", [LowbitLinear, LowbitConv1D, LowbitEmbedding])
@pytest.mark.parametrize("way", WAYS)
def test_the_files_bytes_come_back(scheme: Scheme, kind: type[LowbitModule], way: str) -> None:
    module = module_of(scheme, kind)
    x = some_input(module)
    with torch.no_grad():
        if module.bias is not None:
            module.bias.copy_(module.bias.half())  # a cast and back changes nothing
        want = module(x)
        assert is_tiled(module)
        assert_same_tensors(WAYS[way](module), file_of(scheme))
        if way not in ("deepcopy", "pickle"):
            assert not is_tiled(module)
        assert torch.equal(module(x), want)
        assert is_tiled(module)


@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(scheme: Scheme, duplicate: Callable[[LowbitModule], LowbitModule]) -> None:
    module = module_of(scheme)
    x = some_input(module)
    want = module(x)
    twin = duplicate(module)
    assert torch.equal(twin(x), want)
    with torch.no_grad():
        for p in twin.matrix_parameters().values():
            p.zero_()
    assert torch.equal(module(x), want)
    assert_same_tensors(module.state_dict(), file_of(scheme))


@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
def test_a_pickle_has_the_files_tensors_only(scheme: Scheme) -> None:
    """Nothing that serving keeps beside them."""
    module = module_of(scheme)
    module.untile()
    before = len(pickle.dumps(module))
    module(some_input(module))
    assert len(pickle.dumps(module)) <= before + 100


@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
@pytest.mark.parametrize("assign", [False, True])
def test_loaded_values_are_used(scheme: Scheme, assign: bool) -> None:
    """The result does not depend on earlier calls, even in the same memory."""
    module = module_of(scheme)
    x = torch.randn(2, COLS)
    for seed in range(20):
        file = file_of(scheme, seed)
        if "row_bits" in file:  # planes of the same shape for other rows
            file = {role: t.flip(0 if role in ("planes", "row_bits") else -2) if seed % 2 else t
                    for role, t in file_of(scheme).items()}  # fmt: skip
        state = {**file, "bias": torch.zeros(ROWS)}
        module.load_state_dict({k: v.clone() for k, v in state.items()}, assign=assign)
        w = PlaneMatrix(*(file.get(role) for role in LOADED), scheme.codec, scheme.bits, scheme.group_size, COLS)
        with torch.no_grad():
            torch.testing.assert_close(module(x), naive.linear(x, w, None, None, None), rtol=1e-3, atol=1e-3)
        assert is_tiled(module)


@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
def test_parameters_that_change_in_place(scheme: Scheme) -> None:
    """As an optimizer changes them: the next product has the new ones, also where a copy of the old is kept."""
    module, x = module_of(scheme), torch.randn(2, COLS)
    with torch.no_grad():
        module(x)
        for name, p in module.matrix_parameters().items():
            if name in ("scales", "offsets", "zeros"):
                p.mul_(2)
        found = module(x)
        assert is_tiled(module)
        w = module.plane_matrix
        expected = naive.linear(x, backend.untile(w), module.bias, None, None)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
@pytest.mark.parametrize("dtype", SCALE_DTYPES)
def test_nothing_is_in_memory_twice(scheme: Scheme, dtype: str) -> None:
    """The tiled layout replaces the file's, padded to whole tiles, and goes when that comes back.

    Of ragged rows there are parameters in the order of their bits beside it, and where each row is.
    """
    scheme = replace(scheme, scale_dtype=dtype)
    module = module_of(scheme)
    module(some_input(module))
    file, padded = file_of(scheme), 48
    per_row = {role: t.nbytes // ROWS for role, t in file.items() if role in ("scales", "offsets", "zeros")}
    planes = 3 * padded * 16 if scheme.row_bits else file["planes"].nbytes // ROWS * padded  # ragged: at most all
    whole = padded * sum(per_row.values()) + planes + 64  # a few bytes behind the last tile are read
    rest = sum(t.nbytes for role, t in file.items() if role in ("codebook", "row_bits"))
    memory = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.matrix_parameters().values()}
    assert sum(memory.values()) <= whole + rest
    found = _tensors_of(module)
    assert len(found) > 1
    kept = [t for t in found if t.untyped_storage().data_ptr() not in memory]
    parameters = sum(per_row.values()) * (padded + 3 * 16)  # of three parts, each padded
    ragged = (parameters + 3 * 8 * padded) * scheme.row_bits  # rows of parts, places in them, and those of the kernel
    levels = 4 * 16  # of a codebook, as many as a register has
    assert sum(t.untyped_storage().nbytes() for t in kept) <= ragged + levels
    module.untile()
    memory = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.matrix_parameters().values()}
    assert sum(memory.values()) == sum(t.nbytes for t in file.values())
    assert [t.shape for t in _tensors_of(module) if t.untyped_storage().data_ptr() not in memory] == []


def _tensors_of(module: LowbitModule) -> list[Tensor]:
    """What is cached with the planes, and with their layout."""
    found, seen, queue = list[Tensor](), set[int](), [module._parameters["planes"], module.tiled]
    while queue:
        thing: Any = queue.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            found.append(thing)
            queue.append(vars(thing))
        elif isinstance(thing, dict):
            queue += thing.values()
        elif isinstance(thing, (list, tuple)):
            queue += thing
        elif hasattr(thing, "__dict__"):
            queue.append(vars(thing))
    return found


def test_memory_is_freed_without_the_garbage_collector() -> None:
    """No tensor holds itself by way of what is kept with it."""
    import gc
    import weakref

    w = backend.tile(drawn(KINDS[1], 3, 32, ROWS, COLS))
    operators.linear(torch.randn(2, COLS), w._replace(planes=w.planes.clone()))  # a compiler keeps frames for a while
    gc.disable()
    try:
        operators.linear(torch.randn(2, COLS), w)
        planes = weakref.ref(w.planes)
        del w
        assert planes() is None
    finally:
        gc.enable()


def test_casts_between_forwards() -> None:
    """The compute dtype changes, the declared dtypes do not."""
    module = module_of(SCHEMES[1])
    x = torch.randn(2, COLS)
    with torch.no_grad():
        want = module(x)
        half = module.bfloat16()(x.bfloat16())
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), want, rtol=0.1, atol=0.5)
        assert is_tiled(module)
        assert module.scales.dtype == torch.float16


def test_moves_of_a_tiled_module() -> None:
    module = module_of(SCHEMES[1])
    module(some_input(module))
    module.to("meta")
    assert all(p.is_meta for p in module.parameters())
    assert module.planes.shape == file_of(SCHEMES[1])["planes"].shape


# --- training --------------------------------------------------------------------------------------


def gradients_of(w: PlaneMatrix, call: Any, which: str) -> list[Tensor]:
    """Of x, bias, deltas and parameters."""
    names = [n for n in ("scales", "offsets", "zeros") if getattr(w, n) is not None]
    w = w._replace(**{n: getattr(w, n).detach().requires_grad_() for n in names})
    leaves = [t.clone().requires_grad_() for t in (call.bias, call.deltas) if t is not None]
    if which == "linear":
        x = call.x.clone().requires_grad_()
        y = operators.linear(x, w, *leaves, *([] if call.deltas is not None else [None]), call.task_ids)
        leaves.append(x)
    else:
        ids = torch.arange(len(call.x)) * 3 % ROWS
        y = operators.embedding(ids, w, leaves[1] if len(leaves) > 1 else None, call.task_ids)
        leaves = leaves[1:]
    y.square().sum().backward()
    return [t.grad for t in leaves] + [getattr(w, n).grad for n in names]  # type: ignore[misc]


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@pytest.mark.parametrize("which", ["linear", "embedding"])
@pytest.mark.parametrize("tasks", [None, "mul", "add"])
@pytest.mark.parametrize("batch", [2, 70])
def test_gradients_do_not_depend_on_the_layout(kind: Scheme, which: str, tasks: str | None, batch: int) -> None:
    w = drawn(kind, 3, 32, ROWS, COLS)
    call = random_call(w, batch, tasks=tasks)
    plain, tiled = gradients_of(w, call, which), gradients_of(backend.tile(w), call, which)
    assert len(plain) == len(tiled) > 0
    for a, b in zip(plain, tiled, strict=True):
        assert a is not None
        assert a.any()
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5 * float(a.abs().max()))


@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
def test_a_module_trains_as_it_does_with_plain_planes(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    grads = []
    x, start = torch.randn(5, COLS), torch.randn(1, ROWS) * 0.1
    for packs in (True, False):
        if not packs:
            monkeypatch.setattr(operators, "can_tile", lambda w: False)
        module = module_of(scheme)
        module.register_module("tuned", TunedDelta(Delta(scales=start)))
        module.tuned_name = "mine"
        module.set_task("mine")
        y = module(x)
        assert is_tiled(module) == packs
        y.square().sum().backward()
        assert module.tuned is not None
        assert module.tuned.scales is not None
        grads.append((y.detach(), module.tuned.scales.grad))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_state_dict_between_forward_and_backward() -> None:
    """Tensors that autograd has saved change their layout before the backward pass."""
    grads = []
    x = torch.randn(3, COLS)
    for look in (False, True):
        module = module_of(SCHEMES[1])
        module.scales.requires_grad_()
        y = module(x)
        if look:
            assert_same_tensors(module.state_dict(), file_of(SCHEMES[1]))
        y.square().sum().backward()
        assert module.scales.grad is not None
        grads.append(module.scales.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    "first", [lambda m: m(torch.randn(2, COLS)), lambda m: m.state_dict()], ids=["forward", "state_dict"]
)
def test_training_after_inference_mode(first: Callable[[LowbitModule], Any]) -> None:
    """Tensors made in that mode cannot be trained; the module's own are not of them."""
    module = module_of(SCHEMES[1])
    for prepare in (module.untile, module.tile):  # whichever layout it begins with
        prepare()
        with torch.inference_mode():
            first(module)
    module.scales.requires_grad_()
    x = torch.randn(3, COLS, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    assert module.scales.grad is not None


@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
def test_folding_a_task(scheme: Scheme) -> None:
    """After serving; the planes stay what they are."""
    module = module_of(scheme)
    x = torch.randn(3, COLS)
    delta = Delta(scales=torch.randn(1, ROWS) * 0.1)
    with torch.no_grad():
        before = module(x)
        w = module.plane_matrix
        want = operators.linear(x, w, module.bias, delta.scales[None])  # type: ignore[index]
        module.merge(module.merged_parameters(delta, "F32"))
        found = module(x)
    assert is_tiled(module)
    assert not torch.allclose(found, before)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    state = module.state_dict()
    assert torch.equal(state["planes"], file_of(scheme)["planes"])
    assert state["scales"].dtype == torch.float32
    assert torch.equal(state["scales"], with_delta(of_file(scheme), delta.scales).scales)  # type: ignore[arg-type]


# --- one matrix in two places, and two threads -----------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
def test_a_tied_head_stays_tied(scheme: Scheme) -> None:
    """TIE-1: one matrix, whichever of the two packs it or gives its bytes."""
    embedding, head = module_of(scheme, LowbitEmbedding), module_of(scheme)
    head.tie_to(embedding)
    model = nn.ModuleDict({"embedding": embedding, "head": head})
    ids, x = torch.tensor([0, 36, 5]), torch.randn(2, COLS)
    with torch.no_grad():
        rows, y = embedding(ids), head(x)

        def check() -> None:
            assert embedding.matrix_id == head.matrix_id
            assert same_bits(embedding(ids), rows)
            assert is_tiled(head)
            assert is_tiled(embedding)
            assert torch.equal(head(x), y)
            assert len({p.data_ptr() for p in model.parameters()}) == len(file_of(scheme)) + 1  # and the bias

        check()
        for change in (head.untile, embedding.untile, model.state_dict, lambda: head.planes, model.float):
            change()
            check()
        state = model.state_dict()
        for name in ("embedding", "head"):
            mine = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(name)}
            assert_same_tensors(mine, file_of(scheme))
            assert mine["planes"].data_ptr() == embedding.planes.data_ptr()
        twin = copy.deepcopy(model)
        assert twin["head"].matrix_id == twin["embedding"].matrix_id  # type: ignore[union-attr]
        assert torch.equal(twin["head"](x), y)
        check()


@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
def test_the_first_forwards_come_at_once(scheme: Scheme) -> None:
    """Each of several threads finds the module not tiled yet."""
    module = module_of(scheme)
    x = torch.randn(2, COLS)
    with torch.no_grad():
        want = module(x)

    def forward() -> None:
        with torch.no_grad():
            assert torch.equal(module(x), want)

    for _ in range(20):
        module.untile()
        at_once(*[forward] * 4)
    assert_same_tensors(module.state_dict(), file_of(scheme))


@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
def test_saving_while_serving(scheme: Scheme) -> None:
    """Some threads compute while others read the file's bytes, of one matrix in two modules."""
    embedding, head = module_of(scheme, LowbitEmbedding), module_of(scheme)
    head.tie_to(embedding)
    ids, x, file = torch.tensor([0, 36, 5]), torch.randn(2, COLS), file_of(scheme)
    with torch.no_grad():
        rows, y = embedding(ids), head(x)

    def serve() -> None:
        with torch.no_grad():
            for _ in range(50):
                assert same_bits(embedding(ids), rows)
                assert torch.equal(head(x), y)

    def save(module: LowbitModule) -> Callable[[], None]:
        return lambda: [assert_same_tensors(module.state_dict(), file) for _ in range(50)] and None

    at_once(serve, save(embedding), serve, save(head))


def test_a_moved_module_is_tiled_again_at_once() -> None:
    """A compiled module may not change its layout while it runs, so it is tiled before."""
    module = filled(LowbitLinear(Scheme("bcq", 3, 32, "F32"), 20, 64))
    module.to(torch.float16)
    assert not module.is_tiled
    module.tile()
    module.to(torch.float32)
    assert module.is_tiled
    tied = filled(LowbitLinear(Scheme("bcq", 3, 32, "F32"), 20, 64))
    other = LowbitLinear(tied.scheme, 20, 64)
    other.tie_to(tied)
    tied.tile()
    x = torch.randn(2, 64)
    want = tied(x)
    nn.ModuleList([tied, other]).to(torch.float64).to(torch.float32)
    assert tied.plane_matrix.planes is other.plane_matrix.planes
    assert same_bits(other(x), want)


@pytest.mark.parametrize("sequential", [False, True])
def test_only_what_is_offloaded_stays_plain(sequential: bool) -> None:
    """accelerate hangs hooks on all modules, also where nothing is elsewhere."""
    from accelerate.hooks import AlignDevicesHook, SequentialHook

    for offload in (False, True):
        module = filled(LowbitLinear(Scheme("bcq", 3, 32, "F32"), 20, 64))
        hook = AlignDevicesHook(execution_device="cpu", offload=offload)
        module._hf_hook = SequentialHook(hook) if sequential else hook  # type: ignore[assignment]
        module.tile()
        assert module.is_tiled != offload
