"""Makes the Hugging Face ``Trainer`` write a task's checkpoints instead of whole models, and resume from them."""

from __future__ import annotations

import os
from typing import Any

import safetensors.torch
import transformers

from .models import state_of, unwrapped
from .saving import save_task

WEIGHTS_FILE = "model.safetensors"  # what the Trainer looks for in a checkpoint


class TaskCallback(transformers.TrainerCallback):
    """Give it to the ``Trainer`` that trains a model after :func:`prepare_scale_tuning`.

    A checkpoint then holds the task's bundle, which ``load_task`` reads as it does any other, and beside it, in
    ``model.safetensors``, the trained parameters under the model's own names. From those the Trainer resumes (deltas
    and head; optimizer, scheduler and random state are its own files), and loads the best model at the end.

    Args:
        **card: for the bundles' model cards, as in :func:`save_task`.
    """

    def __init__(self, **card: Any) -> None:
        self.card = card

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """From here on ``save_pretrained`` writes checkpoints of the task."""
        unwrapped(model).lowbit_save = self._save

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """``save_pretrained`` writes the base again."""
        unwrapped(model).lowbit_save = None

    def _save(self, model: Any, directory: str) -> None:
        name = next(info.name for info in state_of(model).loaded.values() if info.tuned)
        save_task(model, directory, name=name, **self.card)
        trained = {key: p.detach().contiguous() for key, p in model.named_parameters() if p.requires_grad}
        safetensors.torch.save_file(trained, os.path.join(directory, WEIGHTS_FILE), metadata={"format": "pt"})
