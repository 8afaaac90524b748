"""Forward and all gradients of every operator, by the float64 reference; CI runs it under sanitizers."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from matrix import BACKENDS, BLOCKS, DTYPES, EDGES, LARGE, LAYOUTS, PANELS, compare, recomputes, results

from attn_gate import backends, functional, reference
from attn_gate._library import ops
from attn_gate.cases import CASES, OPERATORS, channels_last
from attn_gate.judge import judge


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("case", CASES + EDGES + PANELS, ids=lambda case: case.name)
def test_small(case, operator, dtype, backend):
    if reason := backends.BACKENDS[backend].why_not(torch.device(backends.device_of(backend)), dtype):
        pytest.skip(reason)
    for options in recomputes(operator):
        for layout in LAYOUTS:
            compare(case, operator, dtype, layout, backend=backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_large(case, operator, backend):
    for options in recomputes(operator):
        for layout in ("contiguous", "channels last"):
            compare(case, operator, torch.float32, layout, backend=backend, **options)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize(
    "operator,dtype",
    [
        ("attention_gate", torch.float32),
        ("attention_gate", torch.bfloat16),
        ("attention_logits", torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", BLOCKS, ids=lambda case: case.name)
def test_blocks_of_the_depth(case, operator, dtype, layout):
    for options in recomputes(operator):
        compare(case, operator, dtype, layout, **options)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operator", ["gate", "attention_gate"])
@pytest.mark.parametrize("case", [CASES[0], *PANELS], ids=lambda case: case.name)
def test_16_bits_are_float32_rounded_to_nearest(case, operator, dtype, layout):
    """Rounding down stays within what a comparison allows, but is twice as wrong, and all to one side."""
    narrow = case.inputs(operator, dtype, layout)
    wide = {name: t if t is None else t.float() for name, t in narrow.items()}
    call, options = getattr(functional, operator), case.options(operator)
    exact = results(call, wide, **options)
    for name, found in results(call, narrow, **options).items():
        if name == "alpha":  # float32, and perhaps not by the same instructions
            torch.testing.assert_close(found, exact[name], rtol=1e-5, atol=1e-6)
        # dx of patches is a sum of two parts, each of which is rounded.
        if name in ("y", "d g") or (name == "d x" and (operator == "gate" or case.kernel == 1)):
            assert (found == exact[name].to(found.dtype)).double().mean() > 0.99, name


# ---- moments: the native kernels alone have them

# x [N, C, *S], kernel and stride
MOMENTS = [
    ((2, 16, 9, 13), 1, 1),
    ((3, 5, 37), 1, 1),
    ((1, 1, 1, 2), 1, 1),
    ((2, 7, 11, 17), 2, 2),
    ((2, 3, 7, 8, 9), (1, 2, 2), (3, 2, 4)),
    ((1, 49, 21, 20), 1, 1),
    ((2, 97, 5, 6), 1, 1),
    ((1, 33, 67, 129), 1, 1),
    ((1, 70, 20, 21), 2, 3),
    ((4, 3, 13, 24, 30), 1, 1),
]


def moments_and_gradient(function, x, kernel, stride):
    leaf = x.detach().requires_grad_()
    mean, cov = function(leaf, kernel, stride)
    generator = torch.Generator().manual_seed(1)
    slopes = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in (mean, cov)]
    (dx,) = torch.autograd.grad([mean, cov], [leaf], slopes)
    return {"mean": mean, "cov": cov, "d x": dx}


@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape,kernel,stride", MOMENTS, ids=str)
def test_moments(shape, kernel, stride, dtype, offset):
    if offset and dtype == torch.float64:
        pytest.skip("the reference is no more exact than what it would judge")
    x = (torch.randn(shape, dtype=torch.float64) + offset).to(dtype)
    exact = moments_and_gradient(reference.moments, x.double(), kernel, stride)
    eager = moments_and_gradient(reference.moments, x, kernel, stride)
    for name, (arrange, *_) in LAYOUTS.items():
        found = moments_and_gradient(functional.moments, arrange(x), kernel, stride)
        wrong = [result for result in judge(found, eager, exact, dtype) if not result.ok]
        assert not wrong, (name, wrong)
        assert torch.equal(found["cov"], found["cov"].T) and (found["cov"].diagonal() >= 0).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_moments_have_the_same_bits_on_any_number_of_threads(layout):
    x = LAYOUTS[layout][0](torch.randn(3, 20, 101, 97))
    torch.set_num_threads(1)
    one = moments_and_gradient(functional.moments, x, 1, 1)
    torch.set_num_threads(2)
    for _ in range(3):
        two = moments_and_gradient(functional.moments, x, 1, 1)
        assert all(torch.equal(one[name], two[name]) for name in one)


# ---- batch norms in training mode: the native kernels alone have their passes


def in_two_axes(case, dtype, arrange):
    """The case's tensors, 1D ones as 2D, and its stride for each axis."""
    tensors = case.inputs("attention_gate", dtype)
    stride = case.stride if isinstance(case.stride, tuple) else (case.stride,) * case.axes
    if case.axes == 1:
        stride = (1, *stride)
        lifted = {"x", "g", "theta_weight", "phi_weight", "psi_weight"}
        tensors = {k: t.unsqueeze(2) if k in lifted else t for k, t in tensors.items()}
    maps = {k: arrange(tensors[k]) for k in ("x", "g")}
    return {**tensors, **maps}, list(stride)


class Normed:
    """A whole gate with batch norms behind theta and phi: what is drawn for it, and all gradients for given
    ones of y and of the logits."""

    def __init__(self, case, dtype, arrange=lambda t: t, norms=("theta", "phi"), far=0.0):
        torch.manual_seed(5)
        self.case, self.norms = case, norms
        self.tensors, self.stride = in_two_axes(case, dtype, arrange)
        x, g = self.tensors["x"], self.tensors["g"]
        x += far
        g -= far
        self.acc = acc = torch.promote_types(dtype, torch.float32)
        inter = case.inter
        self.beta = torch.randn(inter, dtype=acc)
        self.scale = {"theta": torch.randn(inter, dtype=acc), "phi": torch.randn(inter, dtype=acc)}
        coarse = reference.attention_logits(x, g, *self.weights(), stride=self.stride, **self.options())
        self.alpha, self.dlogits = torch.rand_like(coarse), arrange(torch.randn_like(coarse))
        self.dy = arrange(torch.randn_like(x))

    def options(self):
        return {"phi_resize": self.case.phi_resize, "activation": self.case.activation}

    def weights(self):
        return tuple(self.tensors[f"{name}_weight"] for name in ("theta", "phi", "psi"))

    def to(self, dtype):
        """The same numbers in another dtype, for PyTorch's layers to compute with."""
        other = copy.copy(self)
        other.acc = torch.promote_types(dtype, torch.float32)
        maps = {k: self.tensors[k].to(dtype) for k in ("x", "g")}
        other.tensors = {k: t if t is None else t.to(other.acc) for k, t in self.tensors.items()} | maps
        other.scale = {k: t.to(other.acc) for k, t in self.scale.items()}
        for name in ("beta", "alpha", "dlogits"):
            setattr(other, name, getattr(self, name).to(other.acc))
        other.dy = self.dy.to(dtype)
        return other

    def by_autograd(self):
        x, g, beta = (t.detach().requires_grad_() for t in (self.tensors["x"], self.tensors["g"], self.beta))
        theta_weight, phi_weight, psi_weight = (t.detach().requires_grad_() for t in self.weights())
        scale = {k: t.detach().requires_grad_() for k, t in self.scale.items()}
        conv = F.conv2d if x.ndim == 4 else F.conv3d
        maps = {
            "theta": conv(x.to(self.acc), theta_weight, stride=self.stride),
            "phi": conv(g.to(self.acc), phi_weight),
        }
        for name in self.norms:
            maps[name] = F.batch_norm(maps[name], None, None, scale[name], None, True)
        maps["theta"] = maps["theta"] + beta.view(-1, *[1] * (x.ndim - 2))
        logits = reference.gate_logits(maps["theta"], maps["phi"], psi_weight, **self.options())
        y = reference.apply_attention(x, self.alpha, alpha_resize=self.case.alpha_resize)
        leaves = {
            "x": x, "g": g, "theta_weight": theta_weight, "phi_weight": phi_weight, "bias": beta,
            "psi_weight": psi_weight, **{f"{k}_scale": scale[k] for k in self.norms},
        }  # fmt: skip
        found = torch.autograd.grad([logits, y], list(leaves.values()), [self.dlogits, self.dy])
        return {f"d {name}": t for name, t in zip(leaves, found, strict=True)}

    def by_kernels(self, centred=True):
        """dx, ... of `ops.attention_train_bwd`, as gradients of the projections' own weights."""
        x, g = self.tensors["x"], self.tensors["g"]
        parts, inverse = {}, {}
        for name, of in (("theta", x), ("phi", g)):
            weight = self.tensors[f"{name}_weight"]
            rows = of.double().mean((0, *range(2, of.ndim))).to(self.acc)
            centre = rows.repeat_interleave(weight[0, 0].numel()) if centred and name in self.norms else None
            norm, inverse[name] = None, torch.ones(weight.shape[0], dtype=torch.float64)
            if name in self.norms:
                stride = self.stride if name == "theta" else [1] * len(self.stride)
                mean, var = ops.projection_statistics(of, weight, centre, stride)
                inverse[name] = (var + 1e-5).rsqrt()
                norm = torch.stack((-mean * inverse[name], self.scale[name].double())).to(self.acc)
            column = inverse[name].view(-1, *[1] * (weight.ndim - 1))
            parts[name] = centre, (weight.double() * column).to(self.acc), norm
        (cx, wx, nx), (cg, wg, ng) = parts["theta"], parts["phi"]
        psi = self.tensors["psi_weight"]
        dx, dg, dwx, dwg, dsx, dsg, dbias, dpsi, _ = ops.attention_train_bwd(
            self.dy, self.dlogits, x, g, cx, cg, wx, wg, nx, ng, self.beta, psi.flatten(), self.alpha,
            self.stride, self.case.phi_resize, self.case.alpha_resize, self.case.activation, 511,
        )  # fmt: skip
        columns = [inverse[k].view(-1, *[1] * (x.ndim - 1)) for k in ("theta", "phi")]
        scales = {"d theta_scale": dsx, "d phi_scale": dsg}
        return {
            "d x": dx, "d g": dg, "d theta_weight": (dwx * columns[0]).to(self.acc),
            "d phi_weight": (dwg * columns[1]).to(self.acc), "d bias": dbias,
            "d psi_weight": dpsi.view_as(psi),
            **{f"d {k}_scale": scales[f"d {k}_scale"] for k in self.norms},
        }  # fmt: skip


@pytest.mark.parametrize("norms", [("theta", "phi"), ("theta",), ("phi",), ()], ids=str)
@pytest.mark.parametrize("case", CASES + EDGES + PANELS, ids=lambda case: case.name)
def test_backward_of_batch_norms(case, norms):
    """In float64, of few enough values that a batch norm's gradient isn't all rounding."""
    gate = Normed(case, torch.float64, norms=norms)
    for arrange in (lambda t: t, channels_last):
        gate.tensors["x"], gate.tensors["g"] = arrange(gate.tensors["x"]), arrange(gate.tensors["g"])
        expected = gate.by_autograd()
        for centred in (True, False):
            for name, t in gate.by_kernels(centred).items():
                torch.testing.assert_close(
                    t, expected[name], rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
                )


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "x channels last", "odd offsets"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", PANELS + BLOCKS[2:] + LARGE, ids=lambda case: case.name)
def test_backward_of_batch_norms_in_tiles(case, dtype, layout):
    if dtype != torch.float32:  # maps between the passes are rounded, which would decide relu's slope
        case = replace(case, activation="gelu")
    gate = Normed(case, dtype, LAYOUTS[layout][0])
    exact, eager = gate.to(torch.float64).by_autograd(), gate.to(dtype).by_autograd()
    for centred in (True, False):
        wrong = [j for j in judge(gate.by_kernels(centred), eager, exact, dtype) if not j.ok]
        assert not wrong, wrong


@pytest.mark.parametrize("far", [0, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PANELS + BLOCKS[2:] + LARGE + EDGES[:6], ids=lambda case: case.name)
def test_statistics_of_a_projection(case, dtype, far):
    tensors, stride = in_two_axes(case, dtype, lambda t: t)
    x, weight = tensors["x"] + far, tensors["theta_weight"]
    conv = F.conv2d if x.ndim == 4 else F.conv3d
    theta = conv(x.double(), weight.double(), stride=stride).transpose(0, 1).flatten(1)
    centre = torch.full((weight[0].numel(),), float(far), dtype=weight.dtype)
    for arranged in (x, channels_last(x)):
        mean, var = ops.projection_statistics(arranged, weight, centre if far else None, stride)
        mean = mean + weight.double().flatten(1).sum(1) * far
        digits = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(mean, theta.mean(1), rtol=digits, atol=digits)
        torch.testing.assert_close(var, theta.var(1, correction=0), rtol=4 * digits, atol=digits)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "odd offsets"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape,kernel", [((2, 600, 13, 15), 1), ((1, 160, 14, 64), 2)], ids=str)
def test_statistics_of_large_projections(shape, kernel, dtype, layout, centred):
    """Of more than a MiB of weights, in blocks of the depth."""
    x = torch.randn(shape).to(dtype)
    weight = torch.randn(500, shape[1], kernel, kernel, dtype=reference.accumulation_dtype(x)) / 25
    centre = torch.randn(weight[0].numel(), dtype=weight.dtype) if centred else None
    projected = F.conv2d(x.double(), weight.double(), stride=kernel)
    if centred:
        projected = projected - (weight.flatten(1).double() @ centre.double())[:, None, None]
    var, mean = torch.var_mean(projected, (0, 2, 3), correction=0)
    found = ops.projection_statistics(LAYOUTS[layout][0](x), weight, centre, [kernel, kernel])
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found, (mean, var), **tolerance)


def test_batch_norms_have_the_same_bits_on_any_number_of_threads():
    gate = Normed(LARGE[0], torch.float32)
    torch.set_num_threads(1)
    one = gate.by_kernels()
    torch.set_num_threads(2)
    for _ in range(3):
        two = gate.by_kernels()
        assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("case", CASES + EDGES + BLOCKS[2:], ids=lambda case: case.name)
def test_logits_of_what_is_centred(case):
    """W (x - c) + (b + W c) is the same gate."""
    tensors, stride = in_two_axes(case, torch.float64, lambda t: t)
    x, g, theta, phi, psi, bias, psi_bias = tensors.values()
    options = stride, case.phi_resize, case.activation
    expected, _ = ops.attention_logits_fwd(x, g, theta, phi, bias, psi.flatten(), psi_bias, *options, False)
    centres = torch.randn(theta[0].numel(), dtype=x.dtype), torch.randn(g.shape[1], dtype=x.dtype)
    shift = theta.flatten(1) @ centres[0] + phi.flatten(1) @ centres[1]
    bias = shift if bias is None else bias + shift
    found = ops.attention_train_fwd(x, g, *centres, theta, phi, bias, psi.flatten(), psi_bias, *options)
    torch.testing.assert_close(found, expected)
