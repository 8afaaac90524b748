"""What every operator promises beside its numbers: memory, determinism, sizes, NaN, errors, backends."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix import BLOCKS, DTYPES, LARGE, LAYOUTS, PANELS, STREAMED, compare, results
from raw_operators import refuses_what_does_not_fit
from torch import Tensor
from torch.testing import assert_close

from attn_gate import AttentionGate, backends, functional, namespaces, reference
from attn_gate._library import cpu_isa
from attn_gate.cases import CASES, OPERATORS, GateCase, channels_last
from attn_gate.reference import ACTIVATIONS, RESIZE_MODES

of_all_operators = pytest.mark.parametrize("operator", OPERATORS)
SAME = GateCase("same grid", (4, 6), (4, 6))
RESIZED = GateCase("resized", (5, 8), (3, 4), kernel=2, stride=2)


# ---------------------------------------------------------------------------------------------------- memory


@pytest.fixture
def poison():
    """Memory from torch.empty holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(7).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@of_all_operators
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nothing_uninitialised_is_read(case, operator, poison):
    for dtype, layout in zip(DTYPES, ("contiguous", "channels last", "gaps", "odd offsets"), strict=True):
        compare(case, operator, dtype, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("operator", ["gate", "attention_gate", "apply_attention"])
@pytest.mark.parametrize("case", STREAMED, ids=lambda case: case.name)
def test_results_larger_than_caches(case, operator, layout, poison):
    """They have their pages, since those were filled, and are written past the caches."""
    for dtype in (torch.float32, torch.bfloat16):
        compare(case, operator, dtype, layout)


@of_all_operators
@pytest.mark.parametrize("case", [SAME, RESIZED], ids=lambda case: case.name)
def test_gradients_that_nobody_asked_for_spoil_nothing(case, operator, poison):
    tensors = case.inputs(operator, torch.float64)
    function = getattr(functional, operator)
    expected = results(function, tensors, **case.options(operator))
    for name, t in tensors.items():
        if t is not None:
            leaf = t.detach().requires_grad_()
            outputs = function(**{**tensors, name: leaf}, **case.options(operator))
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            generator = torch.Generator().manual_seed(0)
            slopes = [(torch.randint(-16, 17, o.shape, generator=generator) / 8).to(o) for o in outputs]
            assert_close(torch.autograd.grad(outputs, leaf, slopes)[0], expected[f"d {name}"])


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("axes", [2, 3])
@of_all_operators
def test_native_layouts_are_not_copied(operator, axes, layout):
    """Neither inputs nor gradients: nothing in PyTorch that copies runs underneath."""
    sizes = ((4, 6), (3, 3)) if axes == 2 else ((4, 6, 2), (3, 3, 1))
    case = GateCase("", *sizes, kernel=2, stride=2)
    tensors = case.inputs(operator, layout=layout.replace(" ", "_"))
    arrange = LAYOUTS[layout][2]

    def copies(**inputs):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            results(getattr(functional, operator), inputs, arrange_dy=arrange, **case.options(operator))
        ours = [event for event in profile.events() if event.name.startswith("attn_gate::")]
        assert len(ours) == 2  # forward and backward
        return [name for event in ours for name in names_below(event) if name == "aten::copy_"]

    assert not copies(**tensors)
    first = next(iter(tensors))
    assert copies(**{**tensors, first: LAYOUTS["gaps"][0](tensors[first])})


def names_below(event):
    for child in event.cpu_children:
        yield child.name
        yield from names_below(child)


# -------------------------------------------------------------------------------------------- sizes, offsets


@of_all_operators
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_empty_batch(case, operator, poison):
    """An empty y, and parameter gradients that are zero: as eager PyTorch has it."""
    empty = GateCase(**{**vars(case), "batch": 0})
    tensors = empty.inputs(operator)
    found = results(getattr(functional, operator), tensors, **case.options(operator))
    expected = results(getattr(reference, operator), tensors, **case.options(operator))
    assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in expected.items()}
    assert not any(t.count_nonzero() for t in found.values())


def test_grids_without_voxels(poison):
    x, theta, phi = torch.empty(2, 3, 0, 5), torch.empty(2, 4, 0, 5), torch.empty(2, 4, 0, 2)
    tensors = {"x": x, "theta": theta, "phi": phi, "psi_weight": torch.ones(1, 4, 1, 1)}
    found = results(functional.gate, tensors)
    assert found["y"].shape == x.shape and found["alpha"].shape == (2, 1, 0, 5)
    assert found["d psi_weight"].count_nonzero() == 0


@pytest.mark.parametrize("inter", [0, 2, 33])
@pytest.mark.parametrize("channels", [0, 2, 64])
@pytest.mark.parametrize("gating", [0, 3, 65])
def test_no_channels(channels, gating, inter, poison):
    """A sum over nothing is 0."""
    x, g = torch.randn(2, channels, 4, 6), torch.randn(2, gating, 4, 6)
    theta_weight, phi_weight = torch.randn(inter, channels, 1, 1), torch.randn(inter, gating, 1, 1)
    psi_weight, bias, psi_bias = torch.randn(1, inter, 1, 1), torch.randn(inter), torch.randn(1)
    tensors = {
        "x": x, "g": g, "theta_weight": theta_weight, "phi_weight": phi_weight,
        "psi_weight": psi_weight, "bias": bias, "psi_bias": psi_bias,
    }  # fmt: skip
    for options in ({"recompute": True}, {"recompute": False}):
        found = results(functional.attention_gate, tensors, **options)
        assert all(t.isfinite().all() for t in found.values())
        theta = torch.einsum("nchw,ic->nihw", x, theta_weight[..., 0, 0])
        phi = torch.einsum("nchw,ic->nihw", g, phi_weight[..., 0, 0])
        q = torch.relu(theta + phi + bias.view(-1, 1, 1))
        alpha = torch.sigmoid(torch.einsum("nihw,i->nhw", q, psi_weight[0, :, 0, 0]) + psi_bias)
        assert_close(found["alpha"][:, 0], alpha)
        assert_close(found["y"], x * alpha[:, None])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_offsets_beyond_32_bits(layout):
    """A map of more than 2**31 elements: zeros, one page mapped often, and a few numbers at the end."""
    channels, size = 64, (5800, 5800)
    assert channels * size[0] * size[1] > 2**31
    shape = (1, *size, channels) if layout == "channels last" else (1, channels, *size)
    theta = torch.zeros(shape, dtype=torch.bfloat16)
    theta = theta.movedim(-1, 1) if layout == "channels last" else theta
    voxel = (slice(None), slice(None), slice(-1, None), slice(-3, None))
    theta[voxel] = torch.randn(1, channels, 1, 3)
    psi_weight = torch.randn(1, channels, 1, 1, requires_grad=True)
    torch.set_num_threads(2)
    logits = functional.gate_logits(theta, None, psi_weight)
    corner = theta[voxel].float()
    assert_close(logits[voxel], reference.gate_logits(corner, None, psi_weight), rtol=1e-5, atol=1e-5)
    assert logits.count_nonzero() == 3
    slope = torch.zeros_like(logits)
    slope[voxel] = torch.randn(3)
    (found,) = torch.autograd.grad(logits, psi_weight, slope)
    expected = (torch.relu(corner) * slope[voxel]).sum((0, 2, 3)).view_as(psi_weight)
    assert_close(found, expected, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize(
    "case",
    [*(c for c in LARGE if "1D" not in c.name), PANELS[-1], BLOCKS[0], STREAMED[1]],
    ids=lambda case: case.name,
)
@pytest.mark.parametrize("operator", ["gate", "attention_gate"])
def test_same_bits_on_any_number_of_threads(case, operator, layout):
    tensors = case.inputs(operator, layout=layout.replace(" ", "_"))
    found = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        found.append(results(getattr(functional, operator), tensors, **case.options(operator)))
    for other in found[1:]:
        assert all(torch.equal(t, other[name]) for name, t in found[0].items())


# ------------------------------------------------------------------------------------------- special numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [SAME, RESIZED, *CASES[1:3]], ids=lambda case: case.name)
@of_all_operators
def test_nan_goes_where_it_goes_in_eager(case, operator, dtype):
    """To the same outputs, and to no gradient that is finite there (eager spreads it by weights of 0 too)."""
    tensors = case.inputs(operator, dtype)
    for name, t in tensors.items():
        if t is None:
            continue
        spoilt = t.clone()
        spoilt.view(-1)[t.numel() // 2] = float("nan")
        inputs = {**tensors, name: spoilt}
        found = results(getattr(functional, operator), inputs, **case.options(operator))
        expected = results(getattr(reference, operator), inputs, **case.options(operator))
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
    found = functional.apply_attention(LAYOUTS[layout][0](x), alpha)
    expected = reference.apply_attention(x, alpha)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(7).view(torch.int16), expected.nan_to_num(7).view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@of_all_operators
def test_slope_at_zero_is_that_of_eager(operator, activation, dtype):
    """Empty regions of an image: pre-activations of exactly 0."""
    if operator == "apply_attention":
        pytest.skip("no activation")
    case = GateCase("", (5, 6), (5, 6), activation=activation, bias=False)
    tensors = {
        name: torch.zeros_like(t) if name in ("x", "g", "theta", "phi") and t is not None else t
        for name, t in case.inputs(operator, dtype).items()
    }
    found = results(getattr(functional, operator), tensors, **case.options(operator))
    expected = results(getattr(reference, operator), tensors, **case.options(operator))
    assert_close(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits_close_and_open_the_gate(dtype):
    """alpha is 0 or 1, with gradients of 0, and never NaN."""
    tensors = SAME.inputs("attention_gate", dtype)
    for bias, alpha in ((-1e4, 0.0), (1e4, 1.0)):
        inputs = {**tensors, "psi_bias": torch.full((1,), bias, dtype=tensors["psi_weight"].dtype)}
        found = results(functional.attention_gate, inputs, **SAME.options("attention_gate"))
        assert_close(found["alpha"], torch.full_like(found["alpha"], alpha), rtol=0, atol=1e-37)
        assert found["d psi_weight"].abs().max() < 1e-30
        assert_close(found["y"], tensors["x"] * alpha, rtol=0, atol=1e-30)


# ---------------------------------------------------------------------------------------------- random cases


@st.composite
def gate_cases(draw):
    axes = draw(st.integers(1, 3))
    longest = {1: 60, 2: 14, 3: 7}[axes]
    sizes = st.tuples(*[st.integers(1, longest)] * axes)
    x_size, g_size = draw(sizes), draw(sizes)
    kernel = tuple(draw(st.integers(1, min(3, n))) for n in x_size)
    stride = tuple(draw(st.integers(k, 4)) for k in kernel)
    few = st.integers(1, 20)
    return GateCase(
        "random",
        x_size,
        g_size,
        batch=draw(st.integers(1, 3)),
        channels=draw(few),
        gating=draw(few),
        inter=draw(few),
        kernel=kernel,
        stride=stride,
        phi_resize=draw(st.sampled_from(RESIZE_MODES)),
        alpha_resize=draw(st.sampled_from(RESIZE_MODES)),
        activation=draw(st.sampled_from(list(ACTIVATIONS))),
        bias=draw(st.booleans()),
        psi_bias=draw(st.booleans()),
        phi=draw(st.booleans()),
    )


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(gate_cases(), st.sampled_from(OPERATORS), st.sampled_from(DTYPES), st.sampled_from(list(LAYOUTS)))
def test_random_cases(case, operator, dtype, layout):
    recompute = {"recompute": case.inter % 2 == 0} if operator.startswith("attention") else {}
    compare(case, operator, dtype, layout, **recompute)


# ------------------------------------------------------------------------------------------ instruction sets


def run_compact(**variables):
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)]), **variables}
    command = [sys.executable, str(tests / "compact.py")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "isa", ["default", "avx2", "avx512"]
)  # what goes beyond, where there is, runs all the other tests
def test_every_instruction_set(isa):
    """All that this machine has, in a process each; new scratch memory is full of huge numbers."""
    order = ("default", "avx2", "avx512", "avx512_bf16", "amx")
    if order.index(isa) > order.index(cpu_isa() if not os.environ.get("ATEN_CPU_CAPABILITY") else "avx512"):
        pytest.skip(f"this machine has no {isa}")
    done = run_compact(ATEN_CPU_CAPABILITY=isa, MALLOC_PERTURB_="128")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[0] == isa


MALLOC_CHECK = Path("/lib/x86_64-linux-gnu/libc_malloc_debug.so.0")


@pytest.mark.skipif(not MALLOC_CHECK.exists(), reason="needs glibc's libc_malloc_debug")
def test_nothing_is_written_behind_the_outputs():
    """glibc puts a sentinel behind every block of memory and looks at it when the block is freed."""
    done = run_compact(LD_PRELOAD=str(MALLOC_CHECK), GLIBC_TUNABLES="glibc.malloc.check=3")
    assert done.returncode == 0, done.stderr[-3000:]


class Mallinfo(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    )


@pytest.fixture
def bytes_in_use():
    """What malloc has handed out and not got back."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        pytest.skip("needs glibc 2.33 or later")
    mallinfo.restype = Mallinfo
    return lambda: mallinfo().uordblks


def grows(bytes_in_use, call, calls=400):
    """Bytes that stay behind of each call."""
    for _ in range(calls // 2):
        call()
    before = bytes_in_use()
    for _ in range(calls):
        call()
    return (bytes_in_use() - before) / calls


@of_all_operators
@pytest.mark.parametrize("case", [SAME, RESIZED], ids=lambda case: case.name)
def test_calls_leave_nothing_on_the_heap(case, operator, bytes_in_use):
    """Not the 48 bytes either of each string argument, which PyTorch's own boxing of it leaks before 2.14."""
    tensors = {n: t if t is None else t.requires_grad_() for n, t in case.inputs(operator).items()}
    inputs = [t for t in tensors.values() if t is not None]
    function = getattr(functional, operator)

    def step():
        outputs = function(**tensors, **case.options(operator))
        torch.autograd.grad((outputs if isinstance(outputs, Tensor) else outputs[0]).sum(), inputs)

    def infer():
        with torch.no_grad():
            function(**tensors, **case.options(operator))

    assert grows(bytes_in_use, step) < 16
    assert grows(bytes_in_use, infer) < 16


def test_steps_with_batch_norms_leave_nothing_on_the_heap(bytes_in_use):
    gate = AttentionGate(6, 6, 3, preset="same_grid", recompute=True).train()
    x = torch.randn(2, 6, 4, 6, requires_grad=True)
    assert gate.fusion(x, x).plan == "whole_moments"
    assert grows(bytes_in_use, lambda: torch.autograd.grad(gate(x, x).sum(), x)) < 16


# ---------------------------------------------------------------------------------------------------- errors


def arguments_of(operator):
    return RESIZED.inputs(operator), RESIZED.options(operator)


def tensor(*shape, **options):
    return torch.zeros(shape, **options)


LONG = {"dtype": torch.int64}
HALF = {"dtype": torch.float16}
META = {"device": "meta"}
# operator, argument, what is passed, exception, what the message says beside the argument's name
BAD = [
    # x: [2, 6, 5, 8]
    (
        "gate",
        "x",
        None,
        TypeError,
        "must be a float32, float64, bfloat16 or float16 tensor; got NoneType None",
    ),
    ("gate", "x", [1.0], TypeError, r"got list \[1.0\]"),
    ("gate", "x", tensor(2, 6, 5, 8, **LONG), TypeError, "got a tensor of torch.int64"),
    ("gate", "x", tensor(2, 6, 5, 8, dtype=torch.complex64), TypeError, "got a tensor of torch.complex64"),
    (
        "gate",
        "x",
        tensor(2, 6),
        ValueError,
        r"must be \[N, channels, \*grid\], 1 to 3 grid axes; got shape \[2, 6\]",
    ),
    ("gate", "x", tensor(1, 2, 3, 4, 5, 6), ValueError, "1 to 3 grid axes"),
    (
        "attention_gate",
        "x",
        tensor(2, 6, 1, 8),
        ValueError,
        r"at least theta's kernel \[2, 2\]; got \[1, 8\]",
    ),
    (
        "attention_gate",
        "x",
        tensor(2, 6, 0, 8),
        ValueError,
        r"at least theta's kernel \[2, 2\]; got \[0, 8\]",
    ),
    ("apply_attention", "x", tensor(2), ValueError, "1 to 3 grid axes"),
    # the other maps
    ("gate", "theta", None, TypeError, "must be a float32"),
    (
        "gate",
        "theta",
        tensor(2, 3, 2, 4, **HALF),
        TypeError,
        "is torch.float16, the other maps are torch.float32; cast",
    ),
    (
        "gate",
        "theta",
        tensor(1, 3, 2, 4),
        ValueError,
        r"must have batch size 2 and 2 grid axes .*; got shape \[1, 3",
    ),
    ("gate", "theta", tensor(2, 3, 2), ValueError, "2 grid axes"),
    ("gate", "theta", tensor(2, 3, 2, 4, **META), ValueError, "is on meta, the other maps are on cpu; move"),
    ("gate", "theta", tensor(2, 3, 0, 4), ValueError, r"can't be resized from grid \[0, 4\] to \[5, 8\]"),
    (
        "gate",
        "phi",
        tensor(2, 4, 3, 4),
        ValueError,
        r"must have theta's 3 channels; got shape \[2, 4, 3, 4\]",
    ),
    ("gate", "phi", tensor(2, 3, 0, 4), ValueError, r"can't be resized from grid \[0, 4\] to \[2, 4\]"),
    ("gate", "phi", tensor(2, 3, 3, 4, **LONG), TypeError, "got a tensor of torch.int64"),
    ("gate_logits", "theta", "map", TypeError, "got str 'map'"),
    ("gate_logits", "phi", tensor(2, 3, 3, 4, **HALF), TypeError, "is torch.float16"),
    ("attention_gate", "g", None, TypeError, "got NoneType"),
    ("attention_gate", "g", tensor(3, 5, 3, 4), ValueError, "must have batch size 2"),
    ("attention_gate", "g", tensor(2, 5, 3, 4, 2), ValueError, "2 grid axes as the other maps"),
    ("attention_gate", "g", tensor(2, 5, 3, 0), ValueError, r"can't be resized from grid \[3, 0\]"),
    ("attention_logits", "g", tensor(2, 5, 3, 4, **HALF), TypeError, "is torch.float16"),
    ("apply_attention", "alpha", None, TypeError, "must be a floating point tensor; got NoneType"),
    (
        "apply_attention",
        "alpha",
        tensor(2, 2, 2, 4),
        ValueError,
        r"must be \[2, 1, \*, \*\] for x \[2, 6, 5, 8\]",
    ),
    ("apply_attention", "alpha", tensor(2, 1, 2), ValueError, r"got shape \[2, 1, 2\]"),
    ("apply_attention", "alpha", tensor(2, 1, 2, 0), ValueError, "can't be resized"),
    ("apply_attention", "alpha", tensor(2, 1, 2, 4, **META), ValueError, "is on meta"),
    # parameters
    ("gate", "psi_weight", None, TypeError, "must be a floating point tensor; got NoneType"),
    ("gate", "psi_weight", tensor(3), ValueError, r"must have shape \[1, 3, 1, 1\]; got \[3\]"),
    (
        "gate",
        "psi_weight",
        tensor(1, 4, 1, 1),
        ValueError,
        r"must have shape \[1, 3, 1, 1\]; got \[1, 4, 1, 1\]",
    ),
    ("gate", "psi_weight", tensor(1, 3, 1, 1, **META), ValueError, "is on meta, the maps are on cpu"),
    ("gate", "psi_bias", tensor(2), ValueError, r"must have shape \[1\]; got \[2\]"),
    ("gate", "psi_bias", 0.5, TypeError, "got float 0.5"),
    ("gate_logits", "psi_bias", tensor(1, **LONG), TypeError, "got a tensor of torch.int64"),
    ("attention_gate", "theta_weight", None, TypeError, "got NoneType"),
    (
        "attention_gate",
        "theta_weight",
        tensor(3, 6, 2),
        ValueError,
        r"must be \[I, C, \*kernel\] with 2 kernel axes",
    ),
    (
        "attention_gate",
        "theta_weight",
        tensor(3, 5, 2, 2),
        ValueError,
        r"must have shape \[3, 6, 2, 2\]; got \[3, 5",
    ),
    ("attention_gate", "theta_weight", tensor(3, 6, 0, 2), ValueError, "of at least 1"),
    ("attention_gate", "phi_weight", tensor(3, 6, 1, 1), ValueError, r"must have shape \[3, 5, 1, 1\]"),
    ("attention_gate", "phi_weight", tensor(3, 5, 2, 2), ValueError, r"must have shape \[3, 5, 1, 1\]"),
    ("attention_gate", "phi_weight", tensor(4, 5, 1, 1), ValueError, r"must have shape \[3, 5, 1, 1\]"),
    ("attention_gate", "bias", tensor(1), ValueError, r"must have shape \[3\]"),
    ("attention_logits", "bias", tensor(3, **LONG), TypeError, "torch.int64"),
    # options
    (
        "gate",
        "phi_resize",
        "cubic",
        ValueError,
        "must be one of 'linear', 'nearest', 'align_corners'; got 'cubic'",
    ),
    ("gate", "alpha_resize", None, ValueError, "got None"),
    ("gate", "activation", "tanh", ValueError, "must be one of 'relu', .*'gelu'; got 'tanh'"),
    ("gate", "activation", ["relu"], ValueError, r"got \['relu'\]"),
    ("attention_gate", "stride", 0, ValueError, "must be an integer of at least 1, or 2 of them; got 0"),
    ("attention_gate", "stride", (2, 2, 2), ValueError, r"got \(2, 2, 2\)"),
    ("attention_gate", "stride", 2.0, ValueError, "got 2.0"),
    ("attention_gate", "stride", True, ValueError, "got True"),
    ("attention_gate", "stride", "2", ValueError, "got '2'"),
    ("attention_gate", "padding", -1, ValueError, "must be an integer of at least 0, or 2 of them; got -1"),
    ("attention_gate", "padding", "same", ValueError, "got 'same'"),
    ("attention_gate", "recompute", "never", ValueError, "must be 'auto', True or False; got 'never'"),
    ("attention_gate", "recompute", 1, ValueError, "got 1"),
    ("attention_logits", "recompute", None, ValueError, "got None"),
    ("apply_attention", "alpha_resize", "bilinear", ValueError, "must be one of 'linear'"),
    (
        "gate",
        "backend",
        "gpu",
        ValueError,
        "must be one of 'auto', 'cpu', 'cuda', 'triton', 'eager'.*; got 'gpu'",  # and what tests register
    ),
    ("gate", "backend", None, ValueError, "got None"),
    ("gate", "backend", "cuda", ValueError, "is 'cuda', which can't be used: .*CUDA|is on cpu"),
    ("gate", "backend", "triton", ValueError, "is 'triton', which can't be used: "),
]


@pytest.mark.parametrize(
    "operator,argument,value,exception,message",
    BAD,
    ids=[f"{b[0]}-{b[1]}-{i}" for i, b in enumerate(BAD)],
)
def test_bad_arguments(operator, argument, value, exception, message):
    tensors, options = arguments_of(operator)
    with pytest.raises(exception, match=f"^{argument} .*({message})"):
        getattr(functional, operator)(**{**tensors, **options, argument: value})


def test_raw_operators_check_what_reaches_memory():
    """torch.ops.attn_gate.* can be called by anybody: shapes, dtypes and devices are checked there again."""
    refuses_what_does_not_fit(torch.ops.attn_gate)
    with pytest.raises(RuntimeError, match="limit is a number of bytes, got -1"):
        torch.ops.attn_gate.keep_memory(-1)


# -------------------------------------------------------------------------------------------------- backends


def test_the_environment_chooses_for_auto(monkeypatch):
    tensors, options = arguments_of("gate")
    monkeypatch.setenv("ATTN_GATE_BACKEND", "eager")
    assert backends.choose("auto", tensors["x"]) == "eager" and backends.choose("cpu", tensors["x"]) == "cpu"
    assert_close(functional.gate(**tensors, **options), reference.gate(**tensors, **options), rtol=0, atol=0)
    monkeypatch.setenv("ATTN_GATE_BACKEND", "gpu")
    with pytest.raises(
        ValueError, match="^the environment variable ATTN_GATE_BACKEND must be one of .*; got 'gpu'"
    ):
        functional.gate(**tensors, **options)
    monkeypatch.setenv("ATTN_GATE_BACKEND", "")
    assert backends.choose("auto", tensors["x"]) == "cpu"


@of_all_operators
def test_devices_without_kernels_run_eager(operator, caplog):
    """Silently: what is skipped, and why, is logged at DEBUG."""
    tensors, options = arguments_of(operator)
    tensors = {name: t if t is None else t.to("meta") for name, t in tensors.items()}
    function = getattr(functional, operator)
    with caplog.at_level(logging.DEBUG, logger="attn_gate"):
        outputs = function(**tensors, **options)
    skipped = [record.getMessage() for record in caplog.records]
    assert sorted(m.split(" is skipped: ")[0] for m in skipped) == ["backend cuda", "backend triton"]
    assert (outputs if isinstance(outputs, torch.Tensor) else outputs[0]).device.type == "meta"
    torch.compile(function, fullgraph=True, backend="eager")(**tensors, **options)


@of_all_operators
def test_every_device_and_backend_of_one_interface(operator):
    """backend="eager" is the reference, bit by bit, for all sizes and layouts of inputs."""
    for case in (SAME, RESIZED, GateCase("1D", (9,), (4,), stride=2)):
        tensors = case.inputs(operator, torch.bfloat16)
        found = results(getattr(functional, operator), tensors, backend="eager", **case.options(operator))
        expected = results(getattr(reference, operator), tensors, **case.options(operator))
        assert all(torch.equal(found[name], t) for name, t in expected.items())


@pytest.fixture(scope="session")  # what is registered stays
def beside():
    """A backend beside the native one: the CPU kernels once more, under another namespace."""
    calls = []

    def implementation(name):
        calls.append(name)
        return getattr(torch.ops.attn_gate, name).default

    namespaces.define("attn_gate_beside", ["cpu"], implementation)
    return backends.Backend("beside", "attn_gate_beside", lambda device, dtype: ""), calls


@of_all_operators
def test_a_backend_beside_the_native_one(operator, beside, monkeypatch):
    """Autograd, compile, func and fake kernels serve it; its implementation is looked for at first use."""
    backend, calls = beside
    monkeypatch.setitem(backends.BACKENDS, backend.name, backend)
    tensors, options = arguments_of(operator)
    looked_for = len(calls)
    expected = results(getattr(functional, operator), tensors, **options)
    assert len(calls) == looked_for
    found = results(getattr(functional, operator), tensors, backend="beside", **options)
    assert all(torch.equal(found[name], t) for name, t in expected.items())
    assert len(calls) == looked_for + 2 and calls[-1].endswith("_bwd")

    first = next(iter(tensors))

    def loss(t):
        outputs = getattr(functional, operator)(**{**tensors, first: t}, backend="beside", **options)
        return sum(o.sum() for o in (outputs if isinstance(outputs, tuple) else (outputs,)))

    expected = torch.func.grad(loss)(tensors[first])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaf = tensors[first].detach().requires_grad_()
    assert_close(torch.autograd.grad(compiled(leaf), leaf)[0], expected)


@pytest.mark.parametrize("padding", [0, 1, (1, 0)])
@pytest.mark.parametrize("operator", ["attention_gate", "attention_logits"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_patches_that_overlap_or_are_padded(operator, padding, dtype):
    """PyTorch's convolution makes theta, the rest is fused."""
    case = GateCase("", (9, 8), (4, 5), kernel=3, stride=2)
    padded = GateCase("", (11, 10), (4, 5), kernel=3, stride=2)  # draws a theta of the right size
    assert padded.theta_size
    tensors = case.inputs(operator, dtype)
    for layout in (lambda t: t, channels_last):
        tensors["x"] = layout(tensors["x"])
        options = {**case.options(operator), "padding": padding}
        found = results(getattr(functional, operator), tensors, **options)
        expected = results(getattr(reference, operator), tensors, **options)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-4
        assert_close(found, expected, rtol=tolerance, atol=tolerance)
