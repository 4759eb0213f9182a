"""What train.py --lora adds to training: its options, the frozen base, and the sum of gradients over processes.

Source: the hyperparameters of LLaVA-1.5's released script for LoRA.
"""

import argparse
import re
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from config import LlavaConfig
from extras.adapters import AdapterConfig
from extras.calibration import load_or_quantize
from extras.hub import find_folder
from extras.lora import FullLinear, Linear, LoraLinear, freeze_base, put_in
from extras.quantize import SCHEMES

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # the decoder's linear layers
VISION_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]  # the vision tower's
PROJECTOR = "multi_modal_projector"
LEARNING_RATE = 2e-4
# The options that need --lora, and their defaults; that of the alpha is twice the rank.
DEFAULTS = {"lora_alpha": None, "lora_dropout": 0.05, "lora_targets": TARGETS, "projector_learning_rate": 2e-5}
DEFAULTS |= {"lora_vision": False, "quantize": None, "dtype": None}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of LoRA to a command line."""
    add = parser.add_argument_group("LoRA").add_argument
    add("--lora", type=int, metavar="RANK", help="train a LoRA of this rank in place of the decoder (stage instruct)")
    add("--lora-alpha", type=float, help="the LoRA is scaled by alpha / rank (default: twice the rank)")
    add("--lora-dropout", type=float, help="on the inputs of the LoRA (default: 0.05)")
    names = [*TARGETS, "lm_head"]
    add("--lora-targets", nargs="+", choices=names, help="layers that get a LoRA (default: the decoder's, not lm_head)")
    add("--lora-vision", action="store_true", default=None, help="also train a LoRA in the vision tower")
    add("--projector-learning-rate", type=float, help="peak value for the projector; 0 freezes it (default: 2e-5)")
    add("--quantize", choices=SCHEMES, help="store the frozen base in 8 or 4 bits per weight")
    add("--dtype", choices=["bfloat16", "float16", "float32"], help="of the frozen base (default: the checkpoint's)")


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fills in the defaults; invalid options end in a usage message and exit code 2."""
    if args.lora is None:
        if given := [name for name in DEFAULTS if getattr(args, name) is not None]:
            parser.error(f"--{given[0].replace('_', '-')} needs --lora")
        return
    if args.stage != "instruct" or args.lora < 1:
        parser.error("--lora is for stage instruct, and its rank must be 1 or more")
    for name, default in (DEFAULTS | {"lora_alpha": 2.0 * args.lora}).items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if not (args.lora_alpha > 0 and 0 <= args.lora_dropout < 1 and args.projector_learning_rate >= 0):
        parser.error(
            "--lora-alpha must be above 0, --lora-dropout from 0 to below 1, --projector-learning-rate 0 or more"
        )
    args.learning_rate = LEARNING_RATE if args.learning_rate is None else args.learning_rate


def load_frozen(model_class: Any, args: argparse.Namespace, device: torch.device) -> Any:  # noqa: ANN401
    """The base: its matrices in the checkpoint's dtype, or in --dtype, or quantised; the projector in float32.

    `model_class` is LlavaForConditionalGeneration of llava.py. Activations are bfloat16 if the matrices are; with
    matrices in float16 they are float32, because in float16 gradients would underflow.
    """
    folder = find_folder(args.model)
    config = LlavaConfig.from_pretrained(folder)
    stored = args.dtype or config.dtype or "float32"
    model = model_class.planned(config, "bfloat16" if stored == "bfloat16" else "float32", device, args.quantize)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.to(getattr(torch, stored))
    if config.quantize is None:  # otherwise the projector is in compact form, too
        with torch.device("meta"):
            model.multi_modal_projector = type(model.multi_modal_projector)(config)
        # It computes in float32, also before it is replaced by trained copies: in the pass that measures inputs
        model.multi_modal_projector.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    load_or_quantize(model, model_class.planned(config, "float32", device, None), folder, device)
    model.tie_weights()
    return model


def add_lora(model: nn.Module, args: argparse.Namespace) -> AdapterConfig:
    """Freezes the model, and adds what is trained: a LoRA in the decoder, and copies of the projector's layers.

    With `args.lora_vision`, the vision tower has a LoRA as well.

    Raises a ValueError if lm_head is to have one, but is one with the word embeddings.
    """
    if "lm_head" in args.lora_targets and model.config.tie_word_embeddings:  # type: ignore[union-attr]
        raise ValueError("--lora-targets lm_head: in this model it is one with the word embeddings, so leave it out")
    freeze_base(model)
    torch.manual_seed(args.seed)
    layers: dict[str, nn.Module] = {}
    # Expressions that fit the names in all versions of transformers
    targets = rf"((.*language_model\.(.*\.)?)?({'|'.join(args.lora_targets)})"
    targets += rf"|.*vision_tower\..*\.({'|'.join(VISION_TARGETS)}))" if args.lora_vision else ")"
    for name, module in model.named_modules():
        if isinstance(module, Linear) and re.fullmatch(targets, name):
            layers[name] = LoraLinear(module, args.lora, args.lora_alpha / args.lora, args.lora_dropout)
        elif isinstance(module, Linear) and name.startswith(f"{PROJECTOR}.") and args.projector_learning_rate:
            layers[name] = FullLinear(module)
    put_in(model.train(), layers)
    in_full = [PROJECTOR] if args.projector_learning_rate else None
    return AdapterConfig(args.lora, args.lora_alpha, args.lora_dropout, targets, in_full, args.model)


def parameter_groups(model: nn.Module, args: argparse.Namespace) -> list[dict]:
    """What is trained, in groups for an optimiser, each with the `peak` of its learning rate."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if args.lora is None:
        return [{"params": [*trained.values()], "peak": args.learning_rate}]
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in trained.items():
        groups[name.startswith(f"{PROJECTOR}.")].append(parameter)
    peaks = {False: args.learning_rate, True: args.projector_learning_rate}
    return [{"params": parameters, "peak": peaks[where]} for where, parameters in groups.items() if parameters]


def allocate_state(optimizer: torch.optim.AdamW) -> None:
    """Allocates the gradients and AdamW's averages before the first step.

    Allocated later, they would lie between activations and fragment the memory. The gradients have to be kept from step
    to step. A parameter that a batch does not use, such as the projector's in a batch without images, has a gradient of
    zero then, so that its average still moves it.
    """
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        parameter.grad = torch.zeros_like(parameter)
        averages = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(0.0), **averages}


def sum_gradients(model: nn.Module) -> None:
    """Replaces each gradient by its sum over all processes, which have gradients for the same parameters."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    together = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(together)
    for gradient, part in zip(gradients, together.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
