"""Models with the codec affine (DEC-7), which the format has since version 1.1."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .cases import Valid
from .files import bytes_tensor, floats, hexed
from .models import Model, scheme
from .reader import Tensors
from .rounding import exactly, nearest32, search

CODE = 11  # whose weights are sensitive to how they are rounded


def affine_example() -> Model:
    roles = {
        "planes": hexed("U8", (2, 1, 8), "05 00000000000000 01 00000000000000"),
        "scales": hexed("F16", (1, 1, 2), "00 38 00 b4"),
        "offsets": hexed("F16", (1, 2), "00 be 00 2c"),
    }
    model = Model("affine-example").add("fc", scheme("affine", 2, 2), [1, 3], roles=roles)
    assert roles["scales"] == floats([[[0.5, -0.25]]], "F16")
    assert roles["offsets"] == floats([[-1.5, 0.0625]], "F16")
    assert np.array_equal(model.decoded()["fc"].f32(), np.array([[0, -1.5, -0.4375]], np.float32))
    return model


def wrong_sums(scale: np.float32, offset: np.float32) -> list[np.float32]:
    """Results of decoders that round once, or shift the code before they multiply it."""
    fused = nearest32(CODE * exactly(scale) + exactly(offset))
    return [fused, (np.float32(CODE) - -offset / scale) * scale]


def sensitive() -> tuple[Tensors, int]:
    rows = 4

    def wanted(draw: np.ndarray) -> bool:
        right = np.float32(CODE) * draw[0] + draw[1]
        return all(other != right for other in wrong_sums(draw[0], draw[1]))

    found = np.stack(search("rounding/affine", rows, 2, wanted))
    planes = np.zeros((4, rows, 8), np.uint8)
    for p in range(4):
        planes[p, :, 0] = 0b1010 | (CODE >> (3 - p) & 1)
    roles = {
        "planes": bytes_tensor(planes),
        "scales": floats(np.ascontiguousarray(found[:, 0])[None, :, None]),
        "offsets": floats(np.ascontiguousarray(found[:, 1:])),
    }
    return roles, rows


def rounding_model() -> Model:
    roles, rows = sensitive()
    model = Model("affine-rounding").add("fc", scheme("affine", 4, 0, "F32"), [rows, 4], roles=roles)
    for r, weight in enumerate(model.decoded()["fc"].f32()[:, 0]):
        assert weight not in wrong_sums(roles["scales"].f32()[0, r, 0], roles["offsets"].f32()[r, 0])
    return model


def edge_model() -> Model:
    """Zeros of either sign, subnormal weights, and weights that overflow."""
    four = hexed("U8", (1, 4, 8), 4 * "01 00000000000000")
    pair = hexed("U8", (2, 1, 8), "03 00000000000000 05 00000000000000")
    tiny, big = 2.0**-126, float(np.float32(3e38))
    model = (
        Model("affine-edges")
        .add("zero", scheme("affine", 1, 0, "BF16"), [4, 2], roles={
            "planes": four,
            "scales": floats([[[1.0], [-1.0], [-0.0], [0.0]]], "BF16"),
            "offsets": floats([[-0.0], [-0.0], [-0.0], [0.0]], "BF16"),
        })
        .add("subnormal", scheme("affine", 2, 0, "F32"), [1, 4], roles={
            "planes": pair, "scales": floats([[[tiny * 0.25]]]), "offsets": floats([[-tiny * 0.125]]),
        })
        .add("overflow", scheme("affine", 2, 0, "F32"), [1, 4], roles={
            "planes": pair, "scales": floats([[[big]]]), "offsets": floats([[-big]]),
        })
    )  # fmt: skip
    weights = {name: tensor.f32() for name, tensor in model.decoded().items()}
    assert np.any((weights["zero"] == 0) & np.signbit(weights["zero"]))
    assert np.any((weights["subnormal"] != 0) & (np.abs(weights["subnormal"]) < tiny))
    assert np.isinf(weights["overflow"]).any()
    assert np.isfinite(weights["overflow"]).any()
    return model


def affine_cases() -> Iterator[Valid]:
    yield Valid("affine-example", "Section 15.8 of FORMAT.md.", affine_example())
    shapes = [([3, 1], 0, "F16"), ([1, 63], 16, "BF16"), ([2, 64], 64, "F32"), ([2, 65], 64, "F16"),
              ([1, 127], 50, "BF16"), ([3, 7], 100, "F32"), ([5, 8], 1, "F16"), ([2, 130], 128, "F16")]  # fmt: skip
    every = Model("affine-bits")
    for bits, (shape, group_size, dtype) in enumerate(shapes, 1):
        every.add(f"layers.{bits}.fc", scheme("affine", bits, group_size, dtype), shape)
    yield Valid("affine-bits", "affine, 1 to 8 bits, awkward shapes, every dtype.", every.plain("norm.weight", 4))
    parts = (
        Model("affine-parts")
        .add("nested", scheme("affine", 8, 32, "F32", nested=[2, 4, 7]), [2, 65])
        .add("ragged", scheme("affine", 8, 0, "F32", row_bits=True), [4, 66], row_bits=[8, 1, 5, 3])
        .add("both", scheme("affine", 6, 0, row_bits=True, nested=[1, 4]), [4, 66], row_bits=[6, 1, 5, 3])
        .add("mlp.experts.up", scheme("affine", 3, 8, "F32", nested=[2]), [2, 2, 17], "experts")
        .add("mlp.experts.down", scheme("affine", 2, 0), [2, 3, 5], "experts_transposed")
        .add("h.c_attn", scheme("affine", 2, 4), [6, 5], "conv1d")
        .add("wte", scheme("affine", 4, 4), [7, 6], "embedding")
    )
    yield Valid("affine-parts", "affine: nested, rows with different bits, experts, conv1d, embedding.", parts)
    about = "Values where a fused operation, or a zero in the place of the offset, gives other bits (column 0)."
    yield Valid("affine-rounding", about, rounding_model())
    yield Valid("affine-edges", "affine: zeros of either sign, subnormal weights, infinite weights.", edge_model())
