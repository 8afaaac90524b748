"""Forward and all gradients of every operator, by the float64 reference; CI runs it under sanitizers."""

from __future__ import annotations

import pytest
import torch
from matrix import BACKENDS, DTYPES, EDGES, LARGE, LAYOUTS, compare, recomputes

from attn_gate.cases import CASES, OPERATORS


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("case", CASES + EDGES, ids=lambda case: case.name)
def test_small(case, operator, dtype, backend):
    for options in recomputes(operator):
        for layout in LAYOUTS:
            compare(case, operator, dtype, layout, backend=backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_large(case, operator, backend):
    for options in recomputes(operator):
        for layout in ("contiguous", "channels last"):
            compare(case, operator, torch.float32, layout, backend=backend, **options)
