"""A release that is quantized already, as its files describe it: what each kind of release looks its weights up in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...dtypes import BY_NAME, FLOATS
from ...errors import QuantizedSourceError
from ...schema import is_int
from ..source import Source, SourceTensor


@dataclass(frozen=True)
class Release:
    """A checkpoint with the section of its config that says how it is quantized.

    Attributes:
        source: its tensors.
        section: ``quantization_config`` of ``config.json``.
        dtype: that the config gives to the model, as files name it.
    """

    source: Source
    section: Mapping[str, Any]
    dtype: str

    @property
    def method(self) -> str:
        return str(self.section.get("quant_method"))

    def modules(self, role: str) -> Iterator[str]:
        """Paths of the modules that have a tensor of this role, such as ``qweight``."""
        for name in self.source.tensors:
            path, _, last = name.rpartition(".")
            if last == role and path:
                yield path

    def has(self, name: str) -> bool:
        return name in self.source.tensors

    def tensor(self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...] | None = None) -> SourceTensor:
        """A tensor that a packed weight needs; raises QuantizedSourceError if it lacks, or is not as expected."""
        found = self.source.tensors.get(name)
        if found is None:
            raise self.error(f"lacks the tensor {name!r}, which its packed weight needs; get the checkpoint again")
        if found.dtype not in dtypes:
            raise self.error(f"{name}: has dtype {found.dtype}, expected {' or '.join(dtypes)}; {WRONG}")
        if shape is not None and found.shape != shape:
            raise self.error(f"{name}: has shape {list(found.shape)}, expected {list(shape)}; {WRONG}")
        return found

    def matrix_tensor(self, name: str, dtypes: tuple[str, ...]) -> SourceTensor:
        """As :meth:`tensor`, of two dimensions, neither of them 0."""
        found = self.tensor(name, dtypes)
        if len(found.shape) != 2 or 0 in found.shape:
            raise self.error(f"{name}: has shape {list(found.shape)}, expected two dimensions that are not 0; {WRONG}")
        return found

    def floats(self, name: str, shape: tuple[int, ...] | None = None) -> SourceTensor:
        """As :meth:`tensor`, of a dtype that a lowbit model can store parameters in."""
        return self.tensor(name, FLOATS, shape)

    def number(self, key: str, allowed: tuple[int, ...], default: object = None) -> int:
        """An integer of the section, one of `allowed`."""
        found = self.section.get(key, default)
        if not is_int(found) or found not in allowed:
            raise self.error(
                f"config.json: quantization_config has {key} {found!r}, expected one of "
                f"{', '.join(map(str, allowed))}, which are known; convert the original checkpoint"
            )
        return found

    def group_size(self, cols: int, key: str, default: int) -> int:
        """Columns of a group in a row of `cols`, as the section says; -1 there is the whole row."""
        found = self.section.get(key, default)
        if not is_int(found) or found == 0 or found < -1:
            raise self.error(
                f"config.json: quantization_config has {key} {found!r}, expected a number of columns, or -1; {WRONG}"
            )
        return cols if found == -1 else min(found, cols)

    def error(self, message: str) -> QuantizedSourceError:
        """An error about this release."""
        return QuantizedSourceError(f"{self.source.directory}: {message}")


WRONG = "the file does not fit its quantization_config: get the checkpoint again, or correct config.json"


def model_dtype(config: Mapping[str, Any]) -> str:
    """The dtype of a model by its config, or that of its text part; BF16 if neither says it."""
    for part in (config, config.get("text_config")):
        for key in ("dtype", "torch_dtype"):
            found = part.get(key) if isinstance(part, Mapping) else None
            if isinstance(found, str) and found in BY_NAME:
                return BY_NAME[found]
    return "BF16"
