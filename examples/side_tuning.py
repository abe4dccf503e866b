"""What side tuning keeps in memory for its backward pass, beside LoRA.

    python examples/side_tuning.py BASE [--tokens 128] [--batch-size 16]

BASE is a lowbit model of the BERT kind: directory or Hub id. For each method one step is made on random tokens. Printed
are the numbers in training, and the bytes that autograd keeps from the forward pass until the backward pass. The
methods are in the folder methods/ beside this file; they know nothing of low-bit models.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from methods.ladder import Ladder
from methods.side import SideTuned
from methods.unipt import ParallelTuning
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel

import lowbit_format as lb


class Classifier(nn.Linear):
    """A head on the first token of ``[batch, tokens, width]``."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[batch, labels]``."""
        return super().forward(x[:, 0])


class WithHead(nn.Module):
    """A model and a head on its last hidden state."""

    def __init__(self, model: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.model, self.head = model, head

    def forward(self, **inputs: Any) -> Tensor:
        """Logits ``[batch, labels]``."""
        return self.head(self.model(**inputs).last_hidden_state)


def lora(model: Any, width: int, layers: int) -> nn.Module:
    """LoRA of rank 8 on every linear layer."""
    return WithHead(get_peft_model(model, LoraConfig(target_modules="all-linear", r=8)), Classifier(width, 2))


def ladder(model: Any, width: int, layers: int) -> nn.Module:
    """Ladder side tuning at an eighth of the width."""
    return SideTuned(model, Ladder(width, layers, reduction=8), Classifier(width, 2))


def unipt(model: Any, width: int, layers: int) -> nn.Module:
    """UniPT at an eighth of the width."""
    return SideTuned(model, ParallelTuning(width, layers + 1, reduction=8), Classifier(width, 2))


METHODS: dict[str, Callable[[Any, int, int], nn.Module]] = {"LoRA": lora, "ladder": ladder, "UniPT": unipt}


def main(arguments: Sequence[str] | None = None) -> None:
    """Make one step with each method, and print what it takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="lowbit model of the BERT kind: directory or Hub id")
    parser.add_argument("--tokens", type=int, default=128, help="of each sentence (default: 128)")
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args(arguments)

    for name, make in METHODS.items():
        torch.manual_seed(0)
        model = lb.from_pretrained(options.base, model_class=AutoModel)
        config = model.config
        tuned = make(model, config.hidden_size, config.num_hidden_layers).train()
        ids = torch.randint(config.vocab_size, (options.batch_size, options.tokens))
        numbers = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
        nbytes = kept_for_backward(tuned, ids, torch.arange(options.batch_size) % 2)
        print(f"{name}: {numbers:,} numbers in training, {nbytes / 1e6:.1f} MB kept for the backward pass")


def kept_for_backward(tuned: nn.Module, ids: Tensor, labels: Tensor) -> int:
    """Bytes of the tensors that one step keeps for its backward pass, without the model's parameters."""
    with torch.no_grad():
        tuned(input_ids=ids[:1], attention_mask=torch.ones_like(ids[:1]))  # planes move into the layout of the kernels
    ours = {p.untyped_storage().data_ptr() for p in tuned.parameters()}
    kept = dict[int, torch.UntypedStorage]()  # the storages themselves, so that no address is given twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = nn.functional.cross_entropy(tuned(input_ids=ids, attention_mask=torch.ones_like(ids)), labels)
    loss.backward()
    return sum(storage.nbytes() for storage in kept.values())


if __name__ == "__main__":
    main()
