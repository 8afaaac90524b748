"""The plots of a report: each function draws one panel of what was measured, in the colours of a theme."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from attn_gate.page.theme import Theme

from . import modelled, traffic
from .providers import PROVIDERS
from .registry import Config
from .results import Results, Row
from .tables import is_earlier, three_digits

WIDTH = 4.3
_ROW = 0.27  # inches of one config
# Beside attn_gate and eager: the marks, and the places of their colours in a theme.
_MARKERS = {
    "eager-channels-last": "^",
    "compile": "D",
    "attn_gate-compile": "P",
    "onnxruntime": "o",
    "openvino": "s",
}
_COLOURS = ("compile", "attn_gate-compile", "onnxruntime", "openvino")
_LEFT_ALPHA = 0.35  # bars of what attn_gate leaves to PyTorch's layers
# Ticks of speeds, and the widest range, a logarithm, for which they have room.
_TICKS = (
    ((0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4), math.log(2)),
    ((0.4, 0.5, 0.6, 0.7, 0.8, 1, 1.2, 1.5, 2, 2.5, 3), math.log(4)),
    ((0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10), math.log(12)),
    ((0.05, 0.1, 0.2, 0.4, 0.7, 1, 2, 3, 5, 10, 20, 30, 50), math.log(60)),
    ((0.01, 0.03, 0.1, 0.3, 0.7, 1, 2, 5, 10, 20, 50, 100), math.inf),
)


def colour(provider: str, theme: Theme) -> str:
    """The same in every figure."""
    if provider in _COLOURS:
        return theme.others[_COLOURS.index(provider)]
    return {"limit": theme.floor, "eager": theme.eager, "eager-channels-last": theme.ink}.get(
        provider, theme.fused
    )


def speedups(results: Results, theme: Theme, mode: str, kinds: Sequence[str]) -> Figure | None:
    """How many times faster than eager: attn_gate as bars, the others as marks on them."""
    rows = {
        name: results.find(name, mode, "attn_gate")
        for name, config in results.configs.items()
        if config.kind in kinds
        and results.find(name, mode, "eager")
        and results.find(name, mode, "attn_gate")
    }
    if not rows:
        return None
    figure, axes = _rows_panel(list(rows), f"{_mode_title(mode)}: speed, eager PyTorch = 1")
    for place, (name, row) in enumerate(rows.items()):
        eager = results.find(name, mode, "eager")
        ratio = eager.median_ms / row.median_ms
        alpha = _LEFT_ALPHA if row.fused is False else 1
        axes.barh(place, ratio - 1, left=1, height=0.62, color=theme.fused, alpha=alpha)
        # Both medians' intervals together: how well the ratio is known.
        noise = math.exp(math.hypot(_half_width(row), _half_width(eager)))
        axes.plot([ratio / noise, ratio * noise], [place, place], color=theme.ink, lw=0.9)
        for provider, marker in _MARKERS.items():
            other = results.find(name, mode, provider)
            if other is not None:
                at = eager.median_ms / other.median_ms
                axes.plot(at, place, marker, ms=4.5, color=colour(provider, theme), mec=theme.page, mew=0.6)
    axes.axvline(1, color=theme.eager, lw=1.4)
    _log_ratio_axis(axes)
    shown = [p for p in _MARKERS if any(results.find(name, mode, p) for name in rows)]
    left = any(row.fused is False for row in rows.values())
    handles = [
        Line2D([], [], color=theme.eager, lw=1.4, label="eager"),
        Patch(color=theme.fused, label="attn_gate"),
        *([Patch(color=theme.fused, alpha=_LEFT_ALPHA, label="left to PyTorch")] if left else []),
        *(Line2D([], [], ls="", marker=_MARKERS[p], ms=5, color=colour(p, theme), label=PROVIDERS[p].title)
          for p in shown),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=3, columnspacing=1.2, handletextpad=0.5)
    return figure


def memory(results: Results, theme: Theme, what: str, title: str) -> Figure | None:
    """MiB of attn_gate's and eager's step; `what` is a field of Row."""
    found: dict[str, tuple[Row, Row]] = {}
    for name, config in results.configs.items():
        pair = results.find(name, "step", "attn_gate"), results.find(name, "step", "eager")
        if config.kind != "sweep" and all(row is not None and getattr(row, what) for row in pair):
            found[name] = pair
    if not found:
        return None
    figure, axes = _rows_panel(list(found), title)
    for place, pair in enumerate(found.values()):
        for shift, row, color in ((0.19, pair[1], theme.eager), (-0.19, pair[0], theme.fused)):
            value = getattr(row, what) / 2**20
            axes.barh(place + shift, value, height=0.36, color=color)
            axes.text(
                value * 1.08, place + shift, three_digits(value), size=6.5, va="center", color=theme.faint
            )
    values = [getattr(row, what) / 2**20 for pair in found.values() for row in pair]
    axes.set_xscale("log")
    axes.set_xlim(min(values) / 2, max(values) * 3)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    handles = [Patch(color=theme.eager, label="eager"), Patch(color=theme.fused, label="attn_gate")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def roofline(results: Results, theme: Theme) -> Figure | None:
    """Operations in a second over operations per byte, under what this machine can do."""
    points: list[tuple[str, float, float]] = []
    for row in results.rows:
        config = results.configs.get(row.config)
        is_shown = row.provider in ("attn_gate", "eager") and row.mode in ("inference", "step")
        if not row.times_ms or row.dtype != "float32" or not isinstance(config, Config) or not is_shown:
            continue  # the roof is float32's
        if config.kind != "gate" or row.threads != results.machine["threads"] or is_earlier(results, row):
            continue
        flops = traffic.needed_flops(config, row.mode)
        points.append((row.provider, flops / row.needed_bytes, flops / row.median_ms / 1e6))
    if not points:
        return None
    figure, axes = _panel("Roofline: both modes, all gates", "operations per byte that must move")
    copy, peak = results.machine["copy_gbps"], results.machine["peak_gflops"]
    low = min(min(p[1] for p in points) / 2, peak / copy / 4)
    high = max(max(p[1] for p in points) * 2, peak / copy * 2)
    reach = np.geomspace(low, high, 200)
    roof = f"copy {copy:.0f} GB/s, matrix product {peak:.0f} GFLOP/s"
    axes.loglog(reach, np.minimum(copy * reach, peak), color=theme.floor, lw=1.6, label=roof)
    for provider, marker in (("eager", "o"), ("attn_gate", "D")):
        its = [p for p in points if p[0] == provider]
        axes.plot([p[1] for p in its], [p[2] for p in its], marker, ms=4, mec=theme.page, mew=0.5,
                  color=colour(provider, theme), label=provider)  # fmt: skip
    axes.set_ylabel("GFLOP/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    figure.legend(loc="outside lower center", ncols=3, columnspacing=1.0, handlelength=1.4, fontsize=8)
    return figure


def scaling(results: Results, theme: Theme, family: str, mode: str) -> Figure | None:
    """Time over size ("size") or channels ("channels"), with the slope of proportional growth."""
    providers = ("eager", "attn_gate", "limit")
    configs = [c for c in results.configs.values() if c.kind == "sweep" and c.family == family]
    lines = {
        provider: [(c, row) for c in configs if (row := results.find(c.name, mode, provider))]
        for provider in providers
    }
    if len(lines["attn_gate"]) < 2:
        return None
    by_size = family == "size"
    figure, axes = _panel(
        f"{_mode_title(mode)}, growing {'images' if by_size else 'channels'}",
        "side of the image (64 channels)" if by_size else "channels (64² voxels)",
    )
    for provider, pairs in lines.items():
        if not pairs:
            continue
        across = [c.size[0] if by_size else c.channels for c, _ in pairs]
        style = "--" if provider == "limit" else "-"
        axes.loglog(across, [row.median_ms for _, row in pairs], style, marker="o", ms=3.5, lw=1.5,
                    color=colour(provider, theme), label=PROVIDERS[provider].title)  # fmt: skip
        axes.fill_between(across, [row.summary.q1 for _, row in pairs], [row.summary.q3 for _, row in pairs],
                          color=colour(provider, theme), alpha=0.2, lw=0)  # fmt: skip
    ticks = [c.size[0] if by_size else c.channels for c, _ in lines["attn_gate"]]
    first, last = ticks[0], ticks[-1]
    start = lines["attn_gate"][-1][1].median_ms * (first / last) ** 2
    axes.plot([first, last], [start, start * (last / first) ** 2], ":", color=theme.faint, lw=1,
              label="proportional" if by_size else "square")  # fmt: skip
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("ms")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    figure.legend(loc="outside lower center", ncols=4, columnspacing=1.0, handlelength=1.4, fontsize=8)
    return figure


def thread_scaling(results: Results, theme: Theme) -> Figure | None:
    """How many times faster than on one thread, over the number of threads: a small panel for each case."""
    times: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for row in results.rows:
        if row.times_ms and row.dtype == results.dtype and row.provider in ("attn_gate", "eager"):
            lines = times.setdefault((row.config, row.mode), {})
            lines.setdefault(row.provider, {})[row.threads] = row.median_ms
    speeds: dict[str, dict[str, dict[int, float]]] = {}
    for case, lines in times.items():
        for provider, its in lines.items():
            if 1 in its and len(its) > 1:
                curve = {count: its[1] / its[count] for count in sorted(its)}
                speeds.setdefault(", ".join(case), {})[provider] = curve
    if not speeds:
        return None
    curves = [curve for lines in speeds.values() for curve in lines.values()]
    counts = sorted({count for curve in curves for count in curve})
    rows = math.ceil(len(speeds) / 2)
    figure = Figure(figsize=(WIDTH, 1.1 + 1.6 * rows), layout="constrained")
    _title(figure, "Speed over threads, one thread = 1")
    panels = list(figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False).flat)
    for axes, (case, lines) in zip(panels, speeds.items(), strict=False):
        axes.set_title(case, loc="left", size=8.5, weight="normal", pad=4)
        axes.plot(counts, counts, color=theme.floor, lw=0.9)
        for provider, curve in sorted(lines.items(), reverse=True):  # ours on top
            axes.plot(list(curve), list(curve.values()), "-o", ms=3.5, lw=1.6, color=colour(provider, theme))
        _label_ends(axes, lines, theme)
    for axes in panels[len(speeds) :]:
        axes.set_axis_off()
    for axes in panels[: len(speeds)][-2:]:  # each the lowest of its column
        axes.set_xlabel("threads")
        axes.tick_params(labelbottom=True)
    least = min(1, *(speed for curve in curves for speed in curve.values()))
    most = max(counts[-1], *(speed for curve in curves for speed in curve.values()))
    axes = panels[0]  # the others share its scales
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(0.93, counts[-1] ** 1.3)  # room for the numbers at the ends
    axes.set_ylim(least / 1.06, most * 1.06)
    axes.set_xticks(counts, [str(count) for count in counts])
    ticks = [2.0**power for power in range(-3, 10)] + ([0.7, 1.5] if most < 4 else [])
    ticks = [tick for tick in ticks if least <= tick <= most]
    axes.set_yticks(ticks, [f"{t:g}×" for t in ticks])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    handles = [
        Line2D([], [], color=theme.eager, lw=1.6, marker="o", ms=3.5, label="eager"),
        Line2D([], [], color=theme.fused, lw=1.6, marker="o", ms=3.5, label="attn_gate"),
        Line2D([], [], color=theme.floor, lw=0.9, label="ideal"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, columnspacing=1.2, fontsize=8)
    return figure


def _label_ends(axes: Axes, lines: Mapping[str, Mapping[int, float]], theme: Theme) -> None:
    """The speed on most threads, right of each line's end; that of two ends which are close by, apart."""
    ends = {provider: max(curve.items()) for provider, curve in lines.items()}
    order = sorted(ends, key=ends.get)
    for provider, end in ends.items():
        # A line that ends before the other has its number below: the other goes on upwards.
        lift = 0 if len(order) < 2 else 4.5 if provider == order[-1] else -4.5
        axes.annotate(
            f"{end[1]:.2f}×", end, (6, lift), size=7, va="center", textcoords="offset points",
            color=colour(provider, theme),
        )  # fmt: skip


def modelled_speedups(results: Results, theme: Theme, mode: str) -> Figure | None:
    """Eager's modelled time over attn_gate's on GPUs, bfloat16. No measurement."""
    configs = [c for c in results.configs.values() if modelled.can_model(c) and c.kind == "gate"]
    if not configs:
        return None
    title = f"MODELLED, not measured: {_mode_title(mode).lower()},\nbfloat16, by rooflines; eager PyTorch = 1"
    figure, axes = _rows_panel([c.name for c in configs], title)
    colours = (theme.fused, theme.others[0], theme.others[1])
    for place, config in enumerate(configs):
        for gpu, color, shift in zip(modelled.GPUS, colours, (0.25, 0.0, -0.25), strict=True):
            eager = modelled.eager_ms(config, mode, "bfloat16", gpu)
            ratio = eager / modelled.fused_ms(config, mode, "bfloat16", gpu)
            axes.barh(place + shift, ratio - 1, left=1, height=0.22, color=color, alpha=0.55, hatch="////",
                      edgecolor=color, lw=0.6)  # fmt: skip
    axes.axvline(1, color=theme.eager, lw=1.4)
    _log_ratio_axis(axes)
    handles = [
        Patch(facecolor=color, alpha=0.55, hatch="////", edgecolor=color, label=gpu.name)
        for gpu, color in zip(modelled.GPUS, colours, strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, columnspacing=1.2)
    return figure


Draw = Callable[[Results, Theme], Figure | None]

# By name: how it is drawn, and what it shows, for those who can't see it.
FIGURES: dict[str, tuple[Draw, str]] = {
    "speed_inference": (lambda r, t: speedups(r, t, "inference", ("gate",)),
                        "Bars: inference speed of gates against eager PyTorch"),
    "speed_step": (lambda r, t: speedups(r, t, "step", ("gate",)),
                   "Bars: speed of forward and backward of gates against eager PyTorch"),
    "network_inference": (lambda r, t: speedups(r, t, "inference", ("network",)),
                          "Bars: inference speed of whole networks against eager PyTorch"),
    "network_step": (lambda r, t: speedups(r, t, "step", ("network",)),
                     "Bars: speed of whole networks' training step against eager PyTorch"),
    "memory_kept": (lambda r, t: memory(r, t, "kept_bytes", "Kept for backward, MiB"),
                    "Bars: MiB that autograd keeps between forward and backward"),
    "memory_peak": (lambda r, t: memory(r, t, "peak_bytes", "Peak of one training step, MiB"),
                    "Bars: MiB allocated at the peak of a training step"),
    "roofline": (roofline, "Operations in a second over operations per byte, under the machine's roof"),
    "scaling_size_inference": (lambda r, t: scaling(r, t, "size", "inference"),
                               "Inference time over the size of the image"),
    "scaling_size_step": (lambda r, t: scaling(r, t, "size", "step"), "Step time over the size of the image"),
    "scaling_channels_inference": (lambda r, t: scaling(r, t, "channels", "inference"),
                                   "Inference time over the number of channels"),
    "scaling_channels_step": (lambda r, t: scaling(r, t, "channels", "step"),
                              "Step time over the number of channels"),
    "scaling_threads": (thread_scaling, "Speed against one thread over the number of threads"),
    "modelled_inference": (lambda r, t: modelled_speedups(r, t, "inference"),
                           "Bars: modelled, not measured, inference speed on three GPUs"),
    "modelled_step": (lambda r, t: modelled_speedups(r, t, "step"),
                      "Bars: modelled, not measured, step speed on three GPUs"),
}  # fmt: skip


def _mode_title(mode: str) -> str:
    return {"inference": "Inference", "step": "Forward + backward"}[mode]


def _half_width(row: Row) -> float:
    return math.log(row.summary.high / row.summary.low) / 2


def _panel(title: str, x_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.subplots()
    _title(figure, title)
    axes.set_xlabel(x_label)
    return figure, axes


def _rows_panel(names: Sequence[str], title: str) -> tuple[Figure, Axes]:
    """One line for each name, the first on top."""
    figure = Figure(figsize=(WIDTH, max(2.4, 1.3 + _ROW * len(names))), layout="constrained")
    axes = figure.subplots()
    _title(figure, title)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    return figure, axes


def _title(figure: Figure, title: str) -> None:
    """At the figure's left edge: there is more room than above the axes."""
    figure.suptitle(title, x=0.015, ha="left", size=10.5, weight="bold")


def _log_ratio_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    low, high = min(low, 0.88), max(high * 1.05, 1.15)
    axes.set_xlim(low, high)
    # As many as have room: the first of these whose labels don't touch.
    for candidates, room in _TICKS:
        ticks = [t for t in candidates if low <= t <= high]
        if math.log(high / low) < room:
            break
    axes.set_xticks(ticks, [f"{t:g}×" for t in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
