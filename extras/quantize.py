"""Linear layers for CPUs, with the fastest kernels for weights of 32, 16, 8 or 4 bits.

    FloatLinear    weight (out, in) float32
    HalfLinear     weight (out, in) float16 or bfloat16
    CompactLinear  weight (out, groups, bytes) uint8, scale (out, groups) float32
                   8 bits: (byte - 128) * scale          4 bits: (half a byte - 8) * scale + zero
                   In 4 bits, the last groups of a row hold its zeros.

Decoding reads every weight from memory once per token, so its speed depends on their size in bytes; a prompt has
hundreds of rows, so its speed depends on arithmetic. Each layer uses a fast kernel for both cases, and is a drop-in
replacement for `nn.Linear` for inference, with the same arguments and names.

docs/quantization.md explains how weights are rounded to 8 and 4 bits, and what that costs. FloatLinear and HalfLinear
were chosen by measurement, with PyTorch 2.13 on an AMD EPYC with AVX-512 VNNI and BF16; there, PyTorch's own kernel for
a single row of bfloat16 is twice as fast as oneDNN's.
"""

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extras import matmul
from extras.machine import keep_freed_memory, map_large_blocks

SCHEMES = {f"int{bits}": {"quant_method": "compact", "bits": bits, "version": 2} for bits in (8, 4)}  # in config.json
BLOCK = 1024  # rows of a matrix that are dequantised at a time
SAME_INPUT = (["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"])  # layers that multiply the same rows
ROUNDED_ROWS = 32  # rows that are rounded at a time: few enough for intermediate results to stay in the CPU's cache
RANGES, FITS = (1, 0.92, 0.84, 0.76), 3  # attempts at rounding to 4 bits: parts of the range, least squares for each


class FloatLinear(nn.Linear):
    """Float32 weights, multiplied by oneDNN, which is faster than the MKL kernels that PyTorch uses."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        return multiply_floats(x, self.weight, self.bias) if x.device.type == "cpu" else super().forward(x)


class HalfLinear(nn.Linear):
    """16-bit weights: PyTorch's own kernel for one row; for several, float32 unless the CPU is fast at bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        on_cpu, single = x.device.type == "cpu", x.shape[:-1].numel() == 1
        if on_cpu and single and torch.backends.mkldnn.enabled:
            # The flag is global, but only a thread that found it set sets it again, so it cannot stay cleared.
            torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
            try:
                return super().forward(x)
            finally:
                torch.backends.mkldnn.enabled = True  # type: ignore[assignment]
        if on_cpu and not single and not computes_in(x.dtype):
            rows = x.float()
            parts = [multiply_floats(rows, weight.float()) for weight in self.weight.split(BLOCK)]
            out = torch.cat(parts, dim=-1)
            return (out if self.bias is None else out.add_(self.bias)).to(x.dtype)
        return super().forward(x)


class CompactLinear(nn.Module):
    """Weights of 8 or 4 bits in groups of consecutive inputs, each with its scale and, in 4 bits, its zero.

    The zeros are additional columns of the matrix: a zero is multiplied by the sum of its group's inputs, so those sums
    are additional inputs. Each zero is the sum of two codes of 4 bits, a coarse and a fine one, in two columns.

    In the decoder, on a CPU, ONNX Runtime multiplies by them, with activations rounded to 8 bits. Elsewhere, and
    without it, the weights are dequantised block by block on every call, and multiplied in the dtype of x; on a CPU, in
    bfloat16 if that is fast and no gradient is needed, else in float32. This is slow for one row, but fast for
    hundreds, and needs no packed copy.

    Args:
        in_features, out_features, bias: as of `nn.Linear`.
        bits, group: 8 or 4 bits; the number of weights that share a scale.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, bits: int = 8, group: int = 32) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits, self.group = in_features, out_features, bits, group
        self.groups = math.ceil(in_features / group)  # the last one is padded with weights that are ignored
        groups = self.groups + (2 * math.ceil(self.groups / group) if bits == 4 else 0)
        self.weight = stored(torch.empty(out_features, groups, group * bits // 8, dtype=torch.uint8))
        self.scale = stored(torch.empty(out_features, groups, dtype=torch.float32))
        self.bias = stored(torch.empty(out_features)) if bias else None
        self.uses_runtime = matmul.is_installed()
        self.shared, self.index = Shared(self), 0  # with the layers that have the same input; its place among them

    @torch.no_grad()
    def load_weight(self, weight: Tensor, importance: Tensor | None = None) -> None:
        """Rounds a weight matrix (out, in) of any dtype, a few rows at a time: no float32 copy is needed.

        With 4 bits, `importance` (in,) weighs the squared errors: the mean squares of the inputs. None: all are alike.
        """
        padding = (0, self.groups * self.group - self.in_features)
        importance = torch.ones(self.in_features) if importance is None else importance.float()
        importance = importance + 1e-4 * importance.mean().clamp_(
            min=1e-30
        )  # inputs that were always 0 may not stay so
        grouped = F.pad(importance, padding).view(-1, self.group).to(weight.device)  # (groups, group)
        parts: list[tuple[Tensor, Tensor]] = []
        for rows in weight.split(ROUNDED_ROWS):
            values = F.pad(rows.float(), padding).view(len(rows), -1, self.group)  # (rows, groups, group)
            parts.append(round_to_4_bits(values, grouped) if self.bits == 4 else round_to_8_bits(values))
        codes, scale = (torch.cat(part) for part in zip(*parts, strict=True))
        self.weight, self.scale, self.shared.multiply = stored(codes), stored(scale), None

    def blocks(self, rows: int = BLOCK) -> Iterator[Tensor]:
        """The weight matrix in float32, `rows` of its outputs at a time: (rows, in), the last one shorter."""
        for codes, scale in zip(self.weight.split(rows), self.scale.split(rows), strict=True):
            if self.bits == 4:
                codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
            values = codes.float().sub_(2 ** (self.bits - 1)).mul_(scale[..., None])
            if self.bits == 4:
                values, zeros = values[:, : self.groups], values[:, self.groups :].unflatten(1, (2, -1)).sum(1)
                values = values + zeros.flatten(1)[:, : self.groups, None]
            yield values.flatten(1)[:, : self.in_features]

    def dequantized(self) -> Tensor:
        """The whole weight matrix (out, in) in float32."""
        return torch.cat(list(self.blocks()))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype of x. Gradients flow to x, not to the weights."""
        out = self.product(x)  # (M, out)
        out = out if self.bias is None else out + self.bias
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def product(self, x: Tensor) -> Tensor:
        """(..., in) -> (M, out), without the bias. The first of the layers with the same input multiplies for all."""
        if not self.uses_runtime or x.device.type != "cpu" or x.requires_grad:  # ONNX Runtime has no gradients
            dtype, rows = x.dtype, x.reshape(-1, self.in_features)
            if x.device.type == "cpu":
                dtype = torch.bfloat16 if computes_in(torch.bfloat16) and not x.requires_grad else torch.float32
            return torch.cat([F.linear(rows.to(dtype), block.to(dtype)) for block in self.blocks()], dim=-1)
        if self.shared.multiply is None:
            if self not in self.shared.members():
                self.shared, self.index = Shared(self), 0
            pack([self])
        shared, products = self.shared, self.shared.products  # another thread may replace the products
        if products is None or products[0] is not x or products[1][self.index] is None:
            assert shared.multiply is not None
            products = x, [*shared.multiply(self.with_sums(x.reshape(-1, self.in_features).float()))]
            shared.products = products
        out, products[1][self.index] = products[1][self.index], None
        assert out is not None
        if not any(product is not None for product in products[1]):
            shared.products = None
        return out

    def with_sums(self, x: Tensor) -> Tensor:
        """In 4 bits, appends the sum of each group twice, for its zero: (M, in) -> (M, in + 2 groups, all padded)."""
        if self.bits == 8:
            return x
        x = F.pad(x, (0, self.groups * self.group - self.in_features))
        sums = F.pad(x.view(len(x), self.groups, self.group).sum(-1), (0, -self.groups % self.group))
        return torch.cat([x, sums, sums], dim=-1)


class Shared:
    """What layers with the same input have in common: the first that is called multiplies for all of them."""

    def __init__(self, *layers: CompactLinear) -> None:
        self.layers = [weakref.ref(layer) for layer in layers]  # weak, so that no cycle keeps a model in memory
        self.multiply: Callable[[Tensor], list[Tensor]] | None = None  # by all of them, once the weights are packed
        self.products: tuple[Tensor, list[Tensor | None]] | None = None  # an input, and what has not been fetched of it

    def members(self) -> list[CompactLinear]:
        """The layers; none if one of them has gone, or if this is a copy of another layer's."""
        found = [layer for ref in self.layers if (layer := ref()) is not None and layer.shared is self]
        return found if len(found) == len(self.layers) else []


def pack(layers: Sequence[CompactLinear]) -> None:
    """Lets ONNX Runtime pack the weights of layers that are on the CPU, if it is installed."""

    def one(shared: Shared) -> None:
        members = shared.members()
        matrices, first = [matmul.Matrix(layer.weight, layer.scale, layer.bits) for layer in members], members[0]
        columns = first.in_features if first.bits == 8 else first.scale.shape[1] * first.group
        shared.multiply = matmul.multiplier(matrices, columns)

    if found := {layer.shared for layer in layers if layer.uses_runtime and layer.weight.device.type == "cpu"}:
        matmul.start_threads()
        map_large_blocks()  # packing needs as much temporary memory as the matrices of a session have
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(one, found))
        keep_freed_memory()


def stored(tensor: Tensor) -> nn.Parameter:
    """A parameter that is not trained."""
    return nn.Parameter(tensor, requires_grad=False)


def round_to_8_bits(values: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, groups, group) -> codes of that shape, uint8, and scales (rows, groups): the largest value becomes 127."""
    scale = values.abs().amax(-1).clamp_(min=1e-30) / 127
    return (values / scale[..., None]).round_().add_(128).to(torch.uint8), scale


def round_to_4_bits(values: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, groups, group) -> codes (rows, groups and more, group / 2), uint8, and scales (rows, groups and more).

    They minimise the squared errors of a group, weighted by `importance` (groups, group), as far as four attempts do.
    Each starts from the range of the group, or less of it, rounds, and solves the least squares for scale and zero with
    the codes fixed, several times. The zeros of the best one are then rounded to twice 4 bits, the last groups of the
    result, and codes and scales follow.
    """
    weighted, total = importance * values, importance.sum(-1).clamp_(min=1e-30)
    mean = weighted.sum(-1) / total
    low, high = values.amin(-1), values.amax(-1)
    best: list[Tensor] = []
    for part in RANGES:
        scale = ((high - low) * (part / 15)).clamp_(min=1e-30)
        zero = (low + high + scale) / 2  # codes from -8 to 7 are centred at -1/2
        for last in [False] * FITS + [True]:
            codes = ((values - zero[..., None]) / scale[..., None]).round_().clamp_(-8, 7)
            if not last:
                shares = importance * codes
                centre = shares.sum(-1) / total
                variance = (shares * codes).sum(-1) / total - centre.square()
                slope = ((weighted * codes).sum(-1) / total - mean * centre) / variance
                scale = torch.where(variance > 1e-6, slope, scale)  # 0 if all codes that matter are the same
                zero = mean - scale * centre
        errors = (codes * scale[..., None]).add_(zero[..., None]).sub_(values).square_().mul_(importance).sum(-1)
        found = [errors, codes, scale, zero]
        best = best or found
        better = errors < best[0]
        best = [
            torch.where(better[..., None] if new.ndim > better.ndim else better, new, old)
            for new, old in zip(found, best, strict=True)
        ]
    _, codes, scale, zero = best
    rest = F.pad(zero, (0, -zero.shape[1] % values.shape[-1])).unflatten(1, (-1, values.shape[-1]))
    zero_parts: list[tuple[Tensor, Tensor]] = []
    for _ in ("coarse", "fine"):
        zero_scale = rest.abs().amax(-1).clamp_(min=1e-30) / 7
        zero_codes = (rest / zero_scale[..., None]).round_()
        rest = rest - zero_codes * zero_scale[..., None]
        zero_parts.append((zero_codes, zero_scale))
    rounded = zero - rest.flatten(1)[:, : zero.shape[1]]
    scale = scale.abs().maximum((zero - rounded).abs() / 4)  # even a group of equal weights can make up for the change
    values = values - rounded[..., None]
    codes = (values / scale[..., None]).round_().clamp_(-8, 7)
    shares = importance * codes
    squares = (shares * codes).sum(-1)
    scale = torch.where(squares > 0, (shares * values).sum(-1) / squares, scale)
    codes, scale = (torch.cat(parts, 1) for parts in zip((codes, scale), *zero_parts, strict=True))
    first, second = codes.add_(8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return first | second << 4, scale


def multiply_floats(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` for float32 on a CPU, by oneDNN where PyTorch would use MKL: faster for one row, for 20 and for 600.

    oneDNN's product has no gradients, so training uses PyTorch's.
    """
    if torch.is_grad_enabled() or not torch.backends.mkl.is_available():
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def compact_linears(
    model: nn.Module, quantize: str | None, device: torch.device, embedding_dtype: str | None = None
) -> None:
    """Replaces the linear layers of a meta-device model by those above, where that makes it smaller or faster.

    With `quantize`, word embeddings of 16 bits keep that dtype, `embedding_dtype`, which loses nothing. Raises a
    ValueError if `quantize` is not None, "int8" or "int4".
    """
    if quantize not in (None, *SCHEMES):
        raise ValueError(f"quantize is {quantize!r}; it must be {' or '.join(map(repr, SCHEMES))} or None")
    on_cpu, tied = device.type == "cpu", len(dict(model.named_parameters(remove_duplicate=False)))
    tied = tied > len(dict(model.named_parameters()))
    for path, module in list(model.named_modules()):
        for name, child in module.named_children():
            if quantize and name == "embed_tokens" and embedding_dtype in ("float16", "bfloat16"):
                child.to(getattr(torch, embedding_dtype))
            if not isinstance(child, nn.Linear):
                continue
            layout = bits_and_group(f"{path}.{name}", quantize, tied)
            if layout:
                compact = CompactLinear(child.in_features, child.out_features, child.bias is not None, *layout)
                compact.uses_runtime &= path.startswith("language_model")  # the others always multiply hundreds of rows
                setattr(module, name, compact)
            elif on_cpu and child.weight.dtype in (torch.float16, torch.bfloat16):
                child.__class__ = HalfLinear  # keeps the parameters, so that a tied head stays tied
            elif on_cpu and child.weight.dtype == torch.float32 and child.weight.numel() >= 2**20:
                child.__class__ = FloatLinear  # smaller layers gain little
        for names in SAME_INPUT:
            layers = [layer for name in names if isinstance(layer := getattr(module, name, None), CompactLinear)]
            shared = Shared(*layers)
            for index, layer in enumerate(layers):
                layer.shared, layer.index = shared, index


def bits_and_group(name: str, quantize: str | None, tied: bool) -> tuple[int, int] | None:
    """How a linear layer is stored: bits per weight and weights per group, or None if it is not quantised.

    See docs/quantization.md for the measurements behind it. A head that is tied to the word embeddings stays with them.
    """
    if quantize is None or (name.endswith("lm_head") and (tied or quantize == "int8")):
        return None
    if quantize == "int8" or not name.startswith("language_model.model."):
        return 8, 32
    return (4, 32) if name.endswith(("o_proj", "down_proj")) else (4, 64)


def refuse_nan(model: nn.Module) -> None:
    """Raises a ValueError that names parameters with NaN or infinity.

    ONNX Runtime drops NaN when it rounds activations, so that wrong answers would be all that is seen of it.
    """
    floats = ((name, tensor) for name, tensor in model.named_parameters() if tensor.is_floating_point())
    if broken := [name for name, tensor in floats if not tensor.isfinite().all()]:
        raise ValueError(f"the weights contain NaN or infinity, in {', '.join(broken[:5])}: download them again")


@contextlib.contextmanager
def single_thread(model_is_compact: bool) -> Iterator[None]:
    """Limits PyTorch to one thread while ONNX Runtime computes the products of a compact decoder with all cores.

    After each operation, the threads of both wait at full speed for the next one, on the cores that the other needs:
    with two threads each, a prompt took 1.4 times as long, and a token 1.2 times.
    """
    count = torch.get_num_threads()
    if alone := model_is_compact and matmul.is_installed() and count > 1:
        matmul.start_threads()
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if alone:
            torch.set_num_threads(count)


def computes_in(dtype: torch.dtype) -> bool:
    """Whether this CPU has fast matrix products in this 16-bit dtype: known only of bfloat16, with AVX-512 BF16."""
    uses_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"  # False as well if ATEN_CPU_CAPABILITY lowers it
    return dtype == torch.bfloat16 and uses_avx512 and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
