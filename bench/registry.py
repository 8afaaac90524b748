"""What is measured: gates with their sizes, by name, and how names on the command line are understood."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

MODES = {
    "inference": "forward under torch.no_grad()",
    "step": "forward and backward: gradients of x, g and all parameters",
}


@dataclass(frozen=True)
class Config:
    """One gate at one size, in float32.

    Attributes:
        name: "family-size", short enough to be typed.
        gate: "same_grid" (x and g on one grid, 1x1 projections, no norm) or "paper" (theta is a convolution
            with kernel and stride 2, alpha is interpolated back): the eager modules of `gates`.
        channels, gating, inter: C of x, G of g, I in between.
        size: S, grid of x; 2 or 3 axes.
        batch: N.
    """

    name: str
    gate: str
    channels: int
    gating: int
    inter: int
    size: tuple[int, ...]
    batch: int = 2

    @property
    def family(self) -> str:
        """The first part of the name."""
        return self.name.partition("-")[0]

    @property
    def gating_size(self) -> tuple[int, ...]:
        """Q, grid of g."""
        return self.size if self.gate == "same_grid" else tuple(n // 2 for n in self.size)

    @property
    def x_shape(self) -> tuple[int, ...]:
        """[N, C, *S]"""
        return (self.batch, self.channels, *self.size)

    @property
    def g_shape(self) -> tuple[int, ...]:
        """[N, G, *Q]"""
        return (self.batch, self.gating, *self.gating_size)


# The levels of an Attention U-Net on 256x256 images, and the two finest of MONAI's on 96x96x96 volumes.
_LEVELS_2D = ((64, 32, 256), (128, 64, 128), (256, 128, 64), (512, 256, 32))
_LEVELS_3D = ((16, 8, 96), (32, 16, 48))

CONFIGS: dict[str, Config] = {
    config.name: config
    for config in (
        *(Config(f"same-{n}", "same_grid", c, c, i, (n, n)) for c, i, n in _LEVELS_2D),
        *(Config(f"paper-{n}", "paper", c, 2 * c, i, (n, n)) for c, i, n in _LEVELS_2D),
        *(Config(f"same3d-{n}", "same_grid", c, c, i, (n, n, n), batch=1) for c, i, n in _LEVELS_3D),
    )
}


def select(what: str, wanted: Sequence[str], available: Mapping[str, T]) -> dict[str, T]:
    """Those of `available` that `wanted` names, in the order of `available`.

    A name stands for itself, or for all of its family: "same" for "same-256", "same-128" and so on.

    Raises:
        ValueError: a name that stands for nothing; the message has the closest ones.
    """
    chosen = set()
    families: dict[str, list[str]] = {}
    for name in available:
        families.setdefault(name.partition("-")[0], []).append(name)
    for name in wanted:
        found = [name] if name in available else families.get(name)
        if not found:
            close = difflib.get_close_matches(name, dict.fromkeys([*available, *families]), n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(available)}"
            raise ValueError(f"no {what} is called {name!r}: {hint}")
        chosen.update(found)
    return {name: value for name, value in available.items() if name in chosen}
