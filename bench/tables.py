"""The tables that `python -m attn_gate bench` prints, and the Markdown one for READMEs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import measure_renderables
from rich.table import Table
from rich.text import Text

from .providers import PROVIDERS
from .results import Results, Row

OURS = "attn_gate"
NOISY = "~"  # before a time whose samples are far apart
LEFT = "="  # before a time of attn_gate in which none of its operators ran
WRONG = "✗"  # in place of a time
MARKS = {
    NOISY: "quartiles, of fewer than 6 samples the extremes, more than a quarter of it apart",
    LEFT: "PyTorch's layers, which attn_gate leaves alone there",
    WRONG: "doesn't match float64, so has no time",
}
_IN_CELLS = {
    "±": "half of what lies between the quartiles, of fewer than 6 samples between the extremes",
    **MARKS,
    "of": "so few samples",
}

Cell = Callable[[Row], str]


@dataclass(frozen=True)
class Grid:
    """One table: a line per config, mode, dtype and number of threads, a column per provider.

    Attributes:
        title: what the numbers are.
        columns: names of providers.
        lines: (heading, name, cells); empty cells where nothing was measured.
        legend: what the marks in the cells mean.
    """

    title: str
    columns: list[str]
    lines: list[tuple[str, str, list[str]]]
    legend: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The title, and as many tables as it takes: each has the columns that the console has room for."""
        yield Text(self.title, style="bold")
        if self.legend:
            yield Text(self.legend, style="dim")
        first = 0
        while first < len(self.columns):
            table, last = self._table(first, first + 1), first + 1
            while last < len(self.columns):
                wider = self._table(first, last + 1)
                # Without a limit, to which rich would cut the measure.
                unlimited = options.update(max_width=10**4)
                if measure_renderables(console, unlimited, [wider]).maximum > options.max_width:
                    break
                table, last = wider, last + 1
            yield table
            first = last

    def _table(self, first: int, last: int) -> Table:
        """Some of the columns, and the lines that have cells in these."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        table.add_column("", no_wrap=True)
        for name in self.columns[first:last]:
            table.add_column(PROVIDERS[name].title.replace(" ", "\n", 1), justify="right", no_wrap=True)
        before = ""
        for head, name, cells in self.lines:
            if not any(cells[first:last]):
                continue
            if head != before:
                table.add_row(Text(head, style="bold"))
            before = head
            table.add_row(f" {name}", *cells[first:last])
        return table


def grids(results: Results) -> Iterator[Grid]:
    """All tables of measured numbers that are not empty."""

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
        if row.gbps is None or not copy or is_earlier(results, row):
            return ""
        return f"{100 * row.gbps / copy:.0f}%"

    def over_float32(row: Row) -> str:
        full = results.find(row.config, row.mode, row.provider, dtype="float32", threads=row.threads)
        if row.dtype == "float32" or full is None or not row.times_ms:
            return ""
        return f"{full.median_ms / row.median_ms:.2f}x"

    def over_one_thread(row: Row) -> str:
        one = results.find(row.config, row.mode, row.provider, dtype=row.dtype, threads=1)
        return f"{one.median_ms / row.median_ms:.2f}x" if one and row.times_ms and row.threads > 1 else ""

    whole = (
        (f"Milliseconds, median, {results.dtype}, {threads_text(results.threads)}", time_and_spread),
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
        if text := cell(row):
            cells.setdefault((heading(results, row), row.config), {})[row.provider] = text
    used = {name for line in cells.values() for name in line}
    columns = [name for name in PROVIDERS if name in used]
    order = {name: number for number, name in enumerate(results.configs)}
    headings = list(dict.fromkeys(head for head, _ in cells))
    keys = sorted(cells, key=lambda key: (headings.index(key[0]), order.get(key[1], 0)))
    lines = [(*key, [cells[key].get(name, "") for name in columns]) for key in keys]
    return Grid(title, columns, lines, legend(lines))


def legend(lines: Iterable[tuple[str, str, list[str]]]) -> str:
    """What the marks in these cells mean; empty where there are none."""
    text = "".join(cell for *_, cells in lines for cell in cells)
    return "; ".join(f"{mark}: {meaning}" for mark, meaning in _IN_CELLS.items() if mark in text)


def is_earlier(results: Results, row: Row) -> bool:
    """Whether `--add` took it over: what this run says of the machine needn't hold for it."""
    return "" < row.measured < results.started


def earlier_note(results: Results) -> str:
    """How many rows are from earlier runs, and what that means; empty without any."""
    rows = [row for row in results.rows if row.times_ms]
    when = sorted(row.measured[:16].replace("T", " ") for row in rows if is_earlier(results, row))
    if not when:
        return ""
    return (
        f"{len(when)} of {len(rows)} rows are from earlier runs "
        f"({' to '.join(dict.fromkeys((when[0], when[-1])))} UTC). "
        "Those have no share of the copy bandwidth and no place in the roofline: both roofs, and what else "
        "is said of the machine, are of this run."
    )


def heading(results: Results, row: Row) -> str:
    """Such as "step", "step, bfloat16" or "step, 1 thread"."""
    parts = [row.mode]
    if row.dtype != results.dtype:
        parts.append(row.dtype)
    if row.threads != results.threads:
        parts.append(threads_text(row.threads))
    return ", ".join(parts)


def rich_tables(results: Results) -> Iterator[RenderableType]:
    """Everything that was found, for the terminal."""
    if note := earlier_note(results):
        yield Text(note, style="yellow")
    yield from grids(results)
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


def live(results: Results, config: str) -> Grid:
    """What is known of the config that is being measured."""
    rows = [row for row in results.rows if row.config == config and row.times_ms]
    names = [name for name in PROVIDERS if any(row.provider == name for row in rows)]
    lines = []
    for head in dict.fromkeys(heading(results, row) for row in rows):
        cells = {row.provider: milliseconds(row) for row in rows if heading(results, row) == head}
        lines.append(("", head, [cells.get(name, "") for name in names]))
    return Grid(config, names, lines)


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


def time_and_spread(row: Row) -> str:
    """Such as "~3.21 ±14%", with how many samples it is of where these are few, or that it is wrong."""
    if row.status == "wrong":
        return WRONG
    if not row.times_ms:
        return ""
    s = row.summary
    parts = [milliseconds(row)]
    parts += [f"±{s.spread:.0%}"] if s.count > 1 else []
    parts += [f"of {s.count}"] if s.few else []
    return " ".join(parts)


def mebibytes(count: int | None) -> str:
    """Empty for None."""
    return "" if count is None else three_digits(count / 2**20)


def three_digits(value: float) -> str:
    """At least three that count."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
