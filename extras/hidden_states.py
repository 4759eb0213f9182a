"""The hidden states between the decoder's layers, recorded by hooks, so that the decoder need not collect them."""

from torch import Tensor

from llama import KVCache, LlamaModel


def with_hidden_states(
    decoder: LlamaModel, embeddings: Tensor, cache: KVCache | None, padding: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Runs the decoder on embeddings (B, T, D): its output (B, T, D), and all hidden states as transformers has them.

    These are the input of each layer, the embeddings first, and finally the normalised output.
    """
    states: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda layer, args: states.append(args[0])) for layer in decoder.layers]
    try:
        hidden = decoder(embeddings, cache, padding)
    finally:
        for hook in hooks:
            hook.remove()
    return hidden, (*states, hidden)
