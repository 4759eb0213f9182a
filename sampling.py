"""From logits to the next token: greedy decoding, or sampling with temperature, top-k and top-p.

No function keeps state: randomness comes from `generator`, or PyTorch's global one if it is None. Source: transformers'
logits processors, and arXiv 1904.09751 for top-p (nucleus) sampling.
"""

import math

import torch
from torch import Tensor


def filter_logits(logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Logits (B, V) -> logits (B, V) of the distribution to sample from: temperature first, then top-k, then top-p.

    Args:
        logits: (B, V), float32.
        temperature: above 0; values below 1 sharpen the distribution, values above 1 flatten it.
        top_k: keep the k most likely tokens.
        top_p: keep the smallest set of most likely tokens whose probabilities sum to at least p.
    """
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None and top_p < 1:
        ascending, order = logits.sort()
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        dropped[:, -1] = False  # the most likely token is never dropped
        logits = logits.masked_fill(dropped.scatter(1, order, dropped), -math.inf)
    return logits


def penalize_repetition(logits: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """Makes every token of ids (B, T) less likely (penalty above 1), or more (below): logits (B, V) -> (B, V).

    Positive logits are divided by the penalty, negative ones multiplied (arXiv 1909.05858).
    """
    scores = logits.gather(1, ids)
    return logits.scatter(1, ids, torch.where(scores < 0, scores * penalty, scores / penalty))


def choose_token(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Logits (B, V) -> one token per sequence, (B,): the most likely at temperature 0, otherwise a sampled one."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = filter_logits(logits.float(), temperature, top_k, top_p).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
