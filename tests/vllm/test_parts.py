"""What a process holds of the file's matrices, and what tasks change there. Needs no vLLM."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit_format.container.writer import module_tensors
from lowbit_format.errors import BundleError, LoadError, TaskError
from lowbit_format.kernels import operators
from lowbit_format.reference import decode_numpy
from lowbit_format.runtime.deltas import Delta
from lowbit_format.runtime.stored_tensors import to_torch
from lowbit_format.schema import ModuleEntry, Scheme
from lowbit_format.testing.matrices import random_matrix
from lowbit_format.vllm.parts import FloatPart, PlanePart, can_join, product
from lowbit_format.vllm.slices import Cut, Shard, Slice, ranges, shards_of
from lowbit_format.vllm.task_table import BASE, GROUPS, ROWS, ActiveTasks, TaskTable, table_delta

CPU = torch.device("cpu")
SCHEMES = [
    Scheme("bcq", 3, 64, "F16", offset=True),
    Scheme("bcq", 2, 0, "F32"),
    Scheme("uniform", 4, 32, "BF16"),
    Scheme("uniform", 3, 128, "F16", row_bits=True, nested=(2,)),
    Scheme("codebook", 2, 0, "F32"),
]


def loaded(scheme: Scheme, rows: int, cols: int, piece: Slice | None = None, bits: int | None = None) -> PlanePart:
    """A part with random planes, loaded tensor by tensor."""
    entry = ModuleEntry("layer", scheme, "linear", (rows, cols))
    part = PlanePart([Cut(entry, piece or Slice.whole(entry))], bits=bits, device=CPU)
    for tensor in module_tensors(entry, random_matrix(scheme, rows, cols, seed=1)):
        part.load(tensor.name.rpartition(".")[2], to_torch(tensor))
    return part


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@given(st.data())
def test_a_slice_decodes_to_rows_and_columns_of_the_matrix(scheme: Scheme, data: st.DataObject) -> None:
    edges = sorted(data.draw(st.sets(st.integers(0, 48), min_size=2, max_size=4)))
    rows = tuple(zip(edges[::2], edges[1::2], strict=False))
    first, last = sorted(data.draw(st.sets(st.sampled_from([0, 32, 64, 96, 128, 160]), min_size=2, max_size=2)))
    part = loaded(scheme, 48, 160, Slice(rows, (first, last)))
    whole = torch.from_numpy(decode_numpy(random_matrix(scheme, 48, 160, seed=1)))
    expected = torch.cat([whole[start:stop] for start, stop in rows])[:, first:last]
    assert part.missing == []
    assert torch.equal(operators.dequantize(part.plane_matrix), expected)


def test_a_lower_precision_of_a_slice() -> None:
    scheme = SCHEMES[3]
    part = loaded(scheme, 48, 160, Slice(((16, 32),), (0, 160)), bits=2)
    whole = loaded(scheme, 48, 160, bits=2)
    assert part.scheme == replace(scheme, bits=2, nested=())
    assert torch.equal(operators.dequantize(part.plane_matrix), operators.dequantize(whole.plane_matrix)[16:32])


def test_a_cut_that_kernels_cannot_read_is_refused_by_name() -> None:
    entry = ModuleEntry("model.down_proj", Scheme("bcq", 2, 48, "F16"), "linear", (4, 96))
    with pytest.raises(LoadError, match=r"model\.down_proj: .* at 40, inside of a group of 48 .* --group-size"):
        Cut(entry, Slice(((0, 4),), (0, 40)))


def test_a_tensor_of_another_shape_is_refused_by_name() -> None:
    entry = ModuleEntry("layer", SCHEMES[1], "linear", (4, 64))
    part = PlanePart([Cut(entry, Slice.whole(entry))], bits=None, device=CPU)
    with pytest.raises(LoadError, match=r"'layer\.scales' has the shape \[2, 5, 1\], config\.json says \[2, 4, 1\]"):
        part.load("scales", torch.ones(2, 5, 1))
    assert part.missing == ["layer.planes", "layer.scales"]


def test_fused_layers_of_parts_with_schemes_of_their_own() -> None:
    parts = [loaded(scheme, 16, 64) for scheme in SCHEMES]
    kept = FloatPart("kept", Slice(((0, 16),), (0, 64)), dtype=torch.float32, device=CPU)
    kept.load("weight", torch.randn(16, 64))
    x, bias = torch.randn(5, 64), torch.randn(96)
    weight = torch.cat([*(operators.dequantize(part.plane_matrix) for part in parts), kept.weight])
    torch.testing.assert_close(product([*parts, kept], x, bias), x @ weight.T + bias)


@pytest.mark.parametrize("kind", [ROWS, GROUPS])
def test_matrices_of_one_scheme_are_one_product(kind: str) -> None:
    """Also for tasks that change some of them, in different ways."""
    scheme = SCHEMES[0]
    entries = [ModuleEntry(name, scheme, "linear", (rows, 128)) for name, rows in (("q", 32), ("k", 16), ("v", 16))]
    cuts = [Cut(entry, Slice(((0, 16),), (0, 128))) for entry in entries]
    assert can_join(cuts[0], cuts[1])
    joint, apart = PlanePart(cuts, bits=None, device=CPU), []
    for number, (entry, cut) in enumerate(zip(entries, cuts, strict=True)):
        apart.append(PlanePart([cut], bits=None, device=CPU))
        for tensor in module_tensors(entry, random_matrix(scheme, entry.rows, 128, seed=number)):
            role = tensor.name.rpartition(".")[2]
            assert tensor.name in joint.missing
            joint.load(role, to_torch(tensor), number)
            apart[-1].load(role, to_torch(tensor))
    x = torch.randn(4, 128)
    assert joint.missing == []
    torch.testing.assert_close(joint.product(x, None, sampled=False), product(apart, x, None))

    deltas = {"q": Delta(0.1 * torch.randn(1, 32)), "v": Delta(0.1 * torch.randn(3, 16))}
    tasks, active = table(joint, kind)
    tasks.set(2, joint.table_delta(deltas, kind))
    active.all = 2
    for part in apart:
        alone, its_tasks = table(part, kind)
        alone.set(0, part.table_delta(deltas, kind))
        its_tasks.all = 0
    torch.testing.assert_close(joint.product(x, None, sampled=False), product(apart, x, None))
    joint.matrix_parameters()["scales"].data *= 1e3
    with pytest.raises(BundleError, match=r"'v': the deltas make a scale infinite"):
        joint.table_delta({"v": Delta(torch.full((1, 16), 3e38))}, kind)


def test_matrices_with_tables_or_ragged_rows_stay_apart() -> None:
    for scheme in SCHEMES[3:]:
        cut = Cut(entry := ModuleEntry("layer", scheme, "linear", (16, 128)), Slice.whole(entry))
        assert not can_join(cut, cut)


def test_rows_of_a_process_in_fused_layers() -> None:
    """Query, key and value of 8, 2 and 2 heads of 4 rows, on the second of 4 processes, which share heads of keys."""
    shards = [Shard(32, 8, 8), Shard(8, 0, 4), Shard(8, 0, 4)]
    assert [ranges([shard]) for shard in shards] == [((8, 16),), ((0, 4),), ((0, 4),)]
    assert ranges(shards) == ((8, 16), (32, 36), (40, 44))  # one matrix of the file
    assert ranges([Shard(4, 0, 4), Shard(6, 0, 6)]) == ((0, 10),)
    entry = ModuleEntry("qk", SCHEMES[0], "linear", (40, 64))
    assert shards_of(entry, shards, others=1) == 2  # queries and keys in one matrix, values in another
    assert shards_of(None, shards, others=2) == 1


def table(part: PlanePart, kind: str, slots: int = 3) -> tuple[TaskTable, ActiveTasks]:
    active = ActiveTasks(torch.full((16,), BASE), torch.full((16,), BASE), all=BASE)
    part.tasks = TaskTable(part.plane_matrix, slots, kind, active, fixed=False)
    return part.tasks, active


@pytest.mark.parametrize("kind", [ROWS, GROUPS])
def test_each_token_is_computed_with_its_task(kind: str) -> None:
    part = loaded(SCHEMES[0], 16, 128)
    tasks, active = table(part, kind)
    x, base = torch.randn(6, 128), part.plane_matrix
    factors = [0.1 * torch.randn(1, 16), 0.1 * torch.randn(3, 16)]
    expected = [operators.linear(x, base, None, d[None]) for d in factors]
    assert tasks.of_batch(6, False) == (None, None)
    for slot, delta in enumerate(factors):
        tasks.set(slot, table_delta(Delta(delta), base, kind, "layer"))
    active.tokens[:6], active.all = torch.tensor([0, 1, BASE, 1, 0, 2]), None
    out = part.product(x, None, sampled=False)
    torch.testing.assert_close(out[[0, 4]], expected[0][[0, 4]])
    torch.testing.assert_close(out[[1, 3]], expected[1][[1, 3]])
    torch.testing.assert_close(out[[2, 5]], operators.linear(x, base)[[2, 5]])  # the base, and a slot that is empty
    active.all = 1
    torch.testing.assert_close(part.product(x, None, sampled=False), expected[1])
    tasks.set(1, None)
    torch.testing.assert_close(part.product(x, None, sampled=False), operators.linear(x, base))


def test_the_head_is_computed_for_samples_and_never_with_a_wrong_task() -> None:
    part = loaded(SCHEMES[0], 16, 128)
    tasks, active = table(part, ROWS)
    tasks.set(0, torch.full((1, 16), 0.5))
    active.tokens[:3], active.samples[:2] = torch.tensor([0, 0, BASE]), torch.tensor([0, BASE])
    active.sample_count, active.all = 2, None
    x = torch.randn(2, 128)
    out = part.product(x, None, sampled=True)
    base = operators.linear(x, part.plane_matrix)
    torch.testing.assert_close(out[1], base[1])
    assert float((out[0] - base[0]).abs().max()) > 0.1
    assert bool(part.product(torch.randn(3, 128), None, sampled=True).isnan().all())  # not known whose rows these are


def test_deltas_that_a_table_cannot_hold_are_refused_by_name() -> None:
    w = loaded(SCHEMES[0], 16, 128).plane_matrix
    with pytest.raises(TaskError, match=r"layers\.0: .* LOWBIT_VLLM_TASKS=groups"):
        table_delta(Delta(torch.zeros(3, 16, 2)), w, ROWS, "layers.0")
    with pytest.raises(TaskError, match=r"layers\.0: the task changes offsets"):
        table_delta(Delta(torch.zeros(1, 16), torch.zeros(16, 2)), w, ROWS, "layers.0")


def test_deltas_are_cut_like_their_matrix() -> None:
    scheme, piece = SCHEMES[0], Slice(((8, 16), (0, 4)), (32, 96))
    part, whole = loaded(scheme, 16, 128, piece), loaded(scheme, 16, 128)
    delta = Delta(0.1 * torch.randn(3, 16, 2))
    x = torch.randn(2, 128)
    x[:, :32] = x[:, 96:] = 0
    mine = part.members[0].cut.delta(delta).scales
    assert mine is not None
    assert delta.scales is not None
    expected = operators.linear(x, whole.plane_matrix, None, delta.scales[None])[:, [*range(8, 16), *range(4)]]
    part_of_it = operators.linear(x[:, 32:96].contiguous(), part.plane_matrix, None, mine[None])
    torch.testing.assert_close(part_of_it, expected)
