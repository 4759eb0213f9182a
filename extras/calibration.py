"""Quantising a checkpoint: one short forward pass, in which every linear layer is rounded just before its first use.

    checkpoint in floats -> picture and text -> layer by layer: read, round, write to a temporary file, map, multiply

With 4 bits it matters which errors of a weight do harm: those at inputs that are large. So each layer is rounded for
the inputs that it gets, which come from layers that have been rounded before it. Only one layer is in memory in floats
at a time, and no quantised one: they are mapped from a temporary file, which disappears with the process.
docs/quantization.md has the figures.
"""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from config import LlavaConfig
from extras.machine import keep_freed_memory
from extras.quantize import CompactLinear, refuse_nan
from load import assign, load_weights, read_tensor, stored_tensors
from processor import LlavaProcessor
from vision import LlavaImageProcessor

PICTURE = Path(__file__).parents[1] / "tiny" / "examples" / "scene.png"
TEXT = """\
USER: <image>
What is shown in this image? Describe it in detail. ASSISTANT: The image shows a few coloured shapes on a light
background: a large red circle in the middle, a small blue square to its left, and two green triangles below them. The
circle is larger than all the other shapes, and none of them overlap.</s>USER: How many triangles are there? Answer the
question using a single word or phrase. ASSISTANT: Two</s>USER: Thank you! Now something else: a man in a dark coat is
walking a dog along the beach, while children play football near the water. What could he be thinking about, at 7:45 in
the evening of 3 March 2019? ASSISTANT: He may be enjoying the quiet after a long day at work, or wondering whether it
will rain before he gets home. It is also possible that he is simply looking for a place to sit down and have dinner
with his family.</s>USER: Write a function in Python that adds up the prices in a list. ASSISTANT:
def total(prices):
    result = 0.0
    for item in prices:
        result += item["price"] * item.get("count", 1)
    return round(result, 2)"""


def load_or_quantize(model: Any, plain: Any, folder: Path, device: torch.device) -> None:  # noqa: ANN401
    """Fills a LlavaForConditionalGeneration on the meta device with the weights of a folder, quantised if it is to be.

    Args:
        model: the model that is filled, as `load_weights` would.
        plain: the same model as the folder stores it, on the meta device.
        folder, device: where the checkpoint is, and where the model will run. It is quantised on the CPU.

    Raises a ValueError as `stored_tensors` does.
    """
    if model.config.quantize == plain.config.quantize:
        load_weights(model, folder, device)
        return
    stored = stored_tensors(plain, folder)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, CompactLinear)}
    for name, parameter in list(model.named_parameters()):
        if name in stored and name.removesuffix(".weight") not in layers:
            assign(model, name, read_tensor(stored[name]).to(parameter.dtype))
    model.tie_weights()
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary,
        tqdm(total=len(layers), desc="quantising", unit="layer", leave=False, disable=None) as progress,
    ):

        def load(name: str, inputs: Tensor | None = None) -> None:
            """Reads, rounds and maps one layer, for inputs (..., in)."""
            layer, file = layers.pop(name), Path(temporary) / f"{name}.safetensors"
            importance = None if inputs is None else inputs.flatten(0, -2).float().square().mean(0)
            layer.load_weight(read_tensor(stored[f"{name}.weight"]), importance)
            save_file(layer.state_dict(), file)
            for parameter, tensor in load_file(file).items():
                assign(layer, parameter, tensor)
            progress.update()

        if any(layer.bits == 4 for layer in layers.values()):
            calibrate(model, dict(layers), load, calibration_inputs(model.config, folder))
        for name in list(layers):  # those that the pass did not reach
            load(name)
    refuse_nan(model)
    model.to(device)
    if device.type == "cpu":
        keep_freed_memory()


def calibrate(
    model: Any,  # noqa: ANN401
    layers: dict[str, CompactLinear],
    load: Callable[[str, Tensor], None],
    inputs: dict[str, Tensor],
) -> None:
    """A forward pass in which each layer is loaded, by `load`, when its inputs arrive."""
    hooks, runtime, config = [], [layer.uses_runtime for layer in layers.values()], model.config
    model.config = dataclasses.replace(config, quantize=None)  # so that PyTorch, which multiplies, uses all threads
    for name, layer in layers.items():
        hooks.append(layer.register_forward_pre_hook(lambda _, args, name=name: load(name, args[0])))
        layer.uses_runtime = False  # it would pack a copy of every layer
    with torch.no_grad():
        model(**inputs)
    for hook, layer, used in zip(hooks, layers.values(), runtime, strict=True):
        hook.remove()
        layer.uses_runtime = used
    model.config = config


def calibration_inputs(config: LlavaConfig, folder: Path) -> dict[str, Tensor]:
    """input_ids (1, T) and pixel_values (1, 3, 336, 336). Without a tokenizer in the folder, the text is random ids."""
    picture, side = Image.open(PICTURE), config.vision_config.image_size
    try:
        inputs = dict(LlavaProcessor.from_pretrained(folder)(picture, TEXT))
        ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    except FileNotFoundError:
        words = torch.randint(3, config.text_config.vocab_size, (300,), generator=torch.Generator().manual_seed(0))
        image = torch.full((config.image_seq_length,), config.image_token_id)
        ids = torch.cat([image, words[words != config.image_token_id]])[None]
        pixels = LlavaImageProcessor(size=side, crop_size=side)(picture)
    return {"input_ids": ids[:, : config.text_config.context_length], "pixel_values": pixels}
