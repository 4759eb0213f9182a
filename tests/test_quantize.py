"""Linear layers for CPUs multiply by their weights, rounded or not, and load in little memory."""

import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from conftest import make_judge
from safetensors.torch import load_file, save_file
from torch import nn

from extras import matmul, quantize
from extras.quantize import SCHEMES, CompactLinear, FloatLinear, HalfLinear, compact_linears
from llava import KVCache, LlavaForConditionalGeneration

LAYOUTS = [(8, 32), (4, 32), (4, 64)]  # bits and group
ROOT = Path(__file__).parents[1]
ERRORS = """
import onnxruntime
import torch
from extras.limits import cpu_kind
from test_quantize import LAYOUTS, make_layer
torch.set_grad_enabled(False)
for layout in LAYOUTS:
    ours, exact = make_layer(513, 130, True, *layout)
    for rows in (1, 700):
        x = torch.randn(rows, 513, generator=torch.Generator().manual_seed(0))
        print(cpu_kind(), ((ours(x) - exact(x)).norm() / exact(x).norm()).item(), onnxruntime.__file__)
"""


def make_layer(width_in: int, width_out: int, bias: bool = True, bits: int = 8, group: int = 32):
    """A compact layer, and a float layer with the same rounded weights."""
    generator = torch.Generator().manual_seed(width_in)
    exact = nn.Linear(width_in, width_out, bias=bias)
    exact.weight.data.normal_(mean=0.3, generator=generator)
    rounded = CompactLinear(width_in, width_out, bias, bits, group)
    rounded.load_weight(exact.weight)
    rounded.bias = exact.bias
    exact.weight.data = rounded.dequantized()
    return rounded, exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [(1,), (1, 1), (2, 3), (700,)], ids=str)
@pytest.mark.parametrize("widths", [(64, 64), (37, 5), (1, 1), (1, 7), (513, 130), (40, 1100)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kernel", ["ONNX Runtime", "float32", "bfloat16"])
@torch.no_grad()
def test_a_compact_layer_multiplies_by_its_rounded_weights(widths, layout, rows, dtype, kernel, check, monkeypatch):
    """With ONNX Runtime, which rounds activations to 8 bits in groups, and dequantised, in the CPU's fastest dtype."""
    ours, exact = make_layer(*widths, True, *layout)
    ours.uses_runtime &= kernel == "ONNX Runtime"
    monkeypatch.setattr(quantize, "computes_in", lambda dtype: kernel == "bfloat16")
    x = torch.randn(*rows, widths[0], generator=torch.Generator().manual_seed(0)).to(dtype)
    y = ours(x)
    assert y.dtype == dtype and y.shape == (*rows, widths[1])
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    # In the narrowest layers, product and bias may cancel, which leaves a larger share of what was rounded
    limit = max(rounding, {"ONNX Runtime": 2e-2, "float32": 0, "bfloat16": 2e-2}[kernel])
    check(f"compact layer, {kernel}, {dtype}", y.float(), exact(x.float()), limit=limit)


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512"
    or not (matmul.is_installed() and shutil.which("gcc") and shutil.which("objdump")),
    reason="needs a CPU with AVX-512, ONNX Runtime, gcc and objdump",
)
def test_the_kernels_for_avx2_alone_multiply_by_the_rounded_weights():
    command = [sys.executable, ROOT / "tests/avx2.py", sys.executable, "-c", ERRORS]
    paths = (ROOT, ROOT / "tests", ROOT / "tiny")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    ran = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    print(ran.stdout)
    lines = [line.split(maxsplit=2) for line in ran.stdout.splitlines()]
    assert [kind for kind, _, _ in lines] == 2 * len(LAYOUTS) * ["AVX2"]
    assert all(float(error) < 2e-2 for _, error, _ in lines)
    assert not any(
        file.startswith(sys.prefix) for _, _, file in lines
    )  # the copy that asks the handler for the CPU kind


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("runtime", [True, False])
def test_gradients_flow_through_a_compact_layer_to_its_input_only(layout, runtime, check):
    ours, exact = make_layer(96, 1100, True, *layout)
    ours.uses_runtime &= runtime
    gradients = []
    for layer in (ours, exact):
        x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0)).requires_grad_()
        layer(x).square().sum().backward()
        gradients.append(x.grad)
    check("gradient through a compact layer", *gradients, limit=2e-2 if runtime else 1e-5)
    assert ours.weight.grad is ours.scale.grad is None


@pytest.mark.skipif(not matmul.is_installed(), reason="needs ONNX Runtime")
@pytest.mark.parametrize("quantize", SCHEMES)
@torch.no_grad()
def test_layers_with_the_same_input_are_multiplied_together(quantize, checkpoint):
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, quantize=quantize)
    attention = model.language_model.model.layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    x = torch.randn(3, attention.q_proj.in_features, generator=torch.Generator().manual_seed(0))
    attention.q_proj(x.clone())  # packs the weights
    shared, calls = attention.q_proj.shared, []
    multiply = shared.multiply
    shared.multiply = lambda rows: calls.append(len(rows)) or multiply(rows)
    together = [layer(x) for layer in layers]
    assert calls == [3] and shared.products is None  # the results are not kept
    alone = [layer(x.clone()) for layer in layers]
    assert len(calls) == 4
    assert all(torch.equal(*pair) for pair in zip(together, alone, strict=True))


@pytest.mark.skipif(not matmul.is_installed(), reason="needs ONNX Runtime")
@pytest.mark.parametrize("quantize", SCHEMES)
def test_only_the_decoder_is_packed_for_onnx_runtime(quantize, checkpoint, prompt):
    """The vision tower and the projector always multiply many rows."""
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, quantize=quantize)
    model.generate(**prompt(), max_new_tokens=1)
    packed = {name for name, m in model.named_modules() if isinstance(m, CompactLinear) and m.shared.multiply}
    compact = {name for name, m in model.named_modules() if isinstance(m, CompactLinear)}
    assert packed == {name for name in compact if name.startswith("language_model.")} != compact


def test_a_quantised_model_is_freed_as_soon_as_it_is_dropped(checkpoint, prompt):
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, quantize="int4")
    model.generate(**prompt(), max_new_tokens=1)
    layer = weakref.ref(model.language_model.lm_head)
    del model
    assert layer() is None  # without waiting for the garbage collector


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_blocks_of_a_compact_layer_are_its_weight_matrix(layout):
    ours, _ = make_layer(70, 50, True, *layout)
    blocks = list(ours.blocks(rows=16))
    assert [block.shape for block in blocks] == [(16, 70)] * 3 + [(2, 70)]
    assert torch.equal(torch.cat(blocks), ours.dequantized())


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


def test_8_bit_weights_are_rounded_to_the_nearest_of_255_levels():
    weight = torch.randn(64, 100, generator=torch.Generator().manual_seed(0)).half().float()
    layer = CompactLinear(100, 64)
    layer.load_weight(weight.half())
    steps = layer.scale.repeat_interleave(32, dim=1)[:, :100]
    assert ((layer.dequantized() - weight).abs() <= steps * 0.501).all()
    assert layer.weight[:, :3].amax(-1).maximum(256 - layer.weight[:, :3].int().amin(-1)).eq(255).all()  # 128 +- 127


def weighted_error(layer: CompactLinear, weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    return (importance * (layer.dequantized() - weight).square()).sum()


def test_4_bit_weights_spend_their_precision_on_the_inputs_that_matter():
    generator = torch.Generator().manual_seed(0)
    weight, importance = torch.randn(64, 128, generator=generator), torch.rand(128, generator=generator) ** 4
    blind, weighing = CompactLinear(128, 64, bits=4), CompactLinear(128, 64, bits=4)
    blind.load_weight(weight)
    weighing.load_weight(weight, importance)
    nearest = weight.view(64, 4, 32)  # to the nearest of 16 levels between the smallest and the largest
    low, step = nearest.amin(-1, True), (nearest.amax(-1, True) - nearest.amin(-1, True)) / 15
    nearest = (((nearest - low) / step).round() * step + low).view(64, 128)
    assert weighted_error(weighing, weight, importance) < 0.8 * weighted_error(blind, weight, importance)
    assert (blind.dequantized() - weight).square().sum() < 0.95 * (nearest - weight).square().sum()


@pytest.mark.parametrize("value", [0.0, 1e-3, -7.25])
def test_4_bits_keep_groups_of_equal_weights(value, check):
    weight = torch.full((3, 64), value)
    layer = CompactLinear(64, 3, bits=4)
    layer.load_weight(weight)
    assert (layer.dequantized() - weight).abs().max() <= abs(value) * 1e-6


@torch.no_grad()
def test_rows_of_very_different_magnitude_keep_their_precision(check):
    for layout in LAYOUTS:
        ours, exact = make_layer(64, 64, False, *layout)
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-6], [1.0], [1e6]])
        for row in range(3):
            check("compact layer, rows of different magnitude", ours(x)[row], exact(x)[row], limit=2e-2)


OVERFLOW = """
import sys
import torch
sys.path.insert(0, {root!r})
from extras.quantize import CompactLinear
for bits in (8, 4):
    layer = CompactLinear(4096, 64, False, bits)
    layer.load_weight(torch.ones(64, 4096) - 2 * (torch.arange(4096) % 32 == 0))
    assert layer.uses_runtime
    print([layer(torch.full((rows, 4096), value)).mean().item() for rows in (1, 2, 64) for value in (1.0, -1.0)])
"""


@pytest.mark.skipif(not matmul.is_installed(), reason="needs ONNX Runtime")
def test_the_largest_products_do_not_overflow(request):
    script = OVERFLOW.format(root=str(request.config.rootpath))
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    for line in output.splitlines():
        assert json.loads(line) == pytest.approx([4096.0 * 30 / 32, -4096.0 * 30 / 32] * 3, rel=1e-2)


@torch.no_grad()
def test_zero_inputs_give_the_bias():
    ours, exact = make_layer(64, 64)
    assert torch.equal(ours(torch.zeros(2, 64)), exact.bias.expand(2, -1))


@pytest.fixture(params=["int8", "int4"])
def pair(tmp_path, request):
    """A quantised model, which dequantises on every call, and transformers' model with the same rounded weights."""
    judge = make_judge(text={"num_key_value_heads": 2})
    judge.save_pretrained(tmp_path)
    ours = LlavaForConditionalGeneration.from_pretrained(tmp_path, quantize=request.param)
    for name, module in ours.named_modules():
        if isinstance(module, CompactLinear):
            module.uses_runtime, module.shared.multiply = False, None
            name = name.replace("language_model.model.", "model.language_model.").replace("language_model.lm", "lm")
            prefix = "" if name.startswith(("model.", "lm_head")) else "model."
            judge.get_submodule(prefix + name).weight.data = module.dequantized()
    return ours, judge


def with_runtime(model):
    """The same model, multiplied by ONNX Runtime."""
    for module in model.modules():
        if isinstance(module, CompactLinear):
            module.uses_runtime = True
    return model


def test_logits_of_a_quantised_model_match_transformers_with_rounded_weights(pair, prompt, check):
    ours, _ = pair
    layer = ours.language_model.model.layers[0]
    bits = 4 if ours.config.quantize == "int4" else 8
    assert layer.mlp.up_proj.bits == layer.self_attn.o_proj.bits == bits
    assert ours.vision_tower.encoder.layers[0].mlp.fc1.bits == ours.multi_modal_projector.linear_1.bits == 8
    assert isinstance(ours.language_model.lm_head, CompactLinear if bits == 4 else nn.Linear)
    logits = [model(**prompt()).logits.detach() for model in pair]  # with gradients on, PyTorch's default
    check(f"{ours.config.quantize} model against rounded weights", *logits)


@pytest.mark.skipif(not matmul.is_installed(), reason="needs ONNX Runtime")
@torch.no_grad()
def test_onnx_runtime_gives_the_same_logits_to_the_accuracy_of_8_bit_activations(pair, prompt, check):
    ours, theirs = pair
    expected = theirs(**prompt()).logits
    check(f"{ours.config.quantize} with 8-bit activations", with_runtime(ours)(**prompt()).logits, expected, limit=3e-2)


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


def test_tokens_of_a_quantised_model_match_transformers_alone_in_a_batch_and_with_a_cache(pair, prompt):
    ours, theirs = pair
    inputs = prompt()
    expected = theirs.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert torch.equal(ours.generate(**inputs, max_new_tokens=24), expected)
    twice = {name: tensor.expand(2, *[-1] * (tensor.ndim - 1)) for name, tensor in inputs.items()}
    assert torch.equal(ours.generate(**twice, max_new_tokens=24), expected.expand(2, -1))
    cache = KVCache(ours)
    first = ours.generate(**inputs, max_new_tokens=12, cache=cache)
    assert torch.equal(ours.generate(first, max_new_tokens=12, cache=cache), expected)


# Saved in compact form


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("quantize", SCHEMES)
@torch.no_grad()
def test_a_saved_quantised_model_gives_the_same_logits_to_the_last_bit(quantize, dtype, stored, tmp_path, prompt):
    make_judge().to(stored).save_pretrained(tmp_path)
    ours = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype, quantize=quantize)
    ours.save_pretrained(tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert settings == {"quant_method": "compact", "bits": int(quantize[3:]), "version": 2}
    for option in (None, quantize):  # it need not be named again
        again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "saved", dtype, quantize=option)
        assert torch.equal(again(**prompt()).logits, ours(**prompt()).logits)
        for (name, one), (_, other) in zip(ours.named_parameters(), again.named_parameters(), strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other), name
    again.save_pretrained(tmp_path / "saved")  # over the file that its weights are mapped from
    assert torch.equal(
        LlavaForConditionalGeneration.from_pretrained(tmp_path / "saved", dtype)(**prompt()).logits,
        ours(**prompt()).logits,
    )


def test_quantising_twice_is_refused(checkpoint, tmp_path):
    LlavaForConditionalGeneration.from_pretrained(checkpoint, quantize="int4").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantised as int4 already, not as int8"):
        LlavaForConditionalGeneration.from_pretrained(tmp_path, quantize="int8")


FOREIGN = {
    "GPTQ": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "by 'gptq', which is not supported. Use the ori"),
    "AWQ": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "by 'awq', which is not supported"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "by 'bitsandbytes', which is not"),
    "no method": ({}, "by None, which is not supported"),
    "no object": ("int4", "by 'int4', which is not supported"),
    "3 bits": ({"quant_method": "compact", "bits": 3, "version": 2}, "with settings that are not known: .*'bits': 3"),
    "a later version": ({"quant_method": "compact", "bits": 4, "version": 3}, "settings that are not known"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_quantised_checkpoints_are_refused_in_a_sentence(name, checkpoint, tmp_path):
    settings, sentence = FOREIGN[name]
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=sentence):
        LlavaForConditionalGeneration.from_pretrained(tmp_path)


LAYER = "language_model.model.layers.0.mlp.up_proj"
DAMAGE = {
    "a missing scale": (lambda t: t.pop(f"{LAYER}.scale"), f"missing: {LAYER}.scale"),
    "other groups": (
        lambda t: t.update({f"{LAYER}.scale": torch.ones(160, 4)}),
        rf"wrong shape: {LAYER}.scale is \(160, 4\), but \(160, 3\)",
    ),
    "floats for codes": (
        lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"].float()}),
        f"wrong dtype: {LAYER}.weight is F32, but only U8 is supported",
    ),
    "codes for floats": (
        lambda t: t.update({f"{LAYER}.scale": t[f"{LAYER}.scale"].byte()}),
        f"wrong dtype: {LAYER}.scale is U8, but only F64, F32",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_quantised_checkpoint_is_refused_in_a_sentence(name, checkpoint, tmp_path):
    damage, sentence = DAMAGE[name]
    LlavaForConditionalGeneration.from_pretrained(checkpoint, quantize="int4").save_pretrained(tmp_path)
    tensors = {name: tensor.clone() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=sentence):
        LlavaForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize("quantize", SCHEMES)
@torch.no_grad()
def test_tied_embeddings_stay_tied_and_in_float32(quantize, stored, tmp_path, prompt):
    make_judge(tie_word_embeddings=True).to(stored).save_pretrained(tmp_path)
    ours = LlavaForConditionalGeneration.from_pretrained(tmp_path, quantize=quantize)
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
    with pytest.raises(ValueError, match="quantize is 'int2'; it must be 'int8' or 'int4' or None"):
        LlavaForConditionalGeneration.from_pretrained(checkpoint, quantize="int2")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("quantize", SCHEMES)
def test_nan_in_quantised_weights_is_reported_by_name(quantize, value, tmp_path):
    judge = make_judge()
    judge.model.language_model.layers[1].mlp.up_proj.weight.data[3, 3] = value
    judge.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"NaN or infinity, in language_model.model.layers.1.mlp.up_proj.scale"):
        LlavaForConditionalGeneration.from_pretrained(tmp_path, quantize=quantize)


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


PACKED = """
import pathlib, re, sys
import torch
sys.path.insert(0, {root!r})
from llava import LlavaForConditionalGeneration
from load import weight_bytes
def used(): return int(re.search(r"RssAnon:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
def load(folder):
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    model.generate(torch.ones(1, 8, dtype=torch.long), max_new_tokens=2)
    return model
load({small!r})
before = used()
model = load({large!r})
print(used() - before, weight_bytes(model))
"""


@pytest.mark.skipif(sys.platform != "linux" or not matmul.is_installed(), reason="reads memory from /proc")
@pytest.mark.parametrize("quantize", SCHEMES)
def test_a_saved_quantised_model_is_in_memory_once(quantize, checkpoint, tmp_path, request):
    text = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 12}
    make_judge(text=text).half().save_pretrained(tmp_path)
    for folder, target in ((tmp_path, "large"), (checkpoint, "small")):
        model = LlavaForConditionalGeneration.from_pretrained(folder, quantize=quantize)
        model.save_pretrained(tmp_path / target)
    folders = {
        "root": str(request.config.rootpath),
        "large": str(tmp_path / "large"),
        "small": str(tmp_path / "small"),
    }
    output = subprocess.run(
        [sys.executable, "-c", PACKED.format(**folders)], capture_output=True, text=True, check=True
    ).stdout
    anonymous, size = map(int, output.split())
    print(f"{anonymous / 1e6:.0f} MB of anonymous memory for {size / 1e6:.0f} MB of packed weights")
    assert anonymous < 1.1 * size + 20e6
