"""A recipe: which modules to quantize, and how. A default, then rules by pattern, from options or a JSON file.

Every key that a file can have::

    {
      "default": {              // for all Linear, Conv1D and expert weights that no rule matches; keys may be left out
        "codec": "bcq",         // "bcq", "uniform" or "codebook"
        "bits": 4,              // bcq, uniform: planes of a matrix, 1 to 8; a codebook's table decides for itself
        "group_size": 128,      // columns that share parameters; 0 is the whole row
        "offset": true,         // bcq: fit an offset for each group
        "nested": [2, 3],       // bcq, uniform: lower precisions to store parameters for as well
        "scale_dtype": "F16",   // "F16", "BF16" or "F32"; a wider one is taken where it does not fit
        "recognise": true,      // store a weight that lies on a grid already without loss
        "rounds": null          // rounds of the solver; null is its default
      },
      "rules": [                // the first rule that matches a module's path decides
        {"match": "model.layers.0.*", "keep": true},                                       // full precision
        {"match": "*.down_proj", "bits": 5},                                               // the rest as the default
        {"match": "*.o_proj", "codec": "uniform", "bits": 8, "solver": "minmax"},          // mse, minmax, symmetric
        {"match": "*.up_proj", "codec": "codebook", "table": "nf4"},                       // or the values: [-1, 0, 1]
        {"match": "lm_head", "bits": 6, "nested": []}                                      // the output head too
      ],
      "embeddings": false,      // quantize embeddings that no rule matches
      "lm_head": false          // quantize an output head that no rule matches
    }

(A file is plain JSON, without the comments.) A pattern is matched against the module's path, with ``*`` and ``?`` as in
file names; ``*`` matches dots too. A rule inherits from the default the keys that it leaves out. A rule that matches an
embedding or the output head quantizes it; the default alone does not. A key that means nothing for its codec is an
error, and so is a pattern that matches no module.

Precedence, highest first: a rule's keys, the command's options, the file's default, the built-in default.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..container import strict_json
from ..errors import DirectoryError, RecipeError, SchemeError
from ..quantize import Target

_TARGET_KEYS = {f.name for f in fields(Target)}
_KEYS = ", ".join(sorted(_TARGET_KEYS))
_MEANT_FOR = {  # key of a target -> the codecs that it means something for; keys that are not here mean it for all
    "nested": ("bcq", "uniform"),
    "offset": ("bcq",),
    "solver": ("uniform",),
    "table": ("codebook",),
}


@dataclass(frozen=True)
class Rule:
    """Modules whose path matches `match` become `target`; None keeps them in full precision."""

    match: str
    target: Target | None


@dataclass(frozen=True)
class Recipe:
    """What to do with each module.

    Attributes:
        default: for Linear, Conv1D and expert weights of the base model that no rule matches.
        rules: the first that matches decides.
        embeddings: quantize embeddings by default too.
        lm_head: quantize the output head by default too.
    """

    default: Target = field(default_factory=Target)
    rules: tuple[Rule, ...] = ()
    embeddings: bool = False
    lm_head: bool = False

    def rule_for(self, path: str) -> Rule | None:
        """The first rule that matches the module, or None if the default applies."""
        return next((rule for rule in self.rules if fnmatch.fnmatchcase(path, rule.match)), None)

    def check_matches(self, paths: Iterable[str]) -> None:
        """Raise RecipeError for a pattern that matches no module's path: it is misspelt."""
        known = list(paths)
        for rule in self.rules:
            if not any(fnmatch.fnmatchcase(path, rule.match) for path in known):
                near = ", ".join(known[:3])
                raise RecipeError(f"the pattern {rule.match!r} matches no module; modules are named like {near}")

    def keeping(self, patterns: Iterable[str]) -> Recipe:
        """The recipe with modules that match any of `patterns` left in full precision."""
        return replace(self, rules=(*(Rule(p, None) for p in patterns), *self.rules))


_BUILT_IN = Recipe()
_NO_OPTIONS: Mapping[str, Any] = {}


def load_recipe(path: Path, base: Recipe = _BUILT_IN, options: Mapping[str, Any] = _NO_OPTIONS) -> Recipe:
    """Read a recipe file.

    Args:
        path: the file.
        base: for keys that the file leaves out.
        options: keys of :class:`Target`, and ``embeddings`` and ``lm_head``, that override the file's default.

    Raises:
        RecipeError: the file cannot be read, or has an unknown key or a bad value.
    """

    def fail(_: str, message: str) -> RecipeError:
        return RecipeError(f"{path}: {message}")

    try:
        obj = strict_json.loads(path.read_bytes(), lambda rule, m: DirectoryError(rule, m))
    except OSError as e:
        raise fail("", f"cannot be read: {e.strerror}") from e
    except DirectoryError as e:
        raise fail("", str(e)) from e
    if not isinstance(obj, dict):
        raise fail("", "is not a JSON object")
    if unknown := set(obj) - {"default", "rules", "embeddings", "lm_head"}:
        raise fail("", f"unknown key {sorted(unknown)[0]!r}; expected default, rules, embeddings, lm_head")
    for key in ("embeddings", "lm_head"):
        if not isinstance(obj.get(key, False), bool):
            raise fail("", f"{key} must be true or false")
    settings = obj.get("default", {})
    if isinstance(settings, dict):
        settings = {**settings, **{key: value for key, value in options.items() if key in _TARGET_KEYS}}
    default = _target(settings, base.default, f"{path}: default")
    rules = obj.get("rules", [])
    if not isinstance(rules, list):
        raise fail("", "rules is not a list")
    return Recipe(
        default,
        (*base.rules, *(_rule(rule, default, f"{path}: rule {i + 1}") for i, rule in enumerate(rules))),
        options.get("embeddings", obj.get("embeddings", base.embeddings)),
        options.get("lm_head", obj.get("lm_head", base.lm_head)),
    )


def make_target(settings: Mapping[str, Any], base: Target) -> Target:
    """`base` with `settings`; raises SchemeError for a bad value, and for a setting that the codec would ignore."""
    codec = settings.get("codec", base.codec)
    settings = dict(settings)
    if codec == "codebook":  # bits and nested precisions of the default are not meant for it
        settings.setdefault("bits", Target().bits)
        settings.setdefault("nested", ())
    target = replace(base, **settings)
    for key, codecs in _MEANT_FOR.items():
        no_nested = key == "nested" and settings.get(key) == ()  # a codebook may say that it has none
        if key not in settings or codec in codecs or no_nested:
            continue
        raise SchemeError(
            f"{key} is for {' and '.join(codecs)}, and codec is {codec!r}: leave {key} out, or choose another codec"
        )
    return target


def _rule(obj: Any, default: Target, where: str) -> Rule:
    if not isinstance(obj, dict):
        raise RecipeError(f"{where}: is {json.dumps(obj)[:80]}, expected an object")
    if unknown := set(obj) - _TARGET_KEYS - {"match", "keep"}:
        raise RecipeError(f"{where}: unknown key {sorted(unknown)[0]!r}; expected match, keep, {_KEYS}")
    if not isinstance(obj.get("match"), str):
        raise RecipeError(f'{where}: has no "match", the pattern of the modules that it is for')
    settings = {k: v for k, v in obj.items() if k not in ("match", "keep")}
    if not isinstance(obj.get("keep", False), bool):
        raise RecipeError(f"{where}: keep must be true or false")
    if obj.get("keep"):
        if settings:
            raise RecipeError(
                f"{where}: keep leaves the module as it is, so {sorted(settings)[0]!r} means nothing here"
            )
        return Rule(obj["match"], None)
    return Rule(obj["match"], _target(settings, default, where))


def _target(obj: Any, base: Target, where: str) -> Target:
    if not isinstance(obj, dict):
        raise RecipeError(f"{where}: is {json.dumps(obj)[:80]}, expected an object")
    if unknown := set(obj) - _TARGET_KEYS:
        raise RecipeError(f"{where}: unknown key {sorted(unknown)[0]!r}; expected {_KEYS}")
    settings = dict(obj)
    for key in ("nested", "table"):
        if isinstance(settings.get(key), list):
            settings[key] = tuple(settings[key])
    try:
        return make_target(settings, base)
    except (SchemeError, TypeError, ValueError) as e:
        raise RecipeError(f"{where}: {e}") from e
