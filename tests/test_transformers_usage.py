"""What transformers' documentation of LLaVA shows runs with its import line changed, and gives the same tokens.

Each script runs twice: with transformers, and here. They are written after that page's sections: half precision, one
conversation, a batch, several images, a prompt by hand, padding to a square, quantised and flash variants.
"""

import functools
import http.server
import threading

import numpy as np
import pytest
import torch
import transformers
from conftest import make_judge, random_image
from reference_tokenizer import reference_tokenizer
from test_transformers_processor import PLAIN
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

import llava

LOAD = """
model = LlavaForConditionalGeneration.from_pretrained(FOLDER, torch_dtype=torch.{dtype}, **PLACE)
processor = AutoProcessor.from_pretrained(FOLDER)
"""
ASK = (
    '{{"role": "user", "content": [{{"type": "image", "url": URL + "{image}"}}, {{"type": "text", "text": "{text}"}}]}}'
)
TEMPLATE = """
inputs = processor.apply_chat_template(
    {conversations}, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", {more}
).to(model.device, torch.{dtype})
ids = model.generate(**inputs, max_new_tokens=12, {greedy})
texts = processor.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
"""
BY_HAND = """
processor.tokenizer.padding_side = "left"
prompts = ["USER: <image>\\nWhat is this? ASSISTANT:", "USER: <image>\\n<image>\\nWhich is larger? ASSISTANT:"]
pictures = [Image.open(PATH / "0.png"), Image.open(PATH / "1.png"), Image.open(PATH / "0.png")]
inputs = processor(images=pictures, text=prompts, padding=True, return_tensors="pt").to(model.device, torch.float32)
ids = model.generate(**inputs, max_new_tokens=12, {greedy})
texts = processor.batch_decode(ids, skip_special_tokens=True)
"""
HISTORY = """
conversation = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A red sign."}]},
    {"role": "user", "content": [{"type": "text", "text": "Describe it."}]},
]
prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
inputs = processor(images=Image.open(PATH / "0.png"), text=prompt, return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
texts = [prompt, *processor.batch_decode(ids, skip_special_tokens=True)]
"""
LOSS = """
prompt = "USER: <image>\\nWhat? ASSISTANT: A dog."
inputs = processor(images=Image.open(PATH / "0.png"), text=prompt, return_tensors="pt")
output = model(**inputs, labels=inputs["input_ids"], output_hidden_states=True)
ids, texts = output.logits.argmax(-1), [f"{output.loss.item():.4f}", str(len(output.hidden_states))]
"""
GREEDY = "do_sample=False"
ONE, TWO = (ASK.format(image=f"{i}.png", text=text) for i, text in enumerate(["What is shown?", "And what is this?"]))


def template(conversations: str, dtype: str = "float32", more: str = "", greedy: str = GREEDY) -> str:
    return LOAD.format(dtype=dtype) + TEMPLATE.format(
        conversations=conversations, dtype=dtype, more=more, greedy=greedy
    )


SCRIPTS = {
    "one conversation": template(f"[{ONE}]"),
    "one conversation in bfloat16": template(f"[{ONE}]", dtype="bfloat16"),
    "a batch": template(f"[[{ONE}], [{TWO}]]", more="padding=True"),
    "a repetition penalty": template(f"[{ONE}]", greedy=f"{GREEDY}, repetition_penalty=1.4"),
    "prompts by hand, with several images": LOAD.format(dtype="float32") + BY_HAND.format(greedy=GREEDY),
    "a history": LOAD.format(dtype="float32") + HISTORY,
    "a loss": LOAD.format(dtype="float32") + LOSS,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_file):
    """A checkpoint wholly written by transformers 5: no tokenizer.model, settings in processor_config.json."""
    folder = tmp_path_factory.mktemp("written")
    make_judge().save_pretrained(folder)
    transformers.LlavaProcessor(
        LlavaImageProcessorPil(size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42}),
        reference_tokenizer(tokenizer_file, {"<image>": 420, "<pad>": 421}),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=PLAIN,
    ).save_pretrained(folder)
    assert not (folder / "tokenizer.model").exists()
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two pictures in a folder, and the URL of a server that has them."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(2):
        random_image(np.random.default_rng(i), (60, 50 + 9 * i)).save(folder / f"{i}.png")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *args: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"PATH": folder, "URL": f"http://127.0.0.1:{server.server_port}/"}
    server.shutdown()


def run(script: str, library, folder, pictures) -> dict:
    names = {"FOLDER": str(folder), "torch": torch, "Image": __import__("PIL.Image").Image, **pictures}
    names["PLACE"] = {"device_map": "auto"} if library is llava else {}  # transformers needs accelerate for it
    names |= {name: getattr(library, name) for name in ("AutoProcessor", "LlavaForConditionalGeneration")}
    exec(script, names)
    return names


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_gives_the_same_tokens_with_its_import_changed(name, folder, pictures):
    ours, theirs = (run(SCRIPTS[name], library, folder, pictures) for library in (llava, transformers))
    assert torch.equal(ours["ids"], theirs["ids"])
    assert ours["texts"] == theirs["texts"]


VARIANTS = {
    "4 bits": ("load_in_4bit=True", 'use quantize="int8"'),
    "flash attention": ('attn_implementation="flash_attention_2"', "leave it out"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_that_needs_a_gpu_says_what_to_use_here(name, folder, pictures):
    option, sentence = VARIANTS[name]
    with pytest.raises(ValueError, match=sentence):
        run(f"LlavaForConditionalGeneration.from_pretrained(FOLDER, {option})", llava, folder, pictures)


def test_padding_to_a_square_is_chosen_while_loading(folder, pictures):
    script = (
        'pixels = AutoProcessor.from_pretrained(FOLDER, do_pad=True)(images=Image.open(PATH / "0.png"), text="<image>")'
    )
    ours = run(script, llava, folder, pictures)["pixels"].pixel_values
    settings = {"size": {"shortest_edge": 42}, "crop_size": {"height": 42, "width": 42}, "do_pad": True}
    image = random_image(np.random.default_rng(0), (60, 50))
    theirs = LlavaImageProcessorPil(**settings)(image, return_tensors="pt").pixel_values
    assert (ours - theirs).abs().max() <= 1e-6
