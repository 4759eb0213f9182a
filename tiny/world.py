"""A small synthetic world: randomly generated scenes and their pictures. talk.py generates the text about them.

    make_scene -> Scene (1 to 3 things on a 3 x 3 grid) -> draw -> picture of 96 x 96 pixels

Every thing has a colour, a shape, a size and a cell of the grid. No two things in a scene share both colour and shape,
so "the red circle" is always unambiguous. Three combinations (`HELD_OUT`) appear in no training picture, question or
text. A model that names them correctly has learned colour and shape as independent attributes.
"""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw

COLOURS = {  # the tint varies slightly from thing to thing
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
SIZES = {"small": (8.0, 9.0), "large": (13.0, 14.0)}  # range of the radius in pixels
ROWS, COLUMNS = ["top", "middle", "bottom"], ["left", "centre", "right"]
CELLS = [f"{row} {column}" if row != "middle" or column != "centre" else "centre" for row in ROWS for column in COLUMNS]
COMBINATIONS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
HELD_OUT = [("red", "star"), ("blue", "triangle"), ("yellow", "square")]
KNOWN = [pair for pair in COMBINATIONS if pair not in HELD_OUT]
# Only for the start of the tower's pretraining: shapes without a colour, and colours without a shape
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


Scene = tuple[Thing, ...]  # in reading order: row by row from the top left


# Making and drawing scenes


def make_scene(
    rng: random.Random,
    number: int = 0,
    must: Sequence[tuple[str, str]] = (),
    distinct: bool = False,
    known: Sequence[tuple[str, str]] = KNOWN,
) -> Scene:
    """Generates a random scene.

    Args:
        rng: the only source of randomness.
        number: the number of things; 0: one to three, where larger numbers are more likely.
        must: combinations of colour and shape that the scene has to contain.
        distinct: whether no two things may share a colour or a shape.
        known: the combinations that the other things are chosen from.
    """
    number = number or rng.choices([1, 2, 3], [1, 3, 6])[0]
    # Some scenes have a single colour or shape. Otherwise "three" would be a rare answer to "how many circles".
    colour = rng.choice(list(COLOURS)) if rng.random() < 0.15 else None
    shape = rng.choice(SHAPES) if not colour and rng.random() < 0.2 else None
    if must or distinct:
        colour = shape = None
    pairs = list(must)
    choices = [pair for pair in known if colour in (None, pair[0]) and shape in (None, pair[1])]
    if len(choices) < number:  # PLAIN has only one red combination
        choices = list(known)
    while len(pairs) < number:
        pair = rng.choice(choices)
        if pair not in pairs and not (distinct and any(pair[0] == c or pair[1] == s for c, s in pairs)):
            pairs.append(pair)
    cells = rng.sample(range(9), number)
    things = [Thing(*pair, rng.choice(list(SIZES)), cell) for pair, cell in zip(pairs, cells, strict=True)]
    return tuple(sorted(things, key=lambda thing: thing.cell))


def make_twin(scene: Scene, rng: random.Random, known: Sequence[tuple[str, str]] = KNOWN) -> Scene:
    """A hard negative: a scene with the same colours, but with different shapes or cells."""
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
    """The corners of any shape but a circle, centred at (x, y). Only those of a blob are random."""
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
    """The picture of a scene, 96 x 96 pixels in RGB. Positions within the cells, tints and background are random."""
    fine = 3  # drawn larger by this factor and then reduced, which smooths the edges
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
        if thing.colour == "grey":  # any level from black to white that stands out from the background
            level = rng.choice([level for level in range(256) if abs(level - base) > 70])
            colour = (level, level, level)
        else:
            colour = COLOURS[thing.colour]
        tint = tuple(min(255, max(0, value + rng.randint(-15, 15))) for value in colour)
        if thing.shape == "circle":
            box = [fine * value for value in (x - radius, y - radius, x + radius, y + radius)]
            pen.ellipse(box, fill=tint)
        else:
            pen.polygon([(fine * a, fine * b) for a, b in outline(thing.shape, x, y, radius, rng)], fill=tint)
    return picture.reduce(fine)
