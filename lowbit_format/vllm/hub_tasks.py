"""Tasks by the name of their repository: a request's ``model`` names it, the server fetches it when it is first asked.

Off by default. ``LOWBIT_VLLM_TASK_OWNERS=alice,acme`` allows the repositories of these users and organizations; vLLM
asks resolvers only with ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=1``. A name is ``user/repository`` or
``user/repository/subfolder``.
"""

from __future__ import annotations

import asyncio
import logging
import os

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from ..errors import LowbitError
from ..tasks.repository import fetch_task

log = logging.getLogger("vllm.lowbit")

OWNERS_VARIABLE = "LOWBIT_VLLM_TASK_OWNERS"


class HubTaskResolver(LoRAResolver):
    """Finds tasks on the Hub.

    Args:
        owners: users and organizations whose repositories may be fetched.
    """

    def __init__(self, owners: frozenset[str]) -> None:
        self.owners = owners

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The task `lora_name`, fetched and read once; None if its owner is not allowed, or it cannot be had."""
        owner, *rest = lora_name.split("/", 2)
        if owner not in self.owners or not rest:
            return None
        repository, subfolder = f"{owner}/{rest[0]}", rest[1] if len(rest) > 1 else None
        try:
            stored = await asyncio.to_thread(fetch_task, repository, subfolder=subfolder)
        except LowbitError as e:
            log.warning("lowbit: task %r: %s", lora_name, e)
            return None
        return LoRARequest(lora_name, 1, str(stored.directory))  # vLLM gives it a number of its own


def register() -> None:
    """Register the resolver, if owners are allowed."""
    owners = frozenset(filter(None, os.environ.get(OWNERS_VARIABLE, "").replace(" ", "").split(",")))
    if owners:
        log.info("lowbit: tasks are fetched from the Hub's repositories of: %s", ", ".join(sorted(owners)))
        LoRAResolverRegistry.register_resolver("lowbit tasks of the Hub", HubTaskResolver(owners))
