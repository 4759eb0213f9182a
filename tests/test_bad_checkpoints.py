"""A checkpoint that is damaged, incomplete, mixed up or hostile is refused with a sentence that says what is wrong."""

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

from llava import LlavaForConditionalGeneration, LlavaProcessor
from load import find_folder

WEIGHTS = "model.safetensors"
GIT_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"


def config(**changes):
    """Changes config.json; `text_config` and `vision_config` are changed field by field, and None takes a field out."""

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
    """An index that maps one tensor to each of these files; the weights lie in w.safetensors."""

    def harm(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "w.safetensors")
        weight_map = {f"tensor {i}": name for i, name in enumerate(names)}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return harm


def weights(change, name: str = WEIGHTS):
    """Changes the dict of tensors in the file."""

    def harm(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        save_file(change(tensors), folder / name)

    return harm


def header(change, *, text: bytes | None = None, length: int | None = None):
    """Changes the header of the file: as an object, as text, or the length that is given for it."""

    def harm(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        new = json.loads(content[8 : 8 + size])
        change(new)
        new = json.dumps(new).encode() if text is None else text
        data = struct.pack("<Q", len(new) if length is None else length) + new + content[8 + size :]
        (folder / WEIGHTS).write_bytes(data)

    return harm


def first(change):
    """Changes the entry of one tensor in the header."""
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


NO_INDEX_FILE = "which is no safetensors file in its own folder"
NOT_COMPLETE = "model.safetensors is not a complete safetensors file"
BROKEN = {
    # the folder
    "missing": (shutil.rmtree, "there is no folder"),
    "empty": (lambda folder: [path.unlink() for path in folder.iterdir()], "has no config.json"),
    "a file": (lambda folder: (shutil.rmtree(folder), folder.write_text("")), "is a file; the folder that it lies in"),
    # config.json
    "no config": (remove("config.json"), "has no config.json"),
    "config empty": (file("config.json", ""), "config.json is not valid JSON"),
    "config no JSON": (file("config.json", "{"), "config.json is not valid JSON.*download complete"),
    "config binary": (file("config.json", b"\xff\xfe\0"), "config.json is not valid JSON"),
    "config a list": (file("config.json", "[]"), "config.json holds a list where an object was expected"),
    "config deeper than Python goes": (file("config.json", "[" * 100_000), "config.json is not valid JSON"),
    "llava_next": (config(model_type="llava_next"), "model type 'llava_next'; only 'llava' is supported"),
    "qwen2_vl": (config(model_type="qwen2_vl"), "model type 'qwen2_vl'; only 'llava' is supported"),
    "plain llama": (config(model_type="llama"), "model type 'llama'; only 'llava' is supported"),
    "no model type": (config(model_type=None), "model type None; only 'llava' is supported"),
    "another decoder": (config(text_config={"model_type": "qwen2"}), "text model 'qwen2' is not supported"),
    "another vision tower": (config(vision_config={"model_type": "siglip"}), "vision model 'siglip' is not supported"),
    "text_config a list": (
        file("config.json", '{"model_type": "llava", "text_config": [1]}'),
        "text_config is not an obj",
    ),
    "a text for a number": (config(text_config={"hidden_size": "64"}), "hidden_size is '64', .*not of the type"),
    "a number for a text": (config(projector_hidden_act=3), "projector_hidden_act is 3, which is not of the type"),
    "true for a number": (config(text_config={"vocab_size": True}), "vocab_size is True, which is not of the type"),
    "a fraction for a size": (config(text_config={"hidden_size": 64.5}), "hidden_size is 64.5, which is not of the"),
    "no end of sequence": (
        file("generation_config.json", '{"eos_token_id": "x"}'),
        "eos_token_id is .*, which is not of the type",
    ),
    "NaN": (
        file("config.json", '{"model_type": "llava", "text_config": {"rms_norm_eps": NaN}}'),
        "rms_norm_eps is nan",
    ),
    "negative": (config(text_config={"intermediate_size": -160}), "intermediate_size is -160; it must be at least 1"),
    "zero": (config(vision_config={"patch_size": 0}), "patch_size is 0; it must be at least 1"),
    "absurd": (
        config(text_config={"hidden_size": 10**12}),
        "hidden_size is 1000000000000; it must be at least 1 and at most",
    ),
    "absurd but possible": (config(text_config={"hidden_size": 4 * 10**6}), "wrong shape: .*(64|160)"),
    "absurdly deep": (config(text_config={"num_hidden_layers": 10**9}), "num_hidden_layers is 1000000000; it must be"),
    "heads that do not divide": (
        config(text_config={"num_attention_heads": 3, "head_dim": None}),
        "cannot be cut into 3",
    ),
    "vision heads that do not divide": (config(vision_config={"num_attention_heads": 5}), "vision heads that divide"),
    "key heads that do not divide": (config(text_config={"num_key_value_heads": 3}), "num_key_value_heads that divide"),
    "odd heads": (config(text_config={"head_dim": 15}), "an even head_dim"),
    "grey images": (config(vision_config={"num_channels": 1}), "3 num_channels"),
    "a layer too many": (config(vision_feature_layer=5), "a vision_feature_layer out of 4"),
    "no layers": (config(vision_feature_layer=[]), "a vision_feature_layer out of 4"),
    "another strategy": (config(vision_feature_select_strategy="all"), "a select_strategy that is default or full"),
    "another activation": (config(text_config={"hidden_act": "swish2"}), "activations out of quick_gelu"),
    "patches larger than images": (config(vision_config={"patch_size": 64}), "more than the 0 tokens of an image"),
    "images larger than the context": (
        config(vision_config={"patch_size": 1}),
        "more than the 1764 tokens of an image",
    ),
    "another RoPE": (config(text_config={"rope_parameters": {"rope_type": "yarn"}}), "RoPE of type 'yarn' is not"),
    "another RoPE, spelled as before": (
        config(text_config={"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2}}),
        "RoPE of type 'dynamic' is not supported, only default, linear, llama3",
    ),
    "RoPE of a number beyond all": (
        config(text_config={"rope_parameters": {"rope_theta": 10**30}}),
        "rope_theta of RoPE is 1000",
    ),
    "RoPE of no numbers": (
        config(text_config={"rope_parameters": {"rope_type": "linear", "factor": "2"}}),
        "the factor of RoPE is '2'",
    ),
    # The index
    "index no JSON": (file(f"{WEIGHTS}.index.json", "{"), "index.json is not valid JSON"),
    "index without a map": (file(f"{WEIGHTS}.index.json", "{}"), "index.json has no weight_map of tensor names"),
    "index of numbers": (index(3), "index.json has no weight_map of tensor names"),
    "index with an absent shard": (index("w.safetensors", "gone.safetensors"), "lacks gone.safetensors: finish"),
    "index that climbs out": (index("../w.safetensors"), rf"names '\.\./w.safetensors', {NO_INDEX_FILE}"),
    "index with an absolute path": (index("/etc/passwd"), f"names '/etc/passwd', {NO_INDEX_FILE}"),
    "index into another folder": (index("a/w.safetensors"), f"names 'a/w.safetensors', {NO_INDEX_FILE}"),
    "index naming no safetensors": (index("config.json"), f"names 'config.json', {NO_INDEX_FILE}"),
    "a link out of the folder": (link_out, "is a link to .*elsewhere.safetensors, out of its folder"),
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
    "bytes to spare": (header(lambda new: None, text=b"{}"), NOT_COMPLETE),
    "git-lfs": (file(WEIGHTS, GIT_LFS), "model.safetensors is a git-lfs pointer and not the file itself: run git lfs"),
    "header too long": (header(lambda new: None, length=2**60), NOT_COMPLETE),
    "header too short": (header(lambda new: None, length=100), NOT_COMPLETE),
    "header no JSON": (header(lambda new: None, text=b"{" * 99), NOT_COMPLETE),
    "offsets beyond the end": (first({"data_offsets": [0, 10**9]}), NOT_COMPLETE),
    "offsets that overlap": (first({"data_offsets": [4, 114_692]}), NOT_COMPLETE),
    "offsets backwards": (first({"data_offsets": [114_688, 0]}), NOT_COMPLETE),
    "terabytes": (first({"shape": [2**22, 2**20], "data_offsets": [0, 2**44]}), NOT_COMPLETE),
    "more bytes than there are numbers": (first({"shape": [2**40, 2**40]}), NOT_COMPLETE),
    "no such dtype": (first({"dtype": "F33"}), NOT_COMPLETE),
    "whole numbers": (first({"dtype": "I32"}), r"wrong dtype: language_model.lm_head.weight is I32, but only F64"),
    "quantised": (
        weights(lambda tensors: {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}),
        "wrong dtype: .* is F8_E4M3, but only .*not quantised weights",
    ),
    "twice in two layouts": (
        weights(lambda tensors: tensors | {"lm_head.weight": torch.zeros(448, 64)}),
        "has .*lm_head.weight, and model.safetensors has .*lm_head.weight as well",
    ),
    "twice in two files": (
        lambda folder: (
            shutil.copy(folder / WEIGHTS, folder / "b.safetensors"),
            (folder / WEIGHTS).rename(folder / "a.safetensors"),
        ),
        "a.safetensors has .*, and b.safetensors has .* as well",
    ),
    # The tokenizer
    "no tokenizer.model": (remove("tokenizer.model"), "has no tokenizer.model: copy it from the original checkpoint"),
    "tokenizer.model git-lfs": (file("tokenizer.model", GIT_LFS), "tokenizer.model is a git-lfs pointer"),
    "tokenizer.model empty": (cut("tokenizer.model", 0), "tokenizer.model is not a SentencePiece model"),
    "tokenizer.model cut": (
        cut("tokenizer.model", 3000),
        "tokenizer.model is not a SentencePiece model|cannot have the id",
    ),
    "no image token": (file("added_tokens.json", "{}"), "has no token <image>"),
    "added tokens no JSON": (file("added_tokens.json", "{"), "added_tokens.json is not valid JSON"),
    "added tokens a list": (file("added_tokens.json", "[1]"), "added_tokens.json holds a list"),
    "added tokens are texts": (added(box="7"), "added tokens of .* are not texts with ids"),
    "an added token in place of a piece": (added(box=300), "added token <box> of .* cannot have the id 300, for it is"),
    "an added token twice": (added(box=420), "cannot have the id 420, for it is <"),
    "an added token beyond the next": (added(box=425), "<box> of .* cannot have the id 425, for 422 is the next one"),
    "a negative id": (added(box=-1), "<box> of .* cannot have the id -1"),
    "added tokens beyond the weights": (
        added(**{f"box{i}": 422 + i for i in range(30)}),
        "mixes different checkpoints: the last id of the tokenizer is 451, but 447 by config.json",
    ),
    "another image token": (
        config(image_token_index=421),
        "mixes .*: the id of <image> is 420, but 421 by config.json",
    ),
    "tokenizer settings that are none": (
        file("tokenizer_config.json", '{"added_tokens_decoder": {"420": "<image>"}}'),
        "tokenizer_config.json has tokens that are not as they should be",
    ),
    # The image processor
    "no preprocessor": (remove("preprocessor_config.json"), "has no preprocessor_config.json"),
    "preprocessor no JSON": (file("preprocessor_config.json", "x"), "preprocessor_config.json is not valid JSON"),
    "images of another size": (
        settings(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        r"mixes different checkpoints: the shape of images is \(3, 56, 56\), but \(3, 42, 42\) by config.json",
    ),
    "images of a size that is no size": (settings(size={"shortest": 56}), "image processor of .* cannot work"),
    "images of an absurd size": (
        settings(crop_size=10**6),
        "crop_size is 1000000; it must be at least 1 and at most 2048",
    ),
    "no such filter": (settings(resample=77), "image processor of .* cannot work with its settings"),
    "a deviation of zero": (settings(image_std=[0, 1, 1]), "image_std has a 0"),
    "two channels": (settings(image_mean=[0.5, 0.5]), "image processor of .* cannot work with its settings"),
}


def use(folder: Path) -> None:
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
        use(copy)
    assert type(error.value) in (FileNotFoundError, ValueError)
    assert time.perf_counter() - start < 5


def test_sizes_that_no_number_of_bytes_can_hold_are_refused(copy):
    config(vision_config=dict.fromkeys(("image_size", "patch_size", "hidden_size"), 9 * 10**6))(copy)
    with pytest.raises(ValueError, match=r"cannot be made in torch.float32 on cpu"):
        LlavaForConditionalGeneration.from_pretrained(copy)


def test_all_tensors_that_do_not_fit_are_named(copy):
    (copy / "config.json").write_text(
        (copy / "config.json").read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 4')
    )
    with pytest.raises(ValueError) as error:
        use(copy)
    missing = re.findall("missing: language_model.model.layers.3", str(error.value))
    assert len(missing) == 9


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["language_model.model.norm.weight", "multi_modal_projector.linear_2.weight"])
def test_weights_that_are_no_numbers_are_noticed_at_the_first_token_and_named(name, value, copy, prompt):
    set_weight(name, value)(copy)
    model = LlavaForConditionalGeneration.from_pretrained(copy)
    with pytest.raises(ValueError, match=f"the weights hold NaN or infinity, in {name}"):
        next(model.generate_stream(**prompt()))


def test_a_dtype_that_is_too_narrow_is_not_blamed_on_the_weights(copy, prompt):
    weights(lambda tensors: {name: tensor * 1000 if "mlp" in name else tensor for name, tensor in tensors.items()})(
        copy
    )
    model = LlavaForConditionalGeneration.from_pretrained(copy, dtype="float16")
    with pytest.raises(ValueError, match=r"though the weights are not: torch.float16 is too narrow"):
        model.generate(**prompt())


def test_a_hub_cache_with_its_links_is_loaded(copy, tmp_path):
    """The layout of huggingface_hub: the files of a snapshot are links to blobs, two folders up."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abcd"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(copy.iterdir()):
        shutil.move(path, blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    use(snapshot)


def test_a_folder_that_is_a_link_is_loaded(copy, tmp_path):
    (tmp_path / "link").symlink_to(copy)
    use(tmp_path / "link")


def test_one_file_is_taken_before_the_rest_of_other_ones(copy):
    (copy / "model-00001-of-00002.safetensors").write_bytes(b"left over")
    use(copy)


def test_names_of_tensors_cannot_talk_to_the_terminal(copy, request):
    weights(lambda tensors: tensors | {"\x1b]0;owned\x07\u202e": torch.zeros(1)})(copy)
    command = [sys.executable, request.config.rootpath / "llava.py", "--model", copy, "Hello"]
    result = subprocess.run(command, capture_output=True, timeout=60, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert result.returncode == 1
    assert b"unexpected: " in result.stderr
    assert b"\x1b" not in result.stderr and b"\x07" not in result.stderr


def test_a_sparse_file_of_terabytes_takes_neither_time_nor_memory(copy):
    """The header agrees with the size of the file, which takes no room on the disk."""
    head = json.dumps({"x": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}).encode()
    with open(copy / WEIGHTS, "wb") as out:
        out.write(struct.pack("<Q", len(head)) + head)
        try:
            out.truncate(8 + len(head) + 2**40)
        except OSError:
            pytest.skip("this file system has no such files")
    with pytest.raises(ValueError, match=r"unexpected: x|not a complete safetensors file"):
        use(copy)


@pytest.mark.parametrize("name", ["a/b/c", "../up", "~/x", "/nowhere", ".", "a\nb"])
def test_what_is_no_hub_name_is_not_asked_for_at_the_hub(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if name == ".":
        assert find_folder(name) == Path(".")
        return
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        find_folder(name)


DTYPES = {
    "no such": ("float33", "cpu", "cannot be made in float33 on cpu"),
    "whole numbers": ("int8", "cpu", "cannot be made in torch.int8 on cpu"),
    "not computed with": ("float8_e4m3fn", "cpu", "cannot be made in torch.float8_e4m3fn on cpu"),
    "no such device": ("auto", "gpu", "cannot be made in auto on gpu"),
}


@pytest.mark.parametrize("name", DTYPES)
def test_a_dtype_or_device_that_cannot_be_is_refused(name, checkpoint):
    dtype, device, sentence = DTYPES[name]
    with pytest.raises(ValueError, match=sentence):
        LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype, device=device)
