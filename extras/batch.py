"""Sequences of ids of different lengths -> the tensors of a batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor


class Inputs(dict[str, Tensor]):
    """The model's arguments by name; `inputs.input_ids` is `inputs["input_ids"]`."""

    def __getattr__(self, name: str) -> Tensor:
        if name not in self:
            raise AttributeError(f"the inputs have no {name}")
        return self[name]

    def to(self, *place: Any, **options: Any) -> Self:  # noqa: ANN401
        """Moves all tensors to a device and converts the floating-point ones to a dtype, in place.

        The arguments are those of `Tensor.to`: `.to(device)`, `.to(dtype)`, `.to(device, dtype)` or either by name.
        """
        first = place[0] if place and not isinstance(place[0], torch.dtype) else None
        device, non_blocking = options.get("device", first), options.get("non_blocking", False)
        for name, tensor in self.items():
            if tensor.is_floating_point():
                self[name] = tensor.to(*place, **options)
            elif device is not None:  # ids and masks keep their dtype
                self[name] = tensor.to(device=device, non_blocking=non_blocking)
        return self


class Layout(NamedTuple):
    """How the sequences of a batch get one length."""

    pad: bool = False
    side: str = "left"  # of the padding
    cut: int | None = None  # longer sequences lose their ends
    shortest: int = 0  # padding makes sequences at least this long
    multiple: int = 1  # padding makes the length a multiple of this


def batch(rows: Sequence[list[int]], pad_id: int, layout: Layout, image_id: int) -> Inputs:
    """Rows of ids -> `input_ids` and `attention_mask` (B, T).

    Raises a ValueError if they differ in length and are not padded, or if an image would be cut.
    """
    if layout.cut is not None and any(image_id in row[layout.cut :] for row in rows):
        raise ValueError(f"max_length {layout.cut} cuts off tokens of an image: raise it, or leave truncation out")
    rows = [row[: layout.cut] for row in rows]
    length = max(map(len, rows))
    if layout.pad:
        length = max(length, layout.shortest)
        length += -length % layout.multiple
    missing = [length - len(row) for row in rows]
    if any(missing) and not layout.pad:
        raise ValueError("the prompts differ in length: pass padding=True")

    def padded(row: list[int], padding: list[int]) -> list[int]:
        return row + padding if layout.side == "right" else padding + row

    ids = [padded(row, [pad_id] * count) for row, count in zip(rows, missing, strict=True)]
    mask = [padded([1] * len(row), [0] * count) for row, count in zip(rows, missing, strict=True)]
    return Inputs(input_ids=torch.tensor(ids, dtype=torch.long), attention_mask=torch.tensor(mask, dtype=torch.long))


def encode_texts(
    encode: Callable[[str, bool], list[int]],
    text: str | Sequence[str],
    pad_id: int,
    side: str,
    padding: bool = False,
    return_tensors: str | None = None,
    add_special_tokens: bool = True,
) -> Mapping[str, Any]:
    """What calling a tokenizer of transformers returns: "input_ids" and "attention_mask" of one text or several.

    Args:
        encode: a text, and whether to add `<s>` -> ids.
        text: one, which gives flat lists, or several.
        pad_id, side: how shorter texts are padded.
        padding: whether they are.
        return_tensors: "pt" for tensors (B, T); None for lists.
        add_special_tokens: start with `<s>`.

    Raises a ValueError if return_tensors is another value, or texts of different lengths are not padded for tensors.
    """
    if return_tensors not in (None, "pt"):
        raise ValueError(f"return_tensors is {return_tensors!r}; it must be 'pt' or None")
    texts = [text] if isinstance(text, str) else text
    rows = [encode(one, add_special_tokens) for one in texts]
    if padding or return_tensors:
        inputs = batch(rows, pad_id, Layout(padding, side), image_id=-1)
        if return_tensors:
            return inputs
        lists = {name: tensor.tolist() for name, tensor in inputs.items()}
    else:
        lists = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    return {name: values[0] for name, values in lists.items()} if isinstance(text, str) else lists
