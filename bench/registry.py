"""What is measured: gates and networks with their sizes, by name; and how names are looked up."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

MODES = {
    "inference": "forward under torch.no_grad(), batch norms in eval mode",
    "forward": "forward that keeps what backward needs",
    "backward": "gradients of x, g and all parameters",
    "step": "forward and backward",
}
DTYPES = ("float32", "bfloat16", "float16")
# "gate": one gate of a published network; "sweep": one gate of a series; "network": a whole network.
KINDS = ("gate", "sweep", "network")


@dataclass(frozen=True)
class Config:
    """One gate at one size.

    Attributes:
        name: "family-size", short enough to be typed.
        title: whose gate it is, for people.
        gate: which eager module it is: a key of `gates.GATES`.
        channels, gating, inter: C of x, G of g, I in between.
        size: S, grid of x; 2 or 3 axes.
        batch: N.
        kind: one of KINDS.
    """

    name: str
    title: str
    gate: str
    channels: int
    gating: int
    inter: int
    size: tuple[int, ...]
    batch: int = 2
    kind: str = "gate"

    @property
    def family(self) -> str:
        """The first part of the name."""
        return self.name.partition("-")[0]

    @property
    def ratio(self) -> int:
        """How many times finer S is than the grid of g, theta and alpha."""
        return 1 if self.gate.startswith("same_grid") else 2

    @property
    def gating_size(self) -> tuple[int, ...]:
        """Q, grid of g, and R, that of theta and alpha."""
        return tuple(n // self.ratio for n in self.size)

    @property
    def x_shape(self) -> tuple[int, ...]:
        """[N, C, *S]"""
        return (self.batch, self.channels, *self.size)

    @property
    def g_shape(self) -> tuple[int, ...]:
        """[N, G, *Q]"""
        return (self.batch, self.gating, *self.gating_size)

    @property
    def shape_text(self) -> str:
        """Such as "2 x 64 x 256²"."""
        return f"{self.batch} × {self.channels} × {grid_text(self.size)}"

    def to_json(self) -> dict[str, Any]:
        """All that describes it, but for the name."""
        fields = dataclasses.asdict(self)
        fields.pop("name")
        return {**fields, "gating_size": self.gating_size}


@dataclass(frozen=True)
class NetworkConfig:
    """A whole network on one batch of images.

    Attributes:
        name: "net-" and a short name.
        title: for people.
        network: a key of `networks.NETWORKS`.
        size: of the image; batch: N. Images have one channel.
    """

    name: str
    title: str
    network: str
    size: tuple[int, ...]
    batch: int = 1
    kind: str = "network"

    @property
    def family(self) -> str:
        """The first part of the name."""
        return self.name.partition("-")[0]

    @property
    def shape_text(self) -> str:
        """Such as "1 x 96³"."""
        return f"{self.batch} × {grid_text(self.size)}"

    def to_json(self) -> dict[str, Any]:
        """All that describes it, but for the name."""
        fields = dataclasses.asdict(self)
        fields.pop("name")
        return fields


AnyConfig = Config | NetworkConfig


def grid_text(size: Sequence[int]) -> str:
    """256² for (256, 256), 80×80×48 for that."""
    if len(set(size)) == 1:
        return f"{size[0]}{'²' if len(size) == 2 else '³'}"
    return "×".join(map(str, size))


# (C, I, size) of the skip connections of a U-Net with 64 filters on images of 256x256, finest first.
_LEVELS_2D = ((64, 32, 256), (128, 64, 128), (256, 128, 64), (512, 256, 32))
# MONAI's AttentionUnet, channels (16, 32, 64, 128, 256), on volumes of 96x96x96.
_LEVELS_MONAI = ((16, 8, 96), (32, 16, 48), (64, 32, 24), (128, 64, 12))
# The paper's network on 160x160x96: it has no gate at the finest level, and I = C.
_LEVELS_OKTAY = ((32, 64, (80, 80, 48)), (64, 128, (40, 40, 24)), (128, 256, (20, 20, 12)))
_SIZES = (32, 64, 128, 256, 512, 1024)
_CHANNELS = (16, 32, 64, 128, 256, 512)

CONFIGS: dict[str, AnyConfig] = {
    config.name: config
    for config in (
        *(Config(f"same-{n}", "one grid, no norms", "same_grid", c, c, i, (n, n)) for c, i, n in _LEVELS_2D),
        *(Config(f"paper-{n}", "the paper's formula in 2D", "paper", c, 2 * c, i, (n, n))
          for c, i, n in _LEVELS_2D),
        *(Config(f"same3d-{n}", "one grid in 3D, no norms", "same_grid", c, c, i, (n, n, n), batch=1)
          for c, i, n in _LEVELS_MONAI[:2]),
        *(Config(f"lee-{n}", "LeeJunHyun's AttU_Net, 256²", "same_grid_norms", c, c, i, (n, n))
          for c, i, n in _LEVELS_2D),
        *(Config(f"monai-{n}", "MONAI's AttentionUnet, 96³", "same_grid_norms", c, c, i, (n, n, n), batch=1)
          for c, i, n in _LEVELS_MONAI),
        *(Config(f"oktay-{size[0]}", "the paper's code, 160×160×96", "paper_output", c, g, c, size, batch=1)
          for c, g, size in _LEVELS_OKTAY),
        *(Config(f"keras-{n}", "Keras block, 256²", "keras", c, c, c, (n, n)) for c, _, n in _LEVELS_2D),
        *(Config(f"size-{n}", "series in size: 64 channels, one grid, no norms", "same_grid", 64, 64, 32,
                 (n, n), batch=1, kind="sweep") for n in _SIZES),
        *(Config(f"channels-{c}", "series in channels: 64², one grid, no norms", "same_grid", c, c, c // 2,
                 (64, 64), batch=1, kind="sweep") for c in _CHANNELS),
        NetworkConfig("net-monai", "MONAI's AttentionUnet", "monai", (48, 48, 48)),
        NetworkConfig("net-lee", "LeeJunHyun's AttU_Net", "lee", (192, 192)),
        NetworkConfig("net-oktay", "the paper's network", "oktay", (48, 48, 32)),
    )
}  # fmt: skip


def select(what: str, wanted: Sequence[str], available: Mapping[str, T]) -> dict[str, T]:
    """Those of `available` that `wanted` names, in the order of `available`.

    A name stands for itself, or for all of its family: "same" for "same-256", "same-128" and so on; a name in
    `available` stands for itself alone.

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
