"""Pretrains the parts that LLaVA starts from: the tokenizer, the vision tower and the decoder.

    python tiny/pretrain.py tokenizer --output FOLDER   a SentencePiece BPE, trained on the world's texts
    python tiny/pretrain.py tower     --output FOLDER   a CLIP vision tower, trained on pictures with short texts
    python tiny/pretrain.py decoder   --output FOLDER   a Llama decoder, trained on conversations about ideal pictures
    python tiny/pretrain.py join      --output FOLDER   a checkpoint of these, with a computed projector

Every step generates new pictures and texts, so no sample is seen twice. Tower and decoder training save their state
regularly. The same command resumes an interrupted run, with the results of an uninterrupted one.

The tower is trained with CLIP's contrastive loss (arXiv 2103.00020): over all pairs of a batch, the CLS features of the
last layer are matched with the features of a caption's last token from a small text encoder. Half of the pairs are near
twins, which differ in shape or position. But LLaVA uses only the patch features, which this loss does not constrain. So
a linear layer, discarded later, has to name each patch's cell and the colour, shape and size of what is in it, from the
features of the layer that LLaVA uses. Label smoothing limits how firmly it can learn that nothing red is a star.
"""

import argparse
import dataclasses
import io
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import talk
import world
from make_data import conversation
from naming import NAMES, SIDE, SMOOTHING, name_patches, patch_words, say_names
from phrases import ATTRIBUTES, alt_text, caption, notes

from extras.files import write_atomically, write_json
from extras.saving import copy_processor_files
from extras.terminal import command_line
from llama import LlamaForCausalLM, LlamaModel
from llava import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from tokenizer import IMAGE_TOKEN, SHORT_ANSWER, LlamaTokenizer
from vision import CLIPVisionConfig, CLIPVisionModel, LlavaImageProcessor

VISION = CLIPVisionConfig(
    128, 512, num_hidden_layers=5, num_attention_heads=4, image_size=world.SIDE, patch_size=world.SIDE // SIDE
)
LAYERS = 5  # of the decoder
LONGEST = 208  # tokens of a conversation in its pretraining
# What the texts of the tower's pretraining consist of; its auxiliary models need no other words
WORDS = ["<s>", "</s>", ",", "blob", *world.COLOURS, *world.SHAPES, *world.SIZES, *world.ROWS, *world.COLUMNS]
SAVE_EVERY = 250  # steps
KEPT = {"tower": "vision_tower.", "decoder": "language_model."}  # prefixes of the weights that join keeps
PICTURES = LlavaImageProcessor(size=world.SIDE, crop_size=world.SIDE, do_pad=True)
Model = TypeVar("Model", bound=nn.Module)


def text_config(words: int, layers: int) -> LlamaConfig:
    """The config of the decoder, and of the auxiliary models in the tower's training, for a vocabulary of this size."""
    rows = math.ceil(words / 64) * 64
    return LlamaConfig("llama", rows, 128, 352, layers, 4, max_position_embeddings=1024, rms_norm_eps=1e-5)


@torch.no_grad()
def initialised(model: Model) -> Model:
    """Initialises all weight matrices so that every layer roughly preserves the scale of its input."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02 if "embed" in name else parameter[0].numel() ** -0.5)
    return model


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Trains a SentencePiece BPE with Llama's settings and returns the bytes of its tokenizer.model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=vocab_size,
        hard_vocab_limit=False,  # a small corpus may yield fewer pieces
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


@world.with_made_up_words()
def make_tokenizer(folder: Path) -> LlamaTokenizer:
    """Loads the tokenizer of a folder. If there is none, trains it on the world's texts first."""
    if not (folder / "tokenizer.model").exists():
        texts = []
        for i in range(4000):
            rng = random.Random(f"tokenizer/{i}")
            scene = world.make_scene(rng)
            texts += [notes(scene, rng), alt_text(scene)]
            for turn in talk.converse(scene, rng, 8):
                texts += [f"USER: {turn.question} ASSISTANT: {turn.sentence}", f"ASSISTANT: {turn.short}"]
                texts += [f"?{turn.question}", f"?{SHORT_ANSWER.strip()}"]  # no space in front, as after a line feed
        model = train_tokenizer(texts, vocab_size=1020)
        folder.mkdir(parents=True, exist_ok=True)
        count = len(sentencepiece.SentencePieceProcessor(model_proto=model))
        write_json(folder / "added_tokens.json", {"<image>": count, "<pad>": count + 1})
        write_json(folder / "tokenizer_config.json", {"add_bos_token": True, "pad_token": "<pad>"})
        write_atomically(folder / "tokenizer.model", lambda part: part.write_bytes(model))
    return LlamaTokenizer.from_pretrained(folder)


# The training loop of tower and decoder


def fit(
    name: str,
    model: nn.Module,
    loss_of: Callable[[int], tuple[Tensor, dict[str, float]]],
    args: argparse.Namespace,
    peak: float,
) -> None:
    """Trains all parameters: the hidden layers' matrices with Muon, the rest with AdamW.

    The learning rate rises during a warmup, stays constant for the first half of the steps, then falls linearly.

    Args:
        name: of the files: name.state holds the state to resume from, name.csv the losses.
        model: the model to train.
        loss_of: step -> its loss, and other figures to log.
        args: steps, until (the number of steps to stop after, or None), batch, seed and output folder.
        peak: the highest learning rate.

    Raises a ValueError if the saved state is from a training run with other settings.
    """
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers." in n]
    outer = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers." in n)]
    optimizers = [
        torch.optim.Muon(inner, lr=peak, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=peak, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    state_file, table_file = args.output / f"{name}.state", args.output / f"{name}.csv"
    begin, settings = 0, {"steps": args.steps, "batch": args.batch, "seed": args.seed}
    lines: list[str] = []
    if state_file.exists():
        state = torch.load(state_file)
        if state["settings"] != settings:
            raise ValueError(f"{state_file}: a run with {state['settings']}; use another folder or delete the file")
        begin, lines = state["step"], state["lines"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    warmup, hold, clock = 100, args.steps // 2, time.perf_counter()
    for step in tqdm(range(begin, args.until or args.steps), name, initial=begin, total=args.steps, mininterval=5):
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
        if (step + 1) % SAVE_EVERY == 0 or step + 1 in (args.until, args.steps):
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            state |= {"step": step + 1, "lines": lines, "settings": settings}
            write_atomically(state_file, partial(torch.save, state))


def padded(rows: Sequence[Sequence[int]], value: int = 0) -> Tensor:
    """(B, T), padded on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


# The tower


class TowerTraining(nn.Module):
    """The vision tower with its auxiliary parts: a text encoder for the contrastive loss, and a linear layer that names
    what is in the cell of each patch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.vision_tower = CLIPVisionModel(VISION)
        self.reader = LlamaModel(text_config(len(WORDS), layers=2))
        width = VISION.hidden_size
        self.from_picture = nn.Linear(width, 128, bias=False)
        self.from_text = nn.Linear(128, 128, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.namer = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(map(len, NAMES))))

    def forward(
        self, pixel_values: Tensor, names: Tensor, captions: list[list[int]]
    ) -> tuple[Tensor, dict[str, float]]:
        """Pictures (N, 3, 96, 96), names (N, P, 5) and captions, as ids from <s> to </s> -> the loss and its parts."""
        before, last = self.vision_tower(pixel_values, [-2, -1], "full").chunk(2, dim=-1)  # 2 x (N, 1 + P, Dv)

        # Naming: the patch features of LLaVA's layer, the last but one, must tell what is in the patch's cell
        scores = self.namer(before[:, 1:]).split([len(values) for values in NAMES], dim=-1)  # 5 x (N, P, values)
        losses = [
            F.cross_entropy(score.flatten(0, 1), names[..., i].flatten(), ignore_index=-1, label_smoothing=SMOOTHING)
            for i, score in enumerate(scores)
        ]
        right = (scores[1].argmax(-1) == names[..., 1])[names[..., 2] >= 0].float().mean()

        # Contrast, as in CLIP: which caption belongs to which picture?
        ends = torch.tensor([len(text) - 1 for text in captions])
        text = self.reader(self.reader.embed_tokens(padded(captions)))[torch.arange(len(ends)), ends]  # (N, D), at </s>
        a = F.normalize(self.from_picture(self.vision_tower.post_layernorm(last[:, 0])), dim=-1)  # (N, 128)
        b = F.normalize(self.from_text(text), dim=-1)
        similar = self.log_scale.exp().clamp(max=100) * a @ b.T  # (N, N)
        pairs = torch.arange(len(similar))
        contrast = (F.cross_entropy(similar, pairs) + F.cross_entropy(similar.T, pairs)) / 2
        found = (similar.argmax(1) == pairs).float().mean()
        naming = torch.stack(losses).sum()
        figures = {"naming": naming, "shapes": right, "contrast": contrast, "found": found}
        return naming + 0.25 * contrast, {name: figure.item() for name, figure in figures.items()}


def tower_batch(step: int, args: argparse.Namespace) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Pictures (N, 3, 96, 96), the names of what is in their patches, and captions. Half are near twins of the others.

    In the first fifth of the training, all things have any colour or no particular shape, later half of them. So the
    tower does not learn "red" as evidence against "star", and knows unseen combinations by what they share with others.
    """
    rng = random.Random(f"tower/{args.seed}/{step}")
    known = world.SHAPES_ALONE + world.COLOURS_ALONE
    if step >= args.steps // 5:
        known = world.KNOWN + 6 * world.SHAPES_ALONE + world.COLOURS_ALONE
    scenes = [world.make_scene(rng, known=known) for _ in range(args.batch // 2)]
    scenes += [world.make_twin(scene, rng, known) for scene in scenes]
    pictures = PICTURES([world.draw(scene, rng, world.random_look(rng)) for scene in scenes])
    captions = [["<s>", *alt_text(scene).replace(" some", "").replace(",", " ,").split(), "</s>"] for scene in scenes]
    ids = [[WORDS.index(word) for word in text] for text in captions]
    return pictures, torch.stack([name_patches(scene) for scene in scenes]), ids


def train_tower(args: argparse.Namespace) -> None:
    """Trains the tower and writes tower.state."""
    torch.manual_seed(args.seed)
    model = initialised(TowerTraining())
    fit("tower", model, lambda step: model(*tower_batch(step, args)), args, peak=2e-3)


# The decoder


class DecoderTraining(nn.Module):
    """The decoder, trained on ideal pictures: each image token is a weighted sum of the embeddings of words for what is
    in its patch. What the projector has to learn later is to make such sums of the tower's features.
    """

    def __init__(self, tokenizer: LlamaTokenizer) -> None:
        super().__init__()
        self.language_model = LlamaForCausalLM(text_config(tokenizer.pad_token_id + 1, LAYERS))
        self.image_token_id = tokenizer.image_token_id

    def forward(self, rows: list[tuple[list[int], list[bool]]], patches: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Conversations, as (ids with P image tokens, which of them belong to answers), and the words of their patches
        (B, P, W, 2), as ids and weights -> mean loss and accuracy of the answer tokens."""
        ids = padded([ids for ids, _ in rows])  # (B, T)
        learned = padded([learned for _, learned in rows]).bool()[:, 1:]  # (B, T - 1)
        words = self.language_model.model.embed_tokens(ids)
        word_ids, weights = patches.unbind(-1)  # 2 x (B, P, W)
        pictures = (self.language_model.model.embed_tokens(word_ids.long()) * weights[..., None]).sum(-2)  # (B, P, D)
        words[ids == self.image_token_id] = F.dropout(pictures.flatten(0, 1), 0.1)
        hidden = self.language_model.model(words)[:, :-1]
        logits, targets = self.language_model.lm_head(hidden[learned]), ids[:, 1:][learned]
        return F.cross_entropy(logits, targets), {"right": (logits.argmax(-1) == targets).float().mean().item()}


def decoder_batch(
    step: int, args: argparse.Namespace, tokenizer: LlamaTokenizer
) -> tuple[list[tuple[list[int], list[bool]]], Tensor]:
    """Conversations about scenes, some bare captions, and the words of the scenes' patches.

    At first, guessing fails: there are always three things, no two share a colour or a shape, and all questions but the
    exercises are about one of them. Wordings are plain, and later more and more often the known ones. In between,
    exercises are four times as frequent as at the end.
    """
    rng, rows, patches, progress = random.Random(f"decoder/{args.seed}/{step}"), [], [], step / args.steps
    early = progress < 0.075
    families = [*ATTRIBUTES, "details", "naming", "facts"] if early else talk.FAMILIES
    if not early and progress < 7.5 / 17:
        families = [*families, *3 * ["facts"]]
    for _ in range(args.batch):
        scene = world.make_scene(rng, 3, distinct=True) if early else talk.make_scene(rng)
        turns = talk.converse(scene, rng, 8, families, plain=rng.random() > (progress - 0.13) / 0.32)
        (question, answer), *rest = conversation(turns, rng)
        ids, learned = tokenizer.encode_chat([(f"{IMAGE_TOKEN}\n{question}", answer), *rest], "")
        if not early and rng.random() < 0.06:
            text = tokenizer.encode(caption(scene), add_special_tokens=False)
            ids = [tokenizer.bos_token_id, tokenizer.image_token_id, *text, tokenizer.eos_token_id]
            learned = [False, False, *len(text) * [True], True]
        image = ids.index(tokenizer.image_token_id)
        words = [[(tokenizer.encode(word)[-1], w) for word, w in patch] for patch in patch_words(scene, rng)]
        ids[image : image + 1], learned[image : image + 1] = len(words) * ids[image : image + 1], len(words) * [False]
        rows.append((ids[:LONGEST], learned[:LONGEST]))
        patches.append(words)
    return rows, torch.tensor(patches)


@world.with_made_up_words()
def train_decoder(args: argparse.Namespace, tokenizer: LlamaTokenizer) -> None:
    """Trains the decoder and writes decoder.state."""
    torch.manual_seed(args.seed)
    model = initialised(DecoderTraining(tokenizer))
    fit("decoder", model, lambda step: model(*decoder_batch(step, args, tokenizer)), args, peak=3e-3)


def join(args: argparse.Namespace, tokenizer: LlamaTokenizer) -> None:
    """Writes the checkpoint that stage "instruct" starts from."""
    torch.manual_seed(args.seed)
    text = text_config(tokenizer.pad_token_id + 1, LAYERS)
    config = LlavaConfig(VISION, text, tokenizer.image_token_id, pad_token_id=tokenizer.pad_token_id)
    model = initialised(LlavaForConditionalGeneration(config))
    kept = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("multi_modal_projector.")}
    for part, prefix in KEPT.items():
        weights = torch.load(args.output / f"{part}.state")["model"]
        kept |= {name: tensor for name, tensor in weights.items() if name.startswith(prefix)}
    model.load_state_dict(kept)
    tower = TowerTraining()
    tower.load_state_dict(torch.load(args.output / "tower.state")["model"])
    looks = [(talk.make_scene(rng), world.random_look(rng)) for rng in [random.Random(f"join/{i}") for i in range(64)]]
    pictures = PICTURES([world.draw(scene, random.Random(0), look) for scene, look in looks])
    features = tower.vision_tower(pictures, [-2], "default").flatten(0, 1)
    words = [word for values in NAMES for word in values]
    embeddings = model.language_model.model.embed_tokens(torch.tensor([tokenizer.encode(word)[-1] for word in words]))
    weights = torch.tensor([{"nothing": 3.0, "blob": 0.0}.get(word, 1.0) for word in words])  # as in ideal pictures
    say_names(model.multi_modal_projector, tower.namer, features, embeddings * weights[:, None])
    base = args.output / "base"
    model.save_pretrained(base)
    copy_processor_files(args.output, base)
    size = {"height": world.SIDE, "width": world.SIDE}
    settings = {**dataclasses.asdict(PICTURES), "size": {"shortest_edge": world.SIDE}, "crop_size": size}
    write_json(base / "preprocessor_config.json", settings | {"image_processor_type": "LlavaImageProcessor"})


# The command line


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="pretrain.py", description="Pretrains the parts that LLaVA starts from.")
    add = parser.add_argument
    add("what", choices=["tokenizer", "tower", "decoder", "join"], help="what to train, or join for the checkpoint")
    add("--output", required=True, type=Path, help="folder for tokenizer, training states, losses and checkpoint")
    add("--steps", type=int, default=3000, help="training steps (default 3000)")
    add("--until", type=int, help="stop after this many steps; the same command without it resumes")
    add("--batch", type=int, default=32, help="samples per step (default 32)")
    add("--seed", type=int, default=0, help="seed of samples and initial weights (default 0)")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    if args.what == "tower":
        train_tower(args)
        return
    tokenizer = make_tokenizer(args.output)
    if args.what != "tokenizer":
        {"decoder": train_decoder, "join": join}[args.what](args, tokenizer)


if __name__ == "__main__":
    command_line("pretrain.py", main, "interrupted; the same command resumes from the last saved state")
