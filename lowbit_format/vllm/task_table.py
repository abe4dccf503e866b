"""What tasks change in one matrix, by slot, looked up for each token of a batch.

vLLM gives each adapter that a batch needs a slot, and keeps the slot of every token in one tensor, which its kernels
for LoRA read. The operators of this library take the same: deltas by task, and the task of each row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import TaskError
from ..kernels.matrix import PlaneMatrix, with_delta
from ..runtime.deltas import Delta

BASE = -1  # in the place of a slot
ROWS, GROUPS = "rows", "groups"  # kinds of tables: one factor for each row, or an addend for each group


@dataclass
class ActiveTasks:
    """The slot of each token in the running batch. One object for all tables of a model.

    Attributes:
        tokens: int64, for each token; more than the batch has. vLLM changes its values, never its place in memory.
        samples: int64, for each row of hidden states that the head gets.
        sample_count: how many of `samples` are valid.
        all: the slot of all tokens if they have the same, :data:`BASE` for none; None if they differ, or on a device
            whose graphs must not depend on it.
    """

    tokens: Tensor
    samples: Tensor
    sample_count: int = 0
    all: int | None = BASE


class TaskTable:
    """Deltas of one matrix.

    Args:
        w: the matrix.
        slots: how many tasks a batch may have.
        kind: :data:`ROWS` or :data:`GROUPS`.
        active: shared with the other tables.
        fixed: make room for deltas of all planes at once, since graphs know the place in memory; else it is made when
            a task needs it.
    """

    def __init__(self, w: PlaneMatrix, slots: int, kind: str, active: ActiveTasks, *, fixed: bool) -> None:
        self.rows, self.groups, self.device, self.slots = w.rows, w.groups, w.planes.device, slots
        self.kind, self.active = kind, active
        self.deltas: Tensor | None = self._empty(len(w.scales)) if fixed else None

    def of_batch(self, rows: int, sampled: bool) -> tuple[Tensor | None, Tensor | None]:
        """Deltas and task ids for the operators, for a product with `rows` rows (see :meth:`.PlanePart.product`)."""
        deltas, active = self.deltas, self.active
        if deltas is None:
            return None, None
        if active.all is not None and not torch.compiler.is_compiling():
            return (None, None) if active.all == BASE else (deltas[active.all : active.all + 1], None)
        if not sampled:
            return deltas, active.tokens[:rows]
        if deltas.device.type == "cpu" and rows != active.sample_count:
            # Log probabilities of a prompt, in a batch of several tasks: vLLM does not say of which task they are.
            return torch.full_like(deltas[:1], float("nan")), None
        return deltas, active.samples[:rows]

    @property
    def nbytes(self) -> int:
        """Memory of all slots."""
        return 0 if self.deltas is None else self.deltas.nbytes

    def set(self, slot: int, delta: Tensor | None) -> None:
        """Put what a task changes into a slot, as :func:`table_delta` gives it; None is nothing."""
        if delta is None:
            if self.deltas is not None:
                self.deltas[slot].fill_(-0.0)  # keeps every scale, also the sign of a zero
            return
        if self.deltas is None or self.deltas.shape[1] < len(delta):
            grown = self._empty(len(delta))
            if self.deltas is not None:
                grown[:, : self.deltas.shape[1]] = self.deltas
            self.deltas = grown
        self.deltas[slot].fill_(-0.0)
        self.deltas[slot, : len(delta)] = delta.to(self.device)

    def _empty(self, planes: int) -> Tensor:
        shape = (planes, self.rows) if self.kind == ROWS else (planes, self.rows, self.groups)
        return torch.full((self.slots, *shape), -0.0, dtype=torch.float32, device=self.device)


def table_delta(delta: Delta, w: PlaneMatrix, kind: str, path: str) -> Tensor:
    """A delta of the matrix `w` as a table of this kind holds it, float32 ``[planes, rows(, groups)]`` on the CPU.

    In a table of groups a factor becomes an addend, ``scale * (1 + delta) - scale``, exact to a rounding of the scale.

    Raises TaskError, which names the module `path`, for what tables of this kind cannot hold.
    """
    if delta.shift is not None or delta.scales is None:
        raise TaskError(
            f"{path}: the task changes offsets or zero points, which kernels do not look up by task; merge it into a "
            "base of its own (lowbit_format.merge_task), or tune it without offsets=True"
        )
    if delta.scales.dim() == 2 and kind == GROUPS:
        scales = w.scales[: len(delta.scales)].float()
        return (with_delta(w, delta.scales.to(scales.device)).scales[: len(scales)] - scales).cpu().contiguous()
    if delta.scales.dim() == 3 and kind == ROWS:
        raise TaskError(
            f'{path}: the task adds to the scales of groups (kind="add"), and the server holds factors of rows; start '
            f"it with LOWBIT_VLLM_TASKS={GROUPS}, which serves both and takes more memory per task"
        )
    return delta.scales.float().cpu().contiguous()
