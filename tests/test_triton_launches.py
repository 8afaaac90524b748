"""How many kernels each operator launches, which block sizes it takes, and where: without running them."""

from __future__ import annotations

import json
from dataclasses import replace

import attn_gate.triton_kernels as triton_kernels
import pytest
import torch
from attn_gate.bench.triton_settings import PAPER, PAPER_3D, SAME, Setting, calls
from attn_gate.triton_kernels import geometry, launch, operators, passes

from attn_gate.operators import OPERATORS

# Large enough for the weight gradients to be summed in the pass itself.
ONE_GRID = replace(SAME, x=(256, 256), g=(256, 256))
PATCHES = replace(PAPER, name="patches, linear", x=(512, 512), g=(256, 256), channels=32, gating=32, inter=16)
NEAREST = replace(PATCHES, name="patches, nearest", resize="nearest")
ALIGNED = replace(PATCHES, name="patches, aligned corners", resize="align_corners")
PATCHES_3D = replace(PAPER_3D, x=(32, 64, 64), g=(16, 32, 32), channels=16, gating=16, inter=8)
DEEP = Setting("one grid, deep", (16, 16), (16, 16), 512, 512, 256)
DEEP_3D = replace(PAPER_3D, name="patches 3D, deep", channels=512, gating=512, inter=256)
OWN_GRID = replace(ONE_GRID, name="g on a grid of its own", g=(128, 128))
OWN_NEAREST = replace(OWN_GRID, name="g on a grid of its own, nearest", resize="nearest")

FORWARD, BACKWARD = ["forward"], ["backward", "sum"]
WEIGHTS = ["weights", "sum"]
# (gate, its chain backward, its whole gate forward and backward); the chain is one launch forward, always.
LAUNCHES = (
    (ONE_GRID, BACKWARD, FORWARD, BACKWARD),
    (PATCHES, BACKWARD, FORWARD, BACKWARD),
    (NEAREST, BACKWARD, FORWARD, BACKWARD),
    (ALIGNED, BACKWARD, FORWARD, BACKWARD),
    (PATCHES_3D, BACKWARD, FORWARD, BACKWARD),
    # Bound by arithmetic: ds is stored, and the weight gradients have launches of their own;
    (DEEP, BACKWARD, FORWARD, BACKWARD + 2 * WEIGHTS),
    # and alpha's halo isn't computed twice.
    (DEEP_3D, BACKWARD, [*FORWARD, "apply"], BACKWARD + 2 * WEIGHTS),
    # phi is made on g's grid, and its gradient comes back there.
    *(
        (
            gate,
            [*BACKWARD, "spread"],
            ["project", *FORWARD],
            ["project", *BACKWARD, "spread", "project", *WEIGHTS],
        )
        for gate in (OWN_GRID, OWN_NEAREST)
    ),
)


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that would have run."""
    names = []
    monkeypatch.setattr(launch, "_target", lambda: None)
    monkeypatch.setattr(
        launch,
        "start",
        lambda kernel, *args, **options: names.append(kernel.fn.__name__.removesuffix("_kernel")),
    )
    return names


@pytest.mark.parametrize("layout", ("contiguous", "channels last"))
@pytest.mark.parametrize("row", LAUNCHES, ids=lambda row: row[0].name)
def test_launches(row, layout, launched):
    setting, chain_backward, forward, backward = row
    expected = {
        "gate_fwd": FORWARD,
        "gate_bwd": chain_backward,
        "attention_gate_fwd": forward,
        "attention_gate_bwd": backward,
        "gate_apply_fwd": ["apply"],
        "gate_apply_bwd": ["backward"],
    }
    for operator, arguments in calls(setting, torch.bfloat16, layout):
        launched.clear()
        getattr(operators, operator)(*arguments)
        assert launched == expected[operator], operator


def test_launches_of_logits(launched):
    for operator, arguments in calls(replace(ONE_GRID, stored=True), torch.bfloat16, "contiguous"):
        launched.clear()
        getattr(operators, operator)(*arguments)
        assert launched == (FORWARD if operator.endswith("fwd") else BACKWARD), operator


def test_scratch_is_bounded(monkeypatch):
    """However many tiles there are: x * dy of the tiles that run at a time, not of the whole map."""
    taken = []
    monkeypatch.setattr(
        launch, "start", lambda kernel, *args, **options: taken.append((options.get("room"), args))
    )
    setting = replace(PAPER_3D, x=(64, 128, 128), g=(32, 64, 64), channels=2, gating=2, inter=2)
    for operator, arguments in calls(setting, torch.bfloat16, "contiguous"):
        taken.clear()
        getattr(operators, operator)(*arguments)
        if operator.endswith("_bwd"):
            _, args = taken[0]
            programs, scratch = args[0], args[-1]
            assert 0 < scratch.numel() * 4 <= passes.SCRATCH
            assert scratch.shape[0] == programs


# ------------------------------------------------------------------------------------------------ block sizes


class FakeGpu:
    """What `launch.tuned` asks of torch.cuda."""

    @staticmethod
    def get_device_name(device):
        return "a GPU"


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """The keys for which block sizes were timed; a cache on disk of the test's own."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch, "get_device_module", lambda device: FakeGpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(launch, "_best", {})
    times = []
    monkeypatch.setattr(launch, "_fastest", lambda device, choices, run: times.append(1) or choices[1])
    return times


def problem(batch: int, size: int, channels: int = 6) -> passes.Problem:
    x = torch.empty(batch, channels, size, size, dtype=torch.bfloat16)
    weight = torch.empty(4, channels, 1, 1)
    grid = (1, size, size)
    same = geometry.Resize.between("linear", grid, grid)
    return passes.Problem(x, 4, grid, grid, grid, same, same, "relu", x=x, g=x, theta_weight=weight)


def chosen(p: passes.Problem) -> launch.Blocks:
    return launch.tuned(p.key("forward"), torch.device("cuda"), launch.whole(p.like), lambda blocks: blocks)


def test_block_sizes_are_timed_once_for_a_class_of_shapes(timed):
    first = chosen(problem(1, 32))
    assert first == launch.whole(torch.empty(0, dtype=torch.bfloat16))[1]
    for p in (problem(2, 32), problem(64, 32), problem(3, 57), problem(1, 32, channels=5)):
        assert chosen(p) == first
    assert len(timed) == 1
    chosen(problem(1, 32, channels=64))
    assert len(timed) == 2


def test_another_process_finds_the_block_sizes_on_disk(timed, tmp_path):
    first = chosen(problem(1, 32))
    assert [json.loads(path.read_text()) for path in tmp_path.rglob("attn_gate_blocks.json")] == [vars(first)]
    launch._best.clear()
    assert chosen(problem(2, 40)) == first
    assert len(timed) == 1


def test_nothing_is_timed_where_sums_must_not_depend_on_it(timed):
    torch.use_deterministic_algorithms(True)
    try:
        chosen(problem(1, 32))
    finally:
        torch.use_deterministic_algorithms(False)
    assert timed == []


# ---------------------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize("key", ("CPU", "CUDA", "XPU"))  # ROCm's builds of torch say CUDA too
def test_the_operators_are_registered_for(key):
    for op in OPERATORS:
        for name in (f"{op.name}_fwd", f"{op.name}_bwd"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{triton_kernels.NAMESPACE}::{name}", key)
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"attn_gate::{name}", key)
