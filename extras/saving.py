"""Saving a model as a checkpoint folder that every LLaVA loader knows, without ever losing the one that was there."""

import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from extras.files import write_atomically, write_json

SHARD_BYTES = 5 * 10**9  # the largest file written
# All files of a folder that belong to the tokenizer and the image processor.
PROCESSOR_FILES = ["tokenizer.model", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"]
PROCESSOR_FILES += ["special_tokens_map.json", "preprocessor_config.json", "processor_config.json"]
PROCESSOR_FILES += ["chat_template.json", "chat_template.jinja"]


def save_weights(model: nn.Module, folder: Path, config: dict, generation_config: dict) -> None:
    """Writes weights and configs under the names of the hub's checkpoints.

    Weights above 5 GB are split into shards. Each file gets its final name only when it is complete, so that a model
    can be saved over the very files that its weights are mapped from. New shards never take the names that the folder's
    index uses: until the new index replaces it, atomically, the folder contains the previous model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / "model.safetensors.index.json"
    stem = "model-b" if index.is_file() and b'"model-0' in index.read_bytes() else "model"
    shards: list[list[str]] = [[]]
    filled = total = 0
    for name, parameter in model.named_parameters():
        if filled + parameter.nbytes > SHARD_BYTES:
            shards, filled = [*shards, []], 0
        shards[-1].append(name)
        filled, total = filled + parameter.nbytes, total + parameter.nbytes
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {
            name.replace("vision_tower.", "vision_tower.vision_model.", 1): (
                model.get_parameter(name).detach().cpu().contiguous()
            )
            for name in names
        }

        def write(part: Path, tensors: dict[str, Tensor] = tensors) -> None:
            save_file(tensors, part, {"format": "pt"})

        write_atomically(folder / file, write)
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


def copy_processor_files(source: Path, target: Path) -> None:
    """Copies the files of the tokenizer and the image processor from one checkpoint folder to another."""
    target.mkdir(parents=True, exist_ok=True)
    for name in PROCESSOR_FILES:
        if (source / name).is_file() and source.resolve() != target.resolve():
            shutil.copyfile(source / name, target / name)
