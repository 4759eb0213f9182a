"""Writes the small world as files: pictures and conversations for train.py, pictures and questions for evaluate.py.

    python tiny/make_data.py train --output FOLDER --scenes 72000
    python tiny/make_data.py test  --output FOLDER --scenes 2400

FOLDER/pictures/000000.png ...   96 x 96 pixels
FOLDER/captions.json             LLaVA's format: a caption for the first tenth of the scenes (stage align)
FOLDER/words.json, facts.json    facts in words, and in sentences, about half as many scenes of their own (stage
                                 instruct, to learn to look things up)
FOLDER/conversations.json        three conversations about each of the scenes (stage instruct)
FOLDER/FAMILY.jsonl              for test: a question about each picture, its answer in one word or phrase
FOLDER/FAMILY-sentence.jsonl     the same questions, answered in sentences
FOLDER/unseen*.jsonl             questions about things whose combination of colour and shape no training has shown

Scenes of "train" and "test", and of every seed, are drawn independently.
"""

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import world

from load import write_whole
from tokenizer import SHORT_ANSWER

TURNS = 6  # of a conversation, about
WORDS = 10**6  # number of the first scene of words.json and facts.json


def picture_name(index: int) -> str:
    """Where a picture lies in the folder."""
    return f"pictures/{index:06}.png"


def entry(index: int, turns: list[tuple[str, str]]) -> dict:
    """A conversation about a picture, as LLaVA's data files have it."""
    said = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]
    said[0]["value"] = f"<image>\n{said[0]['value']}"
    return {"id": f"{index:06}", "image": picture_name(index), "conversations": said}


def conversation(turns: list[world.Turn], rng: random.Random) -> list[tuple[str, str]]:
    """Questions and answers, all short or all in sentences.

    As in LLaVA-1.5's own mixture, the wish for short answers stands in the first question and holds from there on;
    here now and then in a later one, too.
    """
    short, said = rng.random() < 0.5, []
    for turn in turns:
        wish = SHORT_ANSWER if short and (not said or rng.random() < 0.1) else ""
        said.append((turn.question + wish, turn.short if short else turn.sentence))
    return said


def make_training(folder: Path, scenes: int, seed: int) -> None:
    """Writes pictures and what is said about them."""
    said: dict[str, list[dict]] = {name: [] for name in ("captions", "words", "facts", "conversations")}
    for i in range(scenes):
        rng = random.Random(f"train/{seed}/{i}")
        scene = world.make_scene(rng)
        world.draw(scene, rng).save(folder / picture_name(i))
        said["captions"] += [entry(i, [("", world.caption(scene))])] if i < scenes // 10 else []
        said["conversations"] += [entry(i, conversation(world.converse(scene, rng, TURNS), rng)) for _ in range(3)]
    for i in range(WORDS, WORDS + scenes // 2):  # three things unlike in all: guessing does not pay
        rng = random.Random(f"train/{seed}/words/{i}")
        scene = world.make_scene(rng, 3, distinct=True)
        world.draw(scene, rng).save(folder / picture_name(i))
        words, facts = world.ask_facts(scene, rng, 12), world.ask_facts(scene, rng, 10)
        said["words"].append(entry(i, [(words.question, words.short)]))
        said["facts"].append(entry(i, [(facts.question, facts.sentence)]))
    for name, entries in said.items():
        write_whole(folder / f"{name}.json", lambda part, entries=entries: part.write_text(json.dumps(entries)))


def guess(turn: world.Turn, scene: world.Scene, rng: random.Random) -> str:
    """What somebody answers who says what was asked of any of the scene's things, or guesses yes, no or how many."""
    thing = rng.choice(scene)
    if turn.short in ("yes", "no"):
        return rng.choice(["yes", "no"])
    if turn.family == "count":
        return world.COUNTS[rng.randint(1, len(scene))]
    if turn.family in ("relation", "details", "caption"):
        return thing.name
    values = {family: world.attribute(family, thing)[0] for family in world.ATTRIBUTES}
    return rng.choice(list(values.values())) if turn.short == "none" else values[world.kind(turn.short)]


def make_test(folder: Path, scenes: int, seed: int) -> None:
    """Writes pictures and a question about each of them for every family; then those with unseen combinations.

    Each line also has the answer of a guesser, who knows the family and sees the right scene, but not which of its
    things is meant.
    """
    lines: dict[str, list[str]] = {}

    def note(name: str, index: int, guess: str, turn: world.Turn, before: world.Turn | None = None) -> None:
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
            family = rng.choice([*world.ATTRIBUTES, "existence"])
            if family == "existence":
                turn = world.ask_existence(scene, rng, world.HELD_OUT)
            else:
                turn = world.ask_attribute(family, scene, thing, rng)
            note("unseen", i, guess(turn, scene, rng), turn)
            continue
        for family in [family for family in world.FAMILIES if family != "facts"]:  # those have many right answers
            if turns := world.ask(family, scene, rng):
                note(family, i, guess(turns[-1], scene, rng), *turns[::-1])
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="make_data.py", description="Writes the small world as files.")
    add = parser.add_argument
    add("what", choices=["train", "test"])
    add("--output", required=True, type=Path)
    add("--scenes", type=int, required=True)
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    (args.output / "pictures").mkdir(parents=True, exist_ok=True)
    if args.what == "train":
        make_training(args.output, args.scenes, args.seed)
    else:
        make_test(args.output, args.scenes, args.seed)


if __name__ == "__main__":
    main()
