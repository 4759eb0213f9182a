"""Shared by the tests of training and scoring: a folder with a small checkpoint, drawn pictures and data."""

import itertools
import json
import sys
from pathlib import Path

import pytest
from toy_data import COLOURS, draw_disc, entry, make_tiny_checkpoint

import train

P = 4  # tokens of an image: 28 x 28 pixels in patches of 14


def draw_pictures(folder: Path) -> None:
    """Writes red.png, green.png, ...: discs of that colour on white. No picture is square."""
    folder.mkdir(exist_ok=True)
    for i, colour in enumerate(COLOURS):
        draw_disc(folder / f"{colour}.png", colour, (40 + 3 * i, 60 - 2 * i), 5, 5)


CAPTIONS = [
    entry(f"{c}.png", "Describe it.\n<image>", "a disc " + "that is " * (i % 3) + c) for i, c in enumerate(COLOURS)
]
COLOUR_QUESTIONS = [entry(f"{c}.png", "<image>\nWhich color?", f"It is {c}.") for c in COLOURS]
# With pictures and without, short and long answers, one turn and two: 8 + 5 entries
MIXED = [
    *COLOUR_QUESTIONS[:5],
    *[entry(f"{c}.png", "<image>\nWhich color?", c, "And what shape?", "A round one, " * 4) for c in COLOURS[5:]],
    *[entry(None, "How many?", "one " * (i + 1)) for i in range(5)],
]


class Workbench:
    """A folder with a checkpoint and pictures, in which the commands run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_tiny_checkpoint(folder / "base")
        draw_pictures(folder / "pictures")

    def arguments(self, output: str, data: list[dict], *options: object, stage: str = "instruct") -> list[str]:
        """Writes `data` to a file and returns the command line that trains on it."""
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

    def stop(self, output: str, step: int, *options: object) -> Path:
        """Runs train.py on MIXED until it is interrupted in this step, after the last save; returns the folder."""
        real, numbers = train.train_step, itertools.count(1)

        def stopping(*args: object) -> tuple[float, float]:
            if next(numbers) == step:
                raise KeyboardInterrupt
            return real(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "train_step", stopping)
            with pytest.raises(SystemExit, match="interrupted"):
                self.train(output, MIXED, *options)
        return self.folder / output


def losses(folder: Path) -> list[float]:
    """The column of losses in loss.csv."""
    return [float(line.split(",")[1]) for line in (folder / "loss.csv").read_text().splitlines()[1:]]
