"""Questions about single things of a scene, and follow-up questions about the thing just named."""

import random

import world
from phrases import (
    ATTRIBUTES,
    SIDE_PHRASES,
    SIDES,
    Kind,
    Turn,
    article,
    find_reference,
    listed,
    name_it,
    names,
    refer,
    sentence,
    the,
    worded,
)
from wordings import Voice

OTHER_COLOURS = ["brown", "black", "white", "grey", "gray", "gold", "beige", "transparent"]  # of no thing
CORNERS = ["top left", "top right", "bottom left", "bottom right"]


def attribute(family: str, thing: world.Thing) -> tuple[str, str]:
    """The value of a thing's attribute, and the predicate of a sentence: "circle", "is a circle"."""
    if family == "position":
        return world.CELLS[thing.cell], f"is in the {world.CELLS[thing.cell]}"
    value = getattr(thing, family)
    return value, f"is {article(value) if family == 'shape' else value}"


def kind_of(value: str) -> str:
    """The attribute that a word is a value of."""
    if value in world.CELLS:
        return "position"
    return "colour" if value in world.COLOURS else "shape" if value in world.SHAPES else "size"


def predicate(family: str, value: str, voice: Voice) -> str:
    """A value as a speaker says it of a thing: "red", "a circle", "in the top left"."""
    if family == "position":
        return voice.cell(value)
    return article(voice.word(value)) if family == "shape" else voice.word(value)


def other_value(family: str, scene: world.Scene, value: str, rng: random.Random) -> str:
    """A wrong value; often that of another thing of the scene."""
    values = {"colour": [*world.COLOURS], "shape": world.SHAPES, "size": [*world.SIZES], "position": world.CELLS}
    near = [attribute(family, thing)[0] for thing in scene if attribute(family, thing)[0] != value]
    return rng.choice(near if near and rng.random() < 0.6 else [other for other in values[family] if other != value])


def ask_attribute(family: str, scene: world.Scene, thing: world.Thing, voice: Voice) -> Turn:
    """Asks for a thing's colour, shape, size or position."""
    kind = refer(voice.rng, scene, thing, family)
    value, says = attribute(family, thing)
    asked, said = name_it(kind, voice, scene)
    if asked == "it" and voice.rng.random() < 0.3:
        question = voice.ask(f"bare_{family}")
    else:  # "What is the object in the top left?" is one of ask_naming's
        named = family == "shape" and (kind.cell, kind.side, voice.plain) == (None, None, False)
        question = voice.ask("identity" if named and voice.rng.random() < 0.3 else family, the=asked)
    return Turn(family, question, value, sentence(f"{said} {says}"))


def ask_side(scene: world.Scene, voice: Voice) -> Turn:
    """Asks for the side, row, column or corner of a thing, or for the side, row or column of all of them."""
    rng, thing = voice.rng, voice.rng.choice(scene)
    shared = [name for name in ("row", "column") if len({getattr(one, name) for one in scene}) == 1]
    if len(scene) > 1 and shared and rng.random() < 0.3:
        what, all_ = rng.choice(shared), "both" if len(scene) == 2 else "all"
        value = world.ROWS[thing.row] if what == "row" else world.COLUMNS[thing.column]
        word, where = (what, "in") if value in ("middle", "centre") or rng.random() < 0.6 else ("side", "on")
        return Turn(
            "side", voice.ask("shared", what=word, all=all_, on=where), value, f"They are {all_} in the {value} {what}."
        )
    kind, cell = refer(rng, scene, thing, "position"), world.CELLS[thing.cell]
    what = rng.choice(["side", "row", "column", "corner"])
    asked, said = name_it(kind, voice, scene)
    question = voice.ask(what, the=asked)
    row, column = world.ROWS[thing.row], world.COLUMNS[thing.column]
    if what == "row":
        return Turn("side", question, row, sentence(f"{said} is in the {row} row"))
    if what == "column":
        return Turn("side", question, column, sentence(f"{said} is in the {column} column"))
    if what == "corner":
        there = cell in CORNERS
        says = f"is in the {cell} corner" if there else "is not in a corner"
        return Turn("side", question, cell if there else "none", sentence(f"{said} {says}"))
    side = column if column != "centre" else row if row != "middle" else "centre"
    return Turn("side", question, side, sentence(f"{said} is {SIDE_PHRASES.get(side, 'in the centre')}"))


def ask_naming(scene: world.Scene, voice: Voice) -> Turn:
    """Asks what, or which one of a kind, is in a cell, or what is on a side."""
    rng = voice.rng
    if rng.random() < 0.12:  # "Which star is in the centre?"
        thing = rng.choice(scene)
        kind, place = rng.choice([Kind(thing.colour), Kind(shape=thing.shape)]), world.CELLS[thing.cell]
        question = voice.ask("which_in", one=worded(kind, voice), place=voice.cell(place))
        return Turn("naming", question, thing.name, f"The {thing.name} is in the {place}.")
    if rng.random() < 0.3:
        side = rng.choice(list(SIDES))
        found = [thing for thing in scene if SIDES[side](thing)]
        place, says = voice.side(side), SIDE_PHRASES[side]
    else:
        cell = rng.choice(scene).cell if rng.random() < 0.8 else rng.randrange(9)
        found = [thing for thing in scene if thing.cell == cell]
        place, says = voice.cell(world.CELLS[cell]), f"in the {world.CELLS[cell]}"
    what = listed([article(thing.name) for thing in found]) if found else "nothing"
    return Turn("naming", voice.ask("naming", place=place), names(found), f"There is {what} {says}.")


def ask_verify(scene: world.Scene, voice: Voice) -> Turn:
    """Asks whether a thing has an attribute. One in ten wrong colours is none of the world's."""
    rng, thing, family = voice.rng, voice.rng.choice(scene), voice.rng.choice([*ATTRIBUTES, "side"])
    holds = rng.random() < 0.5
    kind = refer(rng, scene, thing, "position" if family == "side" else family)
    if family == "side":
        areas = {**SIDES, "corner": lambda thing: world.CELLS[thing.cell] in CORNERS}
        area = rng.choice([area for area in areas if areas[area](thing) == holds])
        value = voice.side(area) if area != "corner" else rng.choice(["in a corner", "in one of the corners"])
        says = f"is {'' if holds else 'not '}{SIDE_PHRASES.get(area, 'in a corner')}"
    else:
        value, says = attribute(family, thing)
        value = predicate(family, value if holds else other_value(family, scene, value, rng), voice)
        if family == "colour" and not holds and rng.random() < 0.1:
            value = rng.choice([colour for colour in OTHER_COLOURS if colour not in world.COLOURS])
    asked, said = name_it(kind, voice, scene)
    question = voice.ask("single", value=value) if asked == "it" else voice.ask("verify", the=asked, value=value)
    return Turn("verify", question, "yes" if holds else "no", f"{'Yes' if holds else 'No'}, {said} {says}.")


def ask_choice(scene: world.Scene, voice: Voice) -> Turn:
    """Asks which of two values a thing has, or which of two things has a value."""
    rng, thing, family = voice.rng, voice.rng.choice(scene), voice.rng.choice([*ATTRIBUTES, "side"])
    value, says = attribute(family, thing) if family != "side" else ("", "")
    others = [one for one in scene if value and attribute(family, one)[0] != value]
    if others and rng.random() < 0.3:
        kind, other = (refer(rng, scene, one, family) for one in (thing, rng.choice(others)))
        slots = dict(zip(("first", "second"), rng.sample([the(kind, voice), the(other, voice)], 2), strict=True))
        question = voice.ask("which_is", value=predicate(family, value, voice), **slots)
        return Turn("choice", question, thing.name, f"The {kind} {says}.")
    kind = refer(rng, scene, thing, "position" if family == "side" else family)
    if family == "side":
        pairs = [pair for pair in (("left", "right"), ("top", "bottom")) if any(SIDES[side](thing) for side in pair)]
        if not pairs:
            return ask_choice(scene, voice)
        pair = rng.choice(pairs)
        value = next(side for side in pair if SIDES[side](thing))
        says, options = f"is {SIDE_PHRASES[value]}", [voice.side(side) for side in pair]
        if rng.random() < 0.3:  # "left or right"
            options = list(pair)
    else:
        options = [predicate(family, word, voice) for word in (value, other_value(family, scene, value, rng))]
    first, second = rng.sample(options, 2)
    asked, said = name_it(kind, voice, scene)
    if asked == "it":
        question = voice.ask("single_choice", value=first, other=second)
    else:
        question = voice.ask("choice", the=asked, value=first, other=second)
    return Turn("choice", question, value, sentence(f"{said} {says}"))


def ask_details(scene: world.Scene, voice: Voice) -> Turn:
    """Asks for every attribute of a thing that the question does not mention."""
    rng, thing = voice.rng, voice.rng.choice(scene)
    told = rng.choice(ATTRIBUTES)
    kind = find_reference(rng, scene, thing, *[family for family in ATTRIBUTES if family != told]) or Kind(*thing[:2])
    told_values = (kind.size, kind.colour, kind.shape, kind.cell)
    rest = [f for f, value in zip(("size", "colour", "shape", "position"), told_values, strict=True) if value is None]
    asked, said = name_it(kind, voice, scene)
    rest = ["size", "colour", "shape", "position"] if asked == "it" else rest
    says = listed([attribute(family, thing)[1].removeprefix("is " if i else "") for i, family in enumerate(rest)])
    return Turn("details", voice.ask("details", the=asked), thing.name, sentence(f"{said} {says}"))


def ask_followup(scene: world.Scene, voice: Voice) -> tuple[Turn, Turn]:
    """Two turns. The second says "it", or "the other one", and can only be answered with the first as context."""
    rng, kind = voice.rng, None
    way = rng.choice(["again", "verify", "other" if len(scene) == 2 else "about" if scene[1:] else "again"])
    while not kind:
        thing = rng.choice(scene)
        first, second = rng.sample(ATTRIBUTES, 2)
        kind = find_reference(rng, scene, thing, first, second)
    value, says = attribute(first, thing)
    opening = Turn(first, voice.ask(first, the=the(kind, voice)), value, f"The {kind} {says}.")
    if way == "again":
        value, says = attribute(second, thing)
        return opening, Turn("follow-up", voice.ask(f"again_{second}"), value, f"It {says}.")
    if way == "verify":
        value, says = attribute(second, thing)
        holds = rng.random() < 0.5
        asked = predicate(second, value if holds else other_value(second, scene, value, rng), voice)
        said = f"{'Yes' if holds else 'No'}, it {says}."
        return opening, Turn("follow-up", voice.ask("again_verify", value=asked), "yes" if holds else "no", said)
    other = rng.choice([one for one in scene if one != thing])
    value, says = attribute(first, other)
    if way == "other":
        return opening, Turn("follow-up", voice.ask("again_other"), value, f"The other one {says}.")
    named = refer(rng, scene, other, first)
    question = voice.ask("again_about", the=the(named, voice))
    return opening, Turn("follow-up", question, value, f"The {named} {says}.")
