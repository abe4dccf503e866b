"""Weights that a model reads without calling their module: a quantized module has no such weight to give.

The model's forward is run on the meta device, where it costs nothing, and every use of a weight outside of its own
module's forward is noted. Where a forward cannot be run, the source of the parent's class is looked at.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..calibration.blocks import ANSWERS

READ = "the model reads its weight itself instead of calling the module"

# What a lowbit module's weight answers too: they tell about the weight, and do not compute with it.
_HARMLESS = {
    "dtype", "device", "shape", "ndim", "is_meta", "is_cuda", "is_cpu", "is_leaf", "is_sparse", "is_quantized",
    "layout", "requires_grad", "grad", "grad_fn", "size", "dim", "numel", "nelement", "is_floating_point", "is_complex",
    "data_ptr", "stride", "is_contiguous", "element_size", "get_device", "__len__", "__repr__", "itemsize", "nbytes",
}  # fmt: skip
_PATIENCE = 2000  # such answers, for all forwards
_NOT_RUN = ("__init__", "_init_weights", "reset_parameters", "post_init", "load_tf_weights", "tie_weights")
_LENGTH = 5  # tokens of the text that is put in
_ERRORS = (Exception,)  # whatever a model's code does on the meta device


def weights_read(model: Any, candidates: dict[str, nn.Module]) -> set[str]:
    """The paths of `candidates` (modules of `model`, on the meta device) whose weights the model reads itself."""
    watch = _Watch(candidates)
    parts = [(path, part) for path, part in model.named_modules() if hasattr(part, "main_input_name")]
    was_training = model.training
    model.eval()
    with watch.hooks(), torch.no_grad():
        for path, part in parts:
            mine = [p for p in candidates if p.startswith(f"{path}." if path else "")]
            if path and watch.called.issuperset(mine):
                continue
            for inputs in _inputs(part):
                ended = False
                with contextlib.suppress(*_ERRORS), watch, torch.device("meta"):
                    part(**inputs)
                    ended = True
                if ended and watch.called.issuperset(mine):
                    break
    model.train(was_training)
    modules = dict(model.named_modules())
    unseen = candidates.keys() - watch.called - watch.read
    return watch.read | {path for path in unseen if _source_reads(modules, path)}


class _Watch(TorchFunctionMode):
    """Notes which modules are called, and which weights meet an operation outside of their module's forward."""

    def __init__(self, candidates: dict[str, nn.Module]) -> None:
        super().__init__()
        self.called, self.read = set[str](), set[str]()
        self._candidates, self._answers = candidates, 0
        self._owners: dict[int, list[str]] = {}
        self._active: list[str] = []
        for path, module in candidates.items():
            self._owners.setdefault(id(module.weight), []).append(path)

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """While the block runs, calls of the candidates are noted."""

        def enter(path: str, module: nn.Module, args: Any) -> None:
            self.called.add(path)
            self._active.append(path)

        def leave(path: str, module: nn.Module, args: Any, output: Any) -> None:
            if path in self._active:
                self._active.remove(path)

        handles = []
        for path, module in self._candidates.items():
            handles.append(module.register_forward_pre_hook(functools.partial(enter, path)))
            handles.append(module.register_forward_hook(functools.partial(leave, path), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":  # of an attribute
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        if name not in _HARMLESS:
            for value in _tensors((*args, *kwargs.values())):
                owners = self._owners.get(id(value), ())
                if owners and not any(path in self._active for path in owners):
                    self.read.update(owners)
        if name in ANSWERS and args and isinstance(args[0], Tensor) and args[0].is_meta:
            self._answers += 1
            if self._answers > _PATIENCE:  # a loop that waits for another answer
                raise RuntimeError("the forward does not end on the meta device")
            return ANSWERS[name]
        return func(*args, **kwargs)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


# --- what to put in ---------------------------------------------------------------------------------


def _inputs(model: Any) -> Iterator[dict[str, Tensor]]:
    """Inputs to try, the model's main one first; those that it cannot take make an error, which does no harm."""
    try:
        takes = set(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        return
    main = model.main_input_name if isinstance(model.main_input_name, str) else model.main_input_name[0]
    ids = next((name for name in (main, *_TEXT) if name in takes and name in _TEXT), None)
    names = [name for name in (ids, "decoder_input_ids") if name in takes]
    text = {name: torch.zeros(1, _LENGTH, dtype=torch.long, device="meta") for name in names if name}
    kinds = sorted((name for name in _SHAPES if name in takes), key=lambda name: name != main)
    if main in text:
        yield text
    decoder = {name: ids for name, ids in text.items() if name.startswith("decoder")}
    for kind in kinds:
        for shape in _SHAPES[kind](model.config):
            with contextlib.suppress(TypeError, ValueError):
                yield {kind: torch.zeros(*shape, device="meta"), **decoder}
    if main not in text and text:
        yield text
    for name in _SEQUENCES:  # of parts that take what others made
        width = _first(model.config, "d_model", "hidden_size")
        if name in takes and isinstance(width, int):
            yield {name: torch.zeros(1, _LENGTH, width, device="meta")}


_TEXT = ("input_ids", "inputs")
_SEQUENCES = ("inputs_embeds", "hidden_states")


def _first(config: Any, *names: str) -> Any:
    """The first of the attributes that the config has, else of one of its parts."""
    parts = [config, *(v for v in vars(config).values() if hasattr(v, "to_dict"))]
    return next((getattr(p, n) for p in parts for n in names if getattr(p, n, None) is not None), None)


def _pictures(config: Any) -> Iterator[tuple[int, ...]]:
    side = _first(config, "image_size", "input_resolution") or 64
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    channels, frames = _first(config, "num_channels", "in_channels") or 3, _first(config, "num_frames") or 2
    yield 1, channels, height, width
    yield 1, channels, 64, 64
    yield 1, frames, channels, height, width


def _sound(config: Any) -> Iterator[tuple[int, ...]]:
    mels = (
        _first(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim") or 80
    )
    length = 2 * (_first(config, "max_source_positions") or 64)
    yield 1, mels, length
    yield 1, length, mels


def _waves(config: Any) -> Iterator[tuple[int, ...]]:
    yield 1, 4000
    yield 1, 1, 4000
    yield 1, _first(config, "max_length") or 64, _first(config, "num_mel_bins") or 80


_SHAPES = {"pixel_values": _pictures, "input_features": _sound, "input_values": _waves}


# --- the source -------------------------------------------------------------------------------------


def _source_reads(modules: dict[str, nn.Module], path: str) -> bool:
    """Whether the class of the module's parent reads its weight and never calls it, by the class's source."""
    parent, _, name = path.rpartition(".")
    if name.isdigit():  # in a list, which its own parent goes through
        parent, _, name = parent.rpartition(".")
    if parent not in modules:
        return False
    cls: Any = type(modules[parent])
    read, called = _uses(cls)
    return name in read and name not in called


@functools.cache
def _uses(cls: Any) -> tuple[frozenset[str], frozenset[str]]:
    """Names of attributes of ``self`` whose ``weight`` the class computes with, and of those that it calls."""
    read, called = set[str](), set[str]()
    for base in cls.__mro__:
        if not base.__module__.startswith("transformers.models."):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef) and function.name not in _NOT_RUN:
                outer = {
                    id(n.value) for n in ast.walk(function) if isinstance(n, ast.Attribute) and n.attr in _HARMLESS
                }
                for node in ast.walk(function):
                    if isinstance(node, ast.Attribute) and node.attr == "weight" and id(node) not in outer:
                        read.update(_own(node.value))
                    elif isinstance(node, ast.Call):
                        called.update(_own(node.func))
    return frozenset(read), frozenset(called)


def _own(node: ast.AST) -> set[str]:
    """``name`` of the expressions ``self.name`` and ``self.name[…]``."""
    node = node.value if isinstance(node, ast.Subscript) else node
    is_own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return {node.attr} if is_own else set()  # type: ignore[attr-defined]
