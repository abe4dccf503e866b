"""Quantizers: a float32 matrix and a target in, a packed matrix out."""

from .solve import Quantized, quantize
from .target import Target

__all__ = ["Quantized", "Target", "quantize"]
