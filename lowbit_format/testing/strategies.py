"""Hypothesis strategies for schemes, module entries, configs and stored matrices, drawn from the table of codecs.

What a codec may have is asked of :data:`lowbit_format.codecs.CODECS`, so a new codec is tested by entering it there.
Rule ids are those of spec/FORMAT.md.
"""

from __future__ import annotations

from hypothesis import strategies as st

from ..codecs import CODECS, Codec
from ..matrix import StoredMatrix
from ..schema import KINDS, MAX_DIMENSION, SCALE_DTYPES, ModuleEntry, QuantizationConfig, Scheme
from .matrices import extreme_matrix

BITS = st.integers(1, 8)  # CFG-2
GROUP_SIZES = st.just(0) | st.integers(1, 9) | st.sampled_from([64, 128, MAX_DIMENSION])  # CFG-2; 0 is the whole row
ROWS = st.integers(1, 5)
COLS = st.integers(1, 20) | st.sampled_from([63, 64, 65, 127, 130])  # BIT-2, and B of section 4: whole 64-bit words
SEEDS = st.integers(0, 2**32 - 1)

# CFG-4: dotted parts, none empty, without control characters and slashes
_PARTS = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="./\\"), min_size=1, max_size=6
)
PATHS = st.lists(_PARTS, min_size=1, max_size=4).map(".".join)


def splits(codec: Codec) -> bool:
    """Whether a codec may have ``row_bits`` and ``nested`` (CFG-2, CFG-3): a table of 2^bits values cannot be cut."""
    return not codec.codebook


@st.composite
def schemes(draw: st.DrawFn, ragged: bool | None = None) -> Scheme:
    """Any valid scheme (CFG-2, CFG-3); `ragged` forces or forbids ``row_bits``."""
    codec = draw(st.sampled_from([c for c in CODECS.values() if not ragged or splits(c)]))
    bits = draw(BITS)
    row_bits = splits(codec) and (draw(st.booleans()) if ragged is None else ragged)
    nested = draw(st.sets(st.integers(1, bits - 1))) if splits(codec) and bits > 1 else set()
    return Scheme(
        codec.id,
        bits,
        draw(GROUP_SIZES),
        draw(st.sampled_from(SCALE_DTYPES)),
        codec.optional_shift and draw(st.booleans()),
        row_bits,
        tuple(sorted(nested)),
        draw(st.none() | st.text(max_size=5)),
    )


@st.composite
def modules(draw: st.DrawFn) -> ModuleEntry:
    """Any valid module of a small shape (CFG-4 to CFG-6, EXP-2)."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    stack = (draw(st.integers(1, 3)),) if KINDS[kind] == 3 else ()
    scheme = draw(schemes(ragged=False if stack else None))
    return ModuleEntry(draw(PATHS), scheme, kind, (*stack, draw(ROWS), draw(COLS)))


@st.composite
def configs(draw: st.DrawFn) -> QuantizationConfig:
    """A configuration of a few modules whose tensor names do not collide (TEN-1, TIE-2)."""
    found = draw(st.lists(modules(), max_size=3, unique_by=lambda m: m.path.replace("_", ".").split(".")[0]))
    tied = {f"tied.to.{i}": m.path for i, m in enumerate(found) if draw(st.booleans())}
    tied = {place: owner for place, owner in tied.items() if not any(m.path.startswith("tied") for m in found)}
    return QuantizationConfig({m.path: m for m in found}, tied, draw(st.sampled_from(["", "model"])))


@st.composite
def stored_matrices(draw: st.DrawFn, scheme: Scheme | None = None) -> StoredMatrix:
    """A matrix of random codes and parameters of any valid scheme, small and of an awkward shape."""
    return extreme_matrix(scheme or draw(schemes()), draw(ROWS), draw(COLS), draw(SEEDS))
