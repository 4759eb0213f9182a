"""LoRA: a frozen linear layer plus a small trained correction, and how it is put into a model, taken out and merged.

    y = W x + b + (alpha / rank) B A x        W (out, in) frozen; A (rank, in) random, B (out, rank) zero at the start

Training changes A and B only: rank * (in + out) numbers instead of in * out. W needs neither gradients nor optimiser
state, so it may be stored in 16 bits or quantised; `multiply_frozen` dequantises a few rows at a time, in both passes.
A layer that is trained in full, as the projector's are, is a copy in float32. `switch` turns all of it off and on.

Source: LoRA (arXiv 2106.09685), section 4.1. PEFT computes the same, in the same dtypes.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extras.quantize import BLOCK, CompactLinear, computes_in

Linear = nn.Linear | CompactLinear  # any linear layer of a base


class LoraLinear(nn.Module):
    """A frozen linear layer with a trained correction of low rank; `scaling` is alpha / rank."""

    def __init__(self, base_layer: Linear, rank: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__()
        width, out, device = base_layer.in_features, base_layer.out_features, base_layer.weight.device
        self.base_layer, self.scaling, self.dropout, self.active = base_layer, scaling, dropout, True
        self.lora_A = nn.Linear(width, rank, bias=False, device=device)  # Kaiming-uniform, as PyTorch's default is
        self.lora_B = nn.Linear(rank, out, bias=False, device=device)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype of the base; the correction is computed in float32."""
        y = self.base_layer(x)
        if not self.active:
            return y
        x = F.dropout(x.to(self.lora_A.weight.dtype), self.dropout, self.training)
        return (y + self.lora_B(self.lora_A(x)) * self.scaling).to(y.dtype)

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """W + (alpha / rank) B A, (out, in), in float32; and b."""
        correction = self.scaling * (self.lora_B.weight @ self.lora_A.weight)
        return self.base_layer.weight.float() + correction, self.base_layer.bias


class FullLinear(nn.Module):
    """A copy of a linear layer, in float32, that is trained in its place."""

    def __init__(self, base_layer: Linear) -> None:
        super().__init__()
        self.base_layer, self.active = base_layer, True
        self.weight = nn.Parameter(torch.cat(list(dequantized(base_layer, torch.float32))).detach())
        self.bias = None if base_layer.bias is None else nn.Parameter(base_layer.bias.detach().float().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in float32."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias) if self.active else self.base_layer(x)

    def merged(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, self.bias


def adapted_layers(model: nn.Module) -> dict[str, LoraLinear | FullLinear]:
    """The layers of a model that belong to its adapter, by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear | FullLinear)}


def put_in(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Replaces the modules of these names."""
    for name, layer in layers.items():
        model.set_submodule(name, layer)


def switch(model: nn.Module, on: bool) -> None:
    """Turns the adapter of a model on or off. A KVCache from before has to be discarded."""
    for layer in adapted_layers(model).values():
        layer.active = on


def take_out(model: nn.Module) -> None:
    """Removes the adapter: the model is the base again."""
    put_in(model, {name: layer.base_layer for name, layer in adapted_layers(model).items()})


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Adds the adapter to the weights of the base, rounded to their dtype, and leaves no trace of it.

    Raises a ValueError if the base is quantised, because rounding the sum to a few bits would lose most of the adapter.
    """
    layers = adapted_layers(model)
    if any(isinstance(layer.base_layer, CompactLinear) for layer in layers.values()):
        raise ValueError("an adapter cannot be merged into a quantised model: load the base without quantize")
    for layer in layers.values():
        base, (weight, bias) = layer.base_layer, layer.merged()
        base.weight = nn.Parameter(weight.to(base.weight.dtype))  # a new one: the old may be a file's pages
        base.bias = None if bias is None else nn.Parameter(bias.to(base.weight.dtype))
    take_out(model)


def dequantized(layer: Linear, dtype: torch.dtype) -> Iterator[Tensor]:
    """The weight matrix of a linear layer of any kind in this dtype, a few rows at a time: (BLOCK or fewer, in)."""
    blocks = layer.blocks() if isinstance(layer, CompactLinear) else layer.weight.split(BLOCK)
    return (block.to(dtype) for block in blocks)


class FrozenProduct(torch.autograd.Function):
    """x W^T, with a gradient for x only. Keeps neither x nor the dequantised W for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Linear, dtype: torch.dtype) -> Tensor:  # noqa: ANN401
        ctx.layer, ctx.dtype, rows = layer, dtype, x.to(dtype)
        return torch.cat([F.linear(rows, weight) for weight in dequantized(layer, dtype)], dim=-1).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        parts = zip(grad.to(ctx.dtype).split(BLOCK, dim=-1), dequantized(ctx.layer, ctx.dtype), strict=True)
        return sum((part @ weight).float() for part, weight in parts).to(grad.dtype), None, None


def multiply_frozen(layer: Linear, x: Tensor) -> Tensor:
    """What the forward of a frozen linear layer computes, with gradients for x: (..., in) -> (..., out)."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    dtype = x.dtype if x.device.type != "cpu" or computes_in(x.dtype) else torch.float32  # the one to compute in
    if layer.weight.dtype == dtype == x.dtype:
        return F.linear(x, layer.weight, layer.bias)  # keeps W itself for the backward pass, not a copy
    y = FrozenProduct.apply(x, layer, dtype)
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


def freeze_base(model: nn.Module) -> None:
    """Makes a model the base that adapters are trained on: no parameter has gradients, but they pass every layer."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Linear):
            module.forward = functools.partial(multiply_frozen, module)  # type: ignore[method-assign]
