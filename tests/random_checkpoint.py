"""Makes a small LLaVA checkpoint with random weights: every file is there, but the model is untrained.

    python tests/random_checkpoint.py FOLDER

The tests use such checkpoints, and without a real one, the command line can be tried on it.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tiny"))
from pretrain import train_tokenizer

from extras.files import write_json
from extras.quantize import CompactLinear
from extras.saving import SHARD_BYTES
from llava import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from vision import CLIPVisionConfig

SENTENCES = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "USER: What is shown in this image? ASSISTANT: A small red circle is to the left of a large blue square.",
    "USER: How many triangles are there? ASSISTANT: There are three triangles, and one of them is green.",
    "The quick brown fox jumps over the lazy dog, again and again, while 1,234 people count to 56,789.",
    "Ein kleines Beispiel mit Umlauten: Äpfel, Öl und Übermut kosten 12 €.",
    "Answer the question using a single word or phrase.",
]


def write_processor_files(folder: Path, image_size: int, tokenizer_model: bytes | None = None) -> None:
    """Writes the files of the tokenizer and the image processor, as in the checkpoints on the hub."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer_model = tokenizer_model or train_tokenizer(SENTENCES, vocab_size=420)
    count = len(sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model))
    (folder / "tokenizer.model").write_bytes(tokenizer_model)
    (folder / "added_tokens.json").write_text(json.dumps({"<image>": count, "<pad>": count + 1}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "pad_token": "<pad>"}))
    preprocessing = {
        "crop_size": {"height": image_size, "width": image_size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": image_size},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Randomises all parameters so that each of them, norms and biases included, affects the output."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        else:
            parameter.normal_(mean=0.5, std=0.2, generator=generator)


def make_checkpoint(folder: Path, vision: CLIPVisionConfig, text: LlamaConfig, seed: int = 0) -> None:
    """Writes a checkpoint of this shape."""
    write_processor_files(folder, vision.image_size)
    config = LlavaConfig(vision, text, image_token_id=420, pad_token_id=421)
    model = LlavaForConditionalGeneration(config)
    randomize(model, seed)
    model.language_model.lm_head.weight.data[:259] *= (
        0.1  # bytes and control tokens become unlikely, so that answers are mostly letters
    )
    model.save_pretrained(folder)


def random_weights(name: str, shape: torch.Size) -> Tensor:
    """A tensor that preserves the scale of activations, and keeps greedy decoding from choosing </s> (2)."""
    if len(shape) == 1:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
    weights = torch.randn(shape).mul_(math.prod(shape[1:]) ** -0.5)
    if name.endswith("lm_head.weight"):
        weights[2] = 0
    return weights


def random_tensor(model: LlavaForConditionalGeneration, name: str) -> Tensor:
    """What is stored under this name: random weights in float16, or the codes and scales of a compact layer."""
    parameter, path = model.get_parameter(name), name.rpartition(".")[0]
    layer = model.get_submodule(path)
    if not isinstance(layer, CompactLinear) or name == f"{path}.bias":
        return random_weights(name, parameter.shape).half()
    if name == f"{path}.weight":
        codes = torch.randint(1, 2**layer.bits, parameter.shape, dtype=torch.uint8)  # without 0, their mean is 0
        if layer.bits == 4:
            codes |= torch.randint(1, 16, parameter.shape, dtype=torch.uint8) << 4
        if path.endswith("lm_head"):
            codes[2] = 128
        return codes
    deviation = 4.32 if layer.bits == 4 else 73.6  # of codes that are all equally likely
    scale = torch.full(parameter.shape, layer.in_features**-0.5 / deviation, dtype=parameter.dtype)
    scale[:, layer.groups :] /= 16  # of the zeros
    return scale


DTYPES = {torch.uint8: "U8", torch.float32: "F32", torch.float16: "F16"}


def write_large_checkpoint(folder: Path, model: LlavaForConditionalGeneration) -> None:
    """Writes config.json and shards of at most 5 GB for a model on the meta device, in float16 as on the hub, or with
    compact layers.

    It holds one tensor in memory at a time. It writes no tokenizer files.
    """
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, parameter in model.named_parameters():
        compact = isinstance(model.get_submodule(name.rpartition(".")[0]), CompactLinear)
        stored = parameter if compact and not name.endswith(".bias") else parameter.half()
        if filled + stored.nbytes > SHARD_BYTES:
            shards, filled = [*shards, {}], 0
        shards[-1][name] = stored
        filled += stored.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file, end = f"model-{number:05}-of-{len(shards):05}.safetensors", 0
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        for name, tensor in shard.items():
            start, end = end, end + tensor.nbytes
            header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8 bytes
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in shard:
                random_tensor(model, name).view(torch.uint8).numpy().tofile(out)
        weight_map |= dict.fromkeys(shard, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", model.config.to_dict() | {"dtype": "float16"})


def write_gguf(file: Path, model: LlavaForConditionalGeneration, kind: str = "Q8_0") -> None:
    """Writes a decoder of this model's shape for llama.cpp: matrices in Q8_0 or Q4_0, one at a time, and a vocabulary.

    The head is always Q8_0. llama.cpp's RoPE pairs channels differently. With random weights, that is only another
    order of channels.
    """
    import gguf

    config = model.config.text_config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("llama")
    special, one_byte = ["<unk>", "<s>", "</s>"], [f"<0x{i:02X}>" for i in range(256)]
    words = [f"word{i}" for i in range(config.vocab_size - len(special + one_byte))]
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    writer.add_token_list(special + one_byte + words)
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * len(words))

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tensors = dict(model.language_model.named_parameters())
    kinds_of = {name: "F32" if p.ndim == 1 else "Q8_0" if "lm_head" in name else kind for name, p in tensors.items()}
    types = {name: gguf.GGMLQuantizationType[one] for name, one in kinds_of.items()}
    for name, parameter in tensors.items():
        size = {"F32": parameter.nbytes, "Q8_0": parameter.numel() // 32 * 34, "Q4_0": parameter.numel() // 32 * 18}
        ours = names.get_name(name, try_suffixes=[".weight"]) or name
        writer.add_tensor_info(ours, parameter.shape, np.dtype("float32"), size[kinds_of[name]], types[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, parameter in tensors.items():
        writer.write_tensor_data(gguf.quants.quantize(random_weights(name, parameter.shape).numpy(), types[name]))
    writer.close()


# A million parameters. The vocabulary is larger than the tokenizer's 422, as in the real checkpoints.
SMALL_VISION = CLIPVisionConfig(64, 128, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14)
SMALL_TEXT = LlamaConfig(
    vocab_size=448,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=8,
    rms_norm_eps=1e-5,
)

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/random_checkpoint.py FOLDER")
    make_checkpoint(Path(sys.argv[1]), SMALL_VISION, SMALL_TEXT)
