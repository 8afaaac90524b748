"""For all tests: one thread, since most are too small for two, a seed, large results in memory of PyTorch's
allocator, which tools that check memory watch, and the same decisions on every maker's CPU; what several
files need."""

from __future__ import annotations

import pytest
import torch

from attn_gate import keep_memory, patch, pointwise

# Whose longest tests take a minute: begun last, one of them would keep one core busy while the others wait.
FIRST = ("test_cuda_sanitizers.py", "test_cuda_table.py", "test_packaging.py", "test_triton.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in FIRST)


@pytest.fixture(autouse=True)
def _one_thread_a_seed_and_nothing_kept():
    threads, limit = torch.get_num_threads(), keep_memory(0)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    keep_memory(limit)


@pytest.fixture(autouse=True)
def _products_pay_as_on_intel(monkeypatch):
    monkeypatch.setattr(pointwise, "_IS_AMD", False)


@pytest.fixture
def runs(monkeypatch):
    """Counts the gates that run fused."""
    calls = []
    run = patch.FusedGate.run
    monkeypatch.setattr(patch.FusedGate, "run", lambda *args: calls.append(args[1]) or run(*args))
    return calls
