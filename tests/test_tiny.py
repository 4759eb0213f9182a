"""The built-in model and its small world: unbiased data, and answers that depend on the picture."""

import collections
import itertools
import json
import math
import random
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import ask_exercise
import ask_scene
import ask_thing
import build
import make_data
import naming
import phrases
import pretrain
import pytest
import score
import talk
import torch
import wordings
import world
from PIL import Image
from torch import nn
from wordings import Voice

import evaluate
from extras.files import read_json
from extras.saving import copy_processor_files
from llava import LlavaConfig, LlavaForConditionalGeneration, LlavaMultiModalProjector, LlavaProcessor
from tokenizer import SHORT_ANSWER

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
    first = json.loads((tmp_path / "conversations.json").read_text())
    assert first and first == json.loads((training / "conversations.json").read_text())[: len(first)]


def test_different_seed_gives_different_data(training, tmp_path):
    (tmp_path / "pictures").mkdir()
    make_data.make_training(tmp_path, scenes=20, seed=1)
    name = make_data.picture_name(0)
    assert (tmp_path / name).read_bytes() != (training / name).read_bytes()


def test_training_data_contains_no_held_out_combination(training):
    pieces = [piece for file in training.glob("*.json") for piece in file.read_text().split('"')]
    for colour, shape in world.HELD_OUT:
        assert not [piece for piece in pieces if f"{colour} {shape}" in piece]
    drawn = {pair[:2] for i in range(2000) for pair in talk.make_scene(random.Random(f"train/0/{i}"))}
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
        ("count", phrases.COUNTS, 0.36),
        ("existence", ["yes", "no"], 0.53),
    ],
)
def test_answers_are_balanced(family, answers, most):
    counts = collections.Counter(talk.ask(family, scene, Voice(rng))[0].short for scene, rng in scenes(3000, "balance"))
    assert set(counts) == set(answers)
    assert max(counts.values()) / 3000 < most


@pytest.mark.parametrize("family", ["existence", "verify", "comparison", "quantity", "two steps", "follow-up"])
def test_yes_and_no_are_equally_frequent(family):
    turns = [turn for scene, rng in scenes(6000, family) for turn in talk.ask(family, scene, Voice(rng))[-1:]]
    counts = collections.Counter(turn.short for turn in turns)
    assert abs(counts["yes"] - counts["no"]) < 0.1 * counts["yes"]


@pytest.mark.parametrize("way", ["all", "both", "none", "any", "same"])
def test_yes_and_no_are_equally_frequent_for_every_quantifier(way, monkeypatch):
    counts = collections.Counter()
    monkeypatch.setattr(Voice, "ask", lambda voice, kind, **slots: kind)
    for scene, rng in scenes(8000, "quantity"):
        [turn] = talk.ask("quantity", scene, Voice(rng))
        counts[turn.short] += turn.question == way
    assert abs(counts["yes"] / counts.total() - 0.5) < 0.06


@pytest.mark.parametrize("form", ask_scene.FORMS)
def test_existence_questions_of_every_form_are_balanced(form, monkeypatch):
    monkeypatch.setattr(Voice, "word", lambda voice, word: word)  # no synonyms
    counts = collections.Counter()
    for scene, rng in scenes(6000, "existence"):
        [turn] = talk.ask("existence", scene, Voice(rng, typos=0.0))
        words = {word.removesuffix("s").removesuffix("se") for word in re.findall("[a-z]+", turn.question.lower())}
        words |= {"cross"} if "crosses" in turn.question.lower() else set()
        if form == tuple(bool(words & set(values)) for values in (world.COLOURS, world.SHAPES, world.SIZES)):
            counts[turn.short] += 1
    assert abs(counts["yes"] / counts.total() - 0.5) < 0.07


def test_the_other_half_of_a_held_out_combination_is_no_evidence_of_absence():
    """Stars are asked about in scenes with something red, and something red where there are stars."""
    counts = collections.Counter()
    for scene, rng in scenes(12000, "evidence"):
        [turn] = talk.ask("existence", scene, Voice(rng, plain=True))
        seen = {value for thing in scene for value in (thing.colour, thing.shape)}
        halves = [half for pair in world.HELD_OUT for half in (pair, pair[::-1])]
        if any(word in turn.question and other in seen for word, other in halves):
            counts[turn.short] += 1
    assert counts.total() > 300
    assert abs(counts["yes"] / counts.total() - 0.5) < 0.09


ALONE = [
    (world.SHAPES_ALONE, [*world.COLOURS, "some", "colour", "color"]),
    (world.COLOURS_ALONE, [*world.SHAPES, "blob"]),
]


@pytest.mark.parametrize(("known", "words"), ALONE, ids=["shapes", "colours"])
def test_what_has_no_name_is_neither_asked_about_nor_part_of_an_answer(known, words):
    for i in range(200):
        rng = random.Random(f"alone/{i}")
        turns = talk.converse(world.make_scene(rng, known=known), rng, 7)
        assert not [turn for turn in turns if any(word in text.lower() for word in words for text in turn)]


@pytest.mark.parametrize(("known", "words"), ALONE, ids=["shapes", "colours"])
def test_yes_and_no_are_equally_frequent_where_something_has_no_name(known, words):
    counts = collections.Counter()
    for i in range(800):
        rng = random.Random(f"alone/{i}")
        counts.update(turn.short for turn in talk.converse(world.make_scene(rng, known=known), rng, 7))
    assert abs(counts["yes"] - counts["no"]) < 0.08 * counts["yes"]


def test_some_training_scenes_have_things_without_a_colour_or_without_a_shape(training):
    colour, shape = collections.Counter(), collections.Counter()  # of conversations that name one, by i % 20
    for item in json.loads((training / "conversations.json").read_text()):
        place = int(Path(item["image"]).stem) % 20
        text = " ".join(message["value"] for message in item["conversations"]).lower()
        colour[place] += any(word in text for word in world.COLOURS)
        shape[place] += any(word in text for word in world.SHAPES)
    assert [place for place in range(20) if not colour[place]] == [5, 10, 15]
    assert [place for place in range(20) if not shape[place]] == [0]


def test_the_exercise_in_counting_asks_for_what_is_alike():
    """Otherwise two circles beside a star would be among thirty kinds of things to count."""
    found = 0
    for i in range(300):
        rng = random.Random(f"numbers/{i}")
        scene = world.make_like(rng)
        alike = {str(kind) for kind in ask_scene.shared_kinds(scene)}
        words = ask_exercise.ask_numbers(scene, Voice(rng)).short.split(", ")
        found += any(f"{kind.removesuffix(' object')} {count}" in words for kind in alike for count in ("two", "three"))
    print(f"{found} of 300")
    assert found > 180


def test_made_up_words_join_the_world_temporarily():
    before = dict(world.COLOURS), list(world.SHAPES), list(world.KNOWN)
    with world.with_made_up_words():
        assert (len(world.COLOURS), len(world.SHAPES)) == (2 * len(before[0]), 2 * len(before[1]))
        assert set(world.KNOWN) > set(before[2]) and not set(world.KNOWN) & set(world.HELD_OUT)
    assert before == (world.COLOURS, world.SHAPES, world.KNOWN)


def test_a_place_that_things_share_is_that_of_each(monkeypatch):
    found = 0
    monkeypatch.setattr(Voice, "ask", lambda voice, kind, **slots: f"{kind} {slots.get('what', '')}")
    for scene, rng in scenes(3000, "shared"):
        [turn] = talk.ask("side", scene, Voice(rng))
        if turn.question.startswith("shared"):
            found += 1
            places = [{world.ROWS[thing.row], world.COLUMNS[thing.column]} for thing in scene]
            assert len(scene) > 1 and all(turn.short in place for place in places)
            assert turn.question != "shared side" or turn.short not in ("middle", "centre")
    assert found > 50


@pytest.mark.parametrize(
    ("kind", "family"),
    [("which_in", "naming"), ("which_is", "choice"), ("superlative_of", "comparison"), ("values_of", "list")],
)
def test_answers_about_some_of_the_things_are_true_of_them(kind, family, monkeypatch):
    found, asked = 0, []
    monkeypatch.setattr(Voice, "ask", lambda voice, name, **slots: asked.append((name, slots)) or "")
    for scene, rng in scenes(1500, kind):
        asked.clear()
        turns = talk.ask(family, scene, Voice(rng, plain=True))
        if not turns or asked[-1][0] != kind:
            continue
        found, slots, short = found + 1, asked[-1][1], turns[0].short
        named = [thing for thing in scene if thing.name == short]
        if kind == "which_in":
            assert slots["place"] == f"in the {world.CELLS[named[0].cell]}"
        elif kind == "which_is":
            assert slots["value"].split(" ", 2)[-1] in (*named[0][:3], world.CELLS[named[0].cell])
        elif kind == "superlative_of":
            members = [thing for thing in scene if set(slots["one"].split()) & set(thing[:2])]
            sizes = [thing.size for thing in members]
            assert len(members) > 1
            if named:
                large = slots["superlative"] in ("bigger", "larger", "biggest", "largest")
                assert named[0].size == ("large" if large else "small") and sizes.count(named[0].size) == 1
        else:
            members = [thing for thing in scene if any(value in slots["many"] for value in thing[:2])]
            family_asked = "shape" if slots["properties"] == "shapes" else "colour"
            values = dict.fromkeys(getattr(thing, family_asked) for thing in members)
            assert short == phrases.listed([*values])
    assert found > 20


def test_followup_directly_follows_its_opening_question(monkeypatch):
    made, ask_followup = [], ask_thing.ask_followup
    monkeypatch.setattr(ask_thing, "ask_followup", lambda *args: made.append(ask_followup(*args)) or made[-1])
    for scene, rng in scenes(300, "conversations"):
        turns = talk.converse(scene, rng, 6)
        found = [pair for pair in itertools.pairwise(turns) if pair[1].family == "follow-up"]
        assert len(found) == sum(turn.family == "follow-up" for turn in turns)
        assert set(found) <= set(made)


def test_relation_answers_are_balanced():
    turns = [turn for scene, rng in scenes(4000, "relations") for turn in talk.ask("relation", scene, Voice(rng))]
    counts = collections.Counter(turn.short for turn in turns)
    assert abs(counts["yes"] - counts["no"]) < 0.1 * counts["yes"]
    assert counts["nothing"] < 0.2 * len(turns)


def test_referring_expressions_are_unambiguous():
    for scene, rng in scenes(1000, "names"):
        thing, without = rng.choice(scene), rng.choice([*phrases.ATTRIBUTES, ""])
        kind = phrases.refer(rng, scene, thing, without)
        assert [one for one in scene if kind.fits(one)] == [thing]
        assert without not in kind._fields or getattr(kind, without) is None
        assert without != "position" or (kind.cell is None and kind.side is None)


def test_questions_for_an_attribute_do_not_name_it():
    for scene, rng in scenes(1000, "attributes"):
        for family in ("colour", "shape"):
            [turn] = talk.ask(family, scene, Voice(rng, typos=0.0))
            assert f" {turn.short}" not in turn.question.lower()


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("family", talk.FAMILIES)
def test_every_family_has_many_wordings(family, held_out):
    made = collections.Counter()
    for scene, rng in scenes(400, "wordings"):
        made.update(turn.question.lower() for turn in talk.ask(family, scene, Voice(rng, held_out, typos=0.0))[-1:])
    assert not any(mark in question for question in made for mark in "[]{}<>|")
    assert len(made) > (150 if family not in ("facts", "caption") else 0 if family == "facts" else 30)


def test_held_out_constructions_are_not_among_the_known_ones():
    assert set(wordings.KNOWN) == set(wordings.HELD_OUT)
    for kind, lines in wordings.HELD_OUT.items():
        assert not set(lines) & set(wordings.KNOWN[kind])
    assert not set(wordings.NOUNS["known"]) & set(wordings.NOUNS["held_out"])


def test_a_typo_changes_one_place_of_one_word():
    for i in range(300):
        rng = random.Random(i)
        text = "what colour is the circle in the bottom left?"
        wrong = wordings.misspell(text, rng)
        assert abs(len(wrong) - len(text)) <= 1
        assert sum(a != b for a, b in zip(text.split(), wrong.split(), strict=True)) <= 1


@pytest.mark.parametrize("condition", world.CONDITIONS)
def test_every_disturbance_changes_the_picture_and_depends_on_the_seed_alone(condition):
    look = world.CONDITIONS[condition]
    for scene, _ in scenes(8, "looks"):
        first, again, plain = (world.draw(scene, random.Random(0), one) for one in (look, look, world.PLAIN_LOOK))
        assert first.tobytes() == again.tobytes()
        assert first.tobytes() != plain.tobytes() or {thing.shape for thing in scene} == {"circle"}  # rotated
        assert first.size == (look.side, look.side)


def test_a_thing_of_any_colour_never_completes_a_held_out_combination():
    for colour, shape in world.HELD_OUT:
        thing, rng = world.Thing("some", shape, "small", 0), random.Random(0)
        for _ in range(300):
            assert world.far(world.mix_tint(thing, 128, rng), world.TINTS[colour], 70)


@pytest.mark.parametrize(("name", "scenes", "questions"), [("visitors", 100, 490), ("visitors later", 40, 160)])
def test_visitors_questions_are_about_drawn_scenes_and_have_answers(name, scenes, questions):
    visitors = read_json(make_data.VISITORS[name])
    assert (len(visitors["scenes"]), len(visitors["questions"])) == (scenes, questions)
    for question in visitors["questions"]:
        assert question["answers"] and 0 <= question["scene"] < scenes


@pytest.mark.parametrize(
    ("sentence", "question", "answers", "right"),
    [
        ("The circle is red.", "what colour is the circle", ["red"], True),
        ("The circle is blue.", "what colour is the circle", ["red"], False),
        ("The circle is red and blue.", "what colour is the circle", ["red"], False),
        ("Yes, the circle is red.", "is it red", ["yes"], True),
        ("No, the circle is red.", "is it blue", ["yes"], False),
        ("The circle is in the top left.", "where is it", ["left", "top left"], True),
        ("The circle is in the top right.", "where is it", ["top left"], False),
        ("There are no circles.", "how many circles", ["zero"], True),
        ("There is no star.", "where is the star", ["none"], True),
        ("I only know about the coloured shapes in the picture.", "hello", ["unknown"], True),
    ],
)
def test_a_sentence_is_right_if_it_states_a_right_answer(sentence, question, answers, right):
    assert score.states(sentence, question, answers) == right


def test_followup_questions_do_not_reveal_the_answer():
    for scene, rng in scenes(500, "follow-ups"):
        first, second = ask_thing.ask_followup(scene, Voice(rng))
        if second.short not in ("small", "large", "yes", "no"):  # "Is it small or large?"
            assert second.short not in first.question and second.short not in second.question


def test_question_alone_baseline_uses_answers_to_the_same_text():
    answers = [("Which?", "a"), ("Which?", "a"), ("How?", "b"), ("How?", "b"), ("Which?", "a"), ("Why?", "c")]
    lines = [{"text": text, "answer": answer} for text, answer in answers]
    assert score.question_alone(lines) == ["a", "a", "b", "b", "a", "a"]


# Pretraining


def test_resumed_pretraining_gives_the_same_weights(tmp_path, monkeypatch):
    tower_batch = pretrain.tower_batch
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 2)
    settings = {"steps": 4, "until": None, "batch": 4, "seed": 0}
    whole, parts, begun = (Namespace(output=tmp_path / name, **settings) for name in ("whole", "parts", "begun"))
    for args in (whole, parts, begun):
        args.output.mkdir()
    pretrain.train_tower(whole)
    begun.until = 3
    pretrain.train_tower(begun)
    assert torch.load(begun.output / "tower.state")["step"] == 3
    begun.until = None
    pretrain.train_tower(begun)

    def interrupted(step, *args):
        if step == 3:
            raise KeyboardInterrupt
        return tower_batch(step, *args)

    monkeypatch.setattr(pretrain, "tower_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain.train_tower(parts)
    monkeypatch.setattr(pretrain, "tower_batch", tower_batch)
    pretrain.train_tower(parts)
    first, *others = (torch.load(args.output / "tower.state")["model"] for args in (whole, parts, begun))
    assert all(torch.equal(first[name], other[name]) for name in first for other in others)
    parts.steps = 8
    with pytest.raises(ValueError, match="use another folder"):
        pretrain.train_tower(parts)


def test_the_first_projector_says_what_the_naming_layer_names():
    """Also in combinations that no picture of its training showed: it has seen none."""
    torch.manual_seed(0)
    sizes = [len(values) for values in naming.NAMES]
    names = sum(sizes)
    # A tower whose features are sums of the names' directions, and a naming layer with the best weights for them
    directions = torch.linalg.qr(torch.cat([torch.ones(128, 1), torch.randn(128, names)], dim=1))[0][:, 1:].T
    namer = nn.Sequential(nn.LayerNorm(128), nn.Linear(128, names))
    gap = torch.tensor([math.log((1 - naming.SMOOTHING) * k / naming.SMOOTHING + 1) for k in sizes for _ in range(k)])
    namer[1].weight.data, namer[1].bias.data = directions * gap[:, None] * (5 / 128) ** 0.5, torch.zeros(names)
    scenes = [
        [world.Thing(colour, shape, "small", 2), world.Thing("blue", "star", "large", 4)]
        for colour, shape in [*world.HELD_OUT, *world.KNOWN]
    ]
    indices = torch.cat([naming.name_patches(scene) for scene in scenes])  # (N, 5)
    said = torch.zeros(len(indices), names)
    for column, start in enumerate(itertools.accumulate(sizes[:-1], initial=0)):
        there = indices[:, column] >= 0
        said[there, start + indices[there, column]] = 1.0
    config = LlavaConfig(pretrain.VISION, pretrain.text_config(1000, 1), 3)
    projector, embeddings = LlavaMultiModalProjector(config), torch.randn(names, 128)
    naming.say_names(projector, namer, said @ directions, embeddings)
    expected = said @ embeddings
    error = (projector(said @ directions) - expected).norm(dim=1) / expected.norm(dim=1)
    print(f"relative error: mean {error.mean():.1e}, largest {error.max():.1e}")
    assert error.max() < 0.01


def test_an_ideal_picture_says_in_every_patch_what_is_in_its_cell():
    scene = [world.Thing("red", "circle", "small", 2), world.Thing("blue", "star", "large", 4)]
    weighted = naming.patch_words(scene, random.Random(0))
    assert len(weighted) == 36
    # Words that are mixed in weigh less than a half
    patches = [[word for word, weight in words if weight > 0.5] for words in weighted]
    assert patches[:2] == 2 * [["nothing", "nothing", "nothing", "top", "left"]]
    assert patches[4] == patches[5] == patches[11] == ["red", "circle", "small", "top", "right"]
    assert patches[14] == patches[21] == ["blue", "star", "large", "middle", "centre"]
    names = naming.name_patches(scene)
    for row, words in zip(names.tolist(), patches, strict=True):
        said = [values[i] for values, i in zip(naming.NAMES, row, strict=True) if i >= 0]
        assert [word for word in said if word in words] == said


def test_join_copies_the_pretrained_weights_into_a_checkpoint(tmp_path):
    args = Namespace(output=tmp_path, steps=1, until=None, batch=4, seed=0)
    tokenizer = pretrain.make_tokenizer(tmp_path)
    pretrain.train_tower(args)
    pretrain.train_decoder(args, tokenizer)
    pretrain.join(args, tokenizer)
    joined, processor = (
        kind.from_pretrained(tmp_path / "base") for kind in (LlavaForConditionalGeneration, LlavaProcessor)
    )
    for part, prefix in pretrain.KEPT.items():
        trained = torch.load(tmp_path / f"{part}.state")["model"]
        for name in [name for name in trained if name.startswith(prefix)]:
            assert torch.equal(joined.get_parameter(name), trained[name])
    inputs = processor(Image.new("RGB", (96, 96)), "USER: <image>\nDescribe the picture. ASSISTANT:")
    assert joined(**inputs).logits.isfinite().all()


def test_average_writes_a_complete_checkpoint_with_the_mean_of_the_weights(tmp_path):
    for name, value in [("first", 1.0), ("second", 4.0)]:
        model = LlavaForConditionalGeneration.from_pretrained(MODEL)
        for parameter in model.parameters():
            nn.init.constant_(parameter, value)
        model.save_pretrained(tmp_path / name)
        copy_processor_files(MODEL, tmp_path / name)
    build.average([tmp_path / "first", tmp_path / "second"], tmp_path / "mean")
    mean, _ = (kind.from_pretrained(tmp_path / "mean") for kind in (LlavaForConditionalGeneration, LlavaProcessor))
    assert all((parameter == 2.5).all() for parameter in mean.parameters())
    assert read_json(tmp_path / "mean" / "config.json")["dtype"] == "float16"


def test_a_failing_step_of_the_build_stops_the_one_beside_it(tmp_path):
    slow = f"import time; time.sleep(60); open({str(tmp_path / 'late')!r}, 'w')"
    with pytest.raises(SystemExit, match="a step failed"):
        build.run(1, ["-c", slow], ["-c", "raise SystemExit(3)"])
    assert not (tmp_path / "late").exists()


# The model


@pytest.fixture(scope="module")
def built_in():
    return LlavaForConditionalGeneration.from_pretrained(MODEL), LlavaProcessor.from_pretrained(MODEL)


def questions(folder, must=()):
    """Questions in plain wording about 60 scenes that are not in the training data, with their pictures."""
    lines = []
    for i in range(60):
        rng = random.Random(f"examination/{i}")
        scene = world.make_scene(rng, must=[rng.choice(must)] if must else [])
        thing = next((one for one in scene if (one.colour, one.shape) in must), scene[0])
        world.draw(scene, rng).save(folder / f"{i}.png")
        turns = [ask_thing.ask_attribute(name, scene, thing, Voice(rng, plain=True)) for name in phrases.ATTRIBUTES]
        turns += [] if must else talk.ask("relation", scene, Voice(rng, plain=True))
        lines += [{"image": f"{i}.png", "text": turn.question, "answer": turn.short} for turn in turns]
    return lines


def accuracy(built_in, folder, lines):
    """The exact-match accuracy."""
    right = 0
    for start in range(0, len(lines), 50):
        batch = [line | {"prompt": line["text"] + SHORT_ANSWER, "history": []} for line in lines[start : start + 50]]
        texts = evaluate.answer_questions(*built_in, batch, folder)
        right += sum(text == line["answer"] for text, line in zip(texts, batch, strict=True))
    return right / len(lines)


def test_accuracy_on_new_scenes(built_in, tmp_path):
    lines = questions(tmp_path)
    share = accuracy(built_in, tmp_path, lines)
    print(f"\n{len(lines)} questions, accuracy: {share:.3f}")
    assert share > 0.95


def test_accuracy_on_held_out_combinations(built_in, tmp_path):
    lines = questions(tmp_path, world.HELD_OUT)
    share = accuracy(built_in, tmp_path, lines)
    print(f"\n{len(lines)} questions, accuracy: {share:.3f}")
    assert share > 0.95


def test_accuracy_with_the_wrong_picture_is_low(built_in, tmp_path):
    lines = questions(tmp_path)
    swapped = [line | {"image": lines[(i + 5) % len(lines)]["image"]} for i, line in enumerate(lines)]
    share = accuracy(built_in, tmp_path, swapped)
    print(f"\n{len(lines)} questions with the wrong picture, accuracy: {share:.3f}")
    assert share < 0.35


@pytest.mark.parametrize("family", talk.FAMILIES)
def test_a_plain_voice_has_one_wording(family):
    for scene, _ in scenes(30, "plain"):
        first, again = (talk.ask(family, scene, Voice(random.Random(5), plain=True)) for _ in range(2))
        assert first == again
        assert all(turn.question[0].isupper() and turn.question[-1] in "?." for turn in first)


def test_built_in_model_is_the_default_of_the_command_line():
    command = [sys.executable, ROOT / "llava.py", "--image", ROOT / "tiny/examples/scene.png"]
    answer = subprocess.run([*command, "What is right of the diamond?"], capture_output=True, text=True, timeout=120)
    assert (answer.stdout, answer.stderr) == ("The pink circle is right of the diamond.\n", "")


@pytest.mark.parametrize("image", ["a photo", "none"])
def test_a_picture_from_outside_its_world_gives_a_note(image, tmp_path):
    rng = torch.Generator().manual_seed(0)
    photo = Image.fromarray(torch.randint(256, (90, 120, 3), generator=rng, dtype=torch.uint8).numpy())
    photo.save(tmp_path / "photo.png")
    command = [sys.executable, ROOT / "llava.py", "--max-new-tokens", "5", "How many circles are there?"]
    command += ["--image", tmp_path / "photo.png"] if image == "a photo" else []
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "the built-in model knows drawn scenes" in answer.stderr
    assert "--model llava-hf/llava-1.5-7b-hf" in answer.stderr


def test_questions_about_what_is_not_in_its_world_get_an_honest_answer(built_in):
    model, processor = built_in
    picture = Image.open(ROOT / "tiny/examples/scene.png")
    for question in ("Is there a cat?", "What is the capital of France?", "Where is the dog?"):
        inputs = processor(picture, f"USER: <image>\n{question} ASSISTANT:")
        answer = processor.tokenizer.decode(model.generate(**inputs)[0, inputs.input_ids.shape[1] :])
        print(question, answer)
        assert "only" in answer and "coloured shapes in the picture" in answer


def test_logits_match_transformers(built_in, check):
    transformers = pytest.importorskip("transformers")
    model, processor = built_in
    reference = transformers.LlavaForConditionalGeneration.from_pretrained(
        MODEL, attn_implementation="sdpa", dtype=torch.float32
    )
    rng = random.Random("judge")
    scene = world.make_scene(rng)
    inputs = processor(world.draw(scene, rng), "USER: <image>\nDescribe the picture. ASSISTANT: There is a large red")
    with torch.no_grad():
        check("logits", model(**inputs).logits, reference(**inputs).logits)


def test_model_files_are_small():
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 10e6


def test_the_lora_example_draws_trains_and_scores(tmp_path):
    command = [sys.executable, ROOT / "tiny/adapt.py", "--folder", tmp_path, "--pictures", "4", "--scenes", "6"]
    command += ["--old-scenes", "1", "--epochs", "1"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    texts = (tmp_path / "train.json").read_text()
    assert "wug" in texts and "tove" in texts and "zeb" in texts
    assert "brown" not in texts and "arrow" not in texts  # what new things look like is not asked about as missing
    assert re.search(r"^\| new \| 6 \| [\d.]+ \| [\d.]+ \|$", printed, re.MULTILINE)
    assert re.search(r"^\| old \| \d+ \| [\d.]+ \| [\d.]+ \|$", printed, re.MULTILINE)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
