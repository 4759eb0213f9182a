"""Teaches the built-in model two new shapes and a new colour with a LoRA, from 300 pictures drawn on the spot.

    python tiny/adapt.py --folder NEW

1. The small world gains two shapes and a colour: wugs look like arrows, toves like moons, and zeb things are brown. The
   decoder has seen these made-up words in its pretraining (world.py), but no drawn picture has ever shown one. So the
   model knows the words and has to learn what they look like, as a large language model would, which knows far more
   words than its vision tower has seen things. Pictures with conversations are drawn, some of them of the old world
   only, so that the model does not forget it.
2. `train.py --lora 8` trains the adapter NEW/adapter: a LoRA in the tower, the decoder and the head, because training
   on pictures has only made the new words less likely. The built-in model itself stays as it is.
3. Both are asked about unseen scenes with new things, and the questions of make_data.py about the old world. It is one
   model, whose adapter is switched off and on. Answers are short and scored by exact match.
"""

import argparse
import json
import math
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import make_data
import talk
import world
from ask_thing import OTHER_COLOURS
from tqdm import tqdm
from wordings import NOUNS

from evaluate import answer_questions
from extras.adapters import WEIGHTS_FILE, image_processor_of
from extras.benchmarks import read_lines, read_questions
from extras.lora import switch
from extras.lora_training import TARGETS
from extras.scores import exact_match
from extras.terminal import command_line
from llava import LlavaForConditionalGeneration, LlavaProcessor

BASE = ROOT / "tiny" / "model"
SHAPES, COLOUR, TINTS = ["wug", "tove"], "zeb", [(120, 72, 30), (139, 69, 19), (101, 67, 33), (150, 90, 50)]
NEW_WORDS = [*SHAPES, COLOUR]
LOOKS_LIKE = ["arrow", "moon", "crescent", "brown"]  # so nobody asks for these as things that are not in the picture
NEW_PAIRS = [(colour, shape) for colour in world.COLOURS for shape in SHAPES]
NEW_PAIRS += [(COLOUR, shape) for shape in [*world.SHAPES, *SHAPES]]
OLD_SHARE = 0.2  # of the training pictures, which show nothing new
NUMBERS = [2, 3, 3]  # of things in the others: more things, more to learn from each
NEW_WEIGHT = 4  # beyond the first, things are drawn from the known pairs once and from the new pairs 4 times
CONVERSATIONS, TURNS = 18, 6  # about each picture, and questions in each conversation
ASKED = [family for family in talk.FAMILIES if family not in ("facts", "follow-up")]
BATCH = 64  # questions answered at once

old_outline = world.outline


def outline(shape: str, x: float, y: float, radius: float, rng: random.Random) -> list[tuple[float, float]]:
    """The corners of a new shape, or of one that world.py knows."""
    if shape == "wug":
        corners = [(-1, -0.3), (0.1, -0.3), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3)]
    elif shape == "tove":  # a disc without a smaller one to its right; the edges cross at 51 or 77 degrees
        degrees = [51 + 258 * i / 24 for i in range(25)]
        corners = [(math.cos(math.radians(a)), math.sin(math.radians(a))) for a in degrees]
        degrees = [283 - 206 * i / 24 for i in range(25)]
        corners += [(0.45 + 0.8 * math.cos(math.radians(a)), 0.8 * math.sin(math.radians(a))) for a in degrees]
    else:
        return old_outline(shape, x, y, radius, rng)
    return [(x + radius * a, y + radius * b) for a, b in corners]


def extend_world() -> None:
    """Adds the new shapes and the new colour to the small world, for this process."""
    world.outline = outline
    world.SHAPES += SHAPES
    world.COLOURS[COLOUR], world.TINTS[COLOUR] = TINTS[0], TINTS
    OTHER_COLOURS[:] = [colour for colour in OTHER_COLOURS if colour not in LOOKS_LIKE]
    for kind, nouns in NOUNS.items():  # what is not of the world
        NOUNS[kind] = [noun for noun in nouns if not any(word in noun for word in LOOKS_LIKE)]


def make_scene(rng: random.Random, number: int = 0, weight: int = 1) -> world.Scene:
    """A scene of `number` things (0: one to three), at least one of them new.

    The others are drawn from the known pairs once and from the new pairs `weight` times.
    """
    return world.make_scene(rng, number, must=[rng.choice(NEW_PAIRS)], known=world.KNOWN + weight * NEW_PAIRS)


def make_training(folder: Path, pictures: int, seed: int) -> None:
    """Writes pictures with conversations."""
    entries = []
    for i in range(pictures):
        rng = random.Random(f"adapt/{seed}/{i}")
        is_old = rng.random() < OLD_SHARE
        scene = world.make_scene(rng) if is_old else make_scene(rng, rng.choice(NUMBERS), NEW_WEIGHT)
        world.draw(scene, rng).save(folder / make_data.picture_name(i))
        for _ in range(CONVERSATIONS):
            turns = talk.converse(scene, rng, TURNS)
            entries.append(make_data.entry(i, make_data.conversation(turns, rng)))
    (folder / "train.json").write_text(json.dumps(entries))


def make_questions(folder: Path, scenes: int, seed: int) -> None:
    """Writes pictures of unseen scenes, each with a question that names something new, or whose answer does."""
    lines: list[dict] = []
    for i in range(10**6, 10**6 + scenes):
        rng = random.Random(f"adapt/test/{seed}/{i}")
        while True:
            scene = make_scene(rng)
            turn = talk.converse(scene, rng, 1, ASKED)[0]
            if any(word in f"{turn.question} {turn.short}".lower() for word in NEW_WORDS):
                break
        world.draw(scene, rng).save(folder / make_data.picture_name(i))
        line = {"question_id": i, "image": make_data.picture_name(i), "text": turn.question, "answer": turn.short}
        lines.append(line | {"category": f"new: {turn.family}"})
    (folder / "new.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def gather_old_questions(folder: Path) -> None:
    """Writes the short questions of make_data.py's test files, in known wordings, to one file."""
    lines: list[dict] = []
    for family in ASKED:
        for line in read_lines(folder / "old" / f"{family}.jsonl"):
            image = f"old/{line['image']}"
            lines.append(line | {"question_id": len(lines), "image": image, "category": f"old: {family}"})
    (folder / "old.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


Hits = dict[str, list[float]]  # category -> 1 for each right answer, 0 for each wrong one


def score(model: LlavaForConditionalGeneration, processor: LlavaProcessor, questions: list[dict], images: Path) -> Hits:
    """Asks all questions; "old" and "new" are categories, too."""
    hits: Hits = {}
    for start in tqdm(range(0, len(questions), BATCH), unit=" batches", leave=False):
        batch = questions[start : start + BATCH]
        for question, text in zip(batch, answer_questions(model, processor, batch, images), strict=True):
            right = exact_match(text, question["answers"])
            for category in (question["category"], question["category"].partition(":")[0]):
                hits.setdefault(category, []).append(right)
    return hits


def run(*command: object) -> None:
    """Runs a script of this repository; a failure ends this one."""
    line = [sys.executable, *map(str, command)]
    print("adapt.py:", *line[1:], file=sys.stderr)
    if subprocess.run(line).returncode:
        sys.exit("adapt.py: a step failed")


def print_scores(off: Hits, on: Hits) -> None:
    """Prints a table in percent: a line for all questions about the new, one for those about the old, and the rest."""
    print("| questions | number | adapter off | adapter on |\n| --- | --- | --- | --- |")
    for name in sorted(off, key=lambda name: (":" in name, name)):
        shares = (f"{100 * sum(hits[name]) / len(hits[name]):.1f}" for hits in (off, on))
        print(f"| {name} | {len(off[name])} | {' | '.join(shares)} |")


def adapt(args: argparse.Namespace) -> None:
    """The three steps."""
    folder, start = args.folder, time.perf_counter()
    if (folder / "adapter").exists():
        raise ValueError(f"{folder / 'adapter'} already exists: choose another --folder")
    for name in ("pictures", "old/pictures"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    extend_world()
    make_training(folder, args.pictures, args.seed)
    make_questions(folder, args.scenes, args.seed)
    run(ROOT / "tiny" / "make_data.py", "test", "--output", folder / "old", "--scenes", args.old_scenes, "--seed", 1)
    gather_old_questions(folder)
    prepared = time.perf_counter()
    command = [ROOT / "train.py", "--stage", "instruct", "--model", BASE, "--output", folder / "adapter"]
    command += ["--data", folder / "train.json", "--images", folder, "--system", "", "--device", "cpu"]
    command += ["--lora", args.rank, "--lora-dropout", 0, "--learning-rate", args.learning_rate, "--seed", args.seed]
    command += ["--projector-learning-rate", args.projector_learning_rate, "--epochs", args.epochs, "--lora-vision"]
    run(*command, "--lora-targets", *TARGETS, "lm_head", "--batch", 16, "--micro-batch", 8)
    trained = time.perf_counter()

    model = LlavaForConditionalGeneration.from_pretrained(BASE, adapter=folder / "adapter").eval()
    processor = LlavaProcessor.from_pretrained(BASE)
    processor.image_processor = image_processor_of(folder / "adapter") or processor.image_processor
    questions = [q for name in ("new", "old") for q in read_questions(folder / f"{name}.jsonl", "exact", True)[2]]
    switch(model, False)
    before = score(model, processor, questions, folder)
    switch(model, True)
    after = score(model, processor, questions, folder)
    print_scores(before, after)
    size = (folder / "adapter" / WEIGHTS_FILE).stat().st_size
    minutes = [f"{(end - begin) / 60:.1f}" for begin, end in ((start, prepared), (prepared, trained))]
    print(f"\nadapter {size / 1000:.0f} kB; drawing {minutes[0]} minutes, training {minutes[1]} minutes")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="adapt.py", description="Teaches the built-in model new things with a LoRA.")
    add = parser.add_argument
    add("--folder", required=True, type=Path, help="folder for pictures, data and the adapter")
    add("--pictures", type=int, default=300, help="to learn from (default: %(default)s)")
    add(
        "--scenes", type=int, default=1000, help="unseen scenes with new things, a question each (default: %(default)s)"
    )
    add("--old-scenes", type=int, default=100, help="scenes of the old world (default: %(default)s)")
    add("--rank", type=int, default=8, help="of the LoRA (default: %(default)s)")
    add("--epochs", type=int, default=2, help="passes over the data (default: %(default)s)")
    add("--learning-rate", type=float, default=4e-3, help="of the LoRA (default: %(default)s)")
    add("--projector-learning-rate", type=float, default=5e-4, help="of the projector (default: %(default)s)")
    add("--seed", type=int, default=0, help="of pictures, questions and training (default: %(default)s)")
    args = parser.parse_args()
    if min(args.pictures, args.scenes, args.old_scenes, args.epochs, args.rank) < 1:
        parser.error("all numbers must be 1 or more")
    command_line("adapt.py", lambda: adapt(args))


if __name__ == "__main__":
    main()
