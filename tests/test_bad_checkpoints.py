"""A checkpoint that is damaged, incomplete, inconsistent or hostile is refused with a sentence that says why."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from extras.hub import find_folder
from llava import LlavaForConditionalGeneration, LlavaProcessor

WEIGHTS = "model.safetensors"
GIT_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"


def config(**changes):
    """Sets fields of config.json; those of `text_config` and `vision_config` are merged, and None stands for null."""

    def harm(folder: Path) -> None:
        edit(folder / "config.json", changes)

    return harm


def edit(file: Path, changes: dict) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    for name, value in changes.items():
        content[name] = content[name] | value if isinstance(value, dict) and name.endswith("_config") else value
    file.write_text(json.dumps(content))


def settings(**changes):
    return lambda folder: edit(folder / "preprocessor_config.json", changes)


def added(**tokens):
    return lambda folder: edit(folder / "added_tokens.json", {f"<{name}>": i for name, i in tokens.items()})


def file(name: str, content: bytes | str):
    content = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(content)


def index(*names: object):
    """Writes an index that maps one tensor to each of these files, and renames the weights to w.safetensors."""

    def harm(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "w.safetensors")
        weight_map = {f"tensor {i}": name for i, name in enumerate(names)}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return harm


def weights(change, name: str = WEIGHTS):
    """Rewrites the weights file with changed tensors."""

    def harm(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        save_file(change(tensors), folder / name)

    return harm


def header(change, *, text: bytes | None = None, length: int | None = None):
    """Rewrites the header of the weights file: as an object or as text, and with its length or a false one."""

    def harm(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        new = json.loads(content[8 : 8 + size])
        change(new)
        new = json.dumps(new).encode() if text is None else text
        data = struct.pack("<Q", len(new) if length is None else length) + new + content[8 + size :]
        (folder / WEIGHTS).write_bytes(data)

    return harm


def entry(change):
    """Changes one tensor's entry in the header."""
    return header(lambda new: new["language_model.lm_head.weight"].update(change))


def cut(name: str, count: int):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:count])


def remove(name: str):
    return lambda folder: (folder / name).unlink()


def link_out(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere.safetensors")
    (folder / WEIGHTS).symlink_to("../elsewhere.safetensors")


def set_weight(name: str, value: float):
    def change(tensors: dict) -> dict:
        tensors[name].view(-1)[5] = value
        return tensors

    return weights(change)


NOT_IN_FOLDER = "which is not a safetensors file in its folder"
NOT_COMPLETE = "model.safetensors is not a complete safetensors file"
BROKEN = {
    # The folder
    "missing": (shutil.rmtree, "there is no folder"),
    "empty": (lambda folder: [path.unlink() for path in folder.iterdir()], "has no config.json"),
    "a file": (
        lambda folder: (shutil.rmtree(folder), folder.write_text("")),
        "is a file; give the folder that contains it",
    ),
    # config.json
    "no config": (remove("config.json"), "has no config.json"),
    "config empty": (file("config.json", ""), "config.json is not valid JSON"),
    "config not JSON": (file("config.json", "{"), "config.json is not valid JSON.*download complete"),
    "config binary": (file("config.json", b"\xff\xfe\0"), "config.json is not valid JSON"),
    "config is a list": (file("config.json", "[]"), "config.json contains a list where an object was expected"),
    "config nested too deeply": (file("config.json", "[" * 100_000), "config.json is not valid JSON"),
    "llava_next": (config(model_type="llava_next"), "model of type 'llava_next'; only 'llava' is supported"),
    "qwen2_vl": (config(model_type="qwen2_vl"), "model of type 'qwen2_vl'; only 'llava' is supported"),
    "plain llama": (config(model_type="llama"), "model of type 'llama'; only 'llava' is supported"),
    "no model type": (config(model_type=None), "model of type None; only 'llava' is supported"),
    "another decoder": (config(text_config={"model_type": "qwen2"}), "text model 'qwen2' is not supported"),
    "another vision tower": (config(vision_config={"model_type": "siglip"}), "vision model 'siglip' is not supported"),
    "text_config is a list": (
        file("config.json", '{"model_type": "llava", "text_config": [1]}'),
        "text_config is not an obj",
    ),
    "string for a number": (config(text_config={"hidden_size": "64"}), "hidden_size is '64', .*not of type int"),
    "number for a string": (config(projector_hidden_act=3), "projector_hidden_act is 3, which is not of type str"),
    "true for a number": (config(text_config={"vocab_size": True}), "vocab_size is True, which is not of type int"),
    "fractional size": (config(text_config={"hidden_size": 64.5}), "hidden_size is 64.5, which is not of type int"),
    "eos_token_id not an id": (
        file("generation_config.json", '{"eos_token_id": "x"}'),
        r"eos_token_id is .*, which is not of type list\[int\]",
    ),
    "NaN": (
        file("config.json", '{"model_type": "llava", "text_config": {"rms_norm_eps": NaN}}'),
        "rms_norm_eps is nan",
    ),
    "negative size": (
        config(text_config={"intermediate_size": -160}),
        "intermediate_size is -160; it must be between 1 and",
    ),
    "size 0": (config(vision_config={"patch_size": 0}), "patch_size is 0; it must be between 1 and"),
    "absurd size": (
        config(text_config={"hidden_size": 10**12}),
        "hidden_size is 1000000000000; it must be between 1 and 10000000",
    ),
    "absurd size within the limit": (config(text_config={"hidden_size": 4 * 10**6}), "wrong shape: .*(64|160)"),
    "absurd number of layers": (
        config(text_config={"num_hidden_layers": 10**9}),
        "num_hidden_layers is 1000000000; it must be",
    ),
    "heads do not divide the width": (
        config(text_config={"num_attention_heads": 3, "head_dim": None}),
        "hidden_size 64 is not divisible by 3 heads",
    ),
    "vision heads do not divide the width": (
        config(vision_config={"num_attention_heads": 5}),
        "a vision hidden_size divisible by its heads",
    ),
    "key-value heads do not divide the heads": (
        config(text_config={"num_key_value_heads": 3}),
        "attention heads divisible by num_key_value_heads",
    ),
    "odd head_dim": (config(text_config={"head_dim": 15}), "an even head_dim"),
    "one colour channel": (config(vision_config={"num_channels": 1}), "num_channels 3"),
    "vision_feature_layer out of range": (config(vision_feature_layer=5), "a vision_feature_layer within 4 layers"),
    "empty vision_feature_layer": (config(vision_feature_layer=[]), "a vision_feature_layer within 4 layers"),
    "unknown strategy": (config(vision_feature_select_strategy="all"), "a select_strategy of default or full"),
    "unknown activation": (config(text_config={"hidden_act": "swish2"}), "activations from quick_gelu"),
    "patch larger than the image": (
        config(vision_config={"patch_size": 64}),
        "a context longer than the 0 tokens of an image",
    ),
    "image larger than the context": (
        config(vision_config={"patch_size": 1}),
        "a context longer than the 1764 tokens of an image",
    ),
    "unsupported RoPE": (config(text_config={"rope_parameters": {"rope_type": "yarn"}}), "RoPE of type 'yarn' is not"),
    "unsupported RoPE, old spelling": (
        config(text_config={"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2}}),
        "RoPE of type 'dynamic' is not supported, only default, linear, llama3",
    ),
    "RoPE number out of range": (
        config(text_config={"rope_parameters": {"rope_theta": 10**30}}),
        "RoPE's rope_theta is 1000",
    ),
    "RoPE factor not a number": (
        config(text_config={"rope_parameters": {"rope_type": "linear", "factor": "2"}}),
        "RoPE's factor is '2'",
    ),
    # The index
    "index not JSON": (file(f"{WEIGHTS}.index.json", "{"), "index.json is not valid JSON"),
    "index without weight_map": (
        file(f"{WEIGHTS}.index.json", "{}"),
        "index.json has no weight_map from tensor names to file names",
    ),
    "index of numbers": (index(3), "index.json has no weight_map from tensor names to file names"),
    "index with a missing shard": (index("w.safetensors", "gone.safetensors"), "lacks gone.safetensors: finish"),
    "index that leaves the folder": (index("../w.safetensors"), rf"names '\.\./w.safetensors', {NOT_IN_FOLDER}"),
    "index with an absolute path": (index("/etc/passwd"), f"names '/etc/passwd', {NOT_IN_FOLDER}"),
    "index into another folder": (index("a/w.safetensors"), f"names 'a/w.safetensors', {NOT_IN_FOLDER}"),
    "index naming another kind of file": (index("config.json"), f"names 'config.json', {NOT_IN_FOLDER}"),
    "link out of the folder": (link_out, "is a link to .*elsewhere.safetensors, outside its folder"),
    # The weights
    "no weights": (remove(WEIGHTS), "has no weights in safetensors format"),
    "pickles": (
        lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"),
        r"pickles \(pytorch_model.bin\).*refused.*safetensors",
    ),
    "zero bytes": (cut(WEIGHTS, 0), NOT_COMPLETE),
    "only a length": (cut(WEIGHTS, 8), NOT_COMPLETE),
    "half a header": (cut(WEIGHTS, 1000), NOT_COMPLETE),
    "half the data": (cut(WEIGHTS, 99_999), NOT_COMPLETE),
    "trailing bytes": (header(lambda new: None, text=b"{}"), NOT_COMPLETE),
    "git-lfs": (file(WEIGHTS, GIT_LFS), "model.safetensors is a git-lfs pointer, not the file itself: run git lfs"),
    "header length too large": (header(lambda new: None, length=2**60), NOT_COMPLETE),
    "header length too small": (header(lambda new: None, length=100), NOT_COMPLETE),
    "header not JSON": (header(lambda new: None, text=b"{" * 99), NOT_COMPLETE),
    "offsets past the end": (entry({"data_offsets": [0, 10**9]}), NOT_COMPLETE),
    "overlapping offsets": (entry({"data_offsets": [4, 114_692]}), NOT_COMPLETE),
    "reversed offsets": (entry({"data_offsets": [114_688, 0]}), NOT_COMPLETE),
    "terabytes": (entry({"shape": [2**22, 2**20], "data_offsets": [0, 2**44]}), NOT_COMPLETE),
    "more bytes than 64 bits can count": (entry({"shape": [2**40, 2**40]}), NOT_COMPLETE),
    "unknown dtype": (entry({"dtype": "F33"}), NOT_COMPLETE),
    "integer dtype": (entry({"dtype": "I32"}), r"wrong dtype: language_model.lm_head.weight is I32, but only F64"),
    "quantised weights": (
        weights(lambda tensors: {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}),
        "wrong dtype: .* is F8_E4M3, but only .*not quantised weights",
    ),
    "tensor in two layouts": (
        weights(lambda tensors: tensors | {"lm_head.weight": torch.zeros(448, 64)}),
        "lm_head.weight in .*model.safetensors and .*lm_head.weight in model.safetensors are the same tensor",
    ),
    "tensor in two files": (
        lambda folder: (
            shutil.copy(folder / WEIGHTS, folder / "b.safetensors"),
            (folder / WEIGHTS).rename(folder / "a.safetensors"),
        ),
        " in .*a.safetensors and .* in b.safetensors are the same tensor",
    ),
    # The tokenizer
    "no tokenizer": (remove("tokenizer.model"), "has no tokenizer: neither tokenizer.model nor tokenizer.json"),
    "tokenizer.model git-lfs": (file("tokenizer.model", GIT_LFS), "tokenizer.model is a git-lfs pointer"),
    "tokenizer.model empty": (cut("tokenizer.model", 0), "tokenizer.model is not a SentencePiece model"),
    "tokenizer.model truncated": (
        cut("tokenizer.model", 3000),
        "tokenizer.model is not a SentencePiece model|cannot have the id",
    ),
    "no image token": (file("added_tokens.json", "{}"), "has no <image> token"),
    "added tokens not JSON": (file("added_tokens.json", "{"), "added_tokens.json is not valid JSON"),
    "added tokens are a list": (file("added_tokens.json", "[1]"), "added_tokens.json contains a list"),
    "added token id is a string": (added(box="7"), "added tokens of .* must map texts to ids"),
    "added token with the id of a piece": (
        added(box=300),
        "added token <box> of .* cannot have the id 300: that is ",
    ),
    "two added tokens with one id": (added(box=420), "cannot have the id 420: that is <"),
    "gap before an added token": (added(box=425), "<box> of .* cannot have the id 425: the next id is 422"),
    "negative token id": (added(box=-1), "<box> of .* cannot have the id -1"),
    "more added tokens than embeddings": (
        added(**{f"box{i}": 422 + i for i in range(30)}),
        "mixes different checkpoints: the last id of the tokenizer is 451, but 447 according to config.json",
    ),
    "another image token id": (
        config(image_token_index=421),
        "mixes .*: the id of <image> is 420, but 421 according to config.json",
    ),
    "malformed tokenizer settings": (
        file("tokenizer_config.json", '{"added_tokens_decoder": {"420": "<image>"}}'),
        "tokenizer_config.json has malformed tokens",
    ),
    # The image processor
    "no preprocessor": (remove("preprocessor_config.json"), "has no preprocessor_config.json"),
    "preprocessor not JSON": (file("preprocessor_config.json", "x"), "preprocessor_config.json is not valid JSON"),
    "images of another size": (
        settings(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        "mixes different checkpoints: the shape of images is "
        r"\(3, 56, 56\), but \(3, 42, 42\) according to config.json",
    ),
    "invalid image size": (settings(size={"shortest": 56}), "settings of the image processor in .* are invalid"),
    "absurd image size": (settings(crop_size=10**6), "crop_size is 1000000; it must be between 1 and 2048"),
    "unknown resampling filter": (settings(resample=77), "settings of the image processor in .* are invalid"),
    "standard deviation 0": (settings(image_std=[0, 1, 1]), "image_std contains a 0"),
    "mean of two channels": (settings(image_mean=[0.5, 0.5]), "settings of the image processor in .* are invalid"),
}


def load_and_run(folder: Path) -> None:
    processor = LlavaProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    model.generate(**processor(text="a circle"), max_new_tokens=1)


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "checkpoint")


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_refused_with_the_reason(name, copy):
    harm, sentence = BROKEN[name]
    harm(copy)
    start = time.perf_counter()
    with pytest.raises((FileNotFoundError, ValueError), match=sentence) as error:
        load_and_run(copy)
    assert type(error.value) in (FileNotFoundError, ValueError)
    assert time.perf_counter() - start < 5


def test_sizes_that_overflow_64_bits_are_refused(copy):
    config(vision_config=dict.fromkeys(("image_size", "patch_size", "hidden_size"), 9 * 10**6))(copy)
    with pytest.raises(ValueError, match=r"cannot be built in torch.float32 on cpu"):
        LlavaForConditionalGeneration.from_pretrained(copy)


def test_every_missing_tensor_is_named(copy):
    (copy / "config.json").write_text(
        (copy / "config.json").read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 4')
    )
    with pytest.raises(ValueError) as error:
        load_and_run(copy)
    missing = re.findall("missing: language_model.model.layers.3", str(error.value))
    assert len(missing) == 9


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["language_model.model.norm.weight", "multi_modal_projector.linear_2.weight"])
def test_nan_and_infinity_in_weights_are_reported_by_name_at_the_first_token(name, value, copy, prompt):
    set_weight(name, value)(copy)
    model = LlavaForConditionalGeneration.from_pretrained(copy)
    with pytest.raises(ValueError, match=f"the weights contain NaN or infinity, in {name}"):
        next(model.generate_stream(**prompt()))


def test_float16_overflow_is_not_blamed_on_the_weights(copy, prompt):
    weights(lambda tensors: {name: tensor * 1000 if "mlp" in name else tensor for name, tensor in tensors.items()})(
        copy
    )
    model = LlavaForConditionalGeneration.from_pretrained(copy, dtype="float16")
    with pytest.raises(ValueError, match=r"although the weights are not: torch.float16 overflows"):
        model.generate(**prompt())


def test_a_hub_cache_with_links_to_its_blobs_is_loaded(copy, tmp_path):
    """In huggingface_hub's layout, a snapshot's files are links to blobs two folders up."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abcd"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(copy.iterdir()):
        shutil.move(path, blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    load_and_run(snapshot)


def test_a_folder_that_is_a_link_is_loaded(copy, tmp_path):
    (tmp_path / "link").symlink_to(copy)
    load_and_run(tmp_path / "link")


def test_a_single_file_takes_precedence_over_leftover_shards(copy):
    (copy / "model-00001-of-00002.safetensors").write_bytes(b"left over")
    load_and_run(copy)


def test_tensor_names_cannot_send_control_characters_to_the_terminal(copy, request):
    weights(lambda tensors: tensors | {"\x1b]0;owned\x07\u202e": torch.zeros(1)})(copy)
    command = [sys.executable, request.config.rootpath / "llava.py", "--model", copy, "Hello"]
    result = subprocess.run(command, capture_output=True, timeout=60, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert result.returncode == 1
    assert b"unexpected: " in result.stderr
    assert b"\x1b" not in result.stderr and b"\x07" not in result.stderr


def test_a_sparse_file_of_a_terabyte_is_refused_without_being_read(copy):
    """The header matches the size of the file, which takes no space on disk."""
    head = json.dumps({"x": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}).encode()
    with open(copy / WEIGHTS, "wb") as out:
        out.write(struct.pack("<Q", len(head)) + head)
        try:
            out.truncate(8 + len(head) + 2**40)
        except OSError:
            pytest.skip("this file system has no sparse files of that size")
    with pytest.raises(ValueError, match=r"unexpected: x|not a complete safetensors file"):
        load_and_run(copy)


@pytest.mark.parametrize("name", ["a/b/c", "../up", "~/x", "/nowhere", ".", "a\nb"])
def test_names_that_cannot_be_on_the_hub_are_not_looked_up_there(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if name == ".":
        assert find_folder(name) == Path(".")
        return
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        find_folder(name)


DTYPES = {
    "unknown dtype": ("float33", "cpu", "cannot be built in float33 on cpu"),
    "integer dtype": ("int8", "cpu", "cannot be built in torch.int8 on cpu"),
    "storage-only dtype": ("float8_e4m3fn", "cpu", "cannot be built in torch.float8_e4m3fn on cpu"),
    "unknown device": ("auto", "gpu", "cannot be built in auto on gpu"),
}


@pytest.mark.parametrize("name", DTYPES)
def test_an_unsupported_dtype_or_device_is_refused(name, checkpoint):
    dtype, device, sentence = DTYPES[name]
    with pytest.raises(ValueError, match=sentence):
        LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype, device=device)
