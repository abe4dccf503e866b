"""Tiny lowbit models to tune, their data, and the formula of a tuned weight in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from support.building import write_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from lowbit_format import prepare_scale_tuning, save_task
from lowbit_format.runtime.deltas import Delta
from lowbit_format.runtime.modules import LowbitConv1D, LowbitModule
from lowbit_format.schema import Scheme

SCHEMES = {
    "bcq": Scheme("bcq", 3, 16, "F16", offset=True),
    "bcq-rows": Scheme("bcq", 2, 0, "F32", offset=True),
    "uniform": Scheme("uniform", 4, 16, "F16"),
    "uniform-rows": Scheme("uniform", 3, 0, "F32"),
    "codebook": Scheme("codebook", 3, 16, "F16"),
    "codebook-rows": Scheme("codebook", 2, 0, "F32"),
}

COMMON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertModel(BertConfig(**COMMON, intermediate_size=48, max_position_embeddings=32)),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**COMMON, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=True)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=1)
    ),
}
CLASSES: dict[str, Any] = {  # bert gets a head that its files do not have
    "bert": AutoModelForSequenceClassification,
    "llama": AutoModelForCausalLM,
    "gpt2": AutoModelForCausalLM,
}
TUNED = {  # what is tuned by default: all quantized modules but embeddings and what is tied to them
    "bert": {
        *(f"bert.encoder.layer.{i}.attention.self.{m}" for i in range(2) for m in ("query", "key", "value")),
        *(
            f"bert.encoder.layer.{i}.{m}.dense"
            for i in range(2)
            for m in ("attention.output", "intermediate", "output")
        ),
        "bert.pooler.dense",
    },
    "llama": {
        *(f"model.layers.{i}.self_attn.{m}_proj" for i in range(2) for m in "qkvo"),
        *(f"model.layers.{i}.mlp.{m}_proj" for i in range(2) for m in ("gate", "up", "down")),
    },
    "gpt2": {
        f"transformer.h.{i}.{m}" for i in range(2) for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    },
}
LENGTH = 7  # prime, so that no activation has as many numbers as a matrix


class Bases:
    """Lowbit directories by name of model and of scheme, each written once."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, model: str, scheme: str = "bcq", *, embeddings: bool = True) -> Path:
        """`embeddings`: they are quantized too."""
        path = self.root / f"{model}-{scheme}-{embeddings}"
        if not path.exists():
            torch.manual_seed(0)
            chosen = SCHEMES[scheme]
            write_model(
                MODELS[model](), path, lambda _, m: None if isinstance(m, nn.Embedding) and not embeddings else chosen
            )
        return path

    def load(self, model: str, scheme: str = "bcq", *, embeddings: bool = True, **kwargs: Any) -> Any:
        """The model, in ``eval`` mode, as every process would get it."""
        path = self.path(model, scheme, embeddings=embeddings)
        torch.manual_seed(1)
        return CLASSES[model].from_pretrained(path, **kwargs)


def batch(model: Any, rows: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs with labels."""
    ids = torch.randint(2, 64, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))
    labels = ids[:, 0] % 2 if hasattr(model, "classifier") else ids
    return {"input_ids": ids, "labels": labels}


def loss_of(model: Any, data: Mapping[str, Tensor]) -> Tensor:
    """Of one forward pass."""
    cache = {} if hasattr(model, "classifier") else {"use_cache": False}
    loss: Tensor = model(**data, **cache).loss
    return loss


def logits_of(model: Any) -> Tensor:
    """Of one fixed batch, in ``eval`` mode."""
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=batch(model)["input_ids"]).logits
    return logits


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What requires grad."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def values(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies."""
    return {name: p.detach().clone() for name, p in parameters.items()}


def scatter(model: nn.Module, size: float = 0.1, seed: int = 3) -> None:
    """Give everything in training random values, as if it had been trained."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trained(model).values():
            p.copy_(size * torch.randn(p.shape, generator=draw))


def gradients(model: nn.Module, data: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the loss, of everything in training."""
    model.zero_grad()
    loss_of(model, data).backward()
    return {name: p.grad.clone() for name, p in trained(model).items() if p.grad is not None}


def same(found: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> bool:
    """Bit for bit."""
    return found.keys() == want.keys() and all(torch.equal(found[name], want[name]) for name in want)


def plain_weight(module: LowbitModule, delta: Delta) -> Tensor:
    """The weight ``[rows, cols]`` with a delta, by TSK-8 and DEC-2 to DEC-4, differentiable, in the delta's dtype."""
    w, (change, move) = module.plane_matrix._replace(planes=module.planes), delta
    dtype = next(t.dtype for t in delta if t is not None)
    group = torch.arange(w.cols) // (w.group_size or w.cols)
    bits = ((w.planes[..., None] >> torch.arange(8)) & 1).reshape(*w.planes.shape[:2], -1)[..., : w.cols]
    scales, shift = w.scales.to(dtype), w.offsets if w.codec == "bcq" else w.zeros
    if change is not None:
        first = scales[: len(change)]
        first = first * (1 + change)[..., None] if change.dim() == 2 else first + change
        scales = torch.cat([first, scales[len(change) :]])
    if shift is not None:
        shift = shift.to(dtype) + (0 if move is None else move)
        shift = shift[:, group]
    if w.codec == "bcq":
        weight = ((bits * 2 - 1) * scales[..., group]).sum(0)
        return weight if shift is None else weight + shift
    code = sum(bits[p].long() << (w.bits - 1 - p) for p in range(w.bits))
    level = code if w.codebook is None else w.codebook.to(dtype)[code]
    return (level if shift is None else level - shift) * scales[0][:, group]


def plain_weights(model: nn.Module, deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a float twin of `model` by name, from `deltas` by their parameters' names (both places of a tie)."""
    weights = {}
    for path, module in model.named_modules():
        if isinstance(module, LowbitModule) and module.tuned is not None:
            place = next(p for p, m in model.named_modules() if isinstance(m, LowbitModule) and m.tuned is module.tuned)
            weight = plain_weight(module, Delta(*(deltas.get(f"{place}.tuned.{part}") for part in Delta._fields)))
            weights[f"{path}.weight"] = weight.t() if isinstance(module, LowbitConv1D) else weight
    return weights


def shared_out(model: Any) -> Any:
    """The model after ``fully_shard`` of each block, and then of the rest, over all processes of the group."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    inner = model.base_model
    for block in inner.encoder.layer if hasattr(inner, "encoder") else getattr(inner, "layers", None) or inner.h:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WAYS: dict[str, Callable[[Any], Any]] = {"ddp": nn.parallel.DistributedDataParallel, "fsdp": shared_out}


def worker(rank: int, world: int, base: str, meeting: str, out: str, steps: int) -> None:
    """One of `world` processes: trains on its part of each batch, in each of :data:`WAYS`, and saves the task."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    for way, wrap in WAYS.items():
        torch.manual_seed(1)
        model = AutoModelForSequenceClassification.from_pretrained(base)
        prepare_scale_tuning(model)
        sgd_steps(wrap(model), model, steps, slice(rank, None, world))
        save_task(model, f"{out}/{way}-{rank}")
        if way == "fsdp":  # of the planes each process has a part
            here = sum(p.to_local().nbytes for p in model.parameters())
            Path(out, f"bytes-{rank}").write_text(f"{here} {sum(p.nbytes for p in model.parameters())}")
    torch.distributed.destroy_process_group()


def sgd_steps(wrapped: Any, model: Any, steps: int, part: slice) -> None:
    """SGD with momentum on `part` of each batch, through `wrapped`, which is `model` or stands for it."""
    optimizer = torch.optim.SGD(trained(model).values(), 0.05, momentum=0.9)
    for step in range(steps):
        data = {key: t[part] for key, t in batch(model, 8, seed=step).items()}
        optimizer.zero_grad()
        wrapped(**data).loss.backward()
        optimizer.step()
