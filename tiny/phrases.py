"""Phrases about the small world's scenes (world.py): descriptions of a scene, and names for its things."""

import itertools
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import world
from wordings import Voice

COUNTS = ["zero", "one", "two", "three"]
SIDES: dict[str, Callable[[world.Thing], bool]] = {
    "left": lambda thing: thing.column == 0,
    "right": lambda thing: thing.column == 2,
    "top": lambda thing: thing.row == 0,
    "bottom": lambda thing: thing.row == 2,
    "middle row": lambda thing: thing.row == 1,
    "centre column": lambda thing: thing.column == 1,
}
SIDE_PHRASES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "middle row": "in the middle row",
    "centre column": "in the centre column",
}
CORNERS = ["top left", "top right", "bottom left", "bottom right"]


class Turn(NamedTuple):
    """A question and its answer in both forms."""

    family: str
    question: str
    short: str  # if the question ends with the paper's "Answer the question using a single word or phrase."
    sentence: str


class Kind(NamedTuple):
    """What an expression such as "the small circle" says about a thing; None: nothing."""

    colour: str | None = None
    shape: str | None = None
    size: str | None = None
    cell: int | None = None
    side: str | None = None

    def fits(self, thing: world.Thing) -> bool:
        """Whether the expression is true of a thing."""
        has = (thing.colour, thing.shape, thing.size, thing.cell)
        same = all(wanted is None or wanted == value for wanted, value in zip(self[:4], has, strict=True))
        return same and (self.side is None or SIDES[self.side](thing))

    def __str__(self) -> str:
        """As answers say it: "small red circle", "red object", "object in the top left", "star on the left"."""
        words = " ".join(word for word in (self.size, self.colour, self.shape or "object") if word)
        words += "" if self.side is None else f" {SIDE_PHRASES[self.side]}"
        return words if self.cell is None else f"{words} in the {world.CELLS[self.cell]}"


def article(text: str) -> str:
    """an orange circle, a red one"""
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def listed(texts: Sequence[str]) -> str:
    """a, b and c"""
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def is_are(number: int) -> str:
    """one is, two are"""
    return "is" if number == 1 else "are"


def names(things: Sequence[world.Thing]) -> str:
    """red circle and blue star"""
    return listed([thing.name for thing in things]) if things else "nothing"


def describe(thing: world.Thing) -> str:
    """a small red circle in the top left"""
    return f"{article(f'{thing.size} {thing.name}')} in the {world.CELLS[thing.cell]}"


def caption(scene: world.Scene) -> str:
    """Every thing with its attributes and position, in reading order, and its relation to the next one."""
    text = f"There is {listed([describe(thing) for thing in scene])}."
    for a, b in itertools.pairwise(scene):
        text += f" The {a.name} is {'left of' if a.row == b.row else 'above'} the {b.name}."
    return text


def alt_text(scene: world.Scene) -> str:
    """The shortest complete caption: "top left small red circle, centre large blue square"."""
    return ", ".join(f"{world.CELLS[thing.cell]} {thing.size} {thing.name}" for thing in scene)


def notes(scene: world.Scene, rng: random.Random) -> str:
    """A scene in words, in random order. The decoder reads this instead of a picture in its pretraining."""
    things = rng.sample(scene, len(scene))
    if rng.random() < 0.5:
        return f"There is {listed([describe(thing) for thing in things])}."
    return " ".join(
        f"In the {world.CELLS[thing.cell]} there is {article(f'{thing.size} {thing.name}')}." for thing in things
    )


# Naming things


def may_ask(kind: Kind, scene: world.Scene, rng: random.Random) -> bool:
    """Whether a question may mention this kind: mostly not an absent star where something is red, and the like.

    Nothing red is ever a star, so stars are rarer in scenes with something red. If the answers showed that, the model
    would learn "red" as evidence against "star", and deny a red star that it sees.
    """
    colours, shapes = ({getattr(thing, name) for thing in scene} for name in ("colour", "shape"))
    misleading = any(
        (kind.shape == shape and shape not in shapes and colour in colours)
        or (kind.colour == colour and colour not in colours and shape in shapes)
        for colour, shape in world.HELD_OUT
    )
    return not misleading or rng.random() < 0.35


# The attributes that an expression may use
REFERENCES = [["colour"], ["shape"], *[["colour", "shape"]] * 2, ["size", "shape"], ["size", "colour"], ["size"]]
ATTRIBUTES = ["colour", "shape", "size", "position"]


def find_reference(rng: random.Random, scene: world.Scene, thing: world.Thing, *without: str) -> Kind | None:
    """An unambiguous expression for this thing, or None if there is none.

    It uses none of the attributes in `without`: colour, shape, size, position.
    """
    ways = []
    for used in REFERENCES:
        kind = Kind(**{name: getattr(thing, name) for name in used})
        if not set(used) & set(without) and sum(map(kind.fits, scene)) == 1:
            ways.append(kind)
    if "position" not in without:
        where = [Kind(side=side) for side in SIDES if SIDES[side](thing)]
        where += [kind._replace(shape=thing.shape) for kind in where if "shape" not in without]
        where = [kind for kind in where if sum(map(kind.fits, scene)) == 1]
        if where and rng.random() < 0.12:
            return rng.choice(where)
        if not ways or rng.random() < 0.15:
            return Kind(cell=thing.cell)
    return rng.choice(ways) if ways else None


def refer(rng: random.Random, scene: world.Scene, thing: world.Thing, without: str) -> Kind:
    """An unambiguous expression for this thing, without one attribute. Colour and shape together are always one."""
    kind = find_reference(rng, scene, thing, without)
    assert kind is not None
    return kind


def worded(kind: Kind, voice: Voice) -> str:
    """The expression as a speaker words it, without article."""
    name = voice.noun(kind.colour, kind.shape, kind.size, placed=(kind.cell, kind.side) != (None, None))
    if kind.side is not None:
        return f"{name} {voice.side(kind.side)}"
    return name if kind.cell is None else f"{name} {voice.cell(world.CELLS[kind.cell])}"


def the(kind: Kind, voice: Voice) -> str:
    """The expression as a speaker words it, with its article."""
    return f"the {worded(kind, voice)}"


def name_it(kind: Kind, voice: Voice, scene: world.Scene) -> tuple[str, str]:
    """The expression in the question and in the answer; sometimes "it" if there is only one thing."""
    if len(scene) == 1 and voice.rng.random() < 0.25:
        return "it", "it"
    return the(kind, voice), f"the {kind}"


def sentence(text: str) -> str:
    """With a capital letter and a full stop."""
    return f"{text[0].upper()}{text[1:]}."
