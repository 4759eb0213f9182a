"""The decoder's logits match transformers' Llama and Mistral in every variant that a checkpoint can have."""

import pytest
import torch
import torch.nn.functional as F

from llama import attend_once

VARIANTS = {
    "multi-head attention": {},
    "grouped-query attention": {"num_key_value_heads": 2},
    "multi-query attention": {"num_key_value_heads": 1},
    "head_dim other than hidden_size / heads": {"head_dim": 24, "num_key_value_heads": 2},
    "attention and MLP biases": {"attention_bias": True, "mlp_bias": True},
    "RoPE theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "RoPE linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "RoPE llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        }
    },
    "large eps": {"rms_norm_eps": 1e-2},
    "gelu": {"hidden_act": "gelu"},
    "Mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 512},
}


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_logits_match_transformers(name, make_pair, prompt, check):
    ours, theirs = make_pair(text=VARIANTS[name])
    inputs = prompt(images=0, length=200)
    check(f"decoder logits, {name}", ours(**inputs).logits, theirs(**inputs).logits)


@pytest.mark.parametrize("where", ["whole config", "text_config"])
@torch.no_grad()
def test_tied_embeddings_share_one_parameter_with_the_head(where, make_pair, prompt, check):
    tied = {"tie_word_embeddings": True}
    ours, theirs = make_pair(text=tied) if where == "text_config" else make_pair(**tied)
    assert ours.language_model.lm_head.weight is ours.language_model.model.embed_tokens.weight
    inputs = prompt(images=0)
    check("decoder logits, tied embeddings", ours(**inputs).logits, theirs(**inputs).logits)


@torch.no_grad()
def test_the_head_computes_only_the_requested_positions(make_pair, prompt):
    ours, _ = make_pair()
    inputs = prompt(images=0, length=12)
    seen = []
    ours.language_model.lm_head.register_forward_hook(lambda head, args, out: seen.append(args[0].shape))
    everything = ours(**inputs).logits
    last = ours(**inputs, logits_to_keep=1).logits
    chosen = torch.arange(12)[None] % 3 == 0
    some = ours(**inputs, logits_to_keep=chosen).logits
    assert seen == [(1, 12, 64), (1, 1, 64), (4, 64)]
    torch.testing.assert_close(last, everything[:, -1:])
    torch.testing.assert_close(some, everything[chosen])


@torch.no_grad()
def test_bfloat16_rounds_where_transformers_rounds(make_pair, prompt, check):
    ours, theirs = make_pair(text={"num_key_value_heads": 2})
    ours, theirs, inputs = ours.bfloat16(), theirs.bfloat16(), prompt(images=0, length=200)
    theirs.model.language_model.rotary_emb.inv_freq = ours.language_model.model.frequencies  # unrounded
    check("decoder logits in bfloat16", ours(**inputs).logits, theirs(**inputs).logits, limit=1e-2)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_a_single_token_attends_as_in_sdpa(masked, groups, check):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 16, generator=generator) for length in (groups, 50, 50))
    mask = (torch.arange(50) >= torch.tensor([0, 7])[:, None])[:, None, None] if masked else None  # padding on the left
    ours, theirs = attend_once(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    check("attention of a single token", ours, theirs, limit=1e-6)
