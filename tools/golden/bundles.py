"""Task bundles that a reader must accept, and the models that they belong to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from .cases import Valid
from .files import Files, digest_metadata, digests_of, floats, hexed, pretty, random_floats, random_planes, safetensors
from .models import Model, scheme
from .reader import Json, Tensor, Tensors
from .rounding import exactly, nearest32, search
from .valid import fingerprint_example


def bundle_bases() -> Iterator[Valid]:
    yield Valid("bundle-example-base", "The base of section 4 of BUNDLE.md.", example_base())
    yield Valid(
        "bundle-base", "The base of the other bundles: all codecs, nested, experts, ragged, a head.", task_base()
    )
    yield Valid(
        "bundle-edge-base", "Parameters of -0.0, subnormal ones, and ones near the largest number.", edge_base()
    )
    yield Valid("bundle-names-base", "A module of the head named like one of the body, a tied place.", names_base())
    yield Valid("bundle-affine-base", "affine, nested and experts, for deltas on scales and offsets.", affine_base())
    yield Valid("bundle-saved-base", "Digests, and modules that are not quantized, for bundles to save.", saved_base())


def example_base() -> Model:
    roles = {
        "planes": random_planes("bundle-example-base", (2, 2), 3),
        "scales": floats([[[1.0], [2.0]], [[0.5], [0.25]]], "F16"),
    }
    return Model("bundle-example-base").add("fc", scheme("bcq", 2), [2, 3], roles=roles)


def task_base() -> Model:
    model = (
        Model("bundle-base")
        .add("model.layers.0.fc", scheme("bcq", 3, 4, offset=True, nested=[2]), [2, 6])
        .add("model.layers.0.up", scheme("uniform", 4, 0, "F32", nested=[2]), [3, 5])
        .add("model.layers.0.lut", scheme("codebook", 2, 4, "BF16"), [2, 6])
        .add("model.layers.0.ragged", scheme("bcq", 2, 0, row_bits=True), [3, 4], row_bits=[1, 2, 2])
        .add("model.experts.w", scheme("bcq", 2, 4, offset=True), [2, 3, 5], "experts")
        .add("score", scheme("bcq", 2), [2, 6])
    )
    model.quant["base_model_prefix"] = "model"
    return model


def affine_base() -> Model:
    return (
        Model("bundle-affine-base")
        .add("fc", scheme("affine", 3, 4, nested=[2]), [2, 6])
        .add("experts.w", scheme("affine", 2, 0, "F32"), [2, 3, 5], "experts")
    )


def edge_base() -> Model:
    """`big` and `zp` overflow where 2^127 is added once more, or a scale of 2^127 doubled."""
    big, small = 2.0**127, 2.0**-100
    model = Model("bundle-edge-base")
    zero = {"scales": floats([[[-0.0], [0.0]], [[-0.0], [1.0]]]), "offsets": floats([[-0.0], [0.0]])}
    tiny = {"scales": floats([[[2.0**-126], [-3 * 2.0**-149]]]), "zeros": floats([[2.0**-126], [1.0]])}
    huge = {"scales": floats([[[1.0], [big]]]), "offsets": floats([[big], [0.0]])}
    zp = {"scales": floats([[[small], [1.0]]]), "zeros": floats([[big], [-0.0]])}
    for path, stored, roles in (
        ("zero", scheme("bcq", 2, 0, "F32", offset=True), zero),
        ("tiny", scheme("uniform", 2, 0, "F32"), tiny),
        ("huge", scheme("bcq", 1, 0, "F32", offset=True), huge),
        ("zp", scheme("uniform", 2, 0, "F32"), zp),
    ):
        planes = random_planes(f"bundle-edge-base/{path}", (stored["bits"], 2), 3)
        model.add(path, stored, [2, 3], roles={"planes": planes, **roles})
    return model


def names_base() -> Model:
    model = (
        Model("bundle-names-base")
        .add("model.fc", scheme("bcq", 2), [2, 3])
        .add("fc", scheme("bcq", 2), [2, 3])
        .add("model.embed", scheme("uniform", 3, nested=[2]), [3, 4], "embedding")
    )
    model.quant["base_model_prefix"] = "model"
    model.quant["tied"] = {"lm_head": "model.embed"}
    return model


def saved_base() -> Model:
    model = Model("bundle-saved-base").add("model.fc", scheme("bcq", 2, 4), [2, 6])
    model.plain("model.norm.weight", 6).plain("model.norm.bias", 6).plain("classifier.weight", 2, 6)
    model.quant["base_model_prefix"] = "model"
    model.metadata = digest_metadata(digests_of(model.tensors))
    return model


@dataclass
class Bundle:
    """A task bundle in the making."""

    base: Valid
    deltas: Tensors
    changes: Json = field(default_factory=dict)
    metadata: dict[str, str] | None = None
    omitted: tuple[str, ...] = ()  # keys of task_config.json

    def config(self) -> Json:
        full = self.whole_config()
        return {key: value for key, value in full.items() if key not in self.omitted}

    def whole_config(self) -> Json:
        prints = self.base.model.fingerprints()
        return {
            "format": "lowbit-task",
            "format_version": "1.0",
            "base_model_name_or_path": "example/base",
            "revision": None,
            "base_fingerprint": prints["fingerprint"],
            "head_fingerprint": prints["head_fingerprint"],
            "method": "alphatuning",
            "bits": None,
            "modules_to_save": [],
            **self.changes,
        }

    def files(self) -> Files:
        scales = safetensors(self.deltas, self.metadata)
        return {"task_config.json": pretty(self.config()), "task_scales.safetensors": scales}

    def base_path(self) -> str:
        return f"valid/{self.base.name}/model"

    def effective(self) -> Tensors:
        """The scales, offsets and zeros, with the deltas applied, of every module that has a delta."""
        model, bits = self.base.model, self.whole_config()["bits"]
        body, head = model.body_and_head()
        names = body | {name: path for name, path in head.items() if name not in body}
        result: Tensors = {}
        for name, path in names.items():
            if not any(delta.rpartition(".")[0].rpartition(".")[0] == name for delta in self.deltas):
                continue
            module = model.module(path)
            suffix = "" if bits is None or module.scheme["bits"] <= bits else f"_k{bits}"
            for role in ("scales", "offsets", "zeros"):
                if role + suffix in module.roles:
                    value = module.roles[role + suffix].f32()
                    result[f"{name}.{role}"] = floats(adapted(value, f"{name}.{role}", self.deltas))
        return result


def adapted(value: np.ndarray, name: str, deltas: Tensors) -> np.ndarray:
    """The table of TSK-6. Planes are the third axis from the end, so experts need nothing of their own."""
    value = value.copy()
    if f"{name}.mul" in deltas:
        delta = deltas[f"{name}.mul"].f32()[..., None]
        p = delta.shape[-3]
        factor = np.float32(1) + delta
        value[..., :p, :, :] = value[..., :p, :, :] * factor
    if f"{name}.add" in deltas:
        delta = deltas[f"{name}.add"].f32()
        if name.endswith(".scales"):
            p = delta.shape[-3]
            value[..., :p, :, :] = value[..., :p, :, :] + delta
        else:
            value = value + delta
    return value


@dataclass(frozen=True)
class ValidBundle:
    name: str
    about: str
    bundle: Bundle
    at: int | str | None = "own"  # precision to apply it at

    def outputs(self) -> Files:
        bits = self.bundle.whole_config()["bits"] if self.at == "own" else self.at
        expected = {"base": self.bundle.base_path(), "bits": bits, "about": self.about}
        effective = self.bundle.effective()
        assert all(np.isfinite(tensor.f32()).all() for tensor in effective.values()), f"{self.name} breaks MAT-6"
        return {f"bundle/{path}": content for path, content in self.bundle.files().items()} | {
            "expected.safetensors": safetensors(effective),
            "expected.json": pretty(expected),
        }


@dataclass(frozen=True)
class InvalidBundle:
    name: str
    rule: str
    about: str
    base: str
    files: Files
    at: int | str | None = "own"  # precision to apply it at
    verify: bool = False  # the fault is in the base's data

    def outputs(self) -> Files:
        how: Json = {} if self.at == "own" else {"bits": self.at}
        how |= {"verify": True} if self.verify else {}
        expected = {"rule": self.rule, "base": self.base, **how, "about": self.about}
        bundle = {f"bundle/{path}": content for path, content in self.files.items()}
        return {**bundle, "expected.json": pretty(expected)}


def random_delta(label: str, *shape: int, dtype: str = "F32") -> Tensor:
    return random_floats(f"delta/{label}", dtype, shape)


def sensitive_delta(base: Model) -> Tensor:
    """Deltas for `layers.0.up` where `scale + scale * delta`, fused or not, differs from the two steps of TSK-8."""
    scales = base.module("model.layers.0.up").roles["scales"].f32()[0, :, 0]
    chosen: list[np.float32] = []
    for r, scale in enumerate(scales):

        def wanted(draw: np.ndarray, scale: np.float32 = scale) -> bool:
            right = scale * (np.float32(1) + draw[0])
            fused = nearest32(exactly(scale) + exactly(scale) * exactly(draw[0]))
            return right not in (fused, scale + scale * draw[0])

        chosen.append(search(f"bundle/rounding/{r}", 1, 1, wanted)[0][0])
    return floats(np.array(chosen, np.float32)[None, :])


def bundles() -> Iterator[ValidBundle]:
    example, base, edge, named, affine, plain = bundle_bases()
    yield from affine_bundles(affine)
    delta = hexed("F32", (1, 2), "00 00 00 3e 00 00 80 be")
    worked = Bundle(example, {"fc.scales.mul": delta})
    assert np.array_equal(delta.f32(), np.array([[0.125, -0.25]], np.float32))
    assert np.array_equal(worked.effective()["fc.scales"].f32()[..., 0], np.array([[1.125, 1.5], [0.5, 0.25]]))
    yield ValidBundle("example", "Section 4 of BUNDLE.md.", worked)
    headed = Valid("fingerprint-example", "", fingerprint_example())
    deltas = {
        "fc.zeros.add": hexed("F32", (1, 1), "00 00 80 be"),
        "score.scales.mul": hexed("F16", (1, 2), "00 38 00 b4"),
    }
    worked = Bundle(headed, deltas)
    assert worked.effective()["fc.zeros"] == floats([[3.25]])
    assert worked.effective()["fc.scales"] == floats([[[0.5]]])
    assert worked.effective()["score.scales"] == floats([[[1.5], [0.375]]])
    yield ValidBundle("example-head", "Section 4.2 of BUNDLE.md.", worked)

    every = {
        "layers.0.fc.scales.mul": random_delta("fc", 3, 2),
        "layers.0.fc.offsets.add": random_delta("fc.offsets", 2, 2, dtype="F16"),
        "layers.0.up.scales.add": random_delta("up", 1, 3, 1, dtype="BF16"),
        "layers.0.up.zeros.add": random_delta("up.zeros", 3, 1),
        "layers.0.lut.scales.mul": random_delta("lut", 1, 2, dtype="BF16"),
        "layers.0.ragged.scales.mul": random_delta("ragged", 2, 3, dtype="F16"),
        "experts.w.scales.mul": random_delta("experts", 2, 1, 3),
        "experts.w.offsets.add": random_delta("experts.offsets", 2, 3, 2),
        "score.scales.add": random_delta("score", 1, 2, 1),
    }
    yield ValidBundle(
        "all-deltas", "Every kind of delta in every dtype, on every kind of module and the head.", Bundle(base, every)
    )
    added = {
        "layers.0.fc.scales.add": random_delta("fc.add", 2, 2, 2),
        "experts.w.scales.add": random_delta("e", 2, 2, 3, 2),
    }
    yield ValidBundle(
        "scales-add", "Added deltas for some planes of a module and for all planes of experts.", Bundle(base, added)
    )

    nested = {
        "layers.0.fc.scales.mul": random_delta("k2", 2, 2),
        "layers.0.fc.offsets.add": random_delta("k2.offsets", 2, 2),
        "layers.0.up.zeros.add": random_delta("k2.zeros", 3, 1),
        "score.scales.mul": random_delta("k2.score", 2, 2),
    }
    yield ValidBundle(
        "nested", "Tuned at precision 2; a module of 2 bits uses its own scales.", Bundle(base, nested, {"bits": 2})
    )

    rounding = {"layers.0.up.scales.mul": sensitive_delta(base.model)}
    yield ValidBundle(
        "rounding", "Deltas where a fused or other order of operations gives other bits.", Bundle(base, rounding)
    )

    zero = {"layers.0.fc.scales.mul": floats([[0.0, -0.0]]), "layers.0.up.zeros.add": floats([[0.0], [-0.0], [0.0]])}
    yield ValidBundle("zero", "Zero deltas of both signs: the base's own values.", Bundle(base, zero))

    elsewhere = Bundle(base, {"layers.0.fc.scales.mul": random_delta("x", 1, 2)}, {"head_fingerprint": "0" * 64})
    yield ValidBundle("other-head", "Another head's fingerprint, which no delta of this bundle needs.", elsewhere)

    saved = {
        "layers.0.fc.scales.mul": random_delta("saved", 1, 2),
        "modules_to_save.classifier.weight": random_delta("w", 2, 6, dtype="F16"),
        "modules_to_save.classifier.bias": random_delta("b", 2),
        "modules_to_save.layers.0.norm.weight": random_delta("n", 6),
    }
    extra = {
        "modules_to_save": ["classifier", "layers.0.norm"],
        "revision": "main",
        "format_version": "1.3",
        "note": [1],
    }
    bundle = Bundle(base, saved, extra, digest_metadata(digests_of(saved)))
    yield ValidBundle(
        "modules-to-save", "Two modules kept whole, digests, a newer minor version, an unknown key.", bundle
    )
    only = Bundle(
        base, {"modules_to_save.classifier.weight": random_delta("w", 2, 6)}, {"modules_to_save": ["classifier"]}
    )
    yield ValidBundle("only-modules-to-save", "No delta at all, only a module kept whole.", only)
    yield from config_bundles(base)
    yield from saved_bundles(base)
    yield from part_bundles(plain)
    yield from edge_bundles(edge)
    yield from named_bundles(base, named)


def config_bundles(base: Valid) -> Iterator[ValidBundle]:
    """TSK-1, TSK-5, MAT-3."""
    deltas = {"layers.0.fc.scales.mul": random_delta("config", 3, 2), "layers.0.up.zeros.add": random_delta("z", 3, 1)}
    optional = ("base_model_name_or_path", "revision", "head_fingerprint", "bits", "modules_to_save")
    bare = Bundle(base, deltas, {"method": ""}, omitted=optional)
    yield ValidBundle("required-keys", "No key but the required ones; method is the empty string.", bare)
    unknown: Json = {
        "peft_type": "LORA", "modules": {"layers.0.fc": None}, "tied": [], "Bits": 9, "": 1e300, "huge": 10**30,
        "base_model_prefix": "x", "quant_method": "lowbit", "created": "2024-01-01\n", "deep": [[[[{}]]]],
    }  # fmt: skip
    bundle = Bundle(base, deltas, unknown, {"format": "np", "made by": "someone"})
    yield ValidBundle("unknown-keys", "Unknown keys in task_config.json and in the header's metadata.", bundle)
    task: Json = {
        "kind": "classification", "labels": ["negative", "so-so", "\u00fcber"], "metrics": {"accuracy": 0.5, "n": 12},
        "domain": {"films": None},
    }  # fmt: skip
    bundle = Bundle(base, deltas, {"format_version": "1.1", "task": task})
    yield ValidBundle("task", "What the task is, with a key that nobody knows.", bundle)
    for slug, told in {"null": None, "empty": {}, "another-kind": {"kind": "ranking", "labels": []}}.items():
        bundle = Bundle(base, deltas, {"format_version": "1.1", "task": told})
        yield ValidBundle(f"task-{slug}", "A task of which little or nothing is said.", bundle)
    bundle = Bundle(base, deltas, {"task": {"kind": 1, "labels": "yes", "metrics": []}})
    yield ValidBundle("task-in-1.0", "A key task that version 1.0 does not know and a reader ignores.", bundle)
    about = "Tuned at precision 4, which is the base's own: no module has more than 4 bits."
    yield ValidBundle("precision-4-at-own", about, Bundle(base, deltas, {"bits": 4}), at=None)


def saved_bundles(base: Valid) -> Iterator[ValidBundle]:
    """TSK-6, TSK-10."""
    integers = {
        "modules_to_save.norm.num_batches_tracked": hexed("I64", (), "07 00 00 00 00 00 00 80"),
        "modules_to_save.norm.mask": hexed("BOOL", (3,), "01 00 01"),
        "modules_to_save.norm.table": hexed("F8_E4M3", (2, 1), "7f 80"),
        "modules_to_save.norm.empty": hexed("C64", (0, 2), ""),
    }
    about = "Saved tensors that are not floats, with no axis, and with no number."
    yield ValidBundle("saved-dtypes", about, Bundle(base, integers, {"modules_to_save": ["norm"]}))
    dotted = {
        "layers.0.fc.scales.mul": random_delta("dotted", 1, 2),
        "modules_to_save.a.weight": random_delta("a.weight", 2),
        "modules_to_save.a.b.weight": random_delta("a.b.weight", 3),
        "modules_to_save.a.bc.parametrizations.weight.original0": random_delta("a.bc", 1),
        "modules_to_save.c.d.e": random_delta("c.d.e", 2),
        "modules_to_save.modules_to_save.scales.mul": hexed("U8", (1,), "01"),
    }
    listed = {"modules_to_save": ["a", "a.b", "c", "modules_to_save"]}
    about = "Parameters with dots in their names, listed modules inside of one another, a parameter named like a delta."
    yield ValidBundle("saved-dots", about, Bundle(base, dotted, listed))


def part_bundles(plain: Valid) -> Iterator[ValidBundle]:
    """TSK-5, MAT-7."""
    weight = random_delta("part", 6)
    bundle = Bundle(plain, {"modules_to_save.norm.weight": weight}, {"modules_to_save": ["norm"]})
    yield ValidBundle("saved-part", "A module saved in part: its bias stays the model's own.", bundle)
    prefixed = {"modules_to_save.model.norm.weight": weight, "modules_to_save.model.norm.bias": random_delta("p", 6)}
    bundle = Bundle(plain, prefixed, {"modules_to_save": ["model.norm"]})
    yield ValidBundle("saved-prefix", "A saved module with the prefix in front, which is taken off.", bundle)
    fresh = {"modules_to_save.score.weight": random_delta("score", 3, 6)}
    about = "A saved module that the base's files do not have: only a model can tell whether it fits."
    yield ValidBundle("saved-fresh", about, Bundle(plain, fresh, {"modules_to_save": ["score"]}))


def affine_bundles(affine: Valid) -> Iterator[ValidBundle]:
    """Scales and offsets of the codec affine; the scales do not change the offsets."""
    deltas = {
        "fc.scales.mul": random_delta("affine.fc", 1, 2),
        "fc.offsets.add": random_delta("affine.offsets", 2, 2),
        "experts.w.scales.add": random_delta("affine.experts", 2, 1, 3, 1),
    }
    yield ValidBundle("affine", "Deltas on affine modules.", Bundle(affine, deltas))
    nested = Bundle(affine, {"fc.scales.mul": random_delta("affine.nested", 1, 2)}, {"bits": 2})
    yield ValidBundle("affine-nested", "The same at a nested precision.", nested)


def edge_bundles(edge: Valid) -> Iterator[ValidBundle]:
    """MAT-5, TSK-8, and the edge of MAT-6."""
    added = {
        "zero.scales.add": floats([[[0.0], [-0.0]], [[-0.0], [0.0]]]),
        "zero.offsets.add": floats([[0.0], [-0.0]]),
        "zp.zeros.add": floats([[0.0], [0.0]]),
    }
    bundle = Bundle(edge, added)
    words = {name: tensor.f32().view(np.uint32).ravel() for name, tensor in bundle.effective().items()}
    assert words["zero.scales"].tolist() == [0, 0, 1 << 31, 127 << 23]
    assert words["zero.offsets"].tolist() == [0, 0]
    assert words["zp.zeros"][1] == 0
    yield ValidBundle("zero-add", "Zeros of both signs, added to zeros of both signs.", bundle)
    kept = {"zero.scales.mul": floats([[0.0, -0.0], [-0.0, 0.0]]), "zero.offsets.add": floats([[-0.0], [-0.0]])}
    yield ValidBundle("zero-kept", "Zero factors, and an added -0.0: -0.0 stays what it is.", Bundle(edge, kept))
    small = {
        "tiny.scales.mul": floats([[-0.75, 0.5]]),
        "tiny.zeros.add": floats([[-(2.0**-127)], [2.0**-149]]),
        "zero.scales.add": floats([[[2.0**-149], [-(2.0**-130)]]]),
    }
    bundle = Bundle(edge, small)
    assert bundle.effective()["tiny.scales"] == floats([[[2.0**-128], [-4 * 2.0**-149]]])
    yield ValidBundle("subnormal", "Subnormal deltas and effective values, which are kept; a tie to even.", bundle)
    most = {"huge.scales.mul": floats([[3.0, 1 - 2.0**-23]]), "huge.offsets.add": floats([[2.0**127 - 2.0**104], [0]])}
    bundle = Bundle(edge, most)
    largest = float(np.finfo(np.float32).max)
    assert bundle.effective()["huge.scales"] == floats([[[4.0], [largest]]])
    assert bundle.effective()["huge.offsets"] == floats([[largest], [0.0]])
    yield ValidBundle("largest", "Effective values that are the largest finite number.", bundle)


def named_bundles(base: Valid, named: Valid) -> Iterator[ValidBundle]:
    """TSK-7."""
    deltas = {"fc.scales.mul": random_delta("names", 2, 2)}
    bundle = Bundle(named, deltas, {"head_fingerprint": "0" * 64})
    yield ValidBundle("body-before-head", "A name that a module of the body has and one of the head.", bundle)
    tied = {"embed.scales.mul": random_delta("embed", 1, 3), "embed.zeros.add": random_delta("embed.zeros", 3, 1)}
    yield ValidBundle("tied", "Deltas on a matrix that is used in two places.", Bundle(named, tied))
    unused = {"layers.0.ragged.scales.add": floats([[[1.0], [2.0], [-4.0]], [[8.0], [0.5], [-0.25]]])}
    bundle = Bundle(base, unused)
    assert bundle.effective()["layers.0.ragged.scales"].f32()[1, 0, 0] == 8
    yield ValidBundle("unused-entries", "An added delta on a plane that the row does not have.", bundle)
