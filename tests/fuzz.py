"""Damages files, prompts and options at random, and sees that each of them works or is refused with a sentence.

    python tests/fuzz.py --minutes 60

It takes a small valid checkpoint, pictures, prompts and options, changes one of them in a few random places (in the
structure of a JSON file or a header, or in its bytes) and does with it what a user would do. An input fails that
raises anything but an OSError or a ValueError of this project's own making, takes more than 10 seconds, or brings the
process above 2 GB. `--only TARGET:NUMBER` does one input again, and shows its traceback.
"""

import argparse
import contextlib
import copy
import io
import json
import linecache
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin

sys.path.insert(0, str(Path(__file__).parents[1]))
from reference_tokenizer import reference_tokenizer
from toy_data import draw_disc, entry, make_tiny_checkpoint

from extras.adapters import CONFIG_FILE, WEIGHTS_FILE, AdapterConfig, save_adapter
from extras.chat import parse_arguments
from extras.data import read_data
from extras.images import load_image
from extras.lora import FullLinear, LoraLinear, put_in
from llava import KVCache, LlavaForConditionalGeneration, LlavaProcessor
from vision import LlavaImageProcessor

SECONDS, BYTES = 10, 2 * 10**9
WORKS = "works"
ROOT = Path(__file__).parents[1]
VALUES = [None, True, False, -1, 0, 1, 2, 3, 7, 420, 448, 1001, 10**6, 2**31, 2**63, 10**30, 0.5, -1.5, 1e-320, 1e308]
VALUES += [float("nan"), float("inf"), "", "x", "../x", "/etc/passwd", "\0", "\ud800", "llama", "float16", "gelu", "2"]
VALUES += [[], {}, [1], [-2, -1], [[]], {"a": 1}, {"content": "<image>"}, {"shortest_edge": 3}, [0.5] * 3, ["x", None]]
WORDS = ["<image>", "</s>", "<s>", "<pad>", "<unk>", "<im", "age>", " ", "\n", "a", "USER:", "é", "🦙", "<0x41>", "\0"]
WORDS += ["\ud800", "\udfff", "\u202e", "\u0301" * 9, "\x1b[31m", "\ufeff", "▁", "word " * 99, "x" * 5000, "\U0010ffff"]


# How things are damaged


def damage_bytes(rng: random.Random, content: bytes, start: int = 0, end: int | None = None) -> bytes:
    """Some bytes between `start` and `end` changed, removed, put in or repeated, or all from some place on cut off."""
    end = len(content) if end is None else end
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        at = rng.randint(start, max(start, min(end, len(content)) - 1))
        span = at + rng.choice([1, 1, 2, 4, 16, 200])
        kind = rng.randrange(6)
        if kind == 0:
            content = content[:at] + bytes([rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])]) + content[at + 1 :]
        elif kind == 1 and at < len(content):
            content = content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        elif kind == 2:
            content = content[:at] + content[span:]
        elif kind == 3:
            content = content[:at] + rng.randbytes(span - at) + content[at:]
        elif kind == 4:
            content = content[:span] + content[at:]
        elif rng.random() < 0.3:
            content = content[:at]
    return content


def damage_json(rng: random.Random, value: object, also: dict | None = None) -> bytes:
    """A JSON text of which some parts are replaced, removed, renamed or added; at times its bytes are damaged too."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        places = []

        def walk(node: object, places: list = places) -> None:
            if isinstance(node, dict | list):
                for key in node if isinstance(node, dict) else range(len(node)):
                    places.append((node, key))
                    walk(node[key])

        walk(value)
        node, key = rng.choice(places) if places else ({}, "")
        old, kind = node[key] if places else 0, rng.randrange(6)
        if kind == 0 and isinstance(node, dict):
            node.pop(key, None)
        elif kind == 1 and isinstance(node, dict):
            node[rng.choice(WORDS) if rng.random() < 0.5 else f"{key}x"] = old
        elif kind == 2 and also:
            name = rng.choice(list(also))
            value[name] = copy.deepcopy(rng.choice([also[name], rng.choice(VALUES)]))
        elif kind == 3 and isinstance(old, int | float):
            node[key] = rng.choice([-old, old + 1, old - 1, old * 2, old * 10**12, float(old), str(old), [old]])
        else:
            node[key] = copy.deepcopy(rng.choice(VALUES))
    text = json.dumps(value).encode()
    return text if rng.random() < 0.8 else damage_bytes(rng, text)


# What is damaged, and what is done with it


def damaged(rng: random.Random, value: object) -> Any:
    """A JSON value of which some parts are damaged; what is then no JSON any more is undamaged."""
    try:
        return json.loads(damage_json(rng, value))
    except (ValueError, RecursionError):
        return value


class Bench:
    """A folder with everything valid, and the targets: methods that damage one thing and use it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.valid = folder, folder / "valid"
        make_tiny_checkpoint(self.valid)
        self.model = LlavaForConditionalGeneration.from_pretrained(self.valid)
        self.processor = LlavaProcessor.from_pretrained(self.valid)
        self.make_adapter(folder / "valid_adapter")
        self.files = {path.name: path.read_bytes() for path in self.valid.iterdir()}
        weights = self.files["model.safetensors"]
        (self.header_length,) = struct.unpack("<Q", weights[:8])
        self.header = json.loads(weights[8 : 8 + self.header_length])
        self.index = {
            "metadata": {},
            "weight_map": dict.fromkeys(self.header.keys() - {"__metadata__"}, "w.safetensors"),
        }
        (folder / "pictures").mkdir()
        for colour in ("red", "green"):
            draw_disc(folder / "pictures" / f"{colour}.png", colour, (40, 50), 5, 5)
        self.pictures = self.make_pictures()
        added = json.loads(self.files["added_tokens.json"])
        backend = reference_tokenizer(self.valid / "tokenizer.model", added).backend_tokenizer
        self.tokenizer_json = json.loads(backend.to_str())
        self.template = (
            "{% for m in messages %}{{ m['role'].upper() }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}"
            "<image>\n{% else %}{{ c['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
        )
        self.targets: dict[str, Callable[[random.Random], None]] = {
            name.removeprefix("fuzz_"): getattr(self, name) for name in dir(self) if name.startswith("fuzz_")
        }

    def make_adapter(self, folder: Path) -> None:
        """A valid adapter, with a LoRA and a projector that was trained in full."""
        model = LlavaForConditionalGeneration.from_pretrained(self.valid)
        query, linear = model.language_model.model.layers[0].self_attn.q_proj, model.multi_modal_projector.linear_1
        put_in(model, {"language_model.model.layers.0.self_attn.q_proj": LoraLinear(query, 2, 1.0)})
        put_in(model, {"multi_modal_projector.linear_1": FullLinear(linear)})
        save_adapter(model, folder, AdapterConfig(2, 2.0, modules_to_save=["linear_1"]), LlavaImageProcessor())

    def make_pictures(self) -> list[tuple[str, bytes]]:
        """Valid files of the formats that the command line takes."""
        picture = Image.open(self.folder / "pictures" / "red.png").convert("RGB")
        exif = Image.Exif()
        exif[0x0112], exif[0x010E] = 6, "a picture"
        text = PngImagePlugin.PngInfo()
        text.add_text("comment", "words " * 50, zip=True)
        kinds = [
            (picture, "JPEG", {"exif": exif}),
            (picture, "JPEG", {"progressive": True}),
            (picture.convert("CMYK"), "JPEG", {}),
            (picture, "PNG", {"pnginfo": text, "exif": exif}),
            (picture.convert("P"), "PNG", {"transparency": 0}),
            (picture.convert("LA"), "PNG", {}),
            (picture.convert("I;16"), "PNG", {}),
            (picture, "GIF", {"save_all": True, "append_images": [picture.rotate(90)]}),
            (picture, "WEBP", {}),
            (picture, "BMP", {}),
            (picture, "TIFF", {"compression": "tiff_lzw"}),
        ]
        made = []
        for image, kind, options in kinds:
            file = io.BytesIO()
            image.save(file, kind, **options)
            made.append((kind, file.getvalue()))
        return made

    def checkpoint(self, **files: bytes | None) -> Path:
        """A folder with the valid files but for these; `_` in a name stands for a dot."""
        folder = self.folder / "checkpoint"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, content in (self.files | {name.replace("__", "."): new for name, new in files.items()}).items():
            if content is not None:
                (folder / name).write_bytes(content)
        return folder

    def use(self, folder: Path) -> None:
        """Loads all of a checkpoint and answers a question."""
        processor = LlavaProcessor.from_pretrained(folder)
        model = LlavaForConditionalGeneration.from_pretrained(folder)
        inputs = processor(Image.new("RGB", (40, 30), "red"), "USER: <image>\nWhat? ASSISTANT:")
        processor.batch_decode(model.generate(**inputs, max_new_tokens=2))

    def fuzz_header(self, rng: random.Random) -> None:
        weights = self.files["model.safetensors"]
        if rng.random() < 0.6:
            header = damage_json(rng, self.header)
            if rng.random() < 0.3:
                header = re.sub(rb"F32", rng.choice([b"F16", b"F64", b"I32", b"F8_E4M3", b"BOOL"]), header, count=1)
            weights = struct.pack("<Q", len(header)) + header + weights[8 + self.header_length :]
        else:
            weights = damage_bytes(rng, weights, 0, rng.choice([8, 8 + self.header_length, None]))
        LlavaForConditionalGeneration.from_pretrained(self.checkpoint(model__safetensors=weights))

    def fuzz_weights(self, rng: random.Random) -> None:
        weights, numbers = bytearray(self.files["model.safetensors"]), [float("nan"), float("inf"), 1e38, -1e38, 1e-40]
        for _ in range(rng.choice([1, 10, 1000])):
            at = 8 + self.header_length + 4 * rng.randrange((len(weights) - 8 - self.header_length) // 4)
            weights[at : at + 4] = struct.pack("<f", rng.choice(numbers))
        self.use(self.checkpoint(model__safetensors=bytes(weights)))

    def fuzz_config(self, rng: random.Random) -> None:
        also = {"rope_scaling": {"type": "linear", "factor": 2.0}, "image_token_index": 420, "torch_dtype": "float16"}
        config = json.loads(self.files["config.json"])
        if rng.random() < 0.8:
            files = {"config__json": damage_json(rng, config, also | VISION_AND_TEXT)}
        else:
            files = {"generation_config__json": damage_json(rng, json.loads(self.files["generation_config.json"]))}
        self.use(self.checkpoint(**files))

    def fuzz_index(self, rng: random.Random) -> None:
        index = damage_json(rng, self.index)
        files = {"model__safetensors__index__json": index, "w__safetensors": self.files["model.safetensors"]}
        LlavaForConditionalGeneration.from_pretrained(self.checkpoint(**files, model__safetensors=None))

    def fuzz_adapter(self, rng: random.Random) -> None:
        """Damages the config of an adapter, or its weights, and answers a question with it."""
        folder = self.folder / "adapter"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder / "valid_adapter", folder)
        if rng.random() < 0.7:
            config = json.loads((folder / CONFIG_FILE).read_text())
            patterns = {"rank_pattern": {".*": 3}, "alpha_pattern": {"q_proj": 1}, "use_rslora": True}
            (folder / CONFIG_FILE).write_bytes(damage_json(rng, config, patterns))
        else:
            (folder / WEIGHTS_FILE).write_bytes(damage_bytes(rng, (folder / WEIGHTS_FILE).read_bytes()))
        model = LlavaForConditionalGeneration.from_pretrained(self.valid, adapter=folder)
        model.generate(torch.tensor([[1, 300, 301]]), max_new_tokens=2)

    def fuzz_tokenizer_model(self, rng: random.Random) -> None:
        pieces = damage_bytes(rng, self.files["tokenizer.model"])
        processor = LlavaProcessor.from_pretrained(self.checkpoint(tokenizer__model=pieces))
        ids = processor(text=["USER: a disc 🦙 ASSISTANT:"]).input_ids[0]
        processor.decode([*ids, *range(450)])

    def fuzz_tokenizer_files(self, rng: random.Random) -> None:
        decoder = {"0": {"content": "<unk>", "special": True}, "420": {"content": "<image>", "special": True}}
        config = {"add_bos_token": True, "pad_token": {"content": "<pad>"}, "added_tokens_decoder": decoder}
        files = {
            "added_tokens__json": damage_json(rng, {"<image>": 420, "<pad>": 421}),
            "tokenizer_config__json": damage_json(rng, config),
        }
        files.pop(rng.choice([*files, ""]), None)
        processor = LlavaProcessor.from_pretrained(self.checkpoint(**files))
        processor.decode(processor(Image.new("RGB", (9, 9)), "<image> a </s>").input_ids[0])

    def fuzz_tokenizer_json(self, rng: random.Random) -> None:
        tokenizer = copy.copy(self.tokenizer_json)
        # The vocabulary and the merges are long: most of the damage shall be elsewhere.
        part = rng.choice(["", "", "vocab", "merges"])
        if part:
            tokenizer["model"] = tokenizer["model"] | {part: damaged(rng, tokenizer["model"][part])}
        else:
            model = {name: value for name, value in tokenizer["model"].items() if name not in ("vocab", "merges")}
            tokenizer = damaged(rng, tokenizer | {"model": model})
            if isinstance(tokenizer, dict) and isinstance(tokenizer.get("model"), dict):
                tokenizer["model"] = self.tokenizer_json["model"] | tokenizer["model"]
        content = json.dumps(tokenizer).encode()
        processor = LlavaProcessor.from_pretrained(self.checkpoint(tokenizer__json=content, tokenizer__model=None))
        ids = processor(Image.new("RGB", (9, 9)), "USER: <image> a 🦙</s>").input_ids[0]
        processor.decode([*ids, *range(450)])

    def fuzz_chat_template(self, rng: random.Random) -> None:
        part = {"type": "image", "image": Image.new("RGB", (9, 9))}
        message = {"role": "user", "content": [part, {"type": "text", "text": "What?"}]}
        plain = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}, {"role": "assistant"}]
        conversation = damaged(rng, plain) if rng.random() < 0.7 else [message]
        template = damage_bytes(rng, self.template.encode()).decode("utf-8", "replace")
        options = {"chat_template": template} if rng.random() < 0.6 else {}
        self.processor.apply_chat_template(conversation, add_generation_prompt=True, **options)

    def fuzz_preprocessor(self, rng: random.Random) -> None:
        config = damage_json(rng, json.loads(self.files["preprocessor_config.json"]), {"do_pad": True, "size": 28})
        if rng.random() < 0.2:
            config = b'{"image_processor": ' + config + b"}"
            folder = self.checkpoint(processor_config__json=config, preprocessor_config__json=None)
        else:
            folder = self.checkpoint(preprocessor_config__json=config)
        self.use(folder)

    def fuzz_image(self, rng: random.Random) -> None:
        kind, content = rng.choice(self.pictures)
        content = damage_bytes(rng, content, 0, rng.choice([40, 200, None]))
        if kind == "PNG" and rng.random() < 0.7:
            content = with_checksums(content)
        (self.folder / "image").write_bytes(content)
        image = load_image(str(self.folder / "image"))
        self.processor.image_processor.do_pad = rng.random() < 0.5
        pixels = self.processor.image_processor(image)
        assert pixels.isfinite().all()

    def fuzz_prompt(self, rng: random.Random) -> None:
        def text(parts: int) -> str:
            return "".join(
                rng.choice(WORDS) if rng.random() < 0.8 else chr(rng.randrange(0x110000))
                for _ in range(rng.randint(0, parts))
            )

        tokenizer = self.processor.tokenizer
        if rng.random() < 0.5:
            texts = [text(rng.choice([3, 30])) for _ in range(rng.randint(1, 3))]
            images = [Image.new("RGB", (30, 30))] * rng.choice([0, 1, sum(t.count("<image>") for t in texts)])
            inputs = self.processor(images or None, texts, padding=rng.random() < 0.8)
        else:
            question, answer = text(9), rng.choice([None, text(9)])
            images = [Image.new("RGB", (30, 30))] * rng.choice([0, 1, question.count("<image>")])
            ids, is_answer = tokenizer.encode_chat([(question, answer), (text(3), None)], text(2))
            assert len(ids) == len(is_answer)
            inputs = self.processor.prepare([ids], images)
        new = self.model.generate(**inputs, max_new_tokens=1)[:, -1:]
        "".join(tokenizer.batch_decode(new)).encode("utf-8")

    def fuzz_options(self, rng: random.Random) -> None:
        names = ["--temperature", "--top-k", "--top-p", "--seed", "--max-new-tokens", "--device", "--dtype", "--image"]
        names += ["--image-mode", "--short", "--system", "--chat", "--stats", "--colour", "-h", "--"]
        values = [
            "0",
            "-1",
            "1",
            "0.5",
            "nan",
            "inf",
            "1e-300",
            "1e308",
            "9" * 30,
            "x",
            "",
            "-",
            "cpu",
            "cuda",
            "٣",
            "\0",
        ]
        argv = ["--model", "M"]
        for _ in range(rng.randint(0, 4)):
            argv += [rng.choice(names), rng.choice(values)][: rng.choice([1, 2, 2])]
        argv += [rng.choice(WORDS)] * rng.choice([0, 1])
        with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
            try:
                args = parse_arguments(argv)
            except SystemExit as stop:
                if stop.code == 2:
                    raise Usage(said.getvalue().splitlines()[-1]) from None
                return  # help was asked for
        options = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")}
        if options["max_new_tokens"] > 3 and rng.random() < 0.9:
            options["max_new_tokens"] = 3
        generator = torch.Generator().manual_seed(args.seed or 0)
        self.model.generate(torch.tensor([[1, 300, 301]]), **options, generator=generator)

    def fuzz_inputs(self, rng: random.Random) -> None:
        """Tensors of wrong shapes, dtypes and values, masks and caches that do not fit."""
        inputs = dict(self.processor(Image.new("RGB", (30, 30)), "USER: <image> a ASSISTANT:"))
        for _ in range(rng.choice([1, 1, 2])):
            name = rng.choice(list(inputs))
            old = inputs[name]
            changes = [
                lambda t: t[..., :-1],
                lambda t: t[0],
                lambda t: t[None],
                lambda t: t.repeat(2, *[1] * (t.ndim - 1)),
            ]
            changes += [lambda t: t.float(), lambda t: t.int(), lambda t: t.bool(), lambda t: t[:0], lambda t: -t]
            changes += [
                lambda t: t * 0,
                lambda t: t * 1000,
                lambda t: t.flip(-1),
                lambda t: t.half(),
                lambda t: t[:, 1:],
            ]
            changes += [lambda t: t.long(), lambda t: t.to("meta")]
            with contextlib.suppress(RuntimeError, IndexError):
                inputs[name] = rng.choice(changes)(old)
        if rng.random() < 0.2:
            inputs.pop(rng.choice(list(inputs)))
        cache = KVCache(self.model, rng.choice([1, 1, 2]), rng.choice([0, 5, 50])) if rng.random() < 0.3 else None
        mode = rng.choice([torch.no_grad, torch.inference_mode, torch.enable_grad])
        if "input_ids" in inputs:
            with mode():
                if rng.random() < 0.5:
                    self.model(**inputs, cache=cache)
                else:
                    self.model.generate(**inputs, max_new_tokens=2, cache=cache)

    def fuzz_data(self, rng: random.Random) -> None:
        data = [
            entry("red.png", "<image>\nWhich color?", "It is red.", "Why?", "It just is."),
            entry(None, "How many?", "one"),
            entry("green.png", "Which color?\n<image>", "green"),
        ]
        data += [MESSAGES, entry(None, "Which?\n<image>", "red", "<image> Why?", "so") | {"images": ["red.png"] * 2}]
        rng.shuffle(data)
        data = data[rng.randrange(len(data)) :]
        file, stage = self.folder / "data.json", rng.choice(["align", "instruct"])
        if rng.random() < 0.5:
            content = damage_json(rng, data)
        else:
            ends = rng.choice([b"\n", b"\r\n", b"\n\n", b"\r"])
            content = ends.join(
                damage_json(rng, item) if rng.random() < 0.5 else json.dumps(item).encode() for item in data
            )
        file.write_bytes(rng.choice([b"", b"", b"\n", b"\xef\xbb\xbf"]) + content)
        read_data(file, stage, self.processor, self.folder / "pictures", "", 64, rng.random() < 0.5)


MESSAGES = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "index": 0}, {"type": "text", "text": "Which color?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        {"role": "user", "content": [{"type": "image", "path": "green.png"}, {"type": "text", "text": "And this?"}]},
        {"role": "assistant", "content": "green"},
    ],
    "images": [{"path": "red.png"}],
}
VISION_AND_TEXT = {
    "vision_feature_layer": [-2, -3],
    "vision_feature_select_strategy": "full",
    "tie_word_embeddings": True,
    "eos_token_id": [2, 7],
    "text_config": {"model_type": "mistral"},
    "vision_config": {},
}


class Usage(ValueError):
    """A usage message and exit code 2."""


def with_checksums(png: bytes) -> bytes:
    """Makes the checksums of a PNG's chunks right again, so that what was damaged is looked at."""
    made, at = png[:8], 8
    while at + 12 <= len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        body = png[at + 4 : at + 8 + length]
        made += png[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return made + png[at:]


# The run


class TooLong(BaseException):
    """An input took more than its seconds."""


def raise_too_long(*_: object) -> None:
    raise TooLong(f"an input took more than {SECONDS} seconds")


def is_promised(error: BaseException) -> bool:
    """Whether an error is an OSError or a ValueError that one of this project's own lines raised on purpose."""
    if isinstance(error, Usage):
        return True
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(last.filename).parent in (ROOT, ROOT / "extras")
    raised_here = ours and "raise" in linecache.getline(last.filename, last.lineno)
    if isinstance(error, OSError):
        return bool(raised_here or error.filename)
    return type(error) is ValueError and raised_here and " " in str(error)


def kind_of(error: BaseException) -> str:
    """Its message without what differs from one input to the next."""
    text = str(error).split("\n")[0]
    text = re.sub(r"/tmp\S*|/dev/shm\S*", "PATH", text)
    text = re.sub(r"'[^']*'|\"[^\"]*\"|\[.*\]|\{.*\}", "VALUE", text)
    text = re.sub(r"\d[\d.e+]*", "N", text)
    return f"{type(error).__name__}: {text[:100]}"


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def try_one(bench: Bench, target: str, number: int) -> str | None:
    """Does one input. Returns how it was refused, or None; raises an AssertionError if it failed."""
    start, before = time.perf_counter(), peak_bytes()
    label = f"--only {target}:{number}"
    signal.signal(signal.SIGALRM, raise_too_long)
    signal.alarm(SECONDS)
    refused = None
    try:
        bench.targets[target](random.Random(f"{target}:{number}"))
    except (Exception, TooLong) as error:
        if not is_promised(error):
            raise AssertionError(f"{label}: {type(error).__name__}: {str(error)[:500]}") from error
        refused = f"{target}: {kind_of(error)}"
    finally:
        signal.alarm(0)
    assert time.perf_counter() - start < SECONDS, f"{label}: took {time.perf_counter() - start:.1f} s"
    assert peak_bytes() < BYTES or before > BYTES, f"{label}: brought the process to {peak_bytes() / 1e9:.1f} GB"
    return refused


def main() -> None:
    parser = argparse.ArgumentParser(description="Damages inputs at random and sees that they are refused properly.")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--inputs", type=int, default=10**9, help="stop after so many")
    parser.add_argument("--seed", type=int, default=0, help="the number of the first input")
    parser.add_argument("--only", metavar="TARGET[:NUMBER]", default="", help="one target, or one input again")
    parser.add_argument("--ways", type=Path, metavar="FILE", help="write every way of refusal to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (16 * 10**9, resource.RLIM_INFINITY))  # rather an error than a dead machine
    target, _, number = args.only.partition(":")
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        bench = Bench(Path(folder))
        if number:
            print(try_one(bench, target, int(number)) or WORKS)
            return
        targets, ways, tried, failures = [target] if target else list(bench.targets), Counter(), Counter(), Counter()
        start, slowest = time.perf_counter(), 0.0
        with contextlib.suppress(KeyboardInterrupt):  # after which there is still the summary
            for i in range(args.seed, args.seed + args.inputs):
                if time.perf_counter() - start > 60 * args.minutes:
                    break
                name, began = targets[i % len(targets)], time.perf_counter()
                tried[name] += 1
                try:
                    ways[try_one(bench, name, i) or WORKS] += 1
                except AssertionError as failure:
                    kind = f"{name}: {kind_of(failure.__cause__ or failure)}"
                    if kind not in failures:
                        print(f"FAILED {failure}", flush=True)
                    failures[kind] += 1
                slowest = max(slowest, time.perf_counter() - began)
        worked = ways.pop(WORKS, 0)
        minutes = (time.perf_counter() - start) / 60
        print(
            f"{tried.total()} inputs in {minutes:.1f} minutes: {ways.total()} refused in {len(ways)} different ways, "
            f"{worked} worked, {failures.total()} failed; "
            f"slowest {slowest:.1f} s, peak memory {peak_bytes() / 1e9:.2f} GB"
        )
        for name in targets:
            refusals = {way: count for way, count in ways.items() if way.startswith(f"{name}: ")}
            print(f"  {name:16} {tried[name]:7} inputs, {sum(refusals.values()):7} refused in {len(refusals):4} ways")
        if args.ways:
            lines = (f"{count:7} {way}\n" for way, count in ways.most_common())
            args.ways.write_text("".join(lines), errors="replace")
    if failures:
        sys.exit(f"{len(failures)} kinds of failure")


if __name__ == "__main__":
    main()
