"""The forward of a module of experts that holds packed matrices, in front of its own class.

All else of the float module stays: activation, gate, biases, norms. Rows that a router sends to one expert are
multiplied together, and experts that none is sent to are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UnsupportedOperationError
from ..tensors import all_roles
from .class_mixin import Mixin, mix_in, restore_class
from .experts import LowbitExperts, Segment
from .known_experts import (
    activated,
    bias_of,
    is_grouped,
    is_sorted,
    name_of_first,
    normed,
    number_of_experts,
    passes_on,
)

_ROLES = all_roles()


class ExpertForward(Mixin):
    """Mixin in front of a module of experts, some of whose parameters are :class:`LowbitExperts` now.

    Their tensors can be read and set by the names of the file, such as ``gate_up_proj_planes`` (EXP-1): so loaders
    find them.
    """

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # which experts are chosen is data
    def forward(self, hidden_states: Tensor, *routing: Any, **named: Any) -> Tensor:
        """As the float module: ``[tokens, hidden]`` to the same, or of sorted experts (see :func:`is_sorted`)."""
        if is_grouped(self):  # type: ignore[arg-type]
            return _grouped_forward(self, hidden_states, *routing, **named)
        return expert_forward(self, _experts, hidden_states, *routing, *named.values())

    def __getattr__(self, name: str) -> Any:
        if (found := _stack_of(self, name)) is not None:
            return getattr(*found)
        return super().__getattr__(name)  # type: ignore[misc]

    def __setattr__(self, name: str, value: Any) -> None:
        if (found := _stack_of(self, name)) is not None:
            setattr(*found, value)
        else:
            super().__setattr__(name, value)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        found: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, found, errors)  # type: ignore[misc]
        unexpected += [name for name in found if _stack_of(self, name.removeprefix(prefix)) is None]
        for name, stack in self._modules.items():
            if isinstance(stack, LowbitExperts):
                stack.load_own(state_dict, f"{prefix}{name}.", metadata, strict, missing, errors)


def put_in(parent: nn.Module, name: str, stack: LowbitExperts) -> None:
    """Put `stack` in the place of the parameter `name` of a module of experts."""
    if not isinstance(parent, ExpertForward):
        mix_in(ExpertForward, parent)
    delattr(parent, name)
    parent.add_module(name, stack)


def take_out(parent: Any, name: str, parameter: nn.Parameter) -> None:
    """Undo :func:`put_in`."""
    delattr(parent, name)
    parent.register_parameter(name, parameter)
    if not any(isinstance(m, LowbitExperts) for m in parent.children()):
        restore_class(parent)


def _stack_of(module: Any, name: str) -> tuple[LowbitExperts, str] | None:
    """Which stack and role the name of a tensor in the file means; None if none."""
    modules: dict[str, Any] = module.__dict__.get("_modules", {})
    for own, stack in modules.items():
        role = name[len(own) + 1 :]
        if isinstance(stack, LowbitExperts) and role in _ROLES and name == f"{own}_{role}":
            return (stack, role) if stack._parameters.get(role) is not None else None
    return None


# What experts make of rows sorted by expert: module, rows, segments, and for each row its expert and token; all tokens.
Experts = Callable[[Any, Tensor, Sequence[Segment], Tensor, Tensor, int], Tensor]


def expert_forward(module: Any, experts: Experts, hidden: Tensor, *routing: Tensor) -> Tensor:
    """What a module of experts gives for its arguments, where `experts` computes what each expert makes of its rows."""
    if is_sorted(module):
        return _sorted_forward(module, experts, hidden)
    index, weights = routing
    return _routed_forward(module, experts, hidden, index, weights)


def _routed_forward(module: Any, experts: Experts, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The experts' part of a layer.

    Args:
        module: of experts.
        hidden: ``[tokens, hidden]``.
        index: int64 ``[tokens, k]``: the experts of each token; numbers behind the last one with matrices mean none, or
            one that gives what it gets.
        weights: float ``[tokens, k]``.

    Raises UnsupportedOperationError if there are more weights, or fewer.
    """
    if weights.numel() != index.numel():
        raise UnsupportedOperationError(
            f"{type(module).__name__} gets weights {list(weights.shape)} for chosen experts {list(index.shape)}, "
            "expected as many: so does PhiMoE in transformers 5.0, which is wrong with float weights too; install a "
            "newer transformers"
        )
    tokens, k = index.shape
    if tokens == 1 and (out := _of_one_token(module, experts, hidden, index[0])) is not None:
        return (out * weights.reshape(-1, 1)).sum(0, keepdim=True).to(hidden.dtype)
    ids, rows, segments = chosen(index, number_of_experts(module) or 0)
    factors, slots = weights.reshape(-1, 1), None
    if segments:
        token = rows // k
        out = experts(module, hidden[token], segments, ids, token, tokens) * factors[rows]
        # the usual case is that every slot is filled
        slots = torch.empty_like(out) if len(rows) == tokens * k else out.new_zeros(tokens * k, out.shape[1])
        slots = slots.index_copy(0, rows, out)
    if passes_on(module) and len(rows) < tokens * k:
        rest = (index.reshape(-1) >= (number_of_experts(module) or 0)).nonzero()[:, 0]
        same = hidden[rest // k] * factors[rest]
        slots = same.new_zeros(tokens * k, same.shape[1]) if slots is None else slots
        slots = slots.index_copy(0, rest, same.to(slots.dtype))
    if slots is None:
        return torch.zeros_like(hidden)
    return slots.view(tokens, k, -1).sum(1).to(hidden.dtype)


def _of_one_token(module: Any, experts: Experts, hidden: Tensor, ids: Tensor) -> Tensor | None:
    """What each chosen expert gives for the only token, ``[k, hidden]``; None if some choice means no expert.

    Nothing need be sorted or gathered here. In a decode step that would take a tenth of the layer's time.
    """
    chosen = ids.tolist()
    if not chosen or max(chosen) >= (number_of_experts(module) or 0):
        return None
    segments = [(expert, i, i + 1) for i, expert in enumerate(chosen)]
    return experts(module, hidden.expand(len(chosen), -1), segments, ids, torch.zeros_like(ids), 1)


def _sorted_forward(module: Any, experts: Experts, hidden: Tensor) -> Tensor:
    """As :func:`_routed_forward` for ``[experts * tokens, hidden]``, zeros where a token is not for an expert.

    Those give zeros, since there is no bias: they are not computed.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    ids, at, segments = chosen_among_all(rows, module.num_experts)
    if not segments:
        return torch.zeros_like(rows)
    count = len(rows) // module.num_experts
    out = experts(module, rows[at], segments, ids, at % count, count).to(rows.dtype)
    return torch.zeros_like(rows).index_copy(0, at, out)


def _grouped_forward(module: Any, inputs: Tensor, expert_size: Any) -> Tensor:
    """One product of rows ``[n, cols]`` that are sorted by expert, with the number of rows of each expert."""
    sizes = expert_size.tolist() if isinstance(expert_size, Tensor) else list(expert_size)
    ids = [expert for expert, size in enumerate(sizes) for _ in range(size)]
    segments = segments_of(ids, len(sizes))
    if not segments:
        return inputs.new_zeros(0, module.weight.rows)
    out: Tensor = module.weight.products(inputs, segments)
    return out


def _experts(module: Any, x: Tensor, segments: Sequence[Segment], ids: Tensor, token: Tensor, tokens: int) -> Tensor:
    """What the experts make of `x`, whose rows are sorted by expert."""
    up = activated(module, _product(module, name_of_first(module), x, segments, ids, token, tokens))
    out = _product(module, "down_proj", up, segments, ids, token, tokens)
    return normed(module, out)


def _product(
    module: Any, name: str, x: Tensor, segments: Sequence[Segment], ids: Tensor, token: Tensor, tokens: int
) -> Tensor:
    """`x` by the matrices of parameter `name`, and its bias."""
    stack = getattr(module, name)
    if isinstance(stack, LowbitExperts):
        out = stack.products(x, segments, token, tokens)
    else:  # kept in full precision
        transposed = is_sorted(module) or getattr(module, "is_transposed", False)
        out = torch.cat([F.linear(x[i:j], stack[e].t() if transposed else stack[e]) for e, i, j in segments])
    bias = bias_of(module, name)
    return out if bias is None else out + bias[ids]


def chosen(index: Tensor, experts: int) -> tuple[Tensor, Tensor, list[Segment]]:
    """What a router chose, in the order of experts.

    Args:
        index: int64 ``[tokens, k]``: the experts of each token; numbers behind the last expert mean none.
        experts: their number.

    Returns:
        The expert of each choice, its place in ``index.flatten()``, and the choices of each expert.
    """
    ids, places = torch.sort(index.reshape(-1), stable=True)
    segments = segments_of(ids.tolist(), experts)
    count = segments[-1][2] if segments else 0  # behind it are choices of no expert
    return ids[:count], places[:count], segments


def chosen_among_all(rows: Tensor, experts: int) -> tuple[Tensor, Tensor, list[Segment]]:
    """As :func:`chosen`, where a module gets all tokens for every expert, ``[experts * tokens, hidden]``: those that
    are for it are not all zeros. The places are those of rows."""
    at = (rows != 0).any(-1).nonzero()[:, 0]
    ids = at // (len(rows) // experts)
    return ids, at, segments_of(ids.tolist(), experts)


def segments_of(ids: list[int], experts: int) -> list[Segment]:
    """Runs of equal numbers in a sorted list, without those from `experts` on."""
    found: list[Segment] = []
    begin = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or ids[i] != ids[begin]:
            if ids[begin] < experts:
                found.append((ids[begin], begin, i))
            begin = i
    return found
