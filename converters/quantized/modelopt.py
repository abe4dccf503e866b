"""TensorRT Model Optimizer (quant_method "modelopt"): FP8 with a scale for the matrix, and NVFP4.

| tensor | dtype, shape | meaning |
|---|---|---|
| weight | E4M3 [rows, cols], or uint8 [rows, cols / 2] | FP8, or two numbers of E2M1 |
| weight_scale | float32: one number; or E4M3 [rows, cols / 16] | of FP8, of NVFP4 |
| weight_scale_2 | float32, one number, of NVFP4 | scales are multiplied by it, in float32 |

weight = number * scale, rounded to the model's dtype: of FP8 after the scale was rounded to it, of NVFP4 in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from .float4 import nvfp4_weight
from .float8 import float8_weight
from .packed import E2M1, Packed
from .release import Release

_NUMBERS = np.abs(E2M1) * np.where(E2M1 < 0, -1, 1).astype(np.float32)  # both zeros are positive
_SMOOTHED = ("pre_quant_scale", "svdquant_lora_a")


def find(release: Release) -> Iterator[Packed]:
    """The weights of a release; raises QuantizedSourceError for one that is not known, or whose tensors lie."""
    for role in _SMOOTHED:
        if (path := next(release.modules(role), None)) is not None:
            raise release.error(
                f"{path}.{role}: the release changes activations by it (AWQ, SVDQuant), which no lowbit model "
                "does; convert the original checkpoint"
            )
    for path in release.modules("weight_scale"):
        weight = release.source.tensors.get(f"{path}.weight")
        if weight is not None and weight.dtype == "U8" and release.has(f"{path}.weight_scale_2"):
            name, of_matrix = weight.name, f"{path}.weight_scale_2"
            yield nvfp4_weight(release, path, name, of_matrix, multiplied=True, numbers=_NUMBERS)
        elif weight is not None and weight.dtype == "F8_E4M3":
            release.tensor(f"{path}.weight_scale", ("F32",))
            found = float8_weight(release, path, f"{path}.weight_scale")
            scheme = replace(found.scheme, scale_dtype=release.dtype)
            yield replace(found, dtype=release.dtype, scheme=scheme, rounded=True)
        else:
            dtype = "no weight" if weight is None else f"a weight of {weight.dtype}"
            raise release.error(
                f"{path}: has scales and {dtype}; of Model Optimizer's kinds FP8 and NVFP4 are known; convert the "
                "original checkpoint"
            )
