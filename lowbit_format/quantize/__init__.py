"""Quantizers: from a float32 matrix and a target to a stored matrix."""

from .solve import Quantized, quantize
from .target import Target

__all__ = ["Quantized", "Target", "quantize"]
