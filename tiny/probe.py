"""How well does a pretrained vision tower name what is in its patches: in known and unseen combinations, and disturbed?

    python tiny/probe.py --folder BUILD        after build.py, or after pretrain.py tower

The linear layer that the tower was trained with (pretrain.py) names each patch's cell in new pictures: the colour, the
shape and the size of the thing in it, its row and its column. In the line "unseen", only things whose combination is
held out are counted: if the tower encodes shape independently of colour, their shapes are named as well as the others.
"""

import argparse
import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import world
from naming import NAMES, name_patches
from pretrain import PICTURES, TowerTraining

UNSEEN = [(NAMES[0].index(colour), NAMES[1].index(shape)) for colour, shape in world.HELD_OUT]


@torch.no_grad()
def shares(training: TowerTraining, look: world.Look, unseen: bool, number: int = 250) -> list[float]:
    """The percentages of the patches with a thing for which colour, shape, size, row and column are named right."""
    rng = random.Random("probe")
    scenes = [world.make_scene(rng, must=[rng.choice(world.HELD_OUT)] if unseen else []) for _ in range(number)]
    names = torch.stack([name_patches(scene) for scene in scenes])  # (N, P, 5)
    before = training.vision_tower(PICTURES([world.draw(scene, rng, look) for scene in scenes]), [-2], "default")
    counted = names[..., 0] >= 0  # (N, P)
    if unseen:
        counted = torch.stack([(names[..., 0] == c) & (names[..., 1] == s) for c, s in UNSEEN]).any(0)
    scores = training.namer(before).split([len(values) for values in NAMES], dim=-1)  # 5 x (N, P, values)
    right = [score.argmax(-1) == names[..., i] for i, score in enumerate(scores)]
    return [100 * hits[counted].float().mean().item() for hits in right]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="probe.py", description="Probes what a vision tower's patches tell.")
    parser.add_argument("--folder", required=True, type=Path, help="folder with tower.state")
    training = TowerTraining()
    training.load_state_dict(torch.load(parser.parse_args().folder / "tower.state")["model"])
    print("| pictures | colour | shape | size | row | column |\n| --- | --- | --- | --- | --- | --- |")
    for name, look in {"plain": world.PLAIN_LOOK, "unseen": world.PLAIN_LOOK, **world.CONDITIONS}.items():
        print(f"| {name} | {' | '.join(f'{share:.1f}' for share in shares(training, look, name == 'unseen'))} |")


if __name__ == "__main__":
    main()
