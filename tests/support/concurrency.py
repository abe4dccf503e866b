"""Work in several threads at once and in forked processes, for tests, with time limits."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
PATIENCE = 60.0  # seconds after which something that should end is held to be stuck


def in_child(work: Callable[[], bool]) -> bool:
    """What `work` says in a forked child; False if it raises, True only if it ends in time."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def at_once(*work: Callable[[], object]) -> None:
    """Run all in threads of their own that start together; what one raises is raised here."""
    barrier, errors = threading.Barrier(len(work)), list[BaseException]()

    def run(act: Callable[[], object]) -> None:
        barrier.wait(PATIENCE)
        try:
            act()
        except BaseException as e:
            errors.append(e)

    running = [threading.Thread(target=run, args=(act,), daemon=True) for act in work]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in running), "stuck"
    if errors:
        raise errors[0]
