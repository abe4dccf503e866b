"""The report of the benchmark of task tuning: tables in Markdown and a plot in SVG, from the cells of a cache."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TITLES = {"sst2": "Sentiment (SST-2)", "lm": "A small language model", "e2e": "Tables in words (E2E)"}
SCORES = {"sst2": ("accuracy", "dev accuracy, %"), "lm": ("perplexity", "perplexity"), "e2e": ("bleu", "BLEU")}


@dataclass(frozen=True)
class Row:
    """One method's runs of one task.

    Attributes:
        method: name, title, base, bits and what it tunes.
        cells: final runs, one for each seed.
        before: the base on the test data, where that was measured.
        timing: what ``--timing`` found; empty if it was not run.
    """

    method: Any
    cells: list[dict[str, Any]]
    before: dict[str, Any] | None
    timing: dict[str, float]

    def values(self, key: str) -> list[float]:
        """A measure on the test data, seed by seed: ``"accuracy"`` in percent, ``"perplexity"``, or as it is."""
        if key == "perplexity":
            return [math.exp(min(50.0, c["test"]["loss"])) for c in self.cells]
        return [(100 if key == "accuracy" else 1) * c["test"][key] for c in self.cells]

    @property
    def numbers(self) -> int:
        """Trained numbers, the head aside."""
        return int(self.cells[0]["trained"])


def write_report(out: Path, tasks: list[tuple[str, Path]], methods: Mapping[str, Any]) -> None:
    """Write ``results.md``, ``results.svg`` and ``cells.json`` (what they are made of) to the directory `out`."""
    rows = {task: _rows(directory, methods) for task, directory in tasks}
    rows = {task: found for task, found in rows.items() if found}
    out.mkdir(parents=True, exist_ok=True)
    parts = ["# Tuning scales for a task\n\nWritten by `tools/benchmarks/tasks`, which says what is run.\n"]
    parts += [TABLES[task](found) for task, found in rows.items()]
    if rows:
        parts.append("![score and trained numbers](results.svg)\n")
        (out / "results.svg").write_text(_svg(rows), "utf-8")
    (out / "results.md").write_text("\n".join(parts), "utf-8")
    facts = {
        task: {r.method.name: {"runs": r.cells, "timing": r.timing} for r in found} for task, found in rows.items()
    }
    (out / "cells.json").write_text(json.dumps(facts, indent=1), "utf-8")


def _rows(directory: Path, methods: Mapping[str, Any]) -> list[Row]:
    timing = json.loads(path.read_text()) if (path := directory / "timing.json").exists() else {}
    found = [json.loads(path.read_text()) for path in directory.glob("*.json")]
    every = [cell for cell in found if "held_out" in cell]
    rows = []
    for method in methods.values():
        cells = _chosen([cell for cell in every if cell["settings"]["name"] == method.name])
        before = directory / f"{method.base}-before.json"
        if cells:
            cells.sort(key=lambda c: c["settings"]["seed"])
            known = json.loads(before.read_text()) if before.exists() else None
            rows.append(Row(method, cells, known, timing.get(method.name, {})))
    return rows


def _chosen(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A method's runs with the rates whose first seed is best on the examples held out of train."""

    def rates(cell: dict[str, Any]) -> tuple[float, float]:
        return cell["settings"]["rate"], cell["settings"]["head_rate"]

    firsts = [cell for cell in cells if cell["settings"]["seed"] == 0]
    if not firsts:
        return []
    best = rates(min(firsts, key=lambda cell: cell["held_out"]["loss"]))
    return [cell for cell in cells if rates(cell) == best]


# --- tables ----------------------------------------------------------------------------------------


def _sst2_table(rows: list[Row]) -> str:
    full = next((statistics.mean(r.values("accuracy")) for r in rows if r.method.name == "full"), math.nan)
    sizes = rows[0].cells[0]["settings"]
    lines = [
        f"## {TITLES['sst2']}\n",
        f"{sizes['train']:,} examples, {sizes['epochs']} epochs, batches of {sizes['batch']}, AdamW, linear decay; the "
        "same examples in the same order for all; the model's dropout with full fine-tuning and LoRA only. Accuracy on "
        "dev, in percent: mean, 95% interval of the mean, and every seed. Seeds differ in fresh parameters and "
        f"dropout. Trained numbers and bundle without the head, which has {rows[0].cells[0]['head']} numbers. "
        f"Learning rates of body and head were searched on {sizes['held_out']} sentences held out of train.\n",
        "| method | accuracy | 95% | to full | seeds | trained | fewer | bundle, bytes | ms/step | peak MB | rates |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    most = max(r.numbers for r in rows)
    for r in rows:
        found = r.values("accuracy")
        mean = statistics.mean(found)
        lines.append(
            f"| {r.method.title} | {mean:.1f} | {_interval(found)} | {mean - full:+.1f} "
            f"| {' '.join(f'{v:.1f}' for v in found)} | {r.numbers:,} | {_times(most, r.numbers)} | {_bytes(r)} "
            f"| {_timing(r)} | {_rates(r)} |"
        )
    return "\n".join(lines) + "\n"


def _lm_table(rows: list[Row]) -> str:
    sizes = rows[0].cells[0]["settings"]
    lines = [
        f"## {TITLES['lm']}\n",
        "Perplexity per token on the last fifth of the text, before and after training on the first part: "
        f"{rows[0].cells[0]['steps']} steps of {sizes['batch']} blocks of 128 tokens, AdamW, linear decay; the same "
        f"blocks in the same order for all. Learning rates were searched on {sizes['held_out']} blocks held out of "
        "train.\n",
        "| method | before | after | seeds | trained | fewer | bundle, bytes | ms/step | peak MB | rates |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    most = max(r.numbers for r in rows)
    for r in rows:
        found = r.values("perplexity")
        before = f"{math.exp(min(50.0, r.before['test']['loss'])):.1f}" if r.before else ""
        lines.append(
            f"| {r.method.title} | {before} | {statistics.mean(found):.2f} | {' '.join(f'{v:.2f}' for v in found)} "
            f"| {r.numbers:,} | {_times(most, r.numbers)} | {_bytes(r)} | {_timing(r)} | {_rates(r)} |"
        )
    return "\n".join(lines) + "\n"


def _e2e_table(rows: list[Row]) -> str:
    sizes, prompts = rows[0].cells[0]["settings"], rows[0].cells[0]["test"]["prompts"]
    lines = [
        f"## {TITLES['e2e']}\n",
        f"{sizes['train']:,} examples, {sizes['epochs']} epoch, batches of {sizes['batch']}, AdamW, linear decay; the "
        "same examples in the same order for all. Loss in nats a token of what follows the prompt, on "
        f"{sizes['test']} examples of eval, before and after; BLEU of greedy answers to {prompts} prompts of eval, "
        "against all of their references. Learning rates were searched on "
        f"{sizes['held_out']} examples held out of train.\n",
        "| method | loss before | after | BLEU | trained | fewer | bundle, bytes | rate |",
        "|---|---|---|---|---|---|---|---|",
    ]
    most = max(r.numbers for r in rows)
    for r in rows:
        before = f"{r.before['test']['loss']:.3f}" if r.before else ""
        loss, bleu = (statistics.mean(r.values(key)) for key in ("loss", "bleu"))
        lines.append(
            f"| {r.method.title} | {before} | {loss:.3f} | {bleu:.1f} | {r.numbers:,} | {_times(most, r.numbers)} "
            f"| {_bytes(r)} | {_rates(r)} |"
        )
    return "\n".join(lines) + "\n"


def _interval(values: list[float]) -> str:
    """Half of the 95% interval of the mean over seeds, by Student's t."""
    if len(values) < 2:
        return ""
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(values), 2.0)
    return f"±{t * statistics.stdev(values) / math.sqrt(len(values)):.1f}"


TABLES = {"sst2": _sst2_table, "lm": _lm_table, "e2e": _e2e_table}


def _times(most: int, numbers: int) -> str:
    return f"{most / numbers:,.0f}x" if numbers else ""


def _bytes(row: Row) -> str:
    return f"{row.cells[0].get('bundle_bytes', 0):,}"


def _timing(row: Row) -> str:
    if not row.timing:
        return " | "
    return f"{1000 * row.timing['seconds_per_step']:.0f} | {row.timing['peak_bytes'] / 1e6:.0f}"


def _rates(row: Row) -> str:
    s = row.cells[0]["settings"]
    shown = [f"{s['rate']:g}"] + (
        [f"{s['head_rate']:g}"] if row.cells[0]["head"] and row.method.tune != "probe" else []
    )
    return ", ".join(shown)


# --- the plot --------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 560, 360, 56, 34, 44, 16
COLOURS = {"full": "#444444", "lora": "#8a5cc2", "alphatuning": "#c8401e", "scales": "#d99411", "peqa": "#1d7a8c"}


def _svg(rows: Mapping[str, list[Row]]) -> str:
    """One panel for each task: score over trained numbers (logarithmic), a dot for the mean, a bar for the seeds."""
    panels = [_panel(task, found, i * WIDTH) for i, (task, found) in enumerate(rows.items())]
    width = WIDTH * len(panels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT}" viewBox="0 0 {width} {HEIGHT}" '
        f'font-family="sans-serif" font-size="11">\n<rect width="{width}" height="{HEIGHT}" fill="white"/>\n'
        + "\n".join(panels)
        + "\n</svg>\n"
    )


def _panel(task: str, rows: list[Row], left: float) -> str:
    key, label = SCORES[task]
    points = [(r, r.values(key)) for r in rows if r.numbers]
    points.sort(key=lambda point: -statistics.mean(point[1]))  # from above, so that labels can give way downwards
    lines = [(r, statistics.mean(r.values(key))) for r in rows if not r.numbers]  # probes: nothing of the body trained
    every = [v for _, found in points for v in found] + [v for _, v in lines]
    low, high = min(every), max(every)
    low, high = low - 0.08 * (high - low) - 0.01, high + 0.08 * (high - low) + 0.01
    first = math.floor(math.log10(min(r.numbers for r, _ in points)))
    last = math.ceil(math.log10(max(r.numbers for r, _ in points)))

    def x(numbers: float) -> float:
        return left + LEFT + (math.log10(numbers) - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def text(px: float, py: float, words: str, anchor: str = "start", colour: str = "#222222") -> str:
        return f'<text x="{px:.1f}" y="{py:.1f}" text-anchor="{anchor}" fill="{colour}">{words}</text>'

    def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
        return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'

    end, floor = left + WIDTH - RIGHT, HEIGHT - BOTTOM
    out = [text(left + LEFT, 20, f"{TITLES[task]}: {label}, over trained numbers (head aside)")]
    for power in range(first, last + 1):
        out.append(line(x(10**power), TOP, x(10**power), floor, 'stroke="#e4e4e4"'))
        out.append(text(x(10**power), floor + 16, f"1e{power}", "middle"))
    for value in _ticks(low, high):
        out.append(line(left + LEFT, y(value), end, y(value), 'stroke="#e4e4e4"'))
        out.append(text(left + LEFT - 6, y(value) + 4, f"{value:g}", "end"))
    for r, mean in lines:
        out.append(line(left + LEFT, y(mean), end, y(mean), 'stroke="#888888" stroke-dasharray="4 3"'))
        out.append(text(end, y(mean) - 4, r.method.title, "end", "#666666"))
    taken: list[tuple[float, float]] = []
    for r, found in points:
        colour, px, mean = COLOURS[r.method.tune], x(r.numbers), statistics.mean(found)
        out.append(line(px, y(min(found)), px, y(max(found)), f'stroke="{colour}" stroke-width="1.5"'))
        out.append(f'<circle cx="{px:.1f}" cy="{y(mean):.1f}" r="4" fill="{colour}"/>')
        right = px > left + 0.6 * WIDTH
        place = y(mean) + 4
        while any(abs(place - other) < 12 and abs(px - at) < 150 for at, other in taken):
            place += 4
        taken.append((px, place))
        out.append(text(px - 8 if right else px + 8, place, r.method.title, "end" if right else "start", colour))
    return "\n".join(out)


def _ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    return [round(i * step, 6) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
