"""Measures this project beside transformers, on this machine, in one command.

    python bench.py --shape 1b

A checkpoint with random weights is made in a temporary folder. Each contender loads it and answers a question about an
image in a process of its own, several times and in turn, so that a machine that slows down slows down all of them. What
the machine could do at best is measured in the same run: how fast a product with a single row streams weights (a token
of an answer), and how fast one with 600 rows computes (a prompt with an image).

Nothing here judges: medians, and the least and most, are all there is.
"""

import argparse
import functools
import importlib.util
import json
import multiprocessing
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from llava import LlamaConfig, LlavaForConditionalGeneration, peak_memory
from quantize import Int8Linear
from vision import CLIPVisionConfig

sys.path.insert(0, str(Path(__file__).parent / "tests"))
from random_checkpoint import SMALL_TEXT, SMALL_VISION, make_checkpoint

CLIP_L = CLIPVisionConfig(1024, 4096, 24, 16, image_size=336, patch_size=14)
SHAPES = {
    "tiny": (SMALL_VISION, SMALL_TEXT),
    "1b": (CLIP_L, LlamaConfig("llama", 32064, 2048, 5632, 22, 32, 4, max_position_embeddings=4096)),
    "7b": (CLIP_L, LlamaConfig("llama", 32064, 4096, 11008, 32, 32, max_position_embeddings=4096)),
}
CONTENDERS = ["llava float32", "transformers float32", "llava int8", "transformers bfloat16"]
FIGURES = {
    "load": "loading, s",
    "memory": "peak memory, GB",
    "vision": "vision tower and projector, s",
    "first": "first token, s",
    "speed": "then, tokens/s",
}


def seconds(function: Callable, repeat: int = 1) -> float:
    """The median duration of a call."""
    durations = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        durations.append(time.perf_counter() - start)
    return statistics.median(durations)


@torch.no_grad()
def measure(contender: str, folder: str, tokens: int) -> dict[str, float]:
    """One contender's figures, in this process."""
    project, kind = contender.split()
    start = time.perf_counter()
    if project == "llava":
        quantize = kind if kind == "int8" else None
        model = LlavaForConditionalGeneration.from_pretrained(folder, "auto" if quantize else kind, quantize=quantize)
        config, options = model.config, {}
    else:
        import transformers

        model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, kind))
        config, options = model.config, {"do_sample": False}
    figures = {"load": time.perf_counter() - start}
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, side, side, generator=generator).to(model.dtype)
    image = torch.full((1, (side // patch) ** 2), 420)
    text = torch.randint(300, 400, (1, 24), generator=generator)
    prompt = torch.cat([text[:, :8], image, text[:, 8:]], dim=1)  # 600 tokens with CLIP-L/336

    def generate(count: int) -> None:
        inputs = {"pixel_values": pixels, "attention_mask": torch.ones_like(prompt), "max_new_tokens": count}
        assert model.generate(prompt, **inputs, **options).shape[1] == prompt.shape[1] + count, "the answer ended early"

    generate(2)  # the first call of all prepares kernels and reads mapped weights
    figures["vision"] = seconds(lambda: model.get_image_features(pixels))
    figures["first"] = seconds(lambda: generate(1))
    figures["speed"] = (tokens - 1) / (seconds(lambda: generate(tokens)) - figures["first"])
    figures["memory"] = float(re.match(r"[\d.]+", peak_memory(torch.device("cpu")))[0])
    return figures


@torch.no_grad()
def machine_limits() -> dict[str, tuple[float, float]]:
    """For each kind of weight: GB/s of weights through a product with one row, GFLOP/s of one with 600 rows."""
    exact = nn.Linear(4096, 11008, bias=False)
    small = Int8Linear(4096, 11008, bias=False)
    small.load_weight(exact.weight)
    limits = {}
    for kind in ("float32", "int8", "bfloat16"):
        layer = small if kind == "int8" else exact.to(getattr(torch, kind))
        x = torch.randn(600, 4096, dtype=torch.float32 if kind == "int8" else layer.weight.dtype)
        size, operations = layer.weight.nbytes, 2 * 600 * layer.weight.numel()
        one, many = (seconds(functools.partial(layer, rows), 9) for rows in (x[:1], x))
        limits[kind] = (size / one / 1e9, operations / many / 1e9)
    return limits


def main() -> None:
    """Makes the checkpoint, runs the contenders in turn and prints the tables."""
    parser = argparse.ArgumentParser(prog="bench.py", description="Measures this project beside transformers.")
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each contender (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=24, help="length of the answers (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file, too")
    parser.add_argument("--measure", nargs=2, metavar=("CONTENDER", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds < 1 or args.tokens < 2:
        parser.error("--rounds must be 1 or more, and --tokens 2 or more")
    if args.measure:
        print(json.dumps(measure(*args.measure, args.tokens)))
        return

    contenders = [name for name in CONTENDERS if name.startswith("llava") or importlib.util.find_spec("transformers")]
    results: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own, too: on Linux, a new process begins with the peak memory of the one that starts it.
        maker = multiprocessing.get_context("spawn").Process(
            target=make_checkpoint, args=(Path(folder), *SHAPES[args.shape])
        )
        maker.start()
        maker.join()
        for turn in range(args.rounds):
            for name in contenders:
                print(f"round {turn + 1} of {args.rounds}: {name}", file=sys.stderr)
                command = [sys.executable, __file__, "--measure", name, folder, "--tokens", str(args.tokens)]
                output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
                results[name].append(json.loads(output.splitlines()[-1]))
    limits = machine_limits()

    print(
        f"shape {args.shape}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}: median (least to most)\n"
    )
    print("| | " + " | ".join(contenders) + " |\n" + "| --- " * (len(contenders) + 1) + "|")
    for key, title in FIGURES.items():
        columns = [sorted(figures[key] for figures in results[name]) for name in contenders]
        cells = [f"{statistics.median(c):.3g} ({c[0]:.3g} to {c[-1]:.3g})" for c in columns]
        print(f"| {title} | " + " | ".join(cells) + " |")
    print("\n| product with a 4096 x 11008 matrix | float32 | int8 | bfloat16 |\n| --- | --- | --- | --- |")
    for i, title in enumerate(["one row, GB/s of weights", "600 rows, GFLOP/s"]):
        print(f"| {title} | " + " | ".join(f"{limit[i]:.3g}" for limit in limits.values()) + " |")
    if args.json:
        args.json.write_text(json.dumps({"results": results, "limits": limits}, indent=2) + "\n")


if __name__ == "__main__":
    main()
