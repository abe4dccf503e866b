"""Scale tuning after ``fully_shard`` (FSDP2): what it takes and what it refuses, with a group of one process.

Two processes are in test_tuning_loops.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.tuning_models import Bases, logits_of, sgd_steps, shared_out, trained

from lowbit_format import load_task, prepare_scale_tuning, save_task, set_task
from lowbit_format.errors import TuningError, UnsupportedOperationError
from lowbit_format.runtime.modules import LowbitModule
from lowbit_format.tasks.saving import bundle_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    meeting = tmp_path_factory.mktemp("group") / "meeting"
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "scheme"), [("llama", "bcq"), ("bert", "uniform-rows"), ("gpt2", "codebook")], ids=str
)
def test_as_without(name: str, scheme: str, bases: Bases, tmp_path: Path) -> None:
    """The same task bit for bit; between calls every tensor is shared out, and none is kept in the kernels' layout."""
    alone, model = bases.load(name, scheme), bases.load(name, scheme)
    for each in (alone, model):
        prepare_scale_tuning(each, "scales", offsets=scheme == "bcq")
    sgd_steps(alone, alone, 3, slice(None))
    model = shared_out(model)
    assert all(hasattr(p, "full_tensor") for p in model.parameters())
    sgd_steps(model, model, 3, slice(None))
    assert not any(m.is_tiled for m in model.modules() if isinstance(m, LowbitModule))
    assert any(m.is_tiled for m in alone.modules() if isinstance(m, LowbitModule))
    found, want = bundle_of(model), bundle_of(alone)
    assert {key: d.tobytes() for key, d in found.deltas.items()} == {key: d.tobytes() for key, d in want.deltas.items()}
    assert all(d.any() for d in found.deltas.values())
    assert torch.equal(logits_of(model), logits_of(alone))

    save_task(model, tmp_path / "task")
    again = bases.load(name, scheme)
    set_task(again, load_task(again, tmp_path / "task"))
    assert torch.equal(logits_of(again), logits_of(alone))


def test_a_task_that_is_loaded_before_serves_after(bases: Bases, tmp_path: Path) -> None:
    tuned = bases.load("llama")
    prepare_scale_tuning(tuned)
    with torch.no_grad():
        for p in trained(tuned).values():
            p.fill_(0.1)
    save_task(tuned, tmp_path / "task")
    model = bases.load("llama")
    load_task(model, tmp_path / "task")
    base = logits_of(model)
    shared_out(model)
    set_task(model, "task")
    assert torch.equal(logits_of(model), logits_of(tuned))
    ids = torch.tensor([[3, 9, 4], [5, 6, 7]])
    words = [m.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0) for m in (model, tuned)]
    assert torch.equal(*words)
    set_task(model, None)
    assert torch.equal(logits_of(model), base)


def test_what_wants_the_whole_matrix_is_refused(bases: Bases, tmp_path: Path) -> None:
    tuned = bases.load("llama")
    prepare_scale_tuning(tuned)
    save_task(tuned, tmp_path / "task")
    model = shared_out(bases.load("llama"))
    with pytest.raises(TuningError, match="call prepare_scale_tuning first, and fully_shard after it"):
        prepare_scale_tuning(model)
    save = functools.partial(model.save_pretrained, tmp_path / "base")
    for call in (lambda: load_task(model, tmp_path / "task"), save, model.dequantize):
        with pytest.raises(
            UnsupportedOperationError, match=r"fully_shard gave each process a part.*call load_task.* before"
        ):
            call()
