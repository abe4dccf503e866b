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

LOG = ("seeds", "derivatives", "rates")  # of the state, what has a row for each step
NOW = ("seed", "eps", "clip", "lr", "initial_lr")  # what the steps to come depend on
SHAPE = ("groups", "sizes")  # what the optimizer that loads the state must have itself
KEPT = ("seed", "eps", "clip", *LOG)  # attributes that a copy has


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
        self.eps, self.clip, self.seed = eps, clip, seed
        self.seeds, self.derivatives = list[int](), list[float]()
        self.rates = list[tuple[float, ...]]()
        super().__init__(params, {"lr": lr})

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
        self.rates.append(tuple(float(group["lr"]) for group in self.param_groups))
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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. Raises TuningError behind a step: the group's directions in the steps so far are not known."""
        if self.seeds:
            raise TuningError(
                f"this optimizer has made {len(self.seeds)} steps without these parameters; add groups before the first"
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold. Torch names what it keeps, and would leave the steps behind."""
        return {**super().__getstate__(), **{name: getattr(self, name) for name in KEPT}}

    def state_dict(self) -> dict[str, Any]:
        """The training so far, and what the rest of it depends on; tensors, so that safetensors hold it too.

        ``seeds`` int64 ``[steps]``, ``derivatives`` float64 ``[steps]``, ``rates`` float64 ``[steps, groups]``;
        ``seed`` uint8, an integer of any length, little-endian; ``eps`` and ``clip`` float64 ``[]``; ``lr`` and
        ``initial_lr`` float64 ``[groups]``, the present rates and those that a scheduler began with, NaN without one;
        ``groups`` and ``sizes`` int64 ``[parameters]``: the number of each one's group, and of its values.
        """
        seed, groups = int(self.seed), self.param_groups
        return {
            "seeds": torch.tensor(self.seeds, dtype=torch.int64),
            "derivatives": torch.tensor(self.derivatives, dtype=torch.float64),
            "rates": torch.tensor(self.rates, dtype=torch.float64).reshape(len(self.seeds), len(groups)),
            "seed": torch.tensor(
                list(seed.to_bytes(seed.bit_length() // 8 + 1, "little", signed=True)), dtype=torch.uint8
            ),
            "eps": torch.tensor(self.eps, dtype=torch.float64),
            "clip": torch.tensor(self.clip, dtype=torch.float64),
            "lr": torch.tensor([float(g["lr"]) for g in groups], dtype=torch.float64),
            "initial_lr": torch.tensor([float(g.get("initial_lr", math.nan)) for g in groups], dtype=torch.float64),
            "groups": torch.tensor([i for i, g in enumerate(groups) for _ in g["params"]], dtype=torch.int64),
            "sizes": torch.tensor([p.numel() for p in self._parameters()], dtype=torch.int64),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Repeat the steps of a training, bit for bit, and take over its seed, `eps`, `clip` and present rates.

        The parameters must have the values that that training began with, and this optimizer has made no step.

        Raises TuningError for a state of another optimizer, other groups or other sizes of parameters, or behind a
        step. Nothing has changed then.
        """
        if self.seeds:
            raise TuningError("this optimizer has made steps already; load a state into a fresh one")
        if missing := [name for name in (*LOG, *NOW, *SHAPE) if not isinstance(state_dict.get(name), Tensor)]:
            raise TuningError(f"the state has no {missing[0]}: it is not that of a ZerothOrder optimizer")
        seeds, derivatives, rates = (state_dict[name] for name in LOG)
        groups = len(self.param_groups)
        present = [state_dict[name].shape for name in ("lr", "initial_lr")]
        if rates.shape != (len(seeds), groups) or len(derivatives) != len(seeds) or present != [(groups,)] * 2:
            raise TuningError(
                f"the state has rates {list(rates.shape)} for {len(seeds)} steps, and this optimizer has "
                f"{groups} groups of parameters"
            )
        self._check_parameters(state_dict)
        self.seed = int.from_bytes(bytes(state_dict["seed"].tolist()), "little", signed=True)
        self.eps, self.clip = float(state_dict["eps"]), float(state_dict["clip"])
        for group, lr, initial in zip(
            self.param_groups, state_dict["lr"].tolist(), state_dict["initial_lr"].tolist(), strict=True
        ):
            group["lr"] = lr
            if not math.isnan(initial):
                group["initial_lr"] = initial
        self.seeds, self.derivatives = seeds.tolist(), derivatives.tolist()
        self.rates = [tuple(row) for row in rates.tolist()]
        for step in range(len(self.seeds)):
            self._move(step)

    def _check_parameters(self, state: dict[str, Any]) -> None:
        """Raise TuningError if a state is not of as many parameters, of the same sizes, in the same groups."""
        own = self.state_dict()
        theirs, mine = (list(zip(*(s[name].tolist() for name in SHAPE), strict=False)) for s in (state, own))
        if len(theirs) != len(mine):
            raise TuningError(f"the state is of {len(theirs)} parameters, and this optimizer has {len(mine)}")
        for i, (found, expected) in enumerate(zip(theirs, mine, strict=True)):
            if found != expected:
                raise TuningError(
                    f"parameter {i} has {found[1]} numbers and is in group {found[0]} in the state, and has "
                    f"{expected[1]} and is in group {expected[0]} here; give the same parameters in the same order"
                )


def _seed_of(seed: int, step: int) -> int:
    """32 bits, as many as torch's generator on a CPU takes."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=4).digest(), "little")


def _normal(seed: int) -> Callable[[Tensor], Tensor]:
    """Gives for one parameter after the other its part of a direction; drawn on the CPU, the same for every device."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def draw(p: Tensor) -> Tensor:
        return torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p.device, p.dtype)

    return draw
