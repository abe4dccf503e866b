"""Fused tensors that transformers cuts on loading are quantized part by part, and joined again by dequantizing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from support.composites import assert_equal_to, converted

from lowbit_format import Recipe, Target
from lowbit_format.container.reader import ModelReader
from lowbit_format.converters.huggingface import open_checkpoint
from lowbit_format.converters.splits import split
from lowbit_format.export import dequantize_directory
from lowbit_format.runtime.modules import LowbitModule

JINA = "JinaEmbeddingsV3"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 64}

pytestmark = pytest.mark.skipif(not hasattr(hf, f"{JINA}Config"), reason="this transformers does not know the model")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With ``float``, ``lowbit`` and ``decoded`` in it."""
    root = tmp_path_factory.mktemp("jina")
    config = getattr(hf, f"{JINA}Config")(**SIZES, max_position_embeddings=32)
    recipe = Recipe(default=Target(codec="uniform", bits=8, group_size=16))
    converted(getattr(hf, f"{JINA}ForMaskedLM")(config), root, recipe)
    return root


def test_all_parts_are_quantized(directory: Path) -> None:
    assert any("Wqkv" in name for name in load_file(directory / "float/model.safetensors"))
    paths = {entry.path.split(".")[-1] for entry in ModelReader(directory / "lowbit").config}
    assert paths >= {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize("cls", [f"{JINA}ForMaskedLM", f"{JINA}Model", "AutoModelForSequenceClassification"])
def test_loads_as_the_decoded_checkpoint(cls: str, directory: Path) -> None:
    want, info = getattr(hf, cls).from_pretrained(directory / "decoded", output_loading_info=True)
    model: Any = getattr(hf, cls).from_pretrained(directory / "lowbit")
    assert any(isinstance(m, LowbitModule) and p.endswith("v_proj") for p, m in model.named_modules())
    assert_equal_to(want, model, info["missing_keys"])


def test_dequantized_under_the_names_of_the_checkpoint(directory: Path, tmp_path: Path) -> None:
    dequantize_directory(ModelReader(directory / "lowbit"), tmp_path / "out")
    want, found = (load_file(d / "model.safetensors") for d in (directory / "decoded", tmp_path / "out"))
    assert found.keys() == want.keys()
    assert [name for name in want if not torch.equal(want[name], found[name])] == []


@pytest.mark.parametrize("wrong", [{"fused": []}, {"a": ["x", "x"]}, {"a": 3}])
def test_a_record_that_says_nonsense_loses_nothing(wrong: Any, directory: Path, tmp_path: Path) -> None:
    reader = ModelReader(directory / "lowbit")
    section = json.loads(json.dumps(reader.model_config["lowbit_conversion"]))
    parts = next(iter(section["joined"].values()))
    text = json.dumps(wrong).replace('"x"', json.dumps(parts[0]))
    reader.model_config["lowbit_conversion"] = {**section, "joined": json.loads(text)}
    dequantize_directory(reader, tmp_path / "out")
    hf.AutoModel.from_pretrained(tmp_path / "out")
    assert set(parts) <= load_file(tmp_path / "out/model.safetensors").keys()


def test_parts_are_ranges_of_bytes(directory: Path) -> None:
    source = open_checkpoint(str(directory / "float"))
    cut, joined = split(source)
    assert cut.identity != source.identity
    for key, parts in joined.items():
        assert np.array_equal(np.concatenate([cut.read(part) for part in parts]), source.read(key))
    again, nothing = split(cut)
    assert again is cut
    assert nothing == {}


def test_of_a_fused_tensor_no_more_is_read_than_the_part(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte once, since a source may be far away."""
    source = open_checkpoint(str(directory / "float"))
    cut, joined = split(source)
    read, came = source.read, dict[str, int]()

    def counted(name: str, begin: int = 0, nbytes: int | None = None) -> Any:
        found = read(name, begin, nbytes)
        came[name] = came.get(name, 0) + len(found)
        return found

    monkeypatch.setattr(source, "read", counted)
    for key, parts in joined.items():
        assert np.array_equal(np.concatenate([cut.read(part) for part in parts]), read(key))
        assert came[key] == source.tensors[key].nbytes
        assert np.array_equal(cut.read(parts[1], 5, 20), cut.read(parts[1])[5:25])
    assert joined
