"""Measures this project beside transformers and llama.cpp, on this machine, in one command.

    python bench.py --shape 1b

A checkpoint with random weights in float16, as those of the hub are, is made in a temporary folder. Each contender
loads it in a process of its own, several times and in turn, so that a machine that slows down slows down all of them.
What the machine can do at best is measured in the same turns: how fast products with a single row stream weights (a
token of an answer) and how fast one with 600 rows computes (a prompt with an image). In every process, behind
the loading, a whole prompt goes through the model before anything is timed, since first calls read mapped weights, take
memory and choose kernels.

Nothing here judges: there are medians, the least and the most, and what share that is of what the machine can do.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
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

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from check import command_line, free_memory
from llava import KVCache, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, peak_memory
from load import weight_bytes, write_json
from quantize import FloatLinear, HalfLinear, computes_in, multiply_bytes, multiply_floats, products_of_bytes
from vision import CLIPVisionConfig

sys.path.insert(0, str(Path(__file__).parent / "tests"))
from random_checkpoint import write_gguf, write_large_checkpoint

SMALL = CLIPVisionConfig(64, 128, 3, 4, image_size=56, patch_size=14)
CLIP_L = CLIPVisionConfig(1024, 4096, 24, 16, image_size=336, patch_size=14)
LLAMA = partial(LlamaConfig, "llama", max_position_embeddings=4096, rms_norm_eps=1e-5)
SHAPES = {  # the vision tower; then vocabulary, width, width of the MLP, layers, heads and heads of keys
    "tiny": (SMALL, LLAMA(448, 128, 256, 4, 8)),
    "1b": (CLIP_L, LLAMA(32064, 2048, 5632, 22, 32, 4)),
    "7b": (CLIP_L, LLAMA(32064, 4096, 11008, 32, 32)),
    "13b": (CLIP_L, LLAMA(32064, 5120, 13824, 40, 40)),
}
CONTENDERS = {  # dtype and quantisation
    "llava float32": ("float32", None),
    "llava bfloat16": ("bfloat16", None),
    "llava float16": ("float16", None),
    "llava int8": ("float32", "int8"),
    "transformers float32": ("float32", None),
    "transformers bfloat16": ("bfloat16", None),
    "llama.cpp Q8_0": ("float32", "int8"),
}
NEEDS = {  # modules, and the packages that have them
    "transformers": (["transformers"], "transformers"),
    "llama.cpp": (["llama_cpp", "gguf"], "llama-cpp-python gguf"),
}
MACHINE, WRITER = "machine", "writer"  # have processes of their own, too
TABLES = {
    "plan": "Memory, by arithmetic, GB:",
    "speed": "Speed, and its share of what the machine can do:",
    "batch": "Several questions at once, tokens/s of all together:",
    "context": "Longer prompts:",
    "chat": "A second question about the same image, which reuses the cache:",
}
OURS = ["llava float32", "llava int8"]  # in the last three tables
PROMPT = 600  # tokens: 576 of an image, and a question
BATCHES, CONTEXTS = [1, 2, 4, 8], [600, 1200, 2400, 3600]
LOAD, MEMORY = "loading, s", "peak memory, GB"
VISION, FIRST, SPEED = "vision tower and projector, s", "first token, s", "then, tokens/s"
GB_S, GFLOP_S = "one row, GB/s of weights", "600 rows, GFLOP/s"
KINDS = ["float32", "bfloat16", "float16", "int8"]  # of weights
IMAGE_TOKEN_ID = 420


def meta_model(shape: str, dtype: str = "float32", quantize: str | None = None) -> LlavaForConditionalGeneration:
    """The model of this shape, without memory."""
    config = LlavaConfig(*SHAPES[shape], image_token_id=IMAGE_TOKEN_ID, dtype="float16")
    return LlavaForConditionalGeneration.planned(config, dtype, "cpu", quantize)


# What is measured, in a process of its own


def seconds(function: Callable[[], object], repeat: int) -> list[float]:
    """The durations of some calls."""
    durations = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        durations.append(time.perf_counter() - start)
    return durations


@torch.no_grad()
def measure(name: str, table: str | None, shape: str, folder: str, tokens: int) -> dict[str, float]:
    """One contender's figures for one table."""
    if name == MACHINE:
        return machine_limits(shape)
    if name == WRITER:  # on Linux, a new process begins with the peak memory of the one that starts it, so not there
        write_large_checkpoint(Path(folder), meta_model(shape))
        if table == "llama.cpp":
            write_gguf(Path(folder) / "model.gguf", meta_model(shape))
        return {"written": 1.0}
    project, (dtype, quantize), vision = name.split()[0], CONTENDERS[name], SHAPES[shape][0]
    pixels: Tensor | None = torch.randn(1, 3, vision.image_size, vision.image_size)
    times: list[float] = []  # when the tokens of an answer came

    def tick(*_: object) -> None:
        times.append(time.perf_counter())

    start = time.perf_counter()  # behind the imports
    if project == "llava":
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype, quantize=quantize)

        def generate(prompt: Tensor, count: int, pixels: Tensor | None = pixels, **cache: KVCache) -> None:
            for _ in model.generate_stream(prompt, pixels, max_new_tokens=count, **cache):
                tick()

    elif project == "transformers":
        from transformers import LlavaForConditionalGeneration as TheirModel

        start = time.perf_counter()
        model = TheirModel.from_pretrained(folder, dtype=getattr(torch, dtype))
        pixels = pixels.to(model.dtype)
        options = {"do_sample": False, "streamer": SimpleNamespace(put=tick, end=tick)}

        def generate(prompt: Tensor, count: int) -> None:
            mask = torch.ones_like(prompt)
            model.generate(prompt, pixel_values=pixels, attention_mask=mask, max_new_tokens=count, **options)
            del times[0], times[-1]  # of the prompt and of the end

    else:
        import llama_cpp

        start = time.perf_counter()
        threads = {"n_threads": torch.get_num_threads(), "n_threads_batch": torch.get_num_threads()}
        model = llama_cpp.Llama(f"{folder}/model.gguf", n_ctx=1024, n_batch=1024, verbose=False, **threads)

        def generate(prompt: Tensor, count: int) -> None:
            model.reset()  # or it would know the beginning of the prompt
            for _ in itertools.islice(model.generate(prompt[0].tolist(), temp=0.0), count):
                tick()

    figures = {LOAD: time.perf_counter() - start}

    def prompt(length: int = PROMPT) -> Tensor:
        """So many tokens (1, T), with an image among them."""
        ids = torch.randint(300, 400, (1, length), generator=torch.Generator().manual_seed(0))
        ids[:, 8 : 8 + (vision.image_size // vision.patch_size) ** 2] = IMAGE_TOKEN_ID
        return ids

    def answer(*args: Tensor | None, **cache: KVCache) -> tuple[float, float]:
        """Seconds to the first token, and tokens per second after it."""
        times.clear()
        start = time.perf_counter()
        generate(*args, **cache)
        assert len(times) == tokens, f"{len(times)} tokens came, not {tokens}"
        return times[0] - start, (tokens - 1) / (times[-1] - times[0])

    generate(prompt(), 2)
    if table == "speed":
        if project != "llama.cpp":
            figures[VISION] = statistics.median(seconds(lambda: model.get_image_features(pixels), 3))
        figures[FIRST], figures[SPEED] = answer(prompt(), tokens)
        if (peak := peak_memory(torch.device("cpu"))) != "unknown":
            figures[MEMORY] = float(peak.removesuffix(" GB"))
        return figures
    if table == "context":
        found = {length: answer(prompt(length), tokens) for length in CONTEXTS}
        firsts = {f"{length} tokens: {FIRST}": first for length, (first, _) in found.items()}
        return firsts | {f"{length} tokens: {SPEED}": speed for length, (_, speed) in found.items()}
    if table == "batch":
        return {f"batch of {size}": batch_speed(model, size, tokens) for size in BATCHES}
    for _ in range(2):  # the first time for the kernels: a short prompt after a long one is new to them
        cache = KVCache(model)
        longer = torch.cat([prompt(), torch.full((1, tokens + 24), 300)], dim=1)  # the answer and another question
        turns = [answer(prompt(), tokens, cache=cache), answer(longer, tokens, None, cache=cache)]
    return {f"{turn} question: {FIRST}": first for turn, (first, _) in zip(("first", "second"), turns, strict=True)}


def batch_speed(model: LlavaForConditionalGeneration, size: int, tokens: int) -> float:
    """Tokens per second behind prompts that were not computed: any keys and values take as long."""
    cache = KVCache(model, size, PROMPT + tokens + 2)
    cache.keys.normal_(), cache.values.normal_()
    cache.length, ids = PROMPT, torch.full((size, 1), 300)
    for step in range(tokens + 2):
        if step == 2:
            start = time.perf_counter()
        ids = model(ids, cache=cache, logits_to_keep=1).logits.argmax(-1)
    return size * tokens / (time.perf_counter() - start)


def machine_limits(shape: str) -> dict[str, float]:
    """For each kind of weights, at best: GB/s of them through products with one row, GFLOP/s of a product with 600.

    The matrices are those of the decoder's MLP. Since a decoder does not fit into a CPU's cache, the single row goes
    through several of them in turn: half a gigabyte, or as many as the decoder has. The 600 rows are computed in the
    kind of numbers that the CPU has units for, float32 for 16 bits without them. With int8 a row of 14 bits is
    multiplied as two of 7, and counts once. The kernels are those of quantize.py.
    """
    config, limits = SHAPES[shape][1], {}
    width, wide = config.hidden_size, config.intermediate_size
    x, halves = torch.randn(PROMPT, width), torch.randint(128, (2 * PROMPT, width), dtype=torch.uint8)
    for kind in KINDS:
        dtype = getattr(torch, kind)
        count = min(3 * config.num_hidden_layers, math.ceil(5e8 / (dtype.itemsize * width * wide)))
        weights = [torch.randint(-127, 128, (wide, width), dtype=torch.int8).to(dtype) for _ in range(count)]
        size, units = weights[0].nbytes, dtype if computes_in(dtype) else torch.float32
        if kind == "int8" and products_of_bytes():
            packed, scale = [torch.ops.onednn.qlinear_prepack(weight, None) for weight in weights], torch.ones(wide)
            rows = [partial(multiply_bytes, halves[:2], weight, scale) for weight in packed]
            whole = partial(multiply_bytes, halves, packed[0], scale)
        elif kind == "int8":
            rows = [lambda weight=weight: F.linear(x[:1], weight.float()) for weight in weights]
            whole = partial(F.linear, x, weights[0].float())
        else:
            layers = [(FloatLinear if kind == "float32" else HalfLinear)(width, wide, False, "meta") for _ in weights]
            for layer, weight in zip(layers, weights, strict=True):
                layer.weight = torch.nn.Parameter(weight)
            rows = [partial(layer, x[:1].to(dtype)) for layer in layers]
            multiply = multiply_floats if units == torch.float32 else F.linear
            whole = partial(multiply, x.to(units), weights[0].to(units))
        each = min(seconds(lambda rows=rows: [one() for one in rows], 10)) / count
        limits[f"{kind}: {GB_S}"] = size / each / 1e9
        limits[f"{kind}: {GFLOP_S}"] = 2 * PROMPT * width * wide / min(seconds(whole, 10)) / 1e9
    return limits


# What is computed


def at_best(name: str, shape: str, limits: dict[str, float]) -> dict[str, float]:
    """The figures of a contender whose work were all done at the machine's limits for its kind of weights.

    The work of a prompt is its FLOPs (a multiplication and an addition are two; attention as if every token saw all
    others; past its queries, keys and values, llava's last layer does only the last token, and so does the last MLP of
    llama.cpp), that of a token after it is to read the decoder's matrices and the head once.
    """
    (vision, text), (dtype, quantize), model = SHAPES[shape], CONTENDERS[name], meta_model(shape)
    is_peer = name.startswith("llama.cpp")  # all of its matrices have 8 bits, the head too: 34 bytes for 32 weights
    with torch.device("meta"), FlopCounterMode(display=False) as image:
        if not is_peer:
            model.get_image_features(torch.empty(1, 3, vision.image_size, vision.image_size))
    with torch.device("meta"), FlopCounterMode(display=False) as words:
        keep = 1 if name.startswith("llava") else 0
        hidden = model.language_model.model(torch.empty(1, PROMPT, text.hidden_size), keep=keep)
        model.language_model.lm_head(hidden[:, -1])
    flops, token = limits[f"{quantize or dtype}: {GFLOP_S}"] * 1e9, 0.0
    for weight_name, weight in meta_model(shape, dtype, quantize).language_model.named_parameters():
        if weight.ndim == 2 and "embed_tokens" not in weight_name:
            kind = "int8" if is_peer else str(weight.dtype).removeprefix("torch.")
            size = weight.numel() * (34 / 32 if is_peer else weight.itemsize)
            token += size / limits[f"{kind}: {GB_S}"] / 1e9
    image, words = image.get_total_flops(), words.get_total_flops()
    words -= is_peer * 2 * (PROMPT - 1) * 3 * text.hidden_size * text.intermediate_size
    return {VISION: image / flops, FIRST: (image + words) / flops, SPEED: 1 / token}


def plan() -> dict[str, dict[str, str]]:
    """What the weights of each shape and a cache of 1000 tokens take."""
    columns: dict[str, dict[str, str]] = {"float32": {}, "bfloat16": {}, "int8": {}}
    for kind, shape in itertools.product(columns, SHAPES):
        model = meta_model(shape, *CONTENDERS[f"llava {kind}"])
        cache = KVCache(model, max_length=1000)
        sizes = f"{weight_bytes(model) / 1e9:.2f} + {(cache.keys.nbytes + cache.values.nbytes) / 1e9:.2f}"
        columns[kind][f"{shape}: weights + cache of 1000 tokens"] = sizes
    return columns


# The tables

Results = dict[str, dict[str, list[float]]]  # contender -> figure -> its values, one from each round


def measure_alone(*job: str | int | None) -> dict[str, float]:
    """`measure` in a process of its own; no figures if that fails, as one does that takes all memory."""
    command = [sys.executable, __file__, "--measure", json.dumps(job)]
    quiet = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=quiet)
    if child.returncode == 0:
        return json.loads(child.stdout.splitlines()[-1])
    print(f"bench.py: {job[0]} has no figures: its process ended with exit code {child.returncode}", file=sys.stderr)
    return {}


def find_contenders(peer: str | None, shape: str) -> list[str]:
    """Those that are installed and fit into memory; why one is left out goes to stderr."""
    found, free = [], free_memory(torch.device("cpu"))
    for name, (dtype, quantize) in CONTENDERS.items():
        project = name.split()[0]
        modules, packages = NEEDS.get(project, ([], ""))
        size = weight_bytes(meta_model(shape, dtype, quantize)) + 10**9
        if project == "llama.cpp" and peer != project:
            continue
        if not all(map(importlib.util.find_spec, modules)):
            print(f"bench.py: {name} is left out; for it, run: pip install {packages}", file=sys.stderr)
        elif free is not None and size > free:
            sizes = f"about {size / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
            print(f"bench.py: {name} is left out: it takes {sizes}", file=sys.stderr)
        else:
            found.append(name)
    return found


def describe_machine() -> str:
    """The CPU, the threads in use and the versions."""
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = next(iter(names), cpu)
    there = {package.name: package.version for package in importlib.metadata.distributions()}
    versions = [f"{name} {there[name]}" for name in ("torch", "transformers", "llama_cpp_python") if name in there]
    kernels = torch.backends.cpu.get_cpu_capability()
    return f"{cpu} ({kernels}), {torch.get_num_threads()} threads, {', '.join(versions)}"


def print_table(title: str, columns: dict[str, dict[str, str]]) -> None:
    """Columns of rows of cells, in Markdown."""
    print(f"\n{title}\n\n| | {' | '.join(columns)} |\n{'| --- ' * (len(columns) + 1)}|")
    for row in dict.fromkeys(row for column in columns.values() for row in column):
        print(f"| {row} | {' | '.join(column.get(row, '-') for column in columns.values())} |", flush=True)


def run_table(table: str, contenders: list[str], folder: str, args: argparse.Namespace) -> dict[str, dict]:
    """Measures and prints one table; returns what goes into the JSON file."""
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
    if limits:
        config = SHAPES[args.shape][1]
        title = f"What the machine can do, with {config.hidden_size} x {config.intermediate_size} matrices:"
        print_table(title, {k: {row: f"{limits[f'{k}: {row}']:.3g}" for row in (GB_S, GFLOP_S)} for k in KINDS})
    return {table: results} | ({"limits": limits, "at best": best} if limits else {})


def run(args: argparse.Namespace) -> None:
    """Makes the checkpoint, runs the contenders and prints the tables."""
    report = {"command": sys.argv, "machine": describe_machine(), "shape": args.shape}
    print(f"{report['machine']}\nshape {args.shape}: medians of {args.rounds} (least to most)")
    if "plan" in args.tables:
        report["plan"] = plan()
        print_table(TABLES["plan"], report["plan"])
    tables = [table for table in TABLES if table in args.tables and table != "plan" and args.shape != "13b"]
    if tables:
        contenders = find_contenders(args.peer, args.shape)
        peer = args.peer if "speed" in tables and "llama.cpp Q8_0" in contenders else None
        size = weight_bytes(meta_model(args.shape, "float16")) * (1.6 if peer else 1)
        if size > shutil.disk_usage(args.folder or tempfile.gettempdir()).free:
            raise OSError(f"the weights take {size / 1e9:.1f} GB of disk, which is not there: choose another --folder")
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            print("writing random weights", file=sys.stderr)
            if not measure_alone(WRITER, peer, args.shape, folder, 0):
                raise OSError("the weights could not be written")
            for table in tables:
                report |= run_table(table, contenders, folder, args)
    if args.json:
        write_json(args.json, report)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.py", description="Measures this project beside transformers.")
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="tiny", help="of the model (default: %(default)s); of 13b, memory only")
    add("--tables", nargs="+", choices=TABLES, default=list(TABLES), metavar="TABLE", help=f"of {', '.join(TABLES)}")
    add("--rounds", type=int, default=3, help="processes for each figure (default: %(default)s)")
    add("--tokens", type=int, default=24, help="length of the answers (default: %(default)s)")
    add("--peer", choices=["llama.cpp"], help="measure it, too: its text part alone, from a GGUF of the same shape")
    add("--folder", type=Path, help="where to put the random weights for the time being (7b: 14.1 GB)")
    add("--json", type=Path, metavar="FILE", help="write all figures to a file, too")
    add("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds < 1 or not 2 <= args.tokens <= 400:  # the contexts leave room for so many
        parser.error("--rounds must be 1 or more, and --tokens from 2 to 400")
    if args.shape == "13b" and "plan" not in args.tables:
        parser.error("of 13b there is only the table plan")
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"--json: there is no folder {args.json.parent}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the weights are deleted then, too
    job = args.measure and json.loads(args.measure)
    command_line("bench.py", lambda: print(json.dumps(measure(*job))) if job else run(args))


if __name__ == "__main__":
    main()
