"""The whole model and its processor match transformers: inputs, logits, tokens and gradients."""

import numpy as np
import pytest
import torch
import transformers
from conftest import random_image
from reference_tokenizer import reference_tokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava import LlavaForConditionalGeneration, LlavaProcessor


@pytest.fixture(scope="module")
def ours(checkpoint):
    return LlavaForConditionalGeneration.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def theirs(checkpoint):
    return transformers.LlavaForConditionalGeneration.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def processor(checkpoint):
    return LlavaProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def their_processor(checkpoint):
    return transformers.LlavaProcessor(
        CLIPImageProcessorPil.from_pretrained(checkpoint),
        reference_tokenizer(checkpoint / "tokenizer.model", {"<image>": 420, "<pad>": 421}),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


@pytest.mark.parametrize("images", [0, 1, 2, 3])
@torch.no_grad()
def test_logits_match_transformers_for_any_number_of_images(images, ours, theirs, prompt, check):
    inputs = prompt(images=images)
    check(f"whole model, {images} images", ours(**inputs).logits, theirs(**inputs).logits)


@torch.no_grad()
def test_logits_of_a_padded_batch_match_transformers(ours, theirs, processor, check):
    images = [random_image(np.random.default_rng(i), (60, 50)) for i in range(3)]
    texts = ["<image> a", "no image at all, but many more words", "one <image> two <image> three"]
    inputs = processor(images=images, text=texts, padding=True)
    real = inputs.attention_mask.bool()
    positions = (inputs.attention_mask.cumsum(1) - 1).clamp(min=0)
    expected = theirs(**inputs, position_ids=positions).logits
    check("whole model, padded batch", ours(**inputs).logits[real], expected[real])


@torch.no_grad()
def test_the_logits_depend_on_the_image(ours, prompt):
    inputs = prompt()
    before = ours(**inputs).logits[:, -1]
    after = ours(inputs["input_ids"], inputs["pixel_values"].flip(-1)).logits[:, -1]
    assert (before - after).norm() > 0.01 * before.norm()


@pytest.mark.parametrize("images", [0, 1, 2])
def test_a_mismatch_of_image_tokens_and_images_is_refused(images, ours, prompt):
    inputs = prompt(images=2)
    inputs["input_ids"] = prompt(images=images)["input_ids"] if images < 2 else inputs["input_ids"][:, :-10]
    with pytest.raises(ValueError, match=r"the prompt has \d+ image tokens, but 2 images have 18 features"):
        ours(**inputs)


PROMPTS = {
    "one image": (["USER: <image>\nWhat's the content of the image? ASSISTANT:"], 1),
    "two images": (["USER: <image>\n<image>\nCompare. ASSISTANT:"], 2),
    "no image": (["USER: Hello ASSISTANT:"], 0),
    "batch of different lengths": (["USER: <image>\nWhat? ASSISTANT:", "x </s>USER: y", "<image><image>"], 3),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_inputs_match_transformers_processor(name, processor, their_processor):
    texts, count = PROMPTS[name]
    images = [random_image(np.random.default_rng(i)) for i in range(count)] or None
    ours = processor(images=images, text=texts, return_tensors="pt", padding=True)
    theirs = their_processor(images=images, text=texts, return_tensors="pt", padding=True)
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-6)
    assert set(ours) == set(theirs) - {"token_type_ids", "mm_token_type_ids"}


def test_the_example_in_transformers_documentation_gives_the_same_answer(ours, theirs, processor, their_processor):
    image = random_image(np.random.default_rng(0))
    text = "USER: <image>\nWhat's the content of the image? ASSISTANT:"
    answers = []
    for model, prepare in ((ours, processor), (theirs, their_processor)):
        inputs = prepare(images=image, text=text, return_tensors="pt").to(model.device)
        ids = model.generate(**inputs, max_new_tokens=15)
        answers.append(prepare.batch_decode(ids, skip_special_tokens=True)[0])
    assert answers[0] == answers[1]


def test_gradients_match_transformers_for_every_parameter_that_affects_the_loss(make_pair, prompt, check):
    ours, theirs = make_pair()
    inputs = prompt()
    ids = inputs["input_ids"]
    for model in (ours, theirs):
        logits = model(**inputs).logits
        torch.nn.functional.cross_entropy(logits[0, -6:-1], ids[0, -5:]).backward()
    their_gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    our_gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert len(our_gradients) == len(their_gradients)
    assert len(our_gradients) == len(list(ours.parameters())) - 18  # all but the last vision layer and post_layernorm
    for (_, ours_), (_, theirs_) in zip(sorted(our_gradients.items()), sorted(their_gradients.items()), strict=True):
        if theirs_.norm() > 1e-6:  # a key bias shifts all scores equally: its gradient is rounding noise
            check("gradients, every parameter", ours_.flatten(), theirs_.flatten(), limit=1e-4)
