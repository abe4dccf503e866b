"""Parts of the data: to train on, to choose by, to judge by."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

MOST = 2000  # examples that are held out: more would cost training data and time, and tell little more


def hold_out(groups: Sequence[Any], labels: Sequence[Any], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of examples to keep and to hold out, the latter a `fraction` of each label, at most :data:`MOST` in all.

    Args:
        groups: of each example what it is known by: examples of one group go into one part, so that none is held out
            that was trained on.
        labels: of each example.
        fraction: to hold out; at least one example of a label that has two groups or more.
        seed: of the draw.
    """
    members = defaultdict[str, list[int]](list)
    for i, group in enumerate(groups):
        members[json.dumps(group, sort_keys=True, default=str)].append(i)
    by_label = defaultdict[Any, list[list[int]]](list)
    for numbers in members.values():
        by_label[labels[numbers[0]]].append(numbers)
    fraction, draw, out = min(fraction, MOST / max(1, len(groups))), random.Random(seed), set[int]()
    for label in sorted(by_label, key=str):
        parts = by_label[label]
        count = min(max(1, round(fraction * len(parts))), len(parts) - 1)
        for numbers in draw.sample(parts, count):
            out.update(numbers)
    return [i for i in range(len(groups)) if i not in out], sorted(out)
