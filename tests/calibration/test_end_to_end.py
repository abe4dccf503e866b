"""The whole model block by block gives its own output and gradients; training scales together lowers the divergence."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import ARCHITECTURES

from lowbit_format.calibration.blocks import find_blocks
from lowbit_format.calibration.effort import Effort
from lowbit_format.calibration.end_to_end import divergence, tune
from lowbit_format.calibration.trained_matrix import TrainedMatrix
from lowbit_format.calibration.whole import run_whole
from lowbit_format.errors import CalibrationError
from lowbit_format.quantize import Target, quantize

IDS = torch.arange(2, 26).reshape(2, 12)
WORK = Effort(sweeps=1, steps=0, learning_rate=0.0, drift=False, samples=8, passes=20, end_rate=0.02)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_blocks_in_turn_give_the_output_and_the_gradients_of_the_model(name: str) -> None:
    torch.manual_seed(0)
    model: Any = ARCHITECTURES[name]().eval()
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.use_cache = False
    batch = {"input_ids": IDS} | ({"decoder_input_ids": IDS[:, :5]} if name == "t5" else {})
    model(**batch)[0].square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        whole = model(**batch)[0]
    lists = find_blocks(model)
    leaves: dict[str, dict[str, torch.Tensor]] = {}
    for blocks in lists:
        for i, block in enumerate(blocks.modules):
            leaves[blocks.path_of(i)] = {n: p.detach().clone().requires_grad_() for n, p in block.named_parameters()}
            block.to("meta")
    found = run_whole(model, lists, batch, lambda path: leaves.get(path, {}))[0]
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
    found.square().sum().backward()
    for path, tensors in leaves.items():
        for inner, leaf in tensors.items():
            torch.testing.assert_close(leaf.grad, expected[f"{path}.{inner}"], rtol=1e-4, atol=1e-6)
    assert all("forward" not in block.__dict__ for blocks in lists for block in blocks.modules)


class Regression:
    """A layer whose weight is to give what another gives; see :class:`lowbit_format.calibration.end_to_end.Samples`."""

    batches = 3

    def __init__(self, trained: TrainedMatrix, weight: torch.Tensor) -> None:
        self.trained, self.weight = trained, weight
        self.x = torch.randn(self.batches, 2, 7, weight.shape[1])

    def wanted(self, batch: int) -> Any:
        return SimpleNamespace(logits=self.x[batch] @ self.weight.T)

    def found(self, batch: int) -> Any:
        return SimpleNamespace(logits=self.x[batch] @ self.trained.weight().T)

    def mask(self, batch: int) -> torch.Tensor:
        return torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1] * 7])


@pytest.mark.parametrize(
    "target", [Target(bits=2, group_size=8), Target("uniform", bits=3, group_size=8), Target("codebook", group_size=0)]
)
def test_it_lowers_the_divergence_and_gives_what_can_be_stored(target: Target) -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 24)
    matrix = quantize(weight.numpy(), target).matrix
    trained = TrainedMatrix(matrix, torch.device("cpu"))
    samples = Regression(trained, weight)
    losses = tune([trained], samples, WORK)
    assert len(losses) == samples.batches * WORK.passes
    assert np.mean(losses[-3:]) < 0.95 * np.mean(losses[:3])
    stored = trained.stored()
    assert np.array_equal(stored.planes, matrix.planes)
    assert np.array_equal(stored.params.scales, stored.params.scales.astype(np.float16))
    trained.round()
    assert np.array_equal(trained.stored().params.scales, stored.params.scales)
    assert tune([TrainedMatrix(matrix, torch.device("cpu"))], Regression(trained, weight), WORK)  # starts anew


def test_a_divergence_that_is_not_finite_is_told() -> None:
    weight = torch.randn(16, 24)
    trained = TrainedMatrix(quantize(weight.numpy(), Target(bits=2)).matrix, torch.device("cpu"))
    samples = Regression(trained, weight)
    samples.x[1] = torch.nan
    with pytest.raises(CalibrationError, match="not finite"):
        tune([trained], samples, WORK)


def test_divergence_looks_at_the_tokens_that_count() -> None:
    p, q = torch.randn(2, 4, 9), torch.randn(2, 4, 9)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    found = divergence(SimpleNamespace(logits=p), SimpleNamespace(logits=q), mask)
    a, b = p.log_softmax(-1), q.log_softmax(-1)
    assert float(found) == pytest.approx(float((b.exp() * (b - a)).sum(-1)[mask != 0].mean()), rel=1e-5)
    hidden = divergence((p,), (q,), mask)
    away, size = (p - q)[mask != 0], q[mask != 0]
    assert float(hidden) == pytest.approx(float(away.square().mean() / size.var(correction=0)), rel=1e-5)
