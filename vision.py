"""Pictures: from an image file to patch features.

    image file -> load_image -> PIL RGB image of any size
               -> LlavaImageProcessor -> pixel_values (N, 3, 336, 336)
               -> CLIPVisionModel -> patch features (N, P, Dv), P = (336 / 14)^2 = 576, Dv = 1024

LLaVA-1.5 looks through CLIP's ViT-L/14 at 336 pixels. It reads the features one layer before the last, where they still
say what is where, and drops the CLS token, which sums up the whole picture.

Sources: CLIP (arXiv 2103.00020) and its ViT; LLaVA-1.5 (arXiv 2310.03744); for the arithmetic of the preprocessing,
transformers' CLIPImageProcessorPil and LlavaImageProcessorPil. Parameter names are those of the checkpoints.
"""

import http.client
import io
import sys
import time
import urllib.request
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

ACTIVATIONS = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # CLIP's fast approximation
    "gelu": F.gelu,  # exact, with erf
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}

MAX_DOWNLOAD = 100 * 2**20  # bytes
DOWNLOAD_SECONDS = 60


# From a file to pixels


def load_image(source: str) -> Image.Image:
    """Reads an image as transformers' load_image does: first frame, turned upright as its EXIF tag says, made RGB.

    As there, transparency is dropped and grey values of 16 bits are cut off at 255. (Images that are given to the
    processor directly get white behind what is transparent, also as in transformers.)

    Args:
        source: a path, an http(s) URL, or "-" for standard input. An OSError says that it cannot be opened or fetched,
            a ValueError that it is not an image that Pillow can read.
    """
    if source == "-":
        source, file = "standard input", io.BytesIO(sys.stdin.buffer.read())
    elif source.startswith(("http://", "https://")):
        file = io.BytesIO(_download(source))
    else:
        file = open(source, "rb")  # noqa: SIM115 - closed below
    with file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about odd palettes and large images
        try:
            return ImageOps.exif_transpose(Image.open(file)).convert("RGB")
        except UnidentifiedImageError as error:
            raise ValueError(f"{source} is not an image that Pillow can read") from error
        except Image.DecompressionBombError as error:
            raise ValueError(f"{source} has too many pixels: {error}") from error
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{source} is a damaged image: {error}") from error


def _download(url: str) -> bytes:
    """The body behind a URL; whatever goes wrong, a slow or endless answer too, ends in an OSError."""
    deadline, body = time.monotonic() + DOWNLOAD_SECONDS, bytearray()
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0"})  # some sites refuse urllib's own
        with urllib.request.urlopen(request, timeout=10) as response:
            while chunk := response.read1(2**16):
                body += chunk
                if len(body) > MAX_DOWNLOAD or time.monotonic() > deadline:
                    raise OSError(f"it is over {MAX_DOWNLOAD >> 20} MiB or takes over {DOWNLOAD_SECONDS} seconds")
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise OSError(f"{url} could not be fetched: {error}") from error
    return bytes(body)


@dataclass
class LlavaImageProcessor:
    """Turns images into `pixel_values`; the fields are those of preprocessor_config.json.

    Crop (the default): the shorter side becomes 336 pixels and the centre square is kept, so the ends of a long picture
    are not seen. Pad (`do_pad`), as the original LLaVA was trained: the picture is first made square with bars in
    CLIP's mean colour, so all of it is seen, but smaller.
    """

    size: int | dict[str, int] = 224  # of the shorter side, or {"shortest_edge": }, or {"height": , "width": }
    crop_size: int | dict[str, int] = 224
    resample: int = 3  # Pillow's number for bicubic
    rescale_factor: float = 1 / 255
    image_mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pictures
    image_std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711)
    do_pad: bool = False
    do_resize: bool = True
    do_center_crop: bool = True
    do_rescale: bool = True
    do_normalize: bool = True

    @classmethod
    def from_dict(cls, config: dict) -> Self:
        """Takes the fields it knows out of a preprocessor_config.json; a null means the default."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in config.items() if name in known and value is not None})

    def __call__(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """PIL images -> pixel_values (N, 3, 336, 336), float32; a ValueError for one too thin to be resized."""
        images = [images] if isinstance(images, Image.Image) else images
        return torch.from_numpy(np.stack([self.preprocess(image) for image in images]))

    def preprocess(self, image: Image.Image) -> np.ndarray:
        """One image -> (3, 336, 336), float32."""
        image = _on_white(image)
        if self.do_pad:
            image = self._pad_to_square(image)
        if self.do_resize:
            image = image.resize(self._resized(image.size), self.resample)
        if self.do_center_crop:
            size = self.crop_size
            height, width = (size, size) if isinstance(size, int) else (size["height"], size["width"])
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        pixels = np.asarray(image)  # (336, 336, 3), 0 to 255
        if self.do_rescale:
            pixels = pixels * self.rescale_factor  # in float64, as transformers does
        pixels = pixels.astype(np.float32)
        if self.do_normalize:
            pixels = (pixels - np.float32(self.image_mean)) / np.float32(self.image_std)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _pad_to_square(self, image: Image.Image) -> Image.Image:
        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in self.image_mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) before -> after."""
        if isinstance(self.size, dict) and "shortest_edge" not in self.size:
            return self.size["width"], self.size["height"]
        short = self.size["shortest_edge"] if isinstance(self.size, dict) else self.size
        width, height = (int(short * side / min(size)) for side in size)
        if width * height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(
                f"an image of {size[0]} x {size[1]} pixels is too long and thin: cut it, or try --image-mode pad"
            )
        return width, height


def _on_white(image: Image.Image) -> Image.Image:
    """Any mode -> RGB, with white behind what is transparent."""
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# From pixels to features


@dataclass
class CLIPVisionConfig:
    """The shape of the vision tower: transformers' defaults (ViT-B/32), and behind them the values of LLaVA-1.5."""

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
    """Cuts the image into patches, makes each a vector, puts CLS in front and adds a learned position to each."""

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
    """Multi-head self-attention in which every position sees every other."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1 + P, Dv) -> the same shape"""
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (N, H, 1 + P, Dh)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class CLIPMLP(nn.Module):
    """Two linear layers with a nonlinearity between them, applied to each position alone."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1 + P, Dv) -> the same shape"""
        return self.fc2(self.act(self.fc1(x)))


class CLIPEncoderLayer(nn.Module):
    """A pre-norm transformer block: attention, then the MLP, each added to what came in."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = CLIPAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1 + P, Dv) -> the same shape"""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):
    """The stack of blocks. (A module of its own because the checkpoints name it: `encoder.layers.0...`)"""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, wanted: set[int]) -> dict[int, Tensor]:
        """(N, 1 + P, Dv) -> {i: hidden state i} for the wanted ones; 0 is the input, i the output of layer i."""
        states = {0: x}
        for i, layer in enumerate(self.layers[: max(wanted)], start=1):
            x = layer(x)
            if i in wanted:
                states[i] = x
        return states


class CLIPVisionModel(nn.Module):
    """CLIP's image encoder, read at the layers that are asked for."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # CLIP's spelling
        self.encoder = CLIPEncoder(config)
        # Normalises CLS for CLIP's own use. LLaVA never reads it; it is here because the checkpoints have it.
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor, layer: int | Sequence[int] = -2, strategy: str = "default") -> Tensor:
        """pixel_values (N, 3, 336, 336) -> features (N, P, Dv), or (N, P, len(layer) * Dv) for a list of layers.

        Args:
            pixel_values: what `LlavaImageProcessor` returns.
            layer: which hidden state: 0 is the input of the first layer, i the output of layer i, -1 that of the
                last. Layers behind the last one wanted are not computed.
            strategy: "default" drops CLS; "full" keeps it, in front: (N, 1 + P, ...).
        """
        count = len(self.encoder.layers) + 1
        wanted = [i + count if i < 0 else i for i in ([layer] if isinstance(layer, int) else layer)]
        x = self.pre_layrnorm(self.embeddings(pixel_values.to(self.embeddings.class_embedding.dtype)))
        states = self.encoder(x, set(wanted))
        first = 1 if strategy == "default" else 0
        return torch.cat([states[i][:, first:] for i in wanted], dim=-1)
