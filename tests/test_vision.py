"""Hidden states of the vision tower match transformers' CLIPVisionModel, and no unneeded layer is computed."""

import pytest
import torch


@pytest.fixture
def pair(make_pair):
    ours, theirs = make_pair()
    return ours.vision_tower, theirs.model.vision_tower


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1, 2, 3, 4, -1, -2, -5])
def test_every_hidden_state_matches_transformers(layer, pair, pixels, check):
    ours, theirs = pair
    states = theirs(pixels, output_hidden_states=True).hidden_states
    check("vision tower, every layer", ours(pixels, layer, "full"), states[layer])


@torch.no_grad()
def test_default_drops_the_cls_token_and_full_keeps_it(pair, pixels):
    ours, _ = pair
    full, default = ours(pixels, -2, "full"), ours(pixels, -2, "default")
    assert full.shape == (2, 10, 48)
    assert torch.equal(default, full[:, 1:])


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_several_layers_are_concatenated_in_the_requested_order(strategy, pair, pixels):
    ours, _ = pair
    expected = torch.cat([ours(pixels, layer, strategy) for layer in (-1, 1, 3)], dim=-1)
    assert torch.equal(ours(pixels, [-1, 1, 3], strategy), expected)


@torch.no_grad()
@pytest.mark.parametrize(("layer", "computed"), [(-2, 3), (0, 0), (1, 1), ([1, -3], 2), (-1, 4)])
def test_layers_after_the_last_requested_one_are_not_computed(layer, computed, pair, pixels):
    ours, _ = pair
    calls = []
    for block in [*ours.encoder.layers, ours.post_layernorm]:
        block.register_forward_hook(lambda *args: calls.append(1))
    ours(pixels, layer)
    assert len(calls) == computed


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        {"vision": {"hidden_act": "gelu", "layer_norm_eps": 1e-3}},
        {"vision": {"patch_size": 6, "image_size": 44}},
        {"vision_feature_layer": [-2, 1], "vision_feature_select_strategy": "full"},
        {"vision_feature_layer": 2, "projector_hidden_act": "relu", "multimodal_projector_bias": False},
    ],
    ids=str,
)
def test_projected_features_match_transformers(config, make_pair, check):
    ours, theirs = make_pair(**config)
    size = ours.config.vision_config.image_size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected = torch.stack(list(theirs.get_image_features(pixels).pooler_output))
    assert expected.shape[1] == ours.config.image_seq_length
    check("projected image features", ours.get_image_features(pixels), expected)


@torch.no_grad()
def test_the_projector_alone_matches_transformers(make_pair, check):
    ours, theirs = make_pair()
    features = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(0))
    expected = theirs.model.multi_modal_projector(features)
    check("projector", ours.multi_modal_projector(features), expected)
