"""LiNeS (Wang et al. 2024, arXiv:2410.17146): less of a task in early layers, which hold what tasks share.

Layer l of L gets ``first + (1 - first) * (l - 1) / (L - 1)`` of its delta: the paper's ``alpha + beta * (l - 1) / (L -
1)``, with the weights of the sum for the common factor ``alpha + beta``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import BundleError

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
# What stands in front of the first layer, by transformers' names. Each is a whole part of a path: an output head may be
# named after embeddings, too (embed_out, unembed, class_embed), and counts as the last layer.
_KINDS = (
    "word|tok|token|token_type|type|task_type|segment|speaker|pos|position|positional|[a-z]_position|row|column|patch"
)
_INPUT = re.compile(
    rf"""(?:^|\.)(?:
    wte | wpe | shared$ | embedder
    | embed(?:ding|dings)?                          # as a name, and around those of BERT and ViT
    | (?:{_KINDS})_emb(?:ed|eds|edding|eddings)?
    | embed_(?:in|tokens|tokens_per_layer|positions|audio_tokens|audio|vision)
    | embed_proj | embeddings_project | embedding_hidden_mapping_in | project_in  # to the width of the layers
    | feature_extractor\.conv_layers | conv\.conv_layers  # the numbered convolutions of wav2vec2 and Speech2Text
    | feature_projection | pos_conv_embed           # and what follows them
    )(?:\.|$)""",
    re.VERBOSE,
)


def layer_factors(modules: Iterable[str], first: float) -> dict[str, float]:
    """What the deltas of each module are multiplied by.

    A module's layer is the first number in its path; what stands before the number is the stack of layers, such as an
    encoder's or a decoder's, and each stack is scaled by itself. Its last layer is the last one of which there is a
    module. Embeddings count as the first layer, and so do convolutions in front of it, numbered or not; all else
    outside of stacks, such as an output head, counts as the last one.

    Args:
        modules: paths.
        first: the factor of the first layer; the last one's is 1.

    Raises:
        BundleError: `first` is not between 0 and 1, or there are no two layers.
    """
    if not 0 <= first <= 1:
        raise BundleError("TSK-9", f"the factor of the first layer is {first}, expected 0 to 1")
    found = {module: _layer_of(module) for module in modules}
    last = dict[str, int]()
    for place in found.values():
        if place is not None:
            last[place[0]] = max(last.get(place[0], 0), place[1])
    if not any(last.values()):
        raise BundleError(
            "TSK-9", "factors for layers are wanted (--lines, lines=), and no two layers are in the bundles"
        )

    def factor(module: str) -> float:
        place = found[module]
        if place is None:
            return first if _INPUT.search(module) else 1.0
        stack, layer = place
        return first + (1 - first) * layer / last[stack] if last[stack] else 1.0

    return {module: factor(module) for module in found}


def _layer_of(module: str) -> tuple[str, int] | None:
    """Stack and number of the layer that a module is in; None outside of all, as in a numbered list of inputs."""
    number = _LAYER.search(module)
    if number is None or _INPUT.search(module[: number.start()]):
        return None
    return module[: number.start()], int(number[1])
