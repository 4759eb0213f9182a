"""A linear probe: does a pretrained vision tower encode the shapes of unseen combinations of colour and shape?

    python tiny/probe.py --folder BUILD        after build.py, or after pretrain.py tower

A linear classifier is trained to predict the shape of a thing from its patch features, at the layer that LLaVA uses, on
things that are neither red nor blue nor yellow. It is tested on new pictures, on three groups of things: the same other
colours; red, blue and yellow in combinations that the tower was trained on; red stars, blue triangles and yellow
squares, which are held out. If the tower encodes shape independently of colour, the last two accuracies are as high as
the first.
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
from pretrain import PICTURES, VISION, TowerTraining

from vision import CLIPVisionModel

HELD_OUT_COLOURS = {colour for colour, _ in world.HELD_OUT}


@torch.no_grad()
def things(tower: CLIPVisionModel, number: int, unseen: bool) -> tuple[list[world.Thing], Tensor]:
    """The known or the unseen things of `number` scenes, and the mean patch features of each (things, Dv)."""
    found, features = [], []
    for i in range(number):
        rng = random.Random(f"probe/{number}/{i}")
        scene = world.make_scene(rng, must=[rng.choice(world.HELD_OUT)] if unseen else [])
        patches = tower(PICTURES([world.draw(scene, rng)]), [-2], "default")  # (1, 36, Dv)
        cells = patches.view(3, 2, 3, 2, -1).mean(dim=(1, 3)).flatten(0, 1)  # (9, Dv): a cell is 2 x 2 patches
        for thing in scene:
            if ((thing.colour, thing.shape) in world.HELD_OUT) == unseen:
                found.append(thing)
                features.append(cells[thing.cell])
    return found, torch.stack(features)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="probe.py", description="Probes a vision tower for the shapes of unseen combinations."
    )
    parser.add_argument("--folder", required=True, type=Path, help="folder with tower.state")
    folder = parser.parse_args().folder
    training = TowerTraining()
    training.load_state_dict(torch.load(folder / "tower.state")["model"])
    tower = training.vision_tower

    def select(found: list[world.Thing], features: Tensor, held_out_colours: bool) -> tuple[Tensor, Tensor]:
        chosen = [i for i, thing in enumerate(found) if (thing.colour in HELD_OUT_COLOURS) == held_out_colours]
        return features[chosen], torch.tensor([world.SHAPES.index(found[i].shape) for i in chosen])

    x, y = select(*things(tower, 2000, unseen=False), held_out_colours=False)
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
        "other colours": select(*fresh, held_out_colours=False),
        "red, blue, yellow; known combinations": select(*fresh, held_out_colours=True),
        "red, blue, yellow; unseen combinations": select(*unseen, held_out_colours=True),
    }.items():
        right = (probe((x - mean) / spread).argmax(1) == y).float().mean().item()
        print(f"{name}: {100 * right:.1f} % of {len(y)} shapes")


if __name__ == "__main__":
    main()
