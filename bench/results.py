"""What was measured, and the two files that hold it: results.json and results.csv.

results.json, schema 1:

    schema        1
    started       ISO 8601, UTC
    interrupted   whether Ctrl-C ended the run; what was measured until then is there
    machine       cpu, cores, threads, load (of the last minute before), instructions, platform, and the
                  versions of Python, torch, ...
    settings      repeats, quick
    configs       {name: gate, batch, channels, gating, inter, size, gating_size}
    rows          one per config, mode and provider:
        config, mode, provider
        status         "measured" | "wrong" | "unavailable" | "failed"; the last three have no times
        note           why there are none, in words
        worst          the result furthest from the float64 reference ("y", "d x", "d theta.weight", ...)
        error          of that one, relative to its largest value
        tolerance      what was allowed
        times_ms       every sample, in order; a repeat of a short call gives several
        median_ms, q1_ms, q3_ms
        kept_bytes     kept by autograd between forward and backward beyond x, g and parameters ("step")
        peak_bytes     the most that tensors made in the call held at one time, results included

results.csv has the same rows, without the samples. Fields that don't apply are null, or empty.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .registry import Config

SCHEMA = 1


@dataclass
class Row:
    """The measurement of one provider for one config and mode; the fields are those of the module's text."""

    config: str
    mode: str
    provider: str
    status: str = "measured"
    note: str = ""
    worst: str | None = None
    error: float | None = None
    tolerance: float | None = None
    times_ms: list[float] = field(default_factory=list)
    kept_bytes: int | None = None
    peak_bytes: int | None = None

    @property
    def median_ms(self) -> float | None:
        """None for a row without times."""
        return statistics.median(self.times_ms) if self.times_ms else None

    @property
    def quartiles_ms(self) -> tuple[float | None, float | None]:
        """The first and the third; both are the sample itself where there is only one."""
        if len(self.times_ms) < 2:
            return self.median_ms, self.median_ms
        q1, _, q3 = statistics.quantiles(self.times_ms, n=4, method="inclusive")
        return q1, q3

    def to_json(self) -> dict[str, Any]:
        """All fields of the schema."""
        q1, q3 = self.quartiles_ms
        quantiles = {"median_ms": self.median_ms, "q1_ms": q1, "q3_ms": q3}
        return {**dataclasses.asdict(self), "times_ms": [round(t, 4) for t in self.times_ms], **quantiles}


@dataclass
class Results:
    """One run of the benchmark."""

    started: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    configs: Sequence[Config] = ()
    rows: list[Row] = field(default_factory=list)
    interrupted: bool = False

    def find(self, config: str, mode: str, provider: str) -> Row | None:
        """The row with a time, or None."""
        for row in self.rows:
            if (row.config, row.mode, row.provider) == (config, mode, provider) and row.times_ms:
                return row
        return None

    def speedup(self, config: str, mode: str, provider: str, over: str) -> float | None:
        """How many times faster than `over` `provider` is, by the medians; None where one has no time."""
        ours, theirs = self.find(config, mode, provider), self.find(config, mode, over)
        return None if ours is None or theirs is None else theirs.median_ms / ours.median_ms

    def to_json(self) -> dict[str, Any]:
        """All fields of the schema."""
        configs = {}
        for config in self.configs:
            fields = dataclasses.asdict(config)
            configs[fields.pop("name")] = {**fields, "gating_size": config.gating_size}
        return {
            "schema": SCHEMA,
            "started": self.started,
            "interrupted": self.interrupted,
            "machine": self.machine,
            "settings": self.settings,
            "configs": configs,
            "rows": [row.to_json() for row in self.rows],
        }

    def write(self, folder: Path) -> None:
        """Write results.json and results.csv; a reader finds the old file or the new one, never a half."""
        folder.mkdir(parents=True, exist_ok=True)
        content = self.to_json()
        _write_atomically(folder / "results.json", json.dumps(content, indent=1) + "\n")
        table = io.StringIO()
        columns = [name for name in Row("", "", "").to_json() if name != "times_ms"]
        writer = csv.DictWriter(table, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(content["rows"])
        _write_atomically(folder / "results.csv", table.getvalue())


def _write_atomically(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are for their owner alone
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
