"""Models whose weights come out right only with the arithmetic of the specification (DEC-1).

Values are searched for which a fused, wider or reordered sum gives other bits, and zeros of both signs, subnormal and
infinite weights are made on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np

from .cases import Valid
from .files import bytes_tensor, floats, hexed, random_bytes
from .models import Model, scheme
from .reader import Tensors


def nearest32(exact: Fraction) -> np.float32:
    """The binary32 value nearest to `exact`, ties to even, for normal values."""
    guess = np.float32(float(exact))
    around = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min(around, key=lambda y: (abs(Fraction(float(y)) - exact), int(y.view(np.uint32)) & 1))


def exactly(value: np.float32) -> Fraction:
    return Fraction(float(value))


def normal_floats(label: str, count: int) -> np.ndarray:
    """Positive normal values between 2^-4 and 2^4 with random mantissas."""
    raw = np.frombuffer(random_bytes(label, 8 * count), "<u4").reshape(count, 2)
    return (((123 + raw[:, 1] % 8) << 23) | (raw[:, 0] & (2**23 - 1))).astype(np.uint32).view(np.float32)


def wrong_bcq_sums(offset: np.float32, scales: np.ndarray, bits: list[int]) -> list[np.float32]:
    """Results of decoders that add the same numbers in another order or precision."""
    signed = [s if bit else -s for s, bit in zip(scales, bits, strict=True)]
    backwards = offset
    for term in reversed(signed):
        backwards = backwards + term
    offset_last = signed[0]
    for term in signed[1:]:
        offset_last = offset_last + term
    offset_last = offset_last + offset
    wide = nearest32(exactly(offset) + sum(map(exactly, signed)))
    return [backwards, offset_last, wide]


def bcq_by_the_rule(offset: np.float32, scales: np.ndarray, bits: list[int]) -> np.float32:
    acc = offset
    for s, bit in zip(scales, bits, strict=True):
        acc = acc + s if bit else acc - s
    return acc


def wrong_uniform_products(code: int, zero: np.float32, scale: np.float32) -> list[np.float32]:
    """Results of decoders that multiply first, fuse, or round once."""
    product, shift = np.float32(code) * scale, zero * scale
    fused = nearest32(code * exactly(scale) - exactly(shift))
    wide = nearest32((code - exactly(zero)) * exactly(scale))
    return [product - shift, fused, wide]


def search(label: str, count: int, per_try: int, wanted: Callable[[np.ndarray], bool]) -> list[np.ndarray]:
    """The first `count` draws of `per_try` values that are wanted."""
    found: list[np.ndarray] = []
    for attempt in range(10_000):
        draw = normal_floats(f"{label}/{attempt}", per_try)
        if wanted(draw):
            found.append(draw)
        if len(found) == count:
            return found
    raise AssertionError(f"nothing found for {label}")


SENSITIVE_BITS = [1, 0, 1, 1]  # the column whose decoding is sensitive, plane 0 first
SENSITIVE_CODE = 11


def sensitive_bcq() -> tuple[Tensors, int]:
    rows = 4

    def wanted(draw: np.ndarray) -> bool:
        right = bcq_by_the_rule(draw[0], draw[1:], SENSITIVE_BITS)
        return all(other != right for other in wrong_bcq_sums(draw[0], draw[1:], SENSITIVE_BITS))

    found = np.stack(search("rounding/bcq", rows, 5, wanted))
    planes = np.zeros((4, rows, 8), np.uint8)
    for p, bit in enumerate(SENSITIVE_BITS):
        planes[p, :, 0] = 0b1010 | bit
    roles = {
        "planes": bytes_tensor(planes),
        "scales": floats(np.ascontiguousarray(found[:, 1:].T)[:, :, None]),
        "offsets": floats(np.ascontiguousarray(found[:, :1])),
    }
    return roles, rows


def sensitive_uniform() -> tuple[Tensors, int]:
    rows = 4

    def wanted(draw: np.ndarray) -> bool:
        right = (np.float32(SENSITIVE_CODE) - draw[0]) * draw[1]
        return all(other != right for other in wrong_uniform_products(SENSITIVE_CODE, draw[0], draw[1]))

    found = np.stack(search("rounding/uniform", rows, 2, wanted))
    planes = np.zeros((4, rows, 8), np.uint8)
    for p in range(4):
        planes[p, :, 0] = 0b1010 | (SENSITIVE_CODE >> (3 - p) & 1)
    roles = {
        "planes": bytes_tensor(planes),
        "scales": floats(np.ascontiguousarray(found[:, 1])[None, :, None]),
        "zeros": floats(np.ascontiguousarray(found[:, :1])),
    }
    return roles, rows


def rounding_model() -> Model:
    bcq, bcq_rows = sensitive_bcq()
    uniform, uniform_rows = sensitive_uniform()
    model = (
        Model("rounding")
        .add("bcq", scheme("bcq", 4, 0, "F32", offset=True), [bcq_rows, 4], roles=bcq)
        .add("uniform", scheme("uniform", 4, 0, "F32"), [uniform_rows, 4], roles=uniform)
    )
    assert_sensitive(model)
    return model


def assert_sensitive(model: Model) -> None:
    """Column 0 decodes to other bits in any order or precision that the specification does not prescribe."""
    weights = model.decoded()
    bcq, uniform = model.module("bcq").roles, model.module("uniform").roles
    for r, weight in enumerate(weights["bcq"].f32()[:, 0]):
        offset, scales = bcq["offsets"].f32()[r, 0], bcq["scales"].f32()[:, r, 0]
        assert weight == bcq_by_the_rule(offset, scales, SENSITIVE_BITS)
        assert weight not in wrong_bcq_sums(offset, scales, SENSITIVE_BITS)
    for r, weight in enumerate(weights["uniform"].f32()[:, 0]):
        zero, scale = uniform["zeros"].f32()[r, 0], uniform["scales"].f32()[0, r, 0]
        assert weight not in wrong_uniform_products(SENSITIVE_CODE, zero, scale)


def arithmetic_cases() -> Iterator[Valid]:
    about = "Values where fused operations, a wider sum or another order give other bits (column 0 of every row)."
    yield Valid("rounding", about, rounding_model())
    yield Valid("subnormal", "Weights that are subnormal in binary32 and must not become zero.", subnormal_model())
    yield Valid("signed-zero", "Scales, offsets and zeros of +0.0 and -0.0, and weights of either zero.", zero_model())
    yield Valid("overflow", "Finite parameters whose weights overflow to infinity in binary32.", overflow_model())
    negative = Model("negative-scales").add(
        "fc",
        scheme("bcq", 2, 2),
        [1, 4],
        roles={
            "planes": hexed("U8", (2, 1, 8), "05 00000000000000 03 00000000000000"),
            "scales": hexed("F16", (2, 1, 2), "00 bc 01 80 01 00 ff 83"),
        },
    )
    yield Valid("negative-scales", "Negative and subnormal F16 scales, the larger one in the last plane.", negative)


def subnormal_model() -> Model:
    tiny = float(np.float32(2.0**-126))
    table = floats([-1.0, 0.5, 0.25, 2.0**-23])
    model = (
        Model("subnormal")
        .add("sum", scheme("bcq", 2, 0, "F32"), [1, 4], roles={
            "planes": hexed("U8", (2, 1, 8), "03 00000000000000 05 00000000000000"),
            "scales": floats([[[tiny]], [[tiny * 0.75]]]),
        })
        .add("product", scheme("uniform", 2, 0, "F32"), [1, 4], roles={
            "planes": hexed("U8", (2, 1, 8), "03 00000000000000 05 00000000000000"),
            "scales": floats([[[tiny * 0.25]]]),
            "zeros": floats([[1.5]]),
        })
        .add("table", scheme("codebook", 2, 0, "BF16"), [1, 4], roles={
            "planes": hexed("U8", (2, 1, 8), "03 00000000000000 05 00000000000000"),
            "scales": floats([[[tiny]]], "BF16"),
            "codebook": table,
        })
    )  # fmt: skip
    for name, weight in model.decoded().items():
        values = np.abs(weight.f32())
        assert np.any((values > 0) & (values < tiny)), name
    return model


def zero_model() -> Model:
    four = hexed("U8", (1, 4, 8), 4 * "01 00000000000000")
    model = (
        Model("signed-zero")
        .add("bcq", scheme("bcq", 1, 0, "F32", offset=True), [4, 2], roles={
            "planes": four,
            "scales": floats([[[0.0], [-0.0], [0.0], [-0.0]]]),
            "offsets": floats([[-0.0], [-0.0], [0.0], [0.0]]),
        })
        .add("plain", scheme("bcq", 1, 0, "F16"), [4, 2], roles={
            "planes": four,
            "scales": floats([[[0.0], [-0.0], [1.0], [-1.0]]], "F16"),
        })
        .add("uniform", scheme("uniform", 1, 0, "BF16"), [4, 2], roles={
            "planes": four,
            "scales": floats([[[1.0], [-1.0], [-0.0], [0.0]]], "BF16"),
            "zeros": floats([[1.0], [1.0], [0.0], [-0.0]], "BF16"),
        })
        .add("codebook", scheme("codebook", 1, 0, "F32"), [4, 2], roles={
            "planes": four,
            "scales": floats([[[1.0], [-1.0], [0.0], [-0.0]]]),
            "codebook": floats([-0.0, 1.0]),
        })
    )  # fmt: skip
    negative = sum(int(np.count_nonzero((t.f32() == 0) & np.signbit(t.f32()))) for t in model.decoded().values())
    assert negative > 0
    return model


def overflow_model() -> Model:
    big = float(np.float32(3e38))
    planes = hexed("U8", (2, 1, 8), "03 00000000000000 05 00000000000000")
    model = (
        Model("overflow")
        .add("bcq", scheme("bcq", 2, 0, "F32"), [1, 4], roles={"planes": planes, "scales": floats([[[big]], [[big]]])})
        .add("uniform", scheme("uniform", 2, 0, "F32"), [1, 4], roles={
            "planes": planes, "scales": floats([[[big]]]), "zeros": floats([[1.5]]),
        })
        .add("codebook", scheme("codebook", 2, 0, "F32"), [1, 4], roles={
            "planes": planes, "scales": floats([[[big]]]), "codebook": floats([-2, -1, 1, 2]),
        })
    )  # fmt: skip
    with np.errstate(all="ignore"):
        assert all(np.isinf(tensor.f32()).any() for tensor in model.decoded().values())
    return model
