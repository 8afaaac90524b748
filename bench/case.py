"""One gate with its data: inputs, weights, and the results that every provider has to reproduce."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from attn_gate import AttentionGate
from attn_gate.judge import Judge, Judgement, worst

from .gates import GATES, has_norms, randomise_norms
from .registry import Config

# Pre-activations nearer to 0 than this are moved: there rounding decides relu's derivative. Not for 16-bit
# types, where rounding decides too many of them, for eager PyTorch too: its error there is the measure.
_MARGIN = 1e-5
_MOVE = 1e-3  # small enough to leave batch statistics where they are to well within the margin


class Case:
    """The eager gate in its dtype, x, g, and the gradient dy of y; seeded, equal numbers on every device.

    Attributes:
        config, dtype, device: what, in which precision, where.
        module: the eager gate; not to be changed, copies are.
        inputs: (x, g); input_names: what they are called.
        slope: dy.
        wants_input_gradients: True, as within a network.
    """

    input_names = ("x", "g")
    wants_input_gradients = True

    def __init__(self, config: Config, dtype: str = "float32", device: str = "cpu") -> None:
        self.config, self.dtype, self.device = config, dtype, device
        torch_dtype = getattr(torch, dtype)
        generator = torch.Generator().manual_seed(0)
        shapes = config.x_shape, config.g_shape, config.x_shape
        x, g, dy = (torch.randn(shape, generator=generator).to(torch_dtype) for shape in shapes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = GATES[config.gate][0](config)
        randomise_norms(module, generator)
        self.module = module.to(torch_dtype)
        self._generator = generator
        self._settled = dtype != "float32"
        self._judges: dict[bool, Judge] = {}
        self.inputs, self.slope = (x, g), dy
        self._to_device()

    def fused(self, **options: object) -> nn.Module:
        """attn_gate's module with the same parameters."""
        config = self.config
        arguments = {"spatial_dims": len(config.size), **GATES[config.gate][1], **options}
        gate = AttentionGate(config.channels, config.gating, config.inter, **arguments)
        gate.to(self.slope.dtype).load_state_dict(self.module.state_dict())
        return gate.to(self.device)

    def settle(self) -> None:
        """Make the inputs such that results can be compared; before anything else uses them."""
        if not self._settled:
            self._leave_the_kink()
            self._settled = True

    def check(self, training: bool, results: Mapping[str, Tensor]) -> Judgement:
        """The worst of these results (see `results_of`), by the rule of `attn_gate.judge`."""
        if training not in self._judges:
            self._judges.clear()  # one at a time: they are large
            dtype = self.slope.dtype
            eager = results_of(copy.deepcopy(self.module), self.inputs, self.slope, training)
            exact = results_of(
                copy.deepcopy(self.module).double(),
                [t.double() for t in self.inputs],
                self.slope.double(),
                training,
            )
            self._judges[training] = Judge(eager, exact, dtype)
        return worst(self._judges[training].judge(results))

    def _to_device(self) -> None:
        self.inputs = tuple(t.to(self.device) for t in self.inputs)
        self.slope = self.slope.to(self.device)
        self.module.to(self.device)

    def _leave_the_kink(self) -> None:
        """Move the voxels of x whose pre-activation is next to 0, in training or in eval mode."""
        double = copy.deepcopy(self.module).double()
        for norm in double.modules():
            if hasattr(norm, "momentum"):
                norm.momentum = 0.0  # else each look in training mode would change eval mode
        close: list[Tensor] = []
        double.relu.register_forward_pre_hook(
            lambda module, args: close.append((args[0].abs() < _MARGIN).any(1).nonzero())
        )
        x, g = self.inputs
        with torch.no_grad():
            for _ in range(100):
                exact = x.double(), g.double()
                for training in {False, has_norms(double)}:
                    double.train(training)(*exact)
                sample, *voxel = torch.cat(close).unbind(1)
                close.clear()
                if not len(sample):
                    return
                voxel = [i * self.config.ratio for i in voxel]
                move = _MOVE * torch.randn((len(sample), self.config.channels), generator=self._generator)
                x[(sample, slice(None), *voxel)] += move.to(x)


def results_of(
    module: nn.Module, inputs: tuple[Tensor, ...], slope: Tensor, training: bool
) -> dict[str, Tensor]:
    """y, and for training the gradients of x, g and each parameter, batch norms in that mode."""
    module.train(training)
    if not training:
        with torch.no_grad():
            return {"y": module(*inputs)}
    inputs = [t.detach().requires_grad_() for t in inputs]
    module.zero_grad(set_to_none=True)
    y = module(*inputs)
    y.backward(slope)
    return {"y": y.detach(), **gradients(module, inputs, Case.input_names)}


def gradients(module: nn.Module, inputs: list[Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    """What the last backward pass left in .grad, as "d x", "d g" and "d theta.weight"."""
    leaves = {**dict(zip(names, inputs, strict=True)), **dict(module.named_parameters())}
    return {f"d {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
