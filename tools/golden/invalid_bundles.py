"""Task bundles that break a rule."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .bundles import Bundle, InvalidBundle, bundle_bases, random_delta, saved_base
from .cases import Invalid, Valid, refused
from .files import Files, digest_metadata, floats, hexed, pretty, random_planes, replaced, with_bytes
from .reader import Tensor, Tensors


def invalid_bundles() -> Iterator[InvalidBundle]:
    _, base, edge, named, _, plain = bundle_bases()
    good: Tensors = {"layers.0.fc.scales.mul": random_delta("good", 1, 2)}
    prints = base.model.fingerprints()

    def wrong(slug: str, rule: str, about: str, bundle: Bundle | Files) -> InvalidBundle:
        files = bundle.files() if isinstance(bundle, Bundle) else bundle
        return InvalidBundle(f"{rule.lower()}-{slug}", rule, about, f"valid/{base.name}/model", files)

    def configured(slug: str, rule: str, about: str, **changes: Any) -> InvalidBundle:
        return wrong(slug, rule, about, Bundle(base, good, changes))

    def without(slug: str, rule: str, key: str) -> InvalidBundle:
        bundle = Bundle(base, good)
        config = {name: value for name, value in bundle.config().items() if name != key}
        return wrong(slug, rule, f"No {key}.", {**bundle.files(), "task_config.json": pretty(config)})

    def holding(slug: str, rule: str, about: str, deltas: Tensors, **changes: Any) -> InvalidBundle:
        return wrong(slug, rule, about, Bundle(base, deltas, changes))

    files = Bundle(base, good).files()
    yield configured("format", "TSK-1", "Another format.", format="peft")
    yield without("no-format", "TSK-1", "format")
    yield configured("version", "TSK-1", "format_version without a minor version.", format_version="1")
    yield configured("major", "TSK-1", "Another major version.", format_version="2.0")
    twice = replaced(files["task_config.json"], '"revision": null', '"revision": null, "revision": null')
    yield wrong("key-twice", "TSK-1", "A key twice.", {**files, "task_config.json": twice})
    array = pretty([Bundle(base, good).config()])
    yield wrong("array", "TSK-1", "task_config.json is a list.", {**files, "task_config.json": array})
    for name in ("NaN", "-Infinity"):
        constant = replaced(files["task_config.json"], '"revision": null', f'"revision": null, "note": {name}')
        yield wrong(name.lower(), "TSK-1", f"{name} under an unknown key.", {**files, "task_config.json": constant})
    for slug, number in {"1e999": "1e999", "long-integer": "9" * 5000}.items():
        large = replaced(files["task_config.json"], '"revision": null', f'"revision": null, "note": {number}')
        about = "A number under an unknown key that counts as Infinity."
        yield wrong(slug, "TSK-1", about, {**files, "task_config.json": large})
    deep = '"revision": null, "note": ' + "[" * 64 + "]" * 64
    deep_config = replaced(files["task_config.json"], '"revision": null', deep)
    yield wrong("depth-65", "TSK-1", "task_config.json of 65 levels.", {**files, "task_config.json": deep_config})
    marked = b"\xef\xbb\xbf" + files["task_config.json"]
    yield wrong("bom", "TSK-1", "A byte order mark.", {**files, "task_config.json": marked})
    latin = replaced(files["task_config.json"], "alphatuning", "m\u00e9thode").decode().encode("latin-1")
    yield wrong("latin-1", "TSK-1", "task_config.json is not UTF-8.", {**files, "task_config.json": latin})
    scales = {"task_scales.safetensors": files["task_scales.safetensors"]}
    yield wrong("no-file", "TSK-1", "No task_config.json.", scales)

    body = prints["fingerprint"]
    yield without("no-base", "TSK-2", "base_fingerprint")
    yield configured("base-short", "TSK-2", "A fingerprint of 63 digits.", base_fingerprint=body[:-1])
    yield configured("base-upper-case", "TSK-2", "A fingerprint in capital letters.", base_fingerprint=body.upper())
    yield configured("base-empty", "TSK-2", "An empty base_fingerprint.", base_fingerprint="")
    yield configured("base-null", "TSK-2", "base_fingerprint is null.", base_fingerprint=None)
    yield configured("head-null", "TSK-2", "head_fingerprint is null.", head_fingerprint=None)
    head = prints["head_fingerprint"].upper()
    yield configured("head-upper-case", "TSK-2", "A head_fingerprint in capital letters.", head_fingerprint=head)
    yield configured("head-number", "TSK-2", "head_fingerprint is a number.", head_fingerprint=0)
    yield configured("head-short", "TSK-2", "A head_fingerprint of one digit.", head_fingerprint="0")

    wrong_bits = {"string": "2", "true": True, "zero": 0, "fraction": 2.5, "list": [2], "negative": -2, "nine": 9}
    for slug, bits in {**wrong_bits, "float": 2.0}.items():
        yield configured(f"bits-{slug}", "TSK-3", f"bits is {json.dumps(bits)}.", bits=bits)
    yield configured("bundle-bits", "NST-3", "bits is 1, which the base does not have.", bits=1)
    about = "bits is 3, which the module with the delta has, and another module does not."
    yield configured("other-module", "NST-3", about, bits=3)
    for bits in (5, 8):
        about = f"bits is {bits}, and no module of the base has more than 4."
        yield configured(f"bundle-bits-{bits}", "NST-3", about, bits=bits)
    yield configured("revision", "TSK-4", "revision is a number.", revision=7)
    yield configured("name", "TSK-4", "base_model_name_or_path is a list.", base_model_name_or_path=["example/base"])
    name = "example/base\u001b[31m"
    yield configured(
        "control", "TSK-4", "A control character in base_model_name_or_path.", base_model_name_or_path=name
    )
    surrogate = replaced(files["task_config.json"], '"revision": null', r'"revision": "\ud800"')
    yield wrong("surrogate", "TSK-4", "A lone surrogate in revision.", {**files, "task_config.json": surrogate})
    yield without("no-method", "TSK-5", "method")
    yield configured("method", "TSK-5", "method is a number.", method=1)
    yield configured("method-null", "TSK-5", "method is null.", method=None)
    yield configured("method-control", "TSK-5", "A control character in method.", method="alpha\u007f")
    yield configured("modules-string", "TSK-5", "modules_to_save is a string.", modules_to_save="classifier")
    yield configured("modules-number", "TSK-5", "modules_to_save holds a number.", modules_to_save=[1])
    yield configured("modules-null", "TSK-5", "modules_to_save is null.", modules_to_save=None)

    for slug, task in {
        "list": [],
        "kind": {"kind": None},
        "kind-control": {"kind": "class\u0007"},
        "labels": {"labels": {"0": "no"}},
        "label-number": {"labels": ["no", 1]},
        "label-empty": {"labels": ["no", ""]},
        "label-control": {"labels": ["no", "y\nes"]},
        "label-twice": {"labels": ["no", "yes", "no"]},
        "metrics": {"metrics": [0.5]},
        "metric-string": {"metrics": {"accuracy": "0.5"}},
        "metric-true": {"metrics": {"accuracy": True}},
        "metric-unnamed": {"metrics": {"": 0.5}},
    }.items():
        about = f"task is {json.dumps(task)}."
        yield configured(f"task-{slug}", "TSK-12", about, format_version="1.1", task=task)

    delta = good["layers.0.fc.scales.mul"]
    yield holding("name", "TSK-6", "A tensor without an operation.", {**good, "layers.0.fc.scales": delta})
    yield holding("operation", "TSK-6", "An unknown operation.", {**good, "layers.0.fc.scales.div": delta})
    yield holding(
        "offsets-mul", "TSK-6", "mul for offsets.", {**good, "layers.0.fc.offsets.mul": random_delta("o", 2, 2)}
    )
    yield holding("planes", "TSK-6", "Planes.", {**good, "layers.0.fc.planes": random_planes("p", (3, 2), 6)})
    doubles = {"layers.0.fc.scales.mul": Tensor("F64", (1, 2), bytes(16))}
    yield holding("dtype", "TSK-6", "A delta in F64.", doubles)
    integers = {"layers.0.fc.scales.mul": Tensor("I32", (1, 2), bytes(8))}
    yield holding("integers", "TSK-6", "A delta in I32.", integers)
    content = files["task_scales.safetensors"]
    yield wrong(
        "bundle", "HDR-6", "A byte behind the last delta.", {**files, "task_scales.safetensors": content + b"\0"}
    )
    yield wrong(
        "bundle", "HDR-1", "A file that ends inside the header.", {**files, "task_scales.safetensors": content[:20]}
    )
    spoilt = Bundle(base, good, metadata=digest_metadata({"layers.0.fc.scales.mul": "0" * 64}))
    yield wrong("bundle", "DIG-3", "The digest of a delta differs.", spoilt)
    config = {"task_config.json": files["task_config.json"]}
    yield wrong("no-file", "TSK-6", "No task_scales.safetensors.", config)

    yield from shape_bundles(holding, good)
    yield from matching_bundles(holding, good)
    yield from saved_refusals(holding, good)
    yield from precision_refusals(base, good)
    yield from edge_refusals(edge)
    yield from named_refusals(named)
    yield from part_refusals(plain)


def saved_refusals(holding: Callable[..., InvalidBundle], good: Tensors) -> Iterator[InvalidBundle]:
    """TSK-5, TSK-6, TSK-10: modules to save."""
    weight = random_delta("w", 2, 6)

    def saving(slug: str, rule: str, about: str, listed: list[str], *names: str) -> InvalidBundle:
        tensors = {f"modules_to_save.{name}": weight for name in names}
        return holding(slug, rule, about, {**good, **tensors}, modules_to_save=listed)

    yield saving("modules-twice", "TSK-5", "A module listed twice.", ["head", "head"], "head.weight")
    yield saving("modules-empty", "TSK-5", "An empty path.", ["head", ""], "head.weight", ".weight")
    yield saving("modules-part", "TSK-5", "A path with an empty part.", ["head..dense"], "head..dense.weight")
    yield saving("modules-slash", "TSK-5", "A path with a slash.", ["../head"], "../head.weight")
    about = "The only tensor belongs to the longer of two listed paths."
    yield saving("longest", "TSK-10", about, ["a", "a.b"], "a.b.weight")
    yield saving("no-parameter", "TSK-10", "A name without a parameter.", ["head"], "head.weight", "head.")
    yield saving("only-module", "TSK-10", "A name without a parameter and its dot.", ["head"], "head.weight", "head")
    yield saving("like-a-delta", "TSK-10", "A saved parameter named like a delta.", [], "layers.0.fc.scales.mul")
    fc = "layers.0.fc"
    yield saving("quantized", "TSK-10", "A quantized module.", [fc], f"{fc}.weight")
    yield saving("full-path", "TSK-10", "A quantized module by its whole path.", [f"model.{fc}"], f"model.{fc}.weight")
    yield saving(
        "above-quantized", "TSK-10", "A module with quantized ones in it.", ["layers.0"], "layers.0.norm.weight"
    )
    yield saving("below-quantized", "TSK-10", "A module inside of a quantized one.", [f"{fc}.x"], f"{fc}.x.weight")
    yield saving("experts", "TSK-10", "A module with quantized experts.", ["experts"], "experts.w")
    yield saving("quantized-head", "TSK-10", "A quantized module of the head.", ["score"], "score.weight")


def precision_refusals(base: Valid, good: Tensors) -> Iterator[InvalidBundle]:
    """MAT-3: what README.md calls the precision to apply at."""
    path = f"valid/{base.name}/model"
    for slug, bits, at in (("own-at-2", None, 2), ("2-at-own", 2, None), ("2-at-4", 2, 4), ("4-at-2", 4, 2)):
        about = f"Tuned at {bits or 'the own'} bits, applied at {at or 'the own'}."
        yield InvalidBundle(f"mat-3-{slug}", "MAT-3", about, path, Bundle(base, good, {"bits": bits}).files(), at)
    about = "Tuned at the base's own bits, applied at 8; no module of the base has more than 4."
    yield InvalidBundle("nst-3-own-at-8", "NST-3", about, path, Bundle(base, good).files(), 8)


def edge_refusals(edge: Valid) -> Iterator[InvalidBundle]:
    """MAT-6: finite deltas that make a finite parameter infinite."""
    big = 2.0**127
    for slug, about, name, delta in (
        ("mul", "A scale of 2^127, doubled.", "huge.scales.mul", floats([[0.0, 1.0]])),
        ("scales", "A scale of 2^127 and a delta of 2^127.", "huge.scales.add", floats([[[0.0], [big]]])),
        ("offsets", "An offset of 2^127 and a delta of 2^127.", "huge.offsets.add", floats([[big], [0.0]])),
        ("zeros", "A zero of 2^127 and a delta of 2^127 in BF16.", "zp.zeros.add", floats([[big], [0.0]], "BF16")),
        ("rounds-up", "Half a step above the largest number.", "huge.offsets.add", floats([[big - 2.0**103], [0.0]])),
    ):
        bundle = Bundle(edge, {name: delta})
        with np.errstate(over="ignore"):
            assert any(np.isinf(tensor.f32()).any() for tensor in bundle.effective().values()), slug
        yield InvalidBundle(f"mat-6-{slug}", "MAT-6", about, f"valid/{edge.name}/model", bundle.files())


def named_refusals(named: Valid) -> Iterator[InvalidBundle]:
    """TSK-7, TSK-10, MAT-2: tied places, and names of body and head."""
    path = f"valid/{named.name}/model"
    tied = Bundle(named, {"lm_head.scales.mul": random_delta("tied", 1, 3)}).files()
    yield InvalidBundle("tsk-7-tied", "TSK-7", "A delta on a tied place.", path, tied)
    saved = {"modules_to_save.lm_head.weight": random_delta("lm_head", 3, 4)}
    files = Bundle(named, saved, {"modules_to_save": ["lm_head"]}).files()
    yield InvalidBundle("tsk-10-tied", "TSK-10", "A tied place is saved.", path, files)


def part_refusals(plain: Valid) -> Iterator[InvalidBundle]:
    """TSK-5, TSK-10, MAT-7, FPR-5."""
    path, six = f"valid/{plain.name}/model", random_delta("six", 6)

    def saving(slug: str, rule: str, about: str, listed: list[str], tensors: Tensors) -> InvalidBundle:
        saved = {f"modules_to_save.{name}": tensor for name, tensor in tensors.items()}
        files = Bundle(plain, saved, {"modules_to_save": listed}).files()
        return InvalidBundle(f"{rule.lower()}-{slug}", rule, about, path, files)

    about = "One module listed with the prefix and without, with two values."
    both = {"norm.weight": six, "model.norm.weight": random_delta("other", 6)}
    yield saving("prefix-twice", "TSK-5", about, ["norm", "model.norm"], both)
    about = "One parameter saved with the prefix and without, below different listed paths."
    below = {"a.b.weight": six, "model.a.b.weight": random_delta("other", 6)}
    yield saving("parameter-twice", "TSK-5", about, ["a", "model.a.b"], below)
    about = "The prefix itself, below which all quantized modules of the body lie."
    yield saving("prefix", "TSK-10", about, ["model"], {"model.weight": six})
    about = "A saved parameter of five numbers where the base's files have six."
    yield saving("shape", "MAT-7", about, ["norm"], {"norm.weight": random_delta("five", 5)})
    about = "A saved parameter of the head with another shape than the base's files have."
    yield saving("shape-head", "MAT-7", about, ["classifier"], {"classifier.weight": random_delta("c", 3, 6)})

    damaged = "invalid/dig-3-bundle-base/model"
    files = Bundle(plain, {"fc.scales.mul": random_delta("fc", 1, 2)}).files()
    about = "The base has one flipped bit in its planes: it fits by digests, and is refused when its bytes are checked."
    yield InvalidBundle("dig-3-base", "DIG-3", about, damaged, files, verify=True)


def damaged_base() -> Invalid:
    """The base of saved modules with one bit of its planes flipped, and the digests as they were (DIG-3, FPR-5)."""
    model = saved_base()
    planes = model.tensors["model.fc.planes"]
    model.tensors["model.fc.planes"] = with_bytes(planes, 0, f"{planes.data[0] ^ 1:02x}")
    about = "One bit of a plane is flipped. A fingerprint by digests is still that of the undamaged base."
    return refused("bundle-base", "DIG-3", about, model, "verify")


def shape_bundles(holding: Callable[..., InvalidBundle], good: Tensors) -> Iterator[InvalidBundle]:
    """TSK-7, TSK-9."""

    def mul(slug: str, about: str, name: str, *shape: int, **changes: Any) -> InvalidBundle:
        return holding(slug, "TSK-7", about, {name: random_delta("s", *shape)}, **changes)

    fc, up, experts = "layers.0.fc", "layers.0.up", "experts.w"
    yield mul("unknown-module", "A module that the base does not have.", "layers.9.fc.scales.mul", 1, 2)
    yield mul("full-path", "A path with the prefix, which is not canonical.", f"model.{fc}.scales.mul", 1, 2)
    yield mul("planes-4", "Four planes for a module of three.", f"{fc}.scales.mul", 4, 2)
    yield mul("planes-0", "No plane.", f"{fc}.scales.mul", 0, 2)
    yield mul("planes-k2", "Three planes at precision 2.", f"{fc}.scales.mul", 3, 2, bits=2)
    yield mul("planes-uniform", "Two planes for uniform.", f"{up}.scales.mul", 2, 3)
    yield mul("rows", "Three rows for a module of two.", f"{fc}.scales.mul", 1, 3)
    yield mul("groups", "One group for a module of two.", f"{fc}.scales.add", 1, 2, 1)
    yield mul("axes", "mul with an axis of groups.", f"{fc}.scales.mul", 1, 2, 2)
    yield mul("offsets-axes", "offsets with an axis of planes.", f"{fc}.offsets.add", 1, 2, 2)
    yield mul("zeros-rows", "zeros for the wrong number of rows.", f"{up}.zeros.add", 1, 3)
    yield mul("experts", "No axis of experts.", f"{experts}.scales.mul", 2, 3)
    yield mul("experts-fewer", "One expert of two.", f"{experts}.scales.mul", 1, 2, 3)
    yield mul("no-offsets", "offsets for a module without them.", "score.offsets.add", 2, 1)
    yield mul("no-zeros", "zeros for a module of bcq.", f"{fc}.zeros.add", 2, 2)

    both = {**good, f"{fc}.scales.add": random_delta("add", 1, 2, 2)}
    yield holding("both", "TSK-9", "mul and add for one module.", both)
    for slug, text in {"nan": "00 00 c0 7f", "inf": "00 00 80 7f"}.items():
        bad = with_bytes(good[f"{fc}.scales.mul"], 4, text)
        yield holding(slug, "TSK-9", f"A delta that is {slug}.", {f"{fc}.scales.mul": bad})
    for slug, text in {"inf-bf16": "00 00 80 ff", "nan-bf16": "00 00 81 7f"}.items():
        special = {f"{fc}.scales.mul": hexed("BF16", (1, 2), text)}
        yield holding(slug, "TSK-9", f"{slug[:3]} in a delta in BF16.", special)
    yield holding(
        "inf-f16", "TSK-9", "Infinity in a delta in F16.", {f"{fc}.scales.mul": hexed("F16", (1, 2), "00 00 00 fc")}
    )


def matching_bundles(holding: Callable[..., InvalidBundle], good: Tensors) -> Iterator[InvalidBundle]:
    """TSK-10, TSK-11, MAT-1, MAT-2."""
    saved = {"modules_to_save.classifier.weight": random_delta("w", 2, 6)}
    yield holding("unlisted", "TSK-10", "A saved tensor of a module that is not listed.", {**good, **saved})
    listed = ["classifier", "other"]
    yield holding("no-tensor", "TSK-10", "A listed module without a tensor.", {**good, **saved}, modules_to_save=listed)
    lookalike = {**good, "modules_to_save.classifiers.weight": random_delta("w", 2, 6), **saved}
    yield holding(
        "lookalike",
        "TSK-10",
        "A saved tensor whose module only begins like a listed one.",
        lookalike,
        modules_to_save=["classifier"],
    )
    yield holding("empty", "TSK-11", "No tensor.", {})
    yield holding("base", "MAT-1", "The bundle belongs to another base.", good, base_fingerprint="0" * 64)
    head = {"score.scales.mul": random_delta("h", 1, 2)}
    yield holding("head", "MAT-2", "A delta on the head, tuned on another head.", head, head_fingerprint="0" * 64)
    yield holding("no-head", "MAT-2", "A delta on the head, tuned on a base without one.", head, head_fingerprint="")
