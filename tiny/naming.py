"""What is in each patch of a picture: as names for the tower's pretraining, and as words for the decoder's.

The tower must name the cell of each patch, and the colour, shape and size of what is in it. The decoder is pretrained
on ideal pictures, whose patches are sums of the words for that. `say_names` connects the two: it makes a projector from
the tower's naming layer and the decoder's word embeddings.
"""

import math
import random

import torch
import world
from torch import Tensor, nn

from llava import LlavaMultiModalProjector

SIDE = 6  # patches per row
# What each patch is to be named: a colour, a shape, a size, a row and a column
NAMES = [list(world.COLOURS), ["nothing", "blob", *world.SHAPES], list(world.SIZES), world.ROWS, world.COLUMNS]
SMOOTHING = 0.1  # of the labels in the tower's pretraining


def cells() -> list[tuple[int, int]]:
    """The row and the column of the grid's cell in which each patch has its centre."""
    places = [int((i + 0.5) * 3 / SIDE) for i in range(SIDE)]
    return [(row, column) for row in places for column in places]


def name_patches(scene: world.Scene) -> Tensor:
    """For each patch, the indices in NAMES of what is in its cell, and of the cell (P, 5). -1: not to be learned."""
    things = {(thing.row, thing.column): thing for thing in scene}

    def name(cell: tuple[int, int]) -> list[int]:
        words = things[cell][:3] if cell in things else ("", "nothing", "")
        indices = [values.index(word) if word in values else -1 for values, word in zip(NAMES, words, strict=False)]
        return [*indices, *cell]

    return torch.tensor([name(cell) for cell in cells()])


def patch_words(scene: world.Scene, rng: random.Random) -> list[list[tuple[str, float]]]:
    """For each patch, the words for what is in its cell, and for the cell, with their weights.

    To each colour and each shape, a random one is mixed in, with a weight below a half. The decoder thereby learns to
    ignore the weaker word: a red triangle that looks slightly blue is still a red triangle.
    """
    things = {}
    for thing in scene:
        a, b = 0.5 * rng.random(), 0.5 * rng.random()
        words = [(thing.colour, 1 - a), (thing.shape, 1 - b), (thing.size, 1.0)]
        words += [(rng.choice(list(world.COLOURS)), a), (rng.choice(world.SHAPES), b)]
        things[thing.row, thing.column] = words
    empty = 3 * [("nothing", 1.0)] + 2 * [("nothing", 0.0)]  # as many words as for a thing
    return [[*things.get(cell, empty), (world.ROWS[cell[0]], 1.0), (world.COLUMNS[cell[1]], 1.0)] for cell in cells()]


@torch.no_grad()
def say_names(projector: LlavaMultiModalProjector, namer: nn.Sequential, features: Tensor, embeddings: Tensor) -> None:
    """Sets the projector so that it says what the naming layer names: the sum of the embeddings of the words.

    For each name, two hidden units form a ramp from 0, where the layer's score is that of a wrong name, to 1, where it
    is that of a right one. They know the name from the score alone, so unseen combinations are said like others.

    Args:
        projector: linear_1, GELU and linear_2, with at least two hidden units for each name.
        namer: LayerNorm and linear layer, trained with label smoothing; its scores are in the order of NAMES.
        features: of some patches (N, Dv). Their mean deviation takes the place of the LayerNorm's division.
        embeddings: of each name's word (names, D).
    """
    norm: nn.LayerNorm = namer[0]  # type: ignore[assignment]
    linear: nn.Linear = namer[1]  # type: ignore[assignment]
    sizes, nothing = [len(values) for values in NAMES], len(NAMES[0])
    weight, bias = linear.weight * norm.weight, linear.bias + linear.weight @ norm.bias
    weight = (weight - weight.mean(1, keepdim=True)) / features.std(-1).mean()
    # Relative to the mean of its K names, a wrong name has a score of about -gap / K, the right one `gap` more
    weight, bias = (torch.cat([part - part.mean(0) for part in whole.split(sizes)]) for whole in (weight, bias))
    gap = torch.tensor([math.log((1 - SMOOTHING) * k / SMOOTHING + 1) for k in sizes for _ in range(k)])  # (names,)
    wrong = -gap / torch.tensor([k for k in sizes for _ in range(k)])
    for group in (0, 2):  # where there is nothing, any colour and size may be named
        start = sum(sizes[:group])
        weight[start : start + sizes[group]] -= 0.6 * weight[nothing]
        bias[start : start + sizes[group]] -= 0.6 * (bias[nothing] - wrong[nothing])
    steep, units = 4.0, 2 * len(gap)
    projector.linear_2.weight.zero_(), projector.linear_2.bias.zero_()
    for unit, height, sign in ((0, 0.35, 1), (1, 0.6, -1)):  # where the ramp begins and ends
        projector.linear_1.weight[unit:units:2] = steep * weight
        projector.linear_1.bias[unit:units:2] = steep * (bias - wrong - height * gap)
        projector.linear_2.weight[:, unit:units:2] = sign * embeddings.T / (steep * 0.25 * gap)
