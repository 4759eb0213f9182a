"""Compares this project with transformers and llama.cpp, on this machine, in one command.

    python bench.py --shape 1b                                          # everything that is installed
    python bench.py --shape 1b --only int4 --tables speed --rounds 1    # in under four minutes

It writes checkpoints with random weights to a temporary folder: in float16 like those on the hub, and in the compact
forms. Each contender loads its own in a process of its own, several times. They take turns, so that a machine that
slows down slows down all of them. The same turns measure the machine's limits (extras/limits.py): how fast products
with a single row stream weights (one token of an answer), and how fast a product with 600 rows computes (a prompt with
an image). After loading, a whole prompt goes through the model before anything is timed, because first calls read
mapped weights, allocate memory and choose kernels.

The tables give medians, minima and maxima, and the share of the machine's limits. They pass no judgement.
"""

import argparse
import importlib.util
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from config import LlavaConfig
from extras.files import write_json
from extras.limits import GB_S, GFLOP_S, KINDS, PROMPT, cpu_kind, describe_machine, machine_limits, seconds
from extras.machine import anonymous_memory, free_memory, peak_memory
from extras.quantize import CompactLinear
from extras.terminal import command_line
from llama import KVCache, LlamaConfig
from llava import LlavaForConditionalGeneration
from load import weight_bytes
from vision import CLIPVisionConfig

sys.path.insert(0, str(Path(__file__).parent / "tests"))
from random_checkpoint import write_gguf, write_large_checkpoint

SMALL = CLIPVisionConfig(64, 128, 3, 4, image_size=56, patch_size=14)
CLIP_L = CLIPVisionConfig(1024, 4096, 24, 16, image_size=336, patch_size=14)
LLAMA = partial(LlamaConfig, "llama", max_position_embeddings=4096, rms_norm_eps=1e-5)
SHAPES = {  # vision tower; decoder: vocabulary, hidden size, intermediate size, layers, heads, KV heads
    "tiny": (SMALL, LLAMA(448, 128, 256, 4, 8)),
    "1b": (CLIP_L, LLAMA(32064, 2048, 5632, 22, 32, 4)),
    "7b": (CLIP_L, LLAMA(32064, 4096, 11008, 32, 32)),
    "13b": (CLIP_L, LLAMA(32064, 5120, 13824, 40, 40)),
}
CONTENDERS = {  # dtype, quantisation
    "llava float32": ("float32", None),
    "llava bfloat16": ("bfloat16", None),
    "llava float16": ("float16", None),
    "llava int8": ("float32", "int8"),
    "llava int4": ("float32", "int4"),
    "transformers float32": ("float32", None),
    "transformers bfloat16": ("bfloat16", None),
    "llama.cpp Q8_0": ("float32", "int8"),
    "llama.cpp Q4_0": ("float32", "int4"),
}
NEEDS = {  # modules to import, packages to install
    "transformers": (["transformers"], "transformers"),
    "llama.cpp": (["llama_cpp", "gguf"], "llama-cpp-python gguf"),
}
BLOCK_BYTES = {"int8": 34 / 32, "int4": 18 / 32}  # of llama.cpp, per weight: 32 share a scale of two bytes
MACHINE, WRITER = "machine", "writer"  # other jobs with a process of their own
TABLES = {
    "plan": "Memory, computed from the shapes, GB:",
    "speed": "Speed, and the share of this machine's limits:",
    "batch": "Batched decoding, tokens/s in total:",
    "context": "Longer prompts:",
    "chat": "A second question about the same image, with the cache reused:",
}
OURS = ["llava float32", "llava int8", "llava int4"]  # in the last three tables
BATCHES, CONTEXTS = [1, 2, 4, 8], [600, 1200, 2400, 3600]
LOAD, MEMORY, ANONYMOUS = "loading, s", "peak memory, GB", "memory without mapped files, GB"
VISION, FIRST, SPEED = "vision tower and projector, s", "time to first token, s", "decoding, tokens/s"
IMAGE_TOKEN_ID = 420


def meta_model(shape: str, dtype: str = "float32", quantize: str | None = None) -> LlavaForConditionalGeneration:
    """The model of this shape on the meta device, which takes no memory."""
    config = LlavaConfig(*SHAPES[shape], image_token_id=IMAGE_TOKEN_ID, dtype="float16")
    return LlavaForConditionalGeneration.planned(config, dtype, "cpu", quantize)


# Measurements, each in its own process

Loaded = tuple[float, Any, Callable[..., list[float]]]  # loading time; model; (ids, count) -> the time of each token


def load_llava(folder: str, dtype: str, quantize: str | None, pixels: Tensor) -> Loaded:
    """This project, whose `generate` also takes other pixels and a cache."""
    start = time.perf_counter()
    model = LlavaForConditionalGeneration.from_pretrained(f"{folder}/{quantize or ''}", dtype)

    def generate(ids: Tensor, count: int, pixels: Tensor | None = pixels, cache: KVCache | None = None) -> list[float]:
        stream = model.generate_stream(ids, pixels, max_new_tokens=count, cache=cache)
        return [time.perf_counter() for _ in stream]

    return time.perf_counter() - start, model, generate


def load_transformers(folder: str, dtype: str, quantize: str | None, pixels: Tensor) -> Loaded:
    """The reference implementation."""
    from transformers import LlavaForConditionalGeneration as TheirModel

    start = time.perf_counter()
    model = TheirModel.from_pretrained(folder, dtype=getattr(torch, dtype))
    pixels = pixels.to(model.dtype)

    def generate(ids: Tensor, count: int) -> list[float]:
        times: list[float] = []
        streamer = SimpleNamespace(put=lambda _: times.append(time.perf_counter()), end=lambda: None)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": count, "do_sample": False}
        model.generate(ids, pixel_values=pixels, streamer=streamer, **options)
        return times[1:]  # the streamer gets the prompt first

    return time.perf_counter() - start, model, generate


def load_llama_cpp(folder: str, dtype: str, quantize: str | None, pixels: Tensor) -> Loaded:
    """llama.cpp, whose text part is measured alone."""
    import llama_cpp

    start = time.perf_counter()
    threads = {"n_threads": torch.get_num_threads(), "n_threads_batch": torch.get_num_threads()}
    model = llama_cpp.Llama(f"{folder}/{quantize}.gguf", n_ctx=1024, n_batch=1024, verbose=False, **threads)

    def generate(ids: Tensor, count: int) -> list[float]:
        model.reset()  # otherwise it would reuse the part of the prompt that it has cached
        return [time.perf_counter() for _ in itertools.islice(model.generate(ids[0].tolist(), temp=0.0), count)]

    return time.perf_counter() - start, model, generate


LOADERS = {"llava": load_llava, "transformers": load_transformers, "llama.cpp": load_llama_cpp}


def write(name: str, shape: str, folder: Path) -> None:
    """Writes what a contender loads."""
    quantize = CONTENDERS[name][1]
    if name.startswith("llama.cpp"):
        write_gguf(folder / f"{quantize}.gguf", meta_model(shape), name.split()[1])
    elif not (target := folder / (quantize or "")).joinpath("config.json").exists():
        target.mkdir(exist_ok=True)
        write_large_checkpoint(target, meta_model(shape, quantize=quantize))


@torch.no_grad()
def measure(name: str, table: str | None, shape: str, folder: str, tokens: int) -> dict[str, float]:
    """Measures one contender's figures for one table."""
    vision, text = SHAPES[shape]
    if name == MACHINE:
        return machine_limits(text.hidden_size, text.intermediate_size, text.num_hidden_layers)
    if name == WRITER:  # not in the main process: on Linux, a new process inherits the peak memory of its parent
        for other in json.loads(table or "[]"):
            write(other, shape, Path(folder))
        return {"written": 1.0}
    pixels = torch.randn(1, 3, vision.image_size, vision.image_size)
    loading, model, generate = LOADERS[name.split()[0]](folder, *CONTENDERS[name], pixels)
    figures = {LOAD: loading}

    def prompt(length: int = PROMPT) -> Tensor:
        """A prompt of `length` tokens, with one image among them: (1, T)."""
        ids = torch.randint(300, 400, (1, length), generator=torch.Generator().manual_seed(0))
        ids[:, 8 : 8 + (vision.image_size // vision.patch_size) ** 2] = IMAGE_TOKEN_ID
        return ids

    def answer(ids: Tensor, **options: KVCache | None) -> tuple[float, float]:
        """Time to first token in seconds, and decoding speed in tokens per second."""
        start = time.perf_counter()
        times = generate(ids, tokens, **options)
        assert len(times) == tokens, f"{len(times)} tokens were generated, not {tokens}"
        return times[0] - start, (tokens - 1) / (times[-1] - times[0])

    generate(prompt(), 2)
    if table == "speed":
        if name.split()[0] != "llama.cpp":
            pixels = pixels.to(model.dtype)
            figures[VISION] = statistics.median(seconds(lambda: model.get_image_features(pixels), 3))
        figures[FIRST], figures[SPEED] = answer(prompt())
        if (peak := peak_memory(torch.device("cpu"))) != "unknown":
            figures[MEMORY] = float(peak.removesuffix(" GB"))
        if (anonymous := anonymous_memory()) is not None:
            figures[ANONYMOUS] = anonymous
        return figures
    if table == "context":
        found = {length: answer(prompt(length)) for length in CONTEXTS}
        firsts = {f"{length} tokens: {FIRST}": first for length, (first, _) in found.items()}
        return firsts | {f"{length} tokens: {SPEED}": speed for length, (_, speed) in found.items()}
    if table == "batch":
        return {f"batch of {size}": batch_speed(model, size, tokens) for size in BATCHES}
    for _ in range(2):  # the first pass warms up: a short prompt after a long one is new to the kernels
        cache = KVCache(model)
        longer = torch.cat([prompt(), torch.full((1, tokens + 24), 300)], dim=1)  # the answer and a second question
        turns = [answer(prompt(), cache=cache), answer(longer, pixels=None, cache=cache)]
    return {f"{turn} question: {FIRST}": first for turn, (first, _) in zip(("first", "second"), turns, strict=True)}


def batch_speed(model: LlavaForConditionalGeneration, size: int, tokens: int) -> float:
    """Tokens per second of all sequences, after prompts that are not computed: random keys and values take as long."""
    cache = KVCache(model, size, PROMPT + tokens + 2)
    cache.keys.normal_(), cache.values.normal_()
    cache.length, ids = PROMPT, torch.full((size, 1), 300)
    for step in range(tokens + 2):
        if step == 2:
            start = time.perf_counter()
        ids = model(ids, cache=cache, logits_to_keep=1).logits.argmax(-1)
    return size * tokens / (time.perf_counter() - start)


def at_best(name: str, shape: str, limits: dict[str, float]) -> dict[str, float]:
    """A contender's figures if all its work were done at the machine's limits for its dtype of weights.

    The vision tower of a quantised model is computed in bfloat16 or float32, so its limits are those for bfloat16.
    The work of a prompt is its FLOPs: a multiplication and an addition count as two, and attention as if every token
    attended to all others. Beyond queries, keys and values, llava's last layer computes only the last token; llama.cpp
    does so in its last MLP. The work of each later token is to read the decoder's matrices and the head once.
    """
    (vision, text), (dtype, quantize), model = SHAPES[shape], CONTENDERS[name], meta_model(shape)
    is_peer = name.startswith("llama.cpp")  # all of its matrices are quantised; in Q4_0, the head is Q8_0
    with torch.device("meta"), FlopCounterMode(display=False) as image_work:
        if not is_peer:
            model.get_image_features(torch.empty(1, 3, vision.image_size, vision.image_size))
    with torch.device("meta"), FlopCounterMode(display=False) as text_work:
        keep = 1 if name.startswith("llava") else 0
        hidden = model.language_model.model(torch.empty(1, PROMPT, text.hidden_size), keep=keep)
        model.language_model.lm_head(hidden[:, -1])
    rate, token = limits[f"{quantize or dtype}: {GFLOP_S}"] * 1e9, 0.0
    image_rate = limits[f"{'bfloat16' if quantize else dtype}: {GFLOP_S}"] * 1e9  # in floats outside the decoder
    for layer_name, layer in meta_model(shape, dtype, None if is_peer else quantize).language_model.named_modules():
        if isinstance(layer, CompactLinear):
            token += layer.in_features * layer.out_features * layer.bits / 8 / limits[f"int{layer.bits}: {GB_S}"] / 1e9
        elif isinstance(layer, torch.nn.Linear):
            theirs = "int8" if layer_name == "lm_head" else quantize
            kind = str(theirs if is_peer else layer.weight.dtype).removeprefix("torch.")
            size = layer.weight.numel() * (BLOCK_BYTES[kind] if is_peer else layer.weight.itemsize)
            token += size / limits[f"{kind}: {GB_S}"] / 1e9
    image_seconds, text_flops = image_work.get_total_flops() / image_rate, text_work.get_total_flops()
    text_flops -= is_peer * 2 * (PROMPT - 1) * 3 * text.hidden_size * text.intermediate_size
    return {VISION: image_seconds, FIRST: image_seconds + text_flops / rate, SPEED: 1 / token}


def plan() -> dict[str, dict[str, str]]:
    """The memory that the weights of each shape and a cache of 1000 tokens take."""
    columns: dict[str, dict[str, str]] = {"float32": {}, "bfloat16": {}, "int8": {}, "int4": {}}
    for kind, shape in itertools.product(columns, SHAPES):
        model = meta_model(shape, *CONTENDERS[f"llava {kind}"])
        cache = KVCache(model, max_length=1000)
        sizes = f"{weight_bytes(model) / 1e9:.2f} + {(cache.keys.nbytes + cache.values.nbytes) / 1e9:.2f}"
        columns[kind][f"{shape}: weights + cache of 1000 tokens"] = sizes
    return columns


Results = dict[str, dict[str, list[float]]]  # contender -> figure -> one value per round


def measure_alone(*job: str | int | None) -> dict[str, float]:
    """Runs `measure` in a process of its own; no figures if that fails, for example because memory runs out."""
    command = [sys.executable, __file__, "--measure", json.dumps(job)]
    quiet = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=quiet)
    if child.returncode == 0:
        return json.loads(child.stdout.splitlines()[-1])
    print(f"bench.py: {job[0]} has no figures: its process ended with exit code {child.returncode}", file=sys.stderr)
    return {}


def find_contenders(only: list[str], shape: str) -> list[str]:
    """The contenders with one of these words in their names that are installed and fit into memory; without words, all
    but llama.cpp. Prints to stderr why others are left out."""
    found, free = [], free_memory(torch.device("cpu"))
    for name, (dtype, quantize) in CONTENDERS.items():
        project = name.split()[0]
        modules, packages = NEEDS.get(project, ([], ""))
        size = weight_bytes(meta_model(shape, dtype, quantize)) + 10**9
        if not any(word in name for word in only) if only else project == "llama.cpp":
            continue
        if not all(map(importlib.util.find_spec, modules)):
            print(f"bench.py: {name} is left out: it is not installed; run: pip install {packages}", file=sys.stderr)
        elif free is not None and size > free:
            sizes = f"about {size / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
            print(f"bench.py: {name} is left out: it needs {sizes}", file=sys.stderr)
        else:
            found.append(name)
    return found


def print_table(title: str, columns: dict[str, dict[str, str]]) -> None:
    """Prints columns of rows of cells as a Markdown table."""
    print(f"\n{title}\n\n| {cpu_kind()} | {' | '.join(columns)} |\n{'| --- ' * (len(columns) + 1)}|")
    for row in dict.fromkeys(row for column in columns.values() for row in column):
        print(f"| {row} | {' | '.join(column.get(row, '-') for column in columns.values())} |", flush=True)


def ratios(results: Results) -> dict[str, dict[str, str]]:
    """For each column of llava, its speed over that of each peer."""
    middle = {name: {k: statistics.median(v) for k, v in figures.items()} for name, figures in results.items()}
    peers = [name for name in middle if not name.startswith("llava") and SPEED in middle[name]]
    columns: dict[str, dict[str, str]] = {}
    for name in (name for name in middle if name.startswith("llava") and SPEED in middle[name]):
        columns[name] = {f"{peer}: first token": f"{middle[peer][FIRST] / middle[name][FIRST]:.2f}" for peer in peers}
        columns[name] |= {f"{peer}: decoding": f"{middle[name][SPEED] / middle[peer][SPEED]:.2f}" for peer in peers}
    return columns if peers else {}


def run_table(table: str, contenders: list[str], folder: str, args: argparse.Namespace) -> dict[str, dict]:
    """Measures and prints one table; returns its part of the JSON file."""
    names = [MACHINE, *contenders] if table == "speed" else [name for name in contenders if name in OURS]
    results: Results = {name: {} for name in names}
    for turn, name in itertools.product(range(args.rounds), names):
        print(f"{table}, round {turn + 1} of {args.rounds}: {name}", file=sys.stderr)
        for figure, value in measure_alone(name, table, args.shape, folder, args.tokens).items():
            results[name].setdefault(figure, []).append(value)
    limits = {figure: max(values) for figure, values in results.pop(MACHINE, {}).items()}
    best = {name: at_best(name, args.shape, limits) if limits else {} for name in results}

    columns: dict[str, dict[str, str]] = {name: {} for name in results}
    for name, figures in results.items():
        for figure, values in figures.items():
            middle, spread = statistics.median(values), f" ({min(values):.3g} to {max(values):.3g})"
            columns[name][figure] = f"{middle:.3g}{spread if len(values) > 1 else ''}"
            if figure in best[name]:
                share = middle / best[name][figure] if figure == SPEED else best[name][figure] / middle
                columns[name][figure] += f", {share:.0%}"
    print_table(TABLES[table], columns)
    if table == "speed" and (compared := ratios(results)):
        print_table("How many times as fast as each peer:", compared)
    if limits:
        config = SHAPES[args.shape][1]
        title = f"This machine's limits, with {config.hidden_size} x {config.intermediate_size} matrices:"
        print_table(title, {k: {row: f"{limits[f'{k}: {row}']:.3g}" for row in (GB_S, GFLOP_S)} for k in KINDS})
    return {table: results} | ({"limits": limits, "at best": best} if limits else {})


def run(args: argparse.Namespace) -> None:
    """Writes the checkpoint, measures the contenders and prints the tables."""
    report = {"command": sys.argv, "machine": describe_machine(), "shape": args.shape}
    print(f"{report['machine']}\nshape {args.shape}, --rounds {args.rounds}: medians (minimum to maximum)")
    if "plan" in args.tables:
        report["plan"] = plan()
        print_table(TABLES["plan"], report["plan"])
    tables = [table for table in TABLES if table in args.tables and table != "plan" and args.shape != "13b"]
    if tables:
        contenders = find_contenders(args.only, args.shape)
        if not contenders:
            raise ValueError(f"there is no contender to measure; their names are {', '.join(CONTENDERS)}")
        files = {(name.startswith("llama.cpp"), CONTENDERS[name][1]): name for name in contenders}.values()
        size = sum(weight_bytes(meta_model(args.shape, "float16", CONTENDERS[name][1])) for name in files)
        if size > shutil.disk_usage(args.folder or tempfile.gettempdir()).free:
            raise OSError(f"the weights need {size / 1e9:.1f} GB of disk, more than is free: choose another --folder")
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            print("writing random weights", file=sys.stderr)
            if not measure_alone(WRITER, json.dumps(contenders), args.shape, folder, 0):
                raise OSError("the weights could not be written")
            for table in tables:
                report |= run_table(table, contenders, folder, args)
    if args.json:
        write_json(args.json, report)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.py", description="Compares this project with transformers.")
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="tiny", help="of the model (default: %(default)s); 13b: memory only")
    add("--tables", nargs="+", choices=TABLES, default=[*TABLES], metavar="TABLE", help=f"default: {', '.join(TABLES)}")
    add("--rounds", type=int, default=3, help="processes per figure (default: %(default)s)")
    add("--tokens", type=int, default=24, help="length of the answers (default: %(default)s)")
    add("--only", nargs="+", default=[], metavar="WORD", help="only contenders with one of these words in their names")
    add("--folder", type=Path, help="where to put the temporary weights (7b: up to 36 GB)")
    add("--json", type=Path, metavar="FILE", help="also write all figures to this file")
    add("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds < 1 or not 2 <= args.tokens <= 400:  # 400 still fit after the longest prompt
        parser.error("--rounds must be 1 or more, and --tokens between 2 and 400")
    if args.shape == "13b" and "plan" not in args.tables:
        parser.error("shape 13b has only the table plan")
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"--json: there is no folder {args.json.parent}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the temporary weights are deleted
    job = args.measure and json.loads(args.measure)
    command_line("bench.py", lambda: print(json.dumps(measure(*job))) if job else run(args))


if __name__ == "__main__":
    main()
