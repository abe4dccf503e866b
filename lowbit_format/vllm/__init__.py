"""Plugin for vLLM: lowbit models behind its server, and tasks per request over one copy of the planes.

vLLM calls :func:`register` in each of its processes, by the entry point group ``vllm.general_plugins``. Only files of
this package import vllm, and nothing else of the library imports this package. Its parts, from the bottom:

* :mod:`.slices`, :mod:`.parts`: what one process holds of a layer, and products with it.
* :mod:`.task_table`: what tasks change there, by slot, looked up for each token.
* :mod:`.config`, :mod:`.methods`, :mod:`.experts`: the quantization method ``lowbit``.
* :mod:`.task_manager`: tasks in the place of vLLM's LoRA adapters; :mod:`.bundles` reads and checks them, and
  :mod:`.metrics` counts them.
* :mod:`.hub_tasks`: tasks by the name of their repository.
* :mod:`.internals`: everything that touches what vLLM does not offer for plugins.
"""

from __future__ import annotations


def register() -> None:
    """Register with the vLLM of this process. Idempotent, and cheap for models that are not ours."""
    from .registration import register as register_all

    register_all()
