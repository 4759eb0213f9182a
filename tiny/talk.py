"""Questions about the small world's scenes (world.py) with their answers, and whole conversations.

    ask, converse: Scene -> questions about it, each with its answer in short form and as a sentence

ask_thing.py, ask_scene.py and ask_exercise.py decide what is asked and which answer is right; wordings.py decides how
it is asked. The wording of a question does not reveal its answer: yes and no are about equally frequent among questions
of the same form, and what a question names but the scene lacks could have been in it.
"""

import random
from collections.abc import Callable, Sequence

import ask_exercise
import ask_scene
import ask_thing
import world
from phrases import ATTRIBUTES, Turn
from wordings import SYNONYMS, Voice

ASKS: dict[str, Callable[[world.Scene, Voice], Turn | None]] = {
    "side": ask_thing.ask_side,
    "naming": ask_thing.ask_naming,
    "verify": ask_thing.ask_verify,
    "choice": ask_thing.ask_choice,
    "details": ask_thing.ask_details,
    "facts": ask_exercise.ask_exercise,
    "count": ask_scene.ask_count,
    "existence": ask_scene.ask_existence,
    "relation": ask_scene.ask_relation,
    "two steps": ask_scene.ask_two_steps,
    "comparison": ask_scene.ask_comparison,
    "quantity": ask_scene.ask_quantity,
    "list": ask_scene.ask_list,
    "caption": ask_scene.ask_caption,
    "presupposition": ask_scene.ask_presupposition,
    "outside": ask_scene.ask_outside,
}
FAMILIES = [*ATTRIBUTES, *ASKS, "follow-up"]
# How often a family is asked in conversations; the others: 1. Captions have many words; counting takes long to learn.
WEIGHTS = {
    **dict.fromkeys(["caption", "details"], 0.4),
    **dict.fromkeys([*ATTRIBUTES, "side", "presupposition"], 0.6),
    **dict.fromkeys(["verify", "outside", "follow-up"], 1.4),
    **dict.fromkeys(["relation", "existence"], 1.8),
    **dict.fromkeys(["comparison", "quantity", "list"], 2.5),
    "count": 3.0,
}
LIKE = 0.4  # the share of training scenes with things that are alike
# If the colours of things have no name (world.SHAPES_ALONE), or the shapes (COLOURS_ALONE), conversations mention none.
# They use the families whose answers stay balanced then.
FAMILIES_ALONE = [*ATTRIBUTES, "side", "verify", "choice", "existence", "two steps", "presupposition", "follow-up"]
UNMENTIONED = {
    "some": ["some", "colour", "color", *world.COLOURS, *ask_thing.OTHER_COLOURS],
    "blob": ["blob", "shape", "form", "geometric", *world.SHAPES],
}
for words in UNMENTIONED.values():
    words += [synonym for word in words for synonym in SYNONYMS.get(word, [])]


def make_scene(rng: random.Random) -> world.Scene:
    """A scene to talk about in training."""
    return world.make_like(rng) if rng.random() < LIKE else world.make_scene(rng)


def ask(family: str, scene: world.Scene, voice: Voice) -> list[Turn]:
    """One turn of a family, or for "follow-up" two turns. No turn if the scene allows no such question."""
    if family == "follow-up":
        return list(ask_thing.ask_followup(scene, voice))
    if family in ATTRIBUTES:
        return [ask_thing.ask_attribute(family, scene, voice.rng.choice(scene), voice)]
    turn = ASKS[family](scene, voice)
    return [turn] if turn else []


def converse(
    scene: world.Scene, rng: random.Random, number: int, families: Sequence[str] | None = None, plain: bool = False
) -> list[Turn]:
    """A conversation of about `number` turns, in plain wordings or in all known ones.

    It mentions no colours, or no shapes, if those of the things have no name; and has no typos, which might hide one.
    """
    never = [word for name in scene[0][:2] for word in UNMENTIONED.get(name, [])]
    families = families or (FAMILIES_ALONE if never else FAMILIES)
    weights = [WEIGHTS.get(family, 1) for family in families]
    voice = Voice(rng, plain=plain, typos=0.0) if never else Voice(rng, plain=plain)
    turns: list[Turn] = []
    while len(turns) < number:
        asked = [turn.question for turn in turns]
        new = ask(rng.choices(families, weights)[0], scene, voice)  # for a follow-up, two turns
        mentioned = any(word in text.lower() for word in never for turn in new for text in turn)
        turns += [] if mentioned or any(turn.question in asked for turn in new) else new
    return turns
