"""Training data: from LLaVA's JSON format to batches of token ids and pixels.

    [{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                          {"from": "gpt", "value": "A cat."}]}, ...]
        -> read_data     -> Sample(ids (t,), is_answer (t,), image), ...
        -> plan_epoch    -> batches with images, and batches without
        -> micro_batches -> what one process computes at once
        -> collate       -> input_ids (B, T), is_answer (B, T), pixel_values (N, 3, S, S)

Sources: LLaVA-1.5 (arXiv 2310.03744), appendix A, and its released scripts for prompts and batches.
"""

import json
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from extras.images import load_image, open_image
from processor import Inputs, LlavaProcessor
from tokenizer import IMAGE_TOKEN

# From the file to samples


class Sample(NamedTuple):
    """One conversation as token ids."""

    entry: int  # index in the data file, from 0
    ids: np.ndarray  # (t,) int32, with a single <image> token if there is an image
    is_answer: np.ndarray  # (t,) bool: the tokens that are learned
    image: Path | None
    length: int  # T, in which an image counts as P tokens


def encode_entry(
    index: int, entry: dict, stage: str, processor: LlavaProcessor, images: Path, system: str, max_length: int
) -> Sample:
    """One entry of the data file -> a Sample of at most `max_length` tokens; longer ones are truncated at the end.

    Stage "align" drops the question, so the model learns to caption an image: `<s><image>caption</s>`. Stage "instruct"
    uses the chat prompt of `LlamaTokenizer.encode_chat`, with `<image>` moved to the front of its question, as LLaVA's
    scripts do.

    Raises:
        ValueError: the entry is broken; the message says how.
    """
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("it has no list of conversations")
    turns = turns[1:] if turns[0].get("from") == "gpt" else turns  # as in LLaVA's scripts: it answers no question
    roles, texts = [turn.get("from") for turn in turns], [turn.get("value") for turn in turns]
    if roles != ["human", "gpt"] * (len(turns) // 2):
        raise ValueError(f"the roles are {', '.join(map(str, roles))}; human and gpt must alternate, gpt last")
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a turn has a value that is not a string")
    questions, answers = texts[::2], texts[1::2]
    image = images / str(entry["image"]) if entry.get("image") else None
    marks = sum(question.count(IMAGE_TOKEN) for question in questions)
    if marks != (image is not None):
        count = int(image is not None)
        raise ValueError(f"the number of {IMAGE_TOKEN} tokens in its questions is {marks}, of images {count}")
    if image is not None:
        try:
            open_image(image).close()  # only the header, because there may be many images
        except Exception as error:  # Pillow raises many types for damaged files
            raise ValueError(f"its image is missing or damaged: {error}") from error

    tokenizer = processor.tokenizer
    if stage == "align":
        if image is None or len(turns) != 2:
            raise ValueError("stage align needs exactly one image and one caption")
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
        keep = len(ids) - (length - max_length)  # every token except <image> counts once
        if image and keep <= ids.index(tokenizer.image_token_id):
            raise ValueError(f"its image does not fit in {max_length} tokens")
        ids, is_answer, length = ids[:keep], is_answer[:keep], max_length
    if not any(is_answer):
        raise ValueError(f"no part of an answer fits in {max_length} tokens")
    return Sample(index, np.array(ids, np.int32), np.array(is_answer), image, length)


def read_data(
    file: Path, stage: str, processor: LlavaProcessor, images: Path, system: str, max_length: int, skip_broken: bool
) -> tuple[list[Sample], str]:
    """All entries of a file in LLaVA's JSON format, and a message about the broken ones that were skipped, if any.

    Raises:
        ValueError: the file is not in this format, or has broken entries that may not be skipped; the message names
            them by their index in the file, from 0.
    """
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{file} contains a {type(entries).__name__} where a list of entries was expected")
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
            raise ValueError(f"{problem}; fix them, or skip them with --skip-broken:{listed}")
        problem += f" and were skipped:{listed}"
    if not samples:
        raise ValueError(problem or f"{file} contains no entries")
    return samples, problem


# From samples to batches


def plan_epoch(samples: Sequence[Sample], batch: int, seed: str) -> list[list[Sample]]:
    """The batches of one epoch: every sample once, in an order determined by the seed.

    A batch has only samples with images or only samples without; the last batches mix what is left of both. Apart from
    that, batches are random samples of the data. Within a batch the longest come first, so that its micro-batches need
    little padding.
    """
    rng = random.Random(seed)
    order = rng.sample(samples, len(samples))
    batches, rest = [], []
    for has_image in (True, False):
        group = [sample for sample in order if (sample.image is not None) == has_image]
        full = len(group) // batch * batch
        batches += [group[i : i + batch] for i in range(0, full, batch)]
        rest += group[full:]
    rng.shuffle(batches)
    batches += [rest[i : i + batch] for i in range(0, len(rest), batch)]
    return [sorted(samples, key=lambda sample: -sample.length) for samples in batches]


class Row(NamedTuple):
    """One row of a micro-batch."""

    sample: Sample
    counts: bool  # False: it is computed, but nothing is learned from it


def micro_batches(batch: Sequence[Sample], size: int, rank: int = 0, world: int = 1) -> list[list[Row]]:
    """One process's share of a batch, in micro-batches of at most `size` rows, sometimes one more.

    With sharded weights, all processes have to run the same parts of the model equally often. So a process that has no
    sample, or no image while another has one, gets an extra sample that does not count.
    """
    pieces = []
    for start in range(0, len(batch), size * world):
        together = batch[start : start + size * world]
        rows = [Row(sample, True) for sample in together[rank::world]]
        with_image = [sample for sample in together if sample.image]
        if not rows or (with_image and not any(row.sample.image for row in rows)):
            rows.append(Row((with_image or together)[0], False))
        pieces.append(rows)
    return pieces


def collate(rows: Sequence[Row], processor: LlavaProcessor) -> Inputs:
    """Rows -> `input_ids` and `is_answer` (B, T), padded on the right, and `pixel_values` (N, 3, S, S) if any.

    Raises:
        ValueError: an image cannot be read.
    """
    tokenizer, longest = processor.tokenizer, max(row.sample.length for row in rows)
    input_ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    is_answer = torch.zeros(len(rows), longest, dtype=torch.bool)
    images = []
    for i, (sample, counts) in enumerate(rows):
        repeats = np.where(sample.ids == tokenizer.image_token_id, processor.image_seq_length, 1)
        input_ids[i, : sample.length] = torch.from_numpy(sample.ids.repeat(repeats))
        is_answer[i, : sample.length] = torch.from_numpy(sample.is_answer.repeat(repeats)) & counts
        if sample.image:
            try:
                images.append(load_image(str(sample.image)))
            except (OSError, ValueError) as error:
                raise ValueError(f"entry {sample.entry}: {error}") from error
    inputs = Inputs(input_ids=input_ids, is_answer=is_answer)
    if images:
        inputs["pixel_values"] = processor.image_processor(images)
    return inputs


def prefetch(make: Callable, items: Iterable, threads: int = 4) -> Iterator:
    """Yields make(item) for each item, in order; threads make the next few while the caller uses this one."""
    with ThreadPoolExecutor(threads) as pool:
        upcoming: deque[Future] = deque()
        for item in items:
            upcoming.append(pool.submit(make, item))
            if len(upcoming) > threads:
                yield upcoming.popleft().result()
        while upcoming:
            yield upcoming.popleft().result()
