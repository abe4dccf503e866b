"""The page: well-formed, self-contained, the same bytes each time, and safe whatever a model's files say."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.directories import random_matrices, tensors_of, write_directory
from support.reports import Page, parse

from lowbit_format.container.writer import StoredTensor
from lowbit_format.converters import Recipe, Rule, convert_hf_to_lowbit
from lowbit_format.integrations.conversion_record import REPORT_FILE
from lowbit_format.quantize import Target
from lowbit_format.report import figures
from lowbit_format.report.write import write_report
from lowbit_format.schema import ModuleEntry, QuantizationConfig, Scheme

pytest.importorskip("plotly")

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = '"><img src=x onerror=document.title=1><script>document.documentElement.dataset.evil=1'
CLOSING = f"</script></style></title>{EVIL}</script>"

Checkpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def report(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a tiny llama with all that a report can show."""
    place = tmp_path_factory.mktemp("report")
    recipe = Recipe(Target(bits=3, group_size=32, nested=(2,)), (Rule("*.q_proj", Target(bits=7, group_size=32)),))
    model = convert_hf_to_lowbit(str(checkpoint("llama")), place / "model", recipe).directory
    told = json.loads((model / REPORT_FILE).read_text())
    told["blocks"] = [["model.layers.0", 0.2, 0.1], ["model.layers.1", 0.3, 0.2]]
    told["budget"] = {"target": 3.1, "reached": 3.05, "lower_bound": 0.5, "curve": [[2, 90.0], [3, 0.6], [4, 0.2]]}
    told["evaluation"] = [{"bits": None, "text": "a short text", "tokens": 1000, "perplexity": 20.0, "divergence": 0.1}]
    (model / REPORT_FILE).write_text(json.dumps(told))
    write_report(model, place / "report.html", against=checkpoint("llama"), modules=["model.layers.0.mlp.up_proj"])
    return place / "report.html"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model whose every name is an attack."""
    place = tmp_path_factory.mktemp("hostile")
    paths = [f"layers.{i}.{name}" for i in range(2) for name in (EVIL.replace(".", "·"), "<b>bold", "&lt;i>")]
    modules = [ModuleEntry(path, Scheme("bcq", 2, 4, "F16", True), "linear", (2, 6)) for path in paths]
    config = QuantizationConfig({m.path: m for m in modules})
    groups = [*tensors_of(modules, random_matrices(modules)), [StoredTensor(CLOSING, "F32", (2,), np.ones(2, "<f4"))]]
    model = place / EVIL.replace("/", "")
    write_directory(model, config, groups)
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": [CLOSING]}))
    told = {
        "version": 1,
        "modules": {m.path: {"nbytes": 0, "relative_error": 1.0} for m in modules},
        "blocks": [[CLOSING, 1, 1]],
        "kept": {CLOSING: {"reason": CLOSING}},
        "evaluation": [{"text": CLOSING, "perplexity": 1.0}],
    }
    (model / REPORT_FILE).write_text(json.dumps(told))
    write_report(model, place / "report.html")
    return place / "report.html"


def browse(page: Path) -> tuple[Page, str]:
    """What a browser makes of a page, and what it printed."""
    assert BROWSER
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=60000", "--enable-logging=stderr"]
    data = f"--user-data-dir={page.parent / 'browser'}"
    done = subprocess.run(
        [BROWSER, *flags, data, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=300
    )
    return parse(done.stdout), done.stderr


def console(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if "CONSOLE" in line]


def test_it_is_well_formed_and_has_every_part(report: Path) -> None:
    page = parse(report.read_text("utf-8"))
    assert page.faults == []
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    headings = re.findall(r"<h2>(.*?)</h2>", report.read_text("utf-8"))
    assert headings == [
        "Quality", "Where the bytes are", "Bits by layer and kind", "Errors by layer and kind", "Blocks", "The budget",
        "Modules", "Weights and levels", "Files",
    ]  # fmt: skip
    places = {attributes["data-plot"] for _, attributes in page.tags if "data-plot" in attributes}
    assert places == page.plots.keys()
    assert {"bytes", "bits", "errors", "blocks", "budget", "distribution-0"} <= places


def test_it_loads_nothing_from_elsewhere(report: Path) -> None:
    page = parse(report.read_text("utf-8"))
    loading = {"src", "href", "srcset", "data", "action", "poster"}
    assert [(tag, attributes) for tag, attributes in page.tags if loading & attributes.keys()] == []
    assert "url(" not in page.texts["style"]
    assert "@import" not in page.texts["style"]
    assert page.texts["script"].count("://") == 0


def test_its_policy_allows_its_own_two_scripts_alone(report: Path) -> None:
    page = parse(report.read_text("utf-8"))
    library = gzip.decompress(base64.b64decode(page.texts["library"]))
    assert b"plotly.js" in library[:100]
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    hashes = [hashlib.sha256(text).digest() for text in (page.texts["script"].encode(), library)]
    sources = " ".join(f"'sha256-{base64.b64encode(h).decode()}'" for h in hashes)
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {sources}"


def test_every_colour_of_a_plot_is_in_both_themes(report: Path) -> None:
    page = parse(report.read_text("utf-8"))
    used = set(re.findall(r"var\((--[\w-]+)\)", page.texts["plots"] + page.texts["script"]))
    light, dark = (set(re.findall(r"(--[\w-]+):", theme)) for theme in page.texts["style"].split("@media", 2)[:2])
    assert len(used) > 8
    assert used <= light
    assert light == dark


def _luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1])
def test_text_and_lines_stand_out(report: Path, theme: int) -> None:
    """WCAG 2.1: a contrast of 4.5 for text, of 3 for what is drawn."""
    style = parse(report.read_text("utf-8")).texts["style"].split("@media", 2)[theme]
    colors = dict(re.findall(r"--([\w-]+): (#\w{6})", style))

    def contrast(a: str, b: str) -> float:
        low, high = sorted(_luminance(colors[name]) for name in (a, b))
        return (high + 0.05) / (low + 0.05)

    for ground in ("page", "panel"):
        assert contrast("text", ground) > 7
        assert contrast("muted", ground) > 4.5
        assert min(contrast("first", ground), contrast("second", ground)) > 3


def test_the_same_model_gives_the_same_bytes(report: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    again = tmp_path / "again.html"
    write_report(report.parent / "model", again, against=checkpoint("llama"), modules=["model.layers.0.mlp.up_proj"])
    assert again.read_bytes() == report.read_bytes()


def test_the_table_has_every_module(report: Path) -> None:
    text = report.read_text("utf-8")
    rows = text[text.index('id="table"') :].split("<tr>")[2:]
    assert len(rows) >= 14
    assert "model.<wbr>layers.0.<wbr>mlp.<wbr>up_<wbr>proj" in text


def test_names_of_a_model_are_text(hostile: Path) -> None:
    page = parse(hostile.read_text("utf-8"))
    assert page.faults == []
    assert sum(tag == "script" for tag, _ in page.tags) == 3
    assert not any(tag in ("img", "b") and "onerror" in attributes for tag, attributes in page.tags)
    assert "onerror" in page.texts[""]  # shown as text
    assert not re.search(r"[<>&]", page.texts["plots"])
    for plot in page.plots.values():
        for text in _strings(plot["data"]):
            assert set(re.findall(r"<(/?\w*)", text)) <= {"br", "b", "/b", "extra", "/extra"}, text


def _strings(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in items for text in _strings(item)]


def test_labels_are_short_and_written_out() -> None:
    assert figures.shown("<b>&") == "&lt;b&gt;&amp;"
    assert figures.shown("x" * 99, 10) == "xxxxx…xxxx"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(999, "999 bytes"), (1000, "1.00 KB"), (16_600_000, "16.6 MB"), (181e6, "181 MB"), (2e9, "2.00 GB")],
)
def test_sizes_have_three_digits(nbytes: float, text: str) -> None:
    assert figures.size_text(nbytes) == text


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_draws_all_of_it_without_an_error(report: Path) -> None:
    page, printed = browse(report)
    assert console(printed) == []
    (drawn,) = [attributes["data-drawn"] for tag, attributes in page.tags if tag == "html"]
    assert drawn == str(len(page.plots))
    assert sum("js-plotly-plot" in (a.get("class") or "") for _, a in page.tags) == len(page.plots)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_runs_nothing_of_a_model(hostile: Path) -> None:
    page, printed = browse(hostile)
    assert console(printed) == []
    (attributes,) = [attributes for tag, attributes in page.tags if tag == "html"]
    assert attributes["data-drawn"] == str(len(page.plots))
    assert "data-evil" not in attributes
    assert not any("onerror" in attributes for _, attributes in page.tags)
