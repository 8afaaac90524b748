"""All that a demo has found so far, and where it may be written: complete files or none."""

from __future__ import annotations

import csv
import io
import json
import math
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from attn_gate._version import __version__
from attn_gate.demo import dataset, train
from attn_gate.demo.compare import Float64Run, StepLocked
from attn_gate.demo.dataset import Slices
from attn_gate.demo.measure import Cost
from attn_gate.demo.train import Run
from attn_gate.page.files import write

LARGEST_FLOAT64_DIFFERENCE = 1e-11


@dataclass
class Results:
    """Filled experiment by experiment; what is missing or short was not reached.

    Attributes:
        patients: name of each scan.
        source: where the images are from, with the licence, as it must be shown.
        held_out: the slices that Dice is of; `shown` indexes the one of each patient that the pictures show.
        runs: the free runs by what they are: "eager", "fused", "floor" (eager on another number of threads).
        seconds: wall time by experiment.
    """

    patients: list[str]
    source: str
    synthetic: bool
    steps: int
    batch: int
    training_slices: int
    parameters: int
    held_out: Slices
    shown: np.ndarray
    fused_backend: str
    float64: Float64Run = field(default_factory=Float64Run)
    locked: StepLocked | None = None
    runs: dict[str, Run] = field(default_factory=dict)
    cost: Cost | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    interrupted: bool = False

    def rows(self) -> Iterator[tuple[str, str, int, str, float]]:
        """(experiment, program, step, quantity, value) of everything measured."""
        for program in ("eager", "fused"):
            for step, loss in enumerate(getattr(self.float64, program)):
                yield "float64", program, step, "loss", loss
        if self.locked:
            for quantity in ("loss_error", "gradient_error"):
                for step, value in enumerate(getattr(self.locked, quantity)):
                    yield "step-locked", "fused against eager", step, quantity, value
            for program in ("eager", "fused"):
                for step, value in getattr(self.locked, f"{program}_error").items():
                    yield "step-locked", f"{program} against float64", step, "gradient_error", value
        for run in self.runs.values():
            for step, loss in enumerate(run.loss):
                yield "free", run.name, step, "loss", loss
            for step, dice in run.dice.items():
                yield "free", run.name, step, "dice", dice.pooled
                for name, value in zip(self.patients, dice.patients, strict=True):
                    yield "free", run.name, step, f"dice {name}", value
        if self.cost:
            for quantity in ("gates_ms", "network_ms"):
                for layout, values in getattr(self.cost, quantity).items():
                    for program, value in values.items():
                        yield f"cost, {layout}", program, 0, quantity, value
            for quantity in ("gates_bytes", "network_bytes"):
                for program, value in getattr(self.cost, quantity).items():
                    yield "cost", program, 0, quantity, value

    def environment(self) -> dict[str, Any]:
        """What is needed to understand or repeat the numbers."""
        return {
            "attn_gate": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "processor": processor(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "fused_backend": self.fused_backend,
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "data": self.source,
            "synthetic": self.synthetic,
            "patients": self.patients,
            "parameters": self.parameters,
            "training_slices": self.training_slices,
            "held_out_slices": len(self.held_out),
            "recipe": {
                "steps": self.steps,
                "batch": self.batch,
                "pixel_mm": dataset.PIXEL_MM,
                "size": dataset.SIZE,
                "channels": list(train.CHANNELS),
                "gate": {"preset": "same_grid", **train.GATE_OPTIONS},
                "learning_rate": [train.LEARNING_RATE, train.LAST_LEARNING_RATE],
                "average_decay": train.AVERAGE_DECAY,
                "seed": train.SEED,
            },
            "seconds": {name: round(s, 1) for name, s in self.seconds.items()},
            "interrupted": self.interrupted,
        }

    def final_dice(self) -> dict[str, float]:
        """The last pooled Dice of each free run that was scored at all."""
        return {key: run.dice[max(run.dice)].pooled for key, run in self.runs.items() if run.dice}

    @property
    def agree(self) -> bool:
        """Whether no float64 loss differs by more than rounding can explain."""
        return max(self.float64.difference, default=0.0) < LARGEST_FLOAT64_DIFFERENCE

    def gradient_error(self) -> float:
        """Median over the steps of the step-locked gradient error; nan if there is none."""
        return median(self.locked.gradient_error) if self.locked and self.locked.gradient_error else math.nan


def processor() -> str:
    """The processor's name as the operating system gives it."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_tables(results: Results, directory: Path) -> None:
    """metrics.csv (one number a line) and env.json."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["experiment", "program", "step", "quantity", "value"])
    table.writerows((*row[:4], f"{row[4]:.9g}") for row in results.rows())
    write(directory / "metrics.csv", text.getvalue())
    write(directory / "env.json", json.dumps(results.environment(), indent=2) + "\n")
