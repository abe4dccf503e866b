"""LiNeS: early layers get less of a task, by their place in their stack, and the rest of a sum stays exact."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit_format.errors import BundleError
from lowbit_format.tasks.arithmetic import merge_bundles
from lowbit_format.tasks.bundle import TaskBundle
from lowbit_format.tasks.bundle_config import TaskConfig
from lowbit_format.tasks.layer_scaling import layer_factors

CONFIG = TaskConfig("ab" * 32)


@given(
    st.integers(2, 40), st.floats(0, 1), st.sampled_from(["layers", "model.layers", "transformer.h", "encoder.layer"])
)
def test_the_factors_of_a_stack_are_evenly_spaced(layers: int, first: float, stack: str) -> None:
    found = layer_factors([f"{stack}.{i}.mlp.experts.7.up" for i in range(layers)], first)
    np.testing.assert_allclose(list(found.values()), np.linspace(first, 1, layers), rtol=1e-12, atol=1e-12)


def test_stacks_are_scaled_apart_and_the_rest_by_its_end() -> None:
    modules = ["encoder.block.0.q", "encoder.block.2.q", "decoder.block.1.q", "decoder.block.4.q", "bridge.0.q"]
    outside = {"shared": 0.5, "embeddings.word_embeddings": 0.5, "wte": 0.5, "lm_head": 1.0, "pooler.dense": 1.0}
    found = layer_factors([*modules, *outside], 0.5)
    assert [found[m] for m in modules] == [0.5, 1.0, 0.625, 1.0, 1.0]
    assert {m: found[m] for m in outside} == outside


INPUTS = """
gpt_neox.embed_in transformer.wte transformer.wpe model.embed_tokens model.decoder.embed_positions shared embed
bert.embeddings bert.embeddings.word_embeddings bert.embeddings.LayerNorm transformer.word_embeddings
bert.embeddings.token_type_embeddings layoutlm.embeddings.x_position_embeddings text_model.embeddings.token_embedding
vit.embeddings.patch_embeddings.projection model.visual.patch_embed.proj tok_embeddings decoder.embed_tokens.3
electra.embeddings_project albert.encoder.embedding_hidden_mapping_in model.decoder.project_in
model.language_model.embed_tokens_per_layer model.embed_vision.embedding_projection embeddings.convs.0.conv
wav2vec2.feature_extractor.conv_layers.0.conv wav2vec2.feature_extractor.conv_layers.6.conv
wav2vec2.feature_projection.projection wav2vec2.encoder.pos_conv_embed.conv model.encoder.conv.conv_layers.1
"""
OUTPUTS = """
embed_out gpt_neox.embed_out unembed model.unembedding unembedding_projection output_embeddings class_embed
lm_head lm_heads.1 score classifier qa_outputs model.decoder.project_out proj_out cls.predictions.decoder
feature_extractor classifier.dense embedding_out shared_head
"""


@pytest.mark.parametrize(("names", "factor"), [(INPUTS, 0.25), (OUTPUTS, 1.0)], ids=["inputs", "outputs"])
def test_names_outside_of_layers(names: str, factor: float) -> None:
    """Those of transformers' classes: an input's is the first layer's factor, an output head's the last one's."""
    layers = {"layers.0.embed_proj": 0.25, "layers.1.rel.position_embedding": 0.625, "layers.2.mlp": 1.0}
    found = layer_factors([*layers, *names.split()], 0.25)
    assert found == layers | dict.fromkeys(names.split(), factor)


def test_a_merged_bundle_has_each_layer_by_its_factor() -> None:
    names = [f"layers.{i}.fc.scales.mul" for i in range(3)]
    a, b = (TaskBundle(CONFIG, {n: np.full((1, 2), v, np.float32) for n in names}) for v in (1.0, 4.0))
    merged = merge_bundles([a, b], [1.0, 0.5], lines=0.5)
    assert [float(merged.deltas[n][0, 0]) for n in names] == [1.5, 2.25, 3.0]
    whole = merge_bundles([a, b], [1.0, 0.5], lines=1.0)
    assert all((whole.deltas[n] == merge_bundles([a, b], [1.0, 0.5]).deltas[n]).all() for n in names)


@pytest.mark.parametrize(
    ("first", "message"), [(1.5, "expected 0 to 1"), (float("nan"), "0 to 1"), (0.5, "no two layers")]
)
def test_what_cannot_be_scaled(first: float, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        layer_factors(["layers.0.fc", "lm_head", "feature_extractor.conv_layers.6.conv"], first)
