"""Stacks of experts: found in checkpoints of every form, planned, quantized an expert at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import edit_weights, weights
from support.conversions import content
from support.experts import build as build_family

from lowbit_format.container.reader import ModelReader
from lowbit_format.converters import Recipe, Rule, convert_hf_to_lowbit, quantizer
from lowbit_format.converters.convert import plan_conversion
from lowbit_format.errors import CoverageError, NonFiniteWeightError, RecipeError, SourceError
from lowbit_format.export import dequantize_directory
from lowbit_format.quantize import Target, quantize
from lowbit_format.reference import decode
from lowbit_format.runtime import known_experts

Checkpoint = Callable[..., Path]

TARGET = Target(bits=2, group_size=32, nested=(1,))
RECIPE = Recipe(TARGET)
PATH = "model.layers.1.mlp.experts"


def stacked(plain: dict[str, torch.Tensor], layer: int, *names: str) -> np.ndarray:
    """The matrices ``[experts, rows, cols]`` that transformers makes of a Mixtral checkpoint's w1 and w3, or w2."""
    at = f"model.layers.{layer}.block_sparse_moe.experts"
    return np.stack([torch.cat([plain[f"{at}.{e}.{n}.weight"] for n in names]).float().numpy() for e in range(4)])


def fused(directory: Path) -> Path:
    """The checkpoint with the stacks of transformers instead of tensors for each expert."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(2):
            parts = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
            made = {name: torch.tensor(stacked(tensors, layer, *own)) for name, own in parts.items()}
            for key in [k for k in tensors if f"layers.{layer}.block_sparse_moe.experts" in k]:
                del tensors[key]
            tensors.update({f"model.layers.{layer}.mlp.experts.{name}": t for name, t in made.items()})

    return edit_weights(directory, change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_expert_is_what_the_solver_gives(dtype: torch.dtype, checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("mixtral", dtype=dtype)
    done = convert_hf_to_lowbit(str(source), tmp_path / "out", RECIPE)
    reader, plain = ModelReader(tmp_path / "out"), weights(source)
    assert reader.verify() == 0
    assert done.plan.coverage == 1.0
    for name, parts in (("gate_up_proj", ("w1", "w3")), ("down_proj", ("w2",))):
        matrices, error = stacked(plain, 1, *parts), 0.0
        for e, matrix in enumerate(matrices):
            one = quantize(matrix, TARGET)
            error += one.squared_error
            assert np.array_equal(decode(reader.matrix(f"{PATH}.{name}", e)), decode(one.matrix))
        outcome = done.outcomes[f"{PATH}.{name}"]
        assert outcome.squared_error == error
        assert outcome.module == reader.config.modules[f"{PATH}.{name}"]
        assert outcome.module.shape == matrices.shape
    router = "model.layers.1.block_sparse_moe.gate.weight"
    assert bytes(reader.raw(router)) == plain[router].view(torch.uint8).numpy().tobytes()


def test_stacks_in_the_checkpoint_give_the_same(
    own_checkpoint: Checkpoint, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = fused(own_checkpoint("mixtral"))
    convert_hf_to_lowbit(str(source), tmp_path / "fused", RECIPE)
    convert_hf_to_lowbit(str(checkpoint("mixtral")), tmp_path / "each", RECIPE)
    assert ModelReader(tmp_path / "fused").fingerprint() == ModelReader(tmp_path / "each").fingerprint()
    torch.save(weights(source), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    convert_hf_to_lowbit(str(source), tmp_path / "pickled", RECIPE)
    assert ModelReader(tmp_path / "pickled").fingerprint() == ModelReader(tmp_path / "each").fingerprint()


def test_a_conversion_with_transposition_is_followed(tmp_path: Path) -> None:
    """gpt-oss has them transposed in the model; Qwen3-VL-MoE's checkpoints do, and are turned on loading."""
    import transformers as hf

    build_family("gpt-oss").save_pretrained(tmp_path / "gpt")
    convert_hf_to_lowbit(str(tmp_path / "gpt"), tmp_path / "gpt-out", RECIPE)
    reader, plain = ModelReader(tmp_path / "gpt-out"), weights(tmp_path / "gpt")
    entry = reader.config.modules[f"{PATH}.gate_up_proj"]
    assert (entry.kind, entry.shape) == ("experts_transposed", (4, 96, 32))
    expected = quantize(plain[f"{PATH}.gate_up_proj"][2].T.numpy(), TARGET).matrix
    assert np.array_equal(decode(reader.matrix(entry.path, 2)), decode(expected))

    text = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "vocab_size": 96, "intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2,
        "pad_token_id": 0, "moe_intermediate_size": 40,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    eye = {
        "depth": 1, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "intermediate_size": 48, "out_hidden_size": 32,
        "deepstack_visual_indexes": [0],
    }  # fmt: skip
    hf.set_seed(0)
    model = hf.Qwen3VLMoeForConditionalGeneration(hf.Qwen3VLMoeConfig(text_config=text, vision_config=eye))
    model.save_pretrained(tmp_path / "vl")
    fingerprints = []
    for turned in (False, True):
        if turned:
            tensors = weights(tmp_path / "vl")
            turn = {k: t.transpose(1, 2).contiguous() for k, t in tensors.items() if ".experts." in k and t.ndim == 3}
            if not turn and hf.__version__ == "5.0.0":
                return  # it saves a tensor for each expert, and cannot load the stacks itself
            assert len(turn) == 2
            save_file({**tensors, **turn}, tmp_path / "vl" / "model.safetensors", {"format": "pt"})
        out = tmp_path / f"vl-{turned}"
        convert_hf_to_lowbit(str(tmp_path / "vl"), out, RECIPE)
        fingerprints.append(ModelReader(out).fingerprint())
    assert fingerprints[0] == fingerprints[1]


def test_stacks_that_a_checkpoint_numbers_as_one(tmp_path: Path) -> None:
    """ERNIE 4.5 VL: the first half of a layer's experts are for text, the others for pictures."""
    import transformers as hf

    text = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 96, "intermediate_size": 48, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [40, 24],
        "mlp_layer_types": ["sparse"], "moe_num_shared_experts": 1, "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    eye = {"depth": 1, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "intermediate_size": 48}
    model = hf.Ernie4_5_VLMoeForConditionalGeneration(hf.Ernie4_5_VLMoeConfig(text_config=text, vision_config=eye))
    model.save_pretrained(tmp_path / "source")
    done = convert_hf_to_lowbit(str(tmp_path / "source"), tmp_path / "out", Recipe(Target("uniform", 8, 32)))
    reader, plain = ModelReader(tmp_path / "out"), weights(tmp_path / "source")
    assert done.plan.coverage > 0.9
    at = "model.language_model.layers.0.mlp"
    assert reader.decode(f"{at}.text_moe.experts.gate_up_proj").shape == (4, 80, 32)
    down = reader.decode(f"{at}.vision_moe.experts.down_proj")
    for e, matrix in enumerate(down):
        assert np.allclose(matrix, plain[f"model.layers.0.mlp.experts.{4 + e}.down_proj.weight"], atol=1e-3)
    dequantize_directory(reader, tmp_path / "float")
    assert weights(tmp_path / "float").keys() == plain.keys()


def test_stacks_of_parts_get_their_names_back(tmp_path: Path) -> None:
    """Step 3.7 has the gates of all experts in one tensor and what they gate in another."""
    import transformers as hf

    text = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "vocab_size": 96, "intermediate_size": 48, "n_routed_experts": 4, "num_local_experts": 4,
        "share_expert_dim": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "mlp_layer_types": ["sparse"],
        "layer_types": ["full_attention"],
    }  # fmt: skip
    eye = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    model = hf.Step3p7ForConditionalGeneration(hf.Step3p7Config(text_config=text, vision_config=eye))
    model.save_pretrained(tmp_path / "source")
    convert_hf_to_lowbit(str(tmp_path / "source"), tmp_path / "out", Recipe(Target("uniform", 8, 32)), min_coverage=0)
    dequantize_directory(ModelReader(tmp_path / "out"), tmp_path / "float", dtype="float32")
    plain, decoded = weights(tmp_path / "source"), weights(tmp_path / "float")
    assert decoded.keys() == plain.keys()
    for name in ("gate_proj", "up_proj", "down_proj"):
        key = f"model.layers.0.moe.{name}.weight"
        torch.testing.assert_close(decoded[key], plain[key], rtol=0, atol=1e-3)


def test_plan_and_recipe_name_the_parameter(checkpoint: Checkpoint) -> None:
    source = str(checkpoint("mixtral"))
    rules = (Rule("*.experts.down_proj", Target("uniform", 8, 0)), Rule("*.0.mlp.experts.*", None))
    _, plan, _ = plan_conversion(source, Recipe(TARGET, rules), min_coverage=0.5)
    found = {s.path: s.module() for s in plan.quantized if s.stack is not None}
    assert {path: (m.scheme.codec, m.shape) for path, m in found.items()} == {
        "model.layers.0.mlp.experts.down_proj": ("uniform", (4, 64, 96)),
        f"{PATH}.down_proj": ("uniform", (4, 64, 96)),
        f"{PATH}.gate_up_proj": ("bcq", (4, 192, 64)),
    }
    kept = [s.tensor.name for s in plan.kept() if s.counted]
    assert len(kept) == 8
    assert all(".0.block_sparse_moe.experts." in name for name in kept)
    assert 0.5 < plan.coverage < 0.9
    with pytest.raises(CoverageError, match=r"mlp\.experts\.gate_up_proj \(kept by the pattern"):
        plan_conversion(source, Recipe(TARGET, rules))
    with pytest.raises(RecipeError, match="matches no module"):
        plan_conversion(source, Recipe(TARGET, (Rule("*.experts.0.w1", None),)))


def test_experts_that_are_not_known_stay_and_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JetMoe's have a forward of another kind, which is known by the name of its class."""
    import transformers as hf

    config = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_key_value_heads": 2, "kv_channels": 8, "vocab_size": 96,
        "intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2,
    }  # fmt: skip
    monkeypatch.setattr(known_experts, "GROUPED", ())
    made = hf.JetMoeConfig(**config)
    made.pad_token_id = getattr(made, "pad_token_id", None)  # which the model of transformers 5.0 asks for
    hf.JetMoeForCausalLM(made).save_pretrained(tmp_path / "source")
    reason = "what JetMoeParallelExperts computes with its experts is not known"
    with pytest.raises(CoverageError, match=rf"only \d\.\d% .*\({reason}\); a newer transformers may"):
        convert_hf_to_lowbit(str(tmp_path / "source"), tmp_path / "out", RECIPE)
    done = convert_hf_to_lowbit(str(tmp_path / "source"), tmp_path / "out", RECIPE, min_coverage=0.0)
    reader, plain = ModelReader(tmp_path / "out"), weights(tmp_path / "source")
    kept = [s.tensor.name for s in done.plan.kept() if s.reason == reason]
    assert len(kept) == 4
    assert all(bytes(reader.raw(name)) == plain[name].numpy().tobytes() for name in kept)


def test_experts_that_come_out_differently_are_stored_alike(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """One expert on a grid; then one with scales that float16 cannot hold; then all on one grid."""

    def change(e: int, factor: float, *, sign: bool) -> Callable[[dict[str, torch.Tensor]], None]:
        def apply(tensors: dict[str, torch.Tensor]) -> None:
            for expert in range(4) if e < 0 else [e]:
                key = f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"
                tensors[key] = (torch.sign(tensors[key]) if sign else tensors[key]) * factor

        return apply

    source, path = own_checkpoint("mixtral"), f"{PATH}.down_proj"
    cases = [(2, 0.5, True, "F16", False), (1, 1e-6, False, "F32", False), (-1, 0.25, True, "F16", True)]
    for i, (e, factor, sign, scales, lossless) in enumerate(cases):
        edit_weights(source, change(e, factor, sign=sign))
        done = convert_hf_to_lowbit(str(source), tmp_path / f"{i}", Recipe(Target(bits=2, group_size=32)))
        outcome = done.outcomes[path]
        assert (outcome.module.scheme.scale_dtype, outcome.lossless) == (scales, lossless)
        assert bool(outcome.widened) == (scales == "F32")
        reader = ModelReader(tmp_path / f"{i}")
        assert reader.verify() == 0
        error = ((reader.decode(path) - stacked(weights(source), 1, "w2")) ** 2).sum()
        assert outcome.squared_error == pytest.approx(error, rel=1e-4, abs=1e-9)


def test_a_checkpoint_without_one_expert_is_refused(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = own_checkpoint("mixtral")
    edit_weights(source, lambda t: t.pop("model.layers.1.block_sparse_moe.experts.2.w2.weight"))
    with pytest.raises(SourceError, match=r"down_proj: the checkpoint has 3 tensors .* for 4 experts"):
        convert_hf_to_lowbit(str(source), tmp_path / "out", RECIPE)


@pytest.mark.parametrize(("experts", "shape"), [([2], (64, 95)), (range(4), (63, 96))], ids=["one", "all"])
def test_experts_of_another_shape_are_refused_before_the_work(
    experts: Iterable[int], shape: tuple[int, int], own_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = own_checkpoint("mixtral")
    names = [f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight" for e in experts]
    edit_weights(source, lambda t: t.update({name: torch.zeros(shape) for name in names}))
    with pytest.raises(
        SourceError, match=rf"experts\.{names[0].split('.')[5]}\.w2.*has shape \[{shape[0]}, {shape[1]}\]"
    ):
        plan_conversion(str(source), RECIPE)


def test_experts_without_one_of_their_parts_are_refused(own_checkpoint: Checkpoint) -> None:
    """The other part has the shape that it should have: what is told is the one that is absent."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for e in range(4):
            del tensors[f"model.layers.1.block_sparse_moe.experts.{e}.w3.weight"]

    source = edit_weights(own_checkpoint("mixtral"), change)
    with pytest.raises(SourceError, match=r"gate_up_proj: the checkpoint has '.*w1\.weight', but nothing like .*w3"):
        plan_conversion(str(source), RECIPE)


def test_experts_that_stand_there_twice_are_refused(own_checkpoint: Checkpoint) -> None:
    """As a stack and as a tensor for each, which may differ."""
    source = own_checkpoint("mixtral")
    whole = torch.tensor(stacked(weights(source), 1, "w2"))
    edit_weights(source, lambda t: t.update({f"{PATH}.down_proj": whole}))
    with pytest.raises(SourceError, match=r"down_proj: the checkpoint has it twice, .*w2\.weight.*take one"):
        plan_conversion(str(source), RECIPE)


def test_experts_of_several_dtypes(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """What counts is the dtype that holds them all; an expert of integers is refused before the work."""
    name = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"

    def change(e: int, dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], None]:
        return lambda tensors: tensors.update({name.format(e): tensors[name.format(e)].to(dtype)})

    source = edit_weights(own_checkpoint("mixtral"), change(0, torch.bfloat16))
    plan = convert_hf_to_lowbit(str(source), tmp_path / "out", RECIPE).plan
    dtypes = {step.path: step.tensor.dtype for step in plan.quantized}
    assert (dtypes[f"{PATH}.down_proj"], dtypes[f"{PATH}.gate_up_proj"]) == ("F32", "F32")
    edit_weights(source, change(2, torch.int8))
    with pytest.raises(SourceError, match=r"experts\.2\.w2\.weight: has dtype I8.*is it quantized already"):
        plan_conversion(str(source), RECIPE)


def test_a_bad_value_names_the_expert(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = own_checkpoint("mixtral")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"][3, 4] = float("nan")

    with pytest.raises(NonFiniteWeightError, match=r"experts\.down_proj\[2\]"):
        convert_hf_to_lowbit(str(edit_weights(source, spoil)), tmp_path / "out", RECIPE)
    assert {p.name for p in tmp_path.iterdir()} == {"source"}


def test_an_interrupted_conversion_resumes_to_the_same_bytes(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(checkpoint("mixtral"))
    convert_hf_to_lowbit(source, tmp_path / "whole" / "out", RECIPE, max_shard_bytes=20_000)
    original, calls = quantizer.quantize_stack, []

    def interrupted(*args: object) -> object:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(quantizer, "quantize_stack", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_hf_to_lowbit(source, tmp_path / "cut" / "out", RECIPE, max_shard_bytes=20_000)
    convert_hf_to_lowbit(source, tmp_path / "cut" / "out", RECIPE, max_shard_bytes=20_000, resume=True)
    assert len(calls) < 3 + 4  # the first two were not made again
    assert content(tmp_path / "cut" / "out") == content(tmp_path / "whole" / "out")


def test_the_record_is_short(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A name for each expert of a large model would be a megabyte in config.json."""
    convert_hf_to_lowbit(str(checkpoint("mixtral")), tmp_path / "out", RECIPE)
    record = json.loads((tmp_path / "out" / "config.json").read_text())["lowbit_conversion"]["experts"]
    at = "model.layers.1.block_sparse_moe.experts.*"
    assert record[f"{PATH}.gate_up_proj"] == [f"{at}.w1.weight", f"{at}.w3.weight"]
    assert len(record) == 4
