"""Publish a task: of a model in memory, or of a bundle on disk."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TaskError
from ..hub import check_subfolder, full_repo_id, is_hub_id
from .bundle import CARD_FILE, read_stored_bundle
from .bundle_config import TASK_CONFIG_FILE, TaskConfig, described
from .card import task_card
from .repository import push_task

if TYPE_CHECKING:
    from ..hub import Token

log = logging.getLogger(__name__)


def push_task_to_hub(
    model_or_dir: Any,
    repo_id: str,
    *,
    name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    token: Token = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    base_model: str | None = None,
    metrics: Mapping[str, float] | None = None,
    dtype: str | None = None,
    **card_options: Any,
) -> str:
    """Publish a task with a model card, in one commit.

    Args:
        model_or_dir: a model with a task, or the directory of a bundle, which stays as it is.
        repo_id, subfolder, revision, private, token, commit_message, create_pr, tag: see
            :func:`lowbit_format.tasks.repository.push_task`.
        name: which of the model's tasks; by default the active one.
        base_model: Hub id of the base; by default the one that the model or bundle names.
        metrics: results of the task by name, for the bundle and its card.
        dtype: of a model's deltas in the file, as in ``save_task``.
        **card_options: ``dataset``, ``language``, ``license`` and ``notes`` of :func:`.card.task_card`.

    A directory's own card is kept unless `base_model`, `metrics` or a card option is given.

    Returns:
        The URL of the commit, or of the pull request.

    Raises:
        HubError: the Hub refused, could not be reached, or somebody else pushed in the meantime.
        TaskError: `name` or `dtype` with a directory, or a task that the model does not have.
        FormatError: the directory holds no valid bundle.
    """
    subfolder = check_subfolder(subfolder)
    card = {"metrics": metrics, "subfolder": subfolder, **card_options}
    push: dict[str, Any] = {
        "subfolder": subfolder,
        "revision": revision,
        "private": private,
        "token": token,
        "commit_message": commit_message,
        "create_pr": create_pr,
        "tag": tag,
    }
    if isinstance(model_or_dir, str | os.PathLike):
        if name is not None or dtype is not None:
            raise TaskError("name and dtype choose a model's task; a directory holds one task, as it was saved")
        stored = read_stored_bundle(Path(model_or_dir))
        full_id = full_repo_id(repo_id, token)
        config = _published(stored.bundle.config, base_model, full_id)
        config = replace(config, task=described(config.task, metrics))
        files: dict[str, Path | bytes] = {**stored.files()}
        if config != stored.bundle.config:
            files[TASK_CONFIG_FILE] = (json.dumps(config.to_dict(), indent=2, ensure_ascii=False) + "\n").encode()
        if base_model or metrics or card_options or CARD_FILE not in files:
            bundle = replace(stored.bundle, config=config)
            files[CARD_FILE] = task_card(bundle, nbytes=stored.nbytes, repo_id=full_id, **card).encode()
        return push_task(files, config, full_id, **push)

    from .saving import bundle_of, write_task

    bundle = bundle_of(model_or_dir, name, base_model=base_model, metrics=metrics)
    full_id = full_repo_id(repo_id, token)
    bundle = replace(bundle, config=_published(bundle.config, None, full_id))
    with tempfile.TemporaryDirectory() as temporary:
        paths = write_task(model_or_dir, bundle, Path(temporary), dtype or "float32", repo_id=full_id, **card)
        return push_task(paths, bundle.config, full_id, **push)


def _published(config: TaskConfig, base_model: str | None, repo_id: str) -> TaskConfig:
    """`config` with the base's id on the Hub; a local path, of no use to others, is replaced by None."""
    base = base_model or config.base_model_name_or_path
    if base is not None and not is_hub_id(base):
        log.warning("%s: give the base's id on the Hub (base_model=, --base-model), for people to find it", repo_id)
        return replace(config, base_model_name_or_path=None, revision=None)
    if base_model is None:
        return config
    return replace(config, base_model_name_or_path=base_model, revision=None)  # the revision was the old one's
