"""Make the golden files in spec/vectors: models and task bundles to test any reader of the format with.

    python -m tools.golden            # make the files, and delete those that are no longer made
    python -m tools.golden --check    # compare with the files on disk; exit status 1 if they differ

The maker was written from spec/FORMAT.md and spec/BUNDLE.md alone and shares no code with the package
``lowbit_format``, so it is a second opinion on every number. It needs the standard library and numpy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from .bundles import bundle_bases, bundles
from .cases import Invalid
from .files import Files
from .invalid_bundles import damaged_base, invalid_bundles
from .invalid_config import config_cases
from .invalid_files import directory_cases, header_cases, json_cases
from .invalid_tensors import data_cases, tensor_cases
from .valid import valid_cases

ROOT = Path(__file__).resolve().parents[2] / "spec" / "vectors"


def invalid_cases() -> Iterator[Invalid]:
    yield from directory_cases()
    yield from json_cases()
    yield from config_cases()
    yield from header_cases()
    yield from tensor_cases()
    yield from data_cases()
    yield damaged_base()


README = """\
# Golden files

Files to test a reader of the lowbit model format with. `python -m tools.golden` makes them all; do not edit them by
hand. It shares no code with the library. `python -m tools.golden --check` says whether they are current. The expected
weights come from [an example reader](../../tools/golden/reader.py), which was written from the specification alone.

- `valid/<name>/model/` is a model directory that a reader must accept. `valid/<name>/expected.safetensors` holds the
  decoded weights in binary32: the tensor `<module>`, `[rows, cols]` or `[experts, rows, cols]` as in the configuration
  (not transposed for `conv1d` and `experts_transposed`), and `<module>@k2` for the module at the nested precision 2.
  A reader must give exactly these bits, the sign of zero included. `expected.json` holds `fingerprint`,
  `head_fingerprint` and `about`.
- `invalid/<name>/model/` is a directory that must be refused. `expected.json` holds the broken `rule`, `about`, and
  `found_by`: with `open` a reader must refuse when it opens the directory and has read the configuration, the index and
  the headers; with `verify` the fault is in the tensors' data. Section 2 is to be checked before the tensors:
  a wrong `shape` in the configuration seldom fits any tensor.
- `bundles/valid/<name>/bundle/` is a task bundle. `expected.json` names its `base`, a path below this directory, and
  the precision `bits` to apply it at. `expected.safetensors` holds, in binary32, `<module>.scales` and, where there are
  any, `<module>.offsets` and `<module>.zeros` of every module with a delta, as they are while the bundle is applied.
  `<module>` is the name that the bundle uses, also for experts.
- `bundles/invalid/<name>/bundle/` must be refused, at the latest when it is applied to `base` at its own `bits`, or at
  those of `expected.json` where that has the key `bits`. For MAT-7 the files of `base` stand for the model. Where
  `expected.json` has the key `verify`, the bundle is good and the bytes of `base` are not: it must be refused by a
  reader that was asked to check them, and may be applied by digests (FPR-5).

Where a fault breaks several rules, `rule` is one of them; a reader may name another.

To test a reader: for each `valid` directory compare the decoded tensors byte for byte with the expected ones, and the
fingerprints as strings, and check that a precision above the largest `bits` is refused (NST-3); for each `invalid`
directory check that the reader reports an error, and not a crash, a partial result or a large allocation.
"""


def collect() -> Files:
    """All files by their path below spec/vectors."""
    files: Files = {"README.md": README.encode()}
    for folder, cases in (
        ("valid", chain(valid_cases(), bundle_bases())),
        ("invalid", invalid_cases()),
        ("bundles/valid", bundles()),
        ("bundles/invalid", invalid_bundles()),
    ):
        seen: set[str] = set()
        for case in cases:
            assert case.name not in seen, f"two cases named {folder}/{case.name}"
            seen.add(case.name)
            files |= {f"{folder}/{case.name}/{path}": content for path, content in case.outputs().items()}
    return files


def on_disk(root: Path) -> Files:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def differences(wanted: Files, present: Files) -> list[str]:
    lines = [f"missing: {path}" for path in wanted if path not in present]
    lines += [f"stale: {path}" for path in present if path not in wanted]
    lines += [f"differs: {path}" for path in wanted if path in present and wanted[path] != present[path]]
    return sorted(lines)


def write(root: Path, wanted: Files) -> None:
    present = on_disk(root)
    for path in set(present) - set(wanted):
        (root / path).unlink()
    for path, content in wanted.items():
        if present.get(path) != content:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(content)
    for folder in sorted((path for path in root.rglob("*") if path.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the golden files in spec/vectors.")
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 with a list if anything differs")
    arguments = parser.parse_args()
    wanted = collect()
    if arguments.check:
        lines = differences(wanted, on_disk(ROOT))
        print("\n".join(lines) or f"{len(wanted)} files are current")
        return 1 if lines else 0
    write(ROOT, wanted)
    print(f"{len(wanted)} files, {sum(map(len, wanted.values()))} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
