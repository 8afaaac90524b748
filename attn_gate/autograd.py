"""The fused operators made differentiable: by autograd Functions, and by rules for compile, export and vmap.

Which way a call takes (each measured):
- In eager mode a plain Function, whose `forward(ctx, ...)` costs the least per call.
- Under torch.compile, export and vmap the operator itself, which has its rules attached by torch.library.
- In forward mode, and under the torch.func transforms that differentiate, the eager twin: their backward must
  be differentiable, and would compute the twin anyway.

Second derivatives are those of the twin: a backward kernel that autograd took for a constant would give
silently wrong numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad

from .operators import ATTENTION_GATE, MOMENTS, OPERATORS, Operator, as_tuple


def call(op: Operator, *args: Any) -> tuple[Tensor, ...]:
    """op's differentiable results, by the way in that suits where we are called from."""
    if torch._C._are_functorch_transforms_active():
        return op.forward(*args)[: op.outputs] if _only_vmap() else op.twin(*args)
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return op.forward(*args)[: op.outputs]
    if forward_ad._current_level >= 0:
        return op.twin(*args)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[: op.tensors]):
        return _FUNCTIONS[op.namespace, op.name].apply(*args)[: op.outputs]
    with below_autograd():
        return op.forward(*args)[: op.outputs]


def _only_vmap() -> bool:
    if torch.compiler.is_compiling():
        return False  # Dynamo traces transforms in ways of its own
    return all(transform.key() == TransformType.Vmap for transform in get_interpreter_stack())


def below_autograd() -> AbstractContextManager:
    """Passes over the operators' rules, which are in Python and cost as much as a small gate."""
    return nullcontext() if torch.compiler.is_compiling() else torch._C._AutoDispatchBelowAutograd()


def _save(op: Operator, ctx: Any, args: Sequence[Any], results: Sequence[Tensor]) -> None:
    """Keeps what backward reads. Results that are no outputs are never differentiated."""
    ctx.save_for_backward(*args[: op.tensors], *[results[i] for i in op.kept])
    ctx.options = tuple(args[op.tensors :])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*results[op.outputs :])


def _backward(op: Operator, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of all arguments: by the kernel, or by the twin where they must be differentiable too."""
    saved = ctx.saved_tensors  # once: checkpointing recomputes at each read, and refuses the second
    tensors, kept = saved[: op.tensors], saved[op.tensors :]
    grads = grads[: op.outputs]
    if all(grad is None for grad in grads):
        found: Sequence[Tensor | None] = [None] * op.tensors
    elif torch.is_grad_enabled():
        found = _twin_gradients(op, grads, tensors, ctx.options)
    else:
        needs = ctx.needs_input_grad[: op.tensors]
        with below_autograd():
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


# ---------------------------------------------------------------------------------------------- eager mode


def _make_function(op: Operator) -> type[torch.autograd.Function]:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
            with below_autograd():
                results = op.forward(*args)
            _save(op, ctx, args, results)
            return results

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return _backward(op, ctx, *grads)

    return Function


_FUNCTIONS: dict[tuple[str, str], type[torch.autograd.Function]] = {}


class AttentionGateFunction(_make_function(ATTENTION_GATE)):
    """The whole gate as a torch.autograd.Function; `attn_gate.functional.attention_gate` is the checked way
    to it.

    y, alpha, preact = AttentionGateFunction.apply(x, g, theta_weight, phi_weight, bias, psi_weight, psi_bias,
                                                   stride, phi_resize, alpha_resize, activation, store)

    x [N, C, *S], g [N, G, *Q], 2D or 3D; theta_weight [I, C, *k], phi_weight [I, G, 1..], bias [I] or None,
    psi_weight [I], psi_bias [1] or None, all in float32 (float64 for float64 maps); stride a list with a
    number per axis; modes as in `attention_gate`; store: keep the pre-activation theta + phi for backward
    (`preact`, else empty).

    Source: Oktay et al. 2018 (arXiv 1804.03999), section 2.2.
    """


# ------------------------------------------------------------------------------- torch.compile, export, vmap


def _register(op: Operator) -> None:
    forward, backward = f"{op.namespace}::{op.name}_fwd", f"{op.namespace}::{op.name}_bwd"
    ops = getattr(torch.ops, op.namespace)

    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        _save(op, ctx, inputs, as_tuple(output))

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"{backward} has no derivative of its own; differentiate {forward} with create_graph=True"
        )

    def vmap_forward(info: Any, dims: tuple, *args: Any) -> tuple:
        maps = 0 if op.over_batch else op.maps
        results, out = _vmap(getattr(ops, f"{op.name}_fwd"), maps, info, dims, *args)
        return (results, out) if len(results) > 1 else (results[0], out[0])

    def vmap_backward(info: Any, dims: tuple, *args: Any) -> tuple:
        # The gradients of parameters are sums over the batch, which must not be folded: maps=0.
        return _vmap(getattr(ops, f"{op.name}_bwd"), 0, info, dims, *args)

    torch.library.register_autograd(
        forward, lambda ctx, *grads: _backward(op, ctx, *grads), setup_context=setup
    )
    torch.library.register_autograd(backward, refuse)
    torch.library.register_vmap(forward, vmap_forward)
    torch.library.register_vmap(backward, vmap_backward)


def make_differentiable(op: Operator) -> None:
    """Once for every operator, in each namespace that has it."""
    _FUNCTIONS[op.namespace, op.name] = AttentionGateFunction if op == ATTENTION_GATE else _make_function(op)
    _register(op)


for _op in (*OPERATORS, MOMENTS):
    make_differentiable(_op)
