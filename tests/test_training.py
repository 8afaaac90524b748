"""Batch norms in training mode, projections made again in every pass: the numbers of the norms as modules."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from attn_gate import AttentionGate, functional, pointwise
from attn_gate.judge import judge
from attn_gate.norms import BiasedBatchNorm

ALL = {f"{layer}_norm": "batch" for layer in ("theta", "phi", "psi")}
GATES = {
    "same grid": ({"preset": "same_grid"}, (2, 16, 9, 14), (2, 12, 9, 14)),
    "same grid 3D": ({"preset": "same_grid", "spatial_dims": 3}, (1, 8, 5, 6, 7), (1, 9, 5, 6, 7)),
    "paper": ({"preset": "paper", **ALL}, (2, 6, 12, 14), (2, 9, 6, 7)),
    "paper, odd sizes": ({"preset": "paper", **ALL}, (2, 6, 13, 15), (2, 9, 4, 5)),
    "only theta": ({"preset": "paper", "theta_norm": "batch"}, (2, 6, 12, 14), (2, 9, 6, 7)),
    "only phi, Keras": (
        {"preset": "keras", "phi_norm": "batch", "output": "none"}, (2, 6, 13, 14), (2, 9, 7, 7),
    ),
    "biased": ({"preset": "same_grid", "norm_biased_variance": True}, (2, 6, 5, 6), (2, 6, 5, 6)),
    "softmax": ({"preset": "same_grid", "normaliser": "softmax"}, (2, 6, 5, 6), (2, 6, 5, 6)),
    "psi by groups": ({"preset": "same_grid", "psi_norm": "group"}, (2, 6, 5, 6), (2, 6, 5, 6)),
}  # fmt: skip
in_all_gates = pytest.mark.parametrize("options,x_size,g_size", GATES.values(), ids=GATES)


def make(options, x_size, g_size, dtype=torch.float32):
    """A gate whose norms are folded in training, and maps for it."""
    gate = AttentionGate(x_size[1], g_size[1], 5, recompute=True, **options).to(dtype).train()
    for parameter in gate.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.5)
    x, g = torch.randn(x_size) + 1, torch.randn(g_size) / 2 - 1
    return gate, x.to(dtype), g.to(dtype)


def step(gate, x, g, backend="auto", create_graph=False):
    """Outputs, all gradients, and the buffers after a step of a copy of this gate."""
    gate = copy.deepcopy(gate)
    gate.backend = backend
    x, g = x.detach().requires_grad_(), g.detach().requires_grad_()
    y, alpha = gate(x, g, return_attention=True)
    generator = torch.Generator().manual_seed(3)
    slopes = [(torch.randint(-8, 9, t.shape, generator=generator) / 8).to(t.dtype) for t in (y, alpha)]
    names = ["x", "g", *dict(gate.named_parameters())]
    gradients = torch.autograd.grad([y, alpha], [x, g, *gate.parameters()], slopes, create_graph=create_graph)
    found = {"y": y, "alpha": alpha, **{f"d {n}": t for n, t in zip(names, gradients, strict=True)}}
    return found, dict(gate.named_buffers())


def check(gate, x, g, dtype=torch.float32, **options):
    assert gate.fusion(x, g).plan == "whole_moments"
    exact, exact_buffers = step(copy.deepcopy(gate).double(), x.double(), g.double(), "eager")
    eager, eager_buffers = step(gate, x, g, "eager")
    found, buffers = step(gate, x, g, **options)
    results = [
        (found, eager, exact),
        *[({n: buffers[n]}, {n: eager_buffers[n]}, {n: exact_buffers[n]}) for n in buffers if "num" not in n],
    ]
    wrong = [j for args in results for j in judge(*args, dtype) if not j.ok]
    assert not wrong, wrong
    for name in buffers:
        assert buffers[name].dtype == eager_buffers[name].dtype
        if "num" in name:
            assert torch.equal(buffers[name], eager_buffers[name])


@in_all_gates
@pytest.mark.parametrize("create_graph", [False, True])
def test_numbers_gradients_and_statistics_of_the_modules(options, x_size, g_size, create_graph):
    check(*make(options, x_size, g_size), create_graph=create_graph)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_several_tiles_and_groups(layout):
    gate, x, g = make({"preset": "same_grid"}, (2, 19, 65, 67), (2, 17, 65, 67))
    check(gate, x.contiguous(memory_format=layout), g)


def test_a_mean_far_from_zero_costs_no_more_digits_than_eager():
    gate, x, g = make({"preset": "same_grid"}, (2, 16, 20, 21), (2, 12, 20, 21))
    check(gate, x + 1000, 1000 - g)


@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None])
def test_momentum_over_several_steps(momentum):
    gate, x, g = make({"preset": "same_grid"}, (2, 6, 5, 6), (2, 6, 5, 6))
    for name in ALL:
        getattr(gate, name).momentum = momentum
    for k in range(3):
        check(gate, x * (k + 1), g + k)
        gate(x * (k + 1), g + k)


def _no_tracking(norm):
    return type(norm)(norm.num_features, track_running_stats=False)


def _no_affine(norm):
    return type(norm)(norm.num_features, affine=False)


def _untracked_in_eval(norm):
    return _no_tracking(norm).eval()


def _frozen(norm):
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm.eval()


def _synced(norm):
    return nn.SyncBatchNorm.convert_sync_batchnorm(norm)


@pytest.mark.parametrize("change", [_no_tracking, _no_affine, _untracked_in_eval, _frozen, _synced])
@pytest.mark.parametrize("layer", ["theta_norm", "phi_norm", "psi_norm"])
def test_kinds_of_batch_norm(layer, change):
    gate, x, g = make({"preset": "same_grid"}, (2, 6, 5, 6), (2, 6, 5, 6))
    setattr(gate, layer, change(getattr(gate, layer)))
    check(gate, x, g)


def test_sync_batch_norm_in_a_group_of_one(tmp_path):
    gate, x, g = make({"preset": "same_grid"}, (2, 6, 5, 6), (2, 6, 5, 6))
    alone, _ = step(gate, x, g)
    gate = nn.SyncBatchNorm.convert_sync_batchnorm(gate)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        grouped, _ = step(gate, x, g)
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(alone[name], grouped[name]) for name in alone)


@pytest.mark.parametrize("layer", ["theta_norm", "phi_norm"])
def test_other_norms_run_as_modules(layer):
    gate, x, g = make({"preset": "same_grid", layer: "instance"}, (2, 6, 5, 6), (2, 6, 5, 6))
    assert gate.fusion(x, g).plan == "chain_logits"
    gate, x, g = make({"preset": "same_grid"}, (2, 6, 5, 6), (2, 6, 5, 6))
    called = []
    getattr(gate, layer).register_forward_hook(lambda *_: called.append(layer))
    assert gate.fusion(x, g).plan == "chain_logits"
    gate(x, g)
    assert called == [layer]


def test_hooks_on_psis_norm_are_called():
    gate, x, g = make({"preset": "same_grid"}, (2, 6, 5, 6), (2, 6, 5, 6))
    expected, _ = step(gate, x, g)
    gate.psi_norm.register_forward_hook(lambda norm, args, output: output * 0)
    found, _ = step(gate, x, g)
    assert gate.fusion(x, g).plan == "whole_moments" and not torch.equal(expected["y"], found["y"])
    assert (found["alpha"] == 0.5).all()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("size", [(1, 6, 1, 1), (0, 6, 3, 3)])
def test_too_few_values_fail_or_pass_as_in_pytorch(size, biased):
    options = {"preset": "same_grid", "norm_biased_variance": biased}
    gate, x, g = make(options, (2, 6, 5, 6), (2, 6, 5, 6))
    x, g = torch.randn(size), torch.randn(size)
    answers = []
    for backend in ("eager", "auto"):
        gate.backend = backend
        try:
            answers.append(gate(x, g).shape)
        except ValueError as error:
            answers.append(str(error))
    assert answers[0] == answers[1]
    assert size[0] == 0 or "more than 1 value per channel" in answers[1]


@pytest.mark.parametrize("subset", [["x"], ["g"], ["theta.weight"], ["phi_norm.bias"], ["psi_norm.weight"]])
def test_gradients_of_a_subset(subset):
    gate, x, g = make({"preset": "same_grid"}, (2, 6, 5, 6), (2, 6, 5, 6))
    expected, _ = step(gate, x, g)
    for name, parameter in gate.named_parameters():
        parameter.requires_grad_(name in subset)
    x.requires_grad_("x" in subset)
    g.requires_grad_("g" in subset)
    y, alpha = gate(x, g, return_attention=True)
    generator = torch.Generator().manual_seed(3)
    slopes = [(torch.randint(-8, 9, t.shape, generator=generator) / 8) for t in (y, alpha)]
    torch.autograd.backward([y, alpha], slopes)
    tensors = {"x": x, "g": g, **dict(gate.named_parameters())}
    for name, t in tensors.items():
        if name in subset:
            torch.testing.assert_close(t.grad, expected[f"d {name}"])
        else:
            assert t.grad is None


def test_gradients_of_one_output():
    gate, x, g = make({"preset": "paper", **ALL}, (2, 6, 12, 14), (2, 9, 6, 7))
    for output in (0, 1):
        found = []
        for backend in ("eager", "auto"):
            gate.backend = backend
            leaf = x.clone().requires_grad_()
            results = gate(leaf, g, return_attention=True)
            found.append(torch.autograd.grad(results[output].square().sum(), [leaf, *gate.parameters()]))
        for eager, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=2e-5)


def test_first_and_second_derivatives():
    gate, x, g = make({"preset": "same_grid"}, (2, 4, 3, 2), (2, 3, 3, 2), torch.float64)
    for name in ALL:
        getattr(gate, name).track_running_stats = False
    inputs = (
        x.requires_grad_(),
        g.requires_grad_(),
        gate.theta.weight,
        gate.phi_norm.weight,
        gate.psi_norm.bias,
    )
    run = lambda x, g, *_: gate(x, g, return_attention=True)  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_second_backward_pass_over_one_graph():
    gate, x, g = make({"preset": "same_grid"}, (2, 6, 5, 6), (2, 6, 5, 6))
    y = gate(x.requires_grad_(), g)
    first = torch.autograd.grad(y.sum(), [x, gate.theta.weight], retain_graph=True)
    second = torch.autograd.grad(y.sum(), [x, gate.theta.weight])
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_in_16_bit_too(dtype):
    check(*make({"preset": "same_grid"}, (2, 6, 9, 10), (2, 6, 9, 10), dtype), dtype)


@pytest.mark.parametrize("options,x_size,g_size", [GATES["same grid"], GATES["paper"]], ids=["same", "paper"])
def test_autocast(options, x_size, g_size):
    gate, x, g = make(options, x_size, g_size)
    exact, _ = step(copy.deepcopy(gate).double(), x.double(), g.double(), "eager")
    with torch.autocast("cpu", torch.bfloat16):
        eager, _ = step(gate, x, g, "eager")
        found, buffers = step(gate, x, g)
    assert found["y"].dtype == torch.bfloat16 and found["d x"].dtype == torch.float32
    assert all(t.dtype == torch.float32 for name, t in found.items() if name.startswith("d "))
    wrong = [j for j in judge(found, eager, exact, torch.bfloat16) if not j.ok]
    assert not wrong, wrong


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    gate, x, g = make({"preset": "same_grid"}, (2, 6, 5, 6), (2, 6, 5, 6))
    compiled = torch.compile(copy.deepcopy(gate), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    y = compiled(x.requires_grad_(), g)
    torch.testing.assert_close(y, gate(x, g))
    (dx,) = torch.autograd.grad(y.square().sum(), [x])
    (expected,) = torch.autograd.grad(gate(x, g).square().sum(), [x])
    torch.testing.assert_close(dx, expected)


def test_torch_func():
    gate, x, g = make({"preset": "same_grid"}, (2, 6, 5, 6), (2, 6, 5, 6))
    buffers = {name: t.clone() for name, t in gate.named_buffers()}
    loss = lambda p, b: torch.func.functional_call(gate, (p, b), (x, g)).square().sum()  # noqa: E731
    found = torch.func.grad(loss)(dict(gate.named_parameters()), buffers)
    expected = torch.autograd.grad(gate(x, g).square().sum(), list(gate.parameters()))
    for ours, theirs in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_keeps_one_channel():
    gate, x, g = make({"preset": "same_grid"}, (2, 16, 64, 64), (2, 16, 64, 64))
    kept = []
    for backend in ("eager", "auto"):
        gate.backend = backend
        storages = {}
        held = {t.untyped_storage().data_ptr() for t in (x, g, *gate.parameters())}

        def pack(t, storages=storages, held=held):
            storage = t.untyped_storage()
            if storage.data_ptr() not in held:
                storages[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = gate(x.requires_grad_(), g)
        kept.append(sum(storages.values()))
        del y
    one_channel = 2 * 64 * 64 * 4
    assert kept[1] < 1.5 * one_channel < kept[0] / 3


@pytest.mark.parametrize("products", [False, True])
def test_where_it_is_chosen(products, monkeypatch):
    """Folded where that pays; elsewhere by PyTorch's layers, and, where these can be products and maps aren't
    small, the rest fused; `recompute` decides."""
    monkeypatch.setattr(pointwise, "_HAS_MKL", products)
    big, deep, small = (2, 64, 192, 192), (2, 256, 64, 64), (2, 64, 32, 32)
    deep_plan = "chain_logits" if products else "eager"
    for size, plan in ((big, "whole_moments"), (deep, deep_plan), (small, "eager")):
        gate = AttentionGate(size[1], size[1], preset="same_grid").train()
        other = AttentionGate(size[1], size[1] // 2, preset="same_grid").train()
        x = torch.empty(size)
        assert other.fusion(x, x[:, ::2].contiguous()).plan == plan
        assert gate.fusion(x, x).plan == plan
        with torch.no_grad():
            assert gate.fusion(x, x).plan == ("eager" if size is deep else plan)
        for recompute, forced in ((True, "whole_moments"), (False, "chain_logits")):
            gate.recompute = recompute
            assert gate.fusion(x, x).plan == forced
        assert gate.eval().fusion(x, x).plan == "whole"


def test_channels_last_has_to_be_larger():
    """PyTorch's batch norms are faster there."""
    for channels, size, plan in ((64, 128, "eager"), (64, 256, "whole_moments"), (32, 256, "whole_moments")):
        gate = AttentionGate(channels, channels, channels // 2, preset="same_grid").train()
        x = torch.empty(2, channels, size, size)
        assert gate.fusion(x, x).plan == "whole_moments"
        x = x.to(memory_format=torch.channels_last)
        assert gate.fusion(x, x).plan == plan
    gate = AttentionGate(32, 32, 16, preset="same_grid", spatial_dims=3).train()
    for size, plan in ((24, "eager"), (48, "whole_moments"), (96, "whole_moments")):
        x = torch.empty(1, 32, size, size, size, memory_format=torch.channels_last_3d)
        assert gate.fusion(x, x).plan == plan


@pytest.mark.parametrize("kind", ["instance", "group"])
def test_where_other_norms_are_left_to_pytorch(kind):
    options = {f"{layer}_norm": kind for layer in ("theta", "phi", "psi")}
    for voxels, plan in ((192, "chain_logits"), (64, "eager")):
        gate = AttentionGate(64, 64, preset="same_grid", **options)
        x = torch.empty(2, 64, voxels, voxels)
        assert gate.fusion(x, x).plan == plan
        with torch.no_grad():
            assert gate.fusion(x, x).plan == "eager"
            gate.recompute = False
            assert gate.fusion(x, x).plan == "chain_logits"


# ---- the operator


def test_moments_are_differentiable_in_every_way():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    for options in ((1, 1), (2, (2, 3))):
        run = lambda x, options=options: functional.moments(x, *options)  # noqa: E731
        assert torch.autograd.gradcheck(run, x)
        assert torch.autograd.gradgradcheck(run, x)
        stacked = torch.vmap(run)(x.detach().expand(3, -1, -1, -1, -1))
        for ours, one in zip(stacked, run(x), strict=True):
            torch.testing.assert_close(ours, one.expand(3, *one.shape))
        _, tangent = torch.func.jvp(run, (x.detach(),), (torch.ones_like(x),))
        torch.testing.assert_close(tangent[0], torch.ones_like(tangent[0]))
    for layout in (torch.contiguous_format, torch.channels_last):
        args = x.detach().contiguous(memory_format=layout).requires_grad_(), [2, 2], [2, 3]
        torch.library.opcheck(torch.ops.attn_gate.moments_fwd.default, args)


@pytest.mark.parametrize(
    "x,kernel,stride,text",
    [
        (torch.empty(0, 3, 4, 4), 1, 1, "at least one patch"),
        (torch.empty(1, 3, 4, 1), 2, 2, "at least one patch"),
        (torch.empty(1, 3, 4, 4), 3, 2, "kernel must not be larger than the stride"),
        (torch.empty(1, 3, 4, 4), 0, 1, "kernel must be an integer of at least 1"),
    ],
)
def test_bad_arguments_of_moments(x, kernel, stride, text):
    with pytest.raises(ValueError, match=text):
        functional.moments(x, kernel, stride)


def test_raw_operators_check_what_reaches_memory():
    ops, x = torch.ops.attn_gate, torch.randn(1, 3, 4, 4)
    mean, cov = ops.moments_fwd(x, [1, 1], [1, 1])
    channel, weight = torch.randn(1, 1, 4, 4), torch.randn(2, 3, 1, 1)
    train = [x, channel, x, x, None, None, weight, weight, None, None, None, weight[:, 0, 0, 0], channel]
    train += [[1, 1], "linear", "linear", "relu", 511]
    ops.attention_train_bwd(*train)
    for call in (
        lambda: ops.moments_fwd(x, [1], [1, 1]),
        lambda: ops.moments_fwd(x, [2, 2], [1, 1]),
        lambda: ops.moments_fwd(x.long(), [1, 1], [1, 1]),
        lambda: ops.moments_bwd(mean, cov[:2], x, mean, [1, 1], [1, 1], 1),
        lambda: ops.moments_bwd(mean, cov.float(), x, mean, [1, 1], [1, 1], 1),
        lambda: ops.moments_bwd(mean, cov, x, mean[:2], [1, 1], [1, 1], 1),
        lambda: ops.projection_statistics(x, torch.randn(2, 4, 1, 1), None, [1, 1]),
        lambda: ops.projection_statistics(x, torch.randn(2, 3, 2, 2), None, [1, 1]),
        lambda: ops.projection_statistics(x, torch.randn(2, 3, 1, 1), torch.randn(4), [1, 1]),
        lambda: ops.projection_statistics(x[:0], torch.randn(2, 3, 1, 1), None, [1, 1]),
        lambda: ops.attention_train_bwd(*train[:8], torch.randn(2, 3), *train[9:]),
        lambda: ops.attention_train_bwd(*train[:8], None, torch.randn(1, 2), *train[10:]),
        lambda: ops.attention_train_bwd(*train[:4], torch.randn(4), *train[5:]),
    ):
        with pytest.raises(RuntimeError, match="attn_gate: "):
            call()


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5)])
def test_biased_norm_of_nothing_is_that_of_pytorch(shape):
    results = []
    for norm in (nn.BatchNorm2d(3), BiasedBatchNorm(3)):
        y = norm(x := torch.empty(shape, requires_grad=True))
        y.sum().backward()
        results.append((y, x.grad, norm.weight.grad, norm.bias.grad, *norm.buffers()))
    torch.testing.assert_close(*results)


def test_biased_norm_without_momentum_averages_over_all_batches():
    norm = BiasedBatchNorm(3, momentum=None)
    batches = [torch.randn(2, 3, 4, 5) for _ in range(3)]
    for batch in batches:
        norm(batch)
    for kept, of_all in ((norm.running_mean, [b.mean((0, 2, 3)) for b in batches]),
                         (norm.running_var, [b.var((0, 2, 3), correction=0) for b in batches])):  # fmt: skip
        torch.testing.assert_close(kept, torch.stack(of_all).mean(0))


def test_biased_norm_may_cease_to_track():
    norm = BiasedBatchNorm(3)
    norm.track_running_stats = False
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(norm(x), nn.BatchNorm2d(3)(x))
    assert norm.running_mean.count_nonzero() == 0 and norm.num_batches_tracked == 0


def test_biased_norm_is_what_it_says():
    gate, x, g = make({"preset": "same_grid", "norm_biased_variance": True}, (2, 3, 4, 5), (2, 3, 4, 5))
    gate.theta_norm = norm = BiasedBatchNorm(5, momentum=1.0)
    gate(x, g)
    theta = gate.theta(x)
    torch.testing.assert_close(norm.running_var, theta.var((0, 2, 3), correction=0))
