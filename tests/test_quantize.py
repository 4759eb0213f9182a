"""Linear layers for CPUs multiply by their weights, rounded or not, and load in little memory."""

import json
import os
import platform
import re
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import make_judge
from torch import nn

from extras import quantize
from extras.quantize import FloatLinear, HalfLinear, Int8Linear, compact_linears
from llava import KVCache, LlavaForConditionalGeneration


def make_layer(width_in: int, width_out: int, bias: bool = True) -> tuple[Int8Linear, nn.Linear]:
    """An int8 layer, and a float layer with the same rounded weights."""
    generator = torch.Generator().manual_seed(width_in)
    exact = nn.Linear(width_in, width_out, bias=bias)
    exact.weight.data.normal_(generator=generator)
    rounded = Int8Linear(width_in, width_out, bias=bias)
    rounded.load_weight(exact.weight)
    rounded.bias = exact.bias
    exact.weight.data = rounded.dequantized()
    return rounded, exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [(1,), (1, 1), (2, 3), (700,)], ids=str)
@pytest.mark.parametrize("widths", [(64, 64), (37, 5), (1, 1), (1, 7), (513, 130), (40, 4100)], ids=str)
@pytest.mark.parametrize("exact_integers", [True, False])
@torch.no_grad()
def test_the_int8_layer_multiplies_by_its_rounded_weights(widths, rows, dtype, exact_integers, check, monkeypatch):
    """With the int8 kernel, and on a CPU without one."""
    if not exact_integers:
        monkeypatch.setattr(quantize, "products_of_bytes", lambda: False)
    ours, exact = make_layer(*widths)
    x = torch.randn(*rows, widths[0], generator=torch.Generator().manual_seed(0)).to(dtype)
    y = ours(x)
    assert y.dtype == dtype
    # The input is rounded to 14 bits, the output to its dtype.
    rounding = {torch.float32: 2**-11, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    check(f"int8 layer, {dtype}", y.float(), exact(x.float()), limit=rounding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [(1,), (1, 1), (2, 3), (700,)], ids=str)
@pytest.mark.parametrize("widths", [(64, 64), (37, 5), (1, 8), (513, 1030)], ids=str)
@pytest.mark.parametrize("fast_bfloat16", [True, False])
@torch.no_grad()
def test_16_bit_layers_match_float32(fast_bfloat16, widths, rows, dtype, check, monkeypatch):
    """On CPUs with and without fast bfloat16 matrix products."""
    monkeypatch.setattr(quantize, "computes_in", lambda dtype: fast_bfloat16 and dtype == torch.bfloat16)
    exact = make_layer(*widths)[1].to(dtype)
    ours = HalfLinear(*widths, dtype=dtype)
    ours.load_state_dict(exact.state_dict())
    x = torch.randn(*rows, widths[0], generator=torch.Generator().manual_seed(0)).to(dtype)
    y = ours(x)
    assert y.dtype == dtype
    check(f"{dtype} layer", y.float(), exact.float()(x.float()), limit=torch.finfo(dtype).eps)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_single_16_bit_row_bypasses_onednn_and_restores_its_flag(enabled, monkeypatch):
    seen, linear = [], torch.nn.functional.linear
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
    monkeypatch.setattr(quantize, "computes_in", lambda dtype: True)
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda *args: seen.append(torch.backends.mkldnn.enabled) or linear(*args)
    )
    layer = HalfLinear(8, 8, dtype=torch.bfloat16)
    layer(torch.ones(1, 8, dtype=torch.bfloat16)), layer(torch.ones(2, 8, dtype=torch.bfloat16))
    assert seen == [False, enabled]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.ones(1, 7, dtype=torch.bfloat16))
    assert torch.backends.mkldnn.enabled == enabled


@pytest.mark.parametrize("rows", [(), (1,), (1, 1), (2, 3), (16,), (700,)], ids=str)
@pytest.mark.parametrize("widths", [(64, 64), (37, 5), (40, 4112)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_the_float32_layer_matches_pytorch(widths, rows, bias, check):
    exact = make_layer(*widths, bias)[1]
    ours = FloatLinear(*widths, bias=bias)
    ours.load_state_dict(exact.state_dict())
    x = torch.randn(*rows, widths[0], generator=torch.Generator().manual_seed(0))
    check("float32 layer", ours(x), exact(x), limit=1e-6)


def test_the_float32_layer_can_be_trained():
    exact, ours = nn.Linear(32, 64), FloatLinear(32, 64)
    ours.load_state_dict(exact.state_dict())
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    for layer in (exact, ours):
        layer(x).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, exact.weight.grad)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs MKL")
@pytest.mark.parametrize("gradients", [True, False])
def test_the_float32_layer_uses_pytorchs_product_only_for_gradients(gradients, monkeypatch):
    seen, linear = [], torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: seen.append(args) or linear(*args))
    with torch.set_grad_enabled(gradients):
        FloatLinear(8, 8)(torch.ones(1, 8))
    assert len(seen) == gradients


def test_only_large_layers_are_replaced():
    with torch.device("meta"):
        model = nn.ModuleDict({"large": nn.Linear(1024, 1024), "small": nn.Linear(1024, 1023)})
        compact_linears(model, None, torch.device("cpu"))
    assert [type(layer) for layer in model.values()] == [FloatLinear, nn.Linear]


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, FloatLinear), (torch.float16, HalfLinear)])
def test_a_large_head_tied_to_the_embeddings_stays_tied(dtype, kind):
    with torch.device("meta"):
        model = nn.ModuleDict({"embed_tokens": nn.Embedding(2048, 1024), "lm_head": nn.Linear(1024, 2048, bias=False)})
        model["lm_head"].weight = model.to(dtype)["embed_tokens"].weight
        compact_linears(model, None, torch.device("cpu"))
    assert model["lm_head"].weight is model["embed_tokens"].weight
    assert type(model["lm_head"]) is kind


def test_weights_are_rounded_to_the_nearest_of_255_levels():
    weight = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    layer = Int8Linear(100, 64)
    layer.load_weight(weight.half())
    assert (layer.dequantized().abs().amax(dim=1) / layer.scale).round().eq(127).all()
    assert ((layer.dequantized() - weight.half().float()).abs() <= layer.scale[:, None] * 0.501).all()


@torch.no_grad()
def test_rows_of_very_different_magnitude_keep_their_precision(check):
    ours, exact = make_layer(64, 64, bias=False)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-6], [1.0], [1e6]])
    for row in range(3):
        check("int8 layer, rows of different magnitude", ours(x)[row], exact(x)[row], limit=2**-11)


OVERFLOW = """
import sys
import torch
sys.path.insert(0, {root!r})
from extras.quantize import Int8Linear
layer = Int8Linear(4096, 64, bias=False)
layer.load_weight(torch.ones(64, 4096))
assert layer.weight.is_mkldnn, "the int8 kernel is not in use"
print([layer(torch.full((rows, 4096), value)).mean().item() for rows in (1, 2, 64) for value in (1.0, -1.0)])
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="needs an x86 CPU")
@pytest.mark.parametrize("instructions", ["SSE41", "AVX2", "AVX512_CORE"])
def test_the_largest_int8_products_do_not_overflow_without_vnni(instructions, request):
    script = OVERFLOW.format(root=str(request.config.rootpath))
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": instructions}
    output = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(output.stdout) == pytest.approx([4096.0, -4096.0] * 3)


@torch.no_grad()
def test_zero_inputs_give_the_bias():
    ours, exact = make_layer(64, 64)
    assert torch.equal(ours(torch.zeros(2, 64)), exact.bias.expand(2, -1))


@pytest.fixture
def pair(tmp_path):
    """A model loaded with quantize="int8", and transformers' model with the same rounded weights."""
    judge = make_judge(text={"num_key_value_heads": 2})
    judge.save_pretrained(tmp_path)
    ours = LlavaForConditionalGeneration.from_pretrained(tmp_path, quantize="int8")
    for name, module in judge.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            rounded = Int8Linear(module.in_features, module.out_features)
            rounded.load_weight(module.weight)
            module.weight.data = rounded.dequantized()
    return ours, judge


def test_int8_logits_match_transformers_with_rounded_weights(pair, prompt, check):
    ours, _ = pair
    assert isinstance(ours.language_model.model.layers[0].mlp.up_proj, Int8Linear)
    assert isinstance(ours.vision_tower.encoder.layers[0].mlp.fc1, Int8Linear)
    assert isinstance(ours.language_model.lm_head, nn.Linear)
    logits = [model(**prompt()).logits.detach() for model in pair]  # with gradients on, PyTorch's default
    check("int8 model against rounded weights", *logits, limit=2**-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fast_bfloat16", [True, False])
@torch.no_grad()
def test_a_16_bit_model_works_with_and_without_fast_bfloat16(
    fast_bfloat16, dtype, tmp_path, prompt, check, monkeypatch
):
    judge = make_judge().to(dtype)
    judge.save_pretrained(tmp_path)
    monkeypatch.setattr(quantize, "computes_in", lambda dtype: fast_bfloat16 and dtype == torch.bfloat16)
    ours = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert isinstance(ours.language_model.model.layers[0].mlp.up_proj, HalfLinear)
    assert isinstance(ours.vision_tower.encoder.layers[0].mlp.fc1, HalfLinear)
    inputs = prompt()
    check(
        f"{dtype} {'with' if fast_bfloat16 else 'without'} fast bfloat16",
        ours(**inputs).logits.float(),
        judge.float()(**inputs).logits,
        limit=2e-2,
    )
    tokens = ours.generate(**inputs, max_new_tokens=8)
    twice = {name: tensor.expand(2, *[-1] * (tensor.ndim - 1)) for name, tensor in inputs.items()}
    assert ours.generate(**twice, max_new_tokens=8).shape == (2, tokens.shape[1])
    ours.save_pretrained(tmp_path / "saved")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "saved", dtype=dtype)
    assert torch.equal(again.generate(**inputs, max_new_tokens=8), tokens)


def test_int8_tokens_match_transformers_alone_in_a_batch_and_with_a_cache(pair, prompt):
    ours, theirs = pair
    inputs = prompt()
    expected = theirs.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert torch.equal(ours.generate(**inputs, max_new_tokens=24), expected)
    twice = {name: tensor.expand(2, *[-1] * (tensor.ndim - 1)) for name, tensor in inputs.items()}
    assert torch.equal(ours.generate(**twice, max_new_tokens=24), expected.expand(2, -1))
    cache = KVCache(ours)
    first = ours.generate(**inputs, max_new_tokens=12, cache=cache)
    assert torch.equal(ours.generate(first, max_new_tokens=12, cache=cache), expected)


@torch.no_grad()
def test_saving_int8_keeps_the_rounded_weights_and_loading_rounds_them_to_the_same(pair, prompt, tmp_path, check):
    ours, theirs = pair
    ours.save_pretrained(tmp_path / "saved")
    reloaded = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "saved")
    check("saved from int8", reloaded(**prompt()).logits, theirs(**prompt()).logits)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "saved", quantize="int8")
    for name, module in again.named_modules():
        if isinstance(module, Int8Linear):
            assert torch.equal(module.dequantized(), ours.get_submodule(name).dequantized()), name


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@torch.no_grad()
def test_tied_embeddings_stay_tied_and_in_float32_with_int8(stored, tmp_path, prompt):
    make_judge(tie_word_embeddings=True).to(stored).save_pretrained(tmp_path)
    ours = LlavaForConditionalGeneration.from_pretrained(tmp_path, quantize="int8")
    assert ours.language_model.lm_head.weight.dtype == torch.float32
    assert ours.language_model.lm_head.weight is ours.language_model.model.embed_tokens.weight
    assert ours(**prompt()).logits.isfinite().all()


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_16_bit_word_embeddings_stay_in_16_bits_with_the_same_logits(stored, tmp_path, prompt):
    judge = make_judge().to(stored)
    judge.save_pretrained(tmp_path / "small")
    judge.float().save_pretrained(tmp_path / "large")
    small, large = (
        LlavaForConditionalGeneration.from_pretrained(tmp_path / name, quantize="int8") for name in ("small", "large")
    )
    small.save_pretrained(tmp_path / "saved")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "saved", quantize="int8")
    embeddings = [model.language_model.model.embed_tokens.weight.dtype for model in (small, large)]
    assert embeddings == [stored, torch.float32]
    for model in (small, again):
        assert model.dtype == model(**prompt()).logits.dtype == torch.float32
        assert torch.equal(model(**prompt()).logits, large(**prompt()).logits)


def test_an_unknown_quantize_option_is_refused(checkpoint):
    with pytest.raises(ValueError, match="quantize is 'int4'; it must be 'int8' or None"):
        LlavaForConditionalGeneration.from_pretrained(checkpoint, quantize="int4")


def test_nan_in_int8_weights_is_reported_by_name(tmp_path, prompt):
    judge = make_judge()
    judge.model.language_model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    judge.save_pretrained(tmp_path)
    ours = LlavaForConditionalGeneration.from_pretrained(tmp_path, quantize="int8")
    with pytest.raises(ValueError, match=r"NaN or infinity, in language_model.model.layers.1.mlp.up_proj.scale"):
        ours.generate(**prompt(), max_new_tokens=1)


MEASURE = """
import pathlib, re, sys
import torch
sys.path.insert(0, {root!r})
from llava import LlavaForConditionalGeneration
LlavaForConditionalGeneration.from_pretrained({small!r}, {dtype!r}, quantize={quantize!r})
torch.randn(512, 512).abs().amax(dim=1)  # memory that libraries allocate at their first call
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
before = peak()
model = LlavaForConditionalGeneration.from_pretrained({folder!r}, {dtype!r}, quantize={quantize!r})
for parameter in model.parameters():
    if parameter.is_floating_point(): parameter.max()  # loads the pages that are only mapped so far
print(peak() - before, sum(p.nbytes for p in model.parameters()), max(p.numel() for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
@pytest.mark.parametrize("kind", [("auto", "int8"), ("bfloat16", None), ("float16", None)], ids=str)
def test_loading_takes_the_converted_weights_and_one_stored_tensor(kind, stored, checkpoint, tmp_path, request):
    judge = make_judge(text={"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 12}).to(stored)
    judge.save_pretrained(tmp_path)
    dtype, quantize = kind
    folders = {"root": str(request.config.rootpath), "folder": str(tmp_path), "small": str(checkpoint)}
    script = MEASURE.format(**folders, dtype=dtype, quantize=quantize)
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    peak, size, largest = map(int, re.findall(r"\d+", output))
    print(f"peak {peak / 1e6:.0f} MB for {size / 1e6:.0f} MB of weights, largest tensor {largest / 1e6:.1f} M weights")
    # The largest tensor as stored, plus a few rows in float32 and what libraries allocate.
    assert peak < size + stored.itemsize * largest + 50e6
