"""fuse_gates and unfuse_gates: what must stay as it was, when the original runs, and what the report says."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foreign import CONV, GridGate, LeeGate, TailGate, seasoned
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import attn_gate
from attn_gate import families, fuse, patch


class Net(nn.Module):
    """A level of LeeJunHyun's network and one of the authors'."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 6, 3, 2, 1)
        self.lee = seasoned(LeeGate(6, 3, 2))
        self.grid = seasoned(GridGate(3, 6))
        self.head = nn.Conv2d(6, 1, 1)

    def forward(self, x):
        g = self.down(x)
        up = F.interpolate(g, size=x.shape[2:])
        y, alpha = self.grid(x, g)
        return self.head(torch.cat([self.lee(g=up, x=x), y * alpha], 1))


@pytest.fixture
def net():
    return Net().eval()


def image(*size, n=2):
    return torch.randn(n, 3, *(size or (9, 12)))


def snapshot(net):
    """Everything of a model that fusing must not change."""
    return {
        "state": {k: v.clone() for k, v in net.state_dict().items()},
        "modules": [(name, id(m), m.training, repr(m)) for name, m in net.named_modules()],
        "parameters": [(name, id(p), p.requires_grad) for name, p in net.named_parameters()],
        "buffers": [(name, id(b)) for name, b in net.named_buffers()],
        "rng": torch.get_rng_state(),
    }


def same(a, b):
    assert a["state"].keys() == b["state"].keys()
    assert all(torch.equal(v, b["state"][k]) for k, v in a["state"].items())
    assert torch.equal(a["rng"], b["rng"])
    for key in ("modules", "parameters", "buffers"):
        assert a[key] == b[key], key


# ---- what stays, and the way back


@pytest.mark.parametrize("training", [False, True])
def test_fusing_changes_nothing_that_shows(net, training, runs):
    net.train(training)
    net.lee.eval()
    net.lee.W_g[0].weight.requires_grad_(False)
    before, classes, dicts = (
        snapshot(net),
        [type(m) for m in net.modules()],
        [set(vars(m)) for m in net.modules()],
    )
    with torch.no_grad():
        expected = copy.deepcopy(net)(x := image())
    before["rng"] = torch.get_rng_state()
    report = fuse.fuse_gates(net)
    same(before, snapshot(net))
    assert list(report.fused) == ["lee", "grid"]
    assert isinstance(net.lee, LeeGate) and isinstance(net.grid, GridGate)

    before_statistics = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected)
    assert runs == [net.grid, net.lee]
    assert training != all(torch.equal(v, before_statistics[k]) for k, v in net.state_dict().items())
    net.load_state_dict(before_statistics)

    assert fuse.unfuse_gates(net) == 2
    same(before, snapshot(net))
    assert [type(m) for m in net.modules()] == classes and [set(vars(m)) for m in net.modules()] == dicts
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected)
    assert len(runs) == 2 and set(report.skipped) == {"lee", "grid"} and fuse.unfuse_gates(net) == 0


def test_checkpoints_fit_both_ways(net):
    other = Net().eval()
    fuse.fuse_gates(other)
    other.load_state_dict(net.state_dict(), strict=True)
    x = image()
    torch.testing.assert_close(other(x), net(x))
    third = Net().eval()
    third.load_state_dict(other.state_dict(), strict=True)
    torch.testing.assert_close(third(x), net(x))


def test_hooks_on_the_gate_itself_stay_and_are_called(net, runs):
    seen = []
    net.lee.register_forward_hook(lambda module, args, output: seen.append("before"))
    fuse.fuse_gates(net)
    net.lee.register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    net(image())
    assert seen == [{"g", "x"}, "before"] and len(runs) == 2
    fuse.unfuse_gates(net)
    net(image())
    assert len(seen) == 4


def test_a_gate_alone_and_fusing_twice(runs):
    gate = LeeGate(6, 3, 2)
    assert list(fuse.fuse_gates(gate).fused) == [""]
    cls = type(gate)
    assert list(fuse.fuse_gates(gate, recompute=True).fused) == [""]
    assert type(gate) is cls and cls.__mro__[1] is LeeGate and patch.state_of(gate).recompute is True
    assert type(fuse_of(LeeGate(6, 3, 2))) is cls  # one class for all gates of a class
    fuse.unfuse_gates(gate)
    assert type(gate) is LeeGate


def fuse_of(module):
    fuse.fuse_gates(module)
    return module


@pytest.mark.parametrize("how", ["deepcopy", "copy", "pickle", "torch.save"])
def test_copies_and_pickles_stay_fused(net, runs, how):
    fuse.fuse_gates(net)
    x = image()
    with torch.no_grad():
        expected = net(x)
    if how == "torch.save":
        torch.save(net, buffer := io.BytesIO())
        other = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    else:
        copies = {
            "deepcopy": copy.deepcopy,
            "copy": copy.copy,
            "pickle": lambda m: pickle.loads(pickle.dumps(m)),
        }
        other = copies[how](net)
    runs.clear()
    with torch.no_grad():
        assert torch.equal(other(x), expected)
    assert runs == [other.grid, other.lee] and type(other.lee) is type(net.lee)
    fuse.unfuse_gates(other)
    assert type(other.lee) is LeeGate
    if how != "copy":  # a shallow copy shares its gates
        assert patch.state_of(net.lee) is not None
        other.lee.W_x[0].weight.data.zero_()
        with torch.no_grad():
            assert torch.equal(net(x), expected)


# ---- when the original runs


def watched(net, path):
    seen = []
    return seen, net.get_submodule(path).register_forward_hook(lambda m, args, output: seen.append(output))


@pytest.mark.parametrize("path", ["lee.psi", "lee.W_x", "lee.W_g", "lee.psi.0", "lee.psi.2", "lee.relu"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_inside_a_gate(net, runs, path, when):
    x = image()
    plain = net(x)
    if when == "after":
        report = fuse.fuse_gates(net)
        assert len(report.fused) == 2
    seen, handle = watched(net, path)
    if when == "before":
        report = fuse.fuse_gates(net)
    assert list(report.fused) == ["grid"]
    assert report.skipped == {"lee": f"a hook on {path[4:]} waits for that layer to be called"}
    torch.testing.assert_close(net(x), plain)
    assert len(seen) == 1 and runs == [net.grid]
    handle.remove()
    assert len(report.fused) == 2 and not report.skipped
    torch.testing.assert_close(net(x), plain)
    assert runs[1:] == [net.grid, net.lee]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "norm", [parametrizations.spectral_norm, parametrizations.weight_norm, nn.utils.spectral_norm]
)
def test_parametrised_layers(net, runs, norm, when):
    if when == "after":
        report = fuse.fuse_gates(net)
    norm(net.lee.W_x[0])
    expected = copy.deepcopy(net)
    fuse.unfuse_gates(expected)
    if when == "before":
        report = fuse.fuse_gates(net)
    assert list(report.fused) == ["grid"] and list(report.skipped) == ["lee"]
    assert "W_x.0" in report.skipped["lee"]
    torch.testing.assert_close(net(x := image()), expected(x))
    assert runs == [net.grid]
    if parametrize.is_parametrized(net.lee.W_x[0]):
        parametrize.remove_parametrizations(net.lee.W_x[0], "weight")
        assert list(report.fused) == ["lee", "grid"]


def test_layers_replaced_after_fusing(net, runs):
    report = fuse.fuse_gates(net)
    net.lee.psi.append(nn.Identity())
    assert report.skipped == {"lee": "psi.3 is a Identity now"}
    del net.lee.psi[3]
    assert not report.skipped
    net.lee.psi[2] = nn.Hardsigmoid()
    assert report.skipped == {"lee": "psi.2 is a Hardsigmoid now"}
    net.lee.W_x[0] = nn.Conv2d(3, 2, 1)
    net.lee.psi[2] = nn.Sigmoid()
    reference = copy.deepcopy(net)
    fuse.unfuse_gates(reference)
    torch.testing.assert_close(net(x := image()), reference(x))
    assert runs == [net.grid, net.lee]


class Adjustable(nn.Module):
    """A gate with what people turn while they train: dropout, a temperature, a flag, a plain function."""

    def __init__(self):
        super().__init__()
        self.W_g, self.W_x, self.psi = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 1, 1)
        self.act, self.drop, self.squash = nn.LeakyReLU(0.01), nn.Dropout(0.0), torch.sigmoid
        self.temperature, self.factor, self.shifts = 1.0, torch.tensor(1.0), [0.0, {"of": 0.0}]
        self.returns_alpha = False

    def forward(self, g, x):
        logits = self.psi(self.drop(self.act(self.W_g(g) + self.W_x(x)))) / self.temperature
        alpha = self.squash(logits * self.factor + self.shifts[0] + self.shifts[1]["of"])
        return (x * alpha, alpha) if self.returns_alpha else x * alpha


@pytest.mark.parametrize(
    "change,reason",
    [
        (lambda gate: setattr(gate, "temperature", 0.1), "temperature is 0.1 now"),
        (lambda gate: setattr(gate, "act", nn.LeakyReLU(0.2)), "act.negative_slope is 0.2 now"),
        (lambda gate: setattr(gate.drop, "p", 0.5), "drop.p is 0.5 now"),
        (lambda gate: setattr(gate, "returns_alpha", True), "returns_alpha is True now"),
        (lambda gate: setattr(gate, "squash", torch.tanh), "squash is <built-in"),
        (lambda gate: gate.factor.fill_(2), "factor is another tensor now"),
        (lambda gate: gate.shifts.__setitem__(0, 1.0), "shifts is [1.0, {'of': 0.0}] now"),
        (lambda gate: gate.shifts[1].update(of=1.0), "shifts is [0.0, {'of': 1.0}] now"),
        (lambda gate: setattr(gate.W_x, "padding", (1, 1)), "W_x.padding is (1, 1) now"),
        (lambda gate: setattr(gate, "W_x", nn.Conv2d(3, 4, 3, padding=1)), "W_x.kernel_size is (3, 3) now"),
        (lambda gate: delattr(gate, "temperature"), "temperature is gone"),
    ],
)
def test_what_a_gate_computes_with_may_change_after_fusing(change, reason, runs):
    gate = Adjustable()
    report = fuse.fuse_gates(gate)
    maps = [torch.randn(2, 3, 96, 96) for _ in range(2)]
    gate(*maps)
    assert runs == [gate] and not report.skipped
    change(gate)
    reference = copy.deepcopy(gate)
    fuse.unfuse_gates(reference)
    assert report.skipped[""].startswith(reason)
    for _ in range(2):  # the second time by what was decided
        torch.manual_seed(1)
        found = outcome(lambda: gate(*maps))
        torch.manual_seed(1)
        expected = outcome(lambda: reference(*maps))
        assert type(found) is type(expected)
        if isinstance(found, tuple) and isinstance(found[0], type):
            assert found == expected  # what is raised
        else:
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert runs == [gate]


def test_a_compiled_gate_follows_its_attributes():
    gate = Adjustable()
    fuse.fuse_gates(gate)
    compiled = torch.compile(gate, fullgraph=True, backend="eager")
    maps = [torch.randn(2, 3, 96, 96) for _ in range(2)]

    def check():
        reference = copy.deepcopy(gate)
        fuse.unfuse_gates(reference)
        torch.testing.assert_close(compiled(*maps), reference(*maps))

    check()
    gate.temperature = 0.1
    check()
    gate.temperature, gate.act = 1.0, nn.LeakyReLU(0.2)
    check()
    gate.factor.fill_(2)
    check()


def test_settings_that_make_no_difference(net, runs):
    fuse.fuse_gates(net)
    net.lee.relu.inplace = False
    net.lee.W_g[1].eps = net.lee.W_g[1].momentum = 0.3
    net.lee.of_somebody_else = 1
    reference = copy.deepcopy(net)
    fuse.unfuse_gates(reference)
    torch.testing.assert_close(net(x := image()), reference(x))
    assert runs == [net.grid, net.lee]


class Holding(LeeGate):
    """Computes with what it holds."""

    factor = 1.0

    def __init__(self, held=None):
        super().__init__(6, 3, 2)
        self.held = held

    def forward(self, g, x):
        logits = self.psi[1](self.psi[0](self.relu(self.W_g(g) + self.W_x(x))))
        return x * self.psi[2](logits * self.factor)


class Scale:
    def __init__(self, value):
        self.value = value

    def __call__(self, t):
        return t * self.value


HELD = {
    "nested dict": (lambda: {"att": {"t": 1.0}}, lambda held: held["att"].update(t=4.0)),
    "namespace": (lambda: types.SimpleNamespace(t=1.0), lambda held: setattr(held, "t", 4.0)),
    "array": (lambda: np.ones(2), lambda held: held.__setitem__(0, 4.0)),
    "callable": (lambda: Scale(1.0), lambda held: setattr(held, "value", 3.0)),
    "tensor": (lambda: torch.ones(2), lambda held: held.data.fill_(2)),
    "tensors": (lambda: [torch.ones(2)], lambda held: held[0].mul_(2)),
    "large tensor": (lambda: torch.ones(99), lambda held: held.mul_(2)),
    "set": (lambda: {1}, lambda held: held.add(2)),
}


@pytest.mark.parametrize("kind", HELD)
def test_what_a_gate_holds_may_change_inside(kind, runs):
    make, change = HELD[kind]
    gate = Holding(make()).eval()
    report = fuse.fuse_gates(gate)
    copies = [copy.deepcopy(gate), pickle.loads(pickle.dumps(gate)), copy.copy(gate)]
    maps = torch.randn(2, 6, 9, 9), torch.randn(2, 3, 9, 9)
    for each in (gate, *copies):
        each(*maps)
    assert runs == [gate, *copies]
    for each in copies[:2]:
        change(each.held)
        each(*maps)
    assert not report.skipped and len(runs) == 4
    change(gate.held)
    gate(*maps)
    assert report.skipped[""].startswith("held is ") and len(runs) == 4
    # A copy of it would do as the class does, not as was found before.
    for each in (copy.deepcopy(gate), pickle.loads(pickle.dumps(gate)), copy.copy(gate)):
        each(*maps)
    assert len(runs) == 4


@pytest.mark.parametrize(
    "held",
    [float("nan"), [float("nan")], (1, float("nan")), torch.Size([2]), F.relu, [nn.ReLU()], range(9),
     list(range(10**5)), torch.tensor(float("nan")), np.float32(1), Scale],
    ids=lambda held: type(held).__name__,
)  # fmt: skip
def test_what_a_gate_holds_is_the_same_in_copies(held, runs):
    gate = Holding(held).eval()
    report = fuse.fuse_gates(gate)
    for each in (gate, copy.deepcopy(gate), pickle.loads(pickle.dumps(gate))):
        each(torch.randn(2, 6, 9, 9), torch.randn(2, 3, 9, 9))
        assert runs.pop() is each
    assert not report.skipped


def test_tensors_of_a_sweep(runs):
    gate = Holding(torch.tensor(1.0)).eval()
    fuse.fuse_gates(gate)
    for value in range(2, 300):
        gate.held = torch.tensor(float(value))
        gate(torch.randn(1, 6, 2, 2), torch.randn(1, 3, 2, 2))
    assert not runs


@pytest.mark.parametrize(
    "change,reason",
    [
        (lambda gate: setattr(gate, "factor", 4.0), "factor is 4.0 now"),
        (lambda gate: setattr(gate.relu, "forward", torch.tanh), "relu.forward is <built-in"),
        (lambda gate: setattr(gate.W_x[0], "forward", torch.zeros_like), "W_x.0.forward is <built-in"),
    ],
)
def test_what_stands_before_an_attribute_of_the_class(change, reason, runs):
    gate = Holding().eval()
    report = fuse.fuse_gates(gate)
    gate.of_somebody_else = 3
    assert not report.skipped
    change(gate)
    assert report.skipped[""].startswith(reason)


def test_attributes_with_dots():
    gate = Holding().eval()
    gate.__dict__["a.b"] = 1
    report = fuse.fuse_gates(gate)
    gate.__dict__["a.b"] = 2
    assert report.skipped == {"": "a.b is 2 now"}


def test_equality_of_what_is_held_is_not_asked(runs):
    class Odd(Scale):
        def __eq__(self, other):
            raise ValueError

    gate = Holding(Odd(1.0)).eval()
    fuse.fuse_gates(gate)
    gate.held = Odd(1.0)
    gate(torch.randn(2, 6, 9, 9), torch.randn(2, 3, 9, 9))
    assert not runs


def test_a_compiled_module_is_pickled_as_before(net, runs):
    net.lee.compile(backend="eager")
    report = fuse.fuse_gates(net)
    copies = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    assert list(report.fused) == ["lee", "grid"]
    for each in copies:
        each(image())
        assert runs[-2:] == [each.grid, each.lee]


def test_what_was_missing_in_a_gate_is_missing_in_its_copies(net, runs):
    fuse.fuse_gates(net)
    net.lee.psi[2] = None
    with pytest.raises(TypeError):
        copy.deepcopy(net)(image())
    assert [type(gate) for gate in runs] == [type(net.grid)]


class Wrapper(nn.Module):
    """Passes on what it wraps, as many do."""

    def __init__(self, gate):
        super().__init__()
        self.gate = gate

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.gate, name)

    def forward(self, g, x):
        return self.gate(g, x)


def test_a_wrapper_is_no_gate_but_what_it_wraps_is(runs):
    wrapper = Wrapper(seasoned(LeeGate(6, 3, 2))).eval()
    maps = torch.randn(2, 6, 9, 9), torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        expected = wrapper(*maps)
        report = fuse.fuse_gates(wrapper)
        assert list(report.fused) == ["gate"] and not report.skipped and "gate" in str(report)
        torch.testing.assert_close(wrapper(*maps), expected)
    assert runs == [wrapper.gate]


def test_norms_folded_into_layers_after_fusing(net, runs):
    expected = net(x := image())
    report = fuse.fuse_gates(net)
    for name in ("W_g", "W_x"):
        setattr(net.lee, name, torch.nn.utils.fuse_conv_bn_eval(*getattr(net.lee, name)))
    torch.testing.assert_close(net(x), expected)
    assert runs == [net.grid] and report.skipped == {"lee": "W_g is a Conv2d now"}
    with attn_gate.capture_attention(net) as maps:
        net(x)
    assert list(maps) == ["grid", "lee"]


class Empty(nn.Module):
    """Named as a gate's layers are, without a parameter."""

    def __init__(self):
        super().__init__()
        self.theta, self.phi, self.psi = nn.Identity(), nn.Identity(), nn.Identity()


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_layers_without_parameters(net, backend):
    net.empty = Empty()
    report = fuse.fuse_gates(net, backend)
    assert list(report.fused) == ["lee", "grid"] and list(report.skipped) == ["empty"]


def test_a_class_that_others_cannot_inherit_from(net, runs):
    class Sealed(LeeGate):
        def __init_subclass__(cls, *, key):
            pass

    net.lee = seasoned(Sealed(6, 3, 2)).eval()
    report = fuse.fuse_gates(net)
    assert list(report.fused) == ["grid"]
    assert report.skipped["lee"].startswith("its class can't be inherited from: TypeError: ")
    net(image())
    assert runs == [net.grid]


def test_what_is_raised_on_the_way_leaves_no_gate_fused(net, monkeypatch):
    monkeypatch.setattr(fuse, "GateEntry", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fuse.fuse_gates(net)
    assert fuse.unfuse_gates(net) == 0


def test_hooks_on_all_modules(net, runs):
    report = fuse.fuse_gates(net)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    net(image())
    assert not runs and net.lee.psi[0] in seen and "on all modules" in report.skipped["lee"]
    handle.remove()
    net(image())
    assert len(runs) == 2


def outcome(function):
    try:
        return function()
    except Exception as error:
        return type(error), str(error)


CALLS = {
    "positional": lambda gate, x, g: gate(g, x),
    "keywords": lambda gate, x, g: gate(x=x, g=g),
    "mixed": lambda gate, x, g: gate(g, x=x),
    "broadcast": lambda gate, x, g: gate(g[:, :, :1, :1], x),
    "broadcast batch": lambda gate, x, g: gate(g[:1], x),
    "one sample without batch": lambda gate, x, g: gate(g[0], x[0]),
    "empty batch": lambda gate, x, g: gate(g[:0], x[:0]),
    "other grid": lambda gate, x, g: gate(g[..., 1:], x),
    "swapped": lambda gate, x, g: gate(x, g),
    "too few": lambda gate, x, g: gate(g),
    "too many": lambda gate, x, g: gate(g, x, x),
    "unknown keyword": lambda gate, x, g: gate(g, y=x),
    "double for float": lambda gate, x, g: gate(g.double(), x.double()),
    "bfloat16 for float": lambda gate, x, g: gate(g, x.bfloat16()),
    "no tensor": lambda gate, x, g: gate(g, None),
    "integers": lambda gate, x, g: gate(g.long(), x.long()),
}
FUSED_CALLS = {"positional", "keywords", "mixed", "empty batch"}


@pytest.mark.parametrize("call", CALLS)
def test_every_call_ends_as_it_did(call, runs):
    gate = seasoned(LeeGate(8, 6, 4)).eval()
    fused = fuse_of(copy.deepcopy(gate))
    x, g = torch.randn(2, 6, 5, 7), torch.randn(2, 8, 5, 7)
    expected, found = outcome(lambda: CALLS[call](gate, x, g)), outcome(lambda: CALLS[call](fused, x, g))
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and found.stride() == expected.stride()
        torch.testing.assert_close(found, expected)
    else:
        assert found == expected
    assert len(runs) == (call in FUSED_CALLS)


@pytest.mark.parametrize("size", [(1, 1), (1, 5)])
def test_statistics_of_a_single_value_are_refused_as_before(size):
    gate = fuse_of(seasoned(LeeGate(8, 6, 4)).train())
    x, g = torch.randn(1, 6, *size), torch.randn(1, 8, *size)
    if size == (1, 1):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            gate(g, x)
    else:
        gate(g, x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("g_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [LeeGate, GridGate])
def test_autocast_gives_the_same_dtypes_and_layouts(kind, dtype, g_dtype, layout, runs):
    gate = seasoned(LeeGate(8, 6, 4) if kind is LeeGate else GridGate(6, 8)).eval()
    fused = fuse_of(copy.deepcopy(gate))
    x, g = torch.randn(2, 6, 8, 8), torch.randn(2, 8, *((8, 8) if kind is LeeGate else (4, 4)))
    exact = gate(*((g, x) if kind is LeeGate else (x, g)))
    x, g = x.to(dtype, memory_format=layout), g.to(g_dtype, memory_format=layout)
    args = (g, x) if kind is LeeGate else (x, g)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = gate(*args), fused(*args)
    for e, f, t in zip(*[r if isinstance(r, tuple) else (r,) for r in (expected, found, exact)], strict=True):
        assert (f.dtype, f.shape) == (e.dtype, e.shape)
        assert (f.float() - t).abs().max() <= 2 * (e.float() - t).abs().max() + 2**-7 * t.abs().max()
    first = found[0] if isinstance(found, tuple) else found
    assert first.is_contiguous(memory_format=layout) and len(runs) == 1


class Labelled(torch.Tensor):
    """A tensor that knows more than numbers, as MONAI's MetaTensor."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs)
        labels = [a.label for a in args if isinstance(a, cls) and hasattr(a, "label")]
        for t in result if isinstance(result, tuple) else (result,):
            if isinstance(t, cls) and labels:
                t.label = labels[0]
        return result


def test_tensors_with_meaning_keep_it(runs):
    x = torch.randn(2, 6, 5, 7).as_subclass(Labelled)
    x.label = "a scan"
    gate = seasoned(LeeGate(8, 6, 4)).eval()
    expected = gate(g := torch.randn(2, 8, 5, 7), x)
    found = fuse_of(gate)(g, x)
    assert type(found) is Labelled and found.label == expected.label == "a scan" and len(runs) == 1
    torch.testing.assert_close(found.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_model_may_change_its_dtype(net, runs, dtype):
    fuse.fuse_gates(net)
    net.to(dtype)
    reference = copy.deepcopy(net)
    fuse.unfuse_gates(reference)
    x = image().to(dtype)
    tolerance = {} if dtype == torch.float64 else {"rtol": 5e-2, "atol": 5e-2}
    torch.testing.assert_close(net(x), reference(x), **tolerance)
    assert len(runs) == 2


# ---- other models and families


def test_gates_of_attn_gate_are_not_touched():
    net = attn_gate.AttentionUNet(2, 1, 1, (4, 8, 8))
    report = fuse.fuse_gates(net)
    assert not report.gates and str(report) == "no attention gates found"


def test_a_model_on_the_meta_device(net):
    with torch.device("meta"):
        empty = Net().eval()
    assert len(fuse.fuse_gates(empty).fused) == 2
    assert empty(image().to("meta")).shape == (2, 1, 9, 12)
    empty.to_empty(device="cpu").load_state_dict(net.state_dict())
    torch.testing.assert_close(empty(x := image()), net(x))


def test_a_gate_that_is_not_initialised_yet():
    gate = LeeGate(8, 6, 4)
    gate.W_x[0] = nn.LazyConv2d(4, 1)
    report = fuse.fuse_gates(gate)
    assert "run the model once" in report.skipped[""]
    gate(torch.randn(2, 8, 5, 5), torch.randn(2, 6, 5, 5))
    assert fuse.fuse_gates(gate).fused


def test_shared_gates_and_shared_layers(runs):
    gate = seasoned(LeeGate(6, 6, 4)).eval()
    gate.W_x = gate.W_g
    net = nn.ModuleDict({"a": gate, "b": gate})
    expected = gate(g := torch.randn(2, 6, 5, 5), x := torch.randn(2, 6, 5, 5))
    assert len(fuse.fuse_gates(net).fused) == 1
    torch.testing.assert_close(net["b"](g, x), expected)
    assert len(runs) == 1


class Listed(LeeGate):
    """Holds its layers in plain lists too, and a tensor that is no buffer."""

    def __init__(self):
        super().__init__(6, 3, 2)
        self.layers = {"projections": [self.W_g, self.W_x], "rest": (self.relu, self.psi)}
        self.one = torch.ones(())

    def forward(self, g, x):
        w_g, w_x = self.layers["projections"]
        relu, psi = self.layers["rest"]
        return x * psi(relu(w_g(g) + w_x(x))) * self.one


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [Listed, lambda: GridGate(3, 6)])
def test_the_probe_runs_a_twin_whatever_the_gate_holds(make, dtype, runs):
    gate = seasoned(make()).to(dtype)  # in training mode: a run of it would show in its statistics
    if isinstance(gate, Listed):
        gate.one = gate.one.to(dtype)
    before = snapshot(gate)
    assert fuse.fuse_gates(gate).fused
    same(before, snapshot(gate))


class Mine(nn.Module):
    """A gate with names that nobody else has."""

    def __init__(self, dims):
        super().__init__()
        self.skip, self.gating, self.score = CONV[dims](6, 4, 1), CONV[dims](8, 4, 1), CONV[dims](4, 1, 1)

    def forward(self, skip, gating):
        return skip * torch.sigmoid(self.score(F.gelu(self.skip(skip) + self.gating(gating))))


def test_a_registered_family(runs, monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", list(families.FAMILIES))
    gate = Mine(3)
    assert fuse.fuse_gates(gate).gates[0].family == "by its layers"
    attn_gate.register_family(attn_gate.GateFamily(name="mine", x="skip", g="gating", psi="score"))
    x, g = torch.randn(2, 6, 3, 4, 5), torch.randn(2, 8, 3, 4, 5)
    fuse.unfuse_gates(gate)
    expected = gate(x, g)
    report = fuse.fuse_gates(gate)
    assert report.gates[0].family == "mine"
    torch.testing.assert_close(gate(skip=x, gating=g), expected)
    assert len(runs) == 1 and patch.state_of(gate).found.spec.activation == "gelu"

    attn_gate.register_family(attn_gate.GateFamily(name="no gelu", x="skip", g="gating", psi="score",
                                                   options={"activation": ["relu"]}))  # fmt: skip
    assert fuse.fuse_gates(gate).gates[0].family == "mine"  # the next family whose layers these are


def test_bad_families():
    with pytest.raises(TypeError, match="family must be a GateFamily; got str"):
        attn_gate.register_family("mine")
    with pytest.raises(TypeError, match="psi of a GateFamily must be a non-empty string; got None"):
        attn_gate.GateFamily(name="mine", x="a", g="b", psi=None)
    with pytest.raises(ValueError, match="options of a GateFamily are resize, .*; got 'activaton'"):
        attn_gate.GateFamily(name="mine", x="a", g="b", psi="c", options={"activaton": ["relu"]})
    with pytest.raises(TypeError, match="out of a GateFamily must be a non-empty string; got 3"):
        attn_gate.GateFamily(name="mine", x="a", g="b", psi="c", out=3)
    for options, error, text in (
        ({"resize": "linear"}, TypeError, "must be values to try; got 'linear'"),
        ({"resize": []}, TypeError, r"must be values to try; got \[\]"),
        ({"activation": ["swish"]}, ValueError, "must be one of 'relu', .*; got 'swish'"),
    ):
        key = next(iter(options))
        with pytest.raises(error, match=rf"options\['{key}'\] of a GateFamily {text}"):
            attn_gate.GateFamily(name="mine", x="a", g="b", psi="c", options=options)


# ---- the report and the arguments


def test_the_report_prints_without_rich(net, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    net.lee.relu.register_forward_hook(lambda *args: None)
    assert str(fuse.fuse_gates(net)).splitlines() == [
        "1 of 2 attention gates run fused",
        "  grid: whole gate, one operator",
        "  lee: left alone: a hook on relu waits for that layer to be called",
    ]


def test_the_report_is_live_and_prints(net):
    report = fuse.fuse_gates(net)
    assert report.fused["lee"] == "whole gate, one operator"
    net.train()
    by_size = "where maps are large; left to PyTorch's layers where they are small (batch norms need"
    assert by_size in report.fused["lee"] and report.fused["grid"] == "whole gate, one operator"
    assert "maps are" not in fuse.fuse_gates(net, recompute=True).fused["lee"]
    assert fuse.fuse_gates(net, recompute=False).fused["lee"].startswith("sum to logits, and the product (")
    report = fuse.fuse_gates(net)
    net.grid.psi.register_forward_hook(lambda *args: None)
    deep = nn.ModuleDict({"a_name_as_long_as_those_of_monai": nn.ModuleDict({"longer_still": net})})
    lines = str(fuse.fuse_gates(deep)).splitlines()
    assert any(line.rstrip().endswith("backend") for line in lines) and max(map(len, lines)) <= 100
    text = " ".join(str(report).split())
    assert "1 of 2 attention gates run fused" in text
    assert "left alone: a hook on psi" in text and "cpu" in text
    assert [gate.backend for gate in report.gates] == ["cpu", ""]


def test_the_report_of_the_eager_backend(net):
    report = fuse.fuse_gates(net, "eager")
    assert set(report.fused.values()) == {"nothing: PyTorch's operators in place of the fused ones"}
    assert [gate.backend for gate in report.gates] == ["eager", "eager"]


def test_deep_gates_are_left_alone_in_training_mode_unless_their_projections_are_products(monkeypatch):
    gate = LeeGate(512, 512, 256).train()
    monkeypatch.setattr(attn_gate.pointwise, "_HAS_MKL", True)
    report = fuse.fuse_gates(gate)
    assert report.fused[""].startswith(
        "sum to logits, and the product where maps are large; left to PyTorch's"
    )
    monkeypatch.setattr(attn_gate.pointwise, "_IS_AMD", True)
    assert not report.fused  # where convolutions are the faster way
    monkeypatch.setattr(attn_gate.pointwise, "_IS_AMD", False)
    assert report.fused
    monkeypatch.setattr(attn_gate.pointwise, "_HAS_MKL", False)
    assert not report.fused and "PyTorch's layers are the faster way" in report.skipped[""]
    gate.eval()
    assert report.fused[""] == "whole gate, one operator"
    assert fuse.fuse_gates(gate.train(), recompute=True).fused


def test_norms_over_instances_are_left_alone_in_inference():
    gate = seasoned(TailGate("instance")).eval()
    report = fuse.fuse_gates(gate)
    assert "in eval mode its norms need statistics" in report.skipped[""]
    gate.train()
    assert "where maps are large; left to PyTorch's layers where they are small" in report.fused[""]


@pytest.mark.parametrize("size,fused", [(48, False), (224, True)])
def test_small_maps_run_the_original_in_training_mode(size, fused, runs):
    gate = seasoned(LeeGate(16, 16, 8))
    expected = copy.deepcopy(gate)
    assert fuse.fuse_gates(gate).fused
    x, g = torch.randn(1, 16, size, size), torch.randn(1, 16, size, size)
    with attn_gate.capture_attention(gate) as maps:
        y = gate(g, x)
    assert len(runs) == fused and maps[""].shape == (1, 1, size, size)
    torch.testing.assert_close(y, expected(g, x), rtol=1e-4, atol=1e-4)
    assert fused or torch.equal(y, expected(g, x))  # itself, not something like it
    with torch.no_grad():
        gate(g, x)
    assert len(runs) == 2 * fused
    gate.eval()(g, x)
    assert len(runs) == 2 * fused + 1


def test_bad_arguments(net):
    with pytest.raises(TypeError, match="model must be a torch.nn.Module; got dict"):
        fuse.fuse_gates({})
    with pytest.raises(TypeError, match="model must be a torch.nn.Module; got int"):
        fuse.unfuse_gates(1)
    with pytest.raises(ValueError, match="backend must be one of 'auto', .* got 'gpu'"):
        fuse.fuse_gates(net, "gpu")
    with pytest.raises(ValueError, match="backend is 'cuda', which can't be used for lee: "):
        fuse.fuse_gates(net, "cuda")
    with pytest.raises(ValueError, match="recompute must be 'auto', True or False; got 'always'"):
        fuse.fuse_gates(net, recompute="always")
    assert patch.state_of(net.lee) is None


def test_recompute_and_backend_reach_the_operators(monkeypatch):
    seen = []
    run = attn_gate.functional.run_whole
    monkeypatch.setattr(attn_gate.functional, "run_whole", lambda *args: seen.append(args[-2:]) or run(*args))
    gate = GridGate(6, 8)
    fuse.fuse_gates(gate, "cpu", recompute=False)
    gate(torch.randn(2, 6, 8, 8), torch.randn(2, 8, 4, 4))
    assert seen[-1] == (False, "cpu")


def test_scripted_gates_and_replaced_forwards_are_left_alone():
    scripted = torch.jit.script(LeeGate(6, 3, 2))
    assert "TorchScript" in fuse.fuse_gates(nn.Sequential(scripted)).skipped["0"]
    gate = LeeGate(6, 3, 2)
    gate.forward = lambda g, x: x
    assert "replaced on the instance" in fuse.fuse_gates(gate).skipped[""]


# ---- the maps


def test_maps_of_fused_gates_of_gates_with_hooks_and_of_our_own(net):
    x = image()
    handle = net.grid.register_forward_hook(lambda m, args, out: expected.update(grid=out[1]))
    expected = {}
    net.lee.psi.register_forward_hook(lambda m, args, out: expected.update(lee=out))
    net(x)
    handle.remove()
    report = fuse.fuse_gates(net)
    assert list(report.skipped) == ["lee"]
    with attn_gate.capture_attention(net) as maps:
        assert maps == {}
        net(x)
    assert not maps["lee"].requires_grad
    torch.testing.assert_close(maps["lee"], expected["lee"])
    torch.testing.assert_close(
        F.interpolate(maps["grid"], size=x.shape[2:], mode="bilinear"), expected["grid"]
    )
    kept = dict(maps)
    net(image())
    assert all(maps[name] is kept[name] for name in kept)  # nothing is captured outside of the block
    assert len(net.lee.psi._forward_hooks) == 1 and not net.lee.psi[1]._forward_hooks

    ours = attn_gate.AttentionUNet(2, 1, 1, (4, 8, 8))
    with attn_gate.capture_attention(ours) as maps, attn_gate.capture_attention(ours.gates[0]) as inner:
        _, theirs = ours(image()[:, :1], return_attention=True)
    assert set(inner) == {""} and set(maps) == {"gates.1"}
    with attn_gate.capture_attention(ours) as maps:
        _, theirs = ours(x := image()[:, :1], return_attention=True)
    assert set(maps) == set(theirs) == {"gates.0", "gates.1"}

    with pytest.raises(ValueError, match=r"call attn_gate.fuse_gates\(model\) first"):
        with attn_gate.capture_attention(nn.Linear(2, 2)):
            pass


def test_maps_of_a_compiled_model(net):
    fuse.fuse_gates(net)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    x = image()
    with torch.no_grad():
        y = compiled(x)
        with attn_gate.capture_attention(compiled) as maps:
            torch.testing.assert_close(compiled(x), y)
        assert set(maps) == {"lee", "grid"}
        with attn_gate.capture_attention(net) as expected:
            net(x)
    torch.testing.assert_close(maps, expected)


def test_pictures_of_maps(net, tmp_path):
    pytest.importorskip("matplotlib")
    fuse.fuse_gates(net)
    with attn_gate.capture_attention(net) as maps:
        net(x := image())
    figure = attn_gate.plot_attention(x, maps, sample=1, channel=2)
    pictures = [axis.get_images() for axis in figure.axes if axis.get_images()]
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["image", "grid", "lee"]
    shown = pictures[0][0].get_array()
    torch.testing.assert_close(torch.as_tensor(shown), x[1, 2])
    overlay = torch.as_tensor(pictures[2][1].get_array())
    torch.testing.assert_close(overlay, maps["lee"][1, 0])
    figure.savefig(tmp_path / "maps.png")

    volume = torch.randn(1, 1, 6, 8, 10)
    alpha = torch.rand(1, 1, 3, 4, 5)
    figure = attn_gate.plot_attention(volume, {"gate": alpha}, position=(2, 3, 4), limits=(0, 1))
    planes = [axis.get_images()[0].get_array() for axis in figure.axes if axis.get_images()][::2]
    for plane, cut in zip(planes, (volume[0, 0, 2], volume[0, 0, :, 3], volume[0, 0, :, :, 4]), strict=True):
        torch.testing.assert_close(torch.as_tensor(plane), cut)


@pytest.mark.parametrize(
    "arguments,text",
    [
        ({"image": torch.zeros(8, 8)}, "image must be a tensor"),
        ({"maps": {}}, "maps is empty"),
        ({"sample": 3}, "sample must be in 0..1; got 3"),
        ({"channel": -1}, "channel must be in 0..2; got -1"),
        ({"maps": {"a": torch.zeros(2, 1, 4)}}, r"maps\['a'\] must be \[N, K, \*R\]"),
        ({"position": (8, 0)}, "position must be a voxel"),
    ],
)
def test_bad_pictures(arguments, text):
    with pytest.raises(ValueError, match=text):
        attn_gate.plot_attention(
            **{"image": torch.zeros(2, 3, 8, 8), "maps": {"a": torch.zeros(2, 1, 4, 4)}} | arguments
        )


def test_every_family_has_its_layers_named_once():
    gates = {"MONAI, LeeJunHyun": LeeGate(4, 4, 2), "Oktay (grid attention)": GridGate(4, 4)}
    for name, gate in gates.items():
        assert [f.name for f in families.FAMILIES if families.has_layers(f, gate)] == [name]
    assert not any(families.has_layers(f, nn.Sequential(TailGate())) for f in families.FAMILIES)
