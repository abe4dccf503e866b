"""Decoder layers that compute a token in few calls: the same as their class, or left to it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.building import Choice, write_model
from support.models import COMMON, llama_config, mixed
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)
from transformers.cache_utils import DynamicCache

import lowbit_format as lb
from lowbit_format.kernels.cpu import products
from lowbit_format.runtime.decoder_layer import DecoderLayer, shorten_layers
from lowbit_format.schema import Scheme

MORE = {"intermediate_size": 48, "num_key_value_heads": 2}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(llama_config(False)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**COMMON, **MORE, sliding_window=4)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**COMMON, **MORE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON, **MORE, head_dim=8)),
}
PROMPTS = torch.tensor([[5, 9, 2, 33, 17, 60, 1], [8, 8, 40, 3, 21, 4, 50]])


def planes(path: str, module: nn.Module) -> Scheme | None:
    return Scheme("bcq", 3, 16, "F16", offset=True) if isinstance(module, nn.Linear) else None


def written(family: Callable[[], PreTrainedModel], directory: Path, choose: Choice = mixed) -> Path:
    torch.manual_seed(0)
    model = family()
    for name, value in model.named_parameters():  # norms and biases are all ones and zeros when new
        if name.endswith("norm.weight") or name.endswith("bias"):
            nn.init.normal_(value, 1.0 if name.endswith("weight") else 0.0, 0.2)
    return write_model(model, directory, choose)


def load(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, **options).eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(FAMILIES["llama"], tmp_path_factory.mktemp("llama") / "model")


def layers(model: nn.Module) -> list[DecoderLayer]:
    return [module for module in model.modules() if isinstance(module, DecoderLayer)]


def left_to_the_class(model: Any) -> Any:
    """A copy whose layers compute as their class does."""
    twin = copy.deepcopy(model)
    for layer in layers(twin):
        layer.same_with = ()
    return twin


def uses_the_short_way(model: nn.Module) -> bool:
    found = layers(model)
    return bool(found) and all(layer.same_with for layer in found)


def generated(model: Any, **options: Any) -> Tensor:
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}
    out: Tensor = model.generate(PROMPTS, **options)
    return out


def steps(model: Any, tokens: int = 6, cache: Any = None, **options: Any) -> Tensor:
    """Logits of every token after the first three, one token at a time."""
    cache, found = DynamicCache() if cache is None else cache, []
    with torch.no_grad():
        model(PROMPTS[:, :3], past_key_values=cache, use_cache=True, **options)
        for i in range(3, tokens):
            found.append(model(PROMPTS[:, i : i + 1], past_key_values=cache, use_cache=True, **options).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_families(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """One token at a time gives what the class gives, and what all tokens at once give."""
    model = load(written(FAMILIES[family], tmp_path / "model"), dtype=dtype)
    found, tolerance = steps(model), 1e-4 if dtype == torch.float32 else 0.1
    assert uses_the_short_way(model)
    assert found.dtype == dtype
    torch.testing.assert_close(found, steps(left_to_the_class(model)), rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        at_once = model(PROMPTS[:, :6]).logits[:, 3:]
    torch.testing.assert_close(found, at_once, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2, "one_row": True},
    ],
    ids=["greedy", "beams", "padding", "static cache", "assisted"],
)
def test_generation(options: dict[str, Any], llama: Path) -> None:
    model, options = load(llama), dict(options)
    if options.pop("one_row", False):
        both = [m.generate(PROMPTS[:1], max_new_tokens=12, do_sample=False, pad_token_id=0, **options)
                for m in (model, left_to_the_class(model))]  # fmt: skip
        assert torch.equal(*both)
        return
    found = generated(model, **options)
    assert uses_the_short_way(model)
    assert torch.equal(found, generated(left_to_the_class(model), **options))


def test_a_static_cache(llama: Path) -> None:
    model = load(llama)
    found = steps(model, cache=StaticCache(model.config, max_cache_len=16))
    assert uses_the_short_way(model)
    torch.testing.assert_close(found, steps(model), rtol=1e-4, atol=1e-4)


def test_hidden_states_and_attentions(llama: Path) -> None:
    """What is asked for of the parts is computed by the parts."""
    model = load(llama)
    cache = DynamicCache()
    with torch.no_grad():
        model(PROMPTS[:, :3], past_key_values=cache)
        twin = copy.deepcopy(cache)
        found = model(PROMPTS[:, 3:4], past_key_values=cache, output_hidden_states=True)
        want = left_to_the_class(model)(PROMPTS[:, 3:4], past_key_values=twin, output_hidden_states=True)
    assert len(found.hidden_states) == len(want.hidden_states) == 3
    for a, b in zip(found.hidden_states, want.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    eager = load(llama, attn_implementation="eager")
    with torch.no_grad():
        out = eager(PROMPTS[:, :1], output_attentions=True)
    assert all(attention is not None for attention in out.attentions)
    assert not uses_the_short_way(eager)


def test_tasks(tmp_path: Path) -> None:
    """A task of the model, and several in one batch, also of kinds that share no call."""
    llama = written(FAMILIES["llama"], tmp_path / "model", planes)
    model = load(llama)
    for name, options in (
        ("a", {"method": "scales"}),
        ("b", {"method": "scales"}),
        ("c", {"method": "scales", "kind": "add", "offsets": True}),
    ):
        tuned = load(llama)
        lb.prepare_scale_tuning(tuned, name=name, **options)
        for i, p in enumerate(q for q in tuned.parameters() if q.requires_grad):
            torch.manual_seed(i + ord(name))
            nn.init.normal_(p, std=0.02 if name == "c" else 0.3)
        lb.save_task(tuned, tmp_path / name)
        lb.load_task(model, tmp_path / name)
    twin = left_to_the_class(model)
    base = generated(model)
    assert uses_the_short_way(model)
    for names in (["a", "a"], ["a", None], ["b", "a"], ["a", "c"], ["c", None]):
        with lb.use_tasks(model, names), lb.use_tasks(twin, names):
            found = steps(model)
            torch.testing.assert_close(found, steps(twin), rtol=1e-4, atol=1e-4)
            if names[1] is None:
                torch.testing.assert_close(found[1], steps(twin)[1])
    lb.set_task(model, "b")
    lb.set_task(twin, "b")
    assert torch.equal(generated(model), generated(twin))
    assert not torch.equal(steps(model), steps(load(llama)))
    lb.set_task(model, None)
    assert torch.equal(generated(model), base)


def test_a_family_with_the_same_parts_that_computes_otherwise(tmp_path: Path) -> None:
    """Granite multiplies what its residuals add."""
    config = GraniteConfig(**COMMON, **MORE, residual_multiplier=0.5, attention_multiplier=0.3)
    model = load(written(lambda: GraniteForCausalLM(config), tmp_path / "granite"))
    assert len(layers(model)) == 2
    found = steps(model)
    assert [layer.same_with for layer in layers(model)] == [(), ()]
    with torch.no_grad():
        torch.testing.assert_close(found, model(PROMPTS[:, :6]).logits[:, 3:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["mlp", "self_attn", "input_layernorm"])
def test_a_part_that_fails_or_computes_otherwise(part: str, llama: Path) -> None:
    model = load(llama)
    for layer in layers(model):
        inner: Any = layer.get_submodule(part)  # type: ignore[attr-defined]
        plain = type(inner)

        class Other(plain):  # type: ignore[misc, valid-type]
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                out = super().forward(*args, **kwargs)
                return (out[0] * 1.1, *out[1:]) if isinstance(out, tuple) else out * 1.1

        inner.__class__ = Other
    steps(model)
    assert [layer.same_with for layer in layers(model)] == [(), ()]


def test_parts_that_change_later(llama: Path) -> None:
    """A hook, another class, another forward: the layer is left to its class from then on, and back again."""
    model = load(llama)
    want = steps(model)
    assert uses_the_short_way(model)
    first: Any = layers(model)[0]
    seen: list[Any] = []
    with torch.no_grad():
        for part in (first.mlp.up_proj, first.self_attn, first.input_layernorm):
            seen.clear()
            handle = part.register_forward_hook(lambda *args: seen.append(1))
            torch.testing.assert_close(steps(model), want, rtol=1e-4, atol=1e-4)
            handle.remove()
            assert len(seen) == 4  # the prompt, and three tokens
        forward = first.mlp.forward
        first.mlp.forward = lambda x: seen.append(x) or forward(x) * 0
        assert not torch.allclose(steps(model), want)
        del first.mlp.forward
        torch.testing.assert_close(steps(model), want, rtol=1e-4, atol=1e-4)


def test_adapters(llama: Path) -> None:
    peft = pytest.importorskip("peft")
    model = load(llama)
    base = steps(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    found = steps(adapted)
    assert not torch.allclose(found, base)
    with torch.no_grad():
        torch.testing.assert_close(found, adapted(PROMPTS[:, :6]).logits[:, 3:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(steps(adapted.unload()), base, rtol=1e-4, atol=1e-4)


def test_training_and_gradients(llama: Path) -> None:
    """A single token with gradients is computed by the parts."""
    model = load(llama)
    lb.prepare_scale_tuning(model, "scales", name="a")
    cache = DynamicCache()
    with torch.no_grad():
        model(PROMPTS[:, :3], past_key_values=cache)
    model(PROMPTS[:, 3:4], past_key_values=cache).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    steps(model)
    assert not uses_the_short_way(model)
    model = load(llama)  # a task that is in training now says nothing of the layer
    lb.prepare_scale_tuning(model, "scales", name="a")
    steps(model)
    assert [layer.same_with for layer in layers(model)] == [None, None]
    lb.unload_task(model, "a")
    steps(model)
    assert uses_the_short_way(model)


def test_masks_of_single_heads(llama: Path) -> None:
    """Those are for the class: here heads that share keys are tokens of one head."""
    model, found = load(llama), []
    mask = torch.zeros(2, 4, 1, 4)
    mask[:, 1, :, :2] = -torch.inf
    steps(model)
    for twin in (model, left_to_the_class(model)):
        cache = DynamicCache()
        with torch.no_grad():
            twin(PROMPTS[:, :3], past_key_values=cache)
            layer, x = layers(twin)[0], torch.ones(2, 1, 32)
            positions = twin.model.rotary_emb(x, torch.tensor([[3]]))
            options = {"past_key_values": cache, "position_embeddings": positions, "attention_mask": mask}
            found.append(layer(x, **options))  # type: ignore[operator]
    torch.testing.assert_close(*found)


def test_hooks_for_all_modules(llama: Path) -> None:
    """A profiler's."""
    model, seen = load(llama), list[Any]()
    steps(model)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *args: seen.append(module))
    try:
        steps(model)
    finally:
        handle.remove()
    assert any(module is model.model.layers[0].mlp.up_proj for module in seen)


def test_copies_pickles_and_float_models(llama: Path) -> None:
    model = load(llama)
    want = steps(model)
    name = type(layers(model)[0]).__name__
    assert name == "LlamaDecoderLayer"
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(steps(twin), want)
        assert uses_the_short_way(twin)
    shorten_layers(model)
    assert type(layers(model)[0]).__mro__.count(DecoderLayer) == 1
    plain = model.dequantize()
    assert layers(plain) == []
    assert {type(layer).__name__ for layer in plain.model.layers} == {name}
    assert not any("same_with" in vars(layer) for layer in plain.model.layers)
    torch.testing.assert_close(steps(plain), want, rtol=1e-4, atol=1e-4)


def test_layers_of_other_structure_are_left_alone(tmp_path: Path) -> None:
    from support.models import MODELS

    for kind in ("gpt2", "opt", "bert"):
        model = MODELS[kind]()
        shorten_layers(model)
        assert layers(model) == []
    float_model = LlamaForCausalLM(llama_config(False))
    shorten_layers(float_model)
    assert layers(float_model) == []


def in_the_short_way_and_by_the_class(model: Any) -> tuple[Tensor, Tensor]:
    return steps(model), steps(left_to_the_class(model))


def scale_norm(model: Any) -> None:
    model.model.layers[0].input_layernorm.weight.mul_(1.5)


def replace_norm(model: Any) -> None:
    norm = model.model.layers[1].post_attention_layernorm
    norm.weight = nn.Parameter(norm.weight * 0.5)


def add_to_bias(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj.bias.add_(0.3)


def replace_bias(model: Any) -> None:
    projection = model.model.layers[1].self_attn.k_proj
    projection.bias = nn.Parameter(projection.bias + 0.2)


def scale_scales(model: Any) -> None:
    model.model.layers[0].mlp.down_proj.scales.mul_(1.25)


def replace_scales(model: Any) -> None:
    projection = model.model.layers[1].mlp.up_proj
    projection.scales = nn.Parameter(projection.scales * 0.75)


def round_activations(model: Any) -> None:
    lb.set_activations(model, "int8")


def loaded_again(model: Any) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["model.layers.0.mlp.gate_proj.scales"].mul_(0.5)
    model.load_state_dict(state, assign=True)


@pytest.mark.parametrize(
    "change",
    [
        scale_norm,
        replace_norm,
        add_to_bias,
        replace_bias,
        scale_scales,
        replace_scales,
        round_activations,
        loaded_again,
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_changes_between_tokens(change: Callable[[Any], None], dtype: torch.dtype, qwen2: Path) -> None:
    """Addresses are kept from token to token: what they are of may change in any way."""
    model = load(qwen2, dtype=dtype)
    before = steps(model)
    with torch.no_grad():
        change(model)
    found, want = in_the_short_way_and_by_the_class(model)
    assert uses_the_short_way(model)
    assert not torch.equal(found, before)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found, want, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(FAMILIES["qwen2"], tmp_path_factory.mktemp("qwen2") / "model")


def test_other_numbers_of_rows_in_turn(llama: Path) -> None:
    model = load(llama)
    twin = left_to_the_class(model)
    for rows in (1, 2, 1, 8, 3, 2):
        ids = (PROMPTS[:1] + torch.arange(rows)[:, None]) % 64
        found, want = (m.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0) for m in (model, twin))
        assert torch.equal(found, want)


def test_threads_that_share_a_model(llama: Path) -> None:
    model = load(llama)
    want = generated(model, max_new_tokens=24)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: generated(model, max_new_tokens=24), range(8)))
    assert all(torch.equal(one, want) for one in found)


@pytest.mark.parametrize("threads", ["1", "3"])
def test_several_threads_give_the_same(threads: str, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(llama)
    want = steps(model)
    monkeypatch.setattr(products, "ONE_THREAD_BELOW", 0)
    monkeypatch.setenv("LOWBIT_NUM_THREADS", threads)
    assert torch.equal(steps(load(llama)), want)
    assert torch.equal(steps(model), want)
