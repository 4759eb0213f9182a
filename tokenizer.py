"""The tokenizer: text to token ids and back, and the chat prompt that LLaVA was trained on.

    "USER: <image>\\nWhat is this? ASSISTANT:"  ->  [1, 3148, 1001, 29901, 29871, 32000, 29871, 13, ...]
    [319, 6635, 29889]                         ->  "A cat."

LLaVA uses Llama's SentencePiece BPE (`tokenizer.model`: 32000 pieces, byte fallback, a space prefixed to every text)
and two added tokens: `<image>` 32000 is the placeholder of an image, `<pad>` 32001 pads batches. Everything here is
plain Python on lists of ids, without tensors.

Sources: SentencePiece (arXiv 1808.06226) for the pieces; transformers' "legacy" LlamaTokenizer for the split at special
tokens and the decoding of bytes; LLaVA's conversation mode `vicuna_v1` for the chat prompt.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from extras.files import read_json

IMAGE_TOKEN = "<image>"
SPACE = "\u2581"  # "▁", which stands for a space inside a piece

# The system prompt of every training conversation of LLaVA-1.5; transformers' documentation leaves it out.
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# The paper's response-format prompt (section 3.2), appended to a question to get a short answer.
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."


class LlamaTokenizer:
    """A SentencePiece model and the tokens that were added to its vocabulary.

    Args:
        model_file: the SentencePiece model.
        added_tokens: text of each added token -> its id; `<image>` must be one of them.
        special: the added tokens that `skip_special_tokens` omits from decoded text; None means all.
        add_bos_token: whether encoded text starts with `<s>`.
        pad_token: the token that pads batches; `<unk>` if there is no such token.

    Raises a ValueError if the file is not a SentencePiece model of Llama's kind, or the added tokens do not fit it.
    """

    def __init__(
        self,
        model_file: str | Path,
        added_tokens: dict[str, int],
        special: Iterable[str] | None = None,
        add_bos_token: bool = True,
        pad_token: str = "<pad>",
    ) -> None:
        content = Path(model_file).read_bytes()
        if content.startswith(b"version https://git-lfs"):
            raise ValueError(f"{model_file} is a git-lfs pointer, not the file itself: run git lfs pull")
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=content or b"\0")  # b"" means "none yet"
            texts = self.pieces.id_to_piece(list(range(len(self.pieces))))
        except (RuntimeError, UnicodeDecodeError) as error:
            raise ValueError(f"{model_file} is not a SentencePiece model: is the download complete?") from error
        if min(self.pieces.bos_id(), self.pieces.eos_id()) < 0:
            raise ValueError(f"{model_file} has no <s> or no </s>, so it is not Llama's")
        if IMAGE_TOKEN not in added_tokens:
            raise ValueError(
                f"the tokenizer of {Path(model_file).parent} has no {IMAGE_TOKEN} token: is this a LLaVA checkpoint?"
            )
        by_id = dict(enumerate(texts))
        for text, token_id in sorted(added_tokens.items(), key=lambda item: item[1]):
            if by_id.setdefault(token_id, text) != text or not 0 <= token_id < len(by_id):
                there = f"that is {by_id[token_id]}" if by_id[token_id] != text else f"the next id is {len(by_id) - 1}"
                raise ValueError(
                    f"the added token {text} of {Path(model_file).parent} cannot have the id {token_id}: {there}; "
                    "tokenizer.model is from another checkpoint, or its download is incomplete"
                )
        control = [i for i in range(len(self.pieces)) if self.pieces.is_control(i) or self.pieces.is_unknown(i)]
        self.special_tokens = {self.pieces.id_to_piece(i): i for i in control} | added_tokens
        self.skipped_ids = {*control, *(added_tokens[text] for text in (added_tokens if special is None else special))}
        self.added_texts = {token_id: text for text, token_id in added_tokens.items()}
        self.add_bos_token = add_bos_token
        self.bos_token_id, self.eos_token_id = self.pieces.bos_id(), self.pieces.eos_id()
        self.image_token_id = added_tokens[IMAGE_TOKEN]
        self.pad_token_id = self.special_tokens.get(pad_token, self.pieces.unk_id())
        # Longest first: if one token is the beginning of another, the longer one is matched.
        by_length = sorted(self.special_tokens, key=len, reverse=True)
        self.special_pattern = re.compile(f"({'|'.join(map(re.escape, by_length))})")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "LlamaTokenizer":
        """Reads `tokenizer.model` and, if they exist, `added_tokens.json` and `tokenizer_config.json`.

        Raises a FileNotFoundError or ValueError that names the file that is missing or damaged.
        """
        folder = Path(folder)
        if not (folder / "tokenizer.model").is_file():
            raise FileNotFoundError(
                f"{folder} has no tokenizer.model: copy it from the original checkpoint (transformers 5 drops it)"
            )
        config = read_json(folder / "tokenizer_config.json", missing={})
        added_tokens = read_json(folder / "added_tokens.json", missing={})
        special = set(added_tokens)
        try:
            for token_id, token in (config.get("added_tokens_decoder") or {}).items():
                added_tokens[token["content"]] = int(token_id)
                if token.get("special"):
                    special.add(token["content"])
                else:
                    special.discard(token["content"])
            pad_token = config.get("pad_token") or "<pad>"
            pad_token = str(pad_token["content"] if isinstance(pad_token, dict) else pad_token)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / 'tokenizer_config.json'} has malformed tokens: {error!r}") from error
        if not all(text and type(text) is str and type(token_id) is int for text, token_id in added_tokens.items()):
            raise ValueError(f"the added tokens of {folder} must map texts to ids: {str(added_tokens)[:200]}")
        return cls(
            folder / "tokenizer.model",
            added_tokens,
            special,
            add_bos_token=config.get("add_bos_token", True) is not False,
            pad_token=pad_token,
        )

    # From text to ids

    def encode(self, text: str, add_special_tokens: bool = True, split_special_tokens: bool = False) -> list[int]:
        """Encodes a raw prompt, in which `<image>`, `</s>` and the other special tokens are recognised.

        The text is split at special tokens and each segment is encoded on its own, with SentencePiece's leading space.
        That is why a LLaVA prompt has a bare "▁" (29871) after the image, where nobody typed a space.

        Args:
            text: any string; lone surrogates, which UTF-8 cannot represent, become U+FFFD.
            add_special_tokens: start with `<s>`.
            split_special_tokens: treat special tokens as plain text.
        """
        ids = [self.bos_token_id] if add_special_tokens and self.add_bos_token else []
        if split_special_tokens:
            return ids + self._encode_plain(text)
        for segment in self.special_pattern.split(text):
            token_id = self.special_tokens.get(segment)
            ids += self._encode_plain(segment) if token_id is None else [token_id]
        return ids

    def encode_chat(
        self, turns: Sequence[tuple[str, str | None]], system: str = "", continued: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Encodes a conversation in the format that LLaVA-1.5 was trained on (conversation mode `vicuna_v1`):

            <s>{system} USER: {question} ASSISTANT: {answer}</s>USER: {question} ASSISTANT: {answer}</s>

        Typed text never becomes a control token: `</s>` in a question or an answer is encoded as plain characters. The
        one exception is `<image>` in a question, the placeholder of an image.

        Args:
            turns: (question, answer) pairs. An answer of None is to be generated: the prompt ends at "ASSISTANT:".
            system: a system prompt such as `VICUNA_SYSTEM`.
            continued: these turns follow an earlier `</s>`, so there is no `<s>` at the start.

        Returns:
            The ids, and for each of them whether it belongs to an answer or its `</s>`: the tokens that are learned.
        """
        ids = [self.bos_token_id] if self.add_bos_token and not continued else []
        is_answer = [False] * len(ids)
        lead = f"{system} " if system else ""
        for question, answer in turns:
            *before_images, rest = f"{lead}USER: {question} ASSISTANT:".split(IMAGE_TOKEN)
            lead = ""
            for segment in before_images:
                ids += [*self._encode_plain(segment), self.image_token_id]
            # "ASSISTANT:" and the answer are encoded as one segment, but no piece spans the space between them, so the
            # answer's ids are those that follow the ids of the prompt alone.
            answer_start = len(ids) + len(self._encode_plain(rest))
            ids += self._encode_plain(rest if answer is None else f"{rest} {answer}")
            if answer is not None:
                ids.append(self.eos_token_id)
            is_answer += [position >= answer_start for position in range(len(is_answer), len(ids))]
        return ids, is_answer

    def _encode_plain(self, text: str) -> list[int]:
        """Encodes with SentencePiece alone, which never produces a control token from text."""
        return self.pieces.encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))

    # From ids to text

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str | None]:
        """The token of each id as the vocabulary spells it, such as "▁cat"; None for ids beyond the vocabulary."""
        return [
            self.pieces.id_to_piece(i) if 0 <= i < len(self.pieces) else self.added_texts.get(i) for i in map(int, ids)
        ]

    def stream(self, ids: Iterable[int], skip_special_tokens: bool = False) -> Iterator[str]:
        """Decodes ids as they arrive: yields text as soon as it is final, and by the end all of it.

        A character outside the vocabulary is encoded as several byte tokens, which are held back until the run of bytes
        ends; if the run is not valid UTF-8, each byte becomes U+FFFD. Ids beyond the vocabulary (the embedding matrix
        has a few more rows than there are tokens) are skipped.
        """
        at_start, run = True, bytearray()

        def finish(text: str) -> Iterator[str]:
            """Yields the run of bytes so far, then `text`, without the one space that encoding adds at the start."""
            nonlocal at_start
            if run:
                try:
                    text = run.decode() + text
                except UnicodeDecodeError:
                    text = "\ufffd" * len(run) + text
                run.clear()
            if text:
                text = text.removeprefix(" ") if at_start else text
                at_start = False
                yield text

        for token_id in ids:
            if skip_special_tokens and token_id in self.skipped_ids:
                continue
            (token,) = self.convert_ids_to_tokens([token_id])
            if token is not None and token_id < len(self.pieces) and self.pieces.is_byte(token_id):
                run.append(int(token[1:-1], 16))  # "<0x0A>"
            elif token is not None:
                yield from finish(token.replace(SPACE, " "))
        yield from finish("")

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Decodes ids (a list or a one-dimensional tensor) to text, as `stream` does."""
        return "".join(self.stream(map(int, ids), skip_special_tokens))

    def batch_decode(self, sequences: Iterable[Iterable[int]], skip_special_tokens: bool = False) -> list[str]:
        """Decodes each sequence of a batch."""
        return [self.decode(ids, skip_special_tokens) for ids in sequences]
