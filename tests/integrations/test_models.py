"""Whole models through transformers: loading, heads, ties, dtypes, precision, saving, and what cannot be done."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.building import Choice, write_model
from support.config_files import edit_config
from support.models import (
    BCQ,
    IDS,
    MODELS,
    RAGGED,
    bert_config,
    mixed,
    opt,
)
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForMaskedLM,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

import lowbit_format
from lowbit_format.container.reader import ModelReader
from lowbit_format.errors import (
    DigestError,
    FormatError,
    LoadError,
    PrecisionError,
    TensorError,
    UnsupportedOperationError,
)
from lowbit_format.integrations.quantizer import LowbitConfig
from lowbit_format.runtime.modules import LowbitModule


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    root, made = tmp_path_factory.mktemp("models"), dict[str, Path]()

    def make(name: str, choose: Choice = mixed) -> Path:
        if choose is not mixed:
            torch.manual_seed(0)
            return write_model(MODELS[name]().eval(), root / f"{name}-{len(list(root.iterdir()))}", choose)
        if name not in made:
            torch.manual_seed(0)
            made[name] = write_model(MODELS[name]().eval(), root / name, choose, shards=2)
        return made[name]

    return make


def logits(model: Any, **kwargs: Any) -> torch.Tensor:
    if model.config.is_encoder_decoder:
        kwargs["decoder_input_ids"] = IDS
    with torch.no_grad():
        out = model(input_ids=IDS, **kwargs)
    return out.logits if "logits" in out else out.last_hidden_state


def float_twin(directory: Path, cls: Any) -> PreTrainedModel:
    """The float model whose weights are the reference-decoded ones, built without any part of the runtime."""
    reader = ModelReader(directory)
    config = copy.deepcopy(cls.config_class.from_pretrained(directory))
    del config.quantization_config
    model = cls(config).eval().float()
    state = {n: torch.from_numpy(reader.tensor(n).copy()) for n in reader.names() if n not in reader.lowbit_names()}
    for entry in reader.config:
        weight = torch.from_numpy(reader.decode(entry.path))
        state[entry.weight] = weight.t() if entry.kind == "conv1d" else weight
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= set(model.all_tied_weights_keys)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_computes_what_the_decoded_model_computes(name: str, directory: Callable[..., Path]) -> None:
    cls = type(MODELS[name]())
    model = cls.from_pretrained(directory(name), dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(float_twin(directory(name), cls)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shard", ["20KB", "1GB"])
def test_saves_what_it_loaded(name: str, shard: str, directory: Callable[..., Path], tmp_path: Path) -> None:
    source = ModelReader(directory(name))
    lowbit_format.from_pretrained(directory(name)).save_pretrained(tmp_path, max_shard_size=shard)
    saved = ModelReader(tmp_path)
    assert saved.verify() == 0  # and no tensor is without a digest
    assert (len(saved.headers) == 1) == (shard == "1GB")
    assert sorted(saved.names()) == sorted(source.names())
    assert all(bytes(saved.raw(n)) == bytes(source.raw(n)) for n in source.names())
    assert saved.config == source.config
    assert saved.fingerprint() == source.fingerprint()
    assert saved.model_config["dtype"] == source.model_config["dtype"]
    assert saved.model_config["architectures"] == source.model_config["architectures"]


@pytest.mark.parametrize(
    ("name", "cls", "prefix", "head"),
    [
        ("bert-base", AutoModelForSequenceClassification, "bert.", "classifier"),
        ("bert-base", AutoModelForTokenClassification, "bert.", "classifier"),
        ("bert-base", AutoModelForMaskedLM, "bert.", "cls"),
        ("bert", AutoModelForSequenceClassification, "bert.", ("classifier", "pooler")),
        ("bert", AutoModel, "", "pooler"),
        ("llama-base", AutoModelForCausalLM, "model.", "lm_head"),
        ("llama-tied", AutoModel, "", ()),
        ("llama", AutoModel, "", ()),
        ("t5", T5EncoderModel, "", ()),
    ],
)
def test_heads(name: str, cls: Any, prefix: str, head: Any, directory: Callable[..., Path], tmp_path: Path) -> None:
    """A file with another head, or none: `head` is what may be missing, all else comes from the file."""
    source = ModelReader(directory(name))
    model, info = cls.from_pretrained(directory(name), output_loading_info=True)
    assert all(key.removeprefix(prefix).startswith(head) for key in info["missing_keys"])
    places = {path: m for path, m in model.named_modules() if isinstance(m, LowbitModule)}
    assert places
    for path, module in places.items():
        owner = model.config.quantization_config.parsed.tied.get(path, path)
        names = (owner, owner.removeprefix(prefix), f"bert.{owner}", f"model.{owner}")
        (found,) = {n for n in names if n in source.config.modules}
        assert torch.equal(module.dequantize(torch.float32), torch.from_numpy(source.decode(found)))
    model.save_pretrained(tmp_path)
    saved = ModelReader(tmp_path)
    saved.verify()
    assert set(saved.config.modules) | set(saved.config.tied) == set(places)
    again = cls.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_headless_base_under_a_tied_head(directory: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory("llama-base"))
    assert model.lm_head.planes is model.model.embed_tokens.planes
    assert model.lm_head.scales is model.model.embed_tokens.scales


@pytest.mark.parametrize("dtype", ["auto", torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
def test_dtypes(dtype: Any, device_map: str | None, directory: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory("llama"), dtype=dtype, device_map=device_map)
    want = torch.bfloat16 if dtype == "auto" else dtype
    assert model.dtype == model.config.dtype == want == model.model.dtype
    kept = {p.dtype for n, p in model.named_parameters() if n.endswith((".scales", ".zeros", ".codebook"))}
    assert kept == {torch.float16, torch.bfloat16, torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "norm" in n} == {want}
    assert not any(p.requires_grad for m in model.modules() if isinstance(m, LowbitModule) for p in m.parameters())
    assert logits(model).dtype == want
    assert model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2, min_new_tokens=2).shape == (2, 9)


def test_modules_kept_in_float32(directory: Callable[..., Path]) -> None:
    """transformers keeps T5's ``wo`` in float32, and T5 reads ``wo.weight.dtype``; stored tensors stay as they are."""
    model = T5ForConditionalGeneration.from_pretrained(directory("t5"), dtype=torch.float16)
    wo = model.decoder.block[0].layer[2].DenseReluDense.wo
    assert wo.weight.dtype == torch.float32
    assert (wo.planes.dtype, wo.scales.dtype) == (torch.uint8, torch.float16)
    assert logits(model).dtype == torch.float16
    assert model.generate(IDS, max_new_tokens=2).shape[0] == 2


def test_offloaded_to_disk(directory: Callable[..., Path], tmp_path: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(directory("llama-tied"))
    places = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    device_map = {**dict.fromkeys(places, "cpu"), "model.layers.1": "disk"}
    path = directory("llama-tied")
    model = AutoModelForCausalLM.from_pretrained(path, device_map=device_map, offload_folder=tmp_path)
    assert model.model.layers[1].mlp.up_proj.planes.is_meta
    assert torch.equal(logits(model), logits(whole))
    with pytest.raises(LoadError, match="cannot be offloaded"):
        lowbit_format.from_pretrained(
            directory("llama-tied", lambda p, m: BCQ), bits=2, device_map=device_map, offload_folder=tmp_path
        )


@pytest.mark.parametrize("name", ["llama-tied", "bert", "gpt2"])
def test_lower_precision(name: str, directory: Callable[..., Path], tmp_path: Path) -> None:
    path = directory(name, lambda p, m: RAGGED if p.endswith(("k_proj", "key", "c_fc")) else BCQ)
    source = ModelReader(path)
    model = lowbit_format.from_pretrained(path, bits=2, verify=True)
    model.save_pretrained(tmp_path)
    saved = ModelReader(tmp_path)
    saved.verify()
    for entry in source.config:
        want = source.decode(entry.path, bits=2)
        got = model.get_submodule(entry.path).dequantize(torch.float32)
        assert (got.t() if entry.kind == "conv1d" else got).detach().contiguous().numpy().tobytes() == want.tobytes()
        assert saved.decode(entry.path).tobytes() == want.tobytes()
        assert saved.module(entry.path).scheme.bits == 2
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))
    with pytest.raises(PrecisionError, match="NST-3"):
        lowbit_format.from_pretrained(path, bits=1)


def test_from_pretrained(directory: Callable[..., Path], tmp_path: Path) -> None:
    model = lowbit_format.from_pretrained(directory("bert"))
    assert isinstance(model, BertForMaskedLM)
    headed = lowbit_format.from_pretrained(directory("bert"), model_class=AutoModelForSequenceClassification)
    assert headed.classifier.weight.shape == (2, 32)
    BertModel(bert_config()).save_pretrained(tmp_path)
    with pytest.raises(LoadError, match="not a lowbit model"):
        lowbit_format.from_pretrained(tmp_path)


def test_verify_finds_damage(directory: Callable[..., Path]) -> None:
    path = directory("gpt2", lambda p, m: BCQ)
    info = ModelReader(path).info("transformer.wte.planes")
    file = path / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[info.begin] ^= 1
    file.write_bytes(raw)
    lowbit_format.from_pretrained(path)
    with pytest.raises(DigestError, match=r"transformer\.wte\.planes"):
        lowbit_format.from_pretrained(path, verify=True)


def rename(config: dict[str, Any]) -> None:
    modules = config["quantization_config"]["modules"]
    modules["transformer.h.7.attn.c_attn"] = modules.pop("transformer.h.0.attn.c_attn")


@pytest.mark.parametrize(
    ("edit", "error", "match"),
    [
        (rename, TensorError, "h.7.attn.c_attn.planes.*missing"),
        (lambda c: c.update(n_layer=1), LoadError, r"h\.1\."),
        (lambda c: c.update(n_layer=3), LoadError, r"has 'transformer\.h\.2\."),
        (lambda c: c.update(n_embd=64), LoadError, r"c_attn: the file has conv1d \[96, 32\]"),
        (lambda c: c["quantization_config"].update(format_version="2.0"), FormatError, "VER-1"),
    ],
    ids=["module", "fewer-layers", "more-layers", "shape", "version"],
)
def test_config_and_weights_disagree(
    edit: Callable[[dict[str, Any]], None], error: type[Exception], match: str, directory: Callable[..., Path]
) -> None:
    path = directory("gpt2", lambda p, m: BCQ)
    edit_config(path, edit)
    with pytest.raises(error, match=match):
        AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("lost", ["transformer.wte.weight", "transformer.ln_f.weight", "transformer.h.1.ln_1.bias"])
def test_a_file_that_lacks_a_tensor_of_its_own_class_is_refused(lost: str, directory: Callable[..., Path]) -> None:
    """transformers alone would warn and go on with random values."""
    path = directory("gpt2", lambda p, m: None if isinstance(m, nn.Embedding) else BCQ)
    tensors = load_file(path / "model.safetensors")
    del tensors[lost]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoadError, match=f"{lost}|lm_head.weight"):  # which is tied to the embedding
        AutoModelForCausalLM.from_pretrained(path)


def test_subclasses_are_not_replaced(tmp_path: Path) -> None:
    """OPT's positions are an nn.Embedding with a forward of its own; a file that has them is refused by name."""
    model = opt()
    model.model.decoder.embed_positions = nn.Embedding(34, 32)
    path = write_model(model, tmp_path / "opt", lambda p, m: BCQ)
    with pytest.raises(LoadError, match="embed_positions: a OPTLearnedPositionalEmbedding cannot hold bit-planes"):
        AutoModelForCausalLM.from_pretrained(path)


def test_a_state_dict_is_refused(directory: Callable[..., Path]) -> None:
    config = LlamaConfig.from_pretrained(directory("llama"))
    with pytest.raises(LoadError, match="state_dict"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict={"x": torch.zeros(1)})


def test_config_round_trip(directory: Callable[..., Path]) -> None:
    raw = json.loads((directory("t5") / "config.json").read_text())["quantization_config"]
    config = LowbitConfig.from_dict(raw)
    assert config.to_dict() == raw == dict(config) == json.loads(config.to_json_string())


def test_casts_and_sizes(directory: Callable[..., Path]) -> None:
    model, plain = AutoModelForCausalLM.from_pretrained(directory("llama-tied")), MODELS["llama-tied"]()
    lowbit = [m for m in model.modules() if isinstance(m, LowbitModule)]
    tiled = [m.is_tiled for m in lowbit]
    assert model.num_parameters() == plain.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == plain.num_parameters(exclude_embeddings=True)
    assert model.num_parameters(only_trainable=True) == 5 * 32  # the norms
    assert [m.is_tiled for m in lowbit] == tiled  # the Trainer counts at every step
    assert any(tiled)
    before = [p.clone() for m in lowbit for p in m.matrix_parameters().values()]
    for cast, dtype in ((model.half, torch.float16), (model.bfloat16, torch.bfloat16), (model.float, torch.float32)):
        assert cast().dtype == dtype
        assert logits(model).dtype == dtype
    after = [p for m in lowbit for p in m.matrix_parameters().values()]
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(after, before, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert logits(model).dtype == torch.bfloat16


def test_resize_token_embeddings(directory: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory("llama-tied"))
    assert model.resize_token_embeddings(64) is model.get_input_embeddings()
    for arguments in ((65,), (None, 128)):
        with pytest.raises(UnsupportedOperationError, match="dequantize"):
            model.resize_token_embeddings(*arguments)
    kept = directory("llama", lambda p, m: None if p in ("model.embed_tokens", "lm_head") else BCQ)
    assert AutoModelForCausalLM.from_pretrained(kept).resize_token_embeddings(65).num_embeddings == 65


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_models_are_tied_again(name: str, directory: Callable[..., Path]) -> None:
    """Programs call it at any time, before the first product and after; a copy is a model like any other."""
    model = AutoModelForCausalLM.from_pretrained(directory(name))
    model.tie_weights()
    want = logits(model)
    for one in (model, copy.deepcopy(model)):
        one.tie_weights()
        assert torch.equal(logits(one), want)
        one.resize_token_embeddings(64)
        assert torch.equal(logits(one), want)
        assert torch.equal(logits(copy.deepcopy(one)), want)


def test_a_state_dict_leaves_parameters_in_training_as_they_are(directory: Callable[..., Path]) -> None:
    """Of those that were cast from outside, the frozen ones get the dtypes again that the file declares."""
    model = AutoModelForCausalLM.from_pretrained(directory("llama"))
    linear = model.model.layers[0].mlp.up_proj
    other = model.model.layers[0].mlp.down_proj
    for module in (linear, other):
        module.scales.data = module.scales.float()
    linear.scales.requires_grad_(True)
    with torch.no_grad():
        linear.scales += 1e-5
    before = linear.scales.detach().clone()
    found = model.state_dict()
    assert torch.equal(linear.scales, before)
    assert torch.equal(found["model.layers.0.mlp.up_proj.scales"], before)
    assert found["model.layers.0.mlp.down_proj.scales"].dtype == torch.float16


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "t5"])
def test_dequantize(name: str, directory: Callable[..., Path], tmp_path: Path) -> None:
    model = lowbit_format.from_pretrained(directory(name))
    want = logits(model)
    plain = model.dequantize()
    assert type(plain) is type(MODELS[name]())
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    torch.testing.assert_close(logits(plain), want, rtol=1e-4, atol=1e-5)
    plain.save_pretrained(tmp_path)
    assert torch.equal(logits(type(plain).from_pretrained(tmp_path)), logits(plain))


def test_copies(directory: Callable[..., Path]) -> None:
    model = lowbit_format.from_pretrained(directory("llama-tied"))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert isinstance(twin, LlamaForCausalLM)
        assert twin.lm_head.planes is twin.model.embed_tokens.planes
        assert torch.equal(logits(twin), logits(model))


@pytest.mark.parametrize("name", ["llama-tied", pytest.param("t5", marks=pytest.mark.exhaustive)])
def test_compiles_to_one_graph(name: str, directory: Callable[..., Path]) -> None:
    model = lowbit_format.from_pretrained(directory(name))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, use_cache=False), logits(model, use_cache=False))


def test_gradient_checkpointing(directory: Callable[..., Path]) -> None:
    model = lowbit_format.from_pretrained(directory("llama-tied")).train()
    found = []
    for switch in (lambda: None, model.gradient_checkpointing_enable):
        switch()
        model.zero_grad()
        model.enable_input_require_grads()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        found.append(model.model.norm.weight.grad.clone())
        assert model.model.layers[0].mlp.up_proj.planes.grad is None
    torch.testing.assert_close(*found)
