"""Broken, hostile or unusual images from files, URLs and streams load within bounds or are refused by name."""

import contextlib
import io
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import pytest
from conftest import encoded, random_image
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

import vision
from extras import images
from extras.images import load_image
from vision import LlavaImageProcessor

PHOTO = encoded(random_image(np.random.default_rng(0), (90, 60)), "JPEG")
PNG = encoded(random_image(np.random.default_rng(0), (90, 60)), "PNG")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run showpage\n%%EOF\n"


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims this size but has only a few bytes of pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(99)))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in [*chunks, (b"IEND", b"")]
    )


def with_exif(exif: bytes) -> bytes:
    return encoded(Image.new("RGB", (9, 6)), "JPEG", exif=b"Exif\0\0" + exif)


BROKEN = {
    "empty": (b"", "is not an image that Pillow can read; try JPEG or PNG"),
    "text": (b"What is shown here?", "is not an image that Pillow can read"),
    "HTML": (b"<!DOCTYPE html><html></html>", "is not an image that Pillow can read"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", "is not an image that Pillow can read"),
    "half a JPEG": (PHOTO[: len(PHOTO) // 2], "is a damaged image: image file is truncated"),
    "half a PNG": (PNG[: len(PNG) // 2], "is a damaged image: image file is truncated"),
    "only a JPEG header": (PHOTO[:20], "is a damaged image|is not an image"),
    "only a PNG signature": (PNG[:8], "is a damaged image|is not an image"),
    "decompression bomb": (png_of(50_000, 50_000), "has too many pixels"),
    "fewer pixels than the header says": (png_of(5000, 5000), "is a damaged image"),
    "EPS, which needs Ghostscript": (EPS, "is not an image that Pillow can read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_file_is_refused_by_name(name, tmp_path):
    content, sentence = BROKEN[name]
    (tmp_path / "photo.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=f"photo.jpg {sentence}"):
        load_image(str(tmp_path / "photo.jpg"))


@pytest.mark.parametrize(
    ("name", "error", "sentence"),
    [
        ("gone.jpg", FileNotFoundError, "gone.jpg"),
        (".", IsADirectoryError, "Is a directory"),
        ("a\0b", ValueError, "is not a path"),
        ("x" * 5000, OSError, "File name too long"),
        ("file:///etc/passwd", FileNotFoundError, "file:///etc/passwd"),
    ],
)
def test_a_path_without_a_file_is_refused(name, error, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=sentence):
        load_image(name)


UNUSUAL = {
    "1 x 1 pixel": encoded(Image.new("RGB", (1, 1)), "PNG"),
    "palette with transparency": encoded(Image.new("P", (9, 6)), "PNG", transparency=b"\0\x80"),
    "nonsense in EXIF": with_exif(b"nonsense"),
    "truncated EXIF": with_exif(b"II*\0\x08\0\0\0\x05\0\x12\x01"),
    "EXIF offset past the end": with_exif(b"II*\0\xff\xff\xff\x7f"),
    "undefined EXIF orientation": with_exif(b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0"),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_an_unusual_file_still_loads(name, tmp_path):
    (tmp_path / "unusual").write_bytes(UNUSUAL[name])
    for pad in (False, True):
        pixels = LlavaImageProcessor(size=42, crop_size=42, do_pad=pad)(load_image(str(tmp_path / "unusual")))
        assert pixels.shape == (1, 3, 42, 42)
        assert pixels.isfinite().all()


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (1, 80_000)])
def test_cropping_refuses_an_image_that_is_too_thin(size):
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels is too long and thin: crop it, or try"):
        LlavaImageProcessor(size=336, crop_size=336)(Image.new("RGB", size))


def test_padding_refuses_a_thin_image_that_would_take_minutes():
    with pytest.raises(ValueError, match=r"1 x 60000 pixels is too long and thin: crop it$"):
        LlavaImageProcessor(size=336, crop_size=336, do_pad=True)(Image.new("RGB", (1, 60_000)))


@pytest.mark.parametrize("size", [(700, 90), (90, 700), (333, 334), (64, 64), (3, 900), (900, 3)])
def test_padding_in_strips_matches_padding_at_once(size, monkeypatch):
    monkeypatch.setattr(vision, "STRIP_PIXELS", 10_000)
    settings = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}, "do_pad": True}
    image = random_image(np.random.default_rng(3), size)
    theirs = LlavaImageProcessorPil(**settings)(image, return_tensors="pt").pixel_values
    assert (LlavaImageProcessor(**settings)(image) - theirs).abs().max() <= 1e-6


MEASURE = """
import pathlib, re, sys, time
sys.path.insert(0, {root!r})
from extras.images import load_image
from vision import LlavaImageProcessor
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
before, start = peak(), time.perf_counter()
LlavaImageProcessor(size=336, crop_size=336, do_pad={pad})(load_image({path!r}))
print(peak() - before, time.perf_counter() - start)
"""
LARGE = {
    "30 megapixels": ((6720, 4480), False, 500),
    "30 megapixels, padded": ((6720, 4480), True, 700),
    "panorama, padded": ((16_000, 3600), True, 900),
    "screenshot of a long page, padded": ((1080, 20_000), True, 400),
    "60000 x 1, padded": ((60_000, 1), True, 400),
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
@pytest.mark.parametrize("name", LARGE)
def test_memory_and_time_of_large_images_are_bounded(name, tmp_path, request):
    size, pad, megabytes = LARGE[name]
    path = tmp_path / "large.jpg"
    Image.radial_gradient("L").resize(size).convert("RGB").save(path)
    script = MEASURE.format(root=str(request.config.rootpath), pad=pad, path=str(path))
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    kilobytes, seconds = map(float, output.split())
    print(f"{name}: {kilobytes / 1e3:.0f} MB, {seconds:.1f} s")
    assert kilobytes < 1e3 * megabytes
    assert seconds < 10


# HEIC


@pytest.fixture(scope="module")
def heic() -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    return encoded(random_image(np.random.default_rng(0), (90, 60)), "HEIF")


def test_heic_without_its_package_is_refused(heic, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "photo.heic").write_bytes(heic)
    with pytest.raises(ValueError, match=r"photo.heic is a HEIC image; to read it, run: pip install pillow-heif"):
        load_image(str(tmp_path / "photo.heic"))


def test_avif_without_pillows_support_is_refused(tmp_path, monkeypatch):
    (tmp_path / "photo.avif").write_bytes(encoded(Image.new("RGB", (9, 6)), "AVIF"))
    monkeypatch.setattr(images.features, "check", lambda name: False)
    with pytest.raises(ValueError, match=r"photo.avif is an AVIF image; to read it, run: pip install --upgrade pillow"):
        load_image(str(tmp_path / "photo.avif"))


def with_size(heic: bytes, width: int, height: int) -> bytes:
    """The same image with another size in its header, but cropped to its own size, the one that Pillow checks."""
    place = heic.index(b"ispe") + 8
    return heic[:place] + struct.pack(">II", width, height) + heic[place + 8 :]


DAMAGES = {
    "header only": lambda heic: heic[:32],
    "half": lambda heic: heic[: len(heic) // 2],
    "a brand and text": lambda heic: b"\0\0\0\x18ftypheic" + b"x" * 100,
    "a size that is too small": lambda heic: with_size(heic, 9, 6),
    "a size that is too large": lambda heic: with_size(heic, 9_000, 6_000),
    "a bomb": lambda heic: with_size(heic, 20_000, 20_000),
    "a thousand boxes": lambda heic: heic[:28] + b"\0\0\0\x08free" * 1000 + heic[28:],
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_heic_file_is_refused(name, heic, tmp_path):
    (tmp_path / "photo.heic").write_bytes(DAMAGES[name](heic))
    sentence = "has too many pixels" if name == "a bomb" else "(is a damaged image|is not an? .*image)"
    start = time.perf_counter()
    with pytest.raises(ValueError, match=f"photo.heic {sentence}"):
        load_image(str(tmp_path / "photo.heic"))
    assert time.perf_counter() - start < 5


def test_a_heic_file_of_any_damage_loads_or_is_refused(heic, tmp_path):
    rng = np.random.default_rng(0)
    for _ in range(100):
        damaged = bytearray(heic)
        for place in rng.integers(0, rng.choice([400, len(heic)]), 4):
            damaged[place] = rng.integers(256)
        (tmp_path / "photo.heic").write_bytes(damaged)
        with contextlib.suppress(ValueError):
            load_image(str(tmp_path / "photo.heic"))


def test_a_large_heic_file_is_refused(heic, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_STREAM", 1000)
    (tmp_path / "photo.heic").write_bytes(heic)
    with pytest.raises(ValueError, match=r"photo.heic is over 0 MiB, too large for a HEIC image"):
        load_image(str(tmp_path / "photo.heic"))


# Standard input


@pytest.mark.parametrize(
    ("stdin", "sentence"),
    [
        (None, "standard input is closed, so no image can be read from it"),
        (io.TextIOWrapper(io.BytesIO(b"")), "standard input is not an image"),
        (io.TextIOWrapper(io.BytesIO(PHOTO[:500])), "standard input is a damaged image"),
        (io.TextIOWrapper(io.BytesIO(bytes(1001))), "standard input is over 0 MiB, too large for an image"),
    ],
    ids=["closed", "empty", "truncated", "too large"],
)
def test_standard_input_without_an_image_is_refused(stdin, sentence, monkeypatch):
    monkeypatch.setattr("sys.stdin", stdin)
    monkeypatch.setattr(images, "MAX_STREAM", 1000)
    with pytest.raises((OSError, ValueError), match=sentence):
        load_image("-")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_an_image_can_be_read_from_a_named_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(PHOTO,), daemon=True).start()
    assert load_image(str(tmp_path / "pipe")).size == (90, 60)


# URLs


@contextlib.contextmanager
def answers(*parts: bytes, pause: float = 0.0):
    """A server that sends these bytes, with a pause after each part; gives its URL."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = threading.Event()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while not done.is_set():
                    connection, _ = server.accept()
                    with connection, contextlib.suppress(OSError):
                        connection.recv(10_000)
                        for part in parts:
                            connection.sendall(part)
                            time.sleep(pause)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/photo.jpg"
        done.set()


def answer(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.0 {status}", *headers, "", ""]).encode() + body


URLS = {
    "refused": ([answer(b"", "403 Forbidden")], "could not be downloaded: HTTP Error 403"),
    "not found": ([answer(b"", "404 Not Found")], "could not be downloaded: HTTP Error 404"),
    "redirects to a file": ([answer(b"", "302 Found", "Location: file:///etc/passwd")], "could not be downloaded"),
    "redirects to itself": ([answer(b"", "302 Found", "Location: /photo.jpg")], "could not be downloaded"),
    "not an image": ([answer(b"<html></html>")], "is not an image that Pillow can read"),
    "truncated": ([answer(PHOTO[:300])], "is a damaged image"),
    "shorter than Content-Length": ([answer(PHOTO[:300], "200 OK", "Content-Length: 9999")], "is a damaged image"),
    "not HTTP": ([b"SSH-2.0-OpenSSH\r\n"], "could not be downloaded"),
    "no response": ([], "could not be downloaded"),
    "endless": ([answer(b"x" * 10**6)] + [b"x" * 10**6] * 10, "could not be downloaded: it is over 1 MiB"),
    "slow body": ([answer(b"x"), *[b"x"] * 99], "could not be downloaded: it is .* or takes over 1 seconds"),
    "slow headers": (
        [b"HTTP/1.0 200 OK\r\n", *[b"X: y\r\n"] * 99],
        "could not be downloaded: it is .* or takes over 1 seconds",
    ),
}


@pytest.mark.parametrize("name", URLS)
def test_a_url_without_an_image_is_refused_in_time(name, monkeypatch):
    parts, sentence = URLS[name]
    monkeypatch.setattr(images, "DOWNLOAD_SECONDS", 1)
    monkeypatch.setattr(images, "MAX_STREAM", 2**20)
    start = time.perf_counter()
    with (
        answers(*parts, pause=0.1 if "slow" in name else 0) as url,
        pytest.raises((OSError, ValueError), match=sentence),
    ):
        load_image(url)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("url", ["http://", "http://[", "http://127.0.0.1:1/x.png", "https://x:port/", "http://a b/\n"])
def test_an_invalid_url_is_refused(url):
    with pytest.raises(OSError, match="could not be downloaded"):
        load_image(url)
