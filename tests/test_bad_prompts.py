"""Prompts of any characters are encoded as typed; those that do not fit are refused with both numbers."""

import time

import pytest
import torch
from PIL import Image

from llava import LlavaForConditionalGeneration, LlavaProcessor


@pytest.fixture(scope="module")
def processor(checkpoint):
    return LlavaProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def model(checkpoint):
    return LlavaForConditionalGeneration.from_pretrained(checkpoint)


TEXTS = {
    "empty": "",
    "whitespace": " \n\t\r\v\f",
    "control characters": "".join(map(chr, range(32))) + "\x7f\x80\x9f",
    "lone surrogates": "a\ud800b\udfff",
    "bidirectional": "\u202eabc\u202c \u2066\u05d0\u2069",
    "combining accents": "e" + "\u0301" * 100,
    "joined emoji": "👩‍👩‍👧‍👦🏳️‍🌈",
    "private and unassigned code points": "\ue000\U000e0001\U0010ffff\uffff",
    "SentencePiece's space": "▁▁a▁",
    "special tokens": "<s></s><pad><unk><0x41><|im_end|>[INST]",
    "byte order mark": "\ufeffUSER:",
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_question_may_contain_any_characters(name, processor, model):
    text = TEXTS[name]
    ids, _ = processor.tokenizer.encode_chat([(text, None)])
    assert max(ids) < 420 and not {0, 1, 2} & set(ids[1:])  # typed text never becomes a control token
    spelled = text.replace("\ud800", "\ufffd").replace("\udfff", "\ufffd").replace("▁", " ")
    assert spelled in processor.decode(ids[1:])
    answer = model.generate(**processor.prepare([ids]), max_new_tokens=3)
    processor.decode(answer[0]).encode("utf-8")


DIFFER = "the numbers of <image> tokens in the text and of images differ"
MISMATCHES = {
    "an image token, no image": ("<image> What?", 0, f"{DIFFER}: 1 and 0"),
    "an image, no image token": ("What?", 1, f"{DIFFER}: 0 and 1"),
    "more image tokens than images": ("<image><image><image>", 2, f"{DIFFER}: 3 and 2"),
    "more images than image tokens": ("<image>", 3, f"{DIFFER}: 1 and 3"),
    "no prompt": ([], 0, "there is no prompt"),
    "prompts of different lengths": (["a", "a b c"], 0, "the prompts differ in length: pass padding=True"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_prompts_that_do_not_match_the_images_or_each_other_are_refused(name, processor):
    text, images, sentence = MISMATCHES[name]
    with pytest.raises(ValueError, match=sentence):
        processor([Image.new("RGB", (9, 9))] * images, text)


def test_return_tensors_other_than_pt_are_refused(processor):
    with pytest.raises(ValueError, match="return_tensors is 'np'; only 'pt' is supported"):
        processor(text="a", return_tensors="np")


def test_near_misses_of_the_image_token_are_text(processor):
    ids = processor(text="<image < image> <IMAGE> &lt;image&gt;").input_ids
    assert (ids != 420).all()


@pytest.mark.parametrize("text", ["x" * 100_000, "word " * 20_000, "\n" * 100_000, "🦙" * 25_000], ids=lambda t: t[:5])
def test_a_prompt_of_100_000_characters_is_refused_quickly(text, processor, model):
    start = time.perf_counter()
    inputs = processor(text=text)
    length = inputs.input_ids.shape[1]
    with pytest.raises(ValueError, match=f"the prompt has {length} tokens, but at most 1023 fit: shorten it"):
        model.generate(**inputs)
    assert time.perf_counter() - start < 10


def test_more_images_than_fit_are_refused(processor, model):
    inputs = processor([Image.new("RGB", (9, 9))] * 120, "<image>" * 120)
    length = inputs.input_ids.shape[1]
    with pytest.raises(ValueError, match=f"the prompt has {length} tokens, but at most 1023 fit"):
        model.generate(**inputs)


def test_a_prompt_that_leaves_room_for_one_token_gets_one_token(model):
    ids = torch.full((1, 1023), 300)
    assert model.generate(ids, max_new_tokens=50).shape == (1, 1024)
