"""The terminal side of llava.py: its options, the questions typed, and the answers printed as they are generated."""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from config import LlavaConfig
from extras.adapters import adapter_bytes, image_processor_of
from extras.checks import check_sampling
from extras.images import load_image
from extras.machine import peak_memory, pick_device
from extras.matmul import is_installed
from extras.memory import check_memory
from extras.quantize import SCHEMES
from llama import KVCache
from processor import LlavaProcessor
from tokenizer import IMAGE_TOKEN, SHORT_ANSWER, VICUNA_SYSTEM, LlamaTokenizer

BUILT_IN = Path(__file__).parents[1] / "tiny" / "model"
BUILT_IN_NOTE = """\
llava.py: the built-in model knows drawn scenes of a few coloured shapes, and nothing else. For other images and
questions use --model llava-hf/llava-1.5-7b-hf (after `pip install huggingface_hub`; it downloads 14 GB)"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the options of llava.py; invalid ones end in a usage message and exit code 2."""
    parser = argparse.ArgumentParser(prog="llava.py", description="Asks a LLaVA-1.5 model about images.")
    add = parser.add_argument
    add("question", nargs="?", help="default: What is shown in this image?")
    add("--image", action="append", default=[], metavar="PATH|URL|-", help="can be repeated, for several images")
    add("--model", default=str(BUILT_IN), help="checkpoint folder or name on the Hugging Face hub (default: built-in)")
    add("--adapter", metavar="FOLDER", help="LoRA for that checkpoint, in PEFT's format: a folder or a name on the hub")
    add("--max-new-tokens", type=int, default=512, help="maximum length of the answer (default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="0: greedy decoding (default); above 0: sampling")
    add("--top-k", type=int, help="sample from the k most likely tokens")
    add("--top-p", type=float, help="sample from the most likely tokens that together reach probability p")
    add("--seed", type=int, help="makes sampling reproducible")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="default: the first one available")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="default: float32 on a CPU")
    add("--quantize", choices=SCHEMES, help="8 or 4 bits per weight: a third or a fifth of the memory of float32")
    add(
        "--save",
        type=Path,
        metavar="FOLDER",
        help="write the model to a new folder, quantised or with the --adapter",
    )
    add("--image-mode", choices=["crop", "pad"], help="crop a long image to its centre, or pad it to a square")
    add("--short", action="store_true", help="ask for a single word or phrase")
    add("--system", nargs="?", const=VICUNA_SYSTEM, default="", help="start with this system prompt, or with Vicuna's")
    add("--chat", action="store_true", help="keep asking: Ctrl-C stops an answer, Ctrl-D quits")
    add("--stats", action="store_true", help="print speed and memory to stderr")
    args = parser.parse_args(argv)
    try:
        check_sampling(args.temperature, args.top_k, args.top_p)
    except ValueError as error:
        parser.error(str(error))
    if args.max_new_tokens < 1:
        parser.error("--max-new-tokens must be 1 or more")
    if not (args.image or args.question or args.chat or args.save):
        parser.error("give a question, an --image, or both")
    if args.save and args.save.exists() and (not args.save.is_dir() or any(args.save.iterdir())):
        parser.error(f"--save: {args.save} exists already; choose a new folder")
    if args.save and args.quantize and args.adapter:
        parser.error("merge the adapter first (--adapter with --save), then quantise the result")
    if args.image.count("-") > 1 or ("-" in args.image and args.chat):
        parser.error("standard input (-) can be one image, and not together with --chat")
    if args.seed is not None and not 0 <= args.seed < 2**63:
        parser.error("--seed must be 0 or more, and below 2**63")
    return args


def run(args: argparse.Namespace, model_class: Any) -> None:  # noqa: ANN401
    """Loads processor and model, and answers. `model_class` is LlavaForConditionalGeneration of llava.py."""
    device = pick_device(args.device)
    images = [load_image(source) for source in args.image]
    processor = LlavaProcessor.from_pretrained(args.model)
    if args.adapter:
        processor.image_processor = image_processor_of(args.adapter) or processor.image_processor
    if args.image_mode:
        processor.image_processor.do_pad = args.image_mode == "pad"
    question = len((args.question or "").encode("utf-8", "replace"))  # at most so many tokens
    tokens = len(images) * processor.image_seq_length + question + args.max_new_tokens
    adapter = adapter_bytes(args.adapter) if args.adapter else 0
    if args.save:
        save(args, processor, model_class, adapter)
        if not (images or args.question or args.chat):
            return
        args.model, args.adapter, adapter = args.save, None, 0
    check_memory(processor.folder, model_class.planned, args.dtype, device, args.quantize, tokens, adapter)
    model = model_class.from_pretrained(args.model, args.dtype, device, args.quantize, args.adapter)
    if model.config.quantize and device.type == "cpu" and not is_installed():
        print("llava.py: for quantised weights to be fast on a CPU, run: pip install onnxruntime", file=sys.stderr)
    converse(args, images, processor, model.generate_stream, KVCache(model), model.generation_config.eos_token_id)


def save(args: argparse.Namespace, processor: LlavaProcessor, model_class: Any, adapter: int) -> None:  # noqa: ANN401
    """Writes a checkpoint folder: quantised, or in the dtype of `--dtype` (by default the original's), with the adapter
    merged into it.
    """
    config, device = LlavaConfig.from_pretrained(processor.folder), torch.device("cpu")
    dtype = (args.dtype != "auto" and args.dtype) or (None if args.quantize else config.dtype) or "float32"
    check_memory(processor.folder, model_class.planned, dtype, device, args.quantize, 0, adapter)
    model = model_class.from_pretrained(args.model, dtype, device, args.quantize, args.adapter)
    model.save_pretrained(args.save)
    processor.save_pretrained(args.save)
    print(f"llava.py: saved to {args.save}; ask it with --model {args.save}", file=sys.stderr)


def converse(
    args: argparse.Namespace,
    images: Sequence[Image.Image],
    processor: LlavaProcessor,
    generate_stream: Callable[..., Iterator[Tensor]],
    cache: KVCache,
    eos_token_id: Sequence[int],
) -> None:
    """Answers the question of the command line and those typed in a chat; the cache holds the conversation so far.

    `generate_stream` and `eos_token_id` are those of the loaded model. Answers go to stdout, everything else to stderr.
    """
    tokenizer, device = processor.tokenizer, cache.keys.device
    generator = torch.Generator(device)
    generator.seed() if args.seed is None else generator.manual_seed(args.seed)
    options = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")}

    note_due = Path(args.model) == BUILT_IN
    conversation = torch.empty(1, 0, dtype=torch.long, device=device)  # the ids of the turns so far
    for question in questions(args):
        answer: list[int] = []
        first_turn = conversation.shape[1] == 0
        if note_due and not (images and all(map(is_drawn, images))):
            print(BUILT_IN_NOTE, file=sys.stderr)
            note_due = False
        try:
            question += SHORT_ANSWER if args.short else ""
            if first_turn and IMAGE_TOKEN not in question:
                question = f"{IMAGE_TOKEN}\n" * len(images) + question
            turn, _ = tokenizer.encode_chat([(question, None)], args.system * first_turn, continued=not first_turn)
            inputs = processor.prepare([turn], images if first_turn else None).to(device)
            prompt = torch.cat([conversation, inputs.input_ids], dim=1)
            pixels = inputs.get("pixel_values")
            tokens = generate_stream(prompt, pixels, **options, generator=generator, cache=cache)
            print_answer(tokens, answer, tokenizer, args.stats)
        except KeyboardInterrupt:
            if not args.chat:
                raise
            print(flush=True)
        except ValueError as error:
            if not args.chat:
                raise
            print(f"llava.py: {error}", file=sys.stderr)
        if not answer:  # stopped before the first token: as if the question had not been asked
            cache.length = min(cache.length, conversation.shape[1])
            continue
        if answer[-1] not in eos_token_id:
            print(f"llava.py: the answer is cut off after {len(answer)} tokens", file=sys.stderr)
            answer.append(tokenizer.eos_token_id)
        conversation = torch.cat([prompt, torch.tensor([answer], device=device)], dim=1)
    if args.stats:
        print(f"peak memory {peak_memory(device)}", file=sys.stderr)


def questions(args: argparse.Namespace) -> Iterator[str]:
    """The question of the command line and, in a chat, those typed until Ctrl-D."""
    if args.question or not args.chat:
        yield args.question or "What is shown in this image?"
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - where available, it gives input() line editing and a history
    while args.chat and sys.stdin is not None:  # None if it was closed from the start
        try:
            if sys.stdin.isatty():
                print("> ", end="", file=sys.stderr, flush=True)
            question = input()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:  # at the prompt there is no answer to stop
            print(file=sys.stderr)
            continue
        if question.strip():
            yield question


def print_answer(tokens: Iterator[Tensor], answer: list[int], tokenizer: LlamaTokenizer, stats: bool) -> None:
    """Prints an answer as it is generated, and appends its ids to `answer`."""
    times = [time.perf_counter()]

    def recorded() -> Iterator[int]:
        for token in tokens:
            answer.append(int(token.item()))
            times.append(time.perf_counter())
            yield answer[-1]

    for text in tokenizer.stream(recorded(), skip_special_tokens=True):
        print(text, end="", flush=True)
    print(flush=True)
    if stats:
        speed = (len(answer) - 1) / (times[-1] - times[1]) if len(answer) > 1 else 0.0
        print(f"time to first token {times[1] - times[0]:.2f} s, decoding {speed:.1f} tokens/s", file=sys.stderr)


def is_drawn(image: Image.Image) -> bool:
    """Whether an image is as flat as the built-in model's drawn scenes: nearly all neighbouring pixels are alike."""
    grey = np.asarray(image.convert("L").resize((96, 96)), dtype=np.int16)
    steps = np.maximum(np.abs(np.diff(grey, axis=0))[:, 1:], np.abs(np.diff(grey, axis=1))[1:])
    return bool((steps > 6).mean() < 0.15)  # at most 0.07 in drawn scenes, 0.2 and more in photos
