"""Invalid arguments of `forward` and `generate` are refused with a reason, and every autograd mode works."""

import pytest
import torch

from llava import KVCache, LlavaForConditionalGeneration


@pytest.fixture(scope="module")
def model(checkpoint):
    return LlavaForConditionalGeneration.from_pretrained(checkpoint)


IDS = torch.tensor([[1, 300, *[420] * 9, 301, 302]])
PIXELS = torch.zeros(1, 3, 42, 42)
TEXT = torch.tensor([[1, 300, 301, 302]])
INVALID = {
    "1-D ids": ({"input_ids": TEXT[0]}, r"input_ids must be integers \(B, T\), not torch.int64 \(4,\)"),
    "3-D ids": ({"input_ids": TEXT[None]}, r"input_ids must be integers \(B, T\)"),
    "float ids": ({"input_ids": TEXT.float()}, r"input_ids must be integers \(B, T\), not torch.float32"),
    "no ids": ({"input_ids": TEXT[:, :0]}, r"input_ids must be integers \(B, T\), not torch.int64 \(1, 0\)"),
    "empty batch": ({"input_ids": TEXT[:0]}, r"input_ids must be integers \(B, T\), not torch.int64 \(0, 4\)"),
    "ids beyond the vocabulary": (
        {"input_ids": TEXT + 147},
        "input_ids range from 148 to 449; the vocabulary has 448 ids",
    ),
    "negative ids": ({"input_ids": TEXT - 2}, "input_ids range from -1 to 300; the vocabulary has 448 ids"),
    "ids on another device": (
        {"input_ids": TEXT.to("meta")},
        "input_ids is on meta and the model on cpu: use inputs.to",
    ),
    "3-D pixels": ({"pixel_values": PIXELS[0]}, r"pixel_values must be .* \(N, 3, 42, 42\), not torch.float32"),
    "pixels of another size": ({"pixel_values": torch.zeros(1, 3, 28, 28)}, r"must be .* \(N, 3, 42, 42\), not"),
    "channels-last pixels": ({"pixel_values": torch.zeros(1, 42, 42, 3)}, r"must be .* \(N, 3, 42, 42\), not"),
    "uint8 pixels": ({"pixel_values": PIXELS.byte()}, r"must be floating-point numbers .* not torch.uint8"),
    "pixels on another device": ({"pixel_values": PIXELS.to("meta")}, "pixel_values is on meta and the model on cpu"),
    "two images, tokens for one": (
        {"pixel_values": PIXELS.repeat(2, 1, 1, 1)},
        "the prompt has 9 image tokens, but 2 images have 18 features: the processor writes 9 tokens for each image",
    ),
    "an image, no image tokens": (
        {"input_ids": TEXT},
        "the prompt has 0 image tokens, but 1 images have 9 features",
    ),
    "one image token too few": ({"input_ids": IDS[:, :-3]}, "the prompt has 8 image tokens, but 1 images have 9"),
    "mask of another length": ({"attention_mask": torch.ones(1, 5)}, r"shape \(1, 5\), not \(1, 13\)"),
    "1-D mask": ({"attention_mask": torch.ones(13)}, r"shape \(13,\), not \(1, 13\)"),
    "additive mask": ({"attention_mask": torch.full((1, 13), -1e9)}, "must be 1 for tokens and 0 for padding"),
    "mask with a hole": ({"attention_mask": torch.tensor([[1, 1, 0] + [1] * 10])}, "padding between its tokens"),
    "all-zero mask": ({"attention_mask": torch.zeros(1, 13)}, "without any tokens|padding on the right"),
    "mask on another device": (
        {"attention_mask": torch.ones(1, 13, device="meta")},
        "attention_mask is on meta and the model",
    ),
}
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "autograd": torch.enable_grad}


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("name", INVALID)
def test_invalid_inputs_are_refused_with_the_reason(name, call, model):
    changes, sentence = INVALID[name]
    with pytest.raises(ValueError, match=sentence):
        getattr(model, call)(**{"input_ids": IDS, "pixel_values": PIXELS, **changes})


GENERATION = {
    "padding on the right": ({"attention_mask": torch.tensor([[1, 1, 1, 0]])}, "generation needs it on the left"),
    "too many tokens": ({"input_ids": TEXT.repeat(1, 256)}, "the prompt has 1024 tokens, but at most 1023 fit"),
    "negative max_new_tokens": ({"max_new_tokens": -1}, "max_new_tokens is -1"),
    "negative temperature": ({"temperature": -0.5}, "temperature is -0.5; it must be 0 .* or 1e-5 or more"),
    "NaN temperature": ({"temperature": float("nan")}, "temperature is nan"),
    "infinite temperature": ({"temperature": float("inf")}, "temperature is inf"),
    "temperature so small that logits overflow": ({"temperature": 1e-300}, "temperature is 1e-300"),
    "top_p of 0": ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
    "top_p above 1": ({"temperature": 1.0, "top_p": 1.1}, "top_p is 1.1"),
    "NaN top_p": ({"temperature": 1.0, "top_p": float("nan")}, "top_p is nan"),
    "top_k of 0": ({"temperature": 1.0, "top_k": 0}, "top_k is 0; it must be 1 or more"),
    "top_p at temperature 0": ({"top_p": 0.9}, "need a temperature above 0"),
}


@pytest.mark.parametrize("name", GENERATION)
def test_invalid_generation_options_are_refused_with_the_reason(name, model):
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
def test_extreme_but_valid_options_work(options, model):
    assert model.generate(TEXT, **{"max_new_tokens": 3, **options}).shape[1] == 4 + options.get("max_new_tokens", 3)


# The cache, and the autograd modes


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_a_cache_with_another_batch_size_is_refused(call, model):
    with pytest.raises(ValueError, match="the cache is for 2 sequences, but input_ids has 1"):
        getattr(model, call)(TEXT, cache=KVCache(model, batch_size=2))


@pytest.mark.parametrize(("batch_size", "cached"), [(2, 0), (1, 4), (1, 5)])
def test_generation_refuses_a_cache_that_the_prompt_does_not_continue(batch_size, cached, model):
    cache = KVCache(model, batch_size)
    cache.length = cached
    with pytest.raises(ValueError, match=f"a cache of {cached} tokens needs input_ids of one longer sequence"):
        model.generate(TEXT.repeat(batch_size, 1), cache=cache)


def test_a_negative_logits_to_keep_is_refused(model):
    with pytest.raises(ValueError, match=r"logits_to_keep is -2; it must be 0 \(all positions\)"):
        model(IDS, PIXELS, logits_to_keep=-2)


@torch.no_grad()
def test_a_cache_that_is_too_short_grows(model):
    cache = KVCache(model, max_length=2)
    assert torch.equal(model(IDS, PIXELS, cache=cache).logits, model(IDS, PIXELS).logits)
    assert cache.length == 13


@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("second", MODES)
def test_a_cache_created_in_one_autograd_mode_works_in_another(first, second, model):
    expected = model.generate(TEXT, max_new_tokens=8)
    with MODES[first]():
        cache = KVCache(model)
        start = model.generate(TEXT, max_new_tokens=3, cache=cache)
    with MODES[second]():
        assert torch.equal(model.generate(start.clone(), max_new_tokens=5, cache=cache), expected)


def test_generated_tokens_can_be_modified_and_trained_on(model):
    tokens = torch.stack(list(model.generate_stream(TEXT, max_new_tokens=3)), dim=1)
    for ids in (next(model.generate_stream(TEXT))[:, None], tokens, model.generate(TEXT, max_new_tokens=3)):
        ids[0, 0] = 1
        model(ids).logits.sum().backward()
    assert model.language_model.model.embed_tokens.weight.grad[1].any()
    model.zero_grad()


@pytest.mark.parametrize("mode", MODES)
def test_logits_are_identical_in_every_autograd_mode(mode, model):
    with torch.no_grad():
        expected = model(IDS, PIXELS).logits
    for training in (True, False):  # False last, so that the shared model ends in eval mode
        model.train(training)
        with MODES[mode]():
            logits = model(IDS, PIXELS).logits
            cached = model(IDS, PIXELS, cache=KVCache(model)).logits
        assert torch.equal(logits, expected) and torch.equal(cached, expected)
        assert logits.requires_grad == (mode == "autograd")
        assert not cached.requires_grad  # a cached graph would grow with every token


@pytest.mark.parametrize("part", ["vision_tower.", "multi_modal_projector.", "language_model."])
def test_only_the_trainable_part_receives_gradients(part, model):
    parameters = {name: parameter.requires_grad_(name.startswith(part)) for name, parameter in model.named_parameters()}
    model(IDS, PIXELS).logits.sum().backward()
    reached = {name for name, parameter in parameters.items() if parameter.grad is not None}
    model.zero_grad()
    model.requires_grad_(True)
    unused = ("vision_tower.post_layernorm", "vision_tower.encoder.layers.3.")  # LLaVA uses the layer before
    assert reached == {name for name in parameters if name.startswith(part) and not name.startswith(unused)}
