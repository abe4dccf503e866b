"""AutoRound (quant_method "auto-round"): integers in the layout of another kind of release, as packing_format says."""

from __future__ import annotations

from collections.abc import Iterator

from . import awq, gptq
from .packed import Packed
from .release import Release

_GPTQ = {"auto_round:auto_gptq": True, "auto_round:gptq": True, "auto_round": False, "auto_round:gptqmodel": False}
_AWQ = ("auto_round:auto_awq", "auto_round:awq")


def find(release: Release) -> Iterator[Packed]:
    """The weights of a release; raises QuantizedSourceError for one that is not known, or whose tensors lie."""
    section = release.section
    packing = section.get("packing_format", "auto_round:auto_gptq")
    if (kind := str(section.get("data_type", "int"))) != "int":
        raise release.error(
            f"config.json: quantization_config has data_type {kind!r}, expected 'int', which is known; convert the "
            "original checkpoint"
        )
    if packing in _AWQ:
        return awq.find(release)
    if packing not in _GPTQ:
        raise release.error(
            f"config.json: quantization_config has packing_format {packing!r}, expected one of "
            f"{', '.join((*_GPTQ, *_AWQ))}; export the model in one of these, or convert the original "
            "checkpoint"
        )
    return gptq.weights(release, varied=bool(section.get("extra_config")), minus_one=_GPTQ[packing])
