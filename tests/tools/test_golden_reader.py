"""The example reader finds in the golden files what is expected, and knows nothing of the library."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from lowbit_format.container.reader import ModelReader
from lowbit_format.errors import PrecisionError
from lowbit_format.testing.vectors import VECTORS, assert_same_bits, cases, expected_tensors, facts

GOLDEN = VECTORS.parents[1] / "tools" / "golden"


@pytest.fixture(scope="module")
def reader() -> ModuleType:
    """tools/golden/reader.py, loaded by its path, as a copy of it would be."""
    spec = importlib.util.spec_from_file_location("example_reader", GOLDEN / "reader.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", cases("valid"))
def test_reads_the_files_of_every_valid_model(name: str, reader: ModuleType) -> None:
    case = VECTORS / "valid" / name
    config, tensors = reader.read_model(case / "model")
    modules = reader.modules_of(config, tensors)
    found = {path: reader.decode(module) for path, module in modules.items()}
    found |= {f"{path}@k{k}": reader.decode(module, k) for path, module in modules.items() for k in module.nested}
    expected = expected_tensors(case)
    assert set(found) == set(expected)
    for key, weight in found.items():
        assert_same_bits(weight, expected[key])
    prints = reader.fingerprints(config.get("base_model_prefix", ""), modules)
    assert prints == (facts(case)["fingerprint"], facts(case)["head_fingerprint"])


def test_refuses_a_precision_that_is_not_stored(reader: ModuleType) -> None:
    config, tensors = reader.read_model(VECTORS / "valid" / "nested" / "model")
    modules = reader.modules_of(config, tensors)
    with pytest.raises(ValueError, match="cannot be read at 1 bit"):
        reader.decode(modules["b"], 1)
    assert np.array_equal(reader.decode(modules["a"], 7), reader.decode(modules["a"]))  # NST-4


@pytest.mark.parametrize("name", cases("valid"))
def test_knows_the_precisions_of_a_base(name: str, reader: ModuleType) -> None:
    """NST-3: those at which the library reads it, and no other."""
    config, tensors = reader.read_model(VECTORS / "valid" / name / "model")
    found, library = reader.precisions(reader.modules_of(config, tensors).values()), list[int]()
    for k in range(1, 10):
        with contextlib.suppress(PrecisionError):
            ModelReader(VECTORS / "valid" / name / "model").check_precision(k)
            library.append(k)
    assert found == library


def test_prints_the_modules_of_a_directory() -> None:
    done = subprocess.run(
        [sys.executable, str(GOLDEN / "reader.py"), str(VECTORS / "valid" / "nested" / "model")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines[0] == "a: linear, bcq, group size 16"
    assert lines[1].startswith("    4 bits, float32 [2, 37], SHA-256 ")
    assert lines[2].startswith("    1 bit, float32 [2, 37], SHA-256 ")
    assert lines[-1] == "head fingerprint: none"


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.py")), ids=lambda path: path.name)
def test_the_second_implementation_imports_numpy_and_the_standard_library_alone(path: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported.add(str(node.module).partition(".")[0])
    assert imported - sys.stdlib_module_names <= {"numpy"}
    relative = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.ImportFrom) and n.level]
    assert path.name != "reader.py" or not relative
