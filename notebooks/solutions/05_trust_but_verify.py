"""Solutions of 05_trust_but_verify.ipynb. Try for a while before you read on."""


# %% exercise 1
def first_difference(labels, ours, theirs, limit=1e-4):
    """The labels and the outputs of two models, in the order of computation -> a label or None."""
    for label, a, b in zip(labels, ours, theirs, strict=True):
        if (a - b).norm() > limit * b.norm():
            return label
    return None


# %% exercise 1, wrong
def first_difference(labels, ours, theirs, limit=1e-4):
    """An absolute limit finds nothing where the numbers are small."""
    for label, a, b in zip(labels, ours, theirs, strict=True):
        if (a - b).abs().max() > limit:
            return label
    return None


# %% exercise 2
def round_rows(weight):
    """(out, in) float32 -> (out, in) int8 and scales (out,), so that int8 * scale approximates the weight."""
    scale = weight.abs().amax(dim=1).clamp(min=1e-30) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


# %% exercise 2, wrong
def round_rows(weight):
    """One scale for the whole matrix: rows of small weights are rounded to zero."""
    scale = (weight.abs().amax() / 127).expand(len(weight))
    return (weight / scale[:, None]).round().to(torch.int8), scale


# %% exercise 2, wrong because it truncates instead of rounding
def round_rows(weight):
    """The error is up to a whole step, and always towards zero."""
    scale = weight.abs().amax(dim=1) / 127
    return (weight / scale[:, None]).to(torch.int8), scale


# %% exercise 3
def diagnose(errors):
    """{"vision": (layers, 1 + P), "decoder": (layers, T)} -> the name of a mistake, or None."""
    limit = 1e-4
    if errors["vision"].max() > limit:
        return "wrong GELU"
    if errors["decoder"].max() < limit:
        return None
    return "interleaved RoPE" if errors["decoder"][:, 0].max() < limit else "missing mask"


# %% exercise 3, wrong
def diagnose(errors):
    """A mistake in the vision tower also shows in the decoder, so the vision tower has to be checked first."""
    limit = 1e-4
    if errors["decoder"].max() < limit:
        return None
    if errors["decoder"][:, 0].max() < limit:
        return "interleaved RoPE"
    return "wrong GELU" if errors["vision"].max() > limit else "missing mask"
