"""The eager gates that attn_gate is compared with: the plain modules that most networks have.

Their layers are called theta, phi and psi, so that one state_dict serves them and `attn_gate.AttentionGate`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import Config

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_LINEAR = {2: "bilinear", 3: "trilinear"}


class SameGridGate(nn.Module):
    """x * sigmoid(psi(relu(phi(g) + theta(x)))): the gate of MONAI and most 2D copies, batch norms folded."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        conv = _CONV[len(config.size)]
        self.theta = conv(config.channels, config.inter, 1)
        self.phi = conv(config.gating, config.inter, 1)
        self.psi = conv(config.inter, 1, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        """x [N, C, *S], g [N, G, *S] -> y [N, C, *S]"""
        return x * torch.sigmoid(self.psi(self.relu(self.phi(g) + self.theta(x))))


class PaperGate(nn.Module):
    """theta strides to g's grid, alpha is interpolated back: Oktay et al. 2018 (arXiv 1804.03999)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        conv = _CONV[len(config.size)]
        self.theta = conv(config.channels, config.inter, 2, stride=2, bias=False)
        self.phi = conv(config.gating, config.inter, 1)
        self.psi = conv(config.inter, 1, 1)
        self.relu = nn.ReLU(inplace=True)
        self.mode = _LINEAR[len(config.size)]

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        """x [N, C, *S], g [N, G, *Q] -> y [N, C, *S]"""
        theta = self.theta(x)
        phi = F.interpolate(self.phi(g), size=theta.shape[2:], mode=self.mode)
        alpha = torch.sigmoid(self.psi(self.relu(theta + phi)))
        return F.interpolate(alpha, size=x.shape[2:], mode=self.mode) * x


GATES = {"same_grid": SameGridGate, "paper": PaperGate}

# The same two as presets of attn_gate.AttentionGate.
PRESETS = {
    "same_grid": {"preset": "same_grid", "theta_norm": "none", "phi_norm": "none", "psi_norm": "none"},
    "paper": {"preset": "paper"},
}
