"""Linear layers for CPUs: all cores stream the weights, which take four, two or one byte each.

    RowsLinear  weight (out, in) float32
    HalfLinear  weight (out, in) float16 or bfloat16
    Int8Linear  weight (out, in) int8, scale (out,) float32      with the true weight ~ int8 * scale

A CPU that answers reads all weights from memory once per token, so their bytes are what an answer's speed depends on; a
prompt has hundreds of rows and depends on arithmetic. Each layer does both in the way that CPUs are fast at, and takes
the place of an `nn.Linear` for inference: the same arguments, names and shapes.

Int8 is symmetric and per output channel: each row of the matrix has the scale that brings its largest weight to 127.
Only weights are rounded to 8 bits. The CPU's integer products need bytes on both sides, so each activation is split
into two of them, 15 bits together: x = step * (254 * high + low), where each row of activations has a step of its own.
The embeddings and the head stay as they are, for the head is the layer where rounding changes answers most.

Source: the symmetric scheme of LLM.int8() (arXiv 2208.07339), without its treatment of outliers, which 15 bits make
superfluous. The choice of kernels is measured, on PyTorch 2.13 and an AMD EPYC with AVX-512 VNNI; bench.py repeats it.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 256  # rows whose intermediate results stay in the CPU's cache
PIECES = 16  # that a matrix is cut into, for all cores to have some


class RowsLinear(nn.Linear):
    """Weights of float32. MKL multiplies a single row, and any number up to about 16, on one core."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        number = x.shape[:-1].numel()  # M
        if x.device.type != "cpu" or number > 16 or self.out_features % PIECES:
            return super().forward(x)
        rows = x.reshape(1, number, self.in_features).expand(PIECES, -1, -1)  # (PIECES, M, in)
        parts = torch.bmm(rows, self.weight.view(PIECES, -1, self.in_features).mT)  # (PIECES, M, out / PIECES)
        out = parts.transpose(0, 1).reshape(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias


class HalfLinear(nn.Linear):
    """Weights of 16 bits on a CPU that has no units for such numbers."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype of x."""
        if x.device.type != "cpu" or x.shape[:-1].numel() == 1:  # a single row: as fast as memory allows
            return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)
        rows = x.float()
        out = torch.cat([F.linear(rows, weight.float()) for weight in self.weight.split(4 * BLOCK)], dim=-1)
        return (out if self.bias is None else out.add_(self.bias)).to(x.dtype)


class Int8Linear(nn.Module):
    """Weights of one byte."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        weight = torch.empty(out_features, in_features, dtype=torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.register_buffer("scale", torch.empty(out_features), persistent=True)

    @torch.no_grad()
    def load_weight(self, weight: Tensor) -> None:
        """Rounds a weight matrix (out, in) of any dtype to int8, a few rows at a time, to need no second matrix."""
        self.scale = torch.empty(len(weight), device=weight.device)
        self.weight = nn.Parameter(torch.empty_like(weight, dtype=torch.int8), requires_grad=False)
        parts = (tensor.split(32) for tensor in (weight, self.scale, self.weight))
        for rows, scale, rounded in zip(*parts, strict=True):
            rows = rows.float()
            scale.copy_(torch.linalg.vector_norm(rows, torch.inf, dim=1).clamp_(min=1e-30) / 127)
            rounded.copy_(rows.div(scale[:, None]).round_())

    def dequantized(self) -> Tensor:
        """The weight matrix (out, in) that the layer computes with, float32."""
        return self.weight.float() * self.scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype of x."""
        if x.device.type != "cpu" or self.weight.shape[1] == 1 or not integer_products():  # slower, and right anywhere
            kind = torch.float32 if x.device.type == "cpu" else x.dtype
            parts = zip(self.weight.split(4 * BLOCK), self.scale.split(4 * BLOCK), strict=True)
            parts = [F.linear(x.to(kind), (part * scale[:, None]).to(kind)) for part, scale in parts]
            out = torch.cat(parts, dim=-1)
            return (out if self.bias is None else out.add_(self.bias)).to(x.dtype)
        rows = x.reshape(-1, x.shape[-1]).float()  # (M, in)
        out = rows.new_empty(len(rows), len(self.weight))
        for some, result in zip(rows.split(BLOCK), out.split(BLOCK), strict=True):
            step = some.abs().amax(dim=1, keepdim=True).clamp_(min=1e-30) / (127 * 254)  # (M, 1)
            low = some / step
            high = (low / 254).round_()
            low.sub_(high, alpha=254).round_()
            both = torch.cat([high.to(torch.int8), low.to(torch.int8)])
            high, low = self.product(both).float().chunk(2)
            torch.mul(low.add_(high, alpha=254).mul_(step), self.scale, out=result)
        out = out if self.bias is None else out.add_(self.bias)
        return out.to(x.dtype).reshape(*x.shape[:-1], -1)

    def product(self, both: Tensor) -> Tensor:
        """(2 M, in) int8 -> (2 M, out) int32, the way that reads the weights fastest for so many rows."""
        if len(both) == 2:  # only a single row streams; what it read is in the cache when the second one comes
            parts = [[torch._int_mm(row[None], weight.t()) for row in both] for weight in self.weight.split(4096)]
            return torch.cat([torch.cat(part) for part in parts], dim=1)
        if len(both) <= 2 * BLOCK // 4:  # with the weights on the left, they need not be rearranged first
            return torch._int_mm(self.weight, both.t()).t()
        return torch._int_mm(both, self.weight.t())


@functools.cache
def integer_products() -> bool:
    """Whether this CPU's integer products are exact: without VNNI instructions, sums of two are cut off at 2**15."""
    large = torch.full((64, 64), 127, dtype=torch.int8)
    return all(bool((torch._int_mm(large[:rows], large) == 64 * 127**2).all()) for rows in (1, 64))


def compact_linears(model: nn.Module, quantize: str | None, device: torch.device) -> None:
    """Exchanges the linear layers of a model without weights for those above, where that makes it smaller or faster."""
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    on_cpu = device.type == "cpu"
    for module in list(model.modules()):
        for name, child in module.named_children():
            if not isinstance(child, nn.Linear) or child.weight in embeddings:  # a tied head stays as it is
                continue
            dtype, shape = child.weight.dtype, (child.in_features, child.out_features, child.bias is not None)
            if quantize == "int8" and name != "lm_head":
                setattr(module, name, Int8Linear(*shape))
            elif on_cpu and dtype == torch.float32 and child.weight.numel() >= 2**20:  # else one core is enough
                setattr(module, name, RowsLinear(*shape))
            elif on_cpu and dtype != torch.float32 and not computes_in(dtype):
                setattr(module, name, HalfLinear(*shape, dtype=dtype))


def computes_in(dtype: torch.dtype) -> bool:
    """Whether this CPU has units for wide products of 16-bit numbers."""
    return dtype == torch.bfloat16 and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
