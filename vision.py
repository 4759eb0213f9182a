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
import threading
import time
import urllib.request
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
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

# Pillow reads more, but some of it with the help of other programs (EPS: Ghostscript) or without limits.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA")
MAX_STREAM = 100 * 2**20  # bytes from a URL or a pipe
DOWNLOAD_SECONDS = 60
MAX_SQUARE = 2**30  # pixels that a picture may have with its bars: resizing them takes seconds
STRIP_PIXELS = 2**24


# From a file to pixels


def load_image(source: str) -> Image.Image:
    """Reads an image as transformers' load_image does: first frame, turned upright as its EXIF tag says, made RGB.

    As there, transparency is dropped and grey values of 16 bits are cut off at 255. (Images that are given to the
    processor directly get white behind what is transparent, also as in transformers.)

    Args:
        source: a path, an http(s) URL, or "-" for standard input. An OSError says that it cannot be opened or fetched,
            a ValueError that it is not an image that Pillow can read.
    """
    if source.startswith(("http://", "https://")):
        file = io.BytesIO(_download(source))
    elif source == "-":
        if sys.stdin is None:
            raise OSError("standard input, where an image was to come from, is closed")
        source, file = "standard input", sys.stdin.buffer
    elif "\0" in source:
        raise ValueError(f"{source!r} is not a path")
    else:
        file = open(source, "rb")  # noqa: SIM115 - closed below
    with file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about odd palettes and large images
        if not file.seekable() or source == "standard input":
            file = io.BytesIO(file.read(MAX_STREAM + 1))
            if file.getbuffer().nbytes > MAX_STREAM:
                raise OSError(f"{source} goes on for over {MAX_STREAM >> 20} MiB, which no image needs")
        try:
            image = open_image(file)
            ImageOps.exif_transpose(image, in_place=True)
            return image if image.mode == "RGB" else image.convert("RGB")
        except UnidentifiedImageError as error:
            raise ValueError(f"{source} is not an image that Pillow can read; try JPEG or PNG") from error
        except Image.DecompressionBombError as error:
            raise ValueError(f"{source} has too many pixels: {error}") from error
        except Exception as error:  # Pillow has one kind for each way in which a file can be damaged
            raise ValueError(f"{source} is a damaged image: {error or type(error).__name__}") from error


def open_image(file: Path | io.IOBase) -> Image.Image:
    """Reads no more than the header of an image; whatever is wrong with it raises one of Pillow's many errors."""
    Image.init()
    return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])


def _download(url: str) -> bytes:
    """The body behind a URL; whatever goes wrong, a slow or endless answer too, ends in an OSError."""
    deadline, result = time.monotonic() + DOWNLOAD_SECONDS, []
    too_much = f"it is over {MAX_STREAM >> 20} MiB or takes over {DOWNLOAD_SECONDS} seconds"

    def fetch() -> None:
        body = bytearray()
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0"})  # some refuse urllib's own
            with urllib.request.urlopen(request, timeout=10) as response:
                while chunk := response.read1(2**16):
                    body += chunk
                    if len(body) > MAX_STREAM or time.monotonic() > deadline:
                        raise OSError(too_much)
            result.append(bytes(body))
        except (OSError, ValueError, http.client.HTTPException) as error:
            result.append(error)

    # In a thread of its own, since a server that sends its headers byte by byte never runs into urllib's time limit.
    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(DOWNLOAD_SECONDS)
    if result and isinstance(result[0], bytes):
        return result[0]
    raise OSError(f"{url} could not be fetched: {result[0] if result else too_much}")


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

    def __post_init__(self) -> None:
        if 0 in np.float32(self.image_std):
            raise ValueError("image_std has a 0, and pixels are divided by it")

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
        size = (max(image.size), max(image.size)) if self.do_pad else image.size
        size = self._resized(size) if self.do_resize else size
        if size[0] * size[1] > Image.MAX_IMAGE_PIXELS or (self.do_pad and max(image.size) * image.height > MAX_SQUARE):
            raise ValueError(
                f"an image of {image.width} x {image.height} pixels is too long and thin: cut it"
                + ("" if self.do_pad else ", or try --image-mode pad")
            )
        if self.do_pad:
            image = self._pad_to_square(image, size[0])
        image = image.resize(size, self.resample)
        if self.do_center_crop:
            size = self.crop_size
            height, width = (size, size) if isinstance(size, int) else (size["height"], size["width"])
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        pixels = np.asarray(image)  # (336, 336, 3), 0 to 255
        if self.do_rescale:
            pixels = pixels * float(self.rescale_factor)  # in float64, as transformers does
        pixels = pixels.astype(np.float32)
        if self.do_normalize:
            pixels = (pixels - np.float32(self.image_mean)) / np.float32(self.image_std)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _pad_to_square(self, image: Image.Image, width: int) -> Image.Image:
        """Adds bars on two sides, and resizes the rows to their final width.

        Pillow resizes all rows first and then all columns, so no value depends on this being done here. But the square
        of a long panorama would take gigabytes, and so there is never more of it than a strip of some rows.
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
        """(width, height) before -> after."""
        if isinstance(self.size, dict) and "shortest_edge" not in self.size:
            return self.size["width"], self.size["height"]
        short = self.size["shortest_edge"] if isinstance(self.size, dict) else self.size
        return int(short * size[0] / min(size)), int(short * size[1] / min(size))


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
