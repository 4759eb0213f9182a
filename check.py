"""Checks: what comes in from outside, whether it is what it should be, and how to say so if it is not.

Files, tensors and options come from strangers and from tired people. Whatever is wrong with them ends here, where it
comes in, in one sentence that names the file or the argument; the model itself then has nothing to check. Nothing else
is needed to understand LLaVA: read this file last.
"""

import contextlib
import dataclasses
import json
import math
import os
import reprlib
import signal
import sys
import types
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Union, get_args, get_origin, get_type_hints

import torch
from PIL import Image
from torch import Tensor, nn

if TYPE_CHECKING:
    from llava import LlavaConfig
    from tokenizer import LlamaTokenizer
    from vision import LlavaImageProcessor

LARGEST = 10**7  # what a config file may give for a size: beyond that, even the names of the weights fill the memory
MOST_LAYERS = 1000

# Configuration files


def read_json(path: Path, missing: dict | None = None) -> dict:
    """The object in a JSON file. Without the file: `missing`, or a FileNotFoundError. Otherwise a ValueError."""
    if not path.is_file():
        if missing is None:
            raise FileNotFoundError(f"{path.parent} has no {path.name}")
        return missing
    if path.stat().st_size > 10**8:
        raise ValueError(f"{path} is over 100 MB, which no file of its kind needs")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}; is the download complete?") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__} where an object was expected")
    return value


def known_fields(cls: type, config: dict, where: str, largest: int = LARGEST) -> dict:
    """Those entries of a config file that are fields of a dataclass; what is null takes the dataclass's default.

    Raises a ValueError for a value that has not the type of its field, or is a size that no model has. (Numbers that
    are no sizes: an id may be 0, and layers are counted from both ends.)
    """
    known = {}
    for name, kind in get_type_hints(cls).items():
        value = config.get(name)
        if value is None or dataclasses.is_dataclass(kind):
            continue
        if not fits(value, kind):
            kind = getattr(kind, "__name__", kind) if get_origin(kind) is None else kind
            raise ValueError(f"{where}: {name} is {reprlib.repr(value)}, which is not of the type {kind}")
        most = MOST_LAYERS if name == "num_hidden_layers" else largest
        least = -most if name.endswith(("_id", "_layer", "resample")) else 1
        sizes = value.values() if isinstance(value, dict) and name != "rope_parameters" else [value]
        if any(type(size) is int and not least <= size <= most for size in sizes):
            raise ValueError(
                f"{where}: {name} is {reprlib.repr(value)}; it must be at least {least} and at most {most}"
            )
        known[name] = value
    return known


def fits(value: object, kind: object) -> bool:
    """Whether a value from a JSON file has the type of an annotation; a whole number is a float as well."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in args)
    if origin in (list, Sequence):
        return isinstance(value, list) and all(fits(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(item, args[1]) for item in value.values())
    if kind is float:
        return type(value) in (int, float) and abs(value) < 1e18  # which NaN and infinity are not
    return type(value) is kind


def check_config(config: "LlavaConfig", activations: Collection[str]) -> None:
    """Raises a ValueError if the parts of a config do not fit together."""
    vision, text, layers = config.vision_config, config.text_config, config.vision_feature_layer
    depth, layers = vision.num_hidden_layers, [layers] if isinstance(layers, int) else layers
    rules = {
        "vision heads that divide its hidden_size": vision.hidden_size % vision.num_attention_heads == 0,
        "num_key_value_heads that divide the heads": text.num_attention_heads % text.num_key_value_heads == 0,
        "an even head_dim": text.head_dim % 2 == 0,
        "3 num_channels": vision.num_channels == 3,
        f"a vision_feature_layer out of {depth}": layers and all(-depth - 1 <= layer <= depth for layer in layers),
        "a select_strategy that is default or full": config.vision_feature_select_strategy in ("default", "full"),
        f"activations out of {', '.join(activations)}": (
            {vision.hidden_act, text.hidden_act, config.projector_hidden_act} <= set(activations)
        ),
        f"a context of more than the {config.image_seq_length} tokens of an image": (
            0 < config.image_seq_length < text.context_length
        ),
    }
    if broken := [rule for rule, holds in rules.items() if not holds]:
        raise ValueError(f"config.json describes no model that can work: it needs {'; '.join(broken)}")


def check_processor(
    folder: Path, config: "LlavaConfig", image_processor: "LlavaImageProcessor", tokenizer: "LlamaTokenizer"
) -> None:
    """Raises a ValueError if tokenizer and image processor do not fit the model in the same folder."""
    try:  # a trial tells whether these settings make sense together
        crop, pad = (dataclasses.replace(image_processor, do_pad=pad) for pad in (False, True))
        shapes = {one(Image.new("RGB", (64, 64))).shape[1:] for one in (crop, pad)}
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the image processor of {folder} cannot work with its settings: {error!r}") from error
    side, rows = config.vision_config.image_size, config.text_config.vocab_size
    last = max(len(tokenizer.pieces) - 1, *tokenizer.special_tokens.values())
    for found, wanted, what in (
        *[(tuple(shape), (3, side, side), "the shape of images") for shape in shapes],
        (tokenizer.image_token_id, config.image_token_id, "the id of <image>"),
        (last, min(last, rows - 1), "the last id of the tokenizer"),
    ):
        if found != wanted:
            raise ValueError(f"{folder} mixes different checkpoints: {what} is {found}, but {wanted} by config.json")


# Arguments


def check_inputs(
    config: "LlavaConfig",
    device: torch.device,
    input_ids: Tensor,
    pixel_values: Tensor | None,
    attention_mask: Tensor | None,
) -> None:
    """Raises a ValueError for tensors that would end in an error of PyTorch's somewhere in the layers."""
    given = {"input_ids": input_ids, "pixel_values": pixel_values, "attention_mask": attention_mask}
    for name, tensor in given.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} and the model on {device}: use inputs.to(...)")
    if input_ids.ndim != 2 or input_ids.dtype not in (torch.long, torch.int) or not input_ids.numel():
        raise ValueError(f"input_ids must be whole numbers (B, T), not {input_ids.dtype} {tuple(input_ids.shape)}")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        shapes = f"{tuple(attention_mask.shape)}, not {tuple(input_ids.shape)}"
        raise ValueError(f"the attention_mask has the shape {shapes}")
    size = (3, *[config.vision_config.image_size] * 2)
    if pixel_values is not None and (pixel_values.shape[1:] != size or not pixel_values.is_floating_point()):
        found = f"{pixel_values.dtype} {tuple(pixel_values.shape)}"
        raise ValueError(f"pixel_values must be floating-point numbers (N, {str(size)[1:]}, not {found}")
    # Looking at the values would make a GPU wait, so the single tokens of generation are spared.
    rows = config.text_config.vocab_size
    if input_ids.shape[1] > 1 and not 0 <= input_ids.min() <= input_ids.max() < rows:
        raise ValueError(f"input_ids go from {input_ids.min()} to {input_ids.max()}, and the model has {rows} rows")


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises a ValueError if an option of `choose_token` is out of its range or would have no effect."""
    if temperature != 0 and not 1e-5 <= temperature < math.inf:  # below, logits divided by it would be infinite
        raise ValueError(f"temperature is {temperature}; it must be 0 (always the likeliest token) or 1e-5 or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError("top_k and top_p need a temperature above 0: without one the likeliest token is taken")


def why_not_finite(model: nn.Module, dtype: torch.dtype) -> str:
    """A sentence on why the logits of a prompt are NaN or infinite."""
    tensors = [*model.named_parameters(), *model.named_buffers()]  # a buffer is the scale of weights of one byte
    broken = [name for name, tensor in tensors if tensor.dtype != torch.int8 and not tensor.isfinite().all()]
    if broken:
        return f"the weights hold NaN or infinity, in {', '.join(broken[:5])}: download them again"
    return f"the logits are NaN or infinite, though the weights are not: {dtype} is too narrow for them"


# Memory


def free_memory(device: torch.device, root: Path = Path("/")) -> int | None:
    """Bytes that this process can still take on a device, or None where nobody says (MPS, macOS, Windows).

    On Linux that is what the kernel calls available, or what is left of a limit that this process was put under: it is
    in a control group, as all of a container is, and that group in others, each with a limit of its own. Pages of files
    count as free, because the kernel drops them first. Sources: proc(5); the kernel's cgroup-v2 and cgroup-v1/memory.

    Args:
        device: where.
        root: where /proc and /sys are; the tests have their own.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        meminfo = (root / "proc/meminfo").read_text()
        groups = (root / "proc/self/cgroup").read_text()
        free = [int(line.split()[1]) * 1024 for line in meminfo.splitlines() if line.startswith("MemAvailable:")]
    except (OSError, ValueError):
        return None
    if device.type != "cpu" or not free:
        return None
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            mount, limit, usage = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            mount, limit, usage = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = Path(path.lstrip("/"))
        for folder in (mount / parent for parent in (group, *group.parents)):
            with contextlib.suppress(OSError, ValueError):  # no such file, as in a container, or no limit: "max"
                left = int((folder / limit).read_text()) - int((folder / usage).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                total = "total_" * ("total_inactive_file" in stat)  # version 1 has these for the groups within, too
                free.append(left + int(stat[f"{total}inactive_file"]) + int(stat[f"{total}active_file"]))
    return max(0, min(free))


# Terminals


def sentence(error: Exception) -> str:
    """What went wrong, for a person; for errors that nobody foresaw it also says how to see more."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename or 'reading or writing failed'}: {error.strerror}"
    elif isinstance(error, OSError | ValueError):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error} (LLAVA_DEBUG=1 shows where)"
    # Names in a file from strangers may hold characters that a terminal obeys.
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def command_line(program: str, run: Callable[[], None], interrupted: str = "interrupted") -> None:
    """Runs a command that was asked for at a terminal: exit code 0, or 1 and one sentence on stderr."""
    if callable(signal.getsignal(signal.SIGINT)):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for stream in (sys.stdin, sys.stdout):  # a character that a terminal lacks, or bytes that are none: a mark
            with contextlib.suppress(AttributeError):  # None, if it was closed from the start
                stream.reconfigure(errors="replace")
        return run()
    except BrokenPipeError:
        message = "standard output was closed before all was written"
    except KeyboardInterrupt:
        program, message = f"\n{program}", interrupted
    except Exception as error:
        if os.environ.get("LLAVA_DEBUG"):
            raise
        message = sentence(error)
    try:
        print(end="", flush=True)
    except OSError:  # a closed pipe, a full disk: Python would complain once more at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(f"{program}: {message}")
