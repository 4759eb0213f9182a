"""Writes the small world to files: pictures and conversations for train.py, pictures and questions for evaluate.py.

    python tiny/make_data.py train --output FOLDER --scenes 32000
    python tiny/make_data.py test  --output FOLDER --scenes 800

FOLDER/pictures/000000.png ...   96 x 96 pixels

"train" also writes, in LLaVA's format:
FOLDER/conversations.json        a conversation about each scene (stage instruct)

"test" also writes, each with another file NAME-sentence.jsonl whose answers are sentences:
FOLDER/FAMILY.jsonl              a question about each picture, with its answer in one word or phrase
FOLDER/FAMILY-held-out.jsonl     the same in constructions that training never uses
FOLDER/typos.jsonl               questions of all families, each with one typo
FOLDER/unseen.jsonl              about things whose combination of colour and shape is held out from training
FOLDER/like.jsonl                how many there are of two or three things of a shape or colour, often beside another
FOLDER/CONDITION.jsonl           about pictures disturbed in one way: outlines, noise, ...

The last files are FOLDER/visitors.jsonl and FOLDER/visitors later.jsonl, without sentences: the hand-written questions
of tests/visitors.json and of tests/visitors_later.json.

The scenes of "train" and "test", and those of different seeds, are generated independently.
"""

import argparse
import json
import random
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import talk
import world
from ask_scene import ask_existence
from ask_thing import ask_attribute, attribute, kind_of
from phrases import ATTRIBUTES, COUNTS, Turn
from wordings import Voice

from extras.files import read_json, write_atomically
from tokenizer import SHORT_ANSWER

TURNS = 7  # per conversation, approximately
# Asked twice as often as in pretraining
MORE = ["list", "relation", "choice", "follow-up", "outside", "presupposition"]
# Of 20 training scenes, three have shapes of any colour, and one has colours without a shape
ALONE = {0: world.COLOURS_ALONE, **dict.fromkeys([5, 10, 15], world.SHAPES_ALONE)}
TESTS = Path(__file__).parents[1] / "tests"
VISITORS = {"visitors": TESTS / "visitors.json", "visitors later": TESTS / "visitors_later.json"}


def picture_name(index: int) -> str:
    """The path of a picture within the folder."""
    return f"pictures/{index:06}.png"


def entry(index: int, turns: list[tuple[str, str]]) -> dict:
    """A conversation about a picture, in the format of LLaVA's data files."""
    messages = [
        {"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)
    ]
    messages[0]["value"] = f"<image>\n{messages[0]['value']}"
    return {"id": f"{index:06}", "image": picture_name(index), "conversations": messages}


def conversation(turns: list[Turn], rng: random.Random) -> list[tuple[str, str]]:
    """Questions and answers. Either all answers are short or all are sentences.

    As in LLaVA-1.5's own data mixture, the request for short answers is part of the first question and holds for the
    whole conversation. Here some later questions repeat it.
    """
    short = rng.random() < 0.5
    pairs: list[tuple[str, str]] = []
    for turn in turns:
        request = SHORT_ANSWER if short and (not pairs or rng.random() < 0.1) else ""
        pairs.append((turn.question + request, turn.short if short else turn.sentence))
    return pairs


def draw(scene: world.Scene, rng: random.Random, target: Path, look: world.Look | None = None) -> None:
    """Saves the picture of a scene; without a look, a random one."""
    world.draw(scene, rng, look or world.random_look(rng)).save(target)


def make_training(folder: Path, scenes: int, seed: int) -> None:
    """Writes pictures and conversations."""
    conversations = []
    for i in range(scenes):
        rng = random.Random(f"train/{seed}/{i}")
        known = ALONE.get(i % 20)
        scene = world.make_scene(rng, known=known) if known else talk.make_scene(rng)
        draw(scene, rng, folder / picture_name(i))
        turns = talk.converse(scene, rng, TURNS, None if known else [*talk.FAMILIES, *MORE])
        conversations.append(entry(i, conversation(turns, rng)))
    write_atomically(folder / "conversations.json", partial(Path.write_text, data=json.dumps(conversations)))


def guess(turn: Turn, scene: world.Scene, rng: random.Random) -> str:
    """The answer of a guesser who picks a random thing of the scene to answer about, or guesses yes, no or a count."""
    thing = rng.choice(scene)
    if turn.short in ("yes", "no"):
        return rng.choice(["yes", "no"])
    if turn.short in COUNTS:
        return COUNTS[rng.randint(1, len(scene))]
    values = {family: attribute(family, thing)[0] for family in ATTRIBUTES}
    if turn.family == "side":
        return rng.choice([world.ROWS[thing.row], world.COLUMNS[thing.column]])
    if turn.short in [value for one in scene for value in (*one[:3], world.CELLS[one.cell])]:
        return values[kind_of(turn.short)]
    return rng.choice(list(values.values())) if turn.short in ("none", "unknown") else thing.name


class Questions:
    """Collects the lines of the test files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: dict[str, list[str]] = {}

    def add(self, name: str, index: int, scene: world.Scene, rng: random.Random, turns: list[Turn]) -> None:
        """Notes the last turn, with the one before as its history, in both forms."""
        turn, answer = turns[-1], guess(turns[-1], scene, rng)
        for form, suffix in [("short", ""), ("sentence", "-sentence")]:
            line = {
                "question_id": index,
                "image": picture_name(index),
                "text": turn.question,
                "answer": getattr(turn, form),
                "category": turn.family,
                "guess": answer if form == "short" else None,
            }
            if turns[1:]:
                request = SHORT_ANSWER if form == "short" else ""
                line["history"] = [[turns[0].question + request, getattr(turns[0], form)]]
            self.lines.setdefault(name + suffix, []).append(json.dumps(line))

    def write(self) -> None:
        """Writes all files."""
        for name, rows in self.lines.items():
            (self.folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")


def ask_any(scene: world.Scene, voice: Voice) -> list[Turn]:
    """A turn of a random family."""
    while True:
        family = voice.rng.choice([family for family in talk.FAMILIES if family not in ("facts", "follow-up")])
        if turns := talk.ask(family, scene, voice):
            return turns


def count_like(scene: world.Scene, voice: Voice) -> Turn:
    """Asks for the number of the things that are alike."""
    while True:
        turn = talk.ask("count", scene, voice)[0]
        if turn.short in ("two", "three") and any(word in turn.sentence for word in [*world.COLOURS, *world.SHAPES]):
            return turn


def make_test(folder: Path, scenes: int, seed: int) -> None:
    """Writes pictures and questions.

    Each line also has the answer of a guesser who knows the family and sees the right scene, but does not know which
    of its things the question is about.
    """
    questions = Questions(folder)
    for i in range(scenes):
        rng = random.Random(f"test/{seed}/{i}")
        scene = world.make_scene(rng)
        draw(scene, rng, folder / picture_name(i), world.PLAIN_LOOK)
        for family in [family for family in talk.FAMILIES if family != "facts"]:  # facts have many correct answers
            for held_out in (False, True):
                if turns := talk.ask(family, scene, Voice(rng, held_out, typos=0.0)):
                    questions.add(f"{family}-held-out" if held_out else family, i, scene, rng, turns)
        questions.add("typos", i, scene, rng, ask_any(scene, Voice(rng, typos=1.0)))
    special = [("unseen", world.PLAIN_LOOK), ("like", world.PLAIN_LOOK), *world.CONDITIONS.items()]
    for number, (name, look) in enumerate(special, start=1):
        for i in range(number * 10**5, number * 10**5 + scenes):
            rng = random.Random(f"test/{seed}/{i}")
            voice = Voice(rng, typos=0.0)
            if name == "unseen":
                scene = world.make_scene(rng, must=[rng.choice(world.HELD_OUT)])
                thing = next(thing for thing in scene if (thing.colour, thing.shape) in world.HELD_OUT)
                family = rng.choice([*ATTRIBUTES, "existence"])
                if family == "existence":
                    turn = ask_existence(scene, voice, world.HELD_OUT)
                else:
                    turn = ask_attribute(family, scene, thing, voice)
            else:
                scene = world.make_like(rng) if name == "like" else world.make_scene(rng)
                turn = count_like(scene, voice) if name == "like" else ask_any(scene, voice)[-1]
            draw(scene, rng, folder / picture_name(i), look)
            questions.add(name, i, scene, rng, [turn])
    questions.write()
    for name, file in VISITORS.items():
        make_visitors(folder, name, read_json(file))


def make_visitors(folder: Path, name: str, visitors: dict) -> None:
    """Writes the pictures and questions of visitors, with all the answers that are right."""
    scenes = []
    for i, things in enumerate(visitors["scenes"]):
        scene = [world.Thing(colour, shape, size, world.CELLS.index(cell)) for size, colour, shape, cell in things]
        scenes.append(scene)
        draw(tuple(scene), random.Random(f"{name}/{i}"), folder / f"pictures/{name}-{i:02}.png", world.PLAIN_LOOK)
    lines = [
        {
            "question_id": i,
            "image": f"pictures/{name}-{question['scene']:02}.png",
            "text": question["question"],
            "answers": question["answers"],
            "category": question["kind"],
        }
        for i, question in enumerate(visitors["questions"])
    ]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="make_data.py", description="Writes the small world to files.")
    add = parser.add_argument
    add("what", choices=["train", "test"], help="what to write: training data or test questions")
    add("--output", required=True, type=Path, help="folder for pictures and texts")
    add(
        "--scenes",
        type=int,
        required=True,
        help="number of scenes; test draws as many for each file",
    )
    add("--seed", type=int, default=0, help="seed of the scenes (default 0)")
    args = parser.parse_args()
    (args.output / "pictures").mkdir(parents=True, exist_ok=True)
    if args.what == "train":
        make_training(args.output, args.scenes, args.seed)
    else:
        make_test(args.output, args.scenes, args.seed)


if __name__ == "__main__":
    main()
