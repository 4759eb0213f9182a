"""Answers the questions in a file, and scores the answers as the benchmarks of the LLaVA-1.5 paper do.

    python evaluate.py --model FOLDER --questions q.jsonl --images FOLDER --out answers.jsonl --metric vqa --short

    q.jsonl        {"question_id": 1, "image": "a.jpg", "text": "What is this?", "answers": ["cat", ...]} per line
    answers.jsonl  {"question_id": 1, "prompt": "What is this?", "text": "A cat", "model_id": "..."} per line

A question without "image" is text only. "history" may contain earlier turns, [["Is there a cat?", "Yes."], ...]; the
image then belongs to the first of them, and --short applies only to the question itself. Scoring needs "answer", or
"answers" for a list of them; with "category", the table has one line per category. Answers are written as soon as they
are generated, and the same command line resumes with the missing ones. Once all of them are in the file, they can be
scored without --model. Decoding is greedy.

Sources: LLaVA-1.5 (arXiv 2310.03744), section 4, and its released evaluation scripts; VQA v2's official evaluation
(arXiv 1612.00837) for the accuracy over ten answers; POPE (arXiv 2305.10355).
"""

import argparse
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from extras.terminal import command_line, handle_early_interrupt

if __name__ == "__main__":
    handle_early_interrupt("evaluate.py")

from tqdm import tqdm

from extras.images import load_image
from extras.machine import pick_device
from llava import LlavaForConditionalGeneration
from processor import LlavaProcessor
from tokenizer import IMAGE_TOKEN, SHORT_ANSWER, VICUNA_SYSTEM

# Scores of one answer, from 0 to 1; `answers` are the ground truth


def exact_match(text: str, answers: Sequence[str]) -> float:
    """1 if the text equals one of the answers, ignoring case, white space and a final full stop (as for GQA)."""

    def normalised(text: str) -> str:
        return " ".join(text.lower().split()).removesuffix(".").rstrip()

    return float(normalised(text) in map(normalised, answers))


NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
NUMBERS = {word: str(number) for number, word in enumerate(NUMBER_WORDS)} | {"none": "0"}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
# Each contraction without one of its apostrophes. Those that would become another word ("well", "shed") are not listed.
MISSPELLED = {
    word[:i] + word[i + 1 :]: word for word in CONTRACTIONS.split() for i in range(len(word)) if word[i] == "'"
}


def vqa_normalised(text: str) -> str:
    """Normalises a text as VQA's evaluation does: no punctuation or articles, numbers as digits, apostrophes restored.

    A punctuation mark is removed if it is next to a space anywhere in the text, or if the text contains a comma between
    digits (1,000); otherwise it becomes a space. A full stop is removed unless a digit follows.
    """
    text = " ".join(text.split())
    joined = re.search(r"\d,\d", text)
    result = text
    for mark in PUNCTUATION:
        result = result.replace(mark, "" if f"{mark} " in text or f" {mark}" in text or joined else " ")
    result = re.sub(r"\.(?!\d)", "", result)
    words = [NUMBERS.get(word, word) for word in result.lower().split()]
    return " ".join(MISSPELLED.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(text: str, answers: Sequence[str]) -> float:
    """VQA's accuracy: the mean of min(matches / 3, 1) over all ways to leave out one of the (ten) human answers."""
    text, answers = vqa_normalised(text), [vqa_normalised(answer) for answer in answers]
    matches = answers.count(text)
    return sum(min((matches - (answer == text)) / 3, 1) for answer in answers) / len(answers)


def option_letter(text: str) -> str | None:
    """The option named in an answer to a multiple-choice question: "B", "b.", "(B) a cat", "The answer is B." -> "B".

    It is the first standalone capital from A to H; a lower-case letter counts only if the answer has no other text.
    """
    found = re.search(r"(?<![\w'])([A-H])(?![\w'])", text) or re.fullmatch(r"\W*([a-h])\W*", text)
    return found and found[1].upper()


def letter_match(text: str, answers: Sequence[str]) -> float:
    """1 if the text names the right option."""
    return float(option_letter(text) in [answer.strip().upper() for answer in answers])


def says_yes(text: str) -> bool:
    """How POPE reads an answer: as no if its first sentence contains the word "No", "no" or "not", otherwise as yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


# Scores of many answers: from (text, ground truth) pairs to the columns of the table


def mean_of(score: Callable[[str, Sequence[str]], float]) -> Callable[[list], dict[str, float]]:
    """The table's columns for a score that is averaged over the answers."""
    return lambda pairs: {"accuracy": sum(score(text, answers) for text, answers in pairs) / len(pairs)}


def pope(pairs: list[tuple[str, Sequence[str]]]) -> dict[str, float]:
    """POPE's metrics, with yes as the positive class; a division by zero counts as 0."""
    outcomes = [(says_yes(text), answers[0].strip().lower() != "no") for text, answers in pairs]
    tp, fp, fn, tn = (outcomes.count(kind) for kind in [(True, True), (True, False), (False, True), (False, False)])
    precision, recall = tp / max(1, tp + fp), tp / max(1, tp + fn)
    return {
        "accuracy": (tp + tn) / len(pairs),
        "precision": precision,
        "recall": recall,
        "F1": 2 * tp / max(1, 2 * tp + fp + fn),
        "yes ratio": (tp + fp) / len(pairs),
    }


METRICS = {
    "exact": mean_of(exact_match),
    "vqa": mean_of(vqa_accuracy),
    "pope": pope,
    "letter": mean_of(letter_match),
}


def score_table(questions: list[dict], texts: list[str], metric: str) -> str:
    """One line per category, in order of first appearance, and one for all questions; in percent."""
    groups: dict[str, list] = {}
    for question, text in zip(questions, texts, strict=True):
        groups.setdefault(str(question.get("category", "")), []).append((text, question["answers"]))
    pairs = [pair for group in groups.values() for pair in group]
    groups = ({} if len(groups) == 1 else groups) | {"all": pairs}
    width = max(8, *map(len, groups))
    columns = list(METRICS[metric](pairs))
    lines = [f"{'category':{width}}  questions  " + "  ".join(f"{name:>9}" for name in columns)]
    for name, group in groups.items():
        figures = METRICS[metric](group)
        lines.append(f"{name:{width}}  {len(group):9}  " + "  ".join(f"{100 * figures[name]:9.2f}" for name in columns))
    return "\n".join(lines)


# Files


def read_lines(file: Path) -> list[dict]:
    """The objects of a JSON-lines file.

    Raises:
        ValueError: a line is not an object with "question_id" and "text".
    """
    entries = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                entries.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{file}, line {number} is not valid JSON: {error}") from error
            if not isinstance(entries[-1], dict) or not {"question_id", "text"} <= entries[-1].keys():
                raise ValueError(f'{file}, line {number} must be an object with "question_id" and "text"')
    return entries


def read_questions(file: Path, suffix: str, metric: str) -> list[dict]:
    """Reads a question file, and adds "prompt" (text and suffix) and "answers" (a list) to each entry.

    Raises:
        ValueError: a line is invalid, a question appears twice, or its ground truth is not what the metric needs.
    """
    questions = read_lines(file)
    fewest = 4 if metric == "vqa" else 1  # with fewer, no answer could score 1
    seen = set()
    for question in questions:
        question["prompt"] = question["text"] + suffix
        history = question.setdefault("history", [])
        if not isinstance(history, list) or not all(is_turn(turn) for turn in history):
            raise ValueError(f"{file}: question {question['question_id']} has a history that is not a list of turns")
        answers = question.get("answers", question.get("answer"))
        answers = answers if isinstance(answers, list) else [answers]
        answers = [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]  # VQA's format
        question["answers"] = [str(answer) for answer in answers if answer is not None]
        allowed = {"pope": r"(?i)\s*(yes|no)\s*", "letter": r"\s*[A-Ha-h]\s*"}.get(metric, "(?s).*")
        if not all(re.fullmatch(allowed, answer) for answer in question["answers"]):
            raise ValueError(f"{file}: question {question['question_id']} has an answer that is invalid for {metric}")
        if len(question["answers"]) < fewest:
            needed = f'"answers", a list of {fewest} or more' if fewest > 1 else '"answer", or a list "answers"'
            raise ValueError(f"{file}: question {question['question_id']} needs {needed} for the metric {metric}")
        if key(question) in seen:
            raise ValueError(f"{file}: question {question['question_id']} appears twice with the same text")
        seen.add(key(question))
    if not questions:
        raise ValueError(f"{file} contains no questions")
    return questions


def is_turn(turn: object) -> bool:
    """Whether this is a pair of a question and its answer."""
    return isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)


def key(entry: dict) -> tuple[str, str]:
    """What identifies a question or an answer: some benchmarks use one id for two questions."""
    return str(entry["question_id"]), entry["prompt"]


def read_answers(file: Path, questions: list[dict], model_id: str | None) -> dict[tuple[str, str], str]:
    """The answers that an earlier run wrote. If it was stopped in the middle of a line, that line is removed.

    Raises:
        ValueError: the file is damaged, or contains answers to other prompts or from another model.
    """
    if not file.exists():
        return {}
    content = file.read_bytes()
    last = content[content.rfind(b"\n") + 1 :]
    try:
        json.loads(last or b"{}")
        if last:  # complete except for its line feed
            file.write_bytes(content + b"\n")
    except ValueError:
        os.truncate(file, len(content) - len(last))
    entries = read_lines(file)
    asked = {key(question) for question in questions}
    for entry in entries:
        if "prompt" not in entry or key(entry) not in asked:
            raise ValueError(f"{file} answers other prompts (question {entry['question_id']}): choose another --out")
        if model_id not in (None, entry.get("model_id")):
            raise ValueError(f"{file} contains answers from the model {entry.get('model_id')}: choose another --out")
    return {key(entry): entry["text"] for entry in entries}


# The command line


def answer_questions(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    questions: Sequence[dict],
    images: Path,
    system: str = "",
    max_new_tokens: int = 128,
) -> list[str]:
    """Answers a batch of questions from `read_questions`, with greedy decoding.

    Raises:
        OSError, ValueError: an image is missing or damaged, or a prompt is too long.
    """
    prompts, pictures = [], []
    for question in questions:
        prompt = question["prompt"]
        turns = [*map(tuple, question.get("history", [])), (prompt, None)]
        if question.get("image"):
            pictures.append(load_image(str(images / question["image"])))
            first = turns[0][0]
            turns[0] = (first if IMAGE_TOKEN in first else f"{IMAGE_TOKEN}\n{first}", turns[0][1])
        prompts.append(processor.tokenizer.encode_chat(turns, system)[0])
    inputs = processor.prepare(prompts, pictures, padding=True).to(model.device)
    ids = model.generate(inputs.input_ids, inputs.get("pixel_values"), inputs.attention_mask, max_new_tokens)
    new = ids[:, inputs.input_ids.shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def parse_arguments() -> argparse.Namespace:
    """Parses the command line; invalid options end in a usage message and exit code 2."""
    parser = argparse.ArgumentParser(prog="evaluate.py", description="Answers questions and scores the answers.")
    add = parser.add_argument
    add("--model", help="checkpoint folder or hub name; not needed once all questions are answered")
    add("--questions", required=True, type=Path, help="a JSON-lines file")
    add("--images", type=Path, default=Path(), help="folder that image paths are relative to (default: current)")
    add("--out", required=True, type=Path, help="JSON-lines file for the answers; what it already answers is skipped")
    add("--metric", required=True, choices=METRICS)
    add("--batch", type=int, default=8, help="questions answered at once (default: %(default)s)")
    add("--max-new-tokens", type=int, default=128, help="maximum length of an answer (default: %(default)s)")
    add("--short", action="store_true", help="ask for a single word or phrase")
    add("--system", default=VICUNA_SYSTEM, help="system prompt; '' for none (default: Vicuna's)")
    add("--image-mode", choices=["crop", "pad"], help="default: the checkpoint's setting; the paper uses pad")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    args = parser.parse_args()
    if args.batch < 1 or args.max_new_tokens < 1:
        parser.error("--batch and --max-new-tokens must be 1 or more")
    return args


def run(args: argparse.Namespace) -> None:
    """Answers the questions that have no answer yet, and prints the table."""
    questions = read_questions(args.questions, SHORT_ANSWER if args.short else "", args.metric)
    model_id = args.model and Path(args.model).resolve().name
    texts = read_answers(args.out, questions, model_id)
    left = [question for question in questions if key(question) not in texts]
    if left and not args.model:
        raise ValueError(f"{args.out} lacks {len(left)} of {len(questions)} answers: give a --model to answer them")
    if left:
        device = pick_device(args.device)
        processor = LlavaProcessor.from_pretrained(args.model)
        if args.image_mode:
            processor.image_processor.do_pad = args.image_mode == "pad"
        model = LlavaForConditionalGeneration.from_pretrained(args.model, device=device)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with (
            open(args.out, "a", encoding="utf-8") as out,
            tqdm(total=len(questions), initial=len(texts), unit=" questions", mininterval=1) as progress,
        ):
            for start in range(0, len(left), args.batch):
                batch = left[start : start + args.batch]
                answers = answer_questions(model, processor, batch, args.images, args.system, args.max_new_tokens)
                for question, text in zip(batch, answers, strict=True):
                    texts[key(question)] = text
                    line = {"question_id": question["question_id"], "prompt": question["prompt"], "text": text}
                    out.write(json.dumps(line | {"model_id": model_id}, ensure_ascii=False) + "\n")
                out.flush()
                progress.update(len(batch))
    print(score_table(questions, [texts[key(question)] for question in questions], args.metric))


def main() -> None:
    """The command line: exit code 0; 1 after one sentence on stderr; 2 for invalid options."""
    args = parse_arguments()
    hint = "interrupted; the same command continues with the remaining questions"
    command_line("evaluate.py", lambda: run(args), hint)


if __name__ == "__main__":
    main()
