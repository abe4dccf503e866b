"""Hook of MkDocs: pages of the site whose files lie beside what they describe.

Links in these files, and in docs/, are written for the repository: they work there, and in an editor. Here they
become links of the site where the target is one of its pages, and links to the repository where it is not.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

import tomllib
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {  # file or folder in the repository -> its place in the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "RELEASING.md": "releasing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "spec/FORMAT.md": "spec/FORMAT.md",
    "spec/BUNDLE.md": "spec/BUNDLE.md",
    "spec/vectors/README.md": "spec/vectors/README.md",
    "lowbit_format/kernels/cpu/README.md": "kernels/cpu.md",
    "lowbit_format/kernels/gpu/README.md": "kernels/gpu.md",
    "examples": "examples",
    "tools/benchmarks": "benchmarks",
}
FROM_FOLDERS = {".md", ".svg"}
LINK = re.compile(
    r"\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)"
)  # a relative link: text, target, anchor; all others have a colon
FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Take the repository's address from pyproject.toml, where it stands once."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"].get("urls", {})
    config.repo_url = next((urls[key].rstrip("/") for key in ("Repository", "Source") if key in urls), None)
    config.edit_uri = None
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the files of :data:`PAGES`."""
    for source, place in _places().items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages."""
    places = _places()
    sources = {place: source for source, place in places.items()}
    here = page.file.src_uri
    folder = posixpath.dirname(sources.get(here, f"docs/{here}"))

    def site(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[2]))
        place = places.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        if place is not None:
            return f"[{match[1]}]({posixpath.relpath(place, posixpath.dirname(here) or '.')}{match[3] or ''})"
        if not (ROOT / target).exists():
            return match[0]  # strict mode reports it
        if config.repo_url is None:
            return match[1]
        return f"[{match[1]}]({config.repo_url}/blob/main/{target}{match[3] or ''})"

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(site, part) for part in parts)


def _places() -> dict[str, str]:
    """:data:`PAGES` file by file."""
    found = dict[str, str]()
    for source, place in PAGES.items():
        if (path := ROOT / source).is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.suffix in FROM_FOLDERS]
            found |= {p.relative_to(ROOT).as_posix(): f"{place}/{p.relative_to(path).as_posix()}" for p in inside}
        else:
            found[source] = place
    return found
