"""Norm layers by name, and one that PyTorch lacks: a batch norm that keeps the biased variance (Keras)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from attn_gate.spec import GateSpec


class BiasedBatchNorm(_BatchNorm):
    """BatchNorm1d/2d/3d whose running_var follows the biased batch variance (divisor n, not n - 1).

    Keras's BatchNormalization: with eps 1e-3 and momentum 0.01 (Keras's 0.99) the same numbers in training
    and eval. Input [N, C, *S]; output, errors and state_dict are BatchNorm's.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected input [N, C, *S]; got {input.ndim} dimensions")

    def forward(self, input: Tensor) -> Tensor:
        keeps = self.training and self.track_running_stats and self.running_var is not None
        if not keeps or input.numel() == 0:
            return super().forward(input)  # no variance to keep, or none at all
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:  # the average over all batches, as in PyTorch
            momentum = 1 / self.num_batches_tracked.item()
        # A copy: autograd holds what it gets here, so that must not change again.
        unbiased = self.running_var.clone()
        output = F.batch_norm(
            input, self.running_mean, unbiased, self.weight, self.bias, True, momentum, self.eps
        )
        n = input.numel() / input.shape[1]
        with torch.no_grad():
            kept = self.running_var * (1 - momentum)
            self.running_var.copy_(kept + (unbiased - kept) * ((n - 1) / n))
        return output


_BATCH = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_INSTANCE = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
FOLDABLE = (*_BATCH.values(), BiasedBatchNorm, nn.SyncBatchNorm)


def make_norm(kind: str, channels: int, spec: GateSpec) -> nn.Module | None:
    """The layer "batch" | "instance" | "group" with the constants of the spec; None for "none".

    Raises:
        ValueError: the groups of a group norm don't divide the channels.
    """
    if kind == "none":
        return None
    if kind == "group":
        groups = min(spec.norm_groups, channels)
        if channels % groups:
            raise ValueError(f"norm_groups must divide the {channels} channels of a group norm; got {groups}")
        return nn.GroupNorm(groups, channels, eps=spec.norm_eps)
    if kind == "instance":
        return _INSTANCE[spec.spatial_dims](
            channels, eps=spec.norm_eps, momentum=spec.norm_momentum, affine=True
        )
    batch = BiasedBatchNorm if spec.norm_biased_variance else _BATCH[spec.spatial_dims]
    return batch(channels, eps=spec.norm_eps, momentum=spec.norm_momentum)
