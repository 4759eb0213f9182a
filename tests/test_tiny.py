"""The built-in model and the small world that it knows: honest data, and answers that come from the picture."""

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
import torch
import world
from PIL import Image

import evaluate
from evaluate import read_lines
from llava import LlavaForConditionalGeneration, LlavaProcessor
from tokenizer import SHORT_ANSWER, LlamaTokenizer

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "tiny" / "model"


# The data


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """The folder that make_data.py writes for training, of a few scenes."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "pictures").mkdir()
    make_data.make_training(folder, scenes=300, seed=0)
    return folder


def scenes(number, split):
    for i in range(number):
        rng = random.Random(f"{split}/{i}")
        yield world.make_scene(rng), rng


def test_the_same_seed_writes_the_same_data(training, tmp_path):
    (tmp_path / "pictures").mkdir()
    make_data.make_training(tmp_path, scenes=20, seed=0)
    for picture in (tmp_path / "pictures").iterdir():
        assert picture.read_bytes() == (training / "pictures" / picture.name).read_bytes()
    for name in ("captions", "words", "facts", "conversations"):
        first = json.loads((tmp_path / f"{name}.json").read_text())
        assert first and first == json.loads((training / f"{name}.json").read_text())[: len(first)]


def test_another_seed_writes_other_data(training, tmp_path):
    (tmp_path / "pictures").mkdir()
    make_data.make_training(tmp_path, scenes=20, seed=1)
    name = make_data.picture_name(0)
    assert (tmp_path / name).read_bytes() != (training / name).read_bytes()


def test_no_combination_kept_for_testing_is_in_the_training_data(training):
    pieces = [piece for file in training.glob("*.json") for piece in file.read_text().split('"')]
    for colour, shape in world.HELD_OUT:
        assert not [piece for piece in pieces if f"{colour} {shape}" in piece]
    drawn = {(thing.colour, thing.shape) for scene, _ in scenes(2000, "train/0") for thing in scene}
    assert drawn == set(world.KNOWN)  # all the others are


def test_a_near_twin_is_another_scene_of_the_same_colours_without_combinations_kept_for_testing():
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
        ("count", world.COUNTS, 0.33),
        ("existence", ["yes", "no"], 0.53),
    ],
)
def test_no_answer_is_much_more_frequent_than_the_others(family, answers, most):
    counts = collections.Counter(world.ask(family, scene, rng)[0].short for scene, rng in scenes(3000, "balance"))
    assert set(counts) == set(answers)
    assert max(counts.values()) / 3000 < most


@pytest.mark.parametrize("form", world.FORMS)
def test_no_form_of_question_about_existence_gives_its_answer_away(form):
    counts = collections.Counter()
    for scene, rng in scenes(6000, "existence"):
        [turn] = world.ask("existence", scene, rng)
        words = turn.question.strip("?").split()
        if form == (bool(set(words) & set(world.COLOURS)), bool(set(words) & set(world.SHAPES))):
            counts[turn.short] += 1
    assert abs(counts["yes"] / counts.total() - 0.5) < 0.05


def test_a_followup_in_a_conversation_comes_right_behind_its_opening(monkeypatch):
    made, ask_followup = [], world.ask_followup
    monkeypatch.setattr(world, "ask_followup", lambda *args: made.append(ask_followup(*args)) or made[-1])
    for scene, rng in scenes(300, "conversations"):
        turns = world.converse(scene, rng, 6)
        found = [pair for pair in itertools.pairwise(turns) if pair[1].family == "follow-up"]
        assert len(found) == sum(turn.family == "follow-up" for turn in turns)
        assert set(found) <= set(made)


def test_relations_hold_as_often_as_not():
    turns = [turn for scene, rng in scenes(4000, "relations") for turn in world.ask("relation", scene, rng)]
    counts = collections.Counter(turn.short for turn in turns)
    assert abs(counts["yes"] - counts["no"]) < 0.1 * counts["yes"]
    assert counts["nothing"] < 0.2 * len(turns)


def test_words_that_mean_one_thing_mean_no_other():
    for scene, rng in scenes(1000, "names"):
        thing = rng.choice(scene)
        words, _, place = world.refer(rng, scene, thing).partition(" in the ")
        told = set(words.split()) - {"object"}
        meant = [t for t in scene if told <= {t.colour, t.shape, t.size} and place in ("", world.CELLS[t.cell])]
        assert meant == [thing]


def test_a_followup_cannot_be_answered_from_its_own_words_or_the_first_question():
    for scene, rng in scenes(500, "follow-ups"):
        first, second = world.ask_followup(scene, rng)
        assert second.short not in first.question and second.short not in second.question
        assert second.short != first.short


def test_the_share_that_questions_give_away_alone_is_that_of_answers_to_the_same_words():
    answers = [("Which?", "a"), ("Which?", "a"), ("How?", "b"), ("How?", "b"), ("Which?", "a"), ("Why?", "c")]
    lines = [{"text": text, "answer": answer} for text, answer in answers]
    assert score.question_alone(lines) == ["a", "a", "b", "b", "a", "a"]


# Pretraining


def test_a_pretraining_that_was_stopped_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    tokenizer, lesson = LlamaTokenizer.from_pretrained(MODEL), pretrain.lesson
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 2)
    whole, parts = (Namespace(output=tmp_path / name, steps=4, batch=4, seed=0) for name in ("whole", "parts"))
    for args in (whole, parts):
        args.output.mkdir()
    pretrain.train_tower(whole, tokenizer)

    def interrupted(step, *args):
        if step == 3:
            raise KeyboardInterrupt
        return lesson(step, *args)

    monkeypatch.setattr(pretrain, "lesson", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain.train_tower(parts, tokenizer)
    monkeypatch.setattr(pretrain, "lesson", lesson)
    pretrain.train_tower(parts, tokenizer)
    ends = [torch.load(args.output / "tower.state")["model"] for args in (whole, parts)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    parts.steps = 8
    with pytest.raises(ValueError, match="use another folder"):
        pretrain.train_tower(parts, tokenizer)


def test_what_was_pretrained_is_joined_to_a_checkpoint(tmp_path):
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
    """Questions in short form about 43 scenes that no training has seen, 300 in all, as evaluate.py reads them."""
    folder = tmp_path_factory.mktemp("unseen")
    (folder / "pictures").mkdir()
    make_data.make_test(folder, scenes=43, seed=1)
    names = [*world.ATTRIBUTES, "count", "existence", "relation"]
    return folder, [line for name in names for line in read_lines(folder / f"{name}.jsonl")][:300]


def accuracy(built_in, folder, lines):
    """The part of the questions that is answered exactly right."""
    right = 0
    for start in range(0, len(lines), 50):
        batch = [line | {"prompt": line["text"] + SHORT_ANSWER, "history": []} for line in lines[start : start + 50]]
        texts = evaluate.answer_questions(*built_in, batch, folder)
        right += sum(text == line["answer"] for text, line in zip(texts, batch, strict=True))
    return right / len(lines)


def test_it_answers_questions_about_scenes_that_it_has_never_seen(built_in, unseen):
    folder, lines = unseen
    share = accuracy(built_in, folder, lines)
    print(f"\n{len(lines)} questions, right: {share:.3f}")
    assert share > 0.95


def test_it_recognises_combinations_of_colour_and_shape_that_it_has_never_seen(built_in, unseen):
    folder, _ = unseen
    lines = read_lines(folder / "unseen.jsonl")
    share = accuracy(built_in, folder, lines)
    print(f"\n{len(lines)} questions, right: {share:.3f}")
    assert share > 0.75


def test_without_the_right_picture_it_can_only_guess(built_in, unseen):
    folder, lines = unseen
    swapped = [line | {"image": lines[(i + 1) % len(lines)]["image"]} for i, line in enumerate(lines)]
    share = accuracy(built_in, folder, swapped)
    print(f"\n{len(lines)} questions about another picture, right: {share:.3f}")
    assert share < 0.35


def test_it_is_the_default_of_the_command_line():
    command = [sys.executable, ROOT / "llava.py", "--image", ROOT / "tiny/examples/scene.png"]
    answer = subprocess.run([*command, "How many circles are there?"], capture_output=True, text=True, timeout=120)
    assert (answer.stdout, answer.stderr) == ("There are two circles.\n", "")


@pytest.mark.parametrize(
    ("image", "question"), [("tiny/examples/scene.png", "Is there a cat?"), ("photo", "How many circles are there?")]
)
def test_what_is_not_of_its_world_is_noted(image, question, tmp_path):
    if image == "photo":
        rng = torch.Generator().manual_seed(0)
        image = tmp_path / "photo.png"
        Image.fromarray(torch.randint(256, (90, 120, 3), generator=rng, dtype=torch.uint8).numpy()).save(image)
    command = [sys.executable, ROOT / "llava.py", "--image", ROOT / image, "--max-new-tokens", "5", question]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "the built-in model knows drawn scenes" in answer.stderr
    assert "--model llava-hf/llava-1.5-7b-hf" in answer.stderr


def test_transformers_computes_the_same_logits(built_in, check):
    transformers = pytest.importorskip("transformers")
    model, processor = built_in
    judge = transformers.LlavaForConditionalGeneration.from_pretrained(MODEL, attn_implementation="sdpa").eval()
    rng = random.Random("judge")
    scene = world.make_scene(rng)
    inputs = processor(world.draw(scene, rng), "USER: <image>\nDescribe the picture. ASSISTANT: There is a large red")
    with torch.no_grad():
        check("logits", model(**inputs).logits, judge(**inputs).logits)


def test_its_weights_are_small_enough_for_the_repository():
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 10e6
