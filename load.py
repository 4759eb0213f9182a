"""Weights on disk: the safetensors files of a checkpoint folder become the parameters of a model.

    *.safetensors -> find_tensors -> where each tensor is, under our names -> load_weights -> a model's parameters

The quirks of published checkpoints are dealt with here: the layouts of tensor names, shards, tied embeddings, unused
buffers. (Those of config.json are in extras/config_file.py.) Only headers are read until `load_weights` maps the files.

Sources: the safetensors format; the files of llava-hf/llava-1.5-7b-hf, llava-1.5-13b-hf and bakLlava-v1-hf.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from extras.machine import keep_freed_memory
from extras.quantize import CompactLinear, pack, refuse_nan
from extras.weight_files import find_files

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
FLOATS = ["F64", "F32", "F16", "BF16"]
SHOWN = 20  # of the tensors that do not match a config.json
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

    Raises a ValueError that names tensors that are missing, unexpected, or of the wrong shape or dtype.
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
    for name, tensor in stored.items():
        codes = name in wanted and wanted[name].dtype == torch.uint8
        if tensor.dtype not in (["U8"] if codes else FLOATS):
            allowed = "U8 is supported" if codes else f"{', '.join(FLOATS)} are supported (not quantised weights)"
            problems.append(f"wrong dtype: {name} is {tensor.dtype}, but only {allowed}")
    if problems:
        shown = [*sorted(problems)[:SHOWN], *[f"and {len(problems) - SHOWN} more"][: len(problems) > SHOWN]]
        raise ValueError("\n  ".join([f"the weights in {folder} do not match its config.json:", *shown]))
    return stored


def read_tensor(stored: StoredTensor) -> Tensor:
    """A tensor in the mapping of its file. The file is opened for it alone, because the memory of pages that were read
    through a mapping is freed only when the mapping ends, with its last tensor."""
    with safe_open(stored.file, "pt") as opened:
        return opened.get_tensor(stored.name)


def assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replaces the parameter of this name."""
    path, _, attribute = name.rpartition(".")
    trained = model.get_parameter(name).requires_grad
    setattr(model.get_submodule(path), attribute, nn.Parameter(tensor, requires_grad=trained))


def load_weights(model: nn.Module, folder: Path, device: torch.device) -> None:
    """Loads the weights into a model that was built on the meta device, in that model's dtypes, one tensor at a time.

    Files are mapped, not read: on a CPU, a tensor that already has the right dtype stays in the mapping, and any other
    is converted on its own. So the weights are never in memory twice. Raises a ValueError as `stored_tensors` does.
    """
    stored = stored_tensors(model, folder)
    wanted = dict(model.named_parameters())
    total = sum(file.stat().st_size for file in {stored[name].file for name in wanted})
    quiet = True if total < BIG else None  # None: tqdm shows the bar on a terminal only
    with tqdm(total=total, desc="loading", unit="B", unit_scale=True, leave=False, disable=quiet) as progress:
        for name, parameter in wanted.items():
            tensor = read_tensor(stored[name])
            progress.update(tensor.nbytes)
            assign(model, name, tensor.to(device=device, dtype=parameter.dtype))
    if compact := [module for module in model.modules() if isinstance(module, CompactLinear)]:
        refuse_nan(model)
        pack(compact)
    if device.type == "cpu":
        keep_freed_memory()


def weight_bytes(model: nn.Module) -> int:
    """The bytes of parameters and buffers; a tied one counts once. What ONNX Runtime multiplies counts as packed."""
    compact = [module for module in model.modules() if isinstance(module, CompactLinear)]
    packed = [2 * module.scale.nbytes for module in compact if module.uses_runtime]
    return sum(packed) + sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
