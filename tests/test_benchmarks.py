"""The benchmarks' official files: small ones in each format, whose scores are worked out by hand."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_training import Workbench

import evaluate
from extras.benchmarks import read_questions

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."

# The official files. Each has more fields than are used here; a few stand for them.


def people(**counts: int) -> list[dict]:
    """The answers of VQAv2 and VizWiz: people(cat=3, dog=7)."""
    texts = [text for text, count in counts.items() for _ in range(count)]
    return [{"answer": text, "answer_confidence": "yes", "answer_id": i} for i, text in enumerate(texts, start=1)]


def presence(number: int, thing: str, label: str) -> dict:
    return {
        "question_id": number,
        "image": f"COCO_val2014_{number:012d}.jpg",
        "text": f"Is there a {thing} in the image?",
        "label": label,
    }


THINGS = ["cat", "dog", "bus", "car", "cup", "bed"]
POPE = [presence(i, thing, "yes" if i < 4 else "no") for i, thing in enumerate(THINGS, start=1)]
VQAV2 = {
    "info": {"description": "This is v2.0 of the VQA dataset."},
    "task_type": "Open-Ended",
    "data_type": "mscoco",
    "license": {},
    "data_subtype": "val2014",
    "questions": [
        {"image_id": 262148, "question": "Which animal is it?", "question_id": 262148000},
        {"image_id": 262148, "question": "How many are there?", "question_id": 262148001},
        {"image_id": 42, "question": "Is it day?", "question_id": 42002},
    ],
}
ANNOTATIONS = {
    "data_subtype": "val2014",
    "annotations": [
        {"question_id": 42002, "image_id": 42, "answers": people(yes=10), "multiple_choice_answer": "yes"},
        {"question_id": 262148000, "image_id": 262148, "answers": people(cat=1, dog=9), "answer_type": "other"},
        {"question_id": 262148001, "image_id": 262148, "answers": people(**{"2": 2, "3": 8}), "answer_type": "number"},
        {"question_id": 7, "image_id": 7, "answers": people(no=10), "answer_type": "yes/no"},
    ],
}
GQA = {
    "201307251": {
        "imageId": "2354786",
        "question": "Is it overcast?",
        "answer": "no",
        "fullAnswer": "No, it is clear.",
    },
    "201640614": {"imageId": "n161313", "question": "What is red?", "answer": "fire truck", "isBalanced": True},
    "202225914": {"imageId": "2354786", "question": "Which side?", "answer": "left", "semantic": []},
}
TEXTVQA = {
    "dataset_type": "val",
    "dataset_version": "0.5.1",
    "data": [
        {
            "question": "what is the brand of this camera?",
            "image_id": "003a8ae2ef43b901",
            "question_id": 34602,
            "answers": ["dakota"] * 3 + ["nous les gosses"] * 7,
            "set_name": "val",
        },
        {
            "question": "what does the small white text spell?",
            "image_id": "0054c91397f2fe05",
            "question_id": 34603,
            "answers": ["copenhagen"] * 10,
            "set_name": "val",
        },
    ],
}
VIZWIZ = [
    {
        "image": "VizWiz_val_00000000.jpg",
        "question": "What is this?",
        "answers": people(unanswerable=9, soap=1),
        "answer_type": "unanswerable",
        "answerable": 0,
    },
    {
        "image": "VizWiz_val_00000001.jpg",
        "question": "What is this?",
        "answers": people(unanswerable=2, coke=8),
        "answer_type": "other",
        "answerable": 1,
    },
    {
        "image": "VizWiz_val_00000002.jpg",
        "question": "Which flavour is it?",
        "answers": people(cherry=10),
        "answer_type": "other",
        "answerable": 1,
    },
]


def problem(answer: int, image: str | None, hint: str = "", split: str = "test") -> dict:
    return {
        "question": "Which is it?",
        "choices": ["red", "green", "blue"],
        "answer": answer,
        "hint": hint,
        "image": image,
        "split": split,
        "subject": "natural science",
        "lecture": "",
    }


SCIENCEQA = {
    "1": problem(0, "image.png", split="train"),
    "4": problem(1, "image.png", "Look at the picture."),
    "5": problem(2, "choice.png"),
    "6": problem(0, None, "Red is a colour."),
    "8": problem(0, None),
    "9": problem(2, None),
}
SPLITS = {"train": ["1"], "val": [], "test": ["9", "4", "5", "6", "8"], "minitest": ["4"]}
FILES = {  # name: file name, content
    "POPE": ("coco_pope_random.json", POPE),
    "VQAv2": ("v2_OpenEnded_mscoco_val2014_questions.json", VQAV2),
    "GQA": ("testdev_balanced_questions.json", GQA),
    "TextVQA": ("TextVQA_0.5.1_val.json", TEXTVQA),
    "VizWiz": ("val.json", VIZWIZ),
    "ScienceQA": ("problems.json", SCIENCEQA),
}


def write(folder: Path, name: str, content: object = None, indent: int | None = None) -> Path:
    """Writes a benchmark's file, or other content in its place, with what lies beside it; returns its path."""
    file_name, official = FILES[name]
    content = official if content is None else content
    if name == "POPE":
        text = "".join(json.dumps(line) + "\n" for line in content)
    else:
        text = json.dumps(content, indent=indent)
    (folder / file_name).write_text(text)
    (folder / "annotations.json").write_text(json.dumps(ANNOTATIONS))
    (folder / "pid_splits.json").write_text(json.dumps(SPLITS))
    return folder / file_name


def changed(content: object, *path: object, to: object = None) -> object:
    """The content with one entry replaced, or removed without `to`."""
    content = copy.deepcopy(content)
    place = content
    for step in path[:-1]:
        place = place[step]
    if to is None:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return content


def without_answers(name: str) -> object:
    """The content as in a test split."""
    content = copy.deepcopy(FILES[name][1])
    entries = {"GQA": lambda: content.values(), "TextVQA": lambda: content["data"], "VizWiz": lambda: content}
    for entry in entries.get(name, list)():
        for field in ("answer", "answers", "fullAnswer", "answerable", "answer_type"):
            entry.pop(field, None)
    return content


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs evaluate.py on a benchmark in a folder of its own; returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def command(name, *options, content=None):
        file = write(tmp_path, name, content)
        arguments = ["--questions", file.name, "--out", "answers.jsonl", *options]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        evaluate.main()
        return capsys.readouterr().out

    return command


@pytest.fixture
def answered(tmp_path, command):
    """The same for texts that a model is said to have answered, in the order of the questions."""

    def answered(name, texts, *options, content=None):
        _, _, questions = read_questions(write(tmp_path, name, content))
        lines = [
            {"question_id": question["question_id"], "prompt": question["prompt"], "text": text, "model_id": "m"}
            for question, text in zip(questions, texts, strict=True)
        ]
        (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return command(name, *options, content=content)

    return answered


def rows(table: str) -> list[list[str]]:
    return [line.split() for line in table.splitlines()]


# Questions


@pytest.mark.parametrize(
    ("name", "metric", "count"),
    [
        ("POPE", "pope", 6),
        ("VQAv2", "vqa", 3),
        ("GQA", "exact", 3),
        ("TextVQA", "vqa", 2),
        ("VizWiz", "vqa", 3),
        ("ScienceQA", "scienceqa", 5),
    ],
)
@pytest.mark.parametrize("indent", [None, 1], ids=["one line", "indented"])
def test_the_format_is_detected_from_the_content(name, metric, count, indent, tmp_path):
    file = write(tmp_path, name, indent=indent).rename(tmp_path / "some file")
    benchmark, own_metric, questions = read_questions(file)
    assert (benchmark.name, own_metric, len(questions)) == (name, metric, count)


@pytest.mark.parametrize(
    ("name", "index", "question_id", "image", "prompt"),
    [
        ("POPE", 0, 1, "COCO_val2014_000000000001.jpg", "Is there a cat in the image?" + SHORT),
        ("VQAv2", 1, 262148001, "COCO_val2014_000000262148.jpg", "How many are there?" + SHORT),
        ("VQAv2", 2, 42002, "COCO_val2014_000000000042.jpg", "Is it day?" + SHORT),
        ("GQA", 1, "201640614", "n161313.jpg", "What is red?" + SHORT),
        ("TextVQA", 0, 34602, "003a8ae2ef43b901.jpg", "what is the brand of this camera?" + SHORT),
        (
            "VizWiz",
            2,
            "VizWiz_val_00000002.jpg",
            "VizWiz_val_00000002.jpg",
            "Which flavour is it?" + UNANSWERABLE + SHORT,
        ),
        ("ScienceQA", 0, "9", None, "Which is it?\nA. red\nB. green\nC. blue" + LETTER),
        (
            "ScienceQA",
            1,
            "4",
            "4/image.png",
            "Context: Look at the picture.\nWhich is it?\nA. red\nB. green\nC. blue" + LETTER,
        ),
    ],
)
def test_questions_are_asked_as_in_the_paper(name, index, question_id, image, prompt, tmp_path):
    question = read_questions(write(tmp_path, name))[2][index]
    assert (question["question_id"], question.get("image"), question["prompt"]) == (question_id, image, prompt)
    assert question["history"] == []


@pytest.mark.parametrize(
    ("subtype", "image"),
    [
        ("train2014", "COCO_train2014_000000262148.jpg"),
        ("test2015", "COCO_test2015_000000262148.jpg"),
        ("test-dev2015", "COCO_test2015_000000262148.jpg"),
    ],
)
def test_the_split_of_vqav2_is_in_the_name_of_the_image(subtype, image, tmp_path):
    file = write(tmp_path, "VQAv2", VQAV2 | {"data_subtype": subtype})
    assert read_questions(file)[2][0]["image"] == image


def test_only_the_test_split_of_scienceqa_is_asked_in_its_order(tmp_path):
    questions = read_questions(write(tmp_path, "ScienceQA"))[2]
    assert [question["question_id"] for question in questions] == ["9", "4", "5", "6", "8"]
    assert [question["answers"] for question in questions] == [["C"], ["B"], ["C"], ["A"], ["A"]]


@pytest.mark.parametrize("name", ["random", "popular", "adversarial"])
def test_the_sampling_of_pope_is_read_from_the_file_name(name, tmp_path):
    file = write(tmp_path, "POPE").rename(tmp_path / f"coco_pope_{name}.json")
    assert {question["category"] for question in read_questions(file)[2]} == {name}


def test_short_changes_nothing_where_short_answers_are_asked_for_anyway(tmp_path):
    file = write(tmp_path, "GQA")
    assert read_questions(file, short=True) == read_questions(file)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("POPE", "COCO_val2014_000000000001.jpg"),
        ("POPE", "val2014/COCO_val2014_000000000001.jpg"),
        ("VQAv2", "COCO_val2014_000000262148.jpg"),
        ("VQAv2", "val2014/COCO_val2014_000000262148.jpg"),
        ("GQA", "2354786.jpg"),
        ("GQA", "images/2354786.jpg"),
        ("TextVQA", "train_images/003a8ae2ef43b901.jpg"),
        ("VizWiz", "val/VizWiz_val_00000000.jpg"),
        ("ScienceQA", "4/image.png"),
        ("ScienceQA", "test/4/image.png"),
        ("ScienceQA", "images/test/4/image.png"),
    ],
)
def test_images_are_found_in_their_folder_or_its_parent(name, place, tmp_path):
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_bytes(b"")
    question = read_questions(write(tmp_path, name))[2][name == "ScienceQA"]
    assert evaluate.find_image(tmp_path, question) == tmp_path / place


# Scores. The figures are worked out by hand.


def test_the_score_of_pope(answered):
    # Three times yes, then three times no: 1 true positive, 2 false negatives, 1 false positive, 2 true negatives
    table = answered("POPE", ["Yes", "No", "No, there is no bus.", "No", "There is not.", "Yes"])
    figures = ["50.00", "50.00", "33.33", "40.00", "33.33"]
    assert rows(table) == [
        ["category", "questions", "accuracy", "precision", "recall", "F1", "yes", "ratio"],
        ["random", "6", *figures],
        ["all", "6", *figures],
    ]


@pytest.mark.parametrize(
    ("name", "options", "texts", "accuracy"),
    [
        # one of ten people: 0.3; two of ten, "2": 0.6; all of them: 1
        ("VQAv2", ["--annotations", "annotations.json"], ["A cat.", "Two", "yes"], "63.33"),
        ("VQAv2", ["--annotations", "annotations.json"], ["dog", "three", "no"], "66.67"),
        ("GQA", [], ["No.", "fire  Truck", "right"], "66.67"),
        ("GQA", [], ["It is not.", "fire truck", "on the left"], "33.33"),
        # three of ten people: 0.9; none: 0
        ("TextVQA", [], ["Dakota", "hagen"], "45.00"),
        ("TextVQA", [], ["Nous les gosses!", "copenhagen"], "100.00"),
        # nine of ten: 1; two of ten: 0.6; none: 0
        ("VizWiz", [], ["Unanswerable", "unanswerable", "Unanswerable."], "53.33"),
        ("VizWiz", [], ["soap", "Coke", "The cherry"], "76.67"),
    ],
)
def test_the_accuracy_of_each_benchmark(name, options, texts, accuracy, answered):
    table = answered(name, texts, *options)
    assert rows(table) == [["category", "questions", "accuracy"], ["all", str(len(texts)), accuracy]]


def test_the_score_of_scienceqa_for_questions_with_an_image_and_without(answered):
    table = answered("ScienceQA", ["C. blue", "B", "A. red", "The answer is A.", "(A)"])
    assert rows(table) == [
        ["category", "questions", "accuracy"],
        ["text", "only", "3", "66.67"],  # "(A)" is not in the form that the released script reads
        ["IMG", "2", "50.00"],
        ["all", "5", "60.00"],
    ]


def test_another_metric_can_be_chosen(answered):
    table = answered("ScienceQA", ["C. blue", "B", "A. red", "The answer is A.", "(A)"], "--metric", "letter")
    assert rows(table)[-1] == ["all", "5", "80.00"]


# Without ground truth


@pytest.mark.parametrize("name", ["VQAv2", "GQA", "TextVQA", "VizWiz"])
def test_questions_of_a_test_split_are_answered_and_not_scored(name, answered):
    content = without_answers(name)
    count = {"TextVQA": 2}.get(name, 3)
    printed = answered(name, ["a"] * count, content=content)
    assert printed.startswith(f"{count} answers are in answers.jsonl. {FILES[name][0]} has no ground truth: no score")
    assert ("--annotations" in printed) == (name == "VQAv2")


# Files for the servers


@pytest.mark.parametrize(
    ("name", "texts", "results"),
    [
        (
            "VQAv2",
            ["A cat.", "Two", "Yes"],
            [
                {"question_id": 262148000, "answer": "cat"},
                {"question_id": 262148001, "answer": "2"},
                {"question_id": 42002, "answer": "yes"},
            ],
        ),
        (
            "GQA",
            ["No.", "Fire truck", "left"],
            [
                {"questionId": "201307251", "prediction": "no"},
                {"questionId": "201640614", "prediction": "fire truck"},
                {"questionId": "202225914", "prediction": "left"},
            ],
        ),
        (
            "VizWiz",
            ["Unanswerable", "Coke", "The cherry."],
            [
                {"image": "VizWiz_val_00000000.jpg", "answer": "unanswerable"},
                {"image": "VizWiz_val_00000001.jpg", "answer": "coke"},
                {"image": "VizWiz_val_00000002.jpg", "answer": "cherry"},
            ],
        ),
    ],
)
@pytest.mark.parametrize("truth", [True, False], ids=["with ground truth", "without"])
def test_the_results_file_is_what_the_server_or_scorer_takes(name, texts, results, truth, answered, tmp_path):
    answered(name, texts, "--results", "sent/results.json", content=None if truth else without_answers(name))
    assert json.loads((tmp_path / "sent" / "results.json").read_text()) == results


@pytest.mark.parametrize("name", ["POPE", "TextVQA", "ScienceQA"])
def test_other_benchmarks_have_no_results_file(name, command):
    with pytest.raises(SystemExit, match=f"--results is for VQAv2, VizWiz and GQA, but .* looks like {name}"):
        command(name, "--results", "results.json")


@pytest.mark.parametrize("file", ["answers.jsonl", FILES["GQA"][0]])
def test_the_results_file_replaces_neither_questions_nor_answers(file, answered, tmp_path):
    with pytest.raises(SystemExit, match=f"--results would replace {file}: choose another file"):
        answered("GQA", ["no", "fire truck", "left"], "--results", file)
    assert (tmp_path / file).read_text()


# Refusals


@pytest.mark.parametrize(
    ("name", "path", "value", "sentence"),
    [
        ("POPE", (1, "label"), None, 'looks like POPE, but question 2 has no "label"'),
        ("POPE", (1, "image"), None, 'looks like POPE, but question 2 has no "image"'),
        ("POPE", (0, "label"), 1, 'looks like POPE, but question 1 has an invalid "label": 1'),
        ("POPE", (0, "label"), "maybe", "question 1 has an answer that is invalid for pope"),
        ("POPE", (2, "question_id"), None, 'line 3 must be an object with "question_id" and "text"'),
        ("VQAv2", ("data_subtype",), None, 'looks like VQAv2, but it has no "data_subtype"'),
        ("VQAv2", ("questions",), {}, 'looks like VQAv2, but it has an invalid "questions": {}'),
        ("VQAv2", ("questions",), [], "contains no questions"),
        ("VQAv2", ("questions", 1, "question"), None, r'looks like VQAv2, but questions\[1\] has no "question"'),
        ("VQAv2", ("questions", 2, "image_id"), "42", r'questions\[2\] has an invalid "image_id": "42"'),
        ("VQAv2", ("questions", 0), 7, r"looks like VQAv2, but questions\[0\] is not an object"),
        ("GQA", ("201640614", "imageId"), None, 'looks like GQA, but question 201640614 has no "imageId"'),
        ("GQA", ("201640614", "question"), None, 'looks like GQA, but question 201640614 has no "question"'),
        ("GQA", ("201640614", "answer"), ["red"], 'question 201640614 has an invalid "answer"'),
        ("GQA", ("201640614", "answer"), None, 'question 201640614 needs "answer"'),
        ("GQA", ("201640614",), [], "looks like GQA, but question 201640614 is not an object"),
        ("TextVQA", ("data",), "val", 'looks like TextVQA, but it has an invalid "data": "val"'),
        ("TextVQA", ("data", 1, "image_id"), None, r'looks like TextVQA, but data\[1\] has no "image_id"'),
        ("TextVQA", ("data", 1, "answers"), "red", r'data\[1\] has an invalid "answers"'),
        ("TextVQA", ("data", 1, "answers"), ["red"] * 3, 'question 34603 needs "answers", a list of 4 or more'),
        ("VizWiz", (1, "image"), None, 'looks like VizWiz, but entry 1 has no "image"'),
        ("VizWiz", (1, "question"), None, 'looks like VizWiz, but entry 1 has no "question"'),
        ("VizWiz", (1, "answers"), None, 'question VizWiz_val_00000001.jpg needs "answers", a list of 4 or more'),
        ("VizWiz", (1, "answers", 3), {"text": "?"}, 'entry 1 has an invalid "answers": they must be texts'),
        ("ScienceQA", ("5",), None, "looks like ScienceQA, but problem 5, which pid_splits.json lists, is missing"),
        ("ScienceQA", ("5", "choices"), None, 'looks like ScienceQA, but problem 5 has no "choices"'),
        ("ScienceQA", ("5", "choices"), ["red"], 'problem 5 has invalid "choices": they must be two to five texts'),
        ("ScienceQA", ("5", "answer"), 3, 'problem 5 has an invalid "answer": 3, where there are 3 choices'),
        ("ScienceQA", ("5", "split"), None, 'problem 5 has no "split"'),
    ],
)
def test_a_malformed_file_is_refused_with_its_benchmark_and_the_place(name, path, value, sentence, tmp_path):
    file = write(tmp_path, name, changed(FILES[name][1], *path, to=value))
    with pytest.raises(ValueError, match=sentence):
        read_questions(file)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "contains no questions"),
        ("[]", "contains no questions"),
        ('{"questions": [', "is not valid JSON: .*; is the download complete?"),
        ("{}", "is in no known format: it must be a file of POPE"),
        ("7", "is in no known format"),
        ('["a"]', "is in no known format"),
        ('[{"question_id": 1, "text": "?"}]', "is in no known format"),
        (json.dumps(ANNOTATIONS), "contains the answers of VQAv2: pass it as --annotations"),
        (json.dumps(SPLITS), "looks like the list of ScienceQA's splits: pass problems.json"),
        ('[{"id": 1, "conversations": []}]', "looks like training data for train.py"),
        ('{"question_id": 1, "text": "?", "answer": "a"}', "needs a --metric: exact, vqa, pope, letter"),
        ('{"question_id": 1, "text": 7, "answer": "a"}', 'question 1 has an invalid "text": 7'),
    ],
)
def test_other_files_are_refused(content, sentence, tmp_path):
    (tmp_path / "q.json").write_text(content)
    with pytest.raises(ValueError, match=sentence):
        read_questions(tmp_path / "q.json")


def test_scienceqa_needs_the_list_of_its_splits(tmp_path):
    file = write(tmp_path, "ScienceQA")
    (tmp_path / "pid_splits.json").unlink()
    with pytest.raises(ValueError, match=r"looks like ScienceQA, but pid_splits.json, .*, is not beside it"):
        read_questions(file)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (VQAV2, 'annotations.json should be VQAv2\'s annotations, but it has no "annotations"'),
        ([], "annotations.json should be VQAv2's annotations, but it is not an object"),
        ({"annotations": []}, "annotations.json has no answers to question 262148000 of .*: are both of one split?"),
        (changed(ANNOTATIONS, "annotations", 1, "answers"), r'annotations\[1\] has no "answers"'),
        (changed(ANNOTATIONS, "annotations", 1, "question_id"), r'annotations\[1\] has no "question_id"'),
        (changed(ANNOTATIONS, "annotations", 1, "answers", to=[{}]), r'annotations\[1\] has an invalid "answers"'),
        (changed(ANNOTATIONS, "annotations", 1, "answers", to=people(cat=3)), "a list of 4 or more"),
    ],
)
def test_unfit_annotations_are_refused(content, sentence, tmp_path):
    file = write(tmp_path, "VQAv2")
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=sentence):
        read_questions(file, annotations=tmp_path / "annotations.json")


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        (
            "GQA",
            ["--annotations", "annotations.json"],
            "--annotations is for VQAv2, but .* looks like GQA: leave it out",
        ),
        ("ScienceQA", ["--short"], "ScienceQA asks for the option's letter, so --short does not apply"),
        ("GQA", ["--metric", "pope"], "question 201640614 has an answer that is invalid for pope"),
        ("GQA", ["--metric", "vqa"], 'question 201307251 needs "answers", a list of 4 or more'),
        ("GQA", [], "answers.jsonl lacks 3 of 3 answers: give a --model"),
        (
            "VizWiz",
            ["--model", "none"],
            r"question VizWiz_val_00000000.jpg needs the image VizWiz_val_00000000.jpg, not in . \(nor in "
            r"train or val or test\)",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused_at_once(name, options, sentence, command):
    with pytest.raises(SystemExit, match=sentence):
        command(name, *options)


# With a model


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    torch.set_num_threads(1)
    return Workbench(tmp_path_factory.mktemp("benchmarks"))


def test_a_benchmark_is_answered_and_resumed(bench, command, tmp_path):
    for number, name in [("4", "image.png"), ("5", "choice.png")]:
        (tmp_path / "test" / number).mkdir(parents=True)
        Image.new("RGB", (30, 40), "red").save(tmp_path / "test" / number / name)
    options = ["--model", bench.folder / "base", "--max-new-tokens", "4", "--device", "cpu", "--batch", "2"]
    table = command("ScienceQA", *options)
    assert [row[:-1] for row in rows(table)[1:]] == [["text", "only", "3"], ["IMG", "2"], ["all", "5"]]
    whole = (tmp_path / "answers.jsonl").read_text()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [line["question_id"] for line in lines] == ["9", "4", "5", "6", "8"]
    assert all(line["prompt"].endswith(LETTER) for line in lines)
    (tmp_path / "answers.jsonl").write_text(whole[: len(whole) // 2])
    assert command("ScienceQA", *options) == table
    assert (tmp_path / "answers.jsonl").read_text() == whole
