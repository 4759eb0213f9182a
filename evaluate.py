"""Answers the questions in a file, and scores the answers as the benchmarks of the LLaVA-1.5 paper do.

    python evaluate.py --model FOLDER --questions coco_pope_random.json --images val2014 --out answers.jsonl
    python evaluate.py --model FOLDER --questions q.jsonl --images FOLDER --out answers.jsonl --metric vqa --short

The files of POPE, VQAv2, GQA, TextVQA, VizWiz and ScienceQA are read as downloaded (extras/benchmarks.py), and asked
and scored as in the paper. Other questions come in this project's own format:

    q.jsonl        {"question_id": 1, "image": "a.jpg", "text": "What is this?", "answers": ["cat", ...]} per line
    answers.jsonl  {"question_id": 1, "prompt": "What is this?", "text": "A cat", "model_id": "...", ...} per line

A question without "image" is text only. "history" may contain earlier turns, [["Is there a cat?", "Yes."], ...]; the
image then belongs to the first of them, and --short applies only to the question itself. Scoring needs "answer", or
"answers" for a list of them; with "category", the table has one line per category. Answers are written as soon as they
are generated, and the same command line resumes with the missing ones. Once all of them are in the file, they can be
scored without --model. Decoding is greedy.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from extras.terminal import command_line, handle_early_interrupt

if __name__ == "__main__":
    handle_early_interrupt("evaluate.py")

from tqdm import tqdm

from extras.adapters import image_processor_of
from extras.benchmarks import VQAV2, key, read_lines, read_questions
from extras.files import write_atomically
from extras.images import load_image
from extras.machine import pick_device
from extras.scores import METRICS, score_table
from llava import LlavaForConditionalGeneration
from processor import LlavaProcessor
from tokenizer import IMAGE_TOKEN, VICUNA_SYSTEM


def read_answers(
    file: Path, questions: list[dict], model_id: str | None, settings: dict[str, object]
) -> dict[tuple[str, str], str]:
    """The answers that an earlier run wrote. If it was stopped in the middle of a line, that line is removed.

    Without a `model_id`, answers of any model, with any settings, are read.

    Raises:
        ValueError: the file is damaged, or has answers to other prompts, from another model or with other settings.
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
        if model_id is None:
            continue
        if model_id != entry.get("model_id"):
            raise ValueError(f"{file} contains answers from the model {entry.get('model_id')}: choose another --out")
        for name, value in entry.get("settings", {}).items():
            if value != settings.get(name):
                raise ValueError(f"{file} contains answers with {name} {value!r}: choose another --out")
    return {key(entry): entry["text"] for entry in entries}


def find_image(images: Path, question: dict) -> Path:
    """The path of a question's image, in the image folder or in one of the subfolders that its benchmark uses.

    Raises:
        FileNotFoundError: it is in none of them.
    """
    name, folders = question["image"], question.get("folders", [])
    for path in [images / name, *(images / folder / name for folder in folders)]:
        if path.is_file():
            return path
    places = f" (nor in {' or '.join(str(images / folder) for folder in folders)})" if folders else ""
    raise FileNotFoundError(f"question {question['question_id']} needs the image {name}, not in {images}{places}")


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
            pictures.append(load_image(str(find_image(images, question))))
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
    add("--adapter", help="LoRA for that checkpoint, in PEFT's format: a folder or a name on the hub")
    add("--questions", required=True, type=Path, help="a benchmark's file as downloaded, or JSON lines")
    add("--annotations", type=Path, help="VQAv2's answers; without them, its questions are answered but not scored")
    add("--images", type=Path, default=Path(), help="folder that image paths are relative to (default: current)")
    add("--out", required=True, type=Path, help="JSON-lines file for the answers; what it already answers is skipped")
    add("--results", type=Path, help="also write the file that the server or scorer of VQAv2, VizWiz or GQA takes")
    add("--metric", choices=METRICS, help="needed for JSON lines of your own; each benchmark has its own")
    add("--batch", type=int, default=8, help="questions answered at once (default: %(default)s)")
    add("--max-new-tokens", type=int, default=128, help="maximum length of an answer (default: %(default)s)")
    add("--short", action="store_true", help="ask for a single word or phrase, as the benchmarks do anyway")
    add("--system", default=VICUNA_SYSTEM, help="system prompt; '' for none (default: Vicuna's)")
    add("--image-mode", choices=["crop", "pad"], help="default: the checkpoint's setting; the paper uses pad")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    args = parser.parse_args()
    if args.batch < 1 or args.max_new_tokens < 1:
        parser.error("--batch and --max-new-tokens must be 1 or more")
    return args


def run(args: argparse.Namespace) -> None:
    """Answers the questions that have no answer yet, and prints the table."""
    benchmark, metric, questions = read_questions(args.questions, args.metric, args.short, args.annotations)
    if args.results:
        if benchmark.result is None:
            raise ValueError(
                f"--results is for VQAv2, VizWiz and GQA, but {args.questions} looks like {benchmark.name}"
            )
        others = [args.out, args.questions, args.annotations or args.out]
        if args.results.resolve() in [file.resolve() for file in others]:
            raise ValueError(f"--results would replace {args.results}: choose another file")
    names = [Path(name).resolve().name for name in (args.model, args.adapter) if name]
    model_id = " + ".join(names) if args.model else None
    settings = {"system": args.system, "image_mode": args.image_mode, "max_new_tokens": args.max_new_tokens}
    texts = read_answers(args.out, questions, model_id, settings)
    left = [question for question in questions if key(question) not in texts]
    if left and not args.model:
        raise ValueError(f"{args.out} lacks {len(left)} of {len(questions)} answers: give a --model to answer them")
    for question in left:  # a missing image is reported before hours of work
        if question.get("image"):
            find_image(args.images, question)
    if left:
        device = pick_device(args.device)
        processor = LlavaProcessor.from_pretrained(args.model)
        if args.adapter:
            processor.image_processor = image_processor_of(args.adapter) or processor.image_processor
        if args.image_mode:
            processor.image_processor.do_pad = args.image_mode == "pad"
        model = LlavaForConditionalGeneration.from_pretrained(args.model, device=device, adapter=args.adapter)
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
                    line |= {"model_id": model_id, "settings": settings}
                    out.write(json.dumps(line, ensure_ascii=False) + "\n")
                out.flush()
                progress.update(len(batch))
    answers = [texts[key(question)] for question in questions]
    if args.results and benchmark.result:
        content = json.dumps([benchmark.result(*pair) for pair in zip(questions, answers, strict=True)]) + "\n"
        args.results.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.results, lambda part: part.write_text(content, encoding="utf-8"))
    if any(question["answers"] for question in questions):
        print(score_table(questions, answers, metric))
    else:
        hint = "; for a score, pass VQAv2's --annotations" if benchmark is VQAV2 else ""
        print(f"{len(answers)} answers are in {args.out}. {args.questions} has no ground truth: no score{hint}.")


def main() -> None:
    """The command line: exit code 0; 1 after one sentence on stderr; 2 for invalid options."""
    args = parse_arguments()
    hint = "interrupted; the same command continues with the remaining questions"
    command_line("evaluate.py", lambda: run(args), hint)


if __name__ == "__main__":
    main()
