"""Batch norms of theta and phi in training mode, with nothing of I channels made or kept.

    theta = W x + b    has the mean W m + b and the variances diag(W Cov W^T),    m, Cov: the moments of x,

so a batch norm behind a projection folds into it in training too, once x's moments are known: small tensors,
on which PyTorch's own autograd works. What remains are passes over x and g:

    forward    moments of x and g; logits of the folded weights; psi's norm on one channel; x * alpha
    backward   dalpha; psi's norm; all gradients of the folded gate; what the moments add to dx and dg

Source: Ioffe and Szegedy 2015 (arXiv 1502.03167), algorithm 1, for projections of known moments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm

from attn_gate import backends, eager, functional
from attn_gate._library import ops
from attn_gate.autograd import below_autograd
from attn_gate.eager import Parts
from attn_gate.folding import fold, has_hooks, is_foldable, summed
from attn_gate.norms import FOLDABLE, BiasedBatchNorm
from attn_gate.reference import accumulation_dtype
from attn_gate.spec import GateSpec

Moments = tuple[Tensor, Tensor]
_NORMS = ("theta_norm", "phi_norm", "psi_norm")
_TENSORS = 6  # of a layer: see _tensors


def takes(norm: nn.Module | None) -> bool:
    """Whether this is a batch norm on the statistics of this batch alone, and nobody listens."""
    if type(norm) not in FOLDABLE or has_hooks(norm):
        return False
    if not norm.training and (norm.running_mean is not None or norm.running_var is not None):
        return False
    if not (isinstance(norm, nn.SyncBatchNorm) and dist.is_available() and dist.is_initialized()):
        return True
    return dist.get_world_size(norm.process_group) == 1


def may_serve(spec: GateSpec, parts: Parts, recompute: str | bool = "auto") -> bool:
    """Whether `run` can take the norms of theta and phi, for maps of some size."""
    norms = parts.theta_norm, parts.phi_norm
    if not any(map(takes, norms)) or not all(n is None or takes(n) or is_foldable(n) for n in norms):
        return False
    return recompute is not False and spec.x_resize == "none" and spec.spatial_dims > 1


def serves(
    spec: GateSpec, parts: Parts, x: Tensor, g: Tensor | None = None, recompute: str | bool = "auto"
) -> bool:
    """Whether `run` can take the norms of theta and phi for these maps, and should."""
    if not may_serve(spec, parts, recompute):
        return False
    voxels = [x.shape[0] * math.prod(spec.theta_grid(x.shape[2:], x.shape[2:]))]
    voxels += [] if g is None else [g.shape[0] * math.prod(g.shape[2:])]
    if min(voxels) < 2:  # PyTorch says what is wrong with that
        return False
    return recompute is True or pays(x, parts)


def pays(x: Tensor, parts: Parts) -> bool:
    """Where recompute="auto" is decided for batch norms in training mode: memory traffic against arithmetic.

    A step saves some 20 passes over maps of I channels, and costs the products of the patches of x (K_x rows)
    and of g with themselves, three times over, and the projections once more. Measured on 2 cores with
    AVX-512 and 32 MiB of cache: 1.1 to 6 times eager's speed where the multiply-adds for each element saved
    are at most 2.5 for each MiB of x, up to 64; less than eager's at twice as many, where maps stay in cache.
    """
    if x.device.type != "cpu" or torch.compiler.is_exporting():
        return False  # not measured there; an exported program may get any size
    inter = parts.theta.weight.shape[0]
    rows_x = parts.theta.weight.numel() // inter
    rows_g = parts.phi.weight.shape[1]
    products = sum(k * k for k, norm in ((rows_x, parts.theta_norm), (rows_g, parts.phi_norm)) if takes(norm))
    multiplications = 1.5 * (products + inter * (rows_x + rows_g)) / (20 * inter)
    mebibytes = x.numel() * x.element_size() / 2**20
    return multiplications <= min(64, 2.5 * mebibytes) * x.element_size() / 4


def left_alone(parts: Parts, x: Tensor, recompute: str | bool = "auto") -> bool:
    """Whether recompute="auto" leaves norms on statistics of these maps, and all behind them, to PyTorch.

    On the CPU it does where `run` doesn't pay: fusing what follows such norms keeps as much for the backward
    pass as eager does, and took 0.7 to 1.05 times its speed in inference, 0.8 to 1.0 times in a training step
    on maps below 12 MiB. Above, a step with norms over instances or groups took 1.0 to 1.5 times its speed.
    """
    if recompute != "auto" or x.device.type != "cpu":
        return False
    norms = [n for n in (parts.theta_norm, parts.phi_norm) if n is not None and not is_foldable(n)]
    if not norms or any(map(has_hooks, norms)):
        return False
    if batch := any(map(takes, norms)):
        if pays(x, parts):
            return False
    return batch or not torch.is_grad_enabled() or x.numel() * x.element_size() < 12 * 2**20


def run(spec: GateSpec, parts: Parts, x: Tensor, g: Tensor, *, backend: str) -> tuple[Tensor, Tensor]:
    """y [N, C, *S] (before the output transform) and alpha [N, 1, *R]; running statistics are updated.

    For gates whose theta and phi have a batch norm that `takes`, one that folds, or none; in 2D or 3D, with
    more than one voxel on each grid. psi's norm may be any.
    """
    x, g = functional.cast(x, g)
    with torch.autocast(x.device.type, enabled=False):
        gate, tensors = _Gate.of(spec, parts, backend), _tensors(parts)
        if not gate.by_function(parts, (x, g, *tensors)):
            return gate.composed(x, g, tensors, parts)
        return _Function.apply(gate, parts, x, g, *tensors)


def _tensors(parts: Parts) -> list[Tensor | None]:
    """Of theta, phi and psi: weight and bias; of their norms, where they fold or are taken here, weight, bias
    and, where they fold, mean and var."""
    tensors: list[Tensor | None] = []
    for layer in ("theta", "phi", "psi"):
        conv, norm = getattr(parts, layer), getattr(parts, f"{layer}_norm")
        tensors += [conv.weight, conv.bias]
        folds = is_foldable(norm)
        tensors += [norm.weight, norm.bias] if folds or takes(norm) else [None, None]
        tensors += [norm.running_mean, norm.running_var] if folds else [None, None]
    return tensors


@dataclass(frozen=True)
class _Gate:
    """What is no tensor. norms: of theta, phi and psi: "batch", "frozen", "other" (psi's alone) or "none"."""

    norms: tuple[str, ...]
    eps: tuple[float, ...]
    kernel: list[int]
    stride: list[int]
    phi_resize: str
    alpha_resize: str
    activation: str
    normaliser: str
    backend: str

    @classmethod
    def of(cls, spec: GateSpec, parts: Parts, backend: str) -> _Gate:
        norms = [getattr(parts, name) for name in _NORMS]
        return cls(
            tuple(_kind(norm) for norm in norms),
            tuple(getattr(norm, "eps", 0.0) for norm in norms),
            list(spec.theta_kernel),
            list(spec.theta_stride),
            eager.kernel_resize(spec.phi_resize),
            eager.kernel_resize(spec.alpha_resize),
            spec.activation,
            spec.normaliser,
            backend,
        )

    def by_function(self, parts: Parts, tensors: Sequence[Tensor | None]) -> bool:
        """Whether the kernels' own backward may be used: on the CPU, in eager mode, for gradients."""
        return (
            "other" not in self.norms
            and torch.is_grad_enabled()
            and any(t is not None and t.requires_grad for t in tensors)
            and not torch.compiler.is_compiling()
            and not torch._C._are_functorch_transforms_active()
            and forward_ad._current_level < 0
            and backends.choose(self.backend, tensors[0]) == "cpu"
        )

    def moments(self, x: Tensor, g: Tensor) -> tuple[Moments, Moments]:
        """Of x and of g, each (None, None) where no batch norm needs them."""
        of_x = of_g = (None, None)
        if self.norms[0] == "batch":
            of_x = functional.moments(x, self.kernel, self.stride, backend=self.backend)
        if self.norms[1] == "batch":
            of_g = functional.moments(g, backend=self.backend)
        return of_x, of_g

    def folded(
        self,
        tensors: Sequence[Tensor | None],
        moments: Sequence[Moments],
        centres: Sequence[Tensor | None] = (None, None),
    ) -> tuple[Tensor | None, ...]:
        """Weights of theta, phi and psi, bias, psi's bias: as `functional.attention_logits` takes them.

        centres: what the projections take off their inputs first.
        """
        weights, biases = [], []
        for i, kind in enumerate(self.norms):
            weight, bias, scale, shift, mean, var = tensors[i * _TENSORS : (i + 1) * _TENSORS]
            if kind == "batch" and i < 2:
                weight, bias = (t if t is None else t.double() for t in (weight, bias))
                mean, cov = moments[i]
                mean = mean if centres[i] is None else mean - centres[i]
                mean, var = statistics_of_projection(weight, bias, mean, cov)
            if mean is not None:
                weight, bias = fold(weight, bias, scale, shift, mean, var, self.eps[i])
            weights.append(weight)
            biases.append(bias)
        return *weights, summed(*biases[:2]), biases[2]

    def alpha(
        self, tensors: Sequence[Tensor | None], logits: Tensor, statistics: Moments = (None, None)
    ) -> Tensor:
        """psi's batch norm and the normaliser; leaves mean and unbiased variance in `statistics`."""
        if self.norms[2] == "batch":
            scale, shift = (t if t is None else t.to(logits.dtype) for t in tensors[-4:-2])
            logits = F.batch_norm(logits, *statistics, scale, shift, True, 1.0, self.eps[2])
        return eager.normalise(logits, self.normaliser)

    def composed(
        self, x: Tensor, g: Tensor, tensors: Sequence[Tensor | None], parts: Parts | None = None
    ) -> tuple[Tensor, Tensor]:
        """The gate, of differentiable operators; `parts`, if given, have their running statistics updated."""
        moments, statistics = self.moments(x, g), (None, None)
        logits = functional.attention_logits(
            x, g, *self.folded(tensors, moments), stride=self.stride, phi_resize=self.phi_resize,
            activation=self.activation, recompute=True, backend=self.backend,
        )  # fmt: skip
        if parts is not None:
            statistics = logits.new_zeros(1), logits.new_zeros(1)
        if self.norms[2] == "other":
            normed = eager.call(parts.psi_norm, logits).to(logits.dtype)
            alpha = eager.normalise(normed, self.normaliser)
        else:
            alpha = self.alpha(tensors, logits, statistics)
        if parts is not None:
            self.track(parts, tensors, moments, statistics, x, g, logits)
        return functional.apply_attention(
            x, alpha, alpha_resize=self.alpha_resize, backend=self.backend
        ), alpha

    def track(
        self,
        parts: Parts,
        tensors: Sequence[Tensor | None],
        moments: Sequence[Moments],
        statistics: Moments,
        x: Tensor,
        g: Tensor,
        logits: Tensor,
    ) -> None:
        """Updates the running statistics of the batch norms on batch statistics."""
        counts = logits.numel(), g.shape[0] * math.prod(g.shape[2:]), logits.numel()
        with torch.no_grad():
            for i, (name, n) in enumerate(zip(_NORMS, counts, strict=True)):
                if self.norms[i] != "batch":
                    continue
                mean, var = statistics
                if i < 2:
                    mean, var = statistics_of_projection(*tensors[i * _TENSORS :][:2], *moments[i])
                    var = var * (n / (n - 1))
                track(getattr(parts, name), mean, var, n)


def _kind(norm: nn.Module | None) -> str:
    if norm is None:
        return "none"
    return "frozen" if is_foldable(norm) else "batch" if takes(norm) else "other"


def statistics_of_projection(
    weight: Tensor, bias: Tensor | None, mean: Tensor, cov: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [I] of a projection of what has these moments, in float64."""
    rows = weight.flatten(1).double()
    projected = rows @ mean
    # A variance is never negative; rounding may make it so.
    var = ((rows @ cov) * rows).sum(1).clamp_min(0)
    return projected if bias is None else projected + bias.double(), var


def track(norm: _BatchNorm, mean: Tensor, var: Tensor, n: int) -> None:
    """What the norm's own forward would do to its buffers; var is the unbiased variance of n values."""
    if not (norm.training and norm.track_running_stats) or norm.running_mean is None:
        return
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:  # the average over all batches so far
            momentum = 1.0 / norm.num_batches_tracked.to(mean.dtype)
    if isinstance(norm, BiasedBatchNorm):
        var = var * ((n - 1) / n)
    for buffer, new in ((norm.running_mean, mean), (norm.running_var, var)):
        buffer.copy_(buffer * (1 - momentum) + new * momentum)


class _Function(torch.autograd.Function):
    """(gate, parts, x, g, *tensors) -> y, alpha. One map is made as gradient of x, and one for g, onto which
    all of their parts are added, where autograd would add three."""

    @staticmethod
    def forward(ctx: Any, gate: _Gate, parts: Parts, x: Tensor, g: Tensor, *tensors: Tensor | None) -> Any:
        with below_autograd():
            moments = gate.moments(x, g)
            centres = [mean if mean is None else mean.to(accumulation_dtype(x)) for mean, _ in moments]
            weights = _arguments(x, gate.folded(tensors, moments, centres))
            options = gate.stride, gate.phi_resize, gate.activation
            logits = ops.attention_train_fwd(x, g, *centres, *weights, *options)
            statistics = logits.new_zeros(1), logits.new_zeros(1)
            alpha = gate.alpha(tensors, logits, statistics)
            y = ops.gate_apply_fwd(x, alpha, gate.alpha_resize)
            gate.track(parts, tensors, moments, statistics, x, g, logits)
        ctx.gate = gate
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, g, logits, *moments[0], *moments[1], *tensors)
        return y, alpha

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dalpha: Tensor | None) -> tuple[Tensor | None, ...]:
        gate, (need_x, need_g, *needs) = ctx.gate, ctx.needs_input_grad[2:]
        x, g, logits, mean_x, cov_x, mean_g, cov_g, *tensors = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            if dy is None and dalpha is None:
                return (None,) * (len(needs) + 4)
            if torch.is_grad_enabled():
                return None, None, *_twin_gradients(gate, (dy, dalpha), x, g, tensors)
            # The graph of the small tensors and of one channel, once more, from leaves of its own.
            leaves = [_leaf(t, need) for t, need in zip(tensors, needs, strict=True)]
            of_x, of_g = (
                [_leaf(t, need_x) for t in (mean_x, cov_x)],
                [_leaf(t, need_g) for t in (mean_g, cov_g)],
            )
            centres = [mean if mean is None else mean.to(accumulation_dtype(x)) for mean in (mean_x, mean_g)]
            level = _leaf(logits, True)
            with torch.enable_grad():
                weights = _arguments(x, gate.folded(leaves, (of_x, of_g), centres))
                alpha = gate.alpha(leaves, level)
            with below_autograd():
                if dy is not None:
                    _, through_y = ops.gate_apply_bwd(dy, x, alpha.detach(), gate.alpha_resize, 2)
                    dalpha = through_y if dalpha is None else through_y + dalpha
                torch.autograd.backward(alpha, dalpha)
                wanted = [need_x, need_g, *[t is not None and t.requires_grad for t in weights]]
                bits = sum(bool(want) << i for i, want in enumerate(wanted))
                args = [t if t is None else t.detach() for t in weights[:4]]
                options = gate.stride, gate.phi_resize, gate.alpha_resize, gate.activation
                dx, dg, *dweights = ops.attention_train_bwd(
                    dy, level.grad, x, g, *centres, *args, alpha.detach(), *options, bits
                )
                pairs = [(w, d) for w, d, want in zip(weights, dweights, wanted[2:], strict=True) if want]
                if pairs:
                    torch.autograd.backward(*zip(*pairs, strict=True))
                ones = [1] * len(gate.stride)
                if need_x and mean_x is not None:
                    ops.moments_add_bwd(dx, of_x[0].grad, of_x[1].grad, x, mean_x, gate.kernel, gate.stride)
                if need_g and mean_g is not None:
                    ops.moments_add_bwd(dg, of_g[0].grad, of_g[1].grad, g, mean_g, ones, ones)
        gradients = [t.grad if t is not None else None for t in leaves]
        return None, None, dx if need_x else None, dg if need_g else None, *gradients


def _arguments(x: Tensor, folded: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Folded weights in the operators' order and dtype."""
    dtype = accumulation_dtype(x)
    theta, phi, psi, bias, psi_bias = (t if t is None else t.to(dtype) for t in folded)
    return theta, phi, bias, psi.reshape(-1), psi_bias


def _leaf(t: Tensor | None, need: bool) -> Tensor | None:
    return t if t is None else t.detach().requires_grad_(need)


def _twin_gradients(
    gate: _Gate, grads: Sequence[Tensor | None], x: Tensor, g: Tensor, tensors: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """First derivatives that can be differentiated again: those of the composition."""
    with torch.enable_grad():
        x, g, *tensors = inputs = [t if t is None else t.view_as(t) for t in (x, g, *tensors)]
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        pairs = [p for p in zip(gate.composed(x, g, tensors), grads, strict=True) if p[1] is not None]
        results, grads = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(results, wanted, grads, create_graph=True, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]
