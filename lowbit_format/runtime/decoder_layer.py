"""A decoder layer that computes the next token of each row in few calls.

Between its products a layer is some sixty operations of torch, and with one token each takes longer to begin than to
compute. :class:`DecoderLayer` stands in front of the class of a layer that is built as Llama's is (Touvron et al. 2023,
arXiv:2302.13971): norm, attention with rotary positions, residual; norm, gated MLP with SiLU, residual. On a CPU it
computes a single token of a few rows itself: with one launch for all before attention and one for all behind it, in
float32. Everything else is left to the class behind it: prompts, training, compiled graphs, hooks on parts, parts that
something has replaced, other ways of attention.

How a layer is built is known from its parts, and not from its name. What its code does with them is not: so before the
first such token both ways compute one, and where they differ the layer is left as it is (Granite's, which multiplies
its residuals, has the same parts).
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ..kernels import operators
from .activations import exactly
from .class_mixin import Mixin, mix_in, restore_class
from .modules import LowbitLinear

if TYPE_CHECKING:
    from ..kernels.cpu.layer_steps import LayerSteps, Parts

log = logging.getLogger(__name__)

MOST_ROWS = 8  # of a batch; more take so long that the calls do not count
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of the largest number of a result
_CONTEXT = 3  # tokens before the one that is computed both ways
_KNOWN = {"attention_mask", "position_ids", "past_key_values", "use_cache", "position_embeddings", "cache_position"}

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION, _HEAD_NORMS = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"q_norm", "k_norm"}
_MLP, _ACTIVATION = {"gate_proj", "up_proj", "down_proj"}, "act_fn"


class DecoderLayer(Mixin):
    """Mixin in front of a decoder layer's class.

    Attributes:
        same_with: the classes of the layer's parts with which both ways gave the same; empty if they did not; None
            before they were compared.
    """

    same_with: tuple[type, ...] | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the class behind it; the result has the dtype of `hidden_states`, ``[batch, tokens, columns]``."""
        if not args and _is_one_token(hidden_states, kwargs) and _is_plain(self):
            if self.same_with is None and (same := self._is_same(hidden_states, kwargs)) is not None:
                self.same_with = _classes(self) if same else ()
            if self.same_with and self.same_with == _classes(self):
                out = _next_token(self, hidden_states, kwargs)
                if out is not None:
                    return out
        return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]

    def _is_same(self, x: Tensor, kwargs: dict[str, Any]) -> bool | None:
        """Whether both ways give the same for `x`, behind tokens of random numbers in a cache of its own.

        None if they cannot be compared now: a task is in training, a part is replaced, or `x` is not finite.
        """
        if not is_built_so(self) or not bool(x.isfinite().all()):  # type: ignore[arg-type]
            return None
        products = [part for part in _parts(self) if isinstance(part, LowbitLinear)]
        try:
            with exactly(products):  # rounding would make much of the order of sums
                off = self._difference(x, kwargs)
        except Exception:  # a class that wants something else behind the same parts
            log.debug("%s is computed as its class does", type(self).__name__, exc_info=True)
            return False
        if off is None or off <= TOLERANCES[x.dtype]:
            return None if off is None else True
        log.debug("%s is computed as its class does: the shorter way is off by %.1e", type(self).__name__, off)
        return False

    def _difference(self, x: Tensor, kwargs: dict[str, Any]) -> float | None:
        cos, _ = kwargs["position_embeddings"]
        generator = torch.Generator().manual_seed(0)

        def random(like: Tensor) -> Tensor:
            shape = (like.shape[0], _CONTEXT, *like.shape[2:])
            return torch.randn(shape, generator=generator).to(like.dtype)

        angles = random(cos[..., : cos.shape[-1] // 2]).repeat(1, 1, 2)
        before, cache = random(x) * x.float().std().to(x.dtype), DynamicCache()
        options = {**kwargs, "attention_mask": None, "past_key_values": cache}
        behind: Any = super()
        behind.forward(before, **{**options, "position_embeddings": (angles.cos(), angles.sin()), "position_ids": None})
        twin = copy.deepcopy(cache)
        want = behind.forward(x, **options)
        found = _next_token(self, x, {**options, "past_key_values": twin})
        if found is None:
            return None
        return float((want.float() - found.float()).abs().max() / want.float().abs().max())


def shorten_layers(model: nn.Module) -> None:
    """Put :class:`DecoderLayer` in front of the layers of `model` that are built so."""
    for module in model.modules():
        if not isinstance(module, DecoderLayer) and is_built_so(module):
            mix_in(DecoderLayer, module)


def restore_layers(model: nn.Module) -> None:
    """Undo :func:`shorten_layers`."""
    for module in model.modules():
        if isinstance(module, DecoderLayer):
            restore_class(module)
            vars(module).pop("same_with", None)


def is_built_so(layer: nn.Module) -> bool:
    """Whether a module has the parts of such a layer, with lowbit products."""
    parts: Any = layer._modules
    if set(parts) != _LAYER:
        return False
    attention, mlp = parts["self_attn"], parts["mlp"]
    attention_parts, mlp_parts = set(attention._modules), set(mlp._modules)
    if attention_parts - _HEAD_NORMS != _ATTENTION or mlp_parts - {_ACTIVATION} != _MLP:
        return False
    products = [attention._modules[name] for name in _ATTENTION] + [mlp._modules[name] for name in _MLP]
    norms = [parts["input_layernorm"], parts["post_attention_layernorm"]]
    norms += [attention._modules[name] for name in attention_parts & _HEAD_NORMS]
    return (
        all(type(product) is LowbitLinear for product in products)
        and all(set(norm._parameters) == {"weight"} and hasattr(norm, "variance_epsilon") for norm in norms)
        and "silu" in type(getattr(mlp, _ACTIVATION, None)).__name__.lower()
        and all(hasattr(attention, name) for name in ("config", "head_dim", "scaling", "layer_idx"))
    )


def _is_one_token(x: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether a call is a decoding step on a CPU, without gradients, and asks for nothing else."""
    if operators.is_watched() or torch.is_grad_enabled() or type(x) is not Tensor or x.dtype not in TOLERANCES:
        return False
    cos, mask = (kwargs.get("position_embeddings") or (None,))[0], kwargs.get("attention_mask")
    return (
        x.dim() == 3
        and x.shape[1] == 1
        and 0 < x.shape[0] <= MOST_ROWS
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and type(cos) is Tensor
        and cos.dim() == 3  # positions of images have one axis more
        and cos.shape[0] in (1, x.shape[0])
        and (mask is None or (mask.dim() == 4 and mask.shape[1] == 1))  # the same for all heads
        and all(value is None or value is False for key, value in kwargs.items() if key not in _KNOWN)
    )


def _is_plain(layer: Any) -> bool:
    """Whether the layer does not train, attends as expected, and nothing listens to its parts."""
    if layer.training or layer._modules["self_attn"].config._attn_implementation != "sdpa":
        return False
    if torch.nn.modules.module._global_forward_hooks or torch.nn.modules.module._global_forward_pre_hooks:
        return False
    return not any(p._forward_hooks or p._forward_pre_hooks or "forward" in p.__dict__ for p in _parts(layer))


def _parts(layer: Any) -> list[Any]:
    parts = layer._modules
    return [*parts.values(), *parts["self_attn"]._modules.values(), *parts["mlp"]._modules.values()]


def _classes(layer: Any) -> tuple[type, ...]:
    return tuple([type(part) for part in _parts(layer)])


def _next_token(layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """The layer's result for one token of each row, ``[batch, 1, columns]``; None where tasks need other calls."""
    batch = hidden.shape[0]
    attention = layer._modules["self_attn"]
    parts, dim = _parts_now(layer, batch), attention.head_dim
    angles = [t.reshape(-1, t.shape[-1]).float().contiguous() for t in kwargs["position_embeddings"]]
    if parts is None or angles[0].shape[-1] != dim:
        return None
    with _steps(layer, parts, batch) as steps:
        x = hidden.reshape(batch, -1).float().contiguous()
        q, k, v = steps.before(x, parts, *angles)
        heads = k.shape[1] // dim
        keys, values = (t.view(batch, heads, 1, dim).to(hidden.dtype) for t in (k, v))
        if (cache := kwargs.get("past_key_values")) is not None:
            keys, values = cache.update(keys, values, attention.layer_idx)
        # The heads that share keys are as good as several tokens of one head: so nothing is repeated.
        q = q.view(batch, heads, -1, dim).to(keys.dtype)
        seen = F.scaled_dot_product_attention(q, keys, values, kwargs.get("attention_mask"), scale=attention.scaling)
        out = steps.after(x, seen.reshape(batch, -1).float(), parts)
    return out.to(hidden.dtype).view(batch, 1, -1)


def _parts_now(layer: Any, batch: int) -> Parts | None:
    """What the layer computes with at this step; None where tasks need other calls."""
    from ..kernels.cpu.layer_steps import Norm, Parts

    parts = layer._modules
    heads, gates = parts["self_attn"]._modules, parts["mlp"]._modules
    factors = {}
    for of in (heads, gates):
        for name, part in of.items():
            if name.endswith("_proj"):
                if (factor := part.factor(batch)) is None:
                    return None
                factors[name] = factor
    first, second, *of_heads = (
        Norm(part._parameters["weight"], part.variance_epsilon)
        for part in (
            parts["input_layernorm"],
            parts["post_attention_layernorm"],
            *(heads[name] for name in ("q_norm", "k_norm") if name in heads),
        )
    )
    return Parts(factors, (first, second), tuple(of_heads), parts["self_attn"].head_dim)


# Jobs know addresses, so copies of a layer must not have them: they are kept beside it. A call takes one and puts it
# back, so that no two threads have the same.
_kept: weakref.WeakKeyDictionary[nn.Module, dict[tuple[int, ...], list[LayerSteps]]] = weakref.WeakKeyDictionary()


@contextmanager
def _steps(layer: nn.Module, parts: Parts, batch: int) -> Iterator[LayerSteps]:
    from ..kernels.cpu.layer_steps import LayerSteps  # compilers load slowly

    shapes = (
        batch,
        parts.dim,
        len(parts.head_norms),
        *(n for f in parts.factors.values() for n in (f.w.rows, f.w.cols)),
    )
    known = _kept.setdefault(layer, {})
    if shapes not in known:
        known.clear()
    free = known.setdefault(shapes, [])
    steps = free.pop() if free else LayerSteps(parts, batch)
    yield steps
    free.append(steps)
