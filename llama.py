"""The Llama decoder with its key-value cache: from embeddings to the hidden states that the head turns into logits.

    embeddings (B, T, D) --32 x (attention, MLP)--> norm --> hidden states (B, T, D) --lm_head--> logits (B, T, V)

The decoder does not know that some embeddings come from an image: llava.py has put them there, and they attend
causally, like text. The file goes from the leaves to the root: config, RMSNorm, RoPE, cache, attention, MLP, layer,
model. Shapes: B batch, T new tokens, S tokens seen (cached and new), D model width, H query heads, Hkv key-value heads,
G = H / Hkv, Dh head width, V vocabulary size.

Sources: Llama 2 (arXiv 2307.09288); transformers' modeling_llama.py for names, defaults and the order of rounding.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from extras.activations import ACTIVATIONS


@dataclass
class LlamaConfig:
    """The shape of the decoder. Defaults are those of transformers; the comments give those of LLaVA-1.5 7B and 13B."""

    model_type: str = "llama"  # "mistral" is the same network with grouped-query attention
    vocab_size: int = 32000  # 32064: 32002 tokens and padding that is never used
    hidden_size: int = 4096  # 4096 and 5120
    intermediate_size: int = 11008  # 11008 and 13824
    num_hidden_layers: int = 32  # 32 and 40
    num_attention_heads: int = 32  # 32 and 40
    num_key_value_heads: int = 0  # 0: as many as attention heads; BakLLaVA has 8
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048  # 4096
    sliding_window: int | None = None  # Mistral's; never reached, because the context is limited to it
    rms_norm_eps: float = 1e-6  # 1e-5
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_parameters: dict = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})

    def __post_init__(self) -> None:
        if not self.head_dim and self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not divisible by {self.num_attention_heads} heads")
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def context_length(self) -> int:
        """The maximum number of tokens, prompt and answer together."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)


class LlamaRMSNorm(nn.Module):
    """Divides each vector by its root mean square, then scales each channel by a learned weight (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D). Normalised in float32 and cast back to the dtype of x before the weight is applied."""
        return self.weight * torch.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype)


def rope_frequencies(config: LlamaConfig) -> Tensor:
    """RoPE's rotation per position, in radians, for each pair of channels (arXiv 2104.09864): (Dh / 2,), float32.

    "linear" scaling divides all frequencies by a factor. "llama3" divides only the low ones, which complete fewer than
    `low_freq_factor` turns within the original context; it leaves those with more than `high_freq_factor` turns
    unchanged and interpolates in between.
    """
    rope = config.rope_parameters
    # Always computed on the CPU: these are not weights, so nothing would fill them in after a meta-device build.
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    frequencies = 1.0 / rope["rope_theta"] ** exponents
    if rope["rope_type"] == "linear":
        return frequencies / rope["factor"]
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return kept * frequencies + (1 - kept) * frequencies / rope["factor"]
    return frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies RoPE: rotates channels i and i + Dh / 2 of each head as a pair. (B, H, T, Dh) -> (B, H, T, Dh)"""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def attend_once(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """What SDPA computes, softmax(q k^T / sqrt(Dh)) v, for few queries: (B, Hkv, G, Dh) -> (B, Hkv, G, Dh).

    `k` and `v` are (B, Hkv, S, Dh), `mask` as in `causal_mask`. On a CPU, SDPA's kernel is made for many queries. Two
    products are up to 1.6 times as fast, if the keys are the first factor: then each key is read once, from end to end.
    """
    if q.device.type != "cpu" or q.dtype != torch.float32:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (k @ (q * q.shape[-1] ** -0.5).transpose(-1, -2)).transpose(-1, -2)  # (B, Hkv, G, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1) @ v


class KVCache:
    """The keys and values of all tokens so far: the state of a conversation, passed to the model and updated by it.

    Args:
        model: a LlamaModel, or the model that contains it; determines shape, dtype and device.
        batch_size: B.
        max_length: number of tokens to allocate; `generate` allocates once for the longest possible answer.
    """

    def __init__(self, model: nn.Module, batch_size: int = 1, max_length: int = 0) -> None:
        decoder = next(module for module in model.modules() if isinstance(module, LlamaModel))
        config, weight = decoder.config, decoder.norm.weight
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, max_length, config.head_dim)
        with torch.inference_mode(False):  # tensors created in inference mode cannot be updated outside of it
            self.keys = torch.empty(shape, dtype=weight.dtype, device=weight.device)  # (layers, B, Hkv, max_length, Dh)
            self.values = torch.empty_like(self.keys)
        self.length = 0  # tokens stored so far; lowering it discards the most recent ones
        self.padding: Tensor | None = None  # (B,): how many of them are padding, always on the left

    def reserve(self, max_length: int) -> None:
        """Grows the cache to `max_length` tokens if it is smaller, keeping its content."""
        *shape, allocated, head_dim = self.keys.shape

        def larger(old: Tensor) -> Tensor:
            new = old.new_empty(*shape, max_length, head_dim)
            new[..., : self.length, :] = old[..., : self.length, :]
            return new

        if max_length > allocated:
            with torch.inference_mode(False), torch.no_grad():
                self.keys, self.values = larger(self.keys), larger(self.values)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores one layer's new keys and values (B, Hkv, T, Dh) and returns all of that layer's, (B, Hkv, S, Dh)."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def keep(self, rows: list[int]) -> None:
        """Keeps only these sequences of the batch; `rows` is in ascending order."""
        for store in (self.keys, self.values):
            for target, source in enumerate(rows):
                if target != source:
                    store[:, target, :, : self.length] = store[:, source, :, : self.length]
        self.keys, self.values = self.keys[:, : len(rows)], self.values[:, : len(rows)]
        self.padding = None if self.padding is None else self.padding[rows]


class LlamaAttention(nn.Module):
    """Causal self-attention in which groups of G = H / Hkv query heads share one key-value head."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim, self.num_key_value_heads = config.head_dim, config.num_key_value_heads
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, config.num_attention_heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, width, bias=bias)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None, keep: int = 0
    ) -> Tensor:
        """(B, T, D) -> (B, T, D), or (B, keep, D): only the last `keep` tokens attend. `mask`: see `causal_mask`."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H or Hkv, T, Dh)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin)[:, :, -keep:], rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(self.layer_idx, k, v)  # (B, Hkv, S, Dh)
        if q.shape[2] > 1:
            grouped = q.shape[1] != k.shape[1]
            x = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
            )  # (B, H, T, Dh)
        else:
            # A single token sees every key, so the G heads of a group can be G queries of one head: the same result
            # without the copy of keys and values that `enable_gqa` makes.
            groups = q.view(len(q), self.num_key_value_heads, -1, self.head_dim)  # (B, Hkv, G, Dh)
            x = attend_once(groups, k, v, mask).reshape(q.shape)
        return self.o_proj(x.transpose(1, 2).flatten(2))


class LlamaMLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): `gate_proj`, after the activation, gates `up_proj` elementwise."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class LlamaDecoderLayer(nn.Module):
    """A pre-norm transformer block: attention and MLP, each with a residual connection."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LlamaAttention(config, layer_idx)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None, keep: int = 0
    ) -> Tensor:
        """(B, T, D) -> (B, T, D), or (B, keep, D) for the last `keep` tokens. (0 keeps all: x[:, -0:] is all of x.)"""
        x = x[:, -keep:] + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, keep)
        return x + self.mlp(self.post_attention_layernorm(x))


def causal_mask(length: int, start: int, padding: Tensor | None, device: torch.device) -> Tensor | None:
    """The causal mask of `length` new tokens after `start` cached ones, in the cheapest form.

    Without padding no mask tensor is needed, so that attention can use its flash kernels: None means "causal" for a
    prompt and "every key" for a single token (`LlamaAttention` tells them apart); several tokens after a cached prefix
    get PyTorch's lower-right causal bias. A padded batch gets a tensor (B, 1, T, S), True where a token may attend.
    """
    if padding is None:
        return causal_lower_right(length, start + length) if start > 0 and length > 1 else None
    key_index = torch.arange(start + length, device=device)  # (S,)
    query_index = key_index[start:, None]  # (T, 1)
    visible = (key_index <= query_index) & (key_index >= padding[:, None, None])  # (B, T, S)
    return (visible | (key_index == query_index))[:, None]  # padding attends to itself: softmax needs one finite score


class LlamaModel(nn.Module):
    """The decoder without its head."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.frequencies = rope_frequencies(config)  # not a buffer: model.bfloat16() would round it

    def forward(self, x: Tensor, cache: KVCache | None = None, padding: Tensor | None = None, keep: int = 0) -> Tensor:
        """Embeddings (B, T, D) -> normalised hidden states (B, T, D), or (B, keep, D) for the last `keep` tokens.

        `padding` (B,) is the number of padding tokens on the left of each sequence. With a cache, x follows the tokens
        that it holds.
        """
        length, start = x.shape[1], 0
        if cache is not None:
            start = cache.length
            cache.reserve(start + length)
        positions = torch.arange(start, start + length, device=x.device)  # (T,)
        if padding is not None:
            positions = (positions - padding[:, None]).clamp(min=0)[:, None]  # (B, 1, T): from the first real token
        angles = positions[..., None] * self.frequencies.to(x.device).repeat(2)  # (T, Dh) or (B, 1, T, Dh)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        mask = causal_mask(length, start, padding, x.device)
        *layers, last = self.layers
        for layer in layers:
            x = layer(x, cos, sin, mask, cache)
        if 0 < keep < length:
            # Of the other tokens, the last layer only needs keys and values: a prompt takes 4 % less (docs/speed.md).
            mask = causal_mask(keep, start + length - keep, padding, x.device)
        x = last(x, cos, sin, mask, cache, keep)
        if cache is not None:
            cache.length += length
        return self.norm(x)


class LlamaForCausalLM(nn.Module):
    """The decoder and its head under the names that the checkpoints use.

    It has no forward: llava.py calls the two parts, with image features before the first and a choice of token
    positions before the second.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
