"""All figures of a demo: which can be drawn from what is there, as PNGs for a light and a dark page."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from attn_gate.demo import charts, pictures
from attn_gate.demo.results import Results
from attn_gate.page.theme import Drawn, Theme, draw, write_both


@dataclass(frozen=True)
class Kind:
    """One figure: how it is drawn and what must be there for it."""

    draw: Callable[[Results, Theme], Figure]
    ready: Callable[[Results], object]


KINDS: dict[str, Kind] = {
    "attention": Kind(pictures.attention, lambda r: "fused" in r.runs and r.runs["fused"].views),
    "segmentation": Kind(
        pictures.segmentation, lambda r: any(r.runs[k].views for k in r.runs if k != "floor")
    ),
    "difference_float64": Kind(charts.float64_difference, lambda r: r.float64.difference),
    "difference_locked": Kind(charts.locked_error, lambda r: r.locked and r.locked.gradient_error),
    "difference_free": Kind(charts.free_difference, lambda r: len([k for k in r.runs if r.runs[k].loss]) > 1),
    "learning_loss": Kind(charts.loss_curves, lambda r: any(run.loss for run in r.runs.values())),
    "learning_dice": Kind(charts.dice_curves, lambda r: any(run.dice for run in r.runs.values())),
    "cost_time": Kind(charts.time_bars, lambda r: r.cost),
    "cost_memory": Kind(charts.memory_bars, lambda r: r.cost),
}


def draw_all(results: Results, directory: Path) -> Iterator[tuple[str, Drawn]]:
    """Draws every figure that can be drawn and writes NAME.png and NAME-dark.png; yields them one by one."""
    for name, kind in KINDS.items():
        if kind.ready(results):
            drawn = draw(functools.partial(kind.draw, results))
            write_both(drawn, directory, name)
            yield name, drawn
