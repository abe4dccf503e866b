"""The journal of a tuning: what it goes on with, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lowbit_format.errors import OutputError
from lowbit_format.tuning.journal import JOURNAL, Journal


def test_a_journal_older_than_a_setting_has_its_default(tmp_path: Path) -> None:
    """One from before `optimizer` was a choice is adam's: it goes on with adam, and with nothing else."""
    Journal(tmp_path, {"seed": 0}, resume=False).update({1e-3: 0.5, 1e-2: math.inf})
    with pytest.raises(OutputError, match="has optimizer 'adam', this one 'zo'; give the same"):
        Journal(tmp_path, {"seed": 0, "optimizer": "zo"}, resume=True)
    with pytest.raises(OutputError, match="has seed 0, this one 1"):
        Journal(tmp_path, {"seed": 1, "optimizer": "adam"}, resume=True)
    again = Journal(tmp_path, {"seed": 0, "optimizer": "adam"}, resume=True)
    assert dict(again) == {1e-3: 0.5, 1e-2: math.inf}
    assert json.loads((tmp_path / JOURNAL).read_text("utf-8"))["settings"] == {"seed": 0, "optimizer": "adam"}
