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
from numpy.typing import NDArray

from ..matrix import F32
from ..quantize import Target, quantize
from ..quantize.recognise import recognise
from ..reference import decode
from ..schema import ModuleEntry, Scheme
from ..tensors import stored_bits
from .budget import Option, lower_hull
from .experts import recognised_stack
from .plan import Step
from .recipe import WORDS
from .source import Source
from .steps import load_step

ROWS = 64  # of a matrix, which are quantized at each number of bits
EXPERTS = 4  # of a stack, of which such rows are taken
MOST_BITS = 8
PRICES = 40  # of a bit, at which rows are given bits
PROBE = 3  # bits at which the effect of a kind of modules is measured, see :mod:`.sensitivity`


@dataclass(frozen=True)
class Candidate:
    """A way to store a module.

    Attributes:
        target: how.
        bits: that are stored: the target's, or those of the grid that the weight lies on.
        nbytes: of its tensors.
        damage: see above.
    """

    target: Target
    bits: int
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
        choices: the targets, of falling bits. A weight that lies on a grid already is stored on that with the first of
            them; with the others it is quantized.
        importance: float32 ``[cols]``: mean square of what each column is multiplied with; None: all count the same.
    """
    sample = np.concatenate(list(_samples(source, step)))
    column_weights = np.ones(sample.shape[1]) if importance is None else importance.astype(np.float64)
    norm = float((sample.astype(np.float64) ** 2 @ column_weights).sum())
    found = list[Candidate]()
    if choices[0].recognise and recognise(sample, choices[0], step.tensor.dtype) is not None:
        own = _recognised(source, step, choices[0])
        if own is not None:
            found.append(Candidate(choices[0], own.bits, _nbytes(step, own), 0.0))
            choices = [replace(target, recognise=False) for target in choices]
    for target in choices:
        plain = replace(target, recognise=False, nested=())
        result = quantize(sample, plain, importance=importance, name=step.tensor.name)
        error = (decode(result.matrix).astype(np.float64) - sample) ** 2 @ column_weights
        damage = float(error.sum()) / norm if norm > 0 else 0.0
        found.append(Candidate(target, target.bits, _nbytes(step, target.scheme()), damage))
    return found


def by_rows(step: Step, found: Sequence[Candidate], shares: NDArray[np.float64]) -> list[Candidate]:
    """More candidates: with rows that have bits of their own, each of the least damage for what it takes.

    Args:
        step: of a Linear or Conv1D.
        found: :func:`candidates` of equal rows, in consecutive bits, from the most to the least.
        shares: float64 ``[rows]``: the part of the damage that each row does, see :mod:`.row_shares`.
    """
    most = found[-1].damage
    if not most > 0 or len({replace(c.target, bits=found[0].target.bits, nested=()) for c in found}) > 1:
        return []  # nothing to save; or rows of one matrix would be of several codecs
    bits = np.array([c.target.bits for c in found])
    damages = np.array([c.damage for c in found])
    by_bits = {c.target.bits: c for c in found}
    more: dict[tuple[int, ...], Candidate] = {}
    for price in most * np.geomspace(1, 1e-5, PRICES):  # of a bit of all rows
        free = bits[(shares[:, None] * damages + price / len(shares) * bits).argmin(1)]
        for top in range(bits[-1] + 1, bits[0] + 1):  # more bits in any row may take more parameters in all rows
            rows = tuple(np.minimum(free, top).tolist())
            if max(rows) < top or min(rows) == top or rows in more:
                continue
            target = replace(by_bits[top].target, row_bits=rows, recognise=False)
            damage = float(shares @ damages[bits[0] - np.array(rows)])
            more[rows] = Candidate(target, top, _nbytes(step, target.scheme(), sum(rows)), damage)
    ways = [Option(c.nbytes, c.damage) for c in (*found, *more.values())]
    best = set(lower_hull(ways))
    return [c for c in more.values() if Option(c.nbytes, c.damage) in best]


def _recognised(source: Source, step: Step, target: Target) -> Scheme | None:
    """The grid that the whole weight lies on."""
    if step.stack is not None:
        matrices = recognised_stack(source, step.stack, target)
        return None if matrices is None else matrices[0].scheme
    matrix = recognise(load_step(source, step), target, step.tensor.dtype)
    return None if matrix is None else matrix.scheme


def _nbytes(step: Step, scheme: Scheme, row_bits_sum: int | None = None) -> int:
    module = step.module()
    return -(-stored_bits(ModuleEntry(module.path, scheme, module.kind, module.shape), row_bits_sum) // 8)


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
