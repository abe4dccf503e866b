"""Where the golden files of spec/vectors lie, and how their expected values are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbit_format.container.header import read_header

from ..dtypes import stored

VECTORS = Path(__file__).resolve().parents[2] / "spec" / "vectors"


def cases(folder: str) -> list[str]:
    """Names of the cases of a folder such as ``"bundles/valid"``; never empty."""
    names = sorted(p.name for p in (VECTORS / folder).iterdir())
    assert names
    return names


def facts(case: Path) -> dict[str, Any]:
    """The case's ``expected.json``."""
    found: dict[str, Any] = json.loads((case / "expected.json").read_text("utf-8"))
    return found


def expected_tensors(case: Path) -> dict[str, NDArray[np.float32]]:
    """The case's ``expected.safetensors``, all binary32, by name."""
    path = case / "expected.safetensors"
    content = np.frombuffer(path.read_bytes(), np.uint8)
    infos = read_header(path).tensors.values()
    assert {t.dtype for t in infos} <= {"F32"}
    return {t.name: stored(content[t.begin : t.end], t.dtype, t.shape) for t in infos}


def assert_same_bits(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    """Equal bit for bit: the sign of zero counts, and a NaN equals itself."""
    assert found.dtype == np.float32
    assert expected.dtype == np.float32
    np.testing.assert_array_equal(
        np.ascontiguousarray(found).view(np.uint32), np.ascontiguousarray(expected).view(np.uint32)
    )
