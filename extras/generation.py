"""`generate` with transformers' arguments: what each sets, and what is returned. extras/compat.py has the rule."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from extras.compat import GENERATING, refuse


@dataclass
class GenerationConfig:
    """Settings of `generate`: the defaults of a model (`model.generation_config`), or those of one call.

    None means not set. Source: transformers' GenerationConfig for names and, with do_sample=True, for defaults.
    """

    max_new_tokens: int | None = None  # 512
    max_length: int | None = None  # prompt and answer together; max_new_tokens takes precedence
    do_sample: bool | None = None  # whether temperature is above 0
    temperature: float | None = None  # 0; with do_sample=True, 1
    top_k: int | None = None  # with do_sample=True, 50; 0 is off
    top_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    return_dict_in_generate: bool | None = None


TENSORS = ["pixel_values", "attention_mask", "generator", "cache"]  # further arguments of `generate_stream`
SETTINGS = [field.name for field in dataclasses.fields(GenerationConfig)]


class GenerateOutput(dict[str, Tensor]):
    """What `generate` returns with return_dict_in_generate=True."""

    @property
    def sequences(self) -> Tensor:
        """(B, T + new): prompt and answer."""
        return self["sequences"]


class Streamer(Protocol):
    """What `generate` calls as it works, with tokens on the CPU. transformers' TextStreamer is one."""

    def put(self, value: Tensor) -> None:
        """Takes the prompt (B, T), then the next token of each sequence, (B,)."""

    def end(self) -> None:
        """Generation has stopped."""


def collect(
    stream: Callable[..., Iterator[Tensor]],
    defaults: GenerationConfig,
    input_ids: Tensor,
    options: dict[str, Any],
) -> Tensor:
    """Runs `generate_stream` with transformers' arguments; returns prompt and answer (B, T + new), or a GenerateOutput.

    Args:
        stream: the model's `generate_stream`.
        defaults: the model's `generation_config`. Settings of `options["generation_config"]` take precedence over it,
            and arguments of the call over both.
        input_ids: (B, T).
        options: the other arguments of `generate`.

    Raises:
        ValueError, TypeError: an option is not supported, or unknown.
    """
    options = dict(options)
    streamer: Streamer | None = options.pop("streamer", None)
    settings = _settings(defaults) | _settings(options.pop("generation_config", None) or {})
    given = {name: options.pop(name) for name in (*SETTINGS, *TENSORS) if name in options}
    refuse("generate", options, GENERATING)
    settings |= {name: value for name, value in given.items() if value is not None}

    returns_dict, do_sample = settings.pop("return_dict_in_generate", False), settings.pop("do_sample", None)
    if do_sample:
        settings = {"temperature": 1.0, "top_k": 50} | settings
        if not settings["temperature"]:
            raise ValueError("generate: do_sample=True needs a temperature above 0")
        if settings["top_k"] == 0:
            del settings["top_k"]
    elif do_sample is not None:  # greedy decoding, which the other settings cannot change
        settings = {name: value for name, value in settings.items() if name not in ("temperature", "top_k", "top_p")}
    max_length = settings.pop("max_length", None)
    if max_length is not None and "max_new_tokens" not in settings:
        length = input_ids.shape[-1]
        if max_length <= length:
            raise ValueError(f"generate: max_length is {max_length}, but the prompt alone has {length} tokens")
        settings["max_new_tokens"] = max_length - length

    if streamer is not None:
        streamer.put(input_ids.cpu())
    new: list[Tensor] = []
    for tokens in stream(input_ids, **settings):
        new.append(tokens[:, None])
        if streamer is not None:
            streamer.put(tokens.cpu())
    if streamer is not None:
        streamer.end()
    ids = torch.cat([input_ids, *new], dim=1)
    return GenerateOutput(sequences=ids) if returns_dict else ids  # type: ignore[return-value] # only where asked for


def ends_and_padding(
    defaults: GenerationConfig, eos_token_id: int | list[int] | None = None, pad_token_id: int | None = None
) -> tuple[list[int], int]:
    """The tokens that end a sequence and the one that pads it: those of a call, else the defaults."""
    ends = defaults.eos_token_id if eos_token_id is None else eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    padding = defaults.pad_token_id if pad_token_id is None else pad_token_id
    return ends, padding if padding is not None else ends[0] if ends else 0


def _settings(config: object) -> dict[str, Any]:
    """What a GenerationConfig, ours or transformers', or a dict sets."""
    values: dict[str, Any] = config if isinstance(config, dict) else vars(config)
    if hasattr(config, "to_diff_dict"):  # transformers': only what is not a default
        values = {k: v for k, v in config.to_diff_dict().items() if not k.startswith(("_", "transformers_version"))}
    refuse("GenerationConfig", {name: value for name, value in values.items() if name not in SETTINGS}, GENERATING)
    return {name: value for name, value in values.items() if name in SETTINGS and value is not None}
