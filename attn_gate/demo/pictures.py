"""The pictures with CT slices in them. Each names the source and licence of the images within itself."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from attn_gate.demo.charts import Theme
from attn_gate.demo.results import Results

TRUTH, EAGER, FUSED = "#39e6c3", "#5aa9ff", "#ff9d4d"  # on grey CT, in both themes
WINDOW = 64  # pixels of the close-ups


def attention(results: Results, theme: Theme) -> Figure:
    """One held-out slice through the fused run: prediction and the map of every gate, from the first step to the last."""
    views = results.runs["fused"].views
    moments, gates = list(views), list(next(iter(views.values())).maps)
    slot = _most_tumour(results)
    image, truth = _slice(results, slot)

    figure = Figure(figsize=(1.5 * len(moments) + 0.75, 1.56 * (1 + len(gates)) + 0.45), layout="constrained")
    grid = figure.subplots(1 + len(gates), len(moments), squeeze=False)
    for axes, step in zip(grid[0], moments, strict=True):
        _show_ct(axes, image)
        _contour(axes, truth, TRUTH)
        _contour(axes, views[step].probability[slot], FUSED)
        axes.set_title("before training" if step == 0 else f"step {step}", size=9.5, weight="normal", loc="center", pad=5)
    for row, gate in zip(grid[1:], gates, strict=True):
        maps = [views[step].maps[gate][slot] for step in moments]
        low, high = min(m.min() for m in maps), max(m.max() for m in maps)
        for axes, alpha in zip(row, maps, strict=True):
            shown = axes.imshow(alpha, cmap="magma", vmin=low, vmax=high, interpolation="nearest")
        bar = figure.colorbar(shown, ax=list(row), fraction=0.03, pad=0.01, aspect=18, ticks=[low, high])
        bar.ax.set_yticklabels([f"{low:.2f}", f"{high:.2f}"], size=8)
        bar.outline.set_visible(False)
    grid[0, 0].set_ylabel("held-out slice", size=9.5)
    for axes, gate, place in zip(grid[1:, 0], gates, _places(len(gates)), strict=True):
        size = "×".join(str(n) for n in views[moments[0]].maps[gate].shape[1:])
        axes.set_ylabel(f"{place} gate\n{size}", size=9.5)
    for axes in grid.flat:
        _bare(axes)
    _foot(figure, results, theme, {"contour by experts": TRUTH, "prediction (fused gates)": FUSED})
    return figure


def segmentation(results: Results, theme: Theme) -> Figure:
    """The held-out slice with most tumour of every patient: three contours, and the finest gate's map below."""
    last = {key: run.views[max(run.views)] for key, run in results.runs.items() if run.views and key != "floor"}
    colours = {"eager": EAGER, "fused": FUSED}
    count = len(results.shown)
    figure = Figure(figsize=(max(2.0 * count, 5.5), 4.75), layout="constrained")
    grid = figure.subplots(2, count, squeeze=False)
    for slot, (top, bottom) in enumerate(grid.T):
        image, truth = _slice(results, slot)
        rows, columns = _close_up(truth)
        _show_ct(top, image[rows, columns])
        _contour(top, truth[rows, columns], TRUTH)
        for key, seen in last.items():
            _contour(top, seen.probability[slot][rows, columns], colours[key], "--" if key == "eager" else "-")
        top.set_title(results.patients[results.held_out.patient[results.shown[slot]]], size=9.5, weight="normal",
                      loc="center", pad=5)  # fmt: skip
        finest = next(iter(last["fused" if "fused" in last else "eager"].maps.values()))[slot]
        bottom.imshow(finest[rows, columns], cmap="magma", interpolation="nearest")
        bottom.set_xlabel(f"α {finest.min():.2f} to {finest.max():.2f}", size=8.5)
    grid[0, 0].set_ylabel("held-out slice", size=9.5)
    grid[1, 0].set_ylabel("finest gate's map", size=9.5)
    for axes in grid.flat:
        _bare(axes)
    names = {"contour by experts": TRUTH, **{f"prediction, {key} gates": colours[key] for key in last}}
    _foot(figure, results, theme, names)
    return figure


def _most_tumour(results: Results) -> int:
    return int(results.held_out.truth[results.shown].flatten(1).sum(1).argmax())


def _slice(results: Results, slot: int) -> tuple[np.ndarray, np.ndarray]:
    index = results.shown[slot]
    return results.held_out.image[index, 1].numpy(), results.held_out.truth[index, 0].numpy()


def _show_ct(axes: Axes, image: np.ndarray) -> None:
    axes.imshow(image, cmap="gray", vmin=-1, vmax=1, interpolation="bilinear")


def _contour(axes: Axes, mask: np.ndarray, colour: str, style: str = "-") -> None:
    if mask.min() < 0.5 < mask.max():
        axes.contour(mask, [0.5], colors=[colour], linewidths=1.3, linestyles=style)


def _close_up(truth: np.ndarray) -> tuple[slice, slice]:
    centre = [int(round(float(c.mean()))) for c in np.nonzero(truth)]
    starts = [min(max(c - WINDOW // 2, 0), n - WINDOW) for c, n in zip(centre, truth.shape, strict=True)]
    return tuple(slice(start, start + WINDOW) for start in starts)


def _places(gates: int) -> list[str]:
    return ["finest", *(["middle"] * (gates - 2)), "coarsest"][:gates]


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)


def _foot(figure: Figure, results: Results, theme: Theme, names: dict[str, str]) -> None:
    """Legend, and below it where the images come from."""
    lines = [Line2D([], [], color=colour, lw=2, label=name) for name, colour in names.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), fontsize=8.5)
    figure.supxlabel(results.source, size=6.6, color=theme.faint)
