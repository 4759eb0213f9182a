"""Question files: six benchmarks of the LLaVA-1.5 paper as downloaded, and this project's own JSON lines.

The format is detected from the content. Whatever it is, the questions come out as dictionaries with "question_id",
"prompt" (with the paper's suffix), "answers" (the ground truth, if the file has it), and where they apply "image",
"folders" (subfolders of the image folder where the image may be), "history" and "category".

Sources: the benchmarks' own files; for the prompts, LLaVA-1.5 (arXiv 2310.03744), its appendix and released scripts.
"""

import json
import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extras.scores import FEWEST, METRICS, TRUTH, plain, vqa_normalised
from tokenizer import SHORT_ANSWER

UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
OPTION_LETTER = "\nAnswer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark asks and scores. `result` makes an entry of the file that its server or scorer takes."""

    name: str
    metric: str | None
    suffix: str = SHORT_ANSWER
    result: Callable[[dict, str], dict] | None = None


OWN = Benchmark("this project's own format", None, "")
POPE = Benchmark("POPE", "pope")
VQAV2 = Benchmark(
    "VQAv2", "vqa", result=lambda q, text: {"question_id": q["question_id"], "answer": vqa_normalised(text)}
)
GQA = Benchmark("GQA", "exact", result=lambda q, text: {"questionId": q["question_id"], "prediction": plain(text)})
TEXTVQA = Benchmark("TextVQA", "vqa")
VIZWIZ = Benchmark(
    "VizWiz", "vqa", UNANSWERABLE + SHORT_ANSWER, lambda q, text: {"image": q["image"], "answer": vqa_normalised(text)}
)
SCIENCEQA = Benchmark("ScienceQA", "scienceqa", OPTION_LETTER)


def read_questions(
    file: Path, metric: str | None = None, short: bool = False, annotations: Path | None = None
) -> tuple[Benchmark, str, list[dict]]:
    """Reads a question file of any format: its benchmark, its metric (unless `metric` names another), its questions.

    Args:
        short: ask for a single word or phrase; most benchmarks do so anyway.
        annotations: VQAv2's answers, which are in a file of their own.

    Raises:
        ValueError: the file is malformed, a question appears twice, or its ground truth is not what the metric needs.
    """
    benchmark, questions = read_benchmark(file, annotations)
    if not questions:
        raise ValueError(f"{file} contains no questions")
    if annotations and benchmark is not VQAV2:
        raise ValueError(f"--annotations is for VQAv2, but {file} looks like {benchmark.name}: leave it out")
    metric = metric or benchmark.metric
    if metric is None:
        raise ValueError(f"{file} is in this project's own format, which needs a --metric: {', '.join(METRICS)}")
    if short and benchmark is SCIENCEQA:
        raise ValueError("ScienceQA asks for the option's letter, so --short does not apply: leave it out")
    suffix = SHORT_ANSWER if short and benchmark is OWN else benchmark.suffix
    unscored = benchmark is not OWN and not any(question["answers"] for question in questions)
    seen = set()
    for question in questions:
        question["prompt"] = question["text"] + suffix
        question.setdefault("history", [])
        if not unscored:
            check_truth(question["answers"], metric, f"{file}: question {question['question_id']}")
        if key(question) in seen:
            raise ValueError(f"{file}: question {question['question_id']} appears twice with the same text")
        seen.add(key(question))
    return benchmark, metric, questions


def check_truth(answers: list[str], metric: str, where: str) -> None:
    """Raises a ValueError if a question's ground truth is not what the metric needs."""
    if not all(re.fullmatch(TRUTH.get(metric, "(?s).*"), answer) for answer in answers):
        raise ValueError(f"{where} has an answer that is invalid for {metric}")
    fewest = FEWEST.get(metric, 1)
    if len(answers) < fewest:
        needed = f'"answers", a list of {fewest} or more' if fewest > 1 else '"answer", or a list "answers"'
        raise ValueError(f"{where} needs {needed} for the metric {metric}")


def key(entry: dict) -> tuple[str, str]:
    """What identifies a question or an answer: some benchmarks use one id for two questions."""
    return str(entry["question_id"]), entry["prompt"]


# Files


def load_json(file: Path) -> Any:  # noqa: ANN401
    """The content of a JSON file of any size; a ValueError names the file if it is damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}; is the download complete?") from error


def read_lines(file: Path) -> list[dict]:
    """The objects of a JSON-lines file.

    Raises:
        ValueError: a line is not an object with "question_id" and "text".
    """
    entries = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            try:
                entries.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{file}, line {number} is not valid JSON: {error}") from error
            if not isinstance(entries[-1], dict) or not {"question_id", "text"} <= entries[-1].keys():
                raise ValueError(f'{file}, line {number} must be an object with "question_id" and "text"')
    return entries


def is_lines(file: Path) -> bool:
    """Whether these are JSON lines: the first line is a whole object, and more lines follow or it is a question."""
    with open(file, encoding="utf-8") as opened:
        lines = (line for line in opened if line.strip())
        try:
            first = json.loads(next(lines, '{"question_id": 0}'))  # an empty file is one without lines
            return isinstance(first, dict) and ("question_id" in first or next(lines, None) is not None)
        except (ValueError, RecursionError):
            return False


def need(entry: object, where: str, **kinds: Any) -> list[Any]:  # noqa: ANN401
    """The values of an entry's fields; a ValueError says where one is missing or is not of its type."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is not an object")
    for name, kind in kinds.items():
        if name not in entry:
            raise ValueError(f'{where} has no "{name}"')
        if not isinstance(entry[name], kind):
            raise ValueError(f'{where} has an invalid "{name}": {json.dumps(entry[name])[:60]}')
    return [entry[name] for name in kinds]


def answer_texts(entry: dict, where: str) -> list[str]:
    """The texts in the list "answers", which holds them as they are or in objects with "answer"; [] without a list."""
    if "answers" not in entry:
        return []
    (answers,) = need(entry, where, answers=list)
    texts: list[Any] = [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f'{where} has an invalid "answers": they must be texts, or objects with "answer"')
    return texts


# Formats: each reader returns questions with "question_id", "text" and "answers"


def read_benchmark(file: Path, annotations: Path | None = None) -> tuple[Benchmark, list[dict]]:
    """Detects the format of a question file, and reads it.

    Raises:
        ValueError: the file is malformed, or in none of the formats.
    """
    if is_lines(file):
        entries = read_lines(file)
        labelled = any("label" in entry for entry in entries)
        if labelled and not any("answer" in entry or "answers" in entry for entry in entries):
            return POPE, read_pope(entries, file)
        return OWN, read_own(entries, file)
    content = load_json(file)
    entries = content if isinstance(content, list) else list(content.values()) if isinstance(content, dict) else []
    fields = {name for entry in entries if isinstance(entry, dict) for name in entry}
    if isinstance(content, list) and ("question" in fields or not content):
        return VIZWIZ, read_vizwiz(content, f"{file} looks like VizWiz, but")
    if isinstance(content, list) and "conversations" in fields:
        raise ValueError(f"{file} looks like training data for train.py: --questions takes questions")
    content = content if isinstance(content, dict) else {}
    if "questions" in content:
        return VQAV2, read_vqav2(content, file, annotations)
    if "data" in content:
        return TEXTVQA, read_textvqa(content, f"{file} looks like TextVQA, but")
    if "choices" in fields:
        return SCIENCEQA, read_scienceqa(content, file)
    if "imageId" in fields:
        return GQA, read_gqa(content, f"{file} looks like GQA, but")
    if "annotations" in content:
        raise ValueError(
            f"{file} contains the answers of VQAv2: pass it as --annotations, and the questions' file here"
        )
    if isinstance(content.get("test"), list):
        raise ValueError(f"{file} looks like the list of ScienceQA's splits: pass problems.json, which lies beside it")
    raise ValueError(
        f"{file} is in no known format: it must be a file of POPE, VQAv2, GQA, TextVQA, VizWiz or ScienceQA as "
        'downloaded, or JSON lines with "question_id" and "text"'
    )


def read_own(entries: list[dict], file: Path) -> list[dict]:
    """This project's JSON lines, with "answer" or "answers" and all other fields as they are."""
    for entry in entries:
        where = f"{file}: question {entry['question_id']}"
        need(entry, where, text=str)
        history = entry.setdefault("history", [])
        if not isinstance(history, list) or not all(is_turn(turn) for turn in history):
            raise ValueError(f"{where} has a history that is not a list of turns")
        answers = entry.get("answers", entry.get("answer"))
        answers = answers if isinstance(answers, list) else [answers]
        answers = [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]  # VQA's format
        entry["answers"] = [str(answer) for answer in answers if answer is not None]
    return entries


def is_turn(turn: object) -> bool:
    """Whether this is a pair of a question and its answer."""
    return isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)


def read_pope(entries: list[dict], file: Path) -> list[dict]:
    """POPE's JSON lines; the sampling (random, popular or adversarial) is in the file's name."""
    category = next((name for name in ("random", "popular", "adversarial") if name in file.stem), "")
    questions = []
    for entry in entries:
        where = f"{file} looks like POPE, but question {entry['question_id']}"
        image, text, label = need(entry, where, image=str, text=str, label=str)
        question = {"question_id": entry["question_id"], "text": text, "answers": [label], "category": category}
        questions.append(question | {"image": image, "folders": ["val2014"]})
    return questions


def read_vqav2(content: dict, file: Path, annotations: Path | None) -> list[dict]:
    """VQAv2's questions and, if there is a second file, its answers; the name of the image is made from its id."""
    where = f"{file} looks like VQAv2, but"
    entries, subtype = need(content, f"{where} it", questions=list, data_subtype=str)
    folder = subtype.replace("test-dev", "test")  # the images of test-dev are some of test's
    truth = None if annotations is None else read_annotations(annotations)
    questions = []
    for i, entry in enumerate(entries):
        image, text, number = need(entry, f"{where} questions[{i}]", image_id=int, question=str, question_id=int)
        if truth is not None and number not in truth:
            raise ValueError(f"{annotations} has no answers to question {number} of {file}: are both of one split?")
        question = {"question_id": number, "text": text, "answers": truth[number] if truth is not None else []}
        questions.append(question | {"image": f"COCO_{folder}_{image:012d}.jpg", "folders": [folder]})
    return questions


def read_annotations(file: Path) -> dict[int, list[str]]:
    """VQAv2's answers by question id."""
    where = f"{file} should be VQAv2's annotations, but"
    (entries,) = need(load_json(file), f"{where} it", annotations=list)
    truth = {}
    for i, entry in enumerate(entries):
        number, _ = need(entry, f"{where} annotations[{i}]", question_id=int, answers=list)
        truth[number] = answer_texts(entry, f"{where} annotations[{i}]")
    return truth


def read_gqa(content: dict, where: str) -> list[dict]:
    """GQA's questions; those of the test and challenge splits have no answers."""
    questions = []
    for number, entry in content.items():
        image, text = need(entry, f"{where} question {number}", imageId=str, question=str)
        answers = need(entry, f"{where} question {number}", answer=str) if "answer" in entry else []
        question = {"question_id": number, "text": text, "answers": answers}
        questions.append(question | {"image": f"{image}.jpg", "folders": ["images"]})
    return questions


def read_textvqa(content: dict, where: str) -> list[dict]:
    """TextVQA's questions; those of the test split have no answers."""
    (entries,) = need(content, f"{where} it", data=list)
    questions = []
    for i, entry in enumerate(entries):
        place = f"{where} data[{i}]"
        image, text, number = need(entry, place, image_id=str, question=str, question_id=int | str)
        question = {"question_id": number, "text": text, "answers": answer_texts(entry, place)}
        questions.append(question | {"image": f"{image}.jpg", "folders": ["train_images", "test_images"]})
    return questions


def read_vizwiz(content: list, where: str) -> list[dict]:
    """VizWiz's questions; those of the test split have no answers. The image's name is the id."""
    questions = []
    for i, entry in enumerate(content):
        image, text = need(entry, f"{where} entry {i}", image=str, question=str)
        question = {"question_id": image, "text": text, "answers": answer_texts(entry, f"{where} entry {i}")}
        questions.append(question | {"image": image, "folders": ["train", "val", "test"]})
    return questions


def read_scienceqa(content: dict, file: Path) -> list[dict]:
    """The problems of ScienceQA's test split, in the order of pid_splits.json; many have no image."""
    where = f"{file} looks like ScienceQA, but"
    splits = file.with_name("pid_splits.json")
    if not splits.is_file():
        raise ValueError(f"{where} {splits.name}, which lists the problems of the test split, is not beside it")
    (numbers,) = need(load_json(splits), f"{splits} should list ScienceQA's splits, but it", test=list)
    questions = []
    for number in numbers:
        place = f"{where} problem {number}"
        if number not in content:
            raise ValueError(f"{place}, which {splits.name} lists, is missing")
        text, choices, answer = need(content[number], place, question=str, choices=list, answer=int)
        if not 2 <= len(choices) <= 5 or not all(isinstance(choice, str) for choice in choices):
            raise ValueError(f'{place} has invalid "choices": they must be two to five texts')
        if not 0 <= answer < len(choices):
            raise ValueError(f'{place} has an invalid "answer": {answer}, where there are {len(choices)} choices')
        hint, image = content[number].get("hint"), content[number].get("image")
        options = [f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, choices, strict=False)]
        text = "\n".join([*([f"Context: {hint}"] if hint else []), text, *options])
        question = {"question_id": number, "text": text, "answers": [string.ascii_uppercase[answer]]}
        if image:
            (split,) = need(content[number], place, split=str)
            question |= {"image": f"{number}/{image}", "folders": [split, f"images/{split}"]}
        questions.append(question | {"category": "IMG" if image else "text only"})
    return questions
