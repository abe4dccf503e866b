"""Converters: one source format per file, and a driver that knows none of them."""

from .budgeted import Budget
from .calibration_data import Calibration
from .convert import Conversion, convert_hf_to_lowbit, fit_budget
from .planning import plan_conversion
from .recipe import Recipe, Rule, load_recipe, write_recipe
from .words import Words

__all__ = [
    "Budget",
    "Calibration",
    "Conversion",
    "Recipe",
    "Rule",
    "Words",
    "convert_hf_to_lowbit",
    "fit_budget",
    "load_recipe",
    "plan_conversion",
    "write_recipe",
]
