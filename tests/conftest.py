"""What the tests share: pairs of models with the same weights, ours and transformers', and the table of errors."""

import io
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # several test processes, and the commands they start, share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a download

import transformers
from pretrain import train_tokenizer
from random_checkpoint import SENTENCES, randomize, write_processor_files

import llava

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 42,
    "patch_size": 14,
}
TEXT = {
    "model_type": "llama",
    "vocab_size": 448,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}
LLAVA = {"image_token_index": 420, "pad_token_id": 421}
PATCHES = 9  # of an image of 42 pixels


def make_judge(text: dict | None = None, vision: dict | None = None, seed: int = 0, **config):
    """A transformers model with random weights; the arguments change the small shapes above."""
    config = transformers.LlavaConfig(
        vision_config=VISION | (vision or {}), text_config=TEXT | (text or {}), **LLAVA | config
    )
    judge = transformers.LlavaForConditionalGeneration(config).eval()
    randomize(judge, seed)
    judge.tie_weights()
    return judge


@pytest.fixture
def make_pair(tmp_path):
    """(ours, theirs): transformers' model, saved by transformers and loaded by us; arguments as for `make_judge`."""

    def make(**config):
        judge = make_judge(**config)
        judge.save_pretrained(tmp_path)
        return llava.LlavaForConditionalGeneration.from_pretrained(tmp_path), judge

    return make


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A whole checkpoint folder: weights by transformers, tokenizer and image processor."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_judge().save_pretrained(folder)
    write_processor_files(folder, image_size=42)
    return folder


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory) -> Path:
    """A SentencePiece model with Llama's settings, of 420 pieces."""
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    file.write_bytes(train_tokenizer(SENTENCES, vocab_size=420))
    return file


@pytest.fixture
def prompt():
    """Makes inputs: `prompt(images=2, length=30)` -> input_ids (1, T) and pixel_values (N, 3, 42, 42)."""

    def make(images: int = 1, length: int = 20, seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 400, (1, length), generator=generator)
        parts = list(ids.split(max(1, length // (images + 1)), dim=1))
        for place in range(images):
            parts.insert(2 * place + 1, torch.full((1, PATCHES), LLAVA["image_token_index"]))
        inputs = {"input_ids": torch.cat(parts, dim=1)}
        if images:
            inputs["pixel_values"] = torch.randn(images, 3, 42, 42, generator=generator)
        return inputs

    return make


def random_image(rng: np.random.Generator, size: tuple[int, int] | None = None) -> Image.Image:
    """Coloured noise of several scales, so that resizing it matters."""
    width, height = size or rng.integers(10, 900, 2)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return Image.blend(coarse, noise, 0.3)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# Files whose tests start processes, train, or execute notebooks. All others are quick.
SLOW = """bad_command_lines bad_images bad_training bench command_line docs explorer_model explorer_page fuzz load
    lora_training notebooks quantize tiny train"""


def pytest_collection_modifyitems(items):
    slow = {f"test_{name}" for name in SLOW.split()}
    for item in items:
        if item.path.stem not in slow:
            item.add_marker(pytest.mark.quick)


ERRORS = pytest.StashKey[dict[str, tuple[float, float]]]()


@pytest.fixture
def check(request):
    """`check(name, ours, theirs)` asserts that the relative error ||ours - theirs|| / ||theirs|| is within its limit.

    The largest error under each name is printed in a table after the tests.
    """
    errors = request.config.stash.setdefault(ERRORS, {})

    def relative_error(name: str, ours: torch.Tensor, theirs: torch.Tensor, limit: float = 1e-5) -> None:
        assert ours.shape == theirs.shape
        error = ((ours - theirs).double().norm() / theirs.double().norm()).item()
        keep_largest(errors, {name: (error, limit)})
        assert error <= limit, f"{name}: relative error {error:.2e} is above {limit:.0e}"

    return relative_error


def keep_largest(errors: dict, more: dict) -> None:
    """Adds {name: (error, limit)} to a table, which keeps the largest error under each name."""
    for name, (error, limit) in more.items():
        errors[name] = (max(error, errors.get(name, (0.0, limit))[0]), limit)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist hands its errors to the one that reports
        session.config.workeroutput["errors"] = session.config.stash.get(ERRORS, {})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    keep_largest(node.config.stash.setdefault(ERRORS, {}), getattr(node, "workeroutput", {}).get("errors", {}))


def pytest_terminal_summary(terminalreporter, config):
    errors = config.stash.get(ERRORS, {})
    if errors:
        terminalreporter.write_sep(
            "-", "relative error against the reference, which is transformers unless it is named"
        )
        for name, (error, limit) in sorted(errors.items()):
            terminalreporter.write_line(f"{name:<60} {error:8.1e}   (limit {limit:.0e})")
