"""The cases of spec/vectors: a model that a reader must accept, or one that it must refuse for a rule."""

from __future__ import annotations

from dataclasses import dataclass

from .files import Files, pretty, safetensors
from .models import Model


@dataclass(frozen=True)
class Valid:
    """A model that a reader must accept, with the weights and fingerprints that it must find."""

    name: str
    about: str
    model: Model
    files: Files | None = None  # the model directory, where it is not simply that of the model

    def outputs(self) -> Files:
        files = self.model.files() if self.files is None else self.files
        expected = {**self.model.fingerprints(), "about": self.about}
        return {f"model/{path}": content for path, content in files.items()} | {
            "expected.safetensors": safetensors(self.model.decoded()),
            "expected.json": pretty(expected),
        }


@dataclass(frozen=True)
class Invalid:
    """A model that a reader must refuse when it opens it, or (`found_by` is ``"verify"``) reads all its data."""

    name: str
    rule: str
    about: str
    files: Files  # of the case's directory
    found_by: str = "open"

    def outputs(self) -> Files:
        about = {"rule": self.rule, "found_by": self.found_by, "about": self.about}
        return {**self.files, "expected.json": pretty(about)}


def refused(slug: str, rule: str, about: str, model: Model | Files, found_by: str = "open") -> Invalid:
    """A case named after the rule that it breaks."""
    files = model.files() if isinstance(model, Model) else model
    name = f"{rule.lower()}-{slug}"
    return Invalid(name, rule, about, {f"model/{path}": content for path, content in files.items()}, found_by)
