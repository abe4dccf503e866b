"""The learning rate, by short trainings.

A short training is the whole one scaled down: fewer steps with their own warm-up and decay, and each step larger by as
much, so that the deltas can go as far. Adam goes about a rate a step, and in short trainings the best rate is as large
as it takes to get far enough: 0.06 to 0.08 in 12 or 20 steps, where 0.01 is best in 96 (phrases of SST-2, MiniLM at 4
bits, batches of 32; ``python -m tools.benchmarks.rates`` makes such a table). A short training with the whole one's own
rates would choose one that is several times too large.
"""

from __future__ import annotations

import math
from collections.abc import Callable, MutableMapping, Sequence

from ..errors import TuningError

RATES = (5e-3, 1e-2, 2e-2)  # of a whole training
FURTHER = 3  # more rates at most, each twice or half the best, while that is at an end
NEAR = 1.03  # times the least loss: of rates that do as well the smallest, since short trainings favour large ones
PART, LEAST, MOST = 8, 20, 150  # a short training has an eighth of the steps, within these


def trial_steps(steps: int) -> int:
    """Steps of a short training for a whole one of `steps`."""
    return min(max(steps // PART, LEAST), MOST, steps)


def trial_rate(rate: float, steps: int) -> float:
    """The rate of a short training that stands for a whole one of `steps` with `rate`."""
    return rate * steps / trial_steps(steps)


def choose_rate(
    trial: Callable[[float], float], losses: MutableMapping[float, float], rates: Sequence[float] = RATES
) -> float:
    """The rate with the least loss after a short training, or the smallest that is :data:`NEAR` it.

    Args:
        trial: gives the loss of the short training that stands for a rate.
        losses: of rates that have been tried, by rate; the others are added.
        rates: to try at first.

    Raises:
        TuningError: all diverged.
    """
    tried = dict[float, float]()

    def try_one(rate: float) -> float:
        if rate not in losses:
            losses[rate] = trial(rate)
        tried[rate] = losses[rate]
        return min(tried, key=lambda r: tried[r])

    best = max(rates)
    for rate in rates:
        best = try_one(rate)
    for _ in range(FURTHER):
        if best not in (min(tried), max(tried)):
            break
        best = try_one(best * (0.5 if best == min(tried) else 2))
    if math.isinf(tried[best]):
        raise TuningError(f"the training diverged at all rates that were tried, {sorted(tried)}; give one: --lr, lr=")
    return min(rate for rate in tried if tried[rate] <= NEAR * tried[best])
