"""A small synthetic world: randomly generated scenes and their pictures. talk.py generates the text about them.

    make_scene -> Scene (1 to 3 things on a 3 x 3 grid) -> draw -> picture of 96 x 96 pixels

Every thing has a colour, a shape, a size and a cell of the grid. No two things in a scene share both colour and shape,
so "the red circle" is always unambiguous. Three combinations (`HELD_OUT`) appear in no training picture, question or
text. A model that names them correctly has learned colour and shape as independent attributes.

How a scene is drawn is its `Look`: outlines, rotation, background, blur, noise, JPEG, resolution. None of this is ever
asked about.
"""

import contextlib
import io
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from PIL import Image, ImageChops, ImageDraw, ImageFilter

# The range of what is called by each name: a tint is a random mixture of these. Colours in between are never drawn.
TINTS = {
    "red": [(214, 39, 40), (255, 0, 0), (170, 20, 30), (235, 70, 60)],
    "orange": [(255, 140, 20), (255, 165, 0), (240, 120, 10), (230, 130, 50)],
    "yellow": [(240, 220, 50), (255, 255, 0), (255, 235, 100), (220, 200, 20)],
    "green": [(40, 160, 60), (0, 128, 0), (0, 220, 40), (90, 190, 80)],
    "blue": [(40, 90, 220), (0, 0, 255), (20, 40, 160), (70, 120, 240)],
    "purple": [(150, 70, 190), (128, 0, 128), (110, 40, 170), (170, 100, 210)],
    "pink": [(245, 130, 190), (255, 192, 203), (255, 105, 180), (240, 150, 200)],
    "cyan": [(60, 200, 220), (0, 255, 255), (64, 224, 208), (30, 180, 200)],
}
COLOURS = {name: tints[0] for name, tints in TINTS.items()}
SHAPES = ["circle", "square", "triangle", "star", "cross", "diamond", "heart"]
SIZES = {"small": (8.0, 10.0), "large": (13.0, 15.0)}  # range of the radius in pixels
JITTER = {"small": 4.0, "large": 2.0}  # how far a thing may be from the middle of its cell, in pixels
ROWS, COLUMNS = ["top", "middle", "bottom"], ["left", "centre", "right"]
CELLS = [f"{row} {column}" if row != "middle" or column != "centre" else "centre" for row in ROWS for column in COLUMNS]
COMBINATIONS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
HELD_OUT = [("red", "star"), ("blue", "triangle"), ("yellow", "square")]
KNOWN = [pair for pair in COMBINATIONS if pair not in HELD_OUT]
# Shapes of any colour, and colours without a shape: for training only, and never with a name for what is missing
SHAPES_ALONE = [("some", shape) for shape in SHAPES]
COLOURS_ALONE = [(colour, "blob") for colour in COLOURS]
# Only for the tokenizer, in which each is one piece, and the decoder's pretraining: colours and shapes nobody can draw
MADE_UP_COLOURS = ["zeb", "quil", "fep", "lorb", "tade", "nim", "vosk", "plir"]
MADE_UP_SHAPES = ["wug", "dax", "blick", "tove", "gorp", "snerk", "mib"]
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
    if len(choices) < number:  # COLOURS_ALONE has only one red combination
        choices = list(known)
    while len(pairs) < number:
        pair = rng.choice(choices)
        if pair not in pairs and not (distinct and any(pair[0] == c or pair[1] == s for c, s in pairs)):
            pairs.append(pair)
    cells = rng.sample(range(9), number)
    things = [Thing(*pair, rng.choice(list(SIZES)), cell) for pair, cell in zip(pairs, cells, strict=True)]
    return tuple(sorted(things, key=lambda thing: thing.cell))


@contextlib.contextmanager
def with_made_up_words() -> Iterator[None]:
    """Temporarily adds the made-up colours and shapes, in all combinations but the held-out ones.

    It changes the lists in place, because other modules and the default of `make_scene` refer to them.
    """
    colours, shapes, known = dict(COLOURS), list(SHAPES), list(KNOWN)
    COLOURS.update(dict.fromkeys(MADE_UP_COLOURS, (0, 0, 0)))
    SHAPES.extend(MADE_UP_SHAPES)
    KNOWN[:] = [pair for pair in itertools.product(COLOURS, SHAPES) if pair not in HELD_OUT]
    try:
        yield
    finally:
        COLOURS.clear()
        COLOURS.update(colours)
        SHAPES[:], KNOWN[:] = shapes, known


def make_like(rng: random.Random) -> Scene:
    """Two or three things of one shape or colour; beside two there is often a third, different thing."""
    while True:
        scene = make_scene(rng, rng.choice([2, 3, 3]))
        if max(len(scene) - len({getattr(thing, name) for thing in scene}) for name in ("colour", "shape")) > 0:
            return scene


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


class Look(NamedTuple):
    """How a scene is drawn. The defaults: filled, upright, on a gradient, and saved without loss."""

    outline: float = 0.0  # probability that a thing is an outline instead of filled
    rotation: float = 0.0  # largest angle of a thing, in degrees
    ground: str = "gradient"  # or a pattern: stripes, checks, dots
    side: int = SIDE  # resolution in pixels
    blur: float = 0.0  # radius in pixels
    noise: float = 0.0  # standard deviation, of 255
    quality: int = 0  # of JPEG; 0: none


PLAIN_LOOK = Look()
PATTERNS = ["stripes", "checks", "dots"]
CONDITIONS = {  # one at a time, for the test of robustness
    "outlines": Look(outline=1.0),
    "rotated": Look(rotation=12.0),
    "patterned ground": Look(ground="any"),
    "small picture": Look(side=64),
    "large picture": Look(side=400),
    "blurred": Look(blur=1.0),
    "noisy": Look(noise=15.0),
    "JPEG": Look(quality=30),
}


def random_look(rng: random.Random) -> Look:
    """The look of a training picture: each disturbance occurs in some, in any combination."""
    return Look(
        outline=rng.choice([0.0, 0.0, 0.3, 1.0]),
        rotation=rng.choice([0.0, 15.0]),
        ground=rng.choice(["gradient", "gradient", "any"]),
        side=rng.randint(56, 160) if rng.random() < 0.2 else SIDE,
        blur=rng.uniform(0.2, 1.2) if rng.random() < 0.2 else 0.0,
        noise=rng.uniform(2, 18) if rng.random() < 0.2 else 0.0,
        quality=rng.randint(20, 90) if rng.random() < 0.2 else 0,
    )


def far(colour: Sequence[int], others: Sequence[Sequence[int]], distance: int) -> bool:
    """Whether a colour is at least this far from the others, in RGB."""
    return all(sum((a - b) ** 2 for a, b in zip(colour, other, strict=True)) > distance**2 for other in others)


def mix_tint(thing: Thing, ground: int, rng: random.Random) -> tuple[int, ...]:
    """A random tint of a thing's colour. "some" is any colour that stands out and doesn't complete a held-out pair."""
    if thing.colour == "some":
        avoid = [tint for name, shape in HELD_OUT if shape == thing.shape for tint in TINTS[name]]
        while True:
            colour = tuple(rng.randrange(256) for _ in range(3))
            if far(colour, avoid, 70) and far(colour, [(ground,) * 3], 80):
                return colour
    tints = TINTS[thing.colour]
    weights = [rng.random() ** 2 for _ in tints]
    mixed = (sum(w * c for w, c in zip(weights, channel, strict=True)) for channel in zip(*tints, strict=True))
    return tuple(min(255, max(0, round(value / sum(weights)) + rng.randint(-10, 10))) for value in mixed)


def draw_ground(pattern: str, base: int, side: int, rng: random.Random) -> Image.Image:
    """A background of roughly the grey level `base`: a gradient from corner to corner, with a pattern on it if any."""
    corners = Image.new("RGB", (2, 2))
    for corner in [(0, 0), (1, 0), (0, 1), (1, 1)]:
        grey = base + rng.randint(-40, 40)
        corners.putpixel(corner, tuple(min(255, max(0, grey + rng.randint(-12, 12))) for _ in range(3)))
    picture = corners.resize((side, side), Image.Resampling.BILINEAR)
    if pattern == "gradient":
        return picture
    pattern = rng.choice(PATTERNS) if pattern == "any" else pattern
    step, mask = rng.randint(side // 24, side // 8), Image.new("L", (side, side))
    pen, strength = ImageDraw.Draw(mask), rng.randint(30, 110)
    for i in range(0, side, step):
        if pattern == "stripes" and (i // step) % 2:
            pen.rectangle((i, 0, i + step - 1, side), fill=strength)
        for j in range(0, side if pattern != "stripes" else 0, step):
            if pattern == "checks" and (i // step + j // step) % 2:
                pen.rectangle((i, j, i + step - 1, j + step - 1), fill=strength)
            if pattern == "dots":
                pen.ellipse((i + step // 4, j + step // 4, i + 3 * step // 4, j + 3 * step // 4), fill=strength)
    mask = mask.transpose(Image.Transpose.ROTATE_90) if rng.random() < 0.5 else mask
    other = base + rng.choice([-60, 60])
    picture.paste(tuple(min(255, max(0, other + rng.randint(-15, 15))) for _ in range(3)), mask=mask)
    return picture


def draw_thing(picture: Image.Image, thing: Thing, tint: tuple[int, ...], look: Look, rng: random.Random) -> None:
    """Draws a thing into the picture: filled, or as an outline of random width."""
    fine, scale = 3, picture.width / SIDE  # drawn larger by `fine` and then reduced, which smooths the edges
    jitter = JITTER[thing.size]
    x, y = (32 * place + 16 + rng.uniform(-jitter, jitter) for place in (thing.column, thing.row))
    radius = rng.uniform(*SIZES[thing.size])
    width = round(fine * scale * rng.uniform(1.7, 0.4 * radius)) if rng.random() < look.outline else 0
    left, top, side = (math.floor(value * scale) for value in (x - 19, y - 19, 40))  # the part that is drawn on
    mask = Image.new("L", (fine * side, fine * side))
    pen, inside = ImageDraw.Draw(mask), None if width else 255

    def place(a: float, b: float) -> tuple[float, float]:
        return fine * (a * scale - left), fine * (b * scale - top)

    if thing.shape == "circle":
        pen.ellipse((*place(x - radius, y - radius), *place(x + radius, y + radius)), inside, 255, width)
    else:
        angle = math.radians(rng.uniform(-1, 1) * look.rotation)
        sine, cosine = math.sin(angle), math.cos(angle)
        around = [(a - x, b - y) for a, b in outline(thing.shape, x, y, radius, rng)]
        points = [place(x + a * cosine - b * sine, y + a * sine + b * cosine) for a, b in around]
        if width:  # ending on the first side closes the last joint
            pen.line([*points, points[0], points[1]], 255, width, joint="curve")
        else:
            pen.polygon(points, fill=255)
    picture.paste(tint, (left, top), mask.reduce(fine))


def draw(scene: Scene, rng: random.Random, look: Look = PLAIN_LOOK) -> Image.Image:
    """The picture of a scene in RGB, look.side pixels wide and high. Positions, tints and background are random."""
    base = rng.randint(0, 255)
    picture = draw_ground(look.ground, base, look.side, rng)
    for thing in scene:
        draw_thing(picture, thing, mix_tint(thing, base, rng), look, rng)
    if look.blur:
        picture = picture.filter(ImageFilter.GaussianBlur(look.blur))
    if look.noise:
        grain = Image.frombytes("RGB", picture.size, rng.randbytes(3 * look.side**2))  # uniform; deviation: 73.9
        grain = grain.point([round(128 + (value - 127.5) * look.noise / 73.9) for value in range(256)] * 3)
        picture = ImageChops.add(picture, grain, offset=-128)
    if look.quality:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=look.quality)
        picture = Image.open(file).convert("RGB")
    return picture
