"""Solutions of 02_words_and_pictures_in_one_sequence.ipynb. Try for a while before you read on."""


# %% exercise 1
# Each picture in front has put P positions where one token was.
def beginnings(ids: list[int], P: int) -> list[int]:
    """Ids with one image token (id `tokenizer.image_token_id`) per picture -> where each picture begins."""
    marks = [i for i, token_id in enumerate(ids) if token_id == tokenizer.image_token_id]
    return [mark + number * (P - 1) for number, mark in enumerate(marks)]


# %% exercise 1, wrong
# P more for each picture in front: but one of these positions was there already.
def beginnings(ids: list[int], P: int) -> list[int]:
    """Ids with one image token (id `tokenizer.image_token_id`) per picture -> where each picture begins."""
    marks = [i for i, token_id in enumerate(ids) if token_id == tokenizer.image_token_id]
    return [mark + number * P for number, mark in enumerate(marks)]


# %% exercise 2
# Shifted by one: what is to be said at t is the token t + 1, and whether it counts is the mask of t + 1, too.
def targets(turns: list[tuple[str, str]]) -> list[int]:
    """Questions and answers -> one target for each token of `tokenizer.encode_chat(turns)`."""
    ids, learned = tokenizer.encode_chat(turns)
    return [after if counts else -100 for after, counts in zip(ids[1:], learned[1:], strict=True)] + [-100]


# %% exercise 2, wrong
# Not shifted: this teaches to repeat the token that was just read.
def targets(turns: list[tuple[str, str]]) -> list[int]:
    """Questions and answers -> one target for each token of `tokenizer.encode_chat(turns)`."""
    ids, learned = tokenizer.encode_chat(turns)
    return [token_id if counts else -100 for token_id, counts in zip(ids, learned, strict=True)]


# %% exercise 2, wrong: everything counts
def targets(turns: list[tuple[str, str]]) -> list[int]:
    """Questions and answers -> one target for each token of `tokenizer.encode_chat(turns)`."""
    ids, _ = tokenizer.encode_chat(turns)
    return [*ids[1:], -100]


# %% exercise 3
# A mask (B, T) as an index reads row by row, and so do features that are laid out as (N * P, D).
def splice(input_ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Ids (B, T) and features (N, P, D) -> embeddings (B, T, D)."""
    embeddings = model.language_model.model.embed_tokens(input_ids).clone()
    embeddings[input_ids == tokenizer.image_token_id] = features.flatten(0, 1)
    return embeddings


# %% exercise 3, wrong
# Picture i for row i: right only as long as every row has one picture.
def splice(input_ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Ids (B, T) and features (N, P, D) -> embeddings (B, T, D)."""
    embeddings = model.language_model.model.embed_tokens(input_ids).clone()
    for row, ids in enumerate(input_ids):
        places = (ids == tokenizer.image_token_id).nonzero()[:, 0]
        for first in places[:: features.shape[1]].tolist():
            embeddings[row, first : first + features.shape[1]] = features[row]
    return embeddings
