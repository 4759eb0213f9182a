"""A checkpoint's tokenizer files -> a SentencePiece model and the tokens added to it.

Llama's tokenizer comes in two files: `tokenizer.model`, the original SentencePiece model, and `tokenizer.json`, the
same BPE in the format of the `tokenizers` library. Many folders have only the second, among them all that transformers
5 saves. It is converted to a SentencePiece model in memory, so that there is one encoder for both.

Sources: sentencepiece_model.proto for the model format; the documentation of `tokenizers` for tokenizer.json.
"""

import struct
import sys
from pathlib import Path
from typing import NamedTuple

import sentencepiece

from extras.files import read_json

SPACE = "\u2581"  # "▁", which stands for a space inside a piece
GIT_LFS = b"version https://git-lfs"
DECODER = {  # "▁" becomes a space, bytes become characters, and the first space is removed
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}
BYTES = {f"<0x{i:02X}>" for i in range(256)}  # the pieces of single bytes, for characters outside the vocabulary
# Types of pieces in a SentencePiece model
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


class TokenizerFiles(NamedTuple):
    """What the files of a tokenizer contain."""

    pieces: sentencepiece.SentencePieceProcessor
    added_tokens: dict[str, int]  # text -> id
    special: set[str]  # those of the added tokens that `skip_special_tokens` omits
    add_bos_token: bool
    pad_token: str
    # Where a space is put in front of a text: "model": before every segment between special tokens, by SentencePiece;
    # "always": the same, unless the segment begins with a space; "first": only at the start of the text; "never".
    prefix: str


def read_tokenizer_files(folder: Path, required: str) -> TokenizerFiles:
    """Reads `tokenizer.model`, or else `tokenizer.json`, and what the other files say about either.

    If both are there and differ, `tokenizer.model` is used, and a sentence on stderr says so.

    Raises:
        FileNotFoundError: there is neither file.
        ValueError: a file is damaged, the tokenizer is of another kind than Llama's, or it lacks the token `required`.
    """
    model_file, json_file = folder / "tokenizer.model", folder / "tokenizer.json"
    if not model_file.is_file() and not json_file.is_file():
        raise FileNotFoundError(f"{folder} has no tokenizer: neither tokenizer.model nor tokenizer.json")
    config = read_json(folder / "tokenizer_config.json", missing={})
    try:
        pad_token = config.get("pad_token") or "<pad>"
        pad_token = str(pad_token["content"] if isinstance(pad_token, dict) else pad_token)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'tokenizer_config.json'} has a malformed pad_token: {error!r}") from error
    files = _from_model(folder, config, pad_token) if model_file.is_file() else _from_json(json_file, pad_token)
    if required not in files.added_tokens:
        raise ValueError(f"the tokenizer of {folder} has no {required} token: is this a LLaVA checkpoint?")
    if model_file.is_file() and json_file.is_file() and (difference := _difference(files, json_file)):
        print(
            f"{folder}: tokenizer.model and tokenizer.json differ in {difference}; tokenizer.model is used. "
            "Remove the one that does not belong to this checkpoint.",
            file=sys.stderr,
        )
    return files


def load_pieces(model_file: Path) -> sentencepiece.SentencePieceProcessor:
    """Loads `tokenizer.model`; raises a ValueError if it is not a SentencePiece model of Llama's kind."""
    content = model_file.read_bytes()
    if content.startswith(GIT_LFS):
        raise ValueError(f"{model_file} is a git-lfs pointer, not the file itself: run git lfs pull")
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=content or b"\0")  # b"" means "none yet"
        pieces.id_to_piece(list(range(len(pieces))))
    except (RuntimeError, UnicodeDecodeError) as error:
        raise ValueError(f"{model_file} is not a SentencePiece model: is the download complete?") from error
    if min(pieces.bos_id(), pieces.eos_id()) < 0:
        raise ValueError(f"{model_file} has no <s> or no </s>, so it is not Llama's")
    return pieces


def _from_model(folder: Path, config: dict, pad_token: str) -> TokenizerFiles:
    """tokenizer.model, with the tokens of added_tokens.json and tokenizer_config.json."""
    pieces = load_pieces(folder / "tokenizer.model")
    added_tokens = dict(read_json(folder / "added_tokens.json", missing={}))
    special = set(added_tokens)
    try:
        for token_id, token in (config.get("added_tokens_decoder") or {}).items():
            added_tokens[token["content"]] = int(token_id)
            (special.add if token.get("special") else special.discard)(token["content"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'tokenizer_config.json'} has malformed tokens: {error!r}") from error
    if not all(text and type(text) is str and type(token_id) is int for text, token_id in added_tokens.items()):
        raise ValueError(f"the added tokens of {folder} must map texts to ids: {str(added_tokens)[:200]}")
    by_id = dict(enumerate(pieces.id_to_piece(list(range(len(pieces))))))
    for text, token_id in sorted(added_tokens.items(), key=lambda item: item[1]):
        if by_id.setdefault(token_id, text) != text or not 0 <= token_id < len(by_id):
            there = f"that is {by_id[token_id]}" if by_id[token_id] != text else f"the next id is {len(by_id) - 1}"
            raise ValueError(
                f"the added token {text} of {folder} cannot have the id {token_id}: {there}; "
                "tokenizer.model is from another checkpoint, or its download is incomplete"
            )
    return TokenizerFiles(
        pieces, added_tokens, special, config.get("add_bos_token", True) is not False, pad_token, "model"
    )


def _from_json(file: Path, pad_token: str) -> TokenizerFiles:
    """tokenizer.json, in one of the forms that Llama's tokenizer has in it."""
    raw = read_json(file)
    try:
        model, tokens = raw["model"], raw.get("added_tokens") or []
        if kind := _other_kind(raw):
            raise ValueError(f"{file} is a {kind} tokenizer; only Llama's SentencePiece BPE is supported")
        vocab: dict[str, int] = model["vocab"] | {}
        added: dict[str, int] = {token["content"]: token["id"] for token in tokens}
        if not all(type(text) is str and type(i) is int for text, i in (*vocab.items(), *added.items())):
            raise TypeError("ids must be integers")
        for token in tokens:
            if flags := [name for name in ("single_word", "lstrip", "rstrip") if token.get(name)]:
                raise ValueError(f"{file}: the token {token['content']} has {flags[0]} set, which is not supported")
        texts = sorted(vocab, key=lambda text: vocab[text])
        if [vocab[text] for text in texts] != list(range(len(texts))):
            raise ValueError(f"{file}: the ids of the vocabulary are not 0 to {len(texts) - 1}")
        if not all(added[text] == vocab.get(text, added[text]) for text in added):
            raise ValueError(f"{file}: an added token has another id in the vocabulary")
        unknown = model.get("unk_token") or "<unk>"
        if missing := {unknown, "<s>", "</s>", *BYTES} - vocab.keys():
            raise ValueError(f"{file}: the vocabulary lacks {', '.join(sorted(missing)[:5])}, so it is not Llama's")
        if sorted(i for text, i in added.items() if text not in vocab) != list(
            range(len(vocab), len(vocab.keys() | added.keys()))
        ):
            raise ValueError(f"{file}: the ids of the added tokens do not follow those of the vocabulary")
        _check_merges(file, vocab, model["merges"])
        prefix = _prefix(file, raw)
        if raw.get("decoder") != DECODER:
            raise ValueError(f"{file}: its decoder is not that of a Llama tokenizer")
        bos = _bos(file, raw)
        control = {text for text in added if text in vocab and text != unknown}
        pieces = sentencepiece.SentencePieceProcessor(
            model_proto=_sentencepiece_model(texts, unknown, control, prefix == "model")
        )
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, UnicodeError) as error:
        raise ValueError(f"{file} is not a complete tokenizer: {error!r}; download it again") from error
    special = {str(token["content"]) for token in tokens if token.get("special")}
    beyond = {text: i for text, i in added.items() if text not in vocab}
    return TokenizerFiles(pieces, beyond, special & beyond.keys(), bos, pad_token, prefix)


def _other_kind(raw: dict) -> str:
    """The name of the tokenizer's kind if it is not a BPE of Llama's kind, else ""."""
    model, steps = raw["model"], str(raw.get("pre_tokenizer")) + str(raw.get("decoder"))
    kind = model.get("type") or ("BPE" if "merges" in model else "unknown")
    if kind != "BPE":
        return str(kind)
    if "ByteLevel" in steps:
        return "byte-level BPE (the kind of GPT-2, Llama 3 and Qwen)"
    if not model.get("byte_fallback") or model.get("ignore_merges") or model.get("dropout"):
        return "BPE without byte fallback, or with options that Llama's does not have,"
    return ""


def _check_merges(file: Path, vocab: dict[str, int], merges: list) -> None:
    """Raises a ValueError unless merges are in the order of the ids that they make: SentencePiece's order."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    if not all(len(pair) == 2 for pair in pairs):
        raise TypeError("a merge is not a pair")
    made = [vocab[left + right] for left, right in pairs]
    if made != sorted(made):
        raise ValueError(f"{file}: its merges are in another order than Llama's, so it is another kind of BPE")


def _prefix(file: Path, raw: dict) -> str:
    """Where a space is put in front of a text; see `TokenizerFiles`."""
    normalizer, before = raw.get("normalizer"), raw.get("pre_tokenizer")
    steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if before is None and steps == [{"type": "Prepend", "prepend": SPACE}, replaces]:
        return "model"
    if before is None and steps == [replaces]:
        return "never"
    if not steps and before and before.get("type") == "Metaspace" and before.get("replacement") == SPACE:
        scheme = before.get("prepend_scheme") or ("always" if before.get("add_prefix_space", True) else "never")
        if before.get("split") is False and scheme in ("always", "first", "never"):
            return scheme
    raise ValueError(f"{file}: its normalizer and pre_tokenizer are not those of a Llama tokenizer")


def _bos(file: Path, raw: dict) -> bool:
    """Whether the post-processor puts `<s>` in front of a text."""
    post = raw.get("post_processor")
    if post is None:
        return False
    if post.get("type") == "TemplateProcessing":
        items = [item.get("SpecialToken", {}).get("id", "text") for item in post["single"]]
        if items in (["text"], ["<s>", "text"]):
            return items[0] == "<s>"
    raise ValueError(f"{file}: its post_processor does more than put <s> in front of a text, which is not supported")


def _sentencepiece_model(texts: list[str], unknown: str, control: set[str], add_dummy_prefix: bool) -> bytes:
    """A serialised SentencePiece BPE model with these pieces; earlier ones are merged first (protobuf wire format)."""

    def varint(number: int) -> bytes:
        out = bytearray()
        while number > 127:
            out.append(number & 127 | 128)
            number >>= 7
        return bytes([*out, number])

    def field(number: int, value: int | float | bytes) -> bytes:
        if isinstance(value, bytes):
            return varint(number << 3 | 2) + varint(len(value)) + value
        if isinstance(value, float):
            return varint(number << 3 | 5) + struct.pack("<f", value)
        return varint(number << 3) + varint(value)

    model = b""
    for i, text in enumerate(texts):
        kind = UNKNOWN if text == unknown else CONTROL if text in control else BYTE if text in BYTES else NORMAL
        model += field(1, field(1, text.encode()) + field(2, float(-i)) + field(3, kind))
    ids = {40: unknown, 41: "<s>", 42: "</s>"}  # trainer_spec: unk_id, bos_id, eos_id
    trainer = field(3, 2) + field(35, 1)  # model_type BPE, byte_fallback
    trainer += b"".join(field(number, texts.index(text)) for number, text in ids.items())
    normalizer = field(1, b"identity") + field(3, int(add_dummy_prefix)) + field(4, 0) + field(5, 1)
    return model + field(2, trainer) + field(3, normalizer)


def _difference(files: TokenizerFiles, json_file: Path) -> str:
    """What tokenizer.json says otherwise than these files, in words; "" if nothing."""
    try:
        other = _from_json(json_file, files.pad_token)
    except ValueError:
        return "their kind"

    def pieces(files: TokenizerFiles) -> list[str]:
        return files.pieces.id_to_piece(list(range(len(files.pieces))))

    if pieces(files) != pieces(other):
        return "their vocabulary"
    if files.added_tokens != other.added_tokens:
        return "their added tokens"
    if files.add_bos_token != other.add_bos_token:
        return "whether a text starts with <s>"
    return "" if files.prefix == other.prefix else "where they put the leading space"
