"""Reading a task's bundle for a server, and refusing what it cannot serve."""

from __future__ import annotations

from pathlib import Path

from ..container.reader import ModelReader
from ..errors import TaskError
from ..integrations.base_model import Base
from ..runtime.deltas import Delta
from ..tasks.finding import find_bundle
from ..tasks.matching import check_matches, modules_by_name
from ..tasks.serving import deltas_of

REFUSED = "lowbit-format refuses the task"  # begins the message of a bundle that cannot be served
PEFT_CONFIG_FILE = "adapter_config.json"


def base_in(directory: Path, bits: int | None) -> Base:
    """The base that a server reads at `bits` from `directory`, with its fingerprint."""
    reader = ModelReader(directory)
    return Base(reader.config, reader.fingerprint(), bits)


def served_deltas(source: str, base: Base) -> dict[str, Delta]:
    """What the bundle in the directory or repository `source` changes, by path of the module in the files of `base`.

    Raises:
        FingerprintError: it was tuned on another base; the message has both fingerprints.
        PrecisionError, BundleError, HubError: as :func:`lowbit_format.load_task`.
        TaskError: it brings modules of its own, which vLLM has but once; it changes experts; or it is an adapter of
            PEFT.
    """
    if (Path(source) / PEFT_CONFIG_FILE).is_file():
        raise TaskError(
            f"{source}: is an adapter of PEFT ({PEFT_CONFIG_FILE}); over a lowbit base this plugin serves task bundles "
            "(task_config.json) alone"
        )
    bundle = find_bundle(source).bundle
    check_matches(bundle, base.config, base.fingerprint, base.bits)
    if saved := bundle.config.modules_to_save:
        raise TaskError(
            f"{source}: the task brings modules of its own, {', '.join(map(repr, saved))}, which vLLM cannot choose "
            "per request; serve it with lowbit_format.use_tasks, or tune it with modules_to_save=[]"
        )
    modules = modules_by_name(base.config)
    deltas = {modules[name][0].path: delta for name, delta in deltas_of(bundle).items()}
    if experts := [path for path in deltas if base.config.modules[path].experts is not None]:
        raise TaskError(
            f"{experts[0]}: the task changes experts, which this plugin serves as they are in the base; serve it with "
            "lowbit_format.use_tasks, merge it into a base of its own (lowbit_format.merge_task), or tune it with "
            "exclude=['*experts*']"
        )
    return deltas
