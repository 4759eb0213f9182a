"""The image side: preprocessing, and CLIP's vision transformer.

    PIL image of any size --LlavaImageProcessor--> pixel_values (N, 3, 336, 336)
                          --CLIPVisionModel------> patch features (N, P, Dv), P = (336 / 14)^2 = 576, Dv = 1024

LLaVA-1.5 uses CLIP's ViT-L/14 at 336 pixels. It takes the features of the last layer but one, where each patch still
describes its own part of the image, and drops the CLS token, which summarises all of it. Shapes: N images, P patches,
Dv width of the vision tower, H heads, Dh head width.

Sources: CLIP (arXiv 2103.00020) and its ViT; LLaVA-1.5 (arXiv 2310.03744); for the arithmetic of preprocessing,
transformers' CLIPImageProcessorPil and LlavaImageProcessorPil. Parameter names are those of the checkpoints.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from extras.activations import ACTIVATIONS

MAX_SQUARE = 2**30  # pixels that an image padded to a square may have: resizing it takes seconds
STRIP_PIXELS = 2**24  # pixels that are padded at a time


@dataclass
class LlavaImageProcessor:
    """Converts images to `pixel_values`; the fields are those of preprocessor_config.json.

    Crop (the default): the shorter side is resized to 336 pixels and the centre square is kept, so the ends of a long
    image are lost. Pad (`do_pad`), as in the original LLaVA's training: the image is first padded to a square with
    CLIP's mean colour, so that all of it is kept, at a lower resolution.
    """

    size: int | dict[str, int] = 224  # of the shorter side, or {"shortest_edge": }, or {"height": , "width": }
    crop_size: int | dict[str, int] = 224
    resample: int = 3  # Pillow's number for bicubic
    rescale_factor: float = 1 / 255
    image_mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images
    image_std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711)
    do_pad: bool = False
    do_resize: bool = True
    do_center_crop: bool = True
    do_rescale: bool = True
    do_normalize: bool = True

    def __post_init__(self) -> None:
        if 0 in np.array(self.image_std, np.float32):
            raise ValueError("image_std contains a 0, and pixels are divided by it")

    def __call__(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """PIL images -> pixel_values (N, 3, 336, 336), float32. Raises a ValueError for an image too thin to resize."""
        images = [images] if isinstance(images, Image.Image) else images
        return torch.from_numpy(np.stack([self.preprocess(image) for image in images]))

    def preprocess(self, image: Image.Image) -> np.ndarray:
        """One image -> (3, 336, 336), float32."""
        image = _on_white(image)
        size = (max(image.size), max(image.size)) if self.do_pad else image.size
        size = self._resized(size) if self.do_resize else size
        limit = Image.MAX_IMAGE_PIXELS or MAX_SQUARE
        if size[0] * size[1] > limit or (self.do_pad and max(image.size) * image.height > MAX_SQUARE):
            raise ValueError(
                f"an image of {image.width} x {image.height} pixels is too long and thin: crop it"
                + ("" if self.do_pad else ", or try --image-mode pad")
            )
        if self.do_pad:
            image = self._pad_to_square(image, size[0])
        image = image.resize(size, self.resample)
        if self.do_center_crop:
            crop = self.crop_size
            height, width = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        pixels = np.asarray(image)  # (336, 336, 3), 0 to 255
        if self.do_rescale:
            pixels = pixels * float(self.rescale_factor)  # in float64, as transformers does
        pixels = pixels.astype(np.float32)
        if self.do_normalize:
            pixels = (pixels - np.array(self.image_mean, np.float32)) / np.array(self.image_std, np.float32)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _pad_to_square(self, image: Image.Image, width: int) -> Image.Image:
        """Pads an image to a square whose rows already have their final width.

        The square of a long panorama would take gigabytes, so it is padded and resized in strips of a few rows. Pillow
        resizes all rows first and then all columns, so the pixels are the same.
        """
        side, colour = max(image.size), tuple(int(255 * mean) for mean in self.image_mean)
        square = Image.new("RGB", (width, side), colour)
        left, top, rows = (side - image.width) // 2, (side - image.height) // 2, max(1, STRIP_PIXELS // side)
        for y in range(0, image.height, rows):
            strip = Image.new("RGB", (side, min(rows, image.height - y)), colour)
            strip.paste(image.crop((0, y, image.width, y + strip.height)), (left, 0))
            square.paste(strip.resize((width, strip.height), self.resample), (0, top + y))
        return square

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) of an image -> (width, height) after resizing."""
        if isinstance(self.size, dict) and "shortest_edge" not in self.size:
            return self.size["width"], self.size["height"]
        short = self.size["shortest_edge"] if isinstance(self.size, dict) else self.size
        return int(short * size[0] / min(size)), int(short * size[1] / min(size))


def _on_white(image: Image.Image) -> Image.Image:
    """An image of any mode -> RGB; transparent parts are composited onto white."""
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@dataclass
class CLIPVisionConfig:
    """The shape of the vision tower. Defaults are those of transformers (ViT-B/32); the comments give LLaVA-1.5's."""

    hidden_size: int = 768  # 1024
    intermediate_size: int = 3072  # 4096
    num_hidden_layers: int = 12  # 24
    num_attention_heads: int = 12  # 16
    num_channels: int = 3
    image_size: int = 224  # 336
    patch_size: int = 32  # 14
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


class CLIPVisionEmbeddings(nn.Module):
    """Patch embeddings with the CLS token in front, plus a learned position embedding for each."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, kernel_size=patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // patch) ** 2 + 1, width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, 336, 336) -> (N, 1 + P, Dv)"""
        patches = self.patch_embedding(pixel_values)  # (N, Dv, 24, 24)
        patches = patches.flatten(2).transpose(1, 2)  # (N, P, Dv), row by row from the top left
        cls = self.class_embedding.expand(len(patches), 1, -1)  # (N, 1, Dv)
        return torch.cat([cls, patches], dim=1) + self.position_embedding.weight


class CLIPAttention(nn.Module):
    """Multi-head self-attention without a mask: every position attends to every other."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1 + P, Dv) -> (N, 1 + P, Dv)"""
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (N, H, 1 + P, Dh)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class CLIPMLP(nn.Module):
    """Two linear layers with an activation between them, applied to each position separately."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1 + P, Dv) -> (N, 1 + P, Dv)"""
        return self.fc2(self.act(self.fc1(x)))


class CLIPEncoderLayer(nn.Module):
    """A pre-norm transformer block: attention and MLP, each with a residual connection."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = CLIPAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1 + P, Dv) -> (N, 1 + P, Dv)"""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):
    """The stack of blocks, a module of its own because the checkpoints name it: `encoder.layers.0...`"""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, wanted: set[int]) -> dict[int, Tensor]:
        """(N, 1 + P, Dv) -> {i: hidden state i}, each (N, 1 + P, Dv), for every i in `wanted`.

        Hidden state 0 is the input, i the output of layer i. Layers after the last wanted one are not computed.
        """
        states = {0: x}
        for i, layer in enumerate(self.layers[: max(wanted)], start=1):
            x = layer(x)
            if i in wanted:
                states[i] = x
        return states


class CLIPVisionModel(nn.Module):
    """CLIP's image encoder, without the pooling and projection that CLIP itself adds."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # CLIP's spelling
        self.encoder = CLIPEncoder(config)
        # CLIP applies it to CLS. LLaVA does not use it; it exists because the checkpoints contain it.
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor, layer: int | Sequence[int] = -2, strategy: str = "default") -> Tensor:
        """pixel_values (N, 3, 336, 336) -> features (N, P, Dv), or (N, P, len(layer) * Dv) for a list of layers.

        Args:
            pixel_values: from `LlavaImageProcessor`.
            layer: which hidden state: 0 is the input of the first layer, i the output of layer i, -1 that of the last.
            strategy: "default" drops CLS; "full" keeps it, in front: (N, 1 + P, ...).
        """
        count = len(self.encoder.layers) + 1
        wanted = [i + count if i < 0 else i for i in ([layer] if isinstance(layer, int) else layer)]
        x = self.pre_layrnorm(self.embeddings(pixel_values.to(self.embeddings.class_embedding.dtype)))
        states = self.encoder(x, set(wanted))
        first = 1 if strategy == "default" else 0
        return torch.cat([states[i][:, first:] for i in wanted], dim=-1)
