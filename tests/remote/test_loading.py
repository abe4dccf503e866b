"""Models loaded from the Hub at a precision: only its planes are fetched, and the model is that of the whole files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.hub_server import HubServer, running_hub

import lowbit_format as lb
from lowbit_format import remote
from lowbit_format.container.reader import ModelReader
from lowbit_format.errors import FingerprintError, HubError, PrecisionError
from lowbit_format.quantize import Target

REPO = "owner/model"
IDS = torch.arange(24).reshape(2, 12)
Checkpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def converted(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("converted") / name
            recipe = lb.Recipe(Target(bits=4, group_size=32, nested=(2,)), lm_head=True)
            lb.convert_hf_to_lowbit(str(checkpoint(name)), made[name], recipe)
        return made[name]

    return get


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(remote, "FIRST", 64)
    monkeypatch.setattr(remote, "GAP", 0)
    with running_hub(tmp_path / "server", monkeypatch) as hub:
        hub.create(REPO)
        yield hub


def publish(hub: HubServer, directory: Path) -> Path:
    hub.commit(REPO, {p.name: p.read_bytes() for p in directory.iterdir()})
    hub.sent = 0
    return directory


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def whole_files(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "server" / "cache").glob("**/snapshots/**/*.safetensors"))


@pytest.mark.parametrize("name", ["llama-tied", "mixtral"])
def test_it_is_the_model_of_the_whole_files(
    name: str, hub: HubServer, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    whole = publish(hub, converted(name))
    near, far = lb.from_pretrained(whole, bits=2), lb.from_pretrained(REPO, bits=2)
    assert torch.equal(logits(far), logits(near))
    assert far.lowbit_base == near.lowbit_base
    assert far.config.quantization_config.to_dict() == near.config.quantization_config.to_dict()
    assert far.name_or_path == far.config._name_or_path == REPO
    assert not whole_files(tmp_path)
    size = (whole / "model.safetensors").stat().st_size
    reader = ModelReader(whole)
    skipped = sum(reader.info(n).nbytes for n in reader.names() if n.endswith("planes")) / 2
    assert hub.sent < size - skipped + 30_000  # config, and headers
    assert all(torch.equal(a, near.state_dict()[n]) for n, a in far.state_dict().items())
    far.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(lb.from_pretrained(tmp_path / "saved")), logits(near))


def test_tasks_of_the_whole_base_fit_its_precision_and_back(
    hub: HubServer, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    """MAT-1, MAT-3: with `task=` the bundle's precision decides what is fetched."""
    whole = publish(hub, converted("llama"))
    near = lb.from_pretrained(whole, bits=2)
    lb.prepare_scale_tuning(near, name="films")
    with torch.no_grad():
        for parameter in (p for p in near.parameters() if p.requires_grad):
            parameter.add_(0.1)
    lb.save_task(near, tmp_path / "films")
    expected = logits(near)
    assert not torch.equal(expected, logits(lb.from_pretrained(whole, bits=2)))
    far = lb.from_pretrained(REPO, task=tmp_path / "films")
    assert not whole_files(tmp_path)
    assert torch.equal(logits(far), expected)
    far = lb.from_pretrained(REPO, bits=2)
    lb.prepare_scale_tuning(far, name="films")
    lb.save_task(far, tmp_path / "again")
    assert f'"base_model_name_or_path": "{REPO}"' in (tmp_path / "again" / "task_config.json").read_text()
    lb.load_task(lb.from_pretrained(whole, bits=2), tmp_path / "again")
    # The directory alone, which other programs may load, is another base, and says so.
    alone = transformers.AutoModelForCausalLM.from_pretrained(lb.fetch_precision(REPO, 2).directory)
    assert torch.equal(logits(alone), logits(lb.from_pretrained(whole, bits=2)))
    with pytest.raises(FingerprintError, match="MAT-1"):
        lb.load_task(alone, tmp_path / "films")


def test_the_whole_model_where_it_is_wanted_or_at_hand(
    hub: HubServer, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    publish(hub, converted("llama"))
    for options in ({"bits": 4}, {}, {"bits": 2, "verify": True}):
        lb.from_pretrained(REPO, **options)
        assert whole_files(tmp_path), options
        shutil.rmtree(tmp_path / "server" / "cache")
    model = lb.from_pretrained(REPO)
    hub.sent = 0
    lb.from_pretrained(REPO, bits=2)  # which the cache has
    assert hub.sent == 0
    assert model.lowbit_base.bits is None
    with pytest.raises(PrecisionError):
        lb.from_pretrained(REPO, bits=3)


def test_without_the_hub_the_cache_serves(
    hub: HubServer, converted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(hub, converted("llama"))
    expected = logits(lb.from_pretrained(REPO, bits=2))
    assert torch.equal(logits(lb.from_pretrained(REPO, bits=2, local_files_only=True)), expected)
    hub.fail("GET", "/api/", status=503, times=99)
    hub.fail("HEAD", "", status=503, times=99)
    hub.fail("GET", "safetensors", status=503, times=99)
    assert torch.equal(logits(lb.from_pretrained(REPO, bits=2)), expected)
    with pytest.raises(HubError):
        lb.fetch_precision(REPO, 2)


def test_a_config_of_the_whole_model_may_be_given(hub: HubServer, converted: Callable[[str], Path]) -> None:
    whole = publish(hub, converted("llama"))
    config = transformers.AutoConfig.from_pretrained(REPO)
    found = lb.from_pretrained(REPO, bits=2, config=config)
    assert torch.equal(logits(found), logits(lb.from_pretrained(whole, bits=2)))
