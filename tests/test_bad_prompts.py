"""A prompt of any characters is read as it was typed, and one that does not fit is refused with both numbers."""

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


ODD = {
    "empty": "",
    "blank": " \n\t\r\v\f",
    "control characters": "".join(map(chr, range(32))) + "\x7f\x80\x9f",
    "lone surrogates": "a\ud800b\udfff",
    "bidi": "\u202eabc\u202c \u2066\u05d0\u2069",
    "combining": "e" + "\u0301" * 100,
    "joined emoji": "👩‍👩‍👧‍👦🏳️‍🌈",
    "private and unassigned": "\ue000\U000e0001\U0010ffff\uffff",
    "SentencePiece's space": "▁▁a▁",
    "special tokens": "<s></s><pad><unk><0x41><|im_end|>[INST]",
    "a byte order mark": "\ufeffUSER:",
}


@pytest.mark.parametrize("name", ODD)
def test_any_characters_can_be_asked(name, processor, model):
    text = ODD[name]
    ids, _ = processor.tokenizer.encode_chat([(text, None)])
    assert max(ids) < 420 and not {0, 1, 2} & set(ids[1:])  # nothing that is typed is ever a control token
    spelled = text.replace("\ud800", "\ufffd").replace("\udfff", "\ufffd").replace("▁", " ")
    assert spelled in processor.decode(ids[1:])
    answer = model.generate(**processor.prepare([ids]), max_new_tokens=3)
    processor.decode(answer[0]).encode("utf-8")


MARKS = {
    "a mark and no image": ("<image> What?", 0, "the text has 1 <image> marks for 0 images"),
    "an image and no mark": ("What?", 1, "the text has 0 <image> marks for 1 images"),
    "more marks": ("<image><image><image>", 2, "the text has 3 <image> marks for 2 images"),
    "more images": ("<image>", 3, "the text has 1 <image> marks for 3 images"),
    "no prompt at all": ([], 0, "there is no prompt"),
    "prompts of two lengths": (["a", "a b c"], 0, "the texts have several lengths: pass padding=True"),
}


@pytest.mark.parametrize("name", MARKS)
def test_marks_and_images_have_to_match(name, processor):
    text, images, sentence = MARKS[name]
    with pytest.raises(ValueError, match=sentence):
        processor([Image.new("RGB", (9, 9))] * images, text)


def test_other_tensors_than_those_of_pytorch_are_refused(processor):
    with pytest.raises(ValueError, match="return_tensors is 'np'; only 'pt' is supported"):
        processor(text="a", return_tensors="np")


def test_a_mark_that_is_almost_one_is_text(processor):
    ids = processor(text="<image < image> <IMAGE> &lt;image&gt;").input_ids
    assert (ids != 420).all()


@pytest.mark.parametrize("text", ["x" * 100_000, "word " * 20_000, "\n" * 100_000, "🦙" * 25_000], ids=lambda t: t[:5])
def test_100_000_characters_are_counted_quickly_and_refused(text, processor, model):
    start = time.perf_counter()
    inputs = processor(text=text)
    length = inputs.input_ids.shape[1]
    with pytest.raises(ValueError, match=f"there are {length} tokens, but only 1023 fit: shorten the prompt"):
        model.generate(**inputs)
    assert time.perf_counter() - start < 10


def test_more_images_than_fit_are_refused(processor, model):
    inputs = processor([Image.new("RGB", (9, 9))] * 120, "<image>" * 120)
    length = inputs.input_ids.shape[1]
    with pytest.raises(ValueError, match=f"there are {length} tokens, but only 1023 fit"):
        model.generate(**inputs)


def test_a_prompt_that_just_fits_is_answered_with_one_token(model):
    ids = torch.full((1, 1023), 300)
    assert model.generate(ids, max_new_tokens=50).shape == (1, 1024)
