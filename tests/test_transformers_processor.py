"""The processor takes what transformers' LlavaProcessor takes, and gives the same prompts, ids and pixels."""

import base64
import itertools
import json
import shutil
import sys
import types

import numpy as np
import pytest
import torch
import transformers
from conftest import encoded, random_image
from PIL import Image
from reference_tokenizer import reference_tokenizer
from test_image_processor import serve
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from extras import chat_template as chat_templates
from extras.batch import Inputs
from extras.chat_template import LLAVA, read_chat_template
from llava import LlavaForConditionalGeneration, LlavaProcessor

PLAIN, WITH_GENERATION = LLAVA
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Each uses something that transformers adds to Jinja, or sets.
FEATURES = """{{ bos_token }}{% set count = namespace(images=0) %}
{% for message in messages %}
    {%- if loop.index > 3 %}{% break %}{% endif %}
    {%- if message.role == 'assistant' %}
        {% generation %}{{ message.content | trim if message.content is string else message.content[0].text }}
        {% endgeneration %}{{ eos_token }}
    {% else %}
        {% for part in message.content if part is mapping and part.type == 'image' %}
            {% set count.images = count.images + 1 %}<image>
        {% endfor %}
        {{ message | tojson(sort_keys=true) if message.content is string else message.content[-1].text }}
    {% endif %}
{% endfor %}
{{ count.images }} images, {{ strftime_now('%Y') }}, {{ dict(a=1).a }}, {{ dict.fromkeys('ab', 1) | length }}
{% if not add_generation_prompt is defined %}{{ raise_exception('never') }}{% endif %}{{ pad_token }} {{ unk_token }}
"""


def text(text: str) -> dict:
    return {"type": "text", "text": text}


IMAGE = {"type": "image"}


def turn(role: str, *parts: dict) -> dict:
    return {"role": role, "content": list(parts)}


CONVERSATIONS = {
    "a question": [turn("user", text("What is this?"))],
    "an image first": [turn("user", IMAGE, text("What is this?"))],
    "an image last": [turn("user", text("What is this?"), IMAGE)],
    "images between texts": [turn("user", text("This"), IMAGE, text("and that"), IMAGE, text("differ how?"))],
    "only an image": [turn("user", IMAGE)],
    "a system message": [turn("system", text("Be brief.")), turn("user", IMAGE, text("What?"))],
    "several turns": [
        turn("user", IMAGE, text("What?")),
        turn("assistant", text("A dog.")),
        turn("user", text("Of which breed?"), IMAGE),
        turn("assistant", text("A poodle."), text("I think.")),
    ],
    "an empty text": [turn("user", text("")), turn("assistant", text(" "))],
    "no parts": [turn("user"), turn("assistant", text("Yes?"))],
    "special tokens in a text": [turn("user", text("<s></s><image>\n{{ messages }} <pad>"))],
    "any characters": [turn("user", text("Äpfel\r\n\t🦙 \"'\\n{% raw %}"))],
    "another role": [turn("tool", text("42")), turn("Ärzte", text("ß"))],
    "tuples and further keys": [{"role": "user", "content": (IMAGE | {"index": 0}, text("?")), "name": None}],
    "no content": [{"role": "assistant", "content": None}, turn("user", text("Hello"))],
}
STRINGS = {
    "a plain text": [{"role": "user", "content": "What is this?"}],
    "plain texts": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>\nWhat?"},
        {"role": "assistant", "content": " A dog. "},
    ],
}


@pytest.fixture(scope="module")
def processor(checkpoint):
    return LlavaProcessor.from_pretrained(checkpoint)


def make_judge(checkpoint, **settings):
    return transformers.LlavaProcessor(
        LlavaImageProcessorPil.from_pretrained(checkpoint, **settings),
        reference_tokenizer(checkpoint / "tokenizer.model", {"<image>": 420, "<pad>": 421}),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=PLAIN,
    )


@pytest.fixture(scope="module")
def judge(checkpoint):
    return make_judge(checkpoint)


def images(count: int = 2, size: tuple[int, int] = (60, 50)) -> list[Image.Image]:
    return [random_image(np.random.default_rng(i), size) for i in range(count)]


def assert_same(ours: Inputs, theirs: dict) -> None:
    assert set(ours) == set(theirs) - {"token_type_ids", "mm_token_type_ids"}
    for name in ours:
        assert ours[name].dtype == torch.as_tensor(theirs[name]).dtype
        torch.testing.assert_close(ours[name], torch.as_tensor(theirs[name]), rtol=0, atol=1e-6)


# The text of a prompt


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_llavas_template_gives_the_prompt_of_transformers(name, add_generation_prompt, processor, judge):
    options = {"add_generation_prompt": add_generation_prompt}
    for template in (PLAIN, WITH_GENERATION, PLAIN.replace("\n", "\\n"), f"{PLAIN}\n"):
        theirs = judge.apply_chat_template(CONVERSATIONS[name], chat_template=template, **options)
        assert processor.apply_chat_template(CONVERSATIONS[name], chat_template=template, **options) == theirs
    assert processor.apply_chat_template(CONVERSATIONS[name], **options) == theirs


@pytest.mark.parametrize("template", [CHATML, FEATURES], ids=["ChatML", "features"])
@pytest.mark.parametrize(
    "name", [*STRINGS, *[name for name in CONVERSATIONS if name not in ("no parts", "no content")]]
)
def test_other_templates_give_the_prompt_of_transformers(name, template, processor, judge):
    conversation = (CONVERSATIONS | STRINGS)[name]
    options = {"chat_template": template, "add_generation_prompt": True}
    theirs = judge.apply_chat_template(conversation, **options)
    assert processor.apply_chat_template(conversation, **options) == theirs


@pytest.mark.parametrize("name", STRINGS)
def test_llavas_template_keeps_plain_texts_as_one_part_each(name, processor, judge):
    """transformers renders their characters as nothing."""
    parts = [message | {"content": [text(message["content"])]} for message in STRINGS[name]]
    assert processor.apply_chat_template(STRINGS[name]) == judge.apply_chat_template(parts)


@pytest.mark.parametrize("template", [PLAIN, WITH_GENERATION, CHATML], ids=["LLaVA", "generation", "ChatML"])
def test_several_conversations_give_several_prompts(template, processor, judge):
    for several in (list(CONVERSATIONS.values())[:6], tuple(CONVERSATIONS.values())[:6], [CONVERSATIONS["a question"]]):
        theirs = judge.apply_chat_template(several, chat_template=template)
        assert isinstance(theirs, list)
        assert processor.apply_chat_template(several, chat_template=template) == theirs


@pytest.mark.parametrize("template", [PLAIN, CHATML, CHATML.replace("part['text']", "part['text'] | trim")])
@pytest.mark.parametrize(
    "ending", [turn("assistant", text("A dog "), text("is ")), turn("assistant", text("It"), IMAGE)]
)
def test_a_message_is_continued_as_by_transformers(ending, template, processor, judge):
    conversation = [turn("user", IMAGE, text("What?")), ending]
    for value in (True, "content"):
        options = {"chat_template": template, "continue_final_message": value}
        theirs = judge.apply_chat_template(conversation, **options)
        assert processor.apply_chat_template(conversation, **options) == theirs


def test_a_plain_text_is_continued(processor):
    conversation = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A"}]
    assert processor.apply_chat_template(conversation, continue_final_message=True) == "USER: What? ASSISTANT: A"


def test_variables_of_a_template_can_be_passed(processor, judge):
    template = "{{ system }} {{ messages[0].content }} {{ tools | tojson }} {{ documents[0].title }}"
    options = {"system": "Hi", "tools": [{"name": "add"}], "documents": [{"title": "T", "text": "x"}]}
    conversation = STRINGS["a plain text"]
    theirs = judge.apply_chat_template(conversation, chat_template=template, **options)
    assert processor.apply_chat_template(conversation, chat_template=template, **options) == theirs


def test_a_template_sees_no_objects_with_methods(processor, judge):
    template = "{{ messages[0].content[0].image }} {{ messages[0].content[1].image }}"
    conversation = [turn("user", {"type": "image", "image": images(1)[0]}, {"type": "image", "image": np.zeros(3)})]
    theirs = judge.apply_chat_template(conversation, chat_template=template)
    assert processor.apply_chat_template(conversation, chat_template=template) == theirs == "<Image> <ndarray>"


ATTACKS = {
    "Python's objects": "{{ ''.__class__.__mro__ }}",
    "an attribute of a namespace": "{% set ns = namespace(a=1) %}{% set ns.__class__ = 1 %}",
    "a namespace with such an attribute": "{{ namespace(__init__=1) }}",
    "a change of the messages": "{{ messages.append(1) }}",
    "an exception": "{{ raise_exception('images are not supported') }}",
    "an error": "{{ 1 / 0 }}",
    "no Jinja": "{% for %}",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_template_that_fails_is_refused_in_a_sentence(name, processor, judge):
    with pytest.raises(ValueError, match=r"the chat template (cannot render this conversation|is not valid Jinja): ."):
        processor.apply_chat_template(CONVERSATIONS["a question"], chat_template=ATTACKS[name])


def test_the_conversation_is_left_as_it_was(processor):
    conversation = [turn("user", {"type": "image_url", "image_url": {"url": "x"}}), turn("assistant", text("A"))]
    before = json.dumps(conversation)
    for template in (PLAIN, CHATML):
        processor.apply_chat_template(conversation, chat_template=template, continue_final_message=True)
    assert json.dumps(conversation) == before


BROKEN = {
    "nothing": ([], "a conversation must be a list of messages"),
    "one message": (turn("user"), "a conversation must be a list of messages"),
    "an empty conversation": ([[]], "a conversation must be a list of messages"),
    "texts": (["Hello"], "a conversation must be a list of messages"),
    "no role": ([{"content": "Hello"}], "a message must be an object with a role"),
    "a number": ([{"role": "user", "content": 3}], "the content of a message must be a text or a list of parts"),
    "parts that are texts": ([{"role": "user", "content": ["Hello"]}], "the content of a message must be a text or"),
    "a video": ([turn("user", {"type": "video", "url": "x"})], "of type 'video'; expected 'text' or 'image'"),
    "no type": ([turn("user", {"text": "x"})], "of type None; expected 'text' or 'image'"),
    "no text": ([turn("user", {"type": "text"})], "a part of type 'text' needs a text, not None"),
    "two sources": (
        [turn("user", {"type": "image", "path": "x", "url": "y"})],
        "an image part has both url and path; expected one of them",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_a_conversation_is_refused(name, processor):
    conversation, sentence = BROKEN[name]
    with pytest.raises(ValueError, match=sentence):
        processor.apply_chat_template(conversation)


# Which template


FILES = {
    "processor_config.json": json.dumps({"chat_template": "{{ 'processor_config' }}"}),
    "chat_template.json": json.dumps({"chat_template": "{{ 'json' }}"}),
    "chat_template.jinja": "{{ 'jinja' }}",
    "additional_chat_templates/rag.jinja": "{{ 'rag' }}",
}


CONFLICT = {"chat_template.json", "additional_chat_templates/rag.jinja"}  # transformers refuses the two together
SETS = [names for count in range(5) for names in itertools.combinations(FILES, count) if not set(names) >= CONFLICT]


@pytest.mark.parametrize("names", SETS, ids="+".join)
def test_templates_are_found_in_transformers_order(names, tmp_path):
    (tmp_path / "additional_chat_templates").mkdir()
    for name in names:
        (tmp_path / name).write_text(FILES[name])
    theirs = transformers.LlavaProcessor.get_processor_dict(tmp_path)[0].get("chat_template")
    assert read_chat_template(tmp_path) == (theirs or None)


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy of the checkpoint without its weights."""
    shutil.copytree(checkpoint, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "copy"


@pytest.mark.parametrize(
    "content",
    ["{{ 'mine' }}", [{"name": "default", "template": "{{ 'mine' }}"}, {"name": "other", "template": "{{ 'other' }}"}]],
    ids=["one", "several"],
)
def test_the_tokenizers_template_comes_last(content, folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": content}))
    processor = LlavaProcessor.from_pretrained(folder)
    assert processor.apply_chat_template(CONVERSATIONS["a question"]) == "mine"
    if isinstance(content, list):
        assert processor.apply_chat_template(CONVERSATIONS["a question"], chat_template="other") == "other"
    (folder / "chat_template.jinja").write_text("{{ 'jinja' }}")
    assert LlavaProcessor.from_pretrained(folder).apply_chat_template(CONVERSATIONS["a question"]) == "jinja"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("chat_template.json", json.dumps({"chat_template": 3})),
        ("processor_config.json", json.dumps({"chat_template": {"default": []}})),
        ("tokenizer_config.json", json.dumps({"chat_template": [{"name": "x"}]})),
        ("chat_template.json", "{"),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_a_malformed_template_file_is_named(file, content, folder):
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=file.replace(".", r"\.")):
        LlavaProcessor.from_pretrained(folder)


def test_a_template_can_be_set_and_is_saved(folder, tmp_path):
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": PLAIN}))
    processor = LlavaProcessor.from_pretrained(folder)
    assert processor.chat_template == PLAIN
    for template in ("{{ 'mine' }}", {"default": "{{ 'mine' }}", "other": "{{ 'other' }}"}):
        processor.chat_template = template
        assert processor.apply_chat_template(CONVERSATIONS["a question"]) == "mine"
        processor.save_pretrained(tmp_path / "saved")
        shutil.copy(folder / "config.json", tmp_path / "saved")
        assert LlavaProcessor.from_pretrained(tmp_path / "saved").chat_template == template
        theirs = transformers.LlavaProcessor.get_processor_dict(tmp_path / "saved")[0]["chat_template"]
        assert theirs == template


def test_a_name_that_leads_out_of_the_folder_is_not_saved(processor, tmp_path):
    changed = types.SimpleNamespace(**vars(processor) | {"chat_template": {"../../x": "{{ 1 }}"}})
    with pytest.raises(ValueError, match="cannot be saved under the name"):
        LlavaProcessor.save_pretrained(changed, tmp_path)


def test_an_unknown_name_of_a_template_is_refused(processor):
    with pytest.raises(ValueError, match="chat_template is 'rag'; expected a Jinja template, or a name of"):
        processor.apply_chat_template(CONVERSATIONS["a question"], chat_template="rag")


def test_without_jinja2_llavas_template_works_and_another_is_refused(processor, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    chat_templates._compiled.cache_clear()
    for template in LLAVA:
        assert processor.apply_chat_template(CONVERSATIONS["a question"], template) == "USER: What is this? "
    with pytest.raises(ImportError, match=r"is not LLaVA-1\.5's; to render it, run: pip install jinja2"):
        processor.apply_chat_template(CONVERSATIONS["a question"], CHATML)


def test_a_jinja2_with_a_broken_sandbox_is_refused(processor, monkeypatch):
    monkeypatch.setattr("jinja2.__version__", "3.1.5")
    chat_templates._compiled.cache_clear()
    with pytest.raises(ImportError, match=r"the sandbox of jinja2 3\.1\.5; run: pip install --upgrade jinja2"):
        processor.apply_chat_template(CONVERSATIONS["a question"], CHATML)


# From a conversation to the model's inputs


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """One picture in every form that a part of a message can have it in."""
    picture = images(1)[0]
    path = tmp_path_factory.mktemp("sources") / "picture.png"
    path.write_bytes(content := encoded(picture, "PNG"))
    with serve({"/picture.png": content}) as address:
        yield {
            "path": {"path": str(path)},
            "url": {"url": f"{address}/picture.png"},
            "a path as URL": {"url": str(path)},
            "picture": {"image": picture},
            "array": {"image": np.asarray(picture)},
            "tensor": {"image": torch.from_numpy(np.asarray(picture).transpose(2, 0, 1).copy())},
            "a path as image": {"image": str(path)},
            "base64": {"base64": base64.b64encode(content).decode()},
            "data URI": {"url": "data:image/png;base64," + base64.b64encode(content).decode()},
            "image_url": {"type": "image_url", "image_url": {"url": str(path)}},
        }


SOURCES = ["path", "url", "a path as URL", "picture", "array", "tensor", "a path as image", "base64", "data URI"]
SOURCES += ["image_url"]
TOKENIZED = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}


@pytest.mark.parametrize("source", SOURCES)
def test_inputs_of_a_conversation_match_transformers(source, sources, processor, judge):
    conversation = [turn("user", IMAGE | sources[source], text("What?"))]
    ours = processor.apply_chat_template(conversation, **TOKENIZED)
    assert_same(ours, judge.apply_chat_template(conversation, **TOKENIZED))
    assert ours.pixel_values.shape == (1, 3, 42, 42)


@pytest.mark.parametrize("template", [PLAIN, CHATML, FEATURES], ids=["LLaVA", "ChatML", "with BOS"])
@pytest.mark.parametrize("name", ["images between texts", "several turns", "a system message", "a question"])
def test_images_can_come_separately(name, template, processor, judge):
    conversation = CONVERSATIONS[name]
    count = sum(part == IMAGE for message in conversation for part in message["content"])
    options = TOKENIZED | {"chat_template": template, "processor_kwargs": {"images": images(count)}}
    ours = processor.apply_chat_template(conversation, **options)
    assert_same(ours, judge.apply_chat_template(conversation, **options))
    del options["processor_kwargs"]
    assert_same(processor.apply_chat_template(conversation, **options, images=images(count)), dict(ours))


@pytest.mark.parametrize("side", ["left", "right"])
def test_inputs_of_several_conversations_match_transformers(side, sources, processor, judge):
    conversations = [
        [turn("user", IMAGE | sources["picture"], text("What?"))],
        [turn("user", text("A question without any image, which is longer"))],
        [turn("user", IMAGE | sources["path"], IMAGE | sources["array"], text("Compare."))],
    ]
    options = TOKENIZED | {"processor_kwargs": {"padding": True, "padding_side": side}}
    theirs = judge.apply_chat_template(conversations, **options)
    assert_same(processor.apply_chat_template(conversations, **options), theirs)
    assert_same(processor.apply_chat_template(conversations, **TOKENIZED, padding=True, padding_side=side), theirs)


def test_ids_alone_are_returned_without_return_dict(processor, judge):
    options = {"tokenize": True, "return_tensors": "pt"}
    ours = processor.apply_chat_template(CONVERSATIONS["a question"], **options)
    assert torch.equal(ours, judge.apply_chat_template(CONVERSATIONS["a question"], **options))


def test_a_conversation_without_its_images_is_refused(processor):
    with pytest.raises(ValueError, match="tokens in the text and of images differ: 1 and 0"):
        processor.apply_chat_template(CONVERSATIONS["an image first"], tokenize=True)


# processor(images, text)


def prompts(count: int = 2) -> list[str]:
    return ["USER: <image>\nWhat is shown here? ASSISTANT:", "USER: <image> And here? Tell me more. ASSISTANT:"][:count]


FORMS = {
    "picture": lambda picture: picture,
    "list": lambda picture: [picture],
    "tuple": lambda picture: (picture,),
    "nested lists": lambda picture: [[picture]],
    "with an empty list": lambda picture: [[picture], []],
    "array (H, W, C)": np.asarray,
    "array (C, H, W)": lambda picture: np.asarray(picture).transpose(2, 0, 1),
    "list of arrays": lambda picture: [np.asarray(picture)],
    "array (N, H, W, C)": lambda picture: np.asarray(picture)[None],
    "array (N, C, H, W)": lambda picture: np.asarray(picture).transpose(2, 0, 1)[None],
    "grey array": lambda picture: np.asarray(picture.convert("L"))[..., None],
    "array with alpha": lambda picture: np.asarray(with_alpha(picture)),
    "array with alpha (C, H, W)": lambda picture: np.asarray(with_alpha(picture)).transpose(2, 0, 1),
    "array of floats up to 255": lambda picture: np.asarray(picture).astype(np.float32),
    "array of 64-bit integers": lambda picture: np.asarray(picture).astype(np.int64),
    "tensor (C, H, W)": lambda picture: torch.from_numpy(np.asarray(picture).transpose(2, 0, 1).copy()),
    "tensor (H, W, C)": lambda picture: torch.from_numpy(np.asarray(picture).copy()),
    "tensor (N, C, H, W)": lambda picture: torch.from_numpy(np.asarray(picture).transpose(2, 0, 1).copy())[None],
    "picture with alpha": lambda picture: with_alpha(picture),
    "3 pixels wide": lambda picture: np.asarray(picture)[:, :3],
    "3 pixels high": lambda picture: np.asarray(picture)[:3],
}


def with_alpha(picture: Image.Image) -> Image.Image:
    picture = picture.copy()
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    return picture


@pytest.mark.parametrize("form", FORMS)
def test_an_image_in_any_form_gives_the_pixels_of_transformers(form, processor, judge):
    given = FORMS[form](images(1)[0])
    ours = processor(images=given, text=prompts(1), return_tensors="pt")
    assert_same(ours, judge(images=given, text=prompts(1), return_tensors="pt"))


def test_images_of_several_kinds_can_be_mixed(sources, processor, judge):
    given = [sources[name].get("path") or sources[name]["image"] for name in ("path", "picture", "array", "tensor")]
    for nested in (given, [given[:1], given[1:]]):
        options = {"images": nested, "text": ["<image> one", "<image><image><image> three"], "padding": True}
        assert_same(processor(**options), judge(**options, return_tensors="pt"))


def test_a_path_may_be_an_object(sources, processor, tmp_path):
    shutil.copy(sources["path"]["path"], tmp_path / "x.png")
    assert_same(processor(tmp_path / "x.png", prompts(1)), processor(sources["path"]["path"], prompts(1)))


def test_standard_input_is_never_read_for_a_conversation(processor):
    with pytest.raises(FileNotFoundError):
        processor("-", "<image>")


@pytest.mark.parametrize("channels", ["channels_first", "channels_last"])
def test_the_channel_axis_of_an_ambiguous_array_can_be_given(channels, processor, judge):
    array = np.random.default_rng(0).integers(0, 256, (3, 50, 3), dtype=np.uint8)
    options = {"images": array, "text": prompts(1), "input_data_format": channels}
    assert_same(processor(**options), judge(**options, return_tensors="pt"))


NO_IMAGES = {
    "number": (3, "expected an image, but found int"),
    "None": ([None], "expected an image, but found NoneType"),
    "bytes": (b"x", "expected an image, but found bytes"),
    "two axes": (np.zeros((9, 9), np.uint8), r"an array \(9, 9\) is not an image: expected \(H, W, C\)"),
    "two channels": (np.zeros((9, 9, 2), np.uint8), r"an array \(9, 9, 2\) is not an image"),
    "no pixels": (np.zeros((9, 0, 3), np.uint8), r"an array \(9, 0, 3\) is not an image"),
    "floats up to 1": (np.full((9, 9, 3), 0.5), "an image is an array of float64; expected uint8"),
    "NaN": (np.full((9, 9, 3), np.nan), "an image is an array of float64; expected uint8"),
    "large values": (torch.full((3, 9, 9), 256), "an image is an array of int64; expected uint8"),
    "booleans": (np.zeros((9, 9, 3), bool), "an image is an array of bool; expected uint8"),
    "broken base64": ("data:image/png;base64,x", "the data URI is not valid base64"),
    "base64 of a text": ("data:image/png;base64,eHg=", "the data URI is not an image that Pillow can read"),
}


@pytest.mark.parametrize("name", NO_IMAGES)
def test_what_is_not_an_image_is_refused(name, processor):
    given, sentence = NO_IMAGES[name]
    with pytest.raises(ValueError, match=sentence):
        processor(given, "<image>")


ORDERS = {
    "images, text": lambda call: call(images(1)[0], prompts(1)[0]),
    "text, images": lambda call: call(prompts(1)[0], images(1)[0]),
    "text, images, in lists": lambda call: call(prompts(1), images(1)),
    "text, images, nested": lambda call: call(prompts(1), [images(1)]),
    "text, images=": lambda call: call(prompts(1)[0], text=images(1)[0]),
    "keywords": lambda call: call(text=prompts(1)[0], images=images(1)[0]),
}


@pytest.mark.parametrize("order", ORDERS)
def test_images_and_text_may_be_in_either_order(order, processor, judge):
    assert_same(ORDERS[order](processor), judge(images=images(1), text=prompts(1), return_tensors="pt"))


def test_a_path_and_a_text_may_be_in_either_order(sources, processor, judge):
    path, prompt = sources["path"]["path"], prompts(1)[0]
    theirs = judge(path, prompt, return_tensors="pt")
    for given in [(path, prompt), (prompt, path), ([path], [prompt]), ([prompt], [path])]:
        assert_same(processor(*given), theirs)


def test_a_text_alone_and_images_alone_match_transformers(processor, judge):
    assert_same(processor(text="Hello"), judge(text="Hello", return_tensors="pt"))
    assert_same(processor(images=images()), judge(images=images(), return_tensors="pt"))
    assert_same(processor(None, "Hello"), judge(None, "Hello", return_tensors="pt"))
    with pytest.raises(ValueError, match="there is no prompt"):
        processor()


@pytest.mark.parametrize("wrong", [3, ["a", 3], [["a"]], {"a": 1}], ids=str)
def test_text_that_is_not_text_is_refused(wrong, processor):
    with pytest.raises(ValueError, match="text must be a string or a list of strings"):
        processor(text=wrong)


LAYOUTS = {
    "longest": {"padding": True},
    "by name": {"padding": "longest"},
    "on the right": {"padding": True, "padding_side": "right"},
    "to a length": {"padding": "max_length", "max_length": 50},
    "to a length, on the right": {"padding": "max_length", "max_length": 50, "padding_side": "right"},
    "to a length that is exceeded": {"padding": "max_length", "max_length": 5, "text": "a b c d e f"},
    "to a multiple": {"padding": True, "pad_to_multiple_of": 16},
    "to the model's length, which is unknown": {"padding": "max_length", "text": "one"},
    "truncated": {"padding": True, "truncation": True, "max_length": 13, "text": ["one two three", "one"]},
    "truncated to more": {"padding": True, "truncation": True, "max_length": 100},
    "truncated by length alone": {"max_length": 4, "text": "one two three"},
    "truncated without a length": {"padding": True, "truncation": True},
    "not truncated": {"padding": True, "truncation": False},
    "not truncated, with a length": {"truncation": False, "max_length": 4, "text": "one two three"},
    "truncated by name": {"truncation": "longest_first", "max_length": 4, "text": "one two three"},
    "truncated and padded": {
        "padding": "max_length",
        "truncation": True,
        "max_length": 8,
        "text": ["one two", "a b c d e f"],
    },
    "without BOS": {"padding": True, "add_special_tokens": False},
    "not padded": {"padding": False, "text": ["one", "one"]},
    "in text_kwargs": {"text_kwargs": {"padding": True, "padding_side": "right"}},
    "in common_kwargs": {"padding": True, "common_kwargs": {"return_tensors": "pt"}},
    "what changes nothing": {"padding": True, "stride": 0, "return_token_type_ids": False, "verbose": False},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LAYOUTS)
def test_batches_are_laid_out_as_by_transformers(name, processor, judge):
    options = {"text": [*prompts(), "Hello"], **LAYOUTS[name]}
    options |= {"images": images()} if "<image>" in options["text"][0] else {}
    assert_same(processor(**options), judge(**{"return_tensors": "pt"} | options))


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizers_padding_side_is_used(side, checkpoint):
    judge, options = make_judge(checkpoint), {"text": ["one two three", "one"], "padding": True}
    processor = LlavaProcessor.from_pretrained(checkpoint)
    assert processor.tokenizer.padding_side == "left"
    processor.tokenizer.padding_side = judge.tokenizer.padding_side = side
    assert_same(processor(**options), judge(**options, return_tensors="pt"))
    assert_same(LlavaProcessor.from_pretrained(checkpoint, padding_side=side)(**options), dict(processor(**options)))


def test_the_models_length_is_read_from_the_tokenizers_config(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 6}))
    judge = make_judge(folder)
    judge.tokenizer.model_max_length = 6
    processor = LlavaProcessor.from_pretrained(folder)
    for options in ({"truncation": True}, {"padding": "max_length", "truncation": True}):
        options |= {"text": "one two three four"}
        assert_same(processor(**options), judge(**options, return_tensors="pt"))
        assert processor(**options).input_ids.shape == (1, 6)


SETTINGS = {
    "pad": {"do_pad": True},
    "other mean": {"image_mean": [0.5, 0.4, 0.3], "image_std": (0.2, 0.3, 0.4)},
    "no normalisation": {"do_normalize": False},
    "no scaling": {"do_rescale": False},
    "other filter": {"resample": Image.Resampling.BILINEAR},
    "other scale": {"size": {"shortest_edge": 56}},
    "square": {"size": {"height": 42, "width": 42}, "do_center_crop": False},
    "what changes nothing": {"do_convert_rgb": True, "data_format": "channels_first", "pad_size": None},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_the_image_processor_take_effect(name, checkpoint, processor):
    theirs = make_judge(checkpoint, **SETTINGS[name])(images(), prompts(), padding=True, return_tensors="pt")
    assert_same(LlavaProcessor.from_pretrained(checkpoint, **SETTINGS[name])(images(), prompts(), padding=True), theirs)
    assert_same(processor(images(), prompts(), padding=True, **SETTINGS[name]), theirs)
    assert_same(processor(images(), prompts(), padding=True, images_kwargs=SETTINGS[name]), theirs)
    assert not processor.image_processor.do_pad


def test_changed_settings_are_saved(checkpoint, folder, tmp_path):
    processor = LlavaProcessor.from_pretrained(checkpoint, do_pad=True, image_mean=[0.5, 0.4, 0.3])
    processor.save_pretrained(tmp_path / "saved")
    ours = json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text())
    theirs = LlavaImageProcessorPil.from_pretrained(tmp_path / "saved")
    assert ours["image_processor_type"] == "LlavaImageProcessor"
    shutil.copy(checkpoint / "config.json", tmp_path / "saved")
    again = LlavaProcessor.from_pretrained(tmp_path / "saved")
    assert again.image_processor == processor.image_processor
    for do_pad in (True, theirs.do_pad):
        pixels = theirs(images(), return_tensors="pt", do_pad=do_pad).pixel_values
        torch.testing.assert_close(again(images=images()).pixel_values, pixels, rtol=0, atol=1e-6)


# What follows from the checkpoint


def test_the_attributes_are_those_of_transformers(processor, judge):
    for name in ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens", "image_token"):
        assert getattr(processor, name) == getattr(judge, name)
    assert processor.image_token_id == judge.image_token_id
    assert processor.image_seq_length == 9


@pytest.mark.parametrize(
    "change",
    [
        {"patch_size": 7},
        {"vision_feature_select_strategy": "full"},
        {"num_additional_image_tokens": 3},
        {"vision_feature_select_strategy": "full", "num_additional_image_tokens": 0},
    ],
    ids=str,
)
def test_the_number_of_image_tokens_follows_the_attributes(change, checkpoint):
    processor, judge = LlavaProcessor.from_pretrained(checkpoint), make_judge(checkpoint)
    for name, value in change.items():
        setattr(processor, name, value)
        setattr(judge, name, value)
    ours, theirs = processor(images(), "<image> <image>"), judge(images(), "<image> <image>", return_tensors="pt")
    assert_same(ours, theirs)
    assert_same(LlavaProcessor.from_pretrained(checkpoint, **change)(images(), "<image> <image>"), theirs)


def test_decoding_takes_transformers_arguments(processor, judge):
    ids = processor(text=["one two", "three </s>"], padding=True).input_ids
    for options in ({}, {"skip_special_tokens": True}):
        options["clean_up_tokenization_spaces"] = False
        assert processor.batch_decode(ids, **options) == judge.batch_decode(ids, **options)
        assert processor.decode(ids[0], **options) == judge.decode(ids[0], **options)


@pytest.mark.parametrize("text", ["one two", ["one two", "three </s>"], "", ["<image> a"]], ids=str)
@pytest.mark.parametrize("options", [{}, {"padding": True}, {"add_special_tokens": False}], ids=str)
def test_calling_the_tokenizer_gives_the_lists_of_transformers(text, options, processor, judge):
    theirs = judge.tokenizer(text, **options)
    assert processor.tokenizer(text, **options) == {name: theirs[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("side", ["left", "right"])
def test_calling_the_tokenizer_for_tensors_pads_on_its_side(side, processor, judge, monkeypatch):
    for one in (processor, judge):
        monkeypatch.setattr(one.tokenizer, "padding_side", side)
    options = {"padding": True, "return_tensors": "pt"}
    ours, theirs = (one.tokenizer(["one two", "a"], **options) for one in (processor, judge))
    assert all(torch.equal(ours[name], theirs[name]) for name in ("input_ids", "attention_mask"))


def test_decoding_that_would_change_the_text_is_refused(processor):
    with pytest.raises(ValueError, match="clean_up_tokenization_spaces=True is not supported"):
        processor.decode([1, 5], clean_up_tokenization_spaces=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        processor.batch_decode([[1, 5]], nonsense=1)


# Inputs.to


@pytest.mark.parametrize(
    ("place", "options"),
    [
        (("cpu",), {}),
        ((torch.float16,), {}),
        (("cpu", torch.bfloat16), {}),
        ((torch.device("cpu"), torch.float64), {}),
        ((), {"device": "cpu"}),
        ((), {"dtype": torch.float16}),
        ((), {"device": "cpu", "dtype": torch.float16}),
        (("cpu",), {"dtype": torch.float16, "non_blocking": True}),
        (("meta",), {}),
        (("meta", torch.float16), {}),
    ],
    ids=str,
)
def test_inputs_move_and_convert_as_those_of_transformers(place, options, processor, judge):
    ours, theirs = processor(images(1), prompts(1)), judge(images(1), prompts(1), return_tensors="pt")
    moved = ours.to(*place, **options)
    theirs.to(*place, **options)
    assert moved is ours
    for name in ours:
        assert (ours[name].dtype, ours[name].device) == (theirs[name].dtype, theirs[name].device)


@pytest.mark.parametrize("wrong", [3.5, [], {}], ids=str)
def test_a_place_that_is_none_is_refused(wrong, processor):
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        processor(text="a").to(wrong)


def test_inputs_go_straight_to_the_model(checkpoint, processor):
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint)
    conversation = [turn("user", {"type": "image", "image": images(1)[0]}, text("What?"))]
    inputs = processor.apply_chat_template(conversation, **TOKENIZED).to(model.device, model.dtype)
    ids = model.generate(**inputs, max_new_tokens=5)
    assert processor.batch_decode(ids, skip_special_tokens=True)[0].startswith("USER:  \nWhat? ASSISTANT:")


# The rule for arguments


REFUSED = {
    "videos": ({"videos": [1]}, "videos=.* is not supported; pass frames of the video as images"),
    "text_pair": ({"text_pair": "b"}, "text_pair='b' is not supported; join the texts"),
    "words": ({"is_split_into_words": True}, "is_split_into_words=True is not supported; join the words"),
    "token types": ({"return_mm_token_type_ids": True}, "use inputs.input_ids == processor.image_token_id"),
    "data format": ({"data_format": "channels_last"}, r"use inputs.pixel_values.permute\(0, 2, 3, 1\)"),
    "device": ({"device": "cuda"}, r"device='cuda' is not supported; use inputs.to\(device\)"),
    "NumPy": ({"return_tensors": "np"}, "return_tensors is 'np'; only 'pt' is supported"),
    "lists": ({"return_tensors": None}, "return_tensors is None; only 'pt' is supported"),
    "padding": ({"padding": "left"}, "padding is 'left'; expected True"),
    "truncation": ({"truncation": "only_second"}, "truncation is 'only_second'; expected True or False"),
    "side": ({"padding_side": "top"}, "padding_side is 'top'; expected 'left' or 'right'"),
    "length": ({"max_length": 0}, "max_length is 0; expected an integer above 0"),
    "multiple": ({"pad_to_multiple_of": 2.5}, "pad_to_multiple_of is 2.5; expected an integer above 0"),
    "channel axis": ({"input_data_format": "none"}, "input_data_format is 'none'; expected 'channels_first' or"),
    "setting": ({"do_pad": "yes"}, "processor: do_pad is 'yes', which is not of type bool"),
    "twice": ({"padding": True, "text_kwargs": {"padding": "max_length"}}, "padding is passed twice"),
    "multiple of": (
        {"padding": True, "truncation": True, "max_length": 10, "pad_to_multiple_of": 8},
        "max_length 10 is not a multiple of pad_to_multiple_of 8",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_argument_that_would_change_the_result_is_refused(name, processor):
    options, sentence = REFUSED[name]
    with pytest.raises(ValueError, match=sentence):
        processor(text="a", **options)


def test_an_image_is_never_cut(processor):
    with pytest.raises(ValueError, match="max_length 8 cuts off tokens of an image"):
        processor(images(1), "<image> What?", truncation=True, max_length=8)


def test_an_unknown_argument_is_a_type_error_that_names_it(processor, checkpoint):
    calls = [
        lambda **options: processor(text="a", **options),
        lambda **options: processor.prepare([[1]], **options),
        lambda **options: processor.apply_chat_template(CONVERSATIONS["a question"], **options),
        lambda **options: processor.apply_chat_template(CONVERSATIONS["a question"], tokenize=True, **options),
        lambda **options: LlavaProcessor.from_pretrained(checkpoint, **options),
        lambda **options: LlavaProcessor.from_pretrained("no/such", **options),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="got an unexpected keyword argument 'pading'"):
            call(pading=True)


CHATS = {
    "a mask": ({"return_assistant_tokens_mask": True}, "tokenizer.encode_chat returns such a mask"),
    "sanitising": ({"sanitize_control_tokens": True}, "never encodes typed text as control tokens"),
    "a function": ({"tools": [print]}, "functions as tools are not supported; describe them by JSON schemas"),
    "two endings": ({"continue_final_message": True, "add_generation_prompt": True}, "exclude one another"),
    "another field": ({"continue_final_message": "thinking"}, "expected True or 'content'"),
    "nothing to continue": ({"continue_final_message": True}, "the last message has no text to continue"),
}


@pytest.mark.parametrize("name", CHATS)
def test_an_argument_that_would_change_the_prompt_is_refused(name, processor):
    options, sentence = CHATS[name]
    with pytest.raises(ValueError, match=sentence):
        processor.apply_chat_template([turn("user", IMAGE)], **options)


def test_what_cannot_change_a_prompt_is_accepted(processor):
    options = {"padding": True, "return_tensors": "np", "return_dict": True, "tools": None, "max_length": 3}
    options |= {"load_audio_from_video": True, "return_assistant_tokens_mask": False, "processor_kwargs": None}
    assert processor.apply_chat_template(CONVERSATIONS["a question"], **options) == "USER: What is this? "


LOADING = {
    "use_fast": {"use_fast": False},
    "hub": {"revision": "main", "token": None, "cache_dir": None, "local_files_only": True, "force_download": False},
    "model's": {"device_map": "auto", "torch_dtype": torch.float16, "trust_remote_code": True},
    "the same": {"patch_size": 14, "vision_feature_select_strategy": "default", "image_token": "<image>"},
}


@pytest.mark.parametrize("name", LOADING)
def test_arguments_of_loading_that_change_nothing_are_accepted(name, checkpoint, processor):
    ours = LlavaProcessor.from_pretrained(checkpoint, **LOADING[name])
    assert_same(ours(images(), prompts(), padding=True), dict(processor(images(), prompts(), padding=True)))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"backend": "torchvision"}, "images are processed by Pillow"),
        ({"subfolder": "x"}, "give the path of that folder"),
        ({"image_token": "<img>"}, "the token of an image is <image>"),
        ({"do_pad": 3}, "do_pad is 3, which is not of type bool"),
        ({"crop_size": 56}, "the shape of images is"),
    ],
    ids=str,
)
def test_arguments_of_loading_that_do_not_fit_are_refused(options, sentence, checkpoint):
    with pytest.raises(ValueError, match=sentence):
        LlavaProcessor.from_pretrained(checkpoint, **options)


def test_hub_options_reach_the_hub(monkeypatch, checkpoint):
    seen = {}
    monkeypatch.setattr("processor.find_folder", lambda name, **options: seen.update(options) or checkpoint)
    LlavaProcessor.from_pretrained("some/where", revision="v1", token="t", do_pad=True)
    assert seen == {"revision": "v1", "token": "t"}


def test_a_template_can_be_given_when_loading(checkpoint):
    processor = LlavaProcessor.from_pretrained(checkpoint, chat_template="{{ 'mine' }}")
    assert processor.apply_chat_template(CONVERSATIONS["a question"]) == "mine"
