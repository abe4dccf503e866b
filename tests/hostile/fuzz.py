"""Fuzz the reader with atheris, by hand: any bytes give a FormatError or a model, never another exception.

    pip install atheris
    python tests/hostile/fuzz.py --seeds corpus               # once: the golden files as a corpus
    python tests/hostile/fuzz.py corpus -max_total_time=3600  # libFuzzer's options; -runs=N for a short run

The first byte of an input selects a file of a small model (see TARGETS), the rest is put in its place. A finding is
written to ``crash-<hash>``; run the script with that file as its only argument to reproduce it. Using more than 512 MB
of memory counts as a finding. This is a script: pytest does not collect it.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import struct
import sys
import tempfile
from pathlib import Path

VECTORS = Path(__file__).resolve().parents[2] / "spec" / "vectors"
MODEL, SHARDED = VECTORS / "valid" / "bundle-base" / "model", VECTORS / "valid" / "sharded" / "model"
BUNDLE = VECTORS / "bundles" / "valid" / "all-deltas" / "bundle"

TARGETS = (  # directory, file in it, whether the input replaces the header alone and keeps the file's data
    (MODEL, "model.safetensors", False),
    (MODEL, "model.safetensors", True),
    (MODEL, "config.json", False),
    (SHARDED, "model.safetensors.index.json", False),
    (BUNDLE, "task_scales.safetensors", True),
    (BUNDLE, "task_config.json", False),
)


def split(content: bytes) -> tuple[bytes, bytes]:
    """Header and data of a safetensors file."""
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return content[8:end], content[end:]


def write_seeds(corpus: Path) -> None:
    """Every golden file, valid or not, as inputs for the targets that take it."""
    corpus.mkdir(parents=True, exist_ok=True)
    for number, (_, name, header_only) in enumerate(TARGETS):
        for path in sorted(VECTORS.rglob(name)):
            content = path.read_bytes()
            if header_only and len(content) >= 8:
                content = split(content)[0]
            seed = bytes([number]) + content
            (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)


def main() -> None:
    if sys.argv[1:2] == ["--seeds"]:
        write_seeds(Path(sys.argv[2]))
        return
    import atheris

    with atheris.instrument_imports(include=["lowbit_format"]):
        from lowbit_format.container.reader import ModelReader
        from lowbit_format.errors import FormatError
        from lowbit_format.reference import decode_numpy
        from lowbit_format.tasks.bundle import read_bundle

    work = Path(tempfile.mkdtemp(prefix="fuzz-reader-"))
    for number, (directory, _, _) in enumerate(TARGETS):
        shutil.copytree(directory, work / str(number))

    def read_model(directory: Path) -> None:
        reader = ModelReader(directory)
        reader.verify()
        reader.fingerprint()
        for module in reader.config:
            for expert in [None] if module.experts is None else range(module.experts):
                decode_numpy(reader.matrix(module.path, expert))

    def one_input(data: bytes) -> None:
        number = data[0] % len(TARGETS) if data else 0
        source, name, header_only = TARGETS[number]
        content = data[1:]
        if header_only:
            content = struct.pack("<Q", len(content)) + content + split((source / name).read_bytes())[1]
        (work / str(number) / name).write_bytes(content)
        with contextlib.suppress(FormatError):
            (read_bundle if source == BUNDLE else read_model)(work / str(number))

    try:
        atheris.Setup([sys.argv[0], "-rss_limit_mb=512", "-max_len=8192", *sys.argv[1:]], one_input)
        atheris.Fuzz()
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
