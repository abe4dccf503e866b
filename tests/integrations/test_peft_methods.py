"""Every method of PEFT over a lowbit model does what it does over the float model of the same weights.

Each is made over both, gets the same gradients, and after the same change of its numbers gives the same logits. The
table of docs/peft.md says what :data:`METHODS` says.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.building import write_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import lowbit_format
from lowbit_format.errors import UnsupportedOperationError
from lowbit_format.runtime.modules import LowbitLinear, LowbitModule
from lowbit_format.schema import Scheme

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
DOCUMENT = Path(__file__).parents[2] / "docs" / "peft.md"

IDS = torch.tensor([[5, 9, 2, 33, 17], [1, 40, 3, 4, 6]])
SQUARE = ["q_proj", "o_proj"]
ALL = ["q_proj", "k_proj", "o_proj", "down_proj"]
TEXT = {"task_type": "CAUSAL_LM"}

MERGES = "works"  # and merges into the float model that dequantize() makes; into the planes it is refused by name
MERGES_ITSELF = "works, merges as it is"  # it changes nothing that is quantized
STAYS = "works, cannot be merged"  # by PEFT, into any model
NEEDS_FLOAT = "refused: call `dequantize()` first"  # before the adapter is added


class Case(NamedTuple):
    """A method of PEFT.

    Attributes:
        method: its row in the table of the documentation.
        config: makes its config. AttributeError where this release of PEFT has no such method.
        verdict: what it does over a lowbit model.
        several: a second adapter can be added.
        quantized_embedding: try it over a model whose embeddings are quantized, too.
        inputs: it wants with every call.
    """

    method: str
    config: Callable[[], Any]
    verdict: str = MERGES
    several: bool = True
    quantized_embedding: bool = False
    inputs: dict[str, Any] = {}  # noqa: RUF012 - never changed


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"target_modules": "all-linear", "r": 4, **options})


VIRTUAL = {**TEXT, "num_virtual_tokens": 3}
TASKS = {"task_ids": torch.tensor([0, 1])}
METHODS = {
    "lora": Case("LoRA", lora),
    "rslora": Case("rsLoRA", lambda: lora(use_rslora=True)),
    "dora": Case("DoRA", lambda: lora(use_dora=True)),
    "eva": Case("EVA", lambda: lora(init_lora_weights="eva", eva_config=peft.EvaConfig())),
    "orthogonal": Case("LoRA, orthogonal start", lambda: lora(init_lora_weights="orthogonal")),
    "mica": Case("MiCA", lambda: (peft.DeloraConfig, lora(init_lora_weights="mica"))[1]),
    "alora": Case("aLoRA", lambda: lora(alora_invocation_tokens=[9, 2], **TEXT), STAYS),
    "embeddings": Case(
        "LoRA of embedding and head",
        lambda: lora(target_modules=["embed_tokens", "lm_head"]),
        quantized_embedding=True,
    ),
    "token-indices": Case(
        "LoRA with trainable tokens", lambda: lora(trainable_token_indices=[1, 5]), quantized_embedding=True
    ),
    "pissa": Case("PiSSA", lambda: lora(init_lora_weights="pissa"), NEEDS_FLOAT),
    "olora": Case("OLoRA", lambda: lora(init_lora_weights="olora"), NEEDS_FLOAT),
    "adalora": Case(
        "AdaLoRA", lambda: peft.AdaLoraConfig(target_modules=ALL, total_step=10, init_r=4, target_r=2), several=False
    ),
    "ia3": Case("IA3", lambda: peft.IA3Config(target_modules=ALL, feedforward_modules=["down_proj"])),
    "vera": Case("VeRA", lambda: peft.VeraConfig(target_modules=SQUARE, r=4)),
    "loha": Case("LoHa", lambda: peft.LoHaConfig(target_modules=ALL, r=2)),
    "lokr": Case("LoKr", lambda: peft.LoKrConfig(target_modules=ALL, r=2)),
    "oft": Case("OFT", lambda: peft.OFTConfig(target_modules=ALL, oft_block_size=4, use_cayley_neumann=False)),
    "boft": Case("BOFT", lambda: peft.BOFTConfig(target_modules=ALL, boft_block_size=4)),
    "hra": Case("HRA", lambda: peft.HRAConfig(target_modules=ALL, r=4)),
    "fourierft": Case("FourierFT", lambda: peft.FourierFTConfig(target_modules=ALL, n_frequency=20)),
    "randlora": Case("RandLora", lambda: peft.RandLoraConfig(target_modules=SQUARE, r=4)),
    "vblora": Case("VB-LoRA", lambda: peft.VBLoRAConfig(target_modules=ALL, r=2, num_vectors=20, vector_length=4)),
    "miss": Case("MiSS", lambda: peft.MissConfig(target_modules=ALL, r=4)),
    "miss-bat": Case("MiSS (bat)", lambda: peft.MissConfig(target_modules=ALL, r=4, init_weights="bat")),
    "shira": Case("SHiRA", lambda: peft.ShiraConfig(target_modules=ALL, r=2)),
    "c3a": Case("C3A", lambda: peft.C3AConfig(target_modules=ALL, block_size=8)),
    "road": Case("RoAd", lambda: peft.RoadConfig(target_modules=ALL, group_size=8)),
    "waveft": Case("WaveFT", lambda: peft.WaveFTConfig(target_modules=ALL, n_frequency=20)),
    "osf": Case("OSF", lambda: peft.OSFConfig(target_modules=ALL)),
    "delora": Case("DeLoRA", lambda: peft.DeloraConfig(target_modules=ALL, r=4)),
    "gralora": Case("GraLoRA", lambda: peft.GraloraConfig(target_modules=SQUARE, r=4, gralora_k=2)),
    "adamss": Case("AdaMSS", lambda: peft.AdamssConfig(target_modules=SQUARE, r=4, num_subspaces=2, subspace_rank=1)),
    "beft": Case("BEFT", lambda: peft.BeftConfig(target_modules=SQUARE), STAYS),
    "lily": Case("Lily", lambda: peft.LilyConfig(target_modules=SQUARE, r=4), STAYS),
    "frod": Case("FRoD", lambda: peft.FrodConfig(target_modules=SQUARE)),
    "pvera": Case("PVeRA", lambda: peft.PveraConfig(target_modules=SQUARE, r=4)),
    "glora": Case("GLoRA", lambda: peft.GloraConfig(target_modules=SQUARE, r=4), NEEDS_FLOAT),
    "unilora": Case("UniLoRA", lambda: peft.UniLoraConfig(target_modules=SQUARE, r=4, theta_d_length=32)),
    "hira": Case("HiRA", lambda: peft.HiraConfig(target_modules=ALL, r=4)),
    "tinylora": Case("TinyLoRA", lambda: peft.TinyLoraConfig(target_modules=ALL, r=2)),
    "psoft": Case("PSOFT", lambda: peft.PsoftConfig(target_modules=ALL, r=4)),
    "peanut": Case("PEANuT", lambda: peft.PeanutConfig(target_modules=SQUARE, r=4)),
    "supertuning": Case("SuperTuning", lambda: peft.SupertuningConfig(target_modules=ALL)),
    "deft": Case("DEFT", lambda: peft.DeftConfig(target_modules=ALL, r=4)),
    "shadow": Case("ShadowPEFT", lambda: peft.ShadowConfig(), STAYS),
    "poly": Case(
        "Poly",
        lambda: peft.PolyConfig(target_modules=ALL, r=2, n_tasks=2, n_splits=1, n_skills=2, **TEXT),
        STAYS,
        inputs=TASKS,
    ),
    "ln": Case("LN tuning", lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]), MERGES_ITSELF),
    "tokens": Case(
        "trainable tokens", lambda: peft.TrainableTokensConfig(token_indices=[5, 9]), quantized_embedding=True
    ),
    "prompt": Case("prompt tuning", lambda: peft.PromptTuningConfig(**VIRTUAL), STAYS, quantized_embedding=True),
    "multitask-prompt": Case(
        "multitask prompt tuning",
        lambda: peft.MultitaskPromptTuningConfig(**VIRTUAL, num_tasks=2),
        STAYS,
        inputs=TASKS,
    ),
    "prefix": Case("prefix tuning", lambda: peft.PrefixTuningConfig(**VIRTUAL), STAYS),
    "p-tuning": Case("P-tuning", lambda: peft.PromptEncoderConfig(**VIRTUAL, encoder_hidden_size=16), STAYS),
    "cpt": Case(
        "CPT",
        lambda: peft.CPTConfig(cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2], **TEXT),
        STAYS,
        quantized_embedding=True,
    ),
    "cartridge": Case("Cartridge", lambda: peft.CartridgeConfig(**VIRTUAL), STAYS),
    "adaption-prompt": Case(
        "adaption prompt", lambda: peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, **TEXT), STAYS
    ),
}
ELSEWHERE = {"X-LoRA": STAYS}  # tested by a function of its own


class Models(NamedTuple):
    """A lowbit model, and the float model of the same weights."""

    lowbit: PreTrainedModel
    plain: PreTrainedModel


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Models]:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(vocab_size=64, num_hidden_layers=1, max_position_embeddings=64, bos_token_id=0, **sizes)
    made: dict[bool, Models] = {}

    def make(with_embeddings: bool) -> Models:
        if with_embeddings not in made:
            kept = () if with_embeddings else (nn.Embedding,)  # as a conversion does by default
            scheme = Scheme("uniform", 4, 16)
            out = tmp_path_factory.mktemp("m") / "m"
            torch.manual_seed(0)
            float_model = LlamaForCausalLM(config)
            write_model(float_model, out, lambda p, m: None if isinstance(m, kept) or p == "lm_head" else scheme)
            lowbit = lowbit_format.from_pretrained(out).eval()
            for module in lowbit.modules():
                if isinstance(module, LowbitModule):  # the random values are large: a token would look at one other
                    module.scales.mul_(0.1)
                    module.zeros.mul_(0.1)
            made[with_embeddings] = Models(lowbit, copy.deepcopy(lowbit).dequantize().eval())
        return made[with_embeddings]

    return make


def made(model: PreTrainedModel, config: Any) -> Any:
    torch.manual_seed(1)
    return peft.get_peft_model(copy.deepcopy(model), config)


def logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, **inputs).logits  # type: ignore[no-any-return]


def trained(model: Any, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients by name; then the numbers are changed at random, and these are the logits."""
    model.train()
    torch.manual_seed(2)
    model(input_ids=IDS, labels=IDS, **inputs).loss.backward()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in parameters.values():
            p += 0.5 * torch.randn(p.shape, generator=generator)
    return {name: p.grad for name, p in parameters.items() if p.grad is not None}, logits(model, inputs)


@contextlib.contextmanager
def configured(case: Case) -> Iterator[Any]:
    try:
        config = case.config()
    except (AttributeError, TypeError) as e:
        if peft.__version__ >= "0.21.2":
            raise
        pytest.skip(f"PEFT {peft.__version__}: {e}")
    yield config


@pytest.mark.parametrize("name", METHODS)
def test_method(name: str, models: Callable[[bool], Models], tmp_path: Path) -> None:
    case = METHODS[name]
    lowbit, plain = models(case.quantized_embedding)
    with configured(case) as config:
        pass
    if case.verdict == NEEDS_FLOAT:
        refused: tuple[type[Exception], ...] = (UnsupportedOperationError, ValueError)  # GLoRA: by PEFT itself
        with pytest.raises(refused, match=r"model\.dequantize\(\)|plain torch\.nn\.Linear"):
            made(lowbit, config)
        made(plain, case.config())
        return
    tuned, twin = made(lowbit, config), made(plain, case.config())
    (grads, found), (want_grads, want) = trained(tuned, case.inputs), trained(twin, case.inputs)
    assert grads
    assert grads.keys() == want_grads.keys()
    for key, grad in grads.items():
        size = float(
            want_grads[key].abs().max()
        )  # DeLoRA's are up to 1,000, and float32 sums are as exact as their terms
        torch.testing.assert_close(grad, want_grads[key], rtol=1e-4, atol=max(1e-6, 1e-5 * size))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    before = logits(lowbit, {})
    assert not torch.allclose(found[:, -IDS.shape[1] :], before, rtol=0, atol=1e-5)

    with tuned.disable_adapter():
        assert torch.equal(logits(tuned, case.inputs), before)
    tuned.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(lowbit), tmp_path)
    assert torch.equal(logits(again, case.inputs), found)
    if case.several:
        tuned.add_adapter("second", case.config())
        tuned.set_adapter("second")
        assert not torch.equal(logits(tuned, case.inputs), found)
        tuned.set_adapter("default")
        assert torch.equal(logits(tuned, case.inputs), found)
        tuned.delete_adapter("second")

    assert merging(tuned, case.inputs, found) == case.verdict
    if case.verdict == MERGES:
        tuned.dequantize()  # the adapter stays, over a float model
        assert not any(isinstance(m, LowbitLinear) for m in tuned.modules())
        torch.testing.assert_close(logits(tuned, {}), found, rtol=1e-4, atol=1e-5)
        merged = tuned.merge_and_unload()
        assert type(merged) is LlamaForCausalLM
        torch.testing.assert_close(logits(merged, {}), found, rtol=1e-4, atol=1e-4)


def merging(tuned: Any, inputs: dict[str, Any], found: Tensor) -> str:
    """The verdict that fits what merging into the lowbit model does; it must change nothing where it is refused."""
    for safe in (False, True):
        try:
            merged = copy.deepcopy(tuned).merge_and_unload(safe_merge=safe)
        except UnsupportedOperationError as e:
            assert re.search(r"To merge an adapter, call model\.dequantize\(\) first", str(e))  # noqa: PT017
            with pytest.raises(UnsupportedOperationError):
                tuned.merge_and_unload(safe_merge=safe)
            assert torch.equal(logits(tuned, inputs), found)
            verdict = MERGES
        except (AttributeError, NotImplementedError, ValueError):
            return STAYS
        else:
            assert torch.equal(logits(merged, {}), found)
            return MERGES_ITSELF
    return verdict


def test_x_lora(models: Callable[[bool], Models], tmp_path: Path) -> None:
    lowbit, plain = models(False)
    for name in ("0", "1"):
        adapter = made(lowbit, lora(target_modules=SQUARE, **TEXT))
        trained(adapter, {})
        adapter.save_pretrained(tmp_path / name)
    adapters = {name: str(tmp_path / name) for name in ("0", "1")}
    found = []
    for model in (lowbit, plain):
        config = peft.XLoraConfig(hidden_size=32, xlora_depth=1, adapters=dict(adapters), **TEXT)
        model = copy.deepcopy(model)
        model.config.use_cache = False
        found.append(trained(made(model, config), {}))
    for key, grad in found[0][0].items():
        torch.testing.assert_close(grad, found[1][0][key], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)


def test_all_linear_layers_are_those_of_the_float_model(models: Callable[[bool], Models]) -> None:
    lowbit, plain = models(True)
    found = made(lowbit, lora()).base_model.targeted_module_names
    assert found == made(plain, lora()).base_model.targeted_module_names != []


def test_every_method_of_this_release_is_tested() -> None:
    if peft.__version__ > "0.21.2":
        pytest.skip("a newer PEFT may have more")
    types = {kind.value for kind in peft.PeftType} & set(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING)
    tested = {"XLORA"}
    for case in METHODS.values():
        with contextlib.suppress(AttributeError, TypeError):
            tested.add(case.config().peft_type.value)
    assert types - tested == set()


def test_the_documented_table() -> None:
    text = DOCUMENT.read_text("utf-8").split("## What PEFT lacks")[0]
    rows = re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|", text, re.MULTILINE)
    documented = {method: verdict for methods, verdict in rows[1:] for method in methods.split("; ")}
    assert documented == {case.method: case.verdict for case in METHODS.values()} | ELSEWHERE
