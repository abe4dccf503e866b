"""Safetensors files on the Hub, whose tensors are fetched when they are read: no weight file is ever on this disk.

A large tensor is a request of its own. Small ones that stand together in a file are fetched together, with the large
one before them or alone, and stay in memory for a while, since they are read one after the other.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError, SourceError
from ..hub import Listing
from ..remote import RemoteFiles, spans
from .side import SAFETENSORS
from .source import commit_identity, placed_tensors

SMALL = 1 << 20  # bytes; a tensor below is fetched with those beside it
RUN = 8 << 20  # bytes that are fetched together, at most
KEPT = 32 << 20  # bytes of small tensors that stay in memory

Run = tuple[str, int, int]  # file, and its bytes from and to


class StreamedSource:
    """A checkpoint on the Hub, read by ranges of one commit.

    Args:
        directory: of the config and the files beside the weights, which are here.
        files: names of the weight files, with the tensors that an index puts into each.
        repo_id: the repository.
        listing: of the commit.

    Raises:
        SourceError: a header is ill-formed, or lacks a tensor of the index.
        HubError: a header cannot be had.
    """

    def __init__(self, directory: Path, files: Mapping[str, list[str]], repo_id: str, listing: Listing) -> None:
        self.directory = directory
        self.repo_id: str | None = repo_id
        self.revision: str | None = listing.commit
        self.files = (*files, f"{SAFETENSORS}.index.json")
        outcome = f"What is converted is kept: --resume, with --revision {listing.commit}, goes on from there"
        self._remote = RemoteFiles(repo_id, listing, outcome=outcome)
        self.traffic = self._remote.traffic
        try:
            headers = {file: self._remote.read_header(file) for file in files}
        except FormatError as e:
            raise SourceError(f"cannot read the checkpoint: {e}") from e
        self.tensors, self._place = placed_tensors(headers, files, f"{repo_id} at {listing.commit}")
        self._runs, self._tails = dict[str, Run](), dict[str, Run]()
        for file, header in headers.items():
            tensors = sorted(header.tensors.values(), key=lambda t: t.begin)
            small = [t for t in tensors if 0 < t.nbytes < SMALL]
            runs = {span[0]: span for span in spans([(t.begin, t.end) for t in small], gap=0, most=RUN)}
            run = (0, 0)
            for t in small:
                run = runs.get(t.begin, run)
                self._runs[t.name] = (file, *run)
            for t in tensors:
                if t.nbytes >= SMALL and t.end in runs:
                    self._tails[t.name] = (file, *runs[t.end])
        self._kept: OrderedDict[Run, NDArray[np.uint8]] = OrderedDict()
        self._fetched = set[Run]()
        self._lock, self._fetching = threading.Lock(), threading.Lock()
        self.identity = commit_identity(repo_id, listing.commit, files)

    def read(self, name: str, begin: int = 0, nbytes: int | None = None) -> NDArray[np.uint8]:
        """As of any source. Raises HubError where the bytes cannot be had."""
        file, place = self._place[name]
        end = self.tensors[name].nbytes if nbytes is None else begin + nbytes
        if begin == end:
            return np.empty(0, np.uint8)
        if run := self._runs.get(name):
            found: NDArray[np.uint8] = self._small(run)[place - run[1] + begin : place - run[1] + end].copy()
            return found
        tail = self._tails.get(name)
        if tail is None or end < self.tensors[name].nbytes or tail in self._fetched:
            return self._remote.read(file, place + begin, place + end)
        data = self._remote.read(file, place + begin, tail[2])
        self._keep(tail, data[end - begin :].copy())
        return data[: end - begin]

    def _small(self, run: Run) -> NDArray[np.uint8]:
        with self._fetching:  # two threads that want the same are served by one request
            with self._lock:
                data = self._kept.get(run)
            if data is None:
                data = self._remote.read(*run)
                self._keep(run, data)
            return data

    def _keep(self, run: Run, data: NDArray[np.uint8]) -> None:
        with self._lock:
            self._fetched.add(run)
            self._kept[run] = data
            while sum(len(kept) for kept in self._kept.values()) > KEPT:
                self._kept.popitem(last=False)
