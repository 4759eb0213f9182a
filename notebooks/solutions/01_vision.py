"""Solutions of 01_vision.ipynb. Try for a while before you read on."""


# %% exercise 1
# Rows come first: whoever goes down by a row of patches passes six of them.
def patch_at(x: int, y: int) -> int:
    """The number of the patch in which the pixel lies."""
    return (y // PATCH) * GRID + x // PATCH


# %% exercise 1, wrong
# x and y changed places: right only on the diagonal.
def patch_at(x: int, y: int) -> int:
    """The number of the patch in which the pixel lies."""
    return (x // PATCH) * GRID + y // PATCH


# %% exercise 2
# The parameter is one tensor: set it to zero, and put it back whatever happens. (A hook on `tower.embeddings` that
# takes the positions away again would do as well.)
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
# The positions are taken from the output, when all layers have worked with them.
def without_positions(pixels: torch.Tensor) -> torch.Tensor:
    """(N, 3, 96, 96) -> (N, P, Dv)"""
    return tower(pixels) - tower.embeddings.position_embedding.weight[1:]


# %% exercise 3
# The heads lie side by side in what goes into out_proj: 32 channels each. What a pre-hook returns takes the place of
# the input.
def without_head(pixels: torch.Tensor, layer: int, head: int) -> torch.Tensor:
    """(N, 3, 96, 96) -> (N, P, Dv); layer and head are counted from 0."""
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
# Every fourth channel instead of 32 in a row: the heads are not interleaved.
def without_head(pixels: torch.Tensor, layer: int, head: int) -> torch.Tensor:
    """(N, 3, 96, 96) -> (N, P, Dv); layer and head are counted from 0."""
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
