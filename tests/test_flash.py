"""Without padding, attention runs in the flash kernels and no mask tensor is built, on CPU and on CUDA.

Only a single token in float32 on a CPU does without SDPA.
"""

import types

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias

import llama

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
]


@pytest.fixture
def masks(monkeypatch):
    """The `attn_mask` of every attention call in the decoder; only the flash kernel is enabled."""
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
    """A model with grouped-query attention; in bfloat16 on CUDA, whose flash kernel does not support float32."""
    ours, _ = make_pair(text={"num_key_value_heads": 2, "hidden_size": 128})
    return ours.to(request.param, torch.bfloat16 if request.param == "cuda" else torch.float32)


@torch.no_grad()
def test_prefill_decoding_and_a_second_turn_run_in_the_flash_kernel(model, prompt, masks):
    inputs = {name: tensor.to(model.device) for name, tensor in prompt().items()}
    cache = llama.KVCache(model)
    steps = [inputs, {"input_ids": inputs["input_ids"][:, :1]}, {"input_ids": inputs["input_ids"][:, :7]}]
    kinds = []
    for step in steps:
        masks.clear()
        model(**step, cache=cache)
        kinds.append({type(mask) for mask in masks})
    none = type(None)
    single = set() if model.device.type == "cpu" else {none}
    assert kinds == [{none}, single, {CausalBias}]  # the prompt, one token, several tokens after a prefix


@torch.no_grad()
def test_only_a_padded_batch_gets_a_mask_tensor(model, prompt, masks):
    ids = prompt(images=0)["input_ids"].to(model.device)
    model(ids, attention_mask=torch.ones_like(ids))
    assert {type(mask) for mask in masks} == {type(None)}
    masks.clear()
    padded = torch.ones_like(ids)
    padded[:, :3] = 0
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION]):
        model(ids, attention_mask=padded)
    assert {type(mask) for mask in masks} == {torch.Tensor}
