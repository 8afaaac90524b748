"""One configuration with its data: inputs, weights, and the results that every provider has to reproduce."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from attn_gate.judge import Judge, Judgement, worst

from .gates import GATES
from .registry import Config

# Pre-activations nearer to 0 than this are redrawn: there rounding decides relu's derivative.
_MARGIN = 1e-5


class Case:
    """x, g, the gradient dy of y, an eager float32 gate, and its results in float64. Seeded."""

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
        self._judges: dict[str, Judge] = {}

    def check(self, mode: str, results: Mapping[str, Tensor]) -> Judgement:
        """The worst of these results (see `run`), by the rule of `attn_gate.judge`."""
        if mode not in self._judges:
            eager = run(mode, copy.deepcopy(self.gate), self.x, self.g, self.dy)
            exact = run(mode, self._double, self.x.double(), self.g.double(), self.dy.double())
            self._judges = {mode: Judge(eager, exact, torch.float32)}  # one mode at a time: they are large
        return worst(self._judges[mode].judge(results))

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
