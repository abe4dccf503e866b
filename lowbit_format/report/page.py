"""The page: facts and figures in one HTML file that loads nothing.

Plots are drawn by plotly.js, which the package plotly has: 4.8 MB, which the page carries compressed, as 2.0 MB.
Browsers unpack it since 2023; text and tables need no script. A content security policy names the page's two scripts by
their hashes and allows no other, and no address: nothing in a model's files can run or be fetched.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from importlib import resources
from typing import Any

from .. import __version__
from ..errors import OutputError
from . import figures
from .conversion import MEASURES
from .entries import VECTORS
from .facts import ModelFacts
from .figures import Figure, size_text

_BREAKS = re.compile(r"(?<=[._])(?=[^\W\d])")
_FEW = 3  # modules named in a sentence


def render(facts: ModelFacts) -> str:
    """The whole HTML file; the same facts give the same text.

    Raises OutputError if plotly or Jinja is not installed.
    """
    try:
        import jinja2
        from markupsafe import Markup
        from plotly.offline import get_plotlyjs
    except ImportError as e:
        message = f"a report needs the package {e.name}, which is missing: pip install 'lowbit-format[report]'"
        raise OutputError(message) from e
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters.update(size=size_text, count=_count, breakable=_breakable)
    plots, library, script = _plots(facts), str(get_plotlyjs()), _part("page.js")
    sources = " ".join(map(_hash, (script, library)))
    return environment.from_string(_part("page.html")).render(
        facts=facts,
        version=__version__,
        tiles=_tiles(facts),
        in_short=_in_short(facts),
        kept=[k for k in facts.kinds if not k.entries[0].is_quantized and k.name != VECTORS],
        measures=MEASURES,
        plots=plots,
        policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {sources}",
        style=Markup(_part("page.css")),
        script=Markup(script),
        data=Markup(_data({name: plot for name, (plot, _) in plots.items()})),
        library=base64.b64encode(gzip.compress(library.encode(), 9, mtime=0)).decode(),
    )


def _plots(facts: ModelFacts) -> dict[str, tuple[Figure, str]]:
    """Each plot by the name of its place in the page, and what it shows for those who do not see it."""
    modules = facts.modules
    found: dict[str, tuple[Figure | None, str]] = {
        "bytes": (figures.bytes_by_kind(facts.kinds), "Sizes of the kinds of tensors; the table below has the numbers"),
        "bits": (figures.bits_by_layer(modules), "Bits a weight by layer and kind"),
        "errors": (figures.error_by_layer(modules), "Relative error by layer and kind"),
    }
    if facts.blocks:
        found["blocks"] = (figures.blocks_line(facts.blocks), "Error of what each block gives, before and after")
    if facts.budget is not None:
        found["budget"] = (figures.budget_curve(facts.budget), "Expected damage against size")
    for i, d in enumerate(facts.distributions):
        found[f"distribution-{i}"] = (figures.histogram(d), f"Distribution of the weights of {d.path}")
    return {name: (plot, text) for name, (plot, text) in found.items() if plot is not None}


def _tiles(facts: ModelFacts) -> list[tuple[str, str, str]]:
    """The numbers that are asked for first: name, value, and what it is beside."""
    modules, original = facts.modules, facts.original
    quantized, stored = sum(e.numel for e in modules), sum(e.nbytes for e in modules)
    about = f"{_times(original.nbytes / facts.nbytes)} than {_beside(facts)}" if original else "of all tensors"
    tiles = [
        ("Size", size_text(facts.nbytes), about),
        (
            "Bits a weight",
            f"{facts.bits_per_weight:.2f}",
            f"whole file; {8 * stored / quantized:.2f} in quantized modules" if quantized else "nothing is quantized",
        ),
        ("Quantized", f"{quantized / facts.numel:.1%}", f"of the weights, in {len(modules):,} modules"),
    ]
    if facts.error is not None:
        tiles.append(("Relative error", f"{facts.error:.4f}", "of the quantized weights"))
    elif modules and modules[0].error is not None:
        tiles.append(("Largest error", f"{modules[0].error:.4f}", "of a module's weights"))
    if facts.evaluations:
        tiles.append(_quality(facts))
    if len(facts.precisions) > 1:
        tiles.append(("Precisions", ", ".join(map(str, facts.precisions)), "bits, in the same file"))
    return tiles


def _quality(facts: ModelFacts) -> tuple[str, str, str]:
    e = next((e for e in facts.evaluations if e.bits is None), facts.evaluations[0])
    if e.perplexity is not None:
        about = "" if e.reference_perplexity is None else f"original {e.reference_perplexity:,.2f}; "
        return "Perplexity", f"{e.perplexity:,.2f}", f"{about}{e.tokens:,} tokens of {e.text or 'a text'}"
    if e.cosine is not None:
        return "Cosine", f"{e.cosine:.4f}", f"to the original's outputs; {e.tokens:,} samples of {e.text or 'a text'}"
    return "Divergence", f"{e.divergence or 0:.4f}", "nats a token from the original"


def _in_short(facts: ModelFacts) -> list[str]:
    """The answer in a few sentences."""
    kinds, modules = facts.kinds, facts.modules
    top = kinds[0]
    how = top.stored if top.entries[0].is_quantized else f"kept in {top.stored}"
    lines = [
        f"The largest part of the file is {top.name}: {size_text(top.nbytes)}, {top.nbytes / facts.nbytes:.0%} of it, "
        f"at {top.bits_per_weight:.2f} bits a weight ({how})."
    ]
    known = [e for e in modules if e.error is not None]
    if known and known[0].error:
        worst = ", ".join(f"{e.path} ({e.error:.4f})" for e in known[:_FEW])
        lines.append(f"The largest relative errors are those of {worst}. Errors come from {facts.errors_from}.")
    if exact := sum(e.error == 0 for e in known):
        lines.append(f"{exact:,} modules are stored without loss.")
    if not known:
        lines.append(
            "How far the weights are from the original is not known: lowbit report with --against ORIGINAL measures it."
        )
    if not facts.evaluations:
        lines.append("How well the model predicts is not known: lowbit eval measures it.")
    if facts.tasks.fitting:
        size = size_text(sum(t.nbytes for t in facts.tasks.fitting))
        lines.append(f"{len(facts.tasks.fitting)} task bundles of this model lie beside it, {size} together.")
    return lines


def _beside(facts: ModelFacts) -> str:
    original = facts.original
    if original is None:
        return ""
    what = original.what if original.is_measured else f"all in {original.what}"
    return f"{what} ({size_text(original.nbytes)})"


def _times(ratio: float) -> str:
    return f"{ratio:.2f} x smaller" if ratio >= 1 else f"{1 / ratio:.2f} x larger"


def _count(number: int) -> str:
    return f"{number:,}"


def _breakable(text: str) -> Any:
    """`text` escaped, with places to break the line behind dots and underlines of paths, and none in a number."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(escape(piece) for piece in _BREAKS.split(text))


def _data(plots: dict[str, Figure]) -> str:
    """JSON that can stand in a script element: no text in it can end that."""
    text = json.dumps(plots, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _part(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")
