"""How much the columns of each matrix count: the mean square of what they are multiplied with in the float model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..calibration.data import Data
from ..matrix import F32
from .blockwise import BlockwiseModel
from .plan import Plan
from .source import Source

BATCHES = 32  # of the data, which are run through the float model once


def importances(source: Source, plan: Plan, data: Data, device: torch.device) -> dict[str, F32]:
    """The importance of the columns of every Linear and Conv1D to quantize, float32 ``[cols]``, by its path.

    A module that no data reach is absent, and so are embeddings and experts, whose inputs are not those of a layer.

    Args:
        source: the checkpoint.
        plan: of its conversion.
        data: of which some batches, but for those held out, go through the model; one block is in memory at a time.
        device: to compute on.

    Raises:
        CalibrationError: the model cannot be run block by block.
    """
    model = BlockwiseModel(source, plan, device)
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    mask: Tensor | None = None

    def seen(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach()
            if mask is not None and x.dim() == 3 and x.shape[:2] == mask.shape:
                x = x[mask != 0]
            x = x.reshape(-1, x.shape[-1]).float()
            sums[path] = sums.get(path, torch.zeros_like(x[0])) + x.square().sum(0)
            rows[path] = rows.get(path, 0) + len(x)

        return add

    hooks = [module.register_forward_pre_hook(seen(step.path)) for step, module in model.layers()]
    try:
        with torch.no_grad():
            for batch in data.batches[: min(BATCHES, len(data.batches) - data.held_out)]:
                there = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                found = there.get("attention_mask")
                mask = found if isinstance(found, Tensor) and found.dim() == 2 else None
                model.run(there)
    finally:
        for hook in hooks:
            hook.remove()
    means = {path: (total / max(1, rows[path])).cpu().numpy() for path, total in sums.items()}
    return {path: mean.astype(np.float32) for path, mean in means.items() if np.isfinite(mean).all() and mean.any()}
