"""Converters: one source format per file, and a driver that knows none of them."""
