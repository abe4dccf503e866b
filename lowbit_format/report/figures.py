"""The plots of a report, as what plotly.js takes: ``{"data": [traces], "layout": {…}}``.

Colours are names of CSS variables, ``var(--…)``: the page puts in those of its light or dark theme. Text of a model
goes through :func:`shown`, since plotly reads some HTML in labels.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .conversion import Block, Budget
from .distribution import Distribution
from .entries import Entry, Kind, joint_error

Figure = dict[str, Any]

_LONGEST = 34  # characters of a label
_LINE = 18  # characters of a line in a tile
_ROW, _LABELS = 26, 96  # pixels: height of a row of a heat map, and of what is around
_TICKS = 7  # numbers of layers below a heat map
_GAPS = 60  # layers up to which cells of a heat map are drawn apart
_DECADES = 30.0  # ratio of the largest and the smallest value from which an axis is logarithmic
_FULL = 16  # bits a weight from which colours are the same: kept tensors have 16 or 32
_NOTICEABLE = 0.5  # bits a weight by which modules have to differ for a map of them
_SCALE = [[i / 4, f"var(--scale-{i})"] for i in range(5)]


def shown(text: str, most: int = 200) -> str:
    """`text` for a label: what plotly would take for a tag is written out; shortened in the middle."""
    if len(text) > most:
        text = f"{text[: most // 2]}…{text[-(most - most // 2 - 1) :]}"
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def size_text(nbytes: float) -> str:
    """A size for people, in three digits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if nbytes >= size:
            number = nbytes / size
            return f"{number:,.{2 if number < 10 else 1 if number < 100 else 0}f} {unit}"
    return f"{nbytes:.0f} bytes"


class _Tile(NamedTuple):
    """A tile of the tree map: its parent's id is empty for the root."""

    id: str
    label: str
    parent: str
    nbytes: int
    bits: float
    about: str


def bytes_by_kind(kinds: Sequence[Kind]) -> Figure:
    """A tree map of the file: its kinds, in these their modules; colours tell bits for each weight."""
    total = sum(kind.nbytes for kind in kinds)
    tiles = [_Tile("all", "whole model", "", total, 8 * total / sum(k.numel for k in kinds), size_text(total))]
    for i, kind in enumerate(kinds):
        about = f"{size_text(kind.nbytes)}, {kind.nbytes / total:.1%} of the file<br>{shown(kind.stored)}"
        tiles.append(_Tile(f"{i}", shown(kind.name, _LONGEST), "all", kind.nbytes, kind.bits_per_weight, about))
        for j, e in enumerate(kind.entries if len(kind.entries) > 1 else ()):
            label = f"layer {e.layer}" if e.layer is not None else shown(e.path, _LONGEST)
            about = f"{shown(e.path)}<br>{size_text(e.nbytes)}<br>{shown(e.stored)}"
            tiles.append(_Tile(f"{i}-{j}", label, f"{i}", e.nbytes, e.bits_per_weight, about))
    trace = {
        "type": "treemap", "ids": [t.id for t in tiles], "labels": [t.label for t in tiles],
        "parents": [t.parent for t in tiles], "values": [t.nbytes for t in tiles], "branchvalues": "total",
        "maxdepth": 2, "sort": True, "tiling": {"pad": 2}, "pathbar": {"visible": True, "side": "bottom"},
        "text": [t.about for t in tiles], "texttemplate": "%{customdata}",
        "customdata": [f"{_wrapped(t.label)}<br>{size_text(t.nbytes)}" for t in tiles],
        "hovertemplate": "<b>%{label}</b><br>%{text}<br>%{color:.2f} bits a weight<extra></extra>",
        "marker": {
            "colors": [t.bits for t in tiles], "colorscale": _SCALE, "cmin": 0, "cmax": _FULL,
            "colorbar": _color_bar("bits a weight") | {"tickvals": [0, 8, _FULL], "ticktext": ["0", "8", "16 +"]},
            "line": {"width": 1, "color": "var(--page)"},
        },
    }  # fmt: skip
    layout = {
        "height": 420,
        "margin": {"l": 4, "r": 4, "t": 48, "b": 26},
        "uniformtext": {"minsize": 10, "mode": "hide"},
    }
    return {"data": [trace], "layout": layout}


def _wrapped(label: str) -> str:
    """`label` in lines that narrow tiles have room for, broken behind dots."""
    lines = [""]
    for piece in re.findall(r"[^.]*[.]?", label):
        lines = [*lines, piece] if len(lines[-1]) + len(piece) > _LINE else [*lines[:-1], lines[-1] + piece]
    return "<br>".join(filter(None, lines))


def error_by_layer(modules: Sequence[Entry]) -> Figure | None:
    """A heat map of relative errors; None if there is none to show."""
    return _by_layer(modules, joint_error, "relative error", ".4f")


def bits_by_layer(modules: Sequence[Entry]) -> Figure | None:
    """A heat map of bits for each weight; None if all are about the same."""

    def bits(cell: Sequence[Entry]) -> float:
        return 8 * sum(e.nbytes for e in cell) / sum(e.numel for e in cell)

    widths = [e.bits_per_weight for e in modules] or [0.0]
    if max(widths) - min(widths) < _NOTICEABLE:
        return None
    return _by_layer(modules, bits, "bits a weight", ".2f")


def _by_layer(
    modules: Sequence[Entry], measure: Callable[[Sequence[Entry]], float | None], what: str, digits: str
) -> Figure | None:
    """A heat map with a column for each layer, and a row for each kind."""
    cells: dict[tuple[str, int], list[Entry]] = {}
    for e in modules:
        if e.layer is not None:
            cells.setdefault((e.kind, e.layer), []).append(e)
    kinds, layers = sorted({k for k, _ in cells}, reverse=True), sorted({n for _, n in cells})
    values = [[measure(cells[k, n]) if (k, n) in cells else None for n in layers] for k in kinds]
    if all(v is None for row in values for v in row):
        return None
    names = [[shown(_cell_name(cells[k, n])) if (k, n) in cells else "" for n in layers] for k in kinds]
    paths = [[cells[k, n][0].path if (k, n) in cells else "" for n in layers] for k in kinds]
    gap = 2 if len(layers) <= _GAPS else 0
    trace = {
        "type": "heatmap", "x": list(map(str, layers)), "y": _short_names(kinds), "z": values, "text": names,
        "customdata": paths, "xgap": gap, "ygap": 2, "colorscale": _SCALE, "hoverongaps": False,
        "hovertemplate": f"%{{text}}<br>{what} %{{z:{digits}}}<extra></extra>", "colorbar": _color_bar(what),
    }  # fmt: skip
    layout = {
        "height": _ROW * len(kinds) + _LABELS + 24, "margin": {"l": 8, "r": 8, "t": 52, "b": 40},
        "xaxis": {"title": {"text": "layer"}, "type": "category", "showgrid": False, "tickangle": 0, **_ticks(layers)},
        "yaxis": {"type": "category", "showgrid": False, "automargin": True, "tickmode": "linear"},
    }  # fmt: skip
    return {"data": [trace], "layout": layout}


def _ticks(layers: Sequence[int]) -> dict[str, Any]:
    """Which layers have their number below the map: few enough for a phone, at a round distance."""
    step = next(s for d in itertools.count() for s in (10**d, 2 * 10**d, 5 * 10**d) if len(layers) <= _TICKS * s)
    return {"tickmode": "array", "tickvals": [str(n) for n in layers[::step]]}


def _cell_name(entries: Sequence[Entry]) -> str:
    return entries[0].path if len(entries) == 1 else f"{entries[0].path} and {len(entries) - 1} more"


def _short_names(kinds: Sequence[str]) -> list[str]:
    """Each kind by as few of its last names as tell it from the others."""

    def tail(kind: str, n: int) -> str:
        return ".".join(kind.split(".")[-n:])

    found = []
    for kind in kinds:
        lengths = range(1, kind.count(".") + 2)
        n = next((n for n in lengths if sum(tail(k, n) == tail(kind, n) for k in kinds) == 1), len(lengths))
        found.append(shown(tail(kind, n), _LONGEST))
    return found if len(set(found)) == len(kinds) else [shown(k) for k in kinds]


def blocks_line(blocks: Sequence[Block]) -> Figure:
    """The error of what each block gives, before and after its layers were fitted together."""
    x = list(range(len(blocks)))
    paths = [shown(b.path) for b in blocks]
    hover = "%{text}<br>%{y:.4g} of the variance<extra>%{fullData.name}</extra>"
    lines = [
        ("layers quantized one by one", [b.before for b in blocks], "var(--second)", "dot"),
        ("in the end", [b.after for b in blocks], "var(--first)", "solid"),
    ]
    data = [
        {
            "type": "scatter", "mode": "lines+markers", "name": name, "x": x, "y": y, "text": paths,
            "hovertemplate": hover, "line": {"color": color, "dash": dash, "width": 2}, "marker": {"size": 5},
        }
        for name, y, color, dash in lines
    ]  # fmt: skip
    axis = {"title": {"text": "squared error / variance"}, "automargin": True, **_scale_of([b.before for b in blocks])}
    return {"data": data, "layout": _plain("block", axis, 320)}


def budget_curve(budget: Budget) -> Figure:
    """Damage against size, with what was asked for and what was reached."""
    x, y = [p[0] for p in budget.curve], [p[1] for p in budget.curve]
    data: list[dict[str, Any]] = [
        {
            "type": "scatter", "mode": "lines+markers", "name": "best choice at each size", "x": x, "y": y,
            "hovertemplate": "%{x:.3f} bits a weight<br>damage %{y:.4g}<extra></extra>",
            "line": {"color": "var(--first)", "width": 2}, "marker": {"size": 4},
        }
    ]  # fmt: skip
    points = [
        ("this model", budget.reached, budget.damage, "circle", "second", "%{x:.3f} bits a weight<br>damage %{y:.4g}"),
        ("no choice does less", budget.target, budget.lower_bound, "line-ew-open", "text", "lower bound %{y:.4g}"),
    ]
    data += [
        {
            "type": "scatter", "mode": "markers", "name": name, "x": [at], "y": [damage],
            "marker": {"size": 11, "symbol": symbol, "color": f"var(--{color})", "line": {"width": 2}},
            "hovertemplate": f"{name}<br>{hover}<extra></extra>",
        }
        for name, at, damage, symbol, color, hover in points
        if at is not None and damage is not None
    ]  # fmt: skip
    shapes = [
        {
            "type": "line", "x0": at, "x1": at, "yref": "paper", "y0": 0, "y1": 1,
            "line": {"color": "var(--muted)", "dash": "dash", "width": 1.5},
        }
        for at in [budget.target]
        if at is not None
    ]  # fmt: skip
    axis = {"title": {"text": "expected damage"}, "automargin": True, **_scale_of(y)}
    layout = {**_plain("bits a weight, whole file", axis, 340), "shapes": shapes}
    return {"data": data, "layout": layout}


def histogram(d: Distribution) -> Figure:
    """A module's weights, before and after, and below them the levels of its codes."""
    middles = [(a + b) / 2 for a, b in itertools.pairwise(d.edges)]
    data: list[dict[str, Any]] = []
    for name, shares, color, fill in (
        ("original", d.original, "var(--second)", "tozeroy"),
        ("quantized", d.quantized, "var(--first)", "none"),
    ):
        if shares:
            data.append(
                {
                    "type": "scatter", "mode": "lines", "name": name, "x": middles, "y": shares, "fill": fill,
                    "line": {"color": color, "width": 1.5, "shape": "hvh"}, "fillcolor": "var(--second-pale)",
                    "hovertemplate": f"{name}<br>%{{y:.2%}} at about %{{x:.4g}}<extra></extra>",
                }
            )  # fmt: skip
    layout = _plain("weight", {"title": {"text": "weights"}, "tickformat": ".1~%", "automargin": True}, 360)
    layout["xaxis"]["range"] = [d.edges[0], d.edges[-1]]
    if d.levels:
        data.append(_levels(d))
        layout["yaxis"]["domain"] = [0.36, 1]
        layout["yaxis2"] = {
            "domain": [0, 0.26], "title": {"text": "codes"}, "tickformat": ".1~%", "nticks": 3, "rangemode": "tozero",
        }  # fmt: skip
        layout["xaxis"]["anchor"] = "y2"
    return {"data": data, "layout": layout}


def _levels(d: Distribution) -> dict[str, Any]:
    """A bar where the levels of a code are, as high as the part of the weights that have it."""
    at = [level.middle for level in d.levels]
    between = [b - a for a, b in itertools.pairwise(at)]
    whole = d.edges[-1] - d.edges[0]
    width = min(max(0.5 * min(between, default=whole), whole / 160), whole / 40)
    about = [
        f"code {level.code} ({level.code:0{d.bits}b}): {level.middle:.4g}<br>in 90% of the groups {level.low:.4g} to "
        f"{level.high:.4g}<br>{level.share:.1%} of the weights"
        for level in d.levels
    ]
    return {
        "type": "bar", "name": "levels", "x": at, "y": [level.share for level in d.levels], "yaxis": "y2",
        "text": about, "width": width, "textposition": "none", "hovertemplate": "%{text}<extra></extra>",
        "marker": {"color": "var(--first)"},
    }  # fmt: skip


def _plain(x: str, y_axis: dict[str, Any], height: int) -> dict[str, Any]:
    """The layout of a plot with two axes."""
    return {
        "height": height, "margin": {"l": 8, "r": 12, "t": 40, "b": 44}, "xaxis": {"title": {"text": x}},
        "yaxis": y_axis, "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    }  # fmt: skip


def _scale_of(values: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis for values that differ by decades, else one that begins at 0."""
    positive = [v for v in values if v > 0]
    if len(positive) == len(values) and positive and max(positive) > _DECADES * min(positive):
        return {"type": "log", "dtick": 1}
    return {"rangemode": "tozero"}


def _color_bar(title: str) -> dict[str, Any]:
    """Above the plot, where it takes no width from it on a phone."""
    return {
        "orientation": "h", "x": 0.5, "xanchor": "center", "y": 1, "yanchor": "bottom", "ypad": 6, "thickness": 9,
        "len": 0.9, "outlinewidth": 0, "title": {"text": title, "side": "top"}, "nticks": 6,
    }  # fmt: skip
