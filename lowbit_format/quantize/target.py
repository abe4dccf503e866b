"""The target of a quantization: the options that a person or a recipe sets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..codecs import CODECS
from ..errors import SchemeError
from ..schema import MAX_DIMENSION, SCALE_DTYPES, Scheme, is_int
from . import codebook, uniform


class _Unchosen(int):
    """Bits that were left out. Those of a codebook's table take their place, also in ``dataclasses.replace``."""


@dataclass(frozen=True)
class Target:
    """How to quantize one matrix.

    Attributes:
        codec: ``"bcq"``, ``"uniform"`` or ``"codebook"``.
        bits: number of planes, 1 to 8; 4 if left out. A codebook has the bits of its table: leave them out, or give the
            same.
        group_size: number of columns that share parameters; 0 is the whole row.
        offset: bcq only: fit an offset for each group.
        nested: bcq and uniform: lower precisions that get their own parameters.
        solver: uniform only: ``"mse"``, ``"minmax"`` or ``"symmetric"``.
        table: codebook only: a name in TABLES, or the values.
        scale_dtype: dtype of the stored parameters; F32 is used where this one cannot hold them (ENC-4).
        recognise: first test whether all weights are on a grid already, and store them without loss if so (ENC-3).
        rounds: of the solver; None is the solver's default.
        row_bits: bcq and uniform: bits of each row, from 1 to `bits`; None: all rows have `bits`.
    """

    codec: str = "bcq"
    bits: int = _Unchosen(4)
    group_size: int = 128
    offset: bool = True
    nested: tuple[int, ...] = ()
    solver: str = "mse"
    table: str | tuple[float, ...] = "nf4"
    scale_dtype: str = "F16"
    recognise: bool = True
    rounds: int | None = None
    row_bits: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        def check(good: bool, message: str) -> None:
            if not good:
                raise SchemeError(message)

        check(self.codec in CODECS, f"codec is {self.codec!r}, expected one of {', '.join(CODECS)}")
        check(is_int(self.bits) and 1 <= self.bits <= 8, f"bits is {self.bits!r}, expected 1 to 8")
        check(
            is_int(self.group_size) and 0 <= self.group_size <= MAX_DIMENSION,
            f"group_size is {self.group_size!r}, expected 0 (the whole row) or a number of columns",
        )
        check(
            self.scale_dtype in SCALE_DTYPES, f"scale_dtype is {self.scale_dtype!r}, expected {', '.join(SCALE_DTYPES)}"
        )
        check(
            self.solver in uniform.SOLVERS, f"solver is {self.solver!r}, expected one of {', '.join(uniform.SOLVERS)}"
        )
        check(
            self.rounds is None or (is_int(self.rounds) and self.rounds >= 0),
            f"rounds is {self.rounds!r}, expected 0 or more",
        )
        check(isinstance(self.nested, (tuple, list)), f"nested is {self.nested!r}, expected several precisions: (2, 3)")
        for key in ("offset", "recognise"):
            check(isinstance(getattr(self, key), bool), f"{key} is {getattr(self, key)!r}, expected true or false")
        if self.row_bits is not None:
            check(self.codec != "codebook", "a codebook has no row_bits")
            known = all(is_int(n) and 1 <= n <= self.bits for n in self.row_bits)
            check(known, f"row_bits has other numbers than integers from 1 to bits = {self.bits}")
        if self.codec == "codebook":
            check(not self.nested, "a codebook has no nested precisions")
            if isinstance(self.table, str):
                check(
                    self.table in codebook.TABLES,
                    f"table is {self.table!r}, expected one of {', '.join(codebook.TABLES)}",
                )
            else:
                values = np.array(self.table, np.float64)
                check(2 <= len(values) <= 256, f"the table has {len(values)} values, expected 2 to 256")
                check(
                    bool(np.isfinite(values.astype(np.float32)).all()), "the table has a value that float32 cannot hold"
                )
                check(len(set(values)) > 1, "the table has one value only")
            own = codebook.table_bits(self.values())
            check(
                isinstance(self.bits, _Unchosen) or self.bits == own,
                f"bits is {self.bits}, and a codebook has the bits of its table, {own}: leave bits out",
            )
            object.__setattr__(self, "bits", _Unchosen(own))
        check(
            all(is_int(k) and 1 <= k < self.bits for k in self.nested),
            f"nested is {list(self.nested)}, expected precisions from 1 to bits - 1 = {self.bits - 1}",
        )
        object.__setattr__(self, "nested", tuple(sorted(set(self.nested))))

    def values(self) -> list[float]:
        """The values of the table of a codebook target."""
        return codebook.TABLES[self.table] if isinstance(self.table, str) else list(self.table)

    def scheme(self, scale_dtype: str | None = None) -> Scheme:
        """The scheme of a matrix quantized to this target, with parameters in `scale_dtype`."""
        label = (self.table if isinstance(self.table, str) else "table") if self.codec == "codebook" else None
        return Scheme(
            self.codec,
            self.bits,
            self.group_size,
            scale_dtype or self.scale_dtype,
            offset=self.codec == "bcq" and self.offset,
            nested=self.nested,
            label=label,
            row_bits=self.row_bits is not None,
        )
