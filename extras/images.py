"""Images from files, URLs and standard input, opened the way transformers opens them, and with bounds on everything."""

import http.client
import io
import sys
import threading
import time
import urllib.request
import warnings
from pathlib import Path
from typing import IO

from PIL import Image, ImageOps, UnidentifiedImageError

# Pillow reads more formats, but some with the help of other programs (EPS: Ghostscript) or without limits.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA")
MAX_STREAM = 100 * 2**20  # bytes from a URL or a pipe
DOWNLOAD_SECONDS = 60


def load_image(source: str) -> Image.Image:
    """Reads an image as transformers' load_image does: first frame, rotated by its EXIF orientation, converted to RGB.

    As there, transparency is dropped and 16-bit grey values are clipped at 255. (An image that is given directly to the
    image processor is composited onto white instead, also as in transformers.)

    Args:
        source: a path, an http(s) URL, or "-" for standard input.

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
    elif "\0" in source:
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
            raise ValueError(f"{source} is not an image that Pillow can read; try JPEG or PNG") from error
        except Image.DecompressionBombError as error:
            raise ValueError(f"{source} has too many pixels: {error}") from error
        except Exception as error:  # Pillow raises many types for damaged files
            raise ValueError(f"{source} is a damaged image: {error or type(error).__name__}") from error


def open_image(file: Path | IO[bytes]) -> Image.Image:
    """Reads only the header of an image; a damaged one raises one of Pillow's many errors."""
    Image.init()
    return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])


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
