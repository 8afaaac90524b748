"""Check, then measure: all take turns in one process, so that the machine's moods hit all alike."""

from __future__ import annotations

import contextlib
import gc
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping

from .case import Case
from .memory import kept_bytes, peak_bytes
from .providers import Program, Provider
from .results import Row

SHORT_MS = 20.0  # up to here a turn is several calls
CALLS = 3
# Other libraries' worker threads spin for a while after their call and would take a core from the next one.
PAUSE_S = 0.03


def measure_case(
    case: Case,
    mode: str,
    providers: Collection[Provider],
    repeats: int,
    rows: list[Row],
    on_progress: Callable[[str], None] = lambda what: None,
) -> None:
    """Append to `rows` that of every provider for this case and mode.

    A provider whose results don't match the float64 reference gets no time. Interrupted by Ctrl-C, it appends
    what it has.

    Args:
        repeats: turns of each provider.
        on_progress: called with what was done once per provider, and once per repeat.
    """
    found: dict[str, Row] = {}
    programs: dict[str, Program] = {}
    try:
        for provider in providers:
            if mode not in provider.modes:
                continue
            row = Row(case.config.name, mode, provider.name)
            program = prepare(case, mode, provider, row)
            found[provider.name] = row
            if program is not None:
                programs[provider.name] = program
            on_progress(f"checked {provider.name}")
        times = {name: found[name].times_ms for name in programs}
        for _ in interleave(programs, repeats, times):
            on_progress("measured")
    finally:
        rows.extend(row for row in found.values() if row.status != "measured" or row.times_ms)


def prepare(case: Case, mode: str, provider: Provider, row: Row) -> Program | None:
    """The provider's program, results checked and memory counted; None, and why in `row`, if it fails."""
    row.note = provider.why_not()
    if row.note:
        row.status = "unavailable"
        return None
    try:
        program = provider.make(case, mode)
        if program.results is not None:
            verdict = case.check(mode, program.results())
            row.worst, row.error, row.tolerance = verdict.name, verdict.error, verdict.tolerance
            if not verdict.ok:
                row.status = "wrong"
                row.note = f"{verdict.name} is off by {verdict.error:.1e}, allowed {verdict.tolerance:.1e}"
                return None
        _count_memory(program, row)
    except Exception as error:  # another library's failure costs its own row, not the run
        row.status = "failed"
        row.note = f"{type(error).__name__}: {error}".partition("\n")[0]
        return None
    return program


def _count_memory(program: Program, row: Row) -> None:
    if program.forward is not None:
        row.kept_bytes = kept_bytes(program.forward, program.held)
    if program.counts_peak:
        program.reset()
        row.peak_bytes = peak_bytes(program.call)


def interleave(
    programs: Mapping[str, Program], repeats: int, times: dict[str, list[float]]
) -> Iterator[None]:
    """Give every program `repeats` turns in random order; append ms to `times`, yield after each round."""
    shuffled = random.Random(0)
    expected = {name: _timed(program) for name, program in programs.items()}  # and warms up
    with _without_gc():
        for _ in range(repeats):
            for name in shuffled.sample(list(programs), len(programs)):
                program = programs[name]
                time.sleep(PAUSE_S)
                short = expected[name] < SHORT_MS
                if short:
                    # Worker threads of the one before may still spin, and its data is in the caches.
                    _timed(program)
                turn = [_timed(program) for _ in range(CALLS if short else 1)]
                times[name] += turn
                expected[name] = min(turn)
            yield


def _timed(program: Program) -> float:
    program.reset()
    start = time.perf_counter()
    program.call()
    return (time.perf_counter() - start) * 1e3


@contextlib.contextmanager
def _without_gc() -> Iterator[None]:
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
