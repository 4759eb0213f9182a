"""LLaVA-1.5: answers questions about images.

    input_ids (B, T) --embed_tokens-------------------------------------------+
                                                                              v
    pixel_values (N, 3, 336, 336) --CLIP--> (N, P, Dv) --MLP--> (N, P, D) --> (B, T, D) --Llama--> logits (B, T, V)

CLIP's P patch features of each image, projected to the width D of the word embeddings, replace the embeddings of the P
`<image>` tokens in the prompt. From there on the decoder treats them like words. This file has the projector, the whole
model and generation; vision.py has the vision tower and llama.py the decoder. It is also the command line:

    python llava.py --model FOLDER --image photo.jpg "What is shown here?"

Sources: LLaVA-1.5 (arXiv 2310.03744); transformers' modeling_llava.py for names and defaults. Parameter names are those
of the checkpoints.
"""

from extras.terminal import command_line, handle_early_interrupt

if __name__ == "__main__":
    handle_early_interrupt("llava.py")

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from config import LlavaConfig
from extras.activations import ACTIVATIONS
from extras.chat import converse, parse_arguments
from extras.checks import (
    check_finite,
    check_forward,
    check_generation,
    check_image_tokens,
    check_sampling,
    left_padding,
)
from extras.hub import find_folder
from extras.images import load_image
from extras.machine import pick_device, pick_dtype
from extras.memory import check_memory
from extras.quantize import compact_linears
from extras.saving import save_weights
from llama import KVCache, LlamaConfig, LlamaForCausalLM
from load import load_weights
from processor import LlavaProcessor
from sampling import choose_token
from vision import CLIPVisionModel

__all__ = ["KVCache", "LlamaConfig", "LlavaConfig", "LlavaForConditionalGeneration", "LlavaProcessor"]


class LlavaMultiModalProjector(nn.Module):
    """The two-layer MLP that projects image features into the space of the word embeddings."""

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

    logits: Tensor  # (B, T, V), or only the positions that were asked for


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
        """Makes the head and the word embeddings one parameter, if the config says so."""
        if self.config.tie_word_embeddings:
            self.language_model.lm_head.weight = self.language_model.model.embed_tokens.weight

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (N, 3, 336, 336) -> projected image features (N, P, D)."""
        config = self.config
        features = self.vision_tower(pixel_values, config.vision_feature_layer, config.vision_feature_select_strategy)
        return self.multi_modal_projector(features)

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        """(B, T) -> word embeddings (B, T, D), in which the image features replace those of the `<image>` tokens.

        Raises a ValueError if there are not P image tokens for each image.
        """
        embeddings = self.language_model.model.embed_tokens(input_ids).to(self.dtype)
        if pixel_values is None:
            return embeddings
        features = self.get_image_features(pixel_values)  # (N, P, D)
        is_image = input_ids == self.config.image_token_id  # (B, T)
        check_image_tokens(is_image, features)
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
            input_ids: (B, T), with P `<image>` tokens for each image; after a cached prefix, only the new tokens.
            pixel_values: (N, 3, 336, 336), the images in the order of their tokens.
            attention_mask: (B, T), 0 for padding on the left. Padding on the right needs no mask, because no token
                attends to it. After a cached prefix it is ignored: the cache knows its padding.
            cache: updated with these tokens' keys and values; they attend to everything in it. For inference only:
                no gradients flow through a cache.
            logits_to_keep: the positions whose logits are computed: the last n (0: all), or the M positions where a
                mask (B, T) is True, which gives logits (M, V).

        Raises a ValueError that names the invalid argument.
        """
        started = cache is not None and cache.length > 0
        mask = None if started else attention_mask
        check_forward(self.config, self.device, input_ids, pixel_values, mask, cache, logits_to_keep)
        padding = cache.padding if cache is not None and started else left_padding(mask)
        if cache is not None:
            cache.padding = padding
        keep = logits_to_keep if isinstance(logits_to_keep, int) else 0
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            embeddings = self.embed(input_ids, pixel_values)  # (B, T, D)
            hidden = self.language_model.model(embeddings, cache, padding, keep)  # (B, T, D) or (B, keep, D)
            if isinstance(logits_to_keep, Tensor):
                hidden = hidden[logits_to_keep]  # (M, D)
            return LlavaOutput(self.language_model.lm_head(hidden))

    def generate(
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
    ) -> Tensor:
        """The prompt and everything that `generate_stream` yields for it, with the same arguments: (B, T + new)."""
        stream = self.generate_stream(
            input_ids, pixel_values, attention_mask, max_new_tokens, temperature, top_k, top_p, generator, cache
        )
        return torch.cat([input_ids, *(tokens[:, None] for tokens in list(stream))], dim=1)

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
        """Yields the next token of every sequence, (B,), as soon as it is chosen.

        A sequence finishes with its end-of-sequence token and is padded from then on; the others continue without it.
        Generation stops when all have finished, after `max_new_tokens`, or when the context is full.

        Args:
            input_ids: (B, T), the whole prompt, including the part that the cache already holds.
            pixel_values: (N, 3, 336, 336), the images in the uncached part of the prompt.
            attention_mask: (B, T), 0 for padding, which must be on the left.
            max_new_tokens: the maximum number of tokens to generate.
            temperature, top_k, top_p, generator: see `choose_token`.
            cache: a conversation of one sequence to continue; only the tokens that it does not hold are computed.

        Raises a ValueError that names the invalid argument.
        """
        check_sampling(temperature, top_k, top_p)
        check_generation(self.config, self.device, input_ids, pixel_values, attention_mask, max_new_tokens, cache)
        batch_size, length = input_ids.shape
        steps = min(max_new_tokens, self.config.text_config.context_length - length)
        cache = cache or KVCache(self, batch_size)
        cache.reserve(length + steps)
        unfinished = torch.arange(batch_size, device=input_ids.device)
        new_ids = input_ids[:, cache.length :]
        for step in range(steps):
            with torch.inference_mode():  # less overhead than no_grad, which matters for small models
                logits = self(new_ids, pixel_values, attention_mask, cache, logits_to_keep=1).logits[:, -1]
                if step == 0:
                    check_finite(logits, self)
                chosen = choose_token(logits, temperature, top_k, top_p, generator)
            pixel_values = attention_mask = None  # the cache has them now
            tokens = torch.full((batch_size,), self.config.pad_token_id, device=input_ids.device)
            tokens[unfinished] = chosen
            yield tokens
            going_on = [i for i, token in enumerate(chosen.tolist()) if token not in self.config.eos_token_id]
            if not going_on or step == steps - 1:
                return
            if len(going_on) < len(chosen):
                unfinished, chosen = unfinished[going_on], chosen[going_on]
                cache.keep(going_on)
            new_ids = chosen[:, None]

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations, the cache and the logits."""
        return self.language_model.model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.language_model.model.embed_tokens.weight.device

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
            dtype: of the weights in memory, such as torch.bfloat16 or "bfloat16". "auto" is float32 on a CPU, because
                few CPUs are fast at prompts in 16 bits, and elsewhere the dtype of the checkpoint.
            device: where the model runs.
            quantize: "int8" stores linear layers in one byte per weight (extras/quantize.py), rounded while loading.

        Raises a FileNotFoundError or a ValueError that says which file or argument is wrong, and what to do.
        """
        folder = find_folder(name)
        model = cls.planned(LlavaConfig.from_pretrained(folder), dtype, device, quantize)
        load_weights(model, folder, torch.device(device))
        model.tie_weights()
        return model.eval()

    @classmethod
    def planned(
        cls, config: LlavaConfig, dtype: torch.dtype | str, device: torch.device | str, quantize: str | None
    ) -> Self:
        """The model on the meta device: every shape and dtype as `from_pretrained` would load it, but no memory."""
        dtype, device = pick_dtype(dtype, device, config.dtype)
        try:
            with torch.device("meta"):
                model = cls(config).to(dtype)
                compact_linears(model, quantize, device, None if config.tie_word_embeddings else config.dtype)
        except RuntimeError as error:  # sizes that no tensor can have
            raise ValueError(f"the model cannot be built in {dtype} on {device}: {error}") from error
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json, generation_config.json and the weights in a form that transformers and this file load."""
        config = self.config.to_dict() | {"dtype": str(self.dtype).removeprefix("torch.")}
        generation = {"bos_token_id": 1, **{name: config[name] for name in ("eos_token_id", "pad_token_id")}}
        save_weights(self, Path(folder), config, generation)


def run(args: argparse.Namespace) -> None:
    """Loads processor and model, and answers: answers go to stdout, everything else to stderr."""
    device = pick_device(args.device)
    images = [load_image(source) for source in args.image]
    processor = LlavaProcessor.from_pretrained(args.model)
    if args.image_mode:
        processor.image_processor.do_pad = args.image_mode == "pad"
    tokens = len(images) * processor.image_seq_length + len((args.question or "").encode()) + args.max_new_tokens
    plan = LlavaForConditionalGeneration.planned
    check_memory(processor.folder, plan, args.dtype, device, args.quantize, tokens)
    model = LlavaForConditionalGeneration.from_pretrained(args.model, args.dtype, device, args.quantize)
    converse(args, images, processor, model.generate_stream, KVCache(model), model.config.eos_token_id)


def main() -> None:
    """The command line: exit code 0; 1 after one sentence on stderr; 2 for invalid options."""
    args = parse_arguments()
    command_line("llava.py", lambda: run(args))


if __name__ == "__main__":
    main()
