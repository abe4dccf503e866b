"""Modules of transformers that hold experts as stacked matrices, and how they compute with them.

Since version 5, such a module has parameters of three dimensions, ``gate_up_proj`` and ``down_proj`` (or ``up_proj``
where there is no gate), and nearly all of them share one interface: ``forward(hidden_states, top_k_index,
top_k_weights)``, which transformers' decorator ``use_experts_implementation`` may compute in other ways. What it may
replace, :mod:`.expert_forward` may replace too. The few other classes that are known stand here by name.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

SORTED = ("Llama4TextExperts",)  # classes that get the rows of every expert, sorted, instead of a router's choice
GROUPED = ("JetMoeParallelExperts",)  # classes of one product each, which get the rows and how many are for each expert
ROUTED = ("LongcatFlashExperts", "Step3p7Experts")  # classes with the decorator's interface, but without it
_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")


def expert_parameters(module: nn.Module) -> dict[str, str]:
    """The stacks of matrices that `module` multiplies with, each by name with its kind (CFG-5).

    Empty for modules whose forward is not known. Stacks that are lowbit modules already are among them.
    """
    own: Any = module
    if is_grouped(module):
        return {"weight": "experts"} if _is_stack(getattr(own, "weight", None)) else {}
    if is_sorted(module):
        transposed = True
    elif _is_one_of(module, ROUTED) and hasattr(own, "act_fn") and number_of_experts(own) is not None:
        transposed = False
    elif hasattr(own, "_apply_gate") and hasattr(own, "is_transposed"):  # the decorator's marks
        transposed = bool(own.is_transposed)
    else:
        return {}
    kind = "experts_transposed" if transposed else "experts"
    return {name: kind for name in _PARAMETERS if _is_stack(getattr(own, name, None))}


def is_sorted(module: nn.Module) -> bool:
    """Whether the forward of `module` takes ``[experts * tokens, hidden]``, every token for every expert."""
    return _is_one_of(module, SORTED)


def is_grouped(module: nn.Module) -> bool:
    """Whether the forward of `module` takes rows sorted by expert, and how many are for each expert."""
    return _is_one_of(module, GROUPED)


def number_of_experts(module: Any) -> int | None:
    """How many experts of `module` have matrices: those in front, where others have none."""
    found: int | None = getattr(module, "num_routed_experts", getattr(module, "num_experts", None))
    return found


def passes_on(module: nn.Module) -> bool:
    """Whether experts without matrices give what they get, as LongCat's do; else a choice of such a one means none."""
    return bool(getattr(module, "zero_expert_num", 0))


def _is_one_of(module: nn.Module, names: tuple[str, ...]) -> bool:
    return any(cls.__name__ in names for cls in type(module).__mro__)


def name_of_first(module: nn.Module) -> str:
    """Name of the stack that the inputs of the module go into."""
    has_gate = "gate_up_proj" in module._parameters or "gate_up_proj" in module._modules
    return "gate_up_proj" if has_gate else "up_proj"


def bias_of(module: Any, name: str) -> Tensor | None:
    """The biases ``[experts, rows]`` that go with the stack `name`, if it has some."""
    bias: Tensor | None = getattr(module, f"{name}_bias", None) if getattr(module, "has_bias", False) else None
    return bias


def activated(module: Any, up: Tensor) -> Tensor:
    """What goes into ``down_proj``, of what the first stack and its bias give, ``[n, rows]``."""
    found: Tensor
    if name_of_first(module) == "up_proj":
        found = module.act_fn(up)
    elif is_sorted(module):
        gate, up = up.chunk(2, dim=-1)
        found = up * module.act_fn(gate)
    elif hasattr(module, "_apply_gate"):
        found = module._apply_gate(up)
    else:
        gate, up = up.chunk(2, dim=-1)
        found = module.act_fn(gate) * up
    return found


def normed(module: Any, out: Tensor) -> Tensor:
    """What experts give, of what ``down_proj`` and its bias give."""
    found: Tensor = module.post_expert_norm(out) if getattr(module, "has_post_expert_norm", False) else out
    return found


def _is_stack(value: Any) -> bool:
    if isinstance(value, nn.Module):
        return str(getattr(value, "kind", "")).startswith("experts")
    return isinstance(value, nn.Parameter) and value.ndim == 3
