"""Argument checks: an invalid argument ends here, in one sentence that names it, and the model has nothing to check."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from config import LlavaConfig
from extras.compat import FORWARD, refuse
from extras.quantize import refuse_nan
from llama import KVCache
from tokenizer import LlamaTokenizer
from vision import LlavaImageProcessor


def check_processor(
    folder: Path, config: LlavaConfig, image_processor: LlavaImageProcessor, tokenizer: LlamaTokenizer
) -> None:
    """Raises a ValueError if tokenizer and image processor do not match the model in the same folder."""
    try:  # running it is the simplest way to find out whether the settings are consistent
        crop, pad = (dataclasses.replace(image_processor, do_pad=pad) for pad in (False, True))
        shapes = {one(Image.new("RGB", (64, 64))).shape[1:] for one in (crop, pad)}
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the settings of the image processor in {folder} are invalid: {error!r}") from error
    side, rows = config.vision_config.image_size, config.text_config.vocab_size
    last = max(len(tokenizer.pieces) - 1, *tokenizer.special_tokens.values())
    expectations: list[tuple[object, object, str]] = [
        *[(tuple(shape), (3, side, side), "the shape of images") for shape in shapes],
        (tokenizer.image_token_id, config.image_token_id, "the id of <image>"),
        (last, min(last, rows - 1), "the last id of the tokenizer"),
    ]
    for found, wanted, what in expectations:
        if found != wanted:
            raise ValueError(
                f"{folder} mixes different checkpoints: {what} is {found}, but {wanted} according to config.json"
            )


def check_inputs(
    config: LlavaConfig,
    device: torch.device,
    input_ids: Tensor,
    pixel_values: Tensor | None,
    attention_mask: Tensor | None,
) -> None:
    """Raises a ValueError for tensors that would otherwise end in an error somewhere in the layers."""
    given = {"input_ids": input_ids, "pixel_values": pixel_values, "attention_mask": attention_mask}
    for name, tensor in given.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} and the model on {device}: use inputs.to(...)")
    if input_ids.ndim != 2 or input_ids.dtype not in (torch.long, torch.int) or not input_ids.numel():
        raise ValueError(f"input_ids must be integers (B, T), not {input_ids.dtype} {tuple(input_ids.shape)}")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        shapes = f"{tuple(attention_mask.shape)}, not {tuple(input_ids.shape)}"
        raise ValueError(f"the attention_mask has the shape {shapes}")
    size = (3, *[config.vision_config.image_size] * 2)
    if pixel_values is not None and (pixel_values.shape[1:] != size or not pixel_values.is_floating_point()):
        found = f"{pixel_values.dtype} {tuple(pixel_values.shape)}"
        raise ValueError(f"pixel_values must be floating-point numbers (N, {str(size)[1:]}, not {found}")
    # Reading the values makes a GPU wait, so the single tokens of decoding are not checked.
    rows = config.text_config.vocab_size
    if input_ids.shape[1] > 1 and not 0 <= input_ids.min() <= input_ids.max() < rows:
        raise ValueError(f"input_ids range from {input_ids.min()} to {input_ids.max()}; the vocabulary has {rows} ids")


def check_forward(
    config: LlavaConfig,
    device: torch.device,
    input_ids: Tensor,
    pixel_values: Tensor | None,
    attention_mask: Tensor | None,
    cache: KVCache | None,
    logits_to_keep: int | Tensor,
    labels: Tensor | None,
    options: dict[str, Any],
) -> None:
    """Raises a ValueError or TypeError that names an invalid argument of the model's `forward`."""
    refuse("forward", options, FORWARD)
    if isinstance(logits_to_keep, int) and logits_to_keep < 0:
        raise ValueError(
            f"logits_to_keep is {logits_to_keep}; it must be 0 (all positions), a number above 0 or a mask"
        )
    check_inputs(config, device, input_ids, pixel_values, attention_mask)
    if cache is not None and cache.keys.shape[1] != len(input_ids):
        raise ValueError(f"the cache is for {cache.keys.shape[1]} sequences, but input_ids has {len(input_ids)}")
    if labels is not None and (labels.shape != input_ids.shape or isinstance(logits_to_keep, Tensor) or logits_to_keep):
        raise ValueError(f"labels must have the shape of input_ids, {tuple(input_ids.shape)}, and need all logits")


def check_image_tokens(is_image: Tensor, features: Tensor) -> None:
    """Raises a ValueError unless there is one image token (B, T) for each image feature (N, P, D)."""
    count, (images, patches) = int(is_image.sum()), features.shape[:2]
    if count != images * patches:
        raise ValueError(
            f"the prompt has {count} image tokens, but {images} images have {images * patches} features: "
            f"the processor writes {patches} tokens for each image"
        )


def left_pads(attention_mask: Tensor | None) -> Tensor | None:
    """The number of padding tokens on the left of each sequence, (B,), from a mask (B, T); None if there are none.

    Raises a ValueError if the mask has other values than 0 and 1, a 0 between two 1s, or a sequence without any 1.
    """
    if attention_mask is None:
        return None
    real = attention_mask.bool()
    if (real != attention_mask).any():
        raise ValueError("the attention_mask must be 1 for tokens and 0 for padding")
    left = (real.cumsum(1) == 0).sum(1)
    right = (real.flip(1).cumsum(1) == 0).sum(1)
    if (left + right + real.sum(1) != real.shape[1]).any():
        raise ValueError("the attention_mask has a sequence with padding between its tokens, or without any tokens")
    return left if left.any() else None


def check_generation(
    config: LlavaConfig,
    device: torch.device,
    input_ids: Tensor,
    pixel_values: Tensor | None,
    attention_mask: Tensor | None,
    max_new_tokens: int,
    cache: KVCache | None,
) -> None:
    """Raises a ValueError that names an invalid argument of `generate_stream`."""
    check_inputs(config, device, input_ids, pixel_values, attention_mask)
    length, limit = input_ids.shape[1], config.text_config.context_length
    if length >= limit:
        raise ValueError(f"the prompt has {length} tokens, but at most {limit - 1} fit: shorten it or start again")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must not be negative")
    if attention_mask is not None and not attention_mask[:, -1].all():
        raise ValueError("the attention_mask has padding on the right: generation needs it on the left")
    if cache is not None and (len(input_ids) != 1 or cache.length >= length):
        raise ValueError(
            f"a cache of {cache.length} tokens needs input_ids of one longer sequence, not {tuple(input_ids.shape)}"
        )
    new_ids = input_ids[:, cache.length if cache else 0 :]
    if max_new_tokens and pixel_values is None and (new_ids == config.image_token_id).any():
        raise ValueError("the prompt has image tokens, but there are no pixel_values")


def check_sampling(temperature: float, top_k: int | None, top_p: float | None, repetition_penalty: float = 1.0) -> None:
    """Raises a ValueError if an option of `choose_token` is out of range or would have no effect."""
    if temperature != 0 and not 1e-5 <= temperature < math.inf:  # below that, logits divided by it would overflow
        raise ValueError(f"temperature is {temperature}; it must be 0 (greedy decoding), or 1e-5 or more and finite")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be 1 or more; leave it out to sample from all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1")
    if not 0 < repetition_penalty < math.inf:
        raise ValueError(f"repetition_penalty is {repetition_penalty}; it must be above 0 (1 is off)")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError("top_k and top_p need a temperature above 0: at 0, decoding is greedy")


def check_finite(logits: Tensor, model: nn.Module) -> None:
    """Raises a ValueError that says why, if the logits of a prompt are NaN or infinite."""
    if logits.isfinite().all():
        return
    refuse_nan(model)
    raise ValueError(f"the logits are NaN or infinite, although the weights are not: {logits.dtype} overflows")
