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
from torch import Tensor, nn

from extras.quantize import FloatLinear, HalfLinear, computes_in, multiply_bytes, multiply_floats, products_of_bytes

PROMPT = 600  # tokens: 576 of an image, and a question
KINDS = ["float32", "bfloat16", "float16", "int8"]  # dtypes of weights
GB_S, GFLOP_S = "one row, GB/s of weights", "600 rows, GFLOP/s"


def describe_machine() -> str:
    """The CPU, the number of threads and the versions of the packages."""
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = next(iter(names), cpu)
    installed = {package.name: package.version for package in importlib.metadata.distributions()}
    packages = [name for name in ("torch", "transformers", "llama_cpp_python") if name in installed]
    versions = ", ".join(f"{name} {installed[name]}" for name in packages)
    kernels = torch.backends.cpu.get_cpu_capability()
    return f"{cpu} ({kernels}), {torch.get_num_threads()} threads, {versions}"


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
    """For each dtype of weights, the highest GB/s of products with one row and GFLOP/s of a product with 600 rows.

    The matrices are those of a decoder's MLP, with hidden size `width` and intermediate size `wide`. A decoder does not
    fit into a CPU's cache, so the single row is multiplied by several matrices in turn: half a gigabyte of them, or as
    many as the MLPs of `layers` layers have.
    """
    limits = {}
    for kind in KINDS:
        dtype = getattr(torch, kind)
        count = min(3 * layers, math.ceil(5e8 / (dtype.itemsize * width * wide)))
        weights = [torch.randint(-127, 128, (wide, width), dtype=torch.int8).to(dtype) for _ in range(count)]
        one_row, many_rows = products(weights)
        limits[f"{kind}: {GB_S}"] = count * weights[0].nbytes / min(seconds(one_row, 10)) / 1e9
        limits[f"{kind}: {GFLOP_S}"] = 2 * PROMPT * width * wide / min(seconds(many_rows, 10)) / 1e9
    return limits


def products(weights: list[Tensor]) -> tuple[Callable[[], object], Callable[[], object]]:
    """Two functions: one row times each matrix (out, in) in turn, and 600 rows times the first matrix.

    They use the kernels of quantize.py. The 600 rows are computed in the weights' dtype if the CPU has fast kernels for
    it, otherwise in float32. For int8, a row of 14 bits is multiplied as two rows of 7 bits and counts once.
    """
    (wide, width), dtype = weights[0].shape, weights[0].dtype
    x = torch.randn(PROMPT, width)
    rows: list[Callable[[], object]]
    many_rows: Callable[[], object]
    if dtype == torch.int8 and products_of_bytes():
        halves = torch.randint(128, (2 * PROMPT, width), dtype=torch.uint8)
        packed, scale = [torch.ops.onednn.qlinear_prepack(weight, None) for weight in weights], torch.ones(wide)
        rows = [partial(multiply_bytes, halves[:2], weight, scale) for weight in packed]
        many_rows = partial(multiply_bytes, halves, packed[0], scale)
    elif dtype == torch.int8:
        rows = [partial(lambda weight: F.linear(x[:1], weight.float()), weight) for weight in weights]
        many_rows = partial(F.linear, x, weights[0].float())
    else:
        layers = [(FloatLinear if dtype == torch.float32 else HalfLinear)(width, wide, False, "meta") for _ in weights]
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight = nn.Parameter(weight)
        rows = [partial(layer, x[:1].to(dtype)) for layer in layers]
        computed = dtype if computes_in(dtype) else torch.float32
        multiply = multiply_floats if computed == torch.float32 else F.linear
        many_rows = partial(multiply, x.to(computed), weights[0].to(computed))

    def one_row() -> None:
        for row in rows:
            row()

    return one_row, many_rows
