"""The built-in model and its small world: unbiased data, and answers that depend on the picture."""

import collections
import itertools
import json
import random
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import make_data
import pretrain
import pytest
import score
import talk
import torch
import world
from PIL import Image

import evaluate
from extras.benchmarks import read_lines
from llava import LlavaForConditionalGeneration, LlavaProcessor
from tokenizer import SHORT_ANSWER, LlamaTokenizer

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "tiny" / "model"


# The data


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """A folder of training data for a few scenes, written by make_data.py."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "pictures").mkdir()
    make_data.make_training(folder, scenes=300, seed=0)
    return folder


def scenes(number, split):
    for i in range(number):
        rng = random.Random(f"{split}/{i}")
        yield world.make_scene(rng), rng


def test_same_seed_gives_same_data(training, tmp_path):
    (tmp_path / "pictures").mkdir()
    make_data.make_training(tmp_path, scenes=20, seed=0)
    for picture in (tmp_path / "pictures").iterdir():
        assert picture.read_bytes() == (training / "pictures" / picture.name).read_bytes()
    for name in ("captions", "words", "facts", "conversations"):
        first = json.loads((tmp_path / f"{name}.json").read_text())
        assert first and first == json.loads((training / f"{name}.json").read_text())[: len(first)]


def test_different_seed_gives_different_data(training, tmp_path):
    (tmp_path / "pictures").mkdir()
    make_data.make_training(tmp_path, scenes=20, seed=1)
    name = make_data.picture_name(0)
    assert (tmp_path / name).read_bytes() != (training / name).read_bytes()


def test_training_data_contains_no_held_out_combination(training):
    pieces = [piece for file in training.glob("*.json") for piece in file.read_text().split('"')]
    for colour, shape in world.HELD_OUT:
        assert not [piece for piece in pieces if f"{colour} {shape}" in piece]
    drawn = {(thing.colour, thing.shape) for scene, _ in scenes(2000, "train/0") for thing in scene}
    assert drawn == set(world.KNOWN)  # all other combinations do occur


def test_near_twin_differs_but_keeps_the_colours_and_has_no_held_out_combination():
    for scene, rng in scenes(300, "twins"):
        twin = world.make_twin(scene, rng)
        assert twin != scene
        assert sorted(thing.colour for thing in twin) == sorted(thing.colour for thing in scene)
        assert not {(thing.colour, thing.shape) for thing in twin} & set(world.HELD_OUT)


@pytest.mark.parametrize(
    ("family", "answers", "most"),
    [
        ("colour", list(world.COLOURS), 0.22),
        ("shape", world.SHAPES, 0.26),
        ("size", list(world.SIZES), 0.54),
        ("position", world.CELLS, 0.15),
        ("count", talk.COUNTS, 0.33),
        ("existence", ["yes", "no"], 0.53),
    ],
)
def test_answers_are_balanced(family, answers, most):
    counts = collections.Counter(talk.ask(family, scene, rng)[0].short for scene, rng in scenes(3000, "balance"))
    assert set(counts) == set(answers)
    assert max(counts.values()) / 3000 < most


@pytest.mark.parametrize("form", talk.FORMS)
def test_existence_questions_of_every_form_are_balanced(form):
    counts = collections.Counter()
    for scene, rng in scenes(6000, "existence"):
        [turn] = talk.ask("existence", scene, rng)
        words = turn.question.strip("?").split()
        if form == (bool(set(words) & set(world.COLOURS)), bool(set(words) & set(world.SHAPES))):
            counts[turn.short] += 1
    assert abs(counts["yes"] / counts.total() - 0.5) < 0.05


def test_followup_directly_follows_its_opening_question(monkeypatch):
    made, ask_followup = [], talk.ask_followup
    monkeypatch.setattr(talk, "ask_followup", lambda *args: made.append(ask_followup(*args)) or made[-1])
    for scene, rng in scenes(300, "conversations"):
        turns = talk.converse(scene, rng, 6)
        found = [pair for pair in itertools.pairwise(turns) if pair[1].family == "follow-up"]
        assert len(found) == sum(turn.family == "follow-up" for turn in turns)
        assert set(found) <= set(made)


def test_relation_answers_are_balanced():
    turns = [turn for scene, rng in scenes(4000, "relations") for turn in talk.ask("relation", scene, rng)]
    counts = collections.Counter(turn.short for turn in turns)
    assert abs(counts["yes"] - counts["no"]) < 0.1 * counts["yes"]
    assert counts["nothing"] < 0.2 * len(turns)


def test_referring_expressions_are_unambiguous():
    for scene, rng in scenes(1000, "names"):
        thing = rng.choice(scene)
        words, _, place = talk.refer(rng, scene, thing).partition(" in the ")
        told = set(words.split()) - {"object"}
        meant = [t for t in scene if told <= {t.colour, t.shape, t.size} and place in ("", world.CELLS[t.cell])]
        assert meant == [thing]


def test_followup_questions_do_not_reveal_the_answer():
    for scene, rng in scenes(500, "follow-ups"):
        first, second = talk.ask_followup(scene, rng)
        assert second.short not in first.question and second.short not in second.question
        assert second.short != first.short


def test_question_alone_baseline_uses_answers_to_the_same_text():
    answers = [("Which?", "a"), ("Which?", "a"), ("How?", "b"), ("How?", "b"), ("Which?", "a"), ("Why?", "c")]
    lines = [{"text": text, "answer": answer} for text, answer in answers]
    assert score.question_alone(lines) == ["a", "a", "b", "b", "a", "a"]


# Pretraining


def test_resumed_pretraining_gives_the_same_weights(tmp_path, monkeypatch):
    tokenizer, tower_batch = LlamaTokenizer.from_pretrained(MODEL), pretrain.tower_batch
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 2)
    whole, parts = (Namespace(output=tmp_path / name, steps=4, batch=4, seed=0) for name in ("whole", "parts"))
    for args in (whole, parts):
        args.output.mkdir()
    pretrain.train_tower(whole, tokenizer)

    def interrupted(step, *args):
        if step == 3:
            raise KeyboardInterrupt
        return tower_batch(step, *args)

    monkeypatch.setattr(pretrain, "tower_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain.train_tower(parts, tokenizer)
    monkeypatch.setattr(pretrain, "tower_batch", tower_batch)
    pretrain.train_tower(parts, tokenizer)
    final = [torch.load(args.output / "tower.state")["model"] for args in (whole, parts)]
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])
    parts.steps = 8
    with pytest.raises(ValueError, match="use another folder"):
        pretrain.train_tower(parts, tokenizer)


def test_join_copies_the_pretrained_weights_into_a_checkpoint(tmp_path):
    args = Namespace(output=tmp_path, steps=1, batch=4, seed=0)
    tokenizer = pretrain.make_tokenizer(tmp_path)
    for step in (pretrain.train_tower, pretrain.train_decoder, pretrain.join):
        step(args, tokenizer)
    joined, processor = (
        kind.from_pretrained(tmp_path / "base") for kind in (LlavaForConditionalGeneration, LlavaProcessor)
    )
    for part, prefix in pretrain.KEPT.items():
        trained = torch.load(tmp_path / f"{part}.state")["model"]
        for name in [name for name in trained if name.startswith(prefix)]:
            assert torch.equal(joined.get_parameter(name.removeprefix("writer.")), trained[name])
    inputs = processor(Image.new("RGB", (96, 96)), "USER: <image>\nDescribe the picture. ASSISTANT:")
    assert joined(**inputs).logits.isfinite().all()


# The model


@pytest.fixture(scope="module")
def built_in():
    return LlavaForConditionalGeneration.from_pretrained(MODEL), LlavaProcessor.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def unseen(tmp_path_factory):
    """300 questions in short form about 43 scenes that are not in the training data, as evaluate.py reads them."""
    folder = tmp_path_factory.mktemp("unseen")
    (folder / "pictures").mkdir()
    make_data.make_test(folder, scenes=43, seed=1)
    names = [*talk.ATTRIBUTES, "count", "existence", "relation"]
    return folder, [line for name in names for line in read_lines(folder / f"{name}.jsonl")][:300]


def accuracy(built_in, folder, lines):
    """The exact-match accuracy."""
    right = 0
    for start in range(0, len(lines), 50):
        batch = [line | {"prompt": line["text"] + SHORT_ANSWER, "history": []} for line in lines[start : start + 50]]
        texts = evaluate.answer_questions(*built_in, batch, folder)
        right += sum(text == line["answer"] for text, line in zip(texts, batch, strict=True))
    return right / len(lines)


def test_accuracy_on_new_scenes(built_in, unseen):
    folder, lines = unseen
    share = accuracy(built_in, folder, lines)
    print(f"\n{len(lines)} questions, accuracy: {share:.3f}")
    assert share > 0.95


def test_accuracy_on_held_out_combinations(built_in, unseen):
    folder, _ = unseen
    lines = read_lines(folder / "unseen.jsonl")
    share = accuracy(built_in, folder, lines)
    print(f"\n{len(lines)} questions, accuracy: {share:.3f}")
    assert share > 0.75


def test_accuracy_with_the_wrong_picture_is_low(built_in, unseen):
    folder, lines = unseen
    swapped = [line | {"image": lines[(i + 1) % len(lines)]["image"]} for i, line in enumerate(lines)]
    share = accuracy(built_in, folder, swapped)
    print(f"\n{len(lines)} questions with the wrong picture, accuracy: {share:.3f}")
    assert share < 0.35


def test_built_in_model_is_the_default_of_the_command_line():
    command = [sys.executable, ROOT / "llava.py", "--image", ROOT / "tiny/examples/scene.png"]
    answer = subprocess.run([*command, "How many circles are there?"], capture_output=True, text=True, timeout=120)
    assert (answer.stdout, answer.stderr) == ("There are two circles.\n", "")


@pytest.mark.parametrize(
    ("image", "question"), [("tiny/examples/scene.png", "Is there a cat?"), ("photo", "How many circles are there?")]
)
def test_input_from_outside_its_world_gives_a_note(image, question, tmp_path):
    if image == "photo":
        rng = torch.Generator().manual_seed(0)
        image = tmp_path / "photo.png"
        Image.fromarray(torch.randint(256, (90, 120, 3), generator=rng, dtype=torch.uint8).numpy()).save(image)
    command = [sys.executable, ROOT / "llava.py", "--image", ROOT / image, "--max-new-tokens", "5", question]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "the built-in model knows drawn scenes" in answer.stderr
    assert "--model llava-hf/llava-1.5-7b-hf" in answer.stderr


def test_logits_match_transformers(built_in, check):
    transformers = pytest.importorskip("transformers")
    model, processor = built_in
    reference = transformers.LlavaForConditionalGeneration.from_pretrained(MODEL, attn_implementation="sdpa").eval()
    rng = random.Random("judge")
    scene = world.make_scene(rng)
    inputs = processor(world.draw(scene, rng), "USER: <image>\nDescribe the picture. ASSISTANT: There is a large red")
    with torch.no_grad():
        check("logits", model(**inputs).logits, reference(**inputs).logits)


def test_model_files_are_small():
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 10e6
