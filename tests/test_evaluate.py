"""evaluate.py: every metric on examples worked out by hand, and answers that do not depend on the batch size."""

import json
import sys

import pytest
import torch
from PIL import Image
from tiny_training import COLOURS, Workbench

import evaluate
from extras.benchmarks import read_questions
from extras.scores import (
    exact_match,
    letter_match,
    option_letter,
    pope,
    says_yes,
    scienceqa_letter,
    scienceqa_match,
    score_table,
    vqa_accuracy,
    vqa_normalised,
)
from llava import LlavaForConditionalGeneration, LlavaProcessor

# Exact match


def test_exact_match_ignores_case_white_space_and_a_full_stop():
    assert exact_match(" Dark  red.\n", ["dark red"]) == 1
    assert exact_match("no", ["yes", "No."]) == 1


@pytest.mark.parametrize("text", ["red car", "re", "red!", ""])
def test_exact_match_ignores_nothing_else(text):
    assert exact_match(text, ["red"]) == 0


# VQA accuracy


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The cat and a dog", "cat and dog"),  # articles
        ("An apple", "apple"),
        ("Two", "2"),
        ("none", "0"),
        ("ten of one", "10 of 1"),
        ("twenty", "twenty"),  # only up to ten
        ("yes.", "yes"),
        ("3.5", "3.5"),  # a full stop before a digit stays
        ("U.S.", "us"),
        ("1,000", "1000"),
        ("red,blue", "red blue"),  # punctuation between letters becomes a space
        ("red, blue", "red blue"),
        ("left-hand side", "left hand side"),
        ("what?!", "what"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("well", "well"),
        ("black\nand\twhite ", "black and white"),
        ("the", ""),
        ("", ""),
    ],
)
def test_vqa_normalisation(text, normalised):
    assert vqa_normalised(text) == normalised


@pytest.mark.parametrize(
    ("matches", "accuracy"),
    [
        (0, 0.0),
        (1, 0.3),  # leaving it out: 0; leaving out one of the nine others: 1/3 each
        (2, 0.6),  # 2 x 1/3 + 8 x 2/3, over ten
        (3, 0.9),  # 3 x 2/3 + 7 x 1, over ten
        (4, 1.0),
        (10, 1.0),
    ],
)
def test_vqa_accuracy_leaves_out_each_human_answer_in_turn(matches, accuracy):
    assert vqa_accuracy("cat", ["cat"] * matches + ["dog"] * (10 - matches)) == pytest.approx(accuracy)


def test_vqa_accuracy_of_a_tie_is_the_same_for_both_answers():
    answers = ["cat"] * 5 + ["dog"] * 5
    assert vqa_accuracy("cat", answers) == vqa_accuracy("dog", answers) == 1


def test_vqa_accuracy_normalises_both_sides():
    assert vqa_accuracy("Two cats.", ["2 cats", "two cats", "the two cats", "Two Cats!"] + ["dog"] * 6) == 1


# Option letters


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b.", "B"),
        ("(C)", "C"),
        ("B. a red car", "B"),
        ("The answer is D.", "D"),
        ("Both B and C", "B"),  # the first
        ("I think that it is B", "B"),  # "I" is not an option
        ("Cats", None),  # a letter within a word
        ("E-mail's B", "E"),
        ("a red car", None),
        ("", None),
    ],
)
def test_option_letter(text, letter):
    assert option_letter(text) == letter


def test_an_answer_without_a_letter_is_wrong():
    assert letter_match("B. a car", ["B"]) == 1
    assert letter_match("A", ["B"]) == 0
    assert letter_match("a car", ["B"]) == 0


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B. a red car", "B"),
        ("The answer is D.", "D"),
        ("A cat is red. The answer is C. Therefore", "C"),
        ("The answer is A. The answer is B.", None),  # two answers are none
        ("The answer is B", None),  # something must follow the letter
        ("B.", None),
        ("(B)", None),
        ("b", None),
        ("F", None),  # there are at most five choices
        ("Both B and C", None),
        ("", None),
    ],
)
def test_how_the_released_script_reads_an_answer_to_scienceqa(text, letter):
    assert scienceqa_letter(text) == letter
    assert scienceqa_match(text, ["D"]) == (letter == "D")


# POPE


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes", True),
        ("No", False),
        ("no, there is a dog", False),
        ("There is not a dog", False),
        ("Yes. There is no cat.", True),  # only the first sentence is read
        ("Nothing to see", True),  # only starts with "no"
        ("NO", True),  # only "No", "no" and "not" count
        ("It isn't there", True),
        ("I do,not know", True),  # the comma is removed: "donot" is one word
        ("", True),
    ],
)
def test_how_pope_reads_an_answer(text, yes):
    assert says_yes(text) == yes


def test_pope_metrics():
    pairs = [("Yes", ["yes"])] * 3 + [("Yes", ["no"])] * 1 + [("No", ["yes"])] * 2 + [("No", ["no"])] * 4
    figures = pope(pairs)  # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives
    assert figures == pytest.approx(
        {"accuracy": 0.7, "precision": 0.75, "recall": 0.6, "F1": 2 * 0.75 * 0.6 / 1.35, "yes ratio": 0.4}
    )


@pytest.mark.parametrize(("said", "true"), [("No", "no"), ("No", "yes"), ("Yes", "no")])
def test_pope_without_true_positives_is_zero_not_an_error(said, true):
    figures = pope([(said, [true])])
    assert figures["precision"] == figures["recall"] == figures["F1"] == 0


def test_the_table_has_one_line_per_category_and_one_for_all():
    questions = [{"category": c, "answers": ["red"]} for c in ("colour", "shape", "colour", "colour")]
    table = score_table(questions, ["red", "blue", "red", "blue"], "exact").splitlines()
    assert [line.split() for line in table] == [
        ["category", "questions", "accuracy"],
        ["colour", "3", "66.67"],
        ["shape", "1", "0.00"],
        ["all", "4", "50.00"],
    ]


# From questions to answers


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    torch.set_num_threads(1)
    return Workbench(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def questions():
    """Eight with an image and three without, of several lengths; the last has the same id as the one before."""
    texts = [
        "Which color?",
        "What is shown in this image?",
        "How many triangles are there, and which of them is green?",
    ]
    asked = [{"question_id": i, "image": f"{c}.png", "text": texts[i % 3], "answer": c} for i, c in enumerate(COLOURS)]
    words = [{"question_id": min(8 + i, 9), "text": text, "answers": ["one"]} for i, text in enumerate(texts)]
    return asked + words


@pytest.fixture
def command(bench, questions, tmp_path, monkeypatch):
    """Runs evaluate.py in this process, in a folder of its own; returns the lines of its answer file."""
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))

    def command(*options, model="base"):
        arguments = ["--questions", "q.jsonl", "--out", "answers.jsonl", "--images", str(bench.folder / "pictures")]
        arguments += ["--model", str(bench.folder / model)] if model else []
        arguments += ["--metric", "exact", "--max-new-tokens", "8", "--device", "cpu", *options]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
        evaluate.main()
        return (tmp_path / "answers.jsonl").read_text().splitlines(keepends=True)

    return command


def test_answers_do_not_depend_on_the_batch_size(command, tmp_path):
    one_by_one = command("--batch", "1")
    (tmp_path / "answers.jsonl").unlink()
    assert command("--batch", "4") == one_by_one
    assert len({json.loads(line)["text"] for line in one_by_one}) > 5  # and they differ


def test_answers_are_in_the_format_of_llava(command, questions):
    lines = [json.loads(line) for line in command("--short")]
    names = ["question_id", "prompt", "text", "model_id", "settings"]
    assert [list(line) for line in lines] == [names] * len(questions)
    assert [line["question_id"] for line in lines] == [question["question_id"] for question in questions]
    assert lines[0]["prompt"] == "Which color?\nAnswer the question using a single word or phrase."
    assert lines[0]["model_id"] == "base"


def test_an_answer_is_what_the_model_generates(bench, command, questions):
    lines = [json.loads(line) for line in command("--system", "")]
    model = LlavaForConditionalGeneration.from_pretrained(bench.folder / "base")
    processor = LlavaProcessor.from_pretrained(bench.folder / "base")
    inputs = processor(None, f"USER: {questions[-1]['text']} ASSISTANT:")
    new = model.generate(**inputs, max_new_tokens=8)[0, inputs.input_ids.shape[1] :]
    assert lines[-1]["text"] == processor.decode(new, skip_special_tokens=True).strip()


def test_earlier_turns_precede_the_question_and_the_image_precedes_them(bench, tmp_path, monkeypatch):
    history = [["Which color?", "red"], ["And what shape?", "A disc."]]
    file = tmp_path / "q.jsonl"
    file.write_text(
        json.dumps({"question_id": 1, "image": "red.png", "text": "Why?", "answer": "", "history": history})
    )
    processor = LlavaProcessor.from_pretrained(bench.folder / "base")
    model = LlavaForConditionalGeneration.from_pretrained(bench.folder / "base")
    seen = []
    monkeypatch.setattr(model, "generate", lambda input_ids, *rest: seen.append(input_ids) or input_ids)
    evaluate.answer_questions(model, processor, read_questions(file, "exact")[2], bench.folder / "pictures")
    expected = "USER: <image>\nWhich color? ASSISTANT: red</s>USER: And what shape? ASSISTANT: A disc.</s>"
    expected += "USER: Why? ASSISTANT:"
    assert torch.equal(seen[0], processor(Image.new("RGB", (9, 9)), expected).input_ids)


@pytest.mark.parametrize("history", ["earlier", [["Which?"]], [["Which?", 1]], [{"from": "human"}]])
def test_a_history_that_is_not_a_list_of_turns_is_refused(history, tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps({"question_id": 1, "text": "Why?", "answer": "", "history": history}))
    with pytest.raises(ValueError, match="not a list of turns"):
        read_questions(file, "exact")


def test_only_missing_answers_are_generated_again(command, tmp_path, monkeypatch):
    whole = command("--batch", "4")
    asked = []
    real = evaluate.answer_questions
    monkeypatch.setattr(
        evaluate, "answer_questions", lambda m, p, batch, *rest: asked.extend(batch) or real(m, p, batch, *rest)
    )
    (tmp_path / "answers.jsonl").write_text("".join(whole[:5]) + whole[5][:20])  # stopped while writing the sixth
    assert command("--batch", "4") == whole
    assert len(asked) == len(whole) - 5


@pytest.mark.parametrize(
    "options", [("--system", "Be brief."), ("--image-mode", "pad"), ("--max-new-tokens", "9")], ids=lambda pair: pair[0]
)
def test_answers_with_other_settings_are_not_mixed(options, command):
    command()
    with pytest.raises(SystemExit, match=f"contains answers with {options[0][2:].replace('-', '_')} .*another --out"):
        command(*options)


def test_a_last_line_without_its_line_feed_is_kept(command, tmp_path):
    whole = command()
    (tmp_path / "answers.jsonl").write_text("".join(whole).rstrip("\n"))
    assert command(model=None) == whole


def test_a_missing_image_is_reported_before_the_model_is_loaded(command):
    with pytest.raises(SystemExit, match=r"question 0 needs the image red.png, not in \.$"):
        command("--images", ".", model="no such model")


def test_complete_answers_are_scored_without_a_model(command, questions, tmp_path, capsys):
    lines = [{"question_id": q["question_id"], "prompt": q["text"], "text": "red."} for q in questions]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command(model=None)
    assert capsys.readouterr().out.splitlines()[-1].split() == ["all", "11", "9.09"]  # one of eleven is red


def test_missing_answers_need_a_model(command):
    with pytest.raises(SystemExit, match="lacks 11 of 11 answers: give a --model"):
        command(model=None)


def test_answers_to_other_prompts_or_from_another_model_are_refused(command):
    command()
    with pytest.raises(SystemExit, match=r"answers other prompts .* choose another --out"):
        command("--short")
    with pytest.raises(SystemExit, match="answers from the model base: choose another --out"):
        command(model="another")


def test_vqa_needs_a_list_of_answers(command):
    with pytest.raises(SystemExit, match='question 0 needs "answers", a list of 4 or more'):
        command("--metric", "vqa")


def test_an_invalid_line_of_the_question_file_is_named(command, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "text": "?", "answer": "x"}\n{"question')
    with pytest.raises(SystemExit, match=r"q.jsonl, line 2 is not valid JSON"):
        command()


def test_the_options_reach_the_model(command, monkeypatch):
    seen = []
    real = evaluate.answer_questions

    def watched(model, processor, questions, images, system, max_new_tokens):
        seen.append((processor.image_processor.do_pad, system, max_new_tokens))
        return real(model, processor, questions, images, system, max_new_tokens)

    monkeypatch.setattr(evaluate, "answer_questions", watched)
    command("--image-mode", "pad", "--system", "Be brief.", "--max-new-tokens", "3")
    assert set(seen) == {(True, "Be brief.", 3)}


@pytest.mark.parametrize(
    ("metric", "answers", "sentence"),
    [
        ("pope", {"answer": "maybe"}, "has an answer that is invalid for pope"),
        ("letter", {"answer": "(B) a cat"}, "has an answer that is invalid for letter"),
        ("exact", {}, "needs"),
        ("vqa", {"answers": ["red"] * 3}, "needs"),
    ],
)
def test_ground_truth_that_the_metric_cannot_use_is_refused_at_once(metric, answers, sentence, tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps({"question_id": 1, "text": "Which?"} | answers))
    with pytest.raises(ValueError, match=sentence):
        read_questions(file, metric)


def test_ground_truth_may_be_in_the_format_of_vqa_or_numbers(tmp_path):
    file = tmp_path / "q.jsonl"
    lines = [
        {"question_id": 1, "text": "?", "answers": [{"answer": "red"}] * 4},
        {"question_id": 2, "text": "?", "answers": [3] * 4},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [question["answers"] for question in read_questions(file, "vqa")[2]] == [["red"] * 4, ["3"] * 4]
