"""``task_config.json``: what a task bundle is, and which base it belongs to (spec/BUNDLE.md sections 1 and 6)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..container import strict_json
from ..errors import BundleError, FormatError, VersionError
from ..schema import check_path, check_version, is_int, is_name, is_sha256, is_text
from .metrics import checked_metrics

TASK_CONFIG_FILE = "task_config.json"
FORMAT = "lowbit-task"
PLAIN, DESCRIBED = "1.0", "1.1"  # versions: without and with a description of the task


@dataclass(frozen=True)
class Description:
    """The key ``task``: what the task is, for people and programs (TSK-12).

    Attributes:
        kind: ``"classification"``, ``"regression"``, ``"token-classification"``, ``"language-modelling"``, or another
            word; empty if it is not said.
        labels: names of the labels, in the order of the outputs.
        metrics: results by name.
        others: keys that this version does not know, kept where a bundle is copied.
    """

    kind: str = ""
    labels: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON object of what is said."""
        said = {"kind": self.kind, "labels": list(self.labels), "metrics": dict(self.metrics)}
        return {key: value for key, value in said.items() if value} | dict(self.others)

    @classmethod
    def from_dict(cls, obj: object, fail: Callable[[str, str], BundleError]) -> Description:
        """Parse and check the object; raises what `fail` makes of a rule and a message."""

        def wrong(what: str, found: object, expected: str) -> BundleError:
            return fail("TSK-12", f"{what} is {found!r}, expected {expected}")

        if not isinstance(obj, Mapping):
            raise wrong("task", obj, "an object, or null")
        kind, labels, metrics = obj.get("kind", ""), obj.get("labels", []), obj.get("metrics", {})
        if not is_text(kind):
            raise wrong("task.kind", kind, "a string without control characters")
        if not isinstance(labels, list) or not all(map(is_name, labels)) or len(set(labels)) != len(labels):
            raise wrong("task.labels", labels, "a list of names, no two of them the same")
        if not isinstance(metrics, Mapping) or not all(is_name(n) and _is_finite(v) for n, v in metrics.items()):
            raise wrong("task.metrics", metrics, "finite numbers by name")
        others = {key: value for key, value in obj.items() if key not in ("kind", "labels", "metrics")}
        return cls(kind, tuple(labels), {name: float(value) for name, value in metrics.items()}, others)


@dataclass(frozen=True)
class TaskConfig:
    """``task_config.json``: which base the deltas belong to (TSK-1 to TSK-5, TSK-12).

    Attributes:
        base_fingerprint, head_fingerprint: of the base that the deltas were tuned on; the second may be empty.
        method: how they were tuned; informative.
        base_model_name_or_path, revision: where people may find the base; no proof of it.
        bits: nested precision at which they were tuned, or None for the base's own bits.
        modules_to_save: paths of modules that the bundle carries whole.
        task: what the task is, if that is said.
        format_version: of the bundle; if not given, the lowest that has what it uses.
        others: keys that this version does not know. A reader ignores them (TSK-5), but what copies a bundle keeps
            them: they are the owner's, or mean something to a later minor version (VER-2).
    """

    base_fingerprint: str
    head_fingerprint: str = ""
    method: str = "alphatuning"
    base_model_name_or_path: str | None = None
    revision: str | None = None
    bits: int | None = None
    modules_to_save: tuple[str, ...] = ()
    task: Description | None = None
    format_version: str = ""
    others: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if self.format_version in ("", PLAIN, DESCRIBED):  # a copy of a later one keeps what this version does not know
            object.__setattr__(self, "format_version", PLAIN if self.task is None else DESCRIBED)

    def to_dict(self) -> dict[str, Any]:
        """JSON object: every known key written out and the others; ``task`` where there is one."""
        written = ("base_fingerprint", "head_fingerprint", "method", "base_model_name_or_path", "revision", "bits")
        known = {"format": FORMAT, "format_version": self.format_version, **{k: getattr(self, k) for k in written}}
        task = {} if self.task is None else {"task": self.task.to_dict()}
        return {**known, "modules_to_save": list(self.modules_to_save), **self.others, **task}

    @classmethod
    def from_dict(cls, obj: object, *, file: object = None) -> TaskConfig:
        """Parse and check the object; raises BundleError, or VersionError for another major version."""

        def fail(rule: str, message: str) -> BundleError:
            return BundleError(rule, message, file=file)

        if not isinstance(obj, Mapping) or obj.get("format") != FORMAT:
            raise fail("TSK-1", f"is not an object with format {FORMAT!r}: this is no task bundle")
        try:
            check_version(obj.get("format_version"), file=None, rule="TSK-1")
        except FormatError as e:
            kind = VersionError if isinstance(e, VersionError) else BundleError
            raise kind("TSK-1", str(e), file=file) from e
        base, head = obj.get("base_fingerprint"), obj.get("head_fingerprint", "")
        if not is_sha256(base):
            raise fail("TSK-2", f"base_fingerprint is {base!r}, expected 64 lower-case hexadecimal digits")
        if head != "" and not is_sha256(head):
            raise fail("TSK-2", f"head_fingerprint is {head!r}, expected 64 lower-case hexadecimal digits, or none")
        bits = obj.get("bits")
        if bits is not None and not (is_int(bits) and 1 <= bits <= 8):
            raise fail("TSK-3", f"bits is {bits!r}, expected an integer from 1 to 8, or null")
        for key in ("base_model_name_or_path", "revision"):
            if obj.get(key) is not None and not is_text(obj[key]):
                raise fail("TSK-4", f"{key} is {obj[key]!r}, expected a string without control characters, or null")
        method, saved = obj.get("method"), obj.get("modules_to_save", [])
        if not is_text(method):
            raise fail("TSK-5", f"method is {method!r}, expected a string without control characters")
        if not isinstance(saved, list) or not all(map(_is_path, saved)) or len(set(saved)) != len(saved):
            raise fail("TSK-5", f"modules_to_save is {saved!r}, expected a list of module paths, none of them twice")
        place, revision = obj.get("base_model_name_or_path"), obj.get("revision")
        version = str(obj["format_version"])
        known = {"format", *(f.name for f in fields(cls))} - {"others"}
        task = None
        if version == PLAIN:  # where the key means nothing
            known.remove("task")
        elif obj.get("task") is not None:
            task = Description.from_dict(obj["task"], fail)
        others = {key: value for key, value in obj.items() if key not in known}
        return cls(base, str(head), method, place, revision, bits, tuple(saved), task, version, others)


def described(task: Description | None, metrics: Mapping[str, float] | None) -> Description | None:
    """`task` with results in the place of its own, if there are any; numbers that are not finite stay out of it.

    Raises TaskError for what is no name or no number.
    """
    finite = {name: value for name, value in checked_metrics(metrics).items() if math.isfinite(value)}
    return replace(task or Description(), metrics=finite) if finite else task


def read_task_config(directory: Path) -> TaskConfig:
    """The configuration of the bundle in `directory`; raises BundleError or VersionError."""
    path = directory / TASK_CONFIG_FILE

    def fail(rule: str, message: str) -> BundleError:
        return BundleError("TSK-1", message, file=path)

    if not directory.is_dir():
        what = "is no directory" if directory.exists() else "there is no such directory"
        raise BundleError("TSK-1", f"{what}; expected one that contains {TASK_CONFIG_FILE}", file=directory)
    if not path.is_file():
        raise fail("TSK-1", "there is no such file; a task bundle has one")
    return TaskConfig.from_dict(strict_json.load_file(path, fail), file=path)


def _is_path(value: object) -> bool:
    try:
        return bool(check_path(value, file=None))
    except FormatError:
        return False


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
