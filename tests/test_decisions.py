"""What is decided once for calls alike: the same as if it were decided anew at each of them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from attn_gate import AttentionGate, decisions, engine, fuse, patch

SIZES = {"x": (2, 8, 6, 6), "g": (2, 8, 6, 6)}


class Gate(nn.Module):
    """LeeJunHyun's."""

    def __init__(self, channels=8):
        super().__init__()
        inter = channels // 2
        self.W_g = nn.Sequential(nn.Conv2d(channels, inter, 1), nn.BatchNorm2d(inter))
        self.W_x = nn.Sequential(nn.Conv2d(channels, inter, 1), nn.BatchNorm2d(inter))
        self.psi = nn.Sequential(nn.Conv2d(inter, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid())
        self.relu = nn.ReLU(inplace=True)

    def forward(self, g, x):
        return x * self.psi(self.relu(self.W_g(g) + self.W_x(x)))


@pytest.fixture
def decided(monkeypatch):
    """A note of each time that a plan was found."""
    found = []
    fusion = engine.fusion
    monkeypatch.setattr(
        engine, "fusion", lambda *args, **options: found.append(args) or fusion(*args, **options)
    )
    return found


def maps(**changes):
    return [torch.randn({**SIZES, **changes}[name]) for name in ("x", "g")]


def test_alike_is_decided_once(decided):
    gate = AttentionGate(8, 8, preset="same_grid").eval()
    for _ in range(3):
        gate(*maps())
    assert len(decided) == 1
    copy.deepcopy(gate)(*maps())
    pickle.loads(pickle.dumps(gate))(*maps())
    assert len(decided) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda gate: gate.train(),
        lambda gate: gate.theta_norm.train(),
        lambda gate: gate.psi.register_forward_hook(lambda *args: None),
        lambda gate: setattr(gate, "recompute", True),
        lambda gate: setattr(gate, "backend", "cpu"),
        lambda gate: setattr(gate, "phi_norm", nn.InstanceNorm2d(4)),
        lambda gate: setattr(gate, "phi_norm", None),
        lambda gate: parametrizations.weight_norm(gate.phi),
        lambda gate: setattr(gate, "spec", gate.spec.replace(normaliser="softmax")),
        lambda gate: setattr(gate, "spec", gate.spec.replace(combine="multiply")),
        lambda gate: vars(gate.theta_norm)["_buffers"].update(running_mean=None, running_var=None),
    ],
)
def test_what_a_gate_s_decision_depends_on(decided, change):
    gate = AttentionGate(8, 8, preset="same_grid").eval()
    gate(*maps())
    change(gate)
    x, g = maps()
    twin = copy.deepcopy(gate)
    twin.backend = "eager"
    for _ in range(2):
        torch.testing.assert_close(gate(x, g), twin(x, g))
    assert len(decided) == 2  # the twin needs no plan


def test_what_maps_and_modes_decide(decided):
    gate = AttentionGate(8, 8, preset="same_grid", theta_norm="none", phi_norm="none", psi_norm="none")
    x, g = maps()
    calls = [
        lambda: gate(x, g),
        lambda: gate(*maps(x=(2, 8, 7, 6), g=(2, 8, 7, 6))),
        lambda: gate(x.to(memory_format=torch.channels_last), g),
        lambda: gate(x, g.to(memory_format=torch.channels_last)),
        torch.no_grad()(lambda: gate(x, g)),
        torch.autocast("cpu", torch.bfloat16)(lambda: gate(x, g)),
        torch.autocast("cpu", torch.float16)(lambda: gate(x, g)),
    ]
    for count, call in enumerate(calls, 1):
        call()
        call()
        assert len(decided) == count
    gate.double()(*[t.double() for t in (x, g)])
    assert len(decided) == len(calls) + 1


def test_bad_maps_are_refused_each_time():
    gate = AttentionGate(8, 4, preset="paper")
    for _ in range(2):
        with pytest.raises(ValueError, match="are x and g swapped"):
            gate(torch.randn(2, 4, 6, 6), torch.randn(2, 8, 3, 3))
        with pytest.raises(TypeError, match="x must be a floating-point tensor; got list"):
            gate([1.0], torch.randn(2, 4, 3, 3))


def test_what_others_may_change_is_decided_at_each_call(decided):
    gate = AttentionGate(8, 8, preset="same_grid").train()
    gate.theta_norm = nn.SyncBatchNorm(4)  # its process group comes and goes
    gate.recompute = True
    for _ in range(2):
        gate(*maps())
    assert len(decided) == 2
    gate = gate.eval()
    gate.theta_norm = nn.BatchNorm2d(4).eval()
    for _ in range(2):
        torch.func.vmap(gate)(*[t[:, None] for t in maps()])
    assert len(decided) == 4


def test_few_are_kept():
    gate = AttentionGate(8, 8, preset="same_grid").eval()
    for n in range(2 * decisions._MOST):
        gate(*maps(x=(1, 8, 1, n + 1), g=(1, 8, 1, n + 1)))
    assert 0 < len(gate._decisions._kept) <= decisions._MOST


@pytest.fixture
def planned(monkeypatch):
    """Plans that fused gates of others ran by."""
    plans = []
    run = patch.FusedGate.run
    monkeypatch.setattr(
        patch.FusedGate,
        "run",
        lambda self, gate, plan, *maps: plans.append(plan) or run(self, gate, plan, *maps),
    )
    return plans


def test_a_fused_gate_follows_its_layers(planned):
    gate = Gate().eval()
    fuse.fuse_gates(gate)
    x, g = maps()
    expected = [gate(g, x) for _ in range(2)]
    assert planned == ["whole", "whole"] and torch.equal(*expected)
    seen = []
    handle = gate.psi.register_forward_hook(lambda *args: seen.append(args))
    for _ in range(2):
        torch.testing.assert_close(gate(g, x), expected[0])
    assert len(seen) == 2 and len(planned) == 2
    handle.remove()
    gate(g, x)
    assert planned[2:] == ["whole"]
    gate.W_x[0] = parametrizations.weight_norm(gate.W_x[0])
    gate(g, x)
    assert len(planned) == 3


def test_a_gate_left_alone_is_fused_once_its_norms_are_frozen(planned):
    gate = Gate().train()
    fuse.fuse_gates(gate)
    x, g = maps()
    for _ in range(2):
        gate(g, x)
    assert not planned
    gate.psi[0].register_forward_hook(lambda *args: None)
    gate(g, x)
    gate.psi[0]._forward_hooks.clear()
    for norm in (gate.W_g[1], gate.W_x[1]):
        norm.eval()
    gate(g, x)
    assert planned == ["whole_logits"]


def test_gates_below_the_size_that_pays_have_products_in_training(planned, monkeypatch):
    """Where PyTorch's layers are the faster way its 1x1 convolutions still are products of matrices."""
    from attn_gate import pointwise

    monkeypatch.setattr(pointwise, "_HAS_MKL", True)
    products, product = [], pointwise._product
    monkeypatch.setattr(
        pointwise, "_product", lambda x, *weights: products.append(x.shape[1]) or product(x, *weights)
    )
    gate = Gate(128).double().train()
    twin = copy.deepcopy(gate)
    fuse.fuse_gates(gate)
    x, g = (torch.randn(1, 128, 32, 32, dtype=torch.float64) for _ in range(2))

    def step(module):
        inputs = [t.clone().requires_grad_() for t in (g, x)]
        y = module(*inputs)
        grads = torch.autograd.grad(y.square().sum(), [*inputs, *module.parameters()])
        return [y, *grads, *module.buffers()]

    for found, expected in zip(step(gate), step(twin), strict=True):
        torch.testing.assert_close(found, expected)
    assert planned == ["eager"] and products == [128, 128, 64]
    small = x[..., :16].contiguous(), g[..., :16].contiguous()
    assert torch.equal(gate(*small), twin(*small)) and len(planned) == 1
    with torch.no_grad():
        gate(g, x)
    assert len(products) == 3


def test_scripted_layers_are_called():
    gate = AttentionGate(8, 8, preset="same_grid", theta_norm="none", phi_norm="none", psi_norm="none")
    x, g = maps()
    expected = gate(x, g)
    gate.theta = torch.jit.script(gate.theta)
    torch.testing.assert_close(gate(x, g), expected)


def test_a_layer_of_another_shape_is_refused_by_name():
    """What the operators would be told of it is checked when a call is decided."""
    gate = AttentionGate(8, 8, preset="same_grid").eval()
    gate(*maps())
    gate.phi = nn.Conv2d(8, gate.inter_channels + 1, 1)
    gate.phi_norm = None
    with pytest.raises(ValueError, match="phi_weight must have shape"):
        gate(*maps())


def test_frozen_layers_are_called():
    gate = AttentionGate(8, 8, preset="same_grid").eval()
    x, g = maps()
    expected = gate(x, g)
    gate.theta = torch.jit.freeze(torch.jit.script(gate.theta))
    torch.testing.assert_close(gate(x, g), expected)


def test_a_fused_gate_that_lost_its_norm_runs_as_it_is(planned):
    gate = Gate().train()
    fuse.fuse_gates(gate)
    x, g = maps()
    gate(g, x)
    gate.W_x = nn.Sequential(gate.W_x[0])
    assert gate(g, x).shape == x.shape and not planned


def test_the_eager_backend_takes_any_layer():
    gate = AttentionGate(8, 8, preset="same_grid").train()
    x, g = maps()
    expected = gate(x, g)
    gate.theta, gate.backend = nn.Sequential(gate.theta), "eager"
    torch.testing.assert_close(gate(x, g), expected)


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_exported_programs_run_at_sizes_that_would_be_decided_otherwise(norm):
    gate = AttentionGate(8, 8, preset="same_grid", theta_norm=norm, phi_norm=norm).train(norm == "instance")
    batch, height = torch.export.Dim("batch"), torch.export.Dim("height")
    shapes = ({0: batch, 2: height}, {0: batch, 2: height})
    program = torch.export.export(gate, tuple(maps()), dynamic_shapes=shapes).module()
    x, g = maps(x=(4, 8, 2000, 6), g=(4, 8, 2000, 6))
    torch.testing.assert_close(program(x, g), gate(x, g), rtol=1e-4, atol=1e-5)
