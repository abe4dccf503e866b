"""Registration with transformers and PEFT: by ``import lowbit_format``, and without it, by the entry point for torch.

What needs the entry point runs in fresh processes over an installed wheel, as a user has it.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from support.checkpoints import build, with_tokenizer
from support.processes import END

import lowbit_format
from lowbit_format import Recipe, Target, convert_hf_to_lowbit

REPOSITORY = Path(__file__).parents[2]
# Products with such groups are decoded: the kernels for others would be compiled for the wheel, which is elsewhere.
RECIPE = Recipe(Target(bits=4, group_size=24))

# What holds at the end of a program of which the first lines import things in some order.
REGISTERED = """
import inspect, sys
import transformers.quantizers.auto as auto
assert auto.AUTO_QUANTIZER_MAPPING["lowbit"].__name__ == "LowbitQuantizer"
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["lowbit"].__name__ == "LowbitConfig"
inspect.getsource(auto)
assert not [name for name, m in list(sys.modules.items()) if getattr(getattr(m, "__spec__", 0), "_callbacks", 0)]
"""


def run(code: str, *path: Path, end: str = END, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh process and expect it to succeed; `path` goes before its ``sys.path``."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code + end], capture_output=True, text=True, cwd=Path(__file__).parent, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's contents, built once for all workers of pytest-xdist."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    with (shared / "wheel.lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "wheel" / "installed").is_dir():
            install_wheel(shared / "wheel")
    return shared / "wheel" / "installed"


def install_wheel(folder: Path) -> None:
    """Build it from a copy of the checkout, so that nothing stale gets into it, and install it below `folder`."""
    source, site = folder / "source", folder / "site"
    for name in ("lowbit_format", "converters"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    build = [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_wheel('dist')"]
    done = subprocess.run(build, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as files:  # to install a wheel of Python alone is to unpack it
        files.extractall(site)
    site.rename(folder / "installed")


# --- import lowbit_format ---------------------------------------------------------------------------


def test_import_is_quick_and_light() -> None:
    code = "import time; t = time.perf_counter(); import lowbit_format; print(time.perf_counter() - t); import sys;"
    code += "print([m for m in ('torch', 'transformers', 'numba', 'numpy', 'peft') if m in sys.modules])"
    seconds, heavy = zip(*(run(code).stdout.splitlines() for _ in range(3)), strict=True)
    assert set(heavy) == {"[]"}
    assert min(float(s) for s in seconds) < 0.3


# Behind transformers.quantizers.auto: test_the_switch_turns_it_off.
@pytest.mark.parametrize(
    "first",
    [
        "import transformers; import lowbit_format",  # transformers is lazy: its quantizers are not there yet
        "import lowbit_format.integrations.quantizer",
    ],
)
def test_registers_in_every_order(first: str) -> None:
    run(first + REGISTERED, TORCH_DEVICE_BACKEND_AUTOLOAD="0")


def test_lazy_names() -> None:
    assert lowbit_format.ModelReader.__module__ == "lowbit_format.container.reader"
    assert set(lowbit_format.__all__) <= set(dir(lowbit_format))
    assert all(hasattr(lowbit_format, name) for name in lowbit_format.__all__)
    assert {"Recipe", "Rule", "Target"} <= set(lowbit_format.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = lowbit_format.no_such_name


# --- without it -------------------------------------------------------------------------------------


def test_torch_imports_us_and_nothing_heavy_with_us(installed: Path) -> None:
    code = "import torch, sys; ours = sorted(m for m in sys.modules if m.split('.')[0] == 'lowbit_format');"
    code += "print(sys.modules['lowbit_format'].__file__); print(*ours)"
    code += "\nprint([m for m in ('transformers', 'numba', 'peft') if m in sys.modules])"
    done = run(code, installed, end="")
    where, ours, heavy = done.stdout.splitlines()
    assert Path(where).parent == installed / "lowbit_format"
    assert ours.split() == ["lowbit_format", "lowbit_format.integrations", "lowbit_format.integrations.registration"]
    assert heavy == "[]"
    assert done.stderr == ""


# Behind "from transformers import AutoModel…": test_auto_model.
@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "import transformers.quantizers.auto",  # imports torch in the middle of its own import
        "import peft",  # imports transformers in an order of its own
        # From another thread; and twice more.
        f"""
import threading
thread = threading.Thread(target=__import__, args=("torch",))
thread.start()
thread.join()
{REGISTERED}
import importlib, lowbit_format
importlib.reload(lowbit_format)
lowbit_format.integrations.registration.register()
""",
    ],
    ids=["transformers", "peft", "thread"],
)
def test_registers_without_a_word_of_ours_in_every_order(installed: Path, first: str) -> None:
    assert "RuntimeWarning" not in run(first + REGISTERED, installed).stderr


@pytest.mark.slow
def test_the_switch_turns_it_off(installed: Path) -> None:
    code = "import sys, transformers.quantizers.auto as auto; assert 'lowbit' not in auto.AUTO_QUANTIZER_MAPPING\n"
    code += "assert 'lowbit_format' not in sys.modules; import lowbit_format"
    run(code + REGISTERED, installed, TORCH_DEVICE_BACKEND_AUTOLOAD="0")


@pytest.mark.parametrize("file", ["integrations/registration.py", "integrations/__init__.py", "errors.py"])
def test_a_damaged_installation_does_not_break_torch(installed: Path, file: str, tmp_path: Path) -> None:
    site = Path(shutil.copytree(installed, tmp_path / "site"))
    (site / "lowbit_format" / file).write_text("raise ImportError('damaged')")
    done = run("import torch; print(torch.ones(2).sum().item())", site, end="")
    assert done.stdout == "2.0\n"
    if file != "errors.py":  # which registration does not need
        assert done.stderr.count("RuntimeWarning: lowbit_format") == 1
        assert "damaged" in done.stderr
        assert "--force-reinstall" in done.stderr


@pytest.mark.slow
def test_a_transformers_that_does_not_fit_is_told_and_lowbit_models_are_refused(
    installed: Path, model: Path, tmp_path: Path
) -> None:
    """Other models load as ever; a lowbit model raises, where transformers alone would make random weights of it."""
    site = Path(shutil.copytree(installed, tmp_path / "site"))
    (site / "lowbit_format" / "integrations" / "quantizer.py").write_text("raise ImportError('no such quantizer base')")
    plain = build("bert", tmp_path / "bert")
    code = f"""
from transformers import AutoModel
AutoModel.from_pretrained({str(plain)!r})
try:
    AutoModel.from_pretrained({str(model)!r})
except Exception as error:
    print(type(error).__name__, error)
"""
    done = run(code, site)
    assert "could not register with transformers" in done.stderr
    assert "no such quantizer base" in done.stderr
    assert done.stdout.startswith("LoadError lowbit_format could not register with transformers")
    assert "pip install -U" in done.stdout


# --- programs that do not know of us ---------------------------------------------------------------


@pytest.fixture(scope="session")
def float_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with a tokenizer of 96 words."""
    return with_tokenizer(build("llama", tmp_path_factory.mktemp("float") / "llama"))


@pytest.fixture(scope="session")
def model(float_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, converted."""
    out = tmp_path_factory.mktemp("lowbit") / "llama"
    return convert_hf_to_lowbit(str(float_model), out, RECIPE).directory


def _last_line(done: subprocess.CompletedProcess[str]) -> object:
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_auto_model(installed: Path, model: Path) -> None:
    code = f"""
from transformers import AutoModelForCausalLM
import torch
model = AutoModelForCausalLM.from_pretrained({str(model)!r})
{REGISTERED}
print(model(torch.arange(5, 15)[None]).logits[0, -1].tolist())
"""
    expected = lowbit_format.from_pretrained(model)(torch.arange(5, 15)[None]).logits[0, -1]
    assert _last_line(run(code, installed)) == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_pipeline(installed: Path, model: Path) -> None:
    code = f"""
import json
from transformers import pipeline
generate = pipeline("text-generation", {str(model)!r})
print(json.dumps(generate("w1 w2 w3", max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]))
"""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    prompt = tokenizer("w1 w2 w3", return_tensors="pt")
    tokens = lowbit_format.from_pretrained(model).generate(**prompt, max_new_tokens=8, do_sample=False)
    expected = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert _last_line(run(code, installed)) == expected


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (extra: clients)")
def test_lm_eval(installed: Path, model: Path) -> None:
    code = f"""
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
lm = HFLM(pretrained={str(model)!r}, device="cpu", dtype="float32", batch_size=1)
request = Instance("loglikelihood", {{}}, ("w1 w2 w3", " w4 w5"), 0)
print([lm.loglikelihood([request])[0][0]])
"""
    from transformers import AutoTokenizer

    tokens = torch.tensor(AutoTokenizer.from_pretrained(model)("w1 w2 w3 w4 w5")["input_ids"])
    logits = lowbit_format.from_pretrained(model)(tokens[None]).logits[0].log_softmax(-1)
    expected = sum(logits[-3 + i, tokens[-2 + i]].item() for i in range(2))
    assert _last_line(run(code, installed)) == pytest.approx([expected], rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None,
    reason="sentence-transformers is not installed (extra: clients)",
)
def test_sentence_transformers(installed: Path, tmp_path: Path) -> None:
    source = with_tokenizer(build("bert", tmp_path / "bert"))
    model = convert_hf_to_lowbit(str(source), tmp_path / "lowbit", RECIPE).directory
    code = f"""
from sentence_transformers import SentenceTransformer
print(SentenceTransformer({str(model)!r}, device="cpu").encode("w1 w2 w3").tolist())
"""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(model)("w1 w2 w3", return_tensors="pt")
    expected = lowbit_format.from_pretrained(model)(**tokens).last_hidden_state[0].mean(0)  # its default is the mean
    assert _last_line(run(code, installed)) == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)
