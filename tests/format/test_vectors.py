"""The golden files of spec/vectors: the reader accepts the valid ones bit for bit and refuses the others by rule."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lowbit_format.codecs import CODECS
from lowbit_format.container.reader import ModelReader
from lowbit_format.errors import FormatError, PrecisionError, TensorError
from lowbit_format.reference import decode_numpy
from lowbit_format.schema import KINDS
from lowbit_format.testing.vectors import (
    VECTORS,
    assert_same_bits,
    cases,
    check_reader,
    command,
    expected_tensors,
    facts,
)

ROOT = VECTORS.parents[1]


def check(root: Path) -> subprocess.CompletedProcess[str]:
    """Run the maker of the golden files in the repository at `root`."""
    return subprocess.run([sys.executable, "-m", "tools.golden", "--check"], cwd=root, capture_output=True, text=True)


def test_files_are_what_the_maker_makes() -> None:
    done = check(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "files are current" in done.stdout


def test_check_sees_a_changed_file(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    shutil.copytree(VECTORS, tmp_path / "spec" / "vectors")
    victim = tmp_path / "spec" / "vectors" / "valid" / "bcq-example" / "model" / "model.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    done = check(tmp_path)
    assert done.returncode == 1
    assert done.stdout.splitlines() == ["differs: valid/bcq-example/model/model.safetensors"]


@pytest.mark.parametrize("name", cases("valid"))
def test_valid_decodes_bit_for_bit(name: str) -> None:
    case = VECTORS / "valid" / name
    reader, expected = ModelReader(case / "model"), expected_tensors(case)
    paths = {m.path for m in reader.config} | {f"{m.path}@k{k}" for m in reader.config for k in m.scheme.nested}
    assert set(expected) == paths
    for key, values in expected.items():
        path, _, k = key.partition("@k")
        assert_same_bits(reader.decode(path, int(k) if k else None), values)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("name", cases("valid"))
def test_valid_decodes_the_same_in_numpy(name: str) -> None:
    case = VECTORS / "valid" / name
    reader = ModelReader(case / "model")
    for key, values in expected_tensors(case).items():
        path, _, k = key.partition("@k")
        bits = int(k) if k else None
        experts = reader.module(path).experts
        if experts is None:
            assert_same_bits(decode_numpy(reader.matrix(path), bits), values)
        for e in range(experts or 0):
            assert_same_bits(decode_numpy(reader.matrix(path, e), bits), values[e])


@pytest.mark.parametrize("name", cases("valid"))
def test_valid_verifies_and_has_its_fingerprint(name: str) -> None:
    case = VECTORS / "valid" / name
    reader, fact = ModelReader(case / "model"), facts(case)
    unverified = reader.verify()
    assert unverified == sum(reader.stored_digest(t) is None for t in reader.names())
    for trust in (True, False):  # FPR-1 to FPR-4, from the digests in the header or from the bytes
        found = reader.fingerprint(trust_digests=trust)
        assert (found.body, found.head) == (fact["fingerprint"], fact["head_fingerprint"])


@pytest.mark.parametrize("name", cases("valid"))
def test_a_precision_above_the_base_is_refused(name: str) -> None:
    """NST-3, for the base and for each module, whatever the module's own bits are."""
    reader = ModelReader(VECTORS / "valid" / name / "model")
    most = max((m.scheme.bits for m in reader.config), default=8)
    wrong: list[Any] = [0, most + 1, 9, True, 1.0]
    for bits in wrong:
        doors: list[Callable[[], object]] = [partial(reader.check_precision, bits)]
        doors += [partial(reader.decode, module.path, bits) for module in reader.config]
        for door in doors:
            with pytest.raises(PrecisionError) as caught:
                door()
            assert caught.value.rule == "NST-3"


@pytest.mark.parametrize("name", cases("invalid"))
def test_invalid_is_refused_by_rule(name: str) -> None:
    case = VECTORS / "invalid" / name
    fact = facts(case)
    tracemalloc.start()
    try:
        if fact["found_by"] == "open":
            with pytest.raises(FormatError) as caught:
                ModelReader(case / "model")
        else:
            reader = ModelReader(case / "model")
            with pytest.raises(FormatError) as caught:
                reader.verify()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.rule == fact["rule"]
    assert f"[{fact['rule']}]" in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert peak < 4 << 20


@pytest.mark.parametrize("name", ["ten-3-scales-nan", "ten-3-offsets-nan"])
def test_values_of_other_precisions_do_not_count(name: str) -> None:
    """TEN-3: at a nested precision, only what it is decoded with; at the module's own bits, all."""
    reader = ModelReader(VECTORS / "invalid" / name / "model")
    assert np.isfinite(reader.decode("fc", 2)).all()
    for bits in (None, 3):
        with pytest.raises(TensorError, match="TEN-3"):
            reader.decode("fc", bits)


@pytest.mark.parametrize("name", ["ten-3-scales-k2-nan", "ten-3-offsets-k2-inf"])
def test_at_its_own_bits_a_module_has_all_values(name: str) -> None:
    reader = ModelReader(VECTORS / "invalid" / name / "model")
    for bits in (None, 2, 3):
        with pytest.raises(TensorError, match="TEN-3"):
            reader.decode("fc", bits)


@pytest.mark.parametrize("name", ["nested", "ragged-nested", "experts"])
def test_a_matrix_of_one_precision_is_the_one_of_all(name: str) -> None:
    """NST-1, NST-2: with the parameters of one precision alone it decodes as with all."""
    reader = ModelReader(VECTORS / "valid" / name / "model")
    for module in reader.config:
        for expert in [None] if module.experts is None else range(module.experts):
            whole = reader.matrix(module.path, expert)
            for k in module.scheme.nested:
                alone = reader.matrix(module.path, expert, only=k)
                assert (alone.scheme.bits, alone.nested) == (k, {})
                assert_same_bits(decode_numpy(alone), decode_numpy(whole, k))


def test_the_worked_fingerprint_is_that_of_its_golden_file() -> None:
    """FORMAT.md 15.7: the records as they are printed there have the fingerprints of the files."""
    text = (ROOT / "spec" / "FORMAT.md").read_text("utf-8").partition("### 15.7")[2]
    body, head = (block.replace("\u2192", "\t").encode() for block in text.split("```\n")[1::2])
    fact = facts(VECTORS / "valid" / "fingerprint-example")
    assert hashlib.sha256(body).hexdigest() == fact["fingerprint"]
    assert hashlib.sha256(head).hexdigest() == fact["head_fingerprint"]
    assert f"These are {len(body)} bytes" in text
    bundle = (ROOT / "spec" / "BUNDLE.md").read_text("utf-8")
    assert all(fact[key] in text and fact[key] in bundle for key in ("fingerprint", "head_fingerprint"))


def test_the_vectors_cover_the_format() -> None:
    """Every codec, kind and (but for large tables) number of bits occurs, nested, ragged and sharded models too."""
    readers = [ModelReader(VECTORS / "valid" / name / "model") for name in cases("valid")]
    modules = [m for reader in readers for m in reader.config]
    for codec in CODECS.values():
        bits = {m.scheme.bits for m in modules if m.scheme.codec == codec.id}
        assert bits >= ({1, 2, 3, 4, 8} if codec.codebook else set(range(1, 9)))
    assert {m.kind for m in modules} == set(KINDS)
    assert any(m.scheme.nested and m.scheme.row_bits for m in modules)
    assert any(len(reader.headers) > 1 for reader in readers)


def decode_everything(model: Path) -> dict[str, NDArray[np.float32]]:
    reader = ModelReader(model)
    reader.verify()
    found = {m.path: reader.decode(m.path) for m in reader.config}
    return found | {f"{m.path}@k{k}": reader.decode(m.path, k) for m in reader.config for k in m.scheme.nested}


def test_a_reader_that_is_right_passes() -> None:
    assert check_reader(decode_everything) == len(cases("valid")) + len(cases("invalid"))


def test_a_reader_that_is_wrong_does_not() -> None:
    def wrong(model: Path) -> dict[str, NDArray[np.float32]]:
        return {name: values + np.float32(1) for name, values in decode_everything(model).items()}

    with pytest.raises(AssertionError, match="differs"):
        check_reader(wrong)


def test_a_reader_that_refuses_nothing_does_not_pass(tmp_path: Path) -> None:
    for kind in ("valid", "invalid"):
        name = cases(kind)[0]
        shutil.copytree(VECTORS / kind / name, tmp_path / kind / name)
    only = expected_tensors(tmp_path / "valid" / cases("valid")[0])
    with pytest.raises(AssertionError, match="breaks the rule"):
        check_reader(lambda model: only, tmp_path)


def test_a_program_is_a_reader(tmp_path: Path) -> None:
    """It gets the paths of a model and of the file to write."""
    case = VECTORS / "valid" / cases("valid")[0]
    script = tmp_path / "reader.py"
    script.write_text(
        "import shutil, sys; from pathlib import Path\n"
        "shutil.copy(Path(sys.argv[1]).parent / 'expected.safetensors', sys.argv[2])\n"
    )
    found = command(f"{sys.executable} {script}")(case / "model")
    assert found.keys() == expected_tensors(case).keys()
    with pytest.raises(subprocess.CalledProcessError):
        command(f"{sys.executable} {script}")(tmp_path)
