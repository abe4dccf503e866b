"""``lowbit_format.from_pretrained``: the class from the config, a precision, checking, and a task, in one call."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import LoadError
from .hub import is_hub_id
from .integrations.architecture import known_class
from .schema import QUANT_METHOD, QuantizationConfig

if TYPE_CHECKING:
    from .partial_download import Fetched
    from .tasks.bundle_config import Description

_TASK_OPTIONS = ("cache_dir", "token", "local_files_only")  # of the Hub, which hold for a task as for its base


def from_pretrained(
    path_or_repo: str | os.PathLike[str],
    *,
    bits: int | None = None,
    verify: bool = False,
    revision: str | None = None,
    model_class: Any = None,
    task: str | os.PathLike[str] | None = None,
    activations: str = "exact",
    **kwargs: Any,
) -> Any:
    """Load a lowbit model from a directory or the Hub.

    Args:
        path_or_repo: directory, or Hub id.
        bits: read the first `bits` planes of every matrix, with the parameters stored for that (NST-1). Of a model on
            the Hub no others are fetched, see :func:`lowbit_format.fetch_precision`, unless the cache holds all.
        verify: check all digests and rules of the format before loading. This takes the whole files, also of the Hub.
        revision: branch, tag or commit on the Hub.
        model_class: a transformers class, such as ``AutoModelForSequenceClassification``; by default the class
            that the task needs, or that ``config.json`` names under ``architectures``, or ``AutoModel``.
        task: a task bundle, as a directory or Hub id, to load and to compute with. `bits` is then the precision that
            it was tuned at, and the names of its labels are those of ``model.config``. (More options:
            :func:`lowbit_format.load_task`.)
        activations: ``"int8"`` rounds what products are made of, for speed on a CPU, see
            :func:`lowbit_format.set_activations`.
        **kwargs: to the class's ``from_pretrained``: ``dtype``, ``device_map``, ``token``, …

    Raises:
        LoadError: not a lowbit model, or one that does not fit the class.
        FormatError: the directory breaks a rule of the format; PrecisionError: it has no parameters for `bits`.
        BundleError, FingerprintError, HubError: the task cannot be had, or belongs to another base.
        UnsupportedOperationError: `activations` is unknown, or not for the device.
    """
    import transformers

    from .integrations.quantizer import LoadOptions, load_options
    from .runtime.activations import check_activations, set_activations
    from .tasks.finding import find_bundle
    from .tasks.serving import load_task, set_task

    check_activations(activations)
    where = ("cache_dir", "token", "local_files_only", "force_download", "subfolder")
    hub = {key: kwargs[key] for key in where if key in kwargs}
    config, _ = transformers.PreTrainedConfig.get_config_dict(path_or_repo, revision=revision, **hub)
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method != QUANT_METHOD:
        raise LoadError(
            f"{path_or_repo}: not a lowbit model (quant_method is {method!r}); convert it with convert_hf_to_lowbit"
        )
    bundle = None if task is None else find_bundle(task, **{k: hub[k] for k in hub if k in _TASK_OPTIONS}).bundle
    about = None if bundle is None else bundle.config.task
    if model_class is None:
        model_class = _class_for(about) or _class_of(config, path_or_repo)
    if about is not None and not kwargs.keys() & {"config", "num_labels", "id2label", "label2id"}:
        kwargs |= outputs_of(about)
    if bundle is not None and bits is None:
        bits = bundle.config.bits
    part = None if verify else _part(path_or_repo, config, bits, revision, hub)
    if part is None:
        with load_options(LoadOptions(bits, verify)):
            model = model_class.from_pretrained(path_or_repo, revision=revision, **kwargs)
    else:
        with load_options(LoadOptions(origin=part.origin)):
            model = model_class.from_pretrained(part.directory, **kwargs)
        model.name_or_path = model.config._name_or_path = part.repo_id  # for cards, and for tasks that are saved
    if bundle is not None:
        set_task(model, load_task(model, bundle, name=Path(str(task)).name))
    if activations != "exact":
        set_activations(model, activations)
    return model


HEADS = {  # kind of a task (TSK-12) -> the class of transformers that has its outputs
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "language-modelling": "AutoModelForCausalLM",
}


def _class_for(about: Description | None) -> Any:
    """The class that a task needs; None where it does not say."""
    import transformers

    return None if about is None or about.kind not in HEADS else getattr(transformers, HEADS[about.kind])


def outputs_of(about: Description) -> dict[str, Any]:
    """Options with which a head has as many outputs as the task, and names for them."""
    if about.kind == "regression":
        return {"num_labels": 1, "problem_type": "regression"}
    if not about.labels:
        return {}
    return {
        "id2label": dict(enumerate(about.labels)),
        "label2id": {name: i for i, name in enumerate(about.labels)},
    }


def _part(
    place: str | os.PathLike[str], config: dict[str, Any], bits: int | None, revision: str | None, hub: dict[str, Any]
) -> Fetched | None:
    """A directory of the precision alone, of a model on the Hub; None where the whole model is to be loaded."""
    if bits is None or hub.get("subfolder") or not is_hub_id(os.fspath(place)):
        return None
    whole = QuantizationConfig.from_dict(config["quantization_config"], file=place)
    whole.check_precision(bits, file=place)
    if all(module.scheme.bits <= bits for module in whole):
        return None
    from .partial_download import find_part

    options = {key: value for key, value in hub.items() if key != "subfolder"}
    return find_part(os.fspath(place), bits, revision=revision, **options)


def _class_of(config: dict[str, Any], where: object) -> Any:
    """The model class that ``config.json`` names, or AutoModel if it names none."""
    import transformers

    names = config.get("architectures")
    known = known_class(names)
    if known is None and names:
        raise LoadError(f"{where}: transformers {transformers.__version__} has no model class {names}; update it")
    return known or transformers.AutoModel
