"""Models that every reader must accept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from .affine import affine_cases
from .cases import Valid
from .files import (
    compact,
    data_of,
    digest_metadata,
    digests_of,
    file_of,
    floats,
    header_of,
    hexed,
    padded,
    replaced,
)
from .models import INDEX, Model, scheme, small
from .reader import ITEM_SIZE, Tensors
from .rounding import arithmetic_cases


def assert_weights(model: Model, path: str, weights: list[list[float]]) -> None:
    got = model.decoded()[path].f32()
    assert np.array_equal(got, np.array(weights, np.float32)), (path, got)


def bcq_example() -> Model:
    roles = {
        "planes": hexed("U8", (2, 1, 8), "0d 00 00 00 00 00 00 00 1b 00 00 00 00 00 00 00"),
        "scales": hexed("F16", (2, 1, 2), "00 3c 00 38 00 34 00 30"),
        "offsets": hexed("F16", (1, 2), "00 2c 00 bc"),
    }
    model = Model("bcq-example").add("fc", scheme("bcq", 2, 4, offset=True), [1, 5], roles=roles)
    assert roles["scales"] == floats([[[1.0, 0.5]], [[0.25, 0.125]]], "F16")
    assert roles["offsets"] == floats([[0.0625, -1.0]], "F16")
    assert_weights(model, "fc", [[1.3125, -0.6875, 0.8125, 1.3125, -1.375]])
    return model


def uniform_roles() -> Tensors:
    return {
        "planes": hexed("U8", (3, 1, 8), "05 00000000000000 04 00000000000000 05 00000000000000"),
        "scales": hexed("F16", (1, 1, 1), "00 38"),
        "zeros": hexed("F16", (1, 1), "00 43"),
    }


def uniform_example() -> Model:
    roles = uniform_roles()
    model = Model("uniform-example").add("fc", scheme("uniform", 3), [1, 3], roles=roles)
    assert roles["scales"] == floats([[[0.5]]], "F16")
    assert roles["zeros"] == floats([[3.5]], "F16")
    assert_weights(model, "fc", [[0.75, -1.75, 1.75]])
    return model


def codebook_example() -> Model:
    roles = {
        "planes": hexed("U8", (2, 2, 8), "01 00000000000000 02 00000000000000 00 00000000000000 01 00000000000000"),
        "scales": hexed("F32", (1, 2, 1), "00 00 00 40 00 00 00 3f"),
        "codebook": hexed("F32", (4,), "00 00 80 bf 00 00 00 00 00 00 80 3f 00 00 00 00"),
    }
    model = Model("codebook-example").add("fc", scheme("codebook", 2, scale_dtype="F32"), [2, 2], roles=roles)
    assert roles["scales"] == floats([[[2.0], [0.5]]])
    assert roles["codebook"] == floats([-1, 0, 1, 0])
    assert_weights(model, "fc", [[2.0, -2.0], [0.0, 0.5]])
    return model


def ragged_example() -> Model:
    roles = {
        "planes": hexed("U8", (6, 8), "".join(first + 7 * "00" for first in ("01", "03", "00", "02", "01", "01"))),
        "scales": floats([[[1], [2], [0.5]], [[0], [1], [0.25]], [[0], [0.5], [0]]]),
        "row_bits": hexed("U8", (3,), "01 03 02"),
    }
    model = Model("ragged-example").add("fc", scheme("bcq", 3, scale_dtype="F32", row_bits=True), [3, 2], roles=roles)
    assert_weights(model, "fc", [[1, -1], [1.5, 2.5], [-0.25, -0.75]])
    return model


def nested_example() -> Model:
    roles = {
        "planes": hexed("U8", (2, 1, 8), "05 00000000000000 06 00000000000000"),
        "scales": hexed("F32", (2, 1, 1), "00 00 00 40 00 00 00 3f"),
        "scales_k1": hexed("F32", (1, 1, 1), "00 00 10 40"),
    }
    model = Model("nested-example").add("fc", scheme("bcq", 2, scale_dtype="F32", nested=[1]), [1, 3], roles=roles)
    assert roles["scales"] == floats([[[2.0]], [[0.5]]])
    assert roles["scales_k1"] == floats([[[2.25]]])
    assert_weights(model, "fc", [[1.5, -1.5, 2.5]])
    assert_weights(model, "fc@k1", [[2.25, -2.25, 2.25]])
    return model


def experts_example() -> Model:
    roles = {
        "planes": hexed("U8", (2, 1, 2, 8), "".join(first + 7 * "00" for first in ("05", "02", "07", "00"))),
        "scales": hexed("F32", (2, 1, 2, 1), "00 00 80 3f 00 00 00 40 00 00 00 3f 00 00 80 3e"),
        "zeros": hexed("F32", (2, 2, 1), "00 00 00 3f 00 00 80 3f 00 00 00 00 00 00 00 c0"),
    }
    model = Model("experts-example").add(
        "mlp.experts.down_proj", scheme("uniform", 1, 0, "F32"), [2, 2, 3], "experts_transposed", roles=roles
    )
    assert roles["scales"] == floats([[[[1.0], [2.0]]], [[[0.5], [0.25]]]])
    assert roles["zeros"] == floats([[[0.5], [1.0]], [[0.0], [-2.0]]])
    weights = [[[0.5, -0.5, 0.5], [-2, 0, -2]], [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]]
    assert np.array_equal(model.decoded()["mlp.experts.down_proj"].f32(), np.array(weights, np.float32))
    return model


def fingerprint_example() -> Model:
    """The module of 15.2 as a body, and a head."""
    roles = {
        "planes": hexed("U8", (1, 2, 8), "02 00000000000000 01 00000000000000"),
        "scales": hexed("F16", (1, 2, 1), "00 3c 00 38"),
    }
    model = Model("fingerprint-example").add("model.fc", scheme("uniform", 3), [1, 3], roles=uniform_roles())
    model.add("score", scheme("bcq", 1), [2, 2], roles=roles)
    model.quant["base_model_prefix"] = "model"
    assert_weights(model, "score", [[-1, 1], [0.5, -0.5]])
    return model


def examples() -> Iterator[Valid]:
    yield Valid("bcq-example", "Section 15.1 of FORMAT.md.", bcq_example())
    yield Valid("uniform-example", "Section 15.2 of FORMAT.md.", uniform_example())
    yield Valid("codebook-example", "Section 15.3 of FORMAT.md.", codebook_example())
    yield Valid("ragged-example", "Section 15.4 of FORMAT.md.", ragged_example())
    yield Valid("nested-example", "Section 15.5 of FORMAT.md.", nested_example())
    yield Valid("experts-example", "Section 15.6 of FORMAT.md.", experts_example())
    yield Valid("fingerprint-example", "Section 15.7 of FORMAT.md.", fingerprint_example())


# (shape, group_size, scale_dtype): one for each number of bits, so that every odd width meets every dtype.
AWKWARD = [
    ([3, 1], 0, "F16"),
    ([1, 63], 16, "BF16"),
    ([2, 64], 64, "F32"),
    ([2, 65], 64, "F16"),
    ([1, 127], 50, "BF16"),
    ([3, 7], 100, "F32"),
    ([5, 8], 1, "F16"),
    ([2, 130], 128, "F16"),
]


def awkward_model(label: str, codec: str, widths: list[int], **more: Any) -> Model:
    model = Model(label)
    for bits in widths:
        shape, group_size, dtype = AWKWARD[bits - 1]
        model.add(f"layers.{bits}.fc", scheme(codec, bits, group_size, dtype, **more), shape)
    return model.plain("layers.1.fc.bias", 3).plain("norm.weight", 4, dtype="BF16")


def codec_cases() -> Iterator[Valid]:
    every = list(range(1, 9))
    shapes = "group size 0, short last groups, a group size above the columns, F16, BF16 and F32 with subnormals"
    yield Valid("bcq-bits", f"bcq, 1 to 8 bits, no offset; {shapes}.", awkward_model("bcq-bits", "bcq", every))
    yield Valid(
        "bcq-bits-offset",
        f"bcq, 1 to 8 bits, with offset; {shapes}.",
        awkward_model("bcq-bits-offset", "bcq", every, offset=True),
    )
    yield Valid(
        "uniform-bits",
        f"uniform, 1 to 8 bits, fractional zeros; {shapes}.",
        awkward_model("uniform-bits", "uniform", every),
    )
    yield Valid(
        "codebook-bits",
        f"codebook, 1 to 4 and 8 bits; {shapes}.",
        awkward_model("codebook-bits", "codebook", [1, 2, 3, 4, 8]),
    )
    largest = Model("largest-group-size").add("fc", scheme("uniform", 2, 2**31 - 1), [2, 9])
    yield Valid("largest-group-size", "The group size 2^31-1: one group.", largest)


def nested_cases() -> Iterator[Valid]:
    nested = (
        Model("nested")
        .add("a", scheme("bcq", 4, 16, offset=True, nested=[1, 2, 3]), [2, 37])
        .add("b", scheme("bcq", 3, 0, "BF16", nested=[2]), [3, 9])
        .add("c", scheme("uniform", 8, 32, "F32", nested=[2, 4, 7]), [2, 65])
        .add("d", scheme("uniform", 2, 0, nested=[1]), [2, 5])
        .add("e", scheme("codebook", 2, 0), [2, 5])
    )
    yield Valid("nested", "bcq and uniform with nested precisions beside a module that has none.", nested)
    ragged = (
        Model("ragged")
        .add("a", scheme("bcq", 4, 8, offset=True, row_bits=True), [5, 19], row_bits=[4, 1, 3, 2, 4])
        .add("b", scheme("uniform", 8, 0, "F32", row_bits=True), [4, 66], row_bits=[8, 1, 5, 3])
        .add("c", scheme("bcq", 4, 0, row_bits=True), [3, 4], row_bits=[1, 1, 1])
        .add("d", scheme("uniform", 2, 0, row_bits=True), [2, 4], row_bits=[2, 2])
    )
    yield Valid("ragged", "Rows with different bits; one module where no row has all bits, one where all have.", ragged)
    both = (
        Model("ragged-nested")
        .add("a", scheme("bcq", 4, 8, offset=True, row_bits=True, nested=[2, 3]), [5, 19], row_bits=[4, 1, 3, 2, 4])
        .add("b", scheme("uniform", 6, 0, "F32", row_bits=True, nested=[1, 4]), [4, 66], row_bits=[6, 1, 5, 3])
    )
    yield Valid("ragged-nested", "Rows with different bits that are also read at nested precisions.", both)


def kind_cases() -> Iterator[Valid]:
    experts = (
        Model("experts")
        .add("mlp.experts.gate_up_proj", scheme("bcq", 3, 8, offset=True), [3, 2, 17], "experts")
        .add("mlp.experts.down_proj", scheme("uniform", 4, 0, "BF16"), [3, 4, 5], "experts_transposed")
        .add("mlp.experts.lut", scheme("codebook", 2, 4, "F32"), [2, 1, 6], "experts")
        .add("mlp.experts.one", scheme("bcq", 1), [1, 1, 1], "experts_transposed")
        .add("mlp.experts.nested", scheme("bcq", 3, 4, offset=True, nested=[1, 2]), [2, 3, 6], "experts")
        .add("mlp.experts.nested_uniform", scheme("uniform", 3, 0, nested=[2]), [2, 2, 6], "experts_transposed")
        .plain("mlp.experts.gate_up_proj_bias", 3, 2)
    )
    yield Valid("experts", "Both kinds of experts for the three codecs, with one codebook for all experts.", experts)
    conv1d = (
        Model("conv1d").add("h.0.attn.c_attn", scheme("bcq", 2, 4), [6, 5], "conv1d").plain("h.0.attn.c_attn.bias", 6)
    )
    yield Valid("conv1d", "A module of kind conv1d; the expected weight is [rows, cols], not the parameter.", conv1d)
    embedding = Model("embedding").add("wte", scheme("uniform", 4, 4), [7, 6], "embedding").plain("ln_f.weight", 6)
    yield Valid("embedding", "A module of kind embedding.", embedding)
    tied = (
        Model("tied").add("model.embed_tokens", scheme("bcq", 3, 4), [5, 6], "embedding").plain("model.norm.weight", 6)
    )
    tied.quant["tied"] = {"lm_head": "model.embed_tokens"}
    yield Valid("tied", "An output head that uses the input embedding.", tied)
    prefix = head_model("base-model-prefix")
    yield Valid("base-model-prefix", "A body below base_model_prefix and a head beside it: two fingerprints.", prefix)
    unused = Model("prefix-unused").add("modelling.fc", scheme("bcq", 1), [2, 3]).add("model", scheme("bcq", 1), [2, 3])
    unused.quant["base_model_prefix"] = "model"
    yield Valid("prefix-unused", "No path begins with the prefix and a dot, so all paths are body.", unused)


def head_model(label: str) -> Model:
    model = (
        Model(label)
        .add("model.layers.0.fc", scheme("bcq", 2, 4), [3, 6])
        .add("model.model.fc", scheme("uniform", 2), [2, 3])
        .add("modelx.fc", scheme("bcq", 1), [2, 3])
        .add("score", scheme("bcq", 2, 4), [2, 6])
    )
    model.quant["base_model_prefix"] = "model"
    return model.plain("model.norm.weight", 6)


def container_cases() -> Iterator[Valid]:
    split = Model("sharded").add("a", scheme("bcq", 2, 4, offset=True), [2, 6]).add("b", scheme("codebook", 2), [2, 6])
    split.plain("norm.weight", 6)
    parts = (["a.planes", "b.scales", "norm.weight"], ["a.scales", "b.codebook"], ["b.planes", "a.offsets"])
    yield Valid(
        "sharded", "Three shards; the tensors of each module lie in different ones.", split, split.sharded(*parts)
    )

    odd = small(label="unaligned")
    files = odd.files()
    text = padded(compact(header_of(odd.tensors, odd.metadata))).rstrip(" ")
    text += " " * ((3 - len(text.encode())) % 8)
    files["model.safetensors"] = file_of(text, data_of(odd.tensors))
    yield Valid("unaligned", "The data begins at an odd byte.", odd, files)

    # The one-byte tensor in front puts every F16 and F32 tensor behind it at an odd address.
    inner = Model("unaligned-tensors").plain("first", 1, dtype="U8").add("fc", scheme("bcq", 2, 4, "F32"), [2, 6])
    yield Valid("unaligned-tensors", "A tensor of one byte in front leaves all others unaligned.", inner)

    spaces = small(label="padded")
    files = spaces.files()
    header = compact(header_of(spaces.tensors, spaces.metadata)) + " " * 100
    files["model.safetensors"] = file_of(header, data_of(spaces.tensors))
    yield Valid("padded", "A header with 100 spaces behind it.", spaces, files)

    order = small(label="header-order")
    files = order.files()
    listed = header_of(order.tensors, None)
    files["model.safetensors"] = file_of(compact(dict(sorted(listed.items(), reverse=True))), data_of(order.tensors))
    yield Valid(
        "header-order", "The header lists the tensors in another order than the data; no metadata.", order, files
    )

    other = small(label="other-dtypes")
    for dtype in ITEM_SIZE:
        other.plain(f"other.{dtype}", 3, dtype=dtype)
    other.plain("other.scalar", dtype="F32").plain("other.empty", 0, 4).plain("other.scales", 2)
    yield Valid("other-dtypes", "Other tensors of every dtype, a scalar, and an empty one.", other)

    yield from name_cases()
    yield from text_cases()
    yield from metadata_cases()


def name_cases() -> Iterator[Valid]:
    # U+FF5E sorts behind U+1F600 in UTF-16 and before it in UTF-8: FPR-3 sorts bytes.
    names = ["слой.0 fc", "a\uff5eb", "a\U0001f600b", "q\"'{}", "a", "a.b", "a-b", "a b"]
    model = Model("names")
    for name in names:
        model.add(name, scheme("bcq", 1), [1, 3])
    files = model.files()
    header = json.dumps(header_of(model.tensors, model.metadata))
    files["model.safetensors"] = file_of(header, data_of(model.tensors))
    yield Valid(
        "names", "Names outside ASCII, raw in config.json and escaped in the header; a sorting trap.", model, files
    )
    long = Model("long-name").add("m" * 512, scheme("bcq", 1), [1, 3]).plain("n" * 1024, 2)
    yield Valid("long-name", "A path of 512 and a tensor name of 1024 characters.", long)


def text_cases() -> Iterator[Valid]:
    """Conventions, DIR-8 to DIR-10."""
    smile = "\U0001f600"
    wide = Model("code-points").add(smile * 512, scheme("bcq", 1), [1, 3]).plain(smile * 1024, 2)
    about = "A path of 512 and a name of 1024 code points above U+FFFF, which are two units each in UTF-16."
    yield Valid("code-points", about, wide)

    zero = Model("minus-zero").add("fc", scheme("bcq", 1), [1, 3])
    files = zero.files()
    files["config.json"] = replaced(files["config.json"], '"group_size": 0', '"group_size": -0')
    header = compact(header_of(zero.tensors, zero.metadata)).replace('"data_offsets":[0,', '"data_offsets":[-0,')
    files["model.safetensors"] = file_of(padded(header), data_of(zero.tensors))
    yield Valid("minus-zero", "-0 is the integer 0, for group_size and in data_offsets.", zero, files)

    foreign = small(label="foreign-numbers")
    files = foreign.sharded(list(foreign.tensors))
    numbers = '"a": NaN, "b": Infinity, "c": -Infinity, "d": 1e999, "e": -1e999, "f": ' + "9" * 5000
    size = '"hidden_size": 8'
    files["config.json"] = replaced(files["config.json"], size, f"{size}, {numbers}")
    files[INDEX] = replaced(files[INDEX], '"total_size": 0', f'"total_size": 0, {numbers}')
    about = "Infinity in every form outside of quantization_config and weight_map, where it is accepted."
    yield Valid("foreign-numbers", about, foreign, files)

    finite = small(label="large-numbers")
    numbers = '"a": 1.7976931348623158e308, "b": ' + "1" + "7" * 308 + ', "c": 1e-999, "d": 0.' + "3" * 5000
    files = finite.files()
    files["config.json"] = replaced(files["config.json"], '"tied": {}', f'"tied": {{}}, {numbers}')
    about = "Numbers in quantization_config that are long, or nearly too large, and have a finite binary64 value."
    yield Valid("large-numbers", about, finite, files)

    deep = small(label="depth-64")
    files = deep.files()
    files["config.json"] = replaced(files["config.json"], size, f'{size}, "deep": ' + "[" * 63 + "]" * 63)
    yield Valid("depth-64", "config.json of 64 levels; the outermost object is the first.", deep, files)


def metadata_cases() -> Iterator[Valid]:
    full = small(label="digests")
    full.metadata = digest_metadata(digests_of(full.tensors))
    yield Valid("digests", "Every tensor has its digest.", full)
    part = small(label="digests-partial")
    some = {"fc.planes": part.tensors["fc.planes"].sha256(), "in.another.file": hashlib.sha256(b"").hexdigest()}
    part.metadata = digest_metadata(some)
    yield Valid("digests-partial", "One tensor has a digest; another digest is for a tensor not in this file.", part)

    newer = small(label="newer-minor")
    newer.quant |= {"format_version": "1.7", "made_by": {"tool": "example", "numbers": [1, 2.5, None]}}
    yield Valid("newer-minor", "format_version 1.7 and an unknown key beside schemes, which may be ignored.", newer)

    bare = Model("defaults").add("fc", scheme("bcq", 2), [2, 5])
    del bare.quant["tied"], bare.quant["base_model_prefix"]
    bare.metadata = None
    yield Valid("defaults", "Every optional key is absent.", bare)

    stated = Model("defaults-stated").add(
        "fc", scheme("bcq", 2, offset=False, row_bits=False, nested=[], label="two bits"), [2, 5]
    )
    yield Valid("defaults-stated", "Every optional key of a bcq scheme is present with its default.", stated)

    empty = Model("no-modules").plain("norm.weight", 4)
    yield Valid("no-modules", "No modules: the fingerprint is the SHA-256 of no bytes.", empty)


def valid_cases() -> Iterator[Valid]:
    yield from examples()
    yield from codec_cases()
    yield from nested_cases()
    yield from kind_cases()
    yield from container_cases()
    yield from arithmetic_cases()
    yield from affine_cases()
