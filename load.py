"""Weights on disk: the safetensors files of a checkpoint folder become the parameters of a model.

    *.safetensors -> find_tensors -> where each tensor is, under our names -> load_weights -> a model's parameters

The quirks of published checkpoints are dealt with here: the layouts of tensor names, shards, tied embeddings, unused
buffers. (Those of config.json are in extras/config_file.py.) Only headers are read until `load_weights` maps the files.

Sources: the safetensors format; the files of llava-hf/llava-1.5-7b-hf, llava-1.5-13b-hf and bakLlava-v1-hf.
"""

import reprlib
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm

from extras.files import fits, read_json
from extras.machine import keep_freed_memory
from extras.quantize import Int8Linear

# The layouts of tensor names: (prefix in the file, our prefix), replaced in this order. Our names are those that
# transformers 5 writes. The others are its names in memory (lines 1, 2 and 4) and those of the hub (line 3).
PREFIXES = [
    ("model.language_model.", "language_model.model."),
    ("model.", ""),
    ("vision_tower.vision_model.", "vision_tower."),
    ("lm_head.", "language_model.lm_head."),
]
GIT_LFS = b"version https://git-lfs"  # the first bytes of the placeholder that git leaves for a file it has not fetched
HARMLESS = (".position_ids", ".rotary_emb.inv_freq")  # buffers in old checkpoints that can be recomputed
FLOATS = ("F64", "F32", "F16", "BF16")  # other dtypes are quantised weights, which need more than a conversion
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
BIG = 10**9  # bytes from which loading takes long enough for a progress bar


class StoredTensor(NamedTuple):
    """Where a tensor is stored."""

    file: Path
    name: str  # in that file
    shape: tuple[int, ...]
    dtype: str  # in safetensors' notation: "F32"


def our_name(name: str) -> str:
    """Our name of a tensor in any of the layouts."""
    for prefix, ours in PREFIXES:
        if name.startswith(prefix):
            name = ours + name.removeprefix(prefix)
    return name


def find_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those named by the index, else model.safetensors, else all there are.

    A file may be a link only within the folder, or to the blobs of a hub cache: a stranger's folder cannot reach out.
    Raises as `find_tensors` does.
    """
    index_file = folder / "model.safetensors.index.json"
    weight_map = read_json(index_file, missing={"weight_map": {}}).get("weight_map")
    if not isinstance(weight_map, dict) or not fits(weight_map, dict[str, str]):
        raise ValueError(f"{index_file} has no weight_map from tensor names to file names")
    for name in weight_map.values():
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise ValueError(f"{index_file} names {reprlib.repr(name)}, which is not a safetensors file in its folder")
    files = sorted({folder / name for name in weight_map.values()})
    if not files:
        single = folder / "model.safetensors"
        files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if not pickles:
            raise FileNotFoundError(f"{folder} has no weights in safetensors format, the only one that is loaded")
        raise ValueError(
            f"{folder} stores its weights as pickles ({', '.join(pickles)}). Loading a pickle can run any code that "
            "its author put in, so pickles are refused. Use a safetensors version of the checkpoint or, if you trust "
            "the author, convert it with transformers: from_pretrained, then save_pretrained"
        )
    homes = (folder.resolve(), folder.resolve().parent.parent / "blobs")
    for file in files:
        if not any(file.resolve().is_relative_to(home) for home in homes):
            raise ValueError(f"{file} is a link to {file.resolve()}, outside its folder: put the file itself there")
        if not file.is_file():
            raise FileNotFoundError(f"{folder} lacks {file.name}: finish the download")
    return files


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Reads the headers of a folder's weights: our name -> where that tensor is stored.

    Raises:
        FileNotFoundError: there are no weights, or a shard is missing.
        ValueError: a file is damaged or outside the folder, a tensor is stored twice, or the weights are pickles.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in find_files(folder):
        try:
            with safe_open(file, "pt") as opened:  # refuses headers that do not match the size of the file
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    if not name.endswith(HARMLESS):
                        part = opened.get_slice(name)
                        found = StoredTensor(file, name, tuple(part.get_shape()), part.get_dtype())
                        before = tensors.setdefault(our_name(name), found)
                        if before is not found:
                            raise ValueError(
                                f"{before.name} in {before.file} and {name} in {file.name} are the same tensor"
                            )
        except (SafetensorError, OSError, RuntimeError) as error:  # the last is PyTorch's, when it maps the file
            with open(file, "rb") as content:
                if content.read(len(GIT_LFS)) == GIT_LFS:
                    raise ValueError(f"{file} is a git-lfs pointer, not the file itself: run git lfs pull") from None
            raise ValueError(f"{file} is not a complete safetensors file: {error}; download it again") from error
    return tensors


def stored_tensors(model: nn.Module, folder: Path) -> dict[str, StoredTensor]:
    """What `find_tensors` finds, if it matches the model.

    Raises a ValueError that names every tensor that is missing, unexpected, or of the wrong shape or dtype.
    """
    stored = find_tensors(folder)
    wanted = dict(model.named_parameters())  # a tied parameter appears under its first name only
    aliases = dict(model.named_parameters(remove_duplicate=False)).keys() - wanted.keys()
    problems = [f"missing: {name}" for name in wanted.keys() - stored.keys()]
    problems += [f"unexpected: {name}" for name in stored.keys() - wanted.keys() - aliases]
    problems += [
        f"wrong shape: {name} is {stored[name].shape}, but {tuple(wanted[name].shape)} according to config.json"
        for name in wanted.keys() & stored.keys()
        if stored[name].shape != tuple(wanted[name].shape)
    ]
    problems += [
        f"wrong dtype: {name} is {tensor.dtype}, but only {', '.join(FLOATS)} are supported (not quantised weights)"
        for name, tensor in stored.items()
        if tensor.dtype not in FLOATS
    ]
    if problems:
        raise ValueError("\n  ".join([f"the weights in {folder} do not match its config.json:", *sorted(problems)]))
    return stored


def load_weights(model: nn.Module, folder: Path, device: torch.device) -> None:
    """Loads the weights into a model that was built on the meta device, in that model's dtypes, one tensor at a time.

    Files are mapped, not read: on a CPU, a tensor that already has the right dtype stays in the mapping, and any other
    is converted on its own. The file is opened once per tensor, because the memory of pages that were read through a
    mapping is freed only when the mapping ends. So the weights are never in memory twice.

    Raises a ValueError as `stored_tensors` does.
    """
    stored = stored_tensors(model, folder)
    wanted = dict(model.named_parameters())
    total = sum(file.stat().st_size for file in {stored[name].file for name in wanted})
    quiet = True if total < BIG else None  # None: tqdm shows the bar on a terminal only
    with tqdm(total=total, desc="loading", unit="B", unit_scale=True, leave=False, disable=quiet) as progress:
        for name in wanted:
            path, _, attribute = name.rpartition(".")
            module = model.get_submodule(path)
            with safe_open(stored[name].file, "pt") as opened:
                tensor = opened.get_tensor(stored[name].name)
                progress.update(tensor.nbytes)
                if isinstance(module, Int8Linear) and attribute == "weight":
                    module.load_weight(tensor.to(device))
                else:
                    setattr(module, attribute, nn.Parameter(tensor.to(device=device, dtype=wanted[name].dtype)))
                del tensor  # or its mapping would outlive the file
    if device.type == "cpu":
        keep_freed_memory()


def weight_bytes(model: nn.Module) -> int:
    """The bytes of all parameters and buffers; a tied parameter counts once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
