"""``task_config.json``: what a task bundle is, and which base it belongs to (spec/BUNDLE.md section 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..container import strict_json
from ..errors import BundleError, FormatError, VersionError
from ..schema import check_path, check_version, is_int, is_sha256, is_text

TASK_CONFIG_FILE = "task_config.json"
FORMAT = "lowbit-task"
BUNDLE_VERSION = "1.0"


@dataclass(frozen=True)
class TaskConfig:
    """``task_config.json``: which base the deltas belong to (TSK-1 to TSK-5).

    Attributes:
        base_fingerprint, head_fingerprint: of the base that the deltas were tuned on; the second may be empty.
        method: how they were tuned; informative.
        base_model_name_or_path, revision: where people may find the base; no proof of it.
        bits: nested precision at which they were tuned, or None for the base's own bits.
        modules_to_save: paths of modules that the bundle carries whole.
        format_version: of the bundle.
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
    format_version: str = BUNDLE_VERSION
    others: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON object: every known key written out, and the others behind them."""
        known = asdict(self)
        others = known.pop("others")
        return {"format": FORMAT, **known, "modules_to_save": list(self.modules_to_save), **others}

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
        known = {"format", *(f.name for f in fields(cls))} - {"others"}
        others = {key: value for key, value in obj.items() if key not in known}
        return cls(base, str(head), method, place, revision, bits, tuple(saved), obj["format_version"], others)


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
