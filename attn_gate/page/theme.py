"""Colours of figures on a light and on a dark page, and figures drawn in both."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from attn_gate.page.files import write

DPI = 200


@dataclass(frozen=True)
class Theme:
    """Colours of one appearance of the page; the same program has the same colour in every figure.

    others: for what is neither eager nor fused nor a floor.
    """

    name: str
    page: str
    ink: str
    faint: str
    grid: str
    eager: str
    fused: str
    floor: str
    others: tuple[str, ...]

    def rc(self) -> dict[str, object]:
        """Matplotlib's settings for this theme."""
        return {
            "figure.facecolor": self.page,
            "axes.facecolor": self.page,
            "savefig.facecolor": self.page,
            "text.color": self.ink,
            "axes.labelcolor": self.faint,
            "axes.edgecolor": self.grid,
            "xtick.color": self.faint,
            "ytick.color": self.faint,
            "grid.color": self.grid,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.spines.left": False,
            "xtick.major.size": 0,
            "xtick.minor.size": 0,
            "ytick.major.size": 0,
            "ytick.minor.size": 0,
            "axes.titlesize": 10.5,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.titlepad": 10,
            "axes.labelsize": 9,
            "xtick.labelsize": 8.5,
            "ytick.labelsize": 8.5,
            "legend.fontsize": 8.5,
            "legend.frameon": False,
            "grid.linewidth": 0.7,
            "font.family": "sans-serif",
            "mathtext.default": "regular",
        }


_OTHERS_LIGHT = ("#2b8a57", "#8a4fbf", "#b8326b", "#94731a")
_OTHERS_DARK = ("#5fc48b", "#c193f2", "#f084b1", "#d8b64e")
LIGHT = Theme(
    "light", "#ffffff", "#1c2330", "#5b6472", "#e4e7ec", "#2f6fbf", "#d9580d", "#8b93a1", _OTHERS_LIGHT
)
DARK = Theme(
    "dark", "#171b22", "#e8ebf0", "#a3acba", "#2c333e", "#74aefb", "#ff9150", "#838c9a", _OTHERS_DARK
)


@dataclass(frozen=True)
class Drawn:
    """A figure as PNG in both themes."""

    light: bytes
    dark: bytes


def draw(make: Callable[[Theme], Figure]) -> Drawn:
    """The figure that `make` makes, in both themes."""
    return Drawn(_png(make, LIGHT), _png(make, DARK))


def write_both(drawn: Drawn, folder: Path, name: str) -> None:
    """Write NAME.png and NAME-dark.png."""
    write(folder / f"{name}.png", drawn.light)
    write(folder / f"{name}-dark.png", drawn.dark)


def _png(make: Callable[[Theme], Figure], theme: Theme) -> bytes:
    content = io.BytesIO()
    with matplotlib.rc_context(theme.rc()):
        make(theme).savefig(content, format="png", dpi=DPI)
    return content.getvalue()
