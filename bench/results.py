"""What was measured, and its files: results.json and results.csv, described in docs/benchmark.md."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attn_gate.page.files import write

from .registry import CONFIGS, AnyConfig, Config, NetworkConfig
from .summary import Summary, summarise

SCHEMA = 2
STATUSES = ("measured", "wrong", "unavailable", "failed")
_DERIVED = ("median_ms", "q1_ms", "q3_ms", "p10_ms", "p90_ms", "low_ms", "high_ms", "outliers", "gbps")

Key = tuple[str, str, int, str, str]


@dataclass
class Row:
    """The measurement of one provider for one config, dtype, number of threads and mode."""

    config: str
    dtype: str
    threads: int
    mode: str
    provider: str
    status: str = "measured"
    note: str = ""
    worst: str | None = None
    error: float | None = None
    tolerance: float | None = None
    kept_bytes: int | None = None
    peak_bytes: int | None = None
    fused: bool | None = None
    resident_bytes: int | None = None
    needed_bytes: int | None = None
    measured: str = ""
    times_ms: list[float] = field(default_factory=list)

    @property
    def key(self) -> Key:
        """What it is the row of."""
        return self.config, self.dtype, self.threads, self.mode, self.provider

    @property
    def is_ours(self) -> bool:
        """Whether it is attn_gate's."""
        return self.provider.partition("-")[0] == "attn_gate"

    @property
    def summary(self) -> Summary | None:
        """None for a row without times."""
        return summarise(self.times_ms) if self.times_ms else None

    @property
    def median_ms(self) -> float | None:
        """None for a row without times."""
        return self.summary.median if self.times_ms else None

    @property
    def gbps(self) -> float | None:
        """The bytes that memory has to move at least, over the median."""
        if not self.times_ms or self.needed_bytes is None:
            return None
        return self.needed_bytes / self.median_ms / 1e6

    def to_json(self) -> dict[str, Any]:
        """All fields of the schema."""
        fields = dataclasses.asdict(self)
        times = fields.pop("times_ms")
        s = self.summary
        values = (s.median, s.q1, s.q3, s.p10, s.p90, s.low, s.high, s.outliers, self.gbps) if s else ()
        derived = dict.fromkeys(_DERIVED)
        derived.update(zip(_DERIVED, values, strict=False))
        return {**fields, **derived, "times_ms": times}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Row:
        """The row that was written so."""
        names = {f.name for f in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in fields.items() if name in names})


@dataclass
class Results:
    """One run of the benchmark.

    Attributes:
        started: ISO 8601, UTC.
        machine: what the times depend on.
        settings: of the command line.
        configs: those that rows name; rows: in the order of their measurement.
        fits: largest batches that fit in a given memory; networks and gates.
        compared: verdicts against a baseline.
        interrupted: whether Ctrl-C ended the run.
    """

    started: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    configs: dict[str, AnyConfig] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    fits: list[dict[str, Any]] = field(default_factory=list)
    compared: dict[str, Any] | None = None
    interrupted: bool = False

    def describe(self, config: AnyConfig) -> None:
        """Add a config that rows are about; all are in the order of the registry."""
        self.configs[config.name] = config
        order = {name: number for number, name in enumerate(CONFIGS)}
        self.configs = dict(sorted(self.configs.items(), key=lambda item: order.get(item[0], len(order))))

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows; one that there is already is replaced."""
        new = {row.key: row for row in rows}
        self.rows = [row for row in self.rows if row.key not in new] + list(new.values())

    @property
    def dtype(self) -> str:
        """The one that goes without saying: float32, or the first of a run without that."""
        measured = dict.fromkeys(row.dtype for row in self.rows if row.times_ms)
        return "float32" if "float32" in measured else next(iter(measured), "float32")

    @property
    def threads(self) -> int:
        """The number that goes without saying: PyTorch's own, or the largest of a run without that."""
        measured, own = {row.threads for row in self.rows if row.times_ms}, self.machine["threads"]
        return own if own in measured else max(measured, default=own)

    def find(
        self, config: str, mode: str, provider: str, *, dtype: str | None = None, threads: int | None = None
    ) -> Row | None:
        """The row with a time, or None; dtype and threads: by default those that go without saying."""
        key = (config, dtype or self.dtype, threads or self.threads, mode, provider)
        for row in self.rows:
            if row.key == key and row.times_ms:
                return row
        return None

    def speedup(self, config: str, mode: str, provider: str, over: str, **which: Any) -> float | None:
        """How many times faster than `over` `provider` is, by the medians; None where one has no time."""
        ours = self.find(config, mode, provider, **which)
        theirs = self.find(config, mode, over, **which)
        return None if ours is None or theirs is None else theirs.median_ms / ours.median_ms

    @property
    def failures(self) -> list[Row]:
        """Rows that are wrong or failed, but for layouts in which plain PyTorch is wrong as well.

        Its batch norm on the CPU loses digits in channels last, and does so in every gate that ends with one.
        """
        wrong = {row.key for row in self.rows if row.status == "wrong"}

        def is_shared(row: Row) -> bool:
            end = "-channels-last"
            return row.provider.endswith(end) and (*row.key[:-1], f"eager{end}") in wrong

        return [
            row for row in self.rows if row.status == "failed" or (row.key in wrong and not is_shared(row))
        ]

    def to_json(self) -> dict[str, Any]:
        """All fields of the schema."""
        from . import modelled  # it describes these results' configs

        return {
            "schema": SCHEMA,
            "started": self.started,
            "interrupted": self.interrupted,
            "machine": self.machine,
            "settings": self.settings,
            "configs": {name: config.to_json() for name, config in self.configs.items()},
            "rows": [row.to_json() for row in self.rows],
            "fits": self.fits,
            "compared": self.compared,
            "modelled": modelled.to_json(self.configs.values()),
        }

    def write(self, folder: Path) -> None:
        """Write results.json and results.csv; a reader finds the old file or the new one, never a half."""
        content = self.to_json()
        write(folder / "results.json", json.dumps(content, indent=1) + "\n")
        table = io.StringIO()
        columns = [name for name in Row("", "", 0, "", "").to_json() if name != "times_ms"]
        writer = csv.DictWriter(table, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(content["rows"])
        write(folder / "results.csv", table.getvalue())


def read(path: Path) -> Results:
    """The results in a file results.json, or in the folder of one.

    Raises:
        ValueError: there is none, or it isn't one of this schema; the message says which.
    """
    path = path / "results.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text())
        schema = content["schema"]
        if schema == SCHEMA:
            return _from_json(content)
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} isn't a results.json of this benchmark") from None
    raise ValueError(f"{path} has schema {schema}; this version reads schema {SCHEMA}")


def _from_json(content: dict[str, Any]) -> Results:
    """Raises ValueError, KeyError, TypeError or AttributeError where the content isn't of this schema."""
    configs = {}
    for name, fields in content["configs"].items():
        fields.pop("gating_size", None)
        kind = NetworkConfig if fields["kind"] == "network" else Config
        configs[name] = kind(name=name, **{**fields, "size": tuple(fields["size"])})
    rows = [Row.from_json(row) for row in content["rows"]]
    for row in rows:
        _ = row.summary  # fails where times aren't numbers
    return Results(
        started=content["started"],
        machine={**content["machine"], "threads": int(content["machine"]["threads"])},
        settings=content["settings"],
        configs=configs,
        rows=rows,
        fits=content["fits"],
        compared=content["compared"] and {"machine": {}, "changed_configs": [], **content["compared"]},
        interrupted=content["interrupted"],
    )
