"""Figures for the notebooks: pictures with their patches, heat maps over pictures, bars, tokens; all in one style.

Every function draws into the matplotlib axes or figure that it is given. Colours are safe for the colour-blind (Okabe
and Ito's palette; cividis for amounts, PuOr for signed values), and text is large enough for a projector.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image
from torch import Tensor

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, GREY = "#CC79A7", "#56B4E9", "#F0E442", "#999999"
PALETTE = [BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, YELLOW, GREY]
AMOUNT, SIGNED = "cividis", "PuOr"  # colour maps: from zero upwards; from negative through white to positive
HEAT = LinearSegmentedColormap.from_list("heat", [VERMILION + "00", VERMILION + "ff"])  # from transparent to opaque


def use_style() -> None:
    """Sets the fonts and colours of all figures in a notebook."""
    plt.rcParams.update(
        {
            "figure.dpi": 72,
            "figure.constrained_layout.use": True,
            "savefig.bbox": "standard",
            "font.size": 14,
            "axes.titlesize": 15,
            "axes.prop_cycle": plt.cycler(color=PALETTE),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "image.cmap": AMOUNT,
            "image.interpolation": "nearest",  # shows the pixels unsmoothed; the stored figures are a quarter as large
            "lines.linewidth": 2.5,
        }
    )


def show_picture(ax: Axes, picture: Image.Image | np.ndarray, title: str = "", grid: int = 0) -> None:
    """A picture; `grid` adds the lines that cut it into grid x grid patches."""
    side = np.asarray(picture).shape[0]
    ax.imshow(picture, extent=(0, side, side, 0))
    ax.set_title(title)
    ax.set_axis_off()
    for i in range(grid + 1) if grid else []:
        line = {"color": "white", "linewidth": 1.2, "clip_on": False}
        ax.axhline(i * side / grid, **line)
        ax.axvline(i * side / grid, **line)


def show_heat(
    ax: Axes, picture: Image.Image, values: Sequence, title: str = "", largest: float | None = None
) -> AxesImage:
    """One value per patch, as a heat map over a pale picture; the (P,) or (rows, columns) values start at the top left.

    Only the coloured objects of the picture are shown, in grey: the more saturated, the darker, because an object may
    be as bright as the background. The colour scale goes from 0 to `largest`, or to the largest value. Returns the
    heat map, which a colour bar needs.
    """
    values = np.asarray(values, dtype=float)
    rows = round(values.size**0.5)
    values = values.reshape(rows, -1)
    side = picture.width
    colour = np.ptp(np.asarray(picture), axis=-1) & 0xE0  # (side, side); few tones keep the notebook small
    ax.imshow(colour, cmap="gray_r", vmin=-60, vmax=400, extent=(0, side, side, 0))
    heat = ax.imshow(values, cmap=HEAT, vmin=0, vmax=largest, extent=(0, side, side, 0))
    ax.set_title(title)
    ax.set_axis_off()
    return heat


def bars(ax: Axes, labels: Sequence[str], values: Sequence[float], title: str = "", marked: int | None = None) -> None:
    """Horizontal bars from top to bottom, each with its value; `marked` is the index of one in another colour."""
    values = [float(value) for value in values]
    colours = [VERMILION if i == marked else BLUE for i in range(len(values))]
    ax.barh(range(len(values)), values, color=colours)
    ax.set_yticks(range(len(values)), labels)
    ax.invert_yaxis()
    ax.set_title(title)
    for i, value in enumerate(values):
        ax.text(value, i, f" {value:.2f}", va="center", fontsize=12)
    ax.margins(x=0.15)


def show_tokens(
    ax: Axes,
    tokens: Sequence[str],
    colours: Sequence[str],
    framed: Sequence[bool] | None = None,
    per_row: int = 12,
    title: str = "",
) -> None:
    """Tokens as coloured boxes, row by row; some may be framed."""
    for i, (token, colour) in enumerate(zip(tokens, colours, strict=True)):
        row, column = divmod(i, per_row)
        ax.add_patch(plt.Rectangle((column, row), 0.92, 0.8, facecolor=colour, alpha=0.4))
        if framed is not None and framed[i]:
            ax.add_patch(plt.Rectangle((column, row), 0.92, 0.8, fill=False, linewidth=2.5))
        size = 12 if max(map(len, token.split("\n"))) * per_row <= 120 else 10
        ax.text(column + 0.46, row + 0.4, token, ha="center", va="center", fontsize=size)
    ax.set(xlim=(-0.05, per_row), ylim=((len(tokens) - 1) // per_row + 0.9, -0.1), title=title)
    ax.set_axis_off()


def mark_spans(ax: Axes, spans: dict[str, tuple[int, int]]) -> None:
    """Coloured strips below an image with one column per position: name -> (first position, first one after it)."""
    for (name, (start, end)), colour in zip(spans.items(), [BLUE, ORANGE, VERMILION, SKY], strict=False):
        ax.axvspan(start - 0.5, end - 0.5, -0.16, -0.04, color=colour, linewidth=0, clip_on=False, label=name)
    ax.tick_params(axis="x", length=0, pad=18)


def show_journey(
    fig: Figure,
    picture: Image.Image,
    pixels: Tensor,
    patches: Tensor,
    projected: Tensor,
    prompt: Sequence[str],
    words: Sequence[str],
    probabilities: Sequence[float],
    answer: str,
) -> None:
    """The path from pixels to words in seven panels: pixels (3, h, w), patches (P, Dv), projected (P, D), and texts."""
    upper, middle, lower = fig.subfigures(3, 1, height_ratios=[1.25, 0.8, 1])
    grid = round(len(patches) ** 0.5)
    ax = upper.subplots(1, 4, width_ratios=[1, 1, 1.5, 1.5])
    show_picture(ax[0], picture, "1 the picture")
    low, high = pixels.min(), pixels.max()
    show_picture(
        ax[1], ((pixels - low) / (high - low)).permute(1, 2, 0).numpy(), f"2 pixels {tuple(pixels.shape)}", grid
    )
    for panel, values, title in [(ax[2], patches, "3 patch features"), (ax[3], projected, "4 projected")]:
        limit = values.abs().quantile(0.98).item()
        panel.imshow(values.T, cmap=SIGNED, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
        panel.set(title=f"{title} {tuple(values.shape)}", xlabel="patch", ylabel="channel")
    first_image = prompt.index("<image>")
    boxes = [*prompt[:first_image], f"<image>\nx {len(patches)}", *prompt[first_image + len(patches) :]]
    colours = [SKY if i == first_image else ORANGE for i in range(len(boxes))]
    show_tokens(
        middle.subplots(), boxes, colours, per_row=13, title=f"5 the prompt: {len(prompt)} vectors (blue: the patches)"
    )
    left, right = lower.subplots(1, 2, width_ratios=[1.6, 1])
    bars(left, words, probabilities, "6 the decoder's next token: probabilities", marked=0)
    left.set_xlim(0, 1.15)
    right.set_axis_off()
    right.set_title("7 the answer")
    box = {"boxstyle": "round,pad=0.6", "facecolor": GREEN, "alpha": 0.4, "edgecolor": "none"}
    right.text(0.5, 0.5, answer, ha="center", va="center", fontsize=20, bbox=box, wrap=True)
