"""Ranges of the files of one commit on the Hub, read without keeping the files.

huggingface_hub opens every response: its session, token and endpoint are used, redirects to a store of the Hub are
followed, and it waits and asks again where the Hub is busy. Here is what a range needs beside: each response is held
against the size and the ETag that the Hub gave for the file at the start, and a range that is cut goes on from there.
"""

from __future__ import annotations

import io
import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .container.header import MAX_HEADER, Header, parse_header
from .errors import HubError
from .hub import Listing, hub_errors, place_of, transport_error

if TYPE_CHECKING:
    from .hub import Token

FIRST = 1 << 16  # bytes of a file that are read for its header; most headers are shorter
GAP = 1 << 17  # bytes between two ranges that are fetched along, in the place of another request
PARALLEL = 4  # requests at a time
AHEAD = 1 << 25  # bytes
TRIES = 5  # without PROGRESS, after which a range is given up
PROGRESS = 1 << 20  # bytes
_CHUNK = 1 << 18
_LONGEST_WAIT = 8.0  # seconds


@dataclass
class Traffic:
    """What was fetched so far: bytes of the files that came, and ranges that were asked for."""

    nbytes: int = 0
    requests: int = 0

    def __str__(self) -> str:
        return f"{self.nbytes / 1e6:,.1f} MB in {self.requests:,} requests"


class RemoteFiles:
    """The files of one commit, read by ranges.

    Args:
        repo_id: the repository.
        listing: of its commit. What a file is, is its size and its ETag there.
        token: of the Hub; by default the saved one.
        outcome: what the messages of errors say about what is done so far.

    Attributes:
        repo_id, listing: as given.
        traffic: what was fetched.
    """

    def __init__(self, repo_id: str, listing: Listing, *, token: Token = None, outcome: str = "Nothing was loaded"):
        self.repo_id, self.listing, self.traffic = repo_id, listing, Traffic()
        self._token, self._outcome, self._lock = token, outcome, threading.Lock()
        self._etags = dict(listing.etags)

    def read(self, path: str, begin: int, end: int) -> NDArray[np.uint8]:
        """Bytes `begin` to `end` of a file, as a new array.

        Raises:
            HubError: they cannot be had, are more than memory, or the file is not the one that it was.
        """
        place = place_of(self.repo_id, self.listing.commit, None)
        where = f"{place}: bytes {begin:,} to {end:,} of {path}"
        try:
            out = np.empty(end - begin, np.uint8)  # which takes memory only as the bytes come
        except (MemoryError, ValueError) as e:
            raise HubError(f"{where}: are more than the memory of this machine. {self._outcome}") from e
        done = fruitless = 0
        while done < len(out):
            with hub_errors(where, self._outcome):
                came, cut = self._request(path, begin + done, out[done:].data, where)
            done += came
            if done == len(out):
                break
            fruitless = 1 if came >= PROGRESS else fruitless + 1
            if fruitless == TRIES:
                raise HubError(
                    f"{where}: the connection was cut {TRIES} times, the last time {len(out) - done:,} bytes before "
                    f"the end; check the network, then try again. {self._outcome}. ({cut})"
                )
            time.sleep(min(2.0 ** (fruitless - 1), _LONGEST_WAIT))
        return out

    def read_all(self, path: str, ranges: Sequence[tuple[int, int]]) -> Iterator[NDArray[np.uint8]]:
        """The bytes of ranges ``(begin, end)``, which ascend and do not overlap; some are fetched ahead.

        Neighbours are fetched together where that is less work than another request. Memory holds :data:`AHEAD` bytes,
        or one range that is larger.
        """
        following, waiting = deque(spans(ranges, gap=GAP, most=AHEAD // PARALLEL)), deque[tuple[int, int, Any]]()
        pool = ThreadPoolExecutor(PARALLEL, thread_name_prefix="lowbit-fetch")
        try:
            data, at, to = np.empty(0, np.uint8), 0, 0
            for begin, end in ranges:
                while end > to:
                    if waiting:
                        waiting.popleft()
                    del data
                    while following and (
                        not waiting or sum(e - b for b, e, _ in waiting) + following[0][1] - following[0][0] <= AHEAD
                    ):
                        span = following.popleft()
                        waiting.append((*span, pool.submit(self.read, path, *span)))
                    at, to, future = waiting[0]
                    data = future.result()
                yield data[begin - at : end - at]
        finally:
            pool.shutdown(cancel_futures=True)

    def read_header(self, path: str) -> Header:
        """The checked header of a safetensors file. Raises HeaderError, DigestError, HubError."""
        size = self.listing.sizes[path]
        raw = self.read(path, 0, min(size, FIRST))
        if len(raw) >= 8:
            whole = 8 + int.from_bytes(raw[:8].tobytes(), "little")
            if len(raw) < whole <= min(size, 8 + MAX_HEADER):  # else it is refused by its length alone
                raw = np.concatenate([raw, self.read(path, len(raw), whole)])
        return parse_header(io.BytesIO(raw.tobytes()), size, f"{self.repo_id}/{path}")

    def _request(self, path: str, begin: int, out: memoryview, where: str) -> tuple[int, str]:
        """Ask once; returns how many bytes came, and what cut them short."""
        from huggingface_hub import constants, hf_hub_url, utils

        hub: Any = utils  # which has no types
        headers = hub.build_hf_headers(token=self._token, library_name="lowbit-format")
        headers |= {"Range": f"bytes={begin}-{begin + len(out) - 1}", "Accept-Encoding": "identity"}
        url, done, cut = hf_hub_url(self.repo_id, path, revision=self.listing.commit), 0, "the answer was too short"
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        try:
            with hub.http_stream_backoff("GET", url, headers=headers, timeout=timeout) as response:
                hub.hf_raise_for_status(response)
                self._check(response, path, begin, begin + len(out), where)
                try:
                    for chunk in response.iter_raw(_CHUNK):
                        n = min(len(chunk), len(out) - done)
                        out[done : done + n] = chunk[:n]
                        done += n
                        if done == len(out):
                            break
                except transport_error() as e:
                    cut = f"{type(e).__name__}: {e}"
        except RuntimeError as e:  # where one thread cannot connect, the library closes the client of all
            if "closed" not in str(e):
                raise
            cut = str(e)
        with self._lock:
            self.traffic.nbytes += done
            self.traffic.requests += 1
        return done, cut

    def _check(self, response: Any, path: str, begin: int, end: int, where: str) -> None:
        """Raise HubError unless a response has the file's bytes from `begin` on, and the file is still the same."""

        def fail(message: str) -> HubError:
            return HubError(f"{where}: {message}. {self._outcome}")

        size, given = self.listing.sizes[path], response.headers
        known, found = self._etags.get(path), _etag(response)
        if known is None and found is not None:
            known = self._etags.setdefault(path, found)
        if found is not None and found != known:
            raise fail(f"the file has changed: its ETag was {known}, and is {found}; begin again")
        if response.status_code == 200:
            if (begin, end) != (0, size):
                raise fail("the Hub, or a proxy before it, ignores ranges and sends whole files; download them instead")
            total = given.get("Content-Length", str(size))
        else:
            match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", given.get("Content-Range", ""))
            if match is None or int(match[1]) != begin:
                raise fail(
                    f"the answer has other bytes than were asked for (Content-Range {given.get('Content-Range')!r}); a "
                    "proxy may be at fault, download the files instead"
                )
            total = match[3]
        if int(total) != size:
            raise fail(f"the file has changed: it had {size:,} bytes, and has {int(total):,}; begin again")
        if given.get("Content-Encoding", "identity") != "identity":
            raise fail(f"the answer is compressed ({given['Content-Encoding']}), which was not asked for")


def _etag(response: Any) -> str | None:
    """The file's ETag in a response: the Hub's own, also where it has redirected to a store, which has others."""
    chain = [*response.history, response]
    own = [r.headers["X-Linked-Etag"] for r in chain if "X-Linked-Etag" in r.headers]
    if not own and "X-Repo-Commit" in response.headers:
        own = [response.headers[key] for key in ("ETag",) if key in response.headers]
    return str(own[0]).removeprefix("W/").strip('"') if own else None


def spans(ranges: Iterable[tuple[int, int]], *, gap: int, most: int) -> Iterator[tuple[int, int]]:
    """Ranges ``(begin, end)`` joined into fewer, in ascending order.

    Two are joined where no more than `gap` bytes are between them, and both together have no more than `most`.
    """
    current: tuple[int, int] | None = None
    for begin, end in sorted(ranges):
        if current is not None and begin - current[1] <= gap and max(end, current[1]) - current[0] <= most:
            current = current[0], max(end, current[1])
            continue
        if current is not None:
            yield current
        current = begin, end
    if current is not None:
        yield current
