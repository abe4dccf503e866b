"""The plan of a conversion, made from names and shapes alone: what is done with every tensor."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace

from ..errors import CoverageError, NothingToQuantizeError, QuantizedSourceError, RecipeError, SourceError
from ..integrations.conversion_record import ConversionRecord
from ..quantize import Target
from ..schema import ModuleEntry, Scheme
from ..tensors import stored_bits
from .experts import KINDS, Stack
from .names import Destination, Names
from .reads import READ
from .recipe import WORDS, Recipe
from .side import SideFiles
from .source import FLOATS, Grid, Source, SourceTensor
from .words import Words

LEFT = "left in full precision by the release"
EMBEDDING, TIED, HEAD = "embedding", "embedding, tied to the output head", "output head"  # reasons to keep a matrix
MATRICES = ("linear", "conv1d", *KINDS, "expert")  # the kinds that coverage counts
BASE_MEMORY = 832 << 20  # Python with torch, transformers and numba; its compiler takes 120 MiB of it on the first run


@dataclass(frozen=True)
class Taken:
    """The target of a weight that a release has quantized: the scheme of its own grid, which it keeps."""

    own: Scheme

    def scheme(self, scale_dtype: str | None = None) -> Scheme:
        """As of :class:`Target`; parameters are in the release's dtype."""
        return replace(self.own, scale_dtype=scale_dtype or self.own.scale_dtype)


@dataclass(frozen=True)
class Step:
    """What is done with one tensor of the checkpoint, or with all tensors of a stack of experts.

    Attributes:
        tensor: the tensor; of a stack to quantize, the parameter that it makes, whose shape is that of its matrices.
        destination: its place in the model.
        target: how to quantize it, or that it is taken over as it is; None keeps it in floats.
        path: path of the module that it becomes (the owner, if tied).
        reason: why it is kept, where it might have been quantized.
        by_default: an embedding or output head of which the recipe says nothing, so that it is rounded to WORDS.
    """

    tensor: SourceTensor
    destination: Destination
    target: Target | Taken | None = None
    path: str = ""
    reason: str = ""
    by_default: bool = False

    def module(self, scheme_dtype: str | None = None) -> ModuleEntry:
        """The planned module; recognition and rounding may still change its scheme."""
        if self.target is None:
            raise ValueError(f"{self.tensor.name} is not quantized")
        shape = self.tensor.shape[::-1] if self.destination.kind == "conv1d" else self.tensor.shape
        return ModuleEntry(self.path, self.target.scheme(scheme_dtype), self.destination.kind, shape)

    @property
    def to_fit(self) -> Target | None:
        """How its parameters are fitted; None if it is kept, or taken over with those that it has."""
        return self.target if isinstance(self.target, Target) else None

    def output_bytes(self) -> int:
        """Bytes of its tensors in the output, as planned."""
        return self.tensor.nbytes if self.target is None else -(-self.stored_bits() // 8)

    def stored_bits(self) -> int:
        """Of a module to quantize."""
        rows = self.target.row_bits if isinstance(self.target, Target) else None
        return stored_bits(self.module(), None if rows is None else sum(rows))

    @property
    def rounded(self) -> bool:
        """Whether data and training are not for it: it is rounded by default, or its rows have different bits."""
        return self.by_default or (isinstance(self.target, Target) and self.target.row_bits is not None)

    @property
    def stack(self) -> Stack | None:
        """The stack of experts that is quantized in this step, if it is one."""
        return None if self.target is None else self.destination.stack

    @property
    def counted(self) -> bool:
        """Whether coverage counts it: a Linear, Conv1D or expert weight of the base model."""
        return self.destination.kind in MATRICES and not self.destination.head


@dataclass(frozen=True)
class Plan:
    """All steps, in the order of writing, and what follows from them.

    Attributes:
        steps: one for each tensor of the checkpoint that has a place of its own in the output.
        tied: path of a tied place to the path of its quantized owner (TIE-1).
        base_model_prefix, architecture: of the model class.
        dropped: second copies of tied matrices, by name in the checkpoint, and the path of the owner that is stored.
        named: the model class that the config names, of which `architecture` may be the base model.
        absent: parameters of that class that the checkpoint does not have.
        side: the files beside the weights.
        renamed: prefixes that were taken off the names of the checkpoint's tensors.
        strange: tensors of the checkpoint that `architecture` does not know; they are kept.
        release: how the checkpoint is quantized already; empty if it is not.
        unused: tensors of such a release that a lowbit model has no use for.
        requantized: its weights are quantized anew, from what it decodes to.
    """

    steps: tuple[Step, ...]
    tied: dict[str, str] = field(default_factory=dict)
    base_model_prefix: str = ""
    architecture: str = ""
    dropped: dict[str, str] = field(default_factory=dict)
    named: str = ""
    absent: tuple[str, ...] = ()
    side: SideFiles = field(default_factory=SideFiles)
    renamed: str = ""
    strange: tuple[str, ...] = ()
    release: str = ""
    unused: tuple[str, ...] = ()
    requantized: bool = False

    @property
    def quantized(self) -> list[Step]:
        return [s for s in self.steps if s.target is not None]

    @property
    def coverage(self) -> float:
        """Quantized part of the weights of Linear, Conv1D and expert modules of the base model; 1 if it has none."""
        counted = [s for s in self.steps if s.counted]
        total = sum(s.tensor.numel for s in counted)
        return sum(s.tensor.numel for s in counted if s.target is not None) / total if total else 1.0

    @property
    def possible_coverage(self) -> float:
        """As :attr:`coverage`, of those weights that the model leaves to their module: others cannot be quantized.

        Of a release that is quantized already, those count that it has quantized.
        """
        counted = [s for s in self.steps if s.counted and s.reason != READ]
        counted = [s for s in counted if s.tensor.grid is not None] or counted
        total = sum(s.tensor.numel for s in counted)
        return sum(s.tensor.numel for s in counted if s.target is not None) / total if total else 1.0

    def record(self) -> ConversionRecord:
        """What the output tells of the checkpoint's names."""
        names, experts = {}, {}
        for step in self.steps:
            if step.stack is not None:
                if patterns := step.stack.patterns:
                    experts[step.path] = patterns
                elif not step.stack.operations and step.stack.first != step.path:
                    names[step.path] = step.stack.first
                continue
            target = step.destination.target if step.target is None else f"{step.path}.weight"
            if target and target != step.tensor.name:
                names[target] = step.tensor.name
        copies = {key: f"{path}.weight" for key, path in self.dropped.items()}
        absent = self.absent if self.architecture == self.named else ()
        return ConversionRecord(names, copies, absent, experts)

    def kept(self) -> list[Step]:
        """Matrices that might have been quantized and are not, largest first."""
        kinds = (*MATRICES, "embedding")
        kept = [s for s in self.steps if s.target is None and s.destination.kind in kinds]
        return sorted(kept, key=lambda s: -s.tensor.numel)

    def output_bytes(self) -> int:
        """Bytes of all tensors of the output, as planned."""
        return sum(step.output_bytes() for step in self.steps)

    def peak_memory(self) -> int:
        """Expected peak of resident memory in bytes: the libraries, and the largest tensor in float and quantized.

        While a tensor is worked on, the next is read.
        """
        following = [*(_read_memory(step) for step in self.steps[1:]), 0]
        return BASE_MEMORY + max((_memory(s, n) for s, n in zip(self.steps, following, strict=True)), default=0)


def _memory(step: Step, following: int) -> int:
    """What working on a step takes, with its tensor and the `following` bytes of the next one."""
    if step.target is None:
        return step.tensor.nbytes + following
    if step.stack is not None:
        return _stack_memory(step) + following
    return 7 * step.tensor.numel + max(4 * step.tensor.numel, following)


def _read_memory(step: Step) -> int:
    """What the tensor of a step takes once it is read: float32, or the bytes to keep. A stack is read by itself."""
    if step.target is None:
        return step.tensor.nbytes
    if isinstance(step.target, Taken):
        return 0
    return 4 * step.tensor.numel if step.stack is None else 0


def _stack_memory(step: Step) -> int:
    """A stack of experts: its result, and one expert in all forms, with the next one read and put together."""
    module = step.module()
    return stored_bits(module) // 8 + (11 + 8) * module.rows * module.cols


def make_plan(
    source: Source,
    names: Names,
    recipe: Recipe,
    *,
    min_coverage: float = 0.9,
    side: SideFiles | None = None,
    requantize: bool = False,
) -> Plan:
    """Decide about every tensor; `side` are the files beside the weights.

    With `requantize`, weights that a release has quantized are quantized anew by the recipe.

    Raises:
        NothingToQuantizeError: no module would be quantized.
        CoverageError: less than `min_coverage` of the matrices would be.
        RecipeError: a pattern of the recipe matches nothing, or it asks for embeddings or an output head that the model
            does not have.
        SourceError: a tensor to quantize has a dtype that is no float.
    """
    quantizable = [r for r in names.destinations.values() if r.kind in ("linear", "conv1d", "embedding", *KINDS)]
    if not quantizable:
        raise NothingToQuantizeError(f"{names.architecture}: has no Linear, Conv1D or Embedding weight to quantize")
    recipe.check_matches([r.path for r in quantizable] + list(names.tied))
    _check_asked(recipe, names)
    words = max((source.tensors[k].shape[0] for k, d in names.destinations.items() if d.kind == "embedding"), default=0)
    steps, dropped, tied = [], {}, {}
    quantized = any(t.grid is not None for t in source.tensors.values())
    owners = set(names.tied.values())
    by_path = {r.path: r for r in names.destinations.values()}
    for key, destination in names.destinations.items():
        tensor = source.tensors[key]
        owner = names.tied.get(destination.path, destination.path)
        stack = destination.stack
        whole = tensor if stack is None else stack.tensor(source.tensors)
        target, reason = _decide(
            destination, owner, names, recipe, quantized=quantized, grid=whole.grid, requantize=requantize
        )
        by_default = False
        of_words = not names.words.isdisjoint((destination.path, owner))
        if target is None and reason in (EMBEDDING, TIED, HEAD) and of_words and not quantized:
            target, reason = _rounded(tensor, destination, reason, recipe)
            by_default = target is not None
        is_embedding = "embedding" in (destination.kind, names.kinds.get(owner))
        if recipe.words is not None and is_embedding and tensor.shape[0] == words:
            said = None if by_default else target
            target, reason = _by_frequency(source, tensor, destination, said, recipe, recipe.words), ""
            by_default = False
        if requantize and whole.grid is not None and isinstance(target, Target):
            target = replace(target, recognise=False)  # or its own grid would be found, and kept
        if isinstance(target, Target) and target.row_bits is not None:
            _check_row_bits(target.row_bits, tensor, destination)
        if target is not None and tensor.numel == 0:
            target, reason = None, "has no weights"
        if target is not None and destination.path != owner and owner in by_path:
            dropped[key] = owner
            continue
        if target is not None and stack is not None:
            if key != stack.first:
                continue  # the step of the first makes the whole stack
            tensor = whole
        own = [key] if stack is None else [name for names in stack.parts for name in names]
        for name in own if target is not None else ():
            if source.tensors[name].dtype not in FLOATS:
                raise SourceError(
                    f"{name}: has dtype {source.tensors[name].dtype}, expected one of {', '.join(FLOATS)}; is it "
                    "quantized already?"
                )
        steps.append(Step(tensor, destination, target, owner, reason, by_default and target is not None))
        if target is not None and owner in owners:
            tied.update({place: own for place, own in names.tied.items() if own == owner})
    plan = Plan(
        tuple(steps),
        tied,
        names.base_model_prefix,
        names.architecture,
        dropped,
        names.named,
        names.absent,
        side or SideFiles(),
        strange=names.strange,
        requantized=requantize,
    )
    _check(plan, min_coverage)
    if requantize:
        _check_nested(plan, recipe)
    return plan


def _check_row_bits(row_bits: tuple[int, ...], tensor: SourceTensor, destination: Destination) -> None:
    """Raise RecipeError if a matrix cannot have these bits of its rows (MIX-1, EXP-2)."""
    if destination.stack is not None or destination.kind in KINDS:
        raise RecipeError(f"{destination.path}: is a stack of experts, whose rows cannot differ; leave row_bits out")
    rows = tensor.shape[-1 if destination.kind == "conv1d" else 0]
    if len(row_bits) != rows:
        raise RecipeError(
            f"{destination.path}: has {rows} rows, and row_bits says the bits of {len(row_bits)}; is the recipe of "
            "another model?"
        )


def _check_nested(plan: Plan, recipe: Recipe) -> None:
    """Raise RecipeError if a grid that is kept takes a precision from the model that the recipe asks for."""
    kept = {step.path: step.target.own for step in plan.quantized if isinstance(step.target, Taken)}
    for path, own in kept.items():
        for bits in recipe.default.nested:
            if bits < own.bits and bits not in own.nested:
                raise RecipeError(
                    f"{path}: keeps its own grid of {own.bits} bits, which has no precision of {bits} "
                    "bits, so that the model would not (NST-3); quantize it anew too (--embeddings, --lm-head), "
                    f"keep it in floats (--keep {path!r}), or leave --nested out"
                )


def _decide(
    destination: Destination,
    owner: str,
    names: Names,
    recipe: Recipe,
    *,
    quantized: bool,
    grid: Grid | None,
    requantize: bool = False,
) -> tuple[Target | Taken | None, str]:
    """Target of a tensor, or None and the reason. All places of a tied matrix share one decision.

    Of a checkpoint that is `quantized` already, what has a `grid` keeps it, and other weights of the body their floats.
    A rule of the recipe can keep a weight in floats; to quantize anew, it can only what cannot be taken over. With
    `requantize`, the recipe decides about all that have a grid as about those of any checkpoint; what it would leave in
    floats, embeddings and the output head, keeps its grid.
    """
    if destination.kind not in (*MATRICES, "embedding"):
        return None, ""
    if destination.reason is not None:
        return None, destination.reason
    places = [owner, *(place for place, own in names.tied.items() if own == owner)]
    if len(places) > 1:
        reason = next(
            (r.reason for r in names.destinations.values() if r.path in places and r.reason is not None), None
        )
        if reason is not None:
            return None, reason
    for place in places:
        rule = recipe.rule_for(place)
        if rule is not None and (requantize or grid is None or grid.refusal or rule.target is None):
            return rule.target, "" if rule.target is not None else f"kept by the pattern {rule.match!r}"
    if grid is not None and not requantize:
        return _taken(destination, places, grid)
    embedding = "embedding" in (destination.kind, *(names.kinds.get(place) for place in places))
    heads = [place in names.heads for place in places]
    if embedding:
        head = any(heads)
        asked = recipe.asked("embeddings") or (recipe.asked("lm_head") if head else None)
        if asked is not None:
            return asked, ""
        if grid is not None and not grid.refusal:
            return _taken(destination, places, grid)
        return None, TIED if head else EMBEDDING
    if all(heads) or (destination.head and len(places) == 1):  # tied to a Linear of the body, it is one of the body
        asked = recipe.asked("lm_head")
        if grid is not None and not grid.refusal and asked is None:
            return _taken(destination, places, grid)
        return asked, "" if asked is not None else HEAD
    return (None, LEFT) if quantized and grid is None else (recipe.default, "")


def _by_frequency(
    source: Source,
    tensor: SourceTensor,
    destination: Destination,
    said: Target | Taken | None,
    recipe: Recipe,
    words: Words,
) -> Target:
    """The target of the vocabulary's embedding, whose rows have bits by the frequency of their words.

    All but the bits is as the recipe `said` of it, or else as :func:`unsaid_words` has it.
    """
    if destination.reason is not None or tensor.grid is not None:
        why = destination.reason or "a release has quantized it"
        raise RecipeError(f"{destination.path}: cannot have bits by frequency: {why}; leave words out of the recipe")
    base = said if isinstance(said, Target) and said.codec != "codebook" else unsaid_words(recipe)
    bits = words.bits[0]
    nested = tuple(k for k in base.nested if k < bits)
    return replace(base, bits=bits, nested=nested, row_bits=words.row_bits(source.directory, tensor.shape[0]))


def unsaid_words(recipe: Recipe) -> Target:
    """All but the bits of an embedding or output head, of which the recipe says nothing and whose bits are chosen.

    It is as the recipe's default. A codebook has just the bits of its table; instead of one it is uniform.
    """
    if recipe.default.codec != "codebook":
        return recipe.default
    return replace(WORDS, solver="mse", group_size=recipe.default.group_size)


def _rounded(tensor: SourceTensor, destination: Destination, reason: str, recipe: Recipe) -> tuple[Target | None, str]:
    """What becomes of an embedding or an output head of which the recipe says nothing: WORDS, where it serves.

    It is called for the matrices with a row for each word of a model that generates text. An encoder keeps its
    embedding, also one that fills in masked words: programs that put layers behind it, such as sentence-transformers,
    take the dtype of its first parameter for theirs, which would be that of planes. Tables of positions and of types
    are small, and servers such as vLLM read them as floats; the head of a classifier is a few rows, which tasks may
    want to train.

    `reason` says what it is.
    """
    keys = {EMBEDDING: ("embeddings",), HEAD: ("lm_head",)}.get(reason, ("embeddings", "lm_head"))
    if any(getattr(recipe, key) is not None for key in keys):
        return None, reason
    if recipe.default.nested:
        return None, f"{reason}; in {WORDS.bits} bits it could not be read at a nested precision"
    shape = tensor.shape[::-1] if destination.kind == "conv1d" else tensor.shape
    planned = ModuleEntry(destination.path, WORDS.scheme(), destination.kind, shape)
    if tensor.numel and stored_bits(planned) >= 8 * tensor.nbytes:
        return None, f"{reason}, which {WORDS.bits} bits would not make smaller"
    return WORDS, ""


def _taken(destination: Destination, places: list[str], grid: Grid) -> tuple[Taken | None, str]:
    """What becomes of a weight that a release has quantized; raises QuantizedSourceError if that cannot be stored."""
    if destination.path != places[0]:
        return None, "tied to another module, and quantized apart from it"
    refusal = grid.refusal
    if destination.kind == "conv1d":
        refusal = "it is the weight of a Conv1D, whose order of rows and columns in such releases is not known"
    if refusal:
        raise QuantizedSourceError(
            f"{destination.key}: {refusal}; keep it as floats (--keep {destination.path!r}, or a pattern with * for "
            "all that are like it), quantize its floats anew by a rule of a recipe, or convert the original checkpoint"
        )
    return Taken(grid.scheme), ""


def _check_asked(recipe: Recipe, names: Names) -> None:
    """Raise RecipeError if the recipe is to quantize embeddings or an output head, and the model has none."""
    shared = {*names.tied, *names.tied.values()}
    matrices = [d for d in names.destinations.values() if d.kind in ("linear", "conv1d")]
    embeddings = [d for d in names.destinations.values() if d.kind == "embedding"]
    has_embedding = embeddings or any(names.kinds.get(path) == "embedding" for path in shared)
    if recipe.words is not None and not has_embedding:
        raise RecipeError(f"words, or --word-frequencies: {names.architecture} has no embedding; leave it out")
    has_head = any(d.head for d in matrices) or not names.heads.isdisjoint(shared)
    for key, found, what in (("embeddings", has_embedding, "embedding"), ("lm_head", has_head, "output head")):
        if recipe.asked(key) is not None and not found:
            option = f"--{key.replace('_', '-')}"
            raise RecipeError(f"{key}, or {option}: {names.architecture} has no {what}; leave it out")


def _check(plan: Plan, min_coverage: float) -> None:
    if not plan.quantized:
        found = Counter(s.reason for s in plan.kept())
        why = "; ".join(f"{n} kept: {reason}" for reason, n in found.most_common(3))
        raise NothingToQuantizeError(
            f"{plan.architecture}: no Linear, Conv1D or Embedding weight would be quantized"
            + (f" ({why})" if why else "")
        )
    covered = plan.possible_coverage
    if covered < min_coverage:
        kept = list(dict.fromkeys(f"{s.destination.path} ({s.reason})" for s in plan.kept() if s.counted))
        largest = "; ".join(kept[:4]) + (f"; and {len(kept) - 4} more" if len(kept) > 4 else "")
        if any(reason.endswith("with its experts is not known)") for reason in kept):
            largest += "; a newer transformers may compute them as other models do, which is known"
        raise CoverageError(
            f"{plan.architecture}: only {covered:.1%} of the weights in matrices would be quantized, expected at least "
            f"{min_coverage:.0%}; kept in full precision: {largest}; pass --min-coverage "
            f"{math.floor(100 * covered) / 100} to accept it"
        )
