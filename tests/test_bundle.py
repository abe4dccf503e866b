"""Task bundles (spec/BUNDLE.md): the golden files, round trips, and what is refused."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import VECTORS, assert_same_bits, cases, expected_tensors, facts

from lowbit_format import bundle as bundles
from lowbit_format.bundle import (
    OPERATIONS,
    TaskBundle,
    TaskConfig,
    check_matches,
    effective_params,
    modules_by_name,
    read_bundle,
    split_delta,
    write_bundle,
)
from lowbit_format.codecs import CODECS
from lowbit_format.container.fingerprint import Fingerprint
from lowbit_format.container.header import read_header
from lowbit_format.container.reader import ModelReader
from lowbit_format.container.writer import Tensor
from lowbit_format.errors import BundleError, FingerprintError, FormatError, LowbitError, OutputError, VersionError
from lowbit_format.packed import Params

VALID, INVALID = VECTORS / "bundles" / "valid", VECTORS / "bundles" / "invalid"
BASE = VECTORS / "valid" / "bundle-base" / "model"
GOOD = VALID / "all-deltas" / "bundle"


def base_params(reader: ModelReader, path: str, bits: int | None) -> Params:
    """A module's parameters as :func:`effective_params` wants them: experts stacked."""
    module = reader.module(path)
    if module.experts is None:
        return reader.matrix(path).at(bits)[0]
    stack = [reader.matrix(path, e).at(bits)[0] for e in range(module.experts)]
    shifts = [p.shift for p in stack if p.shift is not None]
    return Params(np.stack([p.scales for p in stack]), np.stack(shifts) if shifts else None)


def apply(bundle: TaskBundle, reader: ModelReader, bits: int | None) -> dict[str, np.ndarray]:
    """Effective parameters of every module with a delta, named as in the golden files."""
    check_matches(bundle, reader.config, reader.fingerprint(), bits)
    modules, out = modules_by_name(reader.config), {}
    for name in sorted({(split_delta(d) or ("", ""))[0] for d in bundle.deltas}):
        module = modules[name][0]
        params = effective_params(bundle, name, base_params(reader, module.path, bits))
        out[f"{name}.scales"] = params.scales
        if params.shift is not None:
            out[f"{name}.{CODECS[module.scheme.codec].shift}"] = params.shift
    return out


@pytest.fixture(scope="module")
def reader() -> ModelReader:
    return ModelReader(BASE)


# --- the golden files ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cases("bundles/valid"))
def test_valid_bundle_gives_the_expected_parameters(name: str) -> None:
    fact = facts(VALID / name)
    expected = expected_tensors(VALID / name)
    found = apply(read_bundle(VALID / name / "bundle"), ModelReader(VECTORS / fact["base"]), fact["bits"])
    assert set(found) == set(expected)
    for key, values in expected.items():
        assert_same_bits(found[key], values)


@pytest.mark.parametrize("name", cases("bundles/invalid"))
def test_invalid_bundle_is_refused_by_rule(name: str) -> None:
    fact = facts(INVALID / name)
    base = ModelReader(VECTORS / fact["base"])

    def read_and_apply() -> None:
        bundle = read_bundle(INVALID / name / "bundle")
        apply(bundle, base, bundle.config.bits)

    with pytest.raises(FormatError) as caught:
        read_and_apply()
    assert caught.value.rule == fact["rule"]


def test_every_kind_of_delta_is_in_a_golden_file() -> None:
    deltas = {(split_delta(d) or ("", ""))[1] for name in cases("bundles/valid") for d in _deltas(VALID / name)}
    assert deltas == set(OPERATIONS)


def _deltas(case: Path) -> dict[str, np.ndarray]:
    return read_bundle(case / "bundle").deltas


# --- round trips -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cases("bundles/valid"))
def test_round_trip(name: str, tmp_path: Path) -> None:
    bundle = read_bundle(VALID / name / "bundle")
    write_bundle(tmp_path / "deep" / "copy", bundle)
    again = read_bundle(tmp_path / "deep" / "copy")
    assert again.config == bundle.config
    assert set(again.deltas) == set(bundle.deltas)
    for key, delta in bundle.deltas.items():
        assert_same_bits(again.deltas[key], delta)
    assert {(t.name, t.dtype, t.shape, t.data.tobytes()) for t in again.saved} == {
        (t.name, t.dtype, t.shape, t.data.tobytes()) for t in bundle.saved
    }
    header = read_header(tmp_path / "deep" / "copy" / bundles.SCALES_FILE)
    assert set(header.digests) == set(header.tensors)
    assert sorted(p.name for p in (tmp_path / "deep" / "copy").iterdir()) == [bundles.CONFIG_FILE, bundles.SCALES_FILE]


def test_written_bytes_do_not_depend_on_order(tmp_path: Path) -> None:
    bundle = read_bundle(GOOD)
    backwards = replace(bundle, deltas=dict(reversed(bundle.deltas.items())), saved=bundle.saved[::-1])
    write_bundle(tmp_path / "a", bundle)
    write_bundle(tmp_path / "b", backwards)
    for file in (bundles.CONFIG_FILE, bundles.SCALES_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_saved_tensors_of_any_dtype_and_depth(tmp_path: Path) -> None:
    saved = (
        Tensor("classifier.dense.weight", "F64", (2, 2), np.arange(4, dtype="<f8").reshape(2, 2)),
        Tensor("classifier.count", "I64", (), np.array(7, "<i8")),
        Tensor("classifier.empty", "BOOL", (0, 3), np.empty((0, 3), np.bool_)),
    )
    write_bundle(tmp_path, TaskBundle(TaskConfig("0" * 64, modules_to_save=("classifier",)), {}, saved))
    again = {t.name: t for t in read_bundle(tmp_path).saved}
    assert {n: (t.dtype, t.shape, t.data.tobytes()) for n, t in again.items()} == {
        t.name: (t.dtype, t.shape, t.data.tobytes()) for t in saved
    }


def test_a_full_disk_leaves_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = read_bundle(GOOD)
    write_bundle(tmp_path, bundle)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        write_bundle(tmp_path, replace(bundle, config=replace(bundle.config, method="other")))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"config": TaskConfig("no hex")}, "TSK-2"),
        ({"config": TaskConfig("0" * 64, bits=9)}, "TSK-3"),
        ({"config": TaskConfig("0" * 64, modules_to_save=("a/b",))}, "TSK-5"),
        ({"config": TaskConfig("0" * 64, format_version="2.0")}, "TSK-1"),
        ({"deltas": {}}, "TSK-11"),
        ({"deltas": {".scales.mul": np.zeros((1, 1), np.float32)}}, "TSK-6"),
        ({"deltas": {"modules_to_save.x.scales.mul": np.zeros((1, 1), np.float32)}}, "TSK-6"),
        ({"deltas": {"fc.scales.mul": np.full((1, 1), np.nan, np.float32)}}, "TSK-9"),
        ({"saved": (Tensor("x.weight", "F32", (1,), np.zeros(1, "<f4")),)}, "TSK-10"),
    ],
)
def test_the_writer_refuses_what_a_reader_would(changes: dict[str, Any], rule: str, tmp_path: Path) -> None:
    good = TaskBundle(TaskConfig("0" * 64), {"fc.scales.mul": np.zeros((1, 1), np.float32)})
    write_bundle(tmp_path / "good", good)
    with pytest.raises(FormatError) as caught:
        write_bundle(tmp_path / "bad", replace(good, **changes))
    assert caught.value.rule == rule
    assert not (tmp_path / "bad").exists()


# --- matching --------------------------------------------------------------------------------------


def test_another_base_is_named_in_full(reader: ModelReader) -> None:
    """MAT-1: the message names both fingerprints and the base."""
    bundle, mine = read_bundle(GOOD), Fingerprint("ab" * 32, "")
    with pytest.raises(FingerprintError) as caught:
        check_matches(bundle, reader.config, mine)
    assert caught.value.rule == "MAT-1"
    for part in (mine.body, bundle.config.base_fingerprint, "example/base"):
        assert part in str(caught.value)


def test_another_precision_is_refused(reader: ModelReader) -> None:
    """MAT-3, both ways; a number not below the base's own bits is its own precision."""
    own, at_two, mine = read_bundle(GOOD), read_bundle(VALID / "nested" / "bundle"), reader.fingerprint()
    for bundle, bits in ((own, 2), (at_two, None), (at_two, 3)):
        with pytest.raises(BundleError) as caught:
            check_matches(bundle, reader.config, mine, bits)
        assert caught.value.rule == "MAT-3"
    check_matches(own, reader.config, mine, 4)
    check_matches(at_two, reader.config, mine, 2)


@pytest.mark.parametrize("operation", ["scales.mul", "scales.add", "offsets.add"])
def test_an_infinite_effective_value_is_refused(operation: str, reader: ModelReader) -> None:
    """MAT-6: a finite delta can still overflow."""
    shape = {"scales.mul": (1, 2), "scales.add": (1, 2, 2), "offsets.add": (2, 2)}[operation]
    name, largest = "layers.0.fc", np.finfo(np.float32).max
    bundle = TaskBundle(read_bundle(GOOD).config, {f"{name}.{operation}": np.full(shape, largest, np.float32)})
    bundle = replace(bundle, config=replace(bundle.config, modules_to_save=()))
    check_matches(bundle, reader.config, reader.fingerprint())
    huge = Params(np.full((3, 2, 2), largest, np.float32), np.full((2, 2), largest, np.float32))
    with pytest.raises(BundleError) as caught:
        effective_params(bundle, name, huge)
    assert caught.value.rule == "MAT-6"


def test_the_base_stays_as_it_is(reader: ModelReader) -> None:
    """MAT-4, and planes from p on keep their scales (TSK-7)."""
    params = reader.matrix("model.layers.0.fc").params
    before = params.scales.tobytes(), params.shift.tobytes() if params.shift is not None else b""
    delta = {"layers.0.fc.scales.mul": np.full((1, 2), 0.5, np.float32)}
    found = effective_params(TaskBundle(TaskConfig("0" * 64), delta), "layers.0.fc", params)
    assert_same_bits(found.scales[0], params.scales[0] * np.float32(1.5))
    assert_same_bits(found.scales[1:], params.scales[1:])
    assert (params.scales.tobytes(), params.shift.tobytes() if params.shift is not None else b"") == before


def test_the_body_wins_where_names_coincide() -> None:
    """TSK-7: a name that could be the head's too is the body's."""
    from lowbit_format.schema import Module, QuantizationConfig, Scheme

    body, head = (Module(path, Scheme(), "linear", (2, 2)) for path in ("model.fc", "fc"))
    for modules in ([body, head], [head, body]):
        config = QuantizationConfig({m.path: m for m in modules}, base_model_prefix="model")
        assert modules_by_name(config) == {"fc": (body, True)}


# --- hostile configuration -------------------------------------------------------------------------


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"task_config\.json: there is no such file"):
        read_bundle(tmp_path)
    (tmp_path / bundles.CONFIG_FILE).write_text(json.dumps(TaskConfig("0" * 64).to_dict()))
    with pytest.raises(BundleError, match=r"task_scales\.safetensors: there is no such file"):
        read_bundle(tmp_path)


def test_another_major_version_says_so() -> None:
    with pytest.raises(VersionError, match="update lowbit_format"):
        read_bundle(INVALID / "tsk-1-major" / "bundle")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(TaskConfig("").to_dict())), JSON, max_size=3), st.booleans())
def test_any_config_is_parsed_or_refused(changes: dict[str, Any], whole: bool) -> None:
    good = TaskConfig("0" * 64).to_dict()
    try:
        found = TaskConfig.from_dict({**(good if whole else {}), **changes})
    except LowbitError as e:
        found, rule = None, getattr(e, "rule", "")
    assert TaskConfig.from_dict(found.to_dict()) == found if found else rule.startswith("TSK-")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with digests, and a folder beside it for a damaged copy."""
    directory = tmp_path_factory.mktemp("bundle")
    for name in ("whole", "damaged"):
        write_bundle(directory / name, read_bundle(GOOD))
    return directory


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_flipped_bits_are_found(written: Path, data: st.DataObject) -> None:
    """All data is under a digest; a flip that leaves the header well-formed can rename a tensor, and no more."""
    good, content = read_bundle(written / "whole"), bytearray((written / "whole" / bundles.SCALES_FILE).read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    inside = data.draw(st.sampled_from([(0, header_end), (header_end, len(content))]))
    at = data.draw(st.integers(inside[0], inside[1] - 1))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    (written / "damaged" / bundles.SCALES_FILE).write_bytes(content)
    try:
        found = read_bundle(written / "damaged")
    except FormatError:
        return
    assert at < header_end
    for name in set(found.deltas) & set(good.deltas):
        assert_same_bits(found.deltas[name], good.deltas[name])
