"""The eager gates that attn_gate is compared with: the plain modules that most networks have.

Their layers are called theta, phi and psi, so that one state_dict serves them and `attn_gate.AttentionGate`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import Config

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_LINEAR = {2: "bilinear", 3: "trilinear"}


class SameGridGate(nn.Module):
    """x * sigmoid(psi(relu(phi(g) + theta(x)))): the gate of MONAI and most 2D copies.

    norms: a batch norm after each of the three convolutions, as those have it; without: as after folding.
    """

    def __init__(self, config: Config, norms: bool = False) -> None:
        super().__init__()
        axes = len(config.size)
        conv = _CONV[axes]
        self.theta = conv(config.channels, config.inter, 1)
        self.phi = conv(config.gating, config.inter, 1)
        self.psi = conv(config.inter, 1, 1)
        self.theta_norm = _NORM[axes](config.inter) if norms else nn.Identity()
        self.phi_norm = _NORM[axes](config.inter) if norms else nn.Identity()
        self.psi_norm = _NORM[axes](1) if norms else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        """x [N, C, *S], g [N, G, *S] -> y [N, C, *S]"""
        q = self.relu(self.phi_norm(self.phi(g)) + self.theta_norm(self.theta(x)))
        return x * torch.sigmoid(self.psi_norm(self.psi(q)))


class PaperGate(nn.Module):
    """theta strides to g's grid, alpha is interpolated back: Oktay et al. 2018 (arXiv 1804.03999).

    output: then W, a 1x1 convolution and batch norm, as the authors' code has it and the formula doesn't.
    """

    def __init__(self, config: Config, output: bool = False) -> None:
        super().__init__()
        axes = len(config.size)
        conv = _CONV[axes]
        self.theta = conv(config.channels, config.inter, 2, stride=2, bias=False)
        self.phi = conv(config.gating, config.inter, 1)
        self.psi = conv(config.inter, 1, 1)
        self.relu = nn.ReLU(inplace=True)
        self.mode = _LINEAR[axes]
        self.W = nn.Identity()
        if output:
            self.W = nn.Sequential(conv(config.channels, config.channels, 1), _NORM[axes](config.channels))

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        """x [N, C, *S], g [N, G, *Q] -> y [N, C, *S]"""
        theta = self.theta(x)
        phi = F.interpolate(self.phi(g), size=theta.shape[2:], mode=self.mode)
        alpha = torch.sigmoid(self.psi(self.relu(theta + phi)))
        return self.W(F.interpolate(alpha, size=x.shape[2:], mode=self.mode) * x)


class KerasGate(nn.Module):
    """theta takes every second voxel of x, alpha is repeated, then a 1x1 convolution and batch norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        axes = len(config.size)
        conv = _CONV[axes]
        self.theta = conv(config.channels, config.inter, 1, stride=2)
        self.phi = conv(config.gating, config.inter, 1)
        self.psi = conv(config.inter, 1, 1)
        self.relu = nn.ReLU(inplace=True)
        norm = _NORM[axes](config.channels, eps=1e-3, momentum=0.01)
        self.W = nn.Sequential(conv(config.channels, config.channels, 1), norm)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        """x [N, C, *S], g [N, G, *Q] -> y [N, C, *S]"""
        alpha = torch.sigmoid(self.psi(self.relu(self.theta(x) + self.phi(g))))
        return self.W(F.interpolate(alpha, size=x.shape[2:], mode="nearest") * x)


_NO_NORMS = {"theta_norm": "none", "phi_norm": "none", "psi_norm": "none"}

# Each eager gate, and the same as arguments of attn_gate.AttentionGate.
GATES: dict[str, tuple[Any, dict[str, Any]]] = {
    "same_grid": (SameGridGate, {"preset": "same_grid", **_NO_NORMS}),
    "same_grid_norms": (lambda config: SameGridGate(config, norms=True), {"preset": "same_grid"}),
    "paper": (PaperGate, {"preset": "paper"}),
    "paper_output": (lambda config: PaperGate(config, output=True),
                     {"preset": "paper", "output": "conv_norm"}),
    "keras": (KerasGate, {"preset": "keras"}),
}  # fmt: skip


def has_norms(module: nn.Module) -> bool:
    """Whether training and eval mode differ."""
    return any(isinstance(m, tuple(_NORM.values())) for m in module.modules())


def randomise_norms(module: nn.Module, generator: torch.Generator) -> None:
    """Give batch norms statistics, scales and shifts that are not those of a new one, so that they count."""
    for norm in module.modules():
        if isinstance(norm, tuple(_NORM.values())):
            for t, low, high in (
                (norm.running_mean, -0.2, 0.2),
                (norm.running_var, 0.5, 1.5),
                (norm.weight.data, 0.5, 1.5),
                (norm.bias.data, -0.2, 0.2),
            ):
                t.copy_(low + (high - low) * torch.rand(t.shape, generator=generator))
