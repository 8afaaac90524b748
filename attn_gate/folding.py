"""Batch norms in eval mode, folded into the convolutions before them, so that the fused kernels serve.

    norm(conv(t)) = s * (W t + b - mean) + shift = (s W) t + s (b - mean) + shift,   s = scale / sqrt(var +
    eps)

A fold of three norms takes about 45 us on the CPU, as long as a small gate, so it is kept. A stale fold would
be a silent error, and version counters don't see every edit (`p.data.copy_()`, `p.data = q`): the cache
compares the values themselves, in about 15 us. Where that doesn't pay every call folds anew: for large
weights, which are multiplied as fast as they are compared, and off the CPU, where a comparison would wait for
the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from attn_gate.decisions import is_traced, is_watched
from attn_gate.eager import Parts
from attn_gate.norms import FOLDABLE

_LAYERS = ("theta", "phi", "psi")
_LARGEST_KEPT = 2**16  # elements of all sources; at about twice that comparing costs as much as folding

Source = Tensor | float | None


class Folded(NamedTuple):
    """Weights and biases for the operators; bias is theta's plus phi's."""

    theta_weight: Tensor
    phi_weight: Tensor
    psi_weight: Tensor
    bias: Tensor | None
    psi_bias: Tensor | None


class FoldCache:
    """The last fold of one gate, with a copy of the values that it was made of."""

    def __init__(self) -> None:
        self._entry: tuple[tuple[Source, ...], Folded] | None = None

    def folded(self, parts: Parts) -> Folded:
        """The folded weights of a gate with layers theta, phi, psi and norms theta_norm, phi_norm, psi_norm.

        Norms that can't be folded (see `is_foldable`) are left out. Differentiable where any parameter asks
        for a gradient; gradients are then those of the unfolded gate.
        """
        if all(_foldable_norm(parts, layer) is None for layer in _LAYERS):
            return _fold(parts)  # a sum of biases at most: sooner made than compared
        sources = tuple(_sources(parts))
        if not _may_keep(sources):
            return _fold(parts)
        entry = self._entry  # one read: another thread may replace it
        if entry is not None and _same(entry[0], sources):
            return entry[1]
        # Made inside inference_mode the tensors could never take part in a backward pass later.
        with torch.inference_mode(False), torch.no_grad():
            copies = tuple(s.detach().clone() if isinstance(s, Tensor) else s for s in sources)
            entry = copies, _fold(parts)
        self._entry = entry
        return entry[1]

    def __deepcopy__(self, memo: dict) -> FoldCache:
        return FoldCache()

    def __reduce__(self) -> tuple:
        return FoldCache, ()


def is_foldable(norm: nn.Module | None) -> bool:
    """Whether this layer is an affine map now: a batch norm on its running statistics, and nobody listens."""
    return (
        type(norm) in FOLDABLE
        and not norm.training
        and norm.running_mean is not None
        and norm.running_var is not None
        and not is_watched(norm)
    )


def _foldable_norm(parts: Parts, layer: str) -> _BatchNorm | None:
    norm = getattr(parts, f"{layer}_norm")
    return norm if is_foldable(norm) else None


def _fold(parts: Parts) -> Folded:
    (theta, theta_bias), (phi, phi_bias), (psi, psi_bias) = (fold_layer(parts, layer) for layer in _LAYERS)
    return Folded(theta, phi, psi, summed(theta_bias, phi_bias), psi_bias)


def fold_layer(parts: Parts, layer: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the convolution `layer`, and of the norm behind it if that folds."""
    conv, norm = getattr(parts, layer), _foldable_norm(parts, layer)
    if norm is None:
        return conv.weight, conv.bias
    statistics = norm.running_mean, norm.running_var
    return fold(conv.weight, conv.bias, norm.weight, norm.bias, *statistics, norm.eps)


def fold(
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of scale * (conv - mean) / sqrt(var + eps) + shift.

    Differentiable. What is folded comes out in float32 at least, whatever the dtype of the parameters.
    """
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    mean, factor = mean.to(dtype), torch.rsqrt(var.to(dtype) + eps)
    if scale is not None:
        factor = factor * scale
    folded = -mean * factor if bias is None else (bias - mean) * factor
    if shift is not None:
        folded = folded + shift
    return weight * factor.view(-1, *(1,) * (weight.ndim - 1)), folded


def summed(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b, of what there is."""
    return b if a is None else a if b is None else a + b


def _sources(parts: Parts) -> Iterator[Source]:
    """Everything that a fold depends on, a norm that isn't folded being absent."""
    for layer in _LAYERS:
        conv, norm = getattr(parts, layer), _foldable_norm(parts, layer)
        yield conv.weight
        yield conv.bias
        yield None if norm is None else norm.eps
        if norm is not None:
            yield from (norm.weight, norm.bias, norm.running_mean, norm.running_var)


def _may_keep(sources: tuple[Source, ...]) -> bool:
    """Whether a fold may be kept, and pays: plain CPU tensors, no gradient wanted, nobody traces."""
    if is_traced():
        return False
    grad, elements = torch.is_grad_enabled(), 0
    for s in sources:
        if isinstance(s, Tensor):
            if type(s) not in (Tensor, nn.Parameter) or s.device.type != "cpu" or (grad and s.requires_grad):
                return False
            elements += s.numel()
    return elements <= _LARGEST_KEPT


def _same(kept: tuple[Source, ...], now: tuple[Source, ...]) -> bool:
    return len(kept) == len(now) and all(map(_equal, kept, now))


def _equal(a: Source, b: Source) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b
