"""The five fused operators made differentiable: torch.autograd.Functions, and the rules for torch.compile and torch.func.

Why there is more than one way in (each measured):
- A plain Function with `forward(ctx, ...)` costs the least per call; that is what eager mode uses.
- torch.func (grad, vmap, jvp, hessian) wants `setup_context`, which costs ten times as much.
- torch.compile, export and opcheck want the operator itself, with rules attached by torch.library.

Second derivatives and forward mode differentiate the eager twin in attn_gate.reference: a backward kernel that autograd
took for a constant would give silently wrong numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._library import ops

_under_torch_func = torch._C._are_functorch_transforms_active


@dataclass(frozen=True)
class Operator:
    """One operator: `tensors` differentiable inputs, then options that are no tensors.

    forward(*tensors, *options) returns `outputs` differentiable outputs and perhaps what it stores for backward.
    backward(grads, tensors, saved outputs, options, needs) returns a gradient for each of `tensors`.
    twin(*tensors, *options) is the same in eager PyTorch; `batched` says which tensors carry the batch.
    """

    name: str
    tensors: int
    outputs: int
    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., Sequence[Tensor]]
    twin: Callable[..., tuple[Tensor, ...]]
    batched: tuple[int, ...]

    def split(self, args: Sequence[Any]) -> tuple[tuple, tuple]:
        """(tensors, options)"""
        return tuple(args[: self.tensors]), tuple(args[self.tensors :])

    def twin_gradients(self, grads: Sequence[Tensor | None], tensors: Sequence[Tensor | None], options: tuple) -> list:
        """First derivatives of the twin that can be differentiated again; None where a tensor needs none."""
        with torch.enable_grad():
            # Views, so that a tensor passed twice still gets two gradients.
            tensors = [t.view_as(t) if isinstance(t, Tensor) else t for t in tensors]
            wanted = [t for t in tensors if isinstance(t, Tensor) and t.requires_grad]
            pairs = [(o, g) for o, g in zip(self.twin(*tensors, *options), grads, strict=True) if g is not None and o.requires_grad]
            if not pairs or not wanted:
                return [None] * len(tensors)
            outputs, grads = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
        return [next(found) if isinstance(t, Tensor) and t.requires_grad else None for t in tensors]


def _needs(flags: Sequence[bool]) -> int:
    return sum(1 << i for i, flag in enumerate(flags) if flag)


def _only_wanted(grads: Sequence[Tensor], needs: int) -> list[Tensor | None]:
    return [g if needs >> i & 1 else None for i, g in enumerate(grads)]


# ---------------------------------------------------------------------------------------- the operators, described


def _stored(options: tuple) -> tuple:
    """Options of a whole gate without its last one, `store`."""
    return options[:-1]


def _resized(mode: str) -> dict[str, str]:
    return {"phi_resize": mode}


def _psi(psi_weight: Tensor, like: Tensor) -> Tensor:
    return psi_weight.reshape(1, -1, *[1] * (like.ndim - 2))


def _gate_twin(x, theta, phi, psi_weight, psi_bias, phi_resize, alpha_resize, activation):
    return reference.gate(
        x, theta, phi, _psi(psi_weight, x), psi_bias, phi_resize=phi_resize, alpha_resize=alpha_resize, activation=activation
    )


def _gate_logits_twin(theta, phi, psi_weight, psi_bias, phi_resize, activation):
    psi_weight = _psi(psi_weight, theta)
    return (reference.gate_logits(theta, phi, psi_weight, psi_bias, phi_resize=phi_resize, activation=activation),)


def _attention_gate_twin(
    x, g, theta_weight, phi_weight, bias, psi_weight, psi_bias, stride, phi_resize, alpha_resize, activation, store
):
    return reference.attention_gate(
        x, g, theta_weight, phi_weight, _psi(psi_weight, x), bias, psi_bias,
        stride=stride, phi_resize=phi_resize, alpha_resize=alpha_resize, activation=activation,
    )  # fmt: skip


def _attention_logits_twin(x, g, theta_weight, phi_weight, bias, psi_weight, psi_bias, stride, phi_resize, activation, store):
    return (
        reference.attention_logits(
            x, g, theta_weight, phi_weight, _psi(psi_weight, x), bias, psi_bias,
            stride=stride, phi_resize=phi_resize, activation=activation,
        ),
    )  # fmt: skip


GATE = Operator(
    "gate",
    tensors=5,
    outputs=2,
    forward=ops.gate_fwd.default,
    backward=lambda grads, t, saved, options, needs: ops.gate_bwd(*grads, *t[:4], saved[1], *options, needs),
    twin=_gate_twin,
    batched=(0, 1, 2),
)
GATE_LOGITS = Operator(
    "gate_logits",
    tensors=4,
    outputs=1,
    forward=lambda *args: (ops.gate_logits_fwd(*args),),
    backward=lambda grads, t, saved, options, needs: ops.gate_logits_bwd(*grads, *t[:3], *options, needs),
    twin=_gate_logits_twin,
    batched=(0, 1),
)
ATTENTION_GATE = Operator(
    "attention_gate",
    tensors=7,
    outputs=2,
    forward=ops.attention_gate_fwd.default,
    backward=lambda grads, t, saved, options, needs: ops.attention_gate_bwd(*grads, *t[:6], *saved[1:], *_stored(options), needs),
    twin=_attention_gate_twin,
    batched=(0, 1),
)
ATTENTION_LOGITS = Operator(
    "attention_logits",
    tensors=7,
    outputs=1,
    forward=ops.attention_logits_fwd.default,
    backward=lambda grads, t, saved, options, needs: ops.attention_logits_bwd(*grads, *t[:6], saved[1], *_stored(options), needs),
    twin=_attention_logits_twin,
    batched=(0, 1),
)
GATE_APPLY = Operator(
    "gate_apply",
    tensors=2,
    outputs=1,
    forward=lambda *args: (ops.gate_apply_fwd(*args),),
    backward=lambda grads, t, saved, options, needs: ops.gate_apply_bwd(*grads, *t, *options, needs),
    twin=lambda x, alpha, mode: (reference.apply_attention(x, alpha, alpha_resize=mode),),
    batched=(0, 1),
)
OPERATORS = (GATE, GATE_LOGITS, ATTENTION_GATE, ATTENTION_LOGITS, GATE_APPLY)


# ------------------------------------------------------------------------------------------------- eager mode


def _backward(op: Operator, ctx: Any, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of op's tensors: by the kernel, or by the twin where they must be differentiable themselves."""
    saved = ctx.saved_tensors
    tensors, outputs = saved[: op.tensors], saved[op.tensors :]
    grads = grads[: op.outputs]
    if all(g is None for g in grads):
        return [None] * op.tensors
    if torch.is_grad_enabled():
        return op.twin_gradients(grads, tensors, ctx.options)
    needs = _needs(ctx.needs_input_grad[: op.tensors])
    return _only_wanted(op.backward(grads, tensors, outputs, ctx.options, needs), needs)


def _save(op: Operator, ctx: Any, args: Sequence[Any], outputs: Sequence[Tensor]) -> None:
    tensors, ctx.options = op.split(args)
    # y is an output that backward does not read; alpha and a stored pre-activation are.
    kept = [None if op.name in ("gate_logits", "gate_apply") or i == 0 else o for i, o in enumerate(outputs)]
    ctx.save_for_backward(*tensors, *kept)
    ctx.save_for_forward(*tensors, *kept)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*outputs[op.outputs :])


def _tangents(op: Operator, ctx: Any, tangents: Sequence[Tensor | None], outputs: int) -> tuple:
    """Forward mode: tangents of op's outputs, by the twin."""
    tensors = ctx.saved_tensors[: op.tensors]
    moving = [i for i, t in enumerate(tangents[: op.tensors]) if t is not None]

    def of_moving(*values: Tensor) -> tuple[Tensor, ...]:
        full = list(tensors)
        for i, value in zip(moving, values, strict=True):
            full[i] = value
        return tuple(op.twin(*full, *ctx.options))

    primals = tuple(tensors[i] for i in moving)
    _, found = torch.func.jvp(of_moving, primals, tuple(tangents[i] for i in moving))
    return (*found, *[None] * (outputs - op.outputs))


def _make_function(op: Operator) -> type[torch.autograd.Function]:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
            outputs = op.forward(*args)
            _save(op, ctx, args, outputs)
            return tuple(outputs)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return (*_backward(op, ctx, grads), *[None] * len(ctx.options))

    return Function


def _make_functorch_function(op: Operator) -> type[torch.autograd.Function]:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            return tuple(op.forward(*args))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
            _save(op, ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            # Transforms nest: their backward must always be differentiable.
            grads = op.twin_gradients(grads[: op.outputs], ctx.saved_tensors[: op.tensors], ctx.options)
            return (*grads, *[None] * len(ctx.options))

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> tuple:
            return _tangents(op, ctx, tangents, len(ctx.saved_tensors) - op.tensors)

        @staticmethod
        def vmap(info: Any, dims: tuple, *args: Any) -> tuple:
            return _vmap(Function.apply, op.batched, info, dims, *args)

    return Function


def _vmap(call: Callable, batched: Sequence[int], info: Any, dims: tuple, *args: Any) -> tuple[tuple, tuple]:
    """vmap over the batch axis where only maps are batched, else one call after the other."""
    size = info.batch_size
    mapped = [i for i, d in enumerate(dims) if d is not None]
    if set(mapped) <= set(batched) and batched:
        folded = list(args)
        for i in batched:
            if isinstance(args[i], Tensor):
                t = args[i].movedim(dims[i], 0) if dims[i] is not None else args[i].expand(size, *args[i].shape)
                folded[i] = t.reshape(-1, *t.shape[2:])
        results = call(*folded)
        stacked = [r.reshape(size, -1, *r.shape[1:]) if r.ndim > 1 else r.expand(size, *r.shape) for r in _as_tuple(results)]
    else:
        rows = [
            _as_tuple(call(*[a.select(dims[i], k) if i in mapped else a for i, a in enumerate(args)])) for k in range(size)
        ]
        stacked = [torch.stack(column) for column in zip(*rows, strict=True)]
    return tuple(stacked), (0,) * len(stacked)


def _as_tuple(outputs: Any) -> tuple:
    return outputs if isinstance(outputs, tuple) else (outputs,)


_FUNCTIONS = {op.name: _make_function(op) for op in OPERATORS}
_FUNCTORCH = {op.name: _make_functorch_function(op) for op in OPERATORS}


class AttentionGateFunction(_FUNCTIONS["attention_gate"]):
    """The whole gate as a torch.autograd.Function; `attn_gate.functional.attention_gate` is the checked way to it.

    y, alpha, preact = AttentionGateFunction.apply(x, g, theta_weight, phi_weight, bias, psi_weight, psi_bias,
                                                   stride, phi_resize, alpha_resize, activation, store)

    x [N, C, *S], g [N, G, *Q], 2D or 3D; theta_weight [I, C, *k], phi_weight [I, G, 1..], bias [I] or None, psi_weight
    [I], psi_bias [1] or None, all in float32 (float64 for float64 maps); stride a list with a number per axis; modes as
    in `attention_gate`; store: keep the pre-activation theta + phi for backward (`preact`, else empty).
    Formulas: Oktay et al. 2018 (arXiv 1804.03999), section 2.2.
    """


_FUNCTIONS["attention_gate"] = AttentionGateFunction


def call(op: Operator, *args: Any) -> tuple[Tensor, ...]:
    """op's differentiable outputs, by the way in that suits where we are called from."""
    if torch.compiler.is_compiling():
        return op.forward(*args)[: op.outputs]
    if _under_torch_func() or torch.autograd.forward_ad._current_level >= 0:
        return _FUNCTORCH[op.name].apply(*args)[: op.outputs]
    if not torch.is_grad_enabled():
        return op.forward(*args)[: op.outputs]
    return _FUNCTIONS[op.name].apply(*args)[: op.outputs]


# ---------------------------------------------------------------------------- torch.compile, export, opcheck


def _register(op: Operator) -> None:
    forward, backward = f"attn_gate::{op.name}_fwd", f"attn_gate::{op.name}_bwd"

    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        _save(op, ctx, inputs, _as_tuple(output))

    def differentiate(ctx: Any, *grads: Tensor | None) -> tuple:
        return (*_backward(op, ctx, grads), *[None] * len(ctx.options))

    torch.library.register_autograd(forward, differentiate, setup_context=setup)
    torch.library.register_vmap(forward, lambda info, dims, *args: _one_if_one(_vmap(getattr(ops, f"{op.name}_fwd"), op.batched, info, dims, *args)))
    # The gradients of parameters are sums over the batch: they can't be folded.
    torch.library.register_vmap(backward, lambda info, dims, *args: _vmap(getattr(ops, f"{op.name}_bwd"), (), info, dims, *args))


def _one_if_one(result: tuple[tuple, tuple]) -> tuple:
    outputs, dims = result
    return (outputs[0], dims[0]) if len(outputs) == 1 else result


for _op in OPERATORS:
    _register(_op)
