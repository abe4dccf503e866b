"""Task bundles (spec/BUNDLE.md): the golden files, round trips, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lowbit_format.codecs import CODECS
from lowbit_format.container.fingerprint import Fingerprint
from lowbit_format.container.header import read_header
from lowbit_format.container.reader import ModelReader
from lowbit_format.container.writer import StoredTensor
from lowbit_format.errors import (
    BundleError,
    DigestError,
    FingerprintError,
    FormatError,
    LowbitError,
    OutputError,
    VersionError,
)
from lowbit_format.matrix import Params
from lowbit_format.tasks import bundle as bundles
from lowbit_format.tasks.bundle import TaskBundle, read_bundle, rounding_loss, saved_module, write_bundle
from lowbit_format.tasks.bundle_config import TaskConfig
from lowbit_format.tasks.matching import base_params, check_applies, check_matches, effective_params, modules_by_name
from lowbit_format.tasks.operations import OPERATIONS, split_delta
from lowbit_format.testing.vectors import VECTORS, assert_same_bits, cases, expected_tensors, facts

VALID, INVALID = VECTORS / "bundles" / "valid", VECTORS / "bundles" / "invalid"
BASE = VECTORS / "valid" / "bundle-base" / "model"
GOOD = VALID / "all-deltas" / "bundle"
DAMAGED = "invalid/dig-3-bundle-base/model"
PARTS = ("saved-part", "saved-prefix", "saved-fresh")


def apply(bundle: TaskBundle, reader: ModelReader, bits: int | None) -> dict[str, np.ndarray]:
    """Effective parameters of every module with a delta, named as in the golden files."""
    check_matches(bundle, reader.config, reader.fingerprint(), bits)
    modules, out = modules_by_name(reader.config), {}
    for name in sorted({split_delta(d)[0] for d in bundle.deltas}):
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
        apply(bundle, base, fact.get("bits", bundle.config.bits))
        check_applies(bundle, base, verify=fact.get("verify", False))

    with pytest.raises(FormatError) as caught:
        read_and_apply()
    assert caught.value.rule == fact["rule"]


def test_a_damaged_base_still_fits_by_digests() -> None:
    """FPR-5: a digest may stand in for the bytes, and who asks for the bytes gets them checked."""
    bundle, base = read_bundle(INVALID / "dig-3-base" / "bundle"), ModelReader(INVALID.parents[1] / DAMAGED)
    assert base.has_lowbit_digests()
    assert base.fingerprint().body == bundle.config.base_fingerprint
    assert base.fingerprint(trust_digests=False).body != bundle.config.base_fingerprint
    assert check_applies(bundle, base) == 0
    with pytest.raises(DigestError, match=r"model\.fc\.planes.*DIG-3"):
        check_applies(bundle, base, verify=True)


def test_what_the_files_lack_only_a_model_can_judge() -> None:
    """MAT-8: two saved parameters of the base's files, and one that is not there."""
    base = ModelReader(VECTORS / "valid" / "bundle-saved-base" / "model")
    unknown = {name: check_applies(read_bundle(VALID / name / "bundle"), base) for name in PARTS}
    assert unknown == {"saved-part": 0, "saved-prefix": 0, "saved-fresh": 1}


def test_every_kind_of_delta_is_in_a_golden_file() -> None:
    deltas = {split_delta(d)[1].name for name in cases("bundles/valid") for d in _deltas(VALID / name)}
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
    assert sorted(p.name for p in (tmp_path / "deep" / "copy").iterdir()) == [
        bundles.TASK_CONFIG_FILE,
        bundles.SCALES_FILE,
    ]


def test_written_bytes_do_not_depend_on_order(tmp_path: Path) -> None:
    bundle = read_bundle(GOOD)
    backwards = replace(bundle, deltas=dict(reversed(bundle.deltas.items())), saved=bundle.saved[::-1])
    write_bundle(tmp_path / "a", bundle)
    write_bundle(tmp_path / "b", backwards)
    for file in (bundles.TASK_CONFIG_FILE, bundles.SCALES_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_saved_tensors_of_any_dtype_and_depth(tmp_path: Path) -> None:
    saved = (
        StoredTensor("classifier.dense.weight", "F64", (2, 2), np.arange(4, dtype="<f8").reshape(2, 2)),
        StoredTensor("classifier.count", "I64", (), np.array(7, "<i8")),
        StoredTensor("classifier.empty", "BOOL", (0, 3), np.empty((0, 3), np.bool_)),
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


@pytest.mark.parametrize(("old", "failing"), [*((True, n) for n in range(1, 7)), *((False, n) for n in range(1, 4))])
def test_a_failure_between_the_files_leaves_all_as_it_was(
    old: bool, failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the renames fails in turn, first those of old files out of the way, then those of the new ones."""
    bundle, rename, calls = read_bundle(GOOD), os.replace, 0
    if old:
        write_bundle(tmp_path, bundle, card="old")
    (tmp_path / "notes.txt").write_text("mine")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fails_once(a: Any, b: Any) -> None:
        nonlocal calls
        outside = Path(a).parent == tmp_path or Path(b).parent == tmp_path
        calls += outside
        if outside and calls == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(a, b)

    changed = replace(bundle, config=replace(bundle.config, method="other"))
    monkeypatch.setattr(os, "replace", fails_once)
    with pytest.raises(OutputError):
        write_bundle(tmp_path, changed, card="new")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_killed_writer_leaves_no_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While new files come in, there is no ``task_config.json``: a reader finds one bundle or none."""
    bundle, rename, seen = read_bundle(GOOD), os.replace, list[str]()
    write_bundle(tmp_path, bundle, card="old")

    def watched(a: Any, b: Any) -> None:
        rename(a, b)
        if tmp_path in (Path(a).parent, Path(b).parent):
            try:
                found = read_bundle(tmp_path)
                seen.append(f"{found.config.method} {float(next(iter(found.deltas.values())).flat[0])}")
            except BundleError as e:
                seen.append(e.rule)

    halves = {name: np.full_like(delta, 0.5) for name, delta in bundle.deltas.items()}
    monkeypatch.setattr(os, "replace", watched)
    write_bundle(tmp_path, replace(bundle, config=replace(bundle.config, method="other"), deltas=halves), card="new")
    assert seen == ["TSK-1"] * 5 + ["other 0.5"]


def test_the_card_comes_with_the_bundle_or_stays(tmp_path: Path) -> None:
    bundle = read_bundle(GOOD)
    write_bundle(tmp_path, bundle, card="# Aufgabe ü\n")
    text = (tmp_path / bundles.CARD_FILE).read_bytes()
    assert text == "# Aufgabe ü\n".encode()
    write_bundle(tmp_path, bundle)
    assert (tmp_path / bundles.CARD_FILE).read_bytes() == text


def test_links_into_a_cache_are_replaced_not_followed(tmp_path: Path) -> None:
    """The Hub's cache is links to files that others may use."""
    bundle = read_bundle(GOOD)
    write_bundle(tmp_path / "blobs", bundle)
    before = {p.name: p.read_bytes() for p in (tmp_path / "blobs").iterdir()}
    (tmp_path / "snapshot").mkdir()
    for name in before:
        (tmp_path / "snapshot" / name).symlink_to(Path("..") / "blobs" / name)
    assert read_bundle(tmp_path / "snapshot").config == bundle.config
    write_bundle(tmp_path / "snapshot", replace(bundle, config=replace(bundle.config, method="other")))
    assert read_bundle(tmp_path / "snapshot").config.method == "other"
    assert {p.name: p.read_bytes() for p in (tmp_path / "blobs").iterdir()} == before


# --- dtypes ----------------------------------------------------------------------------------------

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
DELTAS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=4), elements=FINITE)


def one_delta(delta: np.ndarray) -> TaskBundle:
    return TaskBundle(TaskConfig("0" * 64), {"fc.scales.mul": delta.astype(np.float32)})


@settings(max_examples=100, deadline=None)
@given(delta=DELTAS, dtype=st.sampled_from(["F16", "BF16", "F32"]))
def test_small_dtypes_round_once_and_say_what_that_costs(
    delta: np.ndarray, dtype: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import torch

    directory, bundle = tmp_path_factory.mktemp("dtype"), one_delta(delta)
    kind = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[dtype]
    expected = torch.from_numpy(delta).to(kind).float().numpy()
    if not np.isfinite(expected).all():
        with pytest.raises(BundleError, match=r"'fc\.scales\.mul'.* store the deltas in (BF16|F32)") as caught:
            write_bundle(directory, bundle, dtype=dtype)
        assert caught.value.rule == "TSK-9"
        assert list(directory.iterdir()) == []
        return
    write_bundle(directory, bundle, dtype=dtype)
    assert_same_bits(read_bundle(directory).deltas["fc.scales.mul"], expected)
    assert read_header(directory / bundles.SCALES_FILE).tensors["fc.scales.mul"].dtype == dtype
    loss, error = rounding_loss(bundle, dtype), expected.astype(np.float64) - delta
    assert loss.changed == np.count_nonzero(expected != delta)
    assert loss.largest == np.abs(error).max()
    rms = np.linalg.norm(delta.astype(np.float64))
    assert loss.relative_rms == pytest.approx(np.linalg.norm(error) / rms if rms else 0.0)


@pytest.mark.parametrize(("dtype", "value", "wider"), [("F16", 65520.0, "BF16"), ("BF16", 3.4e38, "F32")])
def test_an_overflow_names_the_tensor_and_a_dtype_that_holds_it(dtype: str, value: float, wider: str) -> None:
    with pytest.raises(BundleError, match=rf"fc\.scales\.mul.* too large for {dtype}; store the deltas in {wider}"):
        rounding_loss(one_delta(np.array([[value]])), dtype)


def test_a_dtype_that_bundles_do_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="expected one of F16, BF16, F32"):
        write_bundle(tmp_path / "out", one_delta(np.zeros((1, 1))), dtype="F64")
    assert not (tmp_path / "out").exists()


def test_sizes() -> None:
    saved = StoredTensor("head.weight", "I64", (2, 3), np.zeros((2, 3), "<i8"))
    bundle = TaskBundle(TaskConfig("0" * 64), {"fc.scales.mul": np.zeros((2, 5), np.float32)}, (saved,))
    assert (bundle.delta_values, bundle.saved_values, bundle.nbytes) == (10, 6, 4 * 10 + 8 * 6)


# --- what the writer refuses -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"config": TaskConfig("no hex")}, "TSK-2"),
        ({"config": TaskConfig("0" * 64, bits=9)}, "TSK-3"),
        ({"config": TaskConfig("0" * 64, base_model_name_or_path="base\n")}, "TSK-4"),
        ({"config": TaskConfig("0" * 64, revision="\udfff")}, "TSK-4"),
        ({"config": TaskConfig("0" * 64, method="\x1b[2J")}, "TSK-5"),
        ({"config": TaskConfig("0" * 64, modules_to_save=("a/b",))}, "TSK-5"),
        ({"config": TaskConfig("0" * 64, modules_to_save=("x", "x"))}, "TSK-5"),
        ({"config": TaskConfig("0" * 64, format_version="2.0")}, "TSK-1"),
        ({"deltas": {}}, "TSK-11"),
        ({"deltas": {".scales.mul": np.zeros((1, 1), np.float32)}}, "TSK-6"),
        ({"deltas": {"modules_to_save.x.scales.mul": np.zeros((1, 1), np.float32)}}, "TSK-6"),
        ({"deltas": {"fc.scales.mul": np.full((1, 1), np.nan, np.float32)}}, "TSK-9"),
        ({"saved": (StoredTensor("x.weight", "F32", (1,), np.zeros(1, "<f4")),)}, "TSK-10"),
        (
            {
                "config": TaskConfig("0" * 64, modules_to_save=("x",)),
                "saved": (StoredTensor("x.weight", "F32", (1,), np.zeros(1, "<f4")),) * 2,
            },
            "TSK-6",
        ),
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
    """MAT-3, in both directions; a number not below the base's own bits is its own precision."""
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


@pytest.mark.parametrize("name", cases("bundles/valid"))
def test_good_bundles_apply_to_their_base(name: str) -> None:
    check_applies(read_bundle(VALID / name / "bundle"), ModelReader(VECTORS / facts(VALID / name)["base"]))


def test_applying_to_a_directory_checks_effective_values(reader: ModelReader) -> None:
    """MAT-6, at the bundle's own precision."""
    config = replace(read_bundle(VALID / "nested" / "bundle").config, modules_to_save=())
    huge = np.full((1, 2), np.finfo(np.float32).max, np.float32)
    small = TaskBundle(config, {"layers.0.fc.scales.mul": huge / np.float32(1e6)})
    check_applies(small, reader)
    assert base_params(reader, "model.layers.0.fc", config.bits).scales[0].max() > 1
    with pytest.raises(BundleError) as caught:
        check_applies(TaskBundle(config, {"layers.0.fc.scales.mul": huge}), reader)
    assert caught.value.rule == "MAT-6"
    only_nested = huge / np.float32(10) * np.float32([[1, 0]])  # row 0 has scales up to 46 at 2 bits, to 1 at its own
    check_applies(TaskBundle(replace(config, bits=None), {"layers.0.fc.scales.mul": only_nested}), reader)
    with pytest.raises(BundleError, match="MAT-6"):
        check_applies(TaskBundle(config, {"layers.0.fc.scales.mul": only_nested}), reader)
    with pytest.raises(FingerprintError):
        check_applies(TaskBundle(replace(config, base_fingerprint="0" * 64), small.deltas), reader)


def test_the_base_stays_as_it_is(reader: ModelReader) -> None:
    """MAT-4, and planes from p on keep their scales (TSK-7)."""
    params = reader.matrix("model.layers.0.fc").params
    before = params.scales.tobytes(), params.shift.tobytes() if params.shift is not None else b""
    delta = {"layers.0.fc.scales.mul": np.full((1, 2), 0.5, np.float32)}
    found = effective_params(TaskBundle(TaskConfig("0" * 64), delta), "layers.0.fc", params)
    assert_same_bits(found.scales[0], params.scales[0] * np.float32(1.5))
    assert_same_bits(found.scales[1:], params.scales[1:])
    assert (params.scales.tobytes(), params.shift.tobytes() if params.shift is not None else b"") == before


@pytest.mark.parametrize("name", ["a", "a.", ".a", "", ".", "b.c", "ab.c", "a.b.c.d", "a.b.", "a..b", "a.b..", "x.y.z"])
def test_a_saved_tensor_belongs_to_the_longest_path(name: str) -> None:
    """TSK-10, against its words."""
    listed = ("a", "a.b", "a.b.c", "x.y", "x.y.z")
    fitting = [m for m in listed if name.startswith(m + ".") and name.removeprefix(m + ".")]
    assert saved_module(name, listed) == max(fitting, key=len, default=None)


def test_a_bundle_of_many_saved_tensors_is_checked_at_once(tmp_path: Path) -> None:
    """Time grows with the sizes of the two lists, not with their product."""
    paths = tuple(f"m{i}" for i in range(20_000))
    saved = tuple(StoredTensor(f"{path}.w", "U8", (0,), np.empty(0, np.uint8)) for path in paths)
    start = time.process_time()
    bundles.check_bundle(TaskBundle(TaskConfig("0" * 64, modules_to_save=paths), {}, saved), tmp_path)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("listed", "refused"),
    [
        *(("fc", True), ("model.fc", True), ("f", False), ("fcs", False), ("embed.x.y", True), ("model", True)),
        *(("lm_head", True), ("lm_head.x", True), ("cls", True), ("cls.tied", True), ("cls.other", False)),
        *(("model.fcs", False), ("model.lm_head", True), ("models", False)),
    ],
)
def test_what_is_quantized_cannot_be_carried_whole(listed: str, refused: bool) -> None:
    """TSK-10: no module of the base, no tied place, nothing above or below one, with the prefix or without."""
    from lowbit_format.schema import ModuleEntry, QuantizationConfig, Scheme

    modules = {path: ModuleEntry(path, Scheme(), "linear", (2, 2)) for path in ("model.fc", "model.embed")}
    tied = {"lm_head": "model.embed", "model.cls.tied": "model.embed"}
    base = QuantizationConfig(modules, tied, "model")
    saved = StoredTensor(f"{listed}.weight", "U8", (1,), np.zeros(1, np.uint8))
    bundle = TaskBundle(TaskConfig("0" * 64, modules_to_save=(listed,)), {}, (saved,))
    if not refused:
        return check_matches(bundle, base, Fingerprint("0" * 64, ""))
    with pytest.raises(BundleError) as caught:
        check_matches(bundle, base, Fingerprint("0" * 64, ""))
    assert (caught.value.rule, caught.value.tensor) == ("TSK-10", listed)


def test_saved_tensors_need_no_head(reader: ModelReader) -> None:
    """MAT-2: they are no deltas, and whose head they replace does not matter."""
    good = read_bundle(VALID / "only-modules-to-save" / "bundle")
    check_matches(replace(good, config=replace(good.config, head_fingerprint="")), reader.config, reader.fingerprint())


def test_the_body_wins_where_names_coincide() -> None:
    """TSK-7: a name that could be the head's too is the body's."""
    from lowbit_format.schema import ModuleEntry, QuantizationConfig, Scheme

    body, head = (ModuleEntry(path, Scheme(), "linear", (2, 2)) for path in ("model.fc", "fc"))
    for modules in ([body, head], [head, body]):
        config = QuantizationConfig({m.path: m for m in modules}, base_model_prefix="model")
        assert modules_by_name(config) == {"fc": (body, True)}


# --- hostile configuration -------------------------------------------------------------------------


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"nowhere: there is no such directory"):
        read_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"task_config\.json: there is no such file"):
        read_bundle(tmp_path)
    (tmp_path / bundles.TASK_CONFIG_FILE).write_text(json.dumps(TaskConfig("0" * 64).to_dict()))
    with pytest.raises(BundleError, match=r"task_scales\.safetensors: there is no such file"):
        read_bundle(tmp_path)
    with pytest.raises(BundleError, match=r"task_config\.json: is no directory"):
        read_bundle(tmp_path / bundles.TASK_CONFIG_FILE)


def test_a_configuration_of_absurd_size_is_not_read(tmp_path: Path) -> None:
    """TSK-1 with the limit of DIR-8."""
    (tmp_path / bundles.TASK_CONFIG_FILE).touch()
    os.truncate(tmp_path / bundles.TASK_CONFIG_FILE, (1 << 25) + 1)
    with pytest.raises(BundleError, match="expected at most") as caught:
        read_bundle(tmp_path)
    assert caught.value.rule == "TSK-1"


@pytest.mark.parametrize("depth", [63, 100, 100_000])
def test_the_depth_of_a_configuration(depth: int, tmp_path: Path) -> None:
    """TSK-1 with the limit of DIR-8: 64 levels, the object itself one of them, must be read; more are refused."""
    write_bundle(tmp_path, one_delta(np.zeros((1, 1))))
    config = {**TaskConfig("0" * 64).to_dict(), "deep": None}
    text = json.dumps(config).replace('"deep": null', f'"deep": {"[" * depth}{"]" * depth}')
    (tmp_path / bundles.TASK_CONFIG_FILE).write_text(text)
    if depth == 63:
        assert read_bundle(tmp_path).config == TaskConfig("0" * 64)
        return
    with pytest.raises(BundleError, match="TSK-1"):
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
