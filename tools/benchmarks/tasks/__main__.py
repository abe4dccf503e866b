"""Tune scales for a task, beside full fine-tuning, LoRA and a linear probe, on the same examples, steps and batches.

    python -m tools.benchmarks.tasks --sst2 DIR --lm DIR --text FILE --e2e DIR --writer DIR [--cache DIR] [--out DIR]

Three tasks: sentiment (SST-2, a sentence-embedding model with a linear head on the mean of its outputs), a small causal
language model adapted to another kind of text, and a real one that learns to tell tables in words (E2E). It wants:

    --sst2   a directory with train.tsv and dev.tsv: a column ``label`` and one of sentences
    --model  a BERT-like model directory; by default all-MiniLM-L6-v2 as ``lowbit demo`` finds it
    --lm     a causal language model's directory, and
    --text   a text to adapt it to: the first 80% to train on, the rest to test on
    --writer a causal language model's directory, and
    --e2e    a directory with train.csv and eval.csv: columns ``mr`` and ``ref`` (BLEU: `pip install sacrebleu`)

A task whose data is not given is left out. Every method trains at several learning rates, and examples held out of the
training data judge them; with the best rate it trains once more for each further seed. Every run is a cell, kept as
JSON under ``--cache``: an interrupted benchmark goes on where it stopped. ``--calibrate TEXT`` adds the methods whose
base is calibrated, on that text. ``--timing`` measures time per step and peak
memory instead, each method alone in a process of its own. The table and the plot are written to ``--out`` from the
cells there are.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import lowbit_format as lb
from lowbit_format.converters import Recipe, convert_hf_to_lowbit
from lowbit_format.quantize import Target

from ..common import environment, module_command
from .data import IGNORED, Batch, Data, Prompts, Sizes, e2e_data, sst2_data, text_data
from .report import write_report

WARM_UP = 0.06  # part of the steps
HEAD_RATES = (3e-3, 1e-2)
TIMED_STEPS = 20


@dataclass(frozen=True)
class Method:
    """A method to adapt a model.

    Attributes:
        name: in cells and on the command line.
        title: in the table.
        tune: ``"full"``, ``"lora"``, ``"probe"``, or a method of ``prepare_scale_tuning``.
        rates: learning rates to try, by task; a best one at an end asks for further ones.
        bits, codec, group_size: of the base; 0 bits is the float model.
        head_of: take the head's learning rate from this method's search.
        dropout: train with the model's own dropout, which helps methods that train many numbers, and hurts others.
        calibrated: the base is calibrated, on the text of ``--calibrate``.
    """

    name: str
    title: str
    tune: str
    rates: dict[str, tuple[float, ...]]
    bits: int = 0
    codec: str = "bcq"
    group_size: int = 0
    head_of: str = ""
    dropout: bool = False
    calibrated: bool = False

    @property
    def base(self) -> str:
        if not self.bits:
            return "float"
        return f"{self.codec}-{self.bits}-{self.group_size}{'-calibrated' if self.calibrated else ''}"


FULL_RATES = {"sst2": (5e-5, 1e-4, 2e-4), "lm": (1e-3, 2e-3, 4e-3), "e2e": (5e-5, 1e-4)}
LORA_RATES = {"sst2": (5e-4, 1e-3, 2e-3), "lm": (5e-3, 1e-2, 2e-2), "e2e": (1e-3, 2e-3)}
PROBE_RATES = {"sst2": (1e-3, 3e-3, 1e-2)}
SCALE_RATES = {"sst2": (1e-2, 2e-2, 4e-2), "lm": (1e-2, 2e-2, 4e-2), "e2e": (5e-3, 1e-2)}


def _scales(
    name: str, title: str, tune: str, bits: int, codec: str = "bcq", group_size: int = 0, *, calibrated: bool = False
) -> Method:
    head_of = "" if name == "alphatuning-4" else "alphatuning-4"
    return Method(name, title, tune, SCALE_RATES, bits, codec, group_size, head_of, calibrated=calibrated)


METHODS = {
    m.name: m
    for m in (
        Method("full", "full fine-tuning, float", "full", FULL_RATES, dropout=True),
        Method("lora", "LoRA r=8, float", "lora", LORA_RATES, dropout=True),
        Method("lora-4", "LoRA r=8, BCQ 4 bits", "lora", {"e2e": LORA_RATES["e2e"]}, 4),
        Method("probe", "linear probe, float", "probe", PROBE_RATES),
        Method("probe-4", "linear probe, BCQ 4 bits", "probe", PROBE_RATES, 4),
        _scales("alphatuning-4", "AlphaTuning, 4 bits", "alphatuning", 4),
        _scales("alphatuning-3", "AlphaTuning, 3 bits", "alphatuning", 3),
        _scales("alphatuning-2", "AlphaTuning, 2 bits", "alphatuning", 2),
        _scales("peqa-4", "PEQA, 4 bits", "peqa", 4, "uniform"),
        _scales("scales-4", "all scales, 4 bits", "scales", 4),
        _scales("alphatuning-4-g128", "AlphaTuning, 4 bits, groups of 128", "alphatuning", 4, group_size=128),
        _scales("peqa-3", "PEQA, 3 bits", "peqa", 3, "uniform"),
        _scales("alphatuning-4-calibrated", "AlphaTuning, 4 bits, calibrated", "alphatuning", 4, calibrated=True),
        _scales("alphatuning-3-calibrated", "AlphaTuning, 3 bits, calibrated", "alphatuning", 3, calibrated=True),
        _scales("alphatuning-2-calibrated", "AlphaTuning, 2 bits, calibrated", "alphatuning", 2, calibrated=True),
    )
}


# --- models ----------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """A linear head on the mean of an encoder's outputs; without an encoder, on features that were computed before."""

    def __init__(self, encoder: nn.Module | None, width: int) -> None:
        super().__init__()
        self.body, self.head = encoder, nn.Linear(width, 2)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits ``[n, 2]`` and labels ``[n]``."""
        return self.head(batch["features"] if self.body is None else self.features(batch)), batch["labels"]

    def features(self, batch: Batch) -> Tensor:
        """``[n, width]``: the mean over a sentence's tokens."""
        assert self.body is not None
        mask = batch["attention_mask"]
        hidden = self.body(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class Language(nn.Module):
    """A causal language model that predicts the next token."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits ``[n, vocabulary]`` and the tokens that came ``[n]``."""
        ids = batch["input_ids"]
        return self.body(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()


class Completion(Language):
    """A causal language model that goes on from prompts, and its tokenizer."""

    def __init__(self, body: nn.Module, tokenizer: Any, prompts: Prompts) -> None:
        super().__init__(body)
        self.tokenizer, self.prompts = tokenizer, prompts

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits ``[n, vocabulary]`` and the tokens that came ``[n]``, of what follows the prompts."""
        ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"][:, 1:]
        logits = self.body(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        counts = labels != IGNORED
        return logits[counts], labels[counts]

    @torch.no_grad()
    def bleu(self) -> dict[str, float]:
        """BLEU of greedy answers (sacrebleu, all references of a prompt), and how many prompts there were."""
        import sacrebleu  # type: ignore[import-not-found, import-untyped, unused-ignore]

        self.tokenizer.padding_side = "left"
        self.eval()
        answers: list[str] = []
        for i in range(0, len(self.prompts.prompts), 20):
            batch = self.tokenizer(
                self.prompts.prompts[i : i + 20], add_special_tokens=False, padding=True, return_tensors="pt"
            )
            body: Any = self.body
            ids = body.generate(**batch, max_new_tokens=64, do_sample=False, pad_token_id=self.tokenizer.eos_token_id)
            new = ids[:, batch["input_ids"].shape[1] :]
            answers += [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]
        most = max(len(references) for references in self.prompts.references)
        streams = [
            [references[i] if i < len(references) else None for references in self.prompts.references]
            for i in range(most)
        ]
        return {"bleu": sacrebleu.corpus_bleu(answers, streams).score, "prompts": len(answers)}


@dataclass(frozen=True)
class Task:
    """What to learn, on which model."""

    name: str
    source: Path
    auto: Any
    make: Callable[[nn.Module], nn.Module]
    data: Callable[[], Data]
    lora_targets: str
    never_tuned: tuple[str, ...]
    calibration: Path | None = None


def sst2_task(model: Path, directory: Path, sizes: Sizes) -> Task:
    """Sentiment. The encoder's pooler is not used, so it is not counted either."""

    def make(encoder: nn.Module) -> nn.Module:
        return Classifier(encoder, encoder.config.hidden_size)

    return Task(
        "sst2", model, AutoModel, make, lambda: sst2_data(directory, AutoTokenizer.from_pretrained(model), sizes),
        r".*encoder\.layer\..*\.(query|key|value|dense)", ("pooler*",),
    )  # fmt: skip


def e2e_task(model: Path, directory: Path, sizes: Sizes) -> Task:
    """Tables to be told in words."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data, prompts = e2e_data(directory, tokenizer, sizes)
    return Task(
        "e2e", model, AutoModelForCausalLM, lambda body: Completion(body, tokenizer, prompts), lambda: data,
        r".*layers\..*_proj", (),
    )  # fmt: skip


def lm_task(model: Path, text: Path, sizes: Sizes) -> Task:
    """Language modelling."""
    return Task(
        "lm", model, AutoModelForCausalLM, Language,
        lambda: text_data(text, AutoTokenizer.from_pretrained(model), sizes),
        r".*layers\..*_proj", (),
    )  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """A model ready to train."""

    model: nn.Module
    body: list[nn.Parameter]
    head: list[nn.Parameter]


def set_up(task: Task, method: Method, base: Path, seed: int) -> Setup:
    """Load `base` and make trainable what the method trains; the seed is that of fresh parameters and of dropout."""
    torch.manual_seed(seed)
    if method.bits:
        inner = lb.from_pretrained(base, model_class=task.auto, dtype=torch.float32)
    else:
        inner = task.auto.from_pretrained(base, dtype=torch.float32)
    model = task.make(inner)
    for module in inner.modules():
        if isinstance(module, nn.Dropout) and not method.dropout:
            module.p = 0.0
    for name, p in inner.named_parameters():
        p.requires_grad_(method.tune == "full" and not _matches(name, task.never_tuned))
    if method.tune == "lora":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=task.lora_targets)
        model.body = get_peft_model(inner, config)
    elif method.tune not in ("full", "probe"):
        lb.prepare_scale_tuning(inner, method=method.tune, exclude=list(task.never_tuned) or None)
    head = list(model.head.parameters()) if isinstance(model, Classifier) else []
    return Setup(model, [p for p in model.body.parameters() if p.requires_grad], head)


def bundle_bytes(setup: Setup, method: Method) -> int:
    """What a person would share for the task, without the head: the bytes of all files, README aside."""
    if method.tune == "probe":
        return 0
    body: Any = setup.model.body
    with tempfile.TemporaryDirectory() as scratch:
        if method.tune in ("full", "lora"):
            body.save_pretrained(scratch)
        else:
            lb.save_task(body, scratch)
        return sum(f.stat().st_size for f in Path(scratch).rglob("*") if f.is_file() and f.name != "README.md")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def find_base(task: Task, method: Method, cache: Path) -> Path:
    """The directory of the method's base, converted when it is first wanted."""
    if not method.bits:
        return task.source
    out = cache / "bases" / task.name / method.base
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        target = Target(codec=method.codec, bits=method.bits, group_size=method.group_size)
        how = lb.Calibration(str(task.calibration)) if method.calibrated else None
        recipe = Recipe(target, embeddings=False, lm_head=False)
        convert_hf_to_lowbit(str(task.source), out, recipe, calibration=how)
    return out


# --- training --------------------------------------------------------------------------------------


def train(setup: Setup, batches: list[Batch], rate: float, head_rate: float) -> list[float]:
    """AdamW without weight decay, a short warm-up, then linear decay to zero. Returns the seconds of every step."""
    groups = [{"params": setup.body, "lr": rate}, {"params": setup.head, "lr": head_rate}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)
    steps, warm = len(batches), max(1, round(WARM_UP * len(batches)))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    setup.model.train()
    seconds = []
    for batch in batches:
        began = time.perf_counter()
        loss = nn.functional.cross_entropy(*setup.model(batch))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - began)
    return seconds


@torch.no_grad()
def measure(model: nn.Module, batches: list[Batch]) -> dict[str, float]:
    """Mean loss (infinite for NaN) and part of right answers."""
    model.eval()
    loss, right, count = 0.0, 0, 0
    for batch in batches:
        logits, wanted = model(batch)
        loss += nn.functional.cross_entropy(logits.float(), wanted, reduction="sum").item()
        right += int((logits.argmax(-1) == wanted).sum())
        count += len(wanted)
    return {"loss": loss / count if math.isfinite(loss) else math.inf, "accuracy": right / count}


def with_features(model: Classifier, data: Data) -> Data:
    """The same batches as features of the frozen encoder."""

    @torch.no_grad()
    def convert(batches: list[Batch]) -> list[Batch]:
        return [{"features": model.features(b), "labels": b["labels"]} for b in batches]

    model.eval()
    return Data(*(convert(part) for part in (data.train, data.held_out, data.test)))


# --- cells -----------------------------------------------------------------------------------------


@dataclass
class Bench:
    """A task's cells: runs what is not in the cache yet."""

    task: Task
    cache: Path
    sizes: Sizes
    _data: Data | None = None
    _features: tuple[str, Data] | None = None

    @property
    def data(self) -> Data:
        if self._data is None:
            self._data = self.task.data()
        return self._data

    def search(self, method: Method) -> tuple[float, float]:
        """The learning rates of body and head with the least loss on the held-out part."""
        head = HEAD_RATES[0]
        if method.head_of and self.task.name == "sst2":
            head = self.search(METHODS[method.head_of])[1]

        def loss(rate: float, head_rate: float) -> float:
            found: float = self._cell(method, 0, rate, head_rate)["held_out"]["loss"]
            return found

        rates = {r: loss(r, head) for r in method.rates[self.task.name]}
        for _ in range(3 if self.task.name != "e2e" else 1):  # while the best is at an end, go on beyond it
            best, ordered = min(rates, key=lambda r: rates[r]), sorted(rates)
            if best not in (ordered[0], ordered[-1]):
                break
            further = float(f"{best * (0.5 if best == ordered[0] else 2):.3g}")
            rates[further] = loss(further, head)
        best = min(rates, key=lambda r: rates[r])
        if method.head_of or method.tune == "probe" or self.task.name != "sst2":
            return best, head
        return best, min(HEAD_RATES, key=lambda h: loss(best, h))

    def final(self, method: Method, seed: int) -> dict[str, Any]:
        """Train with the rates found."""
        return self._cell(method, seed, *self.search(method))

    def before(self, method: Method) -> dict[str, Any]:
        """The base as it is, on the test data."""

        def run() -> dict[str, Any]:
            setup = set_up(self.task, replace(method, tune="probe"), find_base(self.task, method, self.cache), 0)
            return {"base": method.base, "test": measure(setup.model, self.data.test)}

        return self._cached(f"{method.base}-before", {"base": method.base}, run)

    def _cell(self, method: Method, seed: int, rate: float, head_rate: float) -> dict[str, Any]:
        facts = {key: getattr(method, key) for key in ("name", "tune", "base")}
        facts |= {"seed": seed, "rate": rate, "head_rate": head_rate}
        if method.dropout:
            facts["dropout"] = True
        name = f"{method.name}-{seed}-{rate:g}-{head_rate:g}"
        return self._cached(name, facts, lambda: self._run(method, seed, rate, head_rate))

    def _run(self, method: Method, seed: int, rate: float, head_rate: float) -> dict[str, Any]:
        base = find_base(self.task, method, self.cache)
        setup, data = set_up(self.task, method, base, seed), self.data
        if method.tune == "probe":
            assert isinstance(setup.model, Classifier)
            if self._features is None or self._features[0] != method.base:
                self._features = method.base, with_features(setup.model, data)
            data = self._features[1]
            torch.manual_seed(seed)
            model = Classifier(None, setup.model.head.in_features)
            setup = Setup(model, [], list(model.head.parameters()))
            rate, head_rate = head_rate, rate  # the one rate that is searched is the head's
        seconds = train(setup, data.train, rate, head_rate)
        trained = sum(p.numel() for p in setup.body)
        squares = sum(p.detach().square().sum().item() for p in setup.body)
        return {
            "steps": len(seconds),
            "seconds_per_step": statistics.median(seconds),
            "trained": trained,
            "head": sum(p.numel() for p in setup.head),
            "rms": math.sqrt(squares / max(1, trained)),
            "bundle_bytes": bundle_bytes(setup, method),
            "held_out": measure(setup.model, data.held_out),
            "test": measure(setup.model, data.test)
            | (setup.model.bleu() if isinstance(setup.model, Completion) else {}),
        }

    def _cached(self, name: str, facts: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        settings = {"task": self.task.name, "model": self.task.source.name, **asdict(self.sizes), **facts}
        path = self.cache / "cells" / self.task.name / f"{name}.json"
        if path.exists():
            old: dict[str, Any] = json.loads(path.read_text())
            if old["settings"] == settings:
                return old
        began = time.perf_counter()
        cell = {"settings": settings, **run()}
        cell["seconds"] = time.perf_counter() - began
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_text(json.dumps(cell, indent=1))
        os.replace(path.with_suffix(".part"), path)
        shown = cell.get("test") or cell.get("held_out") or {}
        facts_shown = " ".join(f"{key} {value:.4f}" for key, value in shown.items())
        print(f"{self.task.name} {name}: {facts_shown}, {cell['seconds']:.0f} s", flush=True)
        return cell


# --- time and memory -------------------------------------------------------------------------------


def time_one(bench: Bench, method: Method) -> None:
    """Runs in a process of its own: a few steps of training; prints what they took as JSON.

    Memory is the peak of resident memory from before the model is loaded until the last step, above what Python,
    the libraries and the data take. The longest batch is among the steps.
    """
    import peft  # noqa: F401 - the libraries are not counted, so they are there before

    batches, base = bench.data.train, find_base(bench.task, method, bench.cache)
    chosen = [*batches[:TIMED_STEPS], max(batches, key=lambda b: b["input_ids"].numel())]
    before = _resident("VmRSS")
    setup = set_up(bench.task, method, base, 0)
    loaded = _resident("VmRSS")
    seconds = train(setup, chosen, 1e-4, 1e-3)
    print(
        json.dumps(
            {
                "seconds_per_step": statistics.median(seconds[3:TIMED_STEPS]),
                "peak_bytes": _resident("VmHWM") - before,
                "model_bytes": loaded - before,
            }
        )
    )


def _resident(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def time_all(bench: Bench, methods: list[Method]) -> None:
    """Time every method alone, three times in turn; the medians become cells."""
    chosen = [m for m in methods if m.tune != "probe"]
    found: dict[str, list[dict[str, float]]] = {m.name: [] for m in chosen}
    for m in chosen:
        find_base(bench.task, m, bench.cache)
    for _ in range(3):
        for m in chosen:
            command = module_command("tasks", *sys.argv[1:], "--one", f"{bench.task.name}/{m.name}")
            done = subprocess.run(command, env=environment(), check=True, capture_output=True, text=True)
            found[m.name].append(json.loads(done.stdout.splitlines()[-1]))
    path = bench.cache / "cells" / bench.task.name / "timing.json"
    cells = json.loads(path.read_text()) if path.exists() else {}
    for name, runs in found.items():
        cells[name] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        print(bench.task.name, name, json.dumps(cells[name]), flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(cells, indent=1))


# --- the command -----------------------------------------------------------------------------------

SIZES = {
    "sst2": Sizes(train=6000, epochs=2, held_out=600, test=872, batch=32),
    "lm": Sizes(train=2048, epochs=2, held_out=64, test=512, batch=16),
    "e2e": Sizes(train=1000, epochs=1, held_out=100, test=300, batch=8),
}
QUICK = {
    "sst2": Sizes(train=128, epochs=1, held_out=32, test=64, batch=32),
    "lm": Sizes(train=32, epochs=1, held_out=16, test=16, batch=16),
    "e2e": Sizes(train=16, epochs=1, held_out=8, test=8, batch=8),
}


def tasks(args: argparse.Namespace) -> Iterator[Bench]:
    """The tasks whose data is given."""
    cache = args.cache / "quick" if args.quick else args.cache
    sizes = QUICK if args.quick else SIZES
    if args.sst2:
        from lowbit_format.cli.demo import find_model

        task = sst2_task(args.model or find_model(), args.sst2, sizes["sst2"])
        yield Bench(replace(task, calibration=args.calibrate), cache, sizes["sst2"])
    if args.e2e and args.writer:
        task = e2e_task(args.writer, args.e2e, sizes["e2e"])
        yield Bench(replace(task, calibration=args.calibrate), cache, sizes["e2e"])
    if args.lm and args.text:
        task = lm_task(args.lm, args.text, sizes["lm"])
        yield Bench(replace(task, calibration=args.calibrate), cache, sizes["lm"])


def run_cells(bench: Bench, methods: list[Method], seeds: int) -> None:
    """The rates of every method, by its first seed, then the further seeds.

    A seed makes fresh parameters and dropout: the language model has none but LoRA's, and one seed is enough.
    """
    for method in methods:
        if bench.task.name != "sst2":
            bench.before(method)
    for seed in range(seeds if bench.task.name == "sst2" else 1):
        for method in methods:
            bench.final(method, seed)


def main() -> None:
    """Run the cells that are wanted, or time the methods; then write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sst2", type=Path, help="directory with train.tsv and dev.tsv")
    parser.add_argument("--model", type=Path, help="the encoder; by default all-MiniLM-L6-v2")
    parser.add_argument("--lm", type=Path, help="a causal language model")
    parser.add_argument("--text", type=Path, help="the text to adapt it to")
    parser.add_argument("--writer", type=Path, help="a causal language model that tells tables in words")
    parser.add_argument("--e2e", type=Path, help="directory with train.csv and eval.csv")
    parser.add_argument("--calibrate", type=Path, help="a text to calibrate bases with")
    parser.add_argument("--cache", type=Path, default=Path("bench_tasks_cache"), help="cells and converted bases")
    parser.add_argument("--out", type=Path, help="directory for the table and the plot")
    parser.add_argument("--only", default="*", help="cells to run, such as 'sst2/*' or 'lm/full,lm/peqa-*'")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; by default its own choice")
    parser.add_argument("--quick", action="store_true", help="a few examples only, to see that everything runs")
    parser.add_argument("--timing", action="store_true", help="measure time and memory instead, at a quiet moment")
    parser.add_argument("--report", action="store_true", help="run nothing, write the report from the cells there are")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if args.threads:
        torch.set_num_threads(args.threads)
    benches = list(tasks(args))
    if not benches:
        parser.error("no data: give --sst2, or --lm and --text, or --writer and --e2e")
    for bench in benches:
        wanted = [args.one] if args.one else args.only.split(",")
        methods = [
            m for m in METHODS.values() if bench.task.name in m.rates and (args.calibrate or not m.calibrated)
            and any(fnmatch.fnmatchcase(f"{bench.task.name}/{m.name}", pattern) for pattern in wanted)
        ]  # fmt: skip
        if args.one:
            for method in methods:
                time_one(bench, method)
        elif args.timing:
            time_all(bench, methods)
        elif not args.report:
            run_cells(bench, methods, args.seeds)
    if args.out and not args.one:
        write_report(args.out, [(b.task.name, b.cache / "cells" / b.task.name) for b in benches], METHODS)


if __name__ == "__main__":
    main()
