"""Training data: from LLaVA's JSON format to batches of token ids and pixels.

    [{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                          {"from": "gpt", "value": "A cat."}]}, ...]
        -> read_data     -> Sample(ids (t,), is_answer (t,), picture), ...
        -> plan_epoch    -> batches of samples that are alike
        -> micro_batches -> what one process computes at once
        -> collate       -> input_ids (B, T), is_answer (B, T), pixel_values (N, 3, S, S)

Sources: LLaVA-1.5 (arXiv 2310.03744), appendix A, and its released scripts for prompts and batches.
"""

import json
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from llava import Inputs, LlavaProcessor
from tokenizer import IMAGE_TOKEN
from vision import load_image, open_image

# From the file to samples


class Sample(NamedTuple):
    """One conversation as the model reads it."""

    entry: int  # its place in the data file, from 0
    ids: np.ndarray  # (t,) int32, with a single <image> token if there is a picture
    is_answer: np.ndarray  # (t,) bool: the tokens to learn
    image: Path | None
    length: int  # T, with the picture's P tokens


def encode_entry(
    index: int, entry: dict, stage: str, processor: LlavaProcessor, images: Path, system: str, max_length: int
) -> Sample:
    """One entry of the data file -> a Sample of at most `max_length` tokens; what is longer loses its end.

    In stage "align" the question is left out, and the model writes the caption of a picture: `<s><image>caption</s>`.
    In stage "instruct" it is the chat prompt of `LlamaTokenizer.encode_chat`, in which the `<image>` mark is moved to
    the front of its question, as LLaVA's scripts do.

    Raises:
        ValueError: the entry is broken; the message says how.
    """
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("it has no list of conversations")
    turns = turns[1:] if turns[0].get("from") == "gpt" else turns  # as LLaVA's scripts do: it answers no question
    roles, texts = [turn.get("from") for turn in turns], [turn.get("value") for turn in turns]
    if roles != ["human", "gpt"] * (len(turns) // 2):
        raise ValueError(f"the roles are {', '.join(map(str, roles))}; human and gpt have to take turns, gpt last")
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a turn has a value that is not a text")
    questions, answers = texts[::2], texts[1::2]
    image = images / str(entry["image"]) if entry.get("image") else None
    marks = sum(question.count(IMAGE_TOKEN) for question in questions)
    if marks != (image is not None):
        raise ValueError(
            f"the number of {IMAGE_TOKEN} marks in its questions is {marks}, of images {int(image is not None)}"
        )
    if image is not None:
        try:
            open_image(image).close()  # no more than the header, since there may be many
        except Exception as error:  # Pillow has one kind for each way in which a file can be damaged
            raise ValueError(f"its image is missing or damaged: {error}") from error

    tokenizer = processor.tokenizer
    if stage == "align":
        if image is None or len(turns) != 2:
            raise ValueError("the stage align takes one image and one caption")
        caption = tokenizer.encode(answers[0], add_special_tokens=False, split_special_tokens=True)
        ids = [tokenizer.bos_token_id, tokenizer.image_token_id, *caption, tokenizer.eos_token_id]
        is_answer = [False, False] + [True] * (len(caption) + 1)
    else:
        questions = [
            f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}" if IMAGE_TOKEN in text else text
            for text in questions
        ]
        ids, is_answer = tokenizer.encode_chat(list(zip(questions, answers, strict=True)), system)
    length = len(ids) + (processor.image_seq_length - 1 if image else 0)
    if length > max_length:
        keep = len(ids) - (length - max_length)  # every token but <image> is one place wide
        if image and keep <= ids.index(tokenizer.image_token_id):
            raise ValueError(f"its image does not fit in {max_length} tokens")
        ids, is_answer, length = ids[:keep], is_answer[:keep], max_length
    if not any(is_answer):
        raise ValueError(f"no part of an answer fits in {max_length} tokens")
    return Sample(index, np.array(ids, np.int32), np.array(is_answer), image, length)


def read_data(
    file: Path, stage: str, processor: LlavaProcessor, images: Path, system: str, max_length: int, skip_broken: bool
) -> tuple[list[Sample], str]:
    """All entries of a file in LLaVA's JSON format, and a sentence about the broken ones that were left out, if any.

    Raises:
        ValueError: the file is not of this format, or has broken entries that may not be skipped; each is named
            with its place in the file, from 0.
    """
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{file} holds a {type(entries).__name__} where a list of entries was expected")
    samples, broken, problem = [], [], ""
    for index, entry in enumerate(tqdm(entries, "reading", leave=False, disable=len(entries) < 10_000 or None)):
        try:
            samples.append(encode_entry(index, entry, stage, processor, images, system, max_length))
        except ValueError as error:
            broken.append(f"\n  entry {index}: {error}")
    if broken:
        problem = f"{len(broken)} of {len(entries)} entries in {file} are broken"
        listed = "".join(broken[:10]) + ("\n  ..." if len(broken) > 10 else "")
        if not skip_broken:
            raise ValueError(f"{problem}; repair them, or leave them out with --skip-broken:{listed}")
        problem += f" and left out:{listed}"
    if not samples:
        raise ValueError(problem or f"{file} has no entries to learn from")
    return samples, problem


# From samples to batches


def plan_epoch(samples: Sequence[Sample], batch: int, seed: str) -> list[list[Sample]]:
    """The batches of one epoch: every sample once, in an order that the seed decides.

    A batch has samples with pictures or samples without; only the last ones mix what is left of both. Which samples
    meet is left to chance, so batches stay fair draws of the data, but within a batch the longest come first: its
    micro-batches are padded to nearly their own length.
    """
    rng = random.Random(seed)
    order = rng.sample(samples, len(samples))
    batches, rest = [], []
    for pictured in (True, False):
        group = [sample for sample in order if (sample.image is not None) == pictured]
        full = len(group) // batch * batch
        batches += [group[i : i + batch] for i in range(0, full, batch)]
        rest += group[full:]
    rng.shuffle(batches)
    batches += [rest[i : i + batch] for i in range(0, len(rest), batch)]
    return [sorted(samples, key=lambda sample: -sample.length) for samples in batches]


class Row(NamedTuple):
    """A sample's place in a micro-batch."""

    sample: Sample
    counts: bool  # False: it goes along, but nothing is learned from it


def micro_batches(batch: Sequence[Sample], size: int, rank: int = 0, world: int = 1) -> list[list[Row]]:
    """One process's share of a batch, in pieces of at most `size` rows and at times one more.

    Processes that share their weights have to go through the same parts of the model equally often. So a process that
    has no sample, or no picture while another has one, is given a sample that does not count.
    """
    pieces = []
    for start in range(0, len(batch), size * world):
        together = batch[start : start + size * world]
        rows = [Row(sample, True) for sample in together[rank::world]]
        pictured = [sample for sample in together if sample.image]
        if not rows or (pictured and not any(row.sample.image for row in rows)):
            rows.append(Row((pictured or together)[0], False))
        pieces.append(rows)
    return pieces


def collate(rows: Sequence[Row], processor: LlavaProcessor) -> Inputs:
    """Rows -> `input_ids` and `is_answer` (B, T), padded on the right, and `pixel_values` (N, 3, S, S) if any.

    Raises:
        ValueError: a picture cannot be read.
    """
    tokenizer, longest = processor.tokenizer, max(row.sample.length for row in rows)
    input_ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    is_answer = torch.zeros(len(rows), longest, dtype=torch.bool)
    pictures = []
    for i, (sample, counts) in enumerate(rows):
        places = np.where(sample.ids == tokenizer.image_token_id, processor.image_seq_length, 1)
        input_ids[i, : sample.length] = torch.from_numpy(sample.ids.repeat(places))
        is_answer[i, : sample.length] = torch.from_numpy(sample.is_answer.repeat(places)) & counts
        if sample.image:
            try:
                pictures.append(load_image(str(sample.image)))
            except (OSError, ValueError) as error:
                raise ValueError(f"entry {sample.entry}: {error}") from error
    inputs = Inputs(input_ids=input_ids, is_answer=is_answer)
    if pictures:
        inputs["pixel_values"] = processor.image_processor(pictures)
    return inputs


def ahead(make: Callable, items: Iterable, threads: int = 4) -> Iterator:
    """make(item) for each item in order; the next few are made while the caller is busy with this one."""
    with ThreadPoolExecutor(threads) as pool:
        upcoming = deque()
        for item in items:
            upcoming.append(pool.submit(make, item))
            if len(upcoming) > threads:
                yield upcoming.popleft().result()
        while upcoming:
            yield upcoming.popleft().result()
