"""The Triton kernels compiled for GPUs that aren't here: no spills, and the resources that the table says."""

from __future__ import annotations

import pytest
import torch
from attn_gate.bench import triton_resources
from attn_gate.bench.triton_resources import (
    PAPER,
    SAME,
    TARGETS,
    VARIANTS,
    compile_setting,
    first,
)
from attn_gate.triton_kernels import launch

# One of each kind, for one target: all choices of block sizes, patches, a variant.
QUICK = (
    (SAME, torch.bfloat16, "contiguous", tuple),
    (PAPER, torch.float32, "channels last", first),
    *((*variant, "contiguous", first) for variant in VARIANTS if variant[0].name == "one channel of each"),
)


def recorded(target: tuple, setting: str, dtype: torch.dtype, layout: str) -> list:
    """The table's rows of one compilation."""
    key = (f"{target[0]} {target[1]}", setting, str(dtype).removeprefix("torch."), layout)
    return [
        row for row in triton_resources.read_table() if (row.target, row.gate, row.dtype, row.layout) == key
    ]


def test_no_kernel_spills_on_any_gpu():
    rows = triton_resources.read_table()
    assert {row.target for row in rows} == {f"{backend} {arch}" for backend, arch in TARGETS}
    assert [row for row in rows if row.spills] == []
    assert max(row.shared for row in rows) <= 99 * 1024  # what the smallest of these GPUs gives a program


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_every_choice_of_block_sizes_is_recorded(dtype):
    maps = torch.empty(0, dtype=dtype)
    lists = {
        "gate_fwd": launch.CHAIN,
        "gate_bwd": launch.CHAIN,
        "attention_gate_fwd": launch.whole(maps),
        "attention_gate_bwd": launch.whole_backward(maps),
    }
    for target in TARGETS:
        rows = recorded(target, PAPER.name, dtype, "contiguous")
        for operator, choices in lists.items():
            kernel = "forward_kernel" if operator.endswith("fwd") else "backward_kernel"
            found = {row.choice for row in rows if (row.operator, row.kernel) == (operator, kernel)}
            assert found == set(range(len(choices))), (target, operator)


@pytest.mark.parametrize(
    "setting, dtype, layout, choices",
    QUICK,
    ids=lambda value: getattr(value, "name", getattr(value, "__name__", str(value))),
)
def test_the_table_of_resources_is_true(setting, dtype, layout, choices):
    found = compile_setting(setting, dtype, layout, ("cuda", 90), choices)
    assert found == recorded(("cuda", 90), setting.name, dtype, layout)


@pytest.mark.slow
@pytest.mark.parametrize("target", ("cuda 90", "hip gfx942"))
def test_all_rows_of_a_gpu_are_true(target, monkeypatch):
    """In two processes, minutes; python -m attn_gate.bench.triton_resources compares those of all five."""
    monkeypatch.setattr("sys.argv", ["triton_resources", "--target", target])
    assert triton_resources.main() == 0
