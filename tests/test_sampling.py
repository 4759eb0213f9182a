"""The sampling distribution matches transformers' logits warpers, and a seed makes sampling reproducible."""

import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from sampling import choose_token, filter_logits

OPTIONS = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 0.5, "top_k": 20, "top_p": 0.9},
    {"temperature": 2.0, "top_k": 1000, "top_p": 1.0},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "top_k": 1},
]


@pytest.fixture
def logits():
    return 3 * torch.randn(4, 448, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_distribution_matches_transformers_warpers(options, logits, check):
    expected = TemperatureLogitsWarper(options["temperature"])(None, logits)
    if "top_k" in options:
        expected = TopKLogitsWarper(options["top_k"])(None, expected)
    if options.get("top_p", 1.0) < 1:
        expected = TopPLogitsWarper(options["top_p"])(None, expected)
    check("sampling distribution", filter_logits(logits, **options).softmax(-1), expected.softmax(-1), limit=1e-6)


def test_equal_logits_are_filtered_as_in_transformers(check):
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0, 1.0]])
    for k in (1, 2, 3, 4):
        assert torch.equal(filter_logits(logits, 1.0, top_k=k), TopKLogitsWarper(k)(None, logits))
    for p in (0.2, 0.5, 0.8, 0.95):
        assert torch.equal(filter_logits(logits, 1.0, top_p=p), TopPLogitsWarper(p)(None, logits))


def test_samples_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    generator = torch.Generator().manual_seed(0)
    samples = choose_token(logits.expand(20000, -1), 1.0, generator=generator)
    frequencies = samples.bincount(minlength=4) / 20000
    torch.testing.assert_close(frequencies, logits[0].softmax(-1), rtol=0, atol=0.015)


def test_a_seed_makes_sampling_reproducible(make_pair, prompt):
    ours, _ = make_pair()

    def sample(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return ours.generate(**prompt(), max_new_tokens=30, temperature=1.5, top_p=0.95, generator=generator)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


def test_temperature_0_is_greedy_decoding(logits):
    assert torch.equal(choose_token(logits), logits.argmax(-1))
