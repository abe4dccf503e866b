"""Links of all documents lead to files that exist, and the reference has every public name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lowbit_format

ROOT = Path(__file__).parents[2]
FOLDERS = ("", ".github", "docs", "examples", "spec", "spec/vectors", "tools", "lowbit_format/kernels")
DOCUMENTS = sorted(
    {p for folder in FOLDERS for p in (ROOT / folder).glob("*.md")} | set((ROOT / "tools").rglob("*.md"))
    | set((ROOT / "lowbit_format").rglob("*.md"))
)  # fmt: skip
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s#:]+)(?:#[^)\s]*)?\)")  # relative ones: all others have a colon


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(document: Path) -> None:
    links = _LINK.findall(_FENCE.sub("", document.read_text("utf-8")))
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_the_reference_has_every_public_name() -> None:
    text = (ROOT / "docs" / "reference.md").read_text("utf-8")
    documented = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)", text, re.MULTILINE)}
    public = set(lowbit_format.__all__) - {"LowbitError", "__version__"}  # the errors are there as a module
    assert public - documented == set()
