"""What a report says is true: sizes, errors, levels, tasks; and which file of a conversion it believes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import build, edit_weights
from support.directories import sample_model, write_directory

from lowbit_format.container.reader import ModelReader
from lowbit_format.container.writer import StoredTensor
from lowbit_format.converters import Recipe, Rule, convert_hf_to_lowbit
from lowbit_format.converters.summary import Totals
from lowbit_format.differences import open_side
from lowbit_format.errors import ConfigError, DirectoryError
from lowbit_format.integrations.conversion_record import REPORT_FILE
from lowbit_format.quantize import Target
from lowbit_format.reference import decode
from lowbit_format.report.conversion import Budget
from lowbit_format.report.distribution import codes_of, level_values
from lowbit_format.report.entries import VECTORS, kinds_of
from lowbit_format.report.facts import ModelFacts, model_facts
from lowbit_format.report.page import render
from lowbit_format.schema import QuantizationConfig

Checkpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def converted(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny llama with three kinds of schemes, as the conversion returns it."""
    rules = (Rule("*.q_proj", Target(bits=2, group_size=32)),)
    recipe = Recipe(Target(bits=3, group_size=32), rules, embeddings=False, lm_head=False)
    return convert_hf_to_lowbit(str(checkpoint("llama")), tmp_path_factory.mktemp("report") / "model", recipe)


@pytest.fixture
def model(converted: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted.directory, tmp_path / "model"))


def facts_of(directory: Path, against: Path | None = None, modules: tuple[str, ...] = ()) -> ModelFacts:
    other = None if against is None else open_side(against)
    return model_facts(ModelReader(directory), against=str(against), other=other, modules=modules)


def edit_report(model: Path, change: Callable[[Any], Any]) -> None:
    path = model / REPORT_FILE
    report = json.loads(path.read_text())
    path.write_text(json.dumps(change(report) or report))


def test_sizes_are_those_of_the_files(converted: Any) -> None:
    facts, reader = facts_of(converted.directory), ModelReader(converted.directory)
    assert facts.nbytes == sum(reader.info(name).nbytes for name in reader.names()) == sum(facts.files.values())
    assert sum(kind.nbytes for kind in facts.kinds) == facts.nbytes
    totals = Totals.of(converted.plan, converted.outcomes)
    assert facts.numel == totals.source_bytes / 4  # a float32 checkpoint
    assert facts.original is not None
    assert (facts.original.nbytes, facts.original.what) == (totals.source_bytes, "float32")
    for e in facts.modules:
        assert (e.nbytes, e.numel) == (converted.outcomes[e.path].nbytes, converted.outcomes[e.path].module.numel)


def test_kinds_and_layers_come_from_paths(converted: Any) -> None:
    facts = facts_of(converted.directory)
    entries = {e.path: e for e in facts.entries}
    up = entries["model.layers.1.mlp.up_proj"]
    assert (up.kind, up.stack, up.layer) == ("mlp.up_proj", "model.layers", 1)
    assert entries["model.norm.weight"].kind == VECTORS
    assert entries["lm_head.weight"].kind == "lm_head"
    assert {len(k.entries) for k in facts.kinds if k.entries[0].is_quantized} == {2}


def test_kinds_of_an_encoder_and_a_decoder_are_told_apart(checkpoint: Checkpoint, tmp_path: Path) -> None:
    out = convert_hf_to_lowbit(str(checkpoint("t5")), tmp_path / "out", Recipe(Target(group_size=32))).directory
    names = {k.name for k in kinds_of(facts_of(out).modules)}
    assert {"encoder: layer.*.SelfAttention.q", "decoder: layer.*.SelfAttention.q"} <= names


def test_errors_against_the_original_are_those_of_the_conversion(converted: Any, checkpoint: Checkpoint) -> None:
    measured, told = facts_of(converted.directory, checkpoint("llama")), facts_of(converted.directory)
    for facts in (measured, told):
        for e in facts.modules:
            assert e.error == pytest.approx(converted.outcomes[e.path].relative_error, rel=1e-5)
        assert facts.error == pytest.approx(Totals.of(converted.plan, converted.outcomes).relative_error, rel=1e-5)
    assert told.errors_from == "the conversion"
    assert measured.original is not None
    assert measured.original.is_measured
    assert "llama" in measured.errors_from


def test_the_largest_errors_come_first_and_are_looked_at(converted: Any) -> None:
    facts = facts_of(converted.directory)
    errors = [e.error for e in facts.modules]
    assert errors == sorted(errors, reverse=True)
    assert facts.distributions[0].path == facts.modules[0].path
    assert facts.distributions[0].why == "the largest error"


def test_experts_are_compared_one_by_one(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("mixtral")
    done = convert_hf_to_lowbit(str(source), tmp_path / "out", Recipe(Target(group_size=32)))
    facts = facts_of(done.directory, source, ("model.layers.0.mlp.experts.down_proj",))
    for e in facts.modules:
        assert e.error == pytest.approx(done.outcomes[e.path].relative_error, rel=1e-5)
    assert facts.distributions[0].what == "expert 0 of 4"


def test_without_a_report_of_the_conversion_errors_are_not_known(model: Path) -> None:
    (model / REPORT_FILE).unlink()
    facts = facts_of(model)
    assert facts.errors_from == ""
    assert facts.error is None
    assert all(e.error is None for e in facts.modules)
    assert [d.why for d in facts.distributions] == ["the largest module", "in the last layer"]


@pytest.mark.parametrize(
    "content",
    ["[]", "{", '{"version": 2}', '{"version": 1, "modules": 3, "blocks": [1], "budget": [], "evaluation": 0}'],
)
def test_a_strange_report_of_the_conversion_is_left_out(content: str, model: Path) -> None:
    (model / REPORT_FILE).write_text(content)
    facts = facts_of(model)
    assert facts.errors_from == ""
    assert (facts.blocks, facts.budget, facts.evaluations) == ((), None, ())
    assert bool(facts.notes) == ('"version": 1' not in content)


def test_errors_of_another_model_are_not_believed(model: Path) -> None:
    """The report is of what the conversion wrote; a module of another size was made since."""

    def change(report: Any) -> None:
        report["modules"]["model.layers.0.mlp.up_proj"]["nbytes"] += 8
        report["modules"]["model.layers.1.mlp.up_proj"]["relative_error"] = float("nan")

    edit_report(model, change)
    unknown = [e.path for e in facts_of(model).modules if e.error is None]
    assert unknown == ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]


def test_blocks_budget_and_evaluation_are_read(model: Path) -> None:
    added = {
        "blocks": [["model.layers.0", 0.2, 0.1], ["model.layers.1", 0.3, 0.2], ["bad", "x", 1]],
        "budget": {
            "target": 3.0,
            "reached": 2.99,
            "lower_bound": 0.5,
            "damage": 0.55,
            "measure": "error of outputs",
            "curve": [[4, 0.2], [3, 0.6], [2, "?"]],
        },
        "evaluation": [{"bits": None, "text": "a short text", "tokens": 1000, "perplexity": 20.0}, {"bits": 2}],
    }
    edit_report(model, lambda report: report | added)
    facts = facts_of(model)
    assert [(b.path, b.before, b.after) for b in facts.blocks] == [
        ("model.layers.0", 0.2, 0.1),
        ("model.layers.1", 0.3, 0.2),
    ]
    assert facts.budget == Budget(((3.0, 0.6), (4.0, 0.2)), 3.0, 2.99, 0.55, 0.5, "error of outputs")
    assert [e.perplexity for e in facts.evaluations] == [20.0]


def test_levels_are_what_the_decoder_gives(tmp_path: Path) -> None:
    """Every weight of a matrix is the level of its code in its group, for all codecs and for ragged rows."""
    sample_model(tmp_path)
    reader, seen = ModelReader(tmp_path), set()
    for module in reader.config:
        matrix = reader.matrix(module.path, None if module.experts is None else 0)
        own = np.full(matrix.rows, matrix.scheme.bits) if matrix.row_bits is None else matrix.row_bits
        for bits in np.unique(own):
            rows = np.flatnonzero(own == bits)
            codes, values = codes_of(matrix, rows, int(bits)), level_values(matrix, rows, int(bits))
            values = values.reshape(len(rows), -1, 2 ** int(bits))
            group = np.arange(matrix.cols) // matrix.scheme.group_columns(matrix.cols)
            found = values[np.arange(len(rows))[:, None], group[None, :], codes]
            assert np.array_equal(found, decode(matrix)[rows])
        seen.add((module.scheme.codec, matrix.row_bits is not None))
    assert {codec for codec, _ in seen} >= {"bcq", "uniform", "codebook"}
    assert any(ragged for _, ragged in seen)


def test_distributions_count_every_weight_but_the_tails(converted: Any, checkpoint: Checkpoint) -> None:
    for d in facts_of(converted.directory, checkpoint("llama")).distributions:
        assert 0.99 < sum(d.quantized) <= 1.0001
        assert 0.99 < sum(d.original) <= 1.0001
        assert sum(level.share for level in d.levels) == pytest.approx(1)
        assert len(d.levels) == 2**d.bits
        assert all(level.low <= level.middle <= level.high for level in d.levels)


def test_a_module_can_be_named(converted: Any) -> None:
    path = "model.layers.1.self_attn.k_proj"
    first = facts_of(converted.directory, modules=(path,)).distributions[0]
    assert (first.path, first.why) == (path, "asked for")
    with pytest.raises(ConfigError, match="no such module"):
        facts_of(converted.directory, modules=("model.layers.9",))


def test_another_original_is_refused_or_doubted(converted: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(DirectoryError, match="is it the model that this one was made from"):
        facts_of(converted.directory, checkpoint("bert"))

    def turn(tensors: dict[str, Any]) -> None:
        for name in tensors:
            tensors[name] = -tensors[name]

    strange = edit_weights(build("llama", tmp_path / "strange"), turn)
    assert "hardly the model" in facts_of(converted.directory, strange).notes[0]


def test_an_original_with_nan_is_told_of(converted: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")

    source = edit_weights(Path(shutil.copytree(checkpoint("llama"), tmp_path / "source")), spoil)
    path = "model.layers.0.mlp.up_proj"
    facts = facts_of(converted.directory, source, (path,))
    assert [e.path for e in facts.modules if e.error is None] == [path]
    assert path in facts.notes[0]
    assert facts.distributions[0].original == ()


def test_a_model_without_modules_or_without_weights(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    config = QuantizationConfig({})
    write_directory(tmp_path / "norm", config, [[StoredTensor("norm", "F32", (2,), np.ones(2, "<f4"))]])
    facts = facts_of(tmp_path / "norm")
    assert (facts.bits_per_weight, facts.modules, facts.distributions) == (32.0, (), ())
    assert "whole file" not in render(facts).split("</dl>")[0]
    write_directory(tmp_path / "empty", config, [[StoredTensor("norm", "F32", (0,), np.ones(0, "<f4"))]])
    with pytest.raises(DirectoryError, match="holds no weights"):
        facts_of(tmp_path / "empty")


def test_tasks_beside_the_model_are_found(converted: Any, model: Path) -> None:
    import lowbit_format as lb

    base = lb.from_pretrained(model)
    lb.prepare_scale_tuning(base, method="alphatuning", name="films")
    lb.save_task(base, model.parent / "films")
    shutil.copytree(model.parent / "films", model / "inside")
    config = model.parent / "other" / "task_config.json"
    shutil.copytree(model.parent / "films", config.parent)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_fingerprint": "0" * 64}))
    shutil.copytree(model.parent / "films", model.parent / "broken")
    (model.parent / "broken" / "task_scales.safetensors").write_bytes(b"\0" * 9)
    tasks = facts_of(model).tasks
    assert [t.name for t in tasks.fitting] == ["inside", "films"]
    assert (tasks.fitting[0].modules, tasks.fitting[0].rms, tasks.others) == (14, 0.0, 1)
    assert [name for name, _ in tasks.faults] == ["broken"]
