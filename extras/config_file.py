"""config.json in any of its spellings -> one dict with today's names.

The published files are sparse and of several ages: `image_token_index` for `image_token_id`, `torch_dtype` for `dtype`,
`rope_theta` and `rope_scaling` for `rope_parameters`; everything missing takes the defaults of transformers. That is
dealt with here, so that the rest of the project only sees today's names.

Sources: transformers' config classes for names and defaults; the files of llava-hf/llava-1.5-7b-hf, llava-1.5-13b-hf
and bakLlava-v1-hf for the older spellings.
"""

from pathlib import Path

from extras.files import fits, read_json
from extras.quantize import SCHEMES

# Defaults of transformers that depend on more than the field itself. A vision_config that is present but sparse takes
# the defaults of CLIPVisionConfig (ViT-B/32); these apply if there is none.
VISION_DEFAULTS = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
TEXT_DEFAULTS = {
    "llama": {},
    "mistral": {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
}
ROPE_NUMBERS = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_TYPES = {"default": 1, "linear": 2, "llama3": 5}  # how many of these numbers each type needs


def read_config(folder: Path) -> dict:
    """Reads config.json and generation_config.json into one dict with today's names.

    What is still missing takes its default from the dataclasses that read this dict. `eos_token_id` is a list, from
    generation_config.json, else from config.json, else [2]. Raises as `LlavaConfig.from_pretrained` does.
    """
    raw = read_json(folder / "config.json")
    generation = read_json(folder / "generation_config.json", missing={})
    if raw.get("model_type") != "llava":
        raise ValueError(
            f"{folder / 'config.json'} describes a model of type {raw.get('model_type')!r}; only 'llava' is supported "
            "(LLaVA-1.5, BakLLaVA and their fine-tunes in Hugging Face format)"
        )
    for name in ("text_config", "vision_config"):
        if not isinstance(raw.get(name), dict | None):
            raise ValueError(f"{folder / 'config.json'}: {name} is not an object")
    text = raw.get("text_config") or {}
    text_type = str(text.get("model_type", "llama"))
    if text_type not in TEXT_DEFAULTS:
        raise ValueError(f"{folder / 'config.json'}: the text model {text_type!r} is not supported")
    vision = raw.get("vision_config") or VISION_DEFAULTS
    vision_type = vision.get("model_type", "clip_vision_model")
    if vision_type != "clip_vision_model":
        raise ValueError(f"{folder / 'config.json'}: the vision model {vision_type!r} is not supported")

    file, quantization = folder / "config.json", raw.get("quantization_config")
    if quantization is not None and quantization not in SCHEMES.values():
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        how = "which is not supported" if method != "compact" else f"with settings that are not known: {quantization}"
        raise ValueError(
            f"{file}: the weights are quantised by {method!r}, {how}. Use the original checkpoint with --quantize"
        )

    def first(key: str, default: object) -> object:
        """A token id from the first place that has it."""
        found = (place[key] for place in (generation, raw, text) if place.get(key) is not None)
        return next(found, default)

    eos = first("eos_token_id", 2)
    eos = (eos if isinstance(eos, list) else [eos]) or [2]
    return {
        **raw,
        "image_token_id": raw.get("image_token_id", raw.get("image_token_index", 32000)),
        "dtype": raw.get("dtype") or raw.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype"),
        "quantize": next((name for name, scheme in SCHEMES.items() if scheme == quantization), None),
        "eos_token_id": eos,
        "pad_token_id": first("pad_token_id", eos[0]),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        "vision_config": vision,
        "text_config": TEXT_DEFAULTS[text_type] | text | {"rope_parameters": _rope_parameters(text)},
    }


def _rope_parameters(text: dict) -> dict:
    """RoPE's settings from the current spelling, or from the old one (rope_theta and rope_scaling).

    Raises a ValueError for a type of RoPE that is not implemented here.
    """
    old, new = text.get("rope_scaling") or {}, text.get("rope_parameters") or {}
    if not isinstance(old, dict) or not isinstance(new, dict):
        raise ValueError("config.json: rope_scaling or rope_parameters is not an object")
    rope = {"rope_theta": text.get("rope_theta") or 10000.0, **old, **new}
    rope["rope_type"] = str(rope.pop("type", None) or rope.get("rope_type") or "default")
    if rope["rope_type"] not in ROPE_TYPES:
        raise ValueError(f"RoPE of type {rope['rope_type']!r} is not supported, only {', '.join(ROPE_TYPES)}")
    for name in ROPE_NUMBERS[: ROPE_TYPES[rope["rope_type"]]]:
        if not (fits(rope.get(name), float) and rope[name] > 0):
            value = rope.get(name)
            raise ValueError(f"config.json: RoPE's {name} is {value!r}; it must be a number above 0 and below 1e18")
    return rope
