"""This machine: its CPU and packages, how fast it streams weights, and how fast it computes.

For each token of an answer, the decoder's matrices are multiplied by a single row, so decoding is limited by how fast
weights come from memory. A prompt has hundreds of rows, so it is limited by arithmetic. bench.py compares its figures
with both.
"""

import importlib.metadata
import math
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from extras.quantize import CompactLinear, FloatLinear, HalfLinear, computes_in, multiply_floats, pack

PROMPT = 600  # tokens: 576 of an image, and a question
BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "int4": 0.5}  # per weight
KINDS = list(BYTES)
GB_S, GFLOP_S = "one row, GB/s of weights", "600 rows, GFLOP/s"


def describe_machine() -> str:
    """The CPU, the number of threads and the versions of the packages."""
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = next(iter(names), cpu)
    installed = {package.name: package.version for package in importlib.metadata.distributions()}
    packages = [name for name in ("torch", "onnxruntime", "transformers", "llama_cpp_python") if name in installed]
    versions = ", ".join(f"{name} {installed[name]}" for name in packages)
    return f"{cpu} ({cpu_kind()}), {torch.get_num_threads()} threads, {versions}"


def cpu_kind() -> str:
    """The instructions that kernels are chosen by, such as "AVX512 VNNI BF16"."""
    extras = {"VNNI": "_is_vnni_supported", "BF16": "_is_avx512_bf16_supported", "AMX": "_is_amx_tile_supported"}
    capability = torch.backends.cpu.get_cpu_capability()  # less than the CPU's, if ATEN_CPU_CAPABILITY says so
    found = [name for name, test in extras.items() if capability == "AVX512" and getattr(torch.cpu, test, bool)()]
    return " ".join([capability, *found])


def seconds(function: Callable[[], object], repeat: int) -> list[float]:
    """The durations of `repeat` calls."""
    durations = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        durations.append(time.perf_counter() - start)
    return durations


@torch.no_grad()
def machine_limits(width: int, wide: int, layers: int) -> dict[str, float]:
    """For each kind of weights, the highest GB/s of products with one row and GFLOP/s of a product with 600 rows.

    The matrices are those of a decoder's MLP, with hidden size `width` and intermediate size `wide`. A decoder does not
    fit into a CPU's cache, so the single row is multiplied by several matrices in turn: half a gigabyte of them, or as
    many as the MLPs of `layers` layers have. Bytes are those of the weights, without scales and zeros.
    """
    limits = {}
    for kind in KINDS:
        size = width * wide * BYTES[kind]
        count = min(3 * layers, math.ceil(5e8 / size))
        rows, many_rows = products(kind, width, wide, count)
        rounds = [sum(seconds(row, 1)[0] for row in rows) for _ in range(10)]
        limits[f"{kind}: {GB_S}"] = count * size / min(rounds) / 1e9
        limits[f"{kind}: {GFLOP_S}"] = 2 * PROMPT * width * wide / min(seconds(many_rows, 10)) / 1e9
    return limits


def products(kind: str, width: int, wide: int, count: int) -> tuple[list[Callable[[], object]], Callable[[], object]]:
    """One row times each of `count` matrices (wide, width), and 600 rows times the first of them, as functions.

    They use the kernels of quantize.py. The 600 rows are computed in the weights' dtype if the CPU has fast kernels for
    it, otherwise in float32.
    """
    x = torch.randn(PROMPT, width)
    if kind in ("int8", "int4"):
        compact = [CompactLinear(width, wide, False, int(kind[3:]), 32 if kind == "int8" else 64) for _ in range(count)]
        for layer in compact:
            layer.weight.random_(0, 256), layer.scale.fill_(1)
        pack(compact)
        kernels = [layer.product for layer in compact]
        return [partial(kernel, x[:1]) for kernel in kernels], partial(kernels[0], x)
    dtype = getattr(torch, kind)
    layers = [(FloatLinear if kind == "float32" else HalfLinear)(width, wide, False, dtype=dtype) for _ in range(count)]
    computed = dtype if computes_in(dtype) else torch.float32
    multiply = multiply_floats if computed == torch.float32 else F.linear
    many_rows = partial(multiply, x.to(computed), layers[0].weight.to(computed))
    return [partial(layer, x[:1].to(dtype)) for layer in layers], many_rows
