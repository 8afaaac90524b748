"""The files that a run leaves."""

from __future__ import annotations

from pathlib import Path

from .results import Results


def write_all(results: Results, folder: Path) -> list[Path]:
    """Write all; the paths of those that a user opens."""
    results.write(folder)
    return [folder / "results.json"]
