"""How products are launched on which GPU: what ships, and what was measured on request.

A first call never tries variants. What ships is a rule for each family of GPUs. :mod:`...runtime.autotune` measures a
model's matrices on the device at hand, and keeps what it finds in a file that every later process reads.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch

from ..matrix import PlaneMatrix
from ..parameter_order import TILE_ROWS


class Config(NamedTuple):
    """How products with one matrix are launched.

    Attributes:
        warps: warps of a program; each has a part of the columns.
        most_rows: the most rows of x that are multiplied straight from planes. For more, the weight is decoded for the
            library's matrix product.
    """

    warps: int
    most_rows: int


class Family(NamedTuple):
    """What the rule knows of a family of GPUs.

    Attributes:
        warps: warps that one multiprocessor holds, with the registers that the product kernel takes.
        row_planes: rows of x times planes up to which a product straight from planes takes less time than decoding;
            0 where Triton does not compile these products.
    """

    warps: int
    row_planes: int


# Predicted from instruction counts and bandwidths (README.md); row_planes is what measurements should correct first.
FAMILIES = {"turing": Family(24, 0), "ampere": Family(24, 440), "hopper": Family(24, 280), "amd": Family(16, 200)}
WARPS = (8, 4, 2)
_CODEBOOK = 1.3  # time of a combination of planes over that of a plane (instructions counted)
ROW_STEP = 16  # most_rows is a multiple of this


def choose(w: PlaneMatrix) -> Config:
    """The configuration for tiled `w` on its device."""
    return _choose(w.planes.device, w.rows, w.cols, w.group_size, w.planes.shape[1], w.codec, w.bits)


@functools.cache
def _choose(device: torch.device, rows: int, cols: int, group_size: int, macros: int, codec: str, bits: int) -> Config:
    found = measured().get(key(device, codec, bits, rows, cols, group_size))
    return found or predicted(family(device), multiprocessors(device), rows, macros, codec, bits)


def predicted(family: Family, multiprocessors: int, rows: int, macros: int, codec: str, bits: int) -> Config:
    """What the rule gives: the most warps that have room at once and work each; many rows take several rounds anyway.

    Args:
        family: of the GPU.
        multiprocessors: of the GPU.
        rows: of the weight.
        macros: macro blocks of a row of the weight.
        codec, bits: of the weight.
    """
    tiles, room = -(-rows // TILE_ROWS), family.warps * multiprocessors
    fitting = [n for n in WARPS if n <= macros and (tiles * n <= room or tiles * n >= 4 * room)]
    planes = bits if codec != "codebook" else _CODEBOOK * (2**bits - 1)
    most_rows = max(ROW_STEP, int(family.row_planes / planes) // ROW_STEP * ROW_STEP) if family.row_planes else 0
    return Config(fitting[0] if fitting else WARPS[-1], most_rows)


def family(device: torch.device) -> Family:
    """The family of a device; one newer than all known counts as the newest."""
    if device.type != "cuda":
        return FAMILIES["hopper"]  # the interpreter, which has no speed
    if torch.version.hip is not None:
        return FAMILIES["amd"]
    capability = torch.cuda.get_device_capability(device)[0]
    return FAMILIES["hopper" if capability >= 9 else "ampere" if capability == 8 else "turing"]


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors (compute units) of a device."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 132


def key(device: torch.device, codec: str, bits: int, rows: int, cols: int, group_size: int) -> str:
    """The key of a measured configuration in the file: device, scheme and shape."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name} {codec} {bits} {rows}x{cols}/{group_size}"


def cache_file() -> Path:
    """Where measured configurations are kept: ``$LOWBIT_CACHE/gpu.json``, by default in ``~/.cache/lowbit_format``."""
    return Path(os.environ.get("LOWBIT_CACHE") or Path.home() / ".cache" / "lowbit_format") / "gpu.json"


@functools.cache
def measured() -> dict[str, Config]:
    """Measured configurations by :func:`key`; none if there is no file. Entries of another kind are ignored."""
    try:
        found = json.loads(cache_file().read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    entries = found.items() if isinstance(found, dict) else ()
    return {k: Config(*v) for k, v in entries if _is_config(v)}


def _is_config(entry: object) -> bool:
    numbers = isinstance(entry, list) and len(entry) == 2 and all(type(n) is int for n in entry)
    return numbers and entry[0] in WARPS and entry[1] >= 0  # type: ignore[index]


def forget() -> None:
    """Read the file again at the next call."""
    measured.cache_clear()
    _choose.cache_clear()
