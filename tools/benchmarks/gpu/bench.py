"""What all parts of the GPU benchmark share: the device, data, how to time, and how to tell right from wrong.

The same code runs on a GPU and, tiny, on a CPU where Triton's interpreter runs the kernels.
"""

from __future__ import annotations

import contextlib
import gc
import math
import signal
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lowbit_format.kernels import naive
from lowbit_format.kernels.gpu import launch
from lowbit_format.kernels.matrix import PlaneMatrix, select_rows

from ..common import seconds, spread
from .predict import BATCHES, BITS, GEMV_AIMS, PREFILLS, SIZES, Limits

CHECKED_ROWS = 2048  # of a weight are compared with the float64 product
# Relative error norms: rounding of the result, and of the weight where the library multiplies, with a margin of two.
TOLERANCES = {torch.bfloat16: 6e-3, torch.float16: 8e-4, torch.float32: 2e-5}
CACHE = 60 << 20  # bytes, where torch does not tell


median = statistics.median


class TooLong(BaseException):
    """A time limit passed. It is no ``Exception``, so that code in between does not catch it."""


@dataclass
class Bench:
    """Where and how everything is measured.

    Attributes:
        device: a GPU, or the CPU for a self-check.
        quick: fewer repetitions, sizes and layers.
        clock: Hz to predict with where none can be read.
        wrong: what was computed wrongly, by name.
        notes: what went otherwise than planned.
        late_at: when the part that runs now should end (``time.perf_counter``).
    """

    device: torch.device
    quick: bool = False
    clock: float = 1.755e9
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    late_at: float = math.inf

    @property
    def tiny(self) -> bool:
        """Whether this is a self-check."""
        return self.device.type != "cuda"

    @property
    def half(self) -> torch.dtype:
        """The dtype of x: the interpreter has no bfloat16."""
        return torch.float16 if self.tiny else torch.bfloat16

    @property
    def sizes(self) -> Sequence[tuple[int, int]]:
        """Rows, columns; the most telling first."""
        if self.tiny:
            return ((16, 256),)
        return SIZES[:2] if self.quick else SIZES

    @property
    def bits(self) -> Sequence[int]:
        """Planes of BCQ; those with aims first."""
        return (4, 1) if self.tiny else sorted(BITS, key=lambda b: b not in GEMV_AIMS)

    @property
    def batches(self) -> Sequence[int]:
        """Rows of x."""
        return (1, 20) if self.tiny else BATCHES

    @property
    def prefills(self) -> Sequence[int]:
        """Many rows of x."""
        return (200,) if self.tiny else PREFILLS

    def late(self) -> bool:
        """Whether the part's time is over."""
        return time.perf_counter() > self.late_at

    def left(self) -> float:
        """Seconds that the part has left, at least one."""
        return max(1.0, self.late_at - time.perf_counter())

    # --- timing ---

    def measure(self, run: Callable[[int], object], copies: int = 1, *, budget: float = 0.12) -> list[float]:
        """Microseconds of ``run(i)``, i going over all copies in turn: a sample is the mean of one pass over them.

        A pass is one CUDA graph, so that hardly any time goes by between launches.
        """
        if self.tiny:
            return [1e6 * seconds(lambda: run(copies - 1))]
        replay = self._graph(run, copies)
        for _ in range(2):
            replay()
        one = self._timed(replay, 1)[0]
        count = int(min(300, max(10, (budget / 2 if self.quick else budget) / one)))
        return [1e6 * s / copies for s in self._timed(replay, count)]

    def _graph(self, run: Callable[[int], object], copies: int) -> Callable[[], object]:
        """One pass over all copies as a CUDA graph; as plain calls, with a note, where it cannot be captured."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles kernels and makes handles: not to be done while capturing
            for i in range(copies):
                run(i)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for i in range(copies):
                    run(i)
        except Exception as e:
            torch.cuda.synchronize()
            self.notes.append(f"no CUDA graph, so times hold launches too: {type(e).__name__}: {e}"[:200])
            return lambda: [run(i) for i in range(copies)]
        return graph.replay

    def _timed(self, work: Callable[[], object], count: int) -> list[float]:
        """Seconds of each of `count` calls, by events on the device."""
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for begin, end in events:
            begin.record()
            work()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in events]

    def synchronize(self) -> None:
        """Wait for the device."""
        if not self.tiny:
            torch.cuda.synchronize()

    # --- the device's limits ---

    @cached_property
    def limits(self) -> Limits:
        """What this device can do, measured once in every run."""
        copy, matmul = statistics.median(self.copy_rates), statistics.median(self.matmul_rates)
        return Limits(launch.multiprocessors(self.device), self.sm_clock or self.clock, copy, matmul)

    @cached_property
    def copy_rates(self) -> list[float]:
        """Bytes per second, read and written, of copies from device to device."""
        n = 1 << (16 if self.tiny else 29)
        source = torch.randn(n, device=self.device, dtype=self.half)
        target = torch.full_like(source, math.nan)
        times = self.measure(lambda _: target.copy_(source), budget=0.3)
        assert torch.equal(target, source)
        return [4e6 * n / t for t in times]  # two bytes read, two written, of each number

    @cached_property
    def matmul_rates(self) -> list[float]:
        """Operations per second of a square product in half precision."""
        n = 64 if self.tiny else 8192
        a, b = (torch.randn(n, n, device=self.device, dtype=self.half) for _ in range(2))
        return [2e6 * n**3 / t for t in self.measure(lambda _: a @ b, budget=0.3)]

    @cached_property
    def sm_clock(self) -> float | None:
        """Hz of the multiprocessors under a load of memory, from nvidia-smi; None if it does not tell."""
        if self.tiny:
            return None
        a = torch.randn(1 << 28, device=self.device, dtype=self.half)
        b = torch.empty_like(a)
        for _ in range(8000):  # about 2 s on the fastest
            b.copy_(a)
        try:
            told = float(smi(self.device, "clocks.sm").split()[0])
        except (OSError, ValueError, IndexError, subprocess.SubprocessError):
            return None
        finally:
            torch.cuda.synchronize()
        return told * 1e6 if told > 0 else None

    def copies(self, size: int) -> int:
        """How many copies of `size` bytes are, together, more than three times the last cache."""
        if self.tiny:
            return 2
        properties = torch.cuda.get_device_properties(self.device)
        cache = getattr(properties, "L2_cache_size", 0) or CACHE
        return min(200, max(2, math.ceil(3.2 * cache / size)))

    # --- right or wrong ---

    def check(self, what: str, found: Tensor, expected: Tensor, tolerance: float) -> str:
        """The relative error norm, as text; what is beyond `tolerance` or not finite is noted as wrong."""
        error = float((found.double() - expected.double()).norm() / expected.double().norm())
        if not error <= tolerance or not bool(torch.isfinite(found).all()):
            self.wrong.append(f"{what}: relative error {error:.1e}, expected at most {tolerance:.0e}")
            return f"**{error:.1e}, wrong**"
        return f"{error:.1e}"

    def check_product(self, what: str, x: Tensor, plain: PlaneMatrix, found: Tensor, *tasks: Tensor | None) -> str:
        """Of ``linear(x, plain, None, *tasks)``, against float64, in some rows of the weight; all must be finite."""
        if not bool(torch.isfinite(found).all()):
            return self.check(what, found, torch.ones_like(found), 0)
        rows = torch.randperm(found.shape[1], device=self.device)[:CHECKED_ROWS]
        some = doubled(select_rows(plain, rows))
        deltas, ids = tasks or (None, None)
        deltas = None if deltas is None else deltas[:, :, rows].double()
        expected = naive.linear(x.double(), some, None, deltas, ids)
        return self.check(what, found[:, rows], expected, TOLERANCES[x.dtype])


def doubled(w: PlaneMatrix) -> PlaneMatrix:
    """`w` with parameters of float64, in which the naive operators then compute."""
    return w._replace(**{k: v.double() for k, v in w._asdict().items() if isinstance(v, Tensor) and k != "planes"})


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside the block new memory holds NaN, so that what a kernel leaves unwritten is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the library's products need not be the same every time
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


# --- around it ---------------------------------------------------------------------------------------


def micro(times: Sequence[float]) -> str:
    """Microseconds as ``median (minimum-maximum)``."""
    return spread(times, 1 if statistics.median(times) < 1000 else 0)


def smi(device: torch.device, query: str) -> str:
    """What nvidia-smi tells of the device; OSError or SubprocessError if it is not there."""
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    which = [] if not uuid else ["-i", uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"]
    command = ["nvidia-smi", *which, f"--query-gpu={query}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.splitlines()[0].strip()


@contextlib.contextmanager
def time_limit(limit: float) -> Iterator[None]:
    """Raise :class:`TooLong` in the block after so many seconds, where the system can."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise TooLong(f"more than {limit:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def let_go() -> None:
    """Give memory back that nothing uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
