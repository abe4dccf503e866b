"""The learning rate, by short trainings.

A short training is a whole one scaled down: its own warm-up, its own decay to zero. Figures are in
``tools/benchmarks/README.md``.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping

from ..errors import TuningError

RATES = (5e-3, 1e-2, 2e-2)
FURTHER = 2  # more rates at most, each twice or half the best, while that is at an end
PART, LEAST, MOST = 8, 20, 150  # a short training has an eighth of the steps, within these


def trial_steps(steps: int) -> int:
    """Steps of a short training for a whole one of `steps`."""
    return min(max(steps // PART, LEAST), MOST, steps)


def choose_rate(trial: Callable[[float], float], losses: MutableMapping[float, float]) -> float:
    """The rate with the least loss after a short training.

    Args:
        trial: gives the loss of a rate.
        losses: of rates that have been tried, by rate; the others are added.

    Raises:
        TuningError: all diverged.
    """

    def loss(rate: float) -> float:
        if rate not in losses:
            losses[rate] = trial(rate)
        return losses[rate]

    tried = {rate: loss(rate) for rate in RATES}
    for _ in range(FURTHER):
        best = min(tried, key=lambda rate: tried[rate])
        if best not in (min(tried), max(tried)):
            break
        further = best * (0.5 if best == min(tried) else 2)
        tried[further] = loss(further)
    best = min(tried, key=lambda rate: tried[rate])
    if tried[best] == float("inf"):
        raise TuningError(
            f"the training diverged at all rates that were tried, {sorted(tried)}; give one with --lr (lr=)"
        )
    return best
