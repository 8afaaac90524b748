"""The same gates and providers through pytest-benchmark: `pytest bench/ --benchmark-only`.

With its statistics and storage, but one provider after the other; `python -m attn_gate bench` has them take
turns.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from attn_gate.bench.case import Case
from attn_gate.bench.measure import prepare
from attn_gate.bench.providers import PROVIDERS
from attn_gate.bench.registry import CONFIGS, MODES
from attn_gate.bench.results import Row

RUNS = [
    (mode, provider)
    for mode in MODES
    for provider, entry in PROVIDERS.items()
    if entry.default and mode in entry.modes
]


@pytest.fixture(scope="module", params=CONFIGS)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    """One at a time: the tests of a config follow each other."""
    torch.compiler.reset()
    yield Case(CONFIGS[request.param])
    gc.collect()


@pytest.mark.parametrize(("mode", "provider"), RUNS, ids=[f"{mode}-{provider}" for mode, provider in RUNS])
def test_bench(benchmark, case: Case, mode: str, provider: str):
    row = Row(case.config.name, mode, provider)
    program = prepare(case, mode, PROVIDERS[provider], row)
    if row.status == "unavailable":
        pytest.skip(row.note)
    assert program is not None, row.note
    benchmark.group = f"{case.config.name} {mode}"
    benchmark.extra_info.update(kept_bytes=row.kept_bytes, peak_bytes=row.peak_bytes, error=row.error)
    program.call()
    benchmark.pedantic(program.call, setup=program.reset, rounds=10)
