"""What has become faster or slower since an earlier run, and what is only noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from .results import Results, Row

# Changes below this are never called changes: builds of the same source differ as much.
LEAST = 0.05
_ORDER = ("slower", "faster", "unclear", "same")
_STYLES = {"slower": "bold red", "faster": "green", "same": "dim", "unclear": "yellow"}


def compare(new: Results, old: Results) -> dict[str, Any]:
    """Verdicts on attn_gate's rows that both runs have.

    The machine may be in another mood than then. What isn't attn_gate's ran in both as well: the median
    change of those is the machine's, and their spread is how well that is known. A row's own uncertainty is
    that of both medians (95 %). A row is "faster" or "slower" if its change, the machine's taken off, is more
    than LEAST and more than the uncertainties together; "same" if change and uncertainties together are
    within twice LEAST; else "unclear": repeat on a quieter machine.
    """
    pairs = [(row, _match(row, old)) for row in new.rows if row.times_ms]
    pairs = [(row, before) for row, before in pairs if before is not None]
    others = [math.log(r.median_ms / b.median_ms) for r, b in pairs if not is_ours(r)]
    drift = statistics.median(others) if others else 0.0
    # The middle half of the others around the drift; it counts as the uncertainty of one of them.
    spread = statistics.median(abs(other - drift) for other in others) if others else 0.0
    rows = []
    for row, before in pairs:
        if not is_ours(row):
            continue
        change = math.log(row.median_ms / before.median_ms) - drift
        noise = math.hypot(_uncertainty(row), _uncertainty(before), spread)
        rows.append(
            {
                **dict(zip(("config", "dtype", "threads", "mode", "provider"), row.key, strict=True)),
                "before_ms": before.median_ms,
                "now_ms": row.median_ms,
                "change": math.expm1(change),
                "noise": math.expm1(noise),
                "verdict": _verdict(change, noise),
            }
        )
    rows.sort(key=lambda row: _ORDER.index(row["verdict"]))
    return {
        "baseline": old.started,
        "threads": new.machine["threads"],
        "drift": math.expm1(drift),
        "others": len(others),
        "rows": rows,
    }


def title(row: dict[str, Any], threads: int) -> str:
    """What a row of a comparison is about; without what goes without saying in a run on so many threads."""
    parts = [row["config"], row["mode"]]
    parts += [row["dtype"]] if row["dtype"] != "float32" else []
    parts += [row["provider"].partition("-")[2]] if row["provider"] != "attn_gate" else []
    parts += [f"{row['threads']} threads"] if row["threads"] != threads else []
    return " ".join(parts)


def is_ours(row: Row) -> bool:
    """Whether it is attn_gate's."""
    return row.provider.partition("-")[0] == "attn_gate"


def is_slower(compared: dict[str, Any] | None) -> bool:
    """Whether anything is."""
    return compared is not None and any(row["verdict"] == "slower" for row in compared["rows"])


def tables(compared: dict[str, Any] | None) -> Iterator[Table | Text]:
    """The comparison, for the terminal; nothing without one."""
    if compared is None:
        return
    yield Text(f"Since {compared['baseline']}", style="bold")
    if not compared["rows"]:
        yield Text("the runs have no row of attn_gate in common", style="yellow")
        return
    if compared["others"]:
        yield Text(
            f"what isn't attn_gate's takes {compared['drift']:+.0%} time "
            f"({compared['others']} rows, median): the machine, taken off below",
            style="dim",
        )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "before, ms", "now, ms", "change of time", "noise", "verdict"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in compared["rows"]:
        name = title(row, compared["threads"])
        change, noise = f"{row['change']:+.1%}", f"±{row['noise']:.1%}"
        verdict = Text(row["verdict"], style=_STYLES[row["verdict"]])
        table.add_row(name, f"{row['before_ms']:.2f}", f"{row['now_ms']:.2f}", change, noise, verdict)
    yield table


def _match(row: Row, old: Results) -> Row | None:
    return old.find(row.config, row.mode, row.provider, dtype=row.dtype, threads=row.threads)


def _uncertainty(row: Row) -> float:
    """Half of the median's interval, as a logarithm."""
    return math.log(row.summary.high / row.summary.low) / 2


def _verdict(change: float, noise: float) -> str:
    least = math.log1p(LEAST)
    if abs(change) > max(least, noise):
        return "slower" if change > 0 else "faster"
    return "same" if abs(change) + noise <= 2 * least else "unclear"
