"""Every door gives one verdict on a file: the reader's ``decode``, and loading with transformers (NST-3, TEN-3)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.building import write_model
from support.models import llama_config
from transformers import LlamaForCausalLM

import lowbit_format as lb
from lowbit_format.container.reader import ModelReader
from lowbit_format.errors import FormatError
from lowbit_format.schema import Scheme

PATH, SMALL, RAGGED = (f"model.layers.0.mlp.{name}_proj" for name in ("up", "down", "gate"))
SCHEMES = {
    PATH: Scheme("bcq", 4, 16, nested=(2,)),
    SMALL: Scheme("bcq", 2, 16, nested=(1,)),
    RAGGED: Scheme("bcq", 4, 16, row_bits=True, nested=(2,)),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("verdict") / "model"
    return write_model(LlamaForCausalLM(llama_config(False)), directory, lambda path, _: SCHEMES.get(path))


def spoilt(model: Path, out: Path, name: str) -> Path:
    """A copy in which the first value of a parameter is NaN."""
    shutil.copytree(model, out)
    reader = ModelReader(out)
    with open(out / reader.file_of(name), "r+b") as f:
        f.seek(reader.info(name).begin)
        f.write(b"\x00\x7e")
    return out


def rule(door: Callable[[], object]) -> str | None:
    try:
        door()
    except FormatError as e:
        return e.rule
    return None


def verdicts(directory: Path, bits: int | None) -> set[str | None]:
    reader = ModelReader(directory)
    return {
        rule(lambda: [reader.decode(path, bits) for path in SCHEMES]),
        rule(lambda: lb.from_pretrained(directory, bits=bits)),
    }


@pytest.mark.parametrize(("bits", "expected"), [(None, None), (2, None), (3, "NST-3"), (4, None), (5, "NST-3")])
def test_precisions(model: Path, bits: int | None, expected: str | None) -> None:
    assert verdicts(model, bits) == {expected}


@pytest.mark.parametrize(
    ("name", "bits", "expected"),
    [
        (f"{PATH}.scales", 2, None),
        (f"{PATH}.scales", None, "TEN-3"),
        (f"{PATH}.scales_k2", 2, "TEN-3"),
        (f"{PATH}.scales_k2", 4, "TEN-3"),
        (f"{RAGGED}.scales", 2, None),
        (f"{RAGGED}.scales", None, "TEN-3"),
        (f"{SMALL}.scales_k1", 2, "TEN-3"),  # read at its own bits, it has all its values
    ],
)
def test_values(model: Path, tmp_path: Path, name: str, bits: int | None, expected: str | None) -> None:
    assert verdicts(spoilt(model, tmp_path / "bad", name), bits) == {expected}
