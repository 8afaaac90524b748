"""Does the jobs of a plan one after the other, shows how far it is, and keeps what it has."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import tables
from .device import Device
from .fits import largest_batch
from .measure import first_line, measure_case, threads
from .network_case import make_case
from .plan import Job
from .providers import PROVIDERS
from .resident import resident_bytes
from .results import Results, Row


class Run:
    """Measures into `results`, which are written to `folder` after each mode of each config.

    A context: Ctrl-C inside ends the measurement and is not raised. It, and any error, marks the results as
    interrupted.
    """

    def __init__(self, results: Results, device: Device, memory: int, folder: Path, console: Console) -> None:
        self.results, self.device, self.memory, self.folder = results, device, memory, folder
        self.console = console
        columns = BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn()
        self._progress = Progress(*columns, console=console)
        # Refreshed between measurements: a thread that does so would be in some of the times.
        self._live = Live(self._progress, console=console, transient=True, auto_refresh=False)

    def __enter__(self) -> Run:
        self._live.start()
        gc.freeze()  # all that is imported: to look through it before each measurement takes seconds
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        gc.unfreeze()
        self._live.stop()
        self.results.interrupted = kind is not None
        self.results.write(self.folder)
        return kind is KeyboardInterrupt

    def measure(self, jobs: Sequence[Job]) -> None:
        """Do all jobs."""
        task = self._progress.add_task("", total=len(jobs))
        for number, job in enumerate(jobs):

            def advance(what: str, part: float, number: int = number, job: Job = job) -> None:
                self._progress.update(task, completed=number + part, description=f"{job.config.name}: {what}")
                self._live.refresh()

            self.results.describe(job.config)
            advance("inputs", 0.0)
            with threads(job.threads):
                if job.patience is not None:
                    self._measure_times(job, advance)
                if job.memory:
                    self._measure_memory(job, advance)
            if "torch._dynamo" in sys.modules:  # seconds to import, only for what compiles
                # Else torch.compile's graphs, one for each config, would hit its limit of recompilations.
                torch.compiler.reset()
            self._progress.update(task, completed=number + 1)

    def _measure_times(self, job: Job, advance) -> None:
        try:
            case = make_case(job.config, job.dtype, self.device.name)
            case.settle()
        except ModuleNotFoundError as error:
            self._keep(_without_times(job, "unavailable", f"pip install {error.name}"))
            return
        except Exception as error:  # such as too little memory: the next config may be smaller
            self._keep(_without_times(job, "failed", first_line(error)))
            return
        measure_case(case, job.modes, job.providers, self.device, job.patience, self._keep, advance)

    def _keep(self, rows: list[Row]) -> None:
        self.results.add(rows)
        self.results.write(self.folder)
        if not rows:
            return
        self._live.update(Group(tables.live(self.results, rows[0].config), self._progress))
        if not self.console.is_terminal:
            for mode in dict.fromkeys(row.mode for row in rows):
                its = [row for row in rows if row.mode == mode]
                self.console.print(tables.line(self.results, its), soft_wrap=True, highlight=False)

    def _measure_memory(self, job: Job, advance) -> None:
        usable = [n for n in job.providers if not PROVIDERS[n].why_not(self.device.name, job.dtype)]
        pairs = [(m, n) for m in job.modes for n in usable if PROVIDERS[n].has(job.config, m)]
        for number, (mode, name) in enumerate(pairs):
            advance(f"resident memory, {mode}, {PROVIDERS[name].title}", 0.6 * number / len(pairs))
            row = self.results.find(job.config.name, mode, name, dtype=job.dtype, threads=job.threads)
            if row is not None and self.device.name == "cpu":
                with contextlib.suppress(RuntimeError):
                    row.resident_bytes = resident_bytes(*row.key)
        if "step" not in job.modes:
            return
        for name in usable:
            if "step" in PROVIDERS[name].modes:
                advance(f"largest batch, {PROVIDERS[name].title}", 0.8)
                try:
                    fit = largest_batch(make_case, job.config, job.dtype, name, self.device, self.memory)
                except Exception as error:  # a provider's failure at some batch costs its own line
                    self.console.print(f"largest batch of {name}: {error}".partition("\n")[0], style="yellow")
                    continue
                same = ("config", "dtype", "provider", "limit_bytes")
                others = [f for f in self.results.fits if any(f[key] != fit[key] for key in same)]
                self.results.fits = [*others, fit]
        self.results.write(self.folder)


def _without_times(job: Job, status: str, note: str) -> list[Row]:
    """A row for everything that the job would have measured."""
    config = job.config
    names = [(m, n) for m in job.modes for n in job.providers if PROVIDERS[n].has(config, m)]
    return [Row(config.name, job.dtype, job.threads, *name, status, note) for name in names]
