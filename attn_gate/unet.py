"""AttentionUNet: a small U-Net whose skip connections pass attention gates. Any image size; 1D, 2D and 3D."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_gate.module import AttentionGate, check_preset, checked_channels
from attn_gate.norms import make_norm
from attn_gate.reference import resize
from attn_gate.spec import NORMS, GateSpec

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}


class AttentionUNet(nn.Module):
    """U-Net of double 3x3 convolutions with an attention gate on every skip connection.

        net = AttentionUNet(spatial_dims=2, in_channels=1, out_channels=1, channels=(16, 32, 64, 128))
        logits = net(image)                                  # [N, 1, H, W] for image [N, 1, H, W]
        logits, maps = net(image, return_attention=True)     # maps["gates.0"] [N, 1, H, W]: the finest gate's
        alpha

    Args:
        spatial_dims: 1, 2 or 3.
        in_channels, out_channels: of the image and of the logits.
        channels: of the levels, finest first; at least two. The last level, the bottom, has no gate.
        gate: "same_grid" | "paper" | "keras" or a GateSpec. A gate whose theta has stride 1 is driven by the
            decoder's features after their upsampling, on the skip's own grid, any other by those of the
            coarser level.
        gate_options: fields of GateSpec that differ from that preset.
        norm: "batch" | "instance" | "group" | "none", behind every 3x3 convolution.
        backend: of all gates; see AttentionGate. `set_backend` changes it.
        deep_supervision: adds logits of the coarser decoder levels to what the network returns in training
        mode.

    Any size works, odd, prime and tiny: the image is extended at its far ends by copies of its border voxels
    until every level halves evenly and the bottom has two voxels along each axis, and all results are cropped
    to it again.

    Raises:
        ValueError, TypeError: arguments out of range.

    Source: Oktay et al. 2018 (arXiv 1804.03999), figure 1.
    """

    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 1,
        out_channels: int = 1,
        channels: Sequence[int] = (16, 32, 64, 128),
        *,
        gate: str | GateSpec = "same_grid",
        gate_options: Mapping[str, Any] | None = None,
        norm: str = "batch",
        backend: str = "auto",
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(map(repr, NORMS))}; got {norm!r}")
        in_channels = checked_channels("in_channels", in_channels)
        out_channels = checked_channels("out_channels", out_channels)
        if not isinstance(channels, Iterable):
            raise TypeError(f"channels must be a sequence of integers, one for each level; got {channels!r}")
        channels = tuple(checked_channels(f"channels[{i}]", c) for i, c in enumerate(channels))
        if len(channels) < 2:
            raise ValueError(f"channels must name two levels at least; got {channels!r}")
        check_preset("gate", gate)
        if isinstance(gate, GateSpec):
            spec = gate.replace(**(gate_options or {}))
            if spec.spatial_dims != spatial_dims:
                raise ValueError(f"gate has spatial_dims={spec.spatial_dims}, the network {spatial_dims}")
        else:
            spec = GateSpec.from_preset(gate, spatial_dims, **(gate_options or {}))

        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.deep_supervision = deep_supervision
        self._coarse_gating = any(s > 1 for s in spec.theta_stride)

        conv = _CONV[spatial_dims]
        fine, coarse = channels[:-1], channels[1:]
        self.encoders = nn.ModuleList(
            _double_conv(spatial_dims, c_in, c_out, norm)
            for c_in, c_out in zip((in_channels, *fine), channels, strict=True)
        )
        self.pool = _POOL[spatial_dims](2)
        self.ups = nn.ModuleList(conv(c_in, c_out, 1) for c_in, c_out in zip(coarse, fine, strict=True))
        self.gates = nn.ModuleList(
            AttentionGate(c, below if self._coarse_gating else c, preset=spec, backend=backend)
            for c, below in zip(fine, coarse, strict=True)
        )
        self.decoders = nn.ModuleList(_double_conv(spatial_dims, 2 * c, c, norm) for c in fine)
        self.head = conv(fine[0], out_channels, 1)
        self.aux_heads = nn.ModuleList(conv(c, out_channels, 1) for c in fine[1:] if deep_supervision)

    def forward(self, image: Tensor, return_attention: bool = False) -> Any:
        """Logits [N, out_channels, *S] for image [N, in_channels, *S].

        With deep_supervision in training mode: (logits, [logits of coarser levels, finest first]), all of the
        image's size. With return_attention a pair: what is returned otherwise, and the maps {name of the
        gate: alpha}, finest first. A map covers the image on its own grid, [N, 1, *ceil(S / step)], step
        being 1, 2, 4, ... (2, 4, ... for gates whose theta has stride 2).

        Raises:
            ValueError: the image's rank or channels don't fit, or it has no voxels.
        """
        self._check(image)
        size = tuple(image.shape[2:])
        features = self._pad(image)
        padded = tuple(features.shape[2:])

        skips = []
        for level, encoder in enumerate(self.encoders):
            features = encoder(features if level == 0 else self.pool(features))
            skips.append(features)

        maps, aux = {}, []
        for level in reversed(range(len(self.gates))):
            skip = skips[level]
            # The 1x1 convolution before the resize: the same numbers for a quarter of the work.
            up = resize(self.ups[level](features), skip.shape[2:], "linear")
            gating = features if self._coarse_gating else up
            skip, maps[f"gates.{level}"] = self.gates[level](skip, gating, return_attention=True)
            features = self.decoders[level](torch.cat([skip, up], dim=1))
            if level > 0 and self.deep_supervision and self.training:
                aux.append(_crop(resize(self.aux_heads[level - 1](features), padded, "linear"), size))

        logits = _crop(self.head(features), size)
        output = (logits, aux[::-1]) if self.deep_supervision and self.training else logits
        if not return_attention:
            return output
        return output, {name: _crop_map(maps[name], padded, size) for name in reversed(maps)}

    def set_backend(self, backend: str) -> AttentionUNet:
        """Sets the backend of all gates, as AttentionGate takes it; returns the network."""
        for gate in self.gates:
            gate.backend = backend
        return self

    def _pad(self, image: Tensor) -> Tensor:
        step = 2 ** len(self.gates)
        ends = [max(-(-n // step), 2) * step - n for n in image.shape[2:]]
        if not any(ends):
            return image
        return F.pad(image, [n for end in reversed(ends) for n in (0, end)], mode="replicate")

    def _check(self, image: Tensor) -> None:
        if image.ndim != self.spatial_dims + 2 or image.shape[1] != self.in_channels:
            raise ValueError(
                f"image must be [N, {self.in_channels}] and {self.spatial_dims} axes of space; "
                f"got shape {tuple(image.shape)}"
            )
        if min(image.shape[2:]) < 1:
            raise ValueError(f"image has no voxels; got shape {tuple(image.shape)}")


def _double_conv(spatial_dims: int, in_channels: int, out_channels: int, norm: str) -> nn.Sequential:
    constants = GateSpec(spatial_dims=spatial_dims)
    layers: list[nn.Module] = []
    for c in (in_channels, out_channels):
        layers.append(_CONV[spatial_dims](c, out_channels, 3, padding=1, bias=norm == "none"))
        if norm != "none":
            layers.append(make_norm(norm, out_channels, constants))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def _crop(t: Tensor, size: Sequence[int]) -> Tensor:
    """t without the far ends that `_pad` has added."""
    for axis, n in enumerate(size, start=2):
        t = t.narrow(axis, 0, n)
    return t


def _crop_map(alpha: Tensor, padded: Sequence[int], size: Sequence[int]) -> Tensor:
    """alpha without the voxels that lie wholly in the padding."""
    grid = alpha.shape[2:]
    return _crop(alpha, [-(-n * r // p) for n, r, p in zip(size, grid, padded, strict=True)])
