"""The fused operators, described: what each takes and returns, its backward kernel, its eager twin.

The twin is the same formula in eager PyTorch (`attn_gate.reference`): what second derivatives and forward
mode differentiate, and what backend="eager" runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import reference


@dataclass(frozen=True)
class Operator:
    """One operator: `tensors` inputs that may need gradients, then options that are no tensors.

    Attributes:
        name: of the registered operators {namespace}::{name}_fwd and {namespace}::{name}_bwd.
        tensors: how many of the arguments are tensors (or None); they come first.
        maps: how many of those carry the batch; they come first, parameters after them.
        outputs: how many results are differentiable; what forward stores for backward comes after them.
        kept: indices of the results that backward reads.
        backward_arguments: (grads, tensors, kept results, options) -> those of {name}_bwd, but for `needs`.
        twin: (*tensors, *options) -> the differentiable results, in eager PyTorch.
        namespace: "attn_gate" for the native kernels of every device; see `namespaces`.
        over_batch: whether the results are sums over the batch, which vmap must not fold into it.
    """

    name: str
    tensors: int
    maps: int
    outputs: int
    kept: tuple[int, ...]
    backward_arguments: Callable[..., tuple]
    twin: Callable[..., tuple[Tensor, ...]]
    namespace: str = "attn_gate"
    over_batch: bool = False

    def forward(self, *args: Any) -> tuple[Tensor, ...]:
        """All results of the kernel."""
        return as_tuple(self._registered("fwd")(*args))

    def backward(
        self, grads: Sequence, tensors: Sequence, kept: Sequence, options: tuple, needs: int
    ) -> tuple:
        """A gradient for each of `tensors`, empty where its bit of `needs` is 0."""
        arguments = self.backward_arguments(grads, tensors, kept, options)
        return as_tuple(self._registered("bwd")(*arguments, needs))

    def _registered(self, direction: str) -> Any:
        return getattr(getattr(torch.ops, self.namespace), f"{self.name}_{direction}").default


def as_tuple(results: Any) -> tuple:
    """Operators with one result return it bare."""
    return results if isinstance(results, tuple) else (results,)


def _psi(psi_weight: Tensor, like: Tensor) -> Tensor:
    """psi's weight [I] as the convolution has it: [1, I, 1..]."""
    return psi_weight.reshape(1, -1, *[1] * (like.ndim - 2))


def _gate(x, theta, phi, psi_weight, psi_bias, phi_resize, alpha_resize, activation):
    return reference.gate(
        x, theta, phi, _psi(psi_weight, x), psi_bias,
        phi_resize=phi_resize, alpha_resize=alpha_resize, activation=activation,
    )  # fmt: skip


def _gate_logits(theta, phi, psi_weight, psi_bias, phi_resize, activation):
    psi_weight = _psi(psi_weight, theta)
    options = {"phi_resize": phi_resize, "activation": activation}
    return (reference.gate_logits(theta, phi, psi_weight, psi_bias, **options),)


def _attention_gate(
    x, g, theta_weight, phi_weight, bias, psi_weight, psi_bias,
    stride, phi_resize, alpha_resize, activation, store,
):  # fmt: skip
    return reference.attention_gate(
        x, g, theta_weight, phi_weight, _psi(psi_weight, x), bias, psi_bias,
        stride=stride, phi_resize=phi_resize, alpha_resize=alpha_resize, activation=activation,
    )  # fmt: skip


def _attention_logits(
    x, g, theta_weight, phi_weight, bias, psi_weight, psi_bias,
    stride, phi_resize, activation, store,
):  # fmt: skip
    logits = reference.attention_logits(
        x, g, theta_weight, phi_weight, _psi(psi_weight, x), bias, psi_bias,
        stride=stride, phi_resize=phi_resize, activation=activation,
    )  # fmt: skip
    return (logits,)


def _apply(x, alpha, alpha_resize):
    return (reference.apply_attention(x, alpha, alpha_resize=alpha_resize),)


# The kernels' arguments are in csrc/ops.cpp. `store`, the last option of a whole gate, is of forward only;
# psi's bias matters to no gradient.
GATE = Operator(
    "gate", tensors=5, maps=3, outputs=2, kept=(1,), twin=_gate,
    backward_arguments=lambda grads, t, kept, options: (*grads, *t[:4], *kept, *options),
)  # fmt: skip
GATE_LOGITS = Operator(
    "gate_logits", tensors=4, maps=2, outputs=1, kept=(), twin=_gate_logits,
    backward_arguments=lambda grads, t, kept, options: (*grads, *t[:3], *options),
)  # fmt: skip
ATTENTION_GATE = Operator(
    "attention_gate", tensors=7, maps=2, outputs=2, kept=(1, 2), twin=_attention_gate,
    backward_arguments=lambda grads, t, kept, options: (*grads, *t[:6], *kept, *options[:-1]),
)  # fmt: skip
ATTENTION_LOGITS = Operator(
    "attention_logits", tensors=7, maps=2, outputs=1, kept=(1,), twin=_attention_logits,
    backward_arguments=lambda grads, t, kept, options: (*grads, *t[:6], *kept, *options[:-1]),
)  # fmt: skip
GATE_APPLY = Operator(
    "gate_apply", tensors=2, maps=2, outputs=1, kept=(), twin=_apply,
    backward_arguments=lambda grads, t, kept, options: (*grads, *t, *options),
)  # fmt: skip
MOMENTS = Operator(
    "moments", tensors=1, maps=1, outputs=2, kept=(0,), twin=reference.moments, over_batch=True,
    backward_arguments=lambda grads, t, kept, options: (*grads, *t, *kept, *options),
)  # fmt: skip
OPERATORS = (GATE, GATE_LOGITS, ATTENTION_GATE, ATTENTION_LOGITS, GATE_APPLY)

# namespace -> name -> operator: a backend beside the native kernels adds a namespace of its own.
BY_NAMESPACE = {"attn_gate": {op.name: op for op in OPERATORS}}
