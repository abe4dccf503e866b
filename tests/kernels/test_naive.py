"""The naive backend: right weights, products and gradients; and the truth of the conformance tests, likewise."""

from __future__ import annotations

import torch

from lowbit_format.kernels import naive
from lowbit_format.matrix import StoredMatrix
from lowbit_format.testing import products
from lowbit_format.testing.decoding import F32, DecoderConformance
from lowbit_format.testing.layouts import LayoutConformance
from lowbit_format.testing.operators import OperatorConformance


class TestTruth(DecoderConformance):
    """What the conformance tests take for true decodes as the scalar loop does."""

    def decode(self, matrix: StoredMatrix, bits: int | None) -> F32:
        out: F32 = products.decode(products.plane_matrix(matrix, bits, torch.float32)).contiguous().numpy()
        return out


class TestDecoding(DecoderConformance):
    def decode(self, matrix: StoredMatrix, bits: int | None) -> F32:
        out: F32 = naive.decode(products.plane_matrix(matrix, bits, torch.float32)).contiguous().numpy()
        return out


class TestOperators(OperatorConformance):
    backend = naive


class TestLayout(LayoutConformance):
    backend = naive
    tiles = False
