"""What the tests of training and scoring share: a checkpoint small enough to train, and drawn pictures for it."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from random_checkpoint import randomize, write_processor_files

import train
from llava import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from vision import CLIPVisionConfig

P = 4  # tokens of an image: 28 x 28 pixels in patches of 14
COLOURS = ["red", "green", "blue", "black", "orange", "purple", "brown", "gray"]


def make_tiny_checkpoint(folder: Path, seed: int = 0) -> None:
    """Writes a checkpoint of 0.2 million parameters with grouped key heads."""
    write_processor_files(folder, image_size=28)
    vision = CLIPVisionConfig(32, 64, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14)
    text = LlamaConfig(
        vocab_size=448,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision, text, image_token_id=420, pad_token_id=421))
    randomize(model, seed)
    model.save_pretrained(folder)


def draw_pictures(folder: Path) -> None:
    """Writes red.png, green.png, ...: a disc of that colour on white, none of them square."""
    folder.mkdir(exist_ok=True)
    for i, colour in enumerate(COLOURS):
        picture = Image.new("RGB", (40 + 3 * i, 60 - 2 * i), "white")
        ImageDraw.Draw(picture).ellipse((5, 5, 35, 35), fill=colour)
        picture.save(folder / f"{colour}.png")


def entry(image: str | None, *texts: str) -> dict:
    """An entry of a data file: an image and what human and gpt say in turns."""
    roles = ["human", "gpt"] * len(texts)
    turns = [{"from": role, "value": text} for role, text in zip(roles, texts, strict=False)]
    return {"id": "x", "conversations": turns} | ({"image": image} if image else {})


CAPTIONS = [
    entry(f"{c}.png", "Describe it.\n<image>", "a disc " + "that is " * (i % 3) + c) for i, c in enumerate(COLOURS)
]
COLOUR_QUESTIONS = [entry(f"{c}.png", "<image>\nWhich color?", f"It is {c}.") for c in COLOURS]
# Pictures and text only, short and long answers, one turn and two: 8 + 5 entries
MIXED = [
    *COLOUR_QUESTIONS[:5],
    *[entry(f"{c}.png", "<image>\nWhich color?", c, "And what shape?", "A round one, " * 4) for c in COLOURS[5:]],
    *[entry(None, "How many?", "one " * (i + 1)) for i in range(5)],
]


class Workbench:
    """A folder with a checkpoint and pictures, in which the command line is run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_tiny_checkpoint(folder / "base")
        draw_pictures(folder / "pictures")

    def arguments(self, output: str, data: list[dict], *options: object, stage: str = "instruct") -> list[str]:
        """The command line that trains on `data`; writes the data file."""
        data_file = self.folder / f"{output}.json"
        data_file.write_text(json.dumps(data))
        paths = {"model": "base", "data": data_file.name, "images": "pictures", "output": output}
        arguments = ["--stage", stage, "--device", "cpu"]
        for name, path in paths.items():
            arguments += [f"--{name}", str(self.folder / path)]
        return [*arguments, *map(str, options)]

    def train(self, output: str, data: list[dict], *options: object, stage: str = "instruct") -> Path:
        """Runs train.py in this process; returns the output folder."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["train.py", *self.arguments(output, data, *options, stage=stage)])
            train.main()
        return self.folder / output


def losses(folder: Path) -> list[float]:
    """The column of losses in loss.csv."""
    return [float(line.split(",")[1]) for line in (folder / "loss.csv").read_text().splitlines()[1:]]
