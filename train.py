"""Trains LLaVA-1.5 in its two stages, from any base checkpoint, on any conversations (extras/data.py).

    python train.py --stage align    --model BASE    --data captions.json      --images FOLDER --output ALIGNED
    python train.py --stage instruct --model ALIGNED --data conversations.json --images FOLDER --output FINAL

`align` trains the projector on captions; `instruct` trains the projector and the decoder on conversations. The vision
tower is frozen in both. Weights are float32; on a GPU, autocast computes in bfloat16 where that is safe. Several
processes (`torchrun --nproc-per-node N train.py ...`) shard weights, optimiser state and batches with FSDP2.

With `--lora RANK`, `instruct` freezes the decoder as well, in the checkpoint's 16 bits or quantised, and trains a LoRA
(extras/lora.py) in it, with `--lora-vision` also in the tower, and the projector. The output is an adapter in PEFT's
format. Several processes share the batches only.

All randomness comes from --seed. After a stop, the same command line resumes the run from its last save in the output
folder, with the losses that it would have had without the stop.

Sources: LLaVA-1.5 (arXiv 2310.03744), section 3 and appendix A, and its released scripts for the hyperparameters.
"""

import argparse
import datetime
import functools
import hashlib
import itertools
import json
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from extras.terminal import command_line, handle_early_interrupt

if __name__ == "__main__":
    handle_early_interrupt("train.py")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from extras.adapters import CONFIG_FILE, save_adapter
from extras.data import collate, micro_batches, plan_epoch, prefetch, read_data
from extras.files import read_json, write_atomically, write_json
from extras.lora_training import DEFAULTS as LORA_OPTIONS
from extras.lora_training import (
    add_lora,
    add_options,
    allocate_state,
    check_options,
    load_frozen,
    parameter_groups,
    sum_gradients,
)
from extras.machine import peak_memory, pick_device
from llava import LlavaForConditionalGeneration
from processor import Inputs, LlavaProcessor
from tokenizer import VICUNA_SYSTEM

TRAINED = {"align": ("multi_modal_projector.",), "instruct": ("multi_modal_projector.", "language_model.")}
# The paper's hyperparameters (appendix A) that differ between the stages.
LEARNING_RATE, BATCH = {"align": 1e-3, "instruct": 2e-5}, {"align": 256, "instruct": 128}
# What a run needs to resume: a safetensors file, named so that no loader takes it for the weights of a model.
STATE_FILE = "trainer.state"
# These must not change when a run resumes. Micro-batch and number of processes may: they only affect rounding.
SETTINGS = ["stage", "model", "learning_rate", "batch", "epochs", "warmup_ratio", "weight_decay", "clip"]
SETTINGS += ["max_length", "system", "seed"]
SETTINGS += ["lora", *LORA_OPTIONS]

# The model


def freeze(model: LlavaForConditionalGeneration, stage: str) -> None:
    """Enables gradients only for what the stage trains, so that no activations of the vision tower are kept."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(TRAINED[stage]))


def checkpoint_layers(model: LlavaForConditionalGeneration) -> None:
    """Keeps only the inputs of the layers for the backward pass, which recomputes everything else."""
    tower = [layer for layer in model.vision_tower.encoder.layers if any(p.requires_grad for p in layer.parameters())]
    for layer in [*tower, *model.language_model.model.layers]:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def shard(model: LlavaForConditionalGeneration, device: torch.device) -> None:
    """Shards every parameter across the processes; a layer is gathered only while it is computed."""
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in [*model.vision_tower.encoder.layers, *model.language_model.model.layers]:
        fully_shard(layer.to(device), mesh=mesh)
    fully_shard(model.to(device), mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, gathered if it is sharded. Every process has to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# One step


def answer_loss(model: nn.Module, inputs: Inputs) -> Tensor:
    """The cross-entropy of the answer tokens, summed over a micro-batch: (), float32.

    The head runs only at the M of B * T positions whose next token is learned.
    """
    learned = inputs.is_answer[:, 1:]  # (B, T - 1)
    keep = F.pad(learned, (0, 1))  # (B, T): position t predicts token t + 1
    logits = model(inputs.input_ids, inputs.get("pixel_values"), logits_to_keep=keep).logits  # (M, V)
    return F.cross_entropy(logits.float(), inputs.input_ids[:, 1:][learned], reduction="sum")


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pieces: Iterable[Inputs],
    answers: int,
    clip: float,
    keep_gradients: bool = False,
) -> tuple[float, float]:
    """One optimiser step on one batch; returns the loss, and its gradient norm before clipping.

    `pieces` are this process's micro-batches. The loss is the mean over all `answers` tokens that are learned in the
    batch, across all pieces and processes, so it does not depend on how the batch is divided. With `keep_gradients`,
    their memory is kept for the next step.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    device, sharded = next(model.parameters()).device, isinstance(model, FSDPModule)
    total = torch.zeros((), device=device)
    for inputs in pieces:
        # Every weight is used once, so caching its rounded copy for a second use would only cost memory.
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            loss = answer_loss(model, inputs.to(device)) / answers
        (loss * world if sharded else loss).backward()  # FSDP averages the processes' gradients; here they are summed
        total += loss.detach()
    if world > 1:
        dist.all_reduce(total)
        if not sharded:
            sum_gradients(model)
    norm = whole(nn.utils.clip_grad_norm_(model.parameters(), clip))
    optimizer.step()
    optimizer.zero_grad(set_to_none=not keep_gradients)
    return total.item(), norm.item()


def learning_rate(step: int, steps: int, peak: float, warmup_ratio: float) -> float:
    """For step 0, 1, ..., steps - 1: linear warm-up from 0, then cosine decay (half a period) to 0."""
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# Saving and resuming


def save_state(file: Path, model: nn.Module, optimizer: torch.optim.Optimizer, history: list, settings: dict) -> None:
    """Writes the trained weights, the optimiser's moving averages, the losses so far and the settings.

    The file replaces the previous one once it is complete and on the disk, so there is a complete one at any moment.
    Every process has to call this; the first one writes.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    tensors = {"history:": torch.tensor(history, dtype=torch.float64)}  # (steps so far, 2): loss, gradient norm
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            for kind, tensor in {"weight": parameter.detach(), **optimizer.state[parameter]}.items():
                tensor = whole(tensor)
                if first:
                    tensors[f"{kind}:{name}"] = tensor.cpu().contiguous()
    if first:
        write_atomically(file, lambda part: save_file(tensors, part, metadata={"settings": json.dumps(settings)}))


def load_state(file: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict) -> list[tuple]:
    """Restores model and optimiser from what `save_state` wrote, and returns the history.

    Raises:
        ValueError: the stopped run had other settings, or the file is damaged.
    """
    parameters = dict(model.named_parameters())
    try:
        state = safe_open(file, "pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}): delete it to start over") from error
    with state:
        before = json.loads(state.metadata()["settings"])
        changed = [f"{k} was {before.get(k)}, now {new}" for k, new in settings.items() if before.get(k) != new]
        if changed:
            raise ValueError(
                f"{file.parent} contains a stopped run with other settings ({'; '.join(changed)}): "
                "resume it with the same ones, or choose another --output"
            )
        for key in sorted(state.keys()):
            kind, _, name = key.partition(":")
            if kind == "history":
                continue
            parameter, tensor = parameters[name], state.get_tensor(key).clone()
            if kind != "step":  # a scalar, which stays on the CPU
                tensor = tensor.to(parameter.device)
                if isinstance(parameter, DTensor):
                    tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
            if kind == "weight":
                parameter.data.copy_(tensor)
            else:
                optimizer.state[parameter][kind] = tensor
        return [(loss, norm) for loss, norm in state.get_tensor("history:").tolist()]


def save_model(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Writes a checkpoint folder for transformers and llava.py. Every process has to call this; the first writes."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    processor.save_pretrained(folder)
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():  # images must be padded as in training, which CLIP's own processor cannot do
            config = read_json(folder / name)
            settings = config if name == "preprocessor_config.json" else config.get("image_processor", {})
            settings |= {"do_pad": True, "image_processor_type": "LlavaImageProcessor"}
            write_json(folder / name, config)
    model.save_pretrained(folder)


def plot_losses(history: list[tuple[float, float]], file: Path) -> bool:
    """Plots the losses to a PNG file; returns False if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4.5), layout="tight")
    axes = figure.add_subplot(xlabel="step", ylabel="loss per answer token")
    axes.plot(range(1, len(history) + 1), [loss for loss, _ in history])
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=100)
    return True


# The command line


def parse_arguments() -> argparse.Namespace:
    """Parses the command line; invalid options end in a usage message and exit code 2."""
    parser = argparse.ArgumentParser(prog="train.py", description="Trains LLaVA-1.5 in the paper's two stages.")
    add = parser.add_argument
    add("--stage", required=True, choices=["align", "instruct"], help="train the projector, or projector and decoder")
    add("--model", required=True, help="base checkpoint: a folder, or a name on the Hugging Face hub")
    add("--data", required=True, type=Path, help="conversations, as JSON or JSON lines (docs/training.md)")
    add("--images", required=True, type=Path, help="folder that the image paths in the data are relative to")
    add("--output", required=True, type=Path, help="folder for the trained checkpoint, loss.csv and loss.png")
    add("--learning-rate", type=float, help="peak value (default: 1e-3 for align, 2e-5 for instruct, 2e-4 with --lora)")
    add("--batch", type=int, help="samples per step, across all processes (default: 256 for align, 128 for instruct)")
    add("--micro-batch", type=int, default=16, help="samples that a process computes at once (default: %(default)s)")
    add("--epochs", type=int, default=1, help="passes over the data (default: %(default)s)")
    add("--warmup-ratio", type=float, default=0.03, help="share of the steps for warm-up (default: %(default)s)")
    add("--weight-decay", type=float, default=0.0, help="of AdamW (default: %(default)s)")
    add("--clip", type=float, default=1.0, help="maximum gradient norm (default: %(default)s)")
    add("--max-length", type=int, default=2048, help="maximum tokens per sequence, with image (default: %(default)s)")
    add("--system", default=VICUNA_SYSTEM, help="system prompt of every conversation; '' for none (default: Vicuna's)")
    add("--seed", type=int, default=0, help="determines the order of the data (default: %(default)s)")
    add("--save-every", type=int, default=500, help="steps between saves to resume from (default: %(default)s)")
    add("--gradient-checkpointing", action="store_true", help="recompute layers in the backward pass, to save memory")
    add("--skip-broken", action="store_true", help="skip broken entries instead of refusing the data")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add_options(parser)
    args = parser.parse_args()
    check_options(parser, args)
    args.learning_rate = LEARNING_RATE[args.stage] if args.learning_rate is None else args.learning_rate
    args.batch = BATCH[args.stage] if args.batch is None else args.batch
    for name in ("batch", "micro_batch", "epochs", "max_length", "save_every", "clip", "learning_rate"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if not 0 <= args.warmup_ratio <= 1 or args.weight_decay < 0:
        parser.error("--warmup-ratio must be between 0 and 1, and --weight-decay 0 or more")
    return args


def run(args: argparse.Namespace) -> None:
    """Trains from the start, or from the last save of a stopped run, to the end."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(args.device)
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        # The timeout: all others wait while the first process writes what may be a hundred gigabytes.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=4))
    state_file = args.output / STATE_FILE
    if not state_file.exists() and any((args.output / name).exists() for name in ("config.json", CONFIG_FILE)):
        raise ValueError(f"{args.output} already contains a checkpoint: choose another --output")

    processor = LlavaProcessor.from_pretrained(args.model)
    processor.image_processor.do_pad = True  # as in the paper, so that the whole image is seen
    if args.lora:
        model = load_frozen(LlavaForConditionalGeneration, args, device)
    else:
        model = LlavaForConditionalGeneration.from_pretrained(args.model, torch.float32, "cpu" if world > 1 else device)
    max_length = min(args.max_length, model.config.text_config.context_length)
    samples, skipped = read_data(
        args.data, args.stage, processor, args.images, args.system, max_length, args.skip_broken
    )
    if skipped and rank == 0:
        print(f"train.py: {skipped}", file=sys.stderr)
    settings = {name: getattr(args, name) for name in SETTINGS} | {"samples": len(samples)}
    settings["data"] = hashlib.sha256(args.data.read_bytes()).hexdigest()

    adapter = add_lora(model, args) if args.lora else None
    if adapter is None:
        freeze(model, args.stage)
    if args.gradient_checkpointing:
        checkpoint_layers(model)
    if world > 1 and adapter is None:
        shard(model, device)
    optimizer = torch.optim.AdamW(parameter_groups(model, args), weight_decay=args.weight_decay)
    if adapter is not None:
        allocate_state(optimizer)
    history = load_state(state_file, model, optimizer, settings) if state_file.exists() else []
    plan = [batch for epoch in range(args.epochs) for batch in plan_epoch(samples, args.batch, f"{args.seed}/{epoch}")]
    shares = [micro_batches(batch, args.micro_batch, rank, world) for batch in plan[len(history) :]]
    inputs = prefetch(lambda rows: collate(rows, processor), itertools.chain.from_iterable(shares))

    def rate(step: int, peak: float = args.learning_rate) -> float:
        return learning_rate(step, len(plan), peak, args.warmup_ratio)

    def line(step: int) -> str:
        return f"{step + 1},{history[step][0]!r},{rate(step)!r},{history[step][1]!r}\n"  # repr: exact to the last bit

    done = sum(map(len, plan[: len(history)]))
    args.output.mkdir(parents=True, exist_ok=True)
    with (
        open(args.output / "loss.csv" if rank == 0 else os.devnull, "w") as table,
        tqdm(total=sum(map(len, plan)), initial=done, unit=" samples", mininterval=1, disable=rank > 0) as progress,
    ):
        table.write("step,loss,learning_rate,gradient_norm\n" + "".join(map(line, range(len(history)))))
        for step, share in enumerate(shares, start=len(history)):
            for group in optimizer.param_groups:
                group["lr"] = rate(step, group["peak"])
            torch.manual_seed((args.seed * len(plan) + step) * world + rank)  # for dropout, also after a resume
            answers = sum(int(sample.is_answer.sum()) for sample in plan[step])
            pieces = itertools.islice(inputs, len(share))
            history.append(train_step(model, optimizer, pieces, answers, args.clip, adapter is not None))
            if not all(map(math.isfinite, history[-1])):
                raise ValueError(f"the loss or its gradient is not finite at step {step + 1}: lower --learning-rate")
            table.write(line(step))
            table.flush()
            progress.set_postfix(loss=f"{history[-1][0]:.4f}", refresh=False)
            progress.update(len(plan[step]))
            if (step + 1) % args.save_every == 0 or step + 1 == len(plan):
                save_state(state_file, model, optimizer, history, settings)
                if adapter and rank == 0:
                    save_adapter(model, args.output, adapter, processor.image_processor)
    if adapter is None:
        save_model(model, processor, args.output)
    elif rank == 0:
        save_adapter(model, args.output, adapter, processor.image_processor)
    if rank == 0:
        if not plot_losses(history, args.output / "loss.png"):
            print("train.py: matplotlib is not installed, so the losses are only in loss.csv", file=sys.stderr)
        state_file.unlink()
        print(f"train.py: peak memory {peak_memory(device)}", file=sys.stderr)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    """The command line: exit code 0; 1 after one sentence on stderr; 2 for invalid options."""
    args = parse_arguments()
    command_line("train.py", lambda: run(args), "interrupted; the same command resumes from the last save")


if __name__ == "__main__":
    main()
