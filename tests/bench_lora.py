"""Measures what fine-tuning costs in memory and time, here and with PEFT on transformers, on this machine.

    python tests/bench_lora.py --shape 1b

As bench.py does, it writes a checkpoint with random weights to a temporary folder, and each contender trains on it in a
process of its own; they take turns. All of them get the same work: steps of AdamW on micro-batches of the same samples
of one image and a text. The first step of each process is not timed. Peak memory is that of the whole process.

PEFT's contender is set up as its documentation shows: base in bfloat16, LoRA in the same layers, projector in
`modules_to_save`, and gradient checkpointing by transformers.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from random_checkpoint import write_large_checkpoint

import train
from bench import IMAGE_TOKEN_ID, SHAPES, meta_model, print_table
from extras.files import write_json
from extras.limits import describe_machine
from extras.lora_training import (
    DEFAULTS,
    LEARNING_RATE,
    PROJECTOR,
    TARGETS,
    add_lora,
    allocate_state,
    load_frozen,
    parameter_groups,
)
from extras.machine import free_memory, peak_memory
from extras.terminal import command_line
from llava import LlavaForConditionalGeneration
from load import weight_bytes
from processor import Inputs

KINDS = {  # what is trained -> options of train.py; None: PEFT
    "full, float32": {"lora": None},
    "LoRA, bfloat16": {"dtype": "bfloat16"},
    "LoRA, int8": {"dtype": "bfloat16", "quantize": "int8"},
    "LoRA, int4": {"dtype": "bfloat16", "quantize": "int4"},
    "PEFT, bfloat16": None,
}
CHECKPOINTING = ", checkpointing"
CONTENDERS = [kind + suffix for kind, suffix in itertools.product(KINDS, ["", CHECKPOINTING])]
MEMORY, SPEED = "peak memory, GB", "samples/s"
WRITER = "writer"
ANSWER = 64  # tokens that are learned in each sample

Step = Callable[[Inputs], float]  # one optimiser step on a micro-batch; returns the loss


def samples(shape: str, args: argparse.Namespace) -> Inputs:
    """A micro-batch: an image, and a text of which the last tokens are the answer."""
    vision, _ = SHAPES[shape]
    generator, patches = torch.Generator().manual_seed(0), (vision.image_size // vision.patch_size) ** 2
    ids = torch.randint(300, 400, (args.micro_batch, patches + args.text), generator=generator)
    ids[:, 8 : 8 + patches] = IMAGE_TOKEN_ID
    answer = torch.zeros_like(ids, dtype=torch.bool)
    answer[:, -ANSWER:] = True
    pixels = torch.randn(args.micro_batch, 3, vision.image_size, vision.image_size, generator=generator)
    return Inputs(input_ids=ids, is_answer=answer, pixel_values=pixels)


def ours(folder: str, options: dict, checkpointing: bool, rank: int) -> Step:
    """What train.py does in a step."""
    settings = DEFAULTS | {"lora": rank, "lora_alpha": 2.0 * rank, "model": folder}
    settings |= {"seed": 0, "learning_rate": LEARNING_RATE}
    args, device = argparse.Namespace(**settings | options), torch.device("cpu")
    if args.lora:
        model = load_frozen(LlavaForConditionalGeneration, args, device)
        add_lora(model, args)
    else:
        model = LlavaForConditionalGeneration.from_pretrained(folder, torch.float32)
        train.freeze(model, "instruct")
    if checkpointing:
        train.checkpoint_layers(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, args), lr=1e-6)
    if args.lora:
        allocate_state(optimizer)

    def step(inputs: Inputs) -> float:
        return train.train_step(model, optimizer, [inputs], int(inputs.is_answer.sum()), 1.0, bool(args.lora))[0]

    return step


def peft_step(folder: str, checkpointing: bool, rank: int) -> Step:
    """The same work by PEFT and transformers."""
    import peft
    from transformers import LlavaForConditionalGeneration as TheirModel

    model = TheirModel.from_pretrained(folder, dtype=torch.bfloat16)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    targets = rf".*language_model.*\.({'|'.join(TARGETS)})"
    config = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.05, "modules_to_save": [PROJECTOR]}
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, **config)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)

    def step(inputs: Inputs) -> float:
        labels = inputs.input_ids.where(inputs.is_answer, -100)
        pixels = inputs.pixel_values.bfloat16()
        loss = model(input_ids=inputs.input_ids, pixel_values=pixels, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def measure(name: str, folder: str, args: argparse.Namespace) -> dict[str, float]:
    """The figures of one contender."""
    if name == WRITER:
        write_large_checkpoint(Path(folder), meta_model(args.shape))
        return {"written": 1.0}
    options, checkpointing = KINDS[name.removesuffix(CHECKPOINTING)], name.endswith(CHECKPOINTING)
    if options is None:
        step = peft_step(folder, checkpointing, args.rank)
    else:
        step = ours(folder, options, checkpointing, args.rank)
    inputs, times = samples(args.shape, args), []
    for _ in range(args.steps + 1):
        start = time.perf_counter()
        loss = step(Inputs(inputs))
        times.append(time.perf_counter() - start)
    figures = {SPEED: args.micro_batch / statistics.median(times[1:]), "loss": loss}
    peak = peak_memory(torch.device("cpu"))
    return figures | ({} if peak == "unknown" else {MEMORY: float(peak.removesuffix(" GB"))})


def needed(name: str, shape: str) -> int:
    """The bytes of the weights, and of gradients and AdamW's averages for full training: less than a run takes."""
    options = KINDS[name.removesuffix(CHECKPOINTING)] or {"dtype": "bfloat16"}
    size = weight_bytes(meta_model(shape, options.get("dtype", "float32"), options.get("quantize")))
    if "dtype" in options:
        return size
    decoder = meta_model(shape).language_model
    return size + 3 * weight_bytes(decoder)


def measure_alone(name: str, folder: str, args: argparse.Namespace) -> dict[str, float]:
    """Runs `measure` in a process of its own; no figures if that fails."""
    command = [sys.executable, __file__, "--measure", json.dumps([name, folder, vars(args)], default=str)]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if child.returncode == 0:
        return json.loads(child.stdout.splitlines()[-1])
    print(f"bench_lora.py: {name} has no figures: exit code {child.returncode}", file=sys.stderr)
    return {}


def run(args: argparse.Namespace) -> None:
    """Writes the checkpoint, measures the contenders in turns and prints the table."""
    free, contenders = free_memory(torch.device("cpu")), []
    for name in args.contenders or CONTENDERS:
        if free is not None and (size := needed(name, args.shape)) > free:
            sizes = f"{size / 1e9:.1f} GB and more, {free / 1e9:.1f} GB are free"
            print(f"bench_lora.py: {name} is left out: it needs {sizes}", file=sys.stderr)
        else:
            contenders.append(name)
    title = f"shape {args.shape}, rank {args.rank}, micro-batch {args.micro_batch}, {args.text} tokens of text, "
    title += f"{args.steps} steps, {args.rounds} rounds: medians (minimum to maximum)"
    print(f"{describe_machine()}\n{title}", flush=True)
    results: dict[str, dict[str, list[float]]] = {name: {} for name in contenders}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if not measure_alone(WRITER, folder, args):
            raise OSError("the weights could not be written")
        for turn, name in itertools.product(range(args.rounds), contenders):
            print(f"round {turn + 1} of {args.rounds}: {name}", file=sys.stderr)
            for figure, value in measure_alone(name, folder, args).items():
                results[name].setdefault(figure, []).append(value)
    rows = {}
    for name, figures in results.items():
        rows[name] = {
            figure: f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"
            for figure, values in figures.items()
        }
    print_table("Fine-tuning:", rows)
    if args.json:
        write_json(args.json, {"machine": describe_machine(), "command": sys.argv, "results": results})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench_lora.py", description="Measures fine-tuning, here and with PEFT.")
    add = parser.add_argument
    add("--shape", choices=["tiny", "1b", "7b"], default="tiny", help="of the model (default: %(default)s)")
    add("--rank", type=int, default=128, help="of the LoRA (default: %(default)s, the paper's)")
    add("--micro-batch", type=int, default=1, help="samples at once (default: %(default)s)")
    add("--text", type=int, default=128, help="tokens of a sample besides its image (default: %(default)s)")
    add("--steps", type=int, default=3, help="timed steps per process (default: %(default)s)")
    add("--rounds", type=int, default=1, help="processes per contender (default: %(default)s)")
    add("--contenders", nargs="+", choices=CONTENDERS, metavar="NAME", help=f"default: {'; '.join(CONTENDERS)}")
    add("--folder", type=Path, help="where to put the temporary weights (7b: 14.1 GB)")
    add("--json", type=Path, metavar="FILE", help="also write all figures to this file")
    add("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.text <= ANSWER + 8 or min(args.steps, args.rounds, args.micro_batch, args.rank) < 1:
        parser.error(f"--text must be above {ANSWER + 8}, and the other numbers 1 or more")
    if args.measure:
        name, folder, settings = json.loads(args.measure)
        settings = SimpleNamespace(**settings)
        command_line("bench_lora.py", lambda: print(json.dumps(measure(name, folder, settings))))
    else:
        command_line("bench_lora.py", lambda: run(args))


if __name__ == "__main__":
    main()
