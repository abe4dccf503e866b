"""A part of the GPU benchmark: other packages' products with 4-bit weights, each where it is installed.

A peer that is missing or fails is a row that says why.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit_format.kernels.gpu import backend

from ..common import table
from .bench import Bench, TooLong, let_go, micro, time_limit
from .data import random_matrix
from .predict import bcq, name

GROUP = 128
LIMIT = 25.0  # seconds for one peer at one size
MOST_COPIES = 24  # quantizing takes its time


class Contender(NamedTuple):
    """One matrix as a peer holds it.

    Attributes:
        run: the product.
        weight: what the peer's codes stand for, ``[rows, cols]``.
        nbytes: that a product must read.
    """

    run: Callable[[Tensor], Tensor]
    weight: Callable[[], Tensor]
    nbytes: int


def peers(bench: Bench) -> Iterator[str]:
    """Batch 1 and 8, at each size."""
    for n in (1, 8):
        rows = []
        for size in bench.sizes:
            if bench.late():
                rows.append([name(size), "skipped: the part's time is over", "", "", "", ""])
                continue
            library = _library(bench, size)
            measured = _row(bench, size, n, "torch", bench.half, library, None)
            base = statistics.median(measured[1])
            rows.append(measured[0])
            rows.append(_row(bench, size, n, "lowbit BCQ 4 bits", bench.half, _ours(bench, size), base)[0])
            for package, (what, dtype, make) in PEERS.items():
                rows.append(_peer_row(bench, size, n, package, what, dtype, make, base))
                let_go()
        yield f"## Beside peers, {n} row{'s' * (n > 1)} of x (peers)\n\n" + table(
            ["rows x cols", "package", "us", "GB/s", "to library, bf16", "relative error to its own weights"], rows
        )
    if not bench.tiny:
        for package in PEERS:
            if version := _version(package):
                yield f"{package} {version}"


def _peer_row(
    bench: Bench, size: tuple[int, int], n: int, package: str, what: str, dtype: torch.dtype, make: Any, base: float
) -> list[str]:
    if _version(package) is None:
        return [name(size), what, "not installed", "", "", ""]
    try:
        with time_limit(min(LIMIT, bench.left())):
            first = make(*size, bench.device)
            count = min(MOST_COPIES, bench.copies(first.nbytes))
            copies = [first, *(make(*size, bench.device) for _ in range(count - 1))]
            return _row(bench, size, n, what, dtype, copies, base)[0]
    except (Exception, TooLong) as e:
        reason = f"failed: {type(e).__name__}: {e}".replace("\n", " ").replace("|", "/")[:200]
        return [name(size), what, reason, "", "", ""]


def _row(
    bench: Bench, size: tuple[int, int], n: int, what: str, dtype: torch.dtype, copies: list[Contender],
    base: float | None,
) -> tuple[list[str], list[float]]:  # fmt: skip
    x = torch.randn(n, size[1], device=bench.device).to(dtype)
    first = copies[0]
    expected = x.double() @ first.weight().double().t()
    error = float((first.run(x).double() - expected).norm() / expected.norm())
    del expected
    times = bench.measure(lambda i: copies[i].run(x), len(copies))
    middle = statistics.median(times)
    speed, ratio = f"{1e-3 * first.nbytes / middle:.0f}", f"{(base or middle) / middle:.2f}"
    return [name(size), what, micro(times), speed, ratio, f"{error:.1e}"], times


def _version(package: str) -> str | None:
    """None if the package is not there."""
    return None if importlib.util.find_spec(package) is None else importlib.metadata.version(package)


# --- packages ----------------------------------------------------------------------------------------


def _library(bench: Bench, size: tuple[int, int]) -> list[Contender]:
    count = bench.copies(2 * size[0] * size[1])
    weights = [torch.randn(size, device=bench.device, dtype=bench.half) for _ in range(count)]
    return [Contender(lambda x, w=w: F.linear(x, w), lambda w=w: w, w.nbytes) for w in weights]


def _ours(bench: Bench, size: tuple[int, int]) -> list[Contender]:
    matrix = random_matrix(bench, bcq(4, GROUP), *size)
    return [
        Contender(
            lambda x, w=w: backend.linear(x, w, None, None, None),
            lambda w=w: backend.dequantize(w, None, torch.float32),
            matrix.nbytes,
        )
        for w in matrix.tiled
    ]


def _gemlite(rows: int, cols: int, device: torch.device) -> Contender:
    core = importlib.import_module("gemlite.core")
    kind = core.TORCH_TO_DTYPE[torch.float16]
    codes = torch.randint(0, 16, (rows, cols), dtype=torch.uint8, device=device)
    scales = (torch.rand(rows * cols // GROUP, 1, device=device) * 0.02 + 0.01).half()
    zeros = torch.full_like(scales, 7.5)
    linear = core.GemLiteLinear(
        4, group_size=GROUP, in_features=cols, out_features=rows, input_dtype=kind, output_dtype=kind
    )
    linear.pack(codes.clone(), scales, zeros, None)

    def weight() -> Tensor:
        return ((codes.view(-1, GROUP) - zeros.float()) * scales.float()).view(rows, cols)

    return Contender(linear, weight, rows * cols // 2 + 4 * scales.numel())


def _bitsandbytes(rows: int, cols: int, device: torch.device) -> Contender:
    package, functional = (importlib.import_module(n) for n in ("bitsandbytes", "bitsandbytes.functional"))
    codes, state = functional.quantize_4bit(_random_weight(rows, cols, device), blocksize=64, quant_type="nf4")
    return Contender(
        lambda x: package.matmul_4bit(x, codes.t(), quant_state=state),
        lambda: functional.dequantize_4bit(codes, state),
        rows * cols // 2 + 4 * rows * cols // 64,
    )


def _torchao(rows: int, cols: int, device: torch.device) -> Contender:
    quantization = importlib.import_module("torchao.quantization")
    config = None
    # The tile-packed layout needs torch alone; older versions had no other one, and no such option.
    for options in ({"int4_packing_format": "tile_packed_to_4d"}, {}):
        try:
            config = quantization.Int4WeightOnlyConfig(group_size=GROUP, **options)
            break
        except TypeError:
            continue
    linear = nn.Linear(cols, rows, bias=False, device=device, dtype=torch.bfloat16)
    linear.weight.data = _random_weight(rows, cols, device)
    holder = nn.Sequential(linear)
    quantization.quantize_(holder, config)
    held: Any = holder[0].requires_grad_(False)
    return Contender(
        held,
        lambda: held(torch.eye(cols, device=device, dtype=torch.bfloat16)).t(),  # whatever its tensors look like
        rows * cols // 2 + 4 * rows * cols // GROUP,
    )


def _random_weight(rows: int, cols: int, device: torch.device) -> Tensor:
    return torch.randn(rows, cols, device=device, dtype=torch.bfloat16) * 0.02


PEERS = {  # package -> what it is called in tables, dtype of x, how to make a matrix
    "gemlite": ("GemLite 4 bits, group 128, fp16", torch.float16, _gemlite),
    "bitsandbytes": ("bitsandbytes NF4, bf16", torch.bfloat16, _bitsandbytes),
    "torchao": ("torchao int4, group 128, bf16", torch.bfloat16, _torchao),
}
