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
        {"match": "*.v_proj", "at_least": 3, "at_most": 6},                                // of a budget's choice
        {"match": "*.0.k_proj", "row_bits": "4434"},  // bits of each row of a matrix (of four rows)
        {"match": "lm_head", "bits": 6, "nested": []}                                      // the output head too
      ],
      "embeddings": {"codec": "uniform", "bits": 8},   // those that no rule matches: as a rule has it, without a match;
      "lm_head": false,         // true: as the default; false: full precision. The output head likewise
      "words": {"frequencies": "rank", "bits": [6, 5, 4, 3], "ratio": 2}  // bits of the largest embedding, by frequency
    }

(A file is plain JSON, without the comments.) A pattern is matched against the module's path, with ``*`` and ``?`` as in
file names; ``*`` matches dots too. A rule inherits from the default the keys that it leaves out. A rule that matches an
embedding or the output head decides about it; the default does not. Without a rule and without ``embeddings`` or
``lm_head`` those with a row for each word of a model that generates text get the 8 bits of WORDS, where that makes them
smaller and there are no nested precisions, in which they could not be read. A key that means nothing for its codec is
an error, and so is a pattern that matches no module.

Precedence, highest first: a rule's keys, the command's options, the file's default, the built-in default.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..container import strict_json
from ..container.atomic import write_json
from ..errors import DirectoryError, FrequencyError, RecipeError, SchemeError
from ..quantize import Target
from ..schema import is_int
from .words import Words

# Of embeddings, and of the head that gives a vocabulary, where nothing is said of them. Rounding to nearest in 8 bits
# changes the perplexity of SmolLM2-135M by less than 0.1%, and halves a fifth of its weights: see docs/convert.md.
WORDS = Target("uniform", 8, solver="minmax")

_TARGET_KEYS = {f.name for f in fields(Target)}
_KEYS = ", ".join(sorted(_TARGET_KEYS))
_LIMITS = ("at_least", "at_most")
_MEANT_FOR = {  # key of a target -> the codecs that it means something for; keys that are not here mean it for all
    "nested": ("bcq", "uniform"),
    "offset": ("bcq",),
    "row_bits": ("bcq", "uniform"),
    "solver": ("uniform",),
    "table": ("codebook",),
}


@dataclass(frozen=True)
class Rule:
    """Modules whose path matches `match` become `target`; None keeps them in full precision.

    With `at_least` or `at_most` a budget chooses the bits, within these; otherwise they are those of the target.
    """

    match: str
    target: Target | None
    at_least: int | None = None
    at_most: int | None = None

    @property
    def is_open(self) -> bool:
        """Whether a budget chooses the bits."""
        return self.at_least is not None or self.at_most is not None


@dataclass(frozen=True)
class Recipe:
    """What to do with each module.

    Attributes:
        default: for Linear, Conv1D and expert weights of the base model that no rule matches.
        rules: the first that matches decides.
        embeddings: of embeddings that no rule matches: a target, True for the default's, False for full precision.
            None: WORDS, where :mod:`.plan` finds that it serves.
        lm_head: likewise of the output head. A matrix that is both is quantized if either says so.
        words: bits of the largest embedding by how frequent its words are, which no rule then decides.
    """

    default: Target = field(default_factory=Target)
    rules: tuple[Rule, ...] = ()
    embeddings: Target | bool | None = None
    lm_head: Target | bool | None = None
    words: Words | None = None

    def asked(self, key: str) -> Target | None:
        """The target that ``"embeddings"`` or ``"lm_head"`` asks for; None if it asks for none."""
        value: Target | bool | None = getattr(self, key)
        return self.default if value is True else value or None

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


def load_recipe(path: Path | str, base: Recipe = _BUILT_IN, options: Mapping[str, Any] = _NO_OPTIONS) -> Recipe:
    """Read a recipe file.

    Args:
        path: the file.
        base: for keys that the file leaves out.
        options: keys of :class:`Target`, and ``embeddings`` and ``lm_head`` (True or False), that override the file's
            default.

    Raises:
        RecipeError: the file cannot be read, or has an unknown key or a bad value.
    """

    def fail(_: str, message: str) -> RecipeError:
        return RecipeError(f"{path}: {message}")

    try:
        obj = strict_json.loads(Path(path).read_bytes(), lambda rule, m: DirectoryError(rule, m))
    except OSError as e:
        raise fail("", f"cannot be read: {e.strerror}") from e
    except DirectoryError as e:
        raise fail("", str(e)) from e
    if not isinstance(obj, dict):
        raise fail("", "is not a JSON object")
    if unknown := set(obj) - {"default", "rules", "embeddings", "lm_head", "words"}:
        raise fail("", f"unknown key {sorted(unknown)[0]!r}; expected default, rules, embeddings, lm_head, words")
    settings = obj.get("default", {})
    if isinstance(settings, dict):
        settings = {**settings, **{key: value for key, value in options.items() if key in _TARGET_KEYS}}
    default = _target(settings, base.default, f"{path}: default")
    rules = obj.get("rules", [])
    if not isinstance(rules, list):
        raise fail("", "rules is not a list")
    words: dict[str, Any] = {}
    for key in ("embeddings", "lm_head"):
        words[key] = options.get(key, obj.get(key, getattr(base, key)))
        if isinstance(words[key], dict):
            words[key] = _target(words[key], default, f"{path}: {key}")
        elif not isinstance(words[key], bool | Target) and (key in obj or words[key] is not None):
            raise fail("", f"{key} must be true, false, or an object such as a rule without its match")
    return Recipe(
        default,
        (*base.rules, *(_rule(rule, default, f"{path}: rule {i + 1}") for i, rule in enumerate(rules))),
        **words,
        words=options.get("words", _words(obj["words"], f"{path}: words") if "words" in obj else base.words),
    )


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """The content of a recipe file from which :func:`load_recipe` makes the same recipe."""
    found: dict[str, Any] = {"default": _settings(recipe.default, Target()), "rules": []}
    for rule in recipe.rules:
        limits = {key: getattr(rule, key) for key in _LIMITS if getattr(rule, key) is not None}
        if rule.target is None:
            found["rules"].append({"match": rule.match, "keep": True})
            continue
        settings = _settings(rule.target, recipe.default)
        if limits:
            settings.pop("bits", None)
        found["rules"].append({"match": rule.match, **limits, **settings})
    for key in ("embeddings", "lm_head"):
        value = getattr(recipe, key)
        if value is not None:
            found[key] = _settings(value, recipe.default) if isinstance(value, Target) else value
    if recipe.words is not None:
        found["words"] = {**asdict(recipe.words), "bits": list(recipe.words.bits)}
    return found


def write_recipe(path: Path | str, recipe: Recipe) -> None:
    """Write a recipe file. Raises OutputError if that cannot be done."""
    write_json(Path(path), recipe_to_dict(recipe))


def _words(obj: Any, where: str) -> Words:
    keys = [f.name for f in fields(Words)]
    if not isinstance(obj, dict) or set(obj) - set(keys):
        raise RecipeError(f"{where}: is {json.dumps(obj)[:80]}, expected an object with {', '.join(keys)}")
    if not isinstance(obj.get("frequencies", ""), str) or not isinstance(obj.get("bits", []), list):
        raise RecipeError(f"{where}: frequencies is a string, and bits is a list")
    if not isinstance(obj.get("ratio", 1.0), int | float) or isinstance(obj.get("ratio"), bool):
        raise RecipeError(f"{where}: ratio is {obj['ratio']!r}, expected a number")
    try:
        given: dict[str, Any] = {key: tuple(value) if key == "bits" else value for key, value in obj.items()}
        return Words(**given)
    except FrequencyError as e:
        raise RecipeError(f"{where}: {e}") from e


def _settings(target: Target, base: Target) -> dict[str, Any]:
    """The keys by which a target differs from what it inherits from."""
    found = {}
    for key in sorted(_TARGET_KEYS):
        value = getattr(target, key)
        meant = target.codec in _MEANT_FOR.get(key, (target.codec,)) and (key != "bits" or target.codec != "codebook")
        usual = max(target.row_bits) if key == "bits" and target.row_bits is not None else getattr(base, key)
        if meant and value != usual:
            found[key] = list(value) if isinstance(value, tuple) else value
    if target.row_bits is not None:  # thousands of numbers: a digit for each
        found["row_bits"] = "".join(map(str, target.row_bits))
    return found


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
    if unknown := set(obj) - _TARGET_KEYS - {"match", "keep", *_LIMITS}:
        known = ", ".join(("match", "keep", *_LIMITS, _KEYS))
        raise RecipeError(f"{where}: unknown key {sorted(unknown)[0]!r}; expected {known}")
    if not isinstance(obj.get("match"), str):
        raise RecipeError(f'{where}: has no "match", the pattern of the modules that it is for')
    settings = {k: v for k, v in obj.items() if k not in ("match", "keep", *_LIMITS)}
    limits = {k: obj[k] for k in _LIMITS if k in obj}
    if not isinstance(obj.get("keep", False), bool):
        raise RecipeError(f"{where}: keep must be true or false")
    if obj.get("keep"):
        if unused := sorted(settings | limits):
            raise RecipeError(f"{where}: keep leaves the module as it is, so {unused[0]!r} means nothing here")
        return Rule(obj["match"], None)
    _check_limits(limits, settings, where)
    return Rule(obj["match"], _target(settings, default, where), **limits)


def _check_limits(limits: Mapping[str, Any], settings: Mapping[str, Any], where: str) -> None:
    for key, value in limits.items():
        if not is_int(value) or not 1 <= value <= 8:
            raise RecipeError(f"{where}: {key} is {value!r}, expected bits from 1 to 8")
    for said in ("bits", "row_bits"):
        if limits and said in settings:
            raise RecipeError(
                f"{where}: says {said}, and {next(iter(limits))}, which leaves them open; say one of them"
            )
    if limits.get("at_least", 1) > limits.get("at_most", 8):
        raise RecipeError(
            f"{where}: asks for at least {limits['at_least']} and at most {limits['at_most']} bits, which contradict "
            "each other"
        )


def _target(obj: Any, base: Target, where: str) -> Target:
    if not isinstance(obj, dict):
        raise RecipeError(f"{where}: is {json.dumps(obj)[:80]}, expected an object")
    if unknown := set(obj) - _TARGET_KEYS:
        raise RecipeError(f"{where}: unknown key {sorted(unknown)[0]!r}; expected {_KEYS}")
    settings = dict(obj)
    for key in ("nested", "table"):
        if isinstance(settings.get(key), list):
            settings[key] = tuple(settings[key])
    if "row_bits" in settings:
        digits = settings["row_bits"]
        if not isinstance(digits, str) or not digits or set(digits) - set("12345678"):
            raise RecipeError(
                f"{where}: row_bits is {json.dumps(digits)[:40]}, expected a string with a digit from 1 to 8 for each "
                "row"
            )
        settings["row_bits"] = tuple(map(int, digits))
        settings.setdefault("bits", max(settings["row_bits"]))
    try:
        return make_target(settings, base)
    except (SchemeError, TypeError, ValueError) as e:
        raise RecipeError(f"{where}: {e}") from e
