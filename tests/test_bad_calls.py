"""Tensors that do not fit the model, each other or the cache are refused at its door, in every mode of autograd."""

import pytest
import torch

from llava import KVCache, LlavaForConditionalGeneration


@pytest.fixture(scope="module")
def model(checkpoint):
    return LlavaForConditionalGeneration.from_pretrained(checkpoint)


IDS = torch.tensor([[1, 300, *[420] * 9, 301, 302]])
PIXELS = torch.zeros(1, 3, 42, 42)
TEXT = torch.tensor([[1, 300, 301, 302]])
WRONG = {
    "ids of rank 1": ({"input_ids": TEXT[0]}, r"input_ids must be whole numbers \(B, T\), not torch.int64 \(4,\)"),
    "ids of rank 3": ({"input_ids": TEXT[None]}, r"input_ids must be whole numbers \(B, T\)"),
    "ids of floats": ({"input_ids": TEXT.float()}, r"input_ids must be whole numbers \(B, T\), not torch.float32"),
    "no ids": ({"input_ids": TEXT[:, :0]}, r"input_ids must be whole numbers \(B, T\), not torch.int64 \(1, 0\)"),
    "no rows": ({"input_ids": TEXT[:0]}, r"input_ids must be whole numbers \(B, T\), not torch.int64 \(0, 4\)"),
    "ids beyond the rows": ({"input_ids": TEXT + 147}, "input_ids go from 148 to 449, and the model has 448 rows"),
    "negative ids": ({"input_ids": TEXT - 2}, "input_ids go from -1 to 300, and the model has 448 rows"),
    "ids elsewhere": ({"input_ids": TEXT.to("meta")}, "input_ids is on meta and the model on cpu: use inputs.to"),
    "pixels of rank 3": ({"pixel_values": PIXELS[0]}, r"pixel_values must be .* \(N, 3, 42, 42\), not torch.float32"),
    "pixels of another size": ({"pixel_values": torch.zeros(1, 3, 28, 28)}, r"must be .* \(N, 3, 42, 42\), not"),
    "pixels with the channels last": ({"pixel_values": torch.zeros(1, 42, 42, 3)}, r"must be .* \(N, 3, 42, 42\), not"),
    "pixels of bytes": ({"pixel_values": PIXELS.byte()}, r"must be floating-point numbers .* not torch.uint8"),
    "pixels elsewhere": ({"pixel_values": PIXELS.to("meta")}, "pixel_values is on meta and the model on cpu"),
    "two images for the tokens of one": (
        {"pixel_values": PIXELS.repeat(2, 1, 1, 1)},
        "9 image tokens stand in the prompt, but 2 images have 18 features: the processor writes 9 for each",
    ),
    "an image and no tokens": ({"input_ids": TEXT}, "0 image tokens stand in the prompt, but 1 images have 9 features"),
    "a token too few": ({"input_ids": IDS[:, :-3]}, "8 image tokens stand in the prompt, but 1 images have 9"),
    "mask of another length": ({"attention_mask": torch.ones(1, 5)}, r"shape \(1, 5\), not \(1, 13\)"),
    "mask of rank 1": ({"attention_mask": torch.ones(13)}, r"shape \(13,\), not \(1, 13\)"),
    "mask to be added": ({"attention_mask": torch.full((1, 13), -1e9)}, "must be 1 for tokens and 0 for padding"),
    "mask with a hole": ({"attention_mask": torch.tensor([[1, 1, 0] + [1] * 10])}, "padding between its tokens"),
    "mask of nothing": ({"attention_mask": torch.zeros(1, 13)}, "without any tokens|padding on the right"),
    "mask elsewhere": ({"attention_mask": torch.ones(1, 13, device="meta")}, "attention_mask is on meta and the model"),
}
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "autograd": torch.enable_grad}


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_with_the_reason(name, call, model):
    changes, sentence = WRONG[name]
    with pytest.raises(ValueError, match=sentence):
        getattr(model, call)(**{"input_ids": IDS, "pixel_values": PIXELS, **changes})


GENERATION = {
    "padding on the right": ({"attention_mask": torch.tensor([[1, 1, 1, 0]])}, "generation needs it on the left"),
    "too many tokens": ({"input_ids": TEXT.repeat(1, 256)}, "there are 1024 tokens, but only 1023 fit"),
    "fewer than no new tokens": ({"max_new_tokens": -1}, "max_new_tokens is -1"),
    "negative temperature": ({"temperature": -0.5}, "temperature is -0.5; it must be 0 .* or 1e-5 or more"),
    "temperature NaN": ({"temperature": float("nan")}, "temperature is nan"),
    "temperature infinite": ({"temperature": float("inf")}, "temperature is inf"),
    "temperature too small to divide by": ({"temperature": 1e-300}, "temperature is 1e-300"),
    "top_p of 0": ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
    "top_p above 1": ({"temperature": 1.0, "top_p": 1.1}, "top_p is 1.1"),
    "top_p NaN": ({"temperature": 1.0, "top_p": float("nan")}, "top_p is nan"),
    "top_k of 0": ({"temperature": 1.0, "top_k": 0}, "top_k is 0; it must be 1 or more"),
    "top_p without temperature": ({"top_p": 0.9}, "need a temperature above 0"),
}


@pytest.mark.parametrize("name", GENERATION)
def test_what_cannot_be_generated_is_refused_with_the_reason(name, model):
    changes, sentence = GENERATION[name]
    with pytest.raises(ValueError, match=sentence):
        model.generate(**{"input_ids": TEXT, **changes})


EXTREMES = [
    {"temperature": 1e-5},
    {"temperature": 1e300},
    {"temperature": 1.0, "top_k": 10**30},
    {"temperature": 1.0, "top_p": 1e-320},
    {"temperature": 1e-5, "top_k": 1, "top_p": 1e-9},
    {"max_new_tokens": 0},
]


@pytest.mark.parametrize("options", EXTREMES, ids=str)
def test_options_at_the_ends_of_their_ranges_work(options, model):
    assert model.generate(TEXT, **{"max_new_tokens": 3, **options}).shape[1] == 4 + options.get("max_new_tokens", 3)


# The cache and the modes


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_a_cache_of_another_batch_size_is_refused(call, model):
    with pytest.raises(ValueError, match="the cache is for 2 rows, but input_ids has 1"):
        getattr(model, call)(TEXT, cache=KVCache(model, batch_size=2))


@pytest.mark.parametrize(("rows", "filled"), [(2, 0), (1, 4), (1, 5)])
def test_a_cache_that_does_not_go_on_with_the_prompt_is_refused(rows, filled, model):
    cache = KVCache(model, rows)
    cache.length = filled
    with pytest.raises(ValueError, match=f"a cache of {filled} tokens needs one row of more tokens"):
        model.generate(TEXT.repeat(rows, 1), cache=cache)


def test_a_negative_number_of_logits_is_refused(model):
    with pytest.raises(ValueError, match=r"logits_to_keep is -2; it must be 0 \(all positions\)"):
        model(IDS, PIXELS, logits_to_keep=-2)


@torch.no_grad()
def test_a_cache_that_is_too_short_grows(model):
    cache = KVCache(model, max_length=2)
    assert torch.equal(model(IDS, PIXELS, cache=cache).logits, model(IDS, PIXELS).logits)
    assert cache.length == 13


@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("second", MODES)
def test_a_cache_goes_from_one_mode_to_another(first, second, model):
    expected = model.generate(TEXT, max_new_tokens=8)
    with MODES[first]():
        cache = KVCache(model)
        begun = model.generate(TEXT, max_new_tokens=3, cache=cache)
    with MODES[second]():
        assert torch.equal(model.generate(begun.clone(), max_new_tokens=5, cache=cache), expected)


def test_what_was_generated_can_be_changed_and_trained_on(model):
    tokens = torch.stack(list(model.generate_stream(TEXT, max_new_tokens=3)), dim=1)
    for ids in (next(model.generate_stream(TEXT))[:, None], tokens, model.generate(TEXT, max_new_tokens=3)):
        ids[0, 0] = 1
        model(ids).logits.sum().backward()
    assert model.language_model.model.embed_tokens.weight.grad[1].any()
    model.zero_grad()


@pytest.mark.parametrize("mode", MODES)
def test_logits_are_the_same_in_every_mode(mode, model):
    with torch.no_grad():
        expected = model(IDS, PIXELS).logits
    for training in (True, False):  # the last leaves the model as it was
        model.train(training)
        with MODES[mode]():
            logits = model(IDS, PIXELS).logits
            cached = model(IDS, PIXELS, cache=KVCache(model)).logits
        assert torch.equal(logits, expected) and torch.equal(cached, expected)
        assert logits.requires_grad == (mode == "autograd")
        assert not cached.requires_grad  # a cache keeps no graph, which would grow with every token


@pytest.mark.parametrize("part", ["vision_tower.", "multi_modal_projector.", "language_model."])
def test_gradients_reach_the_part_that_wants_them_and_no_other(part, model):
    wanted = {name: parameter.requires_grad_(name.startswith(part)) for name, parameter in model.named_parameters()}
    model(IDS, PIXELS).logits.sum().backward()
    reached = {name for name, parameter in wanted.items() if parameter.grad is not None}
    model.zero_grad()
    model.requires_grad_(True)
    unused = ("vision_tower.post_layernorm", "vision_tower.encoder.layers.3.")  # LLaVA reads the layer before
    assert reached == {name for name in wanted if name.startswith(part) and not name.startswith(unused)}
