"""The files beside the weights: what comes along, what is converted on the way, and what does not belong to the model.

Tokenizer and settings come along, and so do the weights of other modules that work with the model, such as a layer
behind a sentence encoder. Training states, other copies of the weights, other models in subfolders and code do not.
Pickles have no place in a lowbit model (DIR-5): where their loader takes safetensors too they are converted; a
conversion that would lose one is refused, unless ``--leave-out`` says that it may.
"""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import shutil
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ..container.atomic import write_json
from ..container.header import read_header
from ..container.writer import StoredTensor, write_safetensors
from ..errors import FormatError, SourceError
from ..integrations.conversion_record import REPORT_FILE

SAFETENSORS, PYTORCH = "model.safetensors", "pytorch_model.bin"

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
# Weights for other programs: another copy of the model's.
_COPIES = (
    ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ggml", ".ot", ".tflite", ".mlmodel", ".npz", ".pte", ".engine",
    ".nemo", ".mar",
)  # fmt: skip
_CODE = (".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".sh")
_LOADS_SAFETENSORS = "sentence_transformers."  # modules that take SAFETENSORS where they took PYTORCH
# Folders of training runs and of other programs' copies.
_FOLDERS = re.compile(
    r"checkpoint-\d+|checkpoint_\d+|checkpoints|global_step\d+|runs|logs|wandb|mlruns|original|onnx|openvino|coreml|"
    r"tf|flax|gguf|tensorrt|__pycache__|\..*"
)
_TRAINING = re.compile(
    r"(optimizer|scheduler|scaler|training_args|trainer_state|random_states|rng_state)[\w-]*\.(pt|pth|bin|pkl|json)|"
    r"(optimizer|scheduler)_\d+\.bin|.*optim_states\.pt|"
    r".*model_states\.pt|events\.out\.tfevents.*|latest|zero_to_fp32\.py|pytorch_model_fsdp.*|.*\.distcp"
)
# Names that copies of the model's own weights have, beside those that are read.
_WEIGHTS = re.compile(
    r"(pytorch_model|model|consolidated|tf_model|flax_model|rust_model|adapter_model_old)"
    r"([.-][\w-]+)*\.(bin|pt|pth|ckpt|safetensors)(\.index\.json)?|"
    r"(pytorch_model|model|diffusion_pytorch_model)[\w.-]*\.index(\.[\w-]+)?\.json"
)


@dataclass(frozen=True)
class SideFiles:
    """What becomes of the files beside the weights, by relative path.

    Attributes:
        copied: come along as they are.
        without_code: JSON files whose ``auto_map`` is taken off: the code that it names does not come along.
        converted: pickles, with the name of the safetensors file that takes their place.
        left_out: files and folders that do not come along, with the reason.
        lost: pickles that belong to the model, and that a lowbit model cannot hold.
    """

    copied: tuple[str, ...] = ()
    without_code: tuple[str, ...] = ()
    converted: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    lost: tuple[str, ...] = ()

    def refuse_loss(self, place: object) -> None:
        """Raise SourceError if a pickle of the checkpoint at `place` would be lost."""
        if self.lost:
            options = " ".join(f"--leave-out {shlex.quote(name)}" for name in self.lost)
            raise SourceError(
                f"{place}: {', '.join(self.lost)}: a pickle beside the model, which a lowbit model cannot hold (DIR-5) "
                f"and for which no other format is known that its loader takes; pass {options} to convert without it"
            )

    def write(self, directory: Path, out: Path) -> None:
        """Write the files of the checkpoint in `directory` to `out`."""
        for name in self.copied:
            _parent(out / name)
            shutil.copyfile(directory / name, out / name)
        for name in self.without_code:
            _parent(out / name)
            write_json(out / name, without_auto_map(json.loads((directory / name).read_text("utf-8"))))
        for name, new in self.converted.items():
            _parent(out / new)
            write_safetensors(out / new, _tensors(directory / name))


def side_files(
    directory: Path, own: Collection[str], names: Collection[str] = (), leave_out: Iterable[str] = ()
) -> SideFiles:
    """Sort the files of the checkpoint in `directory`, but for config and card.

    Args:
        directory: of the checkpoint.
        own: the weight files that are read.
        names: of the tensors in them, to tell another copy of them from other weights.
        leave_out: patterns of relative paths that must not come along.

    Raises:
        SourceError: a pickle beside the model cannot come along.
    """
    present = [
        str(PurePosixPath(path.relative_to(directory))) for path in sorted(directory.rglob("*")) if path.is_file()
    ]
    found = sort_files(present, own, lambda name: _read_json(directory / name), leave_out)
    copied = []
    left = dict(found.left_out)
    for name in found.copied:
        if name.endswith(".safetensors") and "/" not in name and _is_copy(directory / name, names):
            left[name] = "another copy of the weights"
        else:
            copied.append(name)
    found.refuse_loss(directory)
    for name in found.converted:
        _tensors(directory / name)  # raises before the work begins
    return SideFiles(tuple(copied), found.without_code, found.converted, left)


def sort_files(
    present: list[str], own: Collection[str], read: Callable[[str], Any], leave_out: Iterable[str] = ()
) -> SideFiles:
    """Sort files by their names alone; `read` gives the content of a JSON file, or None where it is not at hand."""
    parts = _parts(read("modules.json"))
    others = {  # folders with a model of their own
        folder
        for name in present
        if name.endswith("/config.json") and (folder := name.rpartition("/")[0]) not in parts
        if _is_model(read(name), folder, present)
    }
    patterns = list(leave_out)
    copied, stripped, lost = [], [], []
    converted, left = dict[str, str](), dict[str, str]()
    code_needed = _needs_code(present, read)
    for name in present:
        folder, _, file = name.rpartition("/")
        folders = folder.split("/") if folder else []
        if any(part.startswith(".") for part in (*folders, file)) or name in (
            "config.json",
            "README.md",
            REPORT_FILE,
            *own,
        ):
            continue
        strange = next((p for p in folders if _FOLDERS.fullmatch(p) and folder not in parts), None)
        model = next((o for o in others if folder == o or folder.startswith(f"{o}/")), None)
        reason = ""
        if any(fnmatch.fnmatch(name, p) for p in patterns):
            reason = "left out on request"
        elif strange is not None:
            name, reason = f"{name[: name.index(strange)]}{strange}/", "of a training run or for another program"
        elif model is not None:
            name, reason = f"{model}/", "a model of its own"
        elif _TRAINING.fullmatch(file) and not file.endswith(".safetensors"):
            reason = "of a training run"
        elif file.endswith(_COPIES) or (not folder and _WEIGHTS.fullmatch(file)):
            reason = "another copy of the weights"
        elif file.endswith(_CODE) and not (code_needed and file.endswith(".py")):
            reason = "code, which the model does not need"
        elif file.endswith(PICKLES):
            safe = str(
                PurePosixPath(name).with_name(
                    SAFETENSORS if file == PYTORCH else f"{file.rpartition('.')[0]}.safetensors"
                )
            )
            if safe in present:
                reason = "another copy of the weights"
            elif parts.get(folder, "").startswith(_LOADS_SAFETENSORS) and file == PYTORCH:
                converted[name] = safe
            else:
                lost.append(name)
        elif file.endswith("config.json") and not code_needed and _has_auto_map(read(name)):
            stripped.append(name)
        else:
            copied.append(name)
        if reason:
            left[name] = reason
    return SideFiles(tuple(copied), tuple(stripped), converted, left, tuple(lost))


def without_auto_map(obj: Any) -> Any:
    """A JSON value without the ``auto_map`` keys in it, which name code that does not come along."""
    if isinstance(obj, dict):
        return {key: without_auto_map(value) for key, value in obj.items() if key != "auto_map"}
    return [without_auto_map(value) for value in obj] if isinstance(obj, list) else obj


def _parts(modules: Any) -> dict[str, str]:
    """Folders of the modules that sentence-transformers' ``modules.json`` lists, with their types."""
    entries = [e for e in modules if isinstance(e, dict)] if isinstance(modules, list) else []
    return {e["path"]: str(e.get("type")) for e in entries if isinstance(e.get("path"), str) and e["path"]}


def _is_model(config: Any, folder: str, present: list[str]) -> bool:
    """Whether a folder holds a transformers model with weights; without its config at hand, whether it may."""
    weights = any(
        name.startswith(f"{folder}/") and name.endswith((".safetensors", *PICKLES, *_COPIES)) for name in present
    )
    return weights and (config is None or (isinstance(config, dict) and "model_type" in config))


def _has_auto_map(obj: Any) -> bool:
    if isinstance(obj, dict):
        return "auto_map" in obj or any(_has_auto_map(value) for value in obj.values())
    return isinstance(obj, list) and any(_has_auto_map(value) for value in obj)


def _needs_code(present: list[str], read: Callable[[str], Any]) -> bool:
    """Whether a tokenizer, a processor or a module beside the model is made by code of the directory alone."""
    import transformers

    for name in ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        obj = read(name) if name in present else None
        if not isinstance(obj, dict) or not obj.get("auto_map"):
            continue
        given = [obj.get(key) for key in ("tokenizer_class", "processor_class", "image_processor_type")]
        if not any(isinstance(cls, str) and hasattr(transformers, cls) for cls in given):
            return True
    modules = read("modules.json") if "modules.json" in present else None
    types = [e.get("type") for e in modules if isinstance(e, dict)] if isinstance(modules, list) else []
    return any(isinstance(t, str) and not t.startswith("sentence_transformers.") for t in types)


def _read_json(path: Path) -> Any:
    """The content of a JSON file, or None if it is none."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _is_copy(path: Path, names: Collection[str]) -> bool:
    """Whether a safetensors file holds tensors of the model again."""
    try:
        found = read_header(path).tensors
    except FormatError:
        return False
    return bool(found) and 2 * len(found.keys() & set(names)) >= len(found)


def _tensors(path: Path) -> list[StoredTensor]:
    """The tensors of a pickled state dict. Raises SourceError if it holds something else."""
    from .pytorch import PytorchSource

    source = PytorchSource(path.parent, {path.name: []}, None, None)
    if source.other:
        raise SourceError(
            f"{path}: {source.other[0]!r} is no tensor, and a lowbit model holds no pickles (DIR-5); pass --leave-out "
            f"{path.parent.name}/{path.name} to convert without it"
        )
    return [StoredTensor(t.name, t.dtype, t.shape, source.read(t.name)) for t in source.tensors.values()]


def _parent(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
