"""Solutions of 00_quickstart.ipynb. Try for a while before you read on."""

# %% exercise 1
# Rows are counted from the top: cell 1 is above cell 4. The second circle is beside the first, not below it.
my_scene = (
    Thing("red", "circle", "large", 1),
    Thing("blue", "circle", "small", 2),
    Thing("green", "cross", "large", 4),
)


# %% exercise 1, wrong
# Cell 1 is above cell 4, so nothing is below the red circle.
my_scene = (Thing("green", "circle", "large", 1), Thing("red", "circle", "large", 4))


# %% exercise 2
# The last position predicts what comes next; softmax turns logits into probabilities.
def top_tokens(picture, question: str, k: int) -> list[tuple[str, float]]:
    """[(token, probability), ...], the most likely one first."""
    best = model(**prepare(picture, question)).logits[0, -1].softmax(-1).topk(k)
    return list(zip(tokenizer.convert_ids_to_tokens(best.indices), best.values.tolist(), strict=True))


# %% exercise 2, wrong
# Logits are not probabilities: the order is right, the numbers are not.
def top_tokens(picture, question: str, k: int) -> list[tuple[str, float]]:
    """[(token, probability), ...], the most likely one first."""
    best = model(**prepare(picture, question)).logits[0, -1].topk(k)
    return list(zip(tokenizer.convert_ids_to_tokens(best.indices), best.values.tolist(), strict=True))


# %% exercise 3
# `torch.cat` creates a new tensor, so the caller's is unchanged. The pixels are needed at every step: without a cache,
# the whole sequence is computed again, picture and all.
def greedy_answer(inputs, limit: int) -> list[int]:
    """The model's inputs (`input_ids`, `pixel_values`) -> the ids of the answer, with `</s>` if it is reached."""
    ids, answer = inputs.input_ids, []
    while len(answer) < limit and tokenizer.eos_token_id not in answer:
        token = model(ids, inputs.pixel_values).logits[:, -1].argmax(-1)  # (1,)
        answer.append(token.item())
        ids = torch.cat([ids, token[:, None]], dim=1)
    return answer


# %% exercise 3, wrong
# The token is recorded, but never appended to the prompt: the model repeats its first token.
def greedy_answer(inputs, limit: int) -> list[int]:
    """The model's inputs (`input_ids`, `pixel_values`) -> the ids of the answer, with `</s>` if it is reached."""
    answer = []
    while len(answer) < limit and tokenizer.eos_token_id not in answer:
        answer.append(model(inputs.input_ids, inputs.pixel_values).logits[0, -1].argmax().item())
    return answer
