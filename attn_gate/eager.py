"""Every gate that GateSpec can describe, in eager PyTorch: the reference for all knobs, and the way of the
parts that the fused operators don't take.

The functions read the description from a GateSpec and the layers from any object with the attributes of
`Parts`; AttentionGate is one. They call the layers as modules, so hooks, parametrisations and replaced layers
work.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_gate import reference
from attn_gate.spec import GateSpec

Run = Callable[[nn.Module, Tensor], Tensor]
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


class Parts(Protocol):
    """The layers of a gate; None where the spec has none."""

    theta: nn.Module
    phi: nn.Module
    psi: nn.Module
    phi_tail: nn.Module | None
    theta_norm: nn.Module | None
    phi_norm: nn.Module | None
    psi_norm: nn.Module | None
    W: nn.Module | None


def are_convolutions(parts: Parts) -> bool:
    """Whether theta and phi have weights that tell what they cost; a replaced layer may be anything."""
    return isinstance(parts.theta, nn.modules.conv._ConvNd) and isinstance(parts.phi, nn.modules.conv._ConvNd)


def gate(spec: GateSpec, parts: Parts, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The whole described gate: y [N, C, *S] (behind the output transform) and alpha [N, 1 or C, *R]."""
    alpha = attention(spec, parts, x, g)
    return transform(parts, weigh(spec, x, alpha)), alpha


def attention(spec: GateSpec, parts: Parts, x: Tensor, g: Tensor, run: Run | None = None) -> Tensor:
    """alpha on the grid of theta, for x [N, C, *S] and g [N, G, *Q]; run: as in `call`."""
    theta = project_x(spec, parts, x, g, run)
    q = combine(spec, theta, project_g(spec, parts, g, run))
    logits = call(parts.psi, reference.activate(q, spec.activation), run)
    return finish_logits(spec, parts.psi_norm, logits)


def project_x(spec: GateSpec, parts: Parts, x: Tensor, g: Tensor, run: Run | None = None) -> Tensor:
    """theta with its norm, [N, I, *R]; run: as in `call`."""
    return _normed(parts.theta_norm, call(parts.theta, pad(spec, input_of_theta(spec, x, g)), run))


def project_g(spec: GateSpec, parts: Parts, g: Tensor, run: Run | None = None) -> Tensor:
    """phi with its transposed convolution and norm, before the resize, [N, I, *Q']; run: as in `call`."""
    phi = call(parts.phi, g, run)
    if parts.phi_tail is not None:
        phi = call(parts.phi_tail, phi)
        # With stride 2 a kernel of 3 makes one voxel more than "same" keeps: the last.
        for axis, n in enumerate(spec.phi_grid(g.shape[2:]), start=2):
            phi = phi.narrow(axis, 0, n)
    return _normed(parts.phi_norm, phi)


def combine(spec: GateSpec, theta: Tensor, phi: Tensor) -> Tensor:
    """theta + resize(phi), or their product: what the activation takes."""
    phi = resize(phi, theta.shape[2:], spec.phi_resize)
    return theta + phi if spec.combine == "add" else theta * phi


def finish_logits(spec: GateSpec, psi_norm: nn.Module | None, logits: Tensor) -> Tensor:
    """alpha from psi's output: norm (None where it is folded), then normaliser, in float32 at least."""
    logits = _normed(psi_norm, logits)
    return normalise(logits.to(reference.accumulation_dtype(logits)), spec.normaliser)


def normalise(q: Tensor, normaliser: str) -> Tensor:
    """The normaliser of this name on maps q [N, K, *R], each sample and channel for itself; see GateSpec."""
    if normaliser == "sigmoid":
        return torch.sigmoid(q)
    flat = q.flatten(2)  # [N, K, voxels]
    if normaliser == "softmax":
        return flat.softmax(-1).view(q.shape)
    if normaliser != "mean":
        flat = flat - flat.amin(-1, keepdim=True)
    total = flat.amax(-1, keepdim=True) if normaliser == "range" else flat.sum(-1, keepdim=True)
    return (flat / total).view(q.shape)


def weigh(spec: GateSpec, x: Tensor, alpha: Tensor) -> Tensor:
    """x * resize(alpha), in x's dtype."""
    return reference.apply_attention(x, alpha, alpha_resize=kernel_resize(spec.alpha_resize))


def transform(parts: Parts, y: Tensor, run: Run | None = None) -> Tensor:
    """The output transform of y, in y's dtype (autocast's under autocast); y itself where there is none.

    run: as in `call`.
    """
    if parts.W is None:
        return y
    transformed = call(parts.W, y, run)
    return transformed.to(y.dtype) if reference.autocast_dtype(y) is None else transformed


def input_of_theta(spec: GateSpec, x: Tensor, g: Tensor) -> Tensor:
    """x, on g's grid where the spec resizes it before theta."""
    return x if spec.x_resize == "none" else resize(x, g.shape[2:], spec.x_resize)


def pad(spec: GateSpec, x: Tensor) -> Tensor:
    """x with the zeros that theta's convolution can't put itself: those of "same", which aren't symmetric."""
    if spec.theta_padding != "same":
        return x
    pads = spec.theta_pads(x.shape[2:])
    if not any(map(any, pads)):
        return x
    return F.pad(x, [n for before_after in reversed(pads) for n in before_after])


def resize(t: Tensor, size: tuple[int, ...] | torch.Size, mode: str) -> Tensor:
    """As reference.resize; "none" takes a tensor that is on this grid already (the caller has checked it)."""
    return t if mode == "none" else reference.resize(t, size, mode)


def kernel_resize(mode: str) -> str:
    """The operators' name of a spec's resize: for "none" any, since equal sizes are the identity in all."""
    return "linear" if mode == "none" else mode


def call(layer: nn.Module, t: Tensor, run: Run | None = None) -> Tensor:
    """layer(t) with t in the dtype of the layer's parameters, except under autocast, which casts itself.

    run: another way to have layer(t).
    """
    dtype = _dtype_of(layer)
    if dtype is not None and dtype != t.dtype and reference.autocast_dtype(t) is None:
        t = t.to(dtype)
    return layer(t) if run is None else run(layer, t)


def _normed(norm: nn.Module | None, t: Tensor) -> Tensor:
    if norm is None:
        return t
    dtype = _dtype_of(norm)
    # Autocast casts what convolutions take, not what norms do, whose 16 bits take maps of that dtype only.
    if dtype in _SIXTEEN_BITS:
        t = t.to(dtype)
    return call(norm, t)


def _dtype_of(layer: nn.Module) -> torch.dtype | None:
    """The dtype of the layer's floating parameters, or where it has none of its buffers, or None."""
    # A layer's own weight, which a parametrised one has not: layer.weight would compute that.
    own = layer._parameters  # which has no `get` in TorchScript
    weight = own["weight"] if "weight" in own else None
    tensors = chain(layer.parameters(), layer.buffers()) if weight is None else (weight,)
    return next((t.dtype for t in tensors if t.is_floating_point()), None)
