"""``quantization_config``: parsing, writing, canonical paths, and the table of tensors (sections 2, 4, 9, 12).

What is refused is in spec/vectors/invalid, each by its rule; here is what the golden files cannot hold.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_format.codecs import CODECS
from lowbit_format.errors import ConfigError, FormatError, VersionError
from lowbit_format.schema import FORMAT_VERSION, ModuleEntry, QuantizationConfig, Scheme, scheme_names
from lowbit_format.tensors import all_roles, stored_bits, tensor_specs
from lowbit_format.testing.strategies import configs, modules, schemes

MINIMAL: dict[str, Any] = {"quant_method": "lowbit", "format_version": "1.0", "schemes": {}, "modules": {}}


def test_codecs_are_known_by_their_ids() -> None:
    assert all(codec.id == key for key, codec in CODECS.items())


@given(schemes())
def test_scheme_round_trip(scheme: Scheme) -> None:
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


@given(schemes())
def test_defaults_are_left_out(scheme: Scheme) -> None:
    """CFG-2: what equals the default is not written; what is left out is the default."""
    found = scheme.to_dict()
    assert list(found)[:4] == ["codec", "bits", "group_size", "scale_dtype"]
    assert not any(
        found.get(key) in (False, [], None) for key in ("offset", "row_bits", "nested", "label") if key in found
    )


@settings(max_examples=60, deadline=None)
@given(configs())
def test_config_round_trip_is_deterministic(config: QuantizationConfig) -> None:
    obj = config.to_dict()
    again = QuantizationConfig.from_dict(json.loads(json.dumps(obj)))
    assert again == config
    backwards = QuantizationConfig(
        dict(reversed(config.modules.items())), dict(reversed(config.tied.items())), config.base_model_prefix
    )
    assert json.dumps(backwards.to_dict()) == json.dumps(obj)


def test_scheme_names_are_unique_and_stable() -> None:
    several = [
        Scheme(offset=o, scale_dtype=d, group_size=g, bits=b)
        for o, d, g, b in itertools.product((False, True), ("F16", "F32"), (0, 128), (2, 4))
    ]
    names = scheme_names(several)
    assert len(set(names.values())) == len(several)
    assert names == scheme_names(reversed(several))
    assert names[Scheme(bits=4, group_size=128, offset=True)] in ("bcq-4-g128", "bcq-4-g128-2")


@pytest.mark.parametrize("version", ["1.0", "1.1", "1.999999999999999999999"])
def test_minor_versions_are_read(version: str) -> None:
    """VER-2."""
    assert QuantizationConfig.from_dict({**MINIMAL, "format_version": version}).format_version == version


def test_a_major_version_is_refused_before_anything_else() -> None:
    """VER-1: another major version may have changed every other key."""
    with pytest.raises(VersionError, match="update lowbit_format"):
        QuantizationConfig.from_dict({"format_version": "2.0", "schemes": 7})
    assert FORMAT_VERSION.startswith("1.")


def test_further_keys_are_ignored() -> None:
    """CFG-7."""
    assert QuantizationConfig.from_dict({**MINIMAL, "new": {"a": 1}}).modules == {}


@pytest.mark.parametrize(
    ("prefix", "path", "canonical"),
    [
        ("model", "model.layers.0", ("layers.0", True)),
        ("model", "lm_head", ("lm_head", False)),
        ("model", "modelling.fc", ("modelling.fc", False)),
        ("", "model.layers.0", ("model.layers.0", True)),
        ("unused", "lm_head", ("lm_head", True)),
    ],
)
def test_canonical_paths(prefix: str, path: str, canonical: tuple[str, bool]) -> None:
    """FPR-1: the prefix counts only if some path begins with it and a dot."""
    found = {p: ModuleEntry(p, Scheme(), "linear", (1, 1)) for p in ("model.layers.0", "lm_head", "modelling.fc")}
    assert QuantizationConfig(found, base_model_prefix=prefix).canonical_path(path) == canonical


def test_errors_say_where_and_what() -> None:
    config = {**MINIMAL, "schemes": {"s": Scheme().to_dict()}}
    config["modules"] = {"fc": {"scheme": "other", "kind": "linear", "shape": [1, 1]}}
    with pytest.raises(ConfigError) as caught:
        QuantizationConfig.from_dict(config, file="dir/config.json")
    assert (caught.value.rule, caught.value.tensor, caught.value.file) == ("CFG-4", "fc", "dir/config.json")
    assert str(caught.value) == "dir/config.json: 'fc': scheme 'other' is not defined [CFG-4]"


def test_a_hostile_value_does_not_fill_the_message() -> None:
    with pytest.raises(FormatError) as caught:
        Scheme.from_dict({**Scheme().to_dict(), "bits": "x" * 10**6})
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("edge", [0, 1, 64, 65, 2**31 - 1])
@pytest.mark.parametrize("cols", [1, 64, 65, 130])
def test_groups(edge: int, cols: int) -> None:
    """Section 4: every column is in one of the groups and the last group is not empty."""
    scheme = Scheme(group_size=edge)
    groups, width = scheme.groups(cols), scheme.group_columns(cols)
    assert (groups - 1) * width < cols <= groups * width


@given(modules())
def test_tensor_specs(module: ModuleEntry) -> None:
    """TEN-1 and EXP-1: names are the path, a joint and a role; roles are those of the scheme, each once."""
    specs, scheme, codec = tensor_specs(module), module.scheme, CODECS[module.scheme.codec]
    joint = "." if module.experts is None else "_"
    assert all(spec.name == f"{module.path}{joint}{spec.role}" for spec in specs)
    suffixes = ["", *(f"_k{k}" for k in scheme.nested)]
    roles = ["planes", *(f"scales{s}" for s in suffixes)]
    roles += [f"{codec.shift}{s}" for s in suffixes if (codec.shift and not codec.optional_shift) or scheme.offset]
    roles += ["codebook"] * codec.codebook + ["row_bits"] * scheme.row_bits
    assert sorted(spec.role for spec in specs) == sorted(roles)
    assert specs[0].role == "planes"
    assert set(roles) <= all_roles()
    assert stored_bits(module, module.rows * scheme.bits) == stored_bits(module)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["bcq", "F16", "s"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.sampled_from(sorted(Scheme(offset=True, nested=(1,), label="x", row_bits=True).to_dict())), JSON)
)
def test_any_scheme_is_parsed_or_refused(changes: dict[str, Any]) -> None:
    """CFG-3: whatever the values, a scheme or a ConfigError."""
    try:
        scheme = Scheme.from_dict({**Scheme().to_dict(), **changes})
    except ConfigError as e:
        rule = e.rule
    else:
        rule = "" if Scheme.from_dict(scheme.to_dict()) == scheme else "changed"
    assert rule in ("", "CFG-3")
