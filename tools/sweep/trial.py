"""One model class: built tiny, converted, loaded in every way, compared with the float model of its decoded weights."""

from __future__ import annotations

import copy
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .configs import SIZES, tiny_config
from .inputs import candidates

MOST_PARAMETERS = 40_000_000
_TOLERANCE = 1e-3  # of the largest value of an output
Result = dict[str, Any]


class NotBuiltError(Exception):
    """The sweep cannot make a model of the class: its own limit, or the class needs more than its config."""


def run(name: str) -> Result:
    """Try the class `name` of transformers.

    Returns:
        ``status``: ``not built``, ``refused`` (by the conversion, with its ``message``) or ``converted``; then also
        ``ran``, whether there were inputs for a forward, ``coverage``, ``modules``, ``experts`` (those of them that are
        stacks of experts), and ``faults``, one message for each thing that is not as from the float directory.
    """
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    cls: Any = getattr(transformers, name)
    try:
        model, inputs, note = _model(cls)
    except (NotBuiltError, ImportError) as e:  # the other libraries of some models are not installed
        return {"status": "not built", "message": str(e)}
    with tempfile.TemporaryDirectory() as directory:
        return {**_converted(model, inputs, Path(directory)), "note": note}


# --- building -------------------------------------------------------------------------------------------


def _model(cls: Any) -> tuple[Any, dict[str, Any] | None, str]:
    """A tiny model and inputs that it takes, or None if none are known."""
    config_class = getattr(cls, "config_class", None)
    if config_class is None:
        raise NotBuiltError("no config class")
    first, reason = None, ""
    for size in SIZES:
        try:
            config = tiny_config(config_class, size)
            with torch.device("meta"):
                count = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
            if count > MOST_PARAMETERS:
                reason = reason or f"too large: {count / 1e6:.0f} million parameters"
                continue
            model = _with_weights(cls, config)
        except Exception as e:  # whatever a model's code does with such a config
            reason = reason or f"{type(e).__name__}: {e}"
            continue
        inputs = _inputs(model)
        if inputs is not None:
            return model, inputs, str(size)
        first = first or model
    if first is None:
        raise NotBuiltError(reason)
    return first, None, "no inputs"


def _with_weights(cls: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = cls(config).float().eval()
    with torch.no_grad():
        unsaved = model._keys_to_ignore_on_save or ()
        for name, parameter in model.named_parameters():  # biases and norms too, so that a mix-up of two tensors shows
            if name not in unsaved:
                parameter.copy_(parameter.nan_to_num(0, 0, 0).clamp(-2, 2) + 0.02 * torch.randn_like(parameter))
    return model


def _inputs(model: Any) -> dict[str, Any] | None:
    for inputs in candidates(model):
        try:
            if _outputs(model, inputs):
                return inputs
        except Exception:  # another candidate may do
            continue
    return None


def _outputs(model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """All float tensors that the forward gives, in order."""
    torch.manual_seed(0)
    with torch.no_grad():
        return [t for t in _tensors(model(**{n: _cloned(v) for n, v in inputs.items()})) if t.is_floating_point()]


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


# --- converting and comparing ----------------------------------------------------------------------------


def _converted(model: Any, inputs: dict[str, Any] | None, root: Path) -> Result:
    from lowbit_format import Recipe, Rule, Target, convert_hf_to_lowbit
    from lowbit_format.container.reader import ModelReader
    from lowbit_format.errors import LowbitError

    source, out, cls = root / "float", root / "lowbit", type(model)
    model.save_pretrained(source)
    target = Target(codec="uniform", bits=8, group_size=32)
    recipe = Recipe(target, (Rule("*", target),))  # embeddings and heads too, where there are any
    try:
        done = convert_hf_to_lowbit(str(source), out, recipe, min_coverage=0)
    except LowbitError as e:
        return {"status": "refused", "message": f"{type(e).__name__}: {e}".replace(str(root), "")}
    reader, plan = ModelReader(out), done.plan
    faults, refused = list[str](), list[str]()
    if plan.architecture != cls.__name__:
        faults.append(f"converted as {plan.architecture}")
    twin = copy.deepcopy(model)
    for entry in reader.config:
        weight = torch.from_numpy(reader.decode(entry.path))
        turned = entry.kind in ("conv1d", "experts_transposed")
        twin.get_parameter(entry.weight).data = weight.mT.contiguous() if turned else weight
    want = None if inputs is None else _outputs(twin, inputs)
    checks = {
        "own class": lambda: _own_class(cls, out, twin, inputs, want, root / "again"),
        "dequantized": lambda: _dequantized(reader, twin, root / "decoded", root / "expected"),
        **{auto: _auto_check(auto, out, root / "decoded", refused) for auto in _auto_classes(model.config, cls)},
    }
    for what, check in checks.items():
        try:
            faults += [f"{what}: {fault}" for fault in check()]
        except Exception as e:  # whatever comes of it, it is a finding
            faults.append(f"{what}: {type(e).__name__}: {e}".replace(str(root), "")[:600])
    kept = sorted({step.reason for step in plan.kept() if step.reason})
    return {
        "status": "converted", "ran": want is not None, "coverage": round(plan.coverage, 4),
        "possible": round(plan.possible_coverage, 4), "modules": len(plan.quantized),
        "experts": sum(entry.experts is not None for entry in reader.config), "kept": kept, "faults": faults,
        "refused": [message.replace(str(root), "")[:300] for message in refused],
    }  # fmt: skip


def _own_class(
    cls: Any, out: Path, twin: Any, inputs: dict[str, Any] | None, want: list[Tensor] | None, again: Path
) -> list[str]:
    model, info = _loaded(cls, out)
    faults = _info(info) + _differences(twin, model)
    if want is not None and inputs is not None:
        faults += _compare(want, _outputs(model.eval(), inputs), _outputs(twin, inputs))
    model.save_pretrained(again)
    saved, info = _loaded(cls, again)
    return faults + [f"saved again: {fault}" for fault in _info(info) + _differences(twin, saved)]


def _loaded(cls: Any, directory: Path) -> tuple[Any, dict[str, Any]]:
    try:
        model, info = cls.from_pretrained(directory, output_loading_info=True)
    except AttributeError:  # a ``from_pretrained`` of the class's own may not know the option
        return cls.from_pretrained(directory), {}
    return model, info


def _dequantized(reader: Any, twin: Any, decoded: Path, expected: Path) -> list[str]:
    """``lowbit dequantize`` must give what the float model would have saved."""
    from lowbit_format.export import dequantize_directory

    dequantize_directory(reader, decoded)
    twin.save_pretrained(expected)
    want, found = _file(expected), _file(decoded)
    faults = [] if want.keys() == found.keys() else [f"names differ: {sorted(want.keys() ^ found.keys())[:3]}"]
    unequal = [n for n in want if n in found and not _same(want[n], found[n])]
    return faults + ([f"{len(unequal)} of {len(want)} tensors differ: {unequal[:3]}"] if unequal else [])


def _auto_check(auto: str, out: Path, decoded: Path, refused: list[str]) -> Callable[[], list[str]]:
    """As the float directory of the decoded weights loads by the auto class, so must the lowbit directory.

    Or it is refused where the float directory would have random tensors too, which goes into `refused`.
    """
    import transformers

    from lowbit_format.errors import LoadError

    def check() -> list[str]:
        loader = getattr(transformers, auto)
        try:
            want, expected = loader.from_pretrained(decoded, output_loading_info=True)
        except Exception:
            return []
        unsaid = want._keys_to_ignore_on_load_missing or ()  # random too, without a word
        fresh = set(expected["missing_keys"])
        fresh |= {name for name in want.state_dict() if any(re.search(pattern, name) for pattern in unsaid)}
        try:
            model, info = loader.from_pretrained(out, output_loading_info=True)
        except LoadError as e:
            if fresh:
                refused.append(f"{auto}: {type(want).__name__} lacks {len(fresh)} of {len(want.state_dict())}: {e}")
                return []
            raise
        faults = _differences(want, model, fresh)
        lost = _weights(info["missing_keys"]) - fresh
        return faults + ([f"missing {sorted(lost)[:3]}"] if lost else [])

    return check


def _auto_classes(config: Any, cls: Any) -> list[str]:
    """``AutoModel`` and the auto classes that make a model of such a config; those of `cls` first, four at most."""
    from transformers.models.auto import modeling_auto

    found = {}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if isinstance(auto, type) and name.startswith("AutoModel") and mapping is not None and type(config) in mapping:
            made = mapping[type(config)]
            found[name] = cls in (made if isinstance(made, tuple) else (made,))
    return sorted(found, key=lambda n: (not found[n], n != "AutoModel", n != "AutoModelForCausalLM", n))[:4]


def _info(info: dict[str, Any]) -> list[str]:
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return [f"{kind} {sorted(map(str, info[kind]))[:3]}" for kind in kinds if info.get(kind)]


def _weights(names: Any) -> set[str]:
    """Names of lowbit tensors as the float model has them."""
    return {re.sub(r"_(planes|scales|zeros)$", "", re.sub(r"\.(planes|scales|zeros)$", ".weight", n)) for n in names}


def _file(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    from safetensors.torch import load_file

    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def _differences(twin: Any, model: Any, fresh: Any = ()) -> list[str]:
    """Tensors of the lowbit or float `model` that are not those of `twin`, bit for bit."""
    from lowbit_format.runtime.experts import LowbitExperts
    from lowbit_format.runtime.modules import LowbitModule

    want = twin.state_dict()
    found = {n: t for n, t in model.state_dict().items() if n in want}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LowbitExperts):
            found[path] = module.float_parameter(torch.float32)
        elif isinstance(module, LowbitModule):
            found[f"{path}.weight"] = module.dequantize(torch.float32)
    faults = []
    if found.keys() != want.keys():
        faults.append(f"other tensors: {sorted(found.keys() ^ want.keys())[:3]}")
    unequal = [n for n in want if n in found and n not in fresh and not _same(found[n], want[n])]
    return faults + ([f"{len(unequal)} of {len(want)} tensors differ: {unequal[:3]}"] if unequal else [])


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a.eq(b) | (a.isnan() & b.isnan())).all())


def _compare(want: list[Tensor], found: list[Tensor], once_more: list[Tensor]) -> list[str]:
    """Outputs that differ; `once_more` are the wanted ones of a second run, which some models draw at random."""
    if len(want) != len(found):
        return [f"{len(found)} outputs, expected {len(want)}"]
    for i, (a, b, c) in enumerate(zip(want, found, once_more, strict=True)):
        if a.shape != b.shape:
            return [f"output {i} has shape {list(b.shape)}, expected {list(a.shape)}"]
        finite = torch.isfinite(a) & torch.isfinite(c)
        if not torch.equal(a[finite], c[finite]):
            continue
        error = (a - b)[finite].abs().max().item() if finite.any() else 0.0
        largest = a[finite].abs().max().item() if finite.any() else 1.0
        if not error <= _TOLERANCE * max(largest, 1e-3):
            return [f"output {i} differs by {error:.3g}, its largest value is {largest:.3g}"]
    return []
