"""Eager against fused, honestly: in float64, in float32 step by step, and (train.py) in float32 running free.

In float32 two orders of the same sums differ in the last bit, and training amplifies that: two free runs
drift apart though neither is wrong. So the algebra is compared where rounding is negligible (`float64_run`),
and the rounding where it can't accumulate (`StepLocked`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attn_gate import AttentionUNet
from attn_gate.demo.dataset import Batches
from attn_gate.demo.train import differentiate, make_network

FLOAT64_STEPS = 20
FLOAT64_BATCH = 2
FLOAT64_LEARNING_RATE = 2e-2
TRUTH_EVERY = 20


@dataclass
class Float64Run:
    """Losses of two float64 runs from the same weights on the same batches."""

    eager: list[float] = field(default_factory=list)
    fused: list[float] = field(default_factory=list)

    @property
    def difference(self) -> list[float]:
        """|fused - eager| of every step."""
        return [abs(f - e) for e, f in zip(self.eager, self.fused, strict=True)]


def float64_run(run: Float64Run, batches: Batches, steps: int, on_step: Callable[[], None]) -> None:
    """Trains two float64 networks side by side, each by its own gradients, and fills `run`.

    By plain gradient descent: Adam divides by the size of each gradient, so it blows up the rounding of those
    that are all but zero.
    """
    networks = {
        name: make_network(backend).double() for name, backend in (("eager", "eager"), ("fused", "auto"))
    }
    for step in range(steps):
        image, truth = (t.double() for t in batches(step))
        for name, network in networks.items():
            getattr(run, name).append(differentiate(network, image, truth))
            with torch.no_grad():
                for p in network.parameters():
                    p -= FLOAT64_LEARNING_RATE * p.grad
        on_step()


@dataclass
class StepLocked:
    """Beside every step of an eager run: the fused network at the same weights on the same batch.

    `differentiate` takes the place of `train.differentiate`. Every TRUTH_EVERY steps a float64 network at
    these weights says how far each of the two is from the truth.

    Attributes:
        loss_error: |fused - eager| / eager, one number a step.
        gradient_error: |fused - eager| / |eager|, Euclidean norms over all parameters, one number a step.
        eager_error, fused_error: {step: the same distance of its gradient to the float64 one}.
    """

    loss_error: list[float] = field(default_factory=list)
    gradient_error: list[float] = field(default_factory=list)
    eager_error: dict[int, float] = field(default_factory=dict)
    fused_error: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._twin = make_network("auto")
        self._exact = make_network("eager").double()

    def differentiate(self, network: AttentionUNet, image: Tensor, truth: Tensor) -> float:
        """Forward and backward pass of `network` (eager), whose loss is returned, and of its twin."""
        step = len(self.loss_error)
        _copy_parameters(network, self._twin)
        eager = differentiate(network, image, truth)
        fused = differentiate(self._twin, image, truth)
        self.loss_error.append(abs(fused - eager) / abs(eager))
        self.gradient_error.append(_distance(self._twin, network))
        if step % TRUTH_EVERY == 0:
            _copy_parameters(network, self._exact)
            differentiate(self._exact, image.double(), truth.double())
            self.eager_error[step] = _distance(network, self._exact)
            self.fused_error[step] = _distance(self._twin, self._exact)
        return eager


@torch.no_grad()
def _copy_parameters(source: AttentionUNet, target: AttentionUNet) -> None:
    for s, t in zip(source.parameters(), target.parameters(), strict=True):
        t.copy_(s)


def _distance(network: AttentionUNet, reference: AttentionUNet) -> float:
    """|gradient of network - gradient of reference| / |gradient of reference|, all parameters together."""
    ours = torch.cat([p.grad.double().flatten() for p in network.parameters()])
    theirs = torch.cat([p.grad.double().flatten() for p in reference.parameters()])
    return (torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs)).item()
