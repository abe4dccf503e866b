"""One step of a plan, carried out: a tensor of the checkpoint becomes the tensors to write."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..container.writer import StoredTensor, module_tensors
from .journal import Outcome
from .plan import Plan, Step, Taken
from .quantizer import Quantizer
from .source import Source, as_float32
from .taken import take_over, take_over_stack

Carried = tuple[list[StoredTensor], Outcome | None]  # tensors to write, and the outcome if they are quantized


def load_step(source: Source, step: Step) -> NDArray[Any]:
    """A tensor to quantize as a float32 matrix ``[rows, cols]``; a tensor to keep as its bytes.

    Nothing of a stack of experts, which is read an expert at a time, or of what is taken over as it is.
    """
    if step.stack is not None or isinstance(step.target, Taken):
        return np.empty(0, np.float32)
    raw = source.read(step.tensor.name)
    if step.target is None:
        return raw
    weight = as_float32(raw, step.tensor)
    return np.ascontiguousarray(weight.T) if step.destination.kind == "conv1d" else weight


def carry_out(quantizer: Quantizer, source: Source, step: Step, data: NDArray[Any]) -> Carried:
    """What a step comes to; `data` is what :func:`load_step` has read for it.

    Raises:
        SourceError, QuantizationError: it cannot be read or quantized.
    """
    if step.target is None:
        return [StoredTensor(step.tensor.name, step.tensor.dtype, step.tensor.shape, data)], None
    if step.stack is not None:
        taken = isinstance(step.target, Taken)
        return take_over_stack(step) if taken else quantizer.quantize_stack(source, step)
    result = take_over(step) if isinstance(step.target, Taken) else quantizer.quantize(step, data)
    module = replace(step.module(), scheme=result.matrix.scheme)
    tensors = module_tensors(module, result.matrix)
    nbytes = sum(t.nbytes for t in tensors)
    return tensors, Outcome(module, nbytes, result.squared_error, result.squared_norm, result.lossless, result.widened)


def identity(source: Source, plan: Plan) -> str:
    """A digest of everything that what the steps come to depends on: the checkpoint, the plan, this library."""
    steps = [(s.tensor.name, s.path, None if s.target is None else asdict(s.target)) for s in plan.steps]
    text = json.dumps([__version__, source.identity, steps, plan.tied], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
