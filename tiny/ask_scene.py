"""Questions about several things, about the whole picture, and about what is not in it. ask_thing.py has the others."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import world
from ask_thing import attribute, other_value, predicate
from phrases import (
    COUNTS,
    SIDE_PHRASES,
    SIDES,
    Kind,
    Turn,
    article,
    caption,
    find_reference,
    is_are,
    listed,
    may_ask,
    names,
    refer,
    the,
    worded,
)
from wordings import NOUNS, Voice, plural

# When "a is ... b" is true
DIRECTIONS: dict[str, Callable[[world.Thing, world.Thing], bool]] = {
    "left of": lambda a, b: a.column < b.column,
    "right of": lambda a, b: a.column > b.column,
    "above": lambda a, b: a.row < b.row,
    "below": lambda a, b: a.row > b.row,
}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
ONLY_SHAPES = "There are only coloured shapes in the picture."
UNKNOWN = "I only know about the coloured shapes in the picture."
PROPERTIES = ["colour", "shape", "size"]
# The share of questions to keep where one answer would otherwise be more frequent; "whole": about all of the scene
KEPT = {("all", False): 0.15, ("both", False): 0.17, ("none", False): 0.32, ("any", True): 0.31, ("same", False): 0.26}
KEPT |= {("whole all", False): 0.16, ("whole both", False): 0.28, ("whole none", False): 0.18}
KEPT |= {("whole any", True): 0.19, ("compare", False): 0.3, ("alike", False): 0.68, ("number", False): 0.66}


def yes_no(holds: bool) -> str:
    """The short answer."""
    return "yes" if holds else "no"


def kept(way: str, holds: bool, rng: random.Random) -> bool:
    """Whether a question is kept; makes both answers equally frequent."""
    return rng.random() < KEPT.get((way, holds), 1)


def many(kind: Kind, voice: Voice) -> str:
    """The plural of an expression as a speaker words it: "red things", "circles on the left"."""
    return plural(worded(kind, voice))


def plain_many(kind: Kind, number: int) -> str:
    """The expression as answers say it: "red object", "red objects", "crosses"."""
    return str(kind) if number == 1 else plural(str(kind))


def ask_count(scene: world.Scene, voice: Voice) -> Turn:
    """Asks for the number of things: of all, or of those with an attribute, with two, or on a side.

    The four answers are about equally frequent.
    """
    rng = voice.rng
    by_number: dict[int, list[tuple[Kind, str]]] = {}
    places = rng.choice([[""], [""], [""], list(SIDES)])
    kinds = [Kind(colour=colour) for colour in world.COLOURS] + [Kind(shape=shape) for shape in world.SHAPES]
    if places == [""]:
        kinds = 3 * kinds + 2 * [Kind(size=size) for size in world.SIZES]
        kinds += [Kind(colour=c, size=s) for c in world.COLOURS for s in world.SIZES]
        kinds += [Kind(shape=shape, size=s) for shape in world.SHAPES for s in world.SIZES]
    else:
        kinds = [Kind()] * 4 + kinds
    for kind in kinds:
        for place in places if may_ask(kind, scene, rng) else ():
            number = sum(kind.fits(thing) and (not place or SIDES[place](thing)) for thing in scene)
            by_number.setdefault(number, []).append((kind, place))
    if rng.random() < 0.1:
        kind, place, number = Kind(), "", len(scene)
    elif rng.random() < 0.1:
        family = rng.choice(["colour", "shape"])
        number = len({getattr(thing, family) for thing in scene})
        # "How many shapes?" asks for the number of things
        words = ["different shapes"] if family == "shape" else ["colours", "colors", "different colours"]
        word = words[0] if voice.plain else rng.choice(words)
        said = f"There {is_are(number)} {COUNTS[number]} {f'different {family}s' if number > 1 else family}."
        return Turn("count", voice.ask("different", properties=word), COUNTS[number], said)
    else:
        number = rng.choices(list(by_number), [(2, 2, 5, 9)[number] for number in by_number])[0]
        kind, place = rng.choice(by_number[number])
    asked = f"{many(kind, voice)} {voice.side(place)}" if place else many(kind, voice)
    said = f"{plain_many(kind, number)} {SIDE_PHRASES[place]}" if place else plain_many(kind, number)
    sentence = f"There {is_are(number)} {COUNTS[number] if number else 'no'} {said}."
    return Turn("count", voice.ask("count", many=asked), COUNTS[number], sentence)


# Whether an existence question names a colour, a shape and a size: the same distribution for both answers
FORMS, FORM_WEIGHTS = [(1, 1, 0), (1, 0, 0), (0, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)], [6, 2, 2, 1, 1, 1]


def absent(scene: world.Scene, rng: random.Random, forms: Sequence[tuple[int, ...]] = FORMS) -> Kind:
    """Something that is not in the scene; often a near miss, of which all but one attribute are."""
    form = rng.choices(forms, FORM_WEIGHTS[: len(forms)])[0]
    while True:
        (colour, shape), size = rng.choice(world.KNOWN), rng.choice(list(world.SIZES))
        near = rng.random()
        if near < 0.4:
            colour = rng.choice(scene).colour
        elif near < 0.8:
            shape = rng.choice(scene).shape
        kind = Kind(colour if form[0] else None, shape if form[1] else None, size if form[2] else None)
        if kind[:2] not in world.HELD_OUT and not any(map(kind.fits, scene)) and may_ask(kind, scene, rng):
            return kind


def shared_kinds(scene: world.Scene) -> list[Kind]:
    """Expressions for two or more things of the scene that share a colour or a shape."""
    kinds = dict.fromkeys(kind for thing in scene for kind in (Kind(thing.colour), Kind(shape=thing.shape)))
    return [kind for kind in kinds if sum(map(kind.fits, scene)) > 1]


def ask_number(scene: world.Scene, voice: Voice) -> Turn | None:
    """Asks whether there are two, or three, of a kind. None if the scene allows no question with the answer chosen."""
    rng = voice.rng
    holds, asked = rng.random() < 0.5, rng.choice([2, 3])
    thing = rng.choice(scene)
    kinds = [Kind(), Kind(colour=thing.colour), Kind(shape=thing.shape), Kind(size=thing.size)]
    numbers = {kind: sum(map(kind.fits, scene)) for kind in kinds}
    fitting = [kind for kind in kinds if (numbers[kind] == asked if holds else numbers[kind] < asked)]
    if not fitting or not kept("number", holds, rng):
        return None
    kind = rng.choice(fitting)
    number = numbers[kind]
    question = voice.ask("number", number=COUNTS[asked], many=many(kind, voice))
    said = f"there {is_are(number)} {COUNTS[number]} {plain_many(kind, number)}."
    return Turn("existence", question, yes_no(holds), f"{'Yes' if holds else 'No'}, {said}")


def ask_existence(scene: world.Scene, voice: Voice, pairs: Sequence[tuple[str, str]] = ()) -> Turn:
    """Asks whether something is there; yes and no are equally likely. With `pairs`, asks for one of these instead."""
    rng = voice.rng
    if not pairs and rng.random() < 0.1 and (turn := ask_number(scene, voice)):
        return turn
    there, place = rng.random() < 0.5, ""
    if pairs:
        kind = Kind(*rng.choice(pairs))
        there = any(map(kind.fits, scene))
    elif rng.random() < 0.15:  # anything on a side, or a thing of the scene on a right or a wrong side
        thing = rng.choice(scene)
        kind = rng.choice([Kind(), Kind(thing.colour), Kind(shape=thing.shape)])
        holding = [side for side in SIDES if any(kind.fits(one) and SIDES[side](one) for one in scene) == there]
        if not holding:
            return ask_existence(scene, voice)
        place = rng.choice(holding)
    elif there:
        thing, form = rng.choice(scene), rng.choices(FORMS, FORM_WEIGHTS)[0]
        kind = Kind(**{name: getattr(thing, name) for name, named in zip(PROPERTIES, form, strict=True) if named})
    else:
        kind = absent(scene, rng)
    asked, where, said = worded(kind, voice), "", ""
    if place:
        where, said = f" {voice.side(place)}", f" {SIDE_PHRASES[place]}"
    question = voice.ask("existence", a=article(asked) + where, many=plural(asked) + where)
    answer = f"Yes, there is {article(str(kind))}{said}." if there else f"No, there is no {kind}{said}."
    return Turn("existence", question, yes_no(there), answer)


def ask_relation(scene: world.Scene, voice: Voice) -> Turn | None:
    """Asks whether one thing is left of, right of, above or below another, or which one is. None for a single thing."""
    if len(scene) < 2:
        return None
    rng = voice.rng
    a, b = rng.sample(scene, 2)
    true = [direction for direction, holds in DIRECTIONS.items() if holds(a, b)]
    second = refer(rng, scene, b, "position")
    if rng.random() < 0.5:
        direction, holds = rng.choice(true), rng.random() < 0.5
        direction = direction if holds else OPPOSITE[direction]
        first = refer(rng, scene, a, "position")
        sentence = f"{'Yes' if holds else 'No'}, the {first} is {'' if holds else 'not '}{direction} the {second}."
        slots = {"first": the(first, voice), "second": the(second, voice), "direction": voice.direction(direction)}
        return Turn("relation", voice.ask("relation", **slots), yes_no(holds), sentence)
    # Keeps "nothing" a rare answer. Two things in the same direction would mean two correct answers.
    ways = {d: [thing for thing in scene if holds(thing, b)] for d, holds in DIRECTIONS.items()}
    full, empty = [d for d in ways if len(ways[d]) == 1], [d for d in ways if not ways[d]]
    direction = rng.choice(empty if empty and (not full or rng.random() < 0.15) else full)
    question = voice.ask("neighbour", second=the(second, voice), direction=voice.direction(direction))
    if not ways[direction]:
        return Turn("relation", question, "nothing", f"Nothing is {direction} the {second}.")
    name = ways[direction][0].name
    return Turn("relation", question, name, f"The {name} is {direction} the {second}.")


def ask_two_steps(scene: world.Scene, voice: Voice) -> Turn | None:
    """Asks for an attribute of "the thing left of the star". None if nothing is alone in any direction of another."""
    rng, ways = voice.rng, []
    for b in scene:
        for direction, applies in DIRECTIONS.items():
            found = [thing for thing in scene if applies(thing, b)]
            ways += [(found[0], direction, b)] if len(found) == 1 else []
    if not ways:
        return None
    thing, direction, b = rng.choice(ways)
    second, family = refer(rng, scene, b, "position"), rng.choice(["colour", "shape", "size"])
    named = f"the {voice.noun(placed=True)} {voice.direction(direction)} {the(second, voice)}"
    value, says = attribute(family, thing)
    if rng.random() < 0.25:
        holds = rng.random() < 0.5
        asked = predicate(family, value if holds else other_value(family, scene, value, rng), voice)
        said = f"{'Yes' if holds else 'No'}, the object {direction} the {second} {says}."
        return Turn("two steps", voice.ask("verify", the=named, value=asked), yes_no(holds), said)
    return Turn("two steps", voice.ask(family, the=named), value, f"The object {direction} the {second} {says}.")


def ask_comparison(scene: world.Scene, voice: Voice) -> Turn | None:
    """Compares two things in size, colour or shape, or asks for the largest or smallest. None for a single thing."""
    if len(scene) < 2:
        return None
    rng = voice.rng
    a, b = rng.sample(scene, 2)
    way = rng.choice(["compare", "which", "alike", "alike", "superlative"])
    large = rng.random() < 0.6
    size = "large" if large else "small"
    answered = "larger" if large else "smaller"
    comparatives = ["bigger", "larger"] if large else ["smaller", "littler", "smaller"]
    if way == "superlative":
        group = rng.choice([Kind()] * 4 + shared_kinds(scene))
        members = [thing for thing in scene if group.fits(thing)]
        found = [thing for thing in members if thing.size == size]
        if len(found) not in (1, len(members)) or (len(found) > 1 and rng.random() < 0.5):
            return ask_comparison(scene, voice)
        words = ["biggest", "largest"] if large else ["smallest", "littlest", "smallest"]
        two = len(members) == 2 and rng.random() < 0.4
        asked = rng.choice(comparatives if two else words)
        if group == Kind():
            question = voice.ask("superlative", superlative=asked)
        else:
            asked_many = ("two " if len(members) == 2 and rng.random() < 0.4 else "") + many(group, voice)
            question = voice.ask("superlative_of", many=asked_many, one=worded(group, voice), superlative=asked)
        if len(found) > 1 and two:
            return Turn("comparison", question, "neither", "They are the same size.")
        if len(found) > 1:
            return Turn("comparison", question, "none", "They are all the same size.")
        return Turn(
            "comparison", question, found[0].name, f"The {found[0].name} is the {answered.removesuffix('r')}st."
        )
    if way == "alike":
        same = rng.random() < 0.5
        family = rng.choice(PROPERTIES)
        pairs = [(x, y) for x in scene for y in scene if x != y and (getattr(x, family) == getattr(y, family)) == same]
        if not pairs or not kept(way, same, rng):
            return ask_comparison(scene, voice)
        a, b = rng.choice(pairs)
        first, second = (refer(rng, scene, thing, family) for thing in (a, b))
        word = family if family != "colour" else rng.choice(["colour", "color"])
        question = voice.ask("alike", first=the(first, voice), second=the(second, voice), property=word)
        said = f"Yes, they have the same {family}." if same else f"No, they have different {family}s."
        return Turn("comparison", question, yes_no(same), said)
    first, second = (refer(rng, scene, thing, "size") for thing in (a, b))
    slots = {"first": the(first, voice), "second": the(second, voice), "comparative": rng.choice(comparatives)}
    if way == "compare":
        holds = a.size == size != b.size
        if not kept(way, holds, rng):
            return ask_comparison(scene, voice)
        said = f"{'Yes' if holds else 'No'}, the {first} is {'' if holds else 'not '}{answered} than the {second}."
        return Turn("comparison", voice.ask("compare", **slots), yes_no(holds), said)
    question = voice.ask("which", **slots)
    if a.size == b.size:
        return Turn("comparison", question, "neither", "They are the same size.")
    winner, named = (a, first) if a.size == size else (b, second)
    return Turn("comparison", question, winner.name, f"The {named} is {answered}.")


def ask_quantity(scene: world.Scene, voice: Voice) -> Turn:
    """Asks whether all, both, none or any of the things have an attribute, or whether they all share one."""
    rng = voice.rng
    way = rng.choice(["all", "all", "both", "none", "any", "same"])
    family = rng.choice(PROPERTIES)
    if way == "same":
        same = len({getattr(thing, family) for thing in scene}) == 1
        if len(scene) == 1 or not kept(way, same, rng):
            return ask_quantity(scene, voice)
        word = family if family != "colour" else rng.choice(["colour", "color"])
        question = voice.ask("same", property=word)
        said = f"Yes, they all have the same {family}." if same else f"No, they have different {family}s."
        return Turn("quantity", question, yes_no(same), said)
    group = Kind()
    if rng.random() < 0.5:  # all the circles
        thing, told = rng.choice(scene), rng.choice([name for name in PROPERTIES if name != family])
        group = Kind(**{told: getattr(thing, told)})
    members = [thing for thing in scene if group.fits(thing)]
    if (len(members) < 2 and way in ("all", "both")) or (len(members) != 2 and way == "both"):
        return ask_quantity(scene, voice)
    value = attribute(family, rng.choice(members))[0]
    value = value if rng.random() < 0.7 else other_value(family, scene, value, rng)
    number = sum(attribute(family, thing)[0] == value for thing in members)
    holds = {"all": number == len(members), "both": number == 2, "none": number == 0, "any": number > 0}[way]
    if not kept(f"whole {way}" if group == Kind() else way, holds, rng):
        return ask_quantity(scene, voice)
    one = several = voice.word(value)
    if family == "shape":
        one, several = article(one), plural(several)
    kind = way
    if group == Kind() and not voice.plain and rng.random() < 0.4:
        kind = f"whole_{way}"
    question = voice.ask(kind, value=one, values=several, many=many(group, voice), one=worded(group, voice))
    says = plural(value) if family == "shape" else value
    some = article(value) if family == "shape" and number == 1 else says
    things = plain_many(group, 2)
    said = {
        ("all", True): f"Yes, all {things} are {says}.",
        ("all", False): f"No, not all {things} are {says}.",
        ("both", True): f"Yes, both {things} are {says}.",
        ("both", False): f"No, not both {things} are {says}.",
        ("none", True): f"Yes, no {things} are {says}.",
        ("none", False): f"No, {COUNTS[number]} of the {things} {is_are(number)} {some}.",
        ("any", True): f"Yes, {COUNTS[number]} of the {things} {is_are(number)} {some}.",
        ("any", False): f"No, no {things} are {says}.",
    }[way, holds]
    return Turn("quantity", question, yes_no(holds), said)


def ask_list(scene: world.Scene, voice: Voice) -> Turn:
    """Asks for all things, for all colours or shapes, for those with an attribute, or for what else is there."""
    rng, way = voice.rng, voice.rng.choice(["everything", "values", "values", "else", "members"])
    if way == "everything":
        said = listed([article(thing.name) for thing in scene])
        return Turn("list", voice.ask(way), names(scene), f"There is {said}.")
    if way == "values":
        group = rng.choice([Kind()] * 3 + shared_kinds(scene))
        family = "shape" if group.colour else "colour" if group.shape else rng.choice(["colour", "shape"])
        found = list(dict.fromkeys(getattr(thing, family) for thing in scene if group.fits(thing)))
        word = "shapes" if family == "shape" else rng.choice(["colours", "colors"])
        if group != Kind():
            question = voice.ask("values_of", properties=word, many=many(group, voice))
            said = listed([plural(one) if family == "shape" else one for one in found])
            return Turn("list", question, listed(found), f"The {plain_many(group, 2)} are {said}.")
        plain = f"The {family}{'s are' if len(found) > 1 else ' is'} {listed(found)}."
        return Turn("list", voice.ask(way, properties=word), listed(found), plain)
    if way == "else":
        thing = rng.choice(scene)
        kind = refer(rng, scene, thing, "position")
        rest = [other for other in scene if other != thing]
        besides = rng.choice([" besides ", " apart from ", " except ", " beside ", ", besides ", " other than "])
        question = voice.ask(way, besides=besides + the(kind, voice))
        said = f"also {listed([article(other.name) for other in rest])}" if rest else "nothing else"
        return Turn("list", question, names(rest), f"There is {said}.")
    family = rng.choice(PROPERTIES)
    value = attribute(family, rng.choice(scene))[0]
    value = value if rng.random() < 0.85 else other_value(family, scene, value, rng)
    found = [thing for thing in scene if attribute(family, thing)[0] == value]
    asked = plural(voice.word(value)) if family == "shape" else voice.word(value)
    named: dict[str, Any] = {family: value}
    asks = voice.ask(way, value=asked, many=many(Kind(**named), voice))
    said = listed([f"the {thing.name}" for thing in found]) if found else "nothing"
    plain = f"{said[0].upper()}{said[1:]} {is_are(max(1, len(found)))} "
    says = value if family != "shape" else plural(value) if len(found) > 1 else article(value)
    return Turn("list", asks, names(found), f"{plain}{says}.")


def ask_caption(scene: world.Scene, voice: Voice) -> Turn:
    """Asks for a description of the picture."""
    return Turn("caption", voice.ask("caption"), names(scene), caption(scene))


def ask_presupposition(scene: world.Scene, voice: Voice) -> Turn:
    """Asks about a thing that the scene lacks although it could be there."""
    rng = voice.rng
    kind = absent(scene, rng, FORMS[:3])
    told = {"colour": kind.colour, "shape": kind.shape}
    family = rng.choice([name for name in ("colour", "shape", "size", "position") if not told.get(name)])
    named = the(kind, voice)
    if rng.random() < 0.15:
        question = voice.ask("neighbour", second=named, direction=voice.direction(rng.choice(list(DIRECTIONS))))
    elif rng.random() < 0.1:
        question = voice.ask("details", the=named)
    else:
        question = voice.ask(family, the=named)
    return Turn("presupposition", question, "none", f"There is no {kind}.")


def ask_outside(scene: world.Scene, voice: Voice) -> Turn:
    """Asks about what is not of this world at all: things, or anything else people ask."""
    rng, way = voice.rng, voice.rng.choice(["existence", "attribute", "count", "other", "other"])
    noun = rng.choice(NOUNS["held_out" if voice.held_out else "known"])
    thing = the(find_reference(rng, scene, rng.choice(scene)) or Kind(), voice)
    slots = {"a": article(noun), "many": plural(noun), "noun": noun, "the": thing}
    question = voice.ask(f"outside_{way}", **slots)
    if way == "other":
        return Turn("outside", question, "unknown", UNKNOWN)
    short, start = {"existence": ("no", "No, t"), "attribute": ("none", "T"), "count": ("zero", "T")}[way]
    return Turn("outside", question, short, start + ONLY_SHAPES[1:])
