"""Publish a task: of a model in memory, or of a bundle on disk."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TaskError
from ..hub import check_subfolder, full_repo_id, is_hub_id, push_task_directory
from .bundle import CARD_FILE, SCALES_FILE, TASK_CONFIG_FILE, read_bundle
from .card import task_card

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
            :func:`lowbit_format.hub.push_task_directory`.
        name: which of the model's tasks; by default the active one.
        base_model: Hub id of the base, where people will find it; by default what the model or bundle says.
        metrics: what the task reached, by name, for the card.
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
    from_directory = isinstance(model_or_dir, str | os.PathLike)
    if from_directory and (name is not None or dtype is not None):
        raise TaskError("name and dtype choose a model's task; a directory holds one task, as it was saved")
    full_id = full_repo_id(repo_id, token)
    card = {"metrics": metrics, "repo_id": full_id, "subfolder": subfolder, **card_options}
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        if from_directory:
            _copy(Path(model_or_dir), directory)
            if base_model is not None:
                _rename_base(directory / TASK_CONFIG_FILE, base_model)
            if base_model or metrics or card_options or not (directory / CARD_FILE).is_file():
                nbytes = (directory / SCALES_FILE).stat().st_size
                text = task_card(read_bundle(directory), nbytes=nbytes, **card)
                (directory / CARD_FILE).write_text(text, "utf-8", newline="\n")
        else:
            from .saving import save_task

            options = card if dtype is None else {"dtype": dtype, **card}
            save_task(model_or_dir, directory, name=name, base_model=base_model, **options)
        base = read_bundle(directory).config.base_model_name_or_path
        if base is not None and not is_hub_id(base):  # a path here: no business of others, and no use to them
            log.warning("%s: give the base's id on the Hub (base_model=, --base-model), for people to find it", full_id)
            _rename_base(directory / TASK_CONFIG_FILE, None)
        return push_task_directory(
            directory,
            full_id,
            subfolder=subfolder,
            revision=revision,
            private=private,
            token=token,
            commit_message=commit_message,
            create_pr=create_pr,
            tag=tag,
        )


def _copy(source: Path, directory: Path) -> None:
    """The bundle's files, once they are known to be one."""
    read_bundle(source)
    for name in (TASK_CONFIG_FILE, SCALES_FILE, CARD_FILE):
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def _rename_base(path: Path, base_model: str | None) -> None:
    """Say in ``task_config.json`` that the base is `base_model`; all keys stay, but a revision was the old one's."""
    config = json.loads(path.read_text("utf-8"))
    config.update(base_model_name_or_path=base_model, revision=None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8", newline="\n")
