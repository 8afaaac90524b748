"""The pictures with CT slices in them. Each names the source and licence of the images within itself."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D

from attn_gate.demo.results import Results
from attn_gate.page.theme import Theme

TRUTH, EAGER, FUSED = "#39e6c3", "#5aa9ff", "#ff9d4d"  # on grey CT, in both themes
STYLES = {"eager": (0, (3, 1.5)), "fused": "-"}
WINDOW = 64  # pixels of the close-ups
LEFT, RIGHT, TOP, FOOT, GAP = 0.5, 0.5, 0.27, 0.62, 0.07  # inches


def attention(results: Results, theme: Theme) -> Figure:
    """One held-out slice through the fused run: prediction and every gate's map, from first to last step."""
    views = results.runs["fused"].views
    moments, gates = list(views), list(next(iter(views.values())).maps)
    slot = _most_tumour(results)
    image, truth = _slice(results, slot)

    figure, grid = _tiles(1 + len(gates), len(moments), 1.45)
    for axes, step in zip(grid[0], moments, strict=True):
        _show_ct(axes, image)
        _contour(axes, truth, TRUTH)
        _contour(axes, views[step].probability[slot], FUSED)
        _title(axes, "before training" if step == 0 else f"step {step}")
    for row, gate in zip(grid[1:], gates, strict=True):
        maps = [views[step].maps[gate][slot] for step in moments]
        low, high = min(m.min() for m in maps), max(m.max() for m in maps)
        for axes, alpha in zip(row, maps, strict=True):
            shown = axes.imshow(alpha, cmap="magma", vmin=low, vmax=high, interpolation="nearest")
        _colour_bar(figure, row[-1], shown)
    grid[0, 0].set_ylabel("held-out slice")
    for axes, gate, place in zip(grid[1:, 0], gates, _places(len(gates)), strict=True):
        size = "×".join(str(n) for n in views[moments[0]].maps[gate].shape[1:])
        axes.set_ylabel(f"{place} gate\n{size}")
    _foot(figure, results, theme, {_truth(results): (TRUTH, "-"), "prediction, fused gates": (FUSED, "-")})
    return figure


def segmentation(results: Results, theme: Theme) -> Figure:
    """Of every patient the held-out slice with most tumour: three contours, and the finest gate's map."""
    last = {
        key: run.views[max(run.views)] for key, run in results.runs.items() if run.views and key != "floor"
    }
    colours = {"eager": EAGER, "fused": FUSED}
    count = len(results.shown)
    # A single patient's two pictures stand side by side.
    figure, grid = _tiles(2, count, 1.9) if count > 1 else _tiles(1, 2, 2.9)
    for slot, (top, bottom) in enumerate(grid.T if count > 1 else grid):
        image, truth = _slice(results, slot)
        rows, columns = _close_up(truth)
        _show_ct(top, image[rows, columns])
        _contour(top, truth[rows, columns], TRUTH)
        for key, seen in last.items():
            _contour(top, seen.probability[slot][rows, columns], colours[key], STYLES[key])
        _title(top, results.patients[results.held_out.patient[results.shown[slot]]])
        finest = next(iter(last["fused" if "fused" in last else "eager"].maps.values()))[slot]
        close_up = finest[rows, columns]
        shown = bottom.imshow(close_up, cmap="magma", interpolation="nearest")
        if count == 1:
            _title(bottom, "finest gate's map")
            _colour_bar(figure, bottom, shown)
        else:
            text = f"α {close_up.min():.2f} to {close_up.max():.2f}"
            patch = {"boxstyle": "round,pad=0.2", "facecolor": "black", "alpha": 0.55, "linewidth": 0}
            bottom.text(0.04, 0.04, text, color="white", size=8, transform=bottom.transAxes, bbox=patch)
    if count > 1:
        grid[0, 0].set_ylabel("held-out slice")
        grid[1, 0].set_ylabel("finest gate's map")
    lines = {f"prediction, {key} gates": (colours[key], STYLES[key]) for key in last}
    _foot(figure, results, theme, {_truth(results): (TRUTH, "-"), **lines})
    return figure


def _tiles(rows: int, columns: int, tile: float) -> tuple[Figure, np.ndarray]:
    """A figure and its square axes [rows, columns], `tile` inches wide, bare, in line, with room around."""
    width = LEFT + columns * (tile + GAP) - GAP + RIGHT
    height = TOP + rows * (tile + GAP) - GAP + FOOT
    figure = Figure(figsize=(width, height))
    grid = np.empty((rows, columns), dtype=object)
    for row, column in np.ndindex(rows, columns):
        left = LEFT + column * (tile + GAP)
        bottom = height - TOP - tile - row * (tile + GAP)
        axes = figure.add_axes((left / width, bottom / height, tile / width, tile / height))
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        grid[row, column] = axes
    return figure, grid


def _colour_bar(figure: Figure, axes: Axes, shown: AxesImage) -> None:
    """The scale of `shown` to the right of its axes, with the two ends of its range."""
    inch = 1 / (axes.get_position().width * figure.get_figwidth())
    beside = axes.inset_axes((1 + GAP * inch, 0, 0.09 * inch, 1))
    bar = figure.colorbar(shown, cax=beside, ticks=shown.get_clim())
    bar.ax.set_yticklabels([f"{value:.2f}" for value in shown.get_clim()], size=8)
    low, high = bar.ax.get_yticklabels()
    low.set_verticalalignment("bottom")
    high.set_verticalalignment("top")
    bar.outline.set_visible(False)


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, size=9.5, weight="normal", loc="center", pad=5)


def _truth(results: Results) -> str:
    return "true contour" if results.synthetic else "contour by experts"


def _most_tumour(results: Results) -> int:
    return int(results.held_out.truth[results.shown].flatten(1).sum(1).argmax())


def _slice(results: Results, slot: int) -> tuple[np.ndarray, np.ndarray]:
    index = results.shown[slot]
    return results.held_out.image[index, 1].numpy(), results.held_out.truth[index, 0].numpy()


def _show_ct(axes: Axes, image: np.ndarray) -> None:
    axes.imshow(image, cmap="gray", vmin=-1, vmax=1, interpolation="bilinear")


def _contour(axes: Axes, mask: np.ndarray, colour: str, style: str | tuple = "-") -> None:
    if mask.min() < 0.5 < mask.max():
        axes.contour(mask, [0.5], colors=[colour], linewidths=1.3, linestyles=[style])


def _close_up(truth: np.ndarray) -> tuple[slice, slice]:
    centre = [int(round(float(c.mean()))) for c in np.nonzero(truth)]
    starts = [min(max(c - WINDOW // 2, 0), n - WINDOW) for c, n in zip(centre, truth.shape, strict=True)]
    return tuple(slice(start, start + WINDOW) for start in starts)


def _places(gates: int) -> list[str]:
    return ["finest", *(["middle"] * (gates - 2)), "coarsest"][:gates]


def _foot(figure: Figure, results: Results, theme: Theme, names: dict[str, tuple]) -> None:
    """Legend, and below it where the images come from."""
    inch = 1 / figure.get_figheight()
    lines = [
        Line2D([], [], color=colour, ls=style, lw=2, label=name) for name, (colour, style) in names.items()
    ]
    figure.legend(
        handles=lines, loc="lower center", bbox_to_anchor=(0.5, 0.24 * inch), ncols=len(lines), fontsize=9
    )
    figure.text(0.5, 0.09 * inch, results.source, size=6.5, color=theme.faint, ha="center")
