"""A whole network with its batch, as a case for providers; and cases by kind of config."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

import attn_gate
from attn_gate.judge import Judgement

from .case import Case
from .networks import NETWORKS
from .providers import AnyCase
from .registry import AnyConfig, NetworkConfig

LIMIT = 4


def make_case(config: AnyConfig, dtype: str, device: str) -> AnyCase:
    """The case of this config.

    Raises:
        ImportError: the network's package isn't installed.
    """
    kind = NetworkCase if isinstance(config, NetworkConfig) else Case
    return kind(config, dtype, device)


class NetworkCase:
    """A network in its dtype, a batch of images, and the gradient of its logits; seeded.

    Judged by the relative error (norm of the difference over the norm) of the logits, and for training also
    of all gradients of parameters together: at most LIMIT times that of eager PyTorch plus 8 ulp, against
    float64. Less strictly than gates alone are: in a deep network rounding turns the choice of some ReLU or
    max pool in every run, in another place in each, so that two eager runs differ as much (4e-3 at MONAI's).
    """

    input_names = ("image",)
    wants_input_gradients = False

    def __init__(self, config: NetworkConfig, dtype: str = "float32", device: str = "cpu") -> None:
        self.config, self.dtype, self.device = config, dtype, device
        torch_dtype = getattr(torch, dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.module = NETWORKS[config.network](len(config.size)).to(device, torch_dtype)
            self.inputs = (torch.randn(config.batch, 1, *config.size).to(device, torch_dtype),)
            with torch.no_grad():
                logits = copy.deepcopy(self.module).eval()(*self.inputs)
            self.slope = torch.randn(logits.shape).to(device, torch_dtype)
        self._errors: dict[bool, tuple[dict[str, Tensor], dict[str, float]]] = {}

    def fused(self, **options: object) -> nn.Module:
        """The same network with its gates fused.

        Raises:
            RuntimeError: a gate was left as it is; the message says why.
        """
        # In eval mode, where none may be left alone because its layers are the faster way in training.
        module = copy.deepcopy(self.module).eval()
        report = attn_gate.fuse_gates(module, **options)
        if report.skipped or not report.fused:
            reasons = [f"{name}: {reason}" for name, reason in report.skipped.items()]
            raise RuntimeError("not all gates were fused: " + ("; ".join(reasons) or "none was found"))
        return module

    def settle(self) -> None:
        """Nothing has to be done to the inputs."""

    def check(self, training: bool, results: Mapping[str, Tensor]) -> Judgement:
        """The worse of logits and gradients."""
        if training not in self._errors:
            self._errors.clear()
            exact = _together(self._results(copy.deepcopy(self.module).double(), training))
            eager = _together(self._results(copy.deepcopy(self.module), training))
            errors = {name: _distance(eager[name], t) for name, t in exact.items()}
            self._errors[training] = exact, errors
        exact, errors = self._errors[training]
        few_ulp = 8 * torch.finfo(self.slope.dtype).eps
        found = _together(results)
        judged = [
            Judgement(name, _distance(found[name], t), LIMIT * errors[name] + few_ulp)
            for name, t in exact.items()
        ]
        return max(judged, key=lambda judgement: judgement.ratio)

    def _results(self, module: nn.Module, training: bool) -> dict[str, Tensor]:
        module.train(training)
        dtype = next(module.parameters()).dtype
        inputs = [t.to(dtype) for t in self.inputs]
        if not training:
            with torch.no_grad():
                return {"y": module(*inputs)}
        y = module(*inputs)
        y.backward(self.slope.to(dtype))
        return {"y": y.detach(), **{f"d {name}": p.grad for name, p in module.named_parameters()}}


def _together(results: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The logits, and the gradients of all parameters as one tensor in the order of their names."""
    names = sorted(name for name in results if name != "y")
    joined = {"y": results["y"].detach().double()}
    if names:
        joined["d parameters"] = torch.cat([results[name].detach().double().flatten() for name in names])
    return joined


def _distance(found: Tensor, exact: Tensor) -> float:
    """Relative to the exact one's norm; infinite for NaN and for another shape."""
    if found.shape != exact.shape:
        return float("inf")
    distance = ((found - exact).norm() / exact.norm()).item()
    return distance if distance == distance else float("inf")
