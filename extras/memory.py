"""The memory plan: whether a model and its cache will fit, known before any weight is read."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from config import LlavaConfig
from extras.machine import free_memory
from extras.quantize import SCHEMES
from llama import KVCache
from load import stored_tensors, weight_bytes

WORKING_MEMORY = 5 * 10**8  # bytes for the activations of a prompt with an image, about

Plan = Callable[[LlavaConfig, str, torch.device, str | None], nn.Module]  # LlavaForConditionalGeneration.planned


def check_memory(
    folder: Path, plan: Plan, dtype: str, device: torch.device, quantize: str | None, tokens: int, adapter: int = 0
) -> None:
    """Raises a ValueError if the model, `adapter` bytes more and a cache of `tokens` tokens do not fit in memory.

    The message names the options that would fit. Only headers are read for it. From Python a model is loaded whatever
    its size; this check is for the command line, where the system would otherwise kill the process without a word.
    """
    config = LlavaConfig.from_pretrained(folder)

    stored_tensors(plan(config, dtype, device, None), folder)  # first of all, config.json and the weights have to match

    def needed(dtype: str, quantize: str | None) -> tuple[int, int]:
        """Bytes of the weights and of the cache."""
        model = plan(config, dtype, device, quantize)
        cache = KVCache(model, max_length=min(tokens, config.text_config.context_length))
        return weight_bytes(model) + adapter, cache.keys.nbytes + cache.values.nbytes

    weights, cache = needed(dtype, quantize)
    free = free_memory(device)
    if free is None or weights + cache + WORKING_MEMORY <= free:
        return
    smaller = {"--dtype bfloat16": ("bfloat16", quantize)}
    for scheme in SCHEMES if config.quantize is None else ():
        smaller |= {f"--quantize {scheme}": (dtype, scheme)}
        smaller |= {f"--dtype bfloat16 --quantize {scheme}": ("bfloat16", scheme)}
    totals: dict[int, str] = {}  # of options with the same total, the first
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
        advice += "close other programs, or use a smaller model or a larger machine"
        advice += " (or --device cpu)" * (device.type == "cuda")
    raise ValueError(
        f"{folder} needs {weights / 1e9:.1f} GB + {cache / 1e9:.1f} GB cache + {WORKING_MEMORY / 1e9:.1f} GB to work "
        f"with, {free / 1e9:.1f} GB free: {advice}"
    )
