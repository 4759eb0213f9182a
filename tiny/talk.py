"""Text about the small world's scenes (world.py): captions, questions with their answers, whole conversations.

    ask, converse: Scene -> questions about it, each with its answer in short form and as a sentence
    caption, alt_text, notes: Scene -> a description of it

The wording of a question does not reveal its answer: yes and no are equally frequent among questions of the same form,
and what a question names but the scene lacks could have been in it.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import world

COUNTS = ["zero", "one", "two", "three"]


class Turn(NamedTuple):
    """A question and its answer in both forms."""

    family: str
    question: str
    short: str  # if the question ends with the paper's "Answer the question using a single word or phrase."
    sentence: str


def article(text: str) -> str:
    """an orange circle, a red one"""
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def listed(texts: Sequence[str]) -> str:
    """a, b and c"""
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def is_are(number: int) -> str:
    """one is, two are"""
    return "is" if number == 1 else "are"


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


def fits(thing: world.Thing, colour: str | None, shape: str | None, size: str | None, cell: int | None) -> bool:
    """Whether a thing has the given attributes; None matches any value."""
    asked = zip((colour, shape, size, cell), (thing.colour, thing.shape, thing.size, thing.cell), strict=True)
    return all(wanted is None or wanted == has for wanted, has in asked)


def phrase(colour: str | None, shape: str | None, size: str | None, cell: int | None = None) -> str:
    """ "small red circle", "red object", "object in the top left" """
    words = " ".join(word for word in (size, colour, shape or "object") if word)
    return words if cell is None else f"{words} in the {world.CELLS[cell]}"


# The attributes that an expression such as "the small circle" may use
REFERENCES = [["colour"], ["shape"], *[["colour", "shape"]] * 2, ["size", "shape"], ["size", "colour"]]


def refer(rng: random.Random, scene: world.Scene, thing: world.Thing, *without: str) -> str | None:
    """An unambiguous expression for this thing, or None if there is none.

    It uses none of the attributes in `without`: colour, shape, size, position.
    """
    ways = []
    for names in REFERENCES:
        known = {name: getattr(thing, name) if name in names else None for name in ("colour", "shape", "size")}
        if not set(names) & set(without) and sum(fits(other, **known, cell=None) for other in scene) == 1:
            ways.append(phrase(**known))
    if "position" not in without and (not ways or rng.random() < 0.15):
        ways = [phrase(None, None, None, thing.cell)]
    return rng.choice(ways) if ways else None


# For each attribute, the ways to ask for it, and the follow-up question once the thing has been named
ATTRIBUTES = {
    "colour": (["What colour is the {}?", "What is the colour of the {}?", "What color is the {}?"], "And its colour?"),
    "shape": (["What shape is the {}?", "What is the shape of the {}?"], "And its shape?"),
    "size": (["What size is the {}?", "How big is the {}?"], "And its size?"),
    "position": (["Where is the {}?", "In what part of the picture is the {}?"], "And where is it?"),
}


def attribute(family: str, thing: world.Thing) -> tuple[str, str]:
    """The value of a thing's attribute, and the predicate of a sentence: "circle", "is a circle"."""
    if family == "position":
        return world.CELLS[thing.cell], f"is in the {world.CELLS[thing.cell]}"
    value = getattr(thing, family)
    return value, f"is {article(value) if family == 'shape' else value}"


def kind(value: str) -> str:
    """The attribute that a word is a value of."""
    if value in world.CELLS:
        return "position"
    return "colour" if value in world.COLOURS else "shape" if value in world.SHAPES else "size"


def ask_attribute(family: str, scene: world.Scene, thing: world.Thing, rng: random.Random) -> Turn:
    """Asks for a thing's colour, shape, size or position."""
    name = refer(rng, scene, thing, family)
    value, says = attribute(family, thing)
    return Turn(family, rng.choice(ATTRIBUTES[family][0]).format(name), value, f"The {name} {says}.")


def ask_details(scene: world.Scene, rng: random.Random) -> Turn:
    """Asks for every attribute of a thing that the question does not mention."""
    thing = rng.choice(scene)
    known = rng.choice(list(ATTRIBUTES))
    name = refer(rng, scene, thing, *[family for family in ATTRIBUTES if family != known]) or thing.name
    rest = [family for family in ("size", "colour", "shape", "position") if attribute(family, thing)[0] not in name]
    said = listed([attribute(family, thing)[1].removeprefix("is " if i else "") for i, family in enumerate(rest)])
    return Turn("details", f"Tell me about the {name}.", thing.name, f"The {name} {said}.")


def ask_facts(scene: world.Scene, rng: random.Random, number: int = 4) -> Turn:
    """Asks for facts about single things: "circle red, green top left", or "The circle is red. The green object ...".

    No user would ask this; it is a training exercise. In each fact the value directly follows the attribute that
    identifies the thing, which makes this the easiest way to learn to look things up. Without it, the model takes very
    long to learn that from the other questions.
    """
    words, sentences = [], []
    for _ in range(number):
        thing = rng.choice(scene)
        first = rng.choice(["colour", "shape"])  # looking up a position is learned without this exercise
        second = rng.choice([name for name in ("colour", "shape", "position") if name != first] * 2 + ["size"])
        known = {"colour": None, "shape": None, "size": None, "cell": None, first: getattr(thing, first)}
        if sum(fits(other, **known) for other in scene) == 1:
            value, says = attribute(second, thing)
            words.append(f"{known[first]} {value}")
            sentences.append(f"The {phrase(**known)} {says}.")
    if not words:
        return ask_facts(scene, rng, number)
    return Turn("facts", "List some facts.", ", ".join(words), " ".join(sentences))


def ask_followup(scene: world.Scene, rng: random.Random) -> tuple[Turn, Turn]:
    """Two turns. The second says "it" for the thing in the first, so it can only be answered with that context."""
    name = None
    while not name:
        thing = rng.choice(scene)
        first, second = rng.sample(list(ATTRIBUTES), 2)
        name = refer(rng, scene, thing, first, second)
    value, says = attribute(first, thing)
    opening = Turn(first, rng.choice(ATTRIBUTES[first][0]).format(name), value, f"The {name} {says}.")
    value, says = attribute(second, thing)
    return opening, Turn("follow-up", ATTRIBUTES[second][1], value, f"It {says}.")


def ask_count(scene: world.Scene, rng: random.Random) -> Turn:
    """Asks for the number of things, of all or of a colour or shape; the four answers are about equally frequent."""
    kinds = [(colour, None) for colour in world.COLOURS] + [(None, shape) for shape in world.SHAPES]
    by_number: dict[int, list] = {}
    for colour, shape in kinds:
        number = sum(fits(thing, colour, shape, None, None) for thing in scene)
        by_number.setdefault(number, []).append((colour, shape))
    if rng.random() < 0.1:
        colour, shape, number = None, None, len(scene)
    else:
        number = rng.choices(list(by_number), [(2, 2, 5, 9)[number] for number in by_number])[0]
        colour, shape = rng.choice(by_number[number])
    one, many = phrase(colour, shape, None), phrase(colour, shape, None) + "s"
    many = many.replace("crosss", "crosses")
    sentence = f"There {is_are(number)} {COUNTS[number] if number else 'no'} {one if number == 1 else many}."
    question = rng.choice([f"How many {many} are there?", f"How many {many} do you see?"])
    return Turn("count", question, COUNTS[number], sentence)


# Whether an existence question names a colour, and a shape: the same distribution for both answers
FORMS, FORM_WEIGHTS = [(True, True), (True, False), (False, True)], [3, 1, 1]


def absent(scene: world.Scene, rng: random.Random) -> tuple[str | None, str | None]:
    """Colour and shape of something that is not in the scene; often a near miss, where one of the two is."""
    names_colour, names_shape = rng.choices(FORMS, FORM_WEIGHTS)[0]
    while True:
        colour, shape = rng.choice(world.KNOWN)
        near = rng.random()
        if near < 0.4:
            colour = rng.choice(scene).colour
        elif near < 0.8:
            shape = rng.choice(scene).shape
        wanted = (colour if names_colour else None, shape if names_shape else None)
        if wanted not in world.HELD_OUT and not any(fits(thing, *wanted, None, None) for thing in scene):
            return wanted


def ask_existence(scene: world.Scene, rng: random.Random, pairs: Sequence[tuple[str, str]] = ()) -> Turn:
    """Asks whether something is there; yes and no are equally likely. With `pairs`, asks for one of these instead."""
    colour: str | None
    shape: str | None
    there = rng.random() < 0.5
    if pairs:
        colour, shape = rng.choice(pairs)
        there = any(fits(thing, colour, shape, None, None) for thing in scene)
    elif there:
        thing = rng.choice(scene)
        names_colour, names_shape = rng.choices(FORMS, FORM_WEIGHTS)[0]
        colour, shape = thing.colour if names_colour else None, thing.shape if names_shape else None
    else:
        colour, shape = absent(scene, rng)
    name = article(phrase(colour, shape, None))
    question = rng.choice([f"Is there {name}?", f"Do you see {name}?"])
    sentence = f"Yes, there is {name}." if there else f"No, there is no {phrase(colour, shape, None)}."
    return Turn("existence", question, "yes" if there else "no", sentence)


# When "a is ... b" is true
DIRECTIONS: dict[str, Callable[[world.Thing, world.Thing], bool]] = {
    "left of": lambda a, b: a.column < b.column,
    "right of": lambda a, b: a.column > b.column,
    "above": lambda a, b: a.row < b.row,
    "below": lambda a, b: a.row > b.row,
}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def ask_relation(scene: world.Scene, rng: random.Random) -> Turn | None:
    """Asks whether one thing is left of, right of, above or below another, or which one is. None for a single thing."""
    if len(scene) < 2:
        return None
    a, b = rng.sample(scene, 2)
    true = [direction for direction, holds in DIRECTIONS.items() if holds(a, b)]
    if rng.random() < 0.5:
        direction, holds = rng.choice(true), rng.random() < 0.5
        direction = direction if holds else OPPOSITE[direction]
        first, second = (refer(rng, scene, thing, "position") for thing in (a, b))
        sentence = f"{'Yes' if holds else 'No'}, the {first} is {'' if holds else 'not '}{direction} the {second}."
        return Turn("relation", f"Is the {first} {direction} the {second}?", "yes" if holds else "no", sentence)
    second = refer(rng, scene, b, "position")
    # Keeps "nothing" a rare answer. Two things in the same direction would mean two correct answers.
    ways = {d: [thing for thing in scene if holds(thing, b)] for d, holds in DIRECTIONS.items()}
    full, empty = [d for d in ways if len(ways[d]) == 1], [d for d in ways if not ways[d]]
    if empty and (not full or rng.random() < 0.15):
        direction = rng.choice(empty)
        return Turn(
            "relation", f"What is {direction} the {second}?", "nothing", f"Nothing is {direction} the {second}."
        )
    direction = rng.choice(full)
    name = ways[direction][0].name
    return Turn("relation", f"What is {direction} the {second}?", name, f"The {name} is {direction} the {second}.")


def ask_caption(scene: world.Scene, rng: random.Random) -> Turn:
    """Asks for a description of the picture."""
    question = rng.choice(["Describe the picture.", "What do you see in the picture?", "What is shown in this image?"])
    return Turn("caption", question, listed([thing.name for thing in scene]), caption(scene))


def ask_presupposition(scene: world.Scene, rng: random.Random) -> Turn:
    """Asks about a thing that is not in the scene."""
    colour, shape = absent(scene, rng)
    told = {"colour": colour, "shape": shape}
    family = rng.choice([family for family in ATTRIBUTES if not told.get(family)])
    name = phrase(colour, shape, None)
    return Turn("presupposition", rng.choice(ATTRIBUTES[family][0]).format(name), "none", f"There is no {name}.")


FAMILIES = [*ATTRIBUTES, "count", "existence", "relation", "caption", "presupposition", "details", "facts", "follow-up"]


def ask(family: str, scene: world.Scene, rng: random.Random) -> list[Turn]:
    """One turn of a family, or for "follow-up" two turns. No turn if the scene allows no such question."""
    if family == "follow-up":
        return list(ask_followup(scene, rng))
    if family in ATTRIBUTES:
        return [ask_attribute(family, scene, rng.choice(scene), rng)]
    asks = {"count": ask_count, "existence": ask_existence, "relation": ask_relation, "caption": ask_caption}
    asks |= {"presupposition": ask_presupposition, "details": ask_details, "facts": ask_facts}
    turn = asks[family](scene, rng)
    return [turn] if turn else []


def converse(scene: world.Scene, rng: random.Random, number: int, families: Sequence[str] | None = None) -> list[Turn]:
    """A conversation of about `number` turns. Relations, the hardest, are more frequent, and captions are rarer."""
    families = families or FAMILIES
    weights = [{"relation": 3, "existence": 1.5, "caption": 0.5, "facts": 0.5}.get(family, 1) for family in families]
    turns: list[Turn] = []
    while len(turns) < number:
        asked = [turn.question for turn in turns]
        new = ask(rng.choices(families, weights)[0], scene, rng)
        turns += [] if any(turn.question in asked for turn in new) else new  # for a follow-up, `new` is two turns
    return turns


def notes(scene: world.Scene, rng: random.Random) -> str:
    """A scene in words, in random order. The decoder reads this instead of a picture in its pretraining."""
    things = rng.sample(scene, len(scene))
    if rng.random() < 0.5:
        return f"There is {listed([describe(thing) for thing in things])}."
    return " ".join(
        f"In the {world.CELLS[thing.cell]} there is {article(f'{thing.size} {thing.name}')}." for thing in things
    )
