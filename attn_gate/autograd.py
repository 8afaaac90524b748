"""The fused operators made differentiable: autograd Functions, and the rules for torch.compile and torch.func.

Why there are three ways in (each measured):
- A plain Function with `forward(ctx, ...)` costs the least per call: eager mode.
- torch.func (grad, vmap, jvp, hessian) and forward mode want `setup_context`, which costs three times as much.
- torch.compile and export want the operator itself, with rules attached by torch.library.

Second derivatives and forward mode differentiate the operator's eager twin: a backward kernel that autograd took
for a constant would give silently wrong numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._library import ops
from .operators import ATTENTION_GATE, OPERATORS, Operator, as_tuple

_under_torch_func = torch._C._are_functorch_transforms_active
# Below it the operators' Python rules are passed over, which costs as much as a small gate.
_BelowAutograd = torch._C._AutoDispatchBelowAutograd


def call(op: Operator, *args: Any) -> tuple[Tensor, ...]:
    """op's differentiable results, by the way in that suits where we are called from."""
    if torch.compiler.is_compiling():
        # Nothing that is traced inside a transform can be the operator; the twin is, and gets compiled.
        return op.twin(*args) if _under_torch_func() else op.forward(*args)[: op.outputs]
    if _under_torch_func() or forward_ad._current_level >= 0:
        return _TRANSFORMABLE[op.name].apply(*args)[: op.outputs]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[: op.tensors]):
        return _FUNCTIONS[op.name].apply(*args)[: op.outputs]
    with _BelowAutograd():
        return op.forward(*args)[: op.outputs]


# ------------------------------------------------------------------------------------------------- derivatives


def _save(op: Operator, ctx: Any, args: Sequence[Any], results: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Keeps what backward reads. Results that are no outputs are never differentiated."""
    saved = (*args[: op.tensors], *(results[i] for i in op.kept))
    ctx.options = tuple(args[op.tensors :])
    ctx.save_for_backward(*saved)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*results[op.outputs :])
    return saved


def _backward(op: Operator, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of all arguments: by the kernel, or by the twin where they must be differentiable themselves."""
    tensors, kept = ctx.saved_tensors[: op.tensors], ctx.saved_tensors[op.tensors :]
    grads = grads[: op.outputs]
    if all(grad is None for grad in grads):
        found: Sequence[Tensor | None] = [None] * op.tensors
    elif torch.is_grad_enabled():
        found = _twin_gradients(op, grads, tensors, ctx.options)
    else:
        needs = ctx.needs_input_grad[: op.tensors]
        with _BelowAutograd():
            found = op.backward(grads, tensors, kept, ctx.options, sum(n << i for i, n in enumerate(needs)))
        found = [grad if needed else None for grad, needed in zip(found, needs, strict=True)]
    return (*found, *[None] * len(ctx.options))


def _twin_gradients(
    op: Operator, grads: Sequence[Tensor | None], tensors: Sequence[Tensor | None], options: tuple
) -> list[Tensor | None]:
    """First derivatives of the twin, which can be differentiated again."""
    with torch.enable_grad():
        # Views, so that a tensor passed twice still gets two gradients.
        tensors = [t if t is None else t.view_as(t) for t in tensors]
        wanted = [t for t in tensors if t is not None and t.requires_grad]
        pairs = [p for p in zip(op.twin(*tensors, *options), grads, strict=True) if p[1] is not None]
        results, grads = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(results, wanted, grads, create_graph=True, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in tensors]


def _tangents(op: Operator, ctx: Any, tangents: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Forward mode: tangents of op's outputs, by the twin."""
    tensors = ctx.saved_tensors[: op.tensors]
    moving = [i for i, tangent in enumerate(tangents[: op.tensors]) if tangent is not None]

    def of_moving(*values: Tensor) -> tuple[Tensor, ...]:
        new = dict(zip(moving, values, strict=True))
        return op.twin(*[new.get(i, t) for i, t in enumerate(tensors)], *ctx.options)

    primals = tuple(tensors[i] for i in moving)
    return torch.func.jvp(of_moving, primals, tuple(tangents[i] for i in moving))[1]


def _vmap(run: Callable, maps: int, info: Any, dims: Sequence, *args: Any) -> tuple[tuple, tuple]:
    """The vmap axis folded into the batch where only maps have one, else one call after the other."""
    size = info.batch_size
    dims = [d if isinstance(d, int) else None for d in dims]  # lists of numbers have lists of None
    if any(d is not None for d in dims[maps:]):
        rows = [
            as_tuple(run(*[a if d is None else a.select(d, k) for a, d in zip(args, dims, strict=True)]))
            for k in range(size)
        ]
        return tuple(torch.stack(column) for column in zip(*rows, strict=True)), (0,) * len(rows[0])

    folded = []
    for t, d in zip(args[:maps], dims[:maps], strict=True):
        if t is not None:
            t = (t.expand(size, *t.shape) if d is None else t.movedim(d, 0)).flatten(0, 1)
        folded.append(t)
    results = as_tuple(run(*folded, *args[maps:]))
    # A pre-activation that is not stored is an empty vector.
    unfolded = [r.unflatten(0, (size, -1)) if r.ndim > 1 else r.expand(size, *r.shape) for r in results]
    return tuple(unfolded), (0,) * len(unfolded)


# ---------------------------------------------------------------------------------------- eager mode, torch.func


def _make_function(op: Operator) -> type[torch.autograd.Function]:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
            with _BelowAutograd():
                results = op.forward(*args)
            _save(op, ctx, args, results)
            return results

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return _backward(op, ctx, *grads)

    return Function


def _make_transformable(op: Operator) -> type[torch.autograd.Function]:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            return op.forward(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
            ctx.save_for_forward(*_save(op, ctx, inputs, output))

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return _backward(op, ctx, *grads)

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
            stored = len(op.kept) and op.kept[-1] >= op.outputs
            return (*_tangents(op, ctx, tangents), *[None] * stored)

        @staticmethod
        def vmap(info: Any, dims: tuple, *args: Any) -> tuple[tuple, tuple]:
            return _vmap(Function.apply, op.maps, info, dims, *args)

    return Function


_FUNCTIONS = {op.name: _make_function(op) for op in OPERATORS}
_TRANSFORMABLE = {op.name: _make_transformable(op) for op in OPERATORS}


class AttentionGateFunction(_FUNCTIONS["attention_gate"]):
    """The whole gate as a torch.autograd.Function; `attn_gate.functional.attention_gate` is the checked way to it.

    y, alpha, preact = AttentionGateFunction.apply(x, g, theta_weight, phi_weight, bias, psi_weight, psi_bias,
                                                   stride, phi_resize, alpha_resize, activation, store)

    x [N, C, *S], g [N, G, *Q], 2D or 3D; theta_weight [I, C, *k], phi_weight [I, G, 1..], bias [I] or None,
    psi_weight [I], psi_bias [1] or None, all in float32 (float64 for float64 maps); stride a list with a number
    per axis; modes as in `attention_gate`; store: keep the pre-activation theta + phi for backward (`preact`,
    else empty).

    Source: Oktay et al. 2018 (arXiv 1804.03999), section 2.2.
    """


_FUNCTIONS[ATTENTION_GATE.name] = AttentionGateFunction


# ---------------------------------------------------------------------------------- torch.compile, export, opcheck


def _register(op: Operator) -> None:
    forward, backward = f"attn_gate::{op.name}_fwd", f"attn_gate::{op.name}_bwd"

    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        _save(op, ctx, inputs, as_tuple(output))

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"{backward} has no derivative: differentiate {forward} or attn_gate.functional with create_graph=True"
        )

    def vmap_forward(info: Any, dims: tuple, *args: Any) -> tuple:
        results, out = _vmap(getattr(ops, f"{op.name}_fwd"), op.maps, info, dims, *args)
        return (results, out) if len(results) > 1 else (results[0], out[0])

    def vmap_backward(info: Any, dims: tuple, *args: Any) -> tuple:
        # The gradients of parameters are sums over the batch, which must not be folded: maps=0.
        return _vmap(getattr(ops, f"{op.name}_bwd"), 0, info, dims, *args)

    torch.library.register_autograd(forward, lambda ctx, *grads: _backward(op, ctx, *grads), setup_context=setup)
    torch.library.register_autograd(backward, refuse)
    torch.library.register_vmap(forward, vmap_forward)
    torch.library.register_vmap(backward, vmap_backward)


for _op in OPERATORS:
    _register(_op)
