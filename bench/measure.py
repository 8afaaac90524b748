"""Check, then measure: all take turns in one process, so that the machine's moods hit all alike."""

from __future__ import annotations

import contextlib
import datetime
import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from attn_gate.judge import float32_products

from . import traffic
from .device import Device
from .memory import kept_bytes, runs_operators
from .providers import PROVIDERS, TRAINING, AnyCase, Program, Provider, Work
from .registry import Config
from .results import Row

SHORT_MS = 20.0  # up to here a turn is several calls
CALLS = 3
# Up to here a turn begins with a call that isn't timed: the data of the one before is in the caches, and
# memory that was given back meanwhile is slow to get again, above all in virtual machines.
WARM_MS = 100.0
# Each warms up with so many calls, or as many as start within that time, but no fewer than the least.
# Virtual machines that give free memory back to their host get it again page by page: there the first dozen
# calls with a large result take up to five times as long as those that follow.
WARM_UP_CALLS = 12
WARM_UP_S = 0.3
WARM_UP_LEAST = 3
# Worker threads that aren't PyTorch's spin for a while after their call and take a core from the next one.
PAUSE_S = 0.03

OnProgress = Callable[[str, float], None]  # what is done, and which part of the case's work is done by now


@dataclass(frozen=True)
class Patience:
    """How long one config and mode is measured: `repeats` turns of each provider, at least `least`, and in
    between as many as start within `seconds`."""

    repeats: int
    least: int
    seconds: float


def measure_case(
    case: AnyCase,
    modes: list[str],
    providers: list[str],
    device: Device,
    patience: Patience,
    on_rows: Callable[[list[Row]], None],
    on_progress: OnProgress = lambda what, part: None,
) -> None:
    """Measure these providers of a settled case, mode after mode; `on_rows` gets the rows of each.

    A provider whose results don't match the float64 reference gets no time. Interrupted by Ctrl-C, it hands
    over what it has.
    """
    for training in (False, True):
        wanted = [mode for mode in modes if (mode in TRAINING) == training]
        if not wanted:
            continue
        # Of all that this case has to do, the part that is done before; a third of the rest is checks.
        start, share = (0.0 if not training else 1 - len(wanted) / len(modes)), len(wanted) / len(modes)
        programs: dict[str, Program] = {}
        rows: dict[tuple[str, str], Row] = {}
        try:
            for number, name in enumerate(providers):
                provider = PROVIDERS[name]
                its = {m: new_row(case, m, name) for m in wanted if provider.has(case.config, m)}
                if not its:
                    continue
                on_progress(f"check {provider.title}", start + share / 3 * number / len(providers))
                program = prepare(case, training, provider, device, list(its.values()))
                rows.update(((m, name), row) for m, row in its.items())
                if program is not None:
                    programs[name] = program
            for number, mode in enumerate(wanted):
                works = {n: (p.works[mode], p.own_threads) for n, p in programs.items() if (mode, n) in rows}
                times = {n: rows[mode, n].times_ms for n in works}

                def fail(name: str, error: Exception, mode: str = mode, rows: dict = rows) -> None:
                    give_up([rows[mode, name]], "failed", first_line(error))

                for part in interleave(works, device, patience, times, fail):
                    on_progress(mode, start + share / 3 * (1 + 2 * (number + part) / len(wanted)))
        finally:
            on_rows([row for row in rows.values() if row.status != "measured" or row.times_ms])


def new_row(case: AnyCase, mode: str, provider: str) -> Row:
    """Without times yet."""
    config = case.config
    needed = traffic.needed_bytes(config, mode, case.dtype) if isinstance(config, Config) else None
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    names = config.name, case.dtype, torch.get_num_threads(), mode, provider
    return Row(*names, needed_bytes=needed, measured=now)


def prepare(
    case: AnyCase, training: bool, provider: Provider, device: Device, rows: list[Row]
) -> Program | None:
    """The provider's program, results checked and memory counted; None, and why in its rows, if it fails."""
    if reason := provider.why_not(case.device, case.dtype):
        give_up(rows, "unavailable", reason)
        return None
    try:
        program = provider.make(case, training)
        if program.results is not None:
            with float32_products():
                verdict = case.check(training, program.results())
            for row in rows:
                row.worst, row.error, row.tolerance = verdict
            if not verdict.ok:
                allowed = f"allowed {verdict.tolerance:.1e}"
                give_up(rows, "wrong", f"{verdict.name} is off by {verdict.error:.1e}, {allowed}")
                return None
        _count_memory(program, device, rows)
        _look_for_operators(program, rows)
    except Exception as error:  # another library's failure costs its own rows, not the run
        give_up(rows, "failed", first_line(error))
        return None
    return program


def give_up(rows: list[Row], status: str, note: str) -> None:
    """Rows that get no times, or lose them, and why."""
    for row in rows:
        row.status, row.note = status, note
        row.times_ms.clear()


def first_line(error: Exception) -> str:
    """What a row's note has room for."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _count_memory(program: Program, device: Device, rows: list[Row]) -> None:
    kept = None if program.forward is None else kept_bytes(program.forward, program.held)
    for row in rows:
        row.kept_bytes = kept
        if program.counts_peak and row.mode != "backward":  # it frees what was allocated before
            work = program.works[row.mode]
            work.prepare()
            row.peak_bytes = device.peak_bytes(work.call)


def _look_for_operators(program: Program, rows: list[Row]) -> None:
    for row in rows:
        if row.is_ours:
            work = program.works[row.mode]
            work.prepare()
            row.fused = runs_operators(work.call)


def interleave(
    works: Mapping[str, tuple[Work, bool]],
    device: Device,
    patience: Patience,
    times: dict[str, list[float]],
    on_failure: Callable[[str, Exception], None],
) -> Iterator[float]:
    """Give all their turns in random order; append ms to `times`, yield which part is done after each.

    works: with each, whether it has threads that may spin after its turn.
    on_failure: one that raises gets no more turns.
    """
    shuffled = random.Random(0)
    working = dict(works)
    expected: dict[str, float] = {}

    def turn(name: str) -> list[float]:
        work, own_threads = working[name]
        before = expected[name]
        if before < WARM_MS:
            before = min(before, device.time_ms(work.prepare, work.call))
        calls = CALLS if before < SHORT_MS else 1
        found = [device.time_ms(work.prepare, work.call) for _ in range(calls)]
        expected[name] = min(found)
        work.leave()
        if own_threads:
            time.sleep(PAUSE_S)
        return [round(t, 5) for t in found]

    def warm_up(name: str) -> list[float]:
        work, own_threads = working[name]
        end = time.perf_counter() + WARM_UP_S
        for call in range(WARM_UP_CALLS):
            if call >= WARM_UP_LEAST and time.perf_counter() > end:
                break
            expected[name] = device.time_ms(work.prepare, work.call)
        work.leave()
        if own_threads:
            time.sleep(PAUSE_S)
        return []

    def give_turns(names: list[str], give: Callable[[str], list[float]]) -> None:
        for name in names:
            try:
                times[name] += give(name)
            except Exception as error:
                del working[name]
                on_failure(name, error)

    give_turns(list(working), warm_up)
    start = time.perf_counter()
    with _without_gc():
        for round_ in range(patience.repeats):
            elapsed = time.perf_counter() - start
            if round_ >= patience.least and elapsed > patience.seconds:
                return
            give_turns(shuffled.sample(list(working), len(working)), turn)
            done = (round_ + 1) / patience.repeats
            yield min(1.0, max(done, (time.perf_counter() - start) / patience.seconds))


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


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
