"""Code written for transformers runs with its import changed: the model's arguments mean the same, or are refused."""

import dataclasses
import json

import pytest
import torch
import transformers
from conftest import make_judge
from transformers.activations import ACT2FN

from extras import compat
from extras.activations import ACTIVATIONS
from llava import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration
from sampling import filter_logits, penalize_repetition

# Activations


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_that_of_transformers_to_the_last_bit(name):
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 4
    assert torch.equal(ACTIVATIONS[name](x), ACT2FN[name](x))


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "swish"])
@torch.no_grad()
def test_each_part_of_the_model_takes_the_activation_that_its_config_names(name, make_pair, prompt, check):
    ours, theirs = make_pair(text={"hidden_act": name}, vision={"hidden_act": name}, projector_hidden_act=name)
    inputs = prompt()
    check(f"whole model with {name}", ours(**inputs).logits, theirs(**inputs).logits)


# forward


def labels_of(inputs: dict) -> torch.Tensor:
    """Labels for the second half of the prompt."""
    labels = inputs["input_ids"].clone()
    labels[:, : labels.shape[1] // 2] = -100
    return labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_labels_give_the_loss_of_transformers(dtype, make_pair, prompt, check):
    ours, theirs = make_pair()
    ours, theirs, inputs = ours.to(dtype), theirs.to(dtype), prompt()
    theirs.model.language_model.rotary_emb.inv_freq = ours.language_model.model.frequencies  # .bfloat16() rounded it
    labels = labels_of(inputs)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    loss, reference = ours(**inputs, labels=labels).loss, theirs(**inputs, labels=labels).loss
    check(f"loss, {dtype}", loss, reference, limit=1e-6 if dtype == torch.float32 else 1e-2)


def test_the_loss_has_the_gradients_of_transformers(make_pair, prompt, check):
    ours, theirs = make_pair()
    inputs = prompt()
    for model in (ours, theirs):
        model(**inputs, labels=labels_of(inputs)).loss.backward()
    gradients = [
        ours.language_model.model.layers[0].self_attn.q_proj.weight.grad,
        theirs.model.language_model.layers[0].self_attn.q_proj.weight.grad,
    ]
    check("gradients of the loss", *gradients, limit=1e-4)


@torch.no_grad()
def test_hidden_states_are_those_of_transformers(make_pair, prompt, check):
    ours, theirs = make_pair()
    inputs = prompt()
    states = ours(**inputs, output_hidden_states=True).hidden_states
    references = theirs(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == len(references) == 4
    for state, reference in zip(states, references, strict=True):
        check("hidden states", state, reference)


@torch.no_grad()
def test_recording_hidden_states_leaves_no_hooks_and_changes_no_logits(make_pair, prompt):
    ours, _ = make_pair()
    inputs = prompt()
    assert torch.equal(ours(**inputs, output_hidden_states=True).logits, ours(**inputs).logits)
    last = ours(**inputs, output_hidden_states=True, logits_to_keep=2).logits
    torch.testing.assert_close(last, ours(**inputs).logits[:, -2:])
    assert not any(layer._forward_pre_hooks for layer in ours.language_model.model.layers)


def test_the_loss_and_hidden_states_are_absent_unless_asked_for(make_pair, prompt):
    ours, _ = make_pair()
    output = ours(**prompt())
    assert output.loss is None
    assert output.hidden_states is None


BAD_LABELS = {
    "another shape": lambda ids: {"labels": ids[:, 1:]},
    "not all logits": lambda ids: {"labels": ids, "logits_to_keep": 1},
    "chosen logits": lambda ids: {"labels": ids, "logits_to_keep": ids > 0},
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_labels_that_do_not_match_are_refused(case, make_pair, prompt):
    ours, _ = make_pair()
    ids = prompt(images=0)["input_ids"]
    with pytest.raises(ValueError, match="labels must have the shape of input_ids"):
        ours(ids, **BAD_LABELS[case](ids))


# generate


def generated(model, inputs: dict, **options) -> torch.Tensor:
    return model.generate(**inputs, **options)


GREEDY = {
    "do_sample=False": {"do_sample": False, "max_new_tokens": 20},
    "max_length": {"do_sample": False, "max_length": 45},
    "max_length and max_new_tokens": {"do_sample": False, "max_length": 33, "max_new_tokens": 20},
    "repetition_penalty": {"do_sample": False, "repetition_penalty": 1.3, "max_new_tokens": 40},
    "repetition_penalty below 1": {"do_sample": False, "repetition_penalty": 0.8, "max_new_tokens": 20},
    "num_beams=1": {"do_sample": False, "num_beams": 1, "max_new_tokens": 20},
    "use_cache=False": {"do_sample": False, "use_cache": False, "max_new_tokens": 20},
    "an eos": {"do_sample": False, "eos_token_id": 7, "pad_token_id": 5, "max_new_tokens": 20},
    "several eos": {
        "do_sample": False,
        "eos_token_id": list(range(0, 420, 9)),
        "pad_token_id": 5,
        "max_new_tokens": 40,
    },
    "options without effect": {"do_sample": False, "num_return_sequences": 1, "max_new_tokens": 9, "min_length": 0},
}


@pytest.mark.parametrize("case", GREEDY)
@pytest.mark.parametrize("padded", [False, True], ids=["one prompt", "padded batch"])
def test_greedy_decoding_gives_the_tokens_of_transformers(case, padded, make_pair, prompt):
    ours, theirs = make_pair()
    inputs = prompt(images=1)
    if padded:
        ids = prompt(images=0, length=29, seed=3)["input_ids"]
        mask = torch.ones(2, 29, dtype=torch.long)
        mask[1, :11] = 0
        ids[:, :11] = 421
        inputs = inputs | {"input_ids": torch.cat([inputs["input_ids"], ids]), "attention_mask": mask}
    assert torch.equal(ours.generate(**inputs, **GREEDY[case]), theirs.generate(**inputs, **GREEDY[case]))


CONFIGS = {
    "ours": lambda: GenerationConfig(max_new_tokens=7, do_sample=False, repetition_penalty=1.2),
    "transformers'": lambda: transformers.GenerationConfig(max_new_tokens=7, do_sample=False, repetition_penalty=1.2),
    "a dict": lambda: {"max_new_tokens": 7, "do_sample": False, "repetition_penalty": 1.2},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_generation_config_sets_what_a_call_does_not(kind, make_pair, prompt):
    ours, theirs = make_pair()
    inputs = prompt()
    expected = theirs.generate(**inputs, max_new_tokens=7, do_sample=False, repetition_penalty=1.2)
    assert torch.equal(ours.generate(**inputs, generation_config=CONFIGS[kind]()), expected)
    assert ours.generate(**inputs, generation_config=CONFIGS[kind](), max_new_tokens=3).shape[1] == 20 + 9 + 3


def test_the_models_own_generation_config_sets_the_defaults(make_pair, prompt):
    ours, _ = make_pair()
    assert (ours.generation_config.eos_token_id, ours.generation_config.pad_token_id) == ([2], 421)
    ours.generation_config.max_new_tokens = 4
    assert ours.generate(**prompt()).shape[1] == 20 + 9 + 4


def test_do_sample_samples_with_the_defaults_of_transformers(make_pair, prompt):
    """Temperature 1 and the 50 most likely tokens."""
    ours, _ = make_pair()
    inputs = prompt()
    logits = ours(**inputs).logits[:, -1]
    seen = {
        ours.generate(**inputs, do_sample=True, max_new_tokens=1, generator=torch.Generator().manual_seed(seed))[
            0, -1
        ].item()
        for seed in range(60)
    }
    allowed = filter_logits(logits, 1.0, top_k=50).isfinite()[0].nonzero()[:, 0].tolist()
    assert len(seen) > 5
    assert seen <= set(allowed)


def test_do_sample_false_ignores_the_sampling_options(make_pair, prompt):
    ours, _ = make_pair()
    inputs = prompt()
    plain = ours.generate(**inputs, max_new_tokens=9)
    assert torch.equal(ours.generate(**inputs, max_new_tokens=9, do_sample=False, temperature=0.7, top_p=0.9), plain)


@pytest.mark.parametrize("penalty", [1.5, 0.7])
def test_the_repetition_penalty_is_that_of_transformers(penalty):
    generator = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(3, 50, generator=generator), torch.randint(50, (3, 20), generator=generator)
    theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    assert torch.equal(penalize_repetition(logits, ids, penalty), theirs)


class Recorder:
    """A streamer."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_gets_what_that_of_transformers_gets(make_pair, prompt):
    ours, theirs = make_pair()
    inputs, recorders = prompt(), [Recorder(), Recorder()]
    for model, recorder in zip((ours, theirs), recorders, strict=True):
        model.generate(**inputs, max_new_tokens=6, do_sample=False, streamer=recorder)
    assert recorders[0].seen == recorders[1].seen
    assert recorders[0].ended == 1


def test_return_dict_in_generate_returns_the_sequences(make_pair, prompt):
    ours, _ = make_pair()
    inputs = prompt()
    output = ours.generate(**inputs, max_new_tokens=5, return_dict_in_generate=True)
    assert torch.equal(output.sequences, ours.generate(**inputs, max_new_tokens=5))
    assert output["sequences"] is output.sequences


REFUSED = {
    "beams": ({"num_beams": 4}, ValueError, "num_beams=4 is not supported; beam search is not implemented"),
    "several answers": ({"num_return_sequences": 2}, ValueError, "repeat the prompt in the batch"),
    "scores": ({"output_scores": True}, ValueError, r"call model\(ids\).logits"),
    "n-grams": ({"no_repeat_ngram_size": 3}, ValueError, "use repetition_penalty"),
    "stop strings": ({"stop_strings": ["a"]}, ValueError, "generate_stream"),
    "an unknown option": ({"max_tokens": 5}, TypeError, "unexpected keyword argument 'max_tokens'"),
    "sampling at 0": ({"do_sample": True, "temperature": 0.0}, ValueError, "needs a temperature above 0"),
    "a short max_length": ({"max_length": 5}, ValueError, "max_length is 5, but the prompt alone has 29 tokens"),
    "a penalty of 0": ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty is 0.0; it must be above 0"),
    "beams in a config": ({"generation_config": {"num_beams": 4}}, ValueError, "beam search is not implemented"),
    "nonsense in a config": ({"generation_config": {"nonsense": 4}}, TypeError, "argument 'nonsense'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_change_the_answer_is_refused_and_named(case, make_pair, prompt):
    ours, _ = make_pair()
    options, error, sentence = REFUSED[case]
    with pytest.raises(error, match=sentence):
        ours.generate(**prompt(), **options)


FORWARD_REFUSED = {
    "attentions": ({"output_attentions": True}, ValueError, "notebook 03 shows how"),
    "their cache": ({"past_key_values": object()}, ValueError, r"use cache=KVCache\(model\)"),
    "embeddings": ({"inputs_embeds": torch.ones(1)}, ValueError, "pass input_ids"),
    "tuples": ({"return_dict": False}, ValueError, "outputs are named here"),
    "an unknown option": ({"nonsense": 1}, TypeError, "unexpected keyword argument 'nonsense'"),
}


@pytest.mark.parametrize("case", FORWARD_REFUSED)
def test_what_would_change_the_logits_is_refused_and_named(case, make_pair, prompt):
    ours, _ = make_pair()
    options, error, sentence = FORWARD_REFUSED[case]
    with pytest.raises(error, match=sentence):
        ours(**prompt(), **options)


def test_forward_accepts_what_changes_nothing(make_pair, prompt):
    ours, _ = make_pair()
    assert ours(**prompt(), use_cache=True, return_dict=True, image_sizes=None).logits.isfinite().all()


# from_pretrained

LOADED = {
    "torch_dtype": ({"torch_dtype": torch.bfloat16}, torch.bfloat16),
    "torch_dtype as a string": ({"torch_dtype": "float16"}, torch.float16),
    "dtype": ({"dtype": torch.float16}, torch.float16),
    "device_map auto": ({"device_map": "auto"}, torch.float32),
    "device_map cpu": ({"device_map": "cpu"}, torch.float32),
    "device_map of a device": ({"device_map": torch.device("cpu")}, torch.float32),
    "device_map of one entry": ({"device_map": {"": "cpu"}}, torch.float32),
    "low_cpu_mem_usage": ({"low_cpu_mem_usage": True}, torch.float32),
    "sdpa": ({"attn_implementation": "sdpa"}, torch.float32),
    "eager": ({"attn_implementation": "eager"}, torch.float32),
    "revision": ({"revision": "main", "token": None, "cache_dir": None}, torch.float32),
    "safetensors": ({"use_safetensors": True, "trust_remote_code": True}, torch.float32),
    "no quantisation": ({"load_in_4bit": False, "quantization_config": None}, torch.float32),
}


@pytest.mark.parametrize("case", LOADED)
def test_loading_arguments_of_transformers_take_effect_or_change_nothing(case, checkpoint, monkeypatch):
    monkeypatch.setattr(compat, "pick_device", lambda name: torch.device("cpu"))
    options, dtype = LOADED[case]
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, **options)
    assert (model.dtype, model.device.type) == (dtype, "cpu")


NOT_LOADED = {
    "4 bits": ({"load_in_4bit": True}, ValueError, 'load_in_4bit=True is not supported; use quantize="int8"'),
    "8 bits": ({"load_in_8bit": True}, ValueError, 'use quantize="int8"'),
    "bitsandbytes": ({"quantization_config": object()}, ValueError, 'use quantize="int8"'),
    "flash attention on a CPU": (
        {"attn_implementation": "flash_attention_2"},
        ValueError,
        "'flash_attention_2' is not supported on cpu; leave it out",
    ),
    "several devices": ({"device_map": {"vision_tower": 0, "language_model": 1}}, ValueError, "on one device here"),
    "offloading": ({"offload_folder": "x"}, ValueError, "on one device here"),
    "pickles": ({"use_safetensors": False}, ValueError, "pickles can run code"),
    "another config": ({"config": object()}, ValueError, "checkpoint's own config.json"),
    "an unknown option": ({"nonsense": True}, TypeError, "unexpected keyword argument 'nonsense'"),
}


@pytest.mark.parametrize("case", NOT_LOADED)
def test_what_would_load_another_model_is_refused_and_named(case, checkpoint):
    options, error, sentence = NOT_LOADED[case]
    with pytest.raises(error, match=sentence):
        LlavaForConditionalGeneration.from_pretrained(checkpoint, **options)


def test_flash_attention_is_accepted_on_cuda_where_pytorch_has_that_kernel():
    options = {"attn_implementation": "flash_attention_2", "device_map": "cuda"}
    assert compat.loading_options("auto", "cpu", options)[1] == "cuda"


def test_a_revision_reaches_the_hub(monkeypatch, checkpoint):
    import huggingface_hub

    asked = {}

    def snapshot_download(name, allow_patterns, **options):
        asked.update(options)
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    LlavaForConditionalGeneration.from_pretrained("somebody/llava", revision="v2", token="secret")
    assert asked == {"revision": "v2", "token": "secret"}


# Small things


def test_num_parameters_counts_as_transformers_does(make_pair):
    ours, theirs = make_pair()
    assert ours.num_parameters() == theirs.num_parameters()
    ours.vision_tower.requires_grad_(False)
    theirs.model.vision_tower.requires_grad_(False)
    assert ours.num_parameters(only_trainable=True) == theirs.num_parameters(only_trainable=True)


def test_a_config_without_arguments_is_that_of_transformers():
    ours, theirs = LlavaConfig(), transformers.LlavaConfig()
    for part in ("vision_config", "text_config"):
        known = dataclasses.asdict(getattr(ours, part))
        known.pop("sliding_window", None)
        assert known == {name: getattr(getattr(theirs, part), name) for name in known}
    assert (ours.image_token_id, ours.vision_feature_layer) == (theirs.image_token_id, theirs.vision_feature_layer)


def test_a_config_is_read_from_a_folder(tmp_path):
    make_judge().save_pretrained(tmp_path)
    assert LlavaConfig.from_pretrained(tmp_path).text_config.hidden_size == 64
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]["hidden_size"] == 64
