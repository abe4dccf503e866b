"""CPU kernels: the compiled reference dequantizer, then torch's own product. The same functions as :mod:`.naive`.

Decoding gives the same bits as the naive way in a small part of the time; gradients of parameters are still naive.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import reference
from ..bits import to_ragged
from ..packed import PackedMatrix, Params
from ..schema import Scheme
from . import naive
from .naive import Packed, dequantize_param_grads, embedding_param_grads, linear_param_grads

__all__ = [
    "dequantize",
    "dequantize_param_grads",
    "embedding",
    "embedding_param_grads",
    "linear",
    "linear_input_grad",
    "linear_param_grads",
]


def decode(w: Packed) -> Tensor:
    """Weights ``[rows, cols]`` in float32; float64 parameters, which only tests have, go the naive way."""
    if w.scales.dtype == torch.float64:
        return naive.decode(w)
    shift = w.offsets if w.codec == "bcq" else w.zeros
    planes = w.planes.detach().contiguous().numpy()
    row_bits = None if w.row_bits is None else w.row_bits.detach().contiguous().numpy()
    if row_bits is not None and planes.ndim == 3:  # rows picked out of ragged planes come with all planes
        planes = to_ragged(planes[: w.bits], row_bits)
    scheme = Scheme(w.codec, w.bits, w.group_size, "F32", row_bits=w.row_bits is not None)
    matrix = PackedMatrix(
        scheme,
        w.scales.shape[1],
        w.cols,
        planes,
        Params(_floats(w.scales), None if shift is None else _floats(shift)),
        {},
        None if w.codebook is None else _floats(w.codebook),
        row_bits,
    )
    return torch.from_numpy(reference.decode(matrix))


def _floats(values: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = values.detach().float().contiguous().numpy()
    return array


dequantize = partial(naive.dequantize, decode=decode)
linear = partial(naive.linear, decode=decode)
linear_input_grad = partial(naive.linear_input_grad, decode=decode)
embedding = partial(naive.embedding, decode=decode)
