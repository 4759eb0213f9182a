"""From images and texts to the model's inputs: the tokenizer and the image processor of one checkpoint, together.

    images, "USER: <image>\\nWhat is this? ASSISTANT:"  ->  pixel_values (N, 3, 336, 336), input_ids (B, T)

Each `<image>` in a prompt becomes P image tokens. The model will replace their embeddings by the image's P features.
Source: transformers' processing_llava.py.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from PIL import Image
from torch import Tensor

from config import LlavaConfig
from extras.checks import check_processor
from extras.files import known_fields, read_json
from extras.hub import find_folder
from extras.saving import copy_processor_files
from tokenizer import IMAGE_TOKEN, LlamaTokenizer
from vision import LlavaImageProcessor


class Inputs(dict[str, Tensor]):
    """The model's arguments by name; `inputs.input_ids` is `inputs["input_ids"]`."""

    def __getattr__(self, name: str) -> Tensor:
        if name not in self:
            raise AttributeError(f"the inputs have no {name}")
        return self[name]

    def to(self, device: torch.device | str) -> Self:
        """Moves all tensors to another device."""
        return type(self)({name: tensor.to(device) for name, tensor in self.items()})


class LlavaProcessor:
    """Tokenizer and image processor of one checkpoint, and the number of tokens per image (P).

    Args:
        image_processor, tokenizer: the two parts.
        image_seq_length: P.
        folder: where they were loaded from; `save_pretrained` copies its files.
    """

    def __init__(
        self, image_processor: LlavaImageProcessor, tokenizer: LlamaTokenizer, image_seq_length: int, folder: Path
    ) -> None:
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.decode, self.batch_decode = tokenizer.decode, tokenizer.batch_decode
        self.image_seq_length = image_seq_length
        self.folder = folder

    @classmethod
    def from_pretrained(cls, name: str | Path) -> Self:
        """Loads the processor from the folder, or the hub repository, of a checkpoint.

        Raises a FileNotFoundError or a ValueError that names the file that is missing or invalid.
        """
        folder = find_folder(name)
        config = LlavaConfig.from_pretrained(folder)
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
            images: one or several, in the order of the `<image>` tokens in all of the prompts.
            text: one prompt or several. Special tokens that are spelled out in a prompt are encoded as such.
            padding: pad shorter prompts on the left.
            return_tensors: only "pt" is supported.

        Raises:
            ValueError: the numbers of images and `<image>` tokens differ, or prompts differ in length without padding.
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
        """Prompts as ids with one `<image>` per image, such as `encode_chat` returns -> inputs, as `__call__` does."""
        if not prompts:
            raise ValueError("there is no prompt")
        images = [] if images is None else [images] if isinstance(images, Image.Image) else list(images)
        image_id, pad_id = self.tokenizer.image_token_id, self.tokenizer.pad_token_id
        marks = sum(ids.count(image_id) for ids in prompts)
        if marks != len(images):
            raise ValueError(
                f"the numbers of {IMAGE_TOKEN} tokens in the text and of images differ: {marks} and {len(images)}"
            )
        rows = [
            [i for token in ids for i in [token] * (self.image_seq_length if token == image_id else 1)]
            for ids in prompts
        ]
        missing = [max(map(len, rows)) - len(row) for row in rows]
        if any(missing) and not padding:
            raise ValueError("the prompts differ in length: pass padding=True")
        inputs = Inputs(
            input_ids=torch.tensor([[pad_id] * n + row for n, row in zip(missing, rows, strict=True)]),
            attention_mask=torch.tensor([[0] * n + [1] * len(row) for n, row in zip(missing, rows, strict=True)]),
        )
        if images:
            inputs["pixel_values"] = self.image_processor(images)
        return inputs
