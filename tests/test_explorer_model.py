"""The explorer's JavaScript, run by Node, computes what PyTorch computes with the same 16-bit weights."""

import base64
import importlib.util
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
import transformers
import world
from conftest import make_judge
from PIL import Image
from random_checkpoint import write_processor_files
from talk import ask
from wordings import Voice

import vision
from extras.tokenizer_files import load_pieces
from llava import KVCache, LlavaForConditionalGeneration, LlavaProcessor
from processor import Inputs
from sampling import filter_logits
from tokenizer import SHORT_ANSWER, LlamaTokenizer

ROOT = Path(__file__).parents[1]
EXPLORER, BUILT_IN = ROOT / "explorer", ROOT / "tiny" / "model"
FAMILIES = ["colour", "shape", "size", "position", "count", "existence", "relation", "caption", "details", "follow-up"]
SCENES = 50


def node_version() -> int:
    node = shutil.which("node")
    return int(subprocess.check_output([node, "--version"], text=True)[1:].split(".")[0]) if node else 0


needs_node = pytest.mark.skipif(node_version() < 18, reason="the explorer's JavaScript needs Node 18 or newer")

# Around a script that turns `input` into `output`. Typed arrays travel as base64.
BEFORE = """
import { readFileSync, writeFileSync } from "node:fs";
import { answer, encodePrompt, loadModel, nextToken } from "./llava.js";
import { distribution, randomGenerator, sample } from "./sampling.js";
import { float16 } from "./tensor.js";
import { imageProcessor } from "./vision.js";
const TYPES = { Float32Array, Uint8ClampedArray, Uint16Array };
const decode = ({ type, base64 }) => new TYPES[type](Uint8Array.from(Buffer.from(base64, "base64")).buffer);
const revive = (_, value) => (value?.base64 === undefined ? value : decode(value));
const input = JSON.parse(readFileSync("input.json"), revive);
const model = loadModel(Uint8Array.from(readFileSync("model.bin")).buffer);
let output;
"""
AFTER = """
const bytes = (array) => Buffer.from(array.buffer, array.byteOffset, array.byteLength);
const encode = (array) => ({ base64: bytes(array).toString("base64") });
const replace = (_, value) =>
  value instanceof Float32Array ? encode(value) : value instanceof Int32Array ? [...value] : value;
writeFileSync("output.json", JSON.stringify(output, replace));
"""


def typed(array: np.ndarray, kind: str) -> dict:
    """An array as the scripts get it."""
    return {"type": kind, "base64": base64.b64encode(array.tobytes()).decode()}


def floats(value: dict) -> object:
    """An array of a script -> a flat tensor."""
    return (
        torch.frombuffer(bytearray(base64.b64decode(value["base64"])), dtype=torch.float32)
        if "base64" in value
        else value
    )


@pytest.fixture(scope="module")
def run_node(tmp_path_factory):
    """Runs a script with an input, and a model.bin, which is the built-in model's by default; returns its output."""

    def run(script: str, value: object, weights: bytes | None = None) -> object:
        folder = tmp_path_factory.mktemp("node")
        for file in EXPLORER.glob("*.js"):
            shutil.copy(file, folder)
        (folder / "package.json").write_text('{"type": "module"}')  # or Node takes .js files for CommonJS
        (folder / "model.bin").write_bytes(weights or (EXPLORER / "model.bin").read_bytes())
        (folder / "input.json").write_text(json.dumps(value))
        (folder / "script.js").write_text(BEFORE + script + AFTER, encoding="utf-8")
        done = subprocess.run(["node", "script.js"], cwd=folder, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads((folder / "output.json").read_text(encoding="utf-8"), object_hook=floats)

    return run


@pytest.fixture(scope="module")
def export():
    """The module explorer/export.py."""
    spec = importlib.util.spec_from_file_location("explorer_export", EXPLORER / "export.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def in_16_bits(model: torch.nn.Module) -> torch.nn.Module:
    """Rounds the weights as model.bin does; everything else stays float32."""
    for parameter in model.parameters():
        parameter.copy_(parameter.half())
    return model.eval()


@pytest.fixture(scope="module")
def built_in():
    model = in_16_bits(LlavaForConditionalGeneration.from_pretrained(BUILT_IN, torch.float32))
    return model, LlavaProcessor.from_pretrained(BUILT_IN)


def rgba(image: Image.Image) -> dict:
    """An image as a canvas returns it."""
    return typed(np.asarray(image.convert("RGBA")), "Uint8ClampedArray")


def make_questions(number: int) -> list[dict]:
    """Pictures of random scenes, each with a question; every other question asks for a short answer."""
    rng = random.Random("explorer")
    questions = []
    for i in range(number):
        scene = world.make_scene(rng, number=1 + i % 3)
        voice = Voice(rng)
        turns = ask(FAMILIES[i % len(FAMILIES)], scene, voice) or ask("caption", scene, voice)
        questions.append({"image": world.draw(scene, rng), "question": turns[0].question, "short": i // 10 % 2 == 1})
    return questions


def as_input(question: dict, **options) -> dict:
    return question | {"image": rgba(question["image"])} | options


ANSWER = """
const trace = ({ image, ...request }) => {
  const pixels = imageProcessor(image, model.config);
  const tokens = [];
  return { pixels, tokens, ...answer(model, { pixels, ...request }, (token) => tokens.push(token)) };
};
output = input.map(trace);
"""


def prepare(processor: LlavaProcessor, question: dict) -> Inputs:
    """The inputs of the model in Python, as llava.py prepares them."""
    text = f"<image>\n{question['question']}" + SHORT_ANSWER * question.get("short", False)
    return processor.prepare([processor.tokenizer.encode_chat([(text, None)])[0]], question["image"])


@pytest.fixture(scope="module")
def questions():
    return make_questions(SCENES)


@pytest.fixture(scope="module")
def traces(run_node, questions):
    """What JavaScript finds for each of the questions."""
    return run_node(ANSWER, [as_input(question) for question in questions])


# The model


@needs_node
def test_pixels_and_prompts_of_scenes_equal_pythons(built_in, questions, traces):
    for question, trace in zip(questions, traces, strict=True):
        inputs = prepare(built_in[1], question)
        assert torch.equal(trace["pixels"], inputs.pixel_values.flatten())
        assert trace["ids"][: trace["answerStart"]] == inputs.input_ids[0].tolist()


@needs_node
@torch.no_grad()
def test_tower_features_and_logits_match_pytorch(built_in, questions, traces, check):
    model, processor = built_in
    depth, patch = model.config.vision_config.num_hidden_layers, model.config.vision_config.patch_size
    for question, trace in zip(questions, traces, strict=True):
        pixels = prepare(processor, question).pixel_values
        patches = torch.nn.functional.unfold(pixels, patch, stride=patch)[0].T
        assert torch.equal(trace["patches"], patches.flatten())
        states = model.vision_tower(pixels, range(depth + 1), "full")[0].chunk(depth + 1, dim=-1)
        for ours, theirs in zip(trace["tower"], states, strict=True):
            check("explorer: hidden states of the tower", ours, theirs.flatten())
        check("explorer: image features", trace["features"], model.get_image_features(pixels).flatten())
        logits = model(torch.tensor([trace["ids"]]), pixels).logits[0]
        check("explorer: logits", trace["logits"], logits.flatten())


@needs_node
def test_answers_equal_pytorchs(built_in, questions, traces):
    model, processor = built_in
    for question, trace in zip(questions, traces, strict=True):
        inputs = prepare(processor, question)
        ids = model.generate(**inputs, max_new_tokens=64)[0].tolist()
        assert trace["ids"] == ids
        assert trace["pieces"] == processor.tokenizer.convert_ids_to_tokens(ids)
        assert trace["isImage"] == [i == model.config.image_token_id for i in ids]
        text = processor.decode(ids[trace["answerStart"] :], skip_special_tokens=True)
        assert trace["text"] == text == trace["tokens"][-1]["text"]
        assert [token["id"] for token in trace["tokens"]] == ids[trace["answerStart"] :]


@needs_node
@torch.no_grad()
def test_attention_and_lens_match_transformers(questions, traces, check):
    judge = transformers.LlavaForConditionalGeneration.from_pretrained(
        BUILT_IN, attn_implementation="eager", dtype=torch.float32
    )
    decoder, head = in_16_bits(judge).model.language_model, judge.lm_head
    processor = LlavaProcessor.from_pretrained(BUILT_IN)
    for question, trace in list(zip(questions, traces, strict=True))[:10]:
        pixels, ids = prepare(processor, question).pixel_values, torch.tensor([trace["ids"]])
        tower = judge.model.vision_tower(pixels, output_attentions=True)
        for ours, theirs in zip(trace["towerAttention"], tower.attentions, strict=True):
            check("explorer: attention of the tower", ours, theirs.flatten())
        out = judge(input_ids=ids, pixel_values=pixels, output_attentions=True, output_hidden_states=True)
        for ours, theirs in zip(trace["attention"], out.attentions, strict=True):
            check("explorer: attention of the decoder", ours, theirs.flatten())
        hidden = [*(decoder.norm(state) for state in out.hidden_states[:-1]), out.hidden_states[-1]]
        assert len(trace["lens"]) == len(hidden)
        for ours, state in zip(trace["lens"], hidden, strict=True):
            probabilities, ids = head(state)[0].softmax(-1).topk(3)  # (T, 3)
            found = torch.tensor([[one["probability"] for one in position] for position in ours])
            check("explorer: probabilities of the logit lens", found, probabilities, limit=1e-4)
            pieces = processor.tokenizer.convert_ids_to_tokens(ids[:, 0].tolist())
            assert [position[0]["piece"] for position in ours] == [
                piece or f"<unused {i}>" for piece, i in zip(pieces, ids[:, 0].tolist(), strict=True)
            ]


INTERVENTIONS = [
    {"hiddenPatches": [0, 7, 35]},
    {"zeroHeads": [{"layer": 0, "head": 1}, {"layer": 2, "head": 3}, {"layer": 2, "head": 0}]},
    {"skipLayers": [1]},
    {"skipLayers": [0, 4]},
    {"imageFeatures": True},
    {"hiddenPatches": [20], "zeroHeads": [{"layer": 4, "head": 2}], "skipLayers": [2]},
]


@needs_node
@torch.no_grad()
@pytest.mark.parametrize("interventions", INTERVENTIONS, ids=lambda one: "+".join(one))
def test_interventions_are_those_of_hooks_in_pytorch(interventions, built_in, run_node, questions, check):
    model, processor = built_in
    question, other = questions[2], questions[5]
    pixels = prepare(processor, question).pixel_values
    size = model.config.vision_config.patch_size
    across = pixels.shape[-1] // size
    for patch in interventions.get("hiddenPatches", []):
        row, column = size * (patch // across), size * (patch % across)
        pixels[:, :, row : row + size, column : column + size] = 0
    given = dict(interventions)
    hooks = []
    layers = model.language_model.model.layers
    width = layers[0].self_attn.head_dim
    if "imageFeatures" in interventions:
        swapped = model.get_image_features(prepare(processor, other).pixel_values)
        given["imageFeatures"] = typed(swapped.numpy(), "Float32Array")
        hooks.append(model.multi_modal_projector.register_forward_hook(lambda *_: swapped))
    for zero in interventions.get("zeroHeads", []):

        def cut(_, args, head=zero["head"]):
            args[0][..., head * width : (head + 1) * width] = 0

        hooks.append(layers[zero["layer"]].self_attn.o_proj.register_forward_pre_hook(cut))
    for layer in interventions.get("skipLayers", []):
        hooks.append(layers[layer].register_forward_hook(lambda _, args, out: args[0]))
    (trace,) = run_node(ANSWER, [as_input(question, interventions=given)])
    logits = model(torch.tensor([trace["ids"]]), pixels).logits[0]  # (T, V)
    for hook in hooks:
        hook.remove()
    check("explorer: logits with interventions", trace["logits"], logits.flatten())
    best = logits[trace["answerStart"] - 1 : -1].argmax(-1)
    assert trace["ids"][trace["answerStart"] :] == best.tolist()
    untouched = model(torch.tensor([trace["ids"]]), prepare(processor, question).pixel_values).logits[0]
    assert not torch.allclose(logits, untouched, atol=0.1)  # the intervention does something
    for layer in interventions.get("skipLayers", []):
        assert not trace["attention"][layer].any()


@needs_node
@torch.no_grad()
def test_the_next_token_after_other_image_tokens_matches_pytorch(built_in, run_node, questions, check):
    model, processor = built_in
    question = questions[0] | {"short": False}
    inputs = prepare(processor, question)
    empty = model.get_image_features(torch.zeros_like(inputs.pixel_values))
    alone = empty.clone()
    alone[..., 7, :] = model.get_image_features(inputs.pixel_values)[..., 7, :]
    script = """const { ids, features } = input;
    output = nextToken(model, { ids: Int32Array.from(ids), features }).probabilities;"""
    given = {"ids": inputs.input_ids[0].tolist(), "features": typed(alone.numpy(), "Float32Array")}
    hook = model.multi_modal_projector.register_forward_hook(lambda *_: alone)
    expected = model(**inputs).logits[0, -1].softmax(-1)
    hook.remove()
    check("explorer: next token after other image tokens", run_node(script, given), expected)


@needs_node
def test_a_checkpoint_of_other_sizes_matches_pytorch(export, run_node, tmp_path, check):
    text, vision = {"head_dim": 12, "attention_bias": True, "vocab_size": 447}, {"image_size": 44}  # 3 patches of 14
    make_judge(text, vision, tie_word_embeddings=True).save_pretrained(tmp_path)
    write_processor_files(tmp_path, image_size=44)
    model = in_16_bits(LlavaForConditionalGeneration.from_pretrained(tmp_path, torch.float32))
    processor = LlavaProcessor.from_pretrained(tmp_path)
    question = {"image": Image.fromarray(np.random.default_rng(0).integers(0, 256, (44, 44, 3), np.uint8))}
    question["question"] = "What is this: Öl, 12 € or 🦙?"
    (trace,) = run_node(ANSWER, [as_input(question, maxNewTokens=10)], export.export(tmp_path))
    inputs = prepare(processor, question)
    assert trace["ids"] == model.generate(**inputs, max_new_tokens=10)[0].tolist()
    with torch.no_grad():
        logits = model(torch.tensor([trace["ids"]]), inputs.pixel_values).logits[0]
    check("explorer: logits of a checkpoint of other sizes", trace["logits"], logits.flatten())


@needs_node
@torch.no_grad()
def test_a_generated_image_token_is_embedded_like_a_word(export, run_node, checkpoint, check):
    model = in_16_bits(LlavaForConditionalGeneration.from_pretrained(checkpoint, torch.float32))
    processor = LlavaProcessor.from_pretrained(checkpoint)
    question = {"image": Image.new("RGB", (42, 42), "red"), "question": "What?"}
    sampled = [as_input(question, temperature=100, maxNewTokens=300, seed=seed) for seed in range(4)]
    traces = run_node(ANSWER, sampled, export.export(checkpoint))
    inputs, image = prepare(processor, question), processor.tokenizer.image_token_id
    length = inputs.input_ids.shape[1]
    trace = next(trace for trace in traces if image in trace["ids"][length:-1])
    assert sum(trace["isImage"]) == processor.image_seq_length
    cache = KVCache(model)
    model(**inputs, cache=cache)
    logits = model(torch.tensor([trace["ids"][length:]]), cache=cache).logits[0]
    check("explorer: logits after a generated <image>", trace["logits"].view(-1, 448)[length:], logits)


# Inputs


@needs_node
def test_transparent_pixels_are_composited_onto_white_as_in_python(built_in, run_node):
    values, alpha = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    image = np.stack([values, values[::-1], values[:, ::-1], alpha], axis=-1)  # every value with every alpha
    found = run_node("output = imageProcessor(input, model.config);", typed(image, "Uint8ClampedArray"))
    processor = built_in[1].image_processor
    flat = np.asarray(vision._on_white(Image.fromarray(image)))
    mean, std = (np.array(numbers, np.float32) for numbers in (processor.image_mean, processor.image_std))
    expected = ((flat * processor.rescale_factor).astype(np.float32) - mean) / std
    assert np.array_equal(found.view(3, 256, 256), expected.transpose(2, 0, 1))


@needs_node
def test_all_finite_float16_numbers_are_decoded(run_node):
    patterns = np.array([i for i in range(65536) if i >> 10 & 31 != 31], np.uint16)
    found = run_node("output = float16(input);", typed(patterns, "Uint16Array"))
    assert np.array_equal(found.numpy().view(np.uint32), patterns.view(np.float16).astype(np.float32).view(np.uint32))


PARTS = [*"aeiouTHx .,?!\n\t\0é€🦙▁", "  ", " the ", "circle", "Circles", "<image>", "</s>", "<s>", "<pad>", "<unk>"]
PARTS += [
    "<0x41>",
    "<im",
    "age>",
    "USER:",
    " ASSISTANT:",
    "\ud83e",
    "\udd99",
    "\ufeff",
    "\u0301",
    "\r\n",
    "What colour",
]


def random_text(rng: random.Random) -> str:
    return "".join(rng.choices(PARTS, k=rng.randrange(20)))


@needs_node
def test_prompts_have_the_ids_of_python_and_decode_to_the_same_text(built_in, run_node):
    model, processor = built_in
    tokenizer, rng = processor.tokenizer, random.Random(0)
    prompts, vocabulary = [random_text(rng) for _ in range(600)], model.config.text_config.vocab_size
    runs = [
        [rng.choice([rng.randrange(vocabulary), rng.randrange(3, 259)]) for _ in range(rng.randrange(9))]
        for _ in range(600)
    ]
    script = """output = {
      prompts: input.prompts.map((question) => encodePrompt(model, question)),
      texts: input.runs.map((ids) => model.tokenizer.decode(ids)),
    };"""
    found = run_node(script, {"prompts": prompts, "runs": runs})
    image, count = tokenizer.image_token_id, processor.image_seq_length
    for prompt, encoded in zip(prompts, found["prompts"], strict=True):
        ids, _ = tokenizer.encode_chat([(prompt, None)])
        ids = [i for token in ids for i in [token] * (count if token == image else 1)]
        assert encoded["ids"] == ids, prompt
        assert encoded["pieces"] == tokenizer.convert_ids_to_tokens(ids)
    for ids, text in zip(runs, found["texts"], strict=True):
        assert text == tokenizer.decode(ids, skip_special_tokens=True), ids


@needs_node
@pytest.mark.parametrize(
    ("question", "says"),
    [("<image> and <image>?", "must contain <image> once"), ("long " * 1000, "The question is too long: ")],
)
def test_a_question_that_does_not_fit_is_refused_with_a_sentence(question, says, run_node, questions):
    script = "try { " + ANSWER + " } catch (error) { output = error.message; }"
    assert says in run_node(script, [as_input(questions[0]) | {"question": question}])


# Sampling

OPTIONS = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 0.5, "top_k": 20, "top_p": 0.9},
    {"temperature": 2.0, "top_k": 1000, "top_p": 1.0},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "top_k": 1},
]


LOGITS = {
    "random": 3 * torch.randn(8, 700, generator=torch.Generator().manual_seed(0)),
    "equal": torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0, 1.0]]),
}


@needs_node
@pytest.mark.parametrize("logits", LOGITS.values(), ids=LOGITS)
def test_distributions_are_those_of_filter_logits(logits, run_node, check):
    names = {"temperature": "temperature", "top_k": "topK", "top_p": "topP"}
    rows = [typed(row.numpy(), "Float32Array") for row in logits]
    given = [{names[name]: value for name, value in options.items()} for options in OPTIONS]
    script = "output = input.given.map((options) => input.rows.map((row) => distribution(row, options)));"
    found = run_node(script, {"given": given, "rows": rows})
    for options, distributions in zip(OPTIONS, found, strict=True):
        expected = filter_logits(logits, **options).softmax(-1)
        assert torch.equal(torch.stack(distributions) == 0, expected == 0)
        check("explorer: sampling distribution", torch.stack(distributions), expected, limit=1e-6)
    greedy = run_node("output = input.map((row) => distribution(row, { temperature: 0 }));", rows)
    assert torch.equal(torch.stack(greedy), torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[1]).float())


@needs_node
def test_samples_follow_the_distribution_and_their_seed(run_node, questions):
    script = """const probabilities = Float32Array.of(0, 0.1, 0.2, 0, 0.7, 0);
    const draw = (seed, n) => {
      const random = randomGenerator(seed);
      return Array.from({ length: n }, () => sample(probabilities, random));
    };
    const edge = sample(probabilities, () => 1 - 2 ** -32);
    output = { many: draw(0, 20000), same: [draw(1, 50), draw(1, 50), draw(2, 50)], edge };"""
    found = run_node(script, None)
    frequencies = np.bincount(found["many"], minlength=6) / 20000
    assert np.allclose(frequencies, [0, 0.1, 0.2, 0, 0.7, 0], atol=0.015)
    assert frequencies[[0, 3, 5]].sum() == 0
    first, second, other = found["same"]
    assert first == second != other
    assert found["edge"] == 4
    sampled = [as_input(questions[7], temperature=2.0, topP=0.95, maxNewTokens=20, seed=seed) for seed in (1, 1, 2)]
    first, second, other = (trace["ids"] for trace in run_node(ANSWER, sampled))
    assert first == second != other


# The export


def test_model_bin_is_the_export_of_the_built_in_model(export):
    content = (EXPLORER / "model.bin").read_bytes()
    assert content == export.export(BUILT_IN), "run: python explorer/export.py"
    assert len(content) < 10_000_000


UNSUITABLE = [
    (
        {"text_config": {"hidden_size": 1024, "head_dim": 256}},
        "MB of weights in 16 bits; the explorer takes at most 10 MB",
    ),
    ({"text_config": {"num_key_value_heads": 2}}, "as many key-value heads"),
    ({"text_config": {"model_type": "mistral", "num_key_value_heads": 4, "sliding_window": 512}}, "no sliding window"),
    ({"text_config": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}}, "RoPE without scaling"),
    ({"text_config": {"hidden_act": "relu"}}, "activations from gelu, quick_gelu, silu"),
    ({"vision_feature_layer": [-2, -3]}, "a single vision_feature_layer"),
    ({"vision_feature_select_strategy": "full"}, "a vision_feature_select_strategy of default"),
    ({"preprocessor": {"size": {"shortest_edge": 120}}}, "an image processor that only rescales"),
    ({"preprocessor": {"rescale_factor": 1 / 127.5}}, "an image processor that only rescales"),
]


def changed(content: dict, changes: dict) -> dict:
    """A JSON object with some of its entries replaced, in nested objects too."""
    return content | {
        name: changed(content[name], value) if isinstance(value, dict) and name in content else value
        for name, value in changes.items()
    }


@pytest.mark.parametrize(("changes", "says"), UNSUITABLE, ids=[says for _, says in UNSUITABLE])
def test_an_unsuitable_checkpoint_is_refused_with_a_reason(changes, says, export, tmp_path):
    shutil.copytree(BUILT_IN, tmp_path, dirs_exist_ok=True)
    changes = dict(changes)
    for file, change in (("preprocessor_config", changes.pop("preprocessor", {})), ("config", changes)):
        path = tmp_path / f"{file}.json"
        path.write_text(json.dumps(changed(json.loads(path.read_text()), change)))
    with pytest.raises(ValueError, match=str(tmp_path)) as refused:
        export.export(tmp_path)
    assert says in str(refused.value)


def test_a_unigram_tokenizer_is_refused(export, tmp_path):
    sentences = iter(["What is shown in this image?", "There are three triangles.", "A small red circle."] * 20)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_prefix=str(tmp_path / "unigram"),
        vocab_size=290,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    count = len(sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "unigram.model")))
    assert not export.is_llamas(LlamaTokenizer(load_pieces(tmp_path / "unigram.model"), {"<image>": count}))


def test_weights_beyond_float16_are_refused(export):
    with pytest.raises(ValueError, match=r"some\.weight has numbers that are not finite in float16"):
        export.pack({}, {"some.weight": torch.tensor([1.0, 70000.0])})


def test_the_command_fails_with_a_sentence_and_exit_code_1(tmp_path):
    command = [sys.executable, EXPLORER / "export.py", "--model", tmp_path / "missing", "--out", tmp_path / "model.bin"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"export.py: there is no folder {tmp_path / 'missing'}\n"
    assert not (tmp_path / "model.bin").exists()


def test_the_command_refuses_an_unknown_option_with_exit_code_2(export, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["export.py", "--no-such-option"])
    with pytest.raises(SystemExit) as stop:
        export.main()
    assert stop.value.code == 2


def test_the_command_writes_the_weights_and_a_page_that_contains_them(export, tmp_path, monkeypatch, capsys):
    files = ["--out", str(tmp_path / "model.bin"), "--html", str(tmp_path / "explorer.html")]
    monkeypatch.setattr(sys, "argv", ["export.py", *files])
    export.main()
    out, said = capsys.readouterr()
    assert out == ""
    for line, name in zip(said.splitlines(), ("model.bin", "explorer.html"), strict=True):
        size = (tmp_path / name).stat().st_size / 1e6
        assert line == f"wrote {tmp_path / name} ({size:.1f} MB)"
    assert (tmp_path / "model.bin").read_bytes() == (EXPLORER / "model.bin").read_bytes()
    page = (tmp_path / "explorer.html").read_text(encoding="utf-8")
    assert base64.b64encode((EXPLORER / "model.bin").read_bytes()).decode() in page
    assert 'src="page.js"' not in page and 'href="style.css"' not in page


# The worker

WORKER = """
const replies = [];
globalThis.self = { postMessage: (message) => replies.push(message) };
(0, eval)(input.worker);
const buffer = Uint8Array.from(readFileSync("model.bin")).buffer;
const pixels = imageProcessor(input.image, model.config);
const question = "Describe the picture.";
self.onmessage({ data: { id: 1, call: "load", buffer } });
self.onmessage({ data: { id: 2, call: "answer", pixels, question } });
self.onmessage({ data: { id: 3, call: "answer", pixels, question: "<image><image>" } });
output = replies;
"""


@needs_node
def test_the_bundled_worker_answers_messages(export, run_node, questions, built_in):
    model, processor = built_in
    question = questions[0] | {"question": "Describe the picture.", "short": False}
    inputs = prepare(processor, question)
    ids = model.generate(**inputs, max_new_tokens=64)[0].tolist()
    expected = processor.decode(ids[inputs.input_ids.shape[1] :], skip_special_tokens=True)
    loaded, *tokens, answered, refused = run_node(
        WORKER, {"worker": export.bundle("worker.js"), "image": rgba(question["image"])}
    )
    assert loaded["id"] == 1 and loaded["config"]["text_config"]["hidden_size"] == model.config.text_config.hidden_size
    assert {token["id"] for token in tokens} == {2}
    assert [token["token"]["id"] for token in tokens] == ids[inputs.input_ids.shape[1] :]
    assert answered["id"] == 2 and answered["text"] == expected and answered["ids"] == ids
    assert refused["id"] == 3 and "<image>" in refused["error"]
