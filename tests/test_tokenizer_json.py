"""A folder with tokenizer.json alone has the ids, the text and the stream of transformers' tokenizer."""

import copy
import json
import shutil

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_tokenizer import reference_tokenizer
from tokenizers import models, pre_tokenizers, processors

from extras.tokenizer_files import load_pieces
from llava import LlavaProcessor
from tokenizer import LlamaTokenizer

ADDED = {"<image>": 420, "<pad>": 421}
METASPACE = {scheme: pre_tokenizers.Metaspace("▁", scheme, split=False) for scheme in ("first", "always", "never")}
BOS = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
any_text = st.text(st.characters(exclude_categories=["Cs"]))
PARTS = [
    "<image>",
    "</s>",
    "<s>",
    "<pad>",
    "<unk>",
    "<im",
    " ",
    "  ",
    "\n",
    "a",
    "USER:",
    "é",
    "🦙",
    "中文",
    "▁",
    "\0",
    "<0x41>",
]
tricky_text = st.lists(st.sampled_from(PARTS)).map("".join)


@pytest.fixture(scope="module")
def forms(tokenizer_file) -> dict[str, dict]:
    """The content of tokenizer.json in every form, of the hub and as transformers 5 writes it, with and without BOS."""
    found = {}
    for bos in (True, False):
        backend = reference_tokenizer(tokenizer_file, ADDED).backend_tokenizer
        backend.post_processor = BOS if bos else processors.TemplateProcessing("$A", special_tokens=[])
        name = "with BOS" if bos else "without BOS"
        found[f"hub, {name}"] = json.loads(backend.to_str())
        backend.normalizer = None
        for scheme, metaspace in METASPACE.items():
            backend.pre_tokenizer = metaspace
            found[f"{scheme}, {name}"] = json.loads(backend.to_str())
    old = copy.deepcopy(found["hub, with BOS"])
    old["model"]["merges"] = [" ".join(pair) for pair in old["model"]["merges"]]
    return found | {"merges as strings": old, "no post-processor": found["first, with BOS"] | {"post_processor": None}}


NAMES = [f"{form}, {bos}" for form in ("hub", *METASPACE) for bos in ("with BOS", "without BOS")]
NAMES += ["merges as strings", "no post-processor"]


@pytest.fixture(params=NAMES)
def pair(request, forms, tmp_path):
    """Our tokenizer, and transformers', from a folder with this tokenizer.json."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(forms[request.param], ensure_ascii=False), encoding="utf-8")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), clean_up_tokenization_spaces=False
    )
    return LlamaTokenizer.from_pretrained(tmp_path), theirs


def test_ids_are_those_of_transformers(pair):
    ours, theirs = pair

    @settings(max_examples=300, deadline=None)
    @given(any_text | tricky_text)
    def check(text):
        assert ours.encode(text) == theirs(text).input_ids

    check()


def test_decoded_and_streamed_text_is_that_of_transformers(pair):
    ours, theirs = pair

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.integers(0, 421) | st.integers(3, 258)), st.booleans())
    def check(ids, skip):
        text = theirs.decode(ids, skip_special_tokens=skip)
        assert ours.decode(ids, skip) == text
        assert "".join(ours.stream(ids, skip)) == text

    check()


def test_the_chat_prompt_has_the_ids_of_its_text(pair):
    """But for BOS, which `encode_chat` adds if the tokenizer does, as the text has it spelled out after each answer."""
    ours, theirs = pair
    turns = [("<image>\nWhat is this?", "A circle."), ("And now?", None)]
    text = "USER: <image>\nWhat is this? ASSISTANT: A circle.</s>USER: And now? ASSISTANT:"
    assert ours.encode_chat(turns)[0] == theirs(text).input_ids


def test_a_continued_chat_has_the_ids_that_follow_an_answer(pair):
    ours, _ = pair
    whole = ours.encode_chat([("a", "b"), ("c", None)])[0]
    parts = ours.encode_chat([("a", "b")])[0] + ours.encode_chat([("c", None)], continued=True)[0]
    assert parts == whole


def test_a_folder_saved_by_transformers_5_loads(checkpoint, tokenizer_file, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "saved")
    for name in ("tokenizer.model", "added_tokens.json", "tokenizer_config.json"):
        (tmp_path / "saved" / name).unlink()
    theirs = reference_tokenizer(tokenizer_file, ADDED)
    theirs.save_pretrained(tmp_path / "saved")
    ours = LlavaProcessor.from_pretrained(tmp_path / "saved")
    prompt = "USER: <image>\nWhat is this? ASSISTANT:"
    assert ours.tokenizer.encode(prompt) == theirs(prompt).input_ids
    assert ours.tokenizer.pad_token_id == 421


# What is refused


def byte_level() -> dict:
    tokenizer = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    return json.loads(tokenizer.to_str())


def word_piece() -> dict:
    return json.loads(tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")).to_str())


OTHER_KINDS = {
    "byte-level BPE": (byte_level, r"is a byte-level BPE \(the kind of GPT-2, Llama 3 and Qwen\) tokenizer"),
    "WordPiece": (word_piece, "is a WordPiece tokenizer"),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_another_kind_of_tokenizer_is_refused_by_its_name(kind, tmp_path):
    make, sentence = OTHER_KINDS[kind]
    (tmp_path / "tokenizer.json").write_text(json.dumps(make()))
    with pytest.raises(ValueError, match=sentence):
        LlamaTokenizer.from_pretrained(tmp_path)


CHANGES = {
    "an id missing": (lambda raw: raw["model"]["vocab"].pop("a"), "are not 0 to"),
    "merges in another order": (lambda raw: raw["model"]["merges"].reverse(), "merges are in another order"),
    "no </s>": (lambda raw: raw["model"]["vocab"].update({"x" * 99: raw["model"]["vocab"].pop("</s>")}), "lacks </s>"),
    "an id that is a string": (lambda raw: raw["model"]["vocab"].update(a="7"), "is not a complete tokenizer"),
    "no merges": (lambda raw: raw["model"].pop("merges"), "is not a complete tokenizer"),
    "no model": (lambda raw: raw.pop("model"), "is not a complete tokenizer"),
    "a normalizer of T5": (lambda raw: raw.update(normalizer={"type": "NFKC"}), "normalizer and pre_tokenizer are not"),
    "another decoder": (lambda raw: raw.update(decoder={"type": "WordPiece"}), "its decoder is not"),
    "another post-processor": (
        lambda raw: raw.update(post_processor={"type": "BertProcessing"}),
        "post_processor does",
    ),
    "a token that strips spaces": (lambda raw: raw["added_tokens"][3].update(lstrip=True), "<image> has lstrip set"),
    "an added token far away": (lambda raw: raw["added_tokens"][3].update(id=9999), "do not follow those of the voc"),
    "no <image>": (
        lambda raw: raw["added_tokens"].pop(3) and raw["added_tokens"][3].update(id=420),
        "has no <image> token",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_tokenizer_json_that_is_damaged_or_different_is_refused_with_the_reason(change, forms, tmp_path):
    raw = copy.deepcopy(forms["hub, with BOS"])
    apply, sentence = CHANGES[change]
    apply(raw)
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=sentence):
        LlamaTokenizer.from_pretrained(tmp_path)


def test_a_folder_without_any_tokenizer_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        LlamaTokenizer.from_pretrained(tmp_path)


# Both files in one folder


@pytest.fixture
def both(forms, checkpoint, tmp_path):
    """Makes a folder with tokenizer.model and with a tokenizer.json of some form."""

    def make(form: str, change=lambda raw: None):
        raw = copy.deepcopy(forms[form])
        change(raw)
        for name in ("tokenizer.model", "added_tokens.json", "tokenizer_config.json"):
            shutil.copy(checkpoint / name, tmp_path / name)
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
        return tmp_path

    return make


def test_two_files_that_agree_are_used_without_a_word(both, capsys):
    assert LlamaTokenizer.from_pretrained(both("hub, with BOS")).prefix == "model"
    assert capsys.readouterr() == ("", "")


DIFFERENCES = {
    "where they put the leading space": ("first, with BOS", lambda raw: None),
    "whether a text starts with <s>": ("hub, without BOS", lambda raw: None),
    "their added tokens": ("hub, with BOS", lambda raw: raw["added_tokens"].pop()),
    "their kind": ("hub, with BOS", lambda raw: raw["model"].update(type="Unigram")),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_two_files_that_differ_are_named_with_the_difference(difference, both, capsys):
    folder = both(*DIFFERENCES[difference])
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    assert f"tokenizer.json differ in {difference}; tokenizer.model is used" in capsys.readouterr().err
    assert tokenizer.encode("a") == [1, *load_pieces(folder / "tokenizer.model").encode("a")]
