"""Which fused operators take a gate, and the run of them.

Functions of a GateSpec, the gate's layers and the two maps. The layers come as any object with the attributes
of `eager.Parts`: AttentionGate is one, and a gate of another library seen through its adapter is another.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attn_gate import checks, eager, functional, matrix_units, operators, pointwise, reference, training
from attn_gate.decisions import is_watched
from attn_gate.eager import Parts
from attn_gate.folding import FoldCache, fold, fold_layer, is_foldable
from attn_gate.spec import Fusion, GateSpec

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def fusion(
    spec: GateSpec,
    parts: Parts,
    x: Tensor | None = None,
    g: Tensor | None = None,
    recompute: str | bool = "auto",
) -> Fusion:
    """What of this gate fused operators compute now, and why not more; x and g add what their sizes decide.

    recompute: as in AttentionGate; for batch norms in training mode it decides too.
    """
    unfused = [name for name in ("theta", "phi", "psi") if not _is_plain(spec, getattr(parts, name))]
    for name in ("theta_norm", "phi_norm", "psi_norm"):
        norm = getattr(parts, name)
        if norm is not None and not is_foldable(norm):
            unfused.append(name)
    if x is not None and spec.theta_padding == "same":
        grid = spec.input_grid(x.shape[2:], (x if g is None else g).shape[2:])
        if any(map(any, spec.theta_pads(grid))):
            unfused.append("theta")
    found = spec.fusion(unfused)
    if x is None:
        return found
    if found.plan.startswith("whole") and recompute == "auto" and matrix_units.pay(x, parts):
        reasons = ["PyTorch's bfloat16 convolutions have the better arithmetic on this CPU", found.reason]
        return Fusion(found.plan.replace("whole", "chain"), "; ".join(filter(None, reasons)))
    if not found.plan.startswith("chain"):
        return found
    if training.serves(spec, parts, x, g, recompute):
        without = spec.fusion([name for name in unfused if name not in ("theta_norm", "phi_norm")])
        if without.plan.startswith("whole"):
            return Fusion("whole_moments", "batch norms need the statistics of the whole map")
    if training.left_alone(parts, x, recompute):
        return Fusion(
            "eager", "norms need statistics of its maps, and PyTorch's layers are the faster way there"
        )
    return found


def decide(spec: GateSpec, parts: Parts, x: Tensor, g: Tensor, recompute: str | bool) -> str:
    """The plan of `fusion`, for `run`, which doesn't look again at whether maps and parameters fit.

    Raises:
        TypeError, ValueError: they don't.
    """
    plan = fusion(spec, parts, x, g, recompute).plan
    if plan in ("whole", "whole_logits"):
        maps = functional.cast(eager.input_of_theta(spec, x, g), g)
        layers = parts.theta, parts.phi, parts.psi
        parameters = (*(layer.weight for layer in layers), parts.theta.bias, parts.psi.bias)
        checks.checked_whole(*maps, *parameters, spec.theta_stride, 0, recompute)
    return plan


def run(
    spec: GateSpec,
    parts: Parts,
    x: Tensor,
    g: Tensor,
    *,
    plan: str,
    backend: str,
    recompute: str | bool,
    cache: FoldCache,
) -> tuple[Tensor, Tensor]:
    """The whole described gate: y [N, C, *S] (behind the output transform) and alpha [N, 1 or C, *R].

    plan: that of `decide` for these maps. backend, recompute: as in AttentionGate; backend="eager" is plain
    PyTorch, whatever the plan. cache: keeps the folded batch norms of these parts.
    """
    if backend == "eager":
        return eager.gate(spec, parts, x, g)
    if plan == "whole_moments":
        y, alpha = training.run(spec, parts, x, g, backend=backend)
    elif plan.startswith("whole"):
        y, alpha = _whole(spec, parts, x, g, plan == "whole_logits", backend, recompute, cache)
    elif plan.startswith("chain"):
        y, alpha = _chain(spec, parts, x, g, plan == "chain_logits", backend)
    else:
        products = training.products_pay(parts, x)
        alpha = eager.attention(spec, parts, x, g, pointwise.call if products else None)
        y = _weigh(spec, x, alpha, backend) if plan == "apply" else eager.weigh(spec, x, alpha)
    return _transform(spec, parts, y), alpha


def _transform(spec: GateSpec, parts: Parts, y: Tensor) -> Tensor:
    """The output transform, a batch norm that is an affine map folded into its convolution: one pass less."""
    W = parts.W
    if type(W) is not nn.Sequential or len(W) != 2 or is_watched(W):
        return eager.transform(parts, y, pointwise.call)
    conv, norm = W
    if not _is_plain(spec, conv) or not is_foldable(norm):
        return eager.transform(parts, y, pointwise.call)
    statistics = norm.running_mean, norm.running_var
    folded = fold(conv.weight, conv.bias, norm.weight, norm.bias, *statistics, norm.eps)
    weight, bias = (t.to(conv.weight.dtype) for t in folded)
    if reference.autocast_dtype(y) is not None:
        return pointwise.convolve(conv, y, weight, bias)
    return pointwise.convolve(conv, y.to(weight.dtype), weight, bias).to(y.dtype)


def _whole(
    spec: GateSpec,
    parts: Parts,
    x: Tensor,
    g: Tensor,
    logits: bool,
    backend: str,
    recompute: str | bool,
    cache: FoldCache,
) -> tuple[Tensor, Tensor]:
    maps, folded = functional.cast(eager.input_of_theta(spec, x, g), g), cache.folded(parts)
    theta, phi = folded.theta_weight, folded.phi_weight
    if theta is parts.theta.weight and phi is parts.phi.weight:  # no norm was folded into them
        theta, phi = (functional.round_weight(maps[0], w) for w in (theta, phi))
    inputs = (*maps, theta, phi, *folded[2:])
    phi_resize, alpha_resize = map(eager.kernel_resize, (spec.phi_resize, spec.alpha_resize))
    op, modes = operators.ATTENTION_GATE, (phi_resize, alpha_resize, spec.activation)
    if logits:
        op, modes = operators.ATTENTION_LOGITS, (phi_resize, spec.activation)
    results = functional.run_whole(op, *inputs, spec.theta_stride, modes, recompute, backend)
    return _finish(spec, parts, x, results[0], backend) if logits else results


def _chain(
    spec: GateSpec, parts: Parts, x: Tensor, g: Tensor, logits: bool, backend: str
) -> tuple[Tensor, Tensor]:
    theta = eager.project_x(spec, parts, x, g, pointwise.call)
    phi = eager.project_g(spec, parts, g, pointwise.call)
    if torch.is_grad_enabled() and (theta.requires_grad or phi.requires_grad):
        # Added here the operator keeps one map of I channels for its backward pass, not two.
        theta, phi = eager.combine(spec, theta, phi), None
    if reference.autocast_dtype(x) is None:
        theta, phi = theta.to(x.dtype), None if phi is None else phi.to(x.dtype)
    inputs = (theta, phi, *fold_layer(parts, "psi"))
    options = {
        "phi_resize": eager.kernel_resize(spec.phi_resize),
        "activation": spec.activation,
        "backend": backend,
    }
    if logits:
        return _finish(spec, parts, x, functional.gate_logits(*inputs, **options), backend)
    options["alpha_resize"] = eager.kernel_resize(spec.alpha_resize)
    return functional.gate(x, *inputs, **options)


def _finish(spec: GateSpec, parts: Parts, x: Tensor, logits: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """The norm of psi where it isn't folded, the normaliser and the product."""
    norm = None if is_foldable(parts.psi_norm) else parts.psi_norm
    alpha = eager.finish_logits(spec, norm, logits)
    return _weigh(spec, x, alpha, backend), alpha


def _weigh(spec: GateSpec, x: Tensor, alpha: Tensor, backend: str) -> Tensor:
    mode = eager.kernel_resize(spec.alpha_resize)
    return functional.apply_attention(x, alpha, alpha_resize=mode, backend=backend)


def _is_plain(spec: GateSpec, layer: nn.Module) -> bool:
    """Whether the fused operators may use the parameters of this layer in place of calling it."""
    # The exact class: a parametrised, quantised or otherwise wrapped convolution is a subclass.
    return type(layer) is CONVOLUTIONS[spec.spatial_dims] and not is_watched(layer)
