"""Ways of tuning that PEFT lacks (examples/methods) do over a lowbit model what they do over its float model.

They are plain torch and know nothing of low-bit models. docs/peft.md has a table of them.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from support.building import write_model
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

import lowbit_format
from lowbit_format.runtime.modules import LowbitModule
from lowbit_format.schema import Scheme

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "peft.md"

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=64, num_key_value_heads=1)),
    "bert": lambda: BertModel(BertConfig(**SMALL, vocab_size=64, max_position_embeddings=16), add_pooling_layer=False),
    "vit": lambda: ViTModel(ViTConfig(**SMALL, image_size=32, patch_size=8), add_pooling_layer=False),
}
TARGETS = ("q_proj", "v_proj", "down_proj")
IDS = torch.randint(2, 64, (4, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS).index_put((torch.tensor([1, 1]), torch.tensor([5, 6])), torch.tensor(0))
LABELS = torch.tensor([0, 1, 1, 0])
PIXELS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Method(NamedTuple):
    """A way of tuning.

    Attributes:
        base: name of its model.
        add: gives what is to be trained and called, made over that model.
        loss: of a call.
        starts_as_base: it changes nothing before it is trained.
        backbone_backward: gradients go through the model's blocks.
        layers: those it has put into the model, if so.
        before, after: what a step of training does before the forward pass, and after the optimizer's step.
    """

    base: str
    add: Callable[[Any], nn.Module]
    loss: Callable[[Any], Tensor]
    starts_as_base: bool = False
    backbone_backward: bool = True
    before: Callable[[list[Any], int], object] = lambda layers, step: None
    after: Callable[[list[Any]], object] = lambda layers: None


@pytest.fixture(scope="module", autouse=True)
def methods() -> Iterator[None]:
    """The folder examples/ can be imported from, as where its programs run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        yield


def method(name: str) -> ModuleType:
    return importlib.import_module(f"methods.{name}")


def wrapped(file: str, layer: str, **options: Any) -> Callable[[Any], nn.Module]:
    def add(model: Any) -> nn.Module:
        make = getattr(method(file), layer)
        method("wrapping").wrap_linears(model, TARGETS, lambda linear: make(linear, **options))
        return model  # type: ignore[no-any-return]

    return add


def beside_llama(model: Any) -> nn.Module:
    side = method("ladder").Ladder(32, 2, reduction=4, causal=True)
    tuned: nn.Module = method("side").SideTuned(model.model, side, nn.Sequential(model.model.norm, model.lm_head))
    model.requires_grad_(False)  # the head is the model's own
    return tuned


class FirstToken(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, 0])


def beside_bert(side: Callable[[], nn.Module]) -> Callable[[Any], nn.Module]:
    def add(model: Any) -> nn.Module:
        tuned: nn.Module = method("side").SideTuned(model, side(), FirstToken(32, 2))
        return tuned

    return add


def beside_vit(register: int) -> Callable[[Any], nn.Module]:
    def add(model: Any) -> nn.Module:
        tuned: nn.Module = method("hierarchical").HierarchicalSideTuning(
            model.embeddings, model.layers, 32, 2, stages=(8, 16), register=register
        )
        return tuned

    return add


def next_words(tuned: Any) -> Tensor:
    return nn.functional.cross_entropy(logits(tuned)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def logits(tuned: Any) -> Tensor:
    found: Any = tuned(input_ids=IDS)
    return found if isinstance(found, Tensor) else found.logits  # type: ignore[no-any-return]


def of_sentences(tuned: Any) -> Tensor:
    return nn.functional.cross_entropy(tuned(input_ids=IDS, attention_mask=MASK), LABELS)


def of_images(tuned: Any) -> Tensor:
    return nn.functional.cross_entropy(tuned(PIXELS), LABELS)


def draw(layers: list[Any], step: int) -> None:
    method("dylora").draw_rank(layers, torch.Generator().manual_seed(step))


METHODS = {
    "DyLoRA": Method(
        "llama", wrapped("dylora", "DyLoRALinear", rank=4), next_words, starts_as_base=True, before=draw
    ),
    "SoRA": Method(
        "llama", wrapped("sora", "SoRALinear", rank=4), next_words, starts_as_base=True,
        after=lambda layers: method("sora").shrink_gates(layers, 0.01),
    ),
    "LoCA": Method(
        "llama", wrapped("loca", "LoCALinear", frequencies=24, alpha=3.0), next_words, starts_as_base=True,
        before=lambda layers, step: method("loca").take_turns(layers, step, coefficients=3, places=2, until=6),
    ),
    "HUT": Method("llama", wrapped("hut", "HUTLinear", rank=4), next_words, starts_as_base=True),
    "ladder side tuning": Method("llama", beside_llama, next_words, backbone_backward=False),
    "UniPT": Method(
        "bert", beside_bert(lambda: method("unipt").ParallelTuning(32, 3)), of_sentences, backbone_backward=False
    ),
    "hierarchical side tuning": Method("vit", beside_vit(1), of_images),
    "hierarchical side tuning, without a register": Method("vit", beside_vit(0), of_images, backbone_backward=False),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """Each lowbit model, and the float model of the same weights."""
    found = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        path = write_model(make(), tmp_path_factory.mktemp(name) / name, lambda p, m: Scheme("bcq", 3, 16, offset=True))
        model = lowbit_format.from_pretrained(path)
        found[name] = model, copy.deepcopy(model).dequantize()
    return found


def made(case: Method, base: Any) -> nn.Module:
    torch.manual_seed(1)
    return case.add(copy.deepcopy(base)).eval()


def trained(tuned: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in tuned.named_parameters() if p.requires_grad}


def steps(case: Method, tuned: nn.Module, number: int = 8) -> list[float]:
    """The losses of so many steps, and that after them."""
    layers = [m for m in tuned.modules() if type(m).__module__.startswith("methods.") and hasattr(m, "linear")]
    optimizer = torch.optim.AdamW(tuned.parameters(), 2e-2)
    torch.manual_seed(2)
    tuned.train()
    losses = []
    for step in range(number):
        case.before(layers, step)
        optimizer.zero_grad()
        loss = case.loss(tuned)
        loss.backward()
        optimizer.step()
        case.after(layers)
        losses.append(float(loss.detach()))
    tuned.eval()
    with torch.no_grad():
        return [*losses, float(case.loss(tuned))]


@pytest.mark.parametrize("name", METHODS)
def test_as_over_the_float_model(name: str, bases: dict[str, tuple[Any, Any]]) -> None:
    """The same code over both: it changes its own numbers alone, and with these gives both the same gradients."""
    case = METHODS[name]
    over = [made(case, base) for base in bases[case.base]]
    own = [trained(tuned) for tuned in over]
    assert own[0].keys() == own[1].keys()
    assert any(isinstance(m, LowbitModule) for m in over[0].modules())
    assert not any(isinstance(m, LowbitModule) for m in over[1].modules())
    if case.starts_as_base:
        with torch.no_grad():
            torch.testing.assert_close(logits(over[0]), logits(bases[case.base][0]), rtol=0, atol=1e-5)

    start = {key: t.clone() for key, t in over[0].state_dict().items()}
    losses = steps(case, over[0])
    assert losses[-1] < 0.98 * losses[0]
    saved = {key: t for key, t in over[0].state_dict().items() if not torch.equal(t, start[key])}
    changed = saved.keys() - dict(over[0].named_buffers())  # norms of batches have buffers
    assert changed <= own[0].keys()
    # What is added to all tokens before a norm makes no difference; on some machines its gradient is not even noise.
    assert not any((grad := own[0][name].grad) is not None and grad.any() for name in own[0].keys() - changed)
    again = made(case, bases[case.base][0])
    for other in (again, over[1]):
        assert not other.load_state_dict(saved, strict=False).unexpected_keys
        for mine, its in zip(over[0].modules(), other.modules(), strict=True):
            if hasattr(mine, "rank"):  # DyLoRA's present one is no tensor
                its.rank = mine.rank
    with torch.no_grad():
        assert torch.equal(case.loss(again), case.loss(over[0]))
    found, want = (gradients(case, tuned, list(own[0])) for tuned in over)
    for key, grad in want.items():
        torch.testing.assert_close(
            found[key], grad, rtol=1e-3, atol=1e-4 * max(float(g.abs().max()) for g in want.values())
        )


def gradients(case: Method, tuned: nn.Module, names: list[str]) -> dict[str, Tensor]:
    parameters = {key: tuned.get_parameter(key).requires_grad_() for key in names}
    return dict(zip(names, torch.autograd.grad(case.loss(tuned), list(parameters.values())), strict=True))


@pytest.mark.parametrize("name", ["ladder side tuning", "UniPT", *(n for n in METHODS if n.startswith("hierarchical"))])
def test_which_backbones_run_without_a_backward_pass(name: str, bases: dict[str, tuple[Any, Any]]) -> None:
    """No block gives a result with a graph behind it, but for a method that trains what goes through the blocks."""
    case, graphs = METHODS[name], list[bool]()
    tuned = made(case, bases[case.base][0])
    for block in tuned.modules():
        if type(block).__name__ in ("LlamaDecoderLayer", "BertLayer", "ViTLayer"):
            block.register_forward_hook(lambda m, args, out: graphs.append(first(out).requires_grad))
    case.loss(tuned).backward()
    assert graphs == [case.backbone_backward] * 2


def first(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]  # type: ignore[no-any-return]


# --- the recipes themselves ------------------------------------------------------------------------


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 5).requires_grad_(False)


def test_dylora_computes_with_any_rank(linear: nn.Linear) -> None:
    layer = method("dylora").DyLoRALinear(linear, rank=4, alpha=8, frozen=True)
    nn.init.normal_(layer.up)
    x, layer.rank = torch.randn(3, 6), 3
    torch.testing.assert_close(layer(x), linear(x) + x @ (layer.up[:, :3] @ layer.down[:3]).T * 8 / 3)
    layer(x).sum().backward()
    for grad in (layer.down.grad, layer.up.grad.T):
        assert [bool(row.any()) for row in grad] == [False, False, True, False]
    ranks = {method("dylora").draw_rank([layer], torch.Generator().manual_seed(i)) for i in range(40)}
    assert ranks == {1, 2, 3, 4}


def test_sora_loses_the_directions_that_its_gate_closes(linear: nn.Linear) -> None:
    layer = method("sora").SoRALinear(linear, rank=4)
    nn.init.normal_(layer.up)
    layer.gate.data = torch.tensor([0.5, -0.2, 0.05, -0.6])
    method("sora").shrink_gates([layer], 0.2)
    torch.testing.assert_close(layer.gate.data, torch.tensor([0.3, 0.0, 0.0, -0.4]))
    x = torch.randn(3, 6)
    before = layer(x)
    assert layer.prune() == 2
    torch.testing.assert_close(layer(x), before)
    assert [len(layer.down), len(layer.gate), layer.up.shape[1]] == [2, 2, 2]


def test_loca_is_a_sparse_cosine_spectrum_with_gradients_for_its_places(linear: nn.Linear) -> None:
    loca = method("loca")
    layer = loca.LoCALinear(linear, frequencies=3, alpha=0.5)
    rows, cols = torch.tensor([0, 2, 4]), torch.tensor([5, 3, 0])
    layer.places.data = torch.stack([rows / 4, cols / 5])
    layer.coefficients.data = torch.tensor([0.3, -0.2, 0.1])
    c, d = loca.cosines(torch.arange(5), 5), loca.cosines(torch.arange(6), 6)
    torch.testing.assert_close(c @ c.T, torch.eye(5), rtol=0, atol=1e-6)
    spectrum = torch.zeros(5, 6).index_put((rows, cols), layer.coefficients.detach())
    x, weight = torch.randn(3, 6, requires_grad=True), (linear.weight + 0.5 * c.T @ spectrum @ d).requires_grad_()
    found, want = layer(x), nn.functional.linear(x, weight, linear.bias)
    torch.testing.assert_close(found, want)
    direction = torch.randn(3, 5)
    of_weight, of_x = torch.autograd.grad((want * direction).sum(), [weight, x])
    grads = torch.autograd.grad((found * direction).sum(), [layer.coefficients, layer.places, x])
    k = 0.5 * c @ of_weight @ d.T  # gradients of all coefficients
    torch.testing.assert_close(grads[0], k[rows, cols])
    by_row = k[(rows + 1).clamp(max=4), cols] - k[(rows - 1).clamp(min=0), cols]
    by_col = k[rows, (cols + 1).clamp(max=5)] - k[rows, (cols - 1).clamp(min=0)]
    torch.testing.assert_close(grads[1], (torch.stack([by_row, by_col]) * layer.coefficients / 2).clamp(-1, 1).detach())
    torch.testing.assert_close(grads[2], of_x)


def test_loca_takes_turns(linear: nn.Linear) -> None:
    loca, turns = method("loca"), []
    layer = loca.LoCALinear(linear, 3)
    for step in range(8):
        loca.take_turns([layer], step, coefficients=2, places=1, until=6)
        turns.append((layer.coefficients.requires_grad, layer.places.requires_grad))
    assert turns == [(True, False), (True, False), (False, True)] * 2 + [(True, False)] * 2


def test_hut_multiplies_the_weight(linear: nn.Linear) -> None:
    layer = method("hut").HUTLinear(linear, rank=2)
    nn.init.normal_(layer.left)
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer(x) - linear.bias, x @ (linear.weight * (1 + layer.left @ layer.right)).T)


def test_the_table_of_the_documentation() -> None:
    """It names every method, and says of none what the tests do not."""
    text = DOCUMENT.read_text("utf-8")
    for name, case in METHODS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert row.endswith("| no |" if not case.backbone_backward else "| yes |"), name
