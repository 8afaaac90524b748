"""The Triton kernels compiled for GPUs that aren't here: no spills, and the resources that the table says."""

from __future__ import annotations

import pytest
import torch
from attn_gate.bench import triton_resources

QUICK = (("cuda", 90), torch.bfloat16, "contiguous", ("same grid 2D", "paper 2D"))


def recorded(target: tuple, setting: str, dtype: torch.dtype, layout: str) -> list:
    """The table's rows of one compilation."""
    key = (f"{target[0]} {target[1]}", setting, str(dtype).removeprefix("torch."), layout)
    return [
        row for row in triton_resources.read_table() if (row.target, row.gate, row.dtype, row.layout) == key
    ]


def test_no_kernel_spills_on_any_gpu():
    rows = triton_resources.read_table()
    targets = {f"{backend} {arch}" for backend, arch in triton_resources.TARGETS}
    assert {row.target for row in rows} == targets
    assert [row for row in rows if row.spills] == []
    assert max(row.shared for row in rows) <= 99 * 1024  # what the smallest of these GPUs gives a program


@pytest.mark.parametrize("name", QUICK[3])
def test_the_table_of_resources_is_true(name):
    target, dtype, layout, _ = QUICK
    setting = next(setting for setting in triton_resources.SETTINGS if setting.name == name)
    found = triton_resources.compile_setting(setting, dtype, layout, target)
    assert sorted(found) == recorded(target, name, dtype, layout)


@pytest.mark.slow
@pytest.mark.parametrize("target", triton_resources.TARGETS, ids=str)
def test_the_whole_table_of_resources_is_true(target):
    for setting, dtype, layout in triton_resources.combinations():
        found = triton_resources.compile_setting(setting, dtype, layout, target)
        assert sorted(found) == recorded(target, setting.name, dtype, layout)
