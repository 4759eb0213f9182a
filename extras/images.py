"""Images from files, URLs and standard input, opened the way transformers opens them, and with bounds on everything."""

import base64
import http.client
import io
import re
import sys
import threading
import time
import urllib.request
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError, features

# Pillow reads more formats, but some with the help of other programs (EPS: Ghostscript) or without limits.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA")
MAX_STREAM = 100 * 2**20  # bytes from a URL or a pipe
DOWNLOAD_SECONDS = 60
# Brands in the header of a HEIC file. The last two are shared with AVIF, whose files also have a brand of their own.
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1")
AVIF_BRANDS = (b"avif", b"avis")


def as_images(source: object, channels: str | None = None) -> list[Image.Image]:
    """Images in any form that transformers takes -> a flat list.

    Args:
        source: an image, or any nesting of lists of images. An image is a PIL image, a path, a URL, or an array or
            tensor of the values 0 to 255, (H, W, C) or (C, H, W) with 1, 3 or 4 channels; arrays may be stacked.
        channels: "channels_first" or "channels_last", for arrays that could be both; transformers assumes the first.

    Raises:
        OSError: a file cannot be opened or downloaded.
        ValueError: something is not an image.
    """
    if isinstance(source, Image.Image):
        return [source]
    if isinstance(source, str | Path):
        return [load_image("./-" if str(source) == "-" else str(source))]  # standard input is for the command line only
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        source = (source.float() if source.is_floating_point() else source).numpy()
    if isinstance(source, np.ndarray) and source.ndim < 4:
        return [_from_array(source, channels)]
    if isinstance(source, Iterable) and not isinstance(source, dict | bytes):
        return [image for one in source for image in as_images(one, channels)]
    raise ValueError(
        f"expected an image, but found {type(source).__name__}: give a PIL image, an array, a path or a URL"
    )


def _from_array(array: np.ndarray, channels: str | None) -> Image.Image:
    """An array of pixels -> RGB; transparent ones are composited onto white, rounded as transformers does."""
    shape, kind = array.shape, array.dtype
    axes = [
        axis
        for axis, name in ((0, "channels_first"), (2, "channels_last"))
        if array.ndim == 3 and array.size and shape[axis] in (1, 3, 4) and channels in (None, name)
    ]
    if not axes:
        raise ValueError(f"an array {shape} is not an image: expected (H, W, C) or (C, H, W) with 1, 3 or 4 channels C")
    if kind != np.uint8:
        whole = kind.kind in "iuf" and bool(((array >= 0) & (array <= 255) & (array == np.floor(array))).all())
        if not whole or (kind.kind == "f" and 0 < array.max() <= 1):
            raise ValueError(f"an image is an array of {kind}; expected uint8, with values from 0 to 255")
        array = array.astype(np.uint8)
    array = np.moveaxis(array, axes[0], 2)
    if array.shape[2] == 4:
        alpha = array[..., 3:] / 255
        array = np.round(alpha * array[..., :3] + (1 - alpha) * 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3))))


def load_image(source: str) -> Image.Image:
    """Reads an image as transformers' load_image does: first frame, rotated by its EXIF orientation, converted to RGB.

    As there, transparency is dropped and 16-bit grey values are clipped at 255. (An image that is given directly to the
    image processor is composited onto white instead, also as in transformers.)

    Args:
        source: a path, an http(s) URL, a data URI, or "-" for standard input.

    Raises:
        OSError: it cannot be opened or downloaded.
        ValueError: it is not an image that Pillow can read.
    """
    file: IO[bytes]
    if source.startswith(("http://", "https://")):
        file = io.BytesIO(_download(source))
    elif source == "-":
        if sys.stdin is None:
            raise OSError("standard input is closed, so no image can be read from it")
        source, file = "standard input", sys.stdin.buffer
    elif source.startswith("data:image/"):
        try:
            source, file = "the data URI", io.BytesIO(base64.b64decode(source.partition(",")[2]))
        except ValueError as error:
            raise ValueError(f"the data URI is not valid base64: {error}") from error
    elif not source or "\0" in source:
        raise ValueError(f"{source!r} is not a path")
    else:
        file = open(source, "rb")  # noqa: SIM115 - closed below
    with file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about odd palettes and large images
        if not file.seekable() or source == "standard input":
            file = io.BytesIO(file.read(MAX_STREAM + 1))
            if file.getbuffer().nbytes > MAX_STREAM:
                raise OSError(f"{source} is over {MAX_STREAM >> 20} MiB, too large for an image")
        try:
            image = open_image(file)
            ImageOps.exif_transpose(image, in_place=True)
            return image if image.mode == "RGB" else image.convert("RGB")
        except UnidentifiedImageError as error:
            raise ValueError(f"{source} is {error}") from error
        except Image.DecompressionBombError as error:
            raise ValueError(f"{source} has too many pixels: {error}") from error
        except Exception as error:  # Pillow raises many types for damaged files
            raise ValueError(f"{source} is a damaged image: {error or type(error).__name__}") from error


def open_image(file: Path | IO[bytes]) -> Image.Image:
    """Reads only the header of an image; a damaged one raises one of Pillow's many errors."""
    Image.init()
    formats = _formats(file)
    try:
        return Image.open(file, formats=formats)
    except UnidentifiedImageError as error:
        raise UnidentifiedImageError("not an image that Pillow can read; try JPEG or PNG") from error


def _formats(file: Path | IO[bytes]) -> list[str]:
    """The formats that a file may have, by Pillow's names. HEIC, the format of phones, needs a package of its own."""
    if isinstance(file, Path):
        with open(file, "rb") as opened:
            return _formats(opened)
    header = file.read(64)
    brands = [header[i : i + 4] for i in (8, *range(16, min(len(header), int.from_bytes(header[:4])), 4))]
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if header[4:8] == b"ftyp" and any(brand in AVIF_BRANDS for brand in brands):
        if not features.check("avif"):
            raise UnidentifiedImageError("an AVIF image; to read it, run: pip install --upgrade pillow")
    elif header[4:8] == b"ftyp" and any(brand in HEIC_BRANDS for brand in brands):
        if size > MAX_STREAM:  # it would be read into memory
            raise UnidentifiedImageError(f"over {MAX_STREAM >> 20} MiB, too large for a HEIC image")
        try:
            import pillow_heif
        except ImportError:
            raise UnidentifiedImageError("a HEIC image; to read it, run: pip install pillow-heif") from None
        if (pixels := _heic_pixels(file, size)) > 2 * (Image.MAX_IMAGE_PIXELS or pixels):  # Pillow's own limit
            raise Image.DecompressionBombError(f"it declares {pixels}")
        pillow_heif.register_heif_opener()
        return ["HEIF"]
    return [name for name in FORMATS if name in Image.OPEN]


def _heic_pixels(file: IO[bytes], size: int) -> int:
    """The pixels of the largest image in a HEIC file. Pillow sees only the size to which it will be cropped."""
    most = start = 0
    for _ in range(1000):
        file.seek(start)
        header = file.read(16)
        if len(header) < 8:
            file.seek(0)
            return most
        length = int.from_bytes(header[:4]) or size - start
        length = int.from_bytes(header[8:]) if length == 1 else length
        if header[4:8] == b"meta":
            file.seek(start)
            meta = file.read(length)
            for found in re.finditer(b"ispe", meta):  # a box with version, width and height, 4 bytes each
                place = found.start() + (16 if meta[: found.start()].endswith(b"\0\0\0\1") else 8)
                width, height = meta[place : place + 4], meta[place + 4 : place + 8]
                most = max(most, int.from_bytes(width) * int.from_bytes(height))
        start += max(length, 8)
    raise UnidentifiedImageError("not a HEIC image: it has over 1000 boxes")


def _download(url: str) -> bytes:
    """The content of a URL. Every failure, including a slow or endless response, is an OSError."""
    deadline = time.monotonic() + DOWNLOAD_SECONDS
    result: list[bytes | Exception] = []
    too_much = f"it is over {MAX_STREAM >> 20} MiB or takes over {DOWNLOAD_SECONDS} seconds"

    def fetch() -> None:
        body = bytearray()
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0"})  # some refuse urllib's
            with urllib.request.urlopen(request, timeout=10) as response:
                while chunk := response.read1(2**16):
                    body += chunk
                    if len(body) > MAX_STREAM or time.monotonic() > deadline:
                        raise OSError(too_much)
            result.append(bytes(body))
        except (OSError, ValueError, http.client.HTTPException) as error:
            result.append(error)

    # In a thread of its own: a server that sends its headers byte by byte never reaches urllib's timeout.
    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(DOWNLOAD_SECONDS)
    outcome = result[0] if result else OSError(too_much)
    if isinstance(outcome, bytes):
        return outcome
    raise OSError(f"{url} could not be downloaded: {outcome}")
