"""``import lowbit_format``: light, and registering with transformers in whatever order the two are imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import lowbit_format

REGISTERED = """
import transformers.quantizers.auto as auto
assert auto.AUTO_QUANTIZER_MAPPING["lowbit"].__name__ == "LowbitQuantizer"
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["lowbit"].__name__ == "LowbitConfig"
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_import_is_quick_and_light() -> None:
    code = "import time; t = time.perf_counter(); import lowbit_format; print(time.perf_counter() - t); import sys;"
    code += "print([m for m in ('torch', 'transformers', 'numba', 'numpy', 'peft') if m in sys.modules])"
    seconds, heavy = zip(*(run(code).splitlines() for _ in range(3)), strict=True)
    assert set(heavy) == {"[]"}
    assert min(float(s) for s in seconds) < 0.3


@pytest.mark.parametrize(
    "first",
    [
        "import lowbit_format; import transformers",
        "import transformers; import lowbit_format",  # transformers is lazy: its quantizers are not there yet
        "import transformers.quantizers.auto; import lowbit_format",
        "import lowbit_format.integrations.quantizer",
        "import lowbit_format as lb, importlib; importlib.reload(lb); lb.integrations.registration.register()",
    ],
)
def test_registers_in_every_order(first: str) -> None:
    run(first + REGISTERED + "import inspect, sys; inspect.getsource(sys.modules['transformers.quantizers.auto'])")


def test_lazy_names() -> None:
    assert lowbit_format.ModelReader.__module__ == "lowbit_format.container.reader"
    assert set(lowbit_format.__all__) <= set(dir(lowbit_format))
    assert all(hasattr(lowbit_format, name) for name in lowbit_format.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = lowbit_format.no_such_name
