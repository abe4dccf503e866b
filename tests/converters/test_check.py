"""A conversion checks its output: a difference from the plan is an error, and nothing looks finished."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.conversions import assert_nothing_looks_finished

from lowbit_format.converters import Recipe, convert_hf_to_lowbit, driver
from lowbit_format.errors import ConversionError
from lowbit_format.quantize import Target

Checkpoint = Callable[..., Path]

RECIPE = Recipe(Target(bits=2, group_size=32), embeddings=True)


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any, Any], Any]) -> None:
    """Let the driver write other tensors than it should."""
    carry_out = driver.carry_out

    def spoilt(quantizer: Any, source: Any, step: Any, data: Any) -> Any:
        tensors, outcome = carry_out(quantizer, source, step, data)
        return change(step, tensors), outcome

    monkeypatch.setattr(driver, "carry_out", spoilt)


def test_a_tensor_that_is_lost_is_noticed(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda step, tensors: [] if step.tensor.name == "model.norm.weight" else tensors)
    with pytest.raises(ConversionError, match=r"does not load.*lacks 1 tensors.*'model\.norm\.weight'.*report this"):
        convert_hf_to_lowbit(str(checkpoint("llama")), tmp_path / "out", RECIPE)
    assert_nothing_looks_finished(tmp_path / "out")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_other_codes_are_noticed(
    name: str, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(step: Any, tensors: Any) -> Any:
        if step.target is not None:
            tensors[0].data[0, 0, 0] ^= 1  # a bit of every matrix
        return tensors

    spoil(monkeypatch, change)
    with pytest.raises(ConversionError, match="decodes to other weights than the solver gave"):
        convert_hf_to_lowbit(str(checkpoint(name)), tmp_path / "out", RECIPE)
    assert_nothing_looks_finished(tmp_path / "out")
