"""Pixel values match transformers' Pillow image processors, and image files load as they do in transformers."""

import contextlib
import http.server
import io
import threading

import numpy as np
import pillow_heif
import pytest
import torch
from conftest import encoded, random_image
from PIL import Image, ImageDraw
from transformers.image_utils import load_image as transformers_load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from extras.images import load_image
from vision import LlavaImageProcessor

SETTINGS = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
MODES = ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1", "I;16", "I", "F", "YCbCr", "HSV"]


def images_of_all_modes() -> list[Image.Image]:
    """60 images: 5 of random size in each of 12 modes, one of them with a transparent palette colour."""
    rng = np.random.default_rng(0)
    images = []
    for mode in MODES * 5:
        image = random_image(rng)
        if mode in ("RGBA", "LA"):
            image.putalpha(Image.fromarray(rng.integers(0, 256, image.size[::-1], dtype=np.uint8)))
        images.append(image.convert("L").convert(mode) if mode in ("I;16", "F", "I") else image.convert(mode))
    images[4].info["transparency"] = 0
    return images


@pytest.mark.parametrize("do_pad", [False, True], ids=["crop", "pad"])
def test_pixels_match_transformers(do_pad, check):
    judge = (LlavaImageProcessorPil if do_pad else CLIPImageProcessorPil)(**SETTINGS, do_pad=do_pad)
    ours = LlavaImageProcessor(**SETTINGS, do_pad=do_pad)
    for image in images_of_all_modes():
        theirs = judge(image, return_tensors="pt").pixel_values
        assert (ours(image) - theirs).abs().max() <= 1e-6, f"{image.mode} {image.size}"
        check(f"pixels, {'pad' if do_pad else 'crop'}", ours(image), theirs, limit=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 60, "crop_size": 56},
        {"size": {"height": 50, "width": 70}, "do_center_crop": False},
        {"size": {"shortest_edge": 40}, "crop_size": {"height": 56, "width": 56}},
        {"do_resize": False, "crop_size": {"height": 57, "width": 56}},
        {"do_normalize": False},
        {"do_rescale": False},
        {"resample": 2, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "rescale_factor": 1 / 127.5},
        {},
    ],
    ids=str,
)
def test_pixels_match_transformers_for_other_settings(settings):
    rng = np.random.default_rng(1)
    for size in [(90, 61), (33, 120), (40, 41)]:
        image = random_image(rng, size)
        theirs = CLIPImageProcessorPil(**settings)(image, return_tensors="pt").pixel_values
        torch.testing.assert_close(LlavaImageProcessor(**settings)(image), theirs, rtol=0, atol=2e-5)


def test_a_batch_has_the_pixels_of_its_single_images():
    rng = np.random.default_rng(2)
    images = [random_image(rng) for _ in range(3)]
    processor = LlavaImageProcessor(**SETTINGS)
    torch.testing.assert_close(processor(images), torch.cat([processor(image) for image in images]), rtol=0, atol=0)


def marked_image() -> Image.Image:
    """An image that looks different under every rotation and reflection."""
    image = Image.new("RGB", (40, 24), "white")
    ImageDraw.Draw(image).polygon([(0, 0), (39, 0), (0, 12)], fill="red")
    return image


def with_orientation(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(marked_image(), "JPEG", exif=exif)


FILES = {f"EXIF orientation {i}": with_orientation(i) for i in range(1, 9)} | {
    "RGBA": encoded(marked_image().convert("RGBA").rotate(30), "PNG"),
    "palette": encoded(marked_image().convert("P"), "PNG"),
    "transparent palette": encoded(marked_image().convert("P"), "PNG", transparency=0),
    "grey": encoded(marked_image().convert("L"), "PNG"),
    "grey and alpha": encoded(marked_image().convert("LA"), "PNG"),
    "black and white": encoded(marked_image().convert("1"), "PNG"),
    "16 bits": encoded(Image.fromarray(np.arange(0, 60000, 60, dtype=np.uint16).reshape(25, 40)), "PNG"),
    "CMYK": encoded(marked_image().convert("CMYK"), "JPEG"),
    "animated": encoded(marked_image(), "GIF", save_all=True, append_images=[Image.new("RGB", (40, 24), "blue")]),
    "WebP": encoded(marked_image(), "WEBP"),
    "TIFF of 32-bit floats": encoded(marked_image().convert("F"), "TIFF"),
}


@pytest.mark.parametrize("name", FILES)
def test_loaded_files_match_transformers(name, tmp_path):
    (tmp_path / "image").write_bytes(FILES[name])
    path = str(tmp_path / "image")
    ours, theirs = load_image(path), transformers_load_image(path)
    assert ours.mode == "RGB"
    assert ours.size == theirs.size
    assert ours.tobytes() == theirs.tobytes()


def heic(image: Image.Image, **options) -> bytes:
    """A photo as iPhones write it."""
    pillow_heif.register_heif_opener()
    return encoded(image, "HEIF", quality=90, **options)


def rotated_heic() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return heic(marked_image(), exif=exif.tobytes())


PHOTOS = {
    "HEIC": lambda: heic(marked_image()),
    "rotated HEIC": rotated_heic,
    "HEIC with alpha": lambda: heic(marked_image().convert("RGBA").rotate(30)),
    "HEIC of the general brand": lambda: heic(marked_image()).replace(b"ftypheic", b"ftypmif1", 1),
    "AVIF": lambda: encoded(marked_image(), "AVIF"),
    "AVIF of the general brand": lambda: encoded(marked_image(), "AVIF").replace(b"ftypavif", b"ftypmif1", 1),
}


@pytest.mark.parametrize("name", PHOTOS)
def test_photos_of_phones_match_transformers(name, tmp_path):
    (tmp_path / "photo").write_bytes(PHOTOS[name]())
    path = str(tmp_path / "photo")
    ours, theirs = load_image(path), transformers_load_image(path)
    assert (ours.mode, ours.size) == ("RGB", theirs.size)
    assert ours.tobytes() == theirs.tobytes()
    assert ours.size == ((24, 40) if name == "rotated HEIC" else (40, 24))


def test_an_image_can_be_read_from_standard_input(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(FILES["grey"])))
    assert load_image("-").size == (40, 24)


def test_an_image_can_be_read_from_a_url():
    with serve({"/image.png": FILES["palette"]}) as address:
        assert load_image(f"{address}/image.png").tobytes() == marked_image().convert("P").convert("RGB").tobytes()


@pytest.mark.parametrize("path", ["/missing.png", "/text.html"])
def test_a_url_without_an_image_is_refused(path):
    with serve({"/text.html": b"<html>no image</html>"}) as address, pytest.raises((OSError, ValueError)):
        load_image(address + path)


@contextlib.contextmanager
def serve(files: dict[str, bytes]):
    """A web server on this machine."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path in files else 404)
            self.end_headers()
            self.wfile.write(files.get(self.path, b""))

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
