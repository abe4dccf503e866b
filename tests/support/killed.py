"""A conversion in a process of its own that is killed at a chosen moment.

This module is preloaded by multiprocessing's fork server: what it does on import is done once for all conversions.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import conversion_mapping, core_model_loading, pytorch_utils  # noqa: F401 - imported ahead of time

from lowbit_format.calibration.data import Data
from lowbit_format.calibration.effort import Effort
from lowbit_format.converters import Calibration, Recipe, convert_hf_to_lowbit
from lowbit_format.quantize import Target, quantize

OPTIONS: dict[str, Any] = {  # embeddings and head in floats, which fill shards
    "recipe": Recipe(Target(bits=2, group_size=32), embeddings=False, lm_head=False),
    "max_shard_bytes": 25_000,
}
_BATCHES = [{"input_ids": (torch.arange(96) * (7 + i) % 86 + 4).reshape(4, 24)} for i in range(4)]
_EFFORT = Effort(sweeps=1, steps=2, learning_rate=0.01, drift=False, samples=8, passes=1, end_rate=0.02)
CALIBRATED = {**OPTIONS, "calibration": Calibration(Data.of(_BATCHES, held_out=1), _EFFORT)}
_TOUCHES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")

_ = transformers.LlamaForCausalLM
quantize(
    np.eye(40, dtype=np.float32) + np.arange(40, dtype=np.float32), OPTIONS["recipe"].default
)  # loads compiled code


def convert_until(source: Path, out: Path, moment: int, options: dict[str, Any]) -> None:
    """Convert and kill this process at its `moment`-th touch of the output's file system; 0 lets it end.

    The exit code of a process that ends is the number of touches, at most 255.
    """
    touches = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal touches
        if event in _TOUCHES and str(arguments[0]).startswith(str(out.parent)):
            touches += 1
            if touches == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    convert_hf_to_lowbit(str(source), out, **options)
    os._exit(min(touches, 255))
