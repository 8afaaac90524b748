"""The CUDA kernels on a real GPU: the matrix, repeatability, CUDA graphs, a second device."""

from __future__ import annotations

import pytest
import torch
from matrix import DTYPES, EDGES, LARGE, LAYOUTS, compare, follows_in_a_graph, recomputes, results

from attn_gate import backends, functional
from attn_gate.cases import CASES, OPERATORS


def why_not() -> str:
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return backends.BACKENDS["cuda"].why_not(torch.device("cuda"), torch.float32)


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("case", CASES + EDGES, ids=lambda case: case.name)
def test_small(case, operator):
    for dtype in DTYPES:
        for options in recomputes(operator):
            for layout in LAYOUTS:
                compare(case, operator, dtype, layout, backend="cuda", **options)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_large(case, layout):
    for dtype in (torch.float32, torch.bfloat16):
        compare(case, "gate", dtype, layout, backend="cuda")


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_same_bits_on_every_run(case):
    tensors = case.inputs("gate", device="cuda")
    first, *others = (
        results(functional.gate, tensors, backend="cuda", **case.options("gate")) for _ in range(4)
    )
    for other in others:
        assert all(torch.equal(other[name], t) for name, t in first.items())


@pytest.mark.parametrize("case", [CASES[0], CASES[9]], ids=lambda case: case.name)
def test_captured_in_a_graph(case):
    follows_in_a_graph(case, "gate", "cuda")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device():
    """While the first is the current one."""
    case = CASES[9]
    expected = results(functional.gate, case.inputs("gate", device="cuda:0"), backend="cuda")
    found = results(functional.gate, case.inputs("gate", device="cuda:1"), backend="cuda")
    for name, t in expected.items():  # another GPU has other tiles, whose sums round differently
        torch.testing.assert_close(found[name].cpu(), t.cpu())
