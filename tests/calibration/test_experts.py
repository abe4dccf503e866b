"""Experts in calibration: what each gets, and computing with other matrices than the module's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.experts import build
from torch import Tensor

from lowbit_format.calibration.decoded import decoded
from lowbit_format.calibration.effort import Effort
from lowbit_format.calibration.experts import (
    alike,
    computing_with,
    experts_of,
    own_matrices,
    quantize_experts,
    record,
)
from lowbit_format.calibration.hessians import Call, Collector, find_stages
from lowbit_format.quantize import Target, quantize

TOKENS, COLS = 200, 32
TARGET = Target(bits=2, group_size=16)


def module_of(name: str) -> Any:
    """The last module of experts of a model."""
    found = [m for path, m in build(name).named_modules() if path.endswith(".experts")]
    return found[-1]


def routed(seed: int = 0, experts: int = 4, k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the experts of each token, and their weights, as a router gives them."""
    generator = torch.Generator().manual_seed(seed)
    hidden, scores = (torch.randn(TOKENS, n, generator=generator) for n in (COLS, experts))
    weights, index = scores.softmax(-1).topk(k)
    return hidden, index, weights


def arguments(module: Any, seed: int = 0) -> tuple[Tensor, ...]:
    if type(module).__name__ != "Llama4TextExperts":
        return routed(seed)
    hidden, index, weights = routed(seed, k=1)  # all tokens for each expert, those that are not for it as zeros
    scores = torch.zeros(TOKENS, 4).scatter(1, index, weights)
    return ((hidden * scores.T[:, :, None]).reshape(-1, COLS),)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "llama4", "nemotron-h"])
def test_computing_with_its_own_matrices_is_the_modules_forward(name: str) -> None:
    module = module_of(name)
    for p in module.parameters():
        p.requires_grad_(False)
    expected = module(*arguments(module))
    own = own_matrices(module)
    one = own("down_proj", 1).clone().requires_grad_()
    forward = computing_with(module, lambda n, e: one if (n, e) == ("down_proj", 1) else own(n, e))
    found = forward(*arguments(module))
    torch.testing.assert_close(found.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)
    found.sum().backward()
    assert one.grad is not None
    assert float(one.grad.abs().sum()) > 0


@pytest.mark.parametrize("name", ["mixtral", "llama4"])
def test_each_expert_gets_what_the_router_sends_it(name: str) -> None:
    module, mask = module_of(name), (torch.arange(TOKENS) % 3 > 0).reshape(2, -1).long()
    quantized, plain = arguments(module, 0), arguments(module, 1)
    (inputs,) = record(module, [Call(lambda: module(*quantized), lambda: module(*plain), mask)])
    kept, seen = mask.flatten() > 0, 0
    for expert in range(4):
        found = inputs.of(expert, torch.device("cpu"))
        assert found is not None
        x, y, weights = found
        assert y is not None
        if name == "mixtral":
            hidden, index, scores = quantized
            token, place = torch.where((index == expert) & kept[:, None])
            assert weights is not None
            assert torch.equal(x, hidden[token])
            assert torch.equal(y, plain[0][token])  # those of the same tokens, whichever experts they had
            assert torch.equal(weights[:, 0], scores[token, place])
        else:
            own, other = (part[0].reshape(4, TOKENS, COLS)[expert] for part in (quantized, plain))
            token = torch.where((own != 0).any(-1) & kept)[0]
            assert weights is None
            assert torch.equal(x, own[token])
            has_other = (other[token] != 0).any(-1)
            assert torch.equal(y, torch.where(has_other[:, None], other[token], own[token]))
        seen += len(x)
    assert seen == int(kept.sum()) * (2 if name == "mixtral" else 1)


def output_error(module: Any, original: Any, inputs: tuple[Tensor, ...]) -> float:
    with torch.no_grad():
        return float((module(*inputs) - original(*inputs)).square().sum())


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_what_the_experts_give_is_nearer_than_without_data(name: str) -> None:
    effort = Effort(sweeps=2, steps=0, learning_rate=0.0, drift=True, samples=1)
    module, original, inputs = module_of(name), module_of(name), routed()
    mixed = torch.randn(COLS, COLS, generator=torch.Generator().manual_seed(3)) / 4
    inputs = (inputs[0] @ mixed, *inputs[1:])  # columns that have to do with each other
    names = experts_of(module, ["gate_up_proj", "down_proj", "act_fn"])
    assert names == {"": ["gate_up_proj", "down_proj"]}
    call = Call(lambda: module(*inputs), lambda: original(*inputs), None)
    with torch.no_grad():
        found = quantize_experts(module, dict.fromkeys(names[""], TARGET), [call], effort, path="experts")
    assert {n: (len(s.matrices), s.unseen) for n, s in found.items()} == dict.fromkeys(names[""], (4, ()))
    own, plain = own_matrices(module), own_matrices(original)
    for n in names[""]:
        for expert in range(4):
            expected = decoded(found[n].matrices[expert], torch.device("cpu"))
            assert torch.equal(own(n, expert), expected)
    with_data = output_error(module, original, inputs)
    with torch.no_grad():
        for n in names[""]:
            for expert in range(4):
                alone = quantize(np.ascontiguousarray(plain(n, expert).numpy()), TARGET).matrix
                own(n, expert).copy_(decoded(alone, torch.device("cpu")))
    assert with_data < 0.7 * output_error(module, original, inputs)


def test_scales_of_all_experts_get_the_widest_dtype() -> None:
    weight = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)
    narrow, wide = quantize(weight, TARGET).matrix, quantize(weight * 1e-6, TARGET).matrix
    assert (narrow.scheme.scale_dtype, wide.scheme.scale_dtype) == ("F16", "F32")
    found = alike([narrow, wide, narrow])
    assert [m.scheme for m in found] == [wide.scheme] * 3
    cpu = torch.device("cpu")
    assert torch.equal(decoded(found[0], cpu), decoded(narrow, cpu))
    assert alike([narrow, narrow]) == (narrow, narrow)


def test_a_module_of_experts_is_a_stage_of_its_own() -> None:
    model = build("qwen2-moe")
    block, seen = model.model.layers[0], []
    hook = block.register_forward_pre_hook(lambda m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    model(torch.arange(4, 16)[None])
    hook.remove()
    layers = [f"mlp.shared_expert.{n}_proj" for n in ("gate", "up", "down")]
    args, kwargs = seen[0]
    stages = find_stages(block, layers, lambda: block(*args, **kwargs), alone=["mlp.experts"])
    assert ["mlp.experts"] in [stage.layers for stage in stages]
    assert sorted(n for stage in stages for n in stage.layers) == sorted([*layers, "mlp.experts"])


def test_padding_is_left_out_of_tokens_in_one_row_too() -> None:
    x, mask = torch.randn(12, 4), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]])
    flat, whole = (Collector(4, torch.device("cpu")) for _ in range(2))
    flat.add(x, mask)
    whole.add(x.reshape(3, 4, 4), mask)
    assert flat.rows == whole.rows == 6
    assert torch.equal(flat.total, whole.total)
