"""The layers of the library: which part may import which. This table is the one place where that is written down."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "lowbit_format"
FOLDERS = {ROOT / "lowbit_format": PACKAGE, ROOT / "converters": f"{PACKAGE}.converters"}

# From the bottom to the top. A part imports from its own layer and from those below it, nowhere else.
LAYERS: list[tuple[str, str]] = [
    ("errors dtypes bits codecs", "facts that need nothing: errors, numbers on disk, bits and meanings of codes"),
    ("schema", "what a config says"),
    ("tensors matrix", "one matrix as the file has it: its tensors, and their content in numpy"),
    ("machine", "threads and the compiler of this machine: below all that computes"),
    ("reference", "the decoder that every other one is judged by: it must not lean on what it judges"),
    ("container", "files: a reader works with numpy and numba alone, for those who only inspect or verify"),
    ("quantize kernels", "making codes and computing with them; neither knows the other, nor an nn.Module"),
    ("runtime", "modules of torch over the kernels, and the tasks that are active in them"),
    ("hub remote", "transport to and from the Hub; what it carries it need not understand"),
    ("integrations", "transformers and PEFT, which take the runtime's modules"),
    ("tasks", "bundles of many tasks over one base"),
    ("calibration", "what the layers of a float model see of data, and quantizing them for it"),
    (
        "converters export loading precision partial_download evaluation differences vllm",
        "whole models in and out: they use all of the above",
    ),
    ("report", "what a model looks like, of which it reads everything"),
    ("tuning", "a task in one call: data in, a bundle out"),
    ("cli testing", "what people call: commands, and tests of other backends and readers"),
    (PACKAGE, "the public names, which are imported when they are first used, from wherever they are defined"),
]
LEVEL = {part: level for level, (parts, _) in enumerate(LAYERS) for part in parts.split()}

FACTS = {"__version__"}  # of the package itself, which every part may read

# Parts for those who read, verify or inspect without torch and transformers (pip install --no-deps).
WITHOUT_TORCH = [
    "errors",
    "schema",
    "codecs",
    "bits",
    "dtypes",
    "matrix",
    "machine",
    "reference",
    "container",
    "tasks.bundle",
    "tasks.bundle_config",
]
HEAVY = {"torch", "transformers", "peft", "triton"}


class Import(NamedTuple):
    """One name that a module imports."""

    module: str  # which imports
    target: str  # dotted name, of a module or of something in it
    line: int
    at_top: bool  # when the module itself is imported, not within a function


def modules() -> dict[str, Path]:
    """Every module of the library, by dotted name."""
    found = {}
    for folder, name in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([name, *parts]).removesuffix(".__init__")] = path
    return found


def imports(module: str, path: Path) -> Iterator[Import]:
    """All imports of a file, wherever they stand, and strings given to ``import_module``."""
    tree = ast.parse(path.read_text("utf-8"))
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    late = {id(n) for f in ast.walk(tree) if _runs_later(f) for n in ast.walk(f)}
    for node in ast.walk(tree):
        for target in _targets(node, package):
            yield Import(module, target, node.lineno, id(node) not in late)  # type: ignore[attr-defined]


def _targets(node: ast.AST, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{_absolute('.' * node.level + (node.module or ''), package)}.{a.name}" for a in node.names]
    called = getattr(getattr(node, "func", None), "attr", getattr(getattr(node, "func", None), "id", ""))
    if isinstance(node, ast.Call) and called in ("import_module", "__import__") and node.args:
        text = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
        return [_absolute(text, package)] if isinstance(text, str) else []
    return []


def _absolute(name: str, package: str) -> str:
    """A relative module name such as ``..matrix``, seen from a package."""
    dots = len(name) - len(name.lstrip("."))
    if not dots:
        return name
    base = package.split(".")[: len(package.split(".")) - dots + 1]
    return ".".join([*base, *filter(None, [name[dots:]])])


def _runs_later(node: ast.AST) -> bool:
    """Functions, and what only a type checker sees."""
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))


def part(name: str) -> str:
    """The part of the library that a dotted name belongs to: ``kernels`` of ``lowbit_format.kernels.cpu.tiles``."""
    names = name.split(".")
    if len(names) == 1 or (len(names) == 2 and names[1] in FACTS):
        return PACKAGE
    return names[1] if names[1] in LEVEL else PACKAGE


def ours() -> Iterator[Import]:
    for module, path in modules().items():
        for found in imports(module, path):
            if found.target.split(".")[0] == PACKAGE and found.target.rpartition(".")[2] not in FACTS:
                yield found


def test_every_part_has_a_layer() -> None:
    parts = {module.split(".")[1] for module in modules() if "." in module}
    assert parts == LEVEL.keys() - {PACKAGE}
    assert len(LEVEL) == sum(len(parts.split()) for parts, _ in LAYERS)


def test_no_import_against_the_order() -> None:
    against = [i for i in ours() if LEVEL[part(i.target)] > LEVEL[part(i.module)]]
    assert [f"{i.module}:{i.line} imports {i.target}" for i in against] == []


def _edge(found: Import) -> tuple[str, str]:
    return part(found.module), part(found.target)


def test_quantize_and_kernels_do_not_know_each_other() -> None:
    edges = {_edge(i) for i in ours()}
    assert not edges & {("kernels", "quantize"), ("quantize", "kernels")}


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_reading_needs_no_torch(name: str) -> None:
    """At the top of these modules, nor of what they import there."""
    known, todo, seen = modules(), [m for m in modules() if f"{m}.".startswith(f"{PACKAGE}.{name}.")], set[str]()
    assert todo
    while todo:
        module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        for found in imports(module, known[module]):
            if not found.at_top:
                continue
            assert found.target.split(".")[0] not in HEAVY, f"{module}:{found.line} imports {found.target}"
            todo += [m for m in (found.target, found.target.rpartition(".")[0]) if m in known and m != PACKAGE]


def test_no_test_imports_a_test() -> None:
    """What two tests share is in tests/support."""
    tests = sorted((ROOT / "tests").rglob("*.py"))
    assert len(tests) > 50
    for path in tests:
        for found in imports("tests", path):
            names = found.target.split(".")
            assert not any(name.startswith("test_") for name in names), f"{path}:{found.line}"
            assert names[0] != "tests", f"{path}:{found.line} imports {found.target}: write support.… instead"


@pytest.mark.parametrize(
    ("line", "package", "targets"),
    [
        ("import torch.nn", "a.b", ["torch.nn"]),
        ("from ..matrix import A, B", "lowbit_format.a.b", ["lowbit_format.a.matrix.A", "lowbit_format.a.matrix.B"]),
        ("from . import x", "lowbit_format.cli", ["lowbit_format.cli.x"]),
        ("from ... import reference", "lowbit_format.kernels.cpu", ["lowbit_format.reference"]),
        ("importlib.import_module('.hub', __package__)", "lowbit_format", ["lowbit_format.hub"]),
        ("import_module(name)", "lowbit_format", []),
    ],
)  # fmt: skip
def test_what_counts_as_an_import(line: str, package: str, targets: list[str]) -> None:
    assert [t for node in ast.walk(ast.parse(line)) for t in _targets(node, package)] == targets
