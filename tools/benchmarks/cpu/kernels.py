"""A part of the CPU benchmark: single products, a batch of several tasks, and what compiled code costs at the start.

Matrices have random contents. Copies of each, more than the caches hold, are used in turn.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..common import Facts, import_package, job_of_this_process, seconds

COPIES = 128 << 20  # bytes of all copies of a matrix together: some times the largest cache
GROUP = 128


def main() -> None:
    job = job_of_this_process()
    print(json.dumps({"bandwidth": bandwidth, "kernel": kernel, "tasks": tasks, "start": start}[job["do"]](job)))


# --- read bandwidth --------------------------------------------------------------------------------


def bandwidth(job: Facts) -> Facts:
    """GB/s of reading 1 GiB: with Numba or torch, whichever has the larger median."""
    return {"samples": read_bandwidth(job["threads"])}


def read_bandwidth(threads: int) -> list[float]:
    """GB/s, several samples."""
    import numba
    import torch

    @numba.njit(nogil=True)
    def total(values, begin, end):  # type: ignore[no-untyped-def]
        parts = np.zeros(4, np.int64)
        quarter = (end - begin) // 4
        a, b, c, d = np.int64(0), np.int64(0), np.int64(0), np.int64(0)
        for i in range(begin, begin + quarter):
            a += values[i]
            b += values[i + quarter]
            c += values[i + 2 * quarter]
            d += values[i + 3 * quarter]
        parts[0], parts[1], parts[2], parts[3] = a, b, c, d
        return parts.sum()

    values = np.ones((1 << 30) // 8, np.int64)
    floats = torch.from_numpy(values).view(torch.float32)
    step = len(values) // (threads * 4)
    with ThreadPoolExecutor(threads) as pool:

        def by_numba() -> None:
            list(pool.map(lambda i: total(values, i * step, (i + 1) * step), range(threads * 4)))

        def by_torch() -> None:
            floats.sum()

        speeds: list[list[float]] = []
        for work in (by_numba, by_torch):
            work()
            speeds.append([values.nbytes / seconds(work) / 1e9 for _ in range(7)])
    return max(speeds, key=statistics.median)


# --- single products -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """The product with a matrix of one shape, by one kernel.

    Attributes:
        name: what it is.
        nbytes: of the matrix with its parameters; `planes`: of its codes alone.
        run: the product with copy i.
        weight: what copy 0 stores, in float64.
    """

    name: str
    nbytes: int
    planes: int
    run: Callable[[int, Any], Any]
    weight: Callable[[], Any]

    @property
    def copies(self) -> int:
        return max(2, -(-COPIES // self.nbytes))


def kernel(job: Facts) -> Facts:
    """Times of all products at one shape, by number of rows of x."""
    import torch

    rows, cols = job["shape"]
    speed = read_bandwidth(job["threads"])
    found = []
    with torch.inference_mode():
        for batch in job["batches"]:
            products = [*ours(rows, cols, batch), *peers(rows, cols)]
            x = torch.randn(batch, cols)
            errors = {w.name: relative_error(w, x) for w in products}
            times: dict[str, list[float]] = {w.name: [] for w in products}
            for turn in range(job["repeat"] + 1):  # the first turn is not counted
                shift = turn % len(products)
                for product in products[shift:] + products[:shift]:
                    product.run(product.copies - 1, x)  # wakes its threads up
                    calls = range(max(product.copies, 8))
                    samples = [
                        seconds(lambda i=i, product=product, x=x: product.run(i % product.copies, x)) for i in calls
                    ]
                    if turn:
                        times[product.name] += samples
            found += [
                {
                    "name": w.name, "batch": batch, "ms": [1000 * t for t in times[w.name]], "error": errors[w.name],
                    "planes": w.planes, "nbytes": w.nbytes,
                }
                for w in products
            ]  # fmt: skip
    return {"products": found, "bandwidth": speed}


def relative_error(product: Product, x: Any) -> float:
    """Against the float64 product of x and the weights as `product` stores them."""
    expected = x.double() @ product.weight().T
    return float((product.run(0, x).double() - expected).norm() / expected.norm())


def ours(rows: int, cols: int, batch: int) -> Iterator[Product]:
    """Modules of this package; all codecs at batch 1, 4 bits at larger ones."""
    from lowbit_format.schema import Scheme

    bcq = {b: Scheme("bcq", b, GROUP, "F16", offset=True) for b in (1, 2, 3, 4, 8)}
    schemes = {f"lowbit BCQ {b} bit{'s' * (b > 1)}": s for b, s in bcq.items() if batch == 1 or b == 4}
    if batch == 1:
        schemes |= {
            "lowbit uniform 4 bits": Scheme("uniform", 4, GROUP),
            "lowbit NF4": Scheme("codebook", 4, GROUP),
        }
    named = [(name, scheme, "exact") for name, scheme in schemes.items()]
    named += [(f"{name}, int8", scheme, "int8") for name, scheme in schemes.items() if scheme.codec != "codebook"]
    for name, scheme, activations in named:
        one = random_module(scheme, rows, cols, activations)
        nbytes = sum(p.nbytes for p in one.matrix_parameters().values())
        product = Product(name, nbytes, one.planes.nbytes, None, None)  # type: ignore[arg-type]
        modules = [one, *(random_module(scheme, rows, cols, activations) for _ in range(product.copies - 1))]
        yield Product(
            name,
            nbytes,
            one.planes.nbytes,
            lambda i, x, modules=modules: modules[i](x),
            lambda one=one: one.dequantize().double(),
        )


def random_module(scheme: Any, rows: int, cols: int, activations: str = "exact") -> Any:
    """A ``LowbitLinear`` with random planes and parameters; `cols` is a multiple of 8."""
    import torch

    from lowbit_format.quantize.codebook import TABLES
    from lowbit_format.runtime.modules import LowbitLinear

    module = LowbitLinear(scheme, rows, cols)
    for role, p in module.matrix_parameters().items():
        if role == "planes":
            p.data = torch.randint(0, 256, p.shape, dtype=torch.uint8)
        elif role == "codebook":
            p.data = torch.as_tensor(np.asarray(TABLES["nf4"], np.float32))
        elif role == "scales":
            p.data = torch.empty(p.shape).uniform_(0.01, 0.1).to(p.dtype)
        else:
            p.data = torch.full(p.shape, 2 ** (scheme.bits - 1) if role == "zeros" else 0.01).to(p.dtype)
    module.finish_loading("random")
    module.set_activations(activations)
    return module.eval()


def peers(rows: int, cols: int) -> Iterator[Product]:
    """torch in float32, bfloat16 and packed int4; bitsandbytes where it can be imported."""
    import torch
    import torch.nn.functional as F

    for name, dtype in (("torch float32", torch.float32), ("torch bfloat16", torch.bfloat16)):
        nbytes = rows * cols * dtype.itemsize
        copies = max(2, -(-COPIES // nbytes))
        weights = [torch.randn(rows, cols, dtype=dtype) for _ in range(copies)]
        yield Product(
            name, nbytes, nbytes,
            lambda i, x, weights=weights, dtype=dtype: F.linear(x.to(dtype), weights[i]),
            lambda weights=weights: weights[0].double(),
        )  # fmt: skip
    yield int4(rows, cols)
    try:
        yield nf4(rows, cols)
    except Exception as e:  # not installed, or not for CPUs
        print(f"bitsandbytes: {e}")


def int4(rows: int, cols: int) -> Product:
    """torch's own packed 4-bit product, activations in bfloat16."""
    import torch

    codes = torch.randint(0, 16, (rows, cols), dtype=torch.int32)
    params = torch.empty(cols // GROUP, rows, 2).uniform_(0.01, 0.1).bfloat16()  # scale, and value of code 8
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    nbytes = packed.nbytes + params.nbytes
    copies = [(packed.clone(), params.clone()) for _ in range(max(2, -(-COPIES // nbytes)))]

    def run(i: int, x: Any) -> Any:
        weight, scales = copies[i]
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), weight, GROUP, scales)

    def weight() -> Any:
        scale, zero = params.double().repeat_interleave(GROUP, 0).unbind(-1)
        return (codes.double() - 8) * scale.T + zero.T

    return Product("torch packed int4, bfloat16", nbytes, packed.nbytes, run, weight)


def nf4(rows: int, cols: int) -> Product:
    """bitsandbytes' NF4 module, groups of 64, as its users call it on a CPU."""
    import bitsandbytes as bnb
    import torch

    def module() -> Any:
        linear = bnb.nn.Linear4bit(cols, rows, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        linear.weight = bnb.nn.Params4bit(
            torch.randn(rows, cols), requires_grad=False, blocksize=64, quant_type="nf4", compress_statistics=False
        )
        return linear.to("cpu").eval()

    one = module()
    if one.weight.quant_state is None:
        one.weight.data = one.weight.data
        one.weight = one.weight._quantize("cpu")
    state = one.weight.quant_state
    expected = bnb.functional.dequantize_4bit(one.weight.data, state).double()
    planes = rows * cols // 2
    nbytes = planes + state.absmax.nbytes
    modules = [one, *(module() for _ in range(max(2, -(-COPIES // nbytes)) - 1))]
    return Product("bitsandbytes NF4", nbytes, planes, lambda i, x: modules[i](x), lambda: expected)


# --- several tasks in one batch --------------------------------------------------------------------


def tasks(job: Facts) -> Facts:
    """Milliseconds of one forward pass of 8 rows: without a task, with one, with 8; the shape of ``mixing.py``."""
    import torch

    import lowbit_format as lb

    from .. import mixing

    hidden, layers, rows = 2048, 4, 8
    scratch = Path(job["folder"])
    if not (scratch / "base").exists():
        scratch.mkdir(parents=True, exist_ok=True)
        mixing.make_base(scratch, hidden, layers)
    with torch.inference_mode():
        model = lb.from_pretrained(scratch / "base").eval()
        ids = torch.randint(0, 1000, (rows, 1))
        names = [f"task{i}" for i in range(rows)]
        for i, name in enumerate(names):
            lb.load_task(model, mixing.random_task(model, i, 1), name=name)

        def forward() -> Any:
            return model(ids, use_cache=False).logits

        def alone(name: str | None) -> Any:
            lb.set_task(model, name)
            return forward()

        def mixed() -> Any:
            with lb.use_tasks(model, names):
                return forward()

        both = mixed()
        singles = [alone(name)[i] for i, name in enumerate(names)]
        worst = max(float((both[i] - one).norm() / one.norm()) for i, one in enumerate(singles))
        passes: dict[str, Callable[[], Any]] = {
            "no task": lambda: alone(None),
            "one task (set_task)": lambda: alone(names[0]),
            "8 tasks (use_tasks)": mixed,
        }
        times: dict[str, list[float]] = {name: [] for name in passes}
        for _ in range(5 * job["repeat"]):
            for name, one in passes.items():  # in turn: what slows the machine slows all
                times[name].append(1000 * seconds(one))
    return {"ms": times, "worst": worst}


# --- start -----------------------------------------------------------------------------------------


def start(job: Facts) -> Facts:
    """Seconds of the imports, and of the first and second calls of the kernels, in this process."""
    began = time.perf_counter()
    import numba  # noqa: F401
    import torch
    import transformers.modeling_utils  # noqa: F401

    others = time.perf_counter()
    import_package()
    imported = time.perf_counter()
    from lowbit_format.schema import Scheme

    schemes = [
        Scheme("bcq", 4, GROUP, "F16", offset=True),
        Scheme("uniform", 4, GROUP),
        Scheme("codebook", 4, GROUP),
    ]
    modules = [random_module(s, 512, 1024) for s in schemes]
    inputs = [torch.randn(1, batch, 1024) for batch in (1, 8, 128)]
    torch.nn.functional.linear(inputs[0], torch.randn(512, 1024))

    def calls() -> None:
        with torch.inference_mode():
            for module in modules:
                for x in inputs:
                    module(x)

    first_one = seconds(lambda: modules[0](inputs[0]))
    first = seconds(calls)
    second = seconds(calls)
    return {
        "others": others - began,
        "this package": imported - others,
        "first": first_one,
        "all": first_one + first,
        "second": second,
    }


if __name__ == "__main__":
    main()
