"""Whole conversions: every architecture, what is written, what is kept, sharding, and bad endings."""

from __future__ import annotations

import builtins
import errno
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import DENSE, edit_weights, weights
from support.conversions import assert_nothing_looks_finished, content

from lowbit_format.container import writer
from lowbit_format.container.reader import ModelReader
from lowbit_format.converters import Recipe, Rule, convert_hf_to_lowbit
from lowbit_format.converters.driver import work_directory
from lowbit_format.errors import NonFiniteWeightError, NothingToQuantizeError, OutputError, SourceError
from lowbit_format.quantize import Target, quantize
from lowbit_format.reference import decode

Checkpoint = Callable[..., Path]

TARGET = Target(bits=2, group_size=32)
RECIPE = Recipe(TARGET)
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@pytest.mark.parametrize("name", DENSE)
def test_decoded_weights_are_what_the_solver_gives(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, recipe = checkpoint(name), Recipe(rules=(Rule("*", TARGET),))
    done = convert_hf_to_lowbit(str(source), tmp_path / "out", recipe)
    reader, plain = ModelReader(done.directory), weights(source)
    assert reader.verify() == 0
    for step in done.plan.quantized:
        weight = plain[step.tensor.name].numpy()
        expected = quantize(weight.T if step.destination.kind == "conv1d" else weight, TARGET)
        assert np.array_equal(reader.decode(step.path), decode(expected.matrix))
        assert done.outcomes[step.path].squared_error == expected.squared_error
    for step in done.plan.steps:
        if step.target is None:
            assert bytes(reader.raw(step.tensor.name)) == plain[step.tensor.name].numpy().tobytes()
    assert set(reader.config.modules) == {step.path for step in done.plan.quantized}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_float_dtype_is_read_exactly(dtype: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("llama", dtype=DTYPES[dtype])
    convert_hf_to_lowbit(str(source), tmp_path / "out", RECIPE)
    reader, key = ModelReader(tmp_path / "out"), "model.layers.1.mlp.down_proj"
    weight = weights(source)[f"{key}.weight"].float().numpy()
    assert np.array_equal(reader.decode(key), decode(quantize(weight, TARGET, source_dtype=dtype).matrix))
    assert reader.info("model.norm.weight").dtype == dtype
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(DTYPES[dtype]).split(".")[1]


def test_nested_precisions_and_other_codecs_are_written(checkpoint: Checkpoint, tmp_path: Path) -> None:
    rules = (
        Rule("*.q_proj", Target("uniform", 3, 0, nested=(1,))),
        Rule("*.k_proj", Target("codebook", group_size=16)),
    )
    recipe = Recipe(Target(bits=4, group_size=32, nested=(2, 3), scale_dtype="BF16"), rules)
    convert_hf_to_lowbit(str(checkpoint("llama")), tmp_path / "out", recipe)
    reader = ModelReader(tmp_path / "out")
    assert reader.verify() == 0
    schemes = {path.split(".")[-1]: module.scheme for path, module in reader.config.modules.items()}
    assert (schemes["up_proj"].nested, schemes["up_proj"].scale_dtype) == ((2, 3), "BF16")
    assert (schemes["q_proj"].codec, schemes["q_proj"].nested, schemes["q_proj"].group_size) == ("uniform", (1,), 0)
    assert (schemes["k_proj"].codec, schemes["k_proj"].label) == ("codebook", "nf4")


def test_a_weight_on_a_grid_is_stored_without_loss(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    def ternary(tensors: dict[str, torch.Tensor]) -> None:
        key = "model.layers.0.self_attn.q_proj.weight"
        tensors[key] = torch.sign(tensors[key]) * (torch.arange(64 * 64).reshape(64, 64) % 3 > 0) * 0.03

    source = edit_weights(own_checkpoint("llama"), ternary)
    done = convert_hf_to_lowbit(str(source), tmp_path / "out", Recipe(Target(bits=4)))
    lossless = [o.module.path for o in done.outcomes.values() if o.lossless]
    assert lossless == ["model.layers.0.self_attn.q_proj"]
    decoded = ModelReader(tmp_path / "out").decode(lossless[0])
    assert np.array_equal(decoded, weights(source)[f"{lossless[0]}.weight"].numpy())


# --- the directory ----------------------------------------------------------------------------------


def test_side_files_come_along_and_code_does_not(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = own_checkpoint("llama")
    carried = {"tokenizer.json": b'{"a":\r\n1}', "merges.txt": b"\xff\x00", "chat/x.jinja": b"{{}}", "LICENSE": b"free"}
    left = ["modeling_x.py", "custom.so", ".gitattributes", ".cache/x", "pytorch_model.bin", "tf_model.h5", "a.onnx"]
    for name in (*carried, *left):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(carried.get(name, b"no"))
    convert_hf_to_lowbit(str(source), tmp_path / "out", RECIPE)
    found = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    own = {"config.json", "model.safetensors", "README.md", "generation_config.json", "conversion_report.json"}
    assert found == own | set(carried)
    for name, data in carried.items():
        assert (tmp_path / "out" / name).read_bytes() == data


def test_config_keeps_every_key_of_the_checkpoint(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("t5")
    convert_hf_to_lowbit(str(source), tmp_path / "out", RECIPE)
    before, after = (json.loads((d / "config.json").read_text()) for d in (source, tmp_path / "out"))
    assert after.pop("quantization_config")["quant_method"] == "lowbit"
    assert after == before


def test_model_card_has_front_matter_and_says_how_to_load(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = own_checkpoint("bert")
    (source / "README.md").write_text(
        "---\nlicense: mit\nlanguage: en\npipeline_tag: fill-mask\nbase_model: a/b\n---\n# Original\n"
    )
    convert_hf_to_lowbit(str(source), tmp_path / "out", RECIPE)
    card = (tmp_path / "out" / "README.md").read_text()
    front = card.split("---\n")[1].splitlines()
    assert front == [
        "library_name: transformers",
        "tags:",
        "- lowbit",
        "- quantized",
        "license: mit",
        "pipeline_tag: fill-mask",
    ]
    for text in (
        "# out",
        "import lowbit_format",
        "lowbit_format.from_pretrained(",
        "bcq 2 bits, groups of 32",
        "100.0%",
    ):
        assert text in card


def test_model_card_names_the_original_of_a_downloaded_checkpoint(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = tmp_path / "models--someone--tiny-llama" / "snapshots" / "0123"
    source.parent.mkdir(parents=True)
    source.symlink_to(checkpoint("llama"))
    convert_hf_to_lowbit(str(source), tmp_path / "out", RECIPE)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: someone/tiny-llama\nbase_model_relation: quantized" in card
    assert "# a LlamaForCausalLM" in card


@pytest.mark.parametrize("limit", [1, 20_000, 60_000])
def test_a_module_is_never_split_over_shards(limit: int, checkpoint: Checkpoint, tmp_path: Path) -> None:
    recipe = Recipe(Target(bits=4, group_size=32, nested=(2,)), embeddings=True)
    done = convert_hf_to_lowbit(str(checkpoint("opt")), tmp_path / "out", recipe, max_shard_bytes=limit)
    reader = ModelReader(tmp_path / "out")
    assert reader.verify() == 0
    assert len(reader.headers) > 1
    for path in reader.config.modules:
        assert len({reader.file_of(spec.name) for spec in reader.specs(path)}) == 1
    for header in reader.headers.values():
        size = sum(t.nbytes for t in header.tensors.values())
        modules = {name.rpartition(".")[0] for name in header.tensors}
        assert size <= limit or len(modules) == 1
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(reader.info(name).nbytes for name in reader.names())
    one = convert_hf_to_lowbit(str(checkpoint("opt")), tmp_path / "one", recipe)
    assert done.outcomes == one.outcomes
    assert ModelReader(tmp_path / "one").fingerprint() == reader.fingerprint()


def test_two_runs_give_the_same_bytes(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for run, threads in [("1", "1"), ("2", "3")]:
        monkeypatch.setenv("LOWBIT_NUM_THREADS", threads)
        convert_hf_to_lowbit(str(checkpoint("gpt2")), tmp_path / run / "out", RECIPE, max_shard_bytes=20_000)
    assert content(tmp_path / "1" / "out") == content(tmp_path / "2" / "out")


# --- bad endings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("shard_bytes", [1, 1 << 30])
def test_a_weight_that_is_not_finite_ends_it(
    bad: float, shard_bytes: int, own_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    key = "model.layers.1.mlp.up_proj.weight"
    source = edit_weights(own_checkpoint("llama"), lambda tensors: tensors[key][3, 5].fill_(bad))
    with pytest.raises(NonFiniteWeightError, match=key):
        convert_hf_to_lowbit(str(source), tmp_path / "out", RECIPE, max_shard_bytes=shard_bytes)
    assert_nothing_looks_finished(tmp_path / "out")


def test_a_kept_tensor_may_hold_infinities(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = edit_weights(own_checkpoint("llama"), lambda tensors: tensors["model.norm.weight"][0].fill_(-torch.inf))
    convert_hf_to_lowbit(str(source), tmp_path / "out", RECIPE)
    assert ModelReader(tmp_path / "out").verify() == 0


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_full_disk_leaves_nothing_that_looks_finished(
    share: float, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk takes a share of all writes, then no more; once it has space again, --resume completes the work."""

    def convert(out: Path, room: int, resume: bool = False) -> int:
        """Convert with room for so many writes; returns how many of them were left."""
        left = [room]
        out.parent.mkdir(exist_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(writer, "open", _counting_open(left), raising=False)
            convert_hf_to_lowbit(str(checkpoint("llama")), out, RECIPE, max_shard_bytes=20_000, resume=resume)
        return left[0]

    whole, out = tmp_path / "whole" / "out", tmp_path / "cut" / "out"
    writes = 10_000 - convert(whole, 10_000)
    with pytest.raises(OutputError, match=r"No space left on device.*--resume"):
        convert(out, int(share * (writes - 1)))
    assert_nothing_looks_finished(out)
    convert(out, 10_000, resume=True)
    assert content(out) == content(whole)


def test_an_existing_output_is_refused_and_untouched(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("mine")
    for resume in (False, True):
        with pytest.raises(OutputError, match="out"):
            convert_hf_to_lowbit(str(checkpoint("llama")), tmp_path / "out", RECIPE, resume=resume)
    assert [(p.name, p.read_text()) for p in (tmp_path / "out").iterdir()] == [("config.json", "mine")]
    assert not work_directory(tmp_path / "out").exists()


def test_a_file_in_place_of_the_output_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="out"):
        convert_hf_to_lowbit(str(checkpoint("llama")), tmp_path / "out", RECIPE)
    assert (tmp_path / "out").read_text() == "mine"


def test_an_empty_output_directory_is_taken(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    convert_hf_to_lowbit(str(checkpoint("llama")), tmp_path / "out", RECIPE)
    assert ModelReader(tmp_path / "out").verify() == 0


def test_a_source_without_anything_to_quantize_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(NothingToQuantizeError, match=r"LlamaForCausalLM: no Linear.*kept by the pattern"):
        convert_hf_to_lowbit(str(checkpoint("llama")), tmp_path / "out", RECIPE.keeping(["*"]))
    assert not list(tmp_path.iterdir())


def test_a_lowbit_source_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    convert_hf_to_lowbit(str(checkpoint("llama")), tmp_path / "out", RECIPE)
    with pytest.raises(SourceError, match=r"quantized already.*lowbit dequantize"):
        convert_hf_to_lowbit(str(tmp_path / "out"), tmp_path / "again", RECIPE)
    assert not (tmp_path / "again").exists()


# --- helpers ----------------------------------------------------------------------------------------


def _counting_open(left: list[int]) -> Callable[..., Any]:
    """``open`` whose files raise ENOSPC after ``left[0]`` writes in all; reading goes on as before."""

    class Counting(io.FileIO):
        def write(self, data: Any) -> int:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    return lambda path, mode="r": builtins.open(path, mode) if mode == "rb" else Counting(path, mode)


def test_a_part_in_a_subfolder_keeps_its_weights(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Such as the dense layer behind a sentence encoder; what is no safetensors stays out (DIR-5)."""
    source = own_checkpoint("bert")
    (source / "2_Dense").mkdir()
    (source / "2_Dense" / "model.safetensors").write_bytes(b"weights")
    (source / "2_Dense" / "pytorch_model.bin").write_bytes(b"pickle")
    out = convert_hf_to_lowbit(str(source), tmp_path / "out", RECIPE).directory
    assert [p.name for p in (out / "2_Dense").iterdir()] == ["model.safetensors"]
    assert (out / "2_Dense" / "model.safetensors").read_bytes() == b"weights"


def test_the_current_directory_can_be_the_output(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    convert_hf_to_lowbit(str(checkpoint("llama")), ".", RECIPE)
    assert ModelReader(tmp_path / "here").verify() == 0
