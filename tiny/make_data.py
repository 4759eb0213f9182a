"""Writes the small world to files: pictures and conversations for train.py, pictures and questions for evaluate.py.

    python tiny/make_data.py train --output FOLDER --scenes 72000
    python tiny/make_data.py test  --output FOLDER --scenes 2400

FOLDER/pictures/000000.png ...   96 x 96 pixels

"train" also writes, in LLaVA's format:
FOLDER/captions.json             a caption for each of the first tenth of the scenes (stage align)
FOLDER/words.json, facts.json    facts in words, and in sentences, about additional scenes, half as many (stage
                                 instruct: teaches the model to look things up)
FOLDER/conversations.json        three conversations about each scene (stage instruct)

"test" also writes:
FOLDER/FAMILY.jsonl              a question about each picture, with its answer in one word or phrase
FOLDER/FAMILY-sentence.jsonl     the same questions, with their answers as sentences
FOLDER/unseen*.jsonl             questions about things whose combination of colour and shape is held out from training

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

from extras.files import write_atomically
from tokenizer import SHORT_ANSWER

TURNS = 6  # per conversation, approximately
WORDS = 10**6  # index of the first scene of words.json and facts.json


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


def conversation(turns: list[talk.Turn], rng: random.Random) -> list[tuple[str, str]]:
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


def make_training(folder: Path, scenes: int, seed: int) -> None:
    """Writes pictures, captions, facts and conversations."""
    files: dict[str, list[dict]] = {name: [] for name in ("captions", "words", "facts", "conversations")}
    for i in range(scenes):
        rng = random.Random(f"train/{seed}/{i}")
        scene = world.make_scene(rng)
        world.draw(scene, rng).save(folder / picture_name(i))
        files["captions"] += [entry(i, [("", talk.caption(scene))])] if i < scenes // 10 else []
        files["conversations"] += [entry(i, conversation(talk.converse(scene, rng, TURNS), rng)) for _ in range(3)]
    for i in range(WORDS, WORDS + scenes // 2):  # three things with nothing in common, so that guessing fails
        rng = random.Random(f"train/{seed}/words/{i}")
        scene = world.make_scene(rng, 3, distinct=True)
        world.draw(scene, rng).save(folder / picture_name(i))
        words, facts = talk.ask_facts(scene, rng, 12), talk.ask_facts(scene, rng, 10)
        files["words"].append(entry(i, [(words.question, words.short)]))
        files["facts"].append(entry(i, [(facts.question, facts.sentence)]))
    for name, entries in files.items():
        write_atomically(folder / f"{name}.json", partial(Path.write_text, data=json.dumps(entries)))


def guess(turn: talk.Turn, scene: world.Scene, rng: random.Random) -> str:
    """The answer of a guesser who picks a random thing of the scene to answer about, or guesses yes, no or a count."""
    thing = rng.choice(scene)
    if turn.short in ("yes", "no"):
        return rng.choice(["yes", "no"])
    if turn.family == "count":
        return talk.COUNTS[rng.randint(1, len(scene))]
    if turn.family in ("relation", "details", "caption"):
        return thing.name
    values = {family: talk.attribute(family, thing)[0] for family in talk.ATTRIBUTES}
    return rng.choice(list(values.values())) if turn.short == "none" else values[talk.kind(turn.short)]


def make_test(folder: Path, scenes: int, seed: int) -> None:
    """Writes pictures, each with a question of every family; then pictures with held-out combinations.

    Each line also has the answer of a guesser who knows the family and sees the right scene, but does not know which
    of its things the question is about.
    """
    lines: dict[str, list[str]] = {}

    def note(name: str, index: int, guess: str, turn: talk.Turn, before: talk.Turn | None = None) -> None:
        for form, suffix in [("short", ""), ("sentence", "-sentence")]:
            line = {
                "question_id": index,
                "image": picture_name(index),
                "text": turn.question,
                "answer": getattr(turn, form),
                "category": turn.family,
                "guess": guess if form == "short" else None,
            }
            if before:
                line["history"] = [[before.question + (SHORT_ANSWER if form == "short" else ""), getattr(before, form)]]
            lines.setdefault(name + suffix, []).append(json.dumps(line))

    for i in range(2 * scenes):
        rng = random.Random(f"test/{seed}/{i}")
        unseen = i >= scenes
        scene = world.make_scene(rng, must=[rng.choice(world.HELD_OUT)] if unseen else [])
        world.draw(scene, rng).save(folder / picture_name(i))
        if unseen:
            thing = next(thing for thing in scene if (thing.colour, thing.shape) in world.HELD_OUT)
            family = rng.choice([*talk.ATTRIBUTES, "existence"])
            if family == "existence":
                turn = talk.ask_existence(scene, rng, world.HELD_OUT)
            else:
                turn = talk.ask_attribute(family, scene, thing, rng)
            note("unseen", i, guess(turn, scene, rng), turn)
            continue
        for family in [family for family in talk.FAMILIES if family != "facts"]:  # facts have many correct answers
            if turns := talk.ask(family, scene, rng):
                note(family, i, guess(turns[-1], scene, rng), *turns[::-1])
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")


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
        help="number of scenes; train adds half as many, for facts, and test as many, with held-out combinations",
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
