"""Attention takes the flash kernels wherever there is no padding: no mask tensor is built, on CPU and on CUDA."""

import types

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias

import llama

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")),
]


@pytest.fixture
def masks(monkeypatch):
    """The `attn_mask` of every attention call of the decoder, while only the flash kernel is allowed."""
    seen = []
    attend = F.scaled_dot_product_attention

    def watched(q, k, v, attn_mask=None, **options):
        seen.append(attn_mask)
        return attend(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(llama, "F", types.SimpleNamespace(scaled_dot_product_attention=watched))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        yield seen


@pytest.fixture(params=DEVICES)
def model(request, make_pair):
    """A model with grouped keys; in bfloat16 on CUDA, whose flash kernel knows no float32."""
    ours, _ = make_pair(text={"num_key_value_heads": 2, "hidden_size": 128})
    return ours.to(request.param, torch.bfloat16 if request.param == "cuda" else torch.float32)


@torch.no_grad()
def test_prompt_decoding_and_second_turn_run_in_the_flash_kernel_without_a_mask(model, prompt, masks):
    inputs = {name: tensor.to(model.device) for name, tensor in prompt().items()}
    cache = llama.KVCache(model)
    steps = [inputs, {"input_ids": inputs["input_ids"][:, :1]}, {"input_ids": inputs["input_ids"][:, :7]}]
    kinds = []
    for step in steps:
        masks.clear()
        model(**step, cache=cache)
        kinds.append({type(mask) for mask in masks})
    nothing = type(None)
    assert kinds == [{nothing}, {nothing}, {CausalBias}]  # the prompt, one token, several tokens after a prefix


@torch.no_grad()
def test_a_mask_tensor_is_only_built_for_a_padded_batch(model, prompt, masks):
    ids = prompt(images=0)["input_ids"].to(model.device)
    model(ids, attention_mask=torch.ones_like(ids))
    assert {type(mask) for mask in masks} == {type(None)}
    masks.clear()
    padded = torch.ones_like(ids)
    padded[:, :3] = 0
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION]):
        model(ids, attention_mask=padded)
    assert {type(mask) for mask in masks} == {torch.Tensor}
