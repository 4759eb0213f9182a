"""Builds the built-in model from scratch: data, pretraining, instruction tuning by train.py, scores.

    python tiny/build.py --folder BUILD        about two hours on two CPU cores

The build can be interrupted at any point. The same command resumes it and keeps the output of finished steps.
The trained model is in BUILD/model, its scores in BUILD/scores.md, and the loss curves in BUILD/curves.png.
"""

import argparse
import csv
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from extras.saving import copy_processor_files
from extras.terminal import command_line
from llava import LlavaForConditionalGeneration

SEED = 0
SCENES, TEST_SCENES = 32_000, 800
SEEDS = [SEED, SEED + 1]  # of the runs of stage instruct, each with its own data
TOWER_STEPS, DECODER_STEPS = 5000, 17_000
BESIDE = 3000  # decoder steps on one core while the other trains the tower
CURVES = {  # title: (CSV file, column)
    "tower: naming what is in each patch": ("tower.csv", "naming"),
    "decoder: conversations about ideal pictures": ("decoder.csv", "loss"),
    "instruct: conversations": ("instruct-0/loss.csv", "loss"),
}


def run(threads: int, *commands: list[str | Path | int]) -> None:
    """Runs commands in parallel, with `threads` threads each, and waits for all of them.

    If one of them fails, the others are stopped, and the build ends.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    start = time.perf_counter()
    running = []
    for command in commands:
        line = [sys.executable, *map(str, command)]
        print("build.py:", *line[1:], file=sys.stderr)
        running.append(subprocess.Popen(line, env=environment))
    while None in (codes := [process.poll() for process in running]) and not any(codes):
        time.sleep(0.5)
    for process in running:
        process.terminate()
    if any([process.wait() for process in running]):
        sys.exit("build.py: a step failed; fix the cause, then resume with the same command")
    print(f"build.py: {(time.perf_counter() - start) / 60:.1f} minutes", file=sys.stderr)


@torch.no_grad()
def average(folders: Sequence[Path], output: Path) -> None:
    """Writes a checkpoint with the means of other checkpoints' weights, in float16 ("model soup", arXiv 2203.05482)."""
    models = [LlavaForConditionalGeneration.from_pretrained(folder) for folder in folders]
    for parameters in zip(*(model.parameters() for model in models), strict=True):
        parameters[0].copy_(torch.stack(parameters).mean(0))
    models[0].half().save_pretrained(output)
    copy_processor_files(folders[0], output)


def draw_curves(folder: Path) -> None:
    """Plots the losses of all training runs, each as a moving average over up to 20 rows of its CSV file."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axes, (title, (file, column)) in zip(figure.subplots(1, 3), CURVES.items(), strict=True):
        with open(folder / file) as table:
            rows = list(csv.DictReader(table))
        steps, losses = ([float(row[name]) for row in rows] for name in ("step", column))
        size = max(1, min(20, len(rows) // 20))
        starts = range(0, len(rows) - size + 1, size)
        axes.plot([steps[i + size - 1] for i in starts], [sum(losses[i : i + size]) / size for i in starts], lw=2)
        axes.set(title=title, xlabel="step", ylabel="loss", yscale="log")
        axes.grid(alpha=0.3)
    figure.savefig(folder / "curves.png", dpi=80)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="build.py", description="Builds the built-in model from scratch.")
    parser.add_argument("--folder", required=True, type=Path, help="folder for all output, about 1 GB")
    args = parser.parse_args()
    folder, test, tiny = args.folder, args.folder / "test", ROOT / "tiny"

    def finished(name: str) -> bool:
        return (folder / name).exists()

    tokenizer = [tiny / "pretrain.py", "tokenizer", "--output", folder]
    # make_data.py writes the conversations last
    missing = [seed for seed in SEEDS if not finished(f"data-{seed}/conversations.json")]
    data = [tiny / "make_data.py", "train", "--scenes", SCENES, "--output"]
    run(1, tokenizer, *([*data, folder / f"data-{seed}", "--seed", seed] for seed in missing))
    tower = [tiny / "pretrain.py", "tower", "--output", folder, "--steps", TOWER_STEPS, "--seed", SEED]
    decoder = [tiny / "pretrain.py", "decoder", "--output", folder, "--steps", DECODER_STEPS]
    decoder += ["--batch", 16, "--seed", SEED]
    run(1, tower, [*decoder, "--until", BESIDE])
    run(2, decoder)
    if not finished("base/preprocessor_config.json"):
        run(1, [tiny / "pretrain.py", "join", "--output", folder])
    instruct = [ROOT / "train.py", "--stage", "instruct", "--model", folder / "base", "--system", "", "--device", "cpu"]
    instruct += ["--epochs", 1, "--batch", 16, "--micro-batch", 8, "--learning-rate", 1e-3, "--save-every", 250]
    runs = []
    for seed in SEEDS:
        if not finished(f"instruct-{seed}/loss.png"):
            images, output = folder / f"data-{seed}", folder / f"instruct-{seed}"
            files = ["--data", images / "conversations.json", "--images", images, "--output", output]
            runs.append([*instruct, *files, "--seed", seed])
    run(1, *runs)
    if not finished("model/preprocessor_config.json"):
        average([folder / f"instruct-{seed}" for seed in SEEDS], folder / "model")
    if not finished("test/visitors later.jsonl"):  # the last file that make_data.py writes
        run(1, [tiny / "make_data.py", "test", "--output", test, "--scenes", TEST_SCENES, "--seed", SEED])
    run(2, [tiny / "score.py", "--model", folder / "model", "--test", test, "--out", folder / "scores.md"])
    draw_curves(folder)


if __name__ == "__main__":
    command_line("build.py", main, "interrupted; the same command resumes the build")
