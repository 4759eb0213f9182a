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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import sentencepiece

from extras.batch import encode_texts
from extras.compat import DECODING, refuse
from extras.tokenizer_files import SPACE, read_tokenizer_files

IMAGE_TOKEN = "<image>"

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
        pieces: the SentencePiece model.
        added_tokens: text of each added token -> its id; `<image>` must be one of them.
        special: the added tokens that `skip_special_tokens` omits from decoded text; None means all.
        add_bos_token: whether encoded text starts with `<s>`.
        pad_token: the token that pads batches; `<unk>` if there is no such token.
        prefix: where a space is put in front of text; see `extras.tokenizer_files.TokenizerFiles`.
    """

    def __init__(
        self,
        pieces: sentencepiece.SentencePieceProcessor,
        added_tokens: dict[str, int],
        special: Iterable[str] | None = None,
        add_bos_token: bool = True,
        pad_token: str = "<pad>",
        prefix: str = "model",
    ) -> None:
        self.pieces, self.add_bos_token, self.prefix = pieces, add_bos_token, prefix
        control = [i for i in range(len(pieces)) if pieces.is_control(i) or pieces.is_unknown(i)]
        self.special_tokens = {pieces.id_to_piece(i): i for i in control} | added_tokens
        self.skipped_ids = {*control, *(added_tokens[text] for text in (added_tokens if special is None else special))}
        self.added_texts = {token_id: text for text, token_id in added_tokens.items()}
        self.bos_token_id, self.eos_token_id = pieces.bos_id(), pieces.eos_id()
        self.image_token_id = added_tokens[IMAGE_TOKEN]
        self.pad_token_id = self.special_tokens.get(pad_token, pieces.unk_id())
        self.padding_side = "left"
        # Longest first: if one token is the beginning of another, the longer one is matched.
        by_length = sorted(self.special_tokens, key=len, reverse=True)
        self.special_pattern = re.compile(f"({'|'.join(map(re.escape, by_length))})")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Reads `tokenizer.model`, or else `tokenizer.json`, and the files that name the added tokens.

        Raises a FileNotFoundError or ValueError that names the file that is missing, damaged or of another kind.
        """
        return cls(*read_tokenizer_files(Path(folder), IMAGE_TOKEN))

    # From text to ids

    def __call__(self, text: str | Sequence[str], **options: Any) -> Mapping[str, Any]:  # noqa: ANN401
        """Texts -> "input_ids" and "attention_mask", with transformers' arguments; see `extras.batch.encode_texts`."""
        return encode_texts(self.encode, text, self.pad_token_id, self.padding_side, **options)

    def encode(self, text: str, add_special_tokens: bool = True, split_special_tokens: bool = False) -> list[int]:
        """Encodes a raw prompt, in which `<image>`, `</s>` and the other special tokens are recognised.

        The text is split at special tokens and each segment is encoded on its own, with SentencePiece's leading space.
        That is why a LLaVA prompt has a bare "▁" (29871) after the image, where nobody typed a space. (A tokenizer.json
        may put that space at the start of the text only: `prefix`.)

        Args:
            text: any string; lone surrogates, which UTF-8 cannot represent, become U+FFFD.
            add_special_tokens: start with `<s>`.
            split_special_tokens: treat special tokens as plain text.
        """
        ids = [self.bos_token_id] if add_special_tokens and self.add_bos_token else []
        if split_special_tokens:
            return ids + self._encode_plain(text, first=True)
        for i, segment in enumerate(self.special_pattern.split(text)):
            token_id = self.special_tokens.get(segment)
            ids += self._encode_plain(segment, first=i == 0) if token_id is None else [token_id]
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
        lead, first = f"{system} " if system else "", not continued
        for question, answer in turns:
            *before_images, rest = f"{lead}USER: {question} ASSISTANT:".split(IMAGE_TOKEN)
            for segment in before_images:
                ids += [*self._encode_plain(segment, first), self.image_token_id]
                first = False
            # "ASSISTANT:" and the answer are encoded as one segment, but no piece spans the space between them, so the
            # answer's ids are those that follow the ids of the prompt alone.
            answer_start = len(ids) + len(self._encode_plain(rest, first))
            ids += self._encode_plain(rest if answer is None else f"{rest} {answer}", first)
            lead, first = "", False
            if answer is not None:
                ids.append(self.eos_token_id)
            is_answer += [position >= answer_start for position in range(len(is_answer), len(ids))]
        return ids, is_answer

    def _encode_plain(self, text: str, first: bool) -> list[int]:
        """Encodes a segment with SentencePiece, which never produces a control token; `first`: the text starts here."""
        prefixed = self.prefix == "always" or (self.prefix == "first" and first)
        if prefixed and text and not text.startswith((" ", SPACE)):
            text = f" {text}"
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

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False, **options: object) -> str:
        """Decodes ids (a list or a one-dimensional tensor) to text, as `stream` does. `options`: extras/compat.py."""
        refuse("decode", options, DECODING)
        return "".join(self.stream(map(int, ids), skip_special_tokens))

    def batch_decode(self, sequences: Iterable[Iterable[int]], *skip: bool, **options: Any) -> list[str]:  # noqa: ANN401
        """Decodes each sequence of a batch, with the arguments of `decode`."""
        return [self.decode(ids, *skip, **options) for ids in sequences]
