"""Models whose tensors break a rule: names, dtypes and shapes, values, padding bits, and digests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .cases import Invalid, refused
from .files import compact, digests_of, floats, hexed, random_floats, random_planes, with_bytes
from .models import Model, scheme, small
from .reader import Json, Tensor


def tensor_cases() -> Iterator[Invalid]:
    def changed(slug: str, about: str, changes: Mapping[str, Tensor | None], model: Model | None = None) -> Invalid:
        return altered(slug, "TEN-1", about, changes, model)

    tensors = small().tensors
    for role in ("planes", "scales", "offsets"):
        yield changed(f"no-{role}", f"No {role}.", {f"fc.{role}": None})
    none = small()
    none.tensors = {name: tensor for name, tensor in none.tensors.items() if name in ("fc.bias", "norm.weight")}
    yield refused("no-tensors", "TEN-1", "A module without any tensor.", none)

    planes, scales, offsets = (tensors[f"fc.{role}"] for role in ("planes", "scales", "offsets"))
    yield changed("planes-dtype", "planes in I8.", {"fc.planes": Tensor("I8", planes.shape, planes.data)})
    yield changed(
        "scales-dtype",
        "scales in BF16 where the scheme says F16.",
        {"fc.scales": Tensor("BF16", scales.shape, scales.data)},
    )
    yield changed("offsets-dtype", "offsets in F32 where the scheme says F16.", {"fc.offsets": floats(offsets.f32())})
    yield changed("planes-flat", "planes without the axis of rows.", {"fc.planes": Tensor("U8", (2, 8), planes.data)})
    yield changed("planes-swapped", "planes as [rows, bits, B].", {"fc.planes": Tensor("U8", (1, 2, 8), planes.data)})
    yield changed(
        "planes-narrow", "planes with rows of one byte.", {"fc.planes": Tensor("U8", (2, 1, 1), planes.data[::8])}
    )
    yield changed("planes-wide", "planes with rows of 16 bytes.", {"fc.planes": Tensor("U8", (2, 1, 16), bytes(32))})
    yield changed("planes-more", "One plane too many.", {"fc.planes": Tensor("U8", (3, 1, 8), planes.data + bytes(8))})
    yield changed(
        "scales-one",
        "scales of one plane for bcq of two bits.",
        {"fc.scales": Tensor("F16", (1, 1, 2), scales.data[:4])},
    )
    yield changed(
        "scales-groups",
        "scales of one group where there are two.",
        {"fc.scales": Tensor("F16", (2, 1, 1), scales.data[:4])},
    )
    yield changed(
        "offsets-shape", "offsets with an axis too many.", {"fc.offsets": Tensor("F16", (1, 1, 2), offsets.data)}
    )
    yield changed("scales-k1", "scales_k1 that nested does not list.", {"fc.scales_k1": floats([[[1.0, 1.0]]], "F16")})
    yield changed("zeros-bcq", "zeros for bcq.", {"fc.zeros": offsets})
    yield changed("codebook-bcq", "A codebook for bcq.", {"fc.codebook": floats([0, 1, 2, 3])})
    yield changed(
        "row-bits-extra", "row_bits that the scheme does not call for.", {"fc.row_bits": hexed("U8", (1,), "02")}
    )
    huge = small()
    huge.quant["modules"]["fc"]["shape"] = [2**31 - 1, 2**31 - 1]
    yield refused("huge-shape", "TEN-1", "A shape of (2^31-1)^2: nothing may be allocated for it.", huge)
    more = Model("huge").add("fc", scheme("bcq", 8), [1, 1, 1], "experts")
    more.quant["modules"]["fc"]["shape"] = [2**31 - 1] * 3
    yield refused("huge-experts", "TEN-1", "Experts of (2^31-1)^3: the sizes do not fit in 64 bits.", more)
    yield from codec_tensor_cases(changed)
    yield from neighbour_cases()


def altered(
    slug: str,
    rule: str,
    about: str,
    changes: Mapping[str, Tensor | None],
    model: Model | None = None,
    found_by: str = "open",
) -> Invalid:
    """The small model, or another, with tensors put in, replaced or (None) taken out."""
    model = model or small()
    for name, tensor in changes.items():
        if tensor is None:
            del model.tensors[name]
        else:
            model.tensors[name] = tensor
    return refused(slug, rule, about, model, found_by)


def codec_tensor_cases(changed: Callable[..., Invalid]) -> Iterator[Invalid]:
    plain = scheme("bcq", 2, 4)
    yield changed("offsets-extra", "offsets without offset.", {"fc.offsets": floats([[1, 1]], "F16")}, small(plain))
    nested = scheme("bcq", 4, 4, offset=True, nested=[2])
    yield changed("no-scales-k2", "No scales_k2.", {"fc.scales_k2": None}, small(nested))
    yield changed("no-offsets-k2", "No offsets_k2.", {"fc.offsets_k2": None}, small(nested))
    three = random_floats("k3", "F16", (3, 1, 2))
    yield changed("scales-k3", "scales_k3 that nested does not list.", {"fc.scales_k3": three}, small(nested))
    four = random_floats("k2", "F16", (4, 1, 2))
    yield changed("scales-k2-shape", "scales_k2 of four planes.", {"fc.scales_k2": four}, small(nested))
    bare = scheme("bcq", 4, 4, nested=[2])
    extra = {"fc.offsets_k2": floats([[1, 1]], "F16")}
    yield changed("offsets-k2-extra", "offsets_k2 without offset.", extra, small(bare))
    uniform = scheme("uniform", 3, 4, nested=[2])
    yield changed("no-zeros", "uniform without zeros.", {"fc.zeros": None}, small(uniform))
    yield changed("no-zeros-k2", "uniform without zeros_k2.", {"fc.zeros_k2": None}, small(uniform))
    yield changed("offsets-uniform", "offsets for uniform.", {"fc.offsets": floats([[1, 1]], "F16")}, small(uniform))
    affine = scheme("affine", 3, 4, nested=[2])
    yield changed("no-offsets-affine", "affine without offsets.", {"fc.offsets": None}, small(affine))
    yield changed("no-offsets-k2-affine", "affine without offsets_k2.", {"fc.offsets_k2": None}, small(affine))
    yield changed("zeros-affine", "zeros for affine.", {"fc.zeros": floats([[1, 1]], "F16")}, small(affine))
    per_plane = {"fc.scales": random_floats("a", "F16", (3, 1, 2))}
    yield changed("scales-affine", "affine with scales for each plane.", per_plane, small(affine))
    per_plane = {"fc.scales": random_floats("u", "F16", (3, 1, 2))}
    yield changed("scales-uniform", "uniform with scales for each plane.", per_plane, small(uniform))
    table = scheme("codebook", 2, 4)
    yield changed("no-codebook", "codebook without its table.", {"fc.codebook": None}, small(table))
    half = {"fc.codebook": floats([0, 1, 2, 3], "F16")}
    yield changed("codebook-dtype", "A table in scale_dtype and not in F32.", half, small(table))
    yield changed("codebook-short", "A table of three levels.", {"fc.codebook": floats([0, 1, 2])}, small(table))

    def ragged() -> Model:
        return small(scheme("bcq", 3, row_bits=True), shape=[3, 2], row_bits=[1, 3, 2])

    yield changed("no-row-bits", "No row_bits.", {"fc.row_bits": None}, ragged())
    yield changed("row-bits-dtype", "row_bits in I8.", {"fc.row_bits": Tensor("I8", (3,), b"\1\3\2")}, ragged())
    yield changed(
        "row-bits-shape", "row_bits as [rows, 1].", {"fc.row_bits": Tensor("U8", (3, 1), b"\1\3\2")}, ragged()
    )
    full = {"fc.planes": Tensor("U8", (3, 2, 8), bytes(48))}
    yield changed("ragged-planes-three-axes", "planes with three axes beside row_bits.", full, ragged())
    thin = {"fc.planes": Tensor("U8", (6, 1), bytes(6))}
    yield changed("ragged-planes-narrow", "planes with rows of one byte beside row_bits.", thin, ragged())

    def experts() -> Model:
        return Model("experts").add("fc", scheme("bcq", 2), [2, 1, 5], "experts")

    yield changed("experts-no-scales", "Experts without scales.", {"fc_scales": None}, experts())
    yield changed(
        "experts-zeros", "zeros for experts of bcq.", {"fc_zeros": random_floats("z", "F16", (2, 1, 1))}, experts()
    )
    one = {"fc_planes": Tensor("U8", (2, 2, 8), bytes(32))}
    yield changed("experts-planes-shape", "Experts' planes without an axis.", one, experts())
    own = Model("own-table").add("fc", scheme("codebook", 1), [2, 1, 5], "experts")
    tables = {"fc_codebook": floats([[-1, 1], [-1, 1]])}
    yield changed("experts-codebooks", "A table for each expert where there is one for all.", tables, own)


def neighbour_cases() -> Iterator[Invalid]:
    """TEN-2, TEN-4, TIE-2: tensors that may not stand beside others."""
    yield altered("weight", "TEN-2", "weight beside planes.", {"fc.weight": random_floats("w", "F16", (1, 5))})
    experts = Model("experts").add("mlp.w", scheme("bcq", 1), [2, 1, 5], "experts")
    dense = {"mlp.w": random_floats("w", "F16", (2, 1, 5))}
    yield altered("experts", "TEN-2", "The parameter itself beside its planes.", dense, experts)
    planes = small().tensors["fc.planes"]
    yield altered("orphan", "TEN-4", "planes of a module that is not listed.", {"other.planes": planes})
    yield altered("orphan-experts", "TEN-4", "planes of experts that are not listed.", {"other_planes": planes})
    inner = {"fc.inner.planes": planes}
    yield altered("orphan-below", "TEN-4", "planes of a module below a listed one.", inner)

    def tied(pairs: Json) -> Model:
        model = small()
        model.quant["tied"] = pairs
        return model

    yield refused("self", "TIE-2", "A key of tied that is in modules.", tied({"fc": "fc"}))
    yield refused("unknown", "TIE-2", "A value of tied that is not in modules.", tied({"lm_head": "embed"}))
    yield refused("chain", "TIE-2", "A value of tied that is itself tied.", tied({"lm_head": "fc", "other": "lm_head"}))
    scales = {"lm_head.scales": small().tensors["fc.scales"]}
    yield altered("tensors", "TIE-2", "scales under a key of tied.", scales, tied({"lm_head": "fc"}))
    for slug, name in {"weight": "lm_head.weight", "parameter": "lm_head", "underscore": "lm_head_zeros_k3"}.items():
        about = f"{name} beside a key of tied, whatever the kind of the owner."
        yield altered(slug, "TIE-2", about, {name: random_floats(name, "F16", (1, 5))}, tied({"lm_head": "fc"}))
    twin = Model("twin").add("mlp.w", scheme("bcq", 1), [2, 1, 5], "experts")
    twin.quant["tied"] = {"mlp.v": "mlp.w"}
    dotted = {"mlp.v.codebook": floats([-1, 1])}
    yield altered("dot", "TIE-2", "A tensor named with a dot under a key tied to experts.", dotted, twin)


def data_cases() -> Iterator[Invalid]:
    """What only the tensors' data can show."""
    yield from finite_cases()
    yield from padding_cases()

    def ragged(row_bits: str, rows_of_planes: int) -> Model:
        model = small(scheme("uniform", 3, row_bits=True), shape=[3, 2], row_bits=[1, 3, 2])
        model.tensors["fc.row_bits"] = hexed("U8", (3,), row_bits)
        model.tensors["fc.planes"] = random_planes("ragged", (rows_of_planes,), 2)
        return model

    for slug, rule, about, row_bits, total in (
        ("zero", "MIX-1", "A row of 0 bits.", "00 03 02", 5),
        ("above", "MIX-1", "A row of more bits than the scheme has.", "01 04 02", 7),
        ("fewer", "MIX-2", "planes has one row fewer than the sum of row_bits.", "01 03 02", 5),
        ("more", "MIX-2", "planes has one row more than the sum of row_bits.", "01 03 02", 7),
    ):
        yield refused(slug, rule, about, ragged(row_bits, total), "verify")

    experts = Model("experts").add("fc", scheme("bcq", 2), [1, 2, 5], "experts")
    next(iter(experts.quant["schemes"].values()))["row_bits"] = True
    yield refused("row-bits", "EXP-2", "row_bits for experts.", experts)
    yield from digest_cases()


def finite_cases() -> Iterator[Invalid]:
    def spoilt(slug: str, about: str, role: str, at: int, text: str, stored: Json, **more: Any) -> Invalid:
        model = small(stored)
        tensor = with_bytes(model.tensors[f"fc.{role}"], at, text)
        return altered(slug, "TEN-3", about, {f"fc.{role}": tensor}, model, "verify")

    half = scheme("bcq", 3, 4, offset=True, nested=[2])
    yield spoilt("scales-nan", "NaN in F16 scales.", "scales", 2, "00 7e", half)
    yield spoilt("scales-inf", "Infinity in F16 scales.", "scales", 0, "00 7c", half)
    yield spoilt("scales-negative-inf", "Negative infinity in F16 scales.", "scales", 10, "00 fc", half)
    yield spoilt("scales-signalling-nan", "A signalling NaN in F16 scales.", "scales", 10, "01 7c", half)
    yield spoilt("offsets-nan", "NaN in offsets.", "offsets", 2, "00 fe", half)
    yield spoilt("scales-k2-nan", "NaN in scales_k2.", "scales_k2", 0, "00 7e", half)
    yield spoilt("offsets-k2-inf", "Infinity in offsets_k2.", "offsets_k2", 0, "00 7c", half)
    yield spoilt("scales-bf16-nan", "NaN in BF16 scales.", "scales", 0, "c0 7f", scheme("bcq", 2, 4, "BF16"))
    yield spoilt("scales-bf16-inf", "Infinity in BF16 scales.", "scales", 0, "80 7f", scheme("bcq", 2, 4, "BF16"))
    yield spoilt("scales-f32-nan", "NaN in F32 scales.", "scales", 4, "01 00 80 7f", scheme("bcq", 2, 4, "F32"))
    yield spoilt("zeros-inf", "Infinity in zeros.", "zeros", 0, "00 7c", scheme("uniform", 2, 4))
    yield spoilt("codebook-nan", "NaN in the codebook.", "codebook", 12, "00 00 c0 7f", scheme("codebook", 2, 4))


def padding_cases() -> Iterator[Invalid]:
    def dirty(slug: str, about: str, model: Model, name: str, at: int, value: int) -> Invalid:
        tensor = model.tensors[name]
        spoilt = with_bytes(tensor, at, f"{tensor.data[at] | value:02x}")
        assert spoilt != tensor
        return altered(slug, "BIT-3", about, {name: spoilt}, model, "verify")

    yield dirty("next-column", "The bit behind the last column is 1.", small(), "fc.planes", 0, 1 << 5)
    yield dirty("last-byte", "The last bit of a row is 1.", small(), "fc.planes", 7, 1 << 7)
    yield dirty("last-plane", "A bit behind the columns of the last plane is 1.", small(), "fc.planes", 9, 1)
    wide = small(scheme("bcq", 1), shape=[2, 65])
    yield dirty("second-word", "A bit behind column 64 of 65 is 1.", wide, "fc.planes", 8, 2)
    ragged = small(scheme("uniform", 3, row_bits=True), shape=[3, 2], row_bits=[1, 3, 2])
    yield dirty("ragged", "A bit behind the columns of a ragged module is 1.", ragged, "fc.planes", 40, 4)
    experts = Model("experts").add("fc", scheme("bcq", 2), [2, 1, 5], "experts")
    yield dirty("experts", "A bit behind the columns of the last expert is 1.", experts, "fc_planes", 30, 1)


def digest_cases() -> Iterator[Invalid]:
    def hashed(slug: str, rule: str, about: str, text: str, found_by: str = "open") -> Invalid:
        model = small()
        model.metadata = {"lowbit.digests": text}
        return refused(slug, rule, about, model, found_by)

    right = digests_of(small().tensors)
    bias = right["fc.bias"]
    assert bias != bias.upper()
    yield hashed("not-json", "DIG-1", "The digests are not JSON.", "sha256")
    yield hashed("array", "DIG-1", "The digests are a list.", compact(list(right.values())))
    for slug, value in {
        "upper-case": bias.upper(), "short": bias[:-1], "long": bias + "0", "line-feed": bias + "\n",
        "not-hex": "g" + bias[1:], "number": 1, "null": None, "empty": "",
    }.items():  # fmt: skip
        yield hashed(slug, "DIG-1", f"A digest that is ill-formed: {slug}.", compact({**right, "fc.bias": value}))
    yield hashed("byte-order-mark", "DIG-1", "A byte order mark before the digests.", "\ufeff" + compact(right))
    absent = compact({**right, "in.another.file": "x"})
    yield hashed("absent-tensor", "DIG-1", "An ill-formed digest for a tensor not in this file.", absent)
    wrong = hashlib.sha256(b"other").hexdigest()
    for name in ("fc.planes", "norm.weight"):
        about = f"The digest of {name} differs."
        yield hashed(name.replace(".", "-"), "DIG-3", about, compact({**right, name: wrong}), "verify")
