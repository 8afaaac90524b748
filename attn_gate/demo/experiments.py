"""The demo's experiments, one after the other, each with a progress bar, and the report at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from attn_gate import backends
from attn_gate.demo import compare, figures, measure, report, train
from attn_gate.demo.dataset import Batches, Slices, prepare
from attn_gate.demo.dicom import Scan
from attn_gate.demo.results import Results, write, write_tables
from attn_gate.demo.summary import closing_table
from attn_gate.demo.train import Run

TRAINING_SECONDS = 190  # what the training runs together may take when the number of steps isn't given
STEP_CHOICES = (400, 350, 300, 250, 200, 150)
# Work of the runs in forward + backward passes of the eager network, per step: eager, its step-locked twin,
# and now and then one in float64; fused; eager on one thread.
PASSES_PER_STEP = 2.3 + 1 + 1.8
FAST_STEPS = 50
FAST_FLOAT64_STEPS = 10
FAST_BATCH = 4


class Demo:
    """All experiments on one set of scans; `run` does them and writes the report into `directory`."""

    def __init__(
        self,
        scans: list[Scan],
        source: str,
        synthetic: bool,
        directory: Path,
        console: Console,
        *,
        steps: int | None = None,
        fast: bool = False,
    ) -> None:
        self.directory, self.console = directory, console
        training, held_out = prepare(scans)
        batch = FAST_BATCH if fast else train.BATCH
        self.batches = Batches(training, batch)
        self.float64_steps = FAST_FLOAT64_STEPS if fast else compare.FLOAT64_STEPS
        self.threads = torch.get_num_threads()
        self.results = Results(
            patients=[scan.name for scan in scans],
            source=source,
            synthetic=synthetic,
            steps=steps or (FAST_STEPS if fast else _affordable_steps(self.batches)),
            batch=batch,
            training_slices=len(training),
            parameters=sum(p.numel() for p in train.make_network("eager").parameters()),
            held_out=held_out,
            shown=with_most_tumour(held_out),
            fused_backend=backends.choose("auto", training.image),
        )

    def run(self) -> int:
        """The exit code: 0; 1 if eager and fused don't agree in float64; 130 if stopped by Ctrl-C."""
        results = self.results
        stages = [
            ("float64, side by side", self._float64, self.float64_steps),
            ("eager, fused step-locked", self._eager, results.steps),
            ("fused", self._fused, results.steps),
            ("eager, other threads", self._floor, results.steps),
            ("time and memory", self._cost, measure.REPEATS),
        ]
        columns = TextColumn("{task.description:<25}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        try:
            with Progress(*columns, console=self.console) as progress:
                tasks = [progress.add_task(name, total=total, start=False) for name, _, total in stages]
                for task, (name, stage, _) in zip(tasks, stages, strict=True):
                    progress.start_task(task)
                    if not self.console.is_terminal:  # no bar there until the end
                        self.console.print(f"{name} ...")
                    with self._timed(name):
                        stage(lambda task=task: progress.advance(task))
        except KeyboardInterrupt:
            results.interrupted = True
            self.console.print("[yellow]Stopped. Writing what was finished.")
        self._write()
        self.console.print(closing_table(results))
        self.console.print(f"[dim]{results.source}", highlight=False)
        self.console.print(f"Open [bold]{self.directory / 'report.html'}", highlight=False)
        if not results.agree:
            self.console.print(
                "[red]Eager and fused gates disagree in float64: run python -m attn_gate verify"
            )
            return 1
        return 130 if results.interrupted else 0

    def _float64(self, on_step: Callable[[], None]) -> None:
        batches = Batches(self.batches.data, compare.FLOAT64_BATCH)
        compare.float64_run(self.results.float64, batches, self.float64_steps, on_step)

    def _eager(self, on_step: Callable[[], None]) -> None:
        self.results.locked = compare.StepLocked()
        self._train("eager", Run("eager", "eager", self.threads), on_step, self.results.locked.differentiate)

    def _fused(self, on_step: Callable[[], None]) -> None:
        self._train("fused", Run("fused", "auto", self.threads), on_step)

    def _floor(self, on_step: Callable[[], None]) -> None:
        name, threads = ("eager, 1 thread", 1) if self.threads > 1 else ("eager, 2 threads", 2)
        self._train("floor", Run(name, "eager", threads), on_step)

    def _cost(self, on_step: Callable[[], None]) -> None:
        self.results.cost = measure.measure(*self.batches(0), on_step)

    def _train(
        self, key: str, run: Run, on_step: Callable[[], None], differentiate=train.differentiate
    ) -> None:
        results = self.results
        results.runs[key] = run
        train.train(
            run,
            results.steps,
            self.batches,
            results.held_out,
            shown=results.shown,
            on_step=on_step,
            differentiate=differentiate,
        )

    def _write(self) -> None:
        write_tables(self.results, self.directory)
        with self.console.status("drawing"), self._timed("drawing"):
            drawn = dict(figures.draw_all(self.results, self.directory))
        write(self.directory / "report.html", report.page(self.results, drawn))

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.results.seconds[name] = time.perf_counter() - start


def with_most_tumour(held_out: Slices) -> np.ndarray:
    """Of each patient the index of the held-out slice with most tumour."""
    area = held_out.truth.flatten(1).sum(1).numpy()
    patients = [np.flatnonzero(held_out.patient == p) for p in np.unique(held_out.patient)]
    return np.array([slices[area[slices].argmax()] for slices in patients])


def _affordable_steps(batches: Batches) -> int:
    """As many steps as fit into TRAINING_SECONDS by the time of a few, a round number."""
    network = train.make_network("eager")
    seconds = []
    for step in range(5):
        image, truth = batches(step)
        start = time.perf_counter()
        train.differentiate(network, image.contiguous(memory_format=train.LAYOUT), truth)
        seconds.append(time.perf_counter() - start)
    affordable = TRAINING_SECONDS / (sorted(seconds)[len(seconds) // 2] * PASSES_PER_STEP)
    return next((n for n in STEP_CHOICES if n <= affordable), STEP_CHOICES[-1])
