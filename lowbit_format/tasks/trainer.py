"""A callback for the Hugging Face ``Trainer``: it checks that there is a task to train, and fills in model cards."""

from __future__ import annotations

import functools
from typing import Any

import transformers

from ..errors import TuningError
from .checkpoint import save_checkpoint
from .models import tuned_task, unwrapped


class TaskCallback(transformers.TrainerCallback):
    """Give it to the ``Trainer`` that trains a model after :func:`prepare_scale_tuning`.

    A training without a task is refused at its start, and the model cards of checkpoints say what `card` does. The
    Trainer's checkpoints hold the task also without this callback, kilobytes each: its bundle, which ``load_task``
    reads, and ``model.safetensors`` with the trained parameters, from which the Trainer resumes and loads the best
    model at the end. Optimizer, scheduler and random state are in the Trainer's files.

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
        inner.lowbit_save = functools.partial(save_checkpoint, **self.card)
