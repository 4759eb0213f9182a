"""The configuration of the whole model: the shapes of its two towers, and how they are connected.

Source: transformers' LlavaConfig for names and defaults. extras/config_file.py reads the files of several ages.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from extras.activations import ACTIVATIONS
from extras.config_file import read_config
from extras.files import known_fields
from extras.hub import find_folder
from extras.quantize import SCHEMES
from llama import LlamaConfig
from vision import CLIPVisionConfig


@dataclass
class LlavaConfig:
    """The shapes of vision tower and decoder, and how they are connected. Defaults are those of transformers."""

    vision_config: CLIPVisionConfig = field(
        default_factory=lambda: CLIPVisionConfig(1024, 4096, 24, 16, image_size=336, patch_size=14)
    )
    text_config: LlamaConfig = field(default_factory=LlamaConfig)
    image_token_id: int = 32000
    vision_feature_layer: int | list[int] = -2  # hidden states of the vision tower; several are concatenated
    vision_feature_select_strategy: str = "default"  # "default" drops CLS, "full" keeps it
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    tie_word_embeddings: bool = False
    eos_token_id: list[int] = field(default_factory=lambda: [2])
    pad_token_id: int = 2
    dtype: str | None = None  # of the stored weights
    quantize: str | None = None  # "int8" or "int4", if linear layers are quantised

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> Self:  # noqa: ANN401
        """Reads config.json and generation_config.json of a folder, or of a repository of the hub.

        Raises:
            FileNotFoundError: there is no config.json.
            ValueError: a file is damaged, describes another kind of model, or has an invalid value.
        """
        config, file = read_config(find_folder(name, **options)), "config.json"
        return cls(
            CLIPVisionConfig(**known_fields(CLIPVisionConfig, config["vision_config"], f"{file}, vision_config")),
            LlamaConfig(**known_fields(LlamaConfig, config["text_config"], f"{file}, text_config")),
            **known_fields(cls, config, file),
        )

    def __post_init__(self) -> None:
        vision, text, layers = self.vision_config, self.text_config, self.vision_feature_layer
        depth, layers = vision.num_hidden_layers, [layers] if isinstance(layers, int) else layers
        activations = {vision.hidden_act, text.hidden_act, self.projector_hidden_act}
        rules = {
            "a vision hidden_size divisible by its heads": vision.hidden_size % vision.num_attention_heads == 0,
            "attention heads divisible by num_key_value_heads": (
                text.num_attention_heads % text.num_key_value_heads == 0
            ),
            "an even head_dim": text.head_dim % 2 == 0,
            "num_channels 3": vision.num_channels == 3,
            f"a vision_feature_layer within {depth} layers": (
                bool(layers) and all(-depth - 1 <= layer <= depth for layer in layers)
            ),
            "a select_strategy of default or full": self.vision_feature_select_strategy in ("default", "full"),
            f"activations from {', '.join(ACTIVATIONS)}": activations <= set(ACTIVATIONS),
            f"a context longer than the {self.image_seq_length} tokens of an image": (
                0 < self.image_seq_length < text.context_length
            ),
        }
        if broken := [rule for rule, holds in rules.items() if not holds]:
            raise ValueError(f"config.json does not describe a working model: it needs {'; '.join(broken)}")

    @property
    def image_seq_length(self) -> int:
        """P: the number of tokens an image becomes, one per patch; with "full", one more for CLS."""
        patches = (self.vision_config.image_size // self.vision_config.patch_size) ** 2
        return patches + (self.vision_feature_select_strategy == "full")

    def to_dict(self) -> dict:
        """The content of config.json as transformers writes it."""
        config = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", **dataclasses.asdict(self)}
        config["image_token_index"] = config.pop("image_token_id")
        if quantize := config.pop("quantize"):
            config["quantization_config"] = SCHEMES[quantize]
        config["vision_config"]["model_type"] = "clip_vision_model"
        config["text_config"]["tie_word_embeddings"] = self.tie_word_embeddings
        return config
