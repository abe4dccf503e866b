"""What the Hugging Face ``Trainer`` saves of a model whose task is in training: the task, not the base."""

from __future__ import annotations

import os
from typing import Any

import safetensors.torch

from ..integrations.model import trained_state_dict
from .models import tuned_task
from .saving import save_task

WEIGHTS_FILE = "model.safetensors"  # what the Trainer looks for in a checkpoint


def save_checkpoint(model: Any, directory: str, **card: Any) -> None:
    """Write the task in training into `directory`, in two forms.

    The task's bundle, which ``load_task`` reads, and ``model.safetensors`` with the trained parameters (deltas and
    head) under the model's names, from which the Trainer resumes and loads the best model at the end.

    Args:
        model: a lowbit model after ``prepare_scale_tuning``.
        directory: of the checkpoint.
        **card: for the bundle's model card, as in :func:`save_task`.
    """
    save_task(model, directory, name=tuned_task(model), **card)
    trained = {key: t.detach().contiguous() for key, t in trained_state_dict(model).items()}
    safetensors.torch.save_file(trained, os.path.join(directory, WEIGHTS_FILE), metadata={"format": "pt"})
