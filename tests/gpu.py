"""Checks on an NVIDIA GPU: which attention kernel runs, exactness in bfloat16, speed beside transformers, training.

    tests/gpu.sh [--small]        # installs what this needs, and runs it

It prints each figure as soon as it has it, and writes all of them to gpu.json. Weights are random. `--small` leaves out
the 7B, which needs 40 GB. The exit code is 1 if a check fails. It has not been run yet.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from toy_data import make_toy_data

import bench
from llava import KVCache, LlavaConfig, LlavaForConditionalGeneration

ROOT, GPU, TOKENS = Path(__file__).parents[1], torch.device("cuda"), 64
TheirModel = transformers.LlavaForConditionalGeneration


def inputs(side: int = 336) -> dict[str, torch.Tensor]:
    """A prompt of 600 tokens, 576 of them an image."""
    ids = torch.randint(300, 400, (1, bench.PROMPT), generator=torch.Generator().manual_seed(0))
    ids[:, 8 : 8 + (side // 14) ** 2] = bench.IMAGE_TOKEN_ID
    return {"input_ids": ids.to(GPU), "pixel_values": torch.randn(1, 3, side, side).to(GPU, torch.bfloat16)}


def make_ours(shape: str) -> LlavaForConditionalGeneration:
    """Our model of one of bench.py's shapes, with random bfloat16 weights on the GPU."""
    config = LlavaConfig(*bench.SHAPES[shape], image_token_id=bench.IMAGE_TOKEN_ID)
    model = LlavaForConditionalGeneration.planned(config, "bfloat16", GPU, None).to_empty(device=GPU).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02) if parameter.ndim > 1 else parameter.data.fill_(1)
    return model


def make_theirs(shape: str, layers: int | None = None) -> TheirModel:
    """transformers' model of the same shape, with its own random weights."""
    config = LlavaConfig(*bench.SHAPES[shape], image_token_id=bench.IMAGE_TOKEN_ID).to_dict()
    config["text_config"]["num_hidden_layers"] = layers or config["text_config"]["num_hidden_layers"]
    with GPU:
        return TheirModel._from_config(transformers.LlavaConfig(**config), dtype=torch.bfloat16).eval()


@torch.no_grad()
def attention_kernels() -> dict[str, Any]:
    """The names of the attention kernels of a prompt, of one more token, and of seven more after a cached prefix."""
    model, found = make_ours("1b"), {}
    cache, prompt = KVCache(model, max_length=700), inputs()
    following = {"one token": prompt["input_ids"][:, :1], "seven tokens": prompt["input_ids"][:, :7]}
    for step, arguments in {"prompt": prompt, **{name: {"input_ids": ids} for name, ids in following.items()}}.items():
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            model(**arguments, cache=cache)
            torch.cuda.synchronize()
        names = {event.key for event in profiler.key_averages()}
        found[step] = sorted(name[:120] for name in names if "flash" in name.lower() or "fmha" in name.lower())
    return found | {"passed": all(any("flash" in name for name in names) for names in found.values())}


@torch.no_grad()
def exactness() -> dict[str, Any]:
    """Errors of bfloat16 logits against transformers in float32, ours and transformers' own, at the width of the 7B."""
    with tempfile.TemporaryDirectory() as folder:
        theirs = make_theirs("7b", layers=4)
        theirs.save_pretrained(folder)
        ours = LlavaForConditionalGeneration.from_pretrained(folder, "bfloat16", GPU)
    arguments = inputs()
    logits = [model(**arguments).logits.float() for model in (ours, theirs)]
    arguments["pixel_values"] = arguments["pixel_values"].float()
    exact = theirs.float()(**arguments).logits
    errors = [((one - exact).norm() / exact.norm()).item() for one in logits]
    same = (logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean().item()
    figures = dict(zip(("our error", "their error"), errors, strict=True)) | {"same most likely token": same}
    return figures | {"passed": errors[0] < 1.5 * errors[1]}


@torch.inference_mode()
def speed(shape: str, kind: str) -> dict[str, float]:
    """Time to first token and decoding speed, the best of three."""
    model, arguments = make_ours(shape) if kind == "ours" else make_theirs(shape), inputs()
    if kind == "ours":  # no answer ends early
        model.generation_config.eos_token_id = [-1]

    def seconds(count: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        length = {"max_new_tokens": count} | ({} if kind == "ours" else {"min_new_tokens": count})
        model.generate(**arguments, **length, do_sample=False)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(4)
    first, whole = (min(seconds(count) for _ in range(3)) for count in (1, TOKENS))
    memory = torch.cuda.max_memory_allocated() / 1e9
    return {"first token, s": first, "decoding, tokens/s": (TOKENS - 1) / (whole - first), "peak memory, GB": memory}


def training() -> dict[str, Any]:
    """Ten steps of train.py on the GPU, and their losses."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_toy_data(folder, train=80, test=1)
        paths = {"model": "base", "data": "conversations.json", "images": "pictures", "output": "out"}
        command = [sys.executable, ROOT / "train.py", "--stage", "instruct", "--device", "cuda", "--batch", "8"]
        for option, path in paths.items():
            command += [f"--{option}", folder / path]
        start = time.perf_counter()
        done = subprocess.run([*command, "--learning-rate", "1e-3"], capture_output=True, text=True)
        figures: dict[str, Any] = {"seconds": time.perf_counter() - start, "passed": False}
        if done.returncode:
            return figures | {"error": done.stderr[-2000:]}
        lines = (folder / "out" / "loss.csv").read_text().splitlines()[1:]
        losses = [float(line.split(",")[1]) for line in lines]
        return figures | {"losses": losses, "passed": len(losses) == 10 and losses[-1] < losses[0]}


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("tests/gpu.py: there is no CUDA device here")
    report: dict[str, Any] = {"GPU": torch.cuda.get_device_name(), "torch": torch.__version__}
    report["transformers"] = transformers.__version__
    jobs: dict[str, Any] = {"attention kernels": attention_kernels, "bfloat16 logits": exactness, "training": training}
    for shape in ("1b",) if "--small" in sys.argv else ("1b", "7b"):
        for kind in ("ours", "transformers"):
            jobs[f"{shape}, {kind}"] = lambda shape=shape, kind=kind: speed(shape, kind)
    for name, job in jobs.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            report[name] = job()
        except Exception as error:
            report[name] = {"error": f"{type(error).__name__}: {error}", "passed": False}
        print(f"{name}: {json.dumps(report[name])}", flush=True)
        Path("gpu.json").write_text(json.dumps(report, indent=2) + "\n")
    failed = [name for name, figures in report.items() if isinstance(figures, dict) and not figures.get("passed", True)]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
