"""Releases that are published only quantized: one kind a file, and what all have in common in :mod:`.packed`."""

from .source import QuantizedSource, open_quantized

__all__ = ["QuantizedSource", "open_quantized"]
