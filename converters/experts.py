"""Stacks of expert matrices: which tensors of a checkpoint make one, and their quantization, an expert at a time.

A checkpoint has a tensor for each expert and projection, or a stack of its own. transformers' conversion mapping says
how its model's stack comes from these: here the same operations are applied to what each single expert has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..container.writer import StoredTensor, module_tensors
from ..errors import QuantizationError, SourceError
from ..integrations.conversion_record import expert_name
from ..matrix import F32, Params, StoredMatrix
from ..quantize import Quantized, Target, quantize
from ..quantize.recognise import recognise
from ..quantize.solve import measured
from ..runtime.known_experts import expert_parameters
from ..schema import ModuleEntry
from .architecture import Renamer
from .journal import Outcome
from .source import Grid, Source, SourceTensor, as_float32

KINDS = ("experts", "experts_transposed")


@dataclass(frozen=True)
class Stack:
    """The tensors of a checkpoint that make one parameter of stacked experts.

    Attributes:
        path: of the parameter in the model.
        kind: ``experts`` or ``experts_transposed``.
        shape: ``(experts, rows, cols)`` of its matrices.
        parts: names of the tensors: of each part of a matrix (such as gate and up), one for each expert, or a single
            one that has all experts in its first dimension.
        operations: transformers', which make the parameter from the parts.
    """

    path: str
    kind: str
    shape: tuple[int, int, int]
    parts: tuple[tuple[str, ...], ...]
    operations: tuple[Any, ...] = ()

    @property
    def first(self) -> str:
        """The tensor that stands for all of them."""
        return self.parts[0][0]

    @property
    def patterns(self) -> list[str]:
        """Names of the tensors with ``*`` for the expert's number (``*+8``, if the first has number 8), or without, if
        each has a part of all experts; empty unless the rows of a matrix are those of its parts, one after another."""
        plain = self.kind == "experts" and all(
            _is(op, "MergeModulelist") or (_is(op, "Concatenate") and op.dim == 1) for op in self.operations
        )
        if plain and len(self.parts) > 1 and all(len(names) == 1 for names in self.parts):
            return [names[0] for names in self.parts]
        if not plain or len(self.parts[0]) != self.shape[0] or self.shape[0] < 2:
            return []
        found = []
        for names in self.parts:
            pattern = _pattern(names)
            if pattern is None:
                return []
            found.append(pattern)
        return found

    def tensor(self, tensors: dict[str, SourceTensor]) -> SourceTensor:
        """What the parts come to, as one tensor of the model's."""
        own = [tensors[name] for names in self.parts for name in names]
        dtypes = {t.dtype for t in own}
        dtype = own[0].dtype if len(dtypes) == 1 else "F64" if "F64" in dtypes else "F32"  # which holds all of them
        return SourceTensor(self.path, dtype, self.shape, sum(t.nbytes for t in own), self._grid(tensors))

    def _grid(self, tensors: dict[str, SourceTensor]) -> Grid | None:
        """How a release has quantized all parts, the rows of one behind those of another; None if they are floats."""
        parts = [[tensors[name].grid for name in names] for names in self.parts]
        grids = [grid for part in parts for grid in part if grid is not None]
        if not grids:
            return None
        is_whole = len(parts) == 1 and len(parts[0]) == 1 and not self.operations
        refusal = next((grid.refusal for grid in grids if grid.refusal), "")
        if len(grids) < sum(map(len, parts)):
            refusal = "the release has quantized some of its experts, and left others in floats"
        elif any(grid.scheme != grids[0].scheme for grid in grids):
            refusal = "the release has quantized its experts, or their parts, in different ways"
        elif not is_whole and not self.patterns:
            refusal = "transformers puts it together in another way than row by row"

        def matrix(expert: int | None) -> StoredMatrix:
            if is_whole:
                return grids[0].matrix(expert)
            own = [part[0 if len(part) == 1 else expert or 0] for part in parts]
            fused = [len(part) == 1 and self.shape[0] > 1 for part in parts]
            return joined([g.matrix(expert if f else None) for g, f in zip(own, fused, strict=True) if g is not None])

        return Grid(grids[0].scheme, sum(grid.nbytes for grid in grids), matrix, refusal)

    def parameter(self, source: Source) -> NDArray[np.float32]:
        """The whole parameter, float32, as the model has it."""
        experts, rows, cols = self.shape
        transposed = self.kind == "experts_transposed"
        out = np.empty((experts, cols, rows) if transposed else self.shape, np.float32)
        for expert, one in enumerate(out):
            matrix = self.matrix(source, expert)
            one[:] = matrix.T if transposed else matrix
        return out

    def matrix(self, source: Source, expert: int) -> F32:
        """The matrix of one expert, float32 ``[rows, cols]``."""
        import torch

        experts, rows, cols = self.shape
        collected: dict[str, Any] = {}
        for i, names in enumerate(self.parts):
            tensor = source.tensors[names[0 if len(names) == 1 else expert]]
            if len(names) == experts and not self._is_fused(tensor):
                one = as_float32(source.read(tensor.name), tensor)
                collected[f"part{i}"] = [torch.from_numpy(one)]
            else:
                nbytes = tensor.nbytes // experts
                raw = source.read(tensor.name, expert * nbytes, nbytes)
                shape = (1, *tensor.shape[1:])
                one = as_float32(raw, replace(tensor, shape=shape, nbytes=nbytes))
                collected[f"part{i}"] = [torch.from_numpy(one)]
        matrix = _put_together(collected, self).numpy()
        if matrix.shape != (rows, cols):
            raise SourceError(
                f"{self.path}: expert {expert} comes to {list(matrix.shape)}, expected {[rows, cols]}; transformers "
                "converts it in a way that this version of lowbit_format does not follow: keep it (--keep)"
            )
        return np.ascontiguousarray(matrix, np.float32)

    def _is_fused(self, tensor: SourceTensor) -> bool:
        return len(tensor.shape) == 3


def _put_together(collected: dict[str, Any], stack: Stack) -> Any:
    """The matrix of one expert, a tensor ``[rows, cols]``, from its parts as transformers collects them."""
    sources = list(collected)
    for operation in stack.operations:
        collected = operation.convert(collected, source_patterns=sources, target_patterns=["whole"])
    whole = next(iter(collected.values()))
    whole = whole[0] if isinstance(whole, list) else whole
    matrix = whole.reshape(whole.shape[-2:])
    return matrix.T if stack.kind == "experts_transposed" else matrix


def find_stacks(
    model: Any, rename: Renamer, shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, Stack], dict[str, tuple[str, str]]]:
    """The stacks of a model, and the tensors of a checkpoint that belong to one.

    Args:
        model: on the meta device.
        rename: its renaming.
        shapes: of the checkpoint's tensors, by name.

    Returns:
        The stack of each parameter that can be quantized, by the parameter's path; and of every tensor with a part in
        experts, by name, the parameter's path and why it cannot be quantized (empty if it can).
    """
    from transformers.core_model_loading import dot_natural_key

    modules = dict(model.named_modules())
    parts: dict[str, dict[str, list[str]]] = {}
    converters: dict[str, Any] = {}
    for key in sorted(shapes, key=dot_natural_key):
        target, converter, pattern = rename.conversion(key)
        path, _, leaf = target.rpartition(".")
        if path in modules and _is_stack(modules[path], path, leaf):
            parts.setdefault(target, {}).setdefault(pattern or "", []).append(key)
            converters[target] = converter
    for target, converter in list(converters.items()):
        if converter is not None and [type(op).__name__ for op in converter.operations] == [_SHARED]:
            shared = _shared(target, converter, parts.pop(target))
            parts.update(shared)
            converters.update(dict.fromkeys(shared, converter))
    stacks, belongs = dict[str, Stack](), dict[str, tuple[str, str]]()
    for target, by_pattern in parts.items():
        parent, _, leaf = target.rpartition(".")
        stack, reason = _stack(modules[parent], leaf, target, by_pattern, converters[target], shapes)
        if stack is not None and not rename.keeps_stack(target):
            stack, reason = None, "transformers would rename it on loading"
        if stack is not None:
            stacks[target] = stack
        belongs.update({key: (target, reason) for names in by_pattern.values() for key in names})
    return stacks, belongs


_SHARED = "ErnieFuseAndSplitTextVisionExperts"


def _shared(target: str, converter: Any, by_pattern: dict[str, list[str]]) -> dict[str, dict[str, list[str]]]:
    """The parts of several stacks whose experts a checkpoint numbers as one: those of the first stack come first."""
    first, *others = converter.target_patterns
    targets = [target, *(target.replace(first, other) for other in others)]
    found: dict[str, dict[str, list[str]]] = {name: {} for name in targets}
    for pattern, names in by_pattern.items():
        size = -(-len(names) // len(targets))
        for i, name in enumerate(targets):
            found[name][pattern] = names[i * size : (i + 1) * size]
    return found


def _is_stack(module: Any, path: str, leaf: str) -> bool:
    """Whether a parameter is a stack of expert matrices: three dimensions, in a module that says so by its name."""
    import torch

    parameter = getattr(module, leaf, None)
    named = "expert" in f"{path} {type(module).__name__}".lower()
    return named and isinstance(parameter, torch.nn.Parameter) and parameter.ndim == 3


def _stack(
    module: Any, leaf: str, path: str, by_pattern: dict[str, list[str]], converter: Any, shapes: dict[str, Any]
) -> tuple[Stack | None, str]:
    """The stack of one parameter, or why it cannot be quantized."""
    kind = expert_parameters(module).get(leaf)
    if kind is None:
        return None, f"what {type(module).__name__} computes with its experts is not known"
    shape = tuple(getattr(module, leaf).shape)
    experts, *matrix = shape
    rows, cols = reversed(matrix) if kind == "experts_transposed" else matrix
    operations = () if converter is None else _own_operations(converter)
    order = [""] if converter is None else [p for p in converter.source_patterns if p in by_pattern]
    if len(order) < len(by_pattern):
        one, other = (names[0] for names in list(by_pattern.values())[:2])
        raise SourceError(
            f"{path}: the checkpoint has it twice, of tensors such as {one!r} and of {other!r}; take one of both out"
        )
    parts = tuple(tuple(by_pattern[p]) for p in order)
    fused = all(len(names) == 1 and len(shapes[names[0]]) == 3 for names in parts)
    if not fused and any(len(names) != experts for names in parts):
        found = next(len(names) for names in parts if len(names) != experts)
        raise SourceError(
            f"{path}: the checkpoint has {found} tensors such as {parts[0][0]!r} for {experts} experts; get it again, "
            "or correct config.json"
        )
    if fused and any(shapes[names[0]][0] != experts for names in parts):
        raise SourceError(f"{parts[0][0]}: has shape {list(shapes[parts[0][0]])}, the model expects {list(shape)}")
    kept = []
    for operation in operations:
        if _is(operation, "Transpose") and getattr(operation, "check_dims", False):
            if tuple(shapes[parts[0][0]]) == shape:  # by the sizes of the whole stack, as transformers looks at it
                continue
            operation = type(operation)(operation.dim0, operation.dim1)
        if _is(operation, "Force16BytesAlignment"):  # of the memory; the values stay as they are
            continue
        if not _is_for_each(operation, fused):
            return None, "transformers converts it on loading"
        kept.append(operation)
    stack = Stack(path, kind, (experts, rows, cols), parts, tuple(kept))
    absent = [] if converter is None else [p for p in converter.source_patterns if p not in by_pattern]
    _check_shapes(stack, shapes, fused, absent)
    return stack, ""


def _own_operations(converter: Any) -> tuple[Any, ...]:
    """What transformers does to the parts of one stack."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    operation = converter.operations[0]
    if not _is(operation, _SHARED):
        return tuple(converter.operations)
    merge, several = MergeModulelist(operation.stack_dim), len(converter.source_patterns) > 1
    return (merge, Concatenate(operation.concat_dim)) if several else (merge,)


def _check_shapes(stack: Stack, shapes: dict[str, Any], fused: bool, absent: list[str]) -> None:
    """Raise SourceError unless the parts of every expert come to its matrix; `absent` parts may be why they do not."""
    import torch

    _, rows, cols = stack.shape
    odd = next((n for names in stack.parts for n in names if tuple(shapes[n]) != tuple(shapes[names[0]])), None)
    name = odd or stack.first
    if odd is None:
        found = [shapes[names[0]] for names in stack.parts]
        ones = [torch.empty((1, *shape[1:]) if fused else tuple(shape), device="meta") for shape in found]
        try:
            matrix = _put_together({f"part{i}": [one] for i, one in enumerate(ones)}, stack)
        except (RuntimeError, ValueError, LookupError):  # as torch says that shapes do not fit, and some operations
            matrix = None
        if matrix is not None and tuple(matrix.shape) == (rows, cols):
            return
        if absent:
            raise SourceError(
                f"{stack.path}: the checkpoint has {name!r}, but nothing like {', '.join(map(repr, absent))}, which it "
                "is made of too; get it again"
            )
    raise SourceError(
        f"{name}: has shape {list(shapes[name])}, which does not fit {stack.path!r}: the model expects {rows} by "
        f"{cols} for each of {stack.shape[0]} experts"
    )


def _is_for_each(operation: Any, fused: bool) -> bool:
    """Whether the operation does the same to every expert, so that it can be applied to one alone."""
    if _is(operation, "MergeModulelist"):
        return bool(not fused and operation.dim == 0)
    if _is(operation, "Concatenate") or _is(operation, "Interleave"):
        return bool(operation.dim != 0)
    return _is(operation, "Transpose") and 0 not in (operation.dim0, operation.dim1)


def _is(operation: object, name: str) -> bool:
    return type(operation).__name__ == name


def _pattern(names: tuple[str, ...]) -> str | None:
    """The name that `names` have in common, ``*`` being the expert's number; None if there is none."""
    zeros, ones = names[0].split("."), names[1].split(".")
    at = [i for i, (a, b) in enumerate(zip(zeros, ones, strict=False)) if a != b]
    if len(zeros) != len(ones) or len(at) != 1 or not zeros[at[0]].isdecimal():
        return None
    first = int(zeros[at[0]])
    number = f"*+{first}" if first else "*"
    pattern = ".".join(number if i == at[0] else part for i, part in enumerate(zeros))
    same = all(expert_name(pattern, e) == name for e, name in enumerate(names))
    return pattern if same and pattern.count("*") == 1 else None


# --- quantizing -------------------------------------------------------------------------------------


def quantize_stack(source: Source, stack: Stack, target: Target) -> tuple[list[StoredTensor], Outcome]:
    """The tensors of a stack, and the outcome. One expert is in memory as floats at a time, and the next as bytes.

    All experts have one scheme and one codebook (EXP-1): where some lie on a grid and others do not, or scales of some
    need a wider dtype, all are quantized again alike.

    Raises QuantizationError and SourceError, as for a matrix.
    """
    dtype = stack.tensor(source.tensors).dtype
    for attempt, why in _attempts(target):
        weights = enumerate(_matrices(source, stack))
        made = (quantize(w, attempt, source_dtype=dtype, name=f"{stack.path}[{e}]") for e, w in weights)
        found = store_all(stack, made)
        if found is not None:
            tensors, outcome = found
            return tensors, replace(outcome, widened=why or outcome.widened)
    raise QuantizationError(f"{stack.path}: its experts cannot be stored alike; keep it in full precision (--keep)")


def store_stack(
    source: Source, stack: Stack, matrices: Sequence[StoredMatrix], *, lossless: bool = False
) -> tuple[list[StoredTensor], Outcome]:
    """As :func:`quantize_stack`, for matrices of the experts that are made already, with one scheme."""
    weights = zip(_matrices(source, stack), matrices, strict=True)
    found = store_all(stack, (measured(weight, matrix, lossless=lossless) for weight, matrix in weights))
    if found is None:
        raise QuantizationError(f"{stack.path}: its experts have different schemes")
    return found


def recognised_stack(source: Source, stack: Stack, target: Target) -> tuple[StoredMatrix, ...] | None:
    """The matrices of the experts, stored without loss, if all lie on one grid and the target asks for it (ENC-3)."""
    found: list[StoredMatrix] = []
    for weight in _matrices(source, stack) if target.recognise else ():
        one = recognise(weight, target, stack.tensor(source.tensors).dtype)
        if one is None or (found and not _is_alike(one, found[0])):
            return None
        found.append(one)
    return tuple(found) or None


def stack_errors(source: Source, stack: Stack, read: Callable[[int], StoredMatrix]) -> float:
    """The squared error of a stack, whose matrices `read` gives; see :class:`.journal.Outcome`."""
    error = 0.0
    for expert, weight in enumerate(_matrices(source, stack)):
        error += measured(weight, read(expert)).squared_error
    return error


def _attempts(target: Target) -> list[tuple[Target, str | None]]:
    """How all experts of a stack are quantized, until all have the same scheme, and why parameters are wider then."""
    plain = replace(target, recognise=False)
    why = f"{target.scale_dtype} cannot hold the parameters of all experts, F32 can"
    first: list[tuple[Target, str | None]] = [(target, None), (plain, None)] if target.recognise else [(plain, None)]
    return [*first, (replace(plain, scale_dtype="F32"), why)]


def store_all(stack: Stack, quantized: Iterator[Quantized]) -> tuple[list[StoredTensor], Outcome] | None:
    """The tensors of a stack and the outcome, of its experts one after the other; None if their schemes or tables
    differ."""
    first: Quantized | None = None
    out: list[StoredTensor] = []
    error = norm = 0.0
    lossless = True
    for expert, one in enumerate(quantized):
        first = first or one
        if not _is_alike(one.matrix, first.matrix):
            return None
        entry = ModuleEntry(stack.path, one.matrix.scheme, "linear", stack.shape[1:])
        tensors = module_tensors(entry, one.matrix)
        if not out:
            out = _empty(replace(entry, kind=stack.kind, shape=stack.shape), entry, tensors)
        for whole, part in zip(out, tensors, strict=True):
            if whole.data.ndim > part.data.ndim:
                whole.data[expert] = part.data
        error, norm = error + one.squared_error, norm + one.squared_norm
        lossless = lossless and one.lossless
    assert first is not None  # noqa: S101 - for the type checker: a stack has experts
    module = ModuleEntry(stack.path, first.matrix.scheme, stack.kind, stack.shape)
    nbytes = sum(t.nbytes for t in out)
    return out, Outcome(module, nbytes, error, norm, lossless, first.widened)


def _matrices(source: Source, stack: Stack) -> Iterator[F32]:
    """The matrix of every expert; while the caller works on one, the next is read."""
    with ThreadPoolExecutor(1, thread_name_prefix="lowbit-expert") as reader:
        following = reader.submit(stack.matrix, source, 0)
        for expert in range(stack.shape[0]):
            weight = following.result()
            if expert + 1 < stack.shape[0]:
                following = reader.submit(stack.matrix, source, expert + 1)
            yield weight
            del weight


def _empty(whole: ModuleEntry, single: ModuleEntry, of_one: list[StoredTensor]) -> list[StoredTensor]:
    """Room for the tensors of all experts, by those of one; the codebook is that of all."""
    out = []
    for t in of_one:
        name = whole.tensor(t.name.removeprefix(single.tensor("")))
        if t.name == single.tensor("codebook"):
            out.append(replace(t, name=name))
        else:
            data = np.empty((whole.experts or 0, *t.shape), t.data.dtype)
            out.append(StoredTensor(name, t.dtype, data.shape, data))
    return out


def joined(matrices: Sequence[StoredMatrix]) -> StoredMatrix:
    """The rows of matrices one behind the other. Raises QuantizationError if they have different schemes or tables."""
    first = matrices[0]
    if not all(_is_alike(one, first) for one in matrices):
        raise QuantizationError("parts of an expert have different schemes or tables; keep it as floats (--keep)")
    shifts = [one.params.shift for one in matrices if one.params.shift is not None]
    params = Params(
        np.concatenate([one.params.scales for one in matrices], axis=1), np.concatenate(shifts) if shifts else None
    )
    planes = np.concatenate([one.planes for one in matrices], axis=1)
    return replace(first, rows=sum(one.rows for one in matrices), planes=planes, params=params)


def _is_alike(a: StoredMatrix, b: StoredMatrix) -> bool:
    """Whether two experts have the scheme and the table in common."""
    left, right = a.codebook, b.codebook
    same = left is right or (left is not None and right is not None and np.array_equal(left, right))
    return same and a.scheme == b.scheme
