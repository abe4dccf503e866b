"""What a conversion with data takes of memory: that of its dearest moment."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from ..calibration import code_choice
from ..calibration.blocks import Batch
from ..calibration.effort import Effort
from ..schema import ModuleEntry
from ..tensors import stored_bits, tensor_specs
from .experts import KINDS
from .plan import BASE_MEMORY, Step

# Bytes of memory for each: weight of a block, float and decoded, and where it has experts, what they become; of the
# largest matrix, with its codes and all that a solver makes of it; of its Hessian's elements; of a value between two
# layers of a block, of which a batch has some dozens for each token and column.
_PER_INSIDE, _PER_INSIDE_EXPERTS, _PER_WEIGHT, _PER_HESSIAN, _PER_VALUE = 8, 10, 64, 20, 4 * 48
# Of what is trained, with gradient and two moments; of the largest matrix, while its codes move; of a prediction, of
# which there are seven for each word and token where two models are compared.
_PER_TRAINED, _PER_MOVED, _PER_LOGIT = 20, 32, 4 * 7


def peak_memory(
    steps: Sequence[Step],
    places: Mapping[int, str | None],
    batches: Sequence[Batch],
    effort: Effort,
    *,
    causal: bool,
    blocks: int,
) -> int:
    """Expected peak of resident memory in bytes.

    Args:
        steps: of the conversion.
        places: path of the block that a step belongs to, by id of the step; None: it is outside of blocks.
        batches: of the data.
        effort: how much work is done.
        causal: the model predicts tokens.
        blocks: their number.
    """
    outside = sum(s.tensor.numel for s in steps if places[id(s)] is None)
    inside: dict[str, int] = {}
    for step in steps:
        if (path := places[id(step)]) is not None:
            inside[path] = inside.get(path, 0) + step.tensor.numel
    layers = [s for s in steps if needs_data(s)]
    largest = max((s.module().rows * s.module().cols for s in layers), default=0)
    widest = max((s.module().cols for s in layers), default=0)
    each: list[int] = [next(iter(batch.values())).numel() for batch in batches]
    stacks = [s for s in layers if s.stack is not None]
    routed = (2 if effort.drift else 1) * sum(each) if stacks else 0
    block = (_PER_INSIDE_EXPERTS if stacks else _PER_INSIDE) * max(inside.values(), default=0)
    values = _PER_VALUE * max(each) * widest
    by_layer = (
        4 * routed * max((s.module().cols for s in stacks), default=0)
        + _PER_WEIGHT * largest
        + _PER_HESSIAN * widest**2
        + values
    )
    training = _of_a_block(layers, places, effort) + values
    if effort.codes:
        training += _PER_MOVED * largest
    tokens: int = max(each)
    logits = 0
    if causal:
        words = max((s.tensor.shape[0] for s in steps if s.destination.kind == "embedding"), default=0)
        logits = _PER_LOGIT * tokens * words
    trained = _trained(s.module() for s in steps if s.to_fit is not None)
    together = trained + logits + (_PER_VALUE + 4 * blocks) * tokens * widest
    return BASE_MEMORY + 4 * outside + block + max(by_layer, training, together)


def needs_data(step: Step) -> bool:
    """Whether a step is fitted to data."""
    return step.to_fit is not None and not step.rounded and step.destination.kind in ("linear", "conv1d", *KINDS)


def _of_a_block(layers: Iterable[Step], places: Mapping[int, str | None], effort: Effort) -> int:
    """Bytes of what is trained of the largest block; beside it are its weights, and what passes through it."""
    if not effort.steps:
        return 0
    found: dict[str, list[ModuleEntry]] = {}
    for step in layers:
        if (path := places[id(step)]) is not None:
            found.setdefault(path, []).append(step.module())
    chosen = code_choice.BYTES if effort.codes else 0
    return max((_trained(m) + chosen * sum(one.numel for one in m) for m in found.values()), default=0)


def _trained(modules: Iterable[ModuleEntry]) -> int:
    """Bytes of modules whose parameters are trained: planes, and parameters with gradient and moments."""
    modules = list(modules)
    packed = sum(-(-stored_bits(m) // 8) for m in modules)
    specs = [spec for m in modules for spec in tensor_specs(m) if spec.dtype != "U8"]
    return packed + _PER_TRAINED * sum(math.prod(spec.shape) for spec in specs)
