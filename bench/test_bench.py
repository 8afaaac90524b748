"""The same gates and providers through pytest-benchmark: `pytest bench/ --benchmark-only`.

With its statistics and storage, but one provider after the other; `python -m attn_gate bench` has them take
turns. `-k "same-256 and step"` chooses.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from attn_gate.bench import device, plan
from attn_gate.bench.measure import new_row, prepare
from attn_gate.bench.network_case import make_case
from attn_gate.bench.providers import PROVIDERS, TRAINING, AnyCase

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# In the order of the configs: a case is made once, and is large.
RUNS = {
    f"{job.config.name}-{mode}-{provider}": (job.config, mode, provider)
    for job in plan.jobs(plan.full(), plan.Wanted(dtypes=["float32"]), DEVICE)
    if job.patience is not None and job.threads == torch.get_num_threads()
    for mode in job.modes
    for provider in job.providers
    if mode in PROVIDERS[provider].modes
}


@pytest.fixture(scope="module")
def cases() -> Iterator[dict[str, AnyCase]]:
    """The last case that was asked for, and no other."""
    made: dict[str, AnyCase] = {}
    yield made
    made.clear()


@pytest.mark.parametrize("run", RUNS)
def test_bench(benchmark, cases: dict[str, AnyCase], run: str):
    config, mode, name = RUNS[run]
    if config.name not in cases:
        cases.clear()
        gc.collect()
        torch.compiler.reset()
        cases[config.name] = make_case(config, "float32", DEVICE)
        cases[config.name].settle()
    row = new_row(cases[config.name], mode, name)
    program = prepare(cases[config.name], mode in TRAINING, PROVIDERS[name], device.make(DEVICE), [row])
    # PyTorch's batch norm loses digits in channels last, and so does every gate that ends with one.
    shared = row.status == "wrong" and mode in TRAINING and name.endswith("-channels-last")
    if row.status == "unavailable" or shared:
        pytest.skip(row.note)
    assert program is not None, row.note
    work = program.works[mode]
    benchmark.group = f"{config.name} {mode}"
    benchmark.extra_info.update(kept_bytes=row.kept_bytes, peak_bytes=row.peak_bytes, error=row.error)

    def call() -> None:
        work.call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    work.prepare()
    call()
    benchmark.pedantic(call, setup=work.prepare, rounds=10)
