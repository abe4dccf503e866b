"""The GPU benchmark is not broken: its self-check runs its parts, tiny and interpreted; predictions need nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tools import ROOT, run_tool


def run(*arguments: str, interprets: bool = False) -> str:
    """What the benchmark prints."""
    return run_tool("benchmarks.gpu", *arguments, interprets=interprets)


def cells(text: str, heading: str) -> list[list[str]]:
    """Rows of the table below the heading that starts so."""
    lines = text[text.index(heading) :].splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("| ---"))
    rows = []
    for line in lines[begin + 1 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


@pytest.mark.slow
def test_self_check(tmp_path: Path) -> None:
    text = run("--self-check", "--only", "gemv,tasks,dequantize", "--out", str(tmp_path / "tables.md"), interprets=True)
    assert "All results are right." in text
    assert (tmp_path / "tables.md").read_text().split() == text.split()
    gemv = cells(text, "## One row of x")
    assert [row[1] for row in gemv] == ["library", "4", "1"]
    assert all(0 < float(row[7]) < 1e-3 for row in gemv[1:])  # errors in float16
    tasks = cells(text, "## Several tasks")
    assert [row[1].split(",")[0] for row in tasks] == ["base", "one task", "8 tasks", "one task", "8 tasks"]
    assert all(0 < float(row[5]) < 1e-3 for row in tasks)
    decoding = cells(text, "## Decoding")
    assert {row[0] for row in decoding} == {"bcq", "uniform", "codebook"}
    assert all(row[7] == "yes" for row in decoding)


def test_predictions() -> None:
    """Each within what the device can do, and twice the clock never slower."""
    slow, fast = (cells(run("--predict", "--clock", clock), "## One row of x") for clock in ("1.0", "2.0"))
    assert len(slow) == len(fast) == 4 * 5
    for a, b in zip(slow, fast, strict=True):
        assert float(a[5]) == max(float(a[3]), float(a[4])) >= float(b[5]) >= float(b[4]) == float(a[4])


def test_predictions_know_how_the_kernel_divides_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from lowbit_format.kernels.gpu.products import panel_rows
    from tools.benchmarks.gpu.predict import SLICES, chunks

    for n in range(1, 200):
        rows = panel_rows(n, SLICES)
        assert chunks(n) == (rows, -(-n // rows))


def test_a_wrong_result_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    import torch

    from tools.benchmarks.gpu.bench import Bench, poisoned

    bench, right = Bench(torch.device("cpu")), torch.randn(4, 8)
    assert bench.check("right", right, right.double(), 1e-6) == "0.0e+00"
    assert bench.wrong == []
    with poisoned():
        unwritten = torch.empty(4, 8)
    assert "wrong" in bench.check("unwritten", unwritten, right, 1e-2)
    assert "wrong" in bench.check("off", right * 1.1, right, 1e-2)
    assert [w.split(":")[0] for w in bench.wrong] == ["unwritten", "off"]
    assert not torch.are_deterministic_algorithms_enabled()
