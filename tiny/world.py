"""A small world to look at and talk about: drawn scenes, captions, questions and answers, all made by chance.

    Scene (1 to 3 things on a 3 x 3 grid) -> draw -> picture of 96 x 96 pixels
                                          -> ask  -> a question about it and its answers, as a word and as a sentence

Every thing has a colour, a shape, a size and a cell of the grid. No two things of a scene are alike in colour and
shape, so "the red circle" always means one thing. Three combinations (`HELD_OUT`) are in no scene, question or text
that anything is trained on: whoever names them has understood that colour and shape are separate matters.

Questions are asked so that their words do not give the answer away: yes and no are equally frequent to questions of the
same form, and what is asked about and not there could have been there.
"""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw

COLOURS = {  # each drawn in slightly different tints
    "red": (214, 39, 40),
    "orange": (255, 140, 20),
    "yellow": (240, 220, 50),
    "green": (40, 160, 60),
    "blue": (40, 90, 220),
    "purple": (150, 70, 190),
    "pink": (245, 130, 190),
    "cyan": (60, 200, 220),
}
SHAPES = ["circle", "square", "triangle", "star", "cross", "diamond", "heart"]
SIZES = {"small": (8.0, 9.0), "large": (13.0, 14.0)}  # radius in pixels, from and to
ROWS, COLUMNS = ["top", "middle", "bottom"], ["left", "centre", "right"]
CELLS = [f"{row} {column}" if row != "middle" or column != "centre" else "centre" for row in ROWS for column in COLUMNS]
COUNTS = ["zero", "one", "two", "three"]
COMBINATIONS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
HELD_OUT = [("red", "star"), ("blue", "triangle"), ("yellow", "square")]
KNOWN = [pair for pair in COMBINATIONS if pair not in HELD_OUT]
# Only for the first lessons of a tower: shapes without a colour, and colours without a shape
PLAIN = [("grey", shape) for shape in SHAPES] + [(colour, "blob") for colour in COLOURS]
SIDE = 96  # pixels


class Thing(NamedTuple):
    """One object of a scene."""

    colour: str
    shape: str
    size: str
    cell: int  # 0 to 8, row by row from the top left

    @property
    def row(self) -> int:
        return self.cell // 3

    @property
    def column(self) -> int:
        return self.cell % 3

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


Scene = tuple[Thing, ...]  # row by row from the top left, as one reads


# Making and drawing scenes


def make_scene(
    rng: random.Random,
    number: int = 0,
    must: Sequence[tuple[str, str]] = (),
    distinct: bool = False,
    known: Sequence[tuple[str, str]] = KNOWN,
) -> Scene:
    """Draws a scene.

    Args:
        rng: decides all.
        number: of things; 0: one to three, the more the likelier.
        must: combinations of colour and shape that are in it.
        distinct: no colour and no shape twice.
        known: combinations that the others are chosen from.
    """
    number = number or rng.choices([1, 2, 3], [1, 3, 6])[0]
    # Some scenes are of one colour or one shape, so that "three" is no rare answer to "how many circles".
    colour = rng.choice(list(COLOURS)) if rng.random() < 0.15 else None
    shape = rng.choice(SHAPES) if not colour and rng.random() < 0.2 else None
    if must or distinct:
        colour = shape = None
    pairs = list(must)
    choices = [pair for pair in known if colour in (None, pair[0]) and shape in (None, pair[1])]
    choices = choices if len(choices) >= number else known  # of PLAIN there is but one red one
    while len(pairs) < number:
        pair = rng.choice(choices)
        if pair not in pairs and not (distinct and any(pair[0] == c or pair[1] == s for c, s in pairs)):
            pairs.append(pair)
    cells = rng.sample(range(9), number)
    things = [Thing(*pair, rng.choice(list(SIZES)), cell) for pair, cell in zip(pairs, cells, strict=True)]
    return tuple(sorted(things, key=lambda thing: thing.cell))


def make_twin(scene: Scene, rng: random.Random, known: Sequence[tuple[str, str]] = KNOWN) -> Scene:
    """A scene with the same colours, where shapes or places are others: who tells them apart has looked closely."""
    while True:
        cells = rng.sample(range(9), len(scene)) if rng.random() < 0.5 else [thing.cell for thing in scene]
        things = [
            Thing(thing.colour, rng.choice([s for c, s in known if c == thing.colour]), thing.size, cell)
            for thing, cell in zip(scene, cells, strict=True)
        ]
        pairs = {(thing.colour, thing.shape) for thing in things}
        if len(pairs) == len(things) and set(things) != set(scene):
            return tuple(sorted(things, key=lambda thing: thing.cell))


def outline(shape: str, x: float, y: float, radius: float, rng: random.Random) -> list[tuple[float, float]]:
    """The corners of a shape around (x, y) that is not a circle; only those of a blob are made by chance."""
    if shape == "square":
        r = 0.88 * radius
        return [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
    if shape == "diamond":
        return [(x, y - radius), (x + 0.8 * radius, y), (x, y + radius), (x - 0.8 * radius, y)]
    if shape == "heart":
        corners = []
        for i in range(24):
            sine, cosines = math.sin(math.pi * i / 12), [math.cos(k * math.pi * i / 12) for k in (1, 2, 3, 4)]
            height = (13 * cosines[0] - 5 * cosines[1] - 2 * cosines[2] - cosines[3]) / 16
            corners.append((x + radius * sine**3, y - radius * height))
        return corners
    if shape == "cross":
        a, b = 0.36 * radius, radius
        around = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a)]
        return [(x + dx, y + dy) for dx, dy in [*around, (-a, -a)]]
    if shape == "blob":
        ends = [(rng.uniform(0.5, 1.1) * radius, math.pi * (i + rng.uniform(-0.3, 0.3)) / 4) for i in range(8)]
        return [(x + r * math.cos(angle), y + r * math.sin(angle)) for r, angle in ends]
    points, inner = (3, 0.55) if shape == "triangle" else (5, 0.42)
    corners = []
    for i in range(2 * points):
        r, angle = radius * (inner if i % 2 else 1.1), math.pi * (i / points - 0.5)
        corners.append((x + r * math.cos(angle), y + r * math.sin(angle)))
    return corners


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """The picture of a scene: 96 x 96 pixels, RGB. Chance moves things in their cells, and varies tints and ground."""
    fine = 3  # drawn larger and reduced, for smooth edges
    base = rng.randint(0, 255)
    corners = Image.new("RGB", (2, 2))
    for corner in [(0, 0), (1, 0), (0, 1), (1, 1)]:
        grey = base + rng.randint(-40, 40)
        corners.putpixel(corner, tuple(min(255, max(0, grey + rng.randint(-12, 12))) for _ in range(3)))
    picture = corners.resize((SIDE * fine, SIDE * fine), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(picture)
    for thing in scene:
        x, y = (32 * place + 16 + rng.uniform(-2, 2) for place in (thing.column, thing.row))
        radius = rng.uniform(*SIZES[thing.size])
        if thing.colour == "grey":  # any, from black to white, that stands out from the ground
            colour = [rng.choice([level for level in range(256) if abs(level - base) > 70])] * 3
        else:
            colour = COLOURS[thing.colour]
        tint = tuple(min(255, max(0, value + rng.randint(-15, 15))) for value in colour)
        if thing.shape == "circle":
            box = [fine * value for value in (x - radius, y - radius, x + radius, y + radius)]
            pen.ellipse(box, fill=tint)
        else:
            pen.polygon([(fine * a, fine * b) for a, b in outline(thing.shape, x, y, radius, rng)], fill=tint)
    return picture.reduce(fine)


# Talking about them


class Turn(NamedTuple):
    """A question with its answer in both forms."""

    family: str
    question: str
    short: str  # to a question that ends with the paper's "Answer the question using a single word or phrase."
    sentence: str


def article(text: str) -> str:
    """an orange circle, a red one"""
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def listed(texts: Sequence[str]) -> str:
    """a, b and c"""
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def is_are(number: int) -> str:
    """One is, two are."""
    return "is" if number == 1 else "are"


def describe(thing: Thing) -> str:
    """a small red circle in the top left"""
    return f"{article(f'{thing.size} {thing.name}')} in the {CELLS[thing.cell]}"


def caption(scene: Scene) -> str:
    """Every thing with its attributes and place, row by row, and how each lies to the next."""
    text = f"There is {listed([describe(thing) for thing in scene])}."
    for a, b in itertools.pairwise(scene):
        text += f" The {a.name} is {'left of' if a.row == b.row else 'above'} the {b.name}."
    return text


def alt_text(scene: Scene) -> str:
    """The shortest caption that says all: "top left small red circle, centre large blue square"."""
    return ", ".join(f"{CELLS[thing.cell]} {thing.size} {thing.name}" for thing in scene)


def fits(thing: Thing, colour: str | None, shape: str | None, size: str | None, cell: int | None) -> bool:
    """Whether a thing is what was asked for; None is anything."""
    asked = zip((colour, shape, size, cell), (thing.colour, thing.shape, thing.size, thing.cell), strict=True)
    return all(wanted is None or wanted == has for wanted, has in asked)


def phrase(colour: str | None, shape: str | None, size: str | None, cell: int | None = None) -> str:
    """ "small red circle", "red object", "object in the top left" """
    words = " ".join(word for word in (size, colour, shape or "object") if word)
    return words if cell is None else f"{words} in the {CELLS[cell]}"


# What things are called by
REFERENCES = [["colour"], ["shape"], *[["colour", "shape"]] * 2, ["size", "shape"], ["size", "colour"]]


def refer(rng: random.Random, scene: Scene, thing: Thing, *without: str) -> str | None:
    """Words that mean this thing alone; `without` are attributes they must not tell: colour, shape, size, position."""
    ways = []
    for names in REFERENCES:
        known = {name: getattr(thing, name) if name in names else None for name in ("colour", "shape", "size")}
        if not set(names) & set(without) and sum(fits(other, **known, cell=None) for other in scene) == 1:
            ways.append(phrase(**known))
    if "position" not in without and (not ways or rng.random() < 0.15):
        ways = [phrase(None, None, None, thing.cell)]
    return rng.choice(ways) if ways else None


# How each attribute is asked for, first and when the thing has been named, and what is said of it.
ATTRIBUTES = {
    "colour": (["What colour is the {}?", "What is the colour of the {}?", "What color is the {}?"], "And its colour?"),
    "shape": (["What shape is the {}?", "What is the shape of the {}?"], "And its shape?"),
    "size": (["What size is the {}?", "How big is the {}?"], "And its size?"),
    "position": (["Where is the {}?", "In what part of the picture is the {}?"], "And where is it?"),
}


def attribute(family: str, thing: Thing) -> tuple[str, str]:
    """Its value, and what a sentence says of the thing: "circle", "is a circle"."""
    if family == "position":
        return CELLS[thing.cell], f"is in the {CELLS[thing.cell]}"
    value = getattr(thing, family)
    return value, f"is {article(value) if family == 'shape' else value}"


def kind(value: str) -> str:
    """Which attribute a word is a value of."""
    if value in CELLS:
        return "position"
    return "colour" if value in COLOURS else "shape" if value in SHAPES else "size"


def ask_attribute(family: str, scene: Scene, thing: Thing, rng: random.Random) -> Turn:
    """What is this thing's colour, shape, size or position?"""
    name = refer(rng, scene, thing, family)
    value, says = attribute(family, thing)
    return Turn(family, rng.choice(ATTRIBUTES[family][0]).format(name), value, f"The {name} {says}.")


def ask_details(scene: Scene, rng: random.Random) -> Turn:
    """All about one thing that its name does not tell."""
    thing = rng.choice(scene)
    known = rng.choice(list(ATTRIBUTES))
    name = refer(rng, scene, thing, *[family for family in ATTRIBUTES if family != known]) or thing.name
    rest = [family for family in ("size", "colour", "shape", "position") if attribute(family, thing)[0] not in name]
    said = listed([attribute(family, thing)[1].removeprefix("is " if i else "") for i, family in enumerate(rest)])
    return Turn("details", f"Tell me about the {name}.", thing.name, f"The {name} {said}.")


def ask_facts(scene: Scene, rng: random.Random, number: int = 4) -> Turn:
    """Facts about single things: "circle red, green top left", or "The circle is red. The green object is in the ...".

    Hardly anybody would ask this. But what is to be found stands right beside what it is found by, so here looking
    things up by what they are is learned first; without it, the other questions wait very long for that.
    """
    words, sentences = [], []
    for _ in range(number):
        thing = rng.choice(scene)
        first = rng.choice(["colour", "shape"])  # to look up a place is learned without lessons
        second = rng.choice([name for name in ("colour", "shape", "position") if name != first] * 2 + ["size"])
        known = {"colour": None, "shape": None, "size": None, "cell": None, first: getattr(thing, first)}
        if sum(fits(other, **known) for other in scene) == 1:
            value, says = attribute(second, thing)
            words.append(f"{known[first]} {value}")
            sentences.append(f"The {phrase(**known)} {says}.")
    if not words:
        return ask_facts(scene, rng, number)
    return Turn("facts", "List some facts.", ", ".join(words), " ".join(sentences))


def ask_followup(scene: Scene, rng: random.Random) -> tuple[Turn, Turn]:
    """Two turns; the second one says "it" of what the first one was about, and cannot be understood without."""
    name = None
    while not name:
        thing = rng.choice(scene)
        first, second = rng.sample(list(ATTRIBUTES), 2)
        name = refer(rng, scene, thing, first, second)
    value, says = attribute(first, thing)
    opening = Turn(first, rng.choice(ATTRIBUTES[first][0]).format(name), value, f"The {name} {says}.")
    value, says = attribute(second, thing)
    return opening, Turn("follow-up", ATTRIBUTES[second][1], value, f"It {says}.")


def ask_count(scene: Scene, rng: random.Random) -> Turn:
    """Of all things, of a colour, of a shape; the frequencies make the four answers about equally frequent."""
    kinds = [(colour, None) for colour in COLOURS] + [(None, shape) for shape in SHAPES]
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


# Whether a question about existence names a colour, and a shape; the same where it is there and where it is not
FORMS, FORM_WEIGHTS = [(True, True), (True, False), (False, True)], [3, 1, 1]


def absent(scene: Scene, rng: random.Random) -> tuple[str | None, str | None]:
    """Colour and shape of what is not in the scene, often nearly: one of the two is."""
    names_colour, names_shape = rng.choices(FORMS, FORM_WEIGHTS)[0]
    while True:
        colour, shape = rng.choice(KNOWN)
        near = rng.random()
        if near < 0.4:
            colour = rng.choice(scene).colour
        elif near < 0.8:
            shape = rng.choice(scene).shape
        wanted = (colour if names_colour else None, shape if names_shape else None)
        if wanted not in HELD_OUT and not any(fits(thing, *wanted, None, None) for thing in scene):
            return wanted


def ask_existence(scene: Scene, rng: random.Random, pairs: Sequence[tuple[str, str]] = ()) -> Turn:
    """As often yes as no; with `pairs`, of one of these combinations, whether it is there or not."""
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


# What "a is ... b" means
DIRECTIONS: dict[str, Callable[[Thing, Thing], bool]] = {
    "left of": lambda a, b: a.column < b.column,
    "right of": lambda a, b: a.column > b.column,
    "above": lambda a, b: a.row < b.row,
    "below": lambda a, b: a.row > b.row,
}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def ask_relation(scene: Scene, rng: random.Random) -> Turn | None:
    """Whether one thing lies so to another, or what does; None where there are not two things."""
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
    # Chosen so that "nothing" is a rare answer; with two things in a direction there would be two answers.
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


def ask_caption(scene: Scene, rng: random.Random) -> Turn:
    """What is to be seen?"""
    question = rng.choice(["Describe the picture.", "What do you see in the picture?", "What is shown in this image?"])
    return Turn("caption", question, listed([thing.name for thing in scene]), caption(scene))


def ask_presupposition(scene: Scene, rng: random.Random) -> Turn:
    """A question about a thing that is not there."""
    colour, shape = absent(scene, rng)
    told = {"colour": colour, "shape": shape}
    family = rng.choice([family for family in ATTRIBUTES if not told.get(family)])
    name = phrase(colour, shape, None)
    return Turn("presupposition", rng.choice(ATTRIBUTES[family][0]).format(name), "none", f"There is no {name}.")


FAMILIES = [*ATTRIBUTES, "count", "existence", "relation", "caption", "presupposition", "details", "facts", "follow-up"]


def ask(family: str, scene: Scene, rng: random.Random) -> list[Turn]:
    """One turn of this family; of "follow-up" the one before it, too; none where the scene allows no such question."""
    if family == "follow-up":
        return list(ask_followup(scene, rng))
    if family in ATTRIBUTES:
        return [ask_attribute(family, scene, rng.choice(scene), rng)]
    asks = {"count": ask_count, "existence": ask_existence, "relation": ask_relation, "caption": ask_caption}
    asks |= {"presupposition": ask_presupposition, "details": ask_details, "facts": ask_facts}
    turn = asks[family](scene, rng)
    return [turn] if turn else []


def converse(scene: Scene, rng: random.Random, number: int, families: Sequence[str] | None = None) -> list[Turn]:
    """A conversation of about so many turns; relations, which are the hardest, come more often, and captions rarely."""
    families = families or FAMILIES
    weights = [{"relation": 3, "existence": 1.5, "caption": 0.5, "facts": 0.5}.get(family, 1) for family in families]
    turns: list[Turn] = []
    while len(turns) < number:
        asked = [turn.question for turn in turns]
        new = ask(rng.choices(families, weights)[0], scene, rng)
        turns += [] if any(turn.question in asked for turn in new) else new  # a follow-up comes with its opening
    return turns


def notes(scene: Scene, rng: random.Random) -> str:
    """A scene in words, its things in any order: what a decoder that has no eyes yet reads in place of the picture."""
    things = rng.sample(scene, len(scene))
    if rng.random() < 0.5:
        return f"There is {listed([describe(thing) for thing in things])}."
    return " ".join(f"In the {CELLS[thing.cell]} there is {article(f'{thing.size} {thing.name}')}." for thing in things)
