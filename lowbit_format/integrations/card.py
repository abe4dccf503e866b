"""The model card of a base that is pushed from memory; the converter writes a fuller one beside what it converts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def base_card(model: Any, repo_id: str, tags: Sequence[str] = ()) -> str:
    """``README.md``: what the model is, and how to load it without ending up with random weights."""
    schemes = {m.scheme: m for m in model.config.quantization_config.parsed}
    kinds = ", ".join(sorted({f"{s.codec}, {s.bits} bits, group size {s.group_size or 'of a row'}" for s in schemes}))
    lines = [f"- {tag}" for tag in ("lowbit", "quantized", *tags)]
    front = ["---", "library_name: transformers", "tags:", *lines, "---"]
    return (
        "\n".join(front)
        + f"""

# {repo_id}

A {type(model).__name__} with its weights in bit-planes ({kinds}), in the lowbit format.

## Loading

```
pip install lowbit-format
```
```python
import lowbit_format  # registers the format with transformers; without this line the weights would be RANDOM

model = lowbit_format.from_pretrained("{repo_id}")
```

After the import, `from_pretrained` of transformers' own classes works too. Tasks for this base have the fingerprint
`{model.lowbit_base.fingerprint.body}` in their `task_config.json`.
"""
    )
