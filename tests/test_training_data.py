"""Training data: the accepted forms, the tokens that are learned, the refused entries, and the batches."""

import copy
import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_training import CAPTIONS, COLOURS, MIXED, P, Workbench, draw_pictures, entry, make_tiny_checkpoint

import train
from extras.data import Row, Sample, collate, encode_entry, micro_batches, plan_epoch, prefetch, read_data
from llava import LlavaForConditionalGeneration, LlavaProcessor
from vision import LlavaImageProcessor


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    draw_pictures(folder)
    return folder


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_tiny_checkpoint(folder)
    processor = LlavaProcessor.from_pretrained(folder)
    processor.image_processor.do_pad = True
    return processor


@pytest.fixture(scope="module")
def encode(processor, pictures):
    def encode(entry, stage="instruct", system="", max_length=2048):
        return encode_entry(0, entry, stage, processor, pictures, system, max_length)

    return encode


@pytest.fixture(scope="module")
def spelled(processor):
    """The tokens as text, with brackets around those that are learned."""

    def spelled(sample):
        tokens = processor.tokenizer.convert_ids_to_tokens(sample.ids)
        marked = "".join(
            f"[{token}]" if learn else token for token, learn in zip(tokens, sample.is_answer, strict=True)
        )
        return marked.replace("][", "").replace("<0x0A>", "\n").replace("\u2581", " ")

    return spelled


# What is learned


def test_one_turn_with_an_image_learns_the_answer_and_its_end_token(encode, spelled):
    sample = encode(entry("red.png", "<image>\nWhich color?", "a red one"))
    assert spelled(sample) == "<s> USER: <image> \nWhich color? ASSISTANT:[ a red one</s>]"
    assert sample.length == len(sample.ids) + P - 1


def test_several_turns_learn_every_answer(encode, spelled):
    sample = encode(entry("red.png", "<image>\nWhich color?", "red", "What shape?", "a disc"))
    expected = "<s> USER: <image> \nWhich color? ASSISTANT:[ red</s>] USER: What shape? ASSISTANT:[ a disc</s>]"
    assert spelled(sample) == expected


def test_a_conversation_without_an_image_learns_its_answers(encode, spelled):
    sample = encode(entry(None, "How many?", "one two"))
    assert spelled(sample) == "<s> USER: How many? ASSISTANT:[ one two</s>]"
    assert sample.images == ()
    assert sample.length == len(sample.ids)


def test_the_system_prompt_comes_first_and_is_not_learned(encode, spelled):
    sample = encode(entry(None, "How many?", "one"), system="Be nice.")
    assert spelled(sample) == "<s> Be nice. USER: How many? ASSISTANT:[ one</s>]"


def test_a_caption_is_learned_without_its_question(encode, spelled):
    sample = encode(entry("red.png", "Describe it.\n<image>", "a red disc"), stage="align")
    assert spelled(sample) == "<s><image>[ a red disc</s>]"


def test_an_image_token_moves_to_the_front_of_its_question(encode, spelled):
    sample = encode(entry("red.png", "Which color?\n<image>", "red"))
    assert spelled(sample) == "<s> USER: <image> \nWhich color? ASSISTANT:[ red</s>]"


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_special_tokens_in_an_answer_are_plain_text(encode, stage):
    sample = encode(entry("red.png", "<image>\nWhich color?", "<image></s>red"), stage)
    assert (sample.ids == 420).sum() == 1
    assert (sample.ids == 2).sum() == 1


def test_a_long_conversation_is_truncated_at_the_end(encode, spelled):
    whole = encode(entry("red.png", "<image>\nWhich color?", "red", "What shape?", "a disc"))
    cut = encode(entry("red.png", "<image>\nWhich color?", "red", "What shape?", "a disc"), max_length=whole.length - 2)
    assert cut.length == whole.length - 2
    assert spelled(cut) == spelled(whole).removesuffix("c</s>]") + "]"
    assert cut.is_answer.tolist() == whole.is_answer[:-2].tolist()


def test_an_image_that_does_not_fit_is_refused_not_truncated(encode, processor):
    before = len(processor.tokenizer.encode("USER: "))  # <s> and the words before the image
    conversation = entry("red.png", "<image>\nWhich color?", "red")
    with pytest.raises(ValueError, match=f"image does not fit in {before + P - 1} tokens"):
        encode(conversation, max_length=before + P - 1)
    with pytest.raises(ValueError, match="no part of an answer fits"):
        encode(conversation, max_length=before + P)


def test_a_first_turn_by_gpt_is_dropped(encode):
    started_by_gpt = entry(None, "How many?", "one")
    started_by_gpt["conversations"].insert(0, {"from": "gpt", "value": "Hello!"})
    assert encode(started_by_gpt).ids.tolist() == encode(entry(None, "How many?", "one")).ids.tolist()


def test_if_every_entry_is_broken_the_error_says_why(tmp_path, processor, pictures):
    file = tmp_path / "data.json"
    file.write_text(json.dumps([entry("nowhere.png", "<image>\nWhich color?", "red")]))
    with pytest.raises(ValueError, match=r"(?s)1 of 1 entries.*entry 0.*nowhere.png"):
        read_data(file, "instruct", processor, pictures, "", 2048, skip_broken=True)


def test_stage_align_refuses_text_without_an_image(encode):
    with pytest.raises(ValueError, match="one image and one caption"):
        encode(entry(None, "How many?", "one"), stage="align")


# The forms of data


def several(images, *texts):
    return entry(None, *texts) | {"image": images}


def with_system(text, conversation):
    return conversation | {"conversations": [{"from": "system", "value": text}, *conversation["conversations"]]}


CANONICAL = [
    entry("red.png", "<image>\nWhich color?", "a red one"),
    entry("blue.png", "<image>\nWhich color?", "blue", "What shape?", "a disc, \u2028 I \u00e9 \U0001f999 think"),
    entry("green.png", "What color has <image> here?", "green"),
    entry(None, "How many?", "one <image>"),
    several(["red.png", "blue.png"], "<image>\n<image>\nWhich one is red?", "the first"),
    several(["red.png", "red.png", "black.png"], "<image>\nThis?", "red", "and <image> or <image>", "red and black"),
    with_system("Be brief.", entry("gray.png", "Which color?\n<image>", "gray")),
    with_system("", entry(None, "How many?", "two")),
]


def change(
    role="from", text="value", turns="conversations", roles=None, parts=None, images="image", image=None, more=None
):
    """Makes a function from an entry in LLaVA's form to another form.

    Args:
        role, text, turns, images: the names of the fields.
        roles: new names of the roles.
        parts: converts the path of an image to a part; the paths are then left out of the entry if they are in a part.
        image: converts each path in the entry, which then has a list of them.
        more: further fields.
    """

    def converted(old):
        paths = [old["image"]] if isinstance(old.get("image"), str) else old.get("image", [])
        waiting, items = list(enumerate(paths)), []
        for turn in old["conversations"]:
            content = turn["value"]
            if parts and turn["from"] == "human":
                pieces = [piece for piece in re.split("(<image>)", content) if piece]
                content = [
                    parts(*waiting.pop(0)) if piece == "<image>" else {"type": "text", "text": piece}
                    for piece in pieces
                ]
            elif parts:
                content = [{"type": "text", "text": content}]
            items.append({role: (roles or {}).get(turn["from"], turn["from"]), text: content})
        new = {turns: items} | copy.deepcopy(more or {})
        if paths and not (parts and "x.png" in str(parts(0, "x.png"))):
            new[images] = [image(path) for path in paths] if image else paths if len(paths) > 1 else paths[0]
        return new

    return converted


MESSAGES = {"role": "role", "text": "content", "turns": "messages", "roles": {"human": "user", "gpt": "assistant"}}


def system_as_field(old):
    system = [turn["value"] for turn in old["conversations"] if turn["from"] == "system" and turn["value"]]
    turns = [turn for turn in old["conversations"] if not (system and turn["from"] == "system")]
    return old | {"conversations": turns} | ({"system": system[0]} if system else {"system": None})


FORMS = {
    "LLaVA's": change(),
    "roles user and assistant": change(roles=MESSAGES["roles"]),
    "role and content in conversations": change("role", "content"),
    "from and value in messages": change(turns="messages"),
    "images in place of image": change(images="images"),
    "a list of one image": change(image=str),
    "messages with marks": change(**MESSAGES),
    "messages with marks and a list of images": change(**MESSAGES, images="images", image=str),
    "image objects with a path": change(**MESSAGES, images="images", image=lambda path: {"bytes": None, "path": path}),
    "parts, and image": change(**MESSAGES, parts=lambda i, path: {"type": "image"}),
    "parts, and images": change(**MESSAGES, images="images", parts=lambda i, path: {"type": "image"}),
    "parts with an index": change(**MESSAGES, parts=lambda i, path: {"type": "image", "index": i, "text": None}),
    "parts in value": change(parts=lambda i, path: {"type": "image"}),
    "path in image": change(**MESSAGES, parts=lambda i, path: {"type": "image", "image": path}),
    "path in path": change(**MESSAGES, parts=lambda i, path: {"type": "image", "path": path}),
    "path in url": change(**MESSAGES, parts=lambda i, path: {"type": "image", "url": path}),
    "path in image_url": change(**MESSAGES, parts=lambda i, path: {"type": "image_url", "image_url": {"url": path}}),
    "further fields": change(more={"id": 7, "source": "x", "videos": [], "tools": "", "messages": None}),
    "system as a field": system_as_field,
    "turns with further fields": lambda old: (
        old | {"conversations": [turn | {"content": None, "weight": 1} for turn in old["conversations"]]}
    ),
}


def lines(data, end="\n", **options):
    return "".join(json.dumps(item, **options) + end for item in data)


BOM = "\ufeff"
FILES = {  # what is written, from the entries
    "array": json.dumps,
    "array as raw text": lambda data: json.dumps(data, ensure_ascii=False),
    "indented array": lambda data: json.dumps(data, indent=1),
    "array with CR LF": lambda data: json.dumps(data, indent=1).replace("\n", "\r\n"),
    "array with CR": lambda data: json.dumps(data, indent=1).replace("\n", "\r"),
    "array with a BOM": lambda data: BOM + json.dumps(data),
    "array after blank lines": lambda data: "\n \r\n\t" + json.dumps(data) + "\n\n",
    "lines": lines,
    "lines as raw text": lambda data: lines(data, ensure_ascii=False),  # U+2028 does not end a line
    "lines with CR LF": lambda data: lines(data, "\r\n"),
    "lines with a BOM": lambda data: BOM + lines(data),
    "lines with a BOM and CR LF": lambda data: BOM + lines(data, "\r\n", ensure_ascii=False),
    "lines without the last line feed": lambda data: lines(data).rstrip("\n"),
    "lines with blank lines": lambda data: "\n\n" + lines(data, "\n \t\n\r\n"),
    "lines with a BOM and a blank line": lambda data: BOM + "\n" + lines(data),
    "concatenated lines": lambda data: BOM + lines(data[:3]) + BOM + lines(data[3:]),
    "lines with white space inside": lambda data: lines(data, "\t\n", separators=("\r, ", " :\r")),
}


def contents(samples):
    return [
        (s.entry, s.ids.tolist(), s.is_answer.tolist(), [path.name for path in s.images], s.length) for s in samples
    ]


@pytest.fixture(scope="module")
def read(processor, pictures, tmp_path_factory):
    """Writes a text to a file and reads it as training data."""
    folder = tmp_path_factory.mktemp("data")

    def read(text, name="data.json", skip_broken=False, stage="instruct"):
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_data(folder / name, stage, processor, pictures, "Be nice.", 2048, skip_broken)

    return read


@pytest.fixture(scope="module")
def expected(read):
    samples, _ = read(json.dumps(CANONICAL))
    assert [len(sample.images) for sample in samples] == [1, 1, 1, 0, 2, 3, 1, 0]
    return contents(samples)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_conversations_in_any_form_give_the_same_samples(form, read, expected):
    samples, _ = read(json.dumps([FORMS[form](item) for item in CANONICAL]))
    assert contents(samples) == expected


@pytest.mark.parametrize("kind", FILES)
def test_the_same_conversations_in_any_file_give_the_same_samples(kind, read, expected):
    """The format follows from the content, whatever the name says."""
    samples, _ = read(FILES[kind](CANONICAL), "data.json" if kind.startswith("lines") else "data.jsonl")
    assert contents(samples) == expected


def test_the_forms_may_change_from_entry_to_entry(read, expected):
    forms = list(FORMS.values())
    samples, _ = read(lines(forms[(3 * i + 1) % len(forms)](item) for i, item in enumerate(CANONICAL)))
    assert contents(samples) == expected


def test_the_two_examples_of_the_docs_give_the_same_sample(read, pictures):
    (pictures / "cats").mkdir()
    Image.new("RGB", (30, 40)).save(pictures / "cats/1.jpg")
    page = (Path(train.__file__).parent / "docs/training.md").read_text(encoding="utf-8")
    section = page[page.index("## Data") : page.index("## Options")]
    first, second = [read(block)[0] for block in re.findall("```json\n(.*?)```", section, re.DOTALL)]
    assert contents(first) == contents(second)
    assert len(first) == 1


@pytest.mark.parametrize("form", ["LLaVA's", "messages with marks", "parts, and images", "path in path"])
def test_captions_in_any_form_give_the_same_samples(form, read):
    canonical, _ = read(json.dumps(CAPTIONS), stage="align")
    samples, _ = read(lines(map(FORMS[form], CAPTIONS)), stage="align")
    assert contents(samples) == contents(canonical)


def test_the_same_conversations_in_any_form_train_to_the_same_losses(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    bench, data, tables = Workbench(tmp_path), [*MIXED, *CANONICAL], []
    texts = {
        "array": json.dumps(data),
        "lines": FILES["lines with a BOM and CR LF"](list(map(FORMS["messages with marks"], data))),
        "parts": FILES["lines with blank lines"](list(map(FORMS["parts, and images"], data))),
        "paths": FILES["indented array"](list(map(FORMS["path in image"], data))),
    }
    for name, text in texts.items():
        arguments = bench.arguments(name, [], "--batch", 8, "--micro-batch", 4, "--learning-rate", 1e-3)
        (tmp_path / f"{name}.json").write_text(text, encoding="utf-8", newline="")
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        train.main()
        tables.append((tmp_path / name / "loss.csv").read_bytes())
    assert tables[0].count(b"\n") == 4
    assert set(tables) == {tables[0]}


# Several images


def user(*parts):
    """An entry of one question in parts (text, or None for an image), and one answer."""
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    return {"messages": turns, "images": ["red.png"] * parts.count(None)}


QUESTIONS = {
    "image, text": ([None, "Which color?"], "<image> \nWhich color?"),
    "text, image": (["Which color?\n", None], "<image> \nWhich color?"),
    "text, image, text": (["Which color has", None, "here?"], "<image> \nWhich color has here?"),
    "spaces around an image, as with a mark": (["color of ", None, " here?"], "<image> \ncolor of  here?"),
    "texts that touch": ([None, "Which", "color?"], "<image> \nWhich color?"),
    "texts that do not touch": ([None, "Which ", "color?"], "<image> \nWhich color?"),
    "an empty text": ([None, "", "Which color?", ""], "<image> \nWhich color?"),
    "texts only": (["Which", "color?"], "Which color?"),
    "only an image": ([None], "<image> \n"),
    "two images": (["Is", None, "or", None, "red?"], "<image> \n<image> \nIs or red?"),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_image_parts_move_to_the_front_of_their_question(name, encode, spelled):
    parts, question = QUESTIONS[name]
    assert spelled(encode(user(*parts))) == f"<s> USER: {question} ASSISTANT:[ red</s>]"


def test_several_marks_move_to_the_front_of_their_own_question(encode, spelled):
    sample = encode(several(["red.png"] * 3, "Which <image> or <image>?", "one", "What <image> ?", "two"))
    first, second = "<image> \n<image> \nWhich  or ?", "<image> \nWhat  ?"
    assert spelled(sample) == f"<s> USER: {first} ASSISTANT:[ one</s>] USER: {second} ASSISTANT:[ two</s>]"
    assert sample.length == len(sample.ids) + 3 * (P - 1)


def parts(*items, **fields):
    turns = [{"role": "user", "content": list(items)}, {"role": "assistant", "content": "red"}]
    return {"messages": turns} | fields


IMAGE = {"type": "image"}
ORDERS = {
    "the entry's": (several(["red.png", "blue.png"], "<image> <image>", "a"), ["red", "blue"]),
    "over two turns": (several(["red.png", "blue.png"], "<image>", "a", "<image>", "b"), ["red", "blue"]),
    "the parts'": (parts(IMAGE | {"image": "blue.png"}, IMAGE | {"image": "red.png"}), ["blue", "red"]),
    "of both": (
        parts(IMAGE, IMAGE | {"url": "red.png"}, IMAGE, images=["gray.png", "blue.png"]),
        ["gray", "red", "blue"],
    ),
    "twice the same": (parts(IMAGE | {"path": "red.png"}, image="red.png", images=["red.png"]), ["red"]),
    "path before index": (parts(IMAGE | {"path": "red.png", "index": 4}), ["red"]),
}


@pytest.mark.parametrize("name", ORDERS)
def test_images_are_in_the_order_of_their_positions(name, encode):
    data, names = ORDERS[name]
    assert [path.stem for path in encode(data).images] == names


def test_images_may_be_given_by_absolute_paths_and_file_urls(encode, pictures):
    with_space = pictures / "a b.png"
    with_space.write_bytes((pictures / "red.png").read_bytes())
    for path in (str(with_space), with_space.as_uri()):
        assert encode(entry(path, "<image>", "red")).images == (with_space,)


def test_pixels_are_in_the_order_of_the_rows_and_of_the_images_in_them(encode, processor, pictures):
    rows = [
        several(COLOURS[:2], "<image> <image>", "a"),
        entry(None, "How?", "b"),
        several(COLOURS[2:4], "<image> <image>", "c"),
    ]
    data = [row | {"image": [f"{name}.png" for name in row.get("image", [])]} for row in rows]
    inputs = collate([Row(encode(row), True) for row in data], processor)
    expected = processor.image_processor([Image.open(pictures / f"{name}.png") for name in COLOURS[:4]])
    assert torch.equal(inputs.pixel_values, expected)
    assert (inputs.input_ids == 420).sum(1).tolist() == [2 * P, 0, 2 * P]


def test_the_loss_of_several_images_matches_transformers(encode, processor):
    rows = [CANONICAL[i] for i in (4, 3, 5, 0)]
    inputs = collate([Row(encode(row), True) for row in rows], processor)
    model = LlavaForConditionalGeneration.from_pretrained(processor.folder)
    reference = transformers.LlavaForConditionalGeneration.from_pretrained(processor.folder, dtype=torch.float32)
    with torch.no_grad():
        loss = train.answer_loss(model, inputs) / inputs.is_answer.sum()
        expected = reference(
            input_ids=inputs.input_ids,
            pixel_values=inputs.pixel_values,
            attention_mask=inputs.input_ids != 421,
            labels=inputs.input_ids.where(inputs.is_answer, -100),
        ).loss
    assert inputs.pixel_values.shape[0] == 6
    assert ((loss - expected) / expected).abs() <= 1e-5


def test_a_later_image_that_does_not_fit_is_refused_not_truncated(encode):
    data = several(["red.png"] * 2, "<image>", "red", "<image>", "a disc")
    whole = encode(data)
    after = len(whole.ids) - 1 - whole.ids.tolist()[::-1].index(420)  # index of the second image
    fits = after + 1 + 2 * (P - 1)
    assert encode(data, max_length=fits).ids.tolist() == whole.ids.tolist()[: after + 1]
    with pytest.raises(ValueError, match=f"its 2 images do not fit in {fits - 1} tokens"):
        encode(data, max_length=fits - 1)


# The system prompt of an entry

SYSTEMS = {
    "none": ({}, " Be nice. USER:"),
    "a turn": ({"role": "system", "content": "Be brief."}, " Be brief. USER:"),
    "a turn in parts": ({"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, " Be brief. USER:"),
    "an empty turn": ({"role": "system", "content": ""}, " USER:"),
    "from and value": ({"from": "system", "value": "Be brief."}, " Be brief. USER:"),
    "control tokens": ({"from": "system", "value": "</s>"}, " <0x3C><0x2F>s<0x3E> USER:"),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_turn_replaces_the_system_prompt_for_its_entry(name, encode, spelled):
    turn, start = SYSTEMS[name]
    data = entry(None, "How many?", "one")
    data["conversations"] = [turn, *data["conversations"]] if turn else data["conversations"]
    sample = encode(data, system="Be nice.")
    assert spelled(sample) == f"<s>{start} How many? ASSISTANT:[ one</s>]"
    assert (sample.ids == 2).sum() == 1


def test_a_first_turn_by_gpt_is_dropped_after_a_system_turn_too(encode):
    data = with_system("Be brief.", entry(None, "How many?", "one"))
    greeted = copy.deepcopy(data)
    greeted["conversations"].insert(1, {"from": "assistant", "value": "Hello!"})
    assert contents([encode(greeted)]) == contents([encode(data)])


# What is refused


def human(value, **fields):
    return {"conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "a"}]} | fields


SYSTEM_TURN = {"from": "system", "value": "a"}
TURNS = human("b")["conversations"]
REFUSED = {
    "another format": (
        {"instruction": "a", "output": "b"},
        r"keys are \['instruction', 'output'\]\); expected a list of turns",
    ),
    "a number": (5, "it is 5; expected an object"),
    "a list of turns": (TURNS, "expected an object with conversations or messages"),
    "two different lists of turns": (human("a", messages=[SYSTEM_TURN]), "conversations and messages differ"),
    "an unknown role": (
        {"messages": [{"role": "tool", "content": "a"}]},
        "turn 0: its role is 'tool'; expected one of human",
    ),
    "no role": ({"messages": [{"content": "a"}]}, "turn 0: its role is None"),
    "a role that is a list": ({"messages": [{"role": ["user"], "content": "a"}]}, r"turn 0: its role is \['user'\]"),
    "two different roles": ({"messages": [{"from": "gpt", "role": "user", "content": "a"}]}, "from and role differ"),
    "a late system turn": (
        {"conversations": [*TURNS, SYSTEM_TURN]},
        "the roles are human, gpt, system; .* must alternate",
    ),
    "two system turns": ({"conversations": [SYSTEM_TURN, SYSTEM_TURN, *TURNS]}, "the roles are system, human, gpt"),
    "only a system turn": ({"conversations": [SYSTEM_TURN]}, "the roles are none"),
    "two system prompts": ({"conversations": [SYSTEM_TURN, *TURNS], "system": "b"}, "both a system turn and a field"),
    "a system prompt in a list": (human("b", system=["a"]), r"system prompt is \['a'\]; expected text"),
    "a mark in the system prompt": (human("b", system="<image>"), "expected text without <image>"),
    "an image in the system turn": (
        {"messages": [{"role": "system", "content": [IMAGE]}, *TURNS]},
        "turn 0: .* role is system",
    ),
    "an image in an answer": ({"messages": [TURNS[0], {"role": "gpt", "content": [IMAGE]}]}, "turn 1: .* role is gpt"),
    "no content": ({"messages": [{"role": "user", "content": None}]}, "its value is None; expected a string or a list"),
    "content that is an object": (
        human({"type": "text", "text": "a"}),
        "its value is {.*}; expected a string or a list",
    ),
    "a part of text alone": (human(["a"]), "turn 0: a part of its content is 'a'; expected {"),
    "a part without text": (human([{"type": "text"}]), "turn 0: a part of its content is {'type': 'text'}"),
    "a video part": (human([{"type": "video", "path": "a"}]), "turn 0: a part of its content is {.*'video'}"),
    "a video": (human("b", video="a.mp4"), "it has video; expected only text and images"),
    "tools": (human("b", tools="[{}]"), "it has tools; expected"),
    "marks and image parts": (
        parts(IMAGE, {"type": "text", "text": "<image>"}, image=["red.png"] * 2),
        "turn 0: .* both image parts",
    ),
    "fewer images than marks": (
        human("<image> <image>", images=["red.png"]),
        "2 <image> marks .* it names 1 images; expected as many",
    ),
    "more images than marks": (human("<image>", images=["red.png"] * 2), "1 <image> marks .* it names 2 images"),
    "fewer images than parts": (
        parts(IMAGE, IMAGE, image="red.png"),
        "2 <image> marks or image parts without a path, but it names 1",
    ),
    "an image that no part takes": (
        parts(IMAGE | {"path": "red.png"}, image="blue.png"),
        "0 <image> marks .* it names 1 images",
    ),
    "indices out of order": (
        parts(IMAGE | {"index": 1}, IMAGE | {"index": 0}, image=["red.png"] * 2),
        r"parts are \[1, 0\]; expected 0, 1",
    ),
    "an index that is text": (parts(IMAGE | {"index": "red.png"}), "a part of its content is {'index': 'red.png'"),
    "two different images": (human("<image>", image="red.png", images=["blue.png"]), "image and images differ"),
    "two paths in a part": (parts(IMAGE | {"path": "red.png", "url": "blue.png"}), "turn 0: its path and url differ"),
    "a URL": (parts(IMAGE | {"url": "https://x.org/a.png"}), "is .*https.*; expected the path of a local file"),
    "a data URL": (
        parts({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}),
        "expected the path of a local file",
    ),
    "base64": (human("<image>", image="iVBOR" * 2000), "its image is 'iVBOR.{,30}'; expected the path of a local file"),
    "an image without a path": (
        human("<image>", images=[{"bytes": "iVBOR"}]),
        "its image is {'bytes': 'iVBOR'}; expected the path",
    ),
    "an empty path": (human("<image>", images=[""]), "its image is ''; expected the path"),
    "a path that is a number": (human("<image>", images=[7]), "its image is 7; expected the path"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_entry_in_none_of_the_forms_is_refused_by_its_place(name, read):
    broken, sentence = REFUSED[name]
    good = FORMS["messages with marks"](CANONICAL[0])
    with pytest.raises(ValueError, match=f"(?s)1 of 3 entries.*\n  entry 1: .*{sentence}"):
        read(json.dumps([good, broken, good]))
    with pytest.raises(ValueError, match=f"(?s)1 of 3 entries.*\n  entry 1 [(]line 3[)]: .*{sentence}"):
        read(f"{json.dumps(good)}\n\n{json.dumps(broken)}\n{json.dumps(good)}")
    samples, said = read(lines([good, broken, good]), skip_broken=True)
    assert [sample.entry for sample in samples] == [0, 2]
    assert "entry 1 (line 2): " in said


BROKEN_LINES = {
    "truncated": (b'{"messages": [', "Expecting value in column 15"),
    "two objects": (b"{} {}", "Extra data in column 4"),
    "ended by a carriage return": (b"{}\r{}", "Extra data in column 4.; expected a whole object, ended by a line feed"),
    "a comma after it": (b"{},", "Extra data in column 3"),
    "not UTF-8": (b'{"a": "\xe9"}', "'utf-8' codec can't decode byte 0xe9"),
    "a line feed in a string": (b'{"a": "\n"}', "Unterminated string|Invalid control character"),
    "too deep": (b'{"a":' * 100_000, "maximum recursion"),
}


@pytest.mark.parametrize("name", BROKEN_LINES)
def test_an_invalid_line_is_a_broken_entry(name, read):
    broken, sentence = BROKEN_LINES[name]
    good = json.dumps(CANONICAL[0]).encode()
    content = b"\n".join([good, broken, good])
    with pytest.raises(ValueError, match=rf"(?s)entry 1 [(]line 2[)]: it is not valid JSON [(]({sentence})"):
        read(content)
    samples, _ = read(content, skip_broken=True)
    assert contents(samples)[0][1:] == contents(samples)[1][1:]


@pytest.mark.parametrize(
    "content",
    [b"PAR1\x15\x04", "data".encode("utf-16"), b"# comment\n{}", b"id,image,question\n", b'"text"', b"null"],
    ids=["parquet", "UTF-16", "a comment", "CSV", "a string", "null"],
)
def test_a_file_of_another_kind_is_refused(content, read):
    start = re.escape(repr(content[:8]))
    with pytest.raises(
        ValueError, match=rf"neither a JSON array nor JSON lines: it starts with {start}, not UTF-8 text"
    ):
        read(content)


@pytest.mark.parametrize("content", ["", "\n\n", BOM, "[]", "[\n]\n"])
def test_a_file_without_entries_is_refused(content, read):
    with pytest.raises(ValueError, match="contains no entries"):
        read(content)


def test_one_object_over_several_lines_is_refused(read):
    with pytest.raises(ValueError, match=r"entry 0 \(line 1\): it is not valid JSON .* expected a whole object"):
        read(json.dumps(CANONICAL[0], indent=1), skip_broken=True)


# Batches


def make_samples(lengths, pictured):
    return [
        Sample(i, np.ones(length, np.int32), np.ones(length, bool), ("x.png",) * image, length)
        for i, (length, image) in enumerate(zip(lengths, pictured, strict=True))
    ]


def many_samples(count=1000):
    rng = random.Random(0)
    return make_samples([rng.randint(20, 600) for _ in range(count)], [rng.random() < 0.7 for _ in range(count)])


def entries(batches):
    return [sample.entry for batch in batches for sample in batch]


def test_an_epoch_has_every_sample_once():
    assert sorted(entries(plan_epoch(many_samples(), 32, "0"))) == list(range(1000))


def test_the_seed_determines_the_order():
    samples = many_samples()
    assert entries(plan_epoch(samples, 32, "0/1")) == entries(plan_epoch(samples, 32, "0/1"))
    assert entries(plan_epoch(samples, 32, "0/1")) != entries(plan_epoch(samples, 32, "0/2"))


def test_all_batches_but_the_last_are_full_and_of_one_modality():
    *full, _, _ = plan_epoch(many_samples(), 32, "0")
    assert {len(batch) for batch in full} == {32}
    assert all(len({bool(sample.images) for sample in batch}) == 1 for batch in full)


def test_grouping_more_than_halves_the_padding():
    samples = many_samples()

    def padding(batches):
        pieces = [[row.sample.length for row in rows] for batch in batches for rows in micro_batches(batch, 8)]
        padded = sum(max(lengths) * len(lengths) for lengths in pieces)
        return 1 - sum(sample.length for sample in samples) / padded

    shuffled = random.Random(0).sample(samples, len(samples))
    plain, grouped = padding([shuffled[i : i + 64] for i in range(0, 1000, 64)]), padding(plan_epoch(samples, 64, "0"))
    print(f"padding in micro-batches of 8: {plain:.1%} shuffled, {grouped:.1%} grouped")
    assert grouped < plain / 2


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 5), st.integers(1, 4))
def test_processes_share_a_batch_and_run_the_same_parts_of_the_model(pictured, size, world):
    batch = make_samples([1] * len(pictured), pictured)
    shares = [micro_batches(batch, size, rank, world) for rank in range(world)]
    counted = [row.sample.entry for share in shares for rows in share for row in rows if row.counts]
    assert sorted(counted) == list(range(len(batch)))  # each sample counts in one process, once
    assert len({len(share) for share in shares}) == 1
    for together in zip(*shares, strict=True):
        assert all(1 <= len(rows) <= size + 1 for rows in together)
        assert len({any(row.sample.images for row in rows) for rows in together}) == 1


def test_rows_are_padded_on_the_right_and_only_answers_are_learned(encode, processor, pictures):
    long = encode(entry("red.png", "<image>\nWhich color?", "a rather long answer"))
    short = encode(entry(None, "How many?", "one"))
    silent = encode(entry("blue.png", "<image>\nWhich color?", "blue"))
    inputs = collate([Row(long, True), Row(short, True), Row(silent, False)], processor)
    assert inputs.input_ids.shape == inputs.is_answer.shape == (3, long.length)
    assert (inputs.input_ids[0] == 420).sum() == P
    assert inputs.input_ids[1].tolist() == [*short.ids, *[421] * (long.length - short.length)]
    assert inputs.is_answer.sum(1).tolist() == [long.is_answer.sum(), short.is_answer.sum(), 0]
    assert inputs.input_ids[0][inputs.is_answer[0]].tolist() == long.ids[long.is_answer].tolist()


def test_images_are_padded_to_a_square_and_in_the_order_of_the_rows(encode, processor, pictures):
    samples = [encode(entry(f"{c}.png", "<image>\nWhich color?", c)) for c in COLOURS[:3]]
    pixels = collate([Row(sample, True) for sample in samples], processor).pixel_values
    padded = LlavaImageProcessor(28, 28, do_pad=True)
    assert torch.equal(pixels, padded([Image.open(pictures / f"{c}.png") for c in COLOURS[:3]]))


def test_a_damaged_image_is_named(encode, processor, tmp_path):
    sample = encode_entry(7, CAPTIONS[0], "align", processor, _truncated(tmp_path), "", 2048)
    with pytest.raises(ValueError, match=r"entry 7: .*red.png is a damaged image"):
        collate([Row(sample, True)], processor)


def _truncated(folder):
    """A folder whose red.png has a valid header but is truncated."""
    draw_pictures(folder)
    content = (folder / "red.png").read_bytes()
    (folder / "red.png").write_bytes(content[: len(content) // 2])
    return folder


def test_prefetching_keeps_the_order():
    assert list(prefetch(lambda n: n * n, iter(range(50)))) == [n * n for n in range(50)]
