"""What tests of reports look at: the parts of an HTML file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

VOID = {"br", "hr", "img", "input", "link", "meta", "wbr"}


@dataclass
class Page(HTMLParser):
    """A parsed page; a tag that is not closed in order is a fault.

    Attributes:
        tags: every start tag with its attributes.
        texts: text by the id of the script element that has it, and all of the page under ``""``.
        faults: what is ill-formed.
    """

    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    _open: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(self.tags[-1])

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open[-1][0] != tag:
            self.faults.append(f"</{tag}> in {[name for name, _ in self._open]} at {self.getpos()}")
            return
        self._open.pop()

    def handle_data(self, data: str) -> None:
        tag, attributes = self._open[-1] if self._open else ("", {})
        key = attributes.get("id") or tag if tag in ("script", "style") else ""
        self.texts[key] = self.texts.get(key, "") + data

    @property
    def plots(self) -> dict[str, Any]:
        """The plots by name."""
        found: dict[str, Any] = json.loads(self.texts["plots"])
        return found


def parse(text: str) -> Page:
    """The parts of a page that is closed to the end."""
    page = Page()
    page.feed(text)
    page.close()
    page.faults += [f"<{name}> is not closed" for name, _ in page._open]
    return page
