"""Converters: one source format per file, and a driver that knows none of them."""

from .convert import Conversion, convert_hf_to_lowbit, plan_conversion
from .recipe import Recipe, Rule

__all__ = ["Conversion", "Recipe", "Rule", "convert_hf_to_lowbit", "plan_conversion"]
