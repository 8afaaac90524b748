"""Batch norms of theta and phi in training mode, with nothing of I channels made or kept.

Once the mean and the variance of a projection are known, a batch norm behind it folds into it in training
too. So nothing is stored that passes over x and g can make again:

    forward    statistics of theta and of phi; logits of the folded weights; psi's norm; x * alpha
    backward   dalpha; psi's norm; the two means of each norm's gradient; all gradients

In eager mode on the CPU kernels do that (`_Function`). Elsewhere operators that autograd, torch.compile and
torch.func know are composed (`_Gate.composed`), and the statistics are those of known moments of x:

    theta = W x + b    has the mean W m + b and the variances diag(W Cov W^T),    m, Cov: the moments of x

Source: Ioffe and Szegedy 2015 (arXiv 1502.03167), algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from attn_gate import backends, eager, functional, matrix_units, pointwise
from attn_gate._library import ops
from attn_gate.autograd import below_autograd
from attn_gate.decisions import is_traced, is_watched
from attn_gate.eager import Parts
from attn_gate.folding import fold, is_foldable, summed
from attn_gate.norms import FOLDABLE, BiasedBatchNorm
from attn_gate.reference import accumulation_dtype, autocast_dtype
from attn_gate.spec import GateSpec

Moments = tuple[Tensor | None, Tensor | None]
# What is taken off the rows of a projection's input; mean and biased variance of the projection of the rest.
Statistics = tuple[Tensor | None, Tensor | None, Tensor | None]
_NORMS = ("theta_norm", "phi_norm", "psi_norm")
_TENSORS = 6  # of a layer: see _tensors


def takes(norm: nn.Module | None) -> bool:
    """Whether this is a batch norm on the statistics of this batch alone, and nobody listens."""
    if type(norm) not in FOLDABLE or is_watched(norm):
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

    A step saves some 20 passes over maps of I channels, and makes theta and phi (K_x rows of patches of x,
    and g's channels) three times more. Measured on 2 cores with AVX-512 and 32 MiB of cache: 1.1 to 8 times
    eager's speed where the multiply-adds for each element saved are at most 3 for each MiB of x; less than
    eager's at twice as many, where maps stay in cache. In channels last PyTorch's norms are faster: 1.0 to
    2.5 times eager's speed up to 16 of them, at most 2.4 for each MiB; 1.0 to 1.25 times above, at most 3 for
    each MiB beyond 12; 0.65 to 0.95 times where there are more. Where PyTorch has units for bfloat16
    products, 3 to 5 times eager's speed up to 20 of them for each element, 0.9 times at 38; where it has dot
    products of bfloat16 (Zen 5), 0.4 to 0.8 times from 29 on, beside what `left_alone` leaves. Under
    torch.compile and torch.func there are products of the patches with themselves.
    """
    if not eager.are_convolutions(parts):
        return False
    if x.device.type != "cpu" or torch.compiler.is_exporting():
        return False  # not measured there; an exported program may get any size
    inter = parts.theta.weight.shape[0]
    rows_x = parts.theta.weight.numel() // inter
    rows_g = parts.phi.weight.shape[1]
    mebibytes = x.numel() * x.element_size() / 2**20
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        normed = ((rows_x, parts.theta_norm), (rows_g, parts.phi_norm))
        products = sum(k * k for k, norm in normed if takes(norm))
        multiplications = 1.5 * (products + inter * (rows_x + rows_g)) / (20 * inter)
        return multiplications <= min(64, 2.5 * mebibytes) * x.element_size() / 4
    most = min(32 if matrix_units.serve(x, parts) else 64, 3 * mebibytes)
    if not x.is_contiguous():
        most = min(most, max(min(16, 2.4 * mebibytes), 3 * (mebibytes - 12)))
    return 3 * (rows_x + rows_g) / 20 <= most


def left_alone(parts: Parts, x: Tensor, recompute: str | bool = "auto", products: bool = True) -> bool:
    """Whether recompute="auto" leaves norms on statistics of these maps, and all behind them, to PyTorch.

    products: whether projections may be made as products of matrices, where that is faster.

    On the CPU it does where `run` doesn't pay: fusing what follows such norms keeps as much for the backward
    pass as eager does, and took 0.7 to 1.05 times its speed in inference, 0.8 to 1.0 times in a training step
    on maps below 12 MiB. Above, a step with norms over instances or groups took 1.0 to 1.5 times its speed.
    Not where a step's projections are products (pointwise.py) and x has 2^18 elements or more: it then took
    1.0 to 1.25 times eager's speed, in bfloat16 with units for such products 1.5 to 3 times, and
    0.4 to 1.05 times on smaller maps.
    """
    if recompute != "auto" or x.device.type != "cpu":
        return False
    norms = [n for n in (parts.theta_norm, parts.phi_norm) if n is not None and not is_foldable(n)]
    if not norms or any(map(is_watched, norms)):
        return False
    if batch := any(map(takes, norms)):
        if pays(x, parts):
            return False
        may_serve = pointwise.may_serve(parts.theta) and pointwise.may_serve(parts.phi)
        may_serve = may_serve and x.stride(1) != 1  # 1: channels last
        # Sizes are compared behind may_serve, as in products_pay.
        product = may_serve and pointwise.pays(parts.theta, x) and pointwise.pays(parts.phi, x)
        faster = product or matrix_units.serve(x, parts)
        if products and faster and torch.is_grad_enabled() and x.numel() >= 2**18:
            return False
    return batch or not torch.is_grad_enabled() or x.numel() * x.element_size() < 12 * 2**20


def products_pay(parts: Parts, x: Tensor) -> bool:
    """Whether a step is faster with 1x1 convolutions as products, in a gate whose logits are PyTorch's.

    Measured on 2 cores with AVX-512, steps of 1 ms or more: 1.2 to 1.6 times eager's speed from 2^17 elements
    of x on. Below, what that costs in Python is a tenth of the step.
    """
    # may_serve first: a size that is compared under torch.compile or export is one that programs depend on.
    may_serve = pointwise.may_serve(parts.theta) and pointwise.may_serve(parts.phi)
    return may_serve and torch.is_grad_enabled() and x.numel() >= 2**17 and pointwise.serves(parts.theta, x)


def run(spec: GateSpec, parts: Parts, x: Tensor, g: Tensor, *, backend: str) -> tuple[Tensor, Tensor]:
    """y [N, C, *S] (before the output transform) and alpha [N, 1, *R]; running statistics are updated.

    For gates whose theta and phi have a batch norm that `takes`, one that folds, or none; in 2D or 3D, with
    more than one voxel on each grid. psi's norm may be any.
    """
    x, g = functional.cast(x, g)
    with _without_autocast(x):
        gate, tensors = _Gate.of(spec, parts, backend), _tensors(parts)
        if not gate.by_function(parts, (x, g, *tensors)):
            return gate.composed(x, g, tensors, parts)
        return _Function.apply(gate, parts, x, g, *tensors)


def _without_autocast(t: Tensor) -> AbstractContextManager:
    """Off on t's device, where it is on."""
    return nullcontext() if autocast_dtype(t) is None else torch.autocast(t.device.type, enabled=False)


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
            and not is_traced()
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
        self, tensors: Sequence[Tensor | None], moments: Sequence[Moments]
    ) -> tuple[Tensor | None, ...]:
        """Weights of theta, phi and psi, bias, psi's bias: as `functional.attention_logits` takes them."""
        weights, biases = [], []
        for i, kind in enumerate(self.norms):
            weight, bias, scale, shift, mean, var = _layer(tensors, i)
            if kind == "batch" and i < 2:
                weight, bias = (t if t is None else t.double() for t in (weight, bias))
                mean, var = statistics_of_projection(weight, bias, *moments[i])
            if mean is not None:
                weight, bias = fold(weight, bias, scale, shift, mean, var, self.eps[i])
            weights.append(weight)
            biases.append(bias)
        return *weights, summed(*biases[:2]), biases[2]

    def statistics(self, tensors: Sequence[Tensor | None], x: Tensor, g: Tensor) -> list[Statistics]:
        """Of theta and of phi, each Nones where no batch norm needs them."""
        found: list[Statistics] = []
        for i, (of, kernel, stride) in enumerate(
            ((x, self.kernel, self.stride), (g, [1], [1] * len(self.stride)))
        ):
            if self.norms[i] != "batch":
                found.append((None, None, None))
                continue
            if (centre := rough_centre(of)) is not None:
                centre = centre.repeat_interleave(math.prod(kernel))
            weight = _layer(tensors, i)[0].to(accumulation_dtype(of))
            found.append((centre, *ops.projection_statistics(of, weight, centre, stride)))
        return found

    def projection(
        self, i: int, tensors: Sequence[Tensor | None], statistics: Statistics
    ) -> tuple[Tensor | None, ...]:
        """Weight, norm and bias of theta (i = 0), phi (1) or psi (2).

        Behind a batch norm on statistics of this batch the weight is divided by the deviation, and the norm
        is what remains of it: shift and scale [2, I], both in float64. Others are folded, without a norm.
        """
        weight, bias, scale, shift, mean, var = _layer(tensors, i)
        if statistics[1] is not None:
            _, mean, var = statistics
            inverse = (var + self.eps[i]).rsqrt()
            scale = torch.ones_like(var) if scale is None else scale.double()
            return weight.double() * _column(inverse, weight), torch.stack((-mean * inverse, scale)), shift
        if mean is not None:
            weight, bias = fold(weight, bias, scale, shift, mean, var, self.eps[i])
        return weight, None, bias

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
            with torch.no_grad():
                projected = [
                    m if m[0] is None else statistics_of_projection(*_layer(tensors, i)[:2], *m)
                    for i, m in enumerate(moments)
                ]
                self.track(parts, *projected, statistics, g, logits)
        return functional.apply_attention(
            x, alpha, alpha_resize=self.alpha_resize, backend=self.backend
        ), alpha

    def track(
        self, parts: Parts, theta: Moments, phi: Moments, psi: Moments, g: Tensor, logits: Tensor
    ) -> None:
        """Updates the running statistics of batch norms on batch statistics: from the mean and the biased
        variance of theta and phi, the unbiased one of psi."""
        counts = logits.numel(), g.shape[0] * math.prod(g.shape[2:]), logits.numel()
        for i, (mean, var) in enumerate((theta, phi, psi)):
            n = counts[i]
            if self.norms[i] == "batch":
                track(getattr(parts, _NORMS[i]), mean, var if i == 2 else var * (n / (n - 1)), n)


def _kind(norm: nn.Module | None) -> str:
    if norm is None:
        return "none"
    return "frozen" if is_foldable(norm) else "batch" if takes(norm) else "other"


def _layer(tensors: Sequence[Tensor | None], i: int) -> Sequence[Tensor | None]:
    return tensors[i * _TENSORS : (i + 1) * _TENSORS]


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))


def rough_centre(x: Tensor, runs: int = 16, length: int = 16) -> Tensor | None:
    """Means [C] of x, about, in the accumulation dtype; None where x lies around zero.

    Taken off x before it is multiplied, so that means far from zero cost no digits. Exact they needn't be:
    those of `runs` runs of voxels spread over each sample do. Up to 4 deviations from zero cost 2 bits, which
    PyTorch's own layers lose too.
    """
    flat = x.flatten(2)
    runs = max(1, min(runs, flat.shape[2] // length))
    pitch = flat.shape[2] // runs
    sample = flat[:, :, : runs * pitch].unflatten(2, (runs, pitch))[..., :length]
    sample = sample.transpose(0, 1).flatten(1).to(accumulation_dtype(x))
    var, mean = torch.var_mean(sample, 1, correction=0)
    return mean if bool((mean.abs() > 4 * var.sqrt()).any()) else None


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
            found = gate.statistics(tensors, x, g)
            centres = [centre for centre, _, _ in found]
            weights, biases = [], []
            for i, statistics in enumerate((*found, (None, None, None))):
                weight, norm, bias = gate.projection(i, tensors, statistics)
                if norm is not None:
                    weight, bias = weight * _column(norm[1], weight), summed(norm[0] * norm[1], bias)
                weights.append(weight)
                biases.append(bias)
            arguments = _arguments(x, *weights, summed(*biases[:2]), biases[2])
            options = gate.stride, gate.phi_resize, gate.activation
            logits = ops.attention_train_fwd(x, g, *centres, *arguments, *options)
            of_psi = logits.new_zeros(1), logits.new_zeros(1)
            alpha = gate.alpha(tensors, logits, of_psi)
            y = ops.gate_apply_fwd(x, alpha, gate.alpha_resize)
            of_both = [_uncentred(*_layer(tensors, i)[:2], *found[i]) for i in range(2)]
            gate.track(parts, *of_both, of_psi, g, logits)
        ctx.gate = gate
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, g, logits, *found[0], *found[1], *tensors)
        return y, alpha

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dalpha: Tensor | None) -> tuple[Tensor | None, ...]:
        gate, (need_x, need_g, *needs) = ctx.gate, ctx.needs_input_grad[2:]
        x, g, logits, *saved = ctx.saved_tensors
        found, tensors = (saved[:3], saved[3:6]), saved[6:]
        with _without_autocast(x):
            if dy is None and dalpha is None:
                return (None,) * (len(needs) + 4)
            if torch.is_grad_enabled():
                return None, None, *_twin_gradients(gate, (dy, dalpha), x, g, tensors)
            # The graph of folded norms and of one channel, once more, from leaves of its own.
            leaves = [_leaf(t, need) for t, need in zip(tensors, needs, strict=True)]
            level = _leaf(logits, True)
            with torch.enable_grad():
                layers = [gate.projection(i, leaves, found[i]) for i in range(2)]
                psi, _, psi_bias = gate.projection(2, leaves, (None, None, None))
                alpha = gate.alpha(leaves, level)
                (theta, theta_norm, _), (phi, phi_norm, _) = layers
                bias = summed(layers[0][2], layers[1][2])
                weights = _arguments(x, theta, phi, psi, bias, psi_bias)
                scales = [
                    norm if norm is None else norm.to(weights[0].dtype) for norm in (theta_norm, phi_norm)
                ]
            with below_autograd():
                if dy is not None:
                    _, through_y = ops.gate_apply_bwd(dy, x, alpha.detach(), gate.alpha_resize, 2)
                    dalpha = through_y if dalpha is None else through_y + dalpha
                torch.autograd.backward(alpha, dalpha)
                inputs = [weights[0], weights[1], *scales, *weights[2:]]
                wanted = [need_x, need_g, *[t is not None and t.requires_grad for t in inputs]]
                args = [t if t is None else t.detach() for t in inputs[:-1]]
                options = gate.stride, gate.phi_resize, gate.alpha_resize, gate.activation
                dx, dg, *found = ops.attention_train_bwd(
                    dy, level.grad, x, g, found[0][0], found[1][0], *args, alpha.detach(), *options,
                    sum(bool(want) << i for i, want in enumerate(wanted)),
                )  # fmt: skip
                # Statistics are constants of this graph: the kernels have seen to their part.
                for i in range(2):
                    if scales[i] is not None and wanted[4 + i]:
                        found[2 + i] = torch.stack((torch.zeros_like(found[2 + i]), found[2 + i]))
                pairs = [(t, d) for t, d, want in zip(inputs, found, wanted[2:], strict=True) if want]
                if pairs:
                    torch.autograd.backward(*zip(*pairs, strict=True))
        gradients = [t.grad if t is not None else None for t in leaves]
        for i in range(2):  # a batch norm takes off what the bias of its projection adds
            at = i * _TENSORS + 1
            if gate.norms[i] == "batch" and leaves[at] is not None and needs[at]:
                gradients[at] = torch.zeros_like(leaves[at])
        return None, None, dx if need_x else None, dg if need_g else None, *gradients


def _uncentred(
    weight: Tensor, bias: Tensor | None, centre: Tensor | None, mean: Tensor | None, var: Tensor | None
) -> Moments:
    """Mean and variance of the projection itself, of those less its centre."""
    if centre is not None:
        mean = mean + weight.flatten(1).double() @ centre.double()
    return mean if mean is None else summed(mean, bias), var


def _arguments(
    x: Tensor,
    theta: Tensor,
    phi: Tensor,
    psi: Tensor,
    bias: Tensor | None,
    psi_bias: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Weights in the operators' order and dtype."""
    dtype = accumulation_dtype(x)
    theta, phi, psi, bias, psi_bias = (
        t if t is None else t.to(dtype) for t in (theta, phi, psi, bias, psi_bias)
    )
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
