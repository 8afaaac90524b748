"""The files that a run leaves: results, plots, the page, the table for READMEs."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from attn_gate.page.files import write
from attn_gate.page.theme import LIGHT, Drawn, draw, write_both

from . import charts, markdown, report
from .results import Results


def write_all(results: Results, folder: Path) -> list[Path]:
    """Write all; the paths of those that a user opens."""
    results.write(folder)
    write(folder / "table.md", markdown.table(results))
    figures: dict[str, Drawn] = {}
    for name, (make, _) in charts.FIGURES.items():
        if make(results, LIGHT) is not None:
            figures[name] = draw(partial(make, results))
            write_both(figures[name], folder / "plots", name)
    write(folder / "report.html", report.html(results, figures))
    return [folder / name for name in ("report.html", "table.md", "results.json")]
