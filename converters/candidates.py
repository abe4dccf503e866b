"""Candidates of a budget: a module in each number of bits, what it takes then, and the damage that this does.

The damage of a module is its squared error relative to its squared norm. By the linearity theorem of Malinovskii et al.
2024 (HIGGS, arXiv:2411.17525), these add up to the rise of a model's loss, each with a factor of its module, which
:mod:`.sensitivity` measures for its kind; plain squared errors do not, since a norm before or behind a matrix makes up
for its size. With data, each column counts by the mean square of what it is multiplied with: it is the error of the
outputs, as far as columns are independent.

Errors are those of a sample of rows, quantized without data, which ranks bits and modules as all rows do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..matrix import F32
from ..quantize import Target, quantize
from ..quantize.recognise import recognise
from ..reference import decode
from ..schema import ModuleEntry, Scheme
from ..tensors import stored_bits
from .experts import recognised_stack
from .plan import Step
from .recipe import WORDS
from .source import Source
from .steps import load_step

ROWS = 64  # of a matrix, which are quantized at each number of bits
EXPERTS = 4  # of a stack, of which such rows are taken
MOST_BITS = 8
PROBE = 3  # bits at which the effect of a kind of modules is measured, see :mod:`.sensitivity`


@dataclass(frozen=True)
class Candidate:
    """A way to store a module.

    Attributes:
        target: how.
        nbytes: of its tensors.
        damage: see above.
    """

    target: Target
    nbytes: int
    damage: float


def kind_of(path: str) -> str:
    """The kind of a module: the last name of its path that is not a number; an ``up_proj`` of any layer."""
    return next((part for part in reversed(path.split(".")) if not part.isdigit()), path)


def targets(base: Target, least: int, most: int, *, words: bool = False) -> list[Target]:
    """`base` in `most` down to `least` bits, with nested precisions that are lower. Of `words`, 8 bits are WORDS."""
    found = []
    for bits in range(most, least - 1, -1):
        nested = tuple(k for k in base.nested if k < bits)
        found.append(WORDS if words and bits == WORDS.bits else replace(base, bits=bits, nested=nested))
    return found


def candidates(source: Source, step: Step, choices: Sequence[Target], importance: F32 | None = None) -> list[Candidate]:
    """What a module takes and how much damage it does, with each of the targets.

    Args:
        source: the checkpoint.
        step: of the plan; the module that it makes.
        choices: the targets. A weight that lies on a grid already is stored on that, whatever the target.
        importance: float32 ``[cols]``: mean square of what each column is multiplied with; None: all count the same.
    """
    sample = np.concatenate(list(_samples(source, step)))
    column_weights = np.ones(sample.shape[1]) if importance is None else importance.astype(np.float64)
    norm = float((sample.astype(np.float64) ** 2 @ column_weights).sum())
    if choices[0].recognise and recognise(sample, choices[0], step.tensor.dtype) is not None:
        own = _recognised(source, step, choices[0])
        if own is not None:
            return [Candidate(target, _nbytes(step, own), 0.0) for target in choices]
    found = []
    for target in choices:
        plain = replace(target, recognise=False, nested=())
        result = quantize(sample, plain, importance=importance, name=step.tensor.name)
        error = (decode(result.matrix).astype(np.float64) - sample) ** 2 @ column_weights
        damage = float(error.sum()) / norm if norm > 0 else 0.0
        found.append(Candidate(target, _nbytes(step, target.scheme()), damage))
    return found


def _recognised(source: Source, step: Step, target: Target) -> Scheme | None:
    """The grid that the whole weight lies on."""
    if step.stack is not None:
        matrices = recognised_stack(source, step.stack, target)
        return None if matrices is None else matrices[0].scheme
    matrix = recognise(load_step(source, step), target, step.tensor.dtype)
    return None if matrix is None else matrix.scheme


def _nbytes(step: Step, scheme: Scheme) -> int:
    module = step.module()
    return -(-stored_bits(ModuleEntry(module.path, scheme, module.kind, module.shape)) // 8)


def _samples(source: Source, step: Step) -> Iterator[F32]:
    """Rows from all over a matrix, or from all over some of the experts of a stack."""
    if step.stack is None:
        yield _rows(load_step(source, step), ROWS)
        return
    experts = step.stack.shape[0]
    for expert in sorted(set(np.linspace(0, experts - 1, min(EXPERTS, experts)).astype(int).tolist())):
        yield _rows(step.stack.matrix(source, expert), ROWS // EXPERTS)


def _rows(weight: F32, count: int) -> F32:
    chosen = np.unique(np.linspace(0, len(weight) - 1, min(count, len(weight))).astype(int))
    return np.ascontiguousarray(weight[chosen])
