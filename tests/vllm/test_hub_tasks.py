"""Tasks that a request names by their repository, with the real client and a Hub of our own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.hub_server import HubServer, running_hub

from lowbit_format.tasks.bundle import TaskBundle, read_stored_bundle, write_bundle
from lowbit_format.tasks.bundle_config import TaskConfig
from lowbit_format.tasks.repository import push_task

pytest.importorskip("vllm.version")  # `vllm` alone would be this folder
pytestmark = pytest.mark.vllm


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with running_hub(tmp_path, monkeypatch) as server:
        yield server


def test_only_tasks_of_allowed_owners_are_fetched(hub: HubServer, tmp_path: Path) -> None:
    from lowbit_format.vllm.hub_tasks import HubTaskResolver

    bundle = TaskBundle(TaskConfig("ab" * 32), {"fc.scales.mul": np.ones((1, 4), np.float32)})
    write_bundle(tmp_path / "task", bundle)
    stored = read_stored_bundle(tmp_path / "task")
    push_task(stored.files(), stored.bundle.config, "owner/tasks", subfolder="films")
    push_task(stored.files(), stored.bundle.config, "owner/task")

    def resolve(name: str, *owners: str) -> str | None:
        found = asyncio.run(HubTaskResolver(frozenset(owners)).resolve_lora("base", name))
        return None if found is None else found.lora_path

    for name in ("owner/task", "owner/tasks/films"):
        path = resolve(name, "owner")
        assert path is not None
        assert read_stored_bundle(path).bundle.config == bundle.config
    before = len(hub.log)
    assert resolve("owner/task") is resolve("owner/task", "other") is resolve("task", "task") is None
    assert len(hub.log) == before
    assert resolve("owner/tasks", "owner") is resolve("owner/missing", "owner") is None
    assert resolve("owner/tasks/../../etc", "owner") is None


def test_off_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.lora.resolver import LoRAResolverRegistry

    from lowbit_format.vllm import hub_tasks

    monkeypatch.setattr(LoRAResolverRegistry, "resolvers", {})
    monkeypatch.delenv(hub_tasks.OWNERS_VARIABLE, raising=False)
    hub_tasks.register()
    assert not LoRAResolverRegistry.resolvers
    monkeypatch.setenv(hub_tasks.OWNERS_VARIABLE, "alice, acme,")
    hub_tasks.register()
    (resolver,) = LoRAResolverRegistry.resolvers.values()
    assert resolver.owners == {"alice", "acme"}
