"""Checkpoints of every layout, dtype and age load exactly, in one copy; saved checkpoints load in transformers."""

import json
import os
import platform
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import LLAVA, TEXT, VISION, make_judge
from safetensors.torch import load_file, save_file

from extras import hub, machine, saving
from llava import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

LAYOUTS = {
    "hub checkpoints": {
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    },
    "in memory since transformers 4.52": {},
    "in memory, with vision_model": {"model.vision_tower.": "model.vision_tower.vision_model."},
    "written by transformers 5": {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.": "",
    },
}


def in_layout(judge, layout: str) -> dict[str, torch.Tensor]:
    """The tensors of a transformers model under the names of one layout."""
    tensors = {}
    for name, tensor in judge.state_dict().items():
        prefix = next((prefix for prefix in LAYOUTS[layout] if name.startswith(prefix)), "")
        tensors[LAYOUTS[layout].get(prefix, "") + name.removeprefix(prefix)] = tensor.contiguous()
    return tensors


def write(folder, judge, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """Writes a checkpoint folder without transformers and without our own code for saving."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llava", **LLAVA, "text_config": TEXT, "vision_config": VISION})
    )
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    weight_map = {}
    for i in range(shards):
        part = dict(list(tensors.items())[i::shards])
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture(scope="module")
def judge():
    return make_judge()


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_logits_match_transformers_for_every_layout(layout, shards, judge, tmp_path, prompt, check):
    write(tmp_path, judge, in_layout(judge, layout), shards)
    ours = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    check(f"checkpoint layout: {layout}", ours(**prompt()).logits, judge(**prompt()).logits)


def test_the_layouts_differ_from_each_other(judge):
    names = [frozenset(in_layout(judge, layout)) for layout in LAYOUTS]
    assert len(set(names)) == len(LAYOUTS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_logits_of_16_bit_checkpoints_match_transformers(dtype, tmp_path, prompt, check):
    judge = make_judge().to(dtype)
    write(tmp_path, judge, in_layout(judge, "hub checkpoints"))
    ours = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert ours.dtype == torch.float32, "on a CPU, the default is float32"
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    check(f"checkpoint in {dtype}", ours(**prompt()).logits, theirs(**prompt()).logits)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_converted_to_the_requested_dtype(stored, wanted, tmp_path):
    judge = make_judge().to(stored)
    write(tmp_path, judge, in_layout(judge, "hub checkpoints"))
    ours = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=wanted)
    expected = judge.lm_head.weight.to(wanted)
    assert torch.equal(ours.language_model.lm_head.weight, expected)
    assert {parameter.dtype for parameter in ours.parameters()} == {wanted}


def test_buffers_of_old_checkpoints_are_ignored(judge, tmp_path):
    tensors = in_layout(judge, "hub checkpoints")
    tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(10)
    tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    write(tmp_path, judge, tensors)
    LlavaForConditionalGeneration.from_pretrained(tmp_path)


def test_a_stored_head_is_ignored_if_the_embeddings_are_tied(tmp_path):
    judge = make_judge(tie_word_embeddings=True)
    write(
        tmp_path, judge, in_layout(judge, "hub checkpoints") | {"language_model.lm_head.weight": torch.zeros(448, 64)}
    )
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    ours = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(ours.language_model.lm_head.weight, judge.lm_head.weight)


def test_one_message_names_every_tensor_that_does_not_match(judge, tmp_path):
    tensors = in_layout(judge, "hub checkpoints")
    del tensors["language_model.model.norm.weight"], tensors["multi_modal_projector.linear_1.bias"]
    tensors["language_model.model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)
    tensors["language_model.lm_head.weight"] = torch.zeros(448, 63)
    write(tmp_path, judge, tensors)
    with pytest.raises(ValueError) as error:
        LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert str(error.value).splitlines()[1:] == [
        "  missing: language_model.model.norm.weight",
        "  missing: multi_modal_projector.linear_1.bias",
        "  unexpected: language_model.model.layers.9.mlp.up_proj.weight",
        "  wrong shape: language_model.lm_head.weight is (448, 63), but (448, 64) according to config.json",
    ]


def test_the_message_stays_short_if_nothing_matches(judge, tmp_path):
    write(tmp_path, judge, {f"layers.{i}": torch.zeros(2) for i in range(100)})
    with pytest.raises(ValueError, match=r"\n  and \d+ more$") as error:
        LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert len(str(error.value).splitlines()) == 1 + 20 + 1


# The hub


def test_without_huggingface_hub_a_hub_name_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="pip install huggingface_hub"):
        hub.find_folder("llava-hf/llava-1.5-7b-hf")


def test_a_hub_name_is_downloaded_with_huggingface_hub(monkeypatch, tmp_path):
    import huggingface_hub

    def snapshot_download(name, allow_patterns):
        assert name == "llava-hf/llava-1.5-7b-hf"
        assert not any("bin" in pattern for pattern in allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.find_folder("llava-hf/llava-1.5-7b-hf") == tmp_path


NOT_DOWNLOADED = "nobody/nothing is not a folder and could not be downloaded from the hub"


def test_a_failed_download_is_refused_with_the_reason():
    with pytest.raises(FileNotFoundError, match=NOT_DOWNLOADED):
        hub.find_folder("nobody/nothing")


@pytest.mark.parametrize(("message", "reason"), [("no network\nand a long story", "no network"), ("", "OSError")])
def test_only_the_first_line_of_the_hubs_error_is_shown(message, reason, monkeypatch):
    import huggingface_hub

    def snapshot_download(name, allow_patterns):
        raise OSError(message)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError) as error:
        hub.find_folder("nobody/nothing")
    assert str(error.value) == f"{NOT_DOWNLOADED}: {reason}"


# config.json

SPARSE = {
    "as published": {
        "model_type": "llava",
        "image_token_index": 32000,
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": {
            "model_type": "llama",
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float16",
            "vocab_size": 32064,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
            "vocab_size": 32000,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    },
    "only the model type": {"model_type": "llava"},
    "nearly empty parts": {
        "model_type": "llava",
        "text_config": {"model_type": "llama"},
        "vision_config": {"hidden_size": 96},
    },
    "Mistral": {"model_type": "llava", "text_config": {"model_type": "mistral"}},
    "Mistral without a sliding window": {
        "model_type": "llava",
        "text_config": {"model_type": "mistral", "sliding_window": None},
    },
    "RoPE, old spelling": {
        "model_type": "llava",
        "text_config": {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    },
    "RoPE, new spelling": {
        "model_type": "llava",
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
    },
    "other new spellings": {
        "model_type": "llava",
        "image_token_id": 7,
        "dtype": "bfloat16",
        "text_config": {"tie_word_embeddings": True},
    },
}


@pytest.mark.parametrize("name", SPARSE)
def test_defaults_of_a_sparse_config_match_transformers(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SPARSE[name]))
    ours = LlavaConfig.from_pretrained(tmp_path)
    theirs = transformers.LlavaConfig.from_pretrained(tmp_path)
    for part in ("vision_config", "text_config"):
        for field, value in vars(getattr(ours, part)).items():
            expected = getattr(getattr(theirs, part), field, value)  # e.g. Mistral's config has no attention_bias
            if field == "rope_parameters":
                expected.pop("type", None)  # transformers also keeps the old spelling
            assert value == expected, field
    for field in ("image_token_id", "vision_feature_layer", "vision_feature_select_strategy", "projector_hidden_act"):
        assert getattr(ours, field) == getattr(theirs, field)
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.dtype == (None if theirs.dtype is None else str(theirs.dtype).removeprefix("torch."))


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 7}, [5, 6]),
        ({}, {"eos_token_id": 7, "text_config": {"eos_token_id": 8}}, [7]),
        ({}, {"text_config": {"eos_token_id": 8}}, [8]),
        ({}, {}, [2]),
    ],
)
def test_eos_comes_from_generation_config_then_config_then_2(generation, config, expected, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", **config}))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert LlavaConfig.from_pretrained(tmp_path).eos_token_id == expected


# Saving


@pytest.mark.parametrize("shard_bytes", [10**9, 200_000], ids=["one file", "shards"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"tie_word_embeddings": True},
        {"text": {"num_key_value_heads": 2, "head_dim": 24, "attention_bias": True}},
        {"text": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}},
        {"text": {"model_type": "mistral", "num_key_value_heads": 2}, "vision_feature_layer": [1, -2]},
    ],
    ids=str,
)
@torch.no_grad()
def test_saved_checkpoints_load_in_transformers(config, shard_bytes, make_pair, tmp_path, prompt, monkeypatch, check):
    monkeypatch.setattr(saving, "SHARD_BYTES", shard_bytes)
    ours, _ = make_pair(**config)
    ours.save_pretrained(tmp_path / "saved")
    theirs, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not any(info.values()), info
    assert (len(list((tmp_path / "saved").glob("*.safetensors"))) > 1) == (shard_bytes < 10**6)
    check("saved by us, loaded by transformers", ours(**prompt()).logits, theirs(**prompt()).logits)


def test_a_model_can_be_saved_over_its_own_mapped_files(checkpoint, tmp_path, prompt):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    ours = LlavaForConditionalGeneration.from_pretrained(folder)
    before = ours(**prompt()).logits
    ours.save_pretrained(folder)
    assert torch.equal(ours(**prompt()).logits, before)
    assert torch.equal(LlavaForConditionalGeneration.from_pretrained(folder)(**prompt()).logits, before)
    assert not list(folder.glob("*.part"))


def test_saving_deletes_old_shards_and_nothing_else(make_pair, tmp_path, monkeypatch):
    ours, _ = make_pair()
    folder = tmp_path / "saved"
    monkeypatch.setattr(saving, "SHARD_BYTES", 200_000)
    ours.save_pretrained(folder)
    (folder / "model_ema.safetensors").write_bytes(b"somebody else's")
    monkeypatch.undo()
    ours.save_pretrained(folder)
    assert sorted(path.name for path in folder.glob("model*")) == ["model.safetensors", "model_ema.safetensors"]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_auto_dtype_is_float32_on_a_cpu_and_the_checkpoints_elsewhere(device, tmp_path):
    make_judge().to(torch.float16).save_pretrained(tmp_path)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path, device=device)
    assert model.dtype == (torch.float32 if device == "cpu" else torch.float16)


@torch.no_grad()
def test_a_file_with_several_dtypes_loads_as_one_dtype(judge, tmp_path):
    tensors = in_layout(judge, "hub checkpoints")
    mixed = {name: tensor.half() if "mlp" in name else tensor for name, tensor in tensors.items()}
    write(tmp_path, judge, mixed)
    ours = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    expected = mixed["language_model.model.layers.0.mlp.up_proj.weight"].float()
    assert torch.equal(ours.language_model.model.layers[0].mlp.up_proj.weight, expected)


def test_a_saved_processor_loads_and_encodes_alike(checkpoint, tmp_path, make_pair):
    make_pair()[0].save_pretrained(tmp_path / "saved")
    LlavaProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path / "saved")
    inputs = LlavaProcessor.from_pretrained(tmp_path / "saved")(text="a circle")
    assert torch.equal(inputs.input_ids, LlavaProcessor.from_pretrained(checkpoint)(text="a circle").input_ids)


def test_the_image_processor_of_processor_config_json_takes_precedence(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings | {"do_pad": True}}))
    assert LlavaProcessor.from_pretrained(folder).image_processor.do_pad


# Memory

MEASURE = """
import pathlib, re, sys
import torch
sys.path.insert(0, {root!r})
from llava import LlavaForConditionalGeneration
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
before = peak()
model = LlavaForConditionalGeneration.from_pretrained({folder!r}, dtype=torch.float32)
print(peak() - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
def test_converted_weights_are_never_in_memory_twice(tmp_path, request):
    judge = make_judge(text={"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 12}).half()
    write(tmp_path, judge, in_layout(judge, "hub checkpoints"))
    config = judge.config.to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    script = MEASURE.format(root=str(request.config.rootpath), folder=str(tmp_path))
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    peak, size = map(int, output.split())
    file = sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values())
    print(f"peak {peak / 1e6:.0f} MB for {size / 1e6:.0f} MB of weights from a file of {file / 1e6:.0f} MB")
    assert peak < size + 0.25 * file


# With malloc itself, not tensors: their small objects end up between the blocks, at random, and the heap then grows.
PAGES = """
import ctypes, resource, sys
sys.path.insert(0, {root!r})
from extras.machine import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def compute():
    blocks = [ctypes.c_void_p(libc.malloc(24_000_000)) for _ in range(4)]
    for block in blocks: libc.memset(block, 1, 24_000_000)
    for block in blocks: libc.free(block)
keep_freed_memory()
for _ in range(3): compute()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
compute()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_freed_memory_is_reused_for_the_next_results(request):
    script = PAGES.format(root=str(request.config.rootpath))
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    print(f"{int(output)} new pages for results of 96 MB")
    assert int(output) < 100  # 23,405 without `keep_freed_memory`


@pytest.mark.parametrize(("platform", "library"), [("darwin", None), ("linux", object())])
def test_without_glibc_memory_settings_are_left_alone(platform, library, monkeypatch):
    monkeypatch.setattr(machine.sys, "platform", platform)
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: library if library else pytest.fail("called"))
    machine.keep_freed_memory()


@pytest.mark.skipif(os.name == "nt", reason="there are no such permissions on Windows")
def test_saved_weights_can_be_read_by_whoever_can_read_the_folder(make_pair, tmp_path):
    ours, _ = make_pair()
    before = os.umask(0o022)
    try:
        ours.save_pretrained(tmp_path / "saved")
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "saved").iterdir()} == {"0o644"}
