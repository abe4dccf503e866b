"""Tasks of models with experts: each expert of a stack has deltas of its own (TSK-7)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.experts import build
from transformers import AutoModelForCausalLM

import lowbit_format as lb
from lowbit_format import Recipe, Target, convert_hf_to_lowbit
from lowbit_format.container.reader import ModelReader
from lowbit_format.errors import TaskError
from lowbit_format.runtime.experts import LowbitExperts
from lowbit_format.tasks.bundle import read_bundle
from lowbit_format.tasks.matching import check_applies

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.arange(1, 25).reshape(4, 6)
TARGETS = {"bcq": Target(bits=2, group_size=32), "uniform": Target("uniform", 4, 32)}
# What is tuned in a stack of 4 experts: method, options, axes of its scales' delta behind the experts.
WAYS = [
    ("bcq", "mixtral", "alphatuning", {}, 2),
    ("bcq", "gpt-oss", "scales", {"offsets": True}, 2),
    ("bcq", "llama4", "alphatuning", {"kind": "add"}, 3),
    ("uniform", "mixtral", "peqa", {"offsets": True}, 2),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    done: dict[tuple[str, str], Path] = {}

    def make(codec: str, family: str) -> Path:
        if (codec, family) not in done:
            at = tmp_path_factory.mktemp(family)
            build(family).save_pretrained(at / "source")
            convert_hf_to_lowbit(str(at / "source"), at / "lowbit", Recipe(TARGETS[codec]))
            done[codec, family] = at / "lowbit"
        return done[codec, family]

    return make


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(ids).logits
    return out


def make_task(model: Any, directory: Path, seed: int, method: str, **options: Any) -> Path:
    """A bundle with random deltas."""
    lb.prepare_scale_tuning(model, method, name="made", **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=generator) * (0.1 if options.get("kind") == "add" else 1))
    lb.save_task(model, directory)
    lb.unload_task(model, "made")
    return directory


@pytest.mark.parametrize(("codec", "family", "method", "options", "axes"), WAYS)
def test_a_task_from_tuning_to_merging(
    codec: str, family: str, method: str, options: dict[str, Any], axes: int, base: Any, tmp_path: Path
) -> None:
    directory = base(codec, family)
    model = load(directory)
    plain = logits(model)
    bundle = make_task(model, tmp_path / "task", 1, method, **options)
    deltas = {k: v.shape for k, v in read_bundle(bundle).deltas.items() if "experts" in k and ".scales." in k}
    assert len(deltas) == 4
    assert all(shape[0] == 4 and len(shape) == 1 + axes for shape in deltas.values())
    assert check_applies(read_bundle(bundle), ModelReader(directory), verify=True) == 0
    assert torch.equal(logits(model), plain)
    lb.load_task(model, bundle, name="mine")
    lb.set_task(model, "mine")
    tuned = logits(model)
    assert not torch.allclose(tuned, plain, atol=0.01)
    torch.testing.assert_close(logits(copy.deepcopy(model).dequantize()), tuned, rtol=1e-4, atol=1e-5)
    lb.merge_task(model, "mine")
    torch.testing.assert_close(logits(model), tuned, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged")), logits(model))


@pytest.mark.parametrize(("codec", "family", "method", "options", "axes"), WAYS)
def test_a_mixed_batch_is_each_row_with_its_task(
    codec: str, family: str, method: str, options: dict[str, Any], axes: int, base: Any, tmp_path: Path
) -> None:
    model = load(base(codec, family))
    lb.load_task(model, make_task(model, tmp_path / "a", 1, method, **options), name="a")
    other = {**options, "offsets": False} if axes == 2 else options
    more = "scales" if codec == "bcq" else method  # another number of planes
    lb.load_task(model, make_task(model, tmp_path / "b", 2, more, **other), name="b")
    rows = ["a", None, "b", "a"]
    alone = []
    for i, name in enumerate(rows):
        with lb.use_tasks(model, name):
            alone.append(logits(model, IDS[i : i + 1]))
    with lb.use_tasks(model, rows):
        torch.testing.assert_close(logits(model), torch.cat(alone), rtol=1e-4, atol=1e-4)
        options = {"max_new_tokens": 3, "do_sample": False}
        together = model.generate(IDS, **options)
    for i, name in enumerate(rows):
        with lb.use_tasks(model, name):
            generated = model.generate(IDS[i : i + 1], **options)[0]
            assert torch.equal(generated, together[i][: len(generated)])  # an end comes sooner alone
    with lb.use_tasks(model, ["a", "b", None]), pytest.raises(TaskError):
        logits(model)


def test_rows_that_a_router_has_sorted_cannot_be_mixed(base: Any, tmp_path: Path) -> None:
    model = load(base("bcq", "jetmoe"))
    lb.load_task(model, make_task(model, tmp_path / "a", 1, "alphatuning"), name="a")
    with lb.use_tasks(model, "a"):
        assert not torch.equal(logits(model), logits(load(base("bcq", "jetmoe"))))
    with lb.use_tasks(model, ["a", None, "a", "a"]), pytest.raises(TaskError, match="in a separate batch"):
        logits(model)


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "llama4"])
def test_gradients_are_those_of_the_decoded_stack(family: str, base: Any) -> None:
    model = load(base("bcq", family))
    lb.prepare_scale_tuning(model, "scales", offsets=True)
    stack = next(m for m in model.modules() if isinstance(m, LowbitExperts) and m.path.endswith("down_proj"))
    tuned: Any = stack.tuned
    model(IDS, labels=IDS).loss.backward()
    found = {name: p.grad.clone() for name, p in tuned.named_parameters()}
    assert all(bool(g.any()) for g in found.values())

    generator = torch.Generator().manual_seed(3)
    step = {name: torch.randn(p.shape, generator=generator) for name, p in tuned.named_parameters()}
    for size, name in ((0.02, "scales"), (0.001, "shift")):
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                getattr(tuned, name).add_(sign * size * step[name])
                losses.append(float(model(IDS, labels=IDS).loss.double()))
                getattr(tuned, name).sub_(sign * size * step[name])
        slope = (losses[0] - losses[1]) / (2 * size)
        assert slope == pytest.approx(float((found[name] * step[name]).sum()), rel=0.05, abs=2e-3)


def test_training_goes_down_and_experts_without_rows_stay(base: Any, tmp_path: Path) -> None:
    model = load(base("bcq", "mixtral"))
    lb.prepare_scale_tuning(model, include=["*.experts.*"])
    ids = IDS[:1, :1].expand(1, 3)  # one word: two experts in each layer
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 2e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(ids, labels=IDS[1:2, :3]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    for module in model.modules():
        if isinstance(module, LowbitExperts):
            tuned: Any = module.tuned
            assert bool(tuned.scales.flatten(1).any(1).any())
    tuned_logits = logits(model)
    lb.save_task(model, tmp_path / "task")
    again = load(base("bcq", "mixtral"))
    lb.load_task(again, tmp_path / "task", name="t")
    lb.set_task(again, "t")
    assert torch.equal(logits(again), tuned_logits)
