"""Programs of ``tools/``, run as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_tool(module: str, *arguments: str, interprets: bool = False, timeout: float = 300) -> str:
    """What ``python -m tools.MODULE`` prints; its exit status must be 0.

    Args:
        interprets: it runs kernels in Triton's interpreter, which is made quicker beforehand.
    """
    program = ["-m", f"tools.{module}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if interprets:
        run = f"runpy.run_module('tools.{module}', run_name='__main__', alter_sys=True)"
        program = ["-c", f"import runpy; from support.interpreter import quicken; quicken(); {run}"]
        environment |= {"PYTHONPATH": str(ROOT / "tests"), "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, *program, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
