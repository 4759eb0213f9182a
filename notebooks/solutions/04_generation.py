"""Solutions of 04_generation.ipynb. Try for a while before you read on."""


# %% exercise 1
def cache_bytes(config, batch_size, tokens, bytes_per_number):
    """The bytes of the keys and values of `batch_size` sequences of `tokens` tokens each."""
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return per_token * batch_size * tokens * bytes_per_number


# %% exercise 1, wrong
def cache_bytes(config, batch_size, tokens, bytes_per_number):
    """With grouped-query attention, the keys are narrower than the model."""
    return 2 * config.num_hidden_layers * config.hidden_size * batch_size * tokens * bytes_per_number


# %% exercise 2
def keep_min_p(logits, min_p):
    """Logits (B, V) -> logits (B, V), -inf where a token is less than min_p times as likely as the most likely one."""
    probabilities = logits.softmax(-1)
    threshold = min_p * probabilities.amax(-1, keepdim=True)
    return logits.masked_fill(probabilities < threshold, -torch.inf)


# %% exercise 2, wrong
def keep_min_p(logits, min_p):
    """An absolute threshold drops every token where the model is uncertain enough."""
    return logits.masked_fill(logits.softmax(-1) <= min_p, -torch.inf)


# %% exercise 3
@torch.no_grad()
def accept(model, cache, last, draft):
    """int, list of ints -> the list of new tokens: at least 1, at most len(draft) + 1."""
    start = cache.length
    own = model(torch.tensor([[last, *draft]]), cache=cache).logits[0].argmax(-1).tolist()  # the token after each
    good = 0
    while good < len(draft) and own[good] == draft[good]:
        good += 1
    cache.length = start + 1 + good
    return own[: good + 1]


# %% exercise 3, wrong
@torch.no_grad()
def accept(model, cache, last, draft):
    """The tokens are correct, but the rejected ones stay in the cache, and the next step would attend to them."""
    own = model(torch.tensor([[last, *draft]]), cache=cache).logits[0].argmax(-1).tolist()
    good = 0
    while good < len(draft) and own[good] == draft[good]:
        good += 1
    return own[: good + 1]
