"""Damaged and hostile files: a named error or the right content, no other exception, no large allocation.

The golden files of spec/vectors/invalid hold one file for each rule; here files are cut, flipped and made up by the
thousand. ``tests/hostile/fuzz.py`` does the same for hours.
"""

from __future__ import annotations

import copy
import json
import shutil
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.directories import sample_model, tiny_model, tiny_stacks, weights

from lowbit_format.container.header import build_header, read_header
from lowbit_format.container.reader import CONFIG_FILE, INDEX_FILE, ModelReader
from lowbit_format.errors import DigestError, FormatError, HeaderError
from lowbit_format.reference import decode_numpy
from lowbit_format.testing.vectors import assert_same_bits

PEAK = 4 << 20  # bytes that reading a file of a few KB may take at most

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "model"
    tiny_model(directory)
    return directory


@pytest.fixture
def copy_of_tiny(tiny: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def victim(tiny: Path) -> Path:
    """A copy that hypothesis writes over again and again."""
    return Path(shutil.copytree(tiny, tiny.parent / "victim"))


@pytest.fixture(scope="module")
def stacks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stacks") / "model"
    tiny_stacks(directory)
    return directory


@pytest.fixture(scope="module")
def victim_of_stacks(stacks: Path) -> Path:
    return Path(shutil.copytree(stacks, stacks.parent / "victim"))


@pytest.fixture(autouse=True)
def allocations() -> Iterator[None]:
    """Every test here runs under this bound."""
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


def refusal(act: Callable[[], object]) -> FormatError | None:
    """What `act` was refused with, if it was. Any other exception passes, and fails the test; so does a large peak."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        act()
        found = None
    except FormatError as e:
        found = e
    assert tracemalloc.get_traced_memory()[1] - before < PEAK
    assert found is None or len(str(found)) < 3000
    return found


def read_all(directory: Path) -> None:
    """Open, verify, fingerprint and decode everything."""
    reader = ModelReader(directory)
    reader.verify()
    reader.fingerprint(trust_digests=False)
    for module in reader.config:
        for bits in (None, *module.scheme.nested):
            reader.decode(module.path, bits)


def header_file(path: Path, header: object, data: bytes = b"") -> Path:
    """A safetensors file with this header, bytes or JSON."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def one(shape: str, begin: str, end: str) -> bytes:
    """A header of one U8 tensor, with numbers as they are written."""
    return f'{{"a":{{"dtype":"U8","shape":{shape},"data_offsets":[{begin},{end}]}}}}'.encode()


# --- cut and flipped -------------------------------------------------------------------------------


def test_every_prefix_of_the_weights_is_refused(copy_of_tiny: Path) -> None:
    whole = weights(copy_of_tiny).read_bytes()
    for length in range(len(whole)):
        weights(copy_of_tiny).write_bytes(whole[:length])
        error = refusal(lambda: ModelReader(copy_of_tiny))
        assert isinstance(error, HeaderError), length
        assert error.rule in ("HDR-1", "HDR-6"), length


def test_every_prefix_of_the_config_is_refused(copy_of_tiny: Path) -> None:
    path = copy_of_tiny / CONFIG_FILE
    whole = path.read_bytes().rstrip()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        error = refusal(lambda: ModelReader(copy_of_tiny))
        assert error is not None, length
        assert error.rule == "DIR-1", length


def test_every_prefix_of_the_index_is_refused(tmp_path: Path) -> None:
    sample_model(tmp_path, 2)
    path = tmp_path / INDEX_FILE
    whole = path.read_bytes().rstrip()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        error = refusal(lambda: ModelReader(tmp_path))
        assert error is not None, length
        assert error.rule == "DIR-3", length


def test_every_flipped_bit_of_the_data_is_found(copy_of_tiny: Path) -> None:
    """DIG-3: or before the digest a rule about what the bits may be (TEN-3, BIT-3)."""
    content = bytearray(weights(copy_of_tiny).read_bytes())
    (header_bytes,) = struct.unpack("<Q", content[:8])
    rules = set()
    for at in range(8 + header_bytes, len(content)):
        for bit in range(8):
            content[at] ^= 1 << bit
            weights(copy_of_tiny).write_bytes(content)
            error = refusal(lambda: ModelReader(copy_of_tiny).verify())
            assert error is not None, (at, bit)
            rules.add(error.rule)
            content[at] ^= 1 << bit
    assert {"DIG-3", "BIT-3"} <= rules <= {"DIG-3", "BIT-3", "TEN-3"}


def test_a_flipped_bit_of_the_header_never_changes_a_weight(tiny: Path, copy_of_tiny: Path) -> None:
    """Refused, or it renamed a plain tensor or a digest: then all weights are still those of the file."""
    expected = {m.path: ModelReader(tiny).decode(m.path) for m in ModelReader(tiny).config}
    content = bytearray(weights(copy_of_tiny).read_bytes())
    (header_bytes,) = struct.unpack("<Q", content[:8])
    refused = 0
    for at in range(8 + header_bytes):
        bit = 1 << (at % 8)
        content[at] ^= bit
        weights(copy_of_tiny).write_bytes(content)
        if refusal(lambda: read_all(copy_of_tiny)):
            refused += 1
        else:
            reader = ModelReader(copy_of_tiny)
            for path, weight in expected.items():
                assert_same_bits(reader.decode(path), weight)
        content[at] ^= bit
    assert refused > header_bytes * 0.75


def test_flipped_bits_of_the_config_are_survived(copy_of_tiny: Path) -> None:
    path = copy_of_tiny / CONFIG_FILE
    content = bytearray(path.read_bytes())
    refused = 0
    for at in range(len(content)):
        content[at] ^= 1 << (at % 8)
        path.write_bytes(content)
        refused += refusal(lambda: read_all(copy_of_tiny)) is not None
        content[at] ^= 1 << (at % 8)
    assert refused > len(content) // 3


# --- lies ------------------------------------------------------------------------------------------

NINES = "9" * 300  # a number with a finite binary64 value; its square has none
LONG = "9" * 5000  # longer than Python reads an integer


@pytest.mark.parametrize(
    ("header", "rule"),
    [
        (one(f"[{NINES},{NINES}]", "0", "0"), "HDR-5"),
        (one(f"[{','.join([NINES] * 100)}]", "0", "0"), "HDR-5"),  # the product is not worked out
        (one(f"[{NINES}]", "0", NINES), "HDR-6"),
        (one("[0]", NINES, NINES), "HDR-6"),
        (one(f"[{NINES},0]", "0", "0"), None),
        (one("[-0]", "-0", "0"), None),
        (one("[0.0]", "0", "0"), "HDR-5"),
        (one("[0]", "0e0", "0"), "HDR-5"),
        (one("[0]", "1e999", "1e999"), "DIR-8"),  # DIR-9: these count as Infinity
        (one(f"[{LONG},0]", "0", "0"), "DIR-8"),
        (one(f"[-{LONG},0]", "0", "0"), "DIR-8"),
        (one(f"[{'1' + '0' * 309},0]", "0", "0"), "DIR-8"),
        (one(f"[{2**1024 - 2**970},0]", "0", "0"), "DIR-8"),  # rounds to infinity, of 309 digits
        (one(f"[{2**1024 - 2**970 - 1},0]", "0", "0"), None),
        (b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}", "HDR-2"),
        (b'{"a":' + b"[" * 500 + b"]" * 500 + b"}", "HDR-2"),
        (b'{"a":' * 400 + b"1" + b"}" * 400, "HDR-2"),
        (b'{"__metadata__":{"lowbit.digests":"' + b"[" * 900 + b"]" * 900 + b'"}}', "DIG-1"),
        (b"{" + b" " * 100_000 + b"}", None),
    ],
)
def test_numbers_and_nesting_beyond_all_bounds(header: bytes, rule: str | None, tmp_path: Path) -> None:
    path = header_file(tmp_path / "x.safetensors", header)
    error = refusal(lambda: read_header(path))
    assert (error.rule if error else None) == rule


def test_a_far_tensor_before_a_near_one(tmp_path: Path) -> None:
    """HDR-6: two that overlap, the first of which reaches far behind the file."""
    far = {"dtype": "U8", "shape": [int(NINES)], "data_offsets": [0, int(NINES)]}
    near = {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}
    error = refusal(lambda: read_header(header_file(tmp_path / "x.safetensors", {"far": far, "near": near}, b"12")))
    assert error is not None
    assert error.rule == "HDR-6"


@pytest.mark.parametrize("depth", [50, 70, 200, 330, 480, 900, 2000, 100_000])
@pytest.mark.parametrize("at", ["top", "unknown", "bits", "shape"])
def test_deep_nesting_in_the_config(depth: int, at: str, copy_of_tiny: Path) -> None:
    """DIR-8 walks what is parsed and messages print it; neither may run out of stack."""
    deep = "[" * depth + "]" * depth
    config = json.loads((copy_of_tiny / CONFIG_FILE).read_text())
    quant = config["quantization_config"]
    scheme = next(iter(quant["schemes"].values()))
    owner = {"top": config, "unknown": quant, "bits": scheme, "shape": quant["modules"]["a"]}[at]
    owner[at] = "DEEP"
    (copy_of_tiny / CONFIG_FILE).write_text(json.dumps(config).replace('"DEEP"', deep))
    error = refusal(lambda: read_all(copy_of_tiny))
    assert (error is None) == (depth <= 50 and at in ("top", "unknown"))


@pytest.mark.parametrize(("levels", "rule"), [(64, None), (65, "DIR-1")])
@pytest.mark.parametrize("at", ["top", "unknown"])
def test_the_outermost_object_is_the_first_level(levels: int, rule: str | None, at: str, copy_of_tiny: Path) -> None:
    """DIR-10."""
    config = json.loads((copy_of_tiny / CONFIG_FILE).read_text())
    inside, depth = (config, levels - 1) if at == "top" else (config["quantization_config"], levels - 2)
    inside["deep"] = "DEEP"
    text = json.dumps(config).replace('"DEEP"', "[" * depth + "]" * depth)
    (copy_of_tiny / CONFIG_FILE).write_text(text)
    error = refusal(lambda: read_all(copy_of_tiny))
    assert (error.rule if error else None) == rule


def test_files_of_json_have_a_size_that_is_refused_unread(copy_of_tiny: Path) -> None:
    """DIR-10: 2^25 bytes and no more."""
    path = copy_of_tiny / CONFIG_FILE
    with open(path, "ab") as f:
        f.truncate(2**25 + 1)
    error = refusal(lambda: ModelReader(copy_of_tiny))
    assert error is not None
    assert error.rule == "DIR-1"
    assert "33554432" in str(error)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**32, 2**63, 2**64 - 8, 2**64 - 1, 100_000_001, 100_000_000])
def test_lying_header_lengths(length: int, copy_of_tiny: Path) -> None:
    content = weights(copy_of_tiny).read_bytes()
    weights(copy_of_tiny).write_bytes(struct.pack("<Q", length) + content[8:])
    error = refusal(lambda: ModelReader(copy_of_tiny))
    assert error is not None
    assert error.rule == "HDR-1"


@pytest.mark.parametrize(
    "shape", [[2**31 - 1, 2**31 - 1], [2**31 - 1, 6], [2, 2**31 - 1], [1, 6], [2, 5], [3, 6], [6, 2]]
)
def test_lying_shapes_in_the_config(shape: list[int], copy_of_tiny: Path) -> None:
    """TEN-1: the configuration is held against the headers; nothing is allocated for what it says.

    [2, 5] fits all tensors of [2, 6]; then the bit at column 5 is padding that is not zero.
    """
    config = json.loads((copy_of_tiny / CONFIG_FILE).read_text())
    config["quantization_config"]["modules"]["a"]["shape"] = shape
    (copy_of_tiny / CONFIG_FILE).write_text(json.dumps(config))
    error = refusal(lambda: read_all(copy_of_tiny))
    assert error is not None
    assert error.rule == ("BIT-3" if shape == [2, 5] else "TEN-1")


def test_ragged_planes_without_rows(tmp_path: Path) -> None:
    """MIX-2 with a tensor of no bytes."""
    sample_model(tmp_path)
    header, content = read_header(weights(tmp_path)), weights(tmp_path).read_bytes()
    tensors, data = [], []
    for t in header.tensors.values():
        keep = not t.name.endswith("mixed.planes")
        tensors.append((t.name, t.dtype, t.shape if keep else (0, 8)))
        data.append(content[t.begin : t.end] if keep else b"")
    weights(tmp_path).write_bytes(build_header(tensors, {}) + b"".join(data))
    error = refusal(lambda: read_all(tmp_path))
    assert error is not None
    assert error.rule == "MIX-2"


def test_a_tied_place_of_experts_has_no_tensors(tmp_path: Path) -> None:
    """TIE-2 with the names of EXP-1."""
    sample_model(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    config["quantization_config"]["tied"]["model.twin"] = "model.experts.w"
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    assert refusal(lambda: read_all(tmp_path)) is None
    header, content = read_header(weights(tmp_path)), weights(tmp_path).read_bytes()
    body = content[8 + struct.unpack("<Q", content[:8])[0] :]
    for name in ("model.twin", "model.twin_scales"):
        tensors = [(t.name, t.dtype, t.shape) for t in header.tensors.values()]
        weights(tmp_path).write_bytes(build_header([*tensors, (name, "U8", (1,))], {}) + body + b"x")
        error = refusal(lambda: read_all(tmp_path))
        assert error is not None
        assert (error.rule, error.tensor) == ("TIE-2", name)


def test_a_damaged_tensor_is_named(copy_of_tiny: Path) -> None:
    content = bytearray(weights(copy_of_tiny).read_bytes())
    content[-1] ^= 1
    weights(copy_of_tiny).write_bytes(content)
    with pytest.raises(DigestError, match=r"model\.safetensors: 'norm': .*damaged, get it again \[DIG-3\]"):
        ModelReader(copy_of_tiny).verify()


# --- made up ---------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 2**70)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["F32", "U8", "bcq", "a", "a.planes", "linear", "1.0", "\ud800", "x" * 600]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything inside a JSON value."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(inner, (*path, key))


@st.composite
def mutated(draw: st.DrawFn, value: Any) -> Any:
    """`value` with one to three of its parts replaced, removed, renamed or put elsewhere."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        *path, key = draw(st.sampled_from(list(places(value)) or [()])) or [None]
        owner = value
        for step in path:
            owner = owner[step]
        how = draw(st.sampled_from(["replace", "remove", "rename", "nudge"]))
        if key is None:
            break
        if how == "replace":
            owner[key] = draw(JSON)
        elif how == "remove":
            del owner[key]
        elif how == "nudge" and isinstance(owner[key], int):
            owner[key] += draw(st.sampled_from([-1, 1, 8, 2**31, 2**32, 2**64]))
        elif isinstance(owner, dict):
            owner[draw(st.text(max_size=5) | st.sampled_from(["a.planes", "b_planes", "a.weight"]))] = owner.pop(key)
    return value


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


@settings(max_examples=75, deadline=None)
@given(data=st.data())
def test_mutated_headers(tiny: Path, victim: Path, data: st.DataObject) -> None:
    content = weights(tiny).read_bytes()
    (n,) = struct.unpack("<Q", content[:8])
    raw = dumped(data.draw(mutated(json.loads(content[8 : 8 + n]))))
    (victim / CONFIG_FILE).write_bytes((tiny / CONFIG_FILE).read_bytes())
    weights(victim).write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + n :])
    refusal(lambda: read_all(victim))


@settings(max_examples=75, deadline=None)
@given(data=st.data())
def test_mutated_configs(tiny: Path, victim: Path, data: st.DataObject) -> None:
    weights(victim).write_bytes(weights(tiny).read_bytes())
    config = data.draw(mutated(json.loads((tiny / CONFIG_FILE).read_text())))
    (victim / CONFIG_FILE).write_bytes(dumped(config))
    refusal(lambda: read_all(victim))


@settings(max_examples=75, deadline=None)
@given(edits=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=4), st.integers(0, 4)), min_size=1, max_size=4))
def test_spliced_bytes(tiny: Path, victim: Path, edits: list[tuple[float, bytes, int]]) -> None:
    """Bytes inserted, removed and overwritten anywhere in header and body."""
    content = weights(tiny).read_bytes()
    for where, new, removed in edits:
        at = int(where * len(content))
        content = content[:at] + new + content[at + removed :]
    (victim / CONFIG_FILE).write_bytes((tiny / CONFIG_FILE).read_bytes())
    weights(victim).write_bytes(content)
    refusal(lambda: read_all(victim))


@settings(max_examples=75, deadline=None)
@given(raw=st.binary(max_size=40) | JSON.map(dumped))
def test_made_up_headers(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = header_file(tmp_path_factory.getbasetemp() / "made-up.safetensors", raw)
    refusal(lambda: read_header(path))


# --- stacks of experts -----------------------------------------------------------------------------


def is_refused(original: Path, changed: Path) -> bool:
    """Whether `changed` is refused; if not, every stack that it still names has the weights of the original."""
    if refusal(lambda: ModelReader(changed).verify()) is not None:
        return True
    before, after = ModelReader(original), ModelReader(changed)
    for entry in after.config:
        known = before.config.modules.get(entry.path)
        if known is None:  # renamed, tensors and all
            continue
        assert entry.shape[:-1] == known.shape[:-1]
        cols = min(entry.cols, known.cols)  # a matrix may seem wider by some of its padding
        for expert in range(known.experts or 0):
            found, expected = (decode_numpy(reader.matrix(entry.path, expert)) for reader in (after, before))
            assert_same_bits(found[:, :cols], expected[:, :cols])
    return False


@pytest.mark.parametrize(("name", "step"), [("model.safetensors", 9), (CONFIG_FILE, 5)])
def test_a_flipped_bit_never_changes_an_expert(name: str, step: int, stacks: Path, victim_of_stacks: Path) -> None:
    """Of header, data or configuration: refused, or it changed nothing that an expert is made of."""
    for file in ("model.safetensors", CONFIG_FILE):
        shutil.copyfile(stacks / file, victim_of_stacks / file)
    content, refused = bytearray((stacks / name).read_bytes()), 0
    places = range(0, len(content), step)
    for at in places:
        content[at] ^= 1 << (at % 8)
        (victim_of_stacks / name).write_bytes(content)
        refused += is_refused(stacks, victim_of_stacks)
        content[at] ^= 1 << (at % 8)
    assert refused > len(places) // 3


@settings(max_examples=80, deadline=None)
@given(data=st.data(), of_config=st.booleans())
def test_mutated_stacks(stacks: Path, victim_of_stacks: Path, data: st.DataObject, of_config: bool) -> None:
    content, config = weights(stacks).read_bytes(), (stacks / CONFIG_FILE).read_bytes()
    if of_config:
        config = dumped(data.draw(mutated(json.loads(config))))
    else:
        (n,) = struct.unpack("<Q", content[:8])
        raw = dumped(data.draw(mutated(json.loads(content[8 : 8 + n]))))
        content = struct.pack("<Q", len(raw)) + raw + content[8 + n :]
    (victim_of_stacks / CONFIG_FILE).write_bytes(config)
    weights(victim_of_stacks).write_bytes(content)
    is_refused(stacks, victim_of_stacks)
