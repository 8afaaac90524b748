"""The ground truth against graphs written once more, in plain PyTorch from their descriptions, in float64.

One test for each family of published gates that GateSpec covers. They share no code with the package: strided
1x1 convolutions are slices, "same" padding is written out, a transposed convolution is the gradient of a
convolution.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attn_gate import eager, reference
from attn_gate.module import AttentionGate
from attn_gate.norms import BiasedBatchNorm

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make(c, g, i, **spec):
    """A gate whose norms have seen something: random scales, shifts and statistics."""
    gate = AttentionGate(c, g, i, backend="eager", **spec)
    for layer in gate.modules():
        if isinstance(layer, (nn.modules.batchnorm._NormBase, nn.GroupNorm)):
            for t in (layer.weight, layer.bias, getattr(layer, "running_mean", None)):
                if t is not None:
                    t.data.normal_()
            if getattr(layer, "running_var", None) is not None:
                layer.running_var.uniform_(0.5, 2)
    return gate


def pointwise(t, layer):
    """A 1x1 convolution, as a matrix product over channels."""
    y = torch.einsum("nc...,ic->ni...", t, layer.weight.flatten(1))
    return y if layer.bias is None else y + layer.bias.view(-1, *(1,) * (t.ndim - 2))


def lin(t, like, align_corners=False):
    return F.interpolate(t, size=like.shape[2:], mode=LINEAR[t.ndim - 2], align_corners=align_corners)


def norm(t, layer, axes, training=True):
    """(t - mean) / sqrt(var + eps) * weight + bias over these axes, or with the running statistics."""
    shape = (1, -1, *(1,) * (t.ndim - 2))
    if training:
        mean, var = t.mean(axes, keepdim=True), t.var(axes, unbiased=False, keepdim=True)
    else:
        mean, var = layer.running_mean.view(shape), layer.running_var.view(shape)
    return (t - mean) / torch.sqrt(var + layer.eps) * layer.weight.view(shape) + layer.bias.view(shape)


def batch_norm(t, layer):
    return norm(t, layer, (0, *range(2, t.ndim)), layer.training)


def instance_norm(t, layer):
    return norm(t, layer, tuple(range(2, t.ndim)))


def same_transposed(t, layer, stride):
    """TensorFlow's SAME transposed convolution: the gradient of a SAME convolution with this stride."""
    size = [n * stride for n in t.shape[2:]]
    image = torch.zeros(t.shape[0], layer.weight.shape[1], *size, requires_grad=True)
    pads = (1, 1) if stride == 1 else (0, 1)  # kernel 3, stride 1 or 2, size a multiple of the stride
    down = CONV[t.ndim - 2](F.pad(image, pads * (t.ndim - 2)), layer.weight, stride=stride)
    (y,) = torch.autograd.grad(down, image, t)
    return y + layer.bias.view(-1, *(1,) * (t.ndim - 2))


def check(gate, x, g, y, alpha):
    got_y, got_alpha = gate(x, g, return_attention=True)
    torch.testing.assert_close(got_alpha, alpha, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_y, y, rtol=1e-12, atol=1e-12)


def images(c, x_size, g_channels, g_size):
    return torch.randn(2, c, *x_size), torch.randn(2, g_channels, *g_size)


# ---- PyTorch families


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [(8,), (8, 6), (9, 7), (4, 6, 5)])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("activation", ["relu", "softplus"])
def test_paper_code(training, size, align_corners, activation):
    """theta k = s = 2 without bias, W = convolution and batch norm; any size; both alignments (ivadomed)."""
    mode = "align_corners" if align_corners else "linear"
    gate = make(
        6,
        5,
        3,
        spatial_dims=len(size),
        phi_resize=mode,
        alpha_resize=mode,
        activation=activation,
        output="conv_norm",
    ).train(training)
    x, g = images(6, size, 5, [max(1, n // 3) for n in size])
    theta = CONV[len(size)](x, gate.theta.weight, stride=2)
    f = getattr(F, activation)(theta + lin(pointwise(g, gate.phi), theta, align_corners))
    alpha = torch.sigmoid(pointwise(f, gate.psi))
    y = batch_norm(pointwise(x * lin(alpha, x, align_corners), gate.W[0]), gate.W[1])
    check(gate, x, g, y, alpha)


@pytest.mark.parametrize("normaliser", ["softmax", "mean", "mean_flow", "range"])
def test_sononet(normaliser):
    """theta and phi both k = s, no biases but psi's, a normaliser over the voxels, no W."""
    gate = make(4, 6, 3, phi_kernel=2, phi_stride=2, phi_bias=False, normaliser=normaliser)
    x, g = images(4, (8, 10), 6, (4, 6))
    theta = F.conv2d(x, gate.theta.weight, stride=2)
    q = pointwise(F.relu(theta + lin(F.conv2d(g, gate.phi.weight, stride=2), theta)), gate.psi)
    flat = q.reshape(2, -1)
    if normaliser == "softmax":
        flat = flat.exp() / flat.exp().sum(1, keepdim=True)
    elif normaliser == "mean":
        flat = flat / flat.sum(1, keepdim=True)
    else:
        lowest = torch.stack([row.min() for row in flat])[:, None]
        highest = torch.stack([row.max() for row in flat])[:, None]
        scale = (flat - lowest).sum(1, keepdim=True) if normaliser == "mean_flow" else highest - lowest
        flat = (flat - lowest) / scale
    alpha = flat.view_as(q)
    check(gate, x, g, x * lin(alpha, x), alpha)


def test_canet_theta_bias_on_one_grid_with_coarse_g():
    gate = make(4, 6, 4, theta_kernel=1, theta_stride=1, theta_bias=True)
    x, g = images(4, (8, 9), 6, (3, 5))
    alpha = torch.sigmoid(
        pointwise(F.relu(pointwise(x, gate.theta) + lin(pointwise(g, gate.phi), x)), gate.psi)
    )
    check(gate, x, g, x * alpha, alpha)


def test_aesrgan_phi_comes_down_by_a_broken_ratio():
    gate = make(4, 6, 4, output="conv_norm").eval()
    x, g = images(4, (8, 8), 6, (6, 7))  # theta's grid is 4x4
    theta = F.conv2d(x, gate.theta.weight, stride=2)
    alpha = torch.sigmoid(pointwise(F.relu(theta + lin(pointwise(g, gate.phi), theta)), gate.psi))
    check(gate, x, g, batch_norm(pointwise(x * lin(alpha, x), gate.W[0]), gate.W[1]), alpha)


def test_advanced_nnunet():
    """theta k = 3 with stride per axis, padding 1 and bias; W with instance norm."""
    spec = {"theta_kernel": 3, "theta_stride": (1, 2, 2), "theta_padding": "symmetric", "theta_bias": True}
    gate = make(4, 5, 3, spatial_dims=3, output="conv_norm", output_norm="instance", **spec)
    x, g = images(4, (3, 7, 6), 5, (3, 4, 3))
    theta = F.conv3d(F.pad(x, (1,) * 6), gate.theta.weight, gate.theta.bias, stride=(1, 2, 2))
    alpha = torch.sigmoid(pointwise(F.relu(theta + lin(pointwise(g, gate.phi), theta)), gate.psi))
    y = instance_norm(pointwise(x * lin(alpha, x), gate.W[0]), gate.W[1])
    check(gate, x, g, y, alpha)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [(7,), (5, 6), (3, 4, 5)])
def test_monai_and_leejunhyun(training, size):
    gate = make(6, 6, 3, spatial_dims=len(size), preset="same_grid").train(training)
    x, g = images(6, size, 6, size)
    theta, phi = batch_norm(pointwise(x, gate.theta), gate.theta_norm), pointwise(g, gate.phi)
    f = F.relu(batch_norm(phi, gate.phi_norm) + theta)
    alpha = torch.sigmoid(batch_norm(pointwise(f, gate.psi), gate.psi_norm))
    check(gate, x, g, x * alpha, alpha)


@pytest.mark.parametrize("kind,normed", [("batch", batch_norm), ("instance", instance_norm)])
def test_biapy_norms_g_and_psi_but_not_x(kind, normed):
    gate = make(4, 4, 2, preset="same_grid", theta_norm="none", phi_norm=kind, psi_norm=kind)
    x, g = images(4, (5, 6), 4, (5, 6))
    f = F.relu(normed(pointwise(g, gate.phi), gate.phi_norm) + pointwise(x, gate.theta))
    alpha = torch.sigmoid(normed(pointwise(f, gate.psi), gate.psi_norm))
    check(gate, x, g, x * alpha, alpha)


def test_one_map_per_channel():
    gate = make(4, 6, 3, preset="same_grid", psi_norm="none", psi_channels="in_channels").eval()
    x, g = images(4, (5, 6), 6, (5, 6))
    theta, phi = pointwise(x, gate.theta), pointwise(g, gate.phi)
    f = F.relu(batch_norm(theta, gate.theta_norm) + batch_norm(phi, gate.phi_norm))
    alpha = torch.sigmoid(pointwise(f, gate.psi))
    assert alpha.shape == (2, 4, 5, 6)
    check(gate, x, g, x * alpha, alpha)


@pytest.mark.parametrize("size,coarse", [((8, 9), (4, 5)), ((4, 6, 5), (2, 3, 2))])
def test_pymic_brings_x_to_gs_grid_first(size, coarse):
    spec = {"preset": "same_grid", "theta_norm": "none", "phi_norm": "none", "psi_norm": "none"}
    gate = make(4, 6, 2, spatial_dims=len(size), x_resize="linear", alpha_resize="linear", **spec)
    x, g = images(4, size, 6, coarse)
    f = F.relu(pointwise(lin(x, g), gate.theta) + pointwise(g, gate.phi))
    alpha = torch.sigmoid(pointwise(f, gate.psi))
    check(gate, x, g, x * lin(alpha, x), alpha)


def test_group_norm_behind_the_output():
    gate = make(6, 5, 3, preset="keras", output_norm="group", norm_groups=3, norm_eps=1e-5)
    x, g = images(6, (4, 6), 5, (2, 3))
    alpha = torch.sigmoid(
        pointwise(F.relu(pointwise(x[..., ::2, ::2], gate.theta) + pointwise(g, gate.phi)), gate.psi)
    )
    w = pointwise(x * alpha.repeat_interleave(2, 2).repeat_interleave(2, 3), gate.W[0])
    grouped = w.reshape(2, 3, -1)
    grouped = (grouped - grouped.mean(-1, keepdim=True)) / (
        grouped.var(-1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    y = grouped.view_as(w) * gate.W[1].weight.view(1, -1, 1, 1) + gate.W[1].bias.view(1, -1, 1, 1)
    check(gate, x, g, y, alpha)


# ---- Keras families


def keras_up(alpha):
    for axis in range(2, alpha.ndim):
        alpha = alpha.repeat_interleave(2, axis)
    return alpha


def keras_graph(gate, x, theta, phi):
    alpha = torch.sigmoid(pointwise(F.relu(theta + phi), gate.psi))
    return batch_norm(pointwise(x * keras_up(alpha), gate.W[0]), gate.W[1]), alpha


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [(6,), (8, 6), (4, 6, 2)])
def test_keras_block(training, size):
    gate = make(6, 5, 4, spatial_dims=len(size), preset="keras").train(training)
    assert gate.W[1].eps == 1e-3
    x, g = images(6, size, 5, [n // 2 for n in size])
    every_second = x[(..., *(slice(None, None, 2),) * len(size))]
    y, alpha = keras_graph(gate, x, pointwise(every_second, gate.theta), pointwise(g, gate.phi))
    check(gate, x, g, y, alpha)


def test_keras_running_statistics_are_biased():
    gate = make(3, 5, 2, preset="keras").train()
    norm = gate.W[1]
    assert isinstance(norm, BiasedBatchNorm)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    for _ in range(3):
        x, g = images(3, (4, 4), 5, (2, 2))
        w = pointwise(x * keras_up(gate(x, g, return_attention=True)[1]), gate.W[0]).detach()
        mean = 0.99 * mean + 0.01 * w.mean((0, 2, 3))
        var = 0.99 * var + 0.01 * w.var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, var, rtol=1e-12, atol=0)
    assert norm.num_batches_tracked == 3


@pytest.mark.parametrize("stride", [1, 2])
def test_moleimg_transposed_tail(stride):
    spec = {"theta_kernel": 2, "theta_padding": "same", "phi_tail_stride": stride, "phi_resize": "none"}
    gate = make(4, 5, 3, preset="keras", **spec).eval()
    x, g = images(4, (8, 12), 5, (4 // stride, 6 // stride))
    theta = F.conv2d(x, gate.theta.weight, gate.theta.bias, stride=2)
    phi = same_transposed(pointwise(g, gate.phi), gate.phi_tail, stride)
    check(gate, x, g, *keras_graph(gate, x, theta, phi))


@pytest.mark.parametrize("stride", [3, 4])
def test_transposed_tail_with_large_strides_fills_with_the_bias(stride):
    gate = make(4, 5, 3, phi_tail_stride=stride, phi_resize="none")
    g = torch.randn(1, 5, 2, 3)
    phi = eager.project_g(gate.spec, gate, g)
    assert phi.shape == (1, 3, 2 * stride, 3 * stride)
    blocks = torch.einsum("nihw,iokl->nohkwl", pointwise(g, gate.phi), gate.phi_tail.weight)
    expected = F.pad(blocks, (0, stride - 3, 0, 0, 0, stride - 3)).reshape(phi.shape)
    torch.testing.assert_close(phi, expected + gate.phi_tail.bias.view(1, -1, 1, 1))


@pytest.mark.parametrize("size,pads", [((8, 6), (0, 1, 0, 1)), ((4, 6, 2), (0, 1, 0, 1, 0, 1))])
def test_robinvvinod_same_padding_is_not_symmetric(size, pads):
    spec = {"preset": "keras", "theta_kernel": 3, "theta_padding": "same"}
    gate = make(4, 5, 3, spatial_dims=len(size), **spec).train()
    x, g = images(4, size, 5, [n // 2 for n in size])
    theta = CONV[len(size)](F.pad(x, pads), gate.theta.weight, gate.theta.bias, stride=2)
    check(gate, x, g, *keras_graph(gate, x, theta, pointwise(g, gate.phi)))


@pytest.mark.parametrize("size,pads", [((7, 5), (1, 1, 1, 1)), ((8, 5), (1, 1, 0, 1))])
def test_same_padding_of_odd_sizes(size, pads):
    gate = make(4, 5, 3, preset="keras", theta_kernel=3, theta_padding="same", output="none")
    x, g = images(4, size, 5, (4, 3))
    theta = F.conv2d(F.pad(x, pads), gate.theta.weight, gate.theta.bias, stride=2)
    alpha = torch.sigmoid(pointwise(F.relu(theta + pointwise(g, gate.phi)), gate.psi))
    check(gate, x, g, x * F.interpolate(alpha, size=size, mode="nearest"), alpha)


def test_keras_unet_collection_multiply():
    spec = {"theta_norm": "none", "phi_norm": "none", "psi_norm": "none", "activation": "gelu"}
    gate = make(4, 8, 2, preset="same_grid", combine="multiply", **spec)
    x, g = images(4, (5, 6), 8, (5, 6))
    q = pointwise(x, gate.theta) * pointwise(g, gate.phi)
    q = q * 0.5 * (1 + torch.erf(q / 2**0.5))
    alpha = torch.sigmoid(pointwise(q, gate.psi))
    check(gate, x, g, x * alpha, alpha)


# ---- the operators


def operands(dims=2, dtype=torch.float64):
    size = ((6,), (6, 5), (4, 6, 5))[dims - 1]
    x = torch.randn(2, 4, *size)
    g = torch.randn(2, 5, *[(n + 1) // 2 for n in size])
    one = (1,) * dims
    weights = torch.randn(3, 4, *(2,) * dims), torch.randn(3, 5, *one), torch.randn(1, 3, *one)
    return [t.to(dtype) for t in (x, g, *weights, torch.randn(3), torch.randn(1))]


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_operators_are_each_others_parts(dims):
    x, g, theta_w, phi_w, psi_w, bias, psi_bias = operands(dims)
    theta, phi = CONV[dims](x, theta_w, bias, stride=2), CONV[dims](g, phi_w)
    y, alpha = reference.attention_gate(x, g, theta_w, phi_w, psi_w, bias, psi_bias, stride=2)
    for other in (
        reference.gate(x, theta, phi, psi_w, psi_bias),
        reference.gate(x, theta + lin(phi, theta), None, psi_w, psi_bias),
    ):
        torch.testing.assert_close((y, alpha), other)
    logits = reference.attention_logits(x, g, theta_w, phi_w, psi_w, bias, psi_bias, stride=(2,) * dims)
    torch.testing.assert_close(logits, reference.gate_logits(theta, phi, psi_w, psi_bias))
    torch.testing.assert_close(torch.sigmoid(logits), alpha)
    torch.testing.assert_close(reference.apply_attention(x, alpha), y)


def test_padding_is_the_convolutions():
    x, g, theta_w, phi_w, psi_w, bias, psi_bias = operands()
    got = reference.attention_gate(x, g, theta_w, phi_w, psi_w, bias, psi_bias, stride=2, padding=(1, 0))
    theta = F.conv2d(F.pad(x, (0, 0, 1, 1)), theta_w, bias, stride=2)
    torch.testing.assert_close(got, reference.gate(x, theta, F.conv2d(g, phi_w), psi_w, psi_bias))


def test_two_ways_to_align_corners():
    args = operands()
    a = reference.attention_gate(*args, stride=2, align_corners=True)
    b = reference.attention_gate(*args, stride=2, phi_resize="align_corners", alpha_resize="align_corners")
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert (a[0] - reference.attention_gate(*args, stride=2)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [torch.float16, torch.float32])
def test_dtypes(dtype, weights):
    x, g, *parameters = operands()
    x, g = x.to(dtype), g.to(dtype)
    y, alpha = reference.attention_gate(x, g, *[p.to(weights) for p in parameters], stride=2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert (y.dtype, alpha.dtype) == (dtype, wide)
    # Computed in the wide dtype, rounded once at the end: the same bits as from widened inputs.
    wide_y, wide_alpha = reference.attention_gate(
        x.to(wide), g.to(wide), *[p.to(weights).to(wide) for p in parameters], stride=2
    )
    assert torch.equal(alpha, wide_alpha) and torch.equal(y, wide_y.to(dtype))


@pytest.mark.parametrize("mode", reference.RESIZE_MODES)
def test_equal_sizes_are_the_identity(mode):
    t = torch.randn(1, 2, 3, 4)
    assert reference.resize(t, (3, 4), mode) is t


@pytest.mark.parametrize(
    "mode,expected",
    [
        ("linear", [1.0, 1.25, 1.75, 3.0, 5.0, 6.0]),  # samples at (i + 0.5) / 2 - 0.5, held at the ends
        ("nearest", [1.0, 1.0, 2.0, 2.0, 6.0, 6.0]),
        ("align_corners", [1.0, 1.4, 1.8, 2.8, 4.4, 6.0]),
    ],
)
def test_resize_by_hand(mode, expected):
    t = torch.tensor([[[1.0, 2.0, 6.0]]])
    torch.testing.assert_close(reference.resize(t, (6,), mode)[0, 0], torch.tensor(expected))


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations_by_hand(activation):
    t = torch.linspace(-3, 3, 25)
    by_hand = {
        "relu": t * (t > 0),
        "leaky_relu": torch.where(t > 0, t, 0.01 * t),
        "softplus": torch.log1p(t.exp()),
        "silu": t / (1 + (-t).exp()),
        "gelu": t * 0.5 * (1 + torch.erf(t / 2**0.5)),
    }
    torch.testing.assert_close(reference.activate(t, activation), by_hand[activation])


@pytest.mark.parametrize("dims", [1, 2])
def test_differentiable_twice_forward_and_in_transforms(dims):
    x, g, theta_w, phi_w, psi_w, bias, psi_bias = operands(dims)
    parts = (x[:1, :2], g[:1], theta_w[:2, :2], phi_w[:2], psi_w[:, :2])
    inputs = [t.clone().requires_grad_() for t in parts]

    def f(*args):
        return reference.attention_gate(*args, bias[:2], psi_bias, stride=2, activation="softplus")

    assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)
    xs = torch.stack([inputs[0], 2 * inputs[0]])
    batched = torch.vmap(lambda x: f(x, *inputs[1:])[0])(xs)
    torch.testing.assert_close(batched[1], f(xs[1], *inputs[1:])[0])


def test_compiles_without_a_graph_break():
    args = operands()
    compiled = torch.compile(
        lambda *a: reference.attention_gate(*a, stride=2), backend="aot_eager", fullgraph=True, dynamic=True
    )
    torch.testing.assert_close(compiled(*args), reference.attention_gate(*args, stride=2))


def test_empty_batch():
    x, g, *parameters = operands()
    for p in parameters:
        p.requires_grad_()
    y, alpha = reference.attention_gate(x[:0], g[:0], *parameters, stride=2)
    assert y.shape == (0, 4, 6, 5) and alpha.shape == (0, 1, 3, 2)
    y.sum().backward()
    assert all(torch.count_nonzero(p.grad) == 0 for p in parameters)


@pytest.mark.parametrize(
    "name,value", [("phi_resize", "cubic"), ("alpha_resize", "none"), ("activation", "tanh")]
)
def test_unknown_names_are_refused(name, value):
    with pytest.raises(ValueError, match=f"got '{value}'"):
        reference.attention_gate(*operands(), stride=2, **{name: value})
