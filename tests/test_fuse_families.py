"""fuse_gates on every family: found, fused, and the original's results, gradients and running statistics."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from foreign import (
    BiaPyGate,
    ChannelGate,
    EsrganGate,
    FastEstimatorGate,
    GridGate,
    LeeGate,
    MultiGate,
    NamedGate,
    PyMICGate,
    SwappedGate,
    TailGate,
    TorrGate,
    seasoned,
)
from torch import nn

from attn_gate import fuse, patch
from attn_gate.judge import judge

monai = pytest.importorskip("monai.networks.nets.attentionunet")


class Case(NamedTuple):
    """A gate, the shapes of its two arguments in the order of its call, and what it is described as."""

    make: object
    first: tuple[int, ...]
    second: tuple[int, ...]
    expected: dict[str, object]


SAME = {"phi_resize": "none", "theta_norm": "batch", "phi_norm": "batch", "psi_norm": "batch"}
PAPER = {"phi_resize": "linear", "alpha_resize": "linear", "output": "conv_norm"}
CASES = {
    "MONAI 1D": Case(lambda: monai.AttentionBlock(1, 4, 8, 6), (2, 8, 19), (2, 6, 19), SAME),
    "MONAI 2D": Case(lambda: monai.AttentionBlock(2, 4, 8, 6), (2, 8, 7, 9), (2, 6, 7, 9), SAME),
    "MONAI 3D": Case(lambda: monai.AttentionBlock(3, 4, 8, 8), (2, 8, 5, 4, 3), (2, 8, 5, 4, 3), SAME),
    "LeeJunHyun": Case(lambda: LeeGate(8, 6, 4), (2, 8, 7, 9), (2, 6, 7, 9), SAME),
    "LeeJunHyun, 3D": Case(lambda: LeeGate(8, 8, 4, dims=3), (1, 8, 5, 3, 7), (1, 8, 5, 3, 7), SAME),
    "bigmb": Case(lambda: SwappedGate(8, 6, 4), (2, 8, 7, 9), (2, 6, 7, 9), SAME),
    "sfczekalski": Case(lambda: NamedGate(8, 6, 4), (2, 8, 7, 9), (2, 6, 7, 9), SAME),
    "FastEstimator": Case(lambda: FastEstimatorGate(6, 6), (2, 6, 7, 9), (2, 6, 7, 9), SAME),
    "BiaPy, no norm": Case(
        lambda: BiaPyGate(nn.Conv2d, 8, 4), (2, 8, 7, 9), (2, 8, 7, 9), {"psi_norm": "none"}
    ),
    "BiaPy, bn": Case(
        lambda: BiaPyGate(nn.Conv3d, 8, 4, "bn", 6), (2, 8, 3, 4, 5), (2, 6, 3, 4, 5),
        {"theta_norm": "none", "phi_norm": "batch", "psi_norm": "batch"},
    ),
    "BiaPy, in": Case(
        lambda: BiaPyGate(nn.Conv2d, 8, 4, "in"), (2, 8, 7, 9), (2, 8, 7, 9),
        {"theta_norm": "none", "phi_norm": "instance", "psi_norm": "instance"},
    ),
    "Oktay 2D": Case(lambda: GridGate(6, 8), (2, 6, 9, 11), (2, 8, 4, 3), PAPER),
    "Oktay 3D": Case(lambda: GridGate(6, 8, 4, 3), (2, 6, 6, 7, 8), (2, 8, 3, 3, 4), PAPER),
    "Oktay 3D, phi down": Case(lambda: GridGate(6, 8, 4, 3), (2, 6, 6, 7, 8), (2, 8, 3, 3, 8), PAPER),
    "Oktay, per axis": Case(
        lambda: GridGate(6, 8, 4, 3, sub_sample=(1, 2, 2)), (2, 6, 3, 7, 8), (2, 8, 2, 3, 4), PAPER
    ),
    "Oktay, debug": Case(
        lambda: GridGate(6, 8, mode="concatenation_debug"), (2, 6, 8, 8), (2, 8, 4, 4),
        {"activation": "softplus"},
    ),
    "Oktay, residual": Case(
        lambda: GridGate(6, 8, mode="concatenation_residual"), (2, 6, 8, 8), (2, 8, 4, 4),
        {"normaliser": "softmax"},
    ),
    "ivadomed 2D": Case(
        lambda: GridGate(6, 8, align_corners=True), (2, 6, 9, 11), (2, 8, 3, 4),
        {"phi_resize": "align_corners"},
    ),
    "ivadomed 3D": Case(
        lambda: GridGate(6, 8, 4, 3, align_corners=True), (2, 6, 7, 8, 9), (2, 8, 2, 3, 4),
        {"alpha_resize": "align_corners"},
    ),
    "CA-Net": Case(
        lambda: GridGate(6, 8, 6, sub_sample=1, theta_bias=True), (2, 6, 7, 9), (2, 8, 7, 9),
        {"theta_bias": True, **PAPER},
    ),
    "Advanced_nnUNet": Case(
        lambda: GridGate(6, 8, 4, 3, sub_sample=(1, 2, 2), kernel=3, theta_bias=True, output_norm="instance"),
        (2, 6, 5, 7, 8), (2, 8, 5, 4, 4), {"theta_padding": "symmetric", "output_norm": "instance"},
    ),
    "A-ESRGAN": Case(lambda: EsrganGate(6, 8), (2, 6, 12, 10), (2, 8, 8, 7), PAPER),
    **{
        f"TORR, {mode}": Case(
            lambda mode=mode: TorrGate(6, 8, 4, mode), (2, 6, 7, 9), (2, 8, 4, 5), {"normaliser": mode}
        )
        for mode in ("sigmoid", "softmax", "mean", "mean_flow", "range")
    },
    "TORR, no W, strided": Case(
        lambda: TorrGate(6, 8, 4, "sigmoid", 2, use_W=False), (2, 6, 9, 8), (2, 8, 6, 6),
        {"phi_kernel": (2, 2), "output": "none"},
    ),
    "PyMIC 2D": Case(lambda: PyMICGate(2, 6, 8), (2, 6, 9, 11), (2, 8, 4, 5), {"x_resize": "linear"}),
    "PyMIC 3D": Case(lambda: PyMICGate(3, 6, 8), (2, 6, 5, 6, 7), (2, 8, 2, 3, 4), {"x_resize": "linear"}),
    "group norms": Case(lambda: TailGate("group"), (2, 6, 7, 9), (2, 8, 7, 9), {"theta_norm": "group"}),
    "instance norms, silu": Case(
        lambda: TailGate("instance", F.silu), (2, 6, 7, 9), (2, 8, 7, 9),
        {"activation": "silu", "phi_norm": "instance", "phi_bias": False},
    ),
    "g resized behind its norm": Case(
        lambda: TailGate("batch", F.leaky_relu, psi_norm=False), (2, 6, 7, 9), (2, 8, 4, 5),
        {"activation": "leaky_relu", "phi_resize": "align_corners", "psi_norm": "none"},
    ),
}  # fmt: skip


def step(net, case, dtype, training, seed=1):
    """Results by name, gradients as "d NAME", and the buffers afterwards."""
    net.to(dtype).train(training)
    generator = torch.Generator().manual_seed(seed)
    names = ("first", "second")
    inputs = [torch.randn(shape, generator=generator) for shape in (case.first, case.second)]
    inputs = [t.to(dtype).requires_grad_() for t in inputs]
    outputs = net(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    slopes = [torch.randn(t.shape, generator=generator).to(dtype) for t in outputs]
    wanted = dict(zip(names, inputs, strict=True)) | dict(net.named_parameters())
    grads = torch.autograd.grad(outputs, list(wanted.values()), slopes)
    results = dict(zip(("y", "alpha"), outputs, strict=False))
    results |= {f"d {name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return results | {f"buffer {name}": t.clone() for name, t in net.named_buffers() if t.is_floating_point()}


def compare(original, fused, case, training):
    exact = step(copy.deepcopy(original), case, torch.float64, training)
    eager = step(copy.deepcopy(original), case, torch.float32, training)
    found = step(fused, case, torch.float32, training)
    wrong = [
        f"{r.name}: {r.error:.2g} > {r.tolerance:.2g}"
        for r in judge(found, eager, exact, torch.float32)
        if not r.ok
    ]
    assert not wrong, "; ".join(wrong)


@pytest.mark.parametrize(
    "training,recompute", [(False, True), (True, True), (True, False)], ids=["eval", "train", "train, kept"]
)
@pytest.mark.parametrize("name", CASES)
def test_families(name, training, recompute, runs):
    torch.manual_seed(0)
    case = CASES[name]
    original = seasoned(case.make()).train(training)
    fused = copy.deepcopy(original)
    report = fuse.fuse_gates(fused, recompute=recompute)
    assert list(report.fused) == [""] and not report.skipped, report.skipped
    spec = patch.state_of(fused).found.spec
    assert {field: getattr(spec, field) for field in case.expected} == case.expected
    assert patch.state_of(fused).found.training == ""

    compare(original, fused, case, training)
    assert runs == [fused]  # the original forward isn't what ran
    tracked = [int(t) for name, t in fused.named_buffers() if name.endswith("num_batches_tracked")]
    assert all(n == int(training) for n in tracked)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dims", [2, 3])
def test_both_gates_of_a_multi_attention_block(dims, training):
    torch.manual_seed(0)
    original = seasoned(MultiGate(6, 8, 4, dims))
    fused = copy.deepcopy(original)
    assert list(fuse.fuse_gates(fused).fused) == ["gate_block_1", "gate_block_2"]
    x, g = (2, 6, 8, 7, 6)[: dims + 2], (2, 8, 4, 3, 3)[: dims + 2]
    compare(original, fused, Case(None, x, g, {}), training)


def test_a_map_per_channel_is_left_alone_with_the_reason():
    net = nn.Sequential(ChannelGate((8, 6), 6))
    report = fuse.fuse_gates(net)
    assert list(report.skipped) == ["0"] and "one per channel" in report.skipped["0"]


def test_a_gate_that_differs_in_training_mode_is_fused_in_eval_mode_only():
    """g resized before its norm: the statistics are those of another grid."""
    torch.manual_seed(0)
    case = Case(None, (2, 6, 7, 9), (2, 8, 4, 5), {})
    original = seasoned(TailGate("batch", resize="before")).eval()
    fused = copy.deepcopy(original)
    report = fuse.fuse_gates(fused)
    assert "left alone in training mode" in report.fused[""]
    compare(original, fused, case, training=False)
    compare(original, fused, case, training=True)
    assert not report.fused and "in training mode its results differ" in report.skipped[""]


class Renamed(nn.Module):
    """A gate of the usual form with other names; x is what comes second, the product is transformed."""

    def __init__(self, transformed):
        super().__init__()
        self.score = nn.Sequential(nn.Conv2d(4, 1, 1, bias=False), nn.BatchNorm2d(1))
        self.from_below = nn.Sequential(nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.from_side = nn.Sequential(nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.act = nn.LeakyReLU()
        if transformed:
            self.last = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))

    def forward(self, below, side):
        alpha = torch.sigmoid(self.score(self.act(self.from_below(below) + self.from_side(side))))
        return self.last(side * alpha) if hasattr(self, "last") else side * alpha


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("transformed", [False, True])
def test_copies_with_other_names_are_found_by_their_layers(transformed, training):
    torch.manual_seed(0)
    original = seasoned(Renamed(transformed))
    fused = copy.deepcopy(original)
    report = fuse.fuse_gates(fused)
    assert report.gates[0].family == "by its layers" and report.fused
    assert patch.state_of(fused).paths.theta == "from_side.0"
    compare(original, fused, Case(None, (2, 6, 7, 9), (2, 6, 7, 9), {}), training)


class Upsampling(nn.Module):
    """A strided gate whose map goes back by a factor: it takes grids that the stride divides."""

    def __init__(self, kernel):
        super().__init__()
        self.theta = nn.Conv2d(6, 4, kernel, 2, bias=False)
        self.phi, self.psi = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 1, 1)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")

    def forward(self, x, g):
        return x * self.up(torch.sigmoid(self.psi(F.relu(self.theta(x) + self.phi(g)))))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kernel", [1, 2])
def test_gates_for_grids_that_divide(kernel, training):
    torch.manual_seed(0)
    original = Upsampling(kernel)
    fused = copy.deepcopy(original)
    assert fuse.fuse_gates(fused).fused and patch.state_of(fused).found.divides
    compare(original, fused, Case(None, (2, 6, 8, 10), (2, 8, 4, 5), {}), training)
    for net in (original, fused):
        with pytest.raises(RuntimeError, match="The size of tensor a"):
            net(torch.randn(2, 6, 7, 9), torch.randn(2, 8, *((4, 5) if kernel == 1 else (3, 4))))


class NoGate(nn.Module):
    """Layers as a gate's, and no gate."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 1, 1)

    def forward(self, x, g):
        return self.c(self.a(x) * self.b(g))


@pytest.mark.parametrize(
    "make", [NoGate, lambda: nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 1, 1))]
)
def test_what_only_looks_like_a_gate_is_not_mentioned(make):
    assert not fuse.fuse_gates(make()).gates


class Residual(LeeGate):
    def forward(self, g, x):
        return x * (1 + self.psi(self.relu(self.W_g(g) + self.W_x(x))))


class Concatenated(LeeGate):
    def __init__(self):
        super().__init__(8, 6, 4)
        self.psi = nn.Sequential(nn.Conv2d(8, 1, 1), nn.Sigmoid())

    def forward(self, g, x):
        return x * self.psi(torch.cat([self.W_g(g), self.W_x(x)], 1))


class Dropping(LeeGate):
    def __init__(self):
        super().__init__(8, 6, 4)
        self.W_x.append(nn.Dropout(0.5))


class Detached(LeeGate):
    def forward(self, g, x):
        return x * self.psi(self.relu(self.W_g(g) + self.W_x(x))).detach()


class Remembering(LeeGate):
    def __init__(self, where):
        super().__init__(8, 6, 4)
        self.where, self.maps = where, []

    def forward(self, g, x):
        alpha = self.psi(self.relu(self.W_g(g) + self.W_x(x)))
        if self.where == "list":
            self.maps.append(alpha)
        else:
            self.alpha = alpha
        return x * alpha


class Failing(LeeGate):
    def forward(self, g, x):
        return super().forward(g, x) * self.mask


class Extra(LeeGate):
    def __init__(self):
        super().__init__(8, 6, 4)
        self.scale = nn.Parameter(torch.ones(1))


class Steep(LeeGate):
    def forward(self, g, x):
        return x * self.psi(F.leaky_relu(self.W_g(g) + self.W_x(x), 0.2))


class Clipping(LeeGate):
    """Clips the sum as a ReLU6 does, or further up, or the logits."""

    def __init__(self, sums=float("inf"), logits=float("inf")):
        super().__init__(8, 6, 4)
        self.sums, self.logits = sums, logits

    def forward(self, g, x):
        q = self.relu(self.W_g(g) + self.W_x(x)).clamp(max=self.sums)
        logits = self.psi[1](self.psi[0](q)).clamp(-self.logits, self.logits)
        return x * self.psi[2](logits)


class Checking(LeeGate):
    """Takes no large values."""

    def forward(self, g, x):
        if x.abs().max() > 50:
            raise ValueError("x must be normalised")
        return super().forward(g, x)


def test_a_gate_that_takes_no_large_values_is_fused():
    assert list(fuse.fuse_gates(nn.Sequential(Checking(8, 6, 4), LeeGate(8, 6, 4))).fused) == ["0", "1"]


class OtherCall(LeeGate):
    def forward(self, g, x, mask):
        return super().forward(g, x) * mask


class Grouped(LeeGate):
    def __init__(self):
        super().__init__(8, 6, 4)
        self.W_g[0] = nn.Conv2d(8, 4, 1, groups=2)


@pytest.mark.parametrize(
    "make,reason",
    [
        (lambda: Residual(8, 6, 4), "no gate of its family computes what its forward does"),
        (lambda: Steep(8, 6, 4), "no gate of its family computes what its forward does"),
        (lambda: Detached(8, 6, 4), "its gradients or running statistics differ"),
        (lambda: Clipping(sums=6.0), "its results differ where values are large"),
        (lambda: Clipping(sums=100.0), "its results differ where values are large"),
        (lambda: Clipping(logits=10.0), "its results differ where values are large"),
        (Concatenated, "the projections make 4 and 4 channels, psi takes 8"),
        (Extra, "more parameters or buffers than its family: scale"),
        (lambda: OtherCall(8, 6, 4), "not two maps"),
        (Grouped, "W_g.0 is grouped"),
        (lambda: Remembering("list"), r"its forward sets maps on the module"),
        (
            lambda: Remembering("attribute"),
            "its forward sets alpha on the module; for maps there is attn_gate.capture",
        ),
        (lambda: Failing(8, 6, 4), "its forward fails on two maps: AttributeError"),
    ],
)
def test_gates_of_other_graphs_are_left_alone(make, reason):
    gate = make()
    report = fuse.fuse_gates(gate)
    assert not report.fused and reason in report.skipped[""], report.skipped
    assert type(gate).__module__ == __name__ and patch.STATE not in gate.__dict__


def test_what_only_training_shows_is_left_to_the_original_there():
    gate, random_state = Dropping().train(), torch.get_rng_state()
    report = fuse.fuse_gates(gate)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert "in training mode its results differ" in report.skipped[""]
    gate.eval()
    assert "left alone in training mode" in report.fused[""]
