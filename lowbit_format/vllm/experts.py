"""Stacks of experts: a layer of vLLM in which each token is computed by the few experts that a router chooses.

The file has one stack of matrices for gate and up, and one for down (EXP rules). Here each expert's matrix is a part of
its own (:mod:`.parts`). A product of a step goes expert by expert, over the rows that are for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from ..errors import LoadError
from ..schema import ModuleEntry
from .parts import PlanePart
from .slices import Cut, Slice

GATE_UP, DOWN = "gate_up_proj", "down_proj"  # the stacks of a layer, by their names in the file
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}


class LowbitExpertsMethod(FusedMoEMethodBase):
    """A layer of experts, all of them in one process.

    Args:
        path: of the layer.
        stacks: entries of the file by their names in the layer.
        bits: precision to read at; None is the file's.
        layer: of vLLM.

    Raises:
        LoadError: it names the layer, and what of it cannot be served.
    """

    def __init__(self, path: str, stacks: dict[str, ModuleEntry], bits: int | None, layer: Any) -> None:
        super().__init__(layer.moe_config)
        self.path, self.stacks, self.bits = path, stacks, bits
        config = layer.moe_config
        activation = str(getattr(config.activation, "value", config.activation))
        parallel = config.moe_parallel_config
        reasons = {
            f"has {', '.join(sorted(stacks))} quantized, and not {GATE_UP} and {DOWN}": set(stacks) != {GATE_UP, DOWN},
            "is cut by tensor or expert parallelism": parallel.tp_size > 1 or parallel.ep_size > 1,
            "has biases": bool(getattr(config, "has_bias", False)),
            f"has the activation {activation!r}": activation not in ACTIVATIONS or not config.is_act_and_mul,
            "clips its activation": any(
                getattr(config, name, None) is not None for name in ("swiglu_limit", "swiglu_alpha", "swiglu_beta")
            ),
            "is transposed in the file": any(entry.kind != "experts" for entry in stacks.values()),
            "weights inputs instead of results": bool(getattr(layer, "apply_router_weight_on_input", False)),
        }
        if found := [reason for reason, is_so in reasons.items() if is_so]:
            raise LoadError(
                f"{path}: this plugin does not serve such quantized experts: the layer {' and '.join(found)}; load the "
                "model with transformers"
            )
        self.act = ACTIVATIONS[activation]

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make the parts, without data; LoadError where a stack does not fit the layer."""
        inner, device = intermediate_size_per_partition, torch.empty(0).device
        expected = {GATE_UP: (num_experts, 2 * inner, hidden_size), DOWN: (num_experts, hidden_size, inner)}
        for name, entry in self.stacks.items():
            if entry.shape != expected[name]:
                raise LoadError(f"{entry.path} is {list(entry.shape)} in the file, vLLM expects {list(expected[name])}")
        self.parts = {name: list(self._parts(entry, device)) for name, entry in self.stacks.items()}
        layer.lowbit_experts = nn.ModuleDict({name: nn.ModuleList(parts) for name, parts in self.parts.items()})
        layer.load_weights = self._load  # vLLM's own knows no tensors but those of weights

    def _parts(self, stack: ModuleEntry, device: torch.device) -> Iterator[PlanePart]:
        for number in range(stack.shape[0]):
            one = replace(stack, path=f"{stack.path}.{number}", kind="linear", shape=stack.shape[1:])
            yield PlanePart([Cut(one, Slice.whole(one))], bits=self.bits, device=device)

    def _load(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        for name, tensor in weights:
            stack = next((stack for stack in self.stacks if name.startswith(f"{stack}_")), None)
            if stack is None:
                raise LoadError(f"vLLM loads {name!r} of {self.path}, which the file's stacks do not have")
            role = name.removeprefix(f"{stack}_")
            for number, part in enumerate(self.parts[stack]):
                part.load(role, tensor if role == "codebook" else tensor[number])
            yield name

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that all tensors have been loaded."""
        for parts in self.parts.values():
            for part in parts:
                if part.missing:
                    raise LoadError(f"vLLM's class of this model has not loaded {part.missing[0]!r} from the files")

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """Each row of `x` ``[tokens, hidden]`` by its experts ``topk_ids`` ``[tokens, k]``, weighted and summed."""
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for number in set(topk_ids.flatten().tolist()):
            rows, place = (topk_ids == number).nonzero(as_tuple=True)
            gate, up = self.parts[GATE_UP][number].product(x[rows], None, sampled=False).chunk(2, -1)
            result = self.parts[DOWN][number].product(self.act(gate) * up, None, sampled=False)
            out.index_add_(0, rows, result.float() * topk_weights[rows, place, None])
        return out.to(x.dtype)
