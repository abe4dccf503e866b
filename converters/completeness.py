"""What a checkpoint lacks of its model: nothing, what its use does not need, or what makes it another checkpoint.

transformers gives random values to tensors that a file lacks. So a conversion refuses such a checkpoint, unless the
tensors are a head, training or a pooler that nothing here needs: then it is converted as what it is, and says so.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import SourceError
from .architecture import Renamer, bare_model, siblings, tied_keys

# Parameters that stand in for masked inputs in training, and are not looked at otherwise.
_TRAINING = re.compile(r"(^|\.)(masked_spec_embed|mask_token|mask_emb(ed(ding)?)?)$")
# Parts of names that wrappers put in, wherever they stand, and what wraps.
WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "_forward_module.": "a trainer",
}
_PREFIXES = {"module.": "DataParallel", "base_model.model.": "PEFT", "pretrained_model.": "TRL", **WRAPPERS}
_ADAPTER = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer|modules_to_save|ia3_l)\b")
_DEEPEST = 4  # names in a prefix


def fit(model: Any, keys: Iterable[str], directory: Path) -> tuple[Any, tuple[str, ...]]:
    """The model that the checkpoint holds, and what it lacks of it.

    Args:
        model: the class that the config names, on the meta device.
        keys: names of the checkpoint's tensors.
        directory: of the checkpoint, for messages.

    Returns:
        `model`, or its base model where the checkpoint has no tensor of the head, or another class of the same config
        that has just these tensors, such as an encoder alone; and the parameters that the checkpoint does not have.

    Raises:
        SourceError: it lacks what its use needs; the message says what was found instead.
    """
    keys = list(keys)
    missing, found = _missing(model, keys)
    needed = _needed(model, missing)
    if not needed:
        return model, tuple(missing)
    body = f"{model.base_model_prefix}."
    bare = None if any(n.startswith(body) for n in needed) or _has_head(model, found, body) else bare_model(model)
    if bare is not None:
        lacking, _ = _missing(bare, keys)
        if not _needed(bare, lacking):
            return bare, tuple(dict.fromkeys([*missing, *lacking]))
    for other in siblings(model):
        lacking, found = _missing(other, keys)
        if not _needed(other, lacking) and not _strange(other, keys):
            return other, tuple(dict.fromkeys([*needed, *lacking]))
    advice = _advice(model, keys, needed)
    raise SourceError(
        f"{directory}: lacks {len(needed)} tensors of {type(model).__name__}, such as {needed[0]!r}, which would be "
        f"random when the model is loaded; {advice}"
    )


def _missing(model: Any, keys: Iterable[str]) -> tuple[list[str], set[str]]:
    """Tensors of the model that have no values from the keys, and those that a key becomes."""
    rename = Renamer(model)
    given = {target for key in keys for target in rename.targets(key)}
    found = set(given)
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    pairs = [set(pair) for pair in tied_keys(model).items()]
    for _ in pairs:  # a tied tensor may be tied to a tied one
        more = {t for pair in pairs if pair & found for t in pair} - found
        if not more:
            break
        found |= more
    names = model.state_dict()
    return [n for n in names if n not in found and not any(p.search(n) for p in ignored)], given & set(names)


def _needed(model: Any, missing: list[str]) -> list[str]:
    """Those of the missing tensors that the use of the model needs."""
    lacking = set(missing)
    unused = {name for name in missing if _TRAINING.search(name)}
    pooler = {
        name for name in model.state_dict() if name.startswith("pooler.")
    }  # of a bare model: an output of its own
    if model.base_model is model and pooler <= lacking:
        unused |= pooler
    return [name for name in missing if name not in unused]


def _strange(model: Any, keys: Iterable[str]) -> list[str]:
    """The keys that the model does not know."""
    names, rename = set(model.state_dict()), Renamer(model)
    return [key for key in keys if not names & set(rename.targets(key))]


def _has_head(model: Any, found: set[str], body: str) -> bool:
    """Whether the checkpoint has a tensor of the head; also for a model without a base model of its own."""
    return model.base_model is model or any(not name.startswith(body) for name in found)


def _advice(model: Any, keys: list[str], needed: list[str]) -> str:
    """What was found instead, and what to do. Nothing that would make random values permanent."""
    if any(_ADAPTER.search(key) for key in keys):
        return (
            "it holds an adapter that is not merged; load it with PEFT on its base model, call merge_and_unload() and "
            "save_pretrained(), and convert that directory"
        )
    prefixes = _prefixes(model, keys)
    if prefixes:
        options = " ".join(f"--strip-prefix {p}" for p in prefixes)
        made = next((_PREFIXES[p] for p in prefixes if p in _PREFIXES), None)
        what = " and ".join(map(repr, prefixes))
        by = f", as {made} leaves them" if made else ""
        return f"the names of its tensors have {what} in front{by}; pass {options} to take it off"
    strange = _strange(model, keys)
    more = (
        f", or correct config.json: the file has {len(strange)} tensors that this class does not know, such as "
        f"{strange[0]!r}"
        if strange
        else ""
    )
    return f"get the checkpoint again{more}"


def _prefixes(model: Any, keys: list[str]) -> list[str]:
    """What has to be taken off the names so that the model is complete; empty if nothing helps."""
    wrappers = [w for w in WRAPPERS if any(key.startswith(w) or f".{w}" in key for key in keys)]
    stripped = strip(keys, wrappers)
    if wrappers and _complete(model, stripped):
        return wrappers
    counts = Counter(
        ".".join(parts[:n]) + "."
        for key in stripped
        for parts in [key.split(".")]
        for n in range(1, min(len(parts), _DEEPEST))
    )
    often = [prefix for prefix, n in counts.most_common() if 2 * n >= len(keys)]
    often.sort(key=lambda prefix: (prefix not in _PREFIXES, -len(prefix) if prefix in _PREFIXES else 0))
    return next(([p, *wrappers] for p in often if _complete(model, strip(stripped, [p]))), [])


def _complete(model: Any, keys: Iterable[str]) -> bool:
    try:
        fit_names = list(keys)
        missing, found = _missing(model, fit_names)
        needed = _needed(model, missing)
    except SourceError:
        return False
    body = f"{model.base_model_prefix}."
    return not needed or (not any(n.startswith(body) for n in needed) and not _has_head(model, found, body))


def strip(keys: Iterable[str], prefixes: Iterable[str]) -> list[str]:
    """`keys` without `prefixes`: those of wrappers wherever they stand, others in front."""
    result = list(keys)
    for prefix in prefixes:
        if prefix in WRAPPERS:
            pattern = re.compile(rf"(^|(?<=\.)){re.escape(prefix)}")
            result = [pattern.sub("", key) for key in result]
        else:
            result = [key.removeprefix(prefix) for key in result]
    return result
