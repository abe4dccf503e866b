"""Models whose configuration breaks a rule of section 2."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

from .cases import Invalid, refused
from .models import Model, scheme, small
from .reader import Json


def config_cases() -> Iterator[Invalid]:
    def edited(slug: str, rule: str, about: str, edit: Callable[[Json], Any], model: Model | None = None) -> Invalid:
        model = model or small()
        edit(model.quant)
        return refused(slug, rule, about, model)

    def put(**values: Any) -> Callable[[Json], Any]:
        return lambda quant: quant.update(values)

    def drop(key: str) -> Callable[[Json], Any]:
        return lambda quant: quant.pop(key)

    yield edited("method", "CFG-1", "quant_method is another method.", put(quant_method="gptq"))
    yield edited("method-missing", "CFG-1", "No quant_method.", drop("quant_method"))
    yield edited("version-missing", "CFG-1", "No format_version.", drop("format_version"))
    for slug, version in {
        "number": 1.0, "short": "1", "long": "1.0.0", "leading-zero": "01.0", "minor-leading-zero": "1.00",
        "sign": "+1.0", "space": " 1.0", "line-feed": "1.0\n", "other-digits": "1.\u0663", "empty-minor": "1.",
    }.items():  # fmt: skip
        about = f"format_version is {json.dumps(version)}."
        yield edited(f"version-{slug}", "CFG-1", about, put(format_version=version))
    yield edited("major-2", "VER-1", "Another major version.", put(format_version="2.0"))
    yield edited("major-0", "VER-1", "Another major version.", put(format_version="0.9"))
    yield edited("major-10", "VER-1", "A major version that begins with 1.", put(format_version="10.0"))

    yield edited("schemes-missing", "CFG-2", "No schemes.", drop("schemes"))
    yield edited("schemes-list", "CFG-2", "schemes is a list.", lambda q: q.update(schemes=list(q["schemes"].values())))
    yield edited(
        "empty-name", "CFG-2", "A scheme with an empty name.", lambda q: q["schemes"].update({"": scheme("bcq", 1)})
    )
    yield edited("scheme-list", "CFG-3", "A scheme is a list.", lambda q: q["schemes"].update(other=["bcq"]))
    yield from scheme_cases()

    yield edited("modules-missing", "CFG-4", "No modules.", drop("modules"), Model("none").plain("norm.weight", 2))
    yield edited("modules-list", "CFG-4", "modules is a list.", put(modules=[]), Model("none").plain("norm.weight", 2))
    for slug, path in {
        "empty": "", "long": "m" * 513, "control": "a\tb", "delete": "a\x7fb", "slash": "a/b", "backslash": "a\\b"
    }.items():  # fmt: skip
        # The tensors' names are as the path asks, unless the header itself would then be wrong.
        model = Model(slug).add(path, scheme("bcq", 1), [1, 3])
        if slug in ("control", "delete"):
            model.tensors = {}
        yield refused(f"path-{slug}", "CFG-4", f"A path that is not allowed: {slug}.", model)

    def entry(slug: str, rule: str, about: str, edit: Callable[[Json], Any], model: Model | None = None) -> Invalid:
        return edited(slug, rule, about, lambda quant: edit(quant["modules"]["fc"]), model)

    yield entry("scheme-unknown", "CFG-4", "A module names a scheme that does not exist.", put(scheme="none"))
    yield entry("scheme-number", "CFG-4", "A module's scheme is a number.", put(scheme=0))
    for key in ("scheme", "kind", "shape"):
        yield entry(f"no-{key}", "CFG-4", f"A module without {key}.", drop(key))
    yield entry("extra-key", "CFG-4", "A module with a fourth key.", put(dtype="F32"))
    yield edited("entry-list", "CFG-4", "A module's entry is a list.", lambda q: q["modules"].update(fc=["bcq-2-0"]))

    yield entry("unknown", "CFG-5", "A kind that does not exist.", put(kind="conv2d"))
    yield entry("case", "CFG-5", "A kind in capital letters.", put(kind="Linear"))
    yield entry("number", "CFG-5", "A kind that is a number.", put(kind=1))
    yield entry("three-numbers", "CFG-5", "A linear module with three numbers in its shape.", put(shape=[1, 1, 5]))
    yield entry("one-number", "CFG-5", "A linear module with one number in its shape.", put(shape=[5]))
    two = Model("two").add("fc", scheme("bcq", 1), [1, 2, 3], "experts")
    yield entry("experts-two-numbers", "CFG-5", "Experts with two numbers in their shape.", put(shape=[2, 3]), two)

    for slug, shape in {
        "zero": [0, 5], "negative": [-1, 5], "too-large": [2**31, 5], "too-large-cols": [1, 2**31],
        "beyond-i64": [2**63, 5],
        "wraps-to-1": [2**64 + 1, 5], "fraction": [1.5, 5], "string": ["1", 5], "null": [None, 5], "boolean": [True, 5],
    }.items():  # fmt: skip
        yield entry(slug, "CFG-6", f"The shape {json.dumps(shape)}.", put(shape=shape))

    wrong_tied: Json = {"list": [], "null": None, "value": {"lm_head": 1}}
    for slug, tied in wrong_tied.items():
        yield edited(f"tied-{slug}", "CFG-7", f"tied is {json.dumps(tied)}.", put(tied=tied))
    yield edited("tied-path", "CFG-4", "A path in tied that is not allowed.", put(tied={"a..b": "fc"}))
    for slug, prefix in {"null": None, "list": ["model"], "boolean": False}.items():
        yield edited(
            f"prefix-{slug}", "CFG-7", f"base_model_prefix is {json.dumps(prefix)}.", put(base_model_prefix=prefix)
        )


def scheme_cases() -> Iterator[Invalid]:
    """CFG-3. The tensors are what a reader without the check would expect, wherever there is such a thing."""

    def case(slug: str, about: str, built: Json, shape: list[int] | None = None, **changes: Any) -> Invalid:
        model = small(copy.deepcopy(built), shape=shape)
        (name,) = model.quant["schemes"]
        model.quant["schemes"][name].update(changes)
        return refused(slug, "CFG-3", about, model)

    plain, uniform, table = scheme("bcq", 2, 4), scheme("uniform", 2, 4), scheme("codebook", 2, 4)
    yield case("unknown-key", "A key that the scheme table does not have.", plain, rotation=True)
    yield case("codec", "An unknown codec.", plain, codec="int4")
    yield case("codec-case", "A codec in capital letters.", plain, codec="BCQ")
    yield case("dtype", "A scale_dtype that is not allowed.", plain, scale_dtype="F64")
    yield case("dtype-case", "A scale_dtype in small letters.", plain, scale_dtype="f16")
    for key in ("codec", "bits", "group_size", "scale_dtype"):
        model = small(copy.deepcopy(plain))
        del next(iter(model.quant["schemes"].values()))[key]
        yield refused(f"no-{key.replace('_', '-')}", "CFG-3", f"A scheme without {key}.", model)
    yield case("bits-0", "bits is 0.", plain, bits=0)
    yield case("bits-9", "bits is 9.", scheme("bcq", 9, 4))
    yield case("bits-negative", "bits is -1.", plain, bits=-1)
    yield case("bits-fraction", "bits is 2.5.", plain, bits=2.5)
    yield case("bits-string", "bits is a string.", plain, bits="2")
    yield case("bits-true", "bits is true, and the tensors are those of one bit.", scheme("bcq", 1, 4), bits=True)
    yield case("group-size-negative", "group_size is -1.", scheme("bcq", 2, 0), group_size=-1)
    yield case("group-size-large", "group_size is 2^31.", scheme("bcq", 2, 2**31))
    yield case("group-size-false", "group_size is false.", scheme("bcq", 2, 0), group_size=False)
    yield case("group-size-null", "group_size is null.", scheme("bcq", 2, 0), group_size=None)
    yield case("offset-number", "offset is 1.", scheme("bcq", 2, 4, offset=True), offset=1)
    yield case("offset-null", "offset is null.", plain, offset=None)
    yield case("row-bits-string", "row_bits is a string.", plain, row_bits="")
    yield case("label", "label is a number.", plain, label=7)
    yield case("offset-uniform", "offset for uniform.", uniform, offset=True)
    yield case("offset-codebook", "offset for codebook.", table, offset=True)
    yield case("offset-affine", "offset for affine, which always has offsets.", scheme("affine", 2, 4), offset=True)
    yield case("nested-codebook", "nested for codebook.", table, nested=[1])
    model = small(scheme("codebook", 2), shape=[3, 2])
    next(iter(model.quant["schemes"].values()))["row_bits"] = True
    yield refused("row-bits-codebook", "CFG-3", "row_bits for codebook.", model)
    wide = scheme("bcq", 4, 4)
    yield case("nested-number", "nested is a number.", scheme("bcq", 4, 4, nested=[2]), nested=2)
    yield case("nested-null", "nested is null.", wide, nested=None)
    yield case("nested-order", "nested is not ascending.", scheme("bcq", 4, 4, nested=[2, 1]))
    yield case("nested-twice", "nested has a number twice.", scheme("bcq", 4, 4, nested=[2]), nested=[2, 2])
    yield case("nested-0", "nested has 0.", wide, nested=[0])
    yield case("nested-bits", "nested has the full number of bits.", scheme("bcq", 4, 4, nested=[4]))
    yield case("nested-true", "nested has true.", scheme("bcq", 4, 4, nested=[1]), nested=[True])
    yield case("nested-string", "nested has a string.", scheme("bcq", 4, 4, nested=[2]), nested=["2"])
