"""Makes the Hugging Face ``Trainer`` write a task's checkpoints instead of whole models, and resume from them."""

from __future__ import annotations

import os
from typing import Any

import safetensors.torch
import transformers

from ..errors import TuningError
from ..integrations.model import trained_state_dict
from .models import tuned_task, unwrapped
from .saving import save_task

WEIGHTS_FILE = "model.safetensors"  # what the Trainer looks for in a checkpoint


class TaskCallback(transformers.TrainerCallback):
    """Give it to the ``Trainer`` that trains a model after :func:`prepare_scale_tuning`.

    A checkpoint, and what ``trainer.save_model`` writes, then holds two things: the task's bundle, which ``load_task``
    reads, and ``model.safetensors`` with the trained parameters (deltas and head) under the model's names. From the
    latter the Trainer resumes, and loads the best model at the end; optimizer, scheduler and random state are in the
    Trainer's files.

    Args:
        **card: for the bundles' model cards, as in :func:`save_task`.
    """

    def __init__(self, **card: Any) -> None:
        self.card = card

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """From here on the Trainer writes the task; ``model.save_pretrained(directory)`` still writes the base."""
        inner = unwrapped(model)
        if tuned_task(inner) is None:
            raise TuningError("there is no task to train: call prepare_scale_tuning before the Trainer")
        inner.lowbit_save = self._save

    def _save(self, model: Any, directory: str) -> None:
        save_task(model, directory, name=tuned_task(model), **self.card)
        trained = {key: t.detach().contiguous() for key, t in trained_state_dict(model).items()}
        safetensors.torch.save_file(trained, os.path.join(directory, WEIGHTS_FILE), metadata={"format": "pt"})
