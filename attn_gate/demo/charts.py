"""Curves and bars: every function draws one small panel, readable on a phone, in the colours of a `Theme`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from attn_gate.demo.results import Results
from attn_gate.page.theme import Theme

SIZE = (4.1, 3.0)
SMOOTHING = 15
_TIGHT = {"fontsize": 8, "columnspacing": 1.2, "handletextpad": 0.5}  # a legend of several columns


def loss_curves(results: Results, theme: Theme) -> Figure:
    """Training loss of the free runs."""
    figure, axes = _panel("Training loss", "step")
    for key, run in results.runs.items():
        if run.loss:
            axes.plot(_smooth(run.loss), **_line(key, theme), label=run.name)
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower left")
    return figure


def dice_curves(results: Results, theme: Theme) -> Figure:
    """Dice on the held-out slices during the free runs."""
    figure, axes = _panel("Dice on held-out slices", "step")
    for key, run in results.runs.items():
        if run.dice:
            axes.plot(
                list(run.dice), [d.pooled for d in run.dice.values()], **_line(key, theme), marker="o", ms=3.5
            )
            axes.lines[-1].set_label(f"{run.name}: {run.dice[max(run.dice)].pooled:.3f}")
    axes.set_ylim(0, 1)
    axes.set_xlim(left=0)
    figure.legend(loc="outside lower center", ncols=3, title="final", title_fontsize=8.5, **_TIGHT)
    return figure


def float64_difference(results: Results, theme: Theme) -> Figure:
    """(a) |fused - eager| loss of two float64 runs."""
    figure, axes = _panel("a  float64: difference of the losses", "step")
    difference = np.array(results.float64.difference)
    # A logarithmic axis has no zero; a quarter of float64's last place stands for it.
    last_place = np.finfo(np.float64).eps
    same = last_place / 4
    axes.semilogy(np.maximum(difference, same), color=theme.fused, marker="o", ms=4, lw=1.2)
    axes.axhline(last_place, color=theme.floor, lw=1.2, ls="--")
    axes.text(0, last_place * 1.4, "last place of 1.0", color=theme.faint, size=8)
    axes.text(0, same / 1.4, "the same bits", color=theme.faint, size=8, va="top")
    axes.set_ylim(same / 5, max(1e-12, 10 * difference.max(initial=0)))
    return figure


def locked_error(results: Results, theme: Theme) -> Figure:
    """(b) loss and gradient error of the fused network at the eager run's weights."""
    figure, axes = _panel("b  float32, step-locked: relative error", "step")
    locked = results.locked
    axes.semilogy(locked.gradient_error, color=theme.fused, lw=0.9, label="gradient, fused to eager")
    smallest = np.finfo(np.float32).eps / 8  # a logarithmic axis has no zero
    loss = np.maximum(locked.loss_error, smallest)
    axes.semilogy(loss, color=theme.floor, alpha=0.6, lw=0.8, label="loss, fused to eager")
    for program, marker, size in (("eager", "o", 6), ("fused", "x", 4)):
        errors = getattr(locked, f"{program}_error")
        axes.semilogy(
            list(errors),
            list(errors.values()),
            ls="",
            marker=marker,
            ms=size,
            mfc="none",
            color=getattr(theme, program),
            label=f"gradient, {program} to float64",
        )
    figure.legend(loc="outside lower center", ncols=2, **_TIGHT)
    return figure


def free_difference(results: Results, theme: Theme) -> Figure:
    """(c) how far free float32 runs drift from the eager one."""
    figure, axes = _panel("c  float32, free: difference of the losses", "step")
    eager = results.runs["eager"].loss
    for key in ("floor", "fused"):
        if key in results.runs and results.runs[key].loss:
            run = results.runs[key]
            pairs = zip(eager, run.loss, strict=False)  # an interrupted run is shorter
            difference = _smooth([abs(a - b) for a, b in pairs])
            axes.semilogy(
                np.where(difference > 0, difference, np.nan),
                **_line(key, theme),
                label=f"{run.name} against eager",
            )
    axes.legend(loc="lower right")
    return figure


def time_bars(results: Results, theme: Theme) -> Figure:
    """Milliseconds of forward + backward in both memory layouts: all gates alone, whole network."""
    return _bars("Time of one training step", "ms", results.cost.gates_ms, results.cost.network_ms, theme)


def memory_bars(results: Results, theme: Theme) -> Figure:
    """MiB kept between forward and backward: all gates alone, whole network."""
    gates, network = (
        {"": {program: n / 2**20 for program, n in kept.items()}}
        for kept in (results.cost.gates_bytes, results.cost.network_bytes)
    )
    return _bars("Memory kept for the backward pass", "MiB", gates, network, theme)


Groups = dict[str, dict[str, float]]  # {group: {program: value}}


def _bars(title: str, unit: str, gates: Groups, network: Groups, theme: Theme) -> Figure:
    """Bars of the gates and of the network, each on a scale of its own: the gates are a small part."""
    figure = Figure(figsize=SIZE, layout="constrained")
    figure.suptitle(title, x=0.015, ha="left", size=10.5, weight="bold")
    for axes, (name, groups) in zip(
        figure.subplots(1, 2), {"gates alone": gates, "whole network": network}.items(), strict=True
    ):
        for shift, program in ((-0.21, "eager"), (0.21, "fused")):
            values = [values[program] for values in groups.values()]
            bars = axes.bar(
                np.arange(len(groups)) + shift,
                values,
                width=0.38,
                color=getattr(theme, program),
                label=program,
            )
            axes.bar_label(bars, [f"{v:.3g}" if v < 100 else f"{v:.0f}" for v in values], padding=2, size=8.5)
        axes.set_title(f"{name}, {unit}", size=9.5, weight="normal", color=theme.faint)
        axes.set_xticks(range(len(groups)), [group.replace(" ", "\n") for group in groups])
        axes.set_xlim(-0.6 if len(groups) > 1 else -0.9, len(groups) - (0.4 if len(groups) > 1 else 0.1))
        axes.margins(y=0.12)
        axes.grid(axis="x", visible=False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _panel(title: str, x_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.grid(axis="x", visible=False)
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure, axes


def _line(key: str, theme: Theme) -> dict[str, object]:
    style = {"floor": (0, (4, 2)), "eager": "-", "fused": "-"}[key]
    return {
        "color": getattr(theme, key),
        "lw": 1.6,
        "ls": style,
        "zorder": {"floor": 4, "eager": 2, "fused": 3}[key],
    }


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Running mean over the last SMOOTHING values (fewer at the start)."""
    total = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - SMOOTHING, 0)
    return (total[ends] - total[starts]) / (ends - starts)
