"""Solutions of 03_llama.ipynb. Try for a while before you read on."""


# %% exercise 1
# Token t (counted from 1) sees t tokens, itself included: 1 + 2 + ... + T.
def visible_pairs(T: int) -> int:
    """How many pairs a causal mask leaves."""
    return T * (T + 1) // 2


# %% exercise 1, wrong
# As if no token saw itself.
def visible_pairs(T: int) -> int:
    """How many pairs a causal mask leaves."""
    return T * (T - 1) // 2


# %% exercise 2
# G = H / Hkv neighbouring query heads share a key-value head: the order of `repeat_interleave`.
def key_value_head(h: int, H: int, Hkv: int) -> int:
    """The key-value head that query head h reads."""
    return h // (H // Hkv)


# %% exercise 2, wrong
# The order of `repeat` instead: 0, 1, 0, 1.
def key_value_head(h: int, H: int, Hkv: int) -> int:
    """The key-value head that query head h reads."""
    return h % Hkv


# %% exercise 3
# A pre-hook catches the stream of A (in `trace`). Another one, whose return value replaces the input, puts it into B.
def patched(inputs_a, inputs_b, i):
    """Probabilities (V,) of the next token for B, with A's image positions from the input of layer i on."""
    module = [*decoder.layers, decoder.norm][i]
    stream_a = trace(inputs_a)["in"][i]  # (T, D)

    def put(_, arguments):
        x = arguments[0].clone()
        x[0, is_image] = stream_a[is_image]
        return (x, *arguments[1:])

    hook = module.register_forward_pre_hook(put)
    try:
        return model(**inputs_b).logits[0, -1].softmax(-1)
    finally:
        hook.remove()


# %% exercise 3, wrong
# Replaces all positions, including the last one with the answer: B then says what A says, wherever it is patched.
def patched(inputs_a, inputs_b, i):
    """Probabilities (V,) of the next token for B, with A's image positions from the input of layer i on."""
    module = [*decoder.layers, decoder.norm][i]
    stream_a = trace(inputs_a)["in"][i]

    hook = module.register_forward_pre_hook(lambda _, arguments: (stream_a[None], *arguments[1:]))
    try:
        return model(**inputs_b).logits[0, -1].softmax(-1)
    finally:
        hook.remove()
