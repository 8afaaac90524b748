"""Products of float32 on matrix units of bfloat16: as exact as float32's own, the same where not finite. And
products of bfloat16 on those, or by the dot products that vectors of some CPUs make."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import mmap

import pytest
import torch
from matrix import LAYOUTS

from attn_gate import AttentionGate, functional, reference
from attn_gate._library import cpu_isa, ops
from attn_gate.cases import GateCase, channels_last

pytestmark = pytest.mark.skipif(cpu_isa() not in ("amx", "avx512_bf16"), reason="this machine has neither")
has_units = pytest.mark.skipif(cpu_isa() != "amx", reason="this machine lends no AMX")

CHANNELS, INTER, SIZE = 192, 192, (15, 17)  # 2^16 weights and more; a tile of voxels and a piece of one


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def inputs(dtype=torch.float32, **replaced):
    """Of attention_logits: x, g and the weights of theta, phi and psi."""
    tensors = {
        "x": torch.randn(2, CHANNELS, *SIZE, dtype=dtype),
        "g": torch.randn(2, CHANNELS, *SIZE, dtype=dtype),
        "theta_weight": torch.randn(INTER, CHANNELS, 1, 1) / CHANNELS**0.5,
        "phi_weight": torch.randn(INTER, CHANNELS, 1, 1) / CHANNELS**0.5,
        "psi_weight": torch.randn(1, INTER, 1, 1),
    }
    return {**tensors, **replaced}


def logits(module, tensors, dtype=None):
    if dtype is not None:
        tensors = {name: t.to(dtype) for name, t in tensors.items()}
    with torch.no_grad():
        return module.attention_logits(**tensors, activation="gelu")


@has_units
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
@pytest.mark.parametrize("arrange", [lambda t: t, channels_last], ids=["contiguous", "channels last"])
def test_as_exact_as_float32(scale, arrange):
    tensors = inputs()
    tensors["x"], tensors["g"] = arrange(tensors["x"] * scale), arrange(tensors["g"])
    tensors["theta_weight"] /= scale
    exact = logits(reference, tensors, torch.float64)
    error, eager = ((logits(way, tensors) - exact).norm() for way in (functional, reference))
    assert 0 < error <= 1.25 * eager


@has_units
@pytest.mark.parametrize(
    "weights,narrow",
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16, torch.float32)]
    + [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float16)],
    ids=str,
)
def test_as_exact_of_narrower_numbers(weights, narrow):
    """Whose products that must be zero are left out."""
    tensors = inputs(narrow)
    for name in ("theta_weight", "phi_weight"):
        tensors[name] = tensors[name].to(weights).float()
    exact = logits(reference, tensors, torch.float64)
    wide = {**tensors, "x": tensors["x"].float(), "g": tensors["g"].float()}
    error, eager = (logits(functional, tensors) - exact).norm(), (logits(reference, wide) - exact).norm()
    assert 0 < error <= 1.25 * eager


def test_all_bits_count():
    """One weight of 1: the logit is that element of the input, to the last bit."""
    for k in (0, 1, 31, 32, CHANNELS - 1):
        theta, psi = torch.zeros(INTER, CHANNELS, 1, 1), torch.zeros(1, INTER, 1, 1)
        theta[5, k], psi[0, 5] = 1, 1
        tensors = inputs(theta_weight=theta, phi_weight=torch.zeros(INTER, CHANNELS, 1, 1), psi_weight=psi)
        tensors["x"] = tensors["x"].abs()
        with torch.no_grad():
            assert torch.equal(functional.attention_logits(**tensors)[:, 0], tensors["x"][:, k])
        # and so is that weight, where the input is 1
        theta[5, k] = 1 + 2**-23
        tensors["x"] = torch.ones(2, CHANNELS, *SIZE)
        with torch.no_grad():
            assert (functional.attention_logits(**tensors) == theta[5, k]).all()


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 1e37, -1e37])
@pytest.mark.parametrize("name", ["x", "g", "theta_weight", "phi_weight"])
@pytest.mark.parametrize("zeros", [False, True])
def test_numbers_that_are_not_finite_come_out_as_in_eager(name, value, zeros):
    """Also those that overflow. Zeros: bfloat16 weights, and inputs, whose products with infinity are NaN."""
    tensors = inputs()
    tensors["psi_weight"].abs_().mul_(0.02)  # infinities don't meet their like, nor does alpha saturate
    if zeros:
        tensors |= {key: (t * 4).round() for key, t in tensors.items() if key != "psi_weight"}
    if abs(value) < float("inf"):  # what it meets is large too
        for other in ("theta_weight", "phi_weight") if "weight" not in name else ("x", "g"):
            tensors[other] *= 1e9
    before, whole = functional.attention_gate(**tensors)[0], tensors[name]
    tensors[name] = spoilt = whole.clone()
    spoilt.view(-1)[spoilt.numel() // 2 + 3] = value
    found, expected = functional.attention_gate(**tensors), reference.attention_gate(**tensors)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    if "weight" not in name:  # the other voxels never met it
        away = (spoilt == whole).all(1, keepdim=True).expand_as(before)
        assert torch.equal(found[0][away], before[away])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_statistics_of_centred_maps(dtype):
    """Off whose mean even a bfloat16 has more bits than one."""
    x, weight = (torch.randn(2, CHANNELS, *SIZE) + 30).to(dtype), torch.randn(INTER, CHANNELS, 1, 1)
    weight = torch.cat((weight, weight.flip(0)))  # 2^16 weights
    centre = x.double().mean((0, 2, 3)).float()
    mean, var = ops.projection_statistics(x, weight, centre, [1, 1])
    exact = torch.conv2d(x.double() - centre.view(-1, 1, 1), weight.double())
    torch.testing.assert_close(var, exact.var((0, 2, 3), correction=0), rtol=1e-5, atol=0)
    torch.testing.assert_close(mean, exact.mean((0, 2, 3)), rtol=0, atol=1e-4)


def test_an_order_of_sums_that_overflows():
    """The units sum even and odd channels apart: both overflow here, and relu would make -infinity a 0."""
    theta, psi = torch.zeros(INTER, CHANNELS, 1, 1), torch.zeros(1, INTER, 1, 1)
    theta[5, :8], psi[0, 5] = 1, 1e-38
    x = torch.zeros(2, CHANNELS, *SIZE)
    x[:, :8] = 1e38 * torch.tensor([-2.0, 1, -2, 1, 2, -1, 2, 0]).view(-1, 1, 1)
    tensors = inputs(x=x, theta_weight=theta, phi_weight=torch.zeros_like(theta), psi_weight=psi)
    for activation in ("relu", "softplus", "leaky_relu"):
        found = functional.attention_logits(**tensors, activation=activation)
        torch.testing.assert_close(found, reference.attention_logits(**tensors, activation=activation))


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        GateCase("several blocks, rows that fill up", (9, 13), (9, 13), channels=150, gating=170, inter=129),
        GateCase("patches", (10, 26), (5, 13), channels=100, gating=90, inter=97, kernel=2, stride=2),
    ],
    ids=lambda case: case.name,
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_mended_whatever_the_gate(case, layout, dtype, value):
    tensors = case.inputs("attention_logits", dtype, layout)
    tensors["psi_weight"] = tensors["psi_weight"].abs()
    for name in ("x", "g"):
        spoilt = tensors[name].clone()
        spoilt[1, 3, 2, 5] = value
        spoilt[0, 2, 4, 12] = value
        call = {**tensors, name: spoilt}
        found = functional.attention_logits(**call, **case.options("attention_logits"))
        expected = reference.attention_logits(**call, **case.options("attention_logits"))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


# Two rows of the product's depth are a pair, as they lie in memory or made so; odd ones, a part that begins
# within a pair, blocks of the depth, steps of it and tiles of voxels that are filled up.
PAIRS = [
    GateCase("an odd row is last", (9, 13), (9, 13), channels=40, gating=33, inter=40),
    GateCase("no pairs: an odd row is first", (9, 13), (9, 13), channels=33, gating=40, inter=40),
    GateCase("blocks", (21, 13), (21, 13), channels=150, gating=301, inter=40),
    GateCase("shallow", (37, 29), (37, 29), channels=18, gating=18, inter=3),
    GateCase("shallow in 3D", (5, 7, 23), (5, 7, 23), channels=20, gating=14, inter=9),
    GateCase("patches", (18, 26), (9, 13), channels=15, gating=21, inter=36, kernel=2, stride=2),
    GateCase(
        "patches in whole vectors", (18, 64), (9, 32), channels=15, gating=21, inter=36, kernel=2, stride=2
    ),
    GateCase("patches in 3D", (6, 10, 34), (3, 5, 17), channels=5, gating=12, inter=36, kernel=2, stride=2),
    GateCase("strides", (18, 26), (9, 13), channels=40, gating=22, inter=36, stride=2),
]


@pytest.mark.parametrize("case", PAIRS, ids=lambda case: case.name)
@pytest.mark.parametrize(
    "layout", ["contiguous", "channels last", "odd offsets", "odd offsets, channels last"]
)
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=str)
def test_pairs_of_bfloat16(case, layout, weights):
    """alpha as exact as float32's."""
    tensors = case.inputs("attention_gate", torch.bfloat16)
    for name, arrange in zip("xg", LAYOUTS[layout], strict=False):
        tensors[name] = arrange(tensors[name])
    for name in ("theta_weight", "phi_weight"):
        tensors[name] = tensors[name].to(weights).float()
    _, alpha = functional.attention_gate(**tensors, **case.options("attention_gate"))
    exact = {name: t if t is None else t.double() for name, t in tensors.items()}
    _, expected = reference.attention_gate(**exact, **case.options("attention_gate"))
    torch.testing.assert_close(alpha.double(), expected, rtol=3e-6, atol=1e-6)


@pytest.mark.skipif(cpu_isa() != "avx512_bf16", reason="vectors make no dot products here")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_dot_products_are_made(layout):
    """To which subnormals are zeros."""
    case = GateCase("", (9, 13), (9, 13), channels=40, gating=30, inter=20, bias=False, psi_bias=False)
    tensors = case.inputs("attention_logits", torch.bfloat16, layout)
    tensors["x"], tensors["g"] = (torch.full_like(tensors[name], 1e-39) for name in "xg")
    for name in ("theta_weight", "phi_weight", "psi_weight"):
        tensors[name] = torch.full_like(tensors[name], 2.0**60)
    narrow = functional.attention_logits(**tensors, **case.options("attention_logits"))
    tensors["theta_weight"] *= 1 + 2**-20
    wide = functional.attention_logits(**tensors, **case.options("attention_logits"))
    assert (narrow == 0).all() and (wide > 0).all()


def before_a_guard(t):
    """The same where memory ends, so that reading beyond it is a crash."""
    pages = -(-t.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    end = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages)
    assert ctypes.CDLL(None).mprotect(end, mmap.PAGESIZE, 0) == 0
    flat = torch.frombuffer(memory, dtype=t.dtype, offset=pages - t.nbytes, count=t.numel())
    return flat.as_strided(t.shape, t.stride()).copy_(t)


@pytest.mark.parametrize("case", PAIRS, ids=lambda case: case.name)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_nothing_beyond_a_map_is_read(case, layout):
    tensors = case.inputs("attention_gate", torch.bfloat16)
    expected = functional.attention_gate(**tensors, **case.options("attention_gate"))
    for name, arrange in zip("xg", LAYOUTS[layout], strict=False):
        tensors[name] = before_a_guard(arrange(tensors[name]))
    found = functional.attention_gate(**tensors, **case.options("attention_gate"))
    torch.testing.assert_close(found, expected)


# Weight gradients that are summed in each tile, or in a pass of their own; depths, inter channels and voxels
# that are no whole steps.
STEPS = [
    GateCase("one tile", (9, 13), (9, 13), channels=45, gating=50, inter=33, activation="gelu"),
    GateCase("tiles", (31, 29), (31, 29), channels=70, gating=75, inter=70, activation="gelu"),
    GateCase("sums apart", (9, 13), (9, 13), channels=250, gating=260, inter=200, activation="gelu"),
    GateCase(
        "patches", (26, 34), (13, 17), channels=40, gating=50, inter=33, kernel=2, stride=2, activation="gelu"
    ),
    GateCase("phi resized", (14, 26), (7, 13), channels=70, gating=50, inter=40, activation="gelu"),
]


def step(module, case, tensors, dtype=None):
    """Gradients of all inputs but psi_bias, for which there is no product."""
    leaves = {
        name: (t if dtype is None else t.to(dtype)).detach().requires_grad_()
        for name, t in tensors.items()
        if t is not None
    }
    options = {"recompute": True} if module is functional else {}  # a stored s would be rounded
    outputs = module.attention_gate(**leaves, **case.options("attention_gate"), **options)
    torch.manual_seed(1)
    slopes = [torch.randn(y.shape).bfloat16().to(y.dtype) for y in outputs]
    del leaves["psi_bias"]
    found = torch.autograd.grad(outputs, list(leaves.values()), slopes)
    return dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("case", STEPS, ids=lambda case: case.name)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_as_exact_as_float32(case, layout):
    tensors = case.inputs("attention_gate", torch.float32, layout)
    exact = step(reference, case, tensors, torch.float64)
    found, eager = (step(module, case, tensors) for module in (functional, reference))
    for name, true in exact.items():
        error, allowed = ((way[name] - true).norm() for way in (found, eager))
        assert 0 < error <= 3 * allowed, name


@pytest.mark.parametrize("case", STEPS, ids=lambda case: case.name)
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=str)
def test_gradients_of_bfloat16_maps(case, weights):
    """Parameters' gradients lose what two bfloat16, of dot products one, can't hold; maps' their rounding."""
    tensors = case.inputs("attention_gate", torch.bfloat16, "contiguous")
    for name in ("theta_weight", "phi_weight"):
        tensors[name] = tensors[name].to(weights).float()
    exact = step(reference, case, tensors, torch.float64)
    for name, found in step(functional, case, tensors).items():
        error = ((found - exact[name]).norm() / exact[name].norm()).item()
        # phi on a grid of its own is a bfloat16 map, and so is its gradient
        rounded = found.dtype == torch.bfloat16 or case.name == "phi resized"
        rounded |= weights == torch.bfloat16 and cpu_isa() == "avx512_bf16"
        assert error <= (4e-3 if rounded else 4e-5), (name, error)
        if cpu_isa() == "avx512_bf16" and name == "theta_weight" and case.name in ("tiles", "patches"):
            assert (error > 1e-4) == (weights == torch.bfloat16)  # dot products were made


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 1e37])
@pytest.mark.parametrize("name", ["x", "g", "theta_weight", "phi_weight"])
@pytest.mark.parametrize("case", STEPS[1:3], ids=lambda case: case.name)
def test_gradients_are_not_finite_where_they_are_not_in_eager(case, name, value):
    tensors = case.inputs("attention_gate", torch.float32, "contiguous")
    tensors[name] = spoilt = tensors[name].clone()
    spoilt.view(-1)[spoilt.numel() // 2 + 3] = value
    found, expected = (step(module, case, tensors) for module in (functional, reference))
    for key, true in expected.items():
        finite = true.isfinite()
        assert torch.equal(found[key].isfinite(), finite), key
        scale = true[finite].abs().max().item() if finite.any() else 1
        torch.testing.assert_close(found[key][finite], true[finite], rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("channels", "gating", "inter", "g_size"),
    [(70, 75, 45, (16, 18)), (250, 255, 45, (16, 18)), (24, 258, 64, (8, 9)), (24, 512, 64, (8, 9))],
    ids=["summed in tiles", "sums apart", "g of two blocks on its own grid", "the same of whole steps"],
)
def test_gradients_behind_batch_norms(channels, gating, inter, g_size, layout):
    """theta and phi are made apart there, and have gradients of their own."""
    gate = AttentionGate(channels, gating, inter, preset="same_grid", psi_norm="none", recompute=True)
    gate.spec = dataclasses.replace(gate.spec, activation="gelu", phi_resize="linear")
    x, slope = (torch.randn(2, channels, 16, 18) + 3 for _ in range(2))
    g = torch.randn(2, gating, *g_size) + 3
    if layout == "channels_last":
        x, g, slope = (channels_last(t) for t in (x, g, slope))
    assert gate.fusion(x, g).plan == "whole_moments"

    def gradients(gate, dtype):
        gate, inputs = copy.deepcopy(gate).to(dtype), [t.to(dtype).requires_grad_() for t in (x, g)]
        parameters = [p for name, p in gate.named_parameters() if "weight" in name]
        return torch.autograd.grad(gate(*inputs), [*inputs, *parameters], slope.to(dtype))

    found = gradients(gate, torch.float32)
    gate.backend = "eager"
    exact, eager = (gradients(gate, dtype) for dtype in (torch.float64, torch.float32))
    for ours, theirs, true in zip(found, eager, exact, strict=True):
        assert (ours - true).norm() <= 3 * (theirs - true).norm() + 1e-6 * true.norm()
