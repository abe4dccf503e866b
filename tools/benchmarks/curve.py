"""Size against perplexity, drawn from tables that other benchmarks print.

    python -m tools.benchmarks.curve OUT.svg "a budget=budget.md" "llama.cpp=llama.md" [--float 31.37] [--title TEXT]

Each file has a table in Markdown with the columns "bits a weight, whole file" and "perplexity", as :mod:`.bits` and
:mod:`.calibration_llama_cpp` print it; the other lines of the file do not count. Needs matplotlib.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

SIZE, QUALITY = "bits a weight, whole file", "perplexity"


class Point(NamedTuple):
    """A model: bits a weight of the whole file, and perplexity."""

    size: float
    perplexity: float


def main() -> None:
    """Draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("series", nargs="+", help="name=file")
    parser.add_argument("--float", type=float, dest="plain", help="perplexity of the float model")
    parser.add_argument("--title", default="")
    args = parser.parse_args()
    import matplotlib  # of no use to a reader of tables
    from matplotlib import pyplot

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "lowbit"})  # equal numbers make equal files

    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    for text in args.series:
        name, _, file = text.partition("=")
        points = sorted(read(Path(file).read_text("utf-8")))
        axes.plot([p.size for p in points], [p.perplexity for p in points], marker="o", label=name)
    if args.plain is not None:
        axes.axhline(args.plain, color="gray", linestyle="--", label="float")
    axes.set(xlabel=SIZE, ylabel=QUALITY, yscale="log", title=args.title)
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(args.out, metadata={"Date": None})


def read(text: str) -> list[Point]:
    """The points of the table of a text; rows without a size, such as that of the float model, are left out.

    Raises ValueError if there is no such table.
    """
    rows = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in text.splitlines() if "|" in line]
    head = next((row for row in rows if SIZE in row and QUALITY in row), None)
    if head is None:
        raise ValueError(f"no table with the columns {SIZE!r} and {QUALITY!r}")
    size, quality = head.index(SIZE), head.index(QUALITY)
    found = []
    for row in rows[rows.index(head) + 2 :]:
        if len(row) == len(head) and row[size]:
            found.append(Point(float(row[size]), float(row[quality])))
    return found


if __name__ == "__main__":
    main()
