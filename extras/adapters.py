"""LoRA adapters on disk, in PEFT's format: its adapters load here, and those that are trained here load in PEFT.

    adapter_config.json         rank, alpha, the adapted modules, the name of the base
    adapter_model.safetensors   for each adapted module lora_A.weight (rank, in) and lora_B.weight (out, rank); for one
                                that was trained in full (`modules_to_save`), weight and bias

Modules have their names in transformers' model, after `base_model.model.`. Which modules are adapted follows from the
tensors, so that lists and regular expressions of target modules need not be interpreted.

Source: PEFT 0.21 (LoraConfig, save_and_load.py), whose names these are.
"""

import dataclasses
import os
import re
import reprlib
import sys
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from extras.files import known_fields, read_json, write_atomically, write_json
from extras.hub import find_folder
from extras.inputs import read_image_processor
from extras.lora import FullLinear, Linear, LoraLinear, adapted_layers, put_in
from load import our_name
from vision import LlavaImageProcessor

CONFIG_FILE, WEIGHTS_FILE, IMAGES_FILE = "adapter_config.json", "adapter_model.safetensors", "preprocessor_config.json"
# Entries that change nothing once an adapter is trained. Any other that is set may change something, and is refused.
HARMLESS = "auto_mapping peft_version task_type inference_mode revision megatron_core fan_in_fan_out qalora_group_size "
HARMLESS += "exclude_modules layers_to_transform layers_pattern lora_dropout eva_config loftq_config runtime_config "
HARMLESS += "ensure_weight_tying velora_config"
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # init_lora_weights; others change the base, too
PARTS = re.compile(r"(.+?)\.(lora_A\.weight|lora_B\.weight|weight|bias)")


@dataclass
class AdapterConfig:
    """The entries of adapter_config.json that matter here."""

    r: int = 8  # the rank
    lora_alpha: float = 8.0
    lora_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None  # trained in full
    base_model_name_or_path: str | None = None
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)  # regular expression for the end of a name -> rank
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def of_layer(self, names: tuple[str, str]) -> tuple[int, float]:
        """The rank of a layer and its scaling; `names` are its names in the file and in transformers' model.

        Raises a ValueError if a pattern is no regular expression.
        """

        def chosen(patterns: dict, default: float) -> float:
            fitting = (key for key in patterns if any(re.fullmatch(rf"(.*\.)?({key})", name) for name in names))
            return patterns.get(next(fitting, None), default)

        try:
            rank, alpha = int(chosen(self.rank_pattern, self.r)), chosen(self.alpha_pattern, self.lora_alpha)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{CONFIG_FILE}: a pattern is no regular expression: {error}") from error
        return rank, alpha / (rank**0.5 if self.use_rslora else rank)


def read_config(folder: Path) -> AdapterConfig:
    """Reads adapter_config.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or describes an adapter of another kind, which is named.
    """
    file = folder / CONFIG_FILE
    entries = read_json(file)
    kind, start = entries.get("peft_type"), entries.get("init_lora_weights")
    if kind != "LORA":
        raise ValueError(f"{file} describes an adapter of the type {reprlib.repr(kind)}; only LORA is supported")
    if entries.get("bias") not in (None, "none"):
        raise ValueError(f"{file}: bias={reprlib.repr(entries['bias'])} is not supported, only adapters without biases")
    if start not in PLAIN_STARTS:
        raise ValueError(
            f"{file}: init_lora_weights={reprlib.repr(start)} is not supported, because it changes the base as well; "
            "PEFT's save_pretrained converts such an adapter, with path_initial_model_for_weight_conversion"
        )
    known = {entry.name for entry in dataclasses.fields(AdapterConfig)} | {*HARMLESS.split()}
    known |= {"peft_type", "bias", "init_lora_weights"}
    others = [f"{name}={reprlib.repr(value)}" for name, value in sorted(entries.items()) if value and name not in known]
    if others:
        raise ValueError(f"{file}: {', '.join(others)} is not supported, only plain LoRA and rsLoRA")
    entries["lora_dropout"] = None  # it is for training
    config = AdapterConfig(**known_fields(AdapterConfig, entries, str(file)))
    for pattern in [*config.rank_pattern, *config.alpha_pattern]:
        if re.search(r"\)[*+{]", pattern) or len(re.findall("[*+{]", pattern)) > 3:
            raise ValueError(
                f"{file}: to match {reprlib.repr(pattern)} could take for ever; write it without repetitions"
            )
    return config


def read_tensors(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Reads adapter_model.safetensors: the name of a module in the file -> its tensors, by the ends of their names.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or a tensor is not one of those in the module's docstring.
    """
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        advice = "; adapter_model.bin is a pickle, which can run code: convert it with PEFT" if pickled else ""
        raise FileNotFoundError(f"{folder} has no {WEIGHTS_FILE}{advice}")
    try:
        stored = load_file(file)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"{file} is not a complete safetensors file: {error}; download it again") from error
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stored.items():
        plain = re.sub(r"\.(modules_to_save|default)(?=\.)", "", name.removeprefix("base_model.model."))
        if ".base_layer." in plain:  # PEFT adds a copy of the base's head if that has an adapter
            continue
        found = PARTS.fullmatch(plain)
        if not found or not tensor.is_floating_point():
            raise ValueError(f"{file}: {name} ({tensor.dtype}) is not a tensor of a plain LoRA adapter")
        modules.setdefault(found[1], {})[found[2]] = tensor.float()
    return modules


def their_name(name: str) -> str:
    """The name of one of our modules in transformers' model."""
    if name == "language_model.lm_head":
        return "lm_head"
    return "model." + name.replace("language_model.model.", "language_model.", 1)


def make_layer(layer: nn.Module | None, module: str, tensors: dict[str, Tensor], config: AdapterConfig) -> nn.Module:
    """The base's `layer` with its adapter; `module` is its name in the file.

    Raises a ValueError, with both shapes, if the tensors do not fit.
    """
    if not isinstance(layer, Linear):
        raise ValueError("the base has no linear layer of this name, and no other layers are supported")
    out, width = layer.out_features, layer.in_features
    shapes = {part: tuple(tensor.shape) for part, tensor in tensors.items()}
    expected: dict[str, tuple[int, ...]] = {"weight": (out, width)}
    if any(part.startswith("lora_") for part in shapes):
        rank, scaling = config.of_layer((module, their_name(our_name(f"{module}.")[:-1])))
        expected = {"lora_A.weight": (rank, width), "lora_B.weight": (out, rank)}
    elif layer.bias is not None:
        expected["bias"] = (out,)
    if shapes != expected:
        raise ValueError(f"it has {shapes}, but the base and {CONFIG_FILE} need {expected}")
    adapted = LoraLinear(layer, rank, scaling) if "lora_A.weight" in expected else FullLinear(layer)
    on_device = {part: tensor.to(layer.weight.device) for part, tensor in tensors.items()}
    adapted.load_state_dict(on_device, strict=False, assign=True)
    return adapted


def load_adapter(model: nn.Module, adapter: str | Path, base: str | Path | None = None) -> None:
    """Puts the adapter in a folder, or in a repository of the Hugging Face hub, into a model.

    If the adapter says that it was trained on another base than `base`, that is printed to stderr.

    Raises:
        FileNotFoundError: there is no such folder, or a file is missing in it.
        ValueError: it does not fit the model, is damaged, or of another kind; or the model has an adapter already.
    """
    if adapted_layers(model):
        raise ValueError("the model already has an adapter: extras.lora.take_out(model) removes it")
    folder = find_folder(adapter)
    config, stored = read_config(folder), read_tensors(folder)
    modules, layers, problems = dict(model.named_modules()), {}, []
    for module, tensors in stored.items():
        name = our_name(f"{module}.").removesuffix(".")
        try:
            layers[name] = make_layer(modules.get(name), module, tensors, config)
        except ValueError as error:
            problems.append(f"{module}: {error}")
    if "language_model.lm_head" in layers and model.config.tie_word_embeddings:  # type: ignore[union-attr]
        problems.append("lm_head: in the base it is one with the word embeddings, so that it cannot have an adapter")
    for saved in config.modules_to_save or []:
        if not any(f".{saved}." in f".{module}." for module in stored):
            problems.append(f"{saved}: it is in modules_to_save, but not in {WEIGHTS_FILE}")
    if problems or not layers:
        more = [f"and {len(problems) - 5} more"] if len(problems) > 5 else []
        reasons = "\n  ".join([*(problems or ["it has no tensors"])[:5], *more])
        raise ValueError(f"the adapter {adapter} does not fit the base{f' {base}' if base else ''}:\n  {reasons}")
    put_in(model, layers)
    trained_on = config.base_model_name_or_path
    if base and trained_on and os.path.abspath(trained_on) != os.path.abspath(base):
        print(f"{adapter}: trained on {trained_on!r}, not on {str(base)!r}; all shapes are the same", file=sys.stderr)


def save_adapter(model: nn.Module, folder: Path, config: AdapterConfig, image_processor: LlavaImageProcessor) -> None:
    """Writes the adapter of a model as a folder for PEFT and `load_adapter`, with the settings of the images.

    Each file is replaced atomically. The weights come last, so that whoever finds them also finds what they need.
    """
    tensors = {}
    for name, layer in adapted_layers(model).items():
        for part, tensor in layer.named_parameters():
            if not part.startswith("base_layer."):
                tensors[f"base_model.model.{their_name(name)}.{part}"] = tensor.detach().float().cpu().contiguous()
    entries = {"peft_type": "LORA", "task_type": None, "inference_mode": True, "bias": "none"}
    images = {"image_processor_type": "LlavaImageProcessor", "do_convert_rgb": True}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG_FILE, entries | dataclasses.asdict(config))
    write_json(folder / IMAGES_FILE, images | dataclasses.asdict(image_processor))
    write_atomically(folder / WEIGHTS_FILE, lambda part: save_file(tensors, part, {"format": "pt"}))


def adapter_bytes(name: str | Path) -> int:
    """The size of an adapter's weights, in float32 as PEFT writes them; 0 if there are none."""
    file = find_folder(name) / WEIGHTS_FILE
    return file.stat().st_size if file.is_file() else 0


def image_processor_of(name: str | Path) -> LlavaImageProcessor | None:
    """The image processor that an adapter was trained with, if its folder says so, as those trained here do."""
    folder = find_folder(name)
    return read_image_processor(folder) if (folder / IMAGES_FILE).is_file() else None
