"""Solutions of 07_the_real_7b.ipynb. Try for a while before you read on."""


# %% exercise 1
def count_decoder_parameters(config):
    """LlamaConfig -> the number of parameters of embeddings, layers, final norm and head."""
    width, heads, key_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    attention = 2 * width * heads * config.head_dim + 2 * width * key_heads * config.head_dim  # q and o, k and v
    mlp = 3 * width * config.intermediate_size
    return config.num_hidden_layers * (attention + mlp + 2 * width) + width + 2 * config.vocab_size * width


# %% exercise 1, wrong
def count_decoder_parameters(config):
    """This assumes as many key-value heads as query heads, which the 7B and the 13B have, but other models do not."""
    width = config.hidden_size
    layer = 4 * width * width + 3 * width * config.intermediate_size + 2 * width
    return config.num_hidden_layers * layer + width + 2 * config.vocab_size * width


# %% exercise 2
def max_batch_size(config, free, tokens=1000):
    """LlamaConfig and bytes -> the size of the largest batch."""
    left = free - weight_bytes(on_meta(config, torch.bfloat16))
    per_sequence = tokens * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    return max(0, int(left // per_sequence))


# %% exercise 2, wrong
def max_batch_size(config, free, tokens=1000):
    """This counts only the keys; the values take the same amount again."""
    left = free - weight_bytes(on_meta(config, torch.bfloat16))
    per_sequence = tokens * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    return max(0, int(left // per_sequence))


# %% exercise 3
def prompt_flops(config, new, cached=0):
    """The FLOPs of the matrices of all layers and of attention, without the head."""
    width, inner = config.hidden_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    matrices = 2 * width * (inner + keys) + 3 * width * config.intermediate_size
    return config.num_hidden_layers * (2 * new * matrices + 4 * new * (new + cached) * inner)


# %% exercise 3, wrong
def prompt_flops(config, new, cached=0):
    """New tokens attend to the cached ones, too."""
    matrices = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * (2 * new * matrices + 4 * new * new * config.hidden_size)
