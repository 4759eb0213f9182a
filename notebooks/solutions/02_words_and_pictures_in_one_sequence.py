"""Solutions of 02_words_and_pictures_in_one_sequence.ipynb. Try for a while before you read on."""


# %% exercise 1
# Each earlier picture has replaced one token by P positions.
def first_positions(ids: list[int], P: int) -> list[int]:
    """Ids with one image token (id `tokenizer.image_token_id`) per picture -> the first position of each picture."""
    marks = [i for i, token_id in enumerate(ids) if token_id == tokenizer.image_token_id]
    return [mark + number * (P - 1) for number, mark in enumerate(marks)]


# %% exercise 1, wrong
# Adds P for each earlier picture, but one of these positions was there already.
def first_positions(ids: list[int], P: int) -> list[int]:
    """Ids with one image token (id `tokenizer.image_token_id`) per picture -> the first position of each picture."""
    marks = [i for i, token_id in enumerate(ids) if token_id == tokenizer.image_token_id]
    return [mark + number * P for number, mark in enumerate(marks)]


# %% exercise 2
# Shifted by one: position t predicts token t + 1, and the mask of token t + 1 says whether that counts.
def targets(turns: list[tuple[str, str]]) -> list[int]:
    """Questions and answers -> one target per token of `tokenizer.encode_chat(turns)`."""
    ids, learned = tokenizer.encode_chat(turns)
    return [after if counts else -100 for after, counts in zip(ids[1:], learned[1:], strict=True)] + [-100]


# %% exercise 2, wrong
# Not shifted: this teaches the model to repeat the token that it has just read.
def targets(turns: list[tuple[str, str]]) -> list[int]:
    """Questions and answers -> one target per token of `tokenizer.encode_chat(turns)`."""
    ids, learned = tokenizer.encode_chat(turns)
    return [token_id if counts else -100 for token_id, counts in zip(ids, learned, strict=True)]


# %% exercise 2, wrong: everything counts
def targets(turns: list[tuple[str, str]]) -> list[int]:
    """Questions and answers -> one target per token of `tokenizer.encode_chat(turns)`."""
    ids, _ = tokenizer.encode_chat(turns)
    return [*ids[1:], -100]


# %% exercise 3
# Indexing with a mask (B, T) selects row by row, which is also the order of features reshaped to (N * P, D).
def splice(input_ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Ids (B, T) and features (N, P, D) -> embeddings (B, T, D)."""
    embeddings = model.language_model.model.embed_tokens(input_ids).clone()
    embeddings[input_ids == tokenizer.image_token_id] = features.flatten(0, 1)
    return embeddings


# %% exercise 3, wrong
# Takes picture i for row i: right only if every row has exactly one picture.
def splice(input_ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Ids (B, T) and features (N, P, D) -> embeddings (B, T, D)."""
    embeddings = model.language_model.model.embed_tokens(input_ids).clone()
    for row, ids in enumerate(input_ids):
        positions = (ids == tokenizer.image_token_id).nonzero()[:, 0]
        for first in positions[:: features.shape[1]].tolist():
            embeddings[row, first : first + features.shape[1]] = features[row]
    return embeddings
