"""LoRA matches PEFT: adapters made by either one give the same logits, gradients and merged weights in the other."""

import json
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import make_judge
from peft.utils import PeftType
from safetensors.torch import load_file, save_file
from torch import nn

from extras.adapters import CONFIG_FILE, WEIGHTS_FILE, AdapterConfig, load_adapter, save_adapter
from extras.lora import (
    FullLinear,
    LoraLinear,
    adapted_layers,
    dequantized,
    freeze_base,
    merge,
    multiply_frozen,
    put_in,
    switch,
    take_out,
)
from extras.quantize import CompactLinear, FloatLinear, HalfLinear
from llava import LlavaForConditionalGeneration
from vision import LlavaImageProcessor

DECODER = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A checkpoint saved by transformers."""
    folder = tmp_path_factory.mktemp("base")
    make_judge().save_pretrained(folder)
    return folder


@pytest.fixture
def their_base(base):
    return transformers.LlavaForConditionalGeneration.from_pretrained(base)


@pytest.fixture
def our_base(base):
    return LlavaForConditionalGeneration.from_pretrained(base)


def fill(parameters, seed: int = 1) -> None:
    """Random values, as if they had been trained: B is zero at the start, so that nothing would be seen of it."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.data.normal_(std=0.1, generator=generator)


@pytest.fixture
def make_adapter(their_base, tmp_path):
    """Makes an adapter with PEFT: `make_adapter(r=4, ...)`, a LoraConfig's options -> (its folder, PEFT's model)."""

    def make(**options):
        theirs = peft.get_peft_model(
            their_base, peft.LoraConfig(**{"target_modules": DECODER, "r": 4} | options)
        ).eval()
        fill(parameter for parameter in theirs.parameters() if parameter.requires_grad)
        theirs.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", theirs

    return make


def our_adapter(model, rank: int = 4, scaling: float = 2.0, in_full: bool = True) -> AdapterConfig:
    """Puts a random adapter into our model: a LoRA in the decoder, and copies of the projector's layers."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | CompactLinear) and ".layers." in name and name.startswith("language_model."):
            layers[name] = LoraLinear(module, rank, scaling)
            fill([layers[name].lora_A.weight, layers[name].lora_B.weight], seed=len(layers))
        elif isinstance(module, nn.Linear | CompactLinear) and name.startswith("multi_modal_projector.") and in_full:
            layers[name] = FullLinear(module)
            fill(layers[name].parameters(recurse=False), seed=len(layers))
    put_in(model, layers)
    saved = ["multi_modal_projector"] if in_full else None
    return AdapterConfig(rank, rank * scaling, 0.0, DECODER, saved)


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


# Made by PEFT, loaded here

KINDS = {
    "list of names": {"target_modules": ["q_proj", "v_proj"]},  # in the vision tower, too
    "full names": {"target_modules": ["model.language_model.layers.1.mlp.up_proj", "layers.0.self_attn.q_proj"]},
    "regular expression": {},
    "all-linear": {"target_modules": "all-linear"},
    "some layers": {"target_modules": ["o_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "without the vision tower": {"target_modules": ["q_proj"], "exclude_modules": ".*vision_tower.*"},
    "alpha": {"lora_alpha": 32},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "rank pattern": {"rank_pattern": {"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 7}},
    "alpha pattern": {"alpha_pattern": {"^model.language_model.layers.0.mlp.up_proj": 1, "q_proj": 99}},
    "patterns and rslora": {"use_rslora": True, "rank_pattern": {".*_proj": 3}, "alpha_pattern": {"v_proj": 5}},
    "projector in full": {"modules_to_save": ["multi_modal_projector"]},
    "head in full": {"modules_to_save": ["lm_head"]},
    "one layer of the projector in full": {"modules_to_save": ["linear_2"]},
    "projector with a LoRA": {"target_modules": ["linear_1", "linear_2", "q_proj"]},
    "head with a LoRA": {"target_modules": ["lm_head"]},
    "orthogonal start": {"init_lora_weights": "orthogonal", "r": 4},
    "gaussian start": {"init_lora_weights": "gaussian"},
    "dropout, for training only": {"lora_dropout": 0.5},
    "no dropout": {"lora_dropout": 0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_made_by_peft_gives_the_same_logits(kind, base, make_adapter, prompt, check):
    folder, theirs = make_adapter(**KINDS[kind])
    ours = LlavaForConditionalGeneration.from_pretrained(base, adapter=folder)
    inputs = prompt(images=2)
    expected = logits(theirs, inputs)
    with theirs.disable_adapter():
        assert not torch.allclose(expected, logits(theirs, inputs), rtol=1e-2), "the adapter changes nothing"
    check("LoRA made by PEFT, logits", logits(ours, inputs), expected)


def test_an_adapter_gives_the_same_answers_as_in_peft(base, make_adapter, prompt):
    folder, theirs = make_adapter(modules_to_save=["multi_modal_projector"])
    ours = LlavaForConditionalGeneration.from_pretrained(base, adapter=folder)
    inputs = prompt()
    mask = torch.ones_like(inputs["input_ids"])
    expected = theirs.generate(**inputs, attention_mask=mask, max_new_tokens=20, do_sample=False)
    assert torch.equal(ours.generate(**inputs, max_new_tokens=20), expected)


OLD_NAMES = {  # the beginnings of names in adapters made with transformers 4, and with the first versions of PEFT
    "model.language_model.layers.": "language_model.model.layers.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.vision_tower.encoder.": "vision_tower.vision_model.encoder.",
    "lm_head.": "language_model.lm_head.",
}


def rename(folder: Path, change) -> None:
    """Renames the tensors of an adapter."""
    tensors = {change(name): tensor for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})


def old_name(name: str) -> str:
    for new, old in OLD_NAMES.items():
        name = name.replace(f"base_model.model.{new}", f"base_model.model.{old}")
    return name


SPELLINGS = {
    "transformers 4": old_name,
    "with the adapter's name": lambda name: name.replace("lora_A.", "lora_A.default.").replace(
        "lora_B.", "lora_B.default."
    ),
    "with modules_to_save": lambda name: name.replace("projector.", "projector.modules_to_save.default."),
    "without the prefix": lambda name: name.removeprefix("base_model.model."),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_names_of_older_versions_mean_the_same(spelling, base, make_adapter, prompt, check):
    options = {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["multi_modal_projector"]}
    folder, theirs = make_adapter(**options)
    rename(folder, SPELLINGS[spelling])
    ours = LlavaForConditionalGeneration.from_pretrained(base, adapter=folder)
    check("LoRA made by PEFT, logits", logits(ours, prompt()), logits(theirs, prompt()))


def test_a_pattern_with_an_old_name_still_means_its_layer(base, make_adapter, prompt, check):
    folder, theirs = make_adapter(alpha_pattern={"language_model.layers.0.self_attn.q_proj": 64})
    rename(folder, old_name)
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["alpha_pattern"] = {"language_model.model.layers.0.self_attn.q_proj": 64}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    ours = LlavaForConditionalGeneration.from_pretrained(base, adapter=folder)
    check("LoRA made by PEFT, logits", logits(ours, prompt()), logits(theirs, prompt()))


def test_an_adapter_of_16_bits_is_computed_in_float32_as_in_peft(base, make_adapter, prompt, check):
    folder, theirs = make_adapter()
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
    theirs = peft.PeftModel.from_pretrained(theirs.unload(), folder)
    ours = LlavaForConditionalGeneration.from_pretrained(base, adapter=folder)
    check("LoRA made by PEFT, logits", logits(ours, prompt()), logits(theirs, prompt()))


# Made here, loaded by PEFT


def write(model, folder: Path, **options) -> None:
    save_adapter(model, folder, our_adapter(model, **options), LlavaImageProcessor())


@pytest.mark.parametrize("loader", ["PEFT", "transformers"])
@pytest.mark.parametrize("in_full", [True, False], ids=["projector in full", "projector frozen"])
def test_an_adapter_made_here_gives_the_same_logits_in_peft(
    in_full, loader, our_base, their_base, tmp_path, prompt, check
):
    write(our_base, tmp_path, in_full=in_full)
    if loader == "PEFT":
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # PEFT warns of tensors that are missing
            their_base = peft.PeftModel.from_pretrained(their_base, tmp_path)
    else:
        their_base.load_adapter(str(tmp_path))
    check("LoRA made here, logits", logits(our_base, prompt(images=2)), logits(their_base, prompt(images=2)))


def test_an_adapter_made_here_loads_here_with_the_same_logits(base, our_base, tmp_path, prompt):
    write(our_base, tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(base, adapter=tmp_path)
    assert torch.equal(logits(our_base, prompt()), logits(again, prompt()))


# Switched, taken out, merged


def test_switched_off_the_model_is_the_base_to_the_last_bit(base, our_base, prompt):
    plain = logits(our_base, prompt())
    our_adapter(our_base)
    adapted = logits(our_base, prompt())
    switch(our_base, False)
    assert torch.equal(logits(our_base, prompt()), plain)
    switch(our_base, True)
    assert torch.equal(logits(our_base, prompt()), adapted)
    assert not torch.allclose(adapted, plain)


def test_taken_out_nothing_is_left_of_the_adapter(base, our_base):
    before = {name: parameter.clone() for name, parameter in our_base.named_parameters()}
    our_adapter(our_base)
    take_out(our_base)
    after = dict(our_base.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", ["rslora", "patterns and rslora", "projector in full", "head in full", "all-linear"])
def test_merged_weights_are_those_that_peft_merges(kind, base, make_adapter, prompt, tmp_path, check):
    folder, theirs = make_adapter(**KINDS[kind])
    adapted = logits(theirs, prompt())
    ours = LlavaForConditionalGeneration.from_pretrained(base, adapter=folder)
    ours.save_pretrained(tmp_path / "merged")
    merged = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged")
    for name, expected in theirs.merge_and_unload().named_parameters():
        check("LoRA merged, weights", merged.get_parameter(name).data, expected.data)
    check("LoRA merged, logits", logits(merged, prompt()), adapted)
    check("LoRA merged, logits", logits(ours, prompt()), adapted)


def test_merging_does_not_write_into_the_files_of_the_base(base, our_base):
    before = (base / "model.safetensors").read_bytes()
    our_adapter(our_base)
    merge(our_base)
    assert (base / "model.safetensors").read_bytes() == before
    assert not adapted_layers(our_base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merged_into_16_bits_the_sum_is_rounded_once(dtype, base):
    model = LlavaForConditionalGeneration.from_pretrained(base, dtype)
    our_adapter(model)
    expected = {name: layer.merged()[0].to(dtype) for name, layer in adapted_layers(model).items()}
    merge(model)
    assert all(torch.equal(model.get_submodule(name).weight, weight) for name, weight in expected.items())


def test_merging_into_a_quantised_model_is_refused(base, tmp_path):
    model = LlavaForConditionalGeneration.from_pretrained(base, quantize="int8")
    our_adapter(model)
    with pytest.raises(ValueError, match="load the base without quantize"):
        model.save_pretrained(tmp_path)


# On a base of fewer bits


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_on_a_quantised_base_the_adapter_corrects_the_rounded_weights(scheme, base, our_base, tmp_path, prompt, check):
    write(our_base, tmp_path)
    rounded = LlavaForConditionalGeneration.from_pretrained(base, quantize=scheme)
    exact = LlavaForConditionalGeneration.from_pretrained(base)
    with torch.no_grad():
        for name, module in rounded.named_modules():
            if isinstance(module, CompactLinear):
                exact.get_submodule(name).weight.copy_(module.dequantized())
    load_adapter(rounded, tmp_path), load_adapter(exact, tmp_path)
    # Compact layers round their inputs to 8 bits.
    check(f"LoRA on an {scheme} base, logits", logits(rounded, prompt()), logits(exact, prompt()), limit=2e-2)


def test_on_a_bfloat16_base_logits_match_peft(base, make_adapter, prompt, check):
    folder, theirs = make_adapter()
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.bfloat16)
    theirs = peft.PeftModel.from_pretrained(theirs, folder)
    ours = LlavaForConditionalGeneration.from_pretrained(base, torch.bfloat16, adapter=folder)
    inputs = prompt()
    pixels = inputs.pop("pixel_values").bfloat16()
    expected = logits(theirs, inputs | {"pixel_values": pixels}).float()
    check("LoRA on bfloat16, logits", logits(ours, inputs | {"pixel_values": pixels}).float(), expected, limit=2e-2)


# Gradients


def set_answers(inputs):
    labels = inputs["input_ids"].where(inputs["input_ids"] != 420, -100)
    return inputs | {"labels": labels}


@pytest.mark.parametrize("kind", ["regular expression", "projector in full", "rslora", "list of names"])
def test_gradients_match_those_of_peft(kind, base, make_adapter, prompt, check):
    folder, theirs = make_adapter(**KINDS[kind])
    ours = LlavaForConditionalGeneration.from_pretrained(base)
    freeze_base(ours)
    load_adapter(ours, folder)
    inputs = set_answers(prompt(images=2))
    expected, loss = theirs(**inputs).loss, ours(**inputs).loss
    expected.backward(), loss.backward()
    check("LoRA, loss", loss.detach(), expected.detach())
    theirs.save_pretrained(folder)  # for the names
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    trained = {n: p for n, p in ours.named_parameters() if p.grad is not None}
    assert len(trained) == len(gradients)
    for name, parameter in trained.items():
        path, _, part = name.replace("language_model.model.", "language_model.").partition(".lora_")
        part = f"lora_{part.replace('.weight', '.default.weight')}" if part else ""
        if not part:
            path = path.replace("projector.", "projector.modules_to_save.default.")
        full = f"base_model.model.model.{path}" + (f".{part}" if part else "")
        check("LoRA, gradients", parameter.grad, gradients[full])


def layer_of(kind: str, out: int, width: int) -> nn.Module:
    """A frozen layer of this kind, with random weights."""
    exact = nn.Linear(width, out)
    if kind.startswith("int"):
        layer = CompactLinear(width, out, bits=int(kind[3]))
        layer.load_weight(exact.weight.data)
        layer.bias = nn.Parameter(exact.bias.data, requires_grad=False)
        return layer
    if kind == "float32":
        exact.__class__ = FloatLinear
        return exact.requires_grad_(False)
    exact.__class__ = HalfLinear
    return exact.to(getattr(torch, kind)).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "int8", "int4"])
@pytest.mark.parametrize("shape", [(5, 37), (2100, 40), (64, 2100)], ids=str)
@pytest.mark.parametrize("fast_bfloat16", [True, False])
def test_a_frozen_layer_passes_the_gradient_of_its_stored_weights(
    fast_bfloat16, shape, kind, dtype, monkeypatch, check
):
    """Whatever the weights are stored in, and whatever the activations are; also on CPUs that are slow at bfloat16."""
    monkeypatch.setattr("extras.lora.computes_in", lambda dtype: fast_bfloat16 and dtype == torch.bfloat16)
    torch.manual_seed(0)
    layer = layer_of(kind, *shape)
    x = torch.randn(2, 3, shape[1]).to(dtype).requires_grad_()
    y = multiply_frozen(layer, x)
    grad = torch.randn(y.shape).to(dtype)
    y.backward(grad)
    weight = torch.cat(list(dequantized(layer, torch.float32)))
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    expected = nn.functional.linear(x.float(), weight, layer.bias.float())
    assert y.dtype == x.grad.dtype == dtype
    check(f"frozen layer, {dtype}", y.float(), expected, limit=limit)
    check(f"frozen layer, gradient, {dtype}", x.grad.float(), grad.float() @ weight, limit=limit)


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "int8"])
def test_no_dequantised_weights_are_kept_for_the_backward_pass(kind, monkeypatch):
    monkeypatch.setattr("extras.lora.computes_in", lambda dtype: False)  # so that bfloat16 is converted as well
    layer, kept = layer_of(kind, 2048, 512), []
    x = torch.randn(4, 512, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        multiply_frozen(layer, x)
    assert sum(kept) < 2048 * 512 / 10


def test_the_base_gets_no_gradients(our_base, prompt):
    freeze_base(our_base)
    our_adapter(our_base)
    our_base(**set_answers(prompt())).loss.backward()
    with_gradient = {name for name, parameter in our_base.named_parameters() if parameter.grad is not None}
    layers = adapted_layers(our_base)
    expected = {f"{n}.{p}" for n, layer in layers.items() for p, _ in layer.named_parameters() if "base_layer" not in p}
    assert with_gradient == expected


def test_an_untrained_lora_changes_nothing(our_base, prompt):
    plain = logits(our_base, prompt())
    layer = our_base.language_model.model.layers[0].self_attn.q_proj
    put_in(our_base, {"language_model.model.layers.0.self_attn.q_proj": LoraLinear(layer, 4, 2.0)})
    assert torch.equal(logits(our_base, prompt()), plain)


def test_dropout_acts_in_training_only(our_base, prompt):
    layer = our_base.language_model.model.layers[0].self_attn.q_proj
    lora = LoraLinear(layer, 4, 2.0, dropout=0.5)
    fill(lora.lora_B.parameters())
    x = torch.randn(3, 64)
    assert torch.equal(lora.eval()(x), lora(x))
    assert not torch.equal(lora.train()(x), lora(x))


# Refused


OTHERS = {
    "DoRA": ({"use_dora": True}, "use_dora=True is not supported"),
    "biases": ({"bias": "all"}, "bias='all' is not supported"),
    "biases of the LoRA": ({"lora_bias": True}, "lora_bias=True is not supported"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
    "trainable tokens": ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices=\[1, 2\] is not supported"),
    "repeated layers": ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication=.* is not supported"),
    "parameters": ({"target_parameters": ["a.b"]}, "target_parameters=.* is not supported"),
    "activated LoRA": ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens=.* is not supported"),
    "block-diagonal LoRA": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora=.* is not supported"),
    "what is not yet known": ({"use_next_years_idea": True}, "use_next_years_idea=True is not supported"),
}


def change(folder: Path, **entries) -> None:
    """Changes entries of adapter_config.json."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | entries))


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_plain_lora_is_refused_by_its_name(name, base, make_adapter):
    folder, _ = make_adapter()
    entries, sentence = OTHERS[name]
    change(folder, **entries)
    with pytest.raises(ValueError, match=sentence):
        LlavaForConditionalGeneration.from_pretrained(base, adapter=folder)


@pytest.mark.parametrize("kind", [kind.value for kind in PeftType if kind is not PeftType.LORA])
def test_other_kinds_of_adapters_are_refused_by_their_name(kind, base, make_adapter):
    folder, _ = make_adapter()
    change(folder, peft_type=kind)
    with pytest.raises(ValueError, match=f"an adapter of the type '{kind}'; only LORA is supported"):
        LlavaForConditionalGeneration.from_pretrained(base, adapter=folder)


def test_a_dora_by_peft_is_refused(base, make_adapter):
    folder, _ = make_adapter(use_dora=True)
    with pytest.raises(ValueError, match="use_dora=True is not supported"):
        LlavaForConditionalGeneration.from_pretrained(base, adapter=folder)


@pytest.mark.parametrize("module", ["embed_tokens", "norm"])
def test_modules_that_are_not_linear_are_refused_by_their_name(module, base, make_adapter):
    folder, _ = make_adapter(modules_to_save=[module])
    with pytest.raises(ValueError, match=rf"{module}: the base has no linear layer of this name"):
        LlavaForConditionalGeneration.from_pretrained(base, adapter=folder)


def test_an_adapter_of_another_base_is_refused_with_both_shapes(make_adapter, tmp_path):
    folder, _ = make_adapter()
    make_judge(text={"hidden_size": 32, "intermediate_size": 80}).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"(?s)does not fit the base.*k_proj.*\(4, 64\).*need.*\(4, 32\)") as refused:
        LlavaForConditionalGeneration.from_pretrained(tmp_path / "other", adapter=folder)
    assert "and 16 more" in str(refused.value)


def test_a_projector_of_another_base_is_refused_with_both_shapes(make_adapter, tmp_path):
    folder, _ = make_adapter(modules_to_save=["multi_modal_projector"])
    make_judge(vision={"hidden_size": 32}).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"linear_1.*\(64, 48\).*need.*\(64, 32\)"):
        LlavaForConditionalGeneration.from_pretrained(tmp_path / "other", adapter=folder)


def test_a_base_with_fewer_layers_is_refused(make_adapter, tmp_path):
    folder, _ = make_adapter()
    make_judge(text={"num_hidden_layers": 2}).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"layers\.2\.[a-z_.]+: the base has no linear layer of this name"):
        LlavaForConditionalGeneration.from_pretrained(tmp_path / "other", adapter=folder)


def test_another_name_of_the_base_is_said(base, make_adapter, tmp_path, capsys):
    folder, _ = make_adapter()
    LlavaForConditionalGeneration.from_pretrained(base, adapter=folder)
    assert capsys.readouterr().err == ""
    shutil.copytree(base, tmp_path / "copy")
    LlavaForConditionalGeneration.from_pretrained(tmp_path / "copy", adapter=folder)
    assert (
        f"trained on {str(base)!r}, not on {str(tmp_path / 'copy')!r}; all shapes are the same"
        in capsys.readouterr().err
    )


def test_a_tied_head_cannot_have_an_adapter(base, make_adapter, tmp_path):
    folder, _ = make_adapter(target_modules=["lm_head", "q_proj"])
    make_judge(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    with pytest.raises(ValueError, match="lm_head: in the base it is one with the word embeddings"):
        LlavaForConditionalGeneration.from_pretrained(tmp_path / "tied", adapter=folder)


def test_a_second_adapter_is_refused(base, make_adapter):
    folder, _ = make_adapter()
    model = LlavaForConditionalGeneration.from_pretrained(base, adapter=folder)
    with pytest.raises(ValueError, match=r"has an adapter already|already has an adapter"):
        load_adapter(model, folder)


DAMAGES = {
    "no config": (lambda folder: (folder / CONFIG_FILE).unlink(), "has no adapter_config.json"),
    "no weights": (lambda folder: (folder / WEIGHTS_FILE).unlink(), "has no adapter_model.safetensors"),
    "a pickle": (
        lambda folder: (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin"),
        "adapter_model.bin is a pickle, which can run code: convert it with PEFT",
    ),
    "truncated": (
        lambda folder: (folder / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes()[:-10]),
        "is not a complete safetensors file",
    ),
    "no tensors": (lambda folder: save_file({}, folder / WEIGHTS_FILE), "it has no tensors"),
    "half of a layer": (lambda folder: rename(folder, lambda name: name.replace("q_proj.lora_B", "x.lora_B")), "x"),
    "another rank in the config": (lambda folder: change(folder, r=8), r"lora_A.weight': \(8, 64\)"),
    "a rank that is no number": (lambda folder: change(folder, r="four"), "r is 'four'"),
    "a rank of 0": (lambda folder: change(folder, r=0), "r is 0"),
    "a pattern that takes for ever": (
        lambda folder: change(folder, alpha_pattern={"([a-z_.]+)*!": 4}),
        "could take for ever",
    ),
    "a pattern that is none": (lambda folder: change(folder, rank_pattern={"(": 4}), "is no regular expression"),
    "a module that is not there": (
        lambda folder: change(folder, modules_to_save=["multi_modal_projector"]),
        "multi_modal_projector: it is in modules_to_save, but not in adapter_model.safetensors",
    ),
    "unknown tensors": (
        lambda folder: rename(folder, lambda name: name.replace("lora_A.weight", "lora_magnitude_vector")),
        "lora_magnitude_vector .* is not a tensor of a plain LoRA adapter",
    ),
    "integers": (
        lambda folder: save_file({"base_model.model.a.weight": torch.ones(1, dtype=torch.int8)}, folder / WEIGHTS_FILE),
        "is not a tensor of a plain LoRA adapter",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_adapter_is_refused_in_a_sentence(name, base, make_adapter):
    folder, _ = make_adapter()
    damage, sentence = DAMAGES[name]
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        LlavaForConditionalGeneration.from_pretrained(base, adapter=folder)


def test_an_adapter_that_is_not_there_is_named(base):
    with pytest.raises(FileNotFoundError, match="there is no folder nowhere"):
        LlavaForConditionalGeneration.from_pretrained(base, adapter="nowhere")
