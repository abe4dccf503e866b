"""What every tiled layout must do: inherit :class:`LayoutConformance`, name your backend, and its tests run for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ..kernels.matrix import PlaneMatrix
from ..kernels.parameter_order import is_group_major
from ..schema import SCALE_DTYPES, Scheme
from . import products as truth
from .matrices import random_matrix
from .products import KINDS, PARAMETERS, drawn, on_device, plane_matrix, same_bits

TENSORS = "planes", *PARAMETERS, "codebook", "row_bits"


class LayoutConformance:
    """Tests of ``can_tile``, ``tile`` and ``untile``; a subclass says of which backend.

    Attributes:
        backend: a module or an object with the functions of :class:`lowbit_format.kernels.operators.Backend`.
        device: type of the device that it computes on, such as ``"cuda"``.
        tiles: whether it has a tiled layout at all. One that has none gives every matrix back as it is.
        kinds: schemes that it tiles, without bits and group size.
        group_sizes: that it tiles.
        odd_group_sizes: that it does not tile, where a row has several groups.
        columns: most columns to try; several of the backend's largest units are best.
        examples: matrices to try.
    """

    backend: Any
    device: str = "cpu"
    tiles: bool = True
    kinds: Sequence[Scheme] = KINDS
    group_sizes: Sequence[int] = (0, 32, 64, 96, 128, 256, 1024)
    odd_group_sizes: Sequence[int] = (5, 24, 48, 100)
    columns: int = 600
    examples: int = 60

    def matrices(self) -> st.SearchStrategy[PlaneMatrix]:
        """Any matrix that is tiled, with anything in the bits behind its last column."""

        @st.composite
        def matrices(draw: st.DrawFn) -> PlaneMatrix:
            scheme = replace(
                draw(st.sampled_from(list(self.kinds))),
                bits=draw(st.integers(1, 8)),
                group_size=draw(st.sampled_from(list(self.group_sizes))),
                scale_dtype=draw(st.sampled_from(SCALE_DTYPES)),
            )
            rows, cols, seed = draw(st.integers(1, 100)), draw(st.integers(1, self.columns)), draw(st.integers(0, 1000))
            w = plane_matrix(random_matrix(scheme, rows, cols, seed))
            generator = torch.Generator().manual_seed(seed)
            dirty = torch.randint(0, 256, w.planes.shape, dtype=torch.uint8, generator=generator)
            return on_device(w._replace(planes=dirty) if draw(st.booleans()) else w, self.device)

        return matrices()

    def assert_comes_back(self, w: PlaneMatrix) -> None:
        """Tiled, a matrix has the same numbers in another order; untiled, the file's bytes."""
        assert self.backend.can_tile(w) == self.tiles
        tiled = self.backend.tile(w)
        assert not w.is_tiled
        assert tiled.is_tiled == self.tiles
        assert self.backend.tile(tiled).planes is tiled.planes
        back = self.backend.untile(tiled)
        assert not back.is_tiled
        assert self.backend.untile(back) is back
        for name in TENSORS:
            was, of, now = getattr(w, name), getattr(tiled, name), getattr(back, name)
            assert (was is None) == (of is None) == (now is None)
            if was is None:
                continue
            assert now.dtype == was.dtype == of.dtype
            assert torch.equal(now, was)
            assert not self.tiles or now.is_contiguous()
            assert name == "planes" or torch.equal(of, was)
            assert not self.tiles or name not in PARAMETERS or is_group_major(of)
        facts = slice(len(TENSORS), None)
        assert tiled._replace(layout=w.layout)[facts] == back[facts] == w[facts]

    def test_everything_comes_back(self) -> None:
        """Exactly, ragged rows and padding bits too; and what is tiled already is left as it is."""

        @settings(max_examples=self.examples, deadline=None)
        @given(self.matrices())
        def check(w: PlaneMatrix) -> None:
            self.assert_comes_back(w)

        check()

    def test_planes_with_strides(self) -> None:
        """Rows of a larger matrix, and planes in another order in memory."""
        w = drawn(KINDS[0], 4, 32, 40, 100)
        for planes in (w.planes[:, 3:23], w.planes.transpose(0, 1).contiguous().transpose(0, 1)[:, 20:]):
            rows = on_device(w._replace(planes=planes, scales=w.scales[:, :20]), self.device)
            again = self.backend.tile(rows._replace(planes=rows.planes.contiguous()))
            assert torch.equal(self.backend.tile(rows).planes, again.planes)
            assert torch.equal(self.backend.untile(again).planes.cpu(), planes)

    def test_odd_groups_have_no_layout(self) -> None:
        for group_size in self.odd_group_sizes:
            for kind in self.kinds:
                assert not self.backend.can_tile(on_device(drawn(kind, 3, group_size, 10, 200), self.device))

    def test_one_odd_group_is_all_of_the_row(self) -> None:
        for group_size in self.odd_group_sizes:
            w = drawn(KINDS[0], 3, group_size, 10, group_size)
            there = on_device(w, self.device)
            self.assert_comes_back(there)
            found = self.backend.dequantize(self.backend.tile(there), None, torch.float32)
            assert same_bits(found.cpu(), truth.decode(w))
