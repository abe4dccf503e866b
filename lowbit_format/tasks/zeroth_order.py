"""An optimizer with the memory of inference: the gradient's place is taken by two forward passes.

MeZO (Malladi et al. 2023, arXiv:2305.17333) measures the loss at ``p + eps * z`` and at ``p - eps * z``, where z are
normal numbers. Their difference over ``2 * eps`` is the derivative g in the direction z, and the step is
``p -= lr * g * z``. There is no backward pass, so nothing is kept for one; z is drawn from a seed whenever it is
needed. As in QZO (arXiv:2505.13430), only scales move (here their deltas), never codes, and g is clipped: a single wild
one ends a training of quantized weights.

So a training *is* its seeds and derivatives. Replayed onto the numbers that it began with they give the same bits, and
they are what a checkpoint holds: some twenty bytes for a step, whatever the size of the model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TuningError

LOG = ("seeds", "derivatives", "rates")


class ZerothOrder(torch.optim.Optimizer):
    """Trains without a backward pass: ``optimizer.step(lambda: model(**batch).loss)``.

    The model should be in evaluation mode: dropout would make the two losses those of different models. Schedulers of
    torch work as with any optimizer.

    Args:
        params: parameters or groups of them, such as those that ``prepare_scale_tuning`` left to train.
        lr: learning rate, smaller the more numbers are trained: a step has noise in the direction of each.
        eps: how far to either side the loss is measured, in the units of the parameters.
        clip: the largest derivative, of either sign.
        seed: of all directions.

    Attributes:
        derivatives: one for each step, clipped.

    Raises TuningError for a rate, `eps` or `clip` that is not positive.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-4, *, eps: float = 1e-3, clip: float = 100.0, seed: int = 0
    ) -> None:
        for name, value in (("eps", eps), ("clip", clip)):
            if not value > 0:
                raise TuningError(f"{name} is {value}, expected more than 0")
        if not lr >= 0:
            raise TuningError(f"the learning rate is {lr}, expected 0 or more")
        super().__init__(params, {"lr": lr})
        self.eps, self.clip, self.seed = eps, clip, seed
        self.seeds, self.derivatives = list[int](), list[float]()
        self.rates = list[tuple[float, ...]]()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor | float] | None = None) -> float:  # type: ignore[override]
        """Make one step; returns the mean of the two losses.

        Args:
            closure: computes the loss of a batch, the same one each time. It runs in inference mode.

        Raises:
            TuningError: a loss is not finite, or there is no closure. The parameters are as they were.
        """
        if closure is None:
            raise TuningError("this optimizer measures losses: give step a function that computes that of the batch")
        seed = _seed_of(self.seed, len(self.seeds))
        start = [p.detach().clone() for p in self._parameters()]
        try:
            high = self._loss_at(start, self.eps, seed, closure)
            low = self._loss_at(start, -self.eps, seed, closure)
        finally:
            for p, value in zip(self._parameters(), start, strict=True):
                p.copy_(value)
        if not (math.isfinite(high) and math.isfinite(low)):
            raise TuningError(f"the loss is {high} and {low} at step {len(self.seeds)}: the learning rate is too large")
        self.seeds.append(seed)
        self.derivatives.append(max(-self.clip, min(self.clip, (high - low) / (2 * self.eps))))
        self.rates.append(tuple(group["lr"] for group in self.param_groups))
        self._move(len(self.seeds) - 1)
        return (high + low) / 2

    def _loss_at(self, start: list[Tensor], eps: float, seed: int, closure: Callable[[], Tensor | float]) -> float:
        draw = _normal(seed)
        for p, value in zip(self._parameters(), start, strict=True):
            p.copy_(value.add(draw(p), alpha=eps))
        with torch.inference_mode():
            return float(closure())

    def _move(self, step: int) -> None:
        """What step number `step` changes."""
        draw = _normal(self.seeds[step])
        for group, rate in zip(self.param_groups, self.rates[step], strict=True):
            for p in group["params"]:
                p.add_(draw(p), alpha=-rate * self.derivatives[step])

    def _parameters(self) -> Iterator[nn.Parameter]:
        for group in self.param_groups:
            yield from group["params"]

    def state_dict(self) -> dict[str, Any]:
        """The training so far: ``seeds`` int64 ``[steps]``, ``derivatives`` float64 ``[steps]``, and ``rates`` float64
        ``[steps, groups]``."""
        return {
            "seeds": torch.tensor(self.seeds, dtype=torch.int64),
            "derivatives": torch.tensor(self.derivatives, dtype=torch.float64),
            "rates": torch.tensor(self.rates, dtype=torch.float64).reshape(len(self.seeds), len(self.param_groups)),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Repeat the steps of a training, bit for bit.

        The parameters must have the values that that training began with, and this optimizer has made no step.

        Raises TuningError for a state of another optimizer or other groups, or behind a step.
        """
        if self.seeds:
            raise TuningError("this optimizer has made steps already; load a state into a fresh one")
        if missing := [name for name in LOG if not isinstance(state_dict.get(name), Tensor)]:
            raise TuningError(f"the state has no {missing[0]}: it is not that of a ZerothOrder optimizer")
        seeds, derivatives, rates = (state_dict[name] for name in LOG)
        if rates.shape != (len(seeds), len(self.param_groups)) or len(derivatives) != len(seeds):
            raise TuningError(
                f"the state has rates {list(rates.shape)} for {len(seeds)} steps, and this optimizer has "
                f"{len(self.param_groups)} groups of parameters"
            )
        self.seeds, self.derivatives = seeds.tolist(), derivatives.tolist()
        self.rates = [tuple(row) for row in rates.tolist()]
        for step in range(len(self.seeds)):
            self._move(step)


def _seed_of(seed: int, step: int) -> int:
    """32 bits, as many as torch's generator on a CPU takes."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=4).digest(), "little")


def _normal(seed: int) -> Callable[[Tensor], Tensor]:
    """Gives for one parameter after the other its part of a direction; drawn on the CPU, the same for every device."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def draw(p: Tensor) -> Tensor:
        return torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p.device, p.dtype)

    return draw
