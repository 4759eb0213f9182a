"""Ablations: short trainings of the full recipe and of variants with one part changed or removed.

    python tiny/ablate.py --folder BUILD        after build.py; about half an hour on two CPU cores

Each variant is trained with stage align on all captions, and with stage instruct on the first lists of facts and the
first conversations. Then it answers test questions. Each has one seed, so differences of a few points mean nothing. An
interrupted run is resumed by the same command. The table is written to BUILD/ablations.md.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from build import SEED
from pretrain import initialised
from score import percent

import evaluate
import train
from extras.activations import ACTIVATIONS
from extras.benchmarks import read_lines
from extras.files import write_json
from llava import LlavaForConditionalGeneration
from vision import CLIPVisionModel

LISTS, CONVERSATIONS = 10_000, 5_000  # of 36,000 and 216,000
CPU = ["--device", "cpu"]
UNALIGNED = "no alignment stage"
FAMILIES = ["colour", "shape", "size", "position"]
ACTIVATIONS["linear"] = nn.Identity()  # without an activation, the two layers are one linear map


def configure(folder: Path, **changes: object) -> None:
    """Changes entries of config.json."""
    write_json(folder / "config.json", json.loads((folder / "config.json").read_text()) | changes)


def forget_tower(folder: Path) -> None:
    """Replaces the vision tower with an untrained one."""
    torch.manual_seed(SEED)
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    model.vision_tower = initialised(CLIPVisionModel(model.config.vision_config))
    model.save_pretrained(folder)


VARIANTS: dict[str, Callable[[Path], object]] = {  # each changes a copy of the initial checkpoint
    "the recipe": lambda folder: None,
    UNALIGNED: lambda folder: None,
    "last layer instead of the last but one": partial(configure, vision_feature_layer=-1),
    "linear projector instead of an MLP": partial(configure, projector_hidden_act="linear"),
    "vision tower untrained": forget_tower,
}


def call(main: Callable[[], None], *arguments: str | Path | int | float) -> None:
    """Runs one of the project's commands in this process, since only here does ACTIVATIONS have "linear"."""
    sys.argv = [main.__module__, *map(str, arguments)]
    main()


def train_stage(stage: str, source: Path, target: Path, data: Path, images: Path, *options: int | float | str) -> None:
    """Runs a stage of train.py, unless its output is complete."""
    if not (target / "loss.png").exists():
        where: list[str | Path] = ["--model", source, "--output", target, "--data", data, "--images", images]
        call(train.main, "--stage", stage, *where, "--system", "", "--seed", SEED, *CPU, "--micro-batch", 8, *options)


def last_loss(folder: Path) -> str:
    """The mean loss per token of the last 50 steps."""
    losses = [float(line.split(",")[1]) for line in (folder / "loss.csv").read_text().splitlines()[1:][-50:]]
    return f"{sum(losses) / len(losses):.3f}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="ablate.py", description="Trains variants with one part of the recipe changed."
    )
    parser.add_argument("--folder", required=True, type=Path, help="folder written by build.py")
    folder = parser.parse_args().folder
    data, test = folder / "data", folder / "test"
    for name, number in [("words", LISTS), ("conversations", CONVERSATIONS)]:
        write_json(folder / f"first_{name}.json", json.loads((data / f"{name}.json").read_text())[:number])
    rows = [f"| {' | '.join(['variant', 'loss, align', 'loss, words', 'loss, conversations', *FAMILIES])} |"]
    rows.append("| --- " * 8 + "|")
    for i, (name, change) in enumerate(VARIANTS.items()):
        work = folder / "ablations" / str(i)
        base, aligned, words, model = (work / stage for stage in ("base", "aligned", "words", "model"))
        if not base.exists():
            shutil.copytree(folder / "base", work / "copy", dirs_exist_ok=True)
            change(work / "copy")
            (work / "copy").rename(base)
        if name == UNALIGNED:
            aligned, losses = base, ["none"]
        else:
            train_stage("align", base, aligned, data / "captions.json", data, "--batch", 32, "--learning-rate", 2e-3)
            losses = [last_loss(aligned)]
        first = folder / "first_words.json", folder / "first_conversations.json"
        train_stage("instruct", aligned, words, first[0], data, "--batch", 16, "--learning-rate", 2e-3)
        train_stage("instruct", words, model, first[1], data, "--batch", 16, "--learning-rate", 1.5e-3)
        scores = []
        for family in FAMILIES:
            questions, answers = test / f"{family}.jsonl", work / f"{family}.jsonl"
            asked = [
                "--model",
                model,
                "--questions",
                questions,
                "--images",
                test,
                "--out",
                answers,
                "--short",
            ]
            call(evaluate.main, *asked, "--metric", "exact", "--system", "", "--batch", 64, *CPU)
            lines = read_lines(questions)
            texts = {line["question_id"]: line["text"] for line in read_lines(answers)}
            scores.append(f"{percent([texts[line['question_id']] for line in lines], lines):.1f}")
        rows.append(f"| {' | '.join([name, *losses, last_loss(words), last_loss(model), *scores])} |")
    table = "\n".join(rows) + "\n"
    (folder / "ablations.md").write_text(table)
    print(table, end="")


if __name__ == "__main__":
    main()
