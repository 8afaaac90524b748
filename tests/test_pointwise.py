"""1x1 convolutions as matrix products: the numbers of PyTorch's, and only where they are meant."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from attn_gate import AttentionGate, pointwise

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@pytest.fixture(autouse=True)
def _mkl(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(pointwise, "_HAS_MKL", True)


@pytest.fixture
def products(monkeypatch):
    """The layers that were computed as products."""
    seen = []
    serves = pointwise.serves

    def watched(layer, x):
        if found := serves(layer, x):
            seen.append(layer)
        return found

    monkeypatch.setattr(pointwise, "serves", watched)
    return seen


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_numbers_and_gradients(dims, bias):
    layer = CONVOLUTIONS[dims](6, 5, 1, bias=bias).double()
    x = torch.randn(2, 6, *(4, 3, 5)[:dims], dtype=torch.float64, requires_grad=True)
    assert pointwise.serves(layer, x)
    torch.testing.assert_close(pointwise.call(layer, x), layer(x))
    inputs = [x, *layer.parameters()]

    def product(x, *parameters):
        return pointwise.convolve(layer, x, *parameters, *[None] * (2 - len(parameters)))

    assert torch.autograd.gradcheck(product, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(product, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    layer = nn.Conv2d(64, 32, 1).to(dtype)
    x = torch.randn(2, 64, 16, 16).to(dtype)
    found = pointwise.call(layer, x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, layer(x), rtol=0.02 if dtype != torch.float32 else 1e-5, atol=0.02)


def test_autocast():
    layer, x = nn.Conv2d(8, 8, 1), torch.randn(2, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = pointwise.call(layer, x), layer(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(8, 8, 3, padding=1),
        lambda: nn.Conv2d(8, 8, 1, stride=2),
        lambda: nn.Conv2d(8, 8, 1, padding=1),
        lambda: nn.Conv2d(8, 8, 1, groups=2),
        lambda: nn.ConvTranspose2d(8, 8, 1),
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1)),
        lambda: Doubled(8, 8, 1),
        lambda: nn.Identity(),
    ],
)
def test_other_layers_are_called(make):
    layer, x = make(), torch.randn(2, 8, 4, 4)
    assert not pointwise.serves(layer, x)
    assert torch.equal(pointwise.call(layer, x), layer(x))


def test_hooks_are_called():
    layer, x, seen = nn.Conv2d(8, 8, 1), torch.randn(2, 8, 4, 4), []
    layer.register_forward_hook(lambda *args: seen.append(args))
    pointwise.call(layer, x)
    assert len(seen) == 1


def test_where_pytorch_is_better_it_is_pytorch(monkeypatch):
    layer, x = nn.Conv2d(8, 8, 1), torch.randn(2, 8, 4, 4)
    last = x.to(memory_format=torch.channels_last)
    assert not pointwise.serves(layer, last) and not pointwise.serves(nn.Conv2d(4, 8, 1), last[:, :4])
    assert not pointwise.serves(layer, torch.empty(2, 8, 4, 4, device="meta"))
    assert not pointwise.serves(layer, torch.empty(0, 8, 4, 4))
    monkeypatch.setattr(pointwise, "_HAS_MKL", False)
    assert not pointwise.serves(layer, x)


def test_on_amd_small_or_large_layers_are_products(monkeypatch):
    monkeypatch.setattr(pointwise, "_IS_AMD", True)
    monkeypatch.setattr(pointwise, "_HAS_BFLOAT16", True)
    small, middle, large = nn.Conv2d(64, 16, 1), nn.Conv2d(64, 64, 1), nn.Conv2d(512, 256, 1)
    x = torch.empty(1, 64, 8, 8)
    assert pointwise.serves(small, x) and not pointwise.serves(middle, x)
    assert pointwise.serves(middle, torch.empty(1, 64, 256, 256))
    assert not pointwise.serves(large, torch.empty(1, 512, 128, 128))
    assert pointwise.serves(middle, x.bfloat16()) and not pointwise.serves(small, x.half())
    with torch.autocast("cpu", torch.bfloat16):
        assert pointwise.serves(middle, x) and not pointwise.serves(middle, x.double())
    monkeypatch.setattr(pointwise, "_HAS_BFLOAT16", False)
    assert not pointwise.serves(middle, x.bfloat16())


def test_bad_channels_get_pytorch_s_error():
    with pytest.raises(RuntimeError, match="expected input"):
        pointwise.call(nn.Conv2d(8, 8, 1), torch.randn(2, 4, 4, 4))


@pytest.mark.parametrize("training", [False, True])
def test_the_output_transform(products, training):
    """Its convolution is a product, its norm folded in eval mode and called in training mode."""
    gate = AttentionGate(8, 16, preset="keras").train(training)
    x, g = torch.randn(2, 8, 16, 16), torch.randn(2, 16, 8, 8)
    twin = copy.deepcopy(gate)
    twin.backend = "eager"
    torch.testing.assert_close(gate(x, g), twin(x, g))
    assert products and all(layer is gate.W[0] for layer in products)
    for ours, its in zip(gate.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, its)


def test_the_projections_before_norms(products):
    gate = AttentionGate(16, 16, preset="same_grid").train()
    gate.recompute = False
    x, g = torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8)
    twin = copy.deepcopy(gate)
    twin.backend = "eager"
    torch.testing.assert_close(gate(x, g), twin(x, g))
    assert {id(layer) for layer in products} == {id(gate.theta), id(gate.phi)}


def test_the_eager_backend_calls_the_layers(products):
    gate = AttentionGate(8, 16, preset="keras")
    gate.backend = "eager"
    gate(torch.randn(2, 8, 16, 16), torch.randn(2, 16, 8, 8))
    assert not products


@pytest.mark.parametrize("preset", ["same_grid", "keras", "paper"])
def test_gates_under_vmap(preset):
    norms = dict.fromkeys(("theta_norm", "phi_norm", "psi_norm"), "none")
    gate = AttentionGate(4, 4, preset=preset, **norms).eval()
    x, g = torch.randn(3, 1, 4, 8, 8), torch.randn(3, 1, 4, 8, 8)
    found = torch.func.vmap(lambda x, g: gate(x, g))(x, g)
    torch.testing.assert_close(found, torch.stack([gate(a, b) for a, b in zip(x, g, strict=True)]))


def test_hooks_on_all_modules_are_called():
    layer, x, seen = nn.Conv2d(8, 8, 1), torch.randn(2, 8, 4, 4), []
    handle = nn.modules.module.register_module_forward_hook(lambda *args: seen.append(args))
    try:
        pointwise.call(layer, x)
    finally:
        handle.remove()
    assert len(seen) == 1


def test_an_output_convolution_without_a_norm(products):
    gate = AttentionGate(8, 8, preset="same_grid", output="conv").eval()
    x, g = torch.randn(2, 8, 8, 8), torch.randn(2, 8, 8, 8)
    twin = copy.deepcopy(gate)
    twin.backend = "eager"
    torch.testing.assert_close(gate(x, g), twin(x, g))
    assert len(products) == 1
