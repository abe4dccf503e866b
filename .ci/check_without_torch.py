"""Read, verify and decode the valid golden files in an environment without torch or transformers.

python .ci/check_without_torch.py spec/vectors
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from lowbit_format import ModelReader


def main(vectors: Path) -> None:
    """Exit with an error if a model cannot be read, or if torch is installed after all."""
    for name in ("torch", "transformers", "safetensors"):
        if importlib.util.find_spec(name) is not None:
            sys.exit(f"{name} is installed here: this check is for an environment without it")
    weights = 0
    for directory in sorted((vectors / "valid").iterdir()):
        reader = ModelReader(directory / "model")
        reader.verify()
        weights += sum(reader.decode(module.path).size for module in reader.config)
    print(f"decoded {weights:,} weights of {len(list((vectors / 'valid').iterdir()))} models without torch")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
