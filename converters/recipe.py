"""A recipe: which modules to quantize, and how. Defaults, then rules by pattern, from options or a JSON file.

```json
{"default": {"codec": "bcq", "bits": 4, "group_size": 128},
 "rules": [{"match": "*.down_proj", "bits": 5},
           {"match": "lm_head", "codec": "uniform", "bits": 8},
           {"match": "model.layers.0.*", "keep": true}]}
```

A pattern is matched against the module's path (``*`` and ``?`` as in file names; ``*`` crosses dots). The first rule
that
matches decides. A rule's keys override the default; ``"keep": true`` leaves the module in full precision. A rule that
matches an embedding or the output head quantizes it, which the default does not.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..container import strict_json
from ..errors import DirectoryError, RecipeError, SchemeError
from ..quantize import Target

_TARGET_KEYS = {f.name for f in fields(Target)}
_KEYS = ", ".join(sorted(_TARGET_KEYS))


@dataclass(frozen=True)
class Rule:
    """Modules whose path matches `match` become `target`; None keeps them in full precision."""

    match: str
    target: Target | None


@dataclass(frozen=True)
class Recipe:
    """What to do with each module.

    Attributes:
        default: for Linear and Conv1D modules of the base model that no rule matches.
        rules: the first that matches decides.
        embeddings: quantize embeddings by default too.
        lm_head: quantize the output head by default too.
    """

    default: Target = field(default_factory=Target)
    rules: tuple[Rule, ...] = ()
    embeddings: bool = False
    lm_head: bool = False

    def rule_for(self, path: str) -> Rule | None:
        """The rule that decides about the module, or None for the default."""
        return next((rule for rule in self.rules if fnmatch.fnmatchcase(path, rule.match)), None)

    def check_matches(self, paths: Iterable[str]) -> None:
        """Raise RecipeError for a pattern that no module's path fits: it is a slip of the pen."""
        known = list(paths)
        for rule in self.rules:
            if not any(fnmatch.fnmatchcase(path, rule.match) for path in known):
                near = ", ".join(known[:3])
                raise RecipeError(f"the pattern {rule.match!r} matches no module; modules are named like {near}")

    def keeping(self, patterns: Iterable[str]) -> Recipe:
        """The recipe with modules that match any of `patterns` left in full precision."""
        return replace(self, rules=(*(Rule(p, None) for p in patterns), *self.rules))


def load_recipe(path: Path, base: Recipe) -> Recipe:
    """Read a recipe file; what it leaves open comes from `base`.

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
    default = _target(obj.get("default", {}), base.default, f"{path}: default")
    rules = obj.get("rules", [])
    if not isinstance(rules, list):
        raise fail("", "rules is not a list")
    return Recipe(
        default,
        (*base.rules, *(_rule(rule, default, f"{path}: rule {i + 1}") for i, rule in enumerate(rules))),
        obj.get("embeddings", base.embeddings),
        obj.get("lm_head", base.lm_head),
    )


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
    if settings.get("codec", base.codec) == "codebook":  # which has none; the default's are not meant for it
        settings.setdefault("nested", ())
    try:
        return replace(base, **settings)
    except (SchemeError, TypeError, ValueError) as e:
        raise RecipeError(f"{where}: {e}") from e
