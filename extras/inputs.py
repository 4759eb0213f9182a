"""The processor's arguments in transformers' style: what each sets, and what is refused. extras/compat.py has the rule.

Source: transformers' ProcessorMixin, with TextKwargs and ImagesKwargs for the names.
"""

import dataclasses
import enum
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from extras.batch import Layout
from extras.chat_template import (
    Template,
    conversation_images,
    pick_template,
    read_chat_template,
    read_conversations,
    render,
    template_variables,
    write_chat_template,
)
from extras.compat import ANY, Accepted, refuse
from extras.files import known_fields, read_json, write_json
from extras.hub import HUB_OPTIONS
from extras.saving import copy_processor_files
from tokenizer import IMAGE_TOKEN, LlamaTokenizer
from vision import LlavaImageProcessor

SETTINGS = [field.name for field in dataclasses.fields(LlavaImageProcessor)]
PLACEHOLDERS = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")
LARGEST_SIDE = 2048  # that images may be resized to
UNLIMITED = 10**20  # tokenizer_config.json has an even larger model_max_length where there is no limit

OFF, TENSORS = (None, False), "only 'pt' is supported"
OF_IMAGES = {
    "do_convert_rgb": Accepted((None, True), "images are always converted to RGB"),
    "default_to_square": Accepted((None, False), "give size={'height': ..., 'width': ...}"),
    "pad_size": Accepted((None,), "do_pad=True pads to a square"),
    "data_format": Accepted((None, "channels_first"), "use inputs.pixel_values.permute(0, 2, 3, 1)"),
    "disable_grouping": ANY,
    "image_seq_length": ANY,  # transformers ignores it, too
}
LOADING = OF_IMAGES | {
    "use_fast": ANY,  # there is one tokenizer and one image processor
    "trust_remote_code": ANY,  # no code of a checkpoint is ever run
    "dtype": ANY,  # a processor has no weights
    "torch_dtype": ANY,
    "device_map": ANY,
    "low_cpu_mem_usage": ANY,
    "backend": Accepted((None, "pil"), "images are processed by Pillow"),
    "image_token": Accepted((None, IMAGE_TOKEN), f"the token of an image is {IMAGE_TOKEN}"),
    "model_max_length": Accepted((None,), "pass max_length to each call"),
    "subfolder": Accepted((None, ""), "give the path of that folder"),
    "return_unused_kwargs": Accepted(OFF, "leave it out"),
}
CALLING = OF_IMAGES | {
    "videos": Accepted((None,), "pass frames of the video as images"),
    "audio": Accepted((None,), "the model takes text and images only"),
    "text_pair": Accepted((None,), "join the texts"),
    "text_target": Accepted((None,), "encode it in a call of its own"),
    "text_pair_target": Accepted((None,), "encode it in a call of its own"),
    "stride": Accepted((None, 0), "split the text yourself"),
    "is_split_into_words": Accepted(OFF, "join the words"),
    "return_token_type_ids": Accepted(OFF, "the model has none"),
    "return_mm_token_type_ids": Accepted(OFF, "use inputs.input_ids == processor.image_token_id"),
    "return_text_replacement_offsets": Accepted(OFF, "each <image> becomes processor.image_seq_length tokens"),
    "return_attention_mask": Accepted((None, True), "drop it from the inputs"),
    "return_overflowing_tokens": Accepted(OFF, "split the text yourself"),
    "return_special_tokens_mask": Accepted(OFF, "compare inputs.input_ids with processor.tokenizer.skipped_ids"),
    "return_offsets_mapping": Accepted(OFF, "decode the tokens one by one with processor.tokenizer.stream"),
    "return_length": Accepted(OFF, "use inputs.attention_mask.sum(1)"),
    "sanitize_control_tokens": Accepted(OFF, "use tokenizer.encode_chat and processor.prepare"),
    "return_metadata": Accepted(OFF, "leave it out"),
    "device": Accepted((None, "cpu"), "use inputs.to(device)"),
    "verbose": ANY,
}
CHATTING = {
    "return_assistant_tokens_mask": Accepted(OFF, "tokenizer.encode_chat returns such a mask"),
    "sanitize_control_tokens": Accepted(OFF, "tokenizer.encode_chat never encodes typed text as control tokens"),
    "load_audio_from_video": ANY,  # there is no video
}
LAYOUT = ("padding", "truncation", "max_length", "pad_to_multiple_of", "padding_side")
TAKEN = {*SETTINGS, *LAYOUT, "images", "text", "add_special_tokens", "return_tensors", "input_data_format"}
NESTED = ("common_kwargs", "text_kwargs", "images_kwargs")


def loading_arguments(options: Mapping[str, Any]) -> tuple[dict, dict, dict]:
    """Arguments of `from_pretrained` -> those of the hub, the image processor's settings, and the processor's own."""
    options = dict(options)
    hub = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
    settings = image_settings(options, "from_pretrained")
    own = {name: options.pop(name, None) for name in (*PLACEHOLDERS, "chat_template", "padding_side")}
    refuse("from_pretrained", options, LOADING)
    return hub, settings, {name: value for name, value in own.items() if value is not None}


def image_settings(options: dict[str, Any], call: str) -> dict[str, Any]:
    """Takes the image processor's settings out of a call's options. Raises a ValueError for an invalid one."""
    given = {name: options.pop(name) for name in SETTINGS if name in options}
    for name, value in given.items():
        given[name] = int(value) if isinstance(value, enum.IntEnum) else list(value) if type(value) is tuple else value
    return known_fields(LlavaImageProcessor, given, call, LARGEST_SIDE)


def read_image_processor(folder: Path) -> LlavaImageProcessor:
    """The image processor with the settings in the files of a checkpoint."""
    nested = read_json(folder / "processor_config.json", missing={}).get("image_processor")  # of transformers 5
    settings = nested if nested and isinstance(nested, dict) else read_json(folder / "preprocessor_config.json")
    where = f"{folder}, settings of the image processor"
    return LlavaImageProcessor(**known_fields(LlavaImageProcessor, settings, where, LARGEST_SIDE))


def save_files(source: Path, folder: Path, image_processor: LlavaImageProcessor, template: Template | None) -> None:
    """Copies a processor's files to another folder; settings and a template that differ from theirs are written."""
    copy_processor_files(source, folder)
    before = read_image_processor(folder)
    changed = {name: value for name in SETTINGS if (value := getattr(image_processor, name)) != getattr(before, name)}
    for name in ("preprocessor_config.json", "processor_config.json") if changed else ():
        config = read_json(folder / name, missing={})
        settings = config if name == "preprocessor_config.json" else config.get("image_processor")
        if settings and isinstance(settings, dict):
            settings |= changed | ({"image_processor_type": "LlavaImageProcessor"} if image_processor.do_pad else {})
            write_json(folder / name, config)
    if template is not None and template != read_chat_template(folder):
        write_chat_template(folder, template)


def flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """A call's options with those of `text_kwargs`, `images_kwargs` and `common_kwargs` among them."""
    flattened = {
        name: value for name, value in options.items() if name not in (*NESTED, "videos_kwargs", "audio_kwargs")
    }
    for group in NESTED:
        for name, value in (options.get(group) or {}).items():
            if flattened.get(name, value) not in (value, {"padding": False, "return_tensors": "pt"}.get(name)):
                raise ValueError(f"processor: {name} is passed twice, with different values, once in {group}")
            flattened[name] = value
    return flattened


def chat_arguments(
    conversation: Any,  # noqa: ANN401
    own: Template | None,
    chat_template: str | None,
    tokenizer: LlamaTokenizer,
    options: Mapping[str, Any],
) -> tuple[str | list[str], dict[str, Any]]:
    """Arguments of `apply_chat_template` -> the prompt or prompts, and the arguments of `processor(...)` for them.

    `own` is the template of the checkpoint. Raises a TypeError for an option that neither the template nor
    `processor(...)` has.
    """
    options, call = dict(options), "apply_chat_template"
    refuse(call, {name: options.pop(name) for name in CHATTING if name in options}, CHATTING)
    if (continued := options.pop("continue_final_message", False)) not in (None, False, True, "content"):
        raise ValueError(f"{call}: continue_final_message={continued!r} is not supported; expected True or 'content'")
    variables = {name: options.pop(name, None) for name in ("tools", "documents", "add_generation_prompt")}
    variables["add_generation_prompt"] = bool(variables["add_generation_prompt"])
    if continued and variables["add_generation_prompt"]:
        raise ValueError(f"{call}: continue_final_message and add_generation_prompt exclude one another")
    if any(callable(tool) for tool in variables["tools"] or []):
        raise ValueError(f"{call}: functions as tools are not supported; describe them by JSON schemas")
    template = pick_template(own, chat_template)
    conversations, several = read_conversations(conversation)
    read = template_variables(template)
    variables |= {name: options.pop(name) for name in list(options) if name in read}
    options = {**(options.pop("processor_kwargs", None) or {}), **options}
    if options.get("return_tensors") == "auto":
        del options["return_tensors"]
    refuse(call, dict.fromkeys(flat(options)), dict.fromkeys({*TAKEN, *CALLING}, ANY))

    ids = {name: getattr(tokenizer, f"{name}_id") for name in ("bos_token", "eos_token", "pad_token")}
    tokens = dict(zip(ids, tokenizer.convert_ids_to_tokens(ids.values()), strict=True))
    variables = {**tokens, "unk_token": "<unk>", **variables}
    prompts = [render(template, messages, variables, bool(continued)) for messages in conversations]
    if prompts[0].startswith(str(tokens["bos_token"])):
        options["add_special_tokens"] = False
    if options.get("images") is None:
        options["images"] = [conversation_images(messages) for messages in conversations]
    return (prompts, options) if several else (prompts[0], options)


def call_arguments(
    options: Mapping[str, Any], tokenizer: LlamaTokenizer, folder: Path
) -> tuple[Layout, dict[str, Any], str | None]:
    """Options of one call -> the batch's layout, the image processor's settings, and the channel axis of arrays."""
    options = dict(options)
    if (tensors := options.pop("return_tensors", "pt")) != "pt":
        raise ValueError(f"return_tensors is {tensors!r}; {TENSORS}")
    layout = read_layout({name: options.pop(name, None) for name in LAYOUT}, tokenizer.padding_side, folder)
    settings, channels = image_settings(options, "processor"), options.pop("input_data_format", None)
    if channels not in (None, "channels_first", "channels_last"):
        raise ValueError(f"input_data_format is {channels!r}; expected 'channels_first' or 'channels_last'")
    refuse("processor", options, CALLING)
    return layout, settings, channels


def read_layout(options: Mapping[str, Any], side: str, folder: Path) -> Layout:
    """transformers' arguments about the length of sequences. `side` is that of the padding if none is given."""
    padding, truncation, limit, multiple = (options[name] for name in LAYOUT[:4])
    side = options["padding_side"] or side
    if padding not in (None, False, True, "longest", "max_length", "do_not_pad"):
        raise ValueError(f"padding is {padding!r}; expected True ('longest'), 'max_length' or False ('do_not_pad')")
    if truncation not in (None, False, True, "longest_first", "only_first", "do_not_truncate"):
        raise ValueError(f"truncation is {truncation!r}; expected True or False")
    if side not in ("left", "right"):
        raise ValueError(f"padding_side is {side!r}; expected 'left' or 'right'")
    for name, value in (("max_length", limit), ("pad_to_multiple_of", multiple)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name} is {value!r}; expected an integer above 0")
    pad = padding not in (None, False, "do_not_pad")
    cut = truncation not in (None, False, "do_not_truncate") or (limit is not None and not pad and truncation is None)
    if limit is None and (cut or padding == "max_length"):
        limit = read_json(folder / "tokenizer_config.json", missing={}).get("model_max_length")
        limit = limit if type(limit) is int and 0 < limit < UNLIMITED else None
        pad = pad and (padding != "max_length" or limit is not None)
    if cut and pad and multiple and limit and limit % multiple:
        raise ValueError(f"max_length {limit} is not a multiple of pad_to_multiple_of {multiple}")
    shortest = limit if limit and padding == "max_length" else 0
    return Layout(pad, side, limit if cut else None, shortest, multiple or 1)


def in_order(
    images: Any,  # noqa: ANN401
    text: Any,  # noqa: ANN401
    options: Mapping[str, Any],
) -> tuple[Any, list[str] | None, bool, dict[str, Any]]:
    """Arguments of `processor(...)` -> images, texts, `add_special_tokens`, and the other options.

    Images and text may be in either order: older versions of transformers took text first.
    """

    def is_text(value: object) -> bool:
        several = isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(one, str) for one in value)
        return isinstance(value, str) or several

    def marked(value: Any) -> bool:  # noqa: ANN401
        return is_text(value) and IMAGE_TOKEN in "".join(value)

    if is_text(images) and ((text is not None and not is_text(text)) or (marked(images) and not marked(text))):
        images, text = text, images
    if text is not None and not is_text(text) and text not in ([], ()):
        raise ValueError(f"text must be a string or a list of strings, not {type(text).__name__}")
    options = flat(options)
    special = options.pop("add_special_tokens", True)
    return images, [text] if isinstance(text, str) else None if text is None else list(text), bool(special), options
