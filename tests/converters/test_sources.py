"""Checkpoints on the disk: formats that give the same result, and damaged, hostile or missing ones, refused by name."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import edit_weights, weights
from support.config_files import edit_config
from support.conversions import content

from lowbit_format.container.fingerprint import Fingerprint
from lowbit_format.container.reader import ModelReader
from lowbit_format.converters import Recipe, convert_hf_to_lowbit
from lowbit_format.errors import NothingToQuantizeError, SourceError
from lowbit_format.quantize import Target

Checkpoint = Callable[..., Path]

RECIPE = Recipe(Target(bits=2, group_size=32))
INDEX = "model.safetensors.index.json"


def fingerprint(source: Path, out: Path) -> Fingerprint:
    convert_hf_to_lowbit(str(source), out, RECIPE)
    return ModelReader(out).fingerprint()


def refused(source: Path | str, match: str, tmp_path: Path, **options: Any) -> None:
    """The conversion ends in a SourceError and leaves nothing at all."""
    out = tmp_path / "output" / "out"
    with pytest.raises(SourceError, match=match):
        convert_hf_to_lowbit(str(source), out, RECIPE, **options)
    assert not out.parent.exists() or not list(out.parent.iterdir())


# --- formats ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"shard": "40KB"}, {"pickled": True}])
def test_every_format_gives_the_same_model(
    options: dict, dtype: torch.dtype, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    plain, other = checkpoint("llama", dtype=dtype), checkpoint("llama", dtype=dtype, **options)
    assert {p.name for p in other.iterdir()} != {p.name for p in plain.iterdir()}
    assert fingerprint(plain, tmp_path / "a") == fingerprint(other, tmp_path / "b")
    a, b = ModelReader(tmp_path / "a"), ModelReader(tmp_path / "b")
    assert {n: a.digest(n) for n in a.names()} == {n: b.digest(n) for n in b.names()}


def test_pickled_shards_are_read(own_checkpoint: Checkpoint, checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = own_checkpoint("llama")
    tensors = weights(source)
    (source / "model.safetensors").unlink()
    weight_map = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        torch.save({n: t for n, t in tensors.items() if weight_map[n] == file}, source / file)
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert fingerprint(source, tmp_path / "a") == fingerprint(checkpoint("llama"), tmp_path / "b")


def test_old_pickles_that_are_no_zip_are_read_with_a_warning(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = own_checkpoint("llama", pickled=True)
    expected = fingerprint(source, tmp_path / "a")
    path = source / "pytorch_model.bin"
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    with pytest.warns(UserWarning, match="not a zip file; it is read into memory as a whole"):
        assert fingerprint(source, tmp_path / "b") == expected


def test_strided_tensors_of_a_pickle_are_read_in_row_major_order(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = own_checkpoint("llama", pickled=True)
    expected, path = fingerprint(source, tmp_path / "a"), source / "pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    torch.save({n: t.t().contiguous().t() if t.ndim == 2 else t for n, t in state.items()}, path)
    assert fingerprint(source, tmp_path / "b") == expected


def test_safetensors_are_taken_where_both_formats_are(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = own_checkpoint("llama")
    (source / "pytorch_model.bin").write_bytes(b"not read")
    convert_hf_to_lowbit(str(source), tmp_path / "out", RECIPE)
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


def test_a_config_without_dtype_gets_the_main_one(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Otherwise transformers would load the model in the dtype of the first tensor, which may be a scale."""
    source = edit_config(own_checkpoint("llama", dtype=torch.bfloat16), dtype=None, torch_dtype=None)
    convert_hf_to_lowbit(str(source), tmp_path / "out", RECIPE)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_source_is_left_as_it_is(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = own_checkpoint("llama")
    before = content(source)
    convert_hf_to_lowbit(str(source), tmp_path / "out", RECIPE)
    assert content(source) == before


# --- hostile ----------------------------------------------------------------------------------------


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(zipped: bool, own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, marker = own_checkpoint("llama", pickled=True), tmp_path / "ran"
    path = source / "pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "x": Payload(marker)}, path, _use_new_zipfile_serialization=zipped)
    with contextlib.nullcontext() if zipped else pytest.warns(UserWarning, match="not a zip file"):
        refused(source, "holds more than tensors and is refused", tmp_path)
    assert not marker.exists()


def test_a_bare_pickle_with_code_is_refused_and_not_run(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, marker = own_checkpoint("llama", pickled=True), tmp_path / "ran"
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker), protocol=2))
    with pytest.warns(UserWarning, match="not a zip file"):
        refused(source, "refused", tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("version", ["2.5.1", "1.13.0+cu117", "2.5.0a0+git1234"])
def test_a_pickle_is_refused_where_torch_cannot_read_it_safely(
    version: str, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("llama", pickled=True)
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("was read"))
    refused(source, r"CVE-2025-32434.*install torch 2\.6 or newer", tmp_path)


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", ".hidden.safetensors", 3, ""])
def test_an_index_that_points_elsewhere_is_refused(file: Any, own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = own_checkpoint("llama", shard="40KB")
    edit_index(source, lambda weight_map: weight_map.update({"model.norm.weight": file}))
    refused(source, "is not a plain name", tmp_path)


# --- damaged or missing -----------------------------------------------------------------------------


def edit_index(source: Path, change: Callable[[dict], Any]) -> Path:
    index = json.loads((source / INDEX).read_text())
    change(index["weight_map"])
    (source / INDEX).write_text(json.dumps(index))
    return source


def test_a_missing_shard_is_refused(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = own_checkpoint("llama", shard="40KB")
    shard = min(source.glob("model-*.safetensors"))
    shard.unlink()
    refused(source, f"the shard {shard.name} is missing; the download is incomplete", tmp_path)


def test_a_tensor_that_the_index_puts_elsewhere_is_refused(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = own_checkpoint("llama", shard="40KB")
    edit_index(source, lambda weight_map: weight_map.update({"model.norm.weight": weight_map["lm_head.weight"]}))
    refused(source, "lacks the tensor 'model.norm.weight', which the index puts there", tmp_path)


def test_a_tensor_that_no_shard_holds_is_refused(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = own_checkpoint("llama", shard="40KB")
    edit_index(source, lambda weight_map: weight_map.update({"ghost.weight": weight_map["lm_head.weight"]}))
    refused(source, "lacks the tensor 'ghost.weight'", tmp_path)


def test_a_tensor_in_two_shards_is_refused(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = own_checkpoint("llama", shard="40KB")
    shard = json.loads((source / INDEX).read_text())["weight_map"]["model.norm.weight"]
    (source / "copy.safetensors").write_bytes((source / shard).read_bytes())
    edit_index(source, lambda weight_map: weight_map.update({"model.norm.weight": "copy.safetensors"}))
    refused(source, "stands in another shard too", tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "\xff"])
def test_an_index_that_is_none_is_refused(text: str, own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = own_checkpoint("llama", shard="40KB")
    (source / INDEX).write_bytes(text.encode("latin-1"))
    refused(source, "model.safetensors.index.json: (is not an index|names no files)", tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
@pytest.mark.parametrize("pickled", [False, True])
def test_a_file_that_is_cut_off_is_refused(
    keep: int, pickled: bool, own_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = own_checkpoint("llama", pickled=pickled)
    path = source / ("pytorch_model.bin" if pickled else "model.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.warns(UserWarning, match="not a zip file") if pickled and keep == 0 else contextlib.nullcontext():
        refused(source, path.name, tmp_path)


@pytest.mark.parametrize("keep", [None, 5000])
def test_a_file_that_goes_away_while_it_is_read_is_named(
    keep: int | None, own_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path = own_checkpoint("llama") / "model.safetensors"

    def damage(step: object, steps: int) -> None:
        if path.exists() and keep is None:
            path.unlink()
        elif keep is not None:
            os.truncate(path, keep)

    refused(path.parent, r"model\.safetensors: ", tmp_path, report=damage)


def test_a_header_that_is_too_long_is_refused(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = own_checkpoint("llama")
    path = source / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])
    refused(source, "header length is", tmp_path)


@pytest.mark.parametrize("value", [[1, 2], {"x": 3}, 7])
def test_a_pickle_without_a_state_dict_is_refused(value: Any, own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = own_checkpoint("llama", pickled=True)
    torch.save(value, source / "pytorch_model.bin")
    with pytest.raises((SourceError, NothingToQuantizeError)):
        convert_hf_to_lowbit(str(source), tmp_path / "out", RECIPE)


def test_a_directory_without_config_is_refused(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = own_checkpoint("llama")
    (source / "config.json").unlink()
    refused(source, r"config\.json: is missing; SOURCE must be a Hugging Face model directory", tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": ' * 100_000])
def test_a_config_that_is_no_object_is_refused(text: str, own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = own_checkpoint("llama")
    (source / "config.json").write_text(text)
    refused(source, "config.json: is not ", tmp_path)


def test_a_directory_without_weights_is_refused(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = own_checkpoint("llama")
    (source / "model.safetensors").unlink()
    refused(source, "has neither model.safetensors nor pytorch_model.bin", tmp_path)


def test_a_checkpoint_that_is_quantized_already_is_refused(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = edit_config(own_checkpoint("llama"), quantization_config={"quant_method": "eetq", "bits": 8})
    refused(source, "quantized already.*'eetq'.*or dequantize it first", tmp_path)


def test_a_matrix_of_integers_is_refused(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    key = "model.layers.0.mlp.up_proj.weight"
    source = edit_weights(own_checkpoint("llama"), lambda t: t.update({key: t[key].to(torch.int8)}))
    refused(source, f"{key}: has dtype I8.*is it quantized already", tmp_path)


# --- the Hub ----------------------------------------------------------------------------------------


def test_a_repository_that_cannot_be_had_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused("nobody/no-such-model", "no such directory, and not to be had from the Hub", tmp_path)
    refused("nobody/no-such-model", "from the Hub at revision v9", tmp_path, revision="v9")


@pytest.mark.parametrize("source", ["./no/such/directory", "a/b/c", "user/mo del"])
def test_what_is_neither_directory_nor_repository_is_refused(source: str, tmp_path: Path) -> None:
    refused(source, "no such directory", tmp_path)


# --- what is on this machine and is no checkpoint -----------------------------------------------------


def test_a_file_is_named_for_what_it_is(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = own_checkpoint("llama")
    for name in ("x.gguf", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    refused(tmp_path / "x.gguf", r"x\.gguf: has 1 bytes, and is no GGUF file", tmp_path)
    refused(tmp_path / "notes.txt", "is a file, expected the directory", tmp_path)
    refused(source / "model.safetensors", f"SOURCE is the directory of the model: {source}", tmp_path)


def test_a_directory_that_is_no_model_is_named_for_what_it_is(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = own_checkpoint("llama")
    refused(source.parent, f"holds no model itself, but {source} does", tmp_path)
    for folder, file, message in (
        ("adapter", "adapter_config.json", "is an adapter .*merge_and_unload"),
        ("bundle", "task_config.json", "is a task bundle"),
        ("gguf", "x.gguf", r"x\.gguf: has 2 bytes, and is no GGUF file"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
        refused(tmp_path / folder, message, tmp_path)


def test_a_misspelt_directory_is_told_before_the_hub(own_checkpoint: Checkpoint, tmp_path: Path) -> None:
    own_checkpoint("llama")
    refused(tmp_path / "suorce", rf"suorce: no such directory \(did you mean {tmp_path / 'source'}\?\)", tmp_path)


def test_a_directory_has_no_revisions(checkpoint: Checkpoint, tmp_path: Path) -> None:
    refused(checkpoint("llama"), "is a directory, which has no revisions", tmp_path, revision="main")
