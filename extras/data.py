"""Training data: from conversations in JSON to batches of token ids and pixels.

    [{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                          {"from": "gpt", "value": "A cat."}]}, ...]
        -> read_entries  -> the entries of a JSON array or of JSON lines
        -> normalise     -> Conversation(turns, images, system): one form for everything that is accepted
        -> encode_entry  -> Sample(ids (t,), is_answer (t,), images)
        -> plan_epoch    -> batches with images, and batches without
        -> micro_batches -> what one process computes at once
        -> collate       -> input_ids (B, T), is_answer (B, T), pixel_values (N, 3, S, S)

Sources: LLaVA-1.5 (arXiv 2310.03744), appendix A, and its released scripts for prompts and batches; jsonlines.org.
"""

import codecs
import json
import random
import reprlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from urllib.request import url2pathname

import numpy as np
import torch
from tqdm import tqdm

from extras.images import load_image, open_image
from processor import Inputs, LlavaProcessor
from tokenizer import IMAGE_TOKEN

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
UNSUPPORTED = ("video", "videos", "audio", "audios", "tools")  # fields that would change what is trained
PATH_FIELDS = ("image", "path", "url", "image_url")
LONGEST_PATH = 4096  # characters: a longer one is an image in base64

# From the file to conversations


def read_entries(file: Path) -> list[tuple[str, object]]:
    """The entries of a JSON array or of JSON lines, each with its place in the file: "entry 0", "entry 0 (line 1)".

    The first character tells which of the two it is. Lines stay bytes here, so that an invalid one is a broken entry.
    Only a line feed ends a line. A carriage return is white space, because JSON strings cannot contain one.

    Raises:
        ValueError: the file is neither of the two.
    """
    content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    first = content.lstrip()[:1]
    if first == b"[":
        try:
            entries = json.loads(content.decode())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not valid JSON: {error}") from error
        return [(f"entry {index}", entry) for index, entry in enumerate(entries)]
    if first not in (b"{", b""):
        expected = "UTF-8 text that starts with [ (a JSON array) or { (JSON lines)"
        raise ValueError(
            f"{file} is neither a JSON array nor JSON lines: it starts with {content[:8]!r}, not {expected}"
        )
    lines = [(number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    return [(f"entry {index} (line {number})", line) for index, (number, line) in enumerate(lines)]


def parse_line(line: bytes) -> object:
    """The object in one of the JSON lines. Raises a ValueError if the line is not valid JSON."""
    try:
        return json.loads(line.decode("utf-8-sig"))  # concatenated files have a BOM in the middle
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} in column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise ValueError(f"it is not valid JSON ({reason}); expected a whole object, ended by a line feed") from error


class Conversation(NamedTuple):
    """An entry of a data file, whatever its form there."""

    turns: list[tuple[str, str]]  # (question, answer), with an <image> mark in the questions for each image
    images: list[str]  # paths, in the order of the marks
    system: str | None  # replaces --system


def normalise(entry: object) -> Conversation:
    """Converts an entry from any of the accepted forms. A field that is null counts as missing.

    | of an entry     | accepted                                                                                    |
    | --------------- | ------------------------------------------------------------------------------------------- |
    | turns           | "conversations" or "messages"                                                               |
    | role of a turn  | "from" or "role": human or user, gpt or assistant; system for the first turn                |
    | text of a turn  | "value" or "content": a string, or a list of {"type": "text", "text": ...} and image parts  |
    | images          | "image" or "images": a path or a list of paths                                              |
    | their positions | `<image>` in a question; or parts {"type": "image"} (or "image_url"), with a path in        |
    |                 | "image", "path", "url" or "image_url", or without: then the entry's images in order         |
    | system prompt   | a system turn, or a field "system": replaces --system for this entry                        |

    Raises:
        ValueError: it has none of these forms, or contradicts itself; the message says what was found and expected.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"it is {reprlib.repr(entry)}; expected an object with conversations or messages")
    unsupported = [name for name in UNSUPPORTED if entry.get(name)]
    if unsupported:
        raise ValueError(f"it has {' and '.join(unsupported)}; expected only text and images")
    items = pick(entry, "conversations", "messages")
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        keys = reprlib.repr(list(entry))
        raise ValueError(f"it has no list of conversations or messages (its keys are {keys}); expected a list of turns")
    turns = []
    for number, item in enumerate(items):
        try:
            turns.append(read_turn(item))
        except ValueError as error:
            raise ValueError(f"turn {number}: {error}") from error

    system = entry.get("system") or None
    if turns[0].role == "system":
        if system is not None:
            raise ValueError("it has both a system turn and a field named system; expected one of them")
        system = turns.pop(0).text
    if system is not None and (not isinstance(system, str) or IMAGE_TOKEN in system):
        raise ValueError(f"its system prompt is {reprlib.repr(system)}; expected text without {IMAGE_TOKEN}")
    if turns and turns[0].role == "assistant":
        turns.pop(0)  # as in LLaVA's scripts: it answers no question
    questions, answers = turns[::2], turns[1::2]
    if not turns or [turn.role for turn in turns] != ["user", "assistant"] * len(answers):
        found = ", ".join(turn.name for turn in turns) or "none"
        raise ValueError(f"the roles are {found}; human and gpt (or user and assistant) must alternate, gpt last")
    pairs = [(question.text, answer.text) for question, answer in zip(questions, answers, strict=True)]
    marks = [mark for question in questions for mark in question.marks]
    return Conversation(pairs, match_images(marks, read_images(entry)), system)


class Turn(NamedTuple):
    """One turn of a conversation."""

    name: str  # of the role, as in the file
    role: str  # user, assistant or system
    text: str
    marks: list  # for each <image> in a question: the path of its image, its index in the entry's images, or None


def read_turn(turn: dict) -> Turn:
    """Reads a turn in any of the accepted forms. Raises a ValueError if it has none of them."""
    name, content = pick(turn, "from", "role"), pick(turn, "value", "content")
    if not isinstance(name, str) or name not in ROLES:
        raise ValueError(f"its role is {reprlib.repr(name)}; expected one of {', '.join(ROLES)}")
    role, text, marks = ROLES[name], "", []
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    elif not isinstance(content, list):
        raise ValueError(f"its value is {reprlib.repr(content)}; expected a string or a list of parts")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            touching = text[-1:].strip() and part["text"][:1].strip()
            text += f" {part['text']}" if touching else part["text"]  # LLaVA's chat template also separates them
        elif kind in ("image", "image_url") and isinstance(part.get("index"), int | None):
            marks.append(part.get("index") if pick(part, *PATH_FIELDS) is None else read_path(part))
        else:
            expected = '{"type": "text", "text": ...} or {"type": "image"}'
            raise ValueError(f"a part of its content is {reprlib.repr(part)}; expected {expected}")
    if marks and role != "user":
        raise ValueError(f"it has an image, but its role is {name}; expected images only in questions")
    if marks and IMAGE_TOKEN in text:
        raise ValueError(f"it has both image parts and {IMAGE_TOKEN} in its text; expected one of them")
    if role == "user" and not marks:
        return Turn(name, role, text, [None] * text.count(IMAGE_TOKEN))
    return Turn(name, role, IMAGE_TOKEN * len(marks) + text, marks)


def read_images(entry: dict) -> list[str]:
    """The paths in "image" or "images". Raises a ValueError if there are two different lists."""
    values = [entry[name] for name in ("image", "images") if entry.get(name)]
    lists = [[read_path(path) for path in (value if isinstance(value, list) else [value])] for value in values]
    if len(lists) == 2 and lists[0] != lists[1]:
        raise ValueError("its image and images differ; expected one of them")
    return lists[0] if lists else []


def match_images(marks: list, named: list[str]) -> list[str]:
    """The path of each mark's image: its own, or else the next one that the entry names."""
    if marks == named:  # the paths are in both places
        return named
    waiting = [mark for mark in marks if not isinstance(mark, str)]
    if len(waiting) != len(named):
        found = f"{len(waiting)} {IMAGE_TOKEN} marks or image parts without a path"
        raise ValueError(f"its questions have {found}, but it names {len(named)} images; expected as many")
    if any(index not in (None, i) for i, index in enumerate(waiting)):
        raise ValueError(f"the indices of its image parts are {reprlib.repr(waiting)}; expected 0, 1, ... in order")
    paths = iter(named)
    return [mark if isinstance(mark, str) else next(paths) for mark in marks]


def read_path(value: object) -> str:
    """The path in "a.jpg", in {"path": "a.jpg"} and in {"image_url": {"url": "file:///a.jpg"}}."""
    path = value
    while isinstance(path, dict):
        path = pick(path, *PATH_FIELDS)
    if isinstance(path, str) and path.startswith("file://"):
        path = url2pathname(path.removeprefix("file://"))
    if not isinstance(path, str) or not path or "://" in path or path.startswith("data:") or len(path) > LONGEST_PATH:
        raise ValueError(f"its image is {reprlib.repr(value)}; expected the path of a local file")
    return path


def pick(fields: dict, *names: str) -> object:
    """The value under one of several names, or None. Raises a ValueError if there are two that differ."""
    found = {name: fields[name] for name in names if fields.get(name) is not None}
    value = next(iter(found.values()), None)
    if any(other != value for other in found.values()):
        raise ValueError(f"its {' and '.join(found)} differ; expected one of them")
    return value


# From conversations to samples


class Sample(NamedTuple):
    """One conversation as token ids."""

    entry: int  # index in the data file, from 0
    ids: np.ndarray  # (t,) int32, with one <image> token per image
    is_answer: np.ndarray  # (t,) bool: the tokens that are learned
    images: tuple[Path, ...]
    length: int  # T, in which an image counts as P tokens


def encode_entry(
    index: int, entry: object, stage: str, processor: LlavaProcessor, images: Path, system: str, max_length: int
) -> Sample:
    """One entry of the data file -> a Sample of at most `max_length` tokens; longer ones are truncated at the end.

    Stage "align" drops the question, so the model learns to caption an image: `<s><image>caption</s>`. Stage "instruct"
    uses the chat prompt of `LlamaTokenizer.encode_chat`, with each `<image>` moved to the front of its question, as
    LLaVA's scripts do.

    Raises:
        ValueError: the entry is broken; the message says how.
    """
    conversation = normalise(entry)
    paths = tuple(images / path for path in conversation.images)
    for path in paths:
        try:
            open_image(path).close()  # only the header, because there may be many images
        except Exception as error:  # Pillow raises many types for damaged files
            raise ValueError(f"its image is missing or damaged: {error}") from error

    tokenizer = processor.tokenizer
    if stage == "align":
        if len(paths) != 1 or len(conversation.turns) != 1:
            raise ValueError("stage align needs exactly one image and one caption")
        caption = tokenizer.encode(conversation.turns[0][1], add_special_tokens=False, split_special_tokens=True)
        ids = [tokenizer.bos_token_id, tokenizer.image_token_id, *caption, tokenizer.eos_token_id]
        is_answer = [False, False] + [True] * (len(caption) + 1)
    else:
        turns = [(images_first(question), answer) for question, answer in conversation.turns]
        ids, is_answer = tokenizer.encode_chat(turns, system if conversation.system is None else conversation.system)
    length = len(ids) + len(paths) * (processor.image_seq_length - 1)
    if length > max_length:
        keep = len(ids) - (length - max_length)  # every token except <image> counts once
        if tokenizer.image_token_id in ids[max(0, keep) :]:
            subject = "image does" if len(paths) == 1 else f"{len(paths)} images do"
            raise ValueError(f"its {subject} not fit in {max_length} tokens")
        ids, is_answer, length = ids[:keep], is_answer[:keep], max_length
    if not any(is_answer):
        raise ValueError(f"no part of an answer fits in {max_length} tokens")
    return Sample(index, np.array(ids, np.int32), np.array(is_answer), paths, length)


def images_first(question: str) -> str:
    """Moves the `<image>` marks to the front, each followed by a line feed."""
    marks = question.count(IMAGE_TOKEN)
    return f"{IMAGE_TOKEN}\n" * marks + question.replace(IMAGE_TOKEN, "").strip() if marks else question


def read_data(
    file: Path, stage: str, processor: LlavaProcessor, images: Path, system: str, max_length: int, skip_broken: bool
) -> tuple[list[Sample], str]:
    """All entries of a data file as samples, and a message about the broken ones that were skipped, if any.

    Raises:
        ValueError: the file is neither a JSON array nor JSON lines, or has broken entries that may not be skipped; the
            message names them by their index in the file, from 0, and by their line in JSON lines, from 1.
    """
    entries = read_entries(file)
    samples, broken, problem = [], [], ""
    progress = tqdm(entries, "reading", leave=False, disable=len(entries) < 10_000 or None)
    for index, (place, item) in enumerate(progress):
        try:
            entry = parse_line(item) if isinstance(item, bytes) else item
            samples.append(encode_entry(index, entry, stage, processor, images, system, max_length))
        except ValueError as error:
            broken.append(f"\n  {place}: {error}")
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
        group = [sample for sample in order if bool(sample.images) == has_image]
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
        with_image = [sample for sample in together if sample.images]
        if not rows or (with_image and not any(row.sample.images for row in rows)):
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
        for path in sample.images:
            try:
                images.append(load_image(str(path)))
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
