"""Changes to the ``config.json`` of a checkpoint or a lowbit directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONFIG_FILE = "config.json"


def edit_config(directory: Path, change: Callable[[dict[str, Any]], object] | None = None, **keys: Any) -> Path:
    """Set keys of ``config.json``, None removing one, and let `change` edit the rest in place."""
    path = directory / CONFIG_FILE
    config = {**json.loads(path.read_text()), **keys}
    config = {k: v for k, v in config.items() if k not in keys or v is not None}
    if change is not None:
        change(config)
    path.write_text(json.dumps(config))
    return directory
