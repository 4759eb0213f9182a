"""LLaVA-1.5: a picture and a question in, an answer out.

    input_ids (B, T) --embed_tokens-------------------------------------------+
                                                                              v
    pixel_values (N, 3, 336, 336) --CLIP--> (N, P, Dv) --MLP--> (N, P, D) --> (B, T, D) --Llama--> logits (B, T, V)

The picture's P features, projected to the width D of the word embeddings, take the places of the P `<image>` tokens in
the prompt. From there on the decoder treats them like words. This file has the projector, the Llama decoder with its
cache, generation, the processor that makes the inputs, and the command line:

    python llava.py --model FOLDER --image photo.jpg "What is shown here?"

Sources: LLaVA-1.5 (arXiv 2310.03744), Llama 2 (arXiv 2307.09288) and, for names, defaults and the order of roundings,
transformers' modeling_llava.py and modeling_llama.py. Parameter names are those of the checkpoints.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

if __name__ == "__main__" and callable(signal.getsignal(signal.SIGINT)):
    # Until `command_line` takes over: no traceback of the imports below, which take seconds.
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"\nllava.py: interrupted\n"), os._exit(1)))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from check import (
    check_config,
    check_inputs,
    check_processor,
    check_sampling,
    command_line,
    free_memory,
    known_fields,
    read_json,
    why_not_finite,
)
from load import (
    copy_processor_files,
    find_folder,
    load_weights,
    read_config,
    save_weights,
    stored_tensors,
    weight_bytes,
)
from quantize import compact_linears
from tokenizer import IMAGE_TOKEN, SHORT_ANSWER, VICUNA_SYSTEM, LlamaTokenizer
from vision import ACTIVATIONS, CLIPVisionConfig, CLIPVisionModel, LlavaImageProcessor, load_image

BUILT_IN = Path(__file__).parent / "tiny" / "model"
BUILT_IN_NOTE = """\
llava.py: the built-in model knows drawn scenes of a few coloured shapes, and nothing else. For all other pictures and
questions take --model llava-hf/llava-1.5-7b-hf (after `pip install huggingface_hub`; it fetches 14 GB)"""

WORKING_MEMORY = 5 * 10**8  # bytes that computing a prompt with an image takes beside weights and cache, about


@dataclass
class LlamaConfig:
    """The shape of the decoder: transformers' defaults, and behind them the values of the 7B and 13B models."""

    model_type: str = "llama"  # "mistral" is the same network with grouped keys
    vocab_size: int = 32000  # 32064: 32002 tokens and some rows that nobody uses
    hidden_size: int = 4096  # 4096 and 5120
    intermediate_size: int = 11008  # 11008 and 13824
    num_hidden_layers: int = 32  # 32 and 40
    num_attention_heads: int = 32  # 32 and 40
    num_key_value_heads: int | None = None  # None: as many as attention heads; BakLLaVA has 8
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048  # 4096
    sliding_window: int | None = None  # Mistral's; contexts are kept within it, so that it never matters
    rms_norm_eps: float = 1e-6  # 1e-5
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_parameters: dict = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})

    def __post_init__(self) -> None:
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(f"a hidden_size of {self.hidden_size} cannot be cut into {self.num_attention_heads} heads")
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def context_length(self) -> int:
        """The most tokens, prompt and answer together, that the model can work with."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)


@dataclass
class LlavaConfig:
    """The whole model: the shapes of its two towers and how they are joined."""

    vision_config: CLIPVisionConfig
    text_config: LlamaConfig
    image_token_id: int = 32000
    vision_feature_layer: int | list[int] = -2  # hidden states of the vision tower; several are put side by side
    vision_feature_select_strategy: str = "default"  # drops CLS; "full" keeps it
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    tie_word_embeddings: bool = False
    eos_token_id: list[int] = field(default_factory=lambda: [2])
    pad_token_id: int = 2
    dtype: str | None = None  # in which the weights are stored

    @classmethod
    def from_dict(cls, config: dict) -> Self:
        """Takes the fields it knows out of what `load.read_config` returns; a ValueError says what cannot be right."""
        file = "config.json"
        return cls(
            CLIPVisionConfig(**known_fields(CLIPVisionConfig, config["vision_config"], f"{file}, vision_config")),
            LlamaConfig(**known_fields(LlamaConfig, config["text_config"], f"{file}, text_config")),
            **known_fields(cls, config, file),
        )

    def __post_init__(self) -> None:
        check_config(self, ACTIVATIONS)

    @property
    def image_seq_length(self) -> int:
        """P: how many tokens an image becomes; with "full" that is one more than it has patches."""
        patches = (self.vision_config.image_size // self.vision_config.patch_size) ** 2
        return patches + (self.vision_feature_select_strategy == "full")

    def to_dict(self) -> dict:
        """As transformers writes it to config.json."""
        config = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", **dataclasses.asdict(self)}
        config["image_token_index"] = config.pop("image_token_id")
        config["vision_config"]["model_type"] = "clip_vision_model"
        config["text_config"]["tie_word_embeddings"] = self.tie_word_embeddings
        return config


# The decoder: Llama, from the leaves to the root


class LlamaRMSNorm(nn.Module):
    """Scales each vector to a root mean square of 1 and then each channel by a learned weight (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> the same shape; in float32, and rounded to the dtype of x before the weight comes in."""
        return self.weight * torch.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype)


def rope_frequencies(config: LlamaConfig) -> Tensor:
    """The angle per position by which RoPE (arXiv 2104.09864) turns each pair of channels: (Dh / 2,), float32.

    "linear" scaling slows all of them down by a factor. "llama3" slows down only those that turn less than
    `low_freq_factor` times within the original context, leaves those that turn more than `high_freq_factor` times as
    they are, and blends in between.
    """
    rope = config.rope_parameters
    # On the CPU even where the model is built on the meta device, for these are no weights that loading would fill in.
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
    """Turns channel i of each head together with channel i + Dh / 2: (B, H, T, Dh) -> the same shape."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class KVCache:
    """The keys and values of all tokens so far: the state of a conversation, passed to the model and filled by it.

    Args:
        model: whose keys and values these will be.
        batch_size: B.
        max_length: tokens to have room for. `generate` makes room for what its call can need, once.
    """

    def __init__(self, model: "LlavaForConditionalGeneration", batch_size: int = 1, max_length: int = 0) -> None:
        config = model.config.text_config
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, max_length, config.head_dim)
        with torch.inference_mode(False):  # what is made in that mode could not be written to outside of it
            self.keys = torch.empty(shape, dtype=model.dtype, device=model.device)  # (layers, B, Hkv, max_length, Dh)
            self.values = torch.empty_like(self.keys)
        self.length = 0  # tokens held so far; setting it back forgets the last ones
        self.padding: Tensor | None = None  # (B,): how many of them, on the left, are padding

    def reserve(self, max_length: int) -> None:
        """Makes room for so many tokens, if there is not enough."""
        *shape, room, head_dim = self.keys.shape

        def larger(old: Tensor) -> Tensor:
            new = old.new_empty(*shape, max_length, head_dim)
            new[..., : self.length, :] = old[..., : self.length, :]
            return new

        if max_length > room:
            with torch.inference_mode(False), torch.no_grad():
                self.keys, self.values = larger(self.keys), larger(self.values)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds one layer's keys and values (B, Hkv, T, Dh); returns all of that layer (B, Hkv, length + T, Dh)."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def keep(self, rows: list[int]) -> None:
        """Keeps only these rows of the batch, in ascending order."""
        for store in (self.keys, self.values):
            for target, source in enumerate(rows):
                if target != source:
                    store[:, target, :, : self.length] = store[:, source, :, : self.length]
        self.keys, self.values = self.keys[:, : len(rows)], self.values[:, : len(rows)]
        self.padding = None if self.padding is None else self.padding[rows]


class LlamaAttention(nn.Module):
    """Causal self-attention in which G = H / Hkv query heads share one head of keys and values."""

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
        """(B, T, D) -> (B, keep, D) for the last tokens, or all (0); `mask` is what `causal_mask` returns for these."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H or Hkv, T, Dh)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(self.layer_idx, k, v)  # (B, Hkv, S, Dh)
        q = q[:, :, -keep:]  # -0 is 0: all
        if q.shape[2] == 1:
            # A single token sees everything, so the G heads of a group can be the rows of one head: no key is copied.
            q = q.view(len(q), self.num_key_value_heads, -1, self.head_dim)  # (B, Hkv, G, Dh)
            return self.o_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(len(q), 1, -1))
        x = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )
        return self.o_proj(x.transpose(1, 2).flatten(2))


class LlamaMLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): one half of the hidden layer gates the other."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> the same shape"""
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class LlamaDecoderLayer(nn.Module):
    """A pre-norm transformer block: attention, then the MLP, each added to what came in."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LlamaAttention(config, layer_idx)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None, keep: int = 0
    ) -> Tensor:
        """(B, T, D) -> (B, keep, D) for the last tokens, or for all (0)"""
        x = x[:, -keep:] + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, keep)
        return x + self.mlp(self.post_attention_layernorm(x))


def causal_mask(length: int, start: int, padding: Tensor | None, device: torch.device) -> Tensor | None:
    """What `length` new tokens after `start` cached ones may see, in the cheapest form that says it.

    Without padding nothing has to be spelled out, and attention can take its flash kernels: None means "causal" for a
    whole prompt and "everything" for a single token (`LlamaAttention` tells them apart), and for several tokens after a
    prefix there is a description of the lower-right triangle. Only a padded batch needs a mask tensor, (B, 1, T, S),
    True where a token may look.
    """
    if padding is None:
        return causal_lower_right(length, start + length) if start > 0 and length > 1 else None
    key_index = torch.arange(start + length, device=device)  # (S,)
    query_index = key_index[start:, None]  # (T, 1)
    seen = (key_index <= query_index) & (key_index >= padding[:, None, None])  # (B, T, S)
    return (seen | (key_index == query_index))[:, None]  # padding sees itself: softmax needs something to weigh


class LlamaModel(nn.Module):
    """The decoder without its head."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.frequencies = rope_frequencies(config)  # not a buffer, or model.bfloat16() would round the angles

    def forward(self, x: Tensor, cache: KVCache | None = None, padding: Tensor | None = None, keep: int = 0) -> Tensor:
        """Embeddings (B, T, D) -> hidden states of the last tokens (B, keep, D), or of all (0), ready for the head.

        `padding` (B,) counts from the left.
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
        if 0 < keep < length:  # of the others, only the last layer's keys and values are read
            mask = causal_mask(keep, start + length - keep, padding, x.device)
        x = last(x, cos, sin, mask, cache, keep)
        if cache is not None:
            cache.length += length
        return self.norm(x)


class LlamaForCausalLM(nn.Module):
    """The decoder and its head, hidden states to logits, under one name as in the checkpoints.

    It has no forward of its own: LLaVA comes in between, with image features on one side and positions on the other.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


# LLaVA


class LlavaMultiModalProjector(nn.Module):
    """The two-layer MLP that brings image features into the space of the word embeddings."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        layers = 1 if isinstance(config.vision_feature_layer, int) else len(config.vision_feature_layer)
        width, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.linear_1 = nn.Linear(layers * config.vision_config.hidden_size, width, bias=bias)
        self.act = ACTIVATIONS[config.projector_hidden_act]
        self.linear_2 = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, P, Dv) -> (N, P, D)"""
        return self.linear_2(self.act(self.linear_1(x)))


class LlavaOutput(NamedTuple):
    """What the model returns."""

    logits: Tensor  # (B, T, V), or fewer positions where fewer were asked for


class LlavaForConditionalGeneration(nn.Module):
    """The whole model: vision tower, projector, decoder."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = CLIPVisionModel(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.language_model = LlamaForCausalLM(config.text_config)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Lets the head and the word embeddings be one parameter, where the config says so."""
        if self.config.tie_word_embeddings:
            self.language_model.lm_head.weight = self.language_model.model.embed_tokens.weight

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "cpu",
        quantize: str | None = None,
    ) -> Self:
        """Loads a checkpoint folder, or a repository of the Hugging Face hub, ready for inference.

        Args:
            name: the folder, or a name such as "llava-hf/llava-1.5-7b-hf".
            dtype: of the weights in memory, such as torch.bfloat16 or "bfloat16". "auto" is float32 on a CPU, since
                few of them are fast at a prompt in 16 bits, and elsewhere the dtype of the checkpoint.
            device: where the model is to run.
            quantize: "int8" stores linear layers in a byte per weight (quantize.py), made while the file is read.

        Raises a FileNotFoundError or a ValueError that says which file or argument is wrong, and what to do.
        """
        folder = find_folder(name)
        model = cls.planned(LlavaConfig.from_dict(read_config(folder)), dtype, device, quantize)
        load_weights(model, folder, torch.device(device))
        model.tie_weights()
        return model.eval()

    @classmethod
    def planned(
        cls, config: LlavaConfig, dtype: torch.dtype | str, device: torch.device | str, quantize: str | None
    ) -> Self:
        """The model in the shapes and dtypes that it would be loaded in, but without memory (on the meta device).

        The other arguments, and the errors about them, are those of `from_pretrained`.
        """
        if quantize not in (None, "int8"):
            raise ValueError(f"quantize is {quantize!r}; it can be 'int8' or None")
        try:
            device = torch.device(device)
            if dtype == "auto":
                dtype = "float32" if device.type == "cpu" else config.dtype or "float32"
            dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
            F.gelu(torch.ones(1, dtype=dtype, device=device))  # does the device exist, and know this dtype?
            with torch.device("meta"):
                model = cls(config).to(dtype)
                compact_linears(model, quantize, device)
                if quantize and config.dtype in ("float16", "bfloat16") and not config.tie_word_embeddings:
                    # Words are looked up, not multiplied: their embeddings can keep the checkpoint's dtype.
                    model.language_model.model.embed_tokens.to(getattr(torch, config.dtype))
        except (AssertionError, RuntimeError, TypeError) as error:
            raise ValueError(f"the model cannot be made in {dtype} on {device}: {error}") from error
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json, generation_config.json and the weights so that transformers, and this file, load them."""
        config = self.config.to_dict() | {"dtype": str(self.dtype).removeprefix("torch.")}
        generation = {"bos_token_id": 1, **{name: config[name] for name in ("eos_token_id", "pad_token_id")}}
        save_weights(self, Path(folder), config, generation)

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations, the cache and the logits."""
        return self.language_model.model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.language_model.model.embed_tokens.weight.device

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (N, 3, 336, 336) -> what the decoder sees of them (N, P, D)."""
        config = self.config
        features = self.vision_tower(pixel_values, config.vision_feature_layer, config.vision_feature_select_strategy)
        return self.multi_modal_projector(features)

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        """Word embeddings with the image features in the places of the `<image>` tokens: (B, T) -> (B, T, D).

        Raises a ValueError if there are not P image tokens for each image.
        """
        embeddings = self.language_model.model.embed_tokens(input_ids).to(self.dtype)
        if pixel_values is None:
            return embeddings
        features = self.get_image_features(pixel_values)  # (N, P, D)
        is_image = input_ids == self.config.image_token_id  # (B, T)
        if is_image.sum() != features.shape[0] * features.shape[1]:
            raise ValueError(
                f"{int(is_image.sum())} image tokens stand in the prompt, but {features.shape[0]} images have "
                f"{features.shape[0] * features.shape[1]} features: the processor writes {features.shape[1]} for each"
            )
        return embeddings.masked_scatter(is_image[..., None], features.to(embeddings.dtype))

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> LlavaOutput:
        """One pass through the model.

        Args:
            input_ids: (B, T), with P `<image>` tokens for each image; after a cached prefix, only what is new.
            pixel_values: (N, 3, 336, 336), the images in the order of their tokens.
            attention_mask: (B, T), 0 for padding on the left. (Padding on the right needs no mask: no token sees it.)
            cache: stores the keys and values of these tokens, and attention reaches back to all that it holds. It is
                for inference: nothing can be trained through it.
            logits_to_keep: run the head, and most of the last layer, on the last n positions only (0: on all), or the
                head on the M positions where a mask (B, T) is True, which gives logits (M, V).

        Raises a ValueError if the image tokens do not fit the images, a mask the tokens or logits_to_keep is negative.
        """
        keep = logits_to_keep if isinstance(logits_to_keep, int) else 0
        if keep < 0:
            raise ValueError(f"logits_to_keep is {keep}; it must be 0 (all positions), a number above 0 or a mask")
        begun = cache is not None and cache.length > 0  # then what is padding is known
        check_inputs(self.config, self.device, input_ids, pixel_values, None if begun else attention_mask)
        if cache is not None and cache.keys.shape[1] != len(input_ids):
            raise ValueError(f"the cache is for {cache.keys.shape[1]} rows, but input_ids has {len(input_ids)}")
        if begun:
            padding = cache.padding
        else:
            padding = None if attention_mask is None else left_padding(attention_mask)
            if cache is not None:
                cache.padding = padding
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            hidden = self.language_model.model(self.embed(input_ids, pixel_values), cache, padding, keep)
            if isinstance(logits_to_keep, Tensor):
                hidden = hidden[logits_to_keep]  # (M, D)
            return LlavaOutput(self.language_model.lm_head(hidden))

    def generate(self, input_ids: Tensor, *args: object, **kwargs: object) -> Tensor:
        """All of `generate_stream`, which has the arguments: the prompt and the answer, (B, T + new)."""
        new = list(self.generate_stream(input_ids, *args, **kwargs))
        return torch.cat([input_ids, *(tokens[:, None] for tokens in new)], dim=1)

    def generate_stream(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        cache: KVCache | None = None,
    ) -> Iterator[Tensor]:
        """Yields the next token of every row, (B,), as soon as it is chosen, and computes it in inference mode.

        A row ends with its end-of-sequence token and is then filled up with padding, while the others go on without
        it. All of it ends when all rows have, or after `max_new_tokens`, or when the context is full.

        Args:
            input_ids: (B, T), the whole prompt, also where the cache holds its beginning.
            pixel_values: (N, 3, 336, 336), the images that belong to the uncached part of the prompt.
            attention_mask: (B, T), 0 for padding, which must be on the left.
            max_new_tokens: the most tokens to choose.
            temperature, top_k, top_p, generator: see `choose_token`.
            cache: a conversation of one row to go on with; only the tokens that it does not hold are computed.

        Raises a ValueError that names the argument that cannot be right.
        """
        check_sampling(temperature, top_k, top_p)
        check_inputs(self.config, self.device, input_ids, pixel_values, attention_mask)
        batch_size, length = input_ids.shape
        limit = self.config.text_config.context_length
        if length >= limit:
            raise ValueError(f"there are {length} tokens, but only {limit - 1} fit: shorten the prompt or begin anew")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens is {max_new_tokens}, but cannot be negative")
        if attention_mask is not None and not attention_mask[:, -1].all():
            raise ValueError("the attention_mask has padding on the right: generation needs it on the left")
        if cache is not None and (batch_size != 1 or cache.length >= length):
            raise ValueError(
                f"a cache of {cache.length} tokens needs one row of more tokens, not {tuple(input_ids.shape)}"
            )
        steps = min(max_new_tokens, limit - length)
        if steps == 0:
            return
        cache = cache or KVCache(self, batch_size)
        cache.reserve(length + steps)
        rows = torch.arange(batch_size, device=input_ids.device)  # those still being written
        new_ids = input_ids[:, cache.length :]
        if pixel_values is None and (new_ids == self.config.image_token_id).any():
            raise ValueError("the prompt has image tokens, but there are no pixel_values")
        for step in range(steps):
            with torch.inference_mode():  # cheaper than no_grad, as small models feel
                logits = self(new_ids, pixel_values, attention_mask, cache, logits_to_keep=1).logits[:, -1]
                if step == 0 and not logits.isfinite().all():
                    raise ValueError(why_not_finite(self, self.dtype))
                chosen = choose_token(logits, temperature, top_k, top_p, generator)
            pixel_values = attention_mask = None  # they are in the cache now
            tokens = torch.full((batch_size,), self.config.pad_token_id, device=input_ids.device)
            tokens[rows] = chosen
            yield tokens
            going_on = [i for i, token in enumerate(chosen.tolist()) if token not in self.config.eos_token_id]
            if not going_on or step == steps - 1:
                return
            if len(going_on) < len(chosen):
                rows, chosen = rows[going_on], chosen[going_on]
                cache.keep(going_on)
            new_ids = chosen[:, None]


def left_padding(attention_mask: Tensor) -> Tensor | None:
    """How many zeros each row of a mask (B, T) begins with: (B,), or None if there are none in all of it.

    Raises a ValueError if there is something else in it, or a row has zeros between its ones or nothing but zeros.
    """
    real = attention_mask.bool()
    if (real != attention_mask).any():
        raise ValueError("the attention_mask must be 1 for tokens and 0 for padding")
    left = (real.cumsum(1) == 0).sum(1)
    right = (real.flip(1).cumsum(1) == 0).sum(1)
    if (left + right + real.sum(1) != real.shape[1]).any():
        raise ValueError("the attention_mask has a row with padding between its tokens, or without any tokens")
    return left if left.any() else None


def filter_logits(logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Logits (B, V) of the distribution to draw from, as transformers makes them: temperature, then top-k, then top-p.

    Args:
        logits: (B, V), float32.
        temperature: above 0; below 1 sharpens, above 1 flattens.
        top_k: leave the k likeliest tokens.
        top_p: leave the likeliest tokens whose probabilities together reach p (arXiv 1904.09751).
    """
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None and top_p < 1:
        ascending, order = logits.sort()
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        dropped[:, -1] = False  # the likeliest token always stays
        logits = logits.masked_fill(dropped.scatter(1, order, dropped), -math.inf)
    return logits


def choose_token(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Logits (B, V) -> one token a row (B,): the likeliest at temperature 0, else one that is drawn."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = filter_logits(logits.float(), temperature, top_k, top_p).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


# From images and texts to the model's inputs


class Inputs(dict):
    """The model's arguments by name; `inputs.input_ids` is `inputs["input_ids"]`."""

    def __getattr__(self, name: str) -> Tensor:
        if name not in self:
            raise AttributeError(f"the inputs have no {name}")
        return self[name]

    def to(self, device: torch.device | str) -> Self:
        """All tensors on another device."""
        return type(self)({name: tensor.to(device) for name, tensor in self.items()})


class LlavaProcessor:
    """Tokenizer and image processor of one checkpoint, and how many tokens stand for an image (P)."""

    def __init__(
        self,
        image_processor: LlavaImageProcessor,
        tokenizer: LlamaTokenizer,
        image_seq_length: int,
        folder: Path,
    ) -> None:
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.decode, self.batch_decode = tokenizer.decode, tokenizer.batch_decode
        self.image_seq_length = image_seq_length
        self.folder = folder  # whose files `save_pretrained` copies

    @classmethod
    def from_pretrained(cls, name: str | Path) -> Self:
        """Loads from the folder, or the hub repository, that holds the model."""
        folder = find_folder(name)
        config = LlavaConfig.from_dict(read_config(folder))
        nested = read_json(folder / "processor_config.json", missing={}).get("image_processor")  # of transformers 5
        settings = nested if nested and isinstance(nested, dict) else read_json(folder / "preprocessor_config.json")
        known = known_fields(LlavaImageProcessor, settings, f"{folder}, settings of the image processor", largest=2048)
        image_processor, tokenizer = LlavaImageProcessor(**known), LlamaTokenizer.from_pretrained(folder)
        check_processor(folder, config, image_processor, tokenizer)
        return cls(image_processor, tokenizer, config.image_seq_length, folder)

    def save_pretrained(self, folder: str | Path) -> None:
        """Copies the files that this processor was loaded from."""
        copy_processor_files(self.folder, Path(folder))

    def __call__(
        self,
        images: Image.Image | Sequence[Image.Image] | None = None,
        text: str | Sequence[str] = "",
        padding: bool = False,
        return_tensors: str = "pt",
    ) -> Inputs:
        """Images and raw prompts -> `input_ids` and `attention_mask` (B, T), `pixel_values` (N, 3, 336, 336).

        Args:
            images: one or several, in the order of the `<image>` marks in all of the texts.
            text: one prompt or several; special tokens that are spelled out in it have their meaning.
            padding: fill shorter prompts up, on the left.
            return_tensors: "pt", as there is nothing else here.

        Raises:
            ValueError: images and marks do not match, or prompts of several lengths come without padding.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors is {return_tensors!r}; only 'pt' is supported")
        texts = [text] if isinstance(text, str) else text
        return self.prepare([self.tokenizer.encode(text) for text in texts], images, padding)

    def prepare(
        self,
        prompts: Sequence[list[int]],
        images: Image.Image | Sequence[Image.Image] | None = None,
        padding: bool = False,
    ) -> Inputs:
        """Ids with one `<image>` for each image, as `encode_chat` makes them -> the model's inputs; see `__call__`."""
        if not prompts:
            raise ValueError("there is no prompt")
        images = [] if images is None else [images] if isinstance(images, Image.Image) else list(images)
        image_id = self.tokenizer.image_token_id
        marks = sum(ids.count(image_id) for ids in prompts)
        if marks != len(images):
            raise ValueError(f"the text has {marks} {IMAGE_TOKEN} marks for {len(images)} images")
        rows = [
            [i for token in ids for i in [token] * (self.image_seq_length if token == image_id else 1)]
            for ids in prompts
        ]
        longest = max(map(len, rows))
        if not padding and any(len(row) != longest for row in rows):
            raise ValueError("the texts have several lengths: pass padding=True")
        missing = [longest - len(row) for row in rows]
        inputs = Inputs(
            input_ids=torch.tensor(
                [[self.tokenizer.pad_token_id] * n + row for n, row in zip(missing, rows, strict=True)]
            ),
            attention_mask=torch.tensor([[0] * n + [1] * len(row) for n, row in zip(missing, rows, strict=True)]),
        )
        if images:
            inputs["pixel_values"] = self.image_processor(images)
        return inputs


# The command line


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; wrong options end in a usage message and exit code 2."""
    parser = argparse.ArgumentParser(prog="llava.py", description="Asks a LLaVA-1.5 model about images.")
    add = parser.add_argument
    add("question", nargs="?", help="default: What is shown in this image?")
    add("--image", action="append", default=[], metavar="PATH|URL|-", help="repeat it for several images")
    add("--model", default=str(BUILT_IN), help="checkpoint folder or name on the Hugging Face hub (default: built-in)")
    add("--max-new-tokens", type=int, default=512, help="the longest answer (default: %(default)s)")
    add(
        "--temperature",
        type=float,
        default=0.0,
        help="above 0, tokens are drawn; at 0 the likeliest is taken (default)",
    )
    add("--top-k", type=int, help="draw from the k likeliest tokens")
    add("--top-p", type=float, help="draw from the likeliest tokens that together reach p")
    add("--seed", type=int, help="makes drawing repeatable")
    add(
        "--device",
        choices=["auto", "cuda", "mps", "cpu"],
        default="auto",
        help="default: the first of them that is there",
    )
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="default: float32 on a CPU")
    add("--quantize", choices=["int8"], help="a byte per weight: a third of the memory or less; fast on x86 with VNNI")
    add("--image-mode", choices=["crop", "pad"], help="cut the ends off a long image, or add bars to make it square")
    add("--short", action="store_true", help="ask for a single word or phrase")
    add("--system", nargs="?", const=VICUNA_SYSTEM, default="", help="open with this sentence, or with Vicuna's own")
    add("--chat", action="store_true", help="go on asking: Ctrl-C stops an answer, Ctrl-D leaves")
    add("--stats", action="store_true", help="print speed and memory on stderr")
    args = parser.parse_args(argv)
    try:
        check_sampling(args.temperature, args.top_k, args.top_p)
    except ValueError as error:
        parser.error(str(error))
    if args.max_new_tokens < 1:
        parser.error("--max-new-tokens must be 1 or more")
    if not (args.image or args.question or args.chat):
        parser.error("give a question, an --image, or both")
    if args.image.count("-") > 1 or ("-" in args.image and args.chat):
        parser.error("standard input (-) can be one image, and then no --chat")
    if args.seed is not None and not 0 <= args.seed < 2**63:
        parser.error("--seed must be 0 or more, and below 2**63")
    return args


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the fastest there is. Raises a ValueError if it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(device for device in there if there[device]) if name == "auto" else name
    if not there[name]:
        raise ValueError(f"there is no {name} device on this machine; try --device cpu")
    return torch.device(name)


def check_memory(folder: Path, dtype: str, device: torch.device, quantize: str | None, tokens: int) -> None:
    """Raises a ValueError if the model and a cache for so many tokens need more memory than is free.

    It names the options that would fit. Nothing but headers is read for it. From Python, a model loads whatever its
    size: this belongs to the command line, where the next thing would be that the system ends the process.
    """

    config = LlavaConfig.from_dict(read_config(folder))

    def needed(dtype: str, quantize: str | None) -> list[int]:
        """Bytes of the weights and of the cache."""
        model = LlavaForConditionalGeneration.planned(config, dtype, device, quantize)
        stored_tensors(model, folder)  # first of all, config.json and the weights should be of the same model
        cache = KVCache(model, max_length=min(tokens, model.config.text_config.context_length))
        return [weight_bytes(model), cache.keys.nbytes + cache.values.nbytes]

    weights, cache = needed(dtype, quantize)
    free = free_memory(device)
    if free is None or weights + cache + WORKING_MEMORY <= free:
        return
    smaller = {"--quantize int8": (dtype, "int8"), "--dtype bfloat16": ("bfloat16", quantize)}
    smaller["--dtype bfloat16 --quantize int8"] = ("bfloat16", "int8")
    totals: dict[int, str] = {}  # of options that come to the same, the first
    for options, kind in smaller.items():
        totals.setdefault(sum(needed(*kind)) + WORKING_MEMORY, options)
    fitting = [f"{options} ({total / 1e9:.1f} GB in all)" for total, options in totals.items() if total <= free]
    if fitting:
        advice = f"try {' or '.join(fitting)}"
    elif (least := min(totals)) < weights + cache + WORKING_MEMORY:
        advice = f"even {totals[least]} takes {least / 1e9:.1f} GB in all; "
    else:
        advice = "no option makes it smaller; "
    if not fitting:
        advice += "close other programs, or take a smaller model or a larger machine"
        advice += " (or --device cpu)" * (device.type == "cuda")
    raise ValueError(
        f"{folder} needs {weights / 1e9:.1f} GB + {cache / 1e9:.1f} GB cache + {WORKING_MEMORY / 1e9:.1f} GB to work "
        f"with, {free / 1e9:.1f} GB free: {advice}"
    )


def peak_memory(device: torch.device) -> str:
    """The most memory that this process has held so far, on the GPU if it used one."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB on the GPU"
    try:
        import resource  # which Windows does not have
    except ImportError:
        return "unknown"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB"


def questions(args: argparse.Namespace) -> Iterator[str]:
    """The question of the command line and, in a chat, those that are typed until Ctrl-D."""
    if args.question or not args.chat:
        yield args.question or "What is shown in this image?"
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - where it exists, it lets input() edit lines and remember them
    while args.chat and sys.stdin is not None:  # as it is if it was closed from the start
        try:
            if sys.stdin.isatty():
                print("> ", end="", file=sys.stderr, flush=True)
            question = input()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:  # at the prompt there is no answer to stop
            print(file=sys.stderr)
            continue
        if question.strip():
            yield question


def is_drawn(image: Image.Image) -> bool:
    """Whether a picture is as flat as the drawn scenes of the built-in model: nearly all neighbouring pixels alike."""
    grey = np.asarray(image.convert("L").resize((96, 96)), dtype=np.int16)
    steps = np.maximum(np.abs(np.diff(grey, axis=0))[:, 1:], np.abs(np.diff(grey, axis=1))[1:])
    return (steps > 6).mean() < 0.15  # at most 0.07 in drawn scenes, 0.2 and more in photos


def is_known(question: str, tokenizer: LlamaTokenizer) -> bool:
    """Whether each word of a question is a piece of the vocabulary, as all words of the built-in model's world are."""
    words = re.findall(r"[^\W\d_]+", question)
    return all(
        any(len(tokenizer.encode(form, add_special_tokens=False)) == 1 for form in (word, word.lower(), word.title()))
        for word in words
    )


def print_answer(tokens: Iterator[Tensor], answer: list[int], tokenizer: LlamaTokenizer, stats: bool) -> None:
    """Prints an answer while it is written, and puts its ids into `answer`."""
    times = [time.perf_counter()]

    def recorded() -> Iterator[int]:
        for token in tokens:
            answer.append(token.item())
            times.append(time.perf_counter())
            yield answer[-1]

    for text in tokenizer.stream(recorded(), skip_special_tokens=True):
        print(text, end="", flush=True)
    print(flush=True)
    if stats:
        speed = (len(answer) - 1) / (times[-1] - times[1]) if len(answer) > 1 else 0.0
        print(f"first token {times[1] - times[0]:.2f} s, then {speed:.1f} tokens/s", file=sys.stderr)


def run(args: argparse.Namespace) -> None:
    """Loads the model and answers: answers go to stdout, everything else to stderr."""
    device = pick_device(args.device)
    images = [load_image(source) for source in args.image]
    processor = LlavaProcessor.from_pretrained(args.model)
    tokenizer = processor.tokenizer
    if args.image_mode:
        processor.image_processor.do_pad = args.image_mode == "pad"
    tokens = len(images) * processor.image_seq_length + len((args.question or "").encode()) + args.max_new_tokens
    check_memory(processor.folder, args.dtype, device, args.quantize, tokens)
    model = LlavaForConditionalGeneration.from_pretrained(args.model, args.dtype, device, args.quantize)
    generator = torch.Generator(device)
    generator.seed() if args.seed is None else generator.manual_seed(args.seed)
    options = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")}

    at_home = Path(args.model) == BUILT_IN
    cache = KVCache(model)
    conversation = torch.empty(1, 0, dtype=torch.long, device=device)  # the ids of the turns so far
    for question in questions(args):
        answer: list[int] = []
        first_turn = conversation.shape[1] == 0
        if at_home and not (is_known(question, tokenizer) and all(map(is_drawn, images))):
            print(BUILT_IN_NOTE, file=sys.stderr)
            at_home = False  # said once, that is enough
        try:
            question += SHORT_ANSWER if args.short else ""
            if first_turn and IMAGE_TOKEN not in question:
                question = f"{IMAGE_TOKEN}\n" * len(images) + question
            turn, _ = tokenizer.encode_chat([(question, None)], args.system * first_turn, continued=not first_turn)
            inputs = processor.prepare([turn], images if first_turn else None).to(device)
            prompt = torch.cat([conversation, inputs.input_ids], dim=1)
            pixels = inputs.get("pixel_values")
            tokens = model.generate_stream(prompt, pixels, **options, generator=generator, cache=cache)
            print_answer(tokens, answer, tokenizer, args.stats)
        except KeyboardInterrupt:
            if not args.chat:
                raise
            print(flush=True)
        except ValueError as error:
            if not args.chat:
                raise
            print(f"llava.py: {error}", file=sys.stderr)
        if not answer:  # stopped before the first token: as if it had not been asked
            cache.length = min(cache.length, conversation.shape[1])
            continue
        if answer[-1] not in model.config.eos_token_id:
            print(f"llava.py: the answer is cut off after {len(answer)} tokens", file=sys.stderr)
            answer.append(tokenizer.eos_token_id)
        conversation = torch.cat([prompt, torch.tensor([answer], device=device)], dim=1)
    if args.stats:
        print(f"peak memory {peak_memory(device)}", file=sys.stderr)


def main() -> None:
    """The command line: exit code 0, 1 with one sentence on stderr, or 2 for a wrong usage."""
    args = parse_arguments()
    command_line("llava.py", lambda: run(args))


if __name__ == "__main__":
    main()
