"""Models whose files break a rule: what is in the directory, JSON, the index, and safetensors headers."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

from .cases import Invalid, refused
from .files import Files, compact, data_of, file_of, header_of, padded, pretty, replaced
from .models import INDEX, Model, index_of, small
from .reader import Json, Tensors


def directory_cases() -> Iterator[Invalid]:
    good = small().files()
    config = good["config.json"]
    bare = {"model_type": "example"}
    yield refused("no-config", "DIR-1", "No config.json.", {"model.safetensors": good["model.safetensors"]})
    yield refused("not-json", "DIR-1", "config.json ends too early.", {**good, "config.json": config[:-3]})
    yield refused("array", "DIR-1", "config.json is a list.", {**good, "config.json": pretty([json.loads(config)])})
    yield refused("no-key", "DIR-1", "No quantization_config.", {**good, "config.json": pretty(bare)})
    listed = pretty({**bare, "quantization_config": []})
    yield refused("list", "DIR-1", "quantization_config is a list.", {**good, "config.json": listed})
    latin = config.replace(b"example", b"ex\xe4mple")
    yield refused("not-utf-8", "DIR-1", "config.json is not UTF-8.", {**good, "config.json": latin})

    marked = {**good, "config.json": b"\xef\xbb\xbf" + config}
    yield refused("byte-order-mark", "DIR-1", "A byte order mark before config.json.", marked)
    deep = replaced(config, '"hidden_size": 8', '"hidden_size": 8, "deep": ' + "[" * 64 + "]" * 64)
    yield refused("depth-65", "DIR-1", "config.json of 65 levels.", {**good, "config.json": deep})

    names = list(small().tensors)
    both = {**small().sharded(names), "model.safetensors": good["model.safetensors"]}
    yield refused("both", "DIR-2", "An index beside model.safetensors.", both)
    yield refused("neither", "DIR-2", "No weights at all.", {"config.json": config})
    yield from index_cases(names)
    yield from agreement_cases(names)


def index_cases(names: list[str]) -> Iterator[Invalid]:
    """DIR-3. Where a file of the forbidden name can lie safely in a checkout, it does: a careless reader finds it."""
    config, content = small().files()["config.json"], small().files()["model.safetensors"]

    def named(shard: Any) -> Files:
        return {"config.json": config, INDEX: index_of(dict.fromkeys(names, shard))}

    outside = refused("traversal", "DIR-3", "A shard outside the directory.", named("../outside.safetensors"))
    yield Invalid(outside.name, outside.rule, outside.about, {**outside.files, "outside.safetensors": content})
    below = {**named("below/a.safetensors"), "below/a.safetensors": content}
    yield refused("subdirectory", "DIR-3", "A shard in a subdirectory.", below)
    hidden = {**named(".a.safetensors"), ".a.safetensors": content}
    yield refused("hidden", "DIR-3", "A shard whose name begins with a dot.", hidden)
    yield refused("suffix", "DIR-3", "A shard named .bin.", {**named("model.bin"), "model.bin": content})
    yield refused("absolute", "DIR-3", "An absolute path.", named("/model.safetensors"))
    yield refused("backslash", "DIR-3", "A backslash in the name.", named("..\\a.safetensors"))
    yield refused("control", "DIR-3", "A line feed in the name.", named("a\nb.safetensors"))
    yield refused("delete", "DIR-3", "The character U+007F in the name.", named("a\x7fb.safetensors"))
    yield refused("not-a-string", "DIR-3", "A file name that is a number.", named(1))
    shard = {"config.json": config, "a.safetensors": content}
    right = dict.fromkeys(names, "a.safetensors")
    yield refused("no-weight-map", "DIR-3", "No weight_map.", {**shard, INDEX: pretty({"metadata": {}})})
    pairs = index_of([list(item) for item in right.items()])
    yield refused("weight-map-list", "DIR-3", "weight_map is a list.", {**shard, INDEX: pairs})
    yield refused("array", "DIR-3", "The index is a list.", {**shard, INDEX: pretty([{"weight_map": right}])})
    marked = {**shard, INDEX: b"\xef\xbb\xbf" + index_of(right)}
    yield refused("byte-order-mark", "DIR-3", "A byte order mark before the index.", marked)
    deep = replaced(index_of(right), '"total_size": 0', '"total_size": 0, "deep": ' + "[" * 63 + "]" * 63)
    yield refused("depth-65", "DIR-3", "An index of 65 levels.", {**shard, INDEX: deep})


def agreement_cases(names: list[str]) -> Iterator[Invalid]:
    first, second = names[:3], names[3:]  # the second shard holds no tensor of the module
    shard = "model-00001-of-00002.safetensors"
    other = "model-00002-of-00002.safetensors"
    model = small()
    good = model.sharded(first, second)
    right = dict.fromkeys(first, shard) | dict.fromkeys(second, other)

    ghost = {**good, INDEX: index_of({**right, "ghost.weight": shard})}
    yield refused("ghost", "DIR-4", "The index names a tensor that its shard does not have.", ghost)
    unlisted = {**good, INDEX: index_of({name: file for name, file in right.items() if name != "norm.weight"})}
    yield refused("unlisted", "DIR-4", "A shard has a tensor that the index does not name.", unlisted)
    swapped = {**good, INDEX: index_of({**right, "norm.weight": shard})}
    yield refused("swapped", "DIR-4", "The index maps a tensor to the wrong shard.", swapped)
    twice = {**model.sharded([*first, "norm.weight"], second), INDEX: index_of(right)}
    yield refused("twice", "DIR-4", "A tensor is in two shards.", twice)
    missing = {path: content for path, content in good.items() if path != other}
    yield refused("missing-shard", "DIR-4", "A shard that the index names does not exist.", missing)
    # A lax reader that only follows the index would never look into the second shard's extra tensor.
    extra = copy.deepcopy(model).plain("extra", 1)
    more = {**extra.sharded(first, [*second, "extra"]), INDEX: index_of(right)}
    yield refused("extra", "DIR-4", "The second shard has one tensor more than the index.", more)


def json_cases() -> Iterator[Invalid]:
    """DIR-8: keys given twice, and constants that JSON does not have."""
    good = small().files()
    config = good["config.json"]

    def configured(old: str, new: str) -> Files:
        return {**good, "config.json": replaced(config, old, new)}

    def in_header(old: str, new: str, model: Model | None = None) -> Files:
        model = model or small()
        text = compact(header_of(model.tensors, model.metadata)).encode()
        return {**good, "model.safetensors": file_of(replaced(text, old, new), data_of(model.tensors))}

    kind = '"kind": "linear"'
    yield refused(
        "config-top",
        "DIR-8",
        "A key of config.json twice.",
        configured('"hidden_size"', '"model_type": "x", "hidden_size"'),
    )
    yield refused("config-module", "DIR-8", "A key of a module twice.", configured(kind, f"{kind}, {kind}"))
    yield refused("config-scheme", "DIR-8", "A key of a scheme twice.", configured('"bits": 2', '"bits": 3, "bits": 2'))
    entry = '"fc": {"scheme": "bcq-2-0", "kind": "linear", "shape": [1, 5]}'
    yield refused("config-path", "DIR-8", "A module twice.", configured('"modules": {', '"modules": {' + entry + ","))
    yield refused(
        "config-escape", "DIR-8", "A key twice, once escaped.", configured(kind, f'{kind}, "\\u006bind": "linear"')
    )
    for constant in ("NaN", "Infinity", "-Infinity"):
        new = configured('"tied": {}', f'"tied": {{}}, "note": {constant}')
        yield refused(constant.lower(), "DIR-8", f"The constant {constant} in quantization_config.", new)

    for slug, number in {"1e999": "1e999", "minus-1e999": "-1e999", "long-integer": "9" * 5000}.items():
        new = configured('"tied": {}', f'"tied": {{}}, "note": {number}')
        about = f"{number[:6]}{'…' * (len(number) > 6)} in quantization_config, which counts as Infinity."
        yield refused(slug, "DIR-8", about, new)
    yield refused("header-1e999", "DIR-8", "1e999 in a shape.", in_header('"shape":[2]', '"shape":[1e999]'))
    yield refused("header-nan", "DIR-8", "NaN in a shape.", in_header('"shape":[2]', '"shape":[NaN]'))

    bias = compact({"fc.bias": header_of(small().tensors)["fc.bias"]})[1:-1]
    yield refused("header-tensor", "DIR-8", "A tensor twice in the header.", in_header(bias, f"{bias},{bias}"))
    yield refused(
        "header-field", "DIR-8", "A field of a tensor twice.", in_header('"dtype":"F32"', '"dtype":"F32","dtype":"F32"')
    )
    meta = '"__metadata__":{"format":"pt"}'
    yield refused("header-metadata", "DIR-8", "__metadata__ twice.", in_header(meta, f"{meta},{meta}"))
    yield refused(
        "header-metadata-key",
        "DIR-8",
        "A key of __metadata__ twice.",
        in_header('"format":"pt"', '"format":"pt","format":"pt"'),
    )

    indexed = small().sharded(list(small().tensors))
    item = '"fc.bias": "model-00001-of-00001.safetensors"'
    indexed[INDEX] = replaced(indexed[INDEX], item, f"{item}, {item}")
    yield refused("index", "DIR-8", "A tensor twice in the index.", indexed)

    hashed = small()
    pair = compact({"fc.bias": hashed.tensors["fc.bias"].sha256()})[1:-1]
    hashed.metadata = {"lowbit.digests": "{" + pair + "," + pair + "}"}
    yield refused("digests", "DIR-8", "A tensor twice in the digests.", hashed)


def header_cases() -> Iterator[Invalid]:
    model = small()
    good, data = model.files(), data_of(model.tensors)
    content = good["model.safetensors"]
    text = compact(header_of(model.tensors, model.metadata))
    header_end = 8 + struct.unpack("<Q", content[:8])[0]

    def stored(slug: str, rule: str, about: str, content: bytes) -> Invalid:
        return refused(slug, rule, about, {**good, "model.safetensors": content})

    for count in (0, 7):
        yield stored(f"truncated-{count}", "HDR-1", f"A file of {count} bytes.", content[:count])
    yield stored("truncated-8", "HDR-1", "The file ends behind the header's length.", content[:8])
    yield stored("truncated-header", "HDR-1", "The file ends inside the header.", content[: header_end - 1])
    for slug, length in {
        "0": 0, "1": 1, "above-limit": 100_000_001, "past-end": len(content) - 7, "2-to-31": 2**31, "2-to-32": 2**32,
        "2-to-63": 2**63, "largest": 2**64 - 1, "wraps": 2**64 - 8,
    }.items():  # fmt: skip
        yield stored(
            f"length-{slug}", "HDR-1", f"A header's length of {length}.", struct.pack("<Q", length) + content[8:]
        )

    yield stored("leading-space", "HDR-2", "A space before the header.", file_of(" " + text, data))
    yield stored("byte-order-mark", "HDR-2", "A byte order mark before the header.", file_of("\ufeff" + text, data))
    yield stored("padding-zero", "HDR-2", "A zero byte as padding.", file_of(text + "\0", data))
    yield stored("padding-line-feed", "HDR-2", "A line feed as padding.", file_of(text + "\n", data))
    yield stored("text-behind", "HDR-2", "An object behind the header.", file_of(text + " {}", data))
    yield stored("array", "HDR-2", "The header is a list.", file_of("[" + text + "]", data))
    deep = text.replace('"format":"pt"', '"format":' + "[" * 63 + "]" * 63)
    yield stored("depth-65", "HDR-2", "A header of 65 levels.", file_of(deep, data))
    yield stored("not-json", "HDR-2", "The header ends too early.", file_of(text[:-1], data))
    yield stored("trailing-comma", "HDR-2", "A comma before the last brace.", file_of(text[:-1] + ",}", data))
    broken = text.encode().replace(b"norm.weight", b"norm\xff.weight")
    yield stored("not-utf-8", "HDR-2", "A byte that is not UTF-8.", file_of(broken, data))
    yield from entry_cases(good)
    yield from layout_cases(good, content, header_end)


def entry_cases(good: Files) -> Iterator[Invalid]:
    """HDR-3 to HDR-5 and HDR-7: what the header says of `norm.weight`, the last tensor, is wrong."""
    model = small()
    size = len(data_of(model.tensors))

    def edited(
        slug: str, rule: str, about: str, edit: Callable[[Json], Any], tensors: Tensors = model.tensors
    ) -> Invalid:
        header = header_of(tensors, model.metadata)
        edit(header)
        return refused(slug, rule, about, {**good, "model.safetensors": file_of(compact(header), data_of(tensors))})

    def renamed(name: str) -> Callable[[Json], Any]:
        return lambda header: header.update({name: header.pop("norm.weight")})

    def put(**values: Any) -> Callable[[Json], Any]:
        return lambda header: header["norm.weight"].update(values)

    def drop(key: str) -> Callable[[Json], Any]:
        return lambda header: header["norm.weight"].pop(key)

    yield edited("empty-name", "HDR-3", "A tensor with an empty name.", renamed(""))
    yield edited("long-name", "HDR-3", "A name of 1025 characters.", renamed("n" * 1025))
    yield edited("control", "HDR-3", "A line feed in a name.", renamed("norm\nweight"))
    yield edited("nul", "HDR-3", "The character U+0000 in a name.", renamed("norm\0weight"))
    yield edited("delete", "HDR-3", "The character U+007F in a name.", renamed("norm\x7fweight"))
    for key in ("dtype", "shape", "data_offsets"):
        slug = key.replace("_", "-")
        yield edited(f"no-{slug}", "HDR-3", f"A tensor without {key}.", drop(key))
    yield edited("extra-field", "HDR-3", "A fourth field.", put(stride=[1]))
    yield edited("list", "HDR-3", "A list for a tensor.", lambda h: h.update({"norm.weight": ["F32", [2], [32, 40]]}))
    yield edited("null", "HDR-3", "null for a tensor.", lambda h: h.update({"nothing": None}))

    yield edited("unknown", "HDR-4", "A dtype that does not exist.", put(dtype="F33"))
    yield edited("case", "HDR-4", "A dtype in small letters.", put(dtype="f32"))
    yield edited("number", "HDR-4", "A dtype that is a number.", put(dtype=32))

    begin = size - 8
    for slug, shape in {
        "longer": [3], "shorter": [1], "negative": [-1, -2], "fraction": [2.5], "string": ["2"], "number": 2,
        "null": None, "boolean": [True, 2],
    }.items():  # fmt: skip
        yield edited(f"shape-{slug}", "HDR-5", f"The shape {json.dumps(shape)} for two values.", put(shape=shape))
    for slug, offsets in {
        "three": [begin, size, size], "one": [begin], "number": begin, "fraction": [begin + 0.5, size],
        "backwards": [size, begin], "string": [str(begin), str(size)], "negative": [-8, 0],
    }.items():  # fmt: skip
        yield edited(f"offsets-{slug}", "HDR-5", f"The data_offsets {json.dumps(offsets)}.", put(data_offsets=offsets))

    def added(slug: str, about: str, dtype: str, shape: list[int]) -> Invalid:
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [size, size]}
        return edited(slug, "HDR-5", about, lambda header: header.update(empty=entry))

    yield added("wraps-to-0", "A product that is 0 modulo 2^64, and no bytes.", "U8", [2**32, 2**32])
    yield added("bytes-wrap-to-0", "A size in bytes that is 0 modulo 2^64, and no bytes.", "F64", [2**61])
    yield added("wraps-to-0-32", "A product that is 0 modulo 2^32, and no bytes.", "U8", [2**16, 2**16])

    def metadata(value: Any) -> Callable[[Json], Any]:
        return lambda header: header.update(__metadata__=value)

    for slug, value in {
        "number": {"n": 1}, "nested": {"a": {"b": "c"}}, "null": {"a": None}, "list": ["a"], "string": "a",
        "top-null": None,
    }.items():  # fmt: skip
        yield edited(slug, "HDR-7", f"__metadata__ is {json.dumps(value)}.", metadata(value))


def layout_cases(good: Files, content: bytes, header_end: int) -> Iterator[Invalid]:
    """HDR-6: the tensors do not tile the file."""
    model = small()
    data = data_of(model.tensors)
    size = len(data)

    def moved(slug: str, about: str, data: bytes, edit: Callable[[Json], Any]) -> Invalid:
        header = header_of(model.tensors, model.metadata)
        edit(header)
        return refused(slug, "HDR-6", about, {**good, "model.safetensors": file_of(padded(compact(header)), data)})

    def place(name: str, begin: int, end: int, **more: Any) -> Callable[[Json], Any]:
        return lambda header: header.setdefault(name, {}).update(data_offsets=[begin, end], **more)

    def shift_all(header: Json) -> None:
        for name in model.tensors:
            header[name]["data_offsets"] = [offset + 4 for offset in header[name]["data_offsets"]]

    def stored(slug: str, about: str, content: bytes) -> Invalid:
        return refused(slug, "HDR-6", about, {**good, "model.safetensors": content})

    yield stored("no-data", "The file ends behind the header.", content[:header_end])
    yield stored("truncated-middle", "The file ends inside the first tensor.", content[: header_end + 5])
    yield stored("truncated-last", "The last byte is missing.", content[:-1])
    yield stored("byte-behind", "One byte behind the last tensor.", content + b"\0")
    yield stored("bytes-behind", "Sixteen bytes behind the last tensor.", content + bytes(16))
    yield moved(
        "hole",
        "Four bytes between two tensors.",
        data[:-8] + bytes(4) + data[-8:],
        place("norm.weight", size - 4, size + 4),
    )
    yield moved("hole-at-start", "Four bytes before the first tensor.", bytes(4) + data, shift_all)
    yield moved("overlap", "Two tensors share four bytes.", data[:-4], place("norm.weight", size - 12, size - 4))
    alias = place("alias", size - 8, size, dtype="F32", shape=[2])
    yield moved("alias", "Two tensors share all their bytes.", data, alias)
    whole = place("whole", 0, size, dtype="U8", shape=[size])
    yield moved("covering", "One tensor covers all others.", data, whole)
    for power in (31, 62, 63, 64):
        far = place("far", size, size + 2**power, dtype="U8", shape=[2**power])
        yield moved(f"far-2-to-{power}", f"A last tensor of 2^{power} bytes that the file does not have.", data, far)
    inside = place("nothing", size - 4, size - 4, dtype="F32", shape=[0])
    yield moved("empty-inside", "An empty tensor that begins inside another.", data, inside)
