"""Where PyTorch has units for bfloat16 products, large projections are its own; the numbers stay eager's."""

from __future__ import annotations

import copy

import pytest
import torch

from attn_gate import AttentionGate, functional, matrix_units, pointwise


@pytest.fixture(autouse=True)
def _units(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(matrix_units, "AVAILABLE", True)
    monkeypatch.setattr(matrix_units, "OURS", True)
    monkeypatch.setattr(pointwise, "_HAS_MKL", True)


def bare(channels: int, size: int = 8, **options):
    gate = AttentionGate(
        channels, channels, preset="same_grid", theta_norm="none", phi_norm="none", psi_norm="none", **options
    ).eval()
    return gate, torch.randn(2, channels, size, size).bfloat16()


@pytest.mark.parametrize(
    ("channels", "layout", "plan"),
    [
        (512, "channels_last", "chain"),
        (256, "channels_last", "whole"),
        (256, "contiguous_format", "whole"),
        (512, "contiguous_format", "chain"),
    ],
)
def test_they_take_large_projections(channels, layout, plan, monkeypatch):
    gate, x = bare(channels)
    x = x.contiguous(memory_format=getattr(torch, layout))
    assert gate.fusion(x, x).plan == "whole"  # its float32 weights would make float32 products
    with torch.autocast("cpu", torch.bfloat16):
        assert gate.fusion(x.float(), x.float()).plan == plan
        assert gate.fusion(x.double(), x.double()).plan == "whole"
    gate.bfloat16()
    assert gate.fusion(x, x).plan == plan
    gate.recompute = True
    assert gate.fusion(x, x).plan == "whole"
    gate.recompute = "auto"
    monkeypatch.setattr(matrix_units, "AVAILABLE", False)
    assert gate.fusion(x, x).plan == "whole"


def test_they_take_more_where_ours_were_built_without(monkeypatch):
    gate, x = bare(256)
    gate.bfloat16()
    assert gate.fusion(x, x).plan == "whole"
    monkeypatch.setattr(matrix_units, "OURS", False)
    assert gate.fusion(x, x).plan == "chain"
    gate, x = bare(64)
    assert gate.bfloat16().fusion(x, x).plan == "whole"


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("ours", [False, True])
def test_inference_is_ours_unless_norms_fold(norms, ours, monkeypatch):
    monkeypatch.setattr(matrix_units, "OURS", ours)
    gate, x = bare(512)
    if norms:
        gate = AttentionGate(512, 512, preset="same_grid").eval()
    gate.bfloat16()
    assert gate.fusion(x, x).plan == "chain"
    with torch.no_grad():
        assert gate.fusion(x, x).plan == ("whole" if ours and not norms else "chain")


def test_the_reasons_are_told():
    gate, x = bare(512, normaliser="softmax")
    gate.bfloat16()
    found = gate.fusion(x, x)
    assert found.plan == "chain_logits"
    assert "better arithmetic" in found.reason and "needs the whole map" in found.reason


@pytest.mark.parametrize("autocast", [False, True])
def test_numbers_and_gradients(autocast):
    """As far from float64 as the same gate in eager PyTorch: a ReLU turns here and there in either."""
    gate, x = bare(512)
    g = torch.randn_like(x)
    slope = torch.randn_like(x)

    def results(gate, dtype):
        inputs = [t.to(dtype).requires_grad_() for t in (x, g)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype != torch.float64):
            y = gate(*inputs)
        y.backward(slope.to(y.dtype))
        return [y.detach(), *(t.grad for t in inputs), *(p.grad for p in gate.parameters())]

    exact = results(copy.deepcopy(gate).double(), torch.float64)
    dtype = torch.float32 if autocast else torch.bfloat16
    twin = copy.deepcopy(gate).to(dtype)
    twin.backend = "eager"
    for found, eager, true in zip(results(gate.to(dtype), dtype), results(twin, dtype), exact, strict=True):
        assert (found - true).norm() <= 1.5 * (eager - true).norm() + 1e-3 * true.norm()


@pytest.mark.parametrize("norms", [False, True])
def test_autocast_rounds_weights_that_no_norm_was_folded_into(norms, monkeypatch):
    gate, x = bare(64, 64)
    if norms:
        gate = AttentionGate(64, 64, preset="same_grid").eval()
    rounded = copy.deepcopy(gate)
    for layer in (rounded.theta, rounded.phi):
        layer.weight.data = layer.weight.data.bfloat16().float()

    def alpha(gate, pays):
        monkeypatch.setattr(functional, "_BFLOAT16_PAYS", pays)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert gate.fusion(x, x).plan == "whole"
            return gate(x, x, return_attention=True)[1]

    assert not torch.equal(alpha(gate, False), alpha(rounded, False))
    assert torch.equal(alpha(gate, True), alpha(gate if norms else rounded, False))


def test_it_compiles():
    gate, x = bare(512)
    compiled = torch.compile(gate.bfloat16(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, x), gate(x, x))


@pytest.mark.parametrize(("dtype", "plan"), [(torch.bfloat16, "chain_logits"), (torch.float32, "eager")])
def test_behind_batch_norms_that_pytorch_keeps_the_rest_is_fused(dtype, plan, monkeypatch):
    monkeypatch.setattr(pointwise, "_HAS_MKL", False)
    gate = AttentionGate(256, 256, preset="same_grid").train().to(dtype)
    x = torch.empty(2, 256, 64, 64, dtype=dtype)
    assert gate.fusion(x, x).plan == plan


@pytest.mark.parametrize(("units", "plan"), [(False, "whole_moments"), (True, "chain_logits")])
def test_the_layers_that_pytorch_takes_over_are_more(units, plan, monkeypatch):
    monkeypatch.setattr(matrix_units, "AVAILABLE", units)
    gate = AttentionGate(128, 128, 64, preset="same_grid").train().bfloat16()
    x = torch.empty(2, 128, 128, 256, dtype=torch.bfloat16)
    assert gate.fusion(x, x).plan == plan
    wide = AttentionGate(64, 64, 32, preset="same_grid").train().bfloat16()
    x = torch.empty(2, 64, 256, 256, dtype=torch.bfloat16)
    assert wide.fusion(x, x).plan == "whole_moments"


def test_other_devices_have_none():
    gate, _ = bare(512)
    x = torch.empty(2, 512, 8, 8, dtype=torch.bfloat16, device="meta")
    assert not matrix_units.pay(x, gate)
