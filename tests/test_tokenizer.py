"""The tokenizer agrees with a `tokenizers` BPE, streams what it decodes and never obeys what users type."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_tokenizer import reference_tokenizer

from tokenizer import VICUNA_SYSTEM, LlamaTokenizer

ADDED = {"<image>": 420, "<pad>": 421}
BOS, EOS, IMAGE = 1, 2, 420

# Any text (but "▁", which is how SentencePiece writes a space), and text of parts that are easy to get wrong.
any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"))
tricky = [
    "<image>",
    "</s>",
    "<s>",
    "<pad>",
    "<unk>",
    "<im",
    "age>",
    " ",
    "  ",
    "\n",
    "a",
    "USER:",
    "é",
    "🦙",
    "<0x41>",
    "\0",
]
tricky_text = st.lists(st.sampled_from(tricky)).map("".join)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file) -> LlamaTokenizer:
    return LlamaTokenizer(tokenizer_file, ADDED)


@pytest.fixture(scope="session")
def judge(tokenizer_file):
    return reference_tokenizer(tokenizer_file, ADDED)


def test_raw_prompts_have_the_ids_of_the_reference(tokenizer, judge):
    @settings(max_examples=400, deadline=None)
    @given(any_text | tricky_text)
    def check(text):
        assert tokenizer.encode(text) == judge(text).input_ids

    check()


def test_any_ids_decode_to_the_text_of_the_reference(tokenizer, judge):
    ids = st.lists(st.integers(0, 460) | st.integers(3, 258))  # beyond the vocabulary too, and many broken bytes

    @settings(max_examples=400, deadline=None)
    @given(ids, st.booleans())
    def check(ids, skip):
        known = [i for i in ids if i < 422]  # transformers cannot decode the others at all
        assert tokenizer.decode(ids, skip) == judge.decode(known, skip_special_tokens=skip)

    check()


def test_decoding_gives_back_what_was_encoded(tokenizer):
    @settings(max_examples=400, deadline=None)
    @given(any_text | tricky_text)
    def check(text):
        ids = tokenizer.encode(text, split_special_tokens=True)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text

    check()


def test_the_stream_ends_up_as_the_whole_text(tokenizer):
    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.integers(0, 460) | st.integers(3, 258)), st.booleans())
    def check(ids, skip):
        assert "".join(tokenizer.stream(iter(ids), skip)) == tokenizer.decode(ids, skip)

    check()


def test_the_stream_yields_text_as_soon_as_it_is_final(tokenizer):
    given_out = []

    def ids():
        for i in tokenizer.encode("an ox", add_special_tokens=False):
            yield i
            given_out.append(len(text))

    text = []
    for piece in tokenizer.stream(ids()):
        text.append(piece)
    assert given_out == list(range(1, len(given_out) + 1))  # one piece of text for each id, before the next id is drawn


def test_the_stream_holds_a_character_back_until_its_bytes_are_complete(tokenizer):
    ids = tokenizer.encode("🦙🦙 ok", add_special_tokens=False)
    assert len(ids) > 8
    assert all("\ufffd" not in piece for piece in tokenizer.stream(ids))
    assert "".join(tokenizer.stream(ids)) == "🦙🦙 ok"


def test_broken_bytes_become_replacement_characters(tokenizer):
    first_byte = tokenizer.encode("🦙", add_special_tokens=False)[1]
    assert tokenizer.decode([first_byte, first_byte]) == "\ufffd\ufffd"


def test_ids_beyond_the_vocabulary_stand_for_no_text(tokenizer):
    ids = tokenizer.encode("a circle")
    assert tokenizer.decode([*ids, 422, 447, 10**9, -1], skip_special_tokens=True) == "a circle"


def test_batch_decode_decodes_each_row(tokenizer):
    rows = [tokenizer.encode("a circle"), tokenizer.encode("a square")]
    assert tokenizer.batch_decode(rows, skip_special_tokens=True) == ["a circle", "a square"]


def test_lone_surrogates_become_the_replacement_character(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b"), skip_special_tokens=True) == "a\ufffdb"


def test_a_chat_is_written_as_llava_was_trained(tokenizer, judge):
    ids, _ = tokenizer.encode_chat([("<image>\nWhat?", "A fox."), ("Why?", None)], system=VICUNA_SYSTEM)
    text = f"{VICUNA_SYSTEM} USER: <image>\nWhat? ASSISTANT: A fox.</s>USER: Why? ASSISTANT:"
    assert ids == judge(text).input_ids


def test_without_a_system_sentence_a_chat_begins_with_the_user(tokenizer, judge):
    assert tokenizer.encode_chat([("Why?", None)])[0] == judge("USER: Why? ASSISTANT:").input_ids


def test_a_continued_chat_is_the_rest_of_the_whole_one(tokenizer):
    turns = [("<image>\nWhat?", "A fox."), ("Why?", "It is red."), ("And?", None)]
    parts = [tokenizer.encode_chat([turn], continued=i > 0)[0] for i, turn in enumerate(turns)]
    assert [i for part in parts for i in part] == tokenizer.encode_chat(turns)[0]


def test_nothing_that_a_user_types_becomes_a_control_token(tokenizer):
    @settings(max_examples=200, deadline=None)
    @given(tricky_text, tricky_text)
    def check(question, answer):
        ids, _ = tokenizer.encode_chat([(question, answer)])
        control = [i for i in ids if i < 3 or i >= IMAGE]
        assert control == [BOS, *[IMAGE] * question.count("<image>"), EOS]

    check()


def test_what_a_user_types_is_read_as_it_was_typed(tokenizer):
    ids, _ = tokenizer.encode_chat([("What is </s><pad>?", "An <image> tag.")])
    assert "USER: What is </s><pad>? ASSISTANT: An <image> tag." in tokenizer.decode(ids[1:-1])


def test_the_answers_and_their_ends_are_marked(tokenizer):
    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.tuples(any_text | tricky_text, any_text | tricky_text), min_size=1, max_size=3))
    def check(turns):
        ids, is_answer = tokenizer.encode_chat(turns, system="Be brief.")
        runs = [
            [i for i, _ in run]
            for marked, run in itertools.groupby(zip(ids, is_answer, strict=True), lambda x: x[1])
            if marked
        ]
        assert [run[-1] for run in runs] == [EOS] * len(turns)
        assert tokenizer.batch_decode([run[:-1] for run in runs]) == [answer for _, answer in turns]

    check()


def test_the_folder_says_which_tokens_were_added(tmp_path, tokenizer_file):
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 421}))
    decoder = {
        "420": {"content": "<image>", "special": True},
        "421": {"content": "<pad>", "special": True},
        "422": {"content": "<box>", "special": False},
    }
    config = {"added_tokens_decoder": decoder, "add_bos_token": False, "pad_token": {"content": "<box>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = LlamaTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.image_token_id, tokenizer.pad_token_id) == (420, 422)
    assert tokenizer.encode("<image><box>") == [420, 422]
    assert tokenizer.decode([420, 422, 421], skip_special_tokens=True) == "<box>"
