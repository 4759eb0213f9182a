"""Asks a pretrained tower for the shape of things whose combination of colour and shape it has never seen.

    python tiny/probe.py --folder BUILD        after build.py, or after pretrain.py tower

A linear classifier learns to read shapes out of the layer that LLaVA reads, from the patches of things that are neither
red nor blue nor yellow. Then it reads the shapes of things in other pictures: of the same colours; red, blue and yellow
ones in combinations that the tower knows; red stars, blue triangles and yellow squares, which it has never seen. If
shape and colour are separate matters to it, the last two figures are as high as the first.
"""

import argparse
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import world
from pretrain import PICTURES, VISION, TowerLesson, make_tokenizer

from vision import CLIPVisionModel

KEPT_BACK = {colour for colour, _ in world.HELD_OUT}


@torch.no_grad()
def things(tower: CLIPVisionModel, number: int, unseen: bool) -> tuple[list[world.Thing], Tensor]:
    """The things of so many scenes, only known or only unseen ones, and the mean of each one's patches (things, Dv)."""
    found, features = [], []
    for i in range(number):
        rng = random.Random(f"probe/{number}/{i}")
        scene = world.make_scene(rng, must=[rng.choice(world.HELD_OUT)] if unseen else [])
        patches = tower(PICTURES([world.draw(scene, rng)]), [-2], "default")  # (1, 36, Dv)
        cells = patches.view(3, 2, 3, 2, -1).mean(dim=(1, 3)).flatten(0, 1)  # (9, Dv): 2 x 2 patches are a cell
        for thing in scene:
            if ((thing.colour, thing.shape) in world.HELD_OUT) == unseen:
                found.append(thing)
                features.append(cells[thing.cell])
    return found, torch.stack(features)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="probe.py", description="Probes a tower for shapes in unseen combinations.")
    parser.add_argument("--folder", required=True, type=Path, help="the folder that has tower.state")
    folder = parser.parse_args().folder
    lesson = TowerLesson(make_tokenizer(folder))
    lesson.load_state_dict(torch.load(folder / "tower.state")["model"])
    tower = lesson.writer.vision_tower

    def select(found: list[world.Thing], features: Tensor, kept_back: bool) -> tuple[Tensor, Tensor]:
        chosen = [i for i, thing in enumerate(found) if (thing.colour in KEPT_BACK) == kept_back]
        return features[chosen], torch.tensor([world.SHAPES.index(found[i].shape) for i in chosen])

    x, y = select(*things(tower, 2000, unseen=False), kept_back=False)
    mean, spread = x.mean(0), x.std(0) + 1e-6
    torch.manual_seed(0)
    probe = nn.Linear(VISION.hidden_size, len(world.SHAPES))
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(500):
        F.cross_entropy(probe((x - mean) / spread), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    fresh, unseen = things(tower, 1000, unseen=False), things(tower, 1001, unseen=True)
    for name, (x, y) in {
        "other colours": select(*fresh, kept_back=False),
        "red, blue, yellow; known combinations": select(*fresh, kept_back=True),
        "red, blue, yellow; unseen combinations": select(*unseen, kept_back=True),
    }.items():
        right = (probe((x - mean) / spread).argmax(1) == y).float().mean().item()
        print(f"{name}: {100 * right:.1f} % of {len(y)} shapes")


if __name__ == "__main__":
    main()
