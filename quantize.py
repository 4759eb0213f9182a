"""Linear layers for CPUs: all cores stream the weights, which take four, two or one byte each.

    FloatLinear  weight (out, in) float32
    HalfLinear   weight (out, in) float16 or bfloat16
    Int8Linear   weight (out, in) int8, scale (out,) float32      with the true weight ~ int8 * scale

A CPU that answers reads all weights from memory once per token, so their bytes are what an answer's speed depends on; a
prompt has hundreds of rows and depends on arithmetic. Each layer does both in the way that CPUs are fast at, and takes
the place of an `nn.Linear` for inference: the same arguments, names and shapes.

Int8 is symmetric and per output channel: each row of the matrix has the scale that brings its largest weight to 127.
Only weights are rounded to 8 bits. The CPU's products of integers need bytes on both sides, so the activations are
rounded to 14 bits, with a step for each row of them, and their upper and lower 7 bits are multiplied separately. (With
8 bits each, CPUs without VNNI instructions would overflow, as they add products in pairs, into 16 bits.) The head stays
as it is, for rounding it changes answers most; so do the word embeddings, which are looked up, not multiplied.

Source: the symmetric scheme of LLM.int8() (arXiv 2208.07339), without its treatment of outliers, which 14 bits make
superfluous. The kernels were chosen by measuring, with PyTorch 2.13 on an AMD EPYC with AVX-512 VNNI and BF16; there,
PyTorch's own kernel for a single row of bfloat16 is twice as fast as oneDNN's.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 256  # rows whose intermediate results stay in the CPU's cache


class FloatLinear(nn.Linear):
    """Weights of float32: oneDNN multiplies them faster than MKL, which PyTorch takes."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        return multiply_floats(x, self.weight, self.bias) if x.device.type == "cpu" else super().forward(x)


class HalfLinear(nn.Linear):
    """Weights of 16 bits: one row by PyTorch's own kernel, and several in float32 where the CPU has no better units."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        on_cpu, single = x.device.type == "cpu", x.shape[:-1].numel() == 1
        if on_cpu and single and torch.backends.mkldnn.enabled:
            # For all threads; but only one that found oneDNN on switches it on again, so it cannot be left off.
            torch.backends.mkldnn.enabled = False
            try:
                return super().forward(x)
            finally:
                torch.backends.mkldnn.enabled = True
        if on_cpu and not single and not computes_in(x.dtype):
            rows = x.float()
            parts = [multiply_floats(rows, weight.float()) for weight in self.weight.split(4 * BLOCK)]
            out = torch.cat(parts, dim=-1)
            return (out if self.bias is None else out.add_(self.bias)).to(x.dtype)
        return super().forward(x)


class Int8Linear(nn.Module):
    """Weights of one byte: a tensor (out, in), or on a CPU the same packed by oneDNN for its products of bytes."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        weight = torch.empty(out_features, in_features, dtype=torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.register_buffer("scale", torch.empty(out_features))

    @torch.no_grad()
    def load_weight(self, weight: Tensor) -> None:
        """Rounds a weight matrix (out, in) of any dtype to int8, a few rows at a time, to need no second matrix."""
        self.scale = torch.empty(len(weight), device=weight.device)
        whole = torch.empty_like(weight, dtype=torch.int8)
        for rows, scale, rounded in zip(weight.split(32), self.scale.split(32), whole.split(32), strict=True):
            rows = rows.float()
            scale.copy_(torch.linalg.vector_norm(rows, torch.inf, dim=1).clamp_(min=1e-30) / 127)
            rounded.copy_(rows.div(scale[:, None]).round_())
        packs = weight.device.type == "cpu" and products_of_bytes()
        whole = torch.ops.onednn.qlinear_prepack(whole, None) if packs else whole
        self.weight = nn.Parameter(whole, requires_grad=False)

    def dequantized(self) -> Tensor:
        """The weight matrix (out, in) that the layer computes with, float32."""
        weight = self.weight.to_dense().t() if self.weight.is_mkldnn else self.weight
        return weight.float() * self.scale[:, None]

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype of x."""
        rows = x.reshape(-1, x.shape[-1])  # (M, in)
        if self.weight.is_mkldnn:
            out = torch.empty(len(rows), len(self.scale), dtype=torch.float32)
            for some, result in zip(rows.float().split(BLOCK), out.split(BLOCK), strict=True):
                step = some.abs().amax(dim=1, keepdim=True).clamp_(min=1e-30) / 8127  # (M, 1); 63 * 128 + 63
                bits = (some / step).add_(64 * 128 + 64 + 0.5).to(torch.int16)  # .5: to the nearest; 14 bits, 0 or more
                halves = torch.cat([(bits >> 7).to(torch.uint8), (bits & 127).to(torch.uint8)])
                high, low = multiply_bytes(halves, self.weight, self.scale).split(len(some))[:2]
                torch.add(low, high, alpha=128, out=result).mul_(step)
        else:
            dtype = torch.float32 if x.device.type == "cpu" else x.dtype
            out = F.linear(rows.to(dtype), self.dequantized().to(dtype))
        out = out if self.bias is None else out.add_(self.bias)
        return out.to(x.dtype).reshape(*x.shape[:-1], -1)


def multiply_floats(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` for float32, but where PyTorch would take MKL, by oneDNN: MKL is slower at one row, 20 or 600.

    oneDNN's product has no gradients, so training takes PyTorch's.
    """
    if torch.is_grad_enabled() or not torch.backends.mkl.is_available():
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def multiply_bytes(rows: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """Rows (M, in) of bytes below 128, less 64, times a packed matrix (out, in) times scale (out,) -> (M, out) float32.

    Two rows come back as four: oneDNN's kernel for four is the faster one.
    """
    if len(rows) == 2:
        rows = torch.cat([rows, rows])
    kernel, zero = torch.ops.onednn.qlinear_pointwise, torch.zeros(1, dtype=torch.int32)
    return kernel(rows, 1.0, 64, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], "")


@functools.cache
def products_of_bytes() -> bool:
    """Whether oneDNN multiplies bytes exactly here: on x86, which is where it has been tried, it does."""
    weight, rows = torch.full((64, 64), 127, dtype=torch.int8), torch.full((4, 64), 127, dtype=torch.uint8)
    try:
        product = multiply_bytes(rows, torch.ops.onednn.qlinear_prepack(weight, None), torch.ones(64))
    except (AttributeError, RuntimeError):  # a PyTorch without oneDNN, or a CPU that has no such kernel
        return False
    return bool((product == 64 * 127 * 63).all())


def compact_linears(model: nn.Module, quantize: str | None, device: torch.device) -> None:
    """Exchanges the linear layers of a model without weights for those above, where that makes it smaller or faster."""
    on_cpu = device.type == "cpu"
    for module in list(model.modules()):
        for name, child in module.named_children():
            if not isinstance(child, nn.Linear):
                continue
            if quantize == "int8" and name != "lm_head":
                setattr(module, name, Int8Linear(child.in_features, child.out_features, child.bias is not None))
            elif on_cpu and child.weight.dtype in (torch.float16, torch.bfloat16):
                child.__class__ = HalfLinear  # with the same parameters: a head that is tied stays tied
            elif on_cpu and child.weight.dtype == torch.float32 and child.weight.numel() >= 2**20:
                child.__class__ = FloatLinear  # smaller ones gain little


def computes_in(dtype: torch.dtype) -> bool:
    """Whether this CPU is fast at wide products of these numbers: known only of bfloat16, with AVX-512 BF16."""
    return dtype == torch.bfloat16 and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()  # or False
