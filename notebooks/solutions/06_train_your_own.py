"""Solutions of 06_train_your_own.ipynb. Try for a while before you read on."""


# %% exercise 1
def count_trained(named_parameters, stage):
    """A list of (name, parameter), and "align" or "instruct" -> the number of trained parameters."""
    parts = ("multi_modal_projector.",) if stage == "align" else ("multi_modal_projector.", "language_model.")
    return sum(parameter.numel() for name, parameter in named_parameters if name.startswith(parts))


# %% exercise 1, wrong
def count_trained(named_parameters, stage):
    """The vision tower is frozen in the second stage, too."""
    return sum(p.numel() for name, p in named_parameters if stage == "instruct" or "projector" in name)


# %% exercise 2
def my_loss(logits, input_ids, is_answer):
    """Logits (B, T, V), ids (B, T) and a mask (B, T) of the tokens to learn -> a number."""
    learned = is_answer[:, 1:]
    log_probabilities = logits[:, :-1].log_softmax(-1)
    return -log_probabilities.gather(-1, input_ids[:, 1:, None])[..., 0][learned].sum()


# %% exercise 2, wrong
def my_loss(logits, input_ids, is_answer):
    """Without a shift, every position is compared with the token that it has just read."""
    return torch.nn.functional.cross_entropy(logits[is_answer], input_ids[is_answer], reduction="sum")


# %% exercise 2, wrong because questions count as well
def my_loss(logits, input_ids, is_answer):
    """The shift is correct, but every token is learned."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten(), reduction="sum")


# %% exercise 3
def accumulate(model, pieces):
    """Accumulates the gradient of micro-batches (input_ids, is_answer, pixel_values) in the parameters' .grad."""
    answers = sum(int(piece.is_answer.sum()) for piece in pieces)
    for piece in pieces:
        (train.answer_loss(model, piece) / answers).backward()


# %% exercise 3, wrong
def accumulate(model, pieces):
    """In a mean of means, the tokens of a piece with few answer tokens count more than the others."""
    for piece in pieces:
        (train.answer_loss(model, piece) / piece.is_answer.sum() / len(pieces)).backward()
