"""Small weights: linear layers that store one byte per weight and compute almost as if they stored four.

    weight (out, in) float  ->  weight (out, in) int8, scale (out,) float32      with weight ~ int8 * scale

A 7B model takes 8 GB this way instead of 28, and its prompts are computed faster. (A CPU that answers reads all weights
from memory once per token, so a quarter of the bytes could be four times the speed there; with a single row, PyTorch's
integer product is far from that, as bench.py shows.) Rounding is symmetric and per output channel: each row of the
matrix has the scale that brings its largest weight to 127. The head and the embeddings stay as they are: of all layers,
the head is the one in which rounding changes the answers most.

Only the weights are rounded to 8 bits. The CPU's fast integer products need integers on both sides, so the activations
are split into two bytes each, 15 bits together: x = step * (high + low / 254), with the step of each row its own. Both
products go through the weights together, as if there were twice as many rows.

Source: the symmetric scheme of LLM.int8() (arXiv 2208.07339), without its treatment of outliers, which 15 bits make
superfluous.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Int8Linear(nn.Module):
    """Takes the place of an `nn.Linear` for inference: the same names, the same shapes, weights of one byte.

    Args:
        in_features, out_features, bias: as for `nn.Linear`.
    """

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
        for rows, scale, rounded in zip(weight.split(256), self.scale.split(256), self.weight.split(256), strict=True):
            rows = rows.float()
            scale.copy_(rows.abs().amax(dim=1).clamp_(min=1e-30) / 127)
            rounded.copy_(rows.div_(scale[:, None]).round_())

    def dequantized(self) -> Tensor:
        """The weight matrix (out, in) that the layer computes with, float32."""
        return self.weight.float() * self.scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype of x."""
        if x.device.type != "cpu":  # the integer kernels elsewhere are for large batches only
            out = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
            return out if self.bias is None else out + self.bias
        rows = x.reshape(-1, x.shape[-1]).float()  # (M, in)
        step = rows.abs().amax(dim=1, keepdim=True).clamp_(min=1e-30) / 127  # (M, 1)
        high = (rows := rows / step).round()
        low = (rows - high).mul_(254).round_()
        both = torch._int_mm(torch.cat([high, low]).to(torch.int8), self.weight.t())  # (2 M, out), int32
        high, low = both.float().chunk(2)
        out = high.add_(low, alpha=1 / 254).mul_(step).mul_(self.scale)
        out = out if self.bias is None else out.add_(self.bias)
        return out.to(x.dtype).reshape(*x.shape[:-1], -1)


def quantize_linears(model: nn.Module) -> None:
    """Puts an empty Int8Linear in the place of every `nn.Linear` but the head, before weights are loaded."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(module, name, Int8Linear(child.in_features, child.out_features, child.bias is not None))
