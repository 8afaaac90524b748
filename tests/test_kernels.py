"""Forward and all gradients of every operator, by the float64 reference; CI runs it under sanitizers."""

from __future__ import annotations

import pytest
import torch
from matrix import BACKENDS, DTYPES, EDGES, LARGE, LAYOUTS, PANELS, compare, recomputes, results

from attn_gate import backends, functional, reference
from attn_gate._library import ops
from attn_gate.cases import CASES, OPERATORS
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
        # dx of patches is a sum of two parts, each of which is rounded.
        if name in ("y", "alpha", "d g") or (name == "d x" and (operator == "gate" or case.kernel == 1)):
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


def test_moments_gradient_is_added_onto_what_is_there():
    x = torch.randn(2, 19, 8, 9)
    mean, _ = ops.moments_fwd(x, [2, 2], [3, 2])
    start = torch.randn_like(x)
    slope = torch.randn(76, 76, dtype=torch.float64)
    alone = ops.moments_bwd(mean, slope, x, mean, [2, 2], [3, 2], 1)
    onto = start.clone()
    ops.moments_add_bwd(onto, mean, slope, x, mean, [2, 2], [3, 2])
    torch.testing.assert_close(onto, start + alone)


@pytest.mark.parametrize("case", CASES + EDGES, ids=lambda case: case.name)
def test_backward_of_given_logits(case):
    """Of y for given gradients of the logits: the sum of what gate_apply and attention_logits have."""
    tensors = case.inputs("attention_gate", torch.float64)
    if case.axes == 1:
        tensors = {k: t.unsqueeze(2) if k in ("x", "g", "theta_weight") else t for k, t in tensors.items()}
        tensors["phi_weight"] = tensors["phi_weight"].unsqueeze(2)
    stride = case.stride if isinstance(case.stride, tuple) else (case.stride,) * case.axes
    stride = [1, *stride] if case.axes == 1 else list(stride)
    x, g, theta, phi, psi, bias, psi_bias = tensors.values()
    args = x, g, theta, phi, bias, psi.flatten()
    logits, empty = ops.attention_logits_fwd(*args, psi_bias, stride, case.phi_resize, case.activation, False)
    alpha, dy, dlogits = logits.sigmoid(), torch.randn_like(x), torch.randn_like(logits)
    options = stride, case.phi_resize, case.alpha_resize, case.activation
    centre_x = torch.randn(theta[0].numel(), dtype=torch.float64)
    centre_g = torch.randn(g.shape[1], dtype=torch.float64)
    # W (x - c) + (b + W c) is the same gate; its weights have other gradients.
    shift = theta.flatten(1) @ centre_x + phi.flatten(1) @ centre_g
    centred = *args[:4], shift if bias is None else bias + shift, args[5]
    front, parameters = (*centred[:2], centre_x, centre_g), centred[2:]
    same = ops.attention_train_fwd(*front, *parameters, psi_bias, *options[:2], case.activation)
    torch.testing.assert_close(same, logits)
    found = list(ops.attention_train_bwd(dy, dlogits, *front, *parameters, alpha, *options, 127))
    found[2] = found[2] + torch.outer(found[4], centre_x).view_as(theta)
    found[3] = found[3] + torch.outer(found[4], centre_g).view_as(phi)
    dx, _ = ops.gate_apply_bwd(dy, x, alpha, case.alpha_resize, 1)
    parts = ops.attention_logits_bwd(dlogits, *args, empty, stride, case.phi_resize, case.activation, 127)
    for ours, theirs in zip(found, (parts[0] + dx, *parts[1:]), strict=True):
        torch.testing.assert_close(ours, theirs)
