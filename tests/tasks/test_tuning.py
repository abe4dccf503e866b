"""What tuning trains, its gradients, what it starts from, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.checkpoints import build, with_tokenizer
from support.modules import filled
from support.tuning_models import (
    MODELS,
    SCHEMES,
    TUNED,
    Bases,
    batch,
    gradients,
    logits_of,
    loss_of,
    plain_weight,
    plain_weights,
    same,
    scatter,
    trained,
    values,
)
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import lowbit_format
from lowbit_format import (
    Recipe,
    Target,
    convert_hf_to_lowbit,
    list_tasks,
    load_task,
    prepare_scale_tuning,
    save_task,
    set_task,
    unload_task,
)
from lowbit_format.errors import TaskError, TuningError
from lowbit_format.kernels import naive, operators
from lowbit_format.kernels.cpu import backend as cpu_kernels
from lowbit_format.kernels.matrix import with_delta
from lowbit_format.runtime.deltas import Delta, TunedDelta
from lowbit_format.runtime.modules import LowbitLinear, LowbitModule
from lowbit_format.schema import Scheme
from lowbit_format.testing.matrices import random_matrix

FITTING = {"bcq": ["alphatuning", "scales"], "uniform": ["peqa", "scales"], "codebook": ["scales"]}
CASES = [(scheme, method) for scheme in SCHEMES for method in FITTING[SCHEMES[scheme].codec]]


pytestmark = pytest.mark.usefixtures("one_thread")


def has_shift(scheme: str) -> bool:
    return SCHEMES[scheme].codec != "codebook"


def steps(model: Any, n: int = 2) -> torch.optim.Optimizer:
    """A few steps of AdamW on all parameters, as loops hand them over."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for i in range(n):
        optimizer.zero_grad()
        loss_of(model, batch(model, seed=i)).backward()
        optimizer.step()
    return optimizer


# --- what is trained -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("scheme", "method"), CASES)
def test_trains_the_deltas_and_nothing_else(name: str, scheme: str, method: str, bases: Bases) -> None:
    model = bases.load(name, scheme)
    before = values(dict(model.named_parameters()))
    tuning = prepare_scale_tuning(model, method)
    head = {"classifier.weight", "classifier.bias"} if name == "bert" else set()
    assert set(tuning.modules) == TUNED[name]
    assert set(tuning.modules_to_save) == ({"classifier"} if head else set())
    assert trained(model).keys() == {f"{path}.tuned.scales" for path in TUNED[name]} | head
    for path in tuning.modules:
        module = model.get_submodule(path)
        planes = SCHEMES[scheme].bits if SCHEMES[scheme].codec == "bcq" and method == "scales" else 1
        assert module.tuned.scales.shape == (planes, module.rows)
    assert tuning.numbers == sum(p.numel() for n, p in trained(model).items() if n not in head)
    assert model.num_parameters(only_trainable=True) == tuning.numbers + tuning.saved_numbers

    optimizer = steps(model)
    assert {id(p) for p in optimizer.state} == {id(p) for p in trained(model).values()}
    after = dict(model.named_parameters())
    assert same({n: after[n] for n in before if n not in head}, {n: p for n, p in before.items() if n not in head})
    assert all(p.grad is None for p in after.values() if not p.requires_grad)
    assert all(bool(p.any()) for p in trained(model).values())  # and these have moved
    assert not any(torch.equal(after[n], before[n]) for n in head)


@pytest.mark.parametrize(("kind", "offsets"), [("mul", False), ("mul", True), ("add", False), ("add", True)])
@pytest.mark.parametrize("scheme", [s for s in SCHEMES if has_shift(s)])
def test_shapes(kind: str, offsets: bool, scheme: str, bases: Bases) -> None:
    """TSK-6: a factor for each row, an addend for each group."""
    model = bases.load("llama", scheme)
    prepare_scale_tuning(model, "scales", kind=kind, offsets=offsets)
    for path in TUNED["llama"]:
        module = model.get_submodule(path)
        planes, rows, groups = module.scales.shape
        assert module.tuned.scales.shape == ((planes, rows) if kind == "mul" else (planes, rows, groups))
        assert (module.tuned.shift is not None) == offsets
        assert not offsets or module.tuned.shift.shape == (rows, groups)
    steps(model)
    assert all(bool(p.any()) for p in trained(model).values())


@pytest.mark.parametrize("kind", ["mul", "add"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_starts_as_the_base(name: str, scheme: str, kind: str, bases: Bases) -> None:
    model = bases.load(name, scheme)
    want = logits_of(model)
    prepare_scale_tuning(model, "scales", kind=kind, offsets=has_shift(scheme))
    assert_close(logits_of(model), want)
    steps(model)
    assert not torch.equal(logits_of(model), want)
    set_task(model, None)
    assert torch.equal(logits_of(model), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_deltas_stay_float32(dtype: torch.dtype, bases: Bases) -> None:
    model = bases.load("llama")
    prepare_scale_tuning(model, offsets=True)
    scatter(model)
    before, want = values(trained(model)), dict(trained(model))
    cast = {torch.float16: model.half, torch.bfloat16: model.bfloat16, torch.float64: lambda: model.to(dtype)}[dtype]
    cast()
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert same(trained(model), before)
    assert all(p is want[name] for name, p in trained(model).items())  # an optimizer made before still has them
    assert logits_of(model).dtype == dtype
    assert {g.dtype for g in gradients(model, batch(model)).values()} == {torch.float32}


# --- gradients -------------------------------------------------------------------------------------

SHAPES = [  # rows, columns, group size, and how many planes have a delta (None: all)
    (5, 13, 0, 1), (5, 13, 0, None), (3, 35, 16, 1), (3, 35, 16, None), (3, 1, 0, None), (4, 24, 7, 2),
]  # fmt: skip
KINDS = {
    "bcq": Scheme("bcq", 3, 0, "F16", offset=True),
    "bcq-plain": Scheme("bcq", 2, 0, "F32"),
    "bcq-ragged": Scheme("bcq", 3, 0, "F32", offset=True, row_bits=True),
    "uniform": Scheme("uniform", 4, 0, "F16"),
    "codebook": Scheme("codebook", 3, 0, "F16"),
}


def tuned_linear(kind: str, shape: Sequence[int], delta: str, planes: int | None, seed: int = 0) -> LowbitLinear:
    """A linear module with a random delta in training; with a shift too where the scheme has one."""
    rows, cols, group = shape
    scheme = replace(KINDS[kind], group_size=group)
    row_bits = random_matrix(scheme, rows, cols).row_bits
    plane_rows = None if row_bits is None else int(row_bits.sum())
    module = filled(LowbitLinear(scheme, rows, cols, plane_rows=plane_rows))
    bits, _, groups = module.scales.shape
    draw = torch.Generator().manual_seed(seed)
    size = (min(planes or bits, bits), rows) if delta == "mul" else (min(planes or bits, bits), rows, groups)
    shift = torch.randn(rows, groups, generator=draw) if scheme.codec == "uniform" or scheme.offset else None
    module.tuned = TunedDelta(Delta(torch.randn(size, generator=draw), shift).map(lambda t: t * 0.1))
    module.tuned_name = "task"
    module.set_task("task")
    return module  # type: ignore[return-value]


def central_differences(loss: Callable[[Delta], Tensor], start: Delta, h: float = 1e-5) -> Delta:
    """The gradient of ``loss(delta)``, number by number, in float64."""

    def slope(part: str, values: Tensor) -> Tensor:
        steps = h * torch.eye(values.numel(), dtype=torch.float64).reshape(-1, *values.shape)
        up, down = (torch.vmap(lambda v: loss(start._replace(**{part: v})))(values + s) for s in (steps, -steps))
        return ((up - down) / (2 * h)).reshape(values.shape)

    return Delta(*(None if t is None else slope(part, t) for part, t in start._asdict().items()))


def assert_close(found: Tensor | None, want: Tensor | None, rtol: float = 1e-5, atol: float = 0.0) -> None:
    """`rtol` is relative to the largest number of all, since errors of sums of float32 are."""
    assert (found is None) == (want is None)
    if found is not None and want is not None:
        atol += rtol * float(want.detach().abs().max())
        torch.testing.assert_close(found.detach().double(), want.detach().double(), rtol=0, atol=atol)


@pytest.fixture(params=["naive", "cpu.backend", "cpu.backend in tiles of 2 rows", "cpu.backend in tiles of 1 row"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Each module of kernels, the compiled one also with several tiles; called with the number of columns."""
    module, _, rows = request.param.partition(" in tiles of ")
    monkeypatch.setitem(operators.BACKENDS, "cpu", module)

    def tile(cols: int) -> None:
        if rows:
            monkeypatch.setattr(cpu_kernels, "GRAD_CHUNK", 2 * cols + 1 if rows == "2 rows" else 1)

    return tile


@pytest.mark.parametrize("delta", ["mul", "add"])
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "bcq-ragged"])
def test_gradients_of_deltas(kind: str, delta: str, kernels: Callable[[int], None]) -> None:
    """Against float64 central differences, and autograd, of the weight's formula in plain torch."""
    for *shape, planes in SHAPES:
        kernels(shape[1])
        module = tuned_linear(kind, shape, delta, planes)
        x = torch.randn(3, 2, shape[1], generator=torch.Generator().manual_seed(1), requires_grad=True)
        module(x).square().sum().backward()

        def loss(delta: Delta, x: Tensor = x, module: LowbitModule = module) -> Tensor:
            return (x.to(delta.scales.dtype) @ plain_weight(module, delta).T).square().sum()  # type: ignore[union-attr]

        tuned: Any = module.tuned
        exact = central_differences(loss, tuned.delta().map(lambda t: t.detach().double()))
        again = tuned.delta().map(lambda t: t.detach().clone().requires_grad_())
        other = x.detach().clone().requires_grad_()
        loss(again, other).backward()
        for part in Delta._fields:
            found = getattr(tuned, part)
            assert_close(getattr(found, "grad", None), getattr(exact, part))
            assert_close(getattr(found, "grad", None), getattr(getattr(again, part), "grad", None))
        assert_close(x.grad, other.grad)


@pytest.mark.parametrize("delta", ["mul", "add"])
def test_gradients_with_ragged_planes(delta: str, kernels: Callable[[int], None]) -> None:
    """Rows have the planes that MIX-1 gives them; a scale of a plane that a row lacks gets no gradient."""
    kernels(20)
    module = tuned_linear("bcq-ragged", (6, 20, 8), delta, None)
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    module(x).square().sum().backward()
    tuned: Any = module.tuned
    start = tuned.delta().map(lambda t: t.detach().double())
    w = module.plane_matrix._replace(scales=module.scales.double(), offsets=module.offsets.double())  # type: ignore[union-attr]

    def loss(delta: Delta) -> Tensor:
        tuned = with_delta(w._replace(offsets=w.offsets + delta.shift), delta.scales)  # type: ignore[operator, arg-type]
        return (x.double() @ naive.decode(tuned).T).square().sum()

    exact = central_differences(loss, start)
    assert_close(tuned.scales.grad, exact.scales)
    assert_close(tuned.shift.grad, exact.shift)
    absent = module.row_bits[None, :] <= torch.arange(3)[:, None]  # type: ignore[index]
    assert bool(absent.any())
    assert not bool(tuned.scales.grad[absent].any())


def test_the_compiled_kernel_sums_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above are about it: groups of whole bytes go through it, by tiles, and only they do."""
    asked: list[tuple[int, int]] = []
    whole = naive.linear_param_grads

    def spied(*args: Any, decode_grads: Any, **kwargs: Any) -> Any:
        def spy(w: Any, weight_grad: Any, planes: Any) -> Any:
            return decode_grads(w, lambda start, stop: asked.append((start, stop)) or weight_grad(start, stop), planes)

        return whole(*args, decode_grads=spy, **kwargs)

    monkeypatch.setattr(cpu_kernels, "linear_param_grads", lambda *a: spied(*a, decode_grads=cpu_kernels.decode_grads))
    for kind, shape, tile, want in [
        ("bcq", (5, 13, 0), 26, [(0, 2), (2, 4), (4, 5)]),
        ("uniform", (4, 70, 16), 1, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        ("bcq", (4, 70, 16), 1 << 20, [(0, 4)]),
        ("bcq", (7, 24, 7), 1, [(0, 7)]),  # naive: no groups of whole bytes
        ("codebook", (4, 70, 16), 1, [(0, 4)]),  # naive
    ]:
        monkeypatch.setattr(cpu_kernels, "GRAD_CHUNK", tile)
        asked.clear()
        module = tuned_linear(kind, shape, "mul", 1)
        module(torch.randn(2, shape[1])).sum().backward()
        assert asked == want, (kind, shape)


class DoubleLoss(nn.Module):
    """The loss that transformers computes, in the dtype of the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, data: dict[str, Tensor]) -> Tensor:
        logits, labels = self.model(input_ids=data["input_ids"]).logits, data["labels"]
        if labels.dim() == 1:
            return F.cross_entropy(logits, labels)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("kind", ["mul", "add"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_a_model(name: str, scheme: str, kind: str, bases: Bases, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against autograd through a float twin, its weights made from the deltas; and float64 differences along a line."""
    model, twin = bases.load(name, scheme), bases.load(name, scheme).dequantize()
    prepare_scale_tuning(model, "scales", kind=kind, offsets=has_shift(scheme))
    scatter(model, 0.05)
    data = batch(model)
    found = gradients(model, data)
    assert found.keys() == trained(model).keys()

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        deltas = {n: p for n, p in parameters.items() if ".tuned." in n}
        head = {n: p for n, p in parameters.items() if n not in deltas}
        weights = {**plain_weights(model, deltas), **head}
        return torch.func.functional_call(DoubleLoss(twin), {f"model.{n}": w for n, w in weights.items()}, (data,))

    def norm(self: Any, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)  # its own is float32 always, and so is transformers' loss
    plain = {n: p.detach().clone().requires_grad_() for n, p in trained(model).items()}
    loss(plain).backward()
    rounding = 1e-6 * max(
        float(grad.abs().max()) for grad in found.values()
    )  # some are 0 but for that, as of keys' shifts
    for n, grad in found.items():
        assert_close(grad, plain[n].grad, 1e-4, rounding)

    twin.double()
    exact = {n: p.detach().double() for n, p in trained(model).items()}
    line = {n: torch.randn(p.shape, generator=torch.Generator().manual_seed(5)).double() for n, p in exact.items()}
    with torch.no_grad():
        up, down = (loss({n: p + h * line[n] for n, p in exact.items()}) for h in (1e-5, -1e-5))
    slope = sum(float((grad.double() * line[n]).sum()) for n, grad in found.items())
    length = sum(float((grad.double() * line[n]).abs().sum()) for n, grad in found.items())
    assert abs(float(up - down) / 2e-5 - slope) < 1e-4 * length


@pytest.mark.parametrize("include", [["embed_tokens"], None])
@pytest.mark.parametrize("scheme", ["bcq", "uniform", "codebook"])
def test_a_tied_matrix_has_one_delta(scheme: str, include: list[str] | None, bases: Bases) -> None:
    """Its gradient is the sum of those of both places: words looked up, and scores of words."""
    model, twin = bases.load("llama", scheme), bases.load("llama", scheme).dequantize()
    prepare_scale_tuning(model, "scales", include=include and [*include, "q_proj"], offsets=has_shift(scheme))
    assert ("model.embed_tokens.tuned.scales" in trained(model)) == (include is not None)
    assert "lm_head.tuned.scales" not in trained(model)
    if include is None:
        assert model.lm_head.tuned is None
        return
    assert model.lm_head.tuned is model.model.embed_tokens.tuned
    scatter(model, 0.05)
    data = batch(model)
    found = gradients(model, data)
    plain = {n: p.detach().clone().requires_grad_() for n, p in trained(model).items()}
    weights = plain_weights(model, plain)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= weights.keys()
    torch.func.functional_call(twin, weights, (), data, tie_weights=False).loss.backward()
    # Words all score alike here, so queries have gradients of 1e-5 down to 0 beside the embedding's of 20: what float32
    # rounds away of that, in whatever order kernel and twin add up, is no small part of them.
    rounded = 1e-8 * max(float(grad.abs().max()) for grad in found.values())
    for n, grad in found.items():
        assert_close(grad, plain[n].grad, 1e-4, rounded)
    places = []
    for place in ("lm_head.weight", "model.embed_tokens.weight"):  # each by itself is something, and not the whole
        alone = {n: p.detach().clone().requires_grad_() for n, p in trained(model).items()}
        mine = {n: (w if n == place else w.detach()) for n, w in plain_weights(model, alone).items()}
        torch.func.functional_call(twin, mine, (), data, tie_weights=False).loss.backward()
        places.append(alone["model.embed_tokens.tuned.scales"].grad)
    assert all(bool(g.abs().max() > 0) for g in places)
    assert_close(found["model.embed_tokens.tuned.scales"], places[0] + places[1], 1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_backward_keeps_no_weights(name: str, bases: Bases) -> None:
    """What autograd keeps for the backward pass has no float tensor of a quantized matrix's size."""
    model = bases.load(name)
    prepare_scale_tuning(model, "scales", offsets=True)
    tuned = [m for m in model.modules() if isinstance(m, LowbitModule) and m.tuned is not None]
    sizes = {m.rows * m.cols for m in tuned}

    def kept(compute: Any) -> list[Tensor]:
        found: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
            compute().backward()
        return found

    tensors = kept(lambda: loss_of(model.train(), batch(model)))
    planes = {m._parameters["planes"].data_ptr() for m in tuned}  # in whatever layout they are now
    assert planes <= {t.data_ptr() for t in tensors}  # the hooks do see what the operators keep
    assert not [tuple(t.shape) for t in tensors if t.is_floating_point() and t.numel() in sizes]
    x = torch.randn(1, tuned[0].rows * tuned[0].cols, requires_grad=True)
    assert any(t.numel() in sizes for t in kept(lambda: (x * tuned[0].dequantize().flatten()).sum()))  # as it would be


# --- what may be asked for -------------------------------------------------------------------------


def untouched(model: Any, before: dict[str, bool]) -> bool:
    no_deltas = not any(isinstance(m, TunedDelta) for m in model.modules())
    return no_deltas and list_tasks(model) == [] and {n: p.requires_grad for n, p in model.named_parameters()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lora"}, "unknown method 'lora': choose one of alphatuning, peqa, scales"),
        ({"kind": "times"}, "unknown kind 'times' of delta: choose one of mul, add"),
        ({"include": ["fc"]}, "include: 'fc' matches no module"),
        ({"exclude": ["query", "*.fc"]}, r"exclude: '\*\.fc' matches no module"),
        ({"modules_to_save": ["score"]}, "modules_to_save: 'score' matches no module"),
        ({"modules_to_save": ["query"]}, "modules_to_save: 'query' matches no module"),
        ({"modules_to_save": ["encoder"]}, "modules_to_save: 'encoder' matches no module"),
        ({"modules_to_save": ["dropout"]}, "dropout' has no parameters"),
        ({"include": "query"}, r"include is a string; give a list of patterns: \['query'\]"),
        ({"exclude": "query"}, "exclude is a string"),
        ({"modules_to_save": "classifier"}, "modules_to_save is a string"),
        ({"include": ["query"], "exclude": ["query"]}, "no module is left to train"),
        ({"method": "peqa"}, r"peqa trains uniform modules; 'bert\..*' \(13 in all\) is bcq.*method='scales'"),
        ({"method": "peqa", "include": ["query"]}, r"query' \(2 in all\) is bcq"),
    ],
)
def test_refusals(options: dict[str, Any], message: str, bases: Bases) -> None:
    """By name, and before anything has changed."""
    model = bases.load("bert")
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(TuningError, match=message):
        prepare_scale_tuning(model, **options)
    assert untouched(model, before)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("method", ["alphatuning", "peqa", "scales"])
def test_methods_and_codecs(method: str, scheme: str, bases: Bases) -> None:
    model, codec = bases.load("gpt2", scheme), SCHEMES[scheme].codec
    if method in FITTING[codec]:
        assert prepare_scale_tuning(model, method).modules
        assert list_tasks(model)[0].config.method == method
        return
    with pytest.raises(TuningError, match=f"{method} trains (bcq|uniform) modules; .*is {codec}"):
        prepare_scale_tuning(model, method)


def test_offsets_that_are_not_there(bases: Bases) -> None:
    model = bases.load("gpt2", "codebook")
    with pytest.raises(TuningError, match=r"transformer\.h\.0.*has no offsets or zero points"):
        prepare_scale_tuning(model, "scales", offsets=True)
    assert list_tasks(model) == []


def test_names_and_models(bases: Bases, tmp_path: Path) -> None:
    model = bases.load("bert")
    with pytest.raises(TaskError, match="no task 'sst2' is loaded"):
        prepare_scale_tuning(model, start="sst2")
    prepare_scale_tuning(model, name="sst2")
    with pytest.raises(TaskError, match="'sst2' is being trained on this model"):
        prepare_scale_tuning(model)
    save_task(model, tmp_path / "a")
    unload_task(model, "sst2")
    load_task(model, tmp_path / "a", name="sst2")
    with pytest.raises(TaskError, match="the name 'sst2' is taken"):
        prepare_scale_tuning(model, name="sst2")
    with pytest.raises(TaskError, match="a BertModel is no lowbit model"):
        prepare_scale_tuning(MODELS["bert"]())
    with pytest.raises(TaskError, match=r"a SimpleNamespace is no model but has one.*give its `model`"):
        prepare_scale_tuning(SimpleNamespace(model=model))  # as a pipeline


def test_training_without_a_choice_is_told_once(bases: Bases, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing that is quantized would change. Whoever froze something, or computes without gradients, has chosen."""
    tuned, partly, untouched = (bases.load("bert") for _ in range(3))
    prepare_scale_tuning(tuned)
    for name, p in partly.named_parameters():
        p.requires_grad_(p.is_floating_point() and "bias" in name)
    data = batch(untouched)
    caplog.clear()
    loss_of(tuned.train(), data)
    loss_of(partly.train(), data)
    loss_of(untouched.eval(), data)
    with torch.no_grad():
        loss_of(untouched.train(), data)
    assert caplog.text == ""
    loss_of(untouched, data)
    loss_of(untouched, data)
    assert [record.name for record in caplog.records] == ["lowbit_format.integrations.model"]
    assert "Call lowbit_format.prepare_scale_tuning" in caplog.text


def test_a_module_around_a_lowbit_model(bases: Bases, tmp_path: Path) -> None:
    """As a SentenceTransformer is: the task is the inner model's, and nothing else is trained."""

    class Encoder(nn.Sequential):
        @property
        def config(self) -> Any:
            return self[0].config

    encoder = Encoder(bases.load("bert"), nn.Linear(4, 4))
    prepared = prepare_scale_tuning(encoder)
    assert trained(encoder).keys() == {f"0.{name}" for name in trained(encoder[0])}
    assert prepared.modules
    save_task(encoder, tmp_path / "a")
    unload_task(encoder, "default")
    load_task(encoder, tmp_path / "a")
    assert [task.name for task in list_tasks(encoder[0])] == ["a"]


@pytest.mark.slow
def test_a_sentence_transformer(tmp_path: Path) -> None:
    modules = pytest.importorskip("sentence_transformers.models", reason="the extra 'clients' is not installed")
    from sentence_transformers import SentenceTransformer

    source = with_tokenizer(build("bert", tmp_path / "bert"))
    out = convert_hf_to_lowbit(str(source), tmp_path / "lowbit", Recipe(Target(bits=4, group_size=32))).directory
    transformer = modules.Transformer(str(out))
    width = transformer.get_word_embedding_dimension()
    model = SentenceTransformer(modules=[transformer, modules.Pooling(width)], device="cpu")
    before = model.encode("w1 w2 w3")
    assert prepare_scale_tuning(model).modules
    features = model.tokenize(["w1 w2 w3"])
    model(features)["sentence_embedding"].sum().backward()
    assert all(p.grad is not None for name, p in trained(model).items() if "pooler" not in name)
    assert abs(model.encode("w1 w2 w3") - before).max() < 1e-5
    for p in trained(model).values():
        p.data += 0.1
    assert abs(model.encode("w1 w2 w3") - before).max() > 1e-3


@pytest.mark.parametrize(
    ("include", "exclude", "want"),
    [
        (["query", "value"], None, {n for n in TUNED["bert"] if n.endswith(("query", "value"))}),
        (["bert.encoder.layer.1.*"], None, {n for n in TUNED["bert"] if ".1." in n}),
        (["*.attention.*"], ["output.dense", "key"], {n for n in TUNED["bert"] if n.endswith(("query", "value"))}),
        (None, ["bert.pooler.dense"], TUNED["bert"] - {"bert.pooler.dense"}),
        (["word_embeddings", "pooler.dense"], None, {"bert.embeddings.word_embeddings", "bert.pooler.dense"}),
    ],
)
def test_include_and_exclude(
    include: list[str] | None, exclude: list[str] | None, want: set[str], bases: Bases
) -> None:
    model = bases.load("bert")
    tuning = prepare_scale_tuning(model, include=include, exclude=exclude)
    assert set(tuning.modules) == want
    assert {n for n in trained(model) if ".tuned." in n} == {f"{path}.tuned.scales" for path in want}
    assert gradients(model, batch(model)).keys() == trained(model).keys()


# --- modules that are trained whole ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "want"),
    [
        (None, ["classifier"]),
        ([], []),
        (["classifier"], ["classifier"]),
        (["classifier", "layer.1.output.LayerNorm"], ["bert.encoder.layer.1.output.LayerNorm", "classifier"]),
    ],
)
def test_modules_to_save(asked: list[str] | None, want: list[str], bases: Bases, tmp_path: Path) -> None:
    model = bases.load("bert")
    base = logits_of(model)
    tuning = prepare_scale_tuning(model, modules_to_save=asked)
    assert list(tuning.modules_to_save) == want
    whole = {f"{path}.{n}" for path in want for n, _ in model.get_submodule(path).named_parameters()}
    assert {n for n in trained(model) if ".tuned." not in n} == whole
    assert tuning.saved_numbers == sum(model.get_parameter(n).numel() for n in whole)
    steps(model)
    after = logits_of(model)
    set_task(model, None)
    assert torch.equal(logits_of(model), base)
    set_task(model, "default")
    save_task(model, tmp_path / "task")
    again = bases.load("bert")
    set_task(again, load_task(again, tmp_path / "task"))
    assert torch.equal(logits_of(again), after)
    unload_task(model, "default")
    assert torch.equal(logits_of(model), base)
    assert not trained(model)


def test_a_tied_float_module_is_no_module_to_save(bases: Bases) -> None:
    """Its other place belongs to the base, which would change with it."""
    model = bases.load("gpt2", embeddings=False)
    assert model.lm_head.weight is model.transformer.wte.weight
    with pytest.raises(TuningError, match=r"'lm_head' is tied to 'transformer\.wte\.weight'"):
        prepare_scale_tuning(model, modules_to_save=["lm_head"])
    with pytest.raises(TuningError, match=r"wte' is tied to 'lm_head\.weight'"):
        prepare_scale_tuning(model, modules_to_save=["wte"])
    prepare_scale_tuning(model, modules_to_save=["wpe"])
    assert "transformer.wpe.weight" in trained(model)


def test_fresh_modules_inside_one_another_are_saved_once(bases: Bases) -> None:
    """As a masked-language head, which has a parameter of its own beside modules with some."""
    model = bases.load("bert")
    model.classifier.add_module("inner", nn.Linear(2, 2))
    model.lowbit_fresh = (*model.lowbit_fresh, "classifier.inner.weight", "classifier.inner.bias")
    assert prepare_scale_tuning(model).modules_to_save == ("classifier",)


# --- starting from a task --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mul", "add"])
@pytest.mark.parametrize("name", MODELS)
def test_continues_from_a_task(name: str, kind: str, bases: Bases, tmp_path: Path) -> None:
    """Bit for bit: stopping, saving, and starting from the bundle is as going on."""
    model = bases.load(name)
    prepare_scale_tuning(model, kind=kind, offsets=True)
    scatter(model, 0.01)
    save_task(model, tmp_path / "first")
    start, logits = values(trained(model)), logits_of(model)
    sgd = torch.optim.SGD(trained(model).values(), 0.1)
    loss_of(model, batch(model)).backward()
    sgd.step()

    other = bases.load(name)
    base = logits_of(other)
    load_task(other, tmp_path / "first")
    prepare_scale_tuning(other, kind=kind, offsets=True, start="first", name="second")
    assert same(trained(other), start)
    assert torch.equal(logits_of(other), logits)
    sgd = torch.optim.SGD(trained(other).values(), 0.1)
    loss_of(other, batch(other)).backward()
    sgd.step()
    assert same(trained(other), trained(model))
    set_task(other, "first")  # which has not changed with its follower
    assert torch.equal(logits_of(other), logits)
    set_task(other, None)
    assert torch.equal(logits_of(other), base)
    assert [(t.name, t.tuned) for t in list_tasks(other)] == [("first", False), ("second", True)]


def test_starts_with_more_than_the_task_had(bases: Bases, tmp_path: Path) -> None:
    """Modules and offsets that the first task left alone start as the base's."""
    model = bases.load("bert")
    prepare_scale_tuning(model, include=["query"])
    scatter(model)
    save_task(model, tmp_path / "first")
    start = values(trained(model))
    unload_task(model, "default")
    load_task(model, tmp_path / "first")
    prepare_scale_tuning(model, offsets=True, start="first")
    now = trained(model)
    assert same({n: now[n] for n in start}, start)
    assert len(now) == 2 * len(TUNED["bert"]) + 2
    assert not any(bool(p.any()) for n, p in now.items() if n not in start)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "add"}, r"task 'first' has a delta \[1, \d+\], this tuning \[1, \d+, \d+\]"),
        ({"method": "scales"}, r"task 'first' has a delta \[1, \d+\], this tuning \[3, \d+\]"),
        ({"offsets": False}, r"task 'first' has a delta \[\d+, \d+\], this tuning None"),
        ({"include": ["query"]}, r"task 'first' changes '.*' \(11 in all\), which this tuning leaves out"),
        ({"modules_to_save": []}, r"task 'first' changes 'classifier' \(1 in all\), which this tuning leaves out"),
    ],
)
def test_a_start_that_would_be_lost(options: dict[str, Any], message: str, bases: Bases, tmp_path: Path) -> None:
    model = bases.load("bert")
    prepare_scale_tuning(model, offsets=True)
    scatter(model)
    save_task(model, tmp_path / "first")
    unload_task(model, "default")
    load_task(model, tmp_path / "first")
    with pytest.raises(TuningError, match=message):
        prepare_scale_tuning(model, **{"offsets": True, "start": "first", **options})
    assert not any(isinstance(m, TunedDelta) for m in model.modules())
    assert [t.name for t in list_tasks(model)] == ["first"]


def test_what_tuning_prints(bases: Bases) -> None:
    tuning = lowbit_format.prepare_scale_tuning(bases.load("bert"), name="sst2")
    assert str(tuning) == "task 'sst2': 448 numbers in 13 modules, and 66 in classifier"
