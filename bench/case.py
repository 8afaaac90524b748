"""One configuration with its data: inputs, weights, and the results that every provider has to reproduce."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attn_gate.bench.gates import GATES
from attn_gate.bench.registry import Config

# Pre-activations nearer to 0 than this are redrawn: there rounding decides relu's derivative, not the formula.
_MARGIN = 1e-5
_ULPS = 4


@dataclass(frozen=True)
class Verdict:
    """The worst of some results: its name, its error, the error allowed, both relative to its largest value."""

    name: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """False for NaN too."""
        return self.error <= self.tolerance


class Case:
    """x, g, the gradient dy of y, an eager float32 gate, and its results in float64. All contiguous, fixed seed."""

    def __init__(self, config: Config) -> None:
        self.config = config
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(config.x_shape, generator=generator)
        self.g = torch.randn(config.g_shape, generator=generator)
        self.dy = torch.randn(config.x_shape, generator=generator)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.gate = GATES[config.gate](config).eval()
        self._double = copy.deepcopy(self.gate).double()
        self._leave_the_kink(generator)
        self._expected: dict[str, tuple[dict[str, Tensor], dict[str, float]]] = {}

    def check(self, mode: str, results: Mapping[str, Tensor]) -> Verdict:
        """Compare results (see `run`) with the float64 reference.

        Tolerance: twice the error of eager float32, plus a few units in the last place of the largest value.
        """
        reference, eager_errors = self._reference(mode)
        if set(results) != set(reference):
            raise ValueError(f"{mode} must return {', '.join(reference)}; got {', '.join(results)}")
        worst = None
        for name, expected in reference.items():
            tolerance = 2 * eager_errors[name] + _ULPS * torch.finfo(torch.float32).eps
            verdict = Verdict(name, _error(results[name], expected), tolerance)
            # `not <=` and not `>`: NaN is the worst.
            if worst is None or not verdict.error / verdict.tolerance <= worst.error / worst.tolerance:
                worst = verdict
        return worst

    def _reference(self, mode: str) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The float64 results of this mode, and the errors of eager float32."""
        if mode not in self._expected:
            x, g, dy = self.x.double(), self.g.double(), self.dy.double()
            expected = run(mode, self._double, x, g, dy)
            found = run(mode, copy.deepcopy(self.gate), self.x, self.g, self.dy)
            self._expected[mode] = expected, {k: _error(found[k], v) for k, v in expected.items()}
        return self._expected[mode]

    def _leave_the_kink(self, generator: torch.Generator) -> None:
        """Redraw the voxels of x whose pre-activation is next to 0."""
        close: list[Tensor] = []
        hook = self._double.relu.register_forward_pre_hook(
            lambda module, args: close.append((args[0].abs() < _MARGIN).any(1).nonzero())
        )
        ratio = [n // q for n, q in zip(self.config.size, self.config.gating_size, strict=True)]
        with torch.no_grad():
            for _ in range(100):
                self._double(self.x.double(), self.g.double())
                sample, *voxel = close.pop().unbind(1)
                if not len(sample):
                    break
                voxel = [i * r for i, r in zip(voxel, ratio, strict=True)]
                shape = (len(sample), self.config.channels)
                self.x[(sample, slice(None), *voxel)] = torch.randn(shape, generator=generator)
        hook.remove()


def run(mode: str, gate: nn.Module, x: Tensor, g: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The results of a mode: y for "inference"; y and the gradients of x, g and each parameter for "step"."""
    if mode == "inference":
        with torch.no_grad():
            return {"y": gate(x, g)}
    x, g = x.detach().requires_grad_(), g.detach().requires_grad_()
    gate.zero_grad(set_to_none=True)
    y = gate(x, g)
    y.backward(dy)
    return {"y": y.detach(), **gradients(gate, x, g)}


def gradients(gate: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """What the last backward pass left in .grad, as "d x", "d g" and "d theta.weight"."""
    leaves = {"x": x, "g": g, **dict(gate.named_parameters())}
    return {f"d {name}": leaf.grad for name, leaf in leaves.items()}


def _error(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return ((found.detach().double() - expected).abs().max() / scale).item()
