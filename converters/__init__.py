"""Converters: one source format per file, and a driver that knows none of them."""

from .calibration_data import Calibration
from .convert import Conversion, convert_hf_to_lowbit, plan_conversion
from .recipe import Recipe, Rule

__all__ = ["Calibration", "Conversion", "Recipe", "Rule", "convert_hf_to_lowbit", "plan_conversion"]
