"""The tables that `python -m attn_gate bench` prints, and the Markdown one for READMEs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from .providers import PROVIDERS
from .results import Results, Row

OURS = "attn_gate"
NOISY = "~"  # before a time whose samples are far apart
LEFT = "="  # before a time of attn_gate in which none of its operators ran
MARKS = {
    NOISY: "quartiles, of fewer than 6 samples the extremes, more than a quarter of it apart",
    LEFT: "PyTorch's layers, which attn_gate leaves alone there",
}

Cell = Callable[[Row], str]


@dataclass(frozen=True)
class Grid:
    """One table: a line per config, mode, dtype and number of threads, a column per provider.

    Attributes:
        title: what the numbers are.
        columns: names of providers.
        lines: (heading, config, cells); empty cells where nothing was measured.
    """

    title: str
    columns: list[str]
    lines: list[tuple[str, str, list[str]]]


def grids(results: Results) -> Iterator[Grid]:
    """All tables of measured numbers that are not empty."""
    threads = threads_text(results.threads)
    rows = [row for row in results.rows if row.times_ms]
    notes = [f"{mark}: {text}" for mark, text in MARKS.items() if any(mark in marks(row) for row in rows)]
    notes += ["n: of so few samples"] if any(row.summary.few for row in rows) else []
    note = f" ({'; '.join(notes)})" if notes else ""

    def speedup(row: Row) -> str:
        which = {"dtype": row.dtype, "threads": row.threads}
        found = results.speedup(row.config, row.mode, OURS, over=row.provider, **which)
        if found is None or row.provider == OURS:
            return ""
        # Nothing beats the limit: the other way round it reads better.
        return f"{1 / found:.2f}x its" if row.provider == "limit" else f"{found:.2f}x"

    def bandwidth(row: Row) -> str:
        return "" if row.gbps is None else f"{row.gbps:.1f}"

    def share_of_copy(row: Row) -> str:
        copy = results.machine.get("copy_gbps")
        return "" if row.gbps is None or not copy else f"{100 * row.gbps / copy:.0f} %"

    def over_float32(row: Row) -> str:
        full = results.find(row.config, row.mode, row.provider, dtype="float32", threads=row.threads)
        if row.dtype == "float32" or full is None or not row.times_ms:
            return ""
        return f"{full.median_ms / row.median_ms:.2f}x"

    def over_one_thread(row: Row) -> str:
        one = results.find(row.config, row.mode, row.provider, dtype=row.dtype, threads=1)
        return f"{one.median_ms / row.median_ms:.2f}x" if one and row.times_ms and row.threads > 1 else ""

    whole = (
        (f"Milliseconds, median, {results.dtype}, {threads}{note}", counted_milliseconds),
        (f"How many times faster {OURS} is, and its time in that of the memory limit", speedup),
        ("GB/s: bytes that must move over the time", bandwidth),
        ("GB/s relative to this machine's copy bandwidth", share_of_copy),
        ("How many times faster than in float32", over_float32),
        ("How many times faster than on one thread", over_one_thread),
        ("MiB kept by autograd between forward and backward, beyond x, g and parameters",
         lambda row: mebibytes(row.kept_bytes) if row.mode in ("step", "forward") else ""),
        ("MiB allocated at the peak of one call, its results included",
         lambda row: mebibytes(row.peak_bytes)),
        ("MiB that a fresh process grows by in its first call, libraries' own memory included",
         lambda row: mebibytes(row.resident_bytes)),
    )  # fmt: skip
    for title, cell in whole:
        grid = _grid(results, title, cell)
        if grid.lines:
            yield grid


def _grid(results: Results, title: str, cell: Cell) -> Grid:
    """Cells of all rows by line and provider, without empty lines and columns."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in results.rows:
        text = cell(row) if row.status == "measured" else ""
        if text:
            cells.setdefault((heading(results, row), row.config), {})[row.provider] = text
    used = {name for line in cells.values() for name in line}
    columns = [name for name in PROVIDERS if name in used]
    order = {name: number for number, name in enumerate(results.configs)}
    headings = list(dict.fromkeys(head for head, _ in cells))
    keys = sorted(cells, key=lambda key: (headings.index(key[0]), order.get(key[1], 0)))
    return Grid(title, columns, [(*key, [cells[key].get(name, "") for name in columns]) for key in keys])


def heading(results: Results, row: Row) -> str:
    """Such as "step", "step, bfloat16" or "step, 1 thread"."""
    parts = [row.mode]
    if row.dtype != results.dtype:
        parts.append(row.dtype)
    if row.threads != results.threads:
        parts.append(threads_text(row.threads))
    return ", ".join(parts)


def rich_tables(results: Results) -> Iterator[Table | Text]:
    """Everything that was found, for the terminal."""
    for grid in grids(results):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        table.add_column("", no_wrap=True)
        for name in grid.columns:
            table.add_column(PROVIDERS[name].title.replace(" ", "\n", 1), justify="right", no_wrap=True)
        before = None
        for head, config, cells in grid.lines:
            if head != before:
                table.add_row(Text(head, style="bold"))
            before = head
            table.add_row(f" {config}", *cells)
        yield Text(grid.title, style="bold")
        yield table
    if results.fits:
        yield _fits(results)
    yield from remarks(results)


def _fits(results: Results) -> Table:
    title = "Largest batch whose training step fits in the memory (tensors, inputs included)"
    style = {"title_justify": "left", "title_style": "bold"}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, **style)
    table.add_column("")
    for name in ("memory", "provider", "batch", "MiB", "MiB of one more"):
        table.add_column(name, justify="right")
    for fit in results.fits:
        cells = mebibytes(fit["bytes"]), mebibytes(fit["more_bytes"])
        limit = f"{fit['limit_bytes'] / 2**30:g} GiB"
        table.add_row(fit["config"], limit, PROVIDERS[fit["provider"]].title, str(fit["batch"]), *cells)
    return table


def remarks(results: Results) -> Iterator[Text]:
    """One line for everything that has no time, equal reasons together."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in results.rows:
        if row.status != "measured":
            where = f"{row.config} {heading(results, row)}"
            reasons.setdefault((row.provider, row.status, row.note), []).append(where)
    for (provider, status, note), where in reasons.items():
        places = "" if status == "unavailable" else f" at {', '.join(where)}"
        style = "dim" if status == "unavailable" else "bold red"
        yield Text(f"{provider}: {status}{places}: {note}", style=style)


def live(results: Results, config: str) -> Table:
    """What is known of the config that is being measured."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(config, no_wrap=True)
    rows = [row for row in results.rows if row.config == config and row.times_ms]
    names = [name for name in PROVIDERS if any(row.provider == name for row in rows)]
    for name in names:
        table.add_column(PROVIDERS[name].title.replace(" ", "\n", 1), justify="right")
    for head in dict.fromkeys(heading(results, row) for row in rows):
        cells = {row.provider: milliseconds(row) for row in rows if heading(results, row) == head}
        table.add_row(head, *(cells.get(name, "") for name in names))
    return table


def line(results: Results, rows: list[Row]) -> str:
    """The rows of one config and mode in one line, for logs: times in milliseconds."""
    first = rows[0]
    times = ", ".join(f"{row.provider} {milliseconds(row)}" for row in rows if row.times_ms)
    return f"{first.config} {heading(results, first)}: {times}"


def threads_text(count: int) -> str:
    """Such as "2 threads"."""
    return f"{count} thread{'s' if count > 1 else ''}"


def marks(row: Row) -> str:
    """Of MARKS, those that belong before the row's time."""
    return (NOISY if row.summary.noisy else "") + (LEFT if row.fused is False else "")


def milliseconds(row: Row) -> str:
    """The median, marked where it is noisy and where nothing is fused."""
    return marks(row) + three_digits(row.median_ms) if row.times_ms else ""


def counted_milliseconds(row: Row, unit: str = "") -> str:
    """The median, with how many samples it is of where these are few."""
    few = row.times_ms and row.summary.few
    return milliseconds(row) + unit + (f" n={row.summary.count}" if few else "")


def mebibytes(count: int | None) -> str:
    """Empty for None."""
    return "" if count is None else three_digits(count / 2**20)


def three_digits(value: float) -> str:
    """At least three that count."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
