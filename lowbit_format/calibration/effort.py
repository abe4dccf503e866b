"""How much work a calibration does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """How much work calibration does.

    Attributes:
        sweeps: of descent in every layer, see :mod:`lowbit_format.quantize.calibrated`.
        steps: of training the scales, offsets and codes of a whole block; 0 leaves this out.
        learning_rate: of scales and offsets, relative to the mean size of a layer's scales.
        drift: layers are fitted to what they give in the float model, and so make up for the errors of those before.
        samples: that are used unless the caller says another number.
        passes: over the samples in which the scales of all layers are trained together; 0 leaves this out.
        end_rate: the learning rate of that, relative to the mean size of a layer's scales.
        codes: those of a block are trained with its scales, see :mod:`.code_choice`.
    """

    sweeps: int
    steps: int
    learning_rate: float
    drift: bool
    samples: int
    passes: int = 0
    end_rate: float = 0.0
    codes: bool = False


EFFORTS = {
    "fast": Effort(sweeps=2, steps=0, learning_rate=0.0, drift=True, samples=32),
    "default": Effort(sweeps=4, steps=192, learning_rate=0.01, drift=True, samples=64, passes=1, end_rate=0.001),
    "high": Effort(
        sweeps=6, steps=800, learning_rate=0.01, drift=True, samples=128, passes=2, end_rate=0.001, codes=True
    ),
}
