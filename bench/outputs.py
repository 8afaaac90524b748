"""The files that a run leaves: results, plots, the page, the table for READMEs."""

from __future__ import annotations

import datetime
import shutil
import tempfile
from functools import partial
from pathlib import Path

from attn_gate.page.files import write
from attn_gate.page.theme import LIGHT, Drawn, draw, write_both

from . import charts, markdown, report
from .results import Results


def make_folder(folder: Path) -> None:
    """Make it, and see whether files can be written there.

    Raises:
        ValueError: they can't.
    """
    try:
        (folder / "plots").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"--out: {folder} must be a folder to write to: {error.strerror}; take another one"
        ) from None


def set_aside(folder: Path) -> None:
    """Keep a copy of the results of the run before, which this one will replace, named after their date.

    A copy: where nothing gets measured, results.json stays too.
    """
    file = folder / "results.json"
    if file.exists():
        written = datetime.datetime.fromtimestamp(file.stat().st_mtime)
        shutil.copy2(file, folder / f"results.{written:%Y-%m-%d-%H%M%S}.json")


def write_all(results: Results, folder: Path) -> list[Path]:
    """Write all, and remove what an earlier run had beyond that; the paths of those that a user opens."""
    results.write(folder)
    table = markdown.table(results)
    if table:
        write(folder / "table.md", table)
    else:
        (folder / "table.md").unlink(missing_ok=True)
    figures: dict[str, Drawn] = {}
    for name, (make, _) in charts.FIGURES.items():
        if make(results, LIGHT) is not None:
            figures[name] = draw(partial(make, results))
            write_both(figures[name], folder / "plots", name)
        else:
            for look in ("", "-dark"):
                (folder / "plots" / f"{name}{look}.png").unlink(missing_ok=True)
    write(folder / "report.html", report.html(results, figures))
    names = ("report.html", *(["table.md"] if table else []), "results.json")
    return [folder / name for name in names]
