"""Weights: a checkpoint folder in Hugging Face format to a model in memory, and back.

    config.json                  -> read_config  -> dict in today's spelling, with transformers' defaults
    *.safetensors                -> load_weights -> the parameters of a model that was built without memory
    a model that was trained     -> save_weights -> a folder that transformers loads

Every quirk of the published checkpoints is dealt with in this file: the spellings of config.json, the three layouts of
tensor names, shards, tied embeddings. The rest of the project only knows today's names.

Sources: transformers' config classes for the defaults, the files of llava-hf/llava-1.5-7b-hf, llava-1.5-13b-hf and
bakLlava-v1-hf for the quirks, the safetensors format for what a header says.
"""

import ctypes
import json
import os
import reprlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from check import fits, read_json

# What transformers takes for a field that config.json leaves out, where it depends on more than the field itself.
# A vision_config that is there but sparse gets the defaults of CLIPVisionConfig (ViT-B/32) instead of these.
VISION_DEFAULTS = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
TEXT_DEFAULTS = {
    "llama": {},
    "mistral": {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
}
ROPE_NUMBERS = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_TYPES = {"default": 1, "linear": 2, "llama3": 5}  # how many of these numbers each of them needs
# The layouts of tensor names: (prefix in the file, our prefix), to be replaced in this order. Our names are those that
# transformers 5 writes. The others are its names in memory (lines 1, 2 and 4) and those of the hub (line 3).
PREFIXES = [
    ("model.language_model.", "language_model.model."),
    ("model.", ""),
    ("vision_tower.vision_model.", "vision_tower."),
    ("lm_head.", "language_model.lm_head."),
]
GIT_LFS = b"version https://git-lfs"  # how the file begins that git leaves in the place of one that was not fetched
HARMLESS = (".position_ids", ".rotary_emb.inv_freq")  # buffers that old checkpoints carry and nobody needs
FLOATS = ("F64", "F32", "F16", "BF16")  # other dtypes are quantised weights, which need more than a conversion
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
SHARD_BYTES = 5 * 10**9  # the largest file that saving writes
BIG = 10**9  # bytes of files that take long enough to load for a progress bar
# Everything of a folder but its weights and their config: what belongs to the tokenizer and the image processor.
PROCESSOR_FILES = ["tokenizer.model", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"]
PROCESSOR_FILES += ["special_tokens_map.json", "preprocessor_config.json", "processor_config.json"]
PROCESSOR_FILES += ["chat_template.json", "chat_template.jinja"]


def find_folder(name: str | Path) -> Path:
    """The folder called `name`, or the fetched copy of the hub repository of that name; else a FileNotFoundError."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FileNotFoundError(f"{name} is a file; the folder that it lies in is wanted")
    if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise FileNotFoundError(f"there is no folder {name}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(
            f"there is no folder {name}; to fetch the repository of that name from the Hugging Face hub, "
            "run: pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors", "tokenizer.model"]))
    except Exception as error:  # network, authorisation, no such repository, disk full: the library has dozens of kinds
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise FileNotFoundError(f"{name} is no folder and could not be fetched from the hub: {reason}") from error


# config.json


def read_config(folder: Path) -> dict:
    """Reads config.json and generation_config.json into one dict in the spelling of today's transformers.

    The published files are sparse and of several ages: `image_token_index` for `image_token_id`, `torch_dtype` for
    `dtype`, `rope_theta` and `rope_scaling` for `rope_parameters`. What is still left out gets its default from the
    dataclasses that take this dict. `eos_token_id`, a list, comes from generation_config.json, config.json or is [2].

    Raises a FileNotFoundError if there is no config.json, a ValueError if it is damaged or of another kind of model.
    """
    raw = read_json(folder / "config.json")
    generation = read_json(folder / "generation_config.json", missing={})
    if raw.get("model_type") != "llava":
        raise ValueError(
            f"{folder / 'config.json'} is of model type {raw.get('model_type')!r}; only 'llava' is supported "
            "(LLaVA-1.5, BakLLaVA and their fine-tunes in Hugging Face format)"
        )
    for name in ("text_config", "vision_config"):
        if not isinstance(raw.get(name), dict | None):
            raise ValueError(f"{folder / 'config.json'}: {name} is not an object")
    text = raw.get("text_config") or {}
    text_type = str(text.get("model_type", "llama"))
    if text_type not in TEXT_DEFAULTS:
        raise ValueError(f"{folder / 'config.json'}: the text model {text_type!r} is not supported")
    vision = raw.get("vision_config") or VISION_DEFAULTS
    vision_type = vision.get("model_type", "clip_vision_model")
    if vision_type != "clip_vision_model":
        raise ValueError(f"{folder / 'config.json'}: the vision model {vision_type!r} is not supported")

    def first(key: str, default: object) -> object:
        """A token id from the first of the places that may hold it."""
        found = (place[key] for place in (generation, raw, text) if place.get(key) is not None)
        return next(found, default)

    eos = first("eos_token_id", 2)
    eos = (eos if isinstance(eos, list) else [eos]) or [2]
    return {
        **raw,
        "image_token_id": raw.get("image_token_id", raw.get("image_token_index", 32000)),
        "dtype": raw.get("dtype") or raw.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype"),
        "eos_token_id": eos,
        "pad_token_id": first("pad_token_id", eos[0]),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        "vision_config": vision,
        "text_config": TEXT_DEFAULTS[text_type] | text | {"rope_parameters": _rope_parameters(text)},
    }


def _rope_parameters(text: dict) -> dict:
    """RoPE's settings as one dict, from the new spelling or the old: rope_theta and rope_scaling.

    Raises a ValueError for a kind of RoPE that would give wrong logits here.
    """
    old, new = text.get("rope_scaling") or {}, text.get("rope_parameters") or {}
    if not isinstance(old, dict) or not isinstance(new, dict):
        raise ValueError("config.json: rope_scaling or rope_parameters is not an object")
    rope = {"rope_theta": text.get("rope_theta") or 10000.0, **old, **new}
    rope["rope_type"] = str(rope.pop("type", None) or rope.get("rope_type") or "default")
    if rope["rope_type"] not in ROPE_TYPES:
        raise ValueError(f"RoPE of type {rope['rope_type']!r} is not supported, only {', '.join(ROPE_TYPES)}")
    for name in ROPE_NUMBERS[: ROPE_TYPES[rope["rope_type"]]]:
        if not (fits(rope.get(name), float) and rope[name] > 0):
            raise ValueError(f"config.json: the {name} of RoPE is {rope.get(name)!r}, where a number above 0 is needed")
    return rope


# *.safetensors


class StoredTensor(NamedTuple):
    """Where a tensor lies."""

    file: Path
    name: str  # in that file
    shape: tuple[int, ...]
    dtype: str  # as safetensors calls it: "F32"


def our_name(name: str) -> str:
    """The name here of a tensor in any of the three layouts."""
    for prefix, ours in PREFIXES:
        if name.startswith(prefix):
            name = ours + name.removeprefix(prefix)
    return name


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Reads the headers of a folder's weights: our name -> where that tensor lies.

    The files are those that the index names, or else model.safetensors, or else all there are. A file may be a link
    only within the folder, or to the blobs beside the snapshots of a hub cache: strangers' folders stay in themselves.

    Raises a FileNotFoundError if there are no weights or a shard is missing, and a ValueError if a file is damaged,
    is elsewhere, has what another one has, or if the weights are pickles, which can run code.
    """
    index_file = folder / "model.safetensors.index.json"
    weight_map = read_json(index_file, missing={"weight_map": {}}).get("weight_map")
    if not fits(weight_map, dict[str, str]):
        raise ValueError(f"{index_file} has no weight_map of tensor names to file names")
    for name in weight_map.values():
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise ValueError(f"{index_file} names {reprlib.repr(name)}, which is no safetensors file in its own folder")
    files = sorted({folder / name for name in weight_map.values()})
    if not files:
        single = folder / "model.safetensors"
        files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if not pickles:
            raise FileNotFoundError(f"{folder} has no weights in safetensors format, which are the only ones loaded")
        raise ValueError(
            f"{folder} has its weights as pickles ({', '.join(pickles)}). Loading a pickle can run any code that its "
            "author put in, so they are refused. Take a safetensors version of the checkpoint or, if you trust the "
            "author, make one with transformers: from_pretrained, then save_pretrained"
        )
    tensors: dict[str, StoredTensor] = {}
    homes = (folder.resolve(), folder.resolve().parent.parent / "blobs")
    for file in files:
        if not any(file.resolve().is_relative_to(home) for home in homes):
            raise ValueError(f"{file} is a link to {file.resolve()}, out of its folder: put the file itself there")
        if not file.is_file():
            raise FileNotFoundError(f"{folder} lacks {file.name}: finish the download")
        try:
            with safe_open(file, "pt") as opened:  # which refuses headers that do not fit the size of the file
                for name in opened.keys():  # noqa: SIM118 - it is no dict
                    if not name.endswith(HARMLESS):
                        part = opened.get_slice(name)
                        found = StoredTensor(file, name, tuple(part.get_shape()), part.get_dtype())
                        before = tensors.setdefault(our_name(name), found)
                        if before is not found:
                            raise ValueError(f"{before.file} has {before.name}, and {file.name} has {name} as well")
        except (SafetensorError, OSError, RuntimeError) as error:  # the last is PyTorch's, when it maps the file
            with open(file, "rb") as content:
                if content.read(len(GIT_LFS)) == GIT_LFS:
                    raise ValueError(f"{file} is a git-lfs pointer and not the file itself: run git lfs pull") from None
            raise ValueError(f"{file} is not a complete safetensors file: {error}; download it again") from error
    return tensors


def stored_tensors(model: nn.Module, folder: Path) -> dict[str, StoredTensor]:
    """What `find_tensors` finds, if it is what the model needs.

    Raises a ValueError that names every tensor that is missing, unexpected or of the wrong shape or dtype.
    """
    stored = find_tensors(folder)
    wanted = dict(model.named_parameters())  # a tied parameter under its first name only
    aliases = dict(model.named_parameters(remove_duplicate=False)).keys() - wanted.keys()
    problems = [f"missing: {name}" for name in wanted.keys() - stored.keys()]
    problems += [f"unexpected: {name}" for name in stored.keys() - wanted.keys() - aliases]
    problems += [
        f"wrong shape: {name} is {stored[name].shape}, but {tuple(wanted[name].shape)} by config.json"
        for name in wanted.keys() & stored.keys()
        if stored[name].shape != tuple(wanted[name].shape)
    ]
    problems += [
        f"wrong dtype: {name} is {tensor.dtype}, but only {', '.join(FLOATS)} are supported (not quantised weights)"
        for name, tensor in stored.items()
        if tensor.dtype not in FLOATS
    ]
    if problems:
        raise ValueError("\n  ".join([f"the weights in {folder} do not fit its config.json:", *sorted(problems)]))
    return stored


def weight_bytes(model: nn.Module) -> int:
    """What the weights of a model take in memory, or will take if it is on the meta device."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def load_weights(model: nn.Module, folder: Path, device: torch.device) -> None:
    """Loads the weights into a model that was built on the meta device, in its dtypes, one tensor at a time.

    A file is mapped, not read: on a CPU, a tensor of the right dtype stays where the mapping shows it, and any other is
    converted on its own. The file is opened anew for each, because pages that were read through a mapping are given
    back only when the mapping ends. So memory never holds the weights twice.

    Raises a ValueError that names every tensor that is missing, unexpected or of the wrong shape or dtype.
    """
    stored = stored_tensors(model, folder)
    wanted = dict(model.named_parameters())  # a tied parameter under its first name only
    total = sum(file.stat().st_size for file in {stored[name].file for name in wanted})
    quiet = True if total < BIG else None  # None: tqdm shows the bar on a terminal only
    with tqdm(total=total, desc="loading", unit="B", unit_scale=True, leave=False, disable=quiet) as progress:
        for name in wanted:
            path, _, attribute = name.rpartition(".")
            module = model.get_submodule(path)
            with safe_open(stored[name].file, "pt") as opened:
                tensor = opened.get_tensor(stored[name].name)
                progress.update(tensor.nbytes)
                if wanted[name].dtype == torch.int8:
                    module.load_weight(tensor.to(device))
                else:
                    setattr(module, attribute, nn.Parameter(tensor.to(device=device, dtype=wanted[name].dtype)))
                del tensor  # or its mapping would outlive the file
    if device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Lets glibc keep freed blocks, such as a layer's results, for the next layer.

    Otherwise it gives them back to Linux, which makes their pages anew, full of zeros: a tenth of the time of a prompt
    (600 tokens, 1 B parameters). It holds for the whole process, which may keep half a gigabyte more.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # other C libraries have none
        libc.mallopt(-1, 2**29)  # M_TRIM_THRESHOLD of malloc.h: so much may stay free at the end of the heap
        libc.mallopt(-2, 2**28)  # M_TOP_PAD: by so much more than it needs the heap grows
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: blocks above 32 MiB are mostly given back at once


def save_weights(model: nn.Module, folder: Path, config: dict, generation_config: dict) -> None:
    """Writes weights and configs under the names of the hub's checkpoints, which every LLaVA loader knows.

    Weights beyond 5 GB go into several shards. A file gets its final name when it is complete, so a model can be saved
    over the very files that its weights are mapped from. Shards never take the names that the index in the folder has
    in use: until the new index is there, all at once, the folder holds the model that it held before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / "model.safetensors.index.json"
    stem = "model-b" if index.is_file() and b'"model-0' in index.read_bytes() else "model"
    shards: list[list[str]] = [[]]
    parameters, filled, total = dict(model.named_parameters()), 0, 0
    for name, parameter in parameters.items():
        if filled + parameter.nbytes > SHARD_BYTES:
            shards, filled = [*shards, []], 0
        shards[-1].append(name)
        filled, total = filled + parameter.nbytes, total + parameter.nbytes
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {
            name.replace("vision_tower.", "vision_tower.vision_model.", 1): _stored(model, name) for name in names
        }
        write_whole(folder / file, lambda part, tensors=tensors: save_file(tensors, part, {"format": "pt"}))
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
    else:
        index.unlink(missing_ok=True)
    ours = ("model.safetensors", "model-?????-of-?????.safetensors", "model-b-?????-of-?????.safetensors")
    for old in [path for pattern in ours for path in folder.glob(pattern)]:
        if old.name not in weight_map.values():
            old.unlink(missing_ok=True)  # left by an earlier save with another number of shards
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation_config)


def _stored(model: nn.Module, name: str) -> Tensor:
    """A parameter as it is written to a file; weights of one byte as the numbers that they stand for."""
    parameter = model.get_parameter(name).detach()
    if parameter.dtype == torch.int8:
        parameter = model.get_submodule(name.rpartition(".")[0]).dequantized()
    return parameter.cpu().contiguous()


def write_json(path: Path, value: dict) -> None:
    """Writes an object to a JSON file."""
    write_whole(path, lambda part: part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8"))


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` write a file beside this one and puts it in its place when it is complete and on the disk.

    Raises an OSError that says why that failed; whatever was there before still is.
    """
    part = file.with_name(f"{file.name}.part")
    try:
        write(part)
        with open(part, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(part, file)
    except (SafetensorError, OSError) as error:
        part.unlink(missing_ok=True)
        raise OSError(f"{file} could not be written: {getattr(error, 'strerror', None) or error}") from error


def copy_processor_files(source: Path, target: Path) -> None:
    """Copies what belongs to tokenizer and image processor from one checkpoint folder to another."""
    target.mkdir(parents=True, exist_ok=True)
    for name in PROCESSOR_FILES:
        if (source / name).is_file() and source.resolve() != target.resolve():
            shutil.copyfile(source / name, target / name)
