"""Quantizes the experts of a block, one after the other: each for the inputs that the router sends it.

What the module of experts gets is recorded once. Then an expert at a time computes: the Hessian of its first matrix is
that of its own inputs, and the Hessian of ``down_proj`` that of what its quantized first matrix makes of them. A row
counts as much as the router's weight says: that much of its error goes into the block's output.

The inputs of the float model that belong to them are those of the same tokens, whichever experts these had there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import CalibrationError
from ..matrix import StoredMatrix
from ..quantize import Target, quantize
from ..quantize.calibrated import quantize_for_outputs, without_drift
from ..runtime.expert_forward import chosen, chosen_among_all, expert_forward
from ..runtime.experts import Segment
from ..runtime.known_experts import (
    activated,
    bias_of,
    expert_parameters,
    is_sorted,
    name_of_first,
    normed,
    number_of_experts,
)
from .decoded import decoded
from .effort import Effort
from .hessians import LEAST_ROWS, Call, Collector, arguments_of

LAST = "down_proj"


@dataclass(frozen=True)
class StackResult:
    """A stack whose experts are quantized.

    Attributes:
        matrices: of each expert, all with one scheme.
        unseen: numbers of the experts that too little data reached: they are quantized as without data.
    """

    matrices: tuple[StoredMatrix, ...]
    unseen: tuple[int, ...]


def experts_of(block: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """The names, within a block, that are stacks of experts: by the module of experts, the parameters in it."""
    found: dict[str, list[str]] = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        if leaf in expert_parameters(block.get_submodule(path)):
            found.setdefault(path, []).append(leaf)
    return found


class _Inputs:
    """What a module of experts got for one batch, on the host: rows sorted by expert.

    Args:
        hidden: its input, ``[tokens, columns]``.
        plain: its input in the float model, or None.
        rows: int64 ``[n]``: a row of `hidden` for each choice of the router.
        weights: the router's, ``[n]``; None where the input has them in it already.
        experts: which of the choices are for an expert.
    """

    def __init__(
        self, hidden: Tensor, plain: Tensor | None, rows: Tensor, weights: Tensor | None, experts: dict[int, slice]
    ) -> None:
        self._hidden, self._plain, self._rows = hidden.cpu(), None if plain is None else plain.cpu(), rows.cpu()
        self._weights, self._experts = None if weights is None else weights.float().cpu(), experts

    def of(self, expert: int, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
        """The inputs of an expert, those in the float model, and the weights ``[n, 1]``; None if it got none."""
        here = self._experts.get(expert)
        if here is None:
            return None
        rows = self._rows[here]
        plain = None if self._plain is None else self._plain[rows].float().to(device)
        weights = None if self._weights is None else self._weights[here, None].to(device)
        return self._hidden[rows].float().to(device), plain, weights


def record(module: nn.Module, calls: Iterable[Call]) -> list[_Inputs]:
    """What a module of experts gets in each call that reaches it."""
    found = []
    for mask, seen in arguments_of(module, calls):
        hidden, *routing = seen[0]
        plain = seen[1][0] if len(seen) > 1 else None
        found.append(_inputs(module, hidden.detach(), tuple(routing), plain, mask))
    return found


def _inputs(
    module: Any, hidden: Tensor, routing: tuple[Any, ...], plain: Tensor | None, mask: Tensor | None
) -> _Inputs:
    hidden, experts = hidden.reshape(-1, hidden.shape[-1]), number_of_experts(module) or 0
    plain = None if plain is None else plain.reshape(hidden.shape)
    weights: Tensor | None = None
    if is_sorted(module):
        ids, rows, _ = chosen_among_all(hidden, experts)
        tokens = len(hidden) // experts
        token = rows % tokens
        if plain is not None:  # a token that was for another expert there has no input of this one
            plain = torch.where((plain != 0).any(-1, keepdim=True), plain, hidden)
        hidden, plain = hidden[rows], None if plain is None else plain[rows]
        rows = torch.arange(len(rows), device=rows.device)
    else:
        index, scores = routing
        ids, places, _ = chosen(index, experts)
        tokens, weights = len(index), scores.detach().reshape(-1)[places]
        token = rows = places // index.shape[1]
    if mask is not None and mask.numel() == tokens:
        kept = mask.to(token.device).reshape(-1)[token] != 0
        ids, rows, weights = ids[kept], rows[kept], None if weights is None else weights[kept]
    ends = torch.bincount(ids, minlength=experts).cumsum(0).tolist()
    segments = {e: slice(a, b) for e, (a, b) in enumerate(zip([0, *ends], ends, strict=False)) if a < b}
    return _Inputs(hidden, plain, rows, weights, segments)


def quantize_experts(
    module: nn.Module, targets: Mapping[str, Target], calls: Iterable[Call], effort: Effort, *, path: str
) -> dict[str, StackResult]:
    """Quantize stacks of a module of experts; its parameters become the decoded ones.

    Args:
        module: with float weights, on the device to compute on.
        targets: of its parameters.
        calls: one for each batch.
        effort: how much work to do.
        path: of the module, for messages.

    Returns:
        What came of each parameter; nothing if no call reaches the module.

    Raises:
        CalibrationError: the experts get values that are not finite.
    """
    inputs = record(module, calls)
    if not inputs:
        return {}
    made: dict[str, list[StoredMatrix]] = {name: [] for name in targets}
    parameters = {name: _Parameter(module, name) for name in (name_of_first(module), LAST)}
    unseen = []
    for expert in range(parameters[LAST].count):
        one = _Expert(module, expert, parameters, inputs)
        few = one.rows < LEAST_ROWS
        if few:
            unseen.append(expert)
        for name, parameter in parameters.items():
            if name not in targets:
                continue
            weight, target, said = parameter.original(expert), targets[name], f"{path}.{name}[{expert}]"
            if few:
                plain = replace(target, recognise=False)
                matrix = quantize(weight.cpu().numpy(), plain, name=said).matrix
            else:
                matrix = one.fitted(name, weight, target, effort, said)
            made[name].append(matrix)
            parameter.set(expert, decoded(matrix, weight.device))
    for name in targets:
        parameters[name].replace()
    return {name: StackResult(alike(matrices), tuple(unseen)) for name, matrices in made.items()}


def alike(matrices: Iterable[StoredMatrix]) -> tuple[StoredMatrix, ...]:
    """The matrices with one dtype of parameters: the widest that one of them needs, which holds all others' too."""
    matrices = tuple(matrices)
    wide = next((m.scheme for m in matrices if m.scheme.scale_dtype == "F32"), None)
    return matrices if wide is None else tuple(replace(m, scheme=wide) for m in matrices)


def set_experts(block: nn.Module, name: str, stack: StackResult) -> None:
    """Give a block's parameter of stacked experts what the matrices decode to."""
    path, _, leaf = name.rpartition(".")
    parameter = _Parameter(block.get_submodule(path), leaf)
    for expert, matrix in enumerate(stack.matrices):
        weight = parameter.original(expert)
        weight.copy_(decoded(matrix, weight.device))


def own_matrices(module: nn.Module) -> Callable[[str, int], Tensor]:
    """A function that gives the matrix ``[rows, cols]`` of a parameter and an expert in a module."""
    parameters = {name: _Parameter(module, name) for name in expert_parameters(module)}
    return lambda name, expert: parameters[name].original(expert)


def computing_with(module: Any, weight: Callable[[str, int], Tensor]) -> Callable[..., Any]:
    """A ``forward`` for a module of experts, with other matrices than its own.

    In training, an expert's weights are made again for the gradients: no more than one expert is decoded at a time.

    Args:
        weight: the matrix ``[rows, cols]`` of a parameter and an expert.
    """
    first, last = name_of_first(module), LAST

    def product(name: str, x: Tensor, expert: int) -> Tensor:
        w, bias = weight(name, expert), bias_of(module, name)
        return F.linear(x, w, None if bias is None else bias[expert])

    def one(x: Tensor, expert: int) -> Tensor:
        return normed(module, product(last, activated(module, product(first, x, expert)), expert))

    def experts(module: Any, x: Tensor, segments: Sequence[Segment], *_: Any) -> Tensor:
        return torch.cat([checkpoint(one, x[i:j], e, use_reentrant=False) for e, i, j in segments])

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        return expert_forward(module, experts, *args, *kwargs.values())

    return forward


class _Parameter:
    """A stack in a module, and its decoded weights so far."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module, self._name = module, name
        self._transposed = expert_parameters(module)[name] == "experts_transposed"
        found = getattr(module, name)
        assert isinstance(found, nn.Parameter)  # noqa: S101 - expert_parameters says so; tells the type checker
        self._original, self._new = found.detach(), torch.empty(0)
        self.count = len(found)

    def original(self, expert: int) -> Tensor:
        """The float matrix of an expert, ``[rows, cols]``."""
        return self._turned(self._original[expert])

    def now(self, expert: int) -> Tensor:
        """Its decoded matrix, if there is one."""
        return self._turned(self._new[expert]) if len(self._new) else self.original(expert)

    def set(self, expert: int, weight: Tensor) -> None:
        if not len(self._new):
            self._new = torch.empty_like(self._original)
        self._turned(self._new[expert]).copy_(weight)

    def replace(self) -> None:
        """Give the module the decoded weights."""
        self._module.register_parameter(self._name, nn.Parameter(self._new, requires_grad=False))

    def _turned(self, matrix: Tensor) -> Tensor:
        return matrix.T if self._transposed else matrix


class _Expert:
    """One expert and what it gets.

    Attributes:
        rows: number of its inputs.
    """

    def __init__(
        self, module: nn.Module, expert: int, parameters: Mapping[str, _Parameter], inputs: list[_Inputs]
    ) -> None:
        self._module, self._expert, self._inputs = module, expert, inputs
        self._first, self._device = parameters[name_of_first(module)], parameters[LAST].original(expert).device
        bias = bias_of(module, name_of_first(module))
        self._bias = None if bias is None else bias[expert].detach()
        self.rows = sum(len(x) for x, _, _ in self._all())

    def _all(self) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
        found = (batch.of(self._expert, self._device) for batch in self._inputs)
        return (one for one in found if one is not None)

    def fitted(self, name: str, weight: Tensor, target: Target, effort: Effort, said: str) -> StoredMatrix:
        """The matrix of one stack, for the outputs that it gives."""
        seen = Collector(weight.shape[1], self._device, with_cross=effort.drift)
        for x, plain, weights in self._all():
            y = x if plain is None else plain
            if name == LAST:
                x = self._between(x, self._first.now(self._expert))
                y = self._between(y, self._first.original(self._expert))
            seen.add(x if weights is None else x * weights, None, y if weights is None else y * weights)
        if not bool(torch.isfinite(seen.total).all()):
            raise CalibrationError(
                f"{said}: gets inputs that are not finite; leave out the text that causes them, or keep this block in "
                "full precision"
            )
        if seen.cross is not None:
            weight = without_drift(weight, seen.cross, seen.total)
        return quantize_for_outputs(weight, target, seen.hessian, sweeps=effort.sweeps, name=said).matrix

    def _between(self, x: Tensor, first: Tensor) -> Tensor:
        return activated(self._module, F.linear(x, first, self._bias))
