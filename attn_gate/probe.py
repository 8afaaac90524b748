"""What a gate computes, found by running it on tiny random input and comparing with candidate GateSpecs.

The gate itself is never run. A twin of it is (`attn_gate.twin`), which draws from a generator of its own, so
that no parameter, buffer, mode or random state changes.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attn_gate import engine, reference
from attn_gate.families import OPTIONS, GateFamily, Layers, Structure, Unreadable, find_layer
from attn_gate.folding import FoldCache
from attn_gate.spec import GateSpec
from attn_gate.twin import make_twin

_TOLERANCE = 1e-8  # of float64 results, relative to their scale


Case = tuple[Tensor, Tensor, tuple[Tensor, ...]]  # x, g, and what the gate makes of them


class Found(NamedTuple):
    """What a gate computes.

    spec: the description that agrees; phi_resize="none" also says that the gate takes g on theta's grid only.
    arguments: names of (x, g) in its forward; x_first: whether x is the first of them.
    returns: "y"; "y, alpha" or "y, resized alpha" (on x's grid).
    training: why it doesn't agree in training mode; empty where it does.
    divides: whether it agrees only where theta's stride divides x's grid.
    """

    spec: GateSpec
    arguments: tuple[str, str]
    x_first: bool
    returns: str
    training: str
    divides: bool


class Results(NamedTuple):
    """What a gate returns, and, where they were asked for, gradients and buffers afterwards."""

    outputs: tuple[Tensor, ...]
    rest: tuple[Tensor | None, ...] = ()


def probe(family: GateFamily, structure: Structure, gate: nn.Module) -> Found:
    """What this gate computes.

    Raises:
        Unreadable: no description of the family agrees with it.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        with torch.autocast("cpu", enabled=False), torch.device("cpu"):
            return _probe(family, structure, gate)


def bind_names(gate: nn.Module) -> tuple[str, str]:
    """Names of the two maps in the gate's forward.

    Raises:
        Unreadable: it takes fewer, or needs more.
    """
    signature = inspect.signature(type(gate).forward)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = list(signature.parameters.values())[1:]
    names = [p.name for p in parameters if p.kind in kinds]
    needed = [p.name for p in parameters[2:] if p.default is p.empty and p.kind in (*kinds, p.KEYWORD_ONLY)]
    if len(names) < 2 or needed:
        raise Unreadable(f"its forward takes {signature}, not two maps")
    return names[0], names[1]


def _probe(family: GateFamily, structure: Structure, gate: nn.Module) -> Found:
    names = bind_names(gate)
    generator = torch.Generator().manual_seed(0)
    try:
        twin = make_twin(gate, structure.spec.spatial_dims, generator)
    except Exception as error:
        raise Unreadable(f"no twin of it can be made to try: {type(error).__name__}: {error}") from None
    failures, ran = [], False
    for x_first in (False, True):
        cases, failure = {}, ""
        sizes = _sizes(structure.spec, dict(family.options).get("x_resize", ("none",))[0])
        for kind, (x_size, g_size) in sizes.items():
            x, g = _maps(structure.channels, x_size, g_size, generator)
            try:
                cases[kind] = x, g, _original(twin.eval(), x, g, x_first)
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"
        failures.append(failure)
        ran = ran or bool(cases)
        # A gate that takes no other grids, or does something of its own with them, is one without a resize.
        for first in [kind for kind in sizes if kind in cases]:
            resized = [
                case for kind, case in cases.items() if list(sizes).index(kind) >= list(sizes).index(first)
            ]
            for spec in _candidates(family, structure, resize=first == "unequal"):
                returns = _agrees(spec, structure.paths, twin, resized)
                if returns:
                    x, g, _ = resized[0]
                    steps = (spec, structure.paths, twin, x, g, x_first, returns)
                    if reason := _difference(*steps, training=False) or _remembers(twin, x, g, x_first):
                        raise Unreadable(reason)
                    if _clips(*steps):
                        raise Unreadable("its results differ where values are large, as if it clipped them")
                    training = _difference(*steps, training=True)
                    return Found(spec, names, x_first, returns, training, divides=first == "divided")
    if not ran:
        raise Unreadable(f"its forward fails on two maps: {'; in the other order: '.join(failures)}")
    raise Unreadable("no gate of its family computes what its forward does")


def _candidates(family: GateFamily, structure: Structure, *, resize: bool) -> Iterator[GateSpec]:
    """Descriptions to try, the likeliest first: those that differ in the fewest options from it."""
    options = {**OPTIONS, **dict(family.options)}
    if not resize:
        options["resize"] = ("none",)
    combinations = itertools.product(*[list(enumerate(values)) for values in options.values()])
    by_likelihood = sorted(combinations, key=lambda chosen: sum(index > 0 for index, _ in chosen))
    strided = any(s > 1 for s in structure.spec.theta_stride)
    for chosen in by_likelihood:
        fields = dict(zip(options, (value for _, value in chosen), strict=True))
        mode = fields.pop("resize")
        if mode != "none":
            yield structure.spec.replace(phi_resize=mode, alpha_resize=mode, **fields)
            continue
        # g has to come on theta's grid; alpha may have to go to x's all the same.
        for alpha in OPTIONS["resize"] if strided or fields["x_resize"] != "none" else ("none",):
            yield structure.spec.replace(phi_resize="none", alpha_resize=alpha, **fields)


def _sizes(spec: GateSpec, x_resize: str) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Grids of x and g: "unequal", g coarser than theta along one axis and finer along another; "equal"; and
    "divided", where theta's stride divides x's grid, which it doesn't in the others."""

    def before(size: tuple[int, ...], kernel: Any, stride: Any, pads: Any) -> tuple[int, ...]:
        axes = zip(size, kernel, stride, pads, strict=True)
        least = [((n - 1) * s + k - sum(pad), s) for n, k, s, pad in axes]
        # The largest that isn't a multiple of the stride: the last voxels of x are in no patch.
        return tuple(max((m for m in range(n, n + s) if m % s), default=n) for n, s in least)

    axes = spec.spatial_dims
    theta, phi = (5, 4, 3)[:axes], (3, 6, 2)[:axes]
    x_size = before(theta, spec.theta_kernel, spec.theta_stride, spec.theta_pads(theta))
    no_pads = ((0, 0),) * axes
    unequal, equal = (before(n, spec.phi_kernel, spec.phi_stride, no_pads) for n in (phi, theta))
    if x_resize != "none":
        equal = x_size
    sizes = {"unequal": (x_size, unequal), "equal": (x_size, equal)}
    if any(s > 1 for s in spec.theta_stride) and x_resize == "none":
        divided = tuple(n * s for n, s in zip(theta, spec.theta_stride, strict=True))
        if spec.theta_grid(divided, equal) == theta:
            sizes["divided"] = divided, equal
    return sizes


def _maps(
    channels: tuple[int, int], x_size: tuple[int, ...], g_size: tuple[int, ...], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    return tuple(
        torch.randn(2, n, *size, generator=generator, dtype=torch.float64)
        for n, size in zip(channels, (x_size, g_size), strict=True)
    )


def _original(twin: nn.Module, x: Tensor, g: Tensor, x_first: bool) -> tuple[Tensor, ...]:
    """The results of the gate's own forward.

    Raises:
        Unreadable: they are no gate's.
    """
    result = type(twin).forward(twin, *((x, g) if x_first else (g, x)))
    outputs = result if type(result) is tuple else (result,)
    if not (1 <= len(outputs) <= 2 and all(isinstance(t, Tensor) for t in outputs)):
        raise Unreadable("it returns neither y nor (y, alpha)")
    if outputs[0].shape != x.shape or not all(t.isfinite().all() for t in outputs):
        raise Unreadable("it doesn't return finite values in the shape of x")
    return outputs


def _clips(
    spec: GateSpec, paths: Layers, twin: nn.Module, x: Tensor, g: Tensor, x_first: bool, returns: str
) -> bool:
    """Whether results differ where sums and logits are large, as those of a ReLU6 or clamped ones do."""
    loud = make_twin(twin)
    with torch.no_grad():
        for parameter in loud.parameters():
            parameter.mul_(10)
    for net, times in ((twin, 30.0), (twin, 1000.0), (loud, 30.0)):
        far = x * times, g * times
        try:
            expected = _original(net.eval(), *far, x_first)
        except Exception:  # its own results aren't finite there, or it doesn't take such values
            continue
        if not _agrees(spec, paths, net, [(*far, expected)], returns):
            return True
    return False


def _agrees(spec: GateSpec, paths: Layers, twin: nn.Module, cases: list[Case], known: str = "") -> str:
    """What the gate returns, if this spec computes that in every case; else nothing. known: what it is."""
    returns = {known} if known else {"y"} if len(cases[0][2]) == 1 else {"y, alpha", "y, resized alpha"}
    with torch.no_grad():
        for x, g, expected in cases:
            try:
                y, alpha = _run(spec, paths, twin, x, g)
            except Exception:  # grids that this spec can't bring together
                return ""
            returns = {r for r in returns if _same(arrange(spec, r, x, y, alpha), expected)}
            if not returns:
                return ""
    return min(returns)  # where both agree alpha is on x's grid already: "y, alpha"


def arrange(spec: GateSpec, returns: str, x: Tensor, y: Tensor, alpha: Tensor) -> tuple[Tensor, ...]:
    """The results in the form that the gate returns them."""
    if returns == "y":
        return (y,)
    if returns == "y, resized alpha" and spec.alpha_resize != "none":
        alpha = reference.resize(alpha, x.shape[2:], spec.alpha_resize)
    return y, alpha


def _remembers(twin: nn.Module, x: Tensor, g: Tensor, x_first: bool) -> str:
    """What the gate's forward leaves on the module, for somebody to read; the fused one leaves nothing."""

    def length(value: Any) -> int:
        return len(value) if isinstance(value, (list, dict, set)) else 0

    before = {name: (value, length(value)) for name, value in twin.__dict__.items()}
    _original(twin, x, g, x_first)
    for name, value in twin.__dict__.items():
        old, size = before.get(name, (twin, 0))
        if value is not old or length(value) != size:
            return f"its forward sets {name} on the module; for maps there is attn_gate.capture_attention"
    return ""


def _difference(
    spec: GateSpec,
    paths: Layers,
    twin: nn.Module,
    x: Tensor,
    g: Tensor,
    x_first: bool,
    returns: str,
    *,
    training: bool,
) -> str:
    """In what the gate and the spec differ over a step, gradients and running statistics included."""

    def ours(net: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        return arrange(spec, returns, x, *_run(spec, paths, net, x, g))

    try:
        expected = _step(lambda net, x, g: _original(net, x, g, x_first), twin, x, g, training)
    except Exception as error:
        return f"its forward raised {type(error).__name__}: {error}"
    found = _step(ours, twin, x, g, training)
    if not _same(found.outputs, expected.outputs):
        return "its results differ"
    return "" if _same(found.rest, expected.rest) else "its gradients or running statistics differ"


def _step(run: Callable, twin: nn.Module, x: Tensor, g: Tensor, training: bool) -> Results:
    """Results, gradients and buffers of one step of a fresh copy."""
    net = make_twin(twin).train(training)
    x, g = x.clone().requires_grad_(), g.clone().requires_grad_()
    outputs = run(net, x, g)
    # Weights that no symmetry of the results cancels.
    loss = sum((t * torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in outputs)
    grads = torch.autograd.grad(loss, [x, g, *net.parameters()], allow_unused=True)
    return Results(outputs, (*grads, *net.buffers()))


def _run(spec: GateSpec, paths: Layers, net: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    parts = Layers(*[find_layer(net, path) for path in paths])
    options = {"recompute": True, "plan": engine.decide(spec, parts, x, g, recompute=True)}
    return engine.run(spec, parts, x, g, backend="cpu", cache=FoldCache(), **options)


def _same(found: tuple[Tensor | None, ...], expected: tuple[Tensor | None, ...]) -> bool:
    for ours, theirs in zip(found, expected, strict=True):
        if ours is None or theirs is None:
            if ours is not theirs:
                return False
        elif ours.shape != theirs.shape:
            return False
        else:
            scale = max(1.0, theirs.abs().max().item()) if theirs.numel() else 1.0
            if not torch.allclose(ours.to(theirs.dtype), theirs, rtol=0, atol=_TOLERANCE * scale):
                return False
    return True
