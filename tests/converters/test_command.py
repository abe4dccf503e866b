"""The command ``convert_hf_to_lowbit``: its options, what it prints, and its exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints import edit_weights, weights
from support.conversions import content
from typer.testing import CliRunner, Result

from lowbit_format.container.reader import ModelReader
from lowbit_format.converters import Recipe, convert_hf_to_lowbit
from lowbit_format.converters.command import app
from lowbit_format.quantize import Target

Checkpoint = Callable[..., Path]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("COLUMNS", "200")  # so that no table folds a name

    def command(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(a) for a in arguments])

    return command


def failed(result: Result, error: str, message: str) -> None:
    """Exit code 1, and the named error with its message on standard error, without a traceback."""
    assert result.exit_code == 2
    assert result.stderr.startswith(f"{error}: ")
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_it_converts_and_says_what_came_of_it(
    run: Callable[..., Result], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    result = run(checkpoint("llama"), tmp_path / "out", "--no-lm-head")
    assert result.exit_code == 0
    for text in (
        "Error by module kind", "down_proj", "Worst modules", "relative error", "bits per quantized weight", "coverage",
        "100.0%", "Kept in full precision", "lm_head", "output head", "import lowbit_format",
    ):  # fmt: skip
        assert text in result.output
    assert result.output.index("Kept in full precision") < result.output.index("time")
    convert_hf_to_lowbit(str(checkpoint("llama")), tmp_path / "api" / "out", Recipe(lm_head=False))
    assert content(tmp_path / "out") == content(tmp_path / "api" / "out")


def test_options_reach_the_solver(run: Callable[..., Result], checkpoint: Checkpoint, tmp_path: Path) -> None:
    options = [
        "--codec", "uniform", "--bits", 5, "--group-size", 32, "--nested", "4,2", "--solver", "minmax",
        "--scale-dtype", "bf16", "--embeddings", "--lm-head", "--keep", "*.k_proj", "--keep", "*.q_proj",
        "--min-coverage", 0.5, "--max-shard-size", "20KB",
    ]  # fmt: skip
    assert run(checkpoint("llama"), tmp_path / "a" / "out", *options).exit_code == 0
    target = Target("uniform", 5, 32, nested=(2, 4), solver="minmax", scale_dtype="BF16")
    recipe = Recipe(target, embeddings=True, lm_head=True).keeping(["*.k_proj", "*.q_proj"])
    convert_hf_to_lowbit(
        str(checkpoint("llama")), tmp_path / "b" / "out", recipe, min_coverage=0.5, max_shard_bytes=20_000
    )
    assert content(tmp_path / "a" / "out") == content(tmp_path / "b" / "out")


def test_bcq_without_offset_and_a_codebook(run: Callable[..., Result], checkpoint: Checkpoint, tmp_path: Path) -> None:
    run(checkpoint("llama"), tmp_path / "bcq", "--no-offset", "--bits", 2)
    run(checkpoint("llama"), tmp_path / "fp4", "--codec", "codebook", "--table", "fp4-e2m1")
    path = "model.layers.0.mlp.up_proj"
    bcq, fp4 = (ModelReader(tmp_path / name).module(path).scheme for name in ("bcq", "fp4"))
    assert (bcq.codec, bcq.bits, bcq.offset) == ("bcq", 2, False)
    assert (fp4.codec, fp4.bits, fp4.label) == ("codebook", 4, "fp4-e2m1")


def test_a_recipe_adds_to_the_options(run: Callable[..., Result], checkpoint: Checkpoint, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"rules": [{"match": "*_proj", "bits": 3}, {"match": "lm_head", "bits": 6}]}))
    result = run(checkpoint("llama"), tmp_path / "out", "--recipe", recipe, "--bits", 2, "--keep", "*.k_proj")
    assert result.exit_code == 0
    bits = {m.path.split(".")[-1]: m.scheme.bits for m in ModelReader(tmp_path / "out").config}
    assert bits == {
        **dict.fromkeys(("q_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"), 3),
        "lm_head": 6,
        "embed_tokens": 8,
    }


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    run: Callable[..., Result], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    result = run(checkpoint("llama"), tmp_path / "out", "--dry-run", "--modules", "--nested", "2", "--group-size", 32)
    assert result.exit_code == 0
    for text in (
        "model.layers.1.mlp.down_proj", "64x96", "bcq 4 bits, group 32, F16", "bits/weight", "size then", "coverage",
        "expected peak memory", "Kept in full precision", "output head",
    ):  # fmt: skip
        assert text in result.output
    assert not list(tmp_path.iterdir())


def test_a_dry_run_lists_kinds_and_ends_with_the_totals(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It needs no OUT, fits a terminal of 80 columns, and no word of it is broken."""
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(app, [str(checkpoint("llama")), "--dry-run"])
    assert result.exit_code == 0
    assert "model.layers" not in result.output
    for text in ("down_proj", "up_proj", "embed_tokens", "lm_head"):
        assert text in result.output
    assert len(result.output.splitlines()) < 50
    assert "size then" in result.output.splitlines()[-2]


def test_modules_are_listed_on_a_line_each(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    output = CliRunner().invoke(app, [str(checkpoint("llama")), "--dry-run", "--modules"]).output
    lines = [line for line in output.splitlines() if line.startswith("model.layers.1.mlp.down_proj ")]
    assert len(lines) == 1
    assert "64x96" in lines[0]
    assert lines[0].endswith("bits/weight")


def test_a_dry_run_works_though_out_exists(run: Callable[..., Result], checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    result = run(checkpoint("llama"), tmp_path, "--dry-run")
    assert result.exit_code == 0
    assert "exists already" in result.output


def test_without_out_nothing_is_converted(run: Callable[..., Result], checkpoint: Checkpoint) -> None:
    result = run(checkpoint("llama"))
    assert result.exit_code == 2
    assert "OUT is missing" in result.output


def test_options_beside_a_recipe_override_its_default_and_not_its_rules(
    run: Callable[..., Result], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.json"
    rules = [{"match": "*.q_proj", "bits": 5}, {"match": "*.k_proj", "group_size": 16}]
    recipe.write_text(json.dumps({"default": {"bits": 4, "group_size": 64}, "rules": rules, "lm_head": True}))
    options = ["--recipe", recipe, "--bits", 3, "--group-size", 32, "--no-lm-head"]
    assert run(checkpoint("llama"), tmp_path / "out", *options).exit_code == 0
    found = {m.path.split(".")[-1]: (m.scheme.bits, m.scheme.group_size) for m in ModelReader(tmp_path / "out").config}
    assert (found["up_proj"], found["q_proj"], found["k_proj"]) == ((3, 32), (5, 32), (3, 16))
    assert "lm_head" not in found


def test_an_output_head_or_embeddings_that_are_not_there_are_an_error(
    run: Callable[..., Result], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    for more in ([], ["--dry-run"]):
        result = run(checkpoint("bert"), tmp_path / "out", "--lm-head", *more)
        failed(result, "RecipeError", "--lm-head: BertModel has no output head")
    assert run(checkpoint("llama-tied"), tmp_path / "out", "--lm-head", "--dry-run").exit_code == 0
    assert not list(tmp_path.iterdir())


def test_a_dry_run_has_nothing_to_resume(run: Callable[..., Result], checkpoint: Checkpoint, tmp_path: Path) -> None:
    result = run(checkpoint("llama"), tmp_path / "out", "--dry-run", "--resume")
    assert result.exit_code == 2
    assert "--resume has no meaning in a dry run" in result.output


def test_it_resumes(run: Callable[..., Result], checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert run(checkpoint("llama"), tmp_path / "out", "--resume").exit_code == 0
    failed(run(checkpoint("llama"), tmp_path / "out", "--resume"), "OutputError", "exists already")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--codec", "gptq"], "SchemeError", "codec is 'gptq'"),
        (["--nested", "2,x"], "SchemeError", "--nested is '2,x'"),
        (["--nested", "4"], "SchemeError", "expected precisions from 1 to bits - 1 = 3"),
        (["--codec", "uniform", "--solver", "best"], "SchemeError", "solver is 'best'"),
        (["--scale-dtype", "f8"], "SchemeError", "scale_dtype is 'F8'"),
        (["--codec", "codebook", "--table", "nf5"], "SchemeError", "table is 'nf5'"),
        (["--codec", "codebook", "--bits", "3"], "SchemeError", "a codebook has the bits of its table, 4"),
        (["--codec", "codebook", "--nested", "2"], "SchemeError", "a codebook has no nested precisions"),
        (["--codec", "codebook", "--solver", "mse"], "SchemeError", "solver is for uniform, and codec is 'codebook'"),
        (["--table", "fp4-e2m1"], "SchemeError", "table is for codebook, and codec is 'bcq'"),
        (["--solver", "minmax"], "SchemeError", "solver is for uniform"),
        (["--codec", "uniform", "--no-offset"], "SchemeError", "offset is for bcq"),
        (["--max-shard-size", "0"], "RecipeError", "--max-shard-size is '0'"),
        (["--max-shard-size", "2 bananas"], "RecipeError", "expected a size such as 2GB"),
        (["--keep", "*.nothing"], "RecipeError", "'*.nothing' matches no module"),
        (["--recipe", "/no/such/file"], "RecipeError", "cannot be read"),
        (["--revision", "main"], "SourceError", "leave --revision out"),
        (["--keep", "*.mlp.*"], "CoverageError", "only 40.0%"),
        (["--strip-prefix", "x."], "SourceError", "no tensor has a name with 'x.' in front"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_named_error_and_exit_code_2(
    more: list,
    options: list,
    error: str,
    message: str,
    run: Callable[..., Result],
    checkpoint: Checkpoint,
    tmp_path: Path,
) -> None:
    failed(run(checkpoint("llama"), tmp_path / "out", *options, *more), error, message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [["--bits", "0"], ["--bits", "9"], ["--min-coverage", "2"], ["--group-size", "-1"]])
def test_values_out_of_range_are_usage_errors(
    options: list, run: Callable[..., Result], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    assert run(checkpoint("llama"), tmp_path / "out", *options).exit_code == 2


def test_brackets_in_names_are_shown_as_they_are(
    run: Callable[..., Result], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """What looks like the terminal library's markup is part of the name."""
    failed(run(tmp_path / "[red]x[/no]", tmp_path / "out"), "SourceError", "[red]x[/no]: no such directory")
    result = run(checkpoint("llama"), tmp_path / "[red]" / "y[" / "no]")
    assert result.exit_code == 0
    assert "[red]/y[/no]. Load it" in result.output.replace("\n", "")


def test_what_is_taken_off_left_out_and_absent_is_said(
    run: Callable[..., Result], own_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = own_checkpoint("bert-without-pooler")
    tensors = {f"_orig_mod.{name}": tensor for name, tensor in weights(source).items()}
    edit_weights(source, lambda t: (t.clear(), t.update(tensors)))
    (source / "[x].pt").write_bytes(b"x")
    failed(run(source, tmp_path / "out"), "SourceError", "[x].pt: a pickle beside the model")
    failed(run(source, tmp_path / "out", "--leave-out", "*.pt"), "SourceError", "--strip-prefix _orig_mod.")
    for more in (["--dry-run"], []):
        options = ["--leave-out", "*.pt", "--strip-prefix", "_orig_mod.", "--group-size", "32", *more]
        output = run(source, tmp_path / "out", *options).output
        for text in ("_orig_mod.", "[x].pt: left out on request", "pooler.dense.weight", "absent"):
            assert text in output


def test_help_teaches(run: Callable[..., Result]) -> None:
    result = run("--help")
    assert result.exit_code == 0
    for text in ("Examples", "--dry-run", "--resume", "--nested", "one file, many precisions"):
        assert text in result.output
