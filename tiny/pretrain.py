"""What LLaVA takes for granted: a vision tower that has seen pictures, and a decoder that has read texts.

    python tiny/pretrain.py tokenizer --output FOLDER   a SentencePiece BPE, from the world's texts
    python tiny/pretrain.py tower     --output FOLDER   a CLIP vision tower, from pictures with captions
    python tiny/pretrain.py decoder   --output FOLDER   a Llama decoder, from scenes in words with conversations
    python tiny/pretrain.py join      --output FOLDER   all, with a projector that has learned nothing, as a checkpoint

Every step makes its pictures and texts afresh, so nothing is seen twice. Both trainings save their state every so
often, and the same command line goes on from there with the numbers that it would have had.

The tower is CLIP's (arXiv 2103.00020): its CLS of the last layer and the last token of a caption in a small text
encoder have to find one another among the pairs of a batch. Half of the pairs are near twins, which differ in shape or
place. But contrast asks nothing of the patches, which are all that LLaVA reads. So beside it, and thrown away later, a
small decoder has to write about the picture from the patch features of LLaVA's layer, as in CoCa (arXiv 2205.01917): a
caption, or facts such as "circle red", so that what belongs to one thing comes to stand in one place.
"""

import argparse
import dataclasses
import io
import math
import random
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import world
from make_data import conversation

from check import command_line
from llava import LlamaConfig, LlamaForCausalLM, LlamaModel, LlavaConfig, LlavaForConditionalGeneration
from load import copy_processor_files, write_json, write_whole
from tokenizer import SHORT_ANSWER, LlamaTokenizer
from vision import CLIPVisionConfig, LlavaImageProcessor

VISION = CLIPVisionConfig(128, 512, num_hidden_layers=5, num_attention_heads=4, image_size=world.SIDE, patch_size=16)
LAYERS = 5  # of the decoder
SAVE_EVERY = 250  # steps
KEPT = {"tower": "writer.vision_tower.", "decoder": "language_model."}  # of what is trained
PICTURES = LlavaImageProcessor(size=world.SIDE, crop_size=world.SIDE, do_pad=True)


def text_config(tokenizer: LlamaTokenizer, layers: int) -> LlamaConfig:
    """The shape of the decoder, and with fewer layers of the helpers that the tower is trained with."""
    rows = (tokenizer.pad_token_id // 64 + 1) * 64
    return LlamaConfig("llama", rows, 128, 352, layers, 4, max_position_embeddings=1024, rms_norm_eps=1e-5)


@torch.no_grad()
def initialised(model: nn.Module) -> nn.Module:
    """Draws all matrices so that no layer makes its input much larger or smaller."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02 if "embed" in name else parameter[0].numel() ** -0.5)
    return model


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """A SentencePiece BPE with Llama's settings, learned from texts: the bytes of a tokenizer.model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=vocab_size,
        hard_vocab_limit=False,  # few texts may have fewer pieces
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=True,
        minloglevel=2,
    )
    return model.getvalue()


def make_tokenizer(folder: Path) -> LlamaTokenizer:
    """Trains a tokenizer on the world's texts, unless the folder has it, and reads it."""
    if not (folder / "tokenizer.model").exists():
        texts = []
        for i in range(3000):
            rng = random.Random(f"tokenizer/{i}")
            scene = world.make_scene(rng)
            texts += [world.notes(scene, rng), world.alt_text(scene)]
            for turn in world.converse(scene, rng, 6):
                texts += [f"USER: {turn.question} ASSISTANT: {turn.sentence}", f"ASSISTANT: {turn.short}"]
                texts += [f"?{turn.question}", f"?{SHORT_ANSWER.strip()}"]  # as after a line feed, without a space
        model = train_tokenizer(texts, vocab_size=640)
        folder.mkdir(parents=True, exist_ok=True)
        count = len(sentencepiece.SentencePieceProcessor(model_proto=model))
        write_json(folder / "added_tokens.json", {"<image>": count, "<pad>": count + 1})
        write_json(folder / "tokenizer_config.json", {"add_bos_token": True, "pad_token": "<pad>"})
        write_whole(folder / "tokenizer.model", lambda part: part.write_bytes(model))
    return LlamaTokenizer.from_pretrained(folder)


# What both trainings share


def fit(
    name: str,
    model: nn.Module,
    loss_of: Callable[[int], tuple[Tensor, dict[str, float]]],
    args: argparse.Namespace,
    peak: float,
) -> None:
    """Trains all of a model: Muon (matrices between hidden states) and AdamW (the rest), constant, then falling rates.

    Args:
        name: of the files: name.state to go on from, name.csv with the losses.
        model: what is trained.
        loss_of: step -> its loss, and other figures to be written down.
        args: steps, output folder.
        peak: the learning rate.

    Raises a ValueError if what is there to go on from was trained with other settings.
    """
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers." in n]
    outer = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers." in n)]
    optimizers = [
        torch.optim.Muon(inner, lr=peak, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=peak, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    state_file, table_file = args.output / f"{name}.state", args.output / f"{name}.csv"
    begin, lines, settings = 0, [], {"steps": args.steps, "batch": args.batch, "seed": args.seed}
    if state_file.exists():
        state = torch.load(state_file)
        if state["settings"] != settings:
            raise ValueError(
                f"{state_file} is of a training with {state['settings']}: use another folder, or delete it"
            )
        begin, lines = state["step"], state["lines"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    warmup, hold = 100, args.steps // 2
    clock = time.perf_counter()
    for step in tqdm(range(begin, args.steps), name, initial=begin, total=args.steps, mininterval=5):
        rate = peak * min((step + 1) / warmup, 1, (args.steps - step) / (args.steps - hold))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        loss, figures = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0:
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            values = {"step": step, "loss": loss.item(), **figures, "seconds": seconds}
            lines += [",".join(values)] if not lines else []
            lines.append(",".join(f"{value:.5g}" for value in values.values()))
            table_file.write_text("\n".join(lines) + "\n")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.steps:
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            state |= {"step": step + 1, "lines": lines, "settings": settings}
            write_whole(state_file, lambda part, state=state: torch.save(state, part))


def padded(rows: list[list[int]], value: int = 0) -> Tensor:
    """(B, T), filled up on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


# The tower


class TowerLesson(nn.Module):
    """The vision tower and its teachers: a decoder that writes captions, and an encoder of texts to compare with."""

    def __init__(self, tokenizer: LlamaTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        config = LlavaConfig(VISION, text_config(tokenizer, layers=2), tokenizer.image_token_id)
        self.writer = LlavaForConditionalGeneration(config)  # its vision tower is the one that is kept
        self.reader = LlamaModel(config.text_config)
        self.from_picture = nn.Linear(VISION.hidden_size, 128, bias=False)
        self.from_text = nn.Linear(config.text_config.hidden_size, 128, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(
        self, pixel_values: Tensor, captions: list[list[int]], texts: list[list[int]]
    ) -> tuple[Tensor, dict[str, float]]:
        """Pictures (N, 3, 96, 96), their captions, and texts to write, from <s> to </s> -> the loss, and its parts."""
        tower, decoder = self.writer.vision_tower, self.writer.language_model
        before, last = tower(pixel_values, [-2, -1], "full").chunk(2, dim=-1)  # 2 x (N, 1 + P, Dv)

        # Writing, as LLaVA will do it: the patches of the last layer but one in front, then the words.
        ids = padded(texts)  # (N, T)
        patches = self.writer.multi_modal_projector(before[:, 1:])  # (N, P, D)
        words = decoder.model.embed_tokens(ids)  # (N, T, D)
        hidden = decoder.model(torch.cat([patches, words], dim=1))[:, patches.shape[1] : -1]  # (N, T - 1, D)
        learned = torch.arange(1, ids.shape[1]) < torch.tensor([len(text) for text in texts])[:, None]  # (N, T - 1)
        writing = F.cross_entropy(decoder.lm_head(hidden[learned]), ids[:, 1:][learned])

        # Contrast, as CLIP does it: which of the captions belongs to which of the pictures?
        ends = torch.tensor([len(caption) - 1 for caption in captions])
        text = self.reader(self.reader.embed_tokens(padded(captions)))[torch.arange(len(ends)), ends]  # (N, D), at </s>
        a = F.normalize(self.from_picture(tower.post_layernorm(last[:, 0])), dim=-1)  # (N, 128)
        b = F.normalize(self.from_text(text), dim=-1)
        scores = self.log_scale.exp().clamp(max=100) * a @ b.T  # (N, N)
        pairs = torch.arange(len(scores))
        contrast = (F.cross_entropy(scores, pairs) + F.cross_entropy(scores.T, pairs)) / 2
        found = (scores.argmax(1) == pairs).float().mean()
        return writing + 0.25 * contrast, {
            "writing": writing.item(),
            "contrast": contrast.item(),
            "found": found.item(),
        }


def lesson(
    step: int, args: argparse.Namespace, tokenizer: LlamaTokenizer
) -> tuple[Tensor, list[list[int]], list[list[int]]]:
    """Pictures (N, 3, 96, 96), captions, and texts to write: half of them scenes, half their near twins.

    In the first part of the training, things are grey or have no particular shape. So shapes and colours are learned
    apart, and a combination that was never seen is recognised by what it has in common with others. Without that,
    "red" is taken for evidence against "star" when no star was ever red.
    """
    rng = random.Random(f"tower/{args.seed}/{step}")
    known = world.PLAIN if step < args.steps // 5 else world.KNOWN
    scenes = [world.make_scene(rng, known=known) for _ in range(args.batch // 2)]
    scenes += [world.make_twin(scene, rng, known) for scene in scenes]
    captions = [world.alt_text(scene) for scene in scenes]
    texts = [
        caption if i % 2 else world.ask_facts(scene, rng, 6).short
        for i, (scene, caption) in enumerate(zip(scenes, captions, strict=True))
    ]
    ids = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in captions + texts]
    return PICTURES([world.draw(scene, rng) for scene in scenes]), ids[: len(scenes)], ids[len(scenes) :]


def train_tower(args: argparse.Namespace, tokenizer: LlamaTokenizer) -> None:
    """Writes tower.state."""
    torch.manual_seed(args.seed)
    model = initialised(TowerLesson(tokenizer))
    fit("tower", model, lambda step: model(*lesson(step, args, tokenizer)), args, peak=2e-3)


# The decoder


class DecoderLesson(nn.Module):
    """A decoder that reads scenes in words, and answers questions about them."""

    def __init__(self, tokenizer: LlamaTokenizer) -> None:
        super().__init__()
        self.language_model = LlamaForCausalLM(text_config(tokenizer, LAYERS))

    def forward(self, rows: list[tuple[list[int], list[bool]]]) -> tuple[Tensor, dict[str, float]]:
        """Conversations, as (ids, which of them are answers) -> the mean loss of the answers' tokens."""
        ids = padded([ids for ids, _ in rows])  # (B, T)
        learned = padded([learned for _, learned in rows]).bool()[:, 1:]  # (B, T - 1)
        hidden = self.language_model.model(self.language_model.model.embed_tokens(ids))[:, :-1]
        logits, targets = self.language_model.lm_head(hidden[learned]), ids[:, 1:][learned]
        return F.cross_entropy(logits, targets), {"right": (logits.argmax(-1) == targets).float().mean().item()}


def reading(step: int, args: argparse.Namespace, tokenizer: LlamaTokenizer) -> list[tuple[list[int], list[bool]]]:
    """Conversations about scenes in words.

    In the first half of the training guessing does not pay: there are always three things, no two of a colour or shape,
    and every question but those for facts is about one of them.
    """
    rng, rows, early = random.Random(f"decoder/{args.seed}/{step}"), [], step < args.steps // 2
    for _ in range(args.batch):
        scene = world.make_scene(rng, 3, distinct=True) if early else world.make_scene(rng)
        families = [*world.ATTRIBUTES, "details"] if early else None
        turns = world.ask("facts", scene, rng) + world.converse(scene, rng, 3 if early else 4, families)
        turns = conversation(turns, rng)
        turns[0] = (f"{world.notes(scene, rng)}\n{turns[0][0]}", turns[0][1])
        rows.append(tokenizer.encode_chat(turns, ""))
    return rows


def train_decoder(args: argparse.Namespace, tokenizer: LlamaTokenizer) -> None:
    """Writes decoder.state."""
    torch.manual_seed(args.seed)
    model = initialised(DecoderLesson(tokenizer))
    fit("decoder", model, lambda step: model(reading(step, args, tokenizer)), args, peak=3e-3)


def join(args: argparse.Namespace, tokenizer: LlamaTokenizer) -> None:
    """Writes the checkpoint that stage "align" begins with."""
    torch.manual_seed(args.seed)
    config = LlavaConfig(
        VISION, text_config(tokenizer, LAYERS), tokenizer.image_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model = initialised(LlavaForConditionalGeneration(config))
    kept = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("multi_modal_projector.")}
    for part, prefix in KEPT.items():
        weights = torch.load(args.output / f"{part}.state")["model"]
        kept |= {name.removeprefix("writer."): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    model.load_state_dict(kept)
    base = args.output / "base"
    model.save_pretrained(base)
    copy_processor_files(args.output, base)
    size = {"height": world.SIDE, "width": world.SIDE}
    settings = {**dataclasses.asdict(PICTURES), "size": {"shortest_edge": world.SIDE}, "crop_size": size}
    write_json(base / "preprocessor_config.json", settings | {"image_processor_type": "LlavaImageProcessor"})


# The command line


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="pretrain.py", description="Trains what LLaVA takes for granted.")
    add = parser.add_argument
    add("what", choices=["tokenizer", "tower", "decoder", "join"])
    add("--output", required=True, type=Path, help="folder for tokenizer, states and losses")
    add("--steps", type=int, default=3000)
    add("--batch", type=int, default=32)
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    tokenizer = make_tokenizer(args.output)
    if args.what != "tokenizer":
        {"tower": train_tower, "decoder": train_decoder, "join": join}[args.what](args, tokenizer)


if __name__ == "__main__":
    command_line("pretrain.py", main, "interrupted; the same command line goes on from the last state")
