"""What is known of an unfinished tuning, in a directory beside its output, from which it resumes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from ..container.atomic import disk_errors, write_json
from ..errors import OutputError

JOURNAL = "tuning.json"
BEFORE = {"optimizer": "adam"}  # what a setting was before there was a choice; older journals do not have it


class Journal(MutableMapping[float, float]):
    """The losses of learning rates, by rate; each is on the disk as soon as it is set.

    Args:
        work: the directory, which holds checkpoints too.
        settings: of the tuning; one resumes only with the same.
        resume: whether to go on with what is there, if there is something.

    Raises:
        OutputError: an unfinished tuning is there, and is not to be resumed, or had other settings.
    """

    def __init__(self, work: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        self.work, self.settings, self.losses, self.old = work, dict(settings), dict[float, float](), dict[str, Any]()
        if (work / JOURNAL).exists():
            self._read()
            if not resume and (self.losses or any(work.glob("checkpoint-*"))):
                raise OutputError(
                    f"{work}: holds an unfinished tuning; go on with --resume (resume=True), or remove it"
                )
            if resume:
                self._check()
        elif work.exists() and any(work.iterdir()):
            raise OutputError(f"{work}: is in the way: checkpoints go there. Move it, or choose another name")
        with disk_errors(work):
            work.mkdir(parents=True, exist_ok=True)
        self._write()

    def finish(self) -> None:
        """Remove it: the tuning is done."""
        shutil.rmtree(self.work, ignore_errors=True)

    def _read(self) -> None:
        path = self.work / JOURNAL
        try:
            known = json.loads(path.read_text("utf-8"))
            self.old, losses = dict(known["settings"]), known["losses"]
            self.losses = {float(rate): math.inf if loss is None else float(loss) for rate, loss in losses.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise OutputError(f"{path}: cannot be read ({e}); remove {self.work} and begin anew") from e

    def _check(self) -> None:
        old, new = BEFORE | self.old, BEFORE | json.loads(json.dumps(self.settings))
        for key in old | new:
            found, expected = old.get(key), new.get(key)
            if found != expected:
                raise OutputError(
                    f"{self.work}: the unfinished tuning has {key} {found!r}, this one {expected!r}; give the same, "
                    "or remove that directory"
                )

    def _write(self) -> None:
        losses = {repr(rate): loss if math.isfinite(loss) else None for rate, loss in self.losses.items()}
        write_json(self.work / JOURNAL, {"settings": self.settings, "losses": losses})

    def __getitem__(self, rate: float) -> float:
        return self.losses[rate]

    def __setitem__(self, rate: float, loss: float) -> None:
        self.losses[rate] = loss
        self._write()

    def __delitem__(self, rate: float) -> None:
        del self.losses[rate]

    def __iter__(self) -> Iterator[float]:
        return iter(self.losses)

    def __len__(self) -> int:
        return len(self.losses)
