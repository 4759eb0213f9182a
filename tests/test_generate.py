"""Generated tokens match transformers' `generate`, and a cache saves work without changing the result."""

import numpy as np
import pytest
import torch
from conftest import random_image

from llava import KVCache, LlavaProcessor

GREEDY = {"do_sample": False}
TEXTS = [
    "<image> a",
    "USER: no image at all, but many more words than the others have. ASSISTANT:",
    "<image><image> b c",
]


@pytest.fixture(scope="module")
def processor(checkpoint):
    return LlavaProcessor.from_pretrained(checkpoint)


@pytest.fixture
def batch(processor):
    """Three prompts of different lengths, with three images."""
    images = [random_image(np.random.default_rng(i), (60, 50)) for i in range(3)]
    return processor(images=images, text=TEXTS, padding=True)


def new_cache(model, max_length=256, batch_size=1) -> KVCache:
    return KVCache(model, batch_size, max_length)


@pytest.mark.parametrize("text", [{}, {"num_key_value_heads": 2}, {"num_key_value_heads": 2, "head_dim": 24}], ids=str)
def test_64_greedy_tokens_match_transformers(text, make_pair, prompt):
    ours, theirs = make_pair(text=text)
    for seed in range(3):
        inputs = prompt(images=2, seed=seed)
        expected = theirs.generate(**inputs, max_new_tokens=64, **GREEDY)
        assert torch.equal(ours.generate(**inputs, max_new_tokens=64), expected)


def test_tokens_of_a_padded_batch_match_transformers(make_pair, batch):
    ours, theirs = make_pair()
    assert torch.equal(ours.generate(**batch, max_new_tokens=64), theirs.generate(**batch, max_new_tokens=64, **GREEDY))


def test_each_sequence_of_a_batch_gets_the_tokens_it_gets_alone(make_pair, batch):
    ours, _ = make_pair()
    together = ours.generate(**batch, max_new_tokens=64)[:, batch.input_ids.shape[1] :]
    for row, pixels in enumerate(batch.pixel_values.split([1, 0, 2])):
        ids = batch.input_ids[row, batch.attention_mask[row].bool()][None]
        alone = ours.generate(ids, pixels if len(pixels) else None, max_new_tokens=64)[:, ids.shape[1] :]
        assert torch.equal(together[row], alone[0])


def eos_tokens(model, inputs, count: int) -> list[int]:
    """A token from the output of each of the first `count` sequences: as EOS, they end these at different steps."""
    free = model.generate(**inputs, max_new_tokens=20)[:, inputs["input_ids"].shape[1] :]
    return [free[row, 4 * row + 2].item() for row in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_sequences_stop_at_their_own_eos_and_are_padded(count, make_pair, batch):
    ours, theirs = make_pair()
    ours.generation_config.eos_token_id = eos_tokens(ours, batch, count)
    expected = theirs.generate(**batch, max_new_tokens=20, eos_token_id=ours.generation_config.eos_token_id, **GREEDY)
    assert (expected == 421).any(), "a sequence has to finish before the others"
    assert torch.equal(ours.generate(**batch, max_new_tokens=20), expected)


def test_finished_sequences_are_no_longer_computed(make_pair, batch):
    ours, _ = make_pair()
    ours.generation_config.eos_token_id = eos_tokens(ours, batch, 1)
    sizes = []
    ours.language_model.lm_head.register_forward_hook(lambda head, args, out: sizes.append(len(out)))
    ours.generate(**batch, max_new_tokens=20)
    assert sizes[0] == 3
    assert sizes[-1] < 3


def test_generate_stream_yields_the_tokens_of_generate_one_by_one(make_pair, batch):
    ours, _ = make_pair()
    streamed = torch.stack(list(ours.generate_stream(**batch, max_new_tokens=10)), dim=1)
    assert streamed.shape == (3, 10)
    assert torch.equal(torch.cat([batch.input_ids, streamed], 1), ours.generate(**batch, max_new_tokens=10))


def test_generate_stream_computes_nothing_until_it_is_read(make_pair, prompt):
    ours, _ = make_pair()
    calls = []
    ours.language_model.lm_head.register_forward_hook(lambda *args: calls.append(1))
    stream = ours.generate_stream(**prompt(), max_new_tokens=10)
    assert calls == []
    next(stream)
    assert calls == [1]


def test_generation_stops_when_the_context_is_full(make_pair, prompt):
    ours, _ = make_pair(text={"max_position_embeddings": 40})
    inputs = prompt(length=20)
    assert ours.generate(**inputs, max_new_tokens=64).shape == (1, 40)


def test_logits_of_a_padded_batch_are_finite_everywhere(make_pair, batch):
    ours, _ = make_pair()
    assert ours(**batch).logits.isfinite().all()


# The cache


def chunks(ids: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    return list(ids.split([*sizes, ids.shape[1] - sum(sizes)], dim=1))


@pytest.mark.parametrize(
    "sizes", [[19] + [1] * 30, [25, 10, 5], [49], [19, 1, 20]], ids=["single tokens", "chunks", "two chunks", "mixed"]
)
@pytest.mark.parametrize("heads", [4, 2])
@torch.no_grad()
def test_a_prompt_in_chunks_has_the_logits_of_a_single_pass(sizes, heads, make_pair, prompt, check):
    ours, _ = make_pair(text={"num_key_value_heads": heads})
    inputs = prompt(images=1, length=48)
    # Roll the ids so that the image is in the first 19 tokens.
    ids, pixels = inputs["input_ids"].roll(-20, dims=1), inputs["pixel_values"]
    whole = ours(ids, pixels).logits
    cache, parts = new_cache(ours), []
    for chunk in chunks(ids, sizes):
        parts.append(ours(chunk, pixels if cache.length == 0 else None, cache=cache).logits)
    check("cache: chunks against a single pass", torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("keep", [1, 3, 99])
@pytest.mark.parametrize("padded", [True, False])
@torch.no_grad()
def test_the_last_layer_computes_only_the_positions_that_the_head_reads(padded, keep, make_pair, batch, check):
    ours, _ = make_pair(text={"num_key_value_heads": 2})
    lengths: list[int] = []
    ours.language_model.model.layers[-1].mlp.register_forward_hook(lambda mlp, args, out: lengths.append(out.shape[1]))
    inputs = batch if padded else {**batch, "attention_mask": None}
    more = torch.randint(3, 400, (3, 6), generator=torch.Generator().manual_seed(0))
    caches = [new_cache(ours, batch_size=3) for _ in range(2)]
    whole = [ours(**inputs, cache=caches[0]).logits, ours(more, cache=caches[0]).logits]
    some = [ours(**inputs, cache=caches[1], logits_to_keep=keep).logits]
    some += [ours(more, cache=caches[1], logits_to_keep=keep).logits]
    for last, everything in zip(some, whole, strict=True):
        check("only the last positions", last, everything[:, -keep:])
    length = batch.input_ids.shape[1]
    assert lengths == [length, 6, min(keep, length), min(keep, 6)]


@torch.no_grad()
def test_a_padded_batch_in_chunks_has_the_logits_of_a_single_pass(make_pair, batch, check):
    ours, _ = make_pair(text={"num_key_value_heads": 2})
    more = torch.randint(3, 400, (3, 6), generator=torch.Generator().manual_seed(0))
    whole = ours(
        torch.cat([batch.input_ids, more], 1),
        batch.pixel_values,
        torch.cat([batch.attention_mask, torch.ones_like(more)], 1),
    ).logits[:, -7:]
    cache = new_cache(ours, batch_size=3)
    parts = [ours(**batch, cache=cache, logits_to_keep=1).logits]
    parts += [ours(chunk, cache=cache).logits for chunk in (more[:, :1], more[:, 1:5], more[:, 5:])]
    check("cache: padded batch in chunks", torch.cat(parts, dim=1), whole)


def test_a_second_turn_matches_transformers_on_the_whole_conversation(make_pair, prompt):
    ours, theirs = make_pair()
    inputs, cache = prompt(), new_cache(ours)
    first = ours.generate(**inputs, max_new_tokens=12, cache=cache)
    conversation = torch.cat([first, prompt(images=0, seed=1)["input_ids"]], dim=1)
    second = ours.generate(conversation, max_new_tokens=12, cache=cache)
    expected = theirs.generate(conversation, pixel_values=inputs["pixel_values"], max_new_tokens=12, **GREEDY)
    assert torch.equal(second, expected)


def test_a_second_turn_computes_only_the_new_tokens(make_pair, prompt):
    ours, _ = make_pair()
    inputs, cache = prompt(), new_cache(ours)
    first = ours.generate(**inputs, max_new_tokens=12, cache=cache)
    seen, images = [], []
    ours.language_model.model.layers[0].register_forward_hook(lambda layer, args, out: seen.append(out.shape[1]))
    ours.vision_tower.register_forward_hook(lambda *args: images.append(1))
    ours.generate(torch.cat([first, prompt(images=0)["input_ids"]], 1), max_new_tokens=3, cache=cache)
    assert seen == [1 + 20, 1, 1]  # 1: the answer's last token was not yet in the cache
    assert images == []


def test_a_large_enough_cache_is_never_reallocated(make_pair, prompt):
    ours, _ = make_pair()
    cache = new_cache(ours)
    before = cache.keys.data_ptr()
    ours.generate(**prompt(), max_new_tokens=20, cache=cache)
    assert cache.keys.data_ptr() == before
    assert cache.length == 20 + 9 + 19


def test_a_call_allocates_once_for_its_longest_possible_answer(make_pair, prompt):
    ours, _ = make_pair()
    inputs = prompt()
    cache, pointers = KVCache(ours), set()
    ours.language_model.model.norm.register_forward_hook(lambda *args: pointers.add(cache.keys.data_ptr()))
    first = ours.generate(**inputs, max_new_tokens=20, cache=cache)
    assert (len(pointers), cache.keys.shape[3]) == (1, 20 + 9 + 20)
    second = ours.generate(torch.cat([first, inputs["input_ids"][:, :5]], 1), max_new_tokens=20, cache=cache)
    assert (len(pointers), cache.keys.shape[3]) == (2, 20 + 9 + 20 + 5 + 20)
    assert torch.equal(second, ours.generate(second[:, :54], inputs["pixel_values"], max_new_tokens=20))


@pytest.mark.parametrize("with_cache", [False, True])
def test_image_tokens_without_images_are_refused(with_cache, make_pair, prompt):
    ours, _ = make_pair()
    with pytest.raises(ValueError, match="has image tokens, but there are no pixel_values"):
        ours.generate(prompt()["input_ids"], cache=new_cache(ours) if with_cache else None)


def test_a_cache_reset_to_length_0_forgets_everything(make_pair, prompt, batch, check):
    ours, _ = make_pair()
    cache = new_cache(ours, batch_size=3)
    with torch.no_grad():
        ours(**batch, cache=cache)
        cache.length = 0
        ids = prompt(images=0)["input_ids"].expand(3, -1)
        check("cache: reused after a reset", ours(ids, cache=cache).logits, ours(ids).logits)


@torch.no_grad()
def test_positions_count_from_the_first_real_token(make_pair, batch):
    ours, _ = make_pair()
    angles = []
    first_layer = ours.language_model.model.layers[0]
    first_layer.register_forward_pre_hook(lambda layer, args: angles.append(args[1]))  # RoPE's cosines
    ours(**batch)
    ours(torch.ones(1, 8, dtype=torch.long))
    padded, plain = angles
    for row, mask in enumerate(batch.attention_mask):
        assert torch.equal(padded[row, 0, mask.bool()][:8], plain)
