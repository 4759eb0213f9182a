"""Answers a file of questions and scores the answers the way the benchmarks of the LLaVA-1.5 paper are scored.

    python evaluate.py --model FOLDER --questions q.jsonl --images FOLDER --out answers.jsonl --metric vqa --short

    q.jsonl        {"question_id": 1, "image": "a.jpg", "text": "What is this?", "answers": ["cat", ...]} a line
    answers.jsonl  {"question_id": 1, "prompt": "What is this?", "text": "A cat", "model_id": "..."} a line

A question without "image" is text only. "history" may hold earlier turns, [["Is there a cat?", "Yes."], ...]; the image
then belongs to the first of them, and what --short adds to the question is not added there. Scoring needs "answer", or
"answers" for a list of them; with "category" there is a line of the table for each. Answers are written as they come,
and the same command line goes on with those that are missing. Once all are there, no --model is needed to score them.
Decoding is greedy.

Sources: LLaVA-1.5 (arXiv 2310.03744), section 4, and the scripts for evaluation that it released; VQA v2's official
evaluation (arXiv 1612.00837) for the accuracy over ten answers; POPE (arXiv 2305.10355).
"""

import argparse
import json
import os
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

if __name__ == "__main__" and callable(signal.getsignal(signal.SIGINT)):
    # Until `command_line` takes over: no traceback of the imports below, which take seconds.
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"\nevaluate.py: interrupted\n"), os._exit(1)))

from tqdm import tqdm

from check import command_line
from llava import LlavaForConditionalGeneration, LlavaProcessor, pick_device
from tokenizer import IMAGE_TOKEN, SHORT_ANSWER, VICUNA_SYSTEM
from vision import load_image

# Scores of one answer, from 0 to 1


def exact_match(text: str, answers: Sequence[str]) -> float:
    """1 if the text is one of the answers, apart from capitals, white space and a full stop at the end (as for GQA)."""

    def normal(text: str) -> str:
        return " ".join(text.lower().split()).removesuffix(".").rstrip()

    return float(normal(text) in map(normal, answers))


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
# Each of them with one apostrophe forgotten. What would then be another word ("well", "shed") is not among them.
FORGOTTEN = {
    word[:i] + word[i + 1 :]: word for word in CONTRACTIONS.split() for i in range(len(word)) if word[i] == "'"
}


def vqa_normal(text: str) -> str:
    """A text as VQA's evaluation compares it: no punctuation or articles, digits for numbers, apostrophes put back.

    A punctuation mark disappears if it stands beside a space somewhere in the text, or if a comma stands between digits
    (1,000); otherwise it becomes a space. A full stop disappears unless a digit follows.
    """
    text = " ".join(text.split())
    joined = re.search(r"\d,\d", text)
    result = text
    for mark in PUNCTUATION:
        result = result.replace(mark, "" if f"{mark} " in text or f" {mark}" in text or joined else " ")
    result = re.sub(r"\.(?!\d)", "", result)
    words = [NUMBERS.get(word, word) for word in result.lower().split()]
    return " ".join(FORGOTTEN.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(text: str, answers: Sequence[str]) -> float:
    """VQA's accuracy: the mean of min(matches / 3, 1) over all ways to leave one of the (ten) people's answers out."""
    text, answers = vqa_normal(text), [vqa_normal(answer) for answer in answers]
    matches = answers.count(text)
    return sum(min((matches - (answer == text)) / 3, 1) for answer in answers) / len(answers)


def option_letter(text: str) -> str | None:
    """The option that an answer to a multiple-choice question names: "B", "b.", "(B) a cat", "The answer is B." -> "B".

    It is the first of the capitals A to H that stands alone; a small letter counts only if there is nothing else.
    """
    found = re.search(r"(?<![\w'])([A-H])(?![\w'])", text) or re.fullmatch(r"\W*([a-h])\W*", text)
    return found and found[1].upper()


def letter_match(text: str, answers: Sequence[str]) -> float:
    """1 if the option named is the right one."""
    return float(option_letter(text) in [answer.strip().upper() for answer in answers])


def says_yes(text: str) -> bool:
    """POPE's reading of an answer: no if its first sentence has the word "No", "no" or "not", otherwise yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


# Scores of many answers: from (text, right answers) pairs to the columns of the table


def mean_of(score: Callable[[str, Sequence[str]], float]) -> Callable[[list], dict[str, float]]:
    """The table's columns for a score that is simply averaged."""
    return lambda pairs: {"accuracy": sum(score(text, answers) for text, answers in pairs) / len(pairs)}


def pope(pairs: list[tuple[str, Sequence[str]]]) -> dict[str, float]:
    """POPE's figures, with yes as the positive class; what would be divided by zero is 0."""
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
    """One line for each category, in the order of their first questions, and one for all questions; in percent."""
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
        ValueError: a line is something else, or has no "question_id" or "text".
    """
    entries = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                entries.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{file}, line {number} is not valid JSON: {error}") from error
            if not isinstance(entries[-1], dict) or not {"question_id", "text"} <= entries[-1].keys():
                raise ValueError(f'{file}, line {number} has to be an object with "question_id" and "text"')
    return entries


def read_questions(file: Path, suffix: str, metric: str) -> list[dict]:
    """Reads a question file; each entry gets its "prompt" (text and suffix) and "answers" (a list).

    Raises:
        ValueError: a line is wrong, a question is there twice, or has not the answers that the metric compares with.
    """
    questions = read_lines(file)
    fewest = 4 if metric == "vqa" else 1  # with fewer, no answer could be wholly right
    seen = set()
    for question in questions:
        question["prompt"] = question["text"] + suffix
        history = question.setdefault("history", [])
        if not isinstance(history, list) or not all(is_turn(turn) for turn in history):
            raise ValueError(f"{file}: question {question['question_id']} has a history that is no list of turns")
        answers = question.get("answers", question.get("answer"))
        answers = answers if isinstance(answers, list) else [answers]
        answers = [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]  # VQA's own form
        question["answers"] = [str(answer) for answer in answers if answer is not None]
        allowed = {"pope": r"(?i)\s*(yes|no)\s*", "letter": r"\s*[A-Ha-h]\s*"}.get(metric, "(?s).*")
        if not all(re.fullmatch(allowed, answer) for answer in question["answers"]):
            raise ValueError(f"{file}: question {question['question_id']} has an answer that {metric} does not know")
        if len(question["answers"]) < fewest:
            needed = f'"answers", a list of {fewest} or more' if fewest > 1 else '"answer", or a list "answers"'
            raise ValueError(f"{file}: question {question['question_id']} needs {needed} for the metric {metric}")
        if key(question) in seen:
            raise ValueError(f"{file}: question {question['question_id']} is there twice with the same text")
        seen.add(key(question))
    if not questions:
        raise ValueError(f"{file} has no questions")
    return questions


def is_turn(turn: object) -> bool:
    """Whether it is an earlier question with its answer."""
    return isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)


def key(entry: dict) -> tuple[str, str]:
    """What makes a question or an answer the same one: some benchmarks use an id for two questions."""
    return str(entry["question_id"]), entry["prompt"]


def read_answers(file: Path, questions: list[dict], model_id: str | None) -> dict[tuple[str, str], str]:
    """The answers that an earlier run has written; a last line that it was stopped in is cut off.

    Raises:
        ValueError: the file is damaged, or its answers are to other prompts, or by another model.
    """
    if not file.exists():
        return {}
    content = file.read_bytes()
    last = content[content.rfind(b"\n") + 1 :]
    try:
        json.loads(last or b"{}")
        if last:  # complete but for its line feed
            file.write_bytes(content + b"\n")
    except ValueError:
        os.truncate(file, len(content) - len(last))
    entries = read_lines(file)
    asked = {key(question) for question in questions}
    for entry in entries:
        if "prompt" not in entry or key(entry) not in asked:
            raise ValueError(f"{file} answers other prompts (at question {entry['question_id']}): choose another --out")
        if model_id not in (None, entry.get("model_id")):
            raise ValueError(f"{file} has answers of the model {entry.get('model_id')}: choose another --out")
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
    """The answers to a batch of questions, decoded greedily; `read_questions` says what a question is.

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
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens)
    new = ids[:, inputs.input_ids.shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def parse_arguments() -> argparse.Namespace:
    """Reads the command line; what cannot be meant ends in a usage message and exit code 2."""
    parser = argparse.ArgumentParser(prog="evaluate.py", description="Answers questions with a LLaVA and scores it.")
    add = parser.add_argument
    add("--model", help="checkpoint folder or hub name; can be left out when all answers are there")
    add("--questions", required=True, type=Path, help="a JSON-lines file")
    add("--images", type=Path, default=Path(), help="the folder that the image paths start from (default: this one)")
    add("--out", required=True, type=Path, help="the JSON-lines file for the answers; what it has is not asked again")
    add("--metric", required=True, choices=METRICS)
    add("--batch", type=int, default=8, help="questions answered at once (default: %(default)s)")
    add("--max-new-tokens", type=int, default=128, help="the longest answer (default: %(default)s)")
    add("--short", action="store_true", help="ask for a single word or phrase")
    add("--system", default=VICUNA_SYSTEM, help="opens every prompt; '' leaves it out (default: Vicuna's sentence)")
    add("--image-mode", choices=["crop", "pad"], help="default: what the checkpoint says; the paper padded")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    args = parser.parse_args()
    if args.batch < 1 or args.max_new_tokens < 1:
        parser.error("--batch and --max-new-tokens must be 1 or more")
    return args


def run(args: argparse.Namespace) -> None:
    """Answers what is not yet answered, and prints the table."""
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
    """The command line: exit code 0, 1 with one sentence on stderr, or 2 for a wrong usage."""
    args = parse_arguments()
    hint = "interrupted; the same command goes on with the questions that are left"
    command_line("evaluate.py", lambda: run(args), hint)


if __name__ == "__main__":
    main()
