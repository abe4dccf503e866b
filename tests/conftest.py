"""Fixtures that tests of several parts share."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Workers share the cores: threads of torch would wait for each other far longer than tiny products take.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

settings.register_profile("ci", deadline=None, max_examples=40)
settings.register_profile("exhaustive", deadline=None, max_examples=1000)  # pytest --hypothesis-profile=exhaustive
settings.load_profile("ci")

# Kernels of Triton run in its interpreter where there is no GPU; that is decided when they are imported.
os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Workers begin with runs of tests in their order, not with every other one: a module's fixtures are made once."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def pytest_collection_finish() -> None:
    """Thousands of tests stay to the end, with what they import: the garbage collector need not look at them again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Libraries that look for leaks when the process ends find what is frozen."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``checkpoint("gpt2", dtype=…)`` is the directory of :func:`checkpoints.build`, built once; not to be changed."""
    from support.checkpoints import build

    built: dict[str, Path] = {}

    def get(name: str, **options: Any) -> Path:
        key = f"{name} {sorted(options.items(), key=str)}"
        if key not in built:
            built[key] = build(name, tmp_path_factory.mktemp(name), **options)
        return built[key]

    return get


@pytest.fixture
def own_checkpoint(checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a checkpoint that the test may change."""

    def copy(name: str, **options: Any) -> Path:
        return Path(shutil.copytree(checkpoint(name, **options), tmp_path / "source"))

    return copy


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Of torch: on a busy machine its threads wait for each other far longer than tiny products take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Small bases for tests of tuning, see :class:`tuning_models.Bases`."""
    from support.tuning_models import Bases

    return Bases(tmp_path_factory.mktemp("bases"))
