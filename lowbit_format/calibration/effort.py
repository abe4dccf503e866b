"""How much work a calibration does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """How much work calibration does.

    Attributes:
        sweeps: of descent in every layer, see :mod:`lowbit_format.quantize.calibrated`.
        steps: of training the scales and offsets of a whole block; 0 leaves this out.
        learning_rate: of these, relative to the mean size of a layer's scales.
        drift: layers are fitted to what they give in the float model, and so make up for the errors of those before.
        samples: that are used unless the caller says another number.
    """

    sweeps: int
    steps: int
    learning_rate: float
    drift: bool
    samples: int


EFFORTS = {
    "fast": Effort(sweeps=2, steps=0, learning_rate=0.0, drift=True, samples=32),
    "default": Effort(sweeps=4, steps=48, learning_rate=0.01, drift=True, samples=64),
    "high": Effort(sweeps=6, steps=200, learning_rate=0.01, drift=True, samples=128),
}
