"""Training data: which tokens of a conversation are learned, which entries are refused, how batches are formed."""

import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_training import CAPTIONS, COLOURS, P, draw_pictures, entry, make_tiny_checkpoint

from extras.data import Row, Sample, collate, encode_entry, micro_batches, plan_epoch, prefetch, read_data
from llava import LlavaProcessor
from vision import LlavaImageProcessor


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    draw_pictures(folder)
    return folder


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_tiny_checkpoint(folder)
    processor = LlavaProcessor.from_pretrained(folder)
    processor.image_processor.do_pad = True
    return processor


@pytest.fixture(scope="module")
def encode(processor, pictures):
    def encode(entry, stage="instruct", system="", max_length=2048):
        return encode_entry(0, entry, stage, processor, pictures, system, max_length)

    return encode


@pytest.fixture(scope="module")
def spelled(processor):
    """The tokens as text, with brackets around those that are learned."""

    def spelled(sample):
        tokens = processor.tokenizer.convert_ids_to_tokens(sample.ids)
        marked = "".join(
            f"[{token}]" if learn else token for token, learn in zip(tokens, sample.is_answer, strict=True)
        )
        return marked.replace("][", "").replace("<0x0A>", "\n").replace("\u2581", " ")

    return spelled


# What is learned


def test_one_turn_with_an_image_learns_the_answer_and_its_end_token(encode, spelled):
    sample = encode(entry("red.png", "<image>\nWhich color?", "a red one"))
    assert spelled(sample) == "<s> USER: <image> \nWhich color? ASSISTANT:[ a red one</s>]"
    assert sample.length == len(sample.ids) + P - 1


def test_several_turns_learn_every_answer(encode, spelled):
    sample = encode(entry("red.png", "<image>\nWhich color?", "red", "What shape?", "a disc"))
    expected = "<s> USER: <image> \nWhich color? ASSISTANT:[ red</s>] USER: What shape? ASSISTANT:[ a disc</s>]"
    assert spelled(sample) == expected


def test_a_conversation_without_an_image_learns_its_answers(encode, spelled):
    sample = encode(entry(None, "How many?", "one two"))
    assert spelled(sample) == "<s> USER: How many? ASSISTANT:[ one two</s>]"
    assert sample.image is None
    assert sample.length == len(sample.ids)


def test_the_system_prompt_comes_first_and_is_not_learned(encode, spelled):
    sample = encode(entry(None, "How many?", "one"), system="Be nice.")
    assert spelled(sample) == "<s> Be nice. USER: How many? ASSISTANT:[ one</s>]"


def test_a_caption_is_learned_without_its_question(encode, spelled):
    sample = encode(entry("red.png", "Describe it.\n<image>", "a red disc"), stage="align")
    assert spelled(sample) == "<s><image>[ a red disc</s>]"


def test_an_image_token_moves_to_the_front_of_its_question(encode, spelled):
    sample = encode(entry("red.png", "Which color?\n<image>", "red"))
    assert spelled(sample) == "<s> USER: <image> \nWhich color? ASSISTANT:[ red</s>]"


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_special_tokens_in_an_answer_are_plain_text(encode, stage):
    sample = encode(entry("red.png", "<image>\nWhich color?", "<image></s>red"), stage)
    assert (sample.ids == 420).sum() == 1
    assert (sample.ids == 2).sum() == 1


def test_a_long_conversation_is_truncated_at_the_end(encode, spelled):
    whole = encode(entry("red.png", "<image>\nWhich color?", "red", "What shape?", "a disc"))
    cut = encode(entry("red.png", "<image>\nWhich color?", "red", "What shape?", "a disc"), max_length=whole.length - 2)
    assert cut.length == whole.length - 2
    assert spelled(cut) == spelled(whole).removesuffix("c</s>]") + "]"
    assert cut.is_answer.tolist() == whole.is_answer[:-2].tolist()


def test_an_image_that_does_not_fit_is_refused_not_truncated(encode, processor):
    before = len(processor.tokenizer.encode("USER: "))  # <s> and the words before the image
    conversation = entry("red.png", "<image>\nWhich color?", "red")
    with pytest.raises(ValueError, match=f"image does not fit in {before + P - 1} tokens"):
        encode(conversation, max_length=before + P - 1)
    with pytest.raises(ValueError, match="no part of an answer fits"):
        encode(conversation, max_length=before + P)


def test_a_first_turn_by_gpt_is_dropped(encode):
    started_by_gpt = entry(None, "How many?", "one")
    started_by_gpt["conversations"].insert(0, {"from": "gpt", "value": "Hello!"})
    assert encode(started_by_gpt).ids.tolist() == encode(entry(None, "How many?", "one")).ids.tolist()


def test_if_every_entry_is_broken_the_error_says_why(tmp_path, processor, pictures):
    file = tmp_path / "data.json"
    file.write_text(json.dumps([entry("nowhere.png", "<image>\nWhich color?", "red")]))
    with pytest.raises(ValueError, match=r"(?s)1 of 1 entries.*entry 0.*nowhere.png"):
        read_data(file, "instruct", processor, pictures, "", 2048, skip_broken=True)


def test_stage_align_refuses_text_without_an_image(encode):
    with pytest.raises(ValueError, match="one image and one caption"):
        encode(entry(None, "How many?", "one"), stage="align")


# Batches


def make_samples(lengths, pictured):
    return [
        Sample(i, np.ones(length, np.int32), np.ones(length, bool), "x.png" if image else None, length)
        for i, (length, image) in enumerate(zip(lengths, pictured, strict=True))
    ]


def many_samples(count=1000):
    rng = random.Random(0)
    return make_samples([rng.randint(20, 600) for _ in range(count)], [rng.random() < 0.7 for _ in range(count)])


def entries(batches):
    return [sample.entry for batch in batches for sample in batch]


def test_an_epoch_has_every_sample_once():
    assert sorted(entries(plan_epoch(many_samples(), 32, "0"))) == list(range(1000))


def test_the_seed_determines_the_order():
    samples = many_samples()
    assert entries(plan_epoch(samples, 32, "0/1")) == entries(plan_epoch(samples, 32, "0/1"))
    assert entries(plan_epoch(samples, 32, "0/1")) != entries(plan_epoch(samples, 32, "0/2"))


def test_all_batches_but_the_last_are_full_and_of_one_modality():
    *full, _, _ = plan_epoch(many_samples(), 32, "0")
    assert {len(batch) for batch in full} == {32}
    assert all(len({sample.image for sample in batch}) == 1 for batch in full)


def test_grouping_more_than_halves_the_padding():
    samples = many_samples()

    def padding(batches):
        pieces = [[row.sample.length for row in rows] for batch in batches for rows in micro_batches(batch, 8)]
        padded = sum(max(lengths) * len(lengths) for lengths in pieces)
        return 1 - sum(sample.length for sample in samples) / padded

    shuffled = random.Random(0).sample(samples, len(samples))
    plain, grouped = padding([shuffled[i : i + 64] for i in range(0, 1000, 64)]), padding(plan_epoch(samples, 64, "0"))
    print(f"padding in micro-batches of 8: {plain:.1%} shuffled, {grouped:.1%} grouped")
    assert grouped < plain / 2


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 5), st.integers(1, 4))
def test_processes_share_a_batch_and_run_the_same_parts_of_the_model(pictured, size, world):
    batch = make_samples([1] * len(pictured), pictured)
    shares = [micro_batches(batch, size, rank, world) for rank in range(world)]
    counted = [row.sample.entry for share in shares for rows in share for row in rows if row.counts]
    assert sorted(counted) == list(range(len(batch)))  # each sample counts in one process, once
    assert len({len(share) for share in shares}) == 1
    for together in zip(*shares, strict=True):
        assert all(1 <= len(rows) <= size + 1 for rows in together)
        assert len({any(row.sample.image for row in rows) for rows in together}) == 1


def test_rows_are_padded_on_the_right_and_only_answers_are_learned(encode, processor, pictures):
    long = encode(entry("red.png", "<image>\nWhich color?", "a rather long answer"))
    short = encode(entry(None, "How many?", "one"))
    silent = encode(entry("blue.png", "<image>\nWhich color?", "blue"))
    inputs = collate([Row(long, True), Row(short, True), Row(silent, False)], processor)
    assert inputs.input_ids.shape == inputs.is_answer.shape == (3, long.length)
    assert (inputs.input_ids[0] == 420).sum() == P
    assert inputs.input_ids[1].tolist() == [*short.ids, *[421] * (long.length - short.length)]
    assert inputs.is_answer.sum(1).tolist() == [long.is_answer.sum(), short.is_answer.sum(), 0]
    assert inputs.input_ids[0][inputs.is_answer[0]].tolist() == long.ids[long.is_answer].tolist()


def test_images_are_padded_to_a_square_and_in_the_order_of_the_rows(encode, processor, pictures):
    samples = [encode(entry(f"{c}.png", "<image>\nWhich color?", c)) for c in COLOURS[:3]]
    pixels = collate([Row(sample, True) for sample in samples], processor).pixel_values
    padded = LlavaImageProcessor(28, 28, do_pad=True)
    assert torch.equal(pixels, padded([Image.open(pictures / f"{c}.png") for c in COLOURS[:3]]))


def test_a_damaged_image_is_named(encode, processor, tmp_path):
    sample = encode_entry(7, CAPTIONS[0], "align", processor, _truncated(tmp_path), "", 2048)
    with pytest.raises(ValueError, match=r"entry 7: .*red.png is a damaged image"):
        collate([Row(sample, True)], processor)


def _truncated(folder):
    """A folder whose red.png has a valid header but is truncated."""
    draw_pictures(folder)
    content = (folder / "red.png").read_bytes()
    (folder / "red.png").write_bytes(content[: len(content) // 2])
    return folder


def test_prefetching_keeps_the_order():
    assert list(prefetch(lambda n: n * n, iter(range(50)))) == [n * n for n in range(50)]
