"""Open a checkpoint and plan its conversion, from headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..dtypes import DTYPES
from ..errors import SourceError
from ..integrations.conversion_record import KEY
from .completeness import strip
from .huggingface import open_checkpoint, quantized_by, read_model_config
from .names import map_names
from .plan import Plan, make_plan
from .quantized import QuantizedSource, open_quantized
from .recipe import Recipe
from .side import side_files, without_auto_map
from .source import FLOATS, RenamedSource, Source, named_as_shown
from .splits import split

DEFAULT_RECIPE = Recipe()


def plan_conversion(
    source: str,
    recipe: Recipe = DEFAULT_RECIPE,
    *,
    revision: str | None = None,
    min_coverage: float = 0.9,
    strip_prefix: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    requantize: bool = False,
    stream: bool | None = None,
) -> tuple[Source, Plan, dict[str, Any]]:
    """Open a checkpoint and plan its conversion, from headers alone.

    Args:
        source: a directory, or a repository on the Hub.
        recipe: what to quantize, and how.
        revision: branch, tag or commit on the Hub.
        min_coverage: part of the matrices' weights that must be quantized.
        strip_prefix: taken off the names of the tensors, such as ``_orig_mod.``.
        leave_out: patterns of files beside the weights that must not come along.
        requantize: quantize the weights of a release that is quantized already anew, from what it decodes to.
        stream: fetch the Hub's weights tensor by tensor; None: where their files do not fit the disk.

    Returns:
        The open source, the plan, and the ``config.json`` of the output, but for ``quantization_config``.

    Raises:
        SourceError, RecipeError, CoverageError: see :func:`make_plan`.
        HubError: the headers of streamed weights cannot be had.
    """
    opened = open_checkpoint(source, revision=revision, leave_out=leave_out, stream=stream)
    with named_as_shown(opened):
        return plan_opened(
            opened,
            recipe,
            min_coverage=min_coverage,
            strip_prefix=strip_prefix,
            leave_out=leave_out,
            requantize=requantize,
        )


def plan_opened(
    opened: Source,
    recipe: Recipe,
    *,
    min_coverage: float,
    strip_prefix: Sequence[str],
    leave_out: Sequence[str],
    requantize: bool,
) -> tuple[Source, Plan, dict[str, Any]]:
    """As :func:`plan_conversion`, of a checkpoint that is open."""
    config = without_auto_map(read_model_config(opened.directory))
    side = side_files(opened.directory, opened.files, opened.tensors, leave_out)
    section, config = quantized_by(config, opened.directory)
    release, unused = "", tuple[str, ...]()
    if section:
        opened = open_quantized(opened, section, config)
    if isinstance(opened, QuantizedSource):
        release, unused = opened.method, opened.unused
    if strip_prefix:
        opened = _stripped(opened, strip_prefix)
    opened, joined = split(opened)
    names = map_names(opened.directory, {t.name: t.shape for t in opened.tensors.values()})
    if requantize and not release:
        raise SourceError(
            f"{opened.directory}: is not quantized yet: there is nothing to quantize anew; leave --requantize out"
        )
    plan = make_plan(opened, names, recipe, min_coverage=min_coverage, side=side, requantize=requantize)
    plan = replace(plan, renamed=", ".join(strip_prefix), release=release, unused=unused)
    if plan.architecture != plan.named:  # of which it holds the base model alone
        config = {**config, "architectures": [plan.architecture]}
    if record := replace(plan.record(), joined=joined).to_dict():
        config = {**config, KEY: record}
    if "dtype" not in config and "torch_dtype" not in config:
        # transformers would take the dtype of the first float tensor, which may be a scale.
        config = {**config, "dtype": _main_dtype(opened)}
    return opened, plan, config


def _stripped(source: Source, prefixes: Sequence[str]) -> Source:
    """The source with `prefixes` taken off its names. Raises SourceError if one of them stands nowhere."""
    names = list(source.tensors)
    for prefix in prefixes:
        prefix = prefix if prefix.endswith(".") else f"{prefix}."
        stripped = strip(names, [prefix])
        if stripped == names:
            raise SourceError(
                f"{source.directory}: no tensor has a name with {prefix!r} in front; they are named like {names[0]!r}"
            )
        names = stripped
    return RenamedSource(source, dict(zip(source.tensors, names, strict=True)))


def _main_dtype(source: Source) -> str:
    """The float dtype that most of the checkpoint's weights have."""
    counts: dict[str, int] = {}
    for t in source.tensors.values():
        if t.dtype in FLOATS:
            counts[t.dtype] = counts.get(t.dtype, 0) + t.numel
    return DTYPES[max(counts, key=lambda d: counts[d])].torch or "float32" if counts else "float32"
