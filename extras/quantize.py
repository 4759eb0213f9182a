"""Linear layers for CPUs, with the fastest kernels for weights of four, two or one byte.

    FloatLinear  weight (out, in) float32
    HalfLinear   weight (out, in) float16 or bfloat16
    Int8Linear   weight (out, in) int8, scale (out,) float32      weight = int8 * scale, approximately

Decoding reads every weight from memory once per token, so its speed depends on their size in bytes; a prompt has
hundreds of rows, so its speed depends on arithmetic. Each layer uses a fast kernel for both cases, and is a drop-in
replacement for `nn.Linear` for inference, with the same arguments, names and shapes.

Int8 quantisation is symmetric and per output channel: each row of the matrix has its own scale, which maps its largest
weight to 127. Only weights are rounded to 8 bits. Integer products on CPUs need bytes on both sides, so activations are
rounded to 14 bits, with one step per row, and their upper and lower 7 bits are multiplied separately. (With 8 bits
each, CPUs without VNNI would overflow, because they add products in pairs, in 16 bits.) All linear layers of vision
tower, projector and decoder are quantised. The head is not, because rounding it changes answers most; nor are the word
embeddings, which are looked up, not multiplied, and everything that is not a linear layer.

Source: the symmetric scheme of LLM.int8() (arXiv 2208.07339), without its treatment of outliers, which activations of
14 bits make unnecessary. The kernels were chosen by measurement, with PyTorch 2.13 on an AMD EPYC with AVX-512 VNNI
and BF16; there, PyTorch's own kernel for a single row of bfloat16 is twice as fast as oneDNN's.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 256  # rows per product: few enough for intermediate results to stay in the CPU's cache


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
            parts = [multiply_floats(rows, weight.float()) for weight in self.weight.split(4 * BLOCK)]
            out = torch.cat(parts, dim=-1)
            return (out if self.bias is None else out.add_(self.bias)).to(x.dtype)
        return super().forward(x)


class Int8Linear(nn.Module):
    """Int8 weights: a tensor (out, in), on a CPU packed by oneDNN for its int8 kernel."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        weight = torch.empty(out_features, in_features, dtype=torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.register_buffer("scale", torch.empty(out_features))

    @torch.no_grad()
    def load_weight(self, weight: Tensor) -> None:
        """Rounds a weight matrix (out, in) of any dtype to int8, a few rows at a time: no float32 copy is needed."""
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
        """The weight matrix (out, in) in float32, with the values that the layer computes with."""
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
    """`F.linear` for float32 on a CPU, by oneDNN where PyTorch would use MKL: faster for one row, for 20 and for 600.

    oneDNN's product has no gradients, so training uses PyTorch's.
    """
    if torch.is_grad_enabled() or not torch.backends.mkl.is_available():
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def multiply_bytes(rows: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """((rows - 64) @ packed.T) * scale: uint8 rows (M, in) below 128, packed matrix (out, in) -> (M, out) float32.

    Two rows are computed, and returned, as four: oneDNN's kernel for four rows is faster.
    """
    if len(rows) == 2:
        rows = torch.cat([rows, rows])
    kernel, zero = torch.ops.onednn.qlinear_pointwise, torch.zeros(1, dtype=torch.int32)
    return kernel(rows, 1.0, 64, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], "")


@functools.cache
def products_of_bytes() -> bool:
    """Whether oneDNN has an exact int8 kernel for this CPU. It has one on x86; other CPUs have not been tried."""
    weight, rows = torch.full((64, 64), 127, dtype=torch.int8), torch.full((4, 64), 127, dtype=torch.uint8)
    try:
        product = multiply_bytes(rows, torch.ops.onednn.qlinear_prepack(weight, None), torch.ones(64))
    except (AttributeError, RuntimeError):  # a PyTorch without oneDNN, or a CPU that has no such kernel
        return False
    return bool((product == 64 * 127 * 63).all())


def compact_linears(
    model: nn.Module, quantize: str | None, device: torch.device, embedding_dtype: str | None = None
) -> None:
    """Replaces the linear layers of a meta-device model by those above, where that makes it smaller or faster.

    With `quantize`, word embeddings of 16 bits keep that dtype, `embedding_dtype`, which loses nothing. Raises a
    ValueError if `quantize` is not None or "int8".
    """
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize is {quantize!r}; it must be 'int8' or None")
    on_cpu = device.type == "cpu"
    for module in list(model.modules()):
        for name, child in module.named_children():
            if quantize and name == "embed_tokens" and embedding_dtype in ("float16", "bfloat16"):
                child.to(getattr(torch, embedding_dtype))
            if not isinstance(child, nn.Linear):
                continue
            if quantize == "int8" and name != "lm_head":
                setattr(module, name, Int8Linear(child.in_features, child.out_features, child.bias is not None))
            elif on_cpu and child.weight.dtype in (torch.float16, torch.bfloat16):
                child.__class__ = HalfLinear  # keeps the parameters, so that a tied head stays tied
            elif on_cpu and child.weight.dtype == torch.float32 and child.weight.numel() >= 2**20:
                child.__class__ = FloatLinear  # smaller layers gain little


def computes_in(dtype: torch.dtype) -> bool:
    """Whether this CPU has fast matrix products in this 16-bit dtype: known only of bfloat16, with AVX-512 BF16."""
    return dtype == torch.bfloat16 and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()  # or False
