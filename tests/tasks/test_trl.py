"""TRL's trainers tune scales as they train any model, and what they leave behind is the task."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import with_tokenizer
from support.tuning_models import Bases, logits_of, trained, values
from transformers import AutoTokenizer

from lowbit_format import load_task, prepare_scale_tuning, save_task, set_task

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

OPTIONS = {
    "max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False, "report_to": [],
    "save_strategy": "no", "learning_rate": 2e-2, "lr_scheduler_type": "constant", "disable_tqdm": True,
    "logging_steps": 1,
}  # fmt: skip
TEXTS = [{"text": "w1 w2 w3 w4"}, {"text": "w5 w6 w7"}] * 2
PAIRS = [{"prompt": "w1 w2", "chosen": " w3 w4", "rejected": " w5 w6"}] * 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(with_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def check(trainer: Any, model: Any, bases: Bases, directory: Path) -> list[float]:
    """Train; the task that is saved is what was trained, and nothing else has changed. Returns the losses."""
    base_tensors = values(model.state_dict())
    trainer.train()
    assert len(trained(model)) == 14
    assert all(bool(p.any()) for p in trained(model).values())
    changed = {key for key, t in model.state_dict().items() if not torch.equal(t, base_tensors[key])}
    assert changed == set(trained(model))

    again = bases.load("llama")
    base = logits_of(again)
    save_task(model, directory / "task")
    trainer.save_model(str(directory / "saved"))
    for name in ("task", "saved"):
        set_task(again, load_task(again, directory / name, name=name))
        assert torch.equal(logits_of(again), logits_of(model)), name
    assert not torch.equal(logits_of(model), base)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_supervised_fine_tuning(bases: Bases, tokenizer: Any, tmp_path: Path) -> None:
    model = bases.load("llama")
    prepare_scale_tuning(model)
    options = trl.SFTConfig(str(tmp_path / "runs"), **OPTIONS)
    data = datasets.Dataset.from_list(TEXTS)
    trainer = trl.SFTTrainer(model, options, train_dataset=data, processing_class=tokenizer)
    first, second = check(trainer, model, bases, tmp_path)
    assert second < first


def test_preferences_beside_the_base_without_a_second_copy_of_it(bases: Bases, tokenizer: Any, tmp_path: Path) -> None:
    """Its probabilities are computed before the first step, when every delta is zero."""
    model = bases.load("llama")
    prepare_scale_tuning(model)
    options = trl.DPOConfig(str(tmp_path / "runs"), precompute_ref_log_probs=True, **OPTIONS)
    data = datasets.Dataset.from_list(PAIRS)
    trainer = trl.DPOTrainer(model, args=options, train_dataset=data, processing_class=tokenizer)
    assert trainer.ref_model is None
    first, second = check(trainer, model, bases, tmp_path)
    assert first == pytest.approx(math.log(2), abs=1e-6)  # it prefers nothing yet to what the base prefers
    assert second < first
