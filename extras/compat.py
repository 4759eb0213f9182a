"""transformers' arguments at this project's door, so that code written for transformers runs with its import changed.

One rule for every call: an argument that has a meaning here takes effect; one that cannot change the result is
accepted; one that would change it is refused in a sentence that says what to use; an unknown one is a TypeError, as in
any call. The tables below list the second and the third kind; what is neither in them nor a parameter is unknown.

Source: the signatures and defaults of transformers 5 (PreTrainedModel.from_pretrained, GenerationConfig).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from extras.hub import HUB_OPTIONS
from extras.machine import pick_device


class Accepted(NamedTuple):
    """The values that have no effect here, and the advice given for any other. An empty tuple accepts every value."""

    values: tuple = ()
    advice: str = ""


ANY = Accepted()
QUANTISED = Accepted((None, False), 'use quantize="int8" or quantize="int4", or a dtype of 16 bits')
ONE_DEVICE = Accepted((None,), "a model is on one device here: use device_map='auto', or a smaller dtype")
NOT_HERE = "leave it out"

LOADING = {
    "low_cpu_mem_usage": ANY,  # weights are never in memory twice
    "trust_remote_code": ANY,  # no code of a checkpoint is ever run
    "use_safetensors": Accepted((None, True), "pickles can run code and are never loaded"),
    "weights_only": Accepted((None, True), "pickles can run code and are never loaded"),
    "load_in_4bit": QUANTISED,
    "load_in_8bit": QUANTISED,
    "quantization_config": QUANTISED,
    "max_memory": ONE_DEVICE,
    "offload_folder": ONE_DEVICE,
    "offload_buffers": Accepted((None, False), ONE_DEVICE.advice),
    "tp_plan": ONE_DEVICE,
    "config": Accepted((None,), "the shape is that of the checkpoint's own config.json"),
    "state_dict": Accepted((None,), "weights are read from the folder"),
    "variant": Accepted((None,), "rename the files to model*.safetensors"),
    "subfolder": Accepted((None, ""), "give the path of that folder"),
    "ignore_mismatched_sizes": Accepted((None, False), "weights must match config.json"),
    "output_loading_info": Accepted((None, False), "loading fails with a list of everything that does not match"),
}
ATTENTION = (None, "sdpa", "eager")  # the same attention, up to rounding

FORWARD = {
    "use_cache": ANY,  # a cache is passed in
    "return_dict": Accepted((None, True), "outputs are named here: .logits, .loss, .hidden_states"),
    "output_attentions": Accepted((None, False), "notebook 03 shows how to compute attention weights"),
    "past_key_values": Accepted((None,), "use cache=KVCache(model)"),
    "position_ids": Accepted((None,), "positions follow from the attention_mask and the cache"),
    "inputs_embeds": Accepted((None,), "pass input_ids; model.embed(...) shows what becomes of them"),
    "vision_feature_layer": Accepted((None,), "set model.config.vision_feature_layer"),
    "vision_feature_select_strategy": Accepted((None,), "set model.config.vision_feature_select_strategy"),
    "image_sizes": ANY,  # all images have one size after preprocessing
}

DECODING = {
    "clean_up_tokenization_spaces": Accepted((None, False), "text is returned as it was encoded"),
    "spaces_between_special_tokens": ANY,  # only slow tokenizers of transformers 4 added them
}

GENERATING = {
    "use_cache": ANY,  # the cache changes the work, never the result
    "synced_gpus": ANY,
    "bos_token_id": ANY,  # the prompt is given
    "early_stopping": ANY,  # only for beam search, like length_penalty
    "length_penalty": ANY,
    "tokenizer": ANY,
    "num_beams": Accepted((None, 1), "beam search is not implemented: decode greedily, or sample with do_sample=True"),
    "num_return_sequences": Accepted((None, 1), "repeat the prompt in the batch"),
    "past_key_values": Accepted((None,), "use cache=KVCache(model)"),
    "cache_implementation": Accepted((None,), "use cache=KVCache(model)"),
    "output_scores": Accepted((None, False), "call model(ids).logits"),
    "output_logits": Accepted((None, False), "call model(ids).logits"),
    "output_attentions": Accepted((None, False), "notebook 03 shows how to compute them"),
    "output_hidden_states": Accepted((None, False), "call model(ids, output_hidden_states=True)"),
    "assistant_model": Accepted((None,), NOT_HERE),
    "stopping_criteria": Accepted((None,), "read model.generate_stream(...) and stop when you like"),
    "stop_strings": Accepted((None,), "read model.generate_stream(...) and stop when you like"),
    "max_time": Accepted((None,), "read model.generate_stream(...) and stop when you like"),
    "logits_processor": Accepted((None,), NOT_HERE),
    "min_length": Accepted((None, 0), NOT_HERE),
    "min_new_tokens": Accepted((None, 0), NOT_HERE),
    "no_repeat_ngram_size": Accepted((None, 0), "use repetition_penalty"),
    "bad_words_ids": Accepted((None,), NOT_HERE),
    "typical_p": Accepted((None, 1.0), "use top_k or top_p"),
    "min_p": Accepted((None, 0.0), "use top_k or top_p"),
}


def refuse(call: str, options: Mapping[str, Any], accepted: Mapping[str, Accepted]) -> None:
    """Raises a ValueError for an option that would change the result of a call, and a TypeError for an unknown one."""
    for name, value in options.items():
        if name not in accepted:
            raise TypeError(f"{call} got an unexpected keyword argument {name!r}")
        values, advice = accepted[name]
        if values and not any(value is one or (type(value) is type(one) and value == one) for one in values):
            raise ValueError(f"{call}: {name}={value!r} is not supported; {advice}")


def loading_options(
    dtype: torch.dtype | str, device: torch.device | str, options: dict[str, Any]
) -> tuple[torch.dtype | str, torch.device | str, dict[str, Any]]:
    """transformers' arguments of `from_pretrained` -> our dtype and device, and what the hub needs to know."""
    call, options = "from_pretrained", dict(options)
    if (torch_dtype := options.pop("torch_dtype", None)) is not None:
        dtype = torch_dtype
    device_map = options.pop("device_map", None)
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        device = pick_device("auto")
    elif isinstance(device_map, int) and not isinstance(device_map, bool):
        device = torch.device("cuda", device_map)
    elif isinstance(device_map, dict):
        raise ValueError(f"{call}: device_map={device_map!r} is not supported; {ONE_DEVICE.advice}")
    elif device_map is not None:
        device = device_map
    attention = options.pop("attn_implementation", None)
    on_cuda = str(device).startswith("cuda")
    if attention not in ATTENTION and not (on_cuda and attention == "flash_attention_2"):  # SDPA has that kernel there
        raise ValueError(
            f"{call}: attn_implementation={attention!r} is not supported on {device}; leave it out: attention uses "
            "PyTorch's scaled_dot_product_attention, which takes a flash kernel where there is one"
        )
    hub = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
    refuse(call, options, LOADING)
    return dtype, device, hub
