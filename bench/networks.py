"""Whole networks: MONAI's, and two that are well known, written down here with the gates as they have them.

Attribute names are those of the originals, so that `attn_gate.fuse_gates` meets what users have.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _conv_norm_relu(conv: type[nn.Module], norm: type[nn.Module], c_in: int, c_out: int) -> list[nn.Module]:
    return [conv(c_in, c_out, 3, padding=1), norm(c_out), nn.ReLU(inplace=True)]


class DoubleConv2d(nn.Sequential):
    """(3x3 convolution, batch norm, ReLU) twice."""

    def __init__(self, c_in: int, c_out: int) -> None:
        kinds = nn.Conv2d, nn.BatchNorm2d
        super().__init__(*_conv_norm_relu(*kinds, c_in, c_out), *_conv_norm_relu(*kinds, c_out, c_out))


class AttentionBlock2d(nn.Module):
    """The most copied gate: batch norms after all three convolutions, x and g on one grid."""

    def __init__(self, gating: int, channels: int, inter: int) -> None:
        super().__init__()
        self.W_g = nn.Sequential(nn.Conv2d(gating, inter, 1), nn.BatchNorm2d(inter))
        self.W_x = nn.Sequential(nn.Conv2d(channels, inter, 1), nn.BatchNorm2d(inter))
        self.psi = nn.Sequential(nn.Conv2d(inter, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid())
        self.relu = nn.ReLU(inplace=True)

    def forward(self, g: Tensor, x: Tensor) -> Tensor:
        """g [N, G, H, W], x [N, C, H, W] -> y [N, C, H, W]"""
        return x * self.psi(self.relu(self.W_g(g) + self.W_x(x)))


class LeeNetwork(nn.Module):
    """AttU_Net of github.com/LeeJunHyun/Image_Segmentation: 64 to 1024 filters, gates on all four skips."""

    def __init__(self, in_channels: int = 1, out_channels: int = 1) -> None:
        super().__init__()
        filters = (64, 128, 256, 512, 1024)
        fine, coarse = filters[:-1], filters[1:]
        self.encoders = nn.ModuleList(map(DoubleConv2d, (in_channels, *fine), filters))
        self.ups = nn.ModuleList(
            nn.Sequential(nn.Upsample(scale_factor=2), *_conv_norm_relu(nn.Conv2d, nn.BatchNorm2d, c_in, c))
            for c_in, c in zip(coarse, fine, strict=True)
        )
        self.gates = nn.ModuleList(AttentionBlock2d(c, c, c // 2) for c in fine)
        self.decoders = nn.ModuleList(DoubleConv2d(2 * c, c) for c in fine)
        self.head = nn.Conv2d(fine[0], out_channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Logits [N, out_channels, H, W] for [N, in_channels, H, W]; H and W multiples of 16."""
        skips = []
        features = image
        for level, encoder in enumerate(self.encoders):
            features = encoder(F.max_pool2d(features, 2) if level else features)
            skips.append(features)
        for level in reversed(range(len(self.gates))):
            g = self.ups[level](features)
            features = self.decoders[level](torch.cat([self.gates[level](g=g, x=skips[level]), g], dim=1))
        return self.head(features)


class DoubleConv3d(nn.Sequential):
    """(3x3x3 convolution, batch norm, ReLU) twice."""

    def __init__(self, c_in: int, c_out: int) -> None:
        kinds = nn.Conv3d, nn.BatchNorm3d
        super().__init__(*_conv_norm_relu(*kinds, c_in, c_out), *_conv_norm_relu(*kinds, c_out, c_out))


class GridAttention3d(nn.Module):
    """The gate of the paper's code: theta strides to g's grid, alpha is interpolated back, then W."""

    def __init__(self, channels: int, gating: int, inter: int) -> None:
        super().__init__()
        self.W = nn.Sequential(nn.Conv3d(channels, channels, 1), nn.BatchNorm3d(channels))
        self.theta = nn.Conv3d(channels, inter, 2, stride=2, bias=False)
        self.phi = nn.Conv3d(gating, inter, 1)
        self.psi = nn.Conv3d(inter, 1, 1)

    def forward(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, C, *S], g [N, G, *Q] -> W(alpha * x) [N, C, *S], alpha [N, 1, *S]"""
        theta = self.theta(x)
        phi = F.interpolate(self.phi(g), size=theta.shape[2:], mode="trilinear")
        alpha = torch.sigmoid(self.psi(F.relu(theta + phi, inplace=True)))
        alpha = F.interpolate(alpha, size=x.shape[2:], mode="trilinear")
        return self.W(alpha.expand_as(x) * x), alpha


class OktayNetwork(nn.Module):
    """The network of Oktay et al. 2018, one gate per skip: 16 to 256 filters, none at the finest level.

    With deep supervision: the logits are a 1x1 convolution of those of all decoder levels.
    """

    def __init__(self, in_channels: int = 1, out_channels: int = 4) -> None:
        super().__init__()
        filters = (16, 32, 64, 128, 256)
        fine, coarse = filters[:-1], filters[1:]
        self.encoders = nn.ModuleList(map(DoubleConv3d, (in_channels, *fine), filters))
        self.gating = nn.Sequential(nn.Conv3d(256, 256, 1), nn.BatchNorm3d(256), nn.ReLU(inplace=True))
        gated = list(zip(fine, coarse, strict=True))[1:]
        self.gates = nn.ModuleList(GridAttention3d(c, below, c) for c, below in gated)
        self.combine = nn.ModuleList(
            nn.Sequential(nn.Conv3d(c, c, 1), nn.BatchNorm3d(c), nn.ReLU(inplace=True)) for c, _ in gated
        )
        self.decoders = nn.ModuleList(
            DoubleConv3d(c + below, c) for c, below in zip(fine, coarse, strict=True)
        )
        self.heads = nn.ModuleList(nn.Conv3d(c, out_channels, 1) for c in fine)
        self.head = nn.Conv3d(4 * out_channels, out_channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Logits [N, out_channels, *S] for [N, in_channels, *S]; every axis of S a multiple of 16."""
        skips = []
        features = image
        for level, encoder in enumerate(self.encoders):
            features = encoder(F.max_pool3d(features, 2) if level else features)
            skips.append(features)
        logits = []
        for level in reversed(range(4)):
            skip = skips[level]
            if level:
                g = self.gating(features) if level == 3 else features
                skip = self.combine[level - 1](self.gates[level - 1](skip, g)[0])
            up = F.interpolate(features, scale_factor=2.0, mode="trilinear")
            features = self.decoders[level](torch.cat([skip, up], dim=1))
            logits.append(F.interpolate(self.heads[level](features), size=image.shape[2:], mode="trilinear"))
        return self.head(torch.cat(logits[::-1], dim=1))


def _monai(axes: int) -> nn.Module:
    from monai.networks.nets import AttentionUnet

    channels = (16, 32, 64, 128, 256)
    return AttentionUnet(axes, in_channels=1, out_channels=2, channels=channels, strides=(2, 2, 2, 2))


# What makes each, for images of so many axes; MONAI's needs monai.
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "monai": _monai,
    "lee": lambda axes: LeeNetwork(),
    "oktay": lambda axes: OktayNetwork(),
}
