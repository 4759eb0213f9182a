"""Solutions of 04_generation.ipynb. Try for a while before you read on."""


# %% exercise 1
def cache_bytes(config, batch_size, tokens, bytes_per_number):
    """Bytes of the keys and values of so many tokens in each row."""
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return per_token * batch_size * tokens * bytes_per_number


# %% exercise 1, wrong
def cache_bytes(config, batch_size, tokens, bytes_per_number):
    """The width of the model is not that of the keys where heads share them."""
    return 2 * config.num_hidden_layers * config.hidden_size * batch_size * tokens * bytes_per_number


# %% exercise 2
def keep_min_p(logits, min_p):
    """Logits (B, V) -> the same with -inf for tokens less likely than min_p times the likeliest."""
    probabilities = logits.softmax(-1)
    least = min_p * probabilities.amax(-1, keepdim=True)
    return logits.masked_fill(probabilities < least, -torch.inf)


# %% exercise 2, wrong
def keep_min_p(logits, min_p):
    """An absolute limit keeps nothing at all where the model is unsure enough."""
    return logits.masked_fill(logits.softmax(-1) <= min_p, -torch.inf)


# %% exercise 3
@torch.no_grad()
def accept(model, cache, last, draft):
    """int, list of ints -> the list of new tokens, at least one and at most len(draft) + 1."""
    held = cache.length
    own = model(torch.tensor([[last, *draft]]), cache=cache).logits[0].argmax(-1).tolist()  # what follows each of them
    good = 0
    while good < len(draft) and own[good] == draft[good]:
        good += 1
    cache.length = held + 1 + good
    return own[: good + 1]


# %% exercise 3, wrong
@torch.no_grad()
def accept(model, cache, last, draft):
    """Right tokens, but the cache still holds the guesses that were not, and the next step would look at them."""
    own = model(torch.tensor([[last, *draft]]), cache=cache).logits[0].argmax(-1).tolist()
    good = 0
    while good < len(draft) and own[good] == draft[good]:
        good += 1
    return own[: good + 1]
