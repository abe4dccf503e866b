"""Ranges of files on the Hub: what goes wrong on the way gives the right bytes all the same, or a named error."""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.hub_server import HubServer, running_hub, serving

from lowbit_format.container.header import MAX_HEADER, build_header
from lowbit_format.errors import HeaderError, HubError
from lowbit_format.hub import list_files
from lowbit_format.remote import FIRST, PROGRESS, TRIES, RemoteFiles, spans

REPO, FILE = "owner/model", "model.safetensors"
DATA = np.random.default_rng(0).integers(0, 256, 3 * PROGRESS + 77, np.uint8)
BEGIN, END = 1000, len(DATA) - 5


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with running_hub(tmp_path, monkeypatch) as hub:
        hub.create(REPO)
        hub.commit(REPO, {FILE: DATA.tobytes(), "notes.json": b"{}"})
        yield hub


def opened() -> RemoteFiles:
    return RemoteFiles(REPO, list_files(REPO), outcome="Nothing is lost")


def write(hub: HubServer, data: bytes) -> None:
    """Change the file within its commit, which the Hub never does."""
    (hub.place(REPO) / "commits" / hub.head(REPO) / FILE).write_bytes(data)


def test_a_listing_has_the_etags_that_downloads_have(hub: HubServer) -> None:
    listing = list_files(REPO)
    assert listing.commit == hub.head(REPO)
    assert listing.sizes[FILE] == len(DATA)
    assert listing.etags[FILE] == hashlib.sha256(DATA).hexdigest()
    assert listing.etags["notes.json"] == hashlib.sha1(b"blob 2\0{}").hexdigest()
    files = opened()
    assert files.read("notes.json", 0, 2).tobytes() == b"{}"


def test_a_range_and_what_it_cost(hub: HubServer) -> None:
    files = opened()
    assert np.array_equal(files.read(FILE, BEGIN, END), DATA[BEGIN:END])
    assert (files.traffic.nbytes, files.traffic.requests, hub.sent) == (END - BEGIN, 1, END - BEGIN)
    assert not len(files.read(FILE, 7, 7))
    assert np.array_equal(files.read(FILE, 0, len(DATA)), DATA)
    assert str(files.traffic) == "6.3 MB in 2 requests"


def test_a_store_elsewhere_gets_no_token_and_has_etags_of_its_own(hub: HubServer) -> None:
    with serving(hub) as hub.store:
        assert np.array_equal(opened().read(FILE, BEGIN, END), DATA[BEGIN:END])
    assert [(r.path.split("/")[1], r.token) for r in hub.log[-2:]] == [("owner", True), ("store", False)]


HARMLESS: dict[str, list[dict[str, Any]]] = {
    "cut early": [{"cut": 100}],
    "cut again and again, with progress": [{"cut": PROGRESS + 1}] * 2 + [{"cut": 5}] * (TRIES - 2),
    "cut before the first byte": [{"cut": 0}] * (TRIES - 1),
    "busy": [{"status": 429, "headers": {"Retry-After": "2"}}] * 2,
    "trouble of its own": [{"status": 500}, {"status": 503}, {"cut": 2000}, {"status": 502}],
}


@pytest.mark.parametrize("redirected", [False, True])
@pytest.mark.parametrize("faults", HARMLESS.values(), ids=HARMLESS)
def test_what_goes_on_from_where_it_broke(hub: HubServer, faults: list[dict[str, Any]], redirected: bool) -> None:
    files = opened()
    with serving(hub) as store:
        hub.store = store if redirected else None
        for fault in faults:
            hub.fail("GET", "store" if redirected else FILE, **fault)
        assert np.array_equal(files.read(FILE, BEGIN, END), DATA[BEGIN:END])
    assert all(fault.times == 0 for fault in hub.faults)
    assert files.traffic.nbytes == END - BEGIN  # nothing came twice


FATAL: dict[str, tuple[dict[str, Any], str]] = {
    "cut at each try": ({"cut": 0, "times": 99}, f"cut {TRIES} times, the last time {END - BEGIN:,} bytes"),
    "trouble that stays": ({"status": 500, "times": 99}, "the Hub has trouble of its own"),
    "busy for good": ({"status": 429, "times": 99}, "the Hub wants fewer requests"),
    "not allowed": ({"status": 403}, "this token may not do that"),
    "the whole file": ({"whole": True}, "ignores ranges and sends whole files"),
    "another range": ({"headers": {"Content-Range": f"bytes 0-{END - BEGIN}/{len(DATA)}"}}, "other bytes than were"),
    "another size": ({"headers": {"Content-Range": f"bytes {BEGIN}-{END - 1}/9"}}, "the file has changed: it had"),
    "no word of the range": ({"headers": {"Content-Range": "of some kind"}}, "other bytes than were"),
    "another file": ({"headers": {"X-Linked-Etag": '"1234"'}}, "the file has changed: its ETag was"),
    "compressed": ({"headers": {"Content-Encoding": "gzip"}}, "compressed (gzip)"),
}


@pytest.mark.parametrize(("fault", "message"), FATAL.values(), ids=FATAL)
def test_what_is_refused_by_name(hub: HubServer, fault: dict[str, Any], message: str) -> None:
    files = opened()
    hub.fail("GET", FILE, **fault)
    with pytest.raises(HubError) as e:
        files.read(FILE, BEGIN, END)
    assert message in str(e.value)
    place = f"{REPO} at revision '{hub.head(REPO)}': bytes {BEGIN:,} to {END:,} of {FILE}: "
    assert str(e.value).startswith(place)
    assert "Nothing is lost" in str(e.value)


@pytest.mark.parametrize("listed", [True, False])
def test_a_file_that_changes_in_mid_way_is_no_mixture(hub: HubServer, listed: bool) -> None:
    listing = list_files(REPO)
    files = RemoteFiles(REPO, listing if listed else type(listing)(listing.commit, listing.sizes))
    files.read(FILE, 0, 10)
    hub.fail("GET", FILE, cut=PROGRESS)
    hub.fail("GET", FILE, call=lambda: write(hub, DATA[::-1].tobytes()))  # as large as before
    with pytest.raises(HubError, match="the file has changed: its ETag was"):
        files.read(FILE, BEGIN, END)


def test_a_file_that_became_shorter(hub: HubServer) -> None:
    files = opened()
    hub.store = None
    write(hub, b"x")
    with pytest.raises(HubError, match="shorter than it was"):
        files.read(FILE, BEGIN, END)


# --- headers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensors", [3, 2000])
def test_a_header_by_one_range_or_two(hub: HubServer, tensors: int) -> None:
    raw = build_header([(f"model.layers.{i}.weight", "U8", (2,)) for i in range(tensors)], {})
    hub.commit(REPO, {FILE: raw + bytes(2 * tensors)})
    files = opened()
    header = files.read_header(FILE)
    assert len(header.tensors) == tensors
    assert files.traffic.requests == (1 if len(raw) <= FIRST else 2)
    assert files.traffic.nbytes <= max(FIRST, len(raw))


@pytest.mark.parametrize("length", [MAX_HEADER + 1, 1 << 62, (1 << 64) - 1, 3 * PROGRESS + 70, 1, 0])
def test_a_header_that_lies_about_its_length_costs_nothing(hub: HubServer, length: int) -> None:
    hub.commit(REPO, {FILE: struct.pack("<Q", length) + DATA[8:].tobytes()})
    files = opened()
    tracemalloc.start()
    try:
        with pytest.raises(HeaderError, match=r"owner/model/model.safetensors: .*HDR-1"):
            files.read_header(FILE)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert files.traffic.nbytes == FIRST


@pytest.mark.parametrize("content", [b"", b"abc", struct.pack("<Q", 40) + b"{"])
def test_a_file_that_is_none(hub: HubServer, content: bytes) -> None:
    hub.commit(REPO, {FILE: content})
    with pytest.raises(HeaderError, match="HDR-1"):
        opened().read_header(FILE)


def test_shapes_that_lie_are_refused_with_the_header(hub: HubServer) -> None:
    entry = {"w": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}}
    text = json.dumps(entry).encode()
    hub.commit(REPO, {FILE: struct.pack("<Q", len(text)) + text + bytes(4)})
    with pytest.raises(HeaderError, match="HDR-5"):
        opened().read_header(FILE)


def test_a_tensor_that_no_memory_holds(hub: HubServer) -> None:
    """Whatever size the Hub says that its file has."""
    listing = list_files(REPO)
    files = RemoteFiles(REPO, type(listing)(listing.commit, {FILE: 1 << 63}, listing.etags))
    for size in (1 << 60, 1 << 63):
        with pytest.raises(HubError, match=r"are more than the memory of this machine\. Nothing was loaded"):
            files.read(FILE, 0, size)


# --- joining ranges ---------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 200), st.integers(1, 20)).map(lambda r: (r[0], r[0] + r[1])), max_size=12),
    st.integers(0, 10),
    st.integers(1, 60),
)
def test_joined_ranges_hold_all_and_little_else(ranges: list[tuple[int, int]], gap: int, most: int) -> None:
    found = list(spans(ranges, gap=gap, most=most))
    wanted = {i for begin, end in ranges for i in range(begin, end)}
    covered = [i for begin, end in found for i in range(begin, end)]
    assert wanted <= set(covered)
    assert all(any(b <= begin and end <= e for b, e in found) for begin, end in ranges)
    assert found == sorted(found)
    for begin, end in found:
        inside = sorted(i for i in range(begin, end) if i in wanted)
        assert all(b - a <= gap + 1 for a, b in itertools.pairwise(inside))
        assert end - begin <= most or (begin, end) in ranges
