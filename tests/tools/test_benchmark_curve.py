"""The points that a plot of sizes and perplexities takes from printed tables."""

from __future__ import annotations

import runpy

import pytest
from support.tools import ROOT

MODULE = runpy.run_path(str(ROOT / "tools" / "benchmarks" / "curve.py"))
Point, read = MODULE["Point"], MODULE["read"]

TABLE = """Loading…
| type | importance matrix | bits a weight, whole file | perplexity | seconds |
|---|---|---|---|---|
| float | | | 31.37 | |
| Q4_0 | no | 5.46 | 36.08 | 1 |
| Q2_K | yes | 5.25 | 35.98 | 606 |
real 0m1s
"""


def test_points_are_read_by_the_names_of_columns() -> None:
    assert read(TABLE) == [Point(5.46, 36.08), Point(5.25, 35.98)]


def test_a_text_without_such_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="no table with the columns"):
        read("| bits | seconds |\n|---|---|\n| 4 | 1 |\n")
