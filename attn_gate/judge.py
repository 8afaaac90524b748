"""The rule by which results are judged right: verification and benchmark share it.

    error(ours) <= 2 * error(eager PyTorch in the same dtype) + a few ulp

All errors are the largest absolute ones against a float64 reference, relative to the largest absolute value,
the result's scale. The few ulp are 8 of the dtype of the sums (float32 for 16-bit maps) and 1 of a 16-bit
map's own; 32 in float64, where the reference is no more exact than what it judges. Nothing is tuned by hand
for an operator, a size or a dtype.

Gradients of parameters are sums over all voxels, which may cancel to little, with errors that don't: they get
4 times as many ulp, and those of the projections (theta, phi) are judged on one scale, as are those of psi.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

_ULPS = {torch.float32: 8, torch.float64: 32}
_MAPS = ("x", "g", "theta", "phi", "alpha")
_PIECE = 2**18  # elements that are compared at a time: their differences stay in the caches


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


class Judge:
    """Knows what is right and how far one may be off; judges any number of results by that."""

    def __init__(
        self, eager: Mapping[str, Tensor], reference: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        """Results of eager PyTorch in `dtype`, that of the maps, and of the reference, by the same names.

        Names are "y", "alpha", "logits"; gradients begin so: "d x", "d theta_weight" or "d theta.weight".
        """
        self._reference = reference
        scales: dict[str, float] = {}
        errors: dict[str, float] = {}
        for name, exact in reference.items():
            key = _layer(name)
            scales[key] = max(scales.get(key, torch.finfo(torch.float64).tiny), _largest(exact))
            errors[key] = max(errors.get(key, 0.0), _distance(eager[name], exact))
        self._scale = {name: scales[_layer(name)] for name in reference}
        self._tolerance = {
            name: 2 * errors[_layer(name)] / scale + _few_ulp(name, dtype)
            for name, scale in self._scale.items()
        }

    def judge(self, found: Mapping[str, Tensor]) -> list[Judgement]:
        """Judge each of `found`.

        Raises:
            ValueError: they have other names than the reference.
        """
        if set(found) != set(self._reference):
            raise ValueError(f"results must be {', '.join(self._reference)}; got {', '.join(found)}")
        return [
            Judgement(name, _distance(found[name], exact) / self._scale[name], self._tolerance[name])
            for name, exact in self._reference.items()
        ]


def judge(
    found: Mapping[str, Tensor],
    eager: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> list[Judgement]:
    """Judge each of `found` once: `Judge(eager, reference, dtype).judge(found)`."""
    return Judge(eager, reference, dtype).judge(found)


@contextlib.contextmanager
def float32_products() -> Iterator[None]:
    """Have PyTorch multiply float32 in float32 within; a decorator too.

    On GPUs its convolutions take TF32 by default. Two of the same gate then round different numbers, such as
    weights with a norm folded in and without, and a relu next to 0 is open in one and closed in the other: a
    gradient as wrong as can be, of which the rule above knows nothing.
    """
    switches = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


def worst(judgements: list[Judgement]) -> Judgement:
    """The one that comes closest to its tolerance, or exceeds it most."""
    return max(judgements, key=lambda judgement: judgement.ratio)


def _few_ulp(name: str, dtype: torch.dtype) -> float:
    sums = torch.promote_types(dtype, torch.float32)
    few = _ULPS[sums] * torch.finfo(sums).eps + (torch.finfo(dtype).eps if dtype != sums else 0.0)
    return 4 * few if _is_parameter(name) else few


def _is_parameter(name: str) -> bool:
    return name.startswith("d ") and name.removeprefix("d ") not in _MAPS


def _layer(name: str) -> str:
    """The name itself, but for gradients of parameters the layer: "psi" for "d psi_weight", "d psi.bias"."""
    if not _is_parameter(name):
        return name
    layer = name.removeprefix("d ").replace(".", "_").partition("_")[0]
    return "projections" if layer in ("theta", "phi", "bias") else layer


def _largest(t: Tensor) -> float:
    if not t.numel():
        return 0.0
    low, high = t.aminmax()
    return max(high.item(), -low.item())


def _distance(found: Tensor, exact: Tensor) -> float:
    """The largest difference; infinite for NaN and for another shape."""
    if found.shape != exact.shape:
        return float("inf")
    pieces = zip(
        found.detach().to(exact.device).flatten().split(_PIECE), exact.flatten().split(_PIECE), strict=True
    )
    distances = [_largest(piece.to(torch.float64, copy=True).sub_(its)) for piece, its in pieces]
    return max(distance if distance == distance else float("inf") for distance in distances)
