"""The golden files of spec/vectors: where they lie, what they expect, and whether a reader gives it.

:func:`check_reader` runs all of them against any reader: a Python function, or through :func:`command` a program in
any language.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..container.header import read_header
from ..dtypes import stored

VECTORS = Path(os.environ.get("LOWBIT_VECTORS") or Path(__file__).resolve().parents[2] / "spec" / "vectors")

Tensors = Mapping[str, NDArray[np.float32]]
Reader = Callable[[Path], Tensors]  # a model's directory -> weights by path, at lower precisions "path@k2"


def cases(folder: str, vectors: Path = VECTORS) -> list[str]:
    """Names of the cases of a folder such as ``"bundles/valid"``; never empty."""
    names = sorted(p.name for p in (vectors / folder).iterdir())
    assert names
    return names


def facts(case: Path) -> dict[str, Any]:
    """The case's ``expected.json``."""
    found: dict[str, Any] = json.loads((case / "expected.json").read_text("utf-8"))
    return found


def expected_tensors(case: Path) -> dict[str, NDArray[np.float32]]:
    """The case's ``expected.safetensors``, all binary32, by name."""
    return read_tensors(case / "expected.safetensors")


def read_tensors(path: Path) -> dict[str, NDArray[np.float32]]:
    """All tensors of a safetensors file, which must be binary32, by name."""
    content = np.frombuffer(path.read_bytes(), np.uint8)
    infos = read_header(path).tensors.values()
    assert {t.dtype for t in infos} <= {"F32"}
    return {t.name: stored(content[t.begin : t.end], t.dtype, t.shape).astype(np.float32, copy=False) for t in infos}


def assert_same_bits(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    """Equal bit for bit: the sign of zero counts, and a NaN equals itself."""
    assert found.dtype == np.float32
    assert expected.dtype == np.float32
    np.testing.assert_array_equal(
        np.ascontiguousarray(found).view(np.uint32), np.ascontiguousarray(expected).view(np.uint32)
    )


def check_reader(read: Reader, vectors: Path = VECTORS) -> int:
    """Run every golden model against a reader; the number of cases.

    Args:
        read: what decodes a model's directory. It gives float32 ``[rows, cols]`` (experts: ``[experts, rows, cols]``)
            for each path of the config, and for each nested precision k under ``"path@kK"``. An invalid model it
            must refuse with any exception.
        vectors: the directory of golden files; by default what LOWBIT_VECTORS names, or spec/vectors of a checkout.

    Raises:
        AssertionError: a weight differs, a weight is missing, or an invalid model is read; it names the case.
    """
    for name in cases("valid", vectors):
        case = vectors / "valid" / name
        found, expected = read(case / "model"), expected_tensors(case)
        assert set(found) == set(expected), f"{case}: {sorted(set(found) ^ set(expected))} on one side only"
        for key, values in expected.items():
            try:
                assert_same_bits(found[key], values)
            except AssertionError as e:
                raise AssertionError(f"{case}: {key} differs: {e}") from None
    for name in cases("invalid", vectors):
        case = vectors / "invalid" / name
        try:
            read(case / "model")
        except Exception:
            continue
        raise AssertionError(f"{case} is read, but breaks the rule {facts(case)['rule']}")
    return len(cases("valid", vectors)) + len(cases("invalid", vectors))


def command(line: str) -> Reader:
    """A reader that is a program: its last arguments are a model's directory and the safetensors file to write.

    An exit status other than 0 means that it refuses the model.
    """

    def read(model: Path) -> Tensors:
        with tempfile.TemporaryDirectory() as room:
            out = Path(room) / "weights.safetensors"
            subprocess.run([*shlex.split(line), str(model), str(out)], check=True, capture_output=True)
            return read_tensors(out)

    return read
