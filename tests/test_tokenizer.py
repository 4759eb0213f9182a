"""Ids and text match a `tokenizers` BPE, streaming matches decoding, and typed text never becomes a control token."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_tokenizer import reference_tokenizer

from extras.tokenizer_files import load_pieces
from tokenizer import VICUNA_SYSTEM, LlamaTokenizer

ADDED = {"<image>": 420, "<pad>": 421}
BOS, EOS, IMAGE = 1, 2, 420

# Any text without "▁", which stands for a space in SentencePiece, and text made of parts that are easy to get wrong.
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
    return LlamaTokenizer(load_pieces(tokenizer_file), ADDED)


@pytest.fixture(scope="session")
def judge(tokenizer_file):
    return reference_tokenizer(tokenizer_file, ADDED)


def test_ids_of_raw_prompts_match_the_reference(tokenizer, judge):
    @settings(max_examples=400, deadline=None)
    @given(any_text | tricky_text)
    def check(text):
        assert tokenizer.encode(text) == judge(text).input_ids

    check()


def test_text_decoded_from_any_ids_matches_the_reference(tokenizer, judge):
    ids = st.lists(st.integers(0, 460) | st.integers(3, 258))  # some beyond the vocabulary, many of invalid bytes

    @settings(max_examples=400, deadline=None)
    @given(ids, st.booleans())
    def check(ids, skip):
        known = [i for i in ids if i < 422]  # transformers cannot decode the others
        assert tokenizer.decode(ids, skip) == judge.decode(known, skip_special_tokens=skip)

    check()


def test_decoding_inverts_encoding(tokenizer):
    @settings(max_examples=400, deadline=None)
    @given(any_text | tricky_text)
    def check(text):
        ids = tokenizer.encode(text, split_special_tokens=True)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text

    check()


def test_the_streamed_pieces_join_to_the_decoded_text(tokenizer):
    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.integers(0, 460) | st.integers(3, 258)), st.booleans())
    def check(ids, skip):
        assert "".join(tokenizer.stream(iter(ids), skip)) == tokenizer.decode(ids, skip)

    check()


def test_the_stream_yields_text_as_soon_as_it_is_final(tokenizer):
    yielded = []

    def ids():
        for i in tokenizer.encode("an ox", add_special_tokens=False):
            yield i
            yielded.append(len(text))

    text = []
    for piece in tokenizer.stream(ids()):
        text.append(piece)
    assert yielded == list(range(1, len(yielded) + 1))  # one piece of text for each id, before the next id is requested


def test_the_stream_holds_back_a_character_until_its_bytes_are_complete(tokenizer):
    ids = tokenizer.encode("🦙🦙 ok", add_special_tokens=False)
    assert len(ids) > 8
    assert all("\ufffd" not in piece for piece in tokenizer.stream(ids))
    assert "".join(tokenizer.stream(ids)) == "🦙🦙 ok"


def test_invalid_bytes_become_replacement_characters(tokenizer):
    first_byte = tokenizer.encode("🦙", add_special_tokens=False)[1]
    assert tokenizer.decode([first_byte, first_byte]) == "\ufffd\ufffd"


def test_ids_beyond_the_vocabulary_are_skipped(tokenizer):
    ids = tokenizer.encode("a circle")
    assert tokenizer.decode([*ids, 422, 447, 10**9, -1], skip_special_tokens=True) == "a circle"


def test_batch_decode_decodes_each_sequence(tokenizer):
    sequences = [tokenizer.encode("a circle"), tokenizer.encode("a square")]
    assert tokenizer.batch_decode(sequences, skip_special_tokens=True) == ["a circle", "a square"]


def test_lone_surrogates_become_replacement_characters(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b"), skip_special_tokens=True) == "a\ufffdb"


def test_a_chat_is_encoded_in_the_format_of_llavas_training(tokenizer, judge):
    ids, _ = tokenizer.encode_chat([("<image>\nWhat?", "A fox."), ("Why?", None)], system=VICUNA_SYSTEM)
    text = f"{VICUNA_SYSTEM} USER: <image>\nWhat? ASSISTANT: A fox.</s>USER: Why? ASSISTANT:"
    assert ids == judge(text).input_ids


def test_a_chat_without_a_system_prompt_starts_with_user(tokenizer, judge):
    assert tokenizer.encode_chat([("Why?", None)])[0] == judge("USER: Why? ASSISTANT:").input_ids


def test_turns_encoded_one_by_one_join_to_the_whole_chat(tokenizer):
    turns = [("<image>\nWhat?", "A fox."), ("Why?", "It is red."), ("And?", None)]
    parts = [tokenizer.encode_chat([turn], continued=i > 0)[0] for i, turn in enumerate(turns)]
    assert [i for part in parts for i in part] == tokenizer.encode_chat(turns)[0]


def test_typed_text_never_becomes_a_control_token(tokenizer):
    @settings(max_examples=200, deadline=None)
    @given(tricky_text, tricky_text)
    def check(question, answer):
        ids, _ = tokenizer.encode_chat([(question, answer)])
        control = [i for i in ids if i < 3 or i >= IMAGE]
        assert control == [BOS, *[IMAGE] * question.count("<image>"), EOS]

    check()


def test_special_tokens_typed_in_a_chat_are_plain_text(tokenizer):
    ids, _ = tokenizer.encode_chat([("What is </s><pad>?", "An <image> tag.")])
    assert "USER: What is </s><pad>? ASSISTANT: An <image> tag." in tokenizer.decode(ids[1:-1])


def test_answers_and_their_eos_are_marked(tokenizer):
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


def test_added_tokens_are_read_from_the_folder(tmp_path, tokenizer_file):
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
