"""The rule by which results are judged right: verification and benchmark share it.

    error(ours) <= 2 * error(eager PyTorch in the same dtype) + 8 ulp of the result's scale

All errors are the largest absolute ones against a float64 reference, relative to the largest absolute value, the
scale. Nothing is tuned by hand for an operator, a size or a dtype. The gradients of one layer's parameters are
judged on one scale: that of a bias alone is a sum that may cancel to nothing, with errors that don't.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

ULPS = 8


class Judgement(NamedTuple):
    """One result: its error and the error allowed, both relative to its scale."""

    name: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the error is allowed."""
        return self.error <= self.tolerance

    @property
    def ratio(self) -> float:
        """Error over tolerance: the larger, the worse."""
        return self.error / self.tolerance


def judge(
    found: Mapping[str, Tensor], eager: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> list[Judgement]:
    """Judge each of `found`, by what eager PyTorch finds in the same dtypes and by a float64 reference.

    Args:
        found, eager, reference: results by the same names: "y", "alpha", "d x" (gradients begin so),
            "d theta_weight" or "d theta.weight", ...

    Raises:
        ValueError: `found` has other names than `reference`.
    """
    if set(found) != set(reference):
        raise ValueError(f"results must be {', '.join(reference)}; got {', '.join(found)}")
    scales: dict[str, float] = {}
    allowed: dict[str, float] = {}
    for name, exact in reference.items():
        key = _layer(name)
        scales[key] = max(scales.get(key, torch.finfo(torch.float64).tiny), _largest(exact))
        allowed[key] = max(allowed.get(key, 0.0), _distance(eager[name], exact))
    judgements = []
    for name, exact in reference.items():
        scale = scales[_layer(name)]
        ulp = torch.finfo(found[name].dtype).eps
        tolerance = 2 * allowed[_layer(name)] / scale + ULPS * ulp
        judgements.append(Judgement(name, _distance(found[name], exact) / scale, tolerance))
    return judgements


def worst(judgements: list[Judgement]) -> Judgement:
    """The one that comes closest to its tolerance, or exceeds it most."""
    return max(judgements, key=lambda judgement: judgement.ratio)


def _layer(name: str) -> str:
    """ "psi" for "d psi_weight", "d psi.bias"; the bias of a whole gate belongs to theta."""
    if not name.startswith("d "):
        return name
    layer = name.removeprefix("d ").replace(".", "_").partition("_")[0]
    return "d theta" if layer == "bias" else f"d {layer}"


def _largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def _distance(found: Tensor, exact: Tensor) -> float:
    """The largest difference; infinite for NaN and for another shape."""
    if found.shape != exact.shape:
        return float("inf")
    if not exact.numel():
        return 0.0
    distance = (found.detach().to(exact.device, torch.float64) - exact).abs().max().item()
    return distance if distance == distance else float("inf")
