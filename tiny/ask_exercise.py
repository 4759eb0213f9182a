"""Training exercises: lists of facts and of numbers, the skills that other questions rely on. No user asks for them."""

import world
from ask_scene import PROPERTIES, plain_many, shared_kinds
from ask_thing import attribute
from phrases import COUNTS, SIDE_PHRASES, SIDES, Kind, Turn, is_are, may_ask
from wordings import Voice


def ask_facts(scene: world.Scene, voice: Voice, number: int = 4) -> Turn:
    """Asks for facts about single things: "circle red, green top left", or "The circle is red. The green object ...".

    In each fact the value directly follows the attribute that identifies the thing, which makes this the easiest way to
    learn to look things up. Without it, the model takes very long to learn that from the other questions.
    """
    rng, words, sentences = voice.rng, [], []
    for _ in range(number):
        thing = rng.choice(scene)
        first = rng.choice(["colour", "shape"])  # looking up a position is learned without this exercise
        second = rng.choice([name for name in ("colour", "shape", "position") if name != first] * 2 + ["size"])
        kind = Kind(**{first: getattr(thing, first)})
        if sum(map(kind.fits, scene)) == 1:
            value, says = attribute(second, thing)
            words.append(f"{getattr(thing, first)} {value}")
            sentences.append(f"The {kind} {says}.")
    if not words:
        return ask_facts(scene, voice, number)
    return Turn("facts", "List some facts.", ", ".join(words), " ".join(sentences))


def ask_numbers(scene: world.Scene, voice: Voice, number: int = 6) -> Turn:
    """Asks for numbers of things and of different values: "red two, star zero, different shapes one".

    Each number directly follows what it counts: the easiest way to learn counting, on which "all", "any", "both" and
    "the same" rely as well.
    """
    rng, words, sentences = voice.rng, [], []
    kinds = [Kind(colour=colour) for colour in world.COLOURS] + [Kind(shape=shape) for shape in world.SHAPES]
    kinds += [Kind(size=size) for size in world.SIZES] + [Kind(thing.colour, size=thing.size) for thing in scene]
    kinds += [Kind(shape=thing.shape, size=thing.size) for thing in scene] + [Kind(side=side) for side in SIDES]
    kinds = [kind for kind in kinds if may_ask(kind, scene, rng)]
    alike = shared_kinds(scene)  # the hardest to count, and rare among all kinds
    weights = [16 if kind in alike else (1, 2, 4, 8)[sum(map(kind.fits, scene))] for kind in kinds]
    for kind in rng.choices(kinds, weights, k=number):
        if rng.random() < 0.25:
            family = rng.choice(PROPERTIES)
            found = len({getattr(thing, family) for thing in scene})
            word, said = f"different {family}s", f"different {family}s" if found > 1 else family
        else:
            found = sum(map(kind.fits, scene))
            word = kind.side or " ".join(value for value in (kind.size, kind.colour, kind.shape) if value)
            said = f"object {SIDE_PHRASES[kind.side]}" if kind.side else str(kind)
            said = plain_many(kind, found) if not kind.side else said.replace("object", "object" + "s" * (found != 1))
        if f"{word} {COUNTS[found]}" not in words:
            words.append(f"{word} {COUNTS[found]}")
            sentences.append(f"There {is_are(found)} {COUNTS[found] if found else 'no'} {said}.")
    return Turn("facts", "List some numbers.", ", ".join(words), " ".join(sentences))


def ask_exercise(scene: world.Scene, voice: Voice) -> Turn:
    """Asks for facts or for numbers."""
    return (ask_facts if voice.rng.random() < 0.4 else ask_numbers)(scene, voice)
