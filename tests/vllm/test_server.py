"""What a server says of tasks that it refuses, and its metrics."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from support.vllm_models import write_llama
from support.vllm_server import serving

import lowbit_format as lb
from lowbit_format.schema import Scheme
from lowbit_format.tasks.bundle import read_stored_bundle

pytest.importorskip("vllm.version")  # `vllm` alone would be this folder
pytestmark = pytest.mark.vllm

PROMPT = [5, 9, 2, 33]


def base_in(directory: Path, bits: int) -> Path:
    return write_llama(directory, Scheme("bcq", bits, 64, "F16"))


def task_in(base: Path, directory: Path) -> Path:
    model = lb.from_pretrained(base, dtype=torch.float32)
    lb.prepare_scale_tuning(model, modules_to_save=[])
    lb.save_task(model, directory)
    return directory


def test_refused_tasks_are_answered_with_400_and_counted(tmp_path: Path) -> None:
    base, other = base_in(tmp_path / "base", 3), base_in(tmp_path / "other", 2)
    good, wrong = task_in(base, tmp_path / "good"), task_in(other, tmp_path / "wrong")
    broken = shutil.copytree(good, tmp_path / "broken")
    (broken / "task_scales.safetensors").write_bytes(b"no tensors")
    counted = tmp_path / "metrics"
    counted.mkdir()
    with serving(base, PROMETHEUS_MULTIPROC_DIR=str(counted)) as server:
        for number in range(3):  # one more than slots
            assert server.post("/v1/load_lora_adapter", lora_name=f"good-{number}", lora_path=str(good))[0] == 200
            assert server.answer(f"good-{number}", PROMPT, 4)[0] == 200
        for path, message in {wrong: lb.ModelReader(other).fingerprint().body, broken: "HDR-"}.items():
            status, text = server.post("/v1/load_lora_adapter", lora_name=path.name, lora_path=str(path))
            assert status == 400
            found = json.loads(text)["error"]["message"]
            assert re.match(rf"lowbit-format refuses the task '{path.name}': .*{message}", found, re.DOTALL)
            assert server.answer(path.name, PROMPT, 4)[0] == 404
        assert server.post("/v1/load_lora_adapter", lora_name="none", lora_path=str(tmp_path / "none"))[0] == 404
        assert server.answer("base", PROMPT, 4)[0] == 200
        text = server.get("/metrics")
    numbers = {
        name: float(value) for name, value in re.findall(r"^lowbit:(\w+?)(?:\{.*\})? (\S+)$", text, re.MULTILINE)
    }
    rows = read_stored_bundle(good).bundle.delta_values  # not those of the output head, which tuning leaves out
    expected = {
        "task_slots": 2,
        "task_slots_used": 2,
        "tasks_loaded": 3,
        "task_bytes": 3 * 4 * rows,
        "task_slot_bytes": 2 * 4 * rows,
        "task_loads_total": 3,
        "task_refusals_total": 2,
        "task_evictions_total": 1,
    }
    assert numbers == expected
