"""Numbers about tasks for Prometheus, beside vLLM's own at ``/metrics``.

Workers know them, and workers are processes of their own. The client of Prometheus brings the numbers of several
processes together where ``PROMETHEUS_MULTIPROC_DIR`` names a directory; vLLM's ``/metrics`` reads that directory
where it is set. Without it they are in the log only.
"""

from __future__ import annotations

from functools import cache

from prometheus_client import Counter, Gauge
from vllm.distributed.parallel_state import is_global_first_rank


class TaskMetrics:
    """One object for each process; with several workers only the first counts, since all hold the same tasks."""

    def __init__(self) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"lowbit:{name}", text, multiprocess_mode="max")

        self.slots = gauge("task_slots", "Tasks that a batch may have.")
        self.used = gauge("task_slots_used", "Slots that hold a task.")
        self.loaded = gauge("tasks_loaded", "Tasks in the memory of a worker.")
        self.nbytes = gauge("task_bytes", "Memory of the loaded tasks in a worker.")
        self.table_nbytes = gauge("task_slot_bytes", "Memory of all slots in a worker.")
        self.loads = Counter("lowbit:task_loads", "Bundles that were read.")
        self.refusals = Counter("lowbit:task_refusals", "Bundles that were refused.")
        self.evictions = Counter("lowbit:task_evictions", "Tasks that left their slot for another.")


@cache
def task_metrics() -> TaskMetrics | None:
    """Those of this process; None where another worker counts."""
    return TaskMetrics() if is_global_first_rank() else None
