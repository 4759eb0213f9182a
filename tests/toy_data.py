"""Makes a toy data set for train.py and evaluate.py: drawn discs, questions about their colour, a base checkpoint.

    python tests/toy_data.py FOLDER

It writes FOLDER/base (random weights, small enough to train within a minute), FOLDER/pictures, captions.json for stage
align, conversations.json for stage instruct, and questions.jsonl about held-out pictures.
"""

import json
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw
from random_checkpoint import randomize, write_processor_files

from llava import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from tokenizer import SHORT_ANSWER
from vision import CLIPVisionConfig

COLOURS = ["red", "green", "blue", "black", "orange", "purple", "brown", "gray"]


def make_tiny_checkpoint(folder: Path, seed: int = 0) -> None:
    """Writes a checkpoint of 0.2 million parameters, with grouped-query attention."""
    write_processor_files(folder, image_size=28)
    vision = CLIPVisionConfig(32, 64, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14)
    text = LlamaConfig(
        vocab_size=448,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision, text, image_token_id=420, pad_token_id=421))
    randomize(model, seed)
    model.save_pretrained(folder)


def draw_disc(file: Path, colour: str, size: tuple[int, int], left: int, top: int) -> None:
    picture = Image.new("RGB", size, "white")
    ImageDraw.Draw(picture).ellipse((left, top, left + 30, top + 30), fill=colour)
    picture.save(file)


def entry(image: str | None, *texts: str) -> dict:
    """An entry of a data file: an image, and a conversation in which human and gpt alternate."""
    roles = ["human", "gpt"] * len(texts)
    turns = [{"from": role, "value": text} for role, text in zip(roles, texts, strict=False)]
    return {"id": "x", "conversations": turns} | ({"image": image} if image else {})


def make_toy_data(folder: Path, train: int = 1024, test: int = 100, seed: int = 0) -> None:
    """Writes everything that the module's docstring lists."""
    rng = random.Random(seed)
    make_tiny_checkpoint(folder / "base")
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    captions, conversations, questions = [], [], []
    for i in range(train + test):
        colour, size = rng.choice(COLOURS), (rng.randint(40, 60), rng.randint(40, 60))
        name = f"{i:04}.png"
        draw_disc(folder / "pictures" / name, colour, size, rng.randint(0, size[0] - 31), rng.randint(0, size[1] - 31))
        question = "<image>\nWhich color?"
        if i < train:
            captions.append(entry(name, "<image>", f"a {colour} disc"))
            short = rng.random() < 0.5
            turn = (question + SHORT_ANSWER, colour) if short else (question, f"The disc is {colour}.")
            conversations.append(entry(name, *turn))
        else:
            questions.append({"question_id": i, "image": name, "text": "Which color?", "answer": colour})
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "conversations.json").write_text(json.dumps(conversations))
    (folder / "questions.jsonl").write_text("".join(f"{json.dumps(question)}\n" for question in questions))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/toy_data.py FOLDER")
    make_toy_data(Path(sys.argv[1]))
