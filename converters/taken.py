"""Weights that a release has quantized: stored as they are there, code by code."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..container.writer import StoredTensor
from ..errors import ConversionError, QuantizedSourceError
from ..matrix import StoredMatrix
from ..quantize import Quantized
from ..reference import decode
from .experts import store_all
from .journal import Outcome
from .plan import Step
from .source import Grid

_AT_ONCE = 1 << 20  # weights that are decoded at a time


def take_over(step: Step) -> Quantized:
    """The matrix of a step that the release has quantized; its error is 0, in the dtype that the release decodes to."""
    return _quantized(_grid(step).matrix(None))


def take_over_stack(step: Step) -> tuple[list[StoredTensor], Outcome]:
    """As :func:`take_over`, for a stack of experts; raises QuantizedSourceError if they have no scheme in common."""
    stack = step.stack
    assert stack is not None  # noqa: S101 - the driver says so
    found = store_all(stack, map(_quantized, _experts(step)))
    if found is None:
        raise QuantizedSourceError(
            f"{step.path}: its experts have different tables, or parameters of different dtypes, which one stack "
            f"cannot have (EXP-1); keep it as floats (--keep {step.path!r}), or convert the original checkpoint"
        )
    return found


def check_taken(step: Step, written: Iterator[StoredMatrix]) -> None:
    """Raise ConversionError unless the matrices that were written are those of the release."""
    for own, there in zip(_experts(step), written, strict=True):
        if own.scheme != there.scheme or not all(map(np.array_equal, _arrays(own), _arrays(there))):
            raise ConversionError(
                f"{step.path}: holds other codes than the release, which is a fault of lowbit_format or of the disk; "
                "nothing was published. Please run again, and report it if it stays"
            )


def _arrays(matrix: StoredMatrix) -> list[NDArray[np.generic]]:
    found: list[NDArray[np.generic] | None] = [matrix.planes, matrix.params.scales]
    found += [matrix.params.shift, matrix.codebook]
    return [array for array in found if array is not None]


def _experts(step: Step) -> Iterator[StoredMatrix]:
    """The matrix of a step, or those of its experts, one after the other."""
    if step.stack is None:
        yield _grid(step).matrix(None)
        return
    for expert in range(step.stack.shape[0]):
        yield _grid(step).matrix(expert)


def _grid(step: Step) -> Grid:
    assert step.tensor.grid is not None  # noqa: S101 - the plan takes over only what has one
    return step.tensor.grid


def _quantized(matrix: StoredMatrix) -> Quantized:
    norm, rows = 0.0, max(1, _AT_ONCE // matrix.cols)
    for begin in range(0, matrix.rows, rows):
        part = decode(matrix.row_slice(begin, min(matrix.rows, begin + rows))).astype(np.float64)
        norm += float(np.vdot(part, part))
    return Quantized(matrix, 0.0, norm, lossless=True)
