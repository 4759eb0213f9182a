"""The judge of the tokenizer: a `tokenizers` BPE with Llama's legacy normaliser, made from a SentencePiece model.

It is built as the tokenizer.json of the hub's checkpoints is. transformers 5, given only a tokenizer.model, makes a
different tokenizer (without the leading space of every segment and without `<s>`), so it cannot be the judge here.
"""

from pathlib import Path

import sentencepiece
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, processors


def reference_tokenizer(model_file: Path, added_tokens: dict[str, int]) -> transformers.PreTrainedTokenizerFast:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    vocab = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    # A piece is made by joining any two pieces that spell it; the merges are tried in the order of the pieces' scores.
    merges = [
        (-pieces.get_score(i), vocab[piece[:cut]], vocab[piece[cut:]], (piece[:cut], piece[cut:]))
        for piece, i in vocab.items()
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab, [pair for *_, pair in sorted(merges)], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    in_order = ["<unk>", "<s>", "</s>", *sorted(added_tokens, key=added_tokens.get)]
    tokenizer.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in in_order])
    assert {text: tokenizer.token_to_id(text) for text in added_tokens} == added_tokens
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
