"""Peak memory of a conversion, measured in a process of its own."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lowbit_format.container.header import build_header

LAYERS, HIDDEN, MLP, VOCAB = 6, 1024, 4096, 32_000
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": MLP,
    "num_hidden_layers": LAYERS, "num_attention_heads": 16, "vocab_size": VOCAB, "dtype": "bfloat16",
}  # fmt: skip
# VmHWM, since ru_maxrss of a process begins with that of the process which started it.
CHILD = """
import json, re, sys
from pathlib import Path
from lowbit_format.converters import Recipe, convert_hf_to_lowbit
from lowbit_format.quantize import Target
recipe = Recipe(Target(), embeddings=True, lm_head=True)
done = convert_hf_to_lowbit(sys.argv[1], sys.argv[2], recipe)
peak = 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
print(json.dumps({"peak": peak, "expected": done.plan.peak_memory(), "modules": len(done.outcomes)}))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 530 MB in bfloat16."""
    directory = tmp_path_factory.mktemp("large")
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        shapes |= {f"model.layers.{i}.self_attn.{n}_proj.weight": (HIDDEN, HIDDEN) for n in "qkvo"}
        shapes |= {f"model.layers.{i}.mlp.{n}_proj.weight": (MLP, HIDDEN) for n in ("up", "gate")}
        shapes |= {f"model.layers.{i}.mlp.down_proj.weight": (HIDDEN, MLP)}
        shapes |= {f"model.layers.{i}.{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
    shapes["model.norm.weight"] = (HIDDEN,)
    random = np.random.default_rng(0).standard_normal(VOCAB * HIDDEN, np.float32) * np.float32(0.02)
    words = (random.view(np.uint32) >> 16).astype("<u2")  # all tensors are cut from one pool of values
    with open(directory / "model.safetensors", "wb") as f:
        f.write(build_header([(name, "BF16", shape) for name, shape in shapes.items()], {"format": "pt"}))
        for i, shape in enumerate(shapes.values()):
            f.write(np.roll(words[: math.prod(shape)], i).tobytes())
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_peak_memory_is_bounded(source: Path, tmp_path: Path) -> None:
    """At most 1 GiB and three times the largest tensor in float32, and no more than the plan says."""
    command = [sys.executable, "-c", CHILD, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["modules"] == 2 + 7 * LAYERS
    assert found["peak"] <= (1 << 30) + 3 * 4 * VOCAB * HIDDEN
    assert found["peak"] <= found["expected"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_recognition_stays_within_the_bound() -> None:
    """A large matrix on a grid takes no more memory beside itself than one that is quantized: two of its size."""
    child = """
import re
from pathlib import Path
import numpy as np
from lowbit_format.quantize import Target, quantize
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
small = np.random.default_rng(0).integers(-1, 2, (64, 2048)).astype(np.float32)
assert quantize(small, Target()).lossless  # compiled code is loaded
weight = np.tile(small, (128, 2))
before = peak()
assert quantize(weight, Target()).lossless
print((peak() - before) / weight.nbytes)
"""
    printed = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True).stdout
    assert float(printed) < 2


EXPERTS, INNER = 16, 1024
MOE = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": HIDDEN, "num_hidden_layers": 1,
    "intermediate_size": INNER, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 64,
    "num_local_experts": EXPERTS, "dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_experts_are_quantized_one_at_a_time(tmp_path: Path) -> None:
    """A stack of 134 MB in float32: as a matrix alone, it would take three times that."""
    source = tmp_path / "source"
    source.mkdir()
    at = "model.layers.0"
    shapes = {"model.embed_tokens.weight": (64, HIDDEN), "lm_head.weight": (64, HIDDEN), "model.norm.weight": (HIDDEN,)}
    shapes |= {f"{at}.self_attn.{n}_proj.weight": (HIDDEN, HIDDEN) for n in "qkvo"}
    shapes |= {f"{at}.{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
    shapes |= {f"{at}.mlp.gate.weight": (EXPERTS, HIDDEN), f"{at}.mlp.experts.down_proj": (EXPERTS, HIDDEN, INNER)}
    shapes |= {f"{at}.mlp.experts.gate_up_proj": (EXPERTS, 2 * INNER, HIDDEN)}
    words = (np.random.default_rng(0).standard_normal(1 << 20, np.float32).view(np.uint32) >> 16).astype("<u2")
    with open(source / "model.safetensors", "wb") as f:
        f.write(build_header([(name, "BF16", shape) for name, shape in shapes.items()], {"format": "pt"}))
        for shape in shapes.values():
            f.write(np.resize(words, math.prod(shape)).tobytes())
    (source / "config.json").write_text(json.dumps(MOE))
    command = [sys.executable, "-c", CHILD, str(source), str(tmp_path / "out")]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    assert found["modules"] == 2 + 4 + 2
    assert found["peak"] <= found["expected"]
    stack = EXPERTS * 2 * INNER * HIDDEN
    assert found["expected"] < (832 << 20) + stack + 19 * stack // EXPERTS


# Every tensor of 64 KiB has pages of its own: what is counted is alive, and no rest of what was.
CALIBRATED = """
import re, sys, tempfile
from pathlib import Path
import torch, transformers as hf
from lowbit_format.calibration.data import Data
from lowbit_format.calibration.effort import Effort
from lowbit_format.converters import Calibration, Recipe, convert_hf_to_lowbit, plan_conversion
from lowbit_format.converters.convert import peak_memory
from lowbit_format.converters.plan import BASE_MEMORY
from lowbit_format.quantize import Target

def status(key):
    return 1024 * int(re.search(key + r":\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])

def measure(directory, hidden, vocab, length):
    config = hf.LlamaConfig(hidden_size=hidden, intermediate_size=hidden, num_hidden_layers=2, num_attention_heads=4,
                            vocab_size=vocab, tie_word_embeddings=True)
    hf.LlamaForCausalLM(config).save_pretrained(directory / "model")
    data = Data.of([{"input_ids": torch.randint(4, vocab, (1, length))} for _ in range(3)], held_out=1)
    effort = Effort(sweeps=1, steps=2, learning_rate=0.01, drift=True, samples=2, passes=1, end_rate=0.001, codes=True)
    how = Calibration(data, effort)
    recipe = Recipe(Target(bits=2, group_size=128), embeddings=False, lm_head=False)
    opened, plan, _ = plan_conversion(str(directory / "model"), recipe)
    expected = peak_memory(opened, plan, how, measured=True) - BASE_MEMORY
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    convert_hf_to_lowbit(str(directory / "model"), directory / "out", recipe, calibration=how)
    return status("VmHWM") - before, expected

with tempfile.TemporaryDirectory() as scratch:
    shapes = [(128, 128, 64), (512, 512, 64), (128, 16_000, 256)]
    found = [measure(Path(scratch) / str(i), *shape) for i, shape in enumerate(shapes)]
print(found[1:])  # of the first, libraries and compiled code take more
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_calibration_keeps_its_promise() -> None:
    """Both where training the codes of a block is the dearest moment, and where all scales are trained together."""
    command = [sys.executable, "-c", CALIBRATED]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    for peak, expected in json.loads(done.stdout.splitlines()[-1].replace("(", "[").replace(")", "]")):
        assert 0.7 * expected < peak <= expected
