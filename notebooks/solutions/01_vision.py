"""Solutions of 01_vision.ipynb. Try for a while before you read on."""


# %% exercise 1
# Patches are numbered row by row: one row further down is six patches further on.
def patch_at(x: int, y: int) -> int:
    """The index of the patch that contains the pixel."""
    return (y // PATCH) * GRID + x // PATCH


# %% exercise 1, wrong
# x and y are swapped: right only on the diagonal.
def patch_at(x: int, y: int) -> int:
    """The index of the patch that contains the pixel."""
    return (x // PATCH) * GRID + y // PATCH


# %% exercise 2
# The parameter is one tensor: set it to zero, and restore it whatever happens. (A hook on `tower.embeddings` that
# subtracts the position embeddings again would do as well.)
def without_positions(pixels: torch.Tensor) -> torch.Tensor:
    """(N, 3, 96, 96) -> (N, P, Dv)"""
    weight = tower.embeddings.position_embedding.weight
    kept = weight.clone()
    weight.zero_()
    try:
        return tower(pixels)
    finally:
        weight.copy_(kept)


# %% exercise 2, wrong
# Subtracts the position embeddings from the output, after all layers have used them.
def without_positions(pixels: torch.Tensor) -> torch.Tensor:
    """(N, 3, 96, 96) -> (N, P, Dv)"""
    return tower(pixels) - tower.embeddings.position_embedding.weight[1:]


# %% exercise 3
# The heads are concatenated in the input of out_proj, 32 channels each. The return value of a pre-hook replaces the
# input.
def without_head(pixels: torch.Tensor, layer: int, head: int) -> torch.Tensor:
    """(N, 3, 96, 96) -> (N, P, Dv); layer and head count from 0."""
    attention = tower.encoder.layers[layer].self_attn
    width = tower.config.hidden_size // attention.num_heads

    def silence(module: torch.nn.Module, arguments: tuple) -> tuple:
        x = arguments[0].clone()
        x[..., head * width : (head + 1) * width] = 0
        return (x,)

    hook = attention.out_proj.register_forward_pre_hook(silence)
    try:
        return tower(pixels)
    finally:
        hook.remove()


# %% exercise 3, wrong
# Zeroes every fourth channel instead of 32 consecutive ones: the heads are not interleaved.
def without_head(pixels: torch.Tensor, layer: int, head: int) -> torch.Tensor:
    """(N, 3, 96, 96) -> (N, P, Dv); layer and head count from 0."""
    attention = tower.encoder.layers[layer].self_attn

    def silence(module: torch.nn.Module, arguments: tuple) -> tuple:
        x = arguments[0].clone()
        x[..., head :: attention.num_heads] = 0
        return (x,)

    hook = attention.out_proj.register_forward_pre_hook(silence)
    try:
        return tower(pixels)
    finally:
        hook.remove()
