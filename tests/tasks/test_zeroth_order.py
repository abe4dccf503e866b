"""Training by two forward passes: the derivative is one of a known loss, steps repeat bit for bit, memory is a copy."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tuning_models import Bases, batch, loss_of, trained, values
from torch import Tensor, nn

import lowbit_format as lb
from lowbit_format.errors import TuningError
from lowbit_format.tasks.zeroth_order import ZerothOrder

pytestmark = pytest.mark.usefixtures("one_thread")


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 40), (7,), (1, 1))]


def equal(a: list[nn.Parameter], b: list[nn.Parameter]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@settings(max_examples=20)
@given(seed=st.integers(0, 2**64), rates=st.lists(st.floats(1e-4, 1e-1), min_size=1, max_size=6), cut=st.integers(0, 6))
def test_a_training_repeats_bit_for_bit(seed: int, rates: list[float], cut: int) -> None:
    """From its seeds and derivatives, at once or by halves, with rates that a scheduler changes."""

    def run(params: list[nn.Parameter], optimizer: ZerothOrder, part: list[float]) -> None:
        for rate in part:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step(lambda: sum((p.sin() * p).sum() for p in params))

    straight, halves, copy = parameters(), parameters(), parameters()
    groups = [[{"params": p[:1]}, {"params": p[1:], "lr": 1e-3}] for p in (straight, halves, copy)]
    one, two, three = (ZerothOrder(g, seed=seed) for g in groups)
    run(straight, one, rates)
    run(halves, two, rates[:cut])
    three.load_state_dict(two.state_dict())
    run(copy, three, rates[cut:])
    assert equal(straight, copy)
    assert three.derivatives == one.derivatives
    assert one.state_dict()["rates"].shape == (len(rates), 2)


def square(params: list[nn.Parameter]) -> Tensor:
    return torch.stack([(p - 1).square().sum() for p in params]).sum()


@pytest.mark.parametrize(
    "schedule",
    [
        partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
        partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 0.5**step),
    ],
    ids=["step", "lambda"],
)
def test_a_loop_with_a_scheduler_resumes(schedule: Callable[..., Any]) -> None:
    """Both loaded: rates, directions and numbers go on as if nothing had happened, whatever the new one was given."""

    def run(steps: int, resume: tuple[Any, Any] | None = None, **options: Any) -> tuple[Any, ...]:
        params = parameters()
        optimizer = ZerothOrder(params, **options)
        scheduler = schedule(optimizer)
        if resume:
            optimizer.load_state_dict(resume[0])
            scheduler.load_state_dict(resume[1])
        for _ in range(steps):
            optimizer.step(lambda: square(params))
            scheduler.step()
        return params, optimizer, (optimizer.state_dict(), scheduler.state_dict())

    given = {"lr": 0.1, "eps": 1e-2, "clip": 3.0, "seed": -(2**70)}
    params, whole, _ = run(4, **given)
    resumed_params, resumed, state = run(2, run(2, **given)[2], lr=0.3, seed=1)
    assert resumed.rates == whole.rates == [(0.1,), (0.05,), (0.025,), (0.0125,)]
    assert (resumed.seed, resumed.eps, resumed.clip, resumed.seeds) == (whole.seed, 1e-2, 3.0, whole.seeds)
    assert resumed.param_groups[0]["initial_lr"] == 0.1
    assert equal(params, resumed_params)
    torch.testing.assert_close(state[0], whole.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_goes_on_by_itself(copied: Callable[[Any], Any]) -> None:
    params = parameters()
    optimizer = ZerothOrder(params, 1e-2, eps=1e-2, clip=5.0, seed=7)
    optimizer.step(lambda: square(params))
    other_params, other = copied((params, optimizer))
    for p, o in ((params, optimizer), (other_params, other)):
        o.step(lambda p=p: square(p))
        assert len(o.seeds) == 2
    assert equal(params, other_params)
    torch.testing.assert_close(other.state_dict(), optimizer.state_dict(), rtol=0, atol=0, equal_nan=True)
    assert (other.seed, other.eps, other.clip) == (7, 1e-2, 5.0)


def test_a_step_goes_by_the_derivative_in_its_direction() -> None:
    """Of a linear loss it is exact: what is left to one side is the length of the direction."""
    p, slope = nn.Parameter(torch.zeros(1000, dtype=torch.float64)), torch.linspace(-1, 1, 1000, dtype=torch.float64)
    optimizer = ZerothOrder([p], 0.5, eps=0.25, clip=1e9)
    seen: list[Tensor] = []

    def loss() -> Tensor:
        assert torch.is_inference_mode_enabled()
        seen.append(p.detach().clone())
        return (p * slope).sum()

    mean = optimizer.step(loss)
    z = seen[0] / 0.25
    torch.testing.assert_close(seen[1], -seen[0])
    assert abs(mean) < 1e-9
    derivative = float((z * slope).sum())
    assert optimizer.derivatives == [pytest.approx(derivative)]
    torch.testing.assert_close(p.detach(), -0.5 * derivative * z)
    assert abs(float(z.mean())) < 0.2
    assert abs(float(z.std()) - 1) < 0.1


def test_on_average_it_is_the_gradient() -> None:
    slope, steps = torch.tensor([1.0, -2.0, 0.5]), 4000
    p = nn.Parameter(torch.zeros(3))
    optimizer = ZerothOrder([p], 1.0)
    for _ in range(steps):
        optimizer.step(lambda: (p * slope).sum())
    torch.testing.assert_close(p.detach() / steps, -slope, atol=0.15, rtol=0)


def test_a_wild_derivative_is_clipped() -> None:
    for side in (1, -1):
        optimizer = ZerothOrder([nn.Parameter(torch.ones(5))], clip=2.0)
        losses = iter((1e6 * side, 0.0))
        optimizer.step(lambda losses=losses: next(losses))
        assert optimizer.derivatives == [2.0 * side]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_what_fails_changes_nothing(loss: float) -> None:
    params = parameters()
    optimizer = ZerothOrder(params, 0.1)
    with pytest.raises(TuningError, match=r"the loss is .* at step 0: the learning rate is too large"):
        optimizer.step(lambda: loss)

    def interrupted() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(interrupted)
    assert equal(params, parameters())
    assert optimizer.state_dict()["seeds"].shape == (0,)


def test_what_is_refused() -> None:
    params = parameters()
    for options, message in (({"eps": 0}, "eps is 0"), ({"clip": -1}, "clip is -1"), ({"lr": -1}, "rate is -1")):
        with pytest.raises(TuningError, match=message):
            ZerothOrder(params, **options)
    optimizer = ZerothOrder(params)
    with pytest.raises(TuningError, match="give step a function"):
        optimizer.step()
    with pytest.raises(TuningError, match="has no seeds"):
        optimizer.load_state_dict(torch.optim.SGD(params, 0.1).state_dict())
    optimizer.step(lambda: 1.0)
    state = optimizer.state_dict()
    with pytest.raises(TuningError, match="has made steps already"):
        optimizer.load_state_dict(state)
    with pytest.raises(TuningError, match=r"rates \[1, 1\] for 1 steps, and this optimizer has 2 groups"):
        ZerothOrder([{"params": params[:1]}, {"params": params[1:]}]).load_state_dict(state)
    with pytest.raises(TuningError, match="made 1 steps without these parameters; add groups before the first"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert len(optimizer.param_groups) == 1
    assert optimizer.state_dict()["rates"].shape == (1, 1)


def test_a_state_of_other_parameters_changes_nothing() -> None:
    """Other sizes, another order, another number, or another division into groups."""

    def groups(params: list[nn.Parameter], cut: int) -> list[dict[str, Any]]:
        return [{"params": params[:cut]}, {"params": params[cut:]}]

    params = parameters()
    optimizer = ZerothOrder(groups(params, 1), 0.2, seed=9)
    optimizer.step(lambda: square(params))
    others = {
        "parameter 2 has 1 numbers and is in group 1 in the state, and has 4": (
            [*parameters()[:2], nn.Parameter(torch.zeros(4))],
            1,
        ),
        "parameter 0 has 120 numbers and is in group 0 in the state, and has 1 ": (parameters()[::-1], 1),
        "of 3 parameters, and this optimizer has 2": (parameters()[:2], 1),
        "parameter 1 has 7 numbers and is in group 1 in the state, and has 7 and is in group 0": (parameters(), 2),
    }
    for message, (other_params, cut) in others.items():
        before = [nn.Parameter(p.detach().clone()) for p in other_params]
        other = ZerothOrder(groups(other_params, cut))
        with pytest.raises(TuningError, match=message):
            other.load_state_dict(optimizer.state_dict())
        assert equal(other_params, before)
        assert (other.seed, other.seeds, other.param_groups[0]["lr"]) == (0, [], 1e-4)


@pytest.mark.parametrize(("name", "scheme"), [("bert", "bcq"), ("llama", "uniform")])
def test_it_trains_a_task(name: str, scheme: str, bases: Bases) -> None:
    """The loss falls, the base stays, and there are no gradients."""
    model = bases.load(name, scheme)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    lb.prepare_scale_tuning(model, "scales", modules_to_save=[])
    optimizer, data = ZerothOrder(trained(model).values(), 1e-2, seed=3), batch(model)
    losses = [optimizer.step(lambda: loss_of(model.eval(), data)) for _ in range(40)]
    assert losses[-1] < losses[0]
    assert all(p.grad is None for p in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(t, after[key]) for key, t in before.items())


def test_a_compiled_model_takes_the_same_steps(bases: Bases) -> None:
    model = bases.load("bert")
    lb.prepare_scale_tuning(model)
    start, data, losses = values(trained(model.eval())), batch(model), []
    torch.compiler.reset()
    for called in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        with torch.no_grad():
            for key, p in trained(model).items():
                p.copy_(start[key])
        optimizer = ZerothOrder(trained(model).values(), 1e-2)
        losses.append([optimizer.step(lambda called=called: loss_of(called, data)) for _ in range(4)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(set(losses[0])) == 4
