"""The matrix that every backend is tested on (cases x operators x dtypes x layouts), and the one comparison.

A result is right if its error against a float64 reference is at most twice that of eager PyTorch in the same
dtype, plus a few ulp: `attn_gate.judge`. Another backend joins by its name in BACKENDS.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from attn_gate import backends, functional, reference
from attn_gate.cases import GateCase, channels_last
from attn_gate.judge import float32_products, judge

BACKENDS = tuple(name for name, usable, _ in backends.report() if usable and name != "eager")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_PATCHES = {"kernel": 2, "stride": 2}
_NEAREST = {"phi_resize": "nearest", "alpha_resize": "nearest"}
_ALIGNED = {"phi_resize": "align_corners", "alpha_resize": "align_corners"}

# Beside attn_gate.cases.CASES: what no user needs to see.
EDGES = (
    GateCase("prime sizes", (13, 17), (5, 3), channels=7, gating=11, inter=13, **_PATCHES),
    GateCase("one stride per axis", (9, 8), (3, 4), kernel=(3, 1), stride=(3, 2)),
    GateCase("one stride per axis 3D", (4, 9, 8), (4, 3, 4), kernel=(1, 3, 2), stride=(1, 3, 2)),
    GateCase("gaps between patches 3D", (7, 8, 9), (2, 3, 2), kernel=1, stride=(3, 2, 4)),
    GateCase("one axis of one voxel", (1, 33), (1, 33), channels=3),
    GateCase("the other axis of one voxel", (33, 1), (16, 1), kernel=(2, 1), stride=(2, 1)),
    GateCase("one coarse voxel", (2, 3), (1, 1), kernel=(2, 3), stride=(2, 3)),
    GateCase("one coarse voxel 3D", (2, 2, 2), (3, 2, 1), **_PATCHES),
    GateCase("aligned corners onto one voxel", (2, 9), (3, 5), stride=2, **_ALIGNED),
    GateCase("aligned corners from one voxel", (7, 8), (1, 1), stride=8, **_ALIGNED),
    GateCase("nearest, g finer", (7, 9), (10, 13), stride=2, **_NEAREST),
    GateCase("g much finer", (5, 4), (31, 27)),
    GateCase("alpha from one voxel 3D", (3, 4, 5), (2, 2, 2), stride=5),
    GateCase("batch of one", (9, 7), (4, 3), batch=1, **_PATCHES),
    GateCase("batch of five, one sample less than a vector", (1, 3), (1, 3), batch=5),
    GateCase("as many channels as a vector", (6, 9), (6, 9), channels=16, gating=16, inter=16),
    GateCase("one channel more than a vector", (6, 9), (3, 5), channels=17, gating=33, inter=17),
    GateCase("many inner channels", (4, 5), (4, 5), channels=3, gating=2, inter=70),
    GateCase("many input channels", (4, 6), (2, 3), channels=70, gating=53, inter=9, **_PATCHES),
    GateCase("gelu, resized", (9, 10), (4, 5), activation="gelu", **_PATCHES),
    GateCase("leaky relu, resized", (9, 10), (3, 4), activation="leaky_relu", stride=2),
    GateCase("softplus 3D", (4, 5, 6), (4, 5, 6), activation="softplus"),
    GateCase("no bias, resized", (8, 9), (3, 4), bias=False, psi_bias=False, **_PATCHES),
)

# Projections that the CPU kernels do by panels: whole ones, and rows of whole vectors.
PANELS = (
    GateCase("whole panels", (7, 16), (7, 16), channels=120, gating=110, inter=17),
    GateCase("whole panels, y aside", (47, 45), (47, 45), channels=40, gating=30, inter=33),
    GateCase("whole panels, patches", (7, 33), (3, 16), channels=40, gating=18, inter=17, **_PATCHES),
    GateCase("whole panels, patches 3D", (4, 4, 32), (2, 2, 16), channels=30, gating=9, inter=9, **_PATCHES),
    # 2^14 weights, which matrix units take of float32 too
    GateCase("whole panels of many", (13, 17), (13, 17), channels=140, gating=111, inter=70),
)

# Weights of more than a MiB, which the CPU kernels go through in blocks of the depth.
BLOCKS = (
    GateCase("large weights", (16, 29), (16, 29), channels=512, gating=260, inter=344),
    GateCase("large weights, y aside", (37, 29), (37, 29), channels=400, gating=264, inter=400, batch=1),
    GateCase("large weights, patches", (16, 64), (8, 32), channels=120, gating=300, inter=340, **_PATCHES),
    GateCase(
        "large weights, patches 3D", (4, 4, 36), (2, 2, 18), channels=70, gating=240, inter=332, **_PATCHES
    ),
)

# Several tiles in a row and in a sample, several groups of partial sums, several bands (more than 2 MiB of x
# on two grids); rows longer and shorter than a tile.
LARGE = (
    GateCase("large, one grid", (67, 129), (67, 129), channels=24, gating=20, inter=12),
    GateCase("large, patches", (190, 202), (95, 101), channels=20, gating=8, inter=5, **_PATCHES),
    GateCase("large, g coarser", (151, 170), (38, 42), channels=24, gating=9, inter=6),
    GateCase("large, nearest", (200, 175), (50, 44), channels=20, inter=4, stride=4, **_NEAREST),
    GateCase("large, aligned corners", (131, 201), (33, 50), channels=24, inter=4, stride=3, **_ALIGNED),
    GateCase("large, long rows", (6, 2500), (3, 1250), channels=40, inter=7, **_PATCHES),
    GateCase("large, short rows", (2500, 6), (1250, 3), channels=40, inter=7, **_PATCHES),
    GateCase("large 1D", (33001,), (16500,), channels=17, **_PATCHES),
    GateCase("large 3D", (37, 42, 46), (18, 21, 23), channels=9, gating=7, inter=5, **_PATCHES),
    # deep products
    GateCase("deep, one grid", (19, 31), (19, 31), channels=290, gating=270, inter=21),
    GateCase("deep, patches", (14, 38), (7, 19), channels=97, gating=300, inter=17, **_PATCHES),
    GateCase("deep, patches 3D, g coarser", (6, 10, 14), (2, 3, 4), channels=71, gating=257, **_PATCHES),
    GateCase("large 3D, one grid", (13, 24, 30), (13, 24, 30), channels=9, gating=7, inter=5),
)

# Results above 8 MiB (all in float32, two in 16 bits), which the CPU kernels write past the caches:
# where rows begin with cache lines, and where few do.
STREAMED = (
    GateCase("streamed", (288, 320), (288, 320), channels=32, gating=30, inter=36),
    GateCase("streamed, shallow", (289, 331), (289, 331), channels=17, gating=16, inter=3),
    GateCase("streamed, patches", (384, 320), (192, 160), channels=20, gating=33, inter=6, **_PATCHES),
)


def _offset(t: Tensor) -> Tensor:
    """The same strides from an address that no vector is aligned to, between NaN for who reads beyond."""
    buffer = t.new_full([t.numel() + 128], float("nan"))
    view = buffer[63 : 63 + t.numel()].as_strided(t.shape, t.stride())
    return view.copy_(t)


def _gaps(t: Tensor) -> Tensor:
    """Every second element of larger memory, axes in another order: neither contiguous nor channels last."""
    buffer = t.new_full([2 * n for n in reversed(t.shape)], float("nan"))
    return buffer[(slice(None, None, 2),) * t.ndim].permute(*reversed(range(t.ndim))).copy_(t)


def _identity(t: Tensor) -> Tensor:
    return t


def _offset_channels_last(t: Tensor) -> Tensor:
    return _offset(channels_last(t))


def _weights_channels_last(t: Tensor) -> Tensor:
    """As networks in channels last have them."""
    return channels_last(t) if t.ndim > 2 else t


# For each layout how these lie in memory: x and theta; g, phi and alpha; gradients of outputs; parameters.
LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "contiguous": (_identity, _identity, _identity, _identity),
    "channels last": (channels_last,) * 3 + (_weights_channels_last,),
    "x channels last": (channels_last, _identity, _identity, _identity),
    "g channels last": (_identity, channels_last, channels_last, _identity),
    "odd offsets": (_offset, _offset, _offset, _offset),
    "odd offsets, channels last": (_offset_channels_last,) * 3 + (_offset,),
    "gaps": (_gaps, _gaps, _gaps, _gaps),
}
_ROLES = {"x": 0, "theta": 0, "g": 1, "phi": 1, "alpha": 1}


@float32_products()
def compare(
    case: GateCase,
    operator: str,
    dtype: torch.dtype,
    layout: str = "contiguous",
    *,
    backend: str = "cpu",
    seed: int = 0,
    **options: object,
) -> None:
    """Forward and all gradients of one case: fails with the names and errors of wrong results."""
    # Where PyTorch's convolutions or Triton's products of matrices make theta and phi, they take weights
    # rounded to the maps' dtype, as under autocast.
    rounds = backend.startswith(("cuda", "triton")) and operator.startswith("attention")
    tensors, eager, exact = _expected(case, operator, dtype, seed, backends.device_of(backend), rounds)
    arrange = LAYOUTS[layout]
    arranged = {name: t if t is None else arrange[_ROLES.get(name, 3)](t) for name, t in tensors.items()}
    options = {**case.options(operator), **options}
    found = results(getattr(functional, operator), arranged, seed, arrange[2], backend=backend, **options)
    wrong = [
        f"{result.name}: error {result.error:.2g}, allowed {result.tolerance:.2g}"
        for result in judge(found, eager, exact, dtype)
        if not result.ok
    ]
    assert not wrong, f"{operator}, {case.name!r}, {dtype}, {layout}, {options}: " + "; ".join(wrong)
    if "y" in found:
        assert found["y"].dtype == dtype
        x = arranged["x"]
        assert found["y"].stride() == torch.empty_like(x, memory_format=_format(x)).stride()


@functools.lru_cache(maxsize=2)
def _expected(
    case: GateCase, operator: str, dtype: torch.dtype, seed: int, device: str, rounds: bool
) -> tuple[dict, ...]:
    """Inputs, and what eager PyTorch makes of them in this dtype and in float64."""
    twin, options = getattr(reference, operator), case.options(operator)
    tensors = case.inputs(operator, dtype, seed=seed, device=device)
    doubles = {name: None if t is None else t.double() for name, t in tensors.items()}
    rounds = rounds and dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(device, dtype if rounds else None, enabled=rounds):
        eager = results(twin, tensors, seed, **options)
    return tensors, eager, results(twin, doubles, seed, **options)


def results(
    function: Callable,
    tensors: dict[str, Tensor | None],
    seed: int = 0,
    arrange_dy: Callable[[Tensor], Tensor] = _identity,
    **options: object,
) -> dict[str, Tensor]:
    """Outputs by name and, as "d NAME", the gradients of all tensors for random gradients of the outputs."""
    leaves = {name: t if t is None else t.detach().requires_grad_() for name, t in tensors.items()}
    outputs = function(**leaves, **options)
    if not isinstance(outputs, tuple):
        outputs = (outputs,)
    names = ("y", "alpha") if "x" in tensors and not function.__name__.endswith("logits") else ("logits",)
    outputs = dict(zip(names, outputs, strict=False))
    generator = torch.Generator().manual_seed(seed)
    slopes = []
    for output in outputs.values():
        # Numbers that are exact in every dtype, so that all calls get the same.
        slope = torch.randint(-16, 17, output.shape, generator=generator) / 8
        slopes.append(arrange_dy(slope.to(output.device, output.dtype)))
    wanted = {name: t for name, t in leaves.items() if t is not None}
    gradients = torch.autograd.grad(list(outputs.values()), list(wanted.values()), slopes)
    return {**outputs, **{f"d {name}": g for name, g in zip(wanted, gradients, strict=True)}}


def follows_in_a_graph(case: GateCase, operator: str, backend: str) -> None:
    """On a GPU: forward and backward are captured, and follow the inputs when they are replayed."""
    tensors = {name: t.requires_grad_() for name, t in case.inputs(operator, device="cuda").items()}

    def step() -> tuple[Tensor, ...]:
        y, alpha = getattr(functional, operator)(**tensors, **case.options(operator), backend=backend)
        return (y, *torch.autograd.grad(y.square().sum() + alpha.sum(), list(tensors.values())))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # what is compiled and timed, is here
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for t in tensors.values():
            t.mul_(0.5)
    graph.replay()
    assert all(torch.equal(found, exact) for found, exact in zip(captured, step(), strict=True))


def recomputes(operator: str) -> Iterator[dict[str, bool]]:
    """The ways to call an operator that must not change its results."""
    if operator.startswith("attention"):
        yield from ({"recompute": True}, {"recompute": False})
    else:
        yield {}


def _format(x: Tensor) -> torch.memory_format:
    """The layout that results have: x's where it is native, contiguous for all others."""
    if x.ndim == 3 or x.is_contiguous():
        native = not x.is_contiguous() and x.mT.is_contiguous()
        return torch.preserve_format if native else torch.contiguous_format
    last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    return last if x.is_contiguous(memory_format=last) else torch.contiguous_format
