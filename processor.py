"""From images and texts to the model's inputs: the tokenizer and the image processor of one checkpoint, together.

    images, "USER: <image>\\nWhat is this? ASSISTANT:"  ->  pixel_values (N, 3, 336, 336), input_ids (B, T)

Each `<image>` in a prompt becomes P image tokens. The model will replace their embeddings with the image's P features.
Source: transformers' processing_llava.py.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from torch import Tensor

from config import LlavaConfig
from extras.batch import Inputs, batch
from extras.chat_template import Template, read_chat_template
from extras.checks import check_processor
from extras.hub import find_folder
from extras.images import as_images
from extras.inputs import call_arguments, chat_arguments, in_order, loading_arguments, read_image_processor, save_files
from tokenizer import IMAGE_TOKEN, LlamaTokenizer
from vision import LlavaImageProcessor


class LlavaProcessor:
    """Tokenizer and image processor of one checkpoint, its chat template, and the number of tokens per image (P).

    Args:
        image_processor, tokenizer: the two parts.
        config: of the model; P follows from it.
        folder: where they were loaded from; `save_pretrained` copies its files.
    """

    chat_template: Template | None = None  # LLaVA-1.5's

    def __init__(
        self, image_processor: LlavaImageProcessor, tokenizer: LlamaTokenizer, config: LlavaConfig, folder: Path
    ) -> None:
        self.image_processor, self.tokenizer, self.folder = image_processor, tokenizer, folder
        self.decode, self.batch_decode = tokenizer.decode, tokenizer.batch_decode
        self.image_token, self.image_token_id = IMAGE_TOKEN, tokenizer.image_token_id
        self.image_size, self.patch_size = config.vision_config.image_size, config.vision_config.patch_size
        self.vision_feature_select_strategy = config.vision_feature_select_strategy
        self.num_additional_image_tokens = 1  # CLS; the strategy "default" drops it again

    @property
    def image_seq_length(self) -> int:
        """P: the number of tokens that one image becomes."""
        dropped = self.vision_feature_select_strategy == "default"
        return (self.image_size // self.patch_size) ** 2 + self.num_additional_image_tokens - dropped

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: object) -> Self:
        """Loads the processor from the folder, or the hub repository, of a checkpoint.

        `options` are settings of the image processor, such as `do_pad=True`, or those that extras/inputs.py lists.
        Raises a FileNotFoundError or a ValueError that names the file or the option that is missing or invalid.
        """
        hub, settings, attributes = loading_arguments(options)
        folder = find_folder(name, **hub)
        config, tokenizer = LlavaConfig.from_pretrained(folder), LlamaTokenizer.from_pretrained(folder)
        image_processor = dataclasses.replace(read_image_processor(folder), **settings)
        check_processor(folder, config, image_processor, tokenizer)
        tokenizer.padding_side = attributes.pop("padding_side", tokenizer.padding_side)
        processor = cls(image_processor, tokenizer, config, folder)
        vars(processor).update({"chat_template": read_chat_template(folder)} | attributes)
        return processor

    def save_pretrained(self, folder: str | Path) -> None:
        """Copies the files that this processor was loaded from, and writes what was changed since."""
        save_files(self.folder, Path(folder), self.image_processor, self.chat_template)

    def apply_chat_template(
        self, conversation: Sequence, chat_template: str | None = None, *, tokenize: bool = False, **options: object
    ) -> str | list[str] | Tensor | Inputs:
        """A conversation, or a list of them -> the prompt or prompts, by the checkpoint's chat template or another.

        A conversation is a list of {"role": ..., "content": ...}; the content is a text, or a list of parts, which are
        {"type": "text", "text": ...} and {"type": "image"} with an image under "path", "url" or "image". `tokenize`
        returns `input_ids` and, with `return_dict`, all that `self(images, prompt)` does. `options` are
        `add_generation_prompt`, `images` in place of those in the conversation, and other transformers options.
        """
        own, tokenizer, return_dict = self.chat_template, self.tokenizer, options.pop("return_dict", False)
        prompt, arguments = chat_arguments(conversation, own, chat_template, tokenizer, options)
        if not tokenize:
            return prompt
        inputs = self(text=prompt, **arguments)
        return inputs if return_dict else inputs.input_ids

    def __call__(
        self, images: object = None, text: object = None, padding: bool | str = False, **options: object
    ) -> Inputs:
        """Images and raw prompts -> `input_ids` and `attention_mask` (B, T), `pixel_values` (N, 3, 336, 336).

        Args:
            images: one or several (`as_images`), in the order of the `<image>` tokens in all of the prompts.
            text: one prompt or several. Special tokens that are spelled out in a prompt are encoded as such.
            padding: pad shorter prompts on the left.
            options: `add_special_tokens`, and those of `prepare`.

        Raises:
            ValueError: the numbers of images and `<image>` tokens differ, or prompts differ in length without padding.
        """
        images, texts, special, rest = in_order(images, text, {**options, "padding": padding})
        prompts = None if texts is None else [self.tokenizer.encode(text, special) for text in texts]
        return self.prepare(prompts, images, **rest)

    def prepare(
        self, prompts: Sequence[list[int]] | None, images: object = None, padding: bool | str = False, **options: object
    ) -> Inputs:
        """Prompts as ids with one `<image>` per image, such as `encode_chat` returns -> inputs, as `__call__` does.

        `options` are settings of the image processor, `max_length`, `padding_side` and other transformers options
        (extras/inputs.py), for this call. Without prompts, the inputs are `pixel_values` only.
        """
        layout, settings, channels = call_arguments({**options, "padding": padding}, self.tokenizer, self.folder)
        images = as_images([] if images is None else images, channels)
        image_processor = dataclasses.replace(self.image_processor, **settings)
        if prompts is None and images:
            return Inputs(pixel_values=image_processor(images))
        if not prompts:
            raise ValueError("there is no prompt")
        marks = sum(ids.count(self.image_token_id) for ids in prompts)
        if marks != len(images):
            differ = f"the numbers of {IMAGE_TOKEN} tokens in the text and of images differ"
            raise ValueError(f"{differ}: {marks} and {len(images)}")
        repeats = {self.image_token_id: self.image_seq_length}
        rows = [[i for token in ids for i in [token] * repeats.get(token, 1)] for ids in prompts]
        inputs = batch(rows, self.tokenizer.pad_token_id, layout, self.image_token_id)
        return Inputs(inputs, pixel_values=image_processor(images)) if images else inputs
