"""The whole model, of which one block has its weights in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from .blocks import Batch, Blocks, replaced_forward

Weights = Callable[[str], Mapping[str, Tensor]]


def run_whole(model: nn.Module, lists: Sequence[Blocks], batch: Batch, weights: Weights) -> Any:
    """The model's output for a batch.

    With gradients enabled, what a block computes is forgotten and computed again on the way back: memory holds the
    hidden states between blocks, and one block (Chen et al. 2016, arXiv:1604.06174).

    Args:
        model: weights of its blocks need not be there.
        lists: its blocks.
        batch: its inputs.
        weights: called with the path of a block when it is run: its parameters by name within it; with "": parameters
            outside of blocks to use in place of the model's, by name.
    """
    forwards = {
        block: _running(block, blocks.path_of(i), weights) for blocks in lists for i, block in enumerate(blocks.modules)
    }
    with replaced_forward(forwards):
        return functional_call(model, dict(weights("")), kwargs=dict(batch))


def _running(block: nn.Module, path: str, weights: Weights) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _own_forward(block):
            return functional_call(block, dict(weights(path)), args, kwargs)

    return lambda *args, **kwargs: checkpoint(run, *args, use_reentrant=False, **kwargs)


@contextmanager
def _own_forward(block: nn.Module) -> Iterator[None]:
    """The block with the ``forward`` of its class, also while another is in its place."""
    other = block.__dict__.pop("forward", None)
    try:
        yield
    finally:
        if other is not None:
            block.forward = other
