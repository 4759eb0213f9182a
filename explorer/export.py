"""Exports a model for the explorer: weights, tokenizer and configuration, in one file beside the page.

    python explorer/export.py                                    the built-in model -> explorer/model.bin
    python explorer/export.py --model RUN                        your own training run -> explorer/model.bin
    python explorer/export.py --model RUN --html explorer.html   the whole explorer in one file, opened by double click

model.bin holds the length of its header (4 bytes, little-endian), the header in JSON, and the weights in float16. The
header is {"config": ..., "tensors": {name: {"shape": ..., "offset": ...}}}; offsets count numbers, not bytes.

Float16 has three more bits of precision than bfloat16. Its smaller range is enough for trained weights; larger ones
are refused.
"""

import argparse
import base64
import json
import re
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))
from extras.terminal import command_line, handle_early_interrupt

if __name__ == "__main__":
    handle_early_interrupt("export.py")

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from config import LlavaConfig
from extras.files import write_atomically
from extras.hub import find_folder
from llava import LlavaForConditionalGeneration
from processor import LlavaProcessor
from tokenizer import LlamaTokenizer
from vision import LlavaImageProcessor

BUILT_IN = FOLDER.parent / "tiny" / "model"
MOST_BYTES = 10_000_000  # of the weights
ACTIVATIONS = {"quick_gelu", "gelu", "silu"}  # those of tensor.js
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # SentencePiece's types of pieces


def export(folder: Path) -> bytes:
    """The content of model.bin. Raises a ValueError that says why the explorer cannot show this checkpoint."""
    config = LlavaConfig.from_pretrained(folder)
    check_size(config, folder)
    processor = LlavaProcessor.from_pretrained(folder)
    check_parts(config, processor, folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder, torch.float32)
    return pack(describe(config, processor), model.state_dict())


def check_size(config: LlavaConfig, folder: Path) -> None:
    """Raises a ValueError for a model that is too large for a page, before its weights are loaded."""
    planned = LlavaForConditionalGeneration.planned(config, torch.float16, "cpu", None)
    size = sum(tensor.nbytes for tensor in planned.state_dict().values())
    if size > MOST_BYTES:
        raise ValueError(f"{folder} has {size / 1e6:.1f} MB of weights in 16 bits; the explorer takes at most 10 MB")


def check_parts(config: LlavaConfig, processor: LlavaProcessor, folder: Path) -> None:
    """Raises a ValueError that names the parts of a model that the explorer's JavaScript does not have."""
    vision, text = config.vision_config, config.text_config
    activations = {vision.hidden_act, text.hidden_act, config.projector_hidden_act}
    rules = {
        "as many key-value heads as attention heads": text.num_key_value_heads == text.num_attention_heads,
        "no sliding window": text.sliding_window is None,
        "RoPE without scaling": text.rope_parameters["rope_type"] == "default",
        f"activations from {', '.join(sorted(ACTIVATIONS))}": activations <= ACTIVATIONS,
        "a single vision_feature_layer": isinstance(config.vision_feature_layer, int),
        "a vision_feature_select_strategy of default": config.vision_feature_select_strategy == "default",
        "an image processor that only rescales and normalises an image of the model's size": only_normalises(
            processor.image_processor, vision.image_size
        ),
        "a SentencePiece BPE tokenizer with byte fallback, and Llama's normalisation": is_llamas(processor.tokenizer),
    }
    if broken := [rule for rule, holds in rules.items() if not holds]:
        raise ValueError(f"the explorer cannot show {folder}: it needs {'; '.join(broken)}")


def only_normalises(image_processor: LlavaImageProcessor, side: int) -> bool:
    """Whether an image of the model's size is neither resized nor cropped, as in vision.js."""
    values = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    mean, std = (np.array(numbers, np.float32) for numbers in (image_processor.image_mean, image_processor.image_std))
    expected = ((values / 255).astype(np.float32) - mean) / std
    return np.allclose(image_processor.preprocess(Image.fromarray(values)), expected.transpose(2, 0, 1), atol=1e-6)


def is_llamas(tokenizer: LlamaTokenizer) -> bool:
    """Whether tokenizer.js encodes like this SentencePiece model."""
    pieces = tokenizer.pieces
    types = piece_types(tokenizer)
    ranks = [pieces.get_score(i) for i, kind in enumerate(types) if kind == NORMAL]
    return (
        ranks == [-rank for rank in range(len(ranks))]  # the scores of BPE; a unigram model has logarithms
        and types.count(BYTE) == 256
        and not any(pieces.is_unused(i) for i in range(len(pieces)))
        and pieces.normalize(" \ufb01  a\t") == "\u2581\u2581\ufb01\u2581\u2581a\t"  # only the space in front is added
    )


def piece_types(tokenizer: LlamaTokenizer) -> list[int]:
    """The type of each of SentencePiece's pieces."""
    pieces = tokenizer.pieces
    kinds = {UNKNOWN: pieces.is_unknown, CONTROL: pieces.is_control, BYTE: pieces.is_byte}
    return [next((kind for kind, holds in kinds.items() if holds(i)), NORMAL) for i in range(len(pieces))]


def describe(config: LlavaConfig, processor: LlavaProcessor) -> dict:
    """The "config" of the header: that of config.json, and what the tokenizer and the image processor need."""
    tokenizer, image_processor = processor.tokenizer, processor.image_processor
    added = {token_id: text for text, token_id in tokenizer.special_tokens.items() if token_id >= len(tokenizer.pieces)}
    own = range(len(tokenizer.pieces))
    return config.to_dict() | {
        "dtype": "float16",
        "pieces": tokenizer.convert_ids_to_tokens(range(len(own) + len(added))),
        "pieceScores": [tokenizer.pieces.get_score(i) for i in own],
        "pieceTypes": piece_types(tokenizer),
        "specialTokens": tokenizer.special_tokens,
        "skippedIds": sorted(tokenizer.skipped_ids),
        "addBosToken": tokenizer.add_bos_token,
        "bosTokenId": tokenizer.bos_token_id,
        "eosTokenId": tokenizer.eos_token_id,
        "imageMean": list(image_processor.image_mean),
        "imageStd": list(image_processor.image_std),
    }


def pack(config: dict, tensors: dict[str, Tensor]) -> bytes:
    """The header and the weights in float16. Raises a ValueError for weights that float16 cannot represent."""
    entries, weights, offset = {}, [], 0
    for name, tensor in tensors.items():
        entries[name] = {"shape": list(tensor.shape), "offset": offset}
        weights.append(tensor.half().numpy().astype("<f2").tobytes())
        offset += tensor.numel()
        if not tensor.half().isfinite().all():
            raise ValueError(f"{name} has numbers that are not finite in float16")
    header = json.dumps({"config": config, "tensors": entries}, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 4)  # the weights have to be aligned
    return b"".join([len(header).to_bytes(4, "little"), header, *weights])


# The self-contained page

IMPORT = re.compile(r'^import (\{[^;]*?\}) from "\./(\w+)\.js";$', re.MULTILINE)


def self_contained(weights: bytes) -> str:
    """The whole explorer as one HTML file: index.html with its style, its scripts, the worker and the weights."""
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    style = (FOLDER / "style.css").read_text(encoding="utf-8")
    inlined = [
        f'<script type="text/plain" id="worker.js">\n{bundle("worker.js")}</script>',
        f'<script type="text/plain" id="model.bin">{base64.b64encode(weights).decode()}</script>',
        f'<script type="module">\n{bundle("page.js")}</script>',
    ]
    page = replace(page, r'<link rel="stylesheet" href="style.css"\s*/?>', f"<style>\n{style}</style>")
    page = replace(page, r'<script type="module" src="page.js"></script>', "")
    return replace(page, "</body>", "\n".join([*inlined, "</body>"]))


def replace(page: str, pattern: str, text: str) -> str:
    """Replaces what occurs exactly once in index.html."""
    page, count = re.subn(pattern, lambda _: text, page)
    if count != 1:
        raise ValueError(f"index.html must contain {pattern} once; it does {count} times")
    return page


def bundle(entry: str) -> str:
    """A module and everything it imports as one script: each module in a function of its own, dependencies first.

    It supports the forms that the explorer uses: `import { a, b } from "./file.js"` and `export` before a declaration.
    """
    scripts: dict[str, str] = {}

    def add(file: str) -> None:
        source = (FOLDER / file).read_text(encoding="utf-8")
        for _, dependency in re.findall(IMPORT, source):
            if f"{dependency}.js" not in scripts:
                add(f"{dependency}.js")
        exports = re.findall(r"^export (?:async )?(?:function\*?|class|const) (\w+)", source, re.MULTILINE)
        source = re.sub(IMPORT, r"const \1 = \2_js;", source)
        source = re.sub(r"^export (?=async |function|class|const)", "", source, flags=re.MULTILINE)
        if left := re.search(r"^(?:import|export)\b.*|</script.*", source, re.MULTILINE):
            raise ValueError(f"{file} cannot be inlined because of {left[0]!r}")
        scripts[file] = (
            f"const {file.replace('.', '_')} = (() => {{\n{source}\nreturn {{ {', '.join(exports)} }};\n}})();\n"
        )

    add(entry)
    return '"use strict";\n' + "".join(scripts.values())


def parse_arguments() -> argparse.Namespace:
    """Parses the options; invalid ones end in a usage message and exit code 2."""
    parser = argparse.ArgumentParser(prog="export.py", description="Exports a LLaVA checkpoint for the explorer.")
    parser.add_argument("--model", default=str(BUILT_IN), help="checkpoint folder (default: the built-in model)")
    parser.add_argument("--out", type=Path, help="default: explorer/model.bin, unless --html is given")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the whole explorer into one HTML file")
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """Writes the files that were asked for."""
    content = export(find_folder(args.model))
    if args.out or not args.html:
        write(args.out or FOLDER / "model.bin", content)
    if args.html:
        write(args.html, self_contained(content).encode())


def write(path: Path, content: bytes) -> None:
    """Writes a file, or nothing of it, and says so on stderr."""
    write_atomically(path, lambda part: part.write_bytes(content))
    print(f"wrote {path} ({len(content) / 1e6:.1f} MB)", file=sys.stderr)


def main() -> None:
    """The command line: exit code 0; 1 after one sentence on stderr; 2 for invalid options."""
    args = parse_arguments()
    command_line("export.py", lambda: run(args))


if __name__ == "__main__":
    main()
