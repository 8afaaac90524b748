"""AttentionUNet: any size, the same numbers with every backend, maps that belong to the image."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from attn_gate.module import AttentionGate
from attn_gate.spec import GateSpec
from attn_gate.unet import AttentionUNet

GATES = ["paper", "keras", "same_grid"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 13), (16, 16), (31, 17), (48, 40)])
def test_any_size_2d(gate, size):
    net = AttentionUNet(channels=(4, 8, 8, 8), in_channels=2, out_channels=3, gate=gate)
    net(torch.randn(1, 2, *size)).sum().backward()  # also a single tiny image in training mode
    assert all(p.grad is not None for p in net.parameters())
    logits, maps = net.eval()(torch.randn(2, 2, *size), return_attention=True)
    assert logits.shape == (2, 3, *size)
    first = 1 if gate == "same_grid" else 2
    for level, (name, alpha) in enumerate(maps.items()):
        step = first * 2**level
        assert name == f"gates.{level}" and isinstance(net.get_submodule(name), AttentionGate)
        assert alpha.shape == (2, 1, *(-(-n // step) for n in size))
        assert alpha.min() >= 0 and alpha.max() <= 1
    assert len(maps) == 3


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("spatial_dims,size", [(1, (11,)), (3, (5, 7, 9)), (3, (1, 8, 2))])
def test_other_dimensions(gate, spatial_dims, size):
    net = AttentionUNet(spatial_dims, channels=(4, 4, 8), gate=gate, norm="instance").eval()
    assert net(torch.randn(1, 1, *size)).shape == (1, 1, *size)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("training", [False, True])
def test_backends_agree(gate, training):
    net = AttentionUNet(channels=(4, 8, 8), gate=gate).double().train(training)
    other = copy.deepcopy(net).set_backend("eager")
    assert {g.backend for g in other.gates} == {"eager"} and {g.backend for g in net.gates} == {"auto"}
    image = torch.randn(2, 1, 13, 18).double()
    results = []
    for n in (net, other):
        logits, maps = n(image, return_attention=True)
        grads = torch.autograd.grad(logits.square().sum(), list(n.parameters()))
        results.append((logits, *maps.values(), *grads))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(
            ours, reference, rtol=1e-8, atol=1e-10 * max(1.0, reference.abs().max().item())
        )


def test_a_fitting_image_is_not_padded():
    """On sizes that halve evenly the network is the plain one: built here once more from its own layers."""
    net = AttentionUNet(channels=(4, 6, 8), gate="paper").double().eval()
    image = torch.randn(1, 1, 16, 24).double()
    top = net.encoders[0](image)
    middle = net.encoders[1](nn.functional.max_pool2d(top, 2))
    features = net.encoders[2](nn.functional.max_pool2d(middle, 2))
    for level, skip in ((1, middle), (0, top)):
        up = nn.functional.interpolate(net.ups[level](features), scale_factor=2, mode="bilinear")
        gated = net.gates[level](skip, features)
        features = net.decoders[level](torch.cat([gated, up], 1))
    torch.testing.assert_close(net(image), net.head(features))


def test_odd_sizes_are_those_of_the_extended_image():
    net = AttentionUNet(channels=(4, 6, 8), gate="same_grid").eval()
    image = torch.randn(1, 1, 13, 18)
    extended = image[:, :, [*range(13), 12, 12, 12]][..., [*range(18), 17, 17]]
    logits, maps = net(image, return_attention=True)
    full, full_maps = net(extended, return_attention=True)
    torch.testing.assert_close(logits, full[..., :13, :18])
    torch.testing.assert_close(maps["gates.1"], full_maps["gates.1"][..., :7, :9])


def test_the_gates_work_on_the_skips():
    """Closing all gates cuts the skips: the finest encoder's output reaches the logits only from below."""
    net = AttentionUNet(channels=(4, 8), gate="paper").eval()
    image = torch.randn(1, 1, 16, 16)
    nn.init.constant_(net.gates[0].psi.bias, -1e4)
    _, maps = net(image, return_attention=True)
    assert torch.count_nonzero(maps["gates.0"]) == 0
    skips = net.encoders[0](image)
    below = net.ups[0](net.encoders[1](net.pool(skips)))
    up = nn.functional.interpolate(below, size=(16, 16), mode="bilinear")
    expected = net.head(net.decoders[0](torch.cat([torch.zeros_like(skips), up], 1)))
    torch.testing.assert_close(net(image), expected)


def test_deep_supervision():
    net = AttentionUNet(channels=(4, 8, 8, 8), out_channels=2, deep_supervision=True)
    image = torch.randn(2, 1, 13, 18)
    logits, aux = net(image)
    assert logits.shape == (2, 2, 13, 18) and [a.shape for a in aux] == [logits.shape] * 2
    (logits, aux), maps = net(image, return_attention=True)
    assert len(aux) == 2 and len(maps) == 3
    (logits.sum() + sum(a.sum() for a in aux)).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert net.eval()(image).shape == (2, 2, 13, 18)
    # aux logits come finest first: only the second depends on nothing but the coarser decoder.
    net.train().zero_grad()
    net(image)[1][1].sum().backward()
    assert net.decoders[2][0].weight.grad is not None and net.decoders[1][0].weight.grad is None


def test_typical_size_of_the_network():
    for gate in GATES:
        count = sum(p.numel() for p in AttentionUNet(in_channels=3, gate=gate).parameters())
        assert 0.44e6 < count < 0.48e6


def test_gate_options_and_specs():
    options = {"activation": "silu", "output": "conv_norm"}
    net = AttentionUNet(channels=(4, 8), gate="paper", gate_options=options)
    assert net.gates[0].spec == GateSpec.from_preset("paper", **options)
    spec = GateSpec(spatial_dims=3, theta_kernel=(1, 2, 2), theta_stride=(1, 2, 2))
    net = AttentionUNet(3, channels=(4, 8), gate=spec).eval()
    logits, maps = net(torch.randn(1, 1, 4, 6, 8), return_attention=True)
    assert maps["gates.0"].shape == (1, 1, 4, 3, 4) and logits.shape == (1, 1, 4, 6, 8)


@pytest.mark.parametrize(
    "options,error,text",
    [
        ({"channels": (4,)}, ValueError, "two levels at least; got (4,)"),
        ({"norm": "layer"}, ValueError, "norm must be one of 'none', 'batch', 'instance', 'group'; got"),
        ({"channels": 16}, TypeError, "channels must be a sequence of integers, one for each level; got 16"),
        ({"channels": ("16", "32")}, ValueError, "channels[0] must be an integer of at least 1; got '16'"),
        ({"channels": (16, 0)}, ValueError, "channels[1] must be an integer of at least 1; got 0"),
        ({"in_channels": 0}, ValueError, "in_channels must be an integer of at least 1; got 0"),
        ({"out_channels": None}, ValueError, "out_channels must be an integer of at least 1; got None"),
        ({"backend": "gpu"}, ValueError, "backend must be one of 'auto', 'cpu', 'cuda', 'triton', 'eager'"),
        ({"gate": "oktay"}, ValueError, "gate must be one of 'paper', 'keras', 'same_grid', or a GateSpec"),
        ({"gate": ["paper"]}, ValueError, "gate must be one of"),
        ({"gate": GateSpec(spatial_dims=3)}, ValueError, "gate has spatial_dims=3, the network 2"),
        ({"gate_options": {"kernel": 3}}, TypeError, "no field 'kernel'"),
    ],
)
def test_bad_construction(options, error, text):
    with pytest.raises(error) as caught:
        AttentionUNet(**options)
    assert text in str(caught.value)


def test_an_unknown_backend_is_refused_when_it_is_set():
    net = AttentionUNet(channels=(4, 8, 8))
    with pytest.raises(ValueError, match="backend must be one of .*; got 'gpu'"):
        net.set_backend("gpu")
    assert {gate.backend for gate in net.gates} == {"auto"}


@pytest.mark.parametrize("shape", [(1, 2, 8, 8), (1, 8, 8), (1, 1, 8, 8, 8)])
def test_bad_images(shape):
    with pytest.raises(ValueError, match=r"image must be \[N, 1\] and 2 axes of space; got shape"):
        AttentionUNet(channels=(4, 8))(torch.zeros(shape))
    with pytest.raises(ValueError, match="no voxels"):
        AttentionUNet(channels=(4, 8))(torch.zeros(1, 1, 0, 8))
