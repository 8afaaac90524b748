"""The CUDA kernels, run on the host by cuda_on_host: the matrix, and what they promise beside."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from cuda_on_host import backend, build
from matrix import DTYPES, EDGES, LARGE, LAYOUTS, compare, recomputes, results
from raw_operators import refuses_what_does_not_fit
from torch.testing import assert_close

from attn_gate import architectures, functional, reference
from attn_gate.cases import CASES, OPERATORS, GateCase

pytestmark = pytest.mark.skipif(bool(build.why_not()), reason=build.why_not() or "-")
of_all_operators = pytest.mark.parametrize("operator", OPERATORS)
ORDERS = {"in order": 0, "reversed": 1, "drawn": 7, "drawn again": 8}
SAME = GateCase("same grid", (4, 6), (4, 6))
RESIZED = GateCase("resized", (5, 8), (3, 4), kernel=2, stride=2)
NEAREST = GateCase("nearest", (6, 8), (3, 4), stride=2, phi_resize="nearest", alpha_resize="nearest")


@pytest.fixture(scope="module")
def extension():
    return backend.register()


@pytest.fixture(autouse=True)
def host(extension):
    """The extension; memory from torch.empty holds NaN, as shared memory always does."""
    extension.set_order(0)
    extension.set_processors(2)
    extension.set_far(0)
    extension.set_last_blocks(2**62)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(7).isnan().all()
    yield extension
    torch.use_deterministic_algorithms(False)


on_host = functools.partial(compare, backend=backend.NAME)


def run(operator, tensors, *args, **options):
    return results(getattr(functional, operator), tensors, *args, backend=backend.NAME, **options)


# ---------------------------------------------------------------------------------------------------- matrix


@of_all_operators
@pytest.mark.parametrize("case", CASES + EDGES, ids=lambda case: case.name)
def test_small(case, operator, host):
    """Dtypes, layouts, thread orders and numbers of processors (which decide the tiles) in turn."""
    turn = 3 * (CASES + EDGES).index(case) + OPERATORS.index(operator)
    for options in recomputes(operator):
        for _ in range(2):
            take_turn(case, operator, turn, host, **options)
            turn += 1


@pytest.mark.slow
@of_all_operators
@pytest.mark.parametrize("case", CASES + EDGES, ids=lambda case: case.name)
def test_small_in_every_dtype_and_layout(case, operator, host):
    for options in recomputes(operator):
        for turn in range(len(DTYPES) * len(LAYOUTS)):
            take_turn(case, operator, turn, host, **options)


def take_turn(case, operator, turn, host, **options):
    host.set_order(list(ORDERS.values())[turn // 2 % len(ORDERS)])
    host.set_processors((1, 2, 16)[turn // 3 % 3])
    layout = list(LAYOUTS)[turn % len(LAYOUTS)]
    on_host(case, operator, DTYPES[turn % len(DTYPES)], layout, **options)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("case", [c for c in LARGE if "rows" not in c.name], ids=lambda case: case.name)
def test_large(case, layout, host):
    host.set_processors(1)
    on_host(case, "gate", torch.bfloat16 if "3D" in case.name else torch.float32, layout)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", [*CASES[:3], RESIZED, NEAREST, CASES[16]], ids=lambda case: case.name)
def test_same_bits_in_every_order_of_threads(case, order, host):
    for layout in ("contiguous", "channels_last"):
        tensors = case.inputs("gate", layout=layout)
        host.set_order(0)
        expected = run("gate", tensors, **case.options("gate"))
        host.set_order(ORDERS[order])
        found = run("gate", tensors, **case.options("gate"))
        assert all(torch.equal(found[name], t) for name, t in expected.items())


@pytest.mark.parametrize("mode", [1, 2, 3], ids=["nearest", "linear", "align_corners"])
def test_room_for_what_a_tile_receives_from(mode, host):
    """Shared memory is laid out by a bound on it: neither rounding nor the borders of a grid exceed it."""
    draw = random.Random(mode)
    for _ in range(3000):
        coarse = draw.randint(1, 300)
        fine = draw.choice([draw.randint(1, 900), coarse * draw.randint(1, 9)])
        count = draw.randint(1, coarse)
        most = host.most_receivers(mode, count, count, coarse, fine)
        for first in range(0, coarse, count):  # tiles
            assert host.receivers(mode, first, min(first + count, coarse), coarse, fine) <= most
        most = host.most_receivers(mode, count, 1, coarse, fine)
        first = draw.randint(0, coarse - count)
        assert host.receivers(mode, first, first + count, coarse, fine) <= most


# --------------------------------------------------------------------------------------- kernels and memory


@pytest.mark.parametrize(
    "case,backward",
    [(SAME, 2), (NEAREST, 2), (RESIZED, 3), (GateCase("", (8, 12), (4, 6), kernel=2, stride=2), 3)],
    ids=["same grid", "nearest", "phi on a grid of its own", "linear"],
)
def test_number_of_kernels(case, backward, host):
    """Forward is one. Backward is one and the sum of the partial sums; with a linear resize, or where phi is
    resized, two and that."""
    tensors = case.inputs("gate")
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    host.take_launches()
    y, alpha = functional.gate(**leaves, **case.options("gate"), backend=backend.NAME)
    assert len(host.take_launches()) == 1
    (y.sum() + alpha.sum()).backward()
    assert len(host.take_launches()) == backward


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("operator", ["gate", "gate_logits", "apply_attention"])
def test_native_layouts_are_not_copied(operator, axes, layout):
    sizes = ((4, 6), (2, 3)) if axes == 2 else ((4, 6, 2), (2, 3, 1))
    case = GateCase("", *sizes, kernel=2, stride=2)
    tensors = case.inputs(operator, layout=layout.replace(" ", "_"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(operator, tensors, 0, LAYOUTS[layout][2], **case.options(operator))
    ours = [event for event in profile.events() if event.name.startswith("attn_gate_cuda_host_kernels::")]
    assert len(ours) == 2  # forward and backward
    assert not [child.name for event in ours for child in event.cpu_children if "copy" in child.name]


# --------------------------------------------------------------------------------------------------- promises


@of_all_operators
@pytest.mark.parametrize("case", [*CASES[:3], RESIZED, NEAREST], ids=lambda case: case.name)
def test_empty_batch(case, operator):
    empty = GateCase(**{**vars(case), "batch": 0})
    tensors = empty.inputs(operator)
    found = run(operator, tensors, **case.options(operator))
    expected = results(getattr(reference, operator), tensors, **case.options(operator))
    assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in expected.items()}
    assert not any(t.count_nonzero() for t in found.values())


def test_no_voxels_and_no_channels():
    x, theta, phi = torch.empty(2, 3, 0, 5), torch.empty(2, 4, 0, 5), torch.empty(2, 4, 0, 2)
    found = run("gate", {"x": x, "theta": theta, "phi": phi, "psi_weight": torch.ones(1, 4, 1, 1)})
    assert found["y"].shape == x.shape and found["d psi_weight"].count_nonzero() == 0
    for channels, inter in ((0, 2), (3, 0), (0, 0)):
        tensors = {
            "x": torch.randn(2, channels, 4, 6),
            "theta": torch.randn(2, inter, 4, 6),
            "phi": torch.randn(2, inter, 4, 6),
            "psi_weight": torch.randn(1, inter, 1, 1),
            "psi_bias": torch.randn(1),
        }
        assert_close(run("gate", tensors), results(functional.gate, tensors, backend="cpu"))


@pytest.mark.parametrize("gating", [0, 3])
@pytest.mark.parametrize("channels,inter", [(0, 2), (3, 0), (0, 0), (3, 2)])
def test_whole_gates_without_channels(channels, inter, gating):
    tensors = {
        "x": torch.randn(2, channels, 4, 6),
        "g": torch.randn(2, gating, 4, 6),
        "theta_weight": torch.randn(inter, channels, 2, 2),
        "phi_weight": torch.randn(inter, gating, 1, 1),
        "psi_weight": torch.randn(1, inter, 1, 1),
        "bias": torch.randn(inter),
        "psi_bias": torch.randn(1),
    }
    for recompute in (True, False):
        options = {"stride": 2, "recompute": recompute}
        expected = results(functional.attention_gate, tensors, backend="cpu", **options)
        assert_close(run("attention_gate", tensors, **options), expected)


@pytest.mark.parametrize("recompute", [True, False])
def test_backward_under_an_autocast_that_forward_did_not_see(recompute):
    tensors = RESIZED.inputs("attention_gate")
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    options = {**RESIZED.options("attention_gate"), "recompute": recompute, "backend": backend.NAME}
    y, _ = functional.attention_gate(**leaves, **options)
    expected = torch.autograd.grad(y.sum(), list(leaves.values()), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y.sum(), list(leaves.values()))
    assert_close(found, expected)


@pytest.mark.parametrize("case", [SAME, RESIZED, NEAREST], ids=lambda case: case.name)
@of_all_operators
def test_gradients_that_nobody_asked_for_spoil_nothing(case, operator):
    tensors = case.inputs(operator, torch.float64)
    expected = run(operator, tensors, **case.options(operator))
    for name, t in tensors.items():
        if t is None:
            continue
        leaf = t.detach().requires_grad_()
        outputs = getattr(functional, operator)(
            **{**tensors, name: leaf}, backend=backend.NAME, **case.options(operator)
        )
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        generator = torch.Generator().manual_seed(0)
        slopes = [(torch.randint(-16, 17, o.shape, generator=generator) / 8).to(o) for o in outputs]
        assert_close(torch.autograd.grad(outputs, leaf, slopes)[0], expected[f"d {name}"])


@pytest.mark.parametrize("only", ["y", "alpha"])
@pytest.mark.parametrize("case", [SAME, RESIZED, NEAREST], ids=lambda case: case.name)
def test_one_output_used(case, only):
    """dy or dalpha is missing."""
    tensors = {n: t.double().requires_grad_() for n, t in case.inputs("gate").items()}
    wanted = [t for n, t in tensors.items() if only == "y" or n != "x"]
    gradients = []
    for function in (functools.partial(functional.gate, backend=backend.NAME), reference.gate):
        y, alpha = function(**tensors, **case.options("gate"))
        gradients.append(torch.autograd.grad((y if only == "y" else alpha).square().sum(), wanted))
    assert_close(*gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [SAME, RESIZED, NEAREST], ids=lambda case: case.name)
def test_nan_goes_where_it_goes_in_eager(case, dtype):
    tensors = case.inputs("gate", dtype)
    for name, t in tensors.items():
        spoilt = t.clone()
        spoilt.view(-1)[t.numel() // 2] = float("nan")
        inputs = {**tensors, name: spoilt}
        found = run("gate", inputs, **case.options("gate"))
        expected = results(reference.gate, inputs, **case.options("gate"))
        for output, exact in expected.items():
            if output.startswith("d "):
                assert not (found[output].isnan() & exact.isfinite()).any(), (name, output)
            else:
                assert torch.equal(found[output].isnan(), exact.isnan()), (name, output)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_rounding_is_that_of_eager(dtype, layout):
    """All 16-bit numbers times all kinds of factors: ties, subnormal results, overflow, signed zeros, NaN."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(2, 64, 16, 32)
    alpha = torch.rand(2, 1, 16, 32)
    alpha[:, :, :, ::4] = torch.tensor([1.0, 0.5, 2.0**-12, 1 + 2.0**-9, 1 - 2.0**-11, 3.0, 0.0, 1.5])
    found = functional.apply_attention(LAYOUTS[layout][0](x), alpha, backend=backend.NAME)
    expected = reference.apply_attention(x, alpha)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(7).view(torch.int16), expected.nan_to_num(7).view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits_close_and_open_the_gate(dtype):
    tensors = SAME.inputs("gate", dtype)
    for bias, alpha in ((-1e4, 0.0), (1e4, 1.0)):
        inputs = {**tensors, "psi_bias": torch.full((1,), bias, dtype=tensors["psi_weight"].dtype)}
        found = run("gate", inputs, **SAME.options("gate"))
        assert_close(found["alpha"], torch.full_like(found["alpha"], alpha), rtol=0, atol=1e-37)
        assert found["d psi_weight"].abs().max() < 1e-30


def test_second_derivatives():
    tensors = [t.requires_grad_() for t in SAME.inputs("gate", torch.float64).values()]

    def gate(*args):
        return functional.gate(*args, backend=backend.NAME)

    assert torch.autograd.gradcheck(gate, tensors)
    assert torch.autograd.gradgradcheck(gate, tensors)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [SAME, RESIZED, NEAREST, CASES[2], CASES[10]], ids=lambda case: case.name)
def test_strides_beyond_32_bits(case, dtype, layout, host):
    """Channels (voxels, where channels are last) lie 2**31 elements apart, in memory mostly not there."""
    host.set_far(dtype.itemsize)
    on_host(case, "gate", dtype, layout)


@pytest.mark.slow
def test_voxels_beyond_32_bits(host):
    """One channel of more than 2**31 voxels, mostly not there either: only the last blocks run, to
    whom the last tile falls, forward and backward."""
    torch.use_deterministic_algorithms(False)  # or torch.empty would write all of it
    shape, last = (1, 1, 1, 2**31 + 2**20), (..., slice(-64, None))
    try:
        x, theta, dy = (torch.empty(shape, dtype=torch.bfloat16) for _ in range(3))
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")
    for t in (x, theta, dy):
        t[last] = torch.randn(64)
    psi, modes = torch.randn(1), ("linear", "linear", "relu")
    kernels = torch.ops.attn_gate_cuda_host_kernels
    host.set_last_blocks(2)
    y, alpha = kernels.gate_fwd(x, theta, None, psi, None, *modes)
    dx, dtheta, *_ = kernels.gate_bwd(dy, None, x, theta, None, psi, alpha, *modes, 0b11)
    found = y, alpha, dx, dtheta
    x, theta, dy = (t[last].float() for t in (x, theta, dy))
    weight = torch.sigmoid(psi * theta.relu())
    slope = dy * x * weight * (1 - weight) * psi * (theta > 0)
    for ours, expected in zip(found, (x * weight, weight, dy * weight, slope), strict=True):
        assert_close(ours[last].float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("inter", [1023, 1024, 1025])
def test_more_weights_than_shared_memory_holds(inter):
    for layout in ("contiguous", "channels last"):
        on_host(GateCase("", (3, 5), (3, 5), channels=2, inter=inter), "gate", torch.float32, layout)


def test_raw_operators_check_what_reaches_memory():
    refuses_what_does_not_fit(torch.ops.attn_gate_cuda_host_kernels)


# ---------------------------------------------------------------------------------------------- architectures


@pytest.mark.parametrize(
    "built,capability,runs",
    [
        ("8.0 9.0", (8, 0), True),
        ("8.0 9.0", (8, 9), True),
        ("8.6", (8, 0), False),
        ("8.0 9.0", (10, 0), False),
        ("8.0 9.0+PTX", (10, 0), True),
        ("9.0+PTX", (8, 0), False),
        ("9.0a", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),
        ("10.0f", (10, 3), True),
        ("10.0f", (12, 0), False),
        ("", (8, 0), False),
    ],
)
def test_architectures(built, capability, runs):
    reason = architectures.why_not(built, capability)
    assert bool(reason) != runs
    if reason:
        assert f'TORCH_CUDA_ARCH_LIST="{capability[0]}.{capability[1]}"' in reason


def test_torch_compile_traces_the_architectures():
    """On a GPU the choice of the backend is part of what is compiled."""

    def traced(t):
        fits = not architectures.why_not("8.0 9.0a 12.0+PTX", (12, 1))
        return t + 1 if fits and architectures.why_not("8.0 9.0a", (12, 1)) else t - 1

    t = torch.zeros(1)
    assert torch.equal(torch.compile(traced, fullgraph=True, backend="eager")(t), t + 1)
