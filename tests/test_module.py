"""AttentionGate: eager PyTorch's numbers whatever it fuses, no stale fold, no more kept than eager keeps."""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter
from math import prod

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from attn_gate import eager, functional, matrix_units
from attn_gate.module import AttentionGate
from attn_gate.spec import CHOICES, GateSpec

OPERATORS = {
    "whole": {"attention_gate": 1},
    "whole_logits": {"attention_logits": 1, "gate_apply": 1},
    "chain": {"gate": 1},
    "chain_logits": {"gate_logits": 1, "gate_apply": 1},
    "apply": {"gate_apply": 1},
    "eager": {},
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of the fused operators."""
    counter = Counter()

    run = functional._run

    def counted(op, *args):
        counter[op.name] += 1
        return run(op, *args)

    monkeypatch.setattr(functional, "_run", counted)
    return counter


def seasoned(gate):
    """Norms with random scales, shifts and statistics, as after training."""
    for layer in gate.modules():
        if isinstance(layer, (nn.modules.batchnorm._NormBase, nn.GroupNorm)):
            for t in (layer.weight, layer.bias, getattr(layer, "running_mean", None)):
                if t is not None:
                    t.data.normal_()
            if getattr(layer, "running_var", None) is not None:
                layer.running_var.uniform_(0.5, 2)
    return gate


def both(gate, x, g):
    """(y, alpha, all gradients) of the gate as it is, and of a copy in eager PyTorch."""
    results = []
    for net in (gate, copy.deepcopy(gate)):
        if results:
            net.backend = "eager"
        inputs = [t.clone().requires_grad_() for t in (x, g)]
        y, alpha = net(*inputs, return_attention=True)
        torch.manual_seed(1)
        loss = (y * torch.randn_like(y)).sum() + (alpha * torch.randn_like(alpha)).sum()
        wanted = [t for t in (*inputs, *net.parameters()) if t.requires_grad]
        results.append((y, alpha, *torch.autograd.grad(loss, wanted, allow_unused=True), *net.buffers()))
    return results


def check(gate, x, g, tolerance=1e-10):
    for ours, ref in zip(*both(gate, x, g), strict=True):
        assert (ours is None) == (ref is None)
        if ref is not None:
            scale = max(1.0, ref.abs().max().item())
            torch.testing.assert_close(ours, ref, rtol=0, atol=tolerance * scale)


def same_grid_case(dtype=torch.float64, **overrides):
    gate = seasoned(AttentionGate(6, 8, 4, preset="same_grid", **overrides)).to(dtype)
    return gate, torch.randn(2, 6, 5, 7, dtype=dtype), torch.randn(2, 8, 5, 7, dtype=dtype)


# ---- the numbers


def test_worked_example_of_the_paper():
    """x [1, 64, 64, 64], g [1, 128, 32, 32]: theta 2x2 with stride 2, alpha on 32x32, bilinear to 64x64."""
    gate = AttentionGate(64, 128)
    x, g = torch.randn(1, 64, 64, 64), torch.randn(1, 128, 32, 32)
    y, alpha = gate(x, g, return_attention=True)
    assert gate.fusion(x).plan == "whole"
    assert gate.theta.weight.shape == (32, 64, 2, 2) and gate.theta.bias is None
    assert y.shape == (1, 64, 64, 64) and alpha.shape == (1, 1, 32, 32)

    gate, x, g = gate.double(), x.double(), g.double()
    theta = F.conv2d(x, gate.theta.weight, stride=2)
    f = F.relu(theta + F.conv2d(g, gate.phi.weight, gate.phi.bias))
    expected = torch.sigmoid(F.conv2d(f, gate.psi.weight, gate.psi.bias))
    weights = F.interpolate(expected, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(alpha.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(y.double(), x * weights, rtol=0, atol=5e-6)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "options,x_size,g_size",
    [
        ({"preset": "paper"}, (8, 6), (4, 3)),
        ({"preset": "paper", "spatial_dims": 1}, (9,), (4,)),
        ({"preset": "paper", "spatial_dims": 3, "output": "conv_norm"}, (5, 6, 4), (3, 2, 2)),
        ({"preset": "keras"}, (8, 6), (4, 3)),
        ({"preset": "keras", "theta_kernel": 2, "theta_padding": "same"}, (8, 6), (4, 3)),
        ({"preset": "keras", "theta_kernel": 2, "theta_padding": "same"}, (7, 6), (4, 3)),
        (
            {"preset": "keras", "theta_kernel": 3, "theta_padding": "same", "phi_tail_stride": 1},
            (8, 6),
            (4, 3),
        ),
        ({"preset": "same_grid"}, (5, 6), (5, 6)),
        ({"preset": "same_grid", "spatial_dims": 3}, (3, 4, 5), (3, 4, 5)),
        ({"preset": "same_grid", "theta_bias": False, "psi_bias": False}, (5, 6), (5, 6)),
        ({"preset": "same_grid", "psi_norm": "instance"}, (5, 6), (5, 6)),
        ({"preset": "same_grid", "phi_norm": "group", "norm_groups": 2}, (5, 6), (5, 6)),
        ({"preset": "same_grid", "phi_resize": "linear"}, (5, 6), (3, 4)),
        ({"preset": "paper", "normaliser": "softmax"}, (8, 6), (4, 3)),
        ({"preset": "paper", "normaliser": "mean_flow"}, (8, 6), (4, 3)),
        ({"preset": "same_grid", "x_resize": "linear", "alpha_resize": "linear"}, (8, 6), (4, 3)),
        ({"preset": "paper", "combine": "multiply"}, (8, 6), (4, 3)),
        ({"preset": "same_grid", "psi_channels": "in_channels"}, (5, 6), (5, 6)),
    ],
)
def test_same_numbers_and_gradients_as_eager(calls, options, x_size, g_size, training):
    gate = seasoned(AttentionGate(6, 8, 4, **options)).double().train(training)
    x, g = torch.randn(2, 6, *x_size).double(), torch.randn(2, 8, *g_size).double()
    plan = gate.fusion(x).plan
    check(gate, x, g)
    assert calls == OPERATORS[plan]
    with torch.no_grad():
        gate.eval()
        y, alpha = gate(x, g, return_attention=True)
        torch.testing.assert_close((y, alpha), eager.gate(gate.spec, gate, x, g), rtol=1e-10, atol=1e-10)


@st.composite
def specs(draw):
    dims = draw(st.integers(1, 3))
    axis = st.tuples(*(st.integers(1, 3),) * dims)
    choices = {
        name: draw(st.sampled_from(values))
        for name, values in CHOICES.items()
        # Those three divide by numbers close to 0 for some maps, so that no tolerance holds.
        if name not in ("spatial_dims", "normaliser")
    }
    flags = ("theta_bias", "phi_bias", "psi_bias", "norm_biased_variance")
    return GateSpec(
        spatial_dims=dims,
        theta_kernel=draw(axis),
        theta_stride=draw(axis),
        phi_kernel=draw(st.just(1) | axis),
        phi_tail_stride=draw(st.none() | axis),
        normaliser=draw(st.sampled_from(["sigmoid", "softmax"])),
        norm_groups=2,
        **choices,
        **{name: draw(st.booleans()) for name in flags},
    )


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(specs(), st.data())
def test_random_specs(spec, data):
    size = st.tuples(*(st.integers(3, 6),) * spec.spatial_dims)
    x_size, g_size = data.draw(size), data.draw(size)
    grid = spec.theta_grid(x_size, g_size)
    # Norms of a single voxel are an error of PyTorch's own.
    assume(min(grid + spec.phi_grid(g_size)) >= 1 and 1 not in (prod(grid), prod(spec.phi_grid(g_size))))
    # "none" needs grids that agree; that they otherwise are refused is another test.
    spec = spec.replace(
        phi_resize="linear"
        if spec.phi_grid(g_size) != grid and spec.phi_resize == "none"
        else spec.phi_resize,
        alpha_resize="nearest" if grid != x_size and spec.alpha_resize == "none" else spec.alpha_resize,
    )
    torch.manual_seed(0)
    gate = seasoned(AttentionGate(4, 3, 4, preset=spec)).double().train(data.draw(st.booleans()))
    check(gate, torch.randn(2, 4, *x_size).double(), torch.randn(2, 3, *g_size).double(), tolerance=1e-9)


@pytest.mark.parametrize("g_size", [4, 5, 6])
def test_same_padding_is_that_of_the_resized_x(g_size):
    spec = GateSpec(
        spatial_dims=1,
        x_resize="nearest",
        theta_kernel=2,
        theta_stride=3,
        theta_padding="same",
        phi_resize="linear",
    )
    x, g = torch.randn(2, 4, 3).double(), torch.randn(2, 3, g_size).double()
    check(AttentionGate(4, 3, 4, preset=spec).double(), x, g)


def test_training_updates_the_statistics_once():
    gate, x, g = same_grid_case()
    gate.train()
    gate(x, g)
    for norm in (gate.theta_norm, gate.phi_norm, gate.psi_norm):
        assert norm.num_batches_tracked == 1
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        gate(x[:1, :, :1, :1], g[:1, :, :1, :1])


def test_frozen_norms_in_training_are_folded(calls):
    gate, x, g = same_grid_case()
    gate.train()
    for norm in (gate.theta_norm, gate.phi_norm, gate.psi_norm):
        norm.eval()
    check(gate, x, g)
    assert calls == {"attention_gate": 1}
    gate.psi_norm.train()
    assert gate.fusion().plan == "whole_logits"


# ---- the fold


EDITS = {
    "in place": lambda gate, t: t.add_(0.5),
    "data in place": lambda gate, t: t.data.copy_(t.data + 0.5),
    "data replaced": lambda gate, t: setattr(t, "data", t.data + 0.5),
    "optimizer": lambda gate, t: _optimizer_step(t),
    "load_state_dict": lambda gate, t: gate.load_state_dict(
        {k: v + 0.5 for k, v in gate.state_dict().items()}
    ),
}


def _optimizer_step(t):
    t.requires_grad_()
    t.grad = torch.ones_like(t)
    torch.optim.SGD([t], lr=0.5).step()


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("layer", ["theta", "phi", "psi", "theta_norm", "phi_norm", "psi_norm"])
def test_no_fold_is_ever_stale(edit, layer):
    gate, x, g = same_grid_case()
    gate.eval().requires_grad_(False)
    names = list(getattr(gate, layer).state_dict(keep_vars=True))
    for name in names:
        t = getattr(getattr(gate, layer), name)
        if not t.is_floating_point():
            continue
        with torch.no_grad():
            before = gate(x, g)
            assert torch.equal(gate(x, g), before)
            EDITS[edit](gate, t)
            after = gate(x, g)
            assert not torch.equal(after, before), f"{layer}.{name}"
            torch.testing.assert_close(after, eager.gate(gate.spec, gate, x, g)[0], rtol=1e-9, atol=1e-9)
        t.requires_grad_(False)


def test_fold_follows_eps_dtype_replaced_parameters_and_modes():
    gate, x, g = same_grid_case()
    gate.eval()

    def step(change, x=x, g=g):
        change()
        with torch.no_grad():
            y = gate(x, g)
            reference = eager.gate(gate.spec, gate, x, g)[0]
        torch.testing.assert_close(y, reference)
        return y

    first = step(lambda: None)
    assert not torch.equal(step(lambda: setattr(gate.phi_norm, "eps", 0.5)), first)
    second = step(lambda: setattr(gate.theta, "weight", nn.Parameter(torch.randn_like(gate.theta.weight))))
    step(lambda: gate.train())
    step(lambda: gate.eval())
    assert step(lambda: gate.to(torch.float32), x.float(), g.float()).dtype == torch.float32
    step(lambda: setattr(gate, "theta_norm", nn.BatchNorm2d(4).eval()), x.float(), g.float())
    assert not torch.equal(second, first)


def test_fold_is_kept_while_nothing_changes(monkeypatch):
    from attn_gate import folding

    folds = []
    fold = folding._fold
    monkeypatch.setattr(folding, "_fold", lambda parts: folds.append(1) or fold(parts))
    gate, x, g = same_grid_case()
    gate.eval()
    with torch.no_grad():
        for _ in range(3):
            gate(x, g)
        assert len(folds) == 1
    with torch.inference_mode():
        gate(x, g)
    assert len(folds) == 1
    gate(x, g)  # wants gradients
    gate(x, g)
    assert len(folds) == 3


def test_fold_made_in_inference_mode_serves_training_of_the_rest():
    gate, x, g = same_grid_case()
    gate.eval().requires_grad_(False)
    with torch.inference_mode():
        gate(x, g)
    check(gate, x, g)


def test_copies_and_pickles_hold_no_fold():
    gate, x, g = same_grid_case()
    gate.eval()
    with torch.no_grad():
        y = gate(x, g)
        keys = list(gate.state_dict())
        for other in (copy.deepcopy(gate), pickle.loads(pickle.dumps(gate))):
            assert other._fold_cache is not gate._fold_cache
            assert list(other.state_dict()) == keys and torch.equal(other(x, g), y)
            other.theta.weight.data.mul_(2)
            assert not torch.equal(other(x, g), y) and torch.equal(gate(x, g), y)
    buffer = io.BytesIO()
    torch.save(gate, buffer)
    assert len(buffer.getvalue()) < 20_000


# ---- what is kept for the backward pass


def kept_bytes(gate, x, g):
    """Bytes of all storages that autograd keeps, beyond inputs, parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (x, g, *gate.parameters(), *gate.buffers())}
    storages = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = (storage.nbytes(), t)  # held, so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = gate(x, g)
    total = sum(nbytes for nbytes, _ in storages.values())
    y.sum().backward()
    return total


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "options,coarse",
    [
        ({"preset": "paper"}, 2),
        ({"preset": "keras"}, 2),
        ({"preset": "same_grid"}, 1),
        ({"preset": "same_grid", "psi_norm": "none"}, 1),
        ({"preset": "same_grid", "phi_resize": "linear"}, 2),
        ({"preset": "paper", "theta_kernel": 3, "theta_padding": "symmetric", "normaliser": "softmax"}, 2),
    ],
)
def test_keeps_no_more_than_eager(options, coarse, training):
    gate = AttentionGate(16, 16, 8, **options).train(training)
    x = torch.randn(2, 16, 32, 32, requires_grad=True)
    g = torch.randn(2, 16, 32 // coarse, 32 // coarse, requires_grad=True)
    ours = kept_bytes(gate, x, g)
    gate.backend = "eager"
    # Beyond the maps: a few vectors of statistics and folded weights.
    assert ours <= kept_bytes(gate, x, g) + 4 * 1024


# ---- layers that somebody listens to, or has replaced


@pytest.mark.parametrize(
    "layer,plan",
    [
        ("theta", "chain"),
        ("phi", "chain"),
        ("psi", "apply"),
        ("theta_norm", "chain"),
        ("psi_norm", "whole_logits"),
    ],
)
def test_hooks_are_called(calls, layer, plan):
    gate, x, g = same_grid_case()
    gate.eval()
    plain = gate(x, g)
    calls.clear()
    seen = []
    handle = getattr(gate, layer).register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(gate(x, g), plain)
    assert len(seen) == 1 and calls == OPERATORS[plan]
    handle.remove()
    assert gate.fusion().plan == "whole"


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layer", ["theta", "phi", "psi", "theta_norm", "psi_norm", "W.0", "W.1"])
def test_a_forward_in_place_of_the_class_s_is_called(layer, training, compiled):
    """As tools for LoRA or for sharing a model out put it, before the first call and later."""
    preset = "keras" if layer.startswith("W") else "same_grid"
    gate = seasoned(AttentionGate(6, 8, 4, preset=preset, recompute=True)).double().train(training)
    x, g = (
        torch.randn(2, 6, 8, 8).double(),
        torch.randn(2, 8, *[8 if preset == "same_grid" else 4] * 2).double(),
    )
    twin = copy.deepcopy(gate)
    twin.backend = "eager"
    # The limit of recompilations is one of all gates together.
    torch.compiler.reset()
    run = torch.compile(gate, backend="aot_eager") if compiled else gate
    for factor in (None, 3, 5):
        for net in (gate, twin):
            part = net.get_submodule(layer)
            if factor is not None:
                part.forward = lambda t, part=part, factor=factor: factor * type(part).forward(part, t)
        torch.testing.assert_close(run(x, g, True), twin(x, g, True), rtol=1e-10, atol=1e-10)
    torch.compiler.reset()


def test_hooks_on_all_modules_are_called():
    gate, x, g = same_grid_case()
    gate.eval()(x, g)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        gate(x, g)
    finally:
        handle.remove()
    assert {gate.theta, gate.phi, gate.psi, gate.theta_norm, gate.phi_norm, gate.psi_norm} <= set(seen)
    assert gate.fusion().plan == "whole"


def test_parametrised_layers_run_as_modules():
    gate, x, g = same_grid_case()
    gate.eval()
    nn.utils.parametrizations.weight_norm(gate.theta)
    assert gate.fusion().plan == "chain"
    check(gate, x, g)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("recompute", ["auto", True, False])
@pytest.mark.parametrize("layer", ["theta", "phi", "psi"])
@pytest.mark.parametrize("preset", ["paper", "keras", "same_grid"])
def test_layers_wrapped_in_others_run_as_modules(preset, layer, recompute, training, monkeypatch):
    monkeypatch.setattr(matrix_units, "AVAILABLE", True)
    gate = AttentionGate(6, 8, 4, preset=preset, recompute=recompute).double().train(training)
    setattr(gate, layer, nn.Sequential(getattr(gate, layer), nn.Identity()))
    half = 1 if preset == "same_grid" else 2
    x, g = torch.randn(2, 6, 8, 8).double(), torch.randn(2, 8, 8 // half, 8 // half).double()
    plans = ("apply", "eager") if layer == "psi" else ("chain", "chain_logits", "eager")
    assert gate.fusion(x, g).plan in plans
    check(gate, x, g)


# ---- dtypes


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("preset", ["paper", "keras", "same_grid"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_may_be_wider_than_activations(preset, backend, training, dtype):
    gate = AttentionGate(6, 8, 4, preset=preset, backend=backend).train(training)
    half = 1 if preset == "same_grid" else 2
    x, g = torch.randn(2, 6, 8, 8).to(dtype), torch.randn(2, 8, 8 // half, 8 // half).to(dtype)
    wide = copy.deepcopy(gate).double()
    wide.backend = "eager"
    y, alpha = gate(x, g, return_attention=True)
    assert (y.dtype, alpha.dtype) == (dtype, torch.float32)
    expected, expected_alpha = wide(x.double(), g.double(), return_attention=True)
    torch.testing.assert_close(alpha.double(), expected_alpha, rtol=0, atol=4e-2)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=8e-2)


@pytest.mark.parametrize("training", [False, True])
def test_all_bfloat16(training):
    gate, x, g = same_grid_case(torch.bfloat16)
    gate.train(training)
    y, alpha = gate(x, g, return_attention=True)
    assert (y.dtype, alpha.dtype) == (torch.bfloat16, torch.float32)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in gate.parameters())


@pytest.mark.parametrize("preset", ["paper", "same_grid"])
@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("training", [False, True])
def test_autocast(preset, backend, training):
    gate = AttentionGate(6, 8, 4, preset=preset, backend=backend).train(training)
    g_size = (8, 8) if preset == "same_grid" else (4, 4)
    x, g = torch.randn(2, 6, 8, 8, requires_grad=True), torch.randn(2, 8, *g_size)
    expected = copy.deepcopy(gate)(x, g)
    with torch.autocast("cpu", torch.bfloat16):
        y = gate(x, g)
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=8e-2)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and gate.theta.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("psi_norm", ["batch", "instance", "group"])
@pytest.mark.parametrize("preset", ["paper", "keras", "same_grid"])
@pytest.mark.parametrize("training", [False, True])
def test_parameters_in_16_bit_under_autocast(preset, psi_norm, training, dtype):
    gate = seasoned(AttentionGate(64, 64, 8, preset=preset, psi_norm=psi_norm)).to(dtype).train(training)
    plain = copy.deepcopy(gate)
    plain.backend = "eager"
    half = 1 if preset == "same_grid" else 2
    for size in (16, 64):
        x, g = torch.randn(1, 64, size, size), torch.randn(1, 64, size // half, size // half)
        x, g = x.to(dtype), g.to(dtype)
        with torch.autocast("cpu", dtype):
            expected, expected_alpha = plain(x, g, return_attention=True)
            for gate.recompute in ("auto", True, False):
                y, alpha = gate(x, g, return_attention=True)
                assert (y.dtype, alpha.dtype) == (dtype, torch.float32)
                torch.testing.assert_close(alpha, expected_alpha, rtol=0, atol=8e-2)
                torch.testing.assert_close(y, expected, rtol=0, atol=0.3)


@pytest.mark.parametrize("training", [False, True])
def test_norms_without_parameters_in_16_bit(training):
    gate, x, g = same_grid_case(torch.bfloat16)
    gate.psi_norm = nn.BatchNorm2d(1, affine=False).bfloat16()
    gate.train(training)
    for gate.recompute in (True, False):
        assert gate(x, g).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert gate(x, g).dtype == torch.bfloat16


def test_counts_of_a_layer_say_nothing_of_its_dtype():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.tensor(0))

        def forward(self, t):
            return t

    gate, x, g = same_grid_case(torch.float32)
    gate.psi_norm = nn.Identity()
    expected = gate(x, g)
    gate.psi_norm = Counter()
    torch.testing.assert_close(gate(x, g), expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "options", [{"preset": "paper"}, {"preset": "keras"}, {"preset": "same_grid"}, {"combine": "multiply"}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_decides_the_dtype_on_every_path(options, training, backend, dtype):
    gate = AttentionGate(64, 64, 8, backend=backend, **options).train(training)
    gate = gate.double() if dtype == torch.float64 else gate
    half = 1 if options.get("preset") == "same_grid" else 2
    for size in (16, 128):
        x, g = torch.randn(1, 64, size, size), torch.randn(1, 64, size // half, size // half)
        with torch.autocast("cpu", torch.bfloat16):
            y, alpha = gate(x.to(dtype), g.to(dtype), return_attention=True)
        double = dtype == torch.float64  # which autocast leaves alone
        assert y.dtype == (torch.float64 if double else torch.bfloat16)
        assert alpha.dtype == (torch.float64 if double else torch.float32)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("preset", ["paper", "keras", "same_grid"])
@pytest.mark.parametrize("training", [False, True])
def test_maps_must_have_one_dtype(preset, training, backend):
    gate = AttentionGate(6, 8, 4, preset=preset, backend=backend).train(training)
    half = 1 if preset == "same_grid" else 2
    x, g = torch.randn(2, 6, 8, 8), torch.randn(2, 8, 8 // half, 8 // half)
    for other in (g.half(), g.double()):
        with pytest.raises(TypeError, match=r"got torch.float32 and torch.float(16|64); cast one"):
            gate(x, other)
    with torch.autocast("cpu", torch.bfloat16):
        assert gate(x, g.half()).dtype == torch.bfloat16
        with pytest.raises(TypeError, match="which casts all but float64"):
            gate(x, g.double())


# ---- transforms and compilation


def test_functional_call_under_grad_and_vmap():
    gate, x, g = same_grid_case()
    gate.eval()
    with torch.no_grad():
        gate(x, g)  # a fold to be misused
    parameters = dict(gate.named_parameters())

    def loss(parameters, x, g):
        return torch.func.functional_call(gate, parameters, (x, g)).square().sum()

    got = torch.func.grad(loss)(parameters, x, g)
    gate.backend = "eager"
    torch.testing.assert_close(got, torch.func.grad(loss)(parameters, x, g))
    gate.backend = "auto"
    ensemble = {name: torch.stack([p, 2 * p]).detach() for name, p in parameters.items()}
    losses = torch.func.vmap(loss, in_dims=(0, None, None))(ensemble, x, g)
    doubled = {name: 2 * p for name, p in parameters.items()}
    torch.testing.assert_close(losses, torch.stack([loss(parameters, x, g), loss(doubled, x, g)]))


@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_a_graph_break(training):
    gate, x, g = same_grid_case()
    gate.train(training)
    expected = copy.deepcopy(gate)(x, g, True)
    torch.testing.assert_close(torch.compile(gate, backend="aot_eager", fullgraph=True)(x, g, True), expected)


@pytest.mark.parametrize("recompute", ["auto", True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("preset", ["paper", "same_grid", "keras"])
def test_shapes_alone(preset, training, recompute):
    """In modes that know no values: fake tensors, and those of the meta device."""
    gate = AttentionGate(16, 16, 8, preset=preset, recompute=recompute).train(training)
    size = 256 if preset == "same_grid" else 128
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, g = torch.randn(2, 16, 256, 256, requires_grad=True), torch.randn(2, 16, size, size)
        y = gate(x, g)
        assert y.shape == x.shape
    x, g = torch.empty(x.shape, device="meta", requires_grad=True), torch.empty(g.shape, device="meta")
    y = gate.to("meta")(x, g)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape and gate.theta.weight.grad.device.type == "meta"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("preset", ["paper", "same_grid", "keras"])
def test_traced_with_gradients_and_saved(preset, training):
    gate = AttentionGate(6, 8, 4, preset=preset, recompute=True).train(training)
    x, g = torch.randn(2, 6, 8, 8), torch.randn(2, 8, *[8 if preset == "same_grid" else 4] * 2)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(gate, (x, g), check_trace=not training), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x, g), copy.deepcopy(gate)(x, g))


@pytest.mark.parametrize("training", [False, True])
def test_distributed_tensors(training, tmp_path):
    distributed = pytest.importorskip("torch.distributed")
    from torch.distributed import tensor

    gate = AttentionGate(6, 8, 4, preset="same_grid", recompute=True).train(training)
    x, g = torch.randn(2, 6, 8, 8), torch.randn(2, 8, 8, 8)
    expected = copy.deepcopy(gate)(x, g)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        tensor.distribute_module(gate, mesh)
        x, g = (tensor.distribute_tensor(t, mesh, [tensor.Replicate()]) for t in (x, g))
        y = gate(x.requires_grad_(), g)
        y.sum().backward()
        torch.testing.assert_close(y.full_tensor(), expected)
        assert x.grad is not None
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("preset", ["paper", "same_grid"])
def test_exports(preset):
    gate = AttentionGate(6, 8, preset=preset).eval()
    g_size = (8, 8) if preset == "same_grid" else (4, 4)
    x, g = torch.randn(2, 6, 8, 8), torch.randn(2, 8, *g_size)
    exported = torch.export.export(gate, (x, g)).module()
    torch.testing.assert_close(exported(x, g), gate(x, g))


# ---- construction and errors


def test_state_dict_keys():
    paper = AttentionGate(4, 6, output="conv_norm")
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert set(paper.state_dict()) == {
        *("theta.weight", "phi.weight", "phi.bias", "psi.weight", "psi.bias", "W.0.weight", "W.0.bias"),
        *(f"W.1.{name}" for name in norm),
    }
    layers = ("theta", "phi", "psi")
    assert set(AttentionGate(4, 6, preset="same_grid").state_dict()) == {
        *(f"{layer}.{name}" for layer in layers for name in ("weight", "bias")),
        *(f"{layer}_norm.{name}" for layer in layers for name in norm),
    }


def test_papers_initialisation():
    gate = AttentionGate(64, 256, 128, output="conv_norm", init="paper")
    for conv in (gate.theta, gate.phi, gate.W[0]):
        fan_in = conv.weight[0].numel()
        assert conv.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.1)
    scale = gate.W[1].weight
    assert 0.005 < scale.std().item() < 0.04 and scale.mean().item() == pytest.approx(1, abs=0.02)
    assert torch.count_nonzero(gate.W[1].bias) == 0
    with pytest.raises(ValueError, match="init must be one of 'default', 'paper'; got 'zeros'"):
        AttentionGate(4, 4, init="zeros")


@pytest.mark.parametrize(
    "args,kwargs,error,text",
    [
        ((0, 4), {}, ValueError, "in_channels must be an integer of at least 1; got 0"),
        ((4, 4.0), {}, ValueError, "gating_channels"),
        ((4, 4, 0), {}, ValueError, "inter_channels"),
        (("4", 4), {}, ValueError, "in_channels must be an integer of at least 1; got '4'"),
        ((True, 4), {}, ValueError, "in_channels must be an integer of at least 1; got True"),
        ((4, 4), {"preset": "oktay"}, ValueError, "preset must be one of"),
        ((4, 4), {"preset": ["paper"]}, ValueError, "'same_grid', or a GateSpec; got ['paper']"),
        ((4, 4), {"backend": "gpu"}, ValueError, "backend must be one of 'auto', 'cpu', 'cuda', 'triton',"),
        ((4, 4), {"recompute": "yes"}, ValueError, "recompute must be 'auto', True or False; got 'yes'"),
        ((4, 4), {"recompute": None}, ValueError, "recompute must be 'auto', True or False; got None"),
        (
            (4, 4),
            {"preset": GateSpec(), "spatial_dims": 3},
            ValueError,
            "spatial_dims is 3, that of the GateSpec 2",
        ),
        ((4, 4), {"activaton": "relu"}, TypeError, "no field 'activaton'"),
        (
            (4, 4, 3),
            {"theta_norm": "group", "norm_groups": 2},
            ValueError,
            "norm_groups must divide the 3 channels",
        ),
    ],
)
def test_bad_construction(args, kwargs, error, text):
    with pytest.raises(error) as caught:
        AttentionGate(*args, **kwargs)
    assert text in str(caught.value)


@pytest.mark.parametrize("name,value", [("backend", "gpu"), ("recompute", None), ("recompute", 1)])
def test_attributes_are_checked_when_they_are_changed(name, value):
    gate = AttentionGate(4, 4)
    with pytest.raises(ValueError, match=f"{name} must be .*; got {value!r}"):
        setattr(gate, name, value)
    assert getattr(gate, name) == "auto"


def test_channels_may_be_integers_of_numpy():
    gate = AttentionGate(np.int64(8), np.int32(6), np.uint8(4))
    assert [type(n) for n in (gate.in_channels, gate.gating_channels, gate.inter_channels)] == [int] * 3
    assert repr(gate).startswith("AttentionGate(\n  8, 6, 4, ")
    assert gate(torch.randn(1, 8, 4, 4), torch.randn(1, 6, 2, 2)).shape == (1, 8, 4, 4)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize(
    "x,g,error,text",
    [
        ((2, 6, 8), (2, 8, 4, 4), ValueError, "x must have 4 dimensions"),
        ((2, 6, 8, 8), (2, 8, 4, 4, 4), ValueError, "g must have 4 dimensions"),
        ((2, 5, 8, 8), (2, 8, 4, 4), ValueError, "x must have 6 channels; got shape (2, 5, 8, 8)"),
        ((2, 8, 8, 8), (2, 6, 4, 4), ValueError, "are x and g swapped?"),
        ((2, 6, 8, 8), (3, 8, 4, 4), ValueError, "same batch size; got 2 and 3"),
        (
            (2, 6, 1, 8),
            (2, 8, 1, 4),
            ValueError,
            "x is too small for this gate: its grid (1, 8) becomes (0, 4)",
        ),
        ((2, 6, 8, 8), (2, 8, 0, 4), ValueError, "g is too small"),
    ],
)
def test_bad_inputs(backend, x, g, error, text):
    with pytest.raises(error) as caught:
        AttentionGate(6, 8, backend=backend)(torch.zeros(x), torch.zeros(g))
    assert text in str(caught.value)


def test_inputs_that_are_no_tensors_of_numbers():
    gate = AttentionGate(6, 8)
    x, g = torch.zeros(1, 6, 4, 4), torch.zeros(1, 8, 2, 2)
    with pytest.raises(TypeError, match="x must be a floating-point tensor; got a tensor of torch.int64"):
        gate(x.long(), g)
    with pytest.raises(TypeError, match="g must be a floating-point tensor; got NoneType"):
        gate(x, None)
    with pytest.raises(ValueError, match="same device; got cpu and meta"):
        gate(x, g.to("meta"))


def test_grids_that_have_to_agree():
    gate = AttentionGate(6, 8, preset="same_grid")
    with pytest.raises(
        ValueError, match=r"phi_resize='none' .* got \(5, 7\) from x and \(3, 4\) from g.*resize g"
    ):
        gate(torch.zeros(2, 6, 5, 7), torch.zeros(2, 8, 3, 4))
    gate = AttentionGate(6, 8, alpha_resize="none")
    with pytest.raises(
        ValueError, match=r"alpha_resize='none' needs alpha on x's grid \(8, 8\); got \(4, 4\)"
    ):
        gate(torch.zeros(2, 6, 8, 8), torch.zeros(2, 8, 4, 4))


def test_repr_tells_the_difference_from_the_default():
    text = repr(AttentionGate(6, 8, preset="keras", backend="eager"))
    assert "6, 8, 3, spatial_dims=2, theta_stride=(2, 2)" in text and "backend='eager'" in text
    assert "activation" not in text


def test_a_spec_is_a_preset():
    spec = GateSpec(spatial_dims=3, activation="silu")
    gate = AttentionGate(2, 2, preset=spec, psi_bias=False)
    assert gate.spec == spec.replace(psi_bias=False)
    assert isinstance(gate.theta, nn.Conv3d) and gate.psi.bias is None
