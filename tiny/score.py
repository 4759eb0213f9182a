"""Scores the built-in model on freshly drawn scenes, beside what can be reached without looking.

    python tiny/make_data.py test --output TEST --scenes 2400
    python tiny/score.py --model tiny/model --test TEST

For each family of questions: how often the answer is exactly right (evaluate.py's metric "exact"), in one word and as a
sentence; the same when the model is shown another scene's picture ("blind"); what a guesser reaches who names a random
thing of the right scene; the answer that is most often right to the same words ("question alone"); and the one that is
most often right of all. The model's answers are kept in a folder of TEST and are not asked for again.
"""

import argparse
import collections
import hashlib
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from world import FAMILIES

from evaluate import METRICS, exact_match, read_lines

NAMES = [*(family for family in FAMILIES if family != "facts"), "unseen"]


def blindfold(questions: Path, target: Path) -> Path:
    """The same questions about the next scene's picture."""
    lines = read_lines(questions)
    pictures = [line["image"] for line in lines]
    for line, picture in zip(lines, pictures[1:] + pictures[:1], strict=True):
        line["image"] = picture
    target.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return target


def ask(model: str, questions: Path, images: Path, out: Path, short: bool) -> list[str]:
    """The model's answers, by evaluate.py."""
    command = [sys.executable, ROOT / "evaluate.py", "--model", model, "--questions", questions, "--images", images]
    command += ["--out", out, "--metric", "exact", "--system", "", "--batch", "64", "--device", "cpu"]
    command += ["--short"] if short else []
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    texts = {line["question_id"]: line["text"] for line in read_lines(out)}
    return [texts[line["question_id"]] for line in read_lines(questions)]


def percent(texts: list[str], lines: list[dict]) -> float:
    """How many of the answers are exactly right."""
    return 100 * sum(exact_match(text, [line["answer"]]) for text, line in zip(texts, lines, strict=True)) / len(lines)


def question_alone(lines: list[dict]) -> list[str]:
    """For each question, the commonest answer to the same words in the other half, or else to all questions there."""
    guesses = [""] * len(lines)
    for half in (0, 1):
        answers: dict[str | None, collections.Counter] = collections.defaultdict(collections.Counter)
        for line in lines[1 - half :: 2]:
            answers[line["text"]][line["answer"]] += 1
            answers[None][line["answer"]] += 1
        common = {text: counted.most_common(1)[0][0] for text, counted in answers.items()}
        guesses[half::2] = [common.get(line["text"], common[None]) for line in lines[half::2]]
    return guesses


def main() -> None:
    """Prints the table of the model card."""
    parser = argparse.ArgumentParser(prog="score.py", description="Scores the built-in model on drawn scenes.")
    parser.add_argument("--model", default=str(ROOT / "tiny" / "model"))
    parser.add_argument("--test", required=True, type=Path, help="the folder that make_data.py test has written")
    parser.add_argument("--out", type=Path, help="a file for the table")
    args = parser.parse_args()
    weights = (Path(args.model) / "model.safetensors").read_bytes()
    folder = args.test / f"answers-{hashlib.sha256(weights).hexdigest()[:8]}"
    folder.mkdir(exist_ok=True)
    rows = ["| family | questions | form | right | blind | random thing | question alone | always the same |"]
    rows.append("| --- " * 8 + "|")
    for name in NAMES:
        for form in ("short", "sentence"):
            stem = name if form == "short" else f"{name}-sentence"
            questions = args.test / f"{stem}.jsonl"
            lines = read_lines(questions)
            seen = ask(args.model, questions, args.test, folder / f"{stem}.jsonl", form == "short")
            others = blindfold(questions, folder / f"{stem}-blind-questions.jsonl")
            blind = ask(args.model, others, args.test, folder / f"{stem}-blind.jsonl", form == "short")
            answer, often = collections.Counter(line["answer"] for line in lines).most_common(1)[0]
            guessed = f"{percent([line['guess'] for line in lines], lines):.1f}" if form == "short" else ""
            shares = [*(percent(texts, lines) for texts in (blind, question_alone(lines))), 100 * often / len(lines)]
            blinded, alone, same = (f"{share:.1f}" for share in shares)
            rows.append(
                f"| {name} | {len(lines)} | {form} | **{percent(seen, lines):.1f}** | {blinded} | {guessed} | {alone} "
                f"| {same} ({answer if len(answer) < 20 else '...'}) |"
            )
            if name == "existence":
                truth = [["yes" if line["answer"].lower().startswith("yes") else "no"] for line in lines]
                f1 = METRICS["pope"](list(zip(seen, truth, strict=True)))["F1"]
                rows.append(f"| existence as POPE, F1 | {len(lines)} | {form} | **{f1:.3f}** | | | | |")
            print(rows[-1], file=sys.stderr)
    table = "\n".join(rows) + "\n"
    print(table, end="")
    if args.out:
        args.out.write_text(table)


if __name__ == "__main__":
    main()
