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

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import LlavaConfig
from extras.activations import ACTIVATIONS
from extras.adapters import load_adapter
from extras.calibration import load_or_quantize
from extras.chat import parse_arguments, run
from extras.checks import check_finite, check_forward, check_generation, check_image_tokens, check_sampling, left_pads
from extras.compat import loading_options
from extras.generation import GenerationConfig, collect, ends_and_padding
from extras.hidden_states import with_hidden_states
from extras.hub import find_folder
from extras.lora import merge
from extras.machine import pick_dtype
from extras.quantize import compact_linears, single_thread
from extras.saving import save_weights
from llama import KVCache, LlamaConfig, LlamaForCausalLM
from processor import LlavaProcessor
from sampling import choose_token, penalize_repetition
from vision import CLIPVisionModel

AutoProcessor = LlavaProcessor  # for code written for transformers

__all__ = ["AutoProcessor", "GenerationConfig", "KVCache", "LlamaConfig", "LlavaConfig"]
__all__ += ["LlavaForConditionalGeneration", "LlavaProcessor"]


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


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of the next tokens: logits (B, T, V), labels (B, T) with -100 to ignore -> (), float32."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


class LlavaOutput(NamedTuple):
    """What the model returns."""

    logits: Tensor  # (B, T, V), or only the positions that were asked for
    loss: Tensor | None = None  # (), with labels
    hidden_states: tuple[Tensor, ...] | None = None  # embeddings, then each layer's output, the last normalised


class LlavaForConditionalGeneration(nn.Module):
    """The whole model: vision tower, projector, decoder."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.config = config
        self.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
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
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        **options: Any,  # noqa: ANN401
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
            labels: (B, T), the tokens to predict, -100 where there is none; adds the loss to the output.
            output_hidden_states: adds the decoder's hidden states to the output.
            options: transformers' arguments that change nothing here (extras/compat.py).

        Raises a ValueError that names the invalid argument.
        """
        started = cache is not None and cache.length > 0
        mask = None if started else attention_mask
        check_forward(self.config, self.device, input_ids, pixel_values, mask, cache, logits_to_keep, labels, options)
        padding = cache.padding if cache is not None and started else left_pads(mask)
        if cache is not None:
            cache.padding = padding
        keep = logits_to_keep if isinstance(logits_to_keep, int) else 0
        decoder, states = self.language_model.model, None
        gradients = torch.is_grad_enabled() and cache is None
        with torch.set_grad_enabled(gradients):
            embeddings = self.embed(input_ids, pixel_values)  # (B, T, D)
        with torch.set_grad_enabled(gradients), single_thread(self.config.quantize is not None and not gradients):
            if output_hidden_states:
                hidden, states = with_hidden_states(decoder, embeddings, cache, padding)
                hidden = hidden[:, -keep:]
            else:
                hidden = decoder(embeddings, cache, padding, keep)  # (B, T, D) or (B, keep, D)
            if isinstance(logits_to_keep, Tensor):
                hidden = hidden[logits_to_keep]  # (M, D)
            logits = self.language_model.lm_head(hidden)
            return LlavaOutput(logits, None if labels is None else next_token_loss(logits, labels), states)

    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        cache: KVCache | None = None,
        **options: Any,  # noqa: ANN401
    ) -> Tensor:
        """The prompt and all that `generate_stream` yields for it: (B, T + new).

        The arguments are those of `generate_stream`. `options` are transformers' arguments, such as do_sample,
        max_length, streamer and generation_config (extras/generation.py); with return_dict_in_generate, the result is a
        GenerateOutput. What is not given is taken from `self.generation_config`.
        """
        options |= {"pixel_values": pixel_values, "attention_mask": attention_mask, "max_new_tokens": max_new_tokens}
        options |= {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator, "cache": cache}
        return collect(self.generate_stream, self.generation_config, input_ids, options)

    def generate_stream(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        generator: torch.Generator | None = None,
        cache: KVCache | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
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
            repetition_penalty: see `penalize_repetition`; 1 is off.
            cache: a conversation of one sequence to continue; only the tokens that it does not hold are computed.
            eos_token_id, pad_token_id: instead of those of `self.generation_config`.

        Raises a ValueError that names the invalid argument.
        """
        check_sampling(temperature, top_k, top_p, repetition_penalty)
        check_generation(self.config, self.device, input_ids, pixel_values, attention_mask, max_new_tokens, cache)
        ends, padding = ends_and_padding(self.generation_config, eos_token_id, pad_token_id)
        batch_size, length = input_ids.shape
        steps = min(max_new_tokens, self.config.text_config.context_length - length)
        cache = cache or KVCache(self, batch_size)
        cache.reserve(length + steps)
        unfinished, ids = torch.arange(batch_size, device=input_ids.device), input_ids
        for step in range(steps):
            with torch.inference_mode():  # less overhead than no_grad, which matters for small models
                new_ids = ids[:, cache.length :]
                logits = self(new_ids, pixel_values, attention_mask, cache, logits_to_keep=1).logits[:, -1]  # (B, V)
                if step == 0:
                    check_finite(logits, self)
                if repetition_penalty != 1:
                    logits = penalize_repetition(logits, ids, repetition_penalty)
                chosen = choose_token(logits, temperature, top_k, top_p, generator)  # (B,)
                ids = torch.cat([ids, chosen[:, None]], dim=1)
            pixel_values = attention_mask = None  # the cache has them now
            tokens = torch.full((batch_size,), padding, device=input_ids.device)
            tokens[unfinished] = chosen
            yield tokens
            going_on = [i for i, token in enumerate(chosen.tolist()) if token not in ends]
            if not going_on or step == steps - 1:
                return
            if len(going_on) < len(chosen):
                unfinished, ids = unfinished[going_on], ids[going_on]
                cache.keep(going_on)

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations, the cache and the logits."""
        return self.language_model.model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.language_model.model.embed_tokens.weight.device

    def num_parameters(self, only_trainable: bool = False) -> int:
        """The number of parameters; a tied one counts once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "cpu",
        quantize: str | None = None,
        adapter: str | Path | None = None,
        **options: Any,  # noqa: ANN401
    ) -> Self:
        """Loads a checkpoint folder, or a repository of the Hugging Face hub, ready for inference.

        Args:
            name: the folder, or a name such as "llava-hf/llava-1.5-7b-hf".
            dtype: of the weights in memory, such as torch.bfloat16 or "bfloat16". "auto" is float32 on a CPU, because
                few CPUs are fast at prompts in 16 bits, and elsewhere the dtype of the checkpoint.
            device: where the model runs.
            quantize: "int8" or "int4" stores linear layers in 8 or 4 bits per weight (docs/quantization.md). It takes
                minutes for a large model, but `save_pretrained` keeps the result, which is then loaded in seconds.
            adapter: a LoRA for this checkpoint, in PEFT's format (extras/adapters.py): a folder or a hub repository.
            options: transformers' arguments, such as torch_dtype, device_map and revision (extras/compat.py).

        Raises a FileNotFoundError or a ValueError that says which file or argument is wrong, and what to do.
        """
        dtype, device, hub = loading_options(dtype, device, options)
        folder = find_folder(name, **hub)
        config = LlavaConfig.from_pretrained(folder)
        model = cls.planned(config, dtype, device, quantize)
        load_or_quantize(model, cls.planned(config, dtype, device, None), folder, torch.device(device))
        model.tie_weights()
        if adapter:
            load_adapter(model, adapter, name)
        return model.eval()

    @classmethod
    def planned(
        cls, config: LlavaConfig, dtype: torch.dtype | str, device: torch.device | str, quantize: str | None
    ) -> Self:
        """The model on the meta device: every shape and dtype as `from_pretrained` would load it, but no memory."""
        dtype, device = pick_dtype(dtype, device, config.dtype)
        if quantize and config.quantize not in (None, quantize):
            raise ValueError(f"the checkpoint is quantised as {config.quantize} already, not as {quantize}")
        config = dataclasses.replace(config, quantize=quantize or config.quantize)
        try:
            with torch.device("meta"):
                model = cls(config).to(dtype)
                compact_linears(model, config.quantize, device, None if config.tie_word_embeddings else config.dtype)
        except RuntimeError as error:  # sizes that no tensor can have
            raise ValueError(f"the model cannot be built in {dtype} on {device}: {error}") from error
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json, generation_config.json and the weights, in a form that transformers loads, too; quantised
        weights stay as they are, in a form for this file only. An adapter is merged first (extras/lora.py).
        """
        merge(self)
        dtype = self.language_model.model.embed_tokens.weight.dtype
        config = self.config.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}
        ends, padding = ends_and_padding(self.generation_config)
        generation = {"bos_token_id": 1, "eos_token_id": ends, "pad_token_id": padding}
        save_weights(self, Path(folder), config, generation)


def main() -> None:
    """The command line: exit code 0; 1 after one sentence on stderr; 2 for invalid options."""
    args = parse_arguments()
    command_line("llava.py", lambda: run(args, LlavaForConditionalGeneration))


if __name__ == "__main__":
    main()
