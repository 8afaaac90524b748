"""The tables that `python -m attn_gate bench` prints."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich import box
from rich.table import Table
from rich.text import Text

from .providers import PROVIDERS, Provider
from .results import Results, Row

OURS = "attn_gate"
NOISY = 0.25  # of the median, between the quartiles: above, a time gets a mark


def tables(results: Results, providers: Iterable[Provider]) -> list[Table | Text]:
    """Times, attn_gate's speed-ups and memory, as far as measured, and a remark for what wasn't."""
    measured = {row.provider for row in results.rows if row.times_ms}
    shown = [p for p in providers if p.name in measured]
    others = [p for p in shown if p.name != OURS]
    return [
        *_times(results, shown),
        *_speedups(results, others),
        *_kept(results, shown),
        *_peaks(results, shown),
        *remarks(results),
    ]


def remarks(results: Results) -> list[Text]:
    """One line for everything that has no time, equal reasons together."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in results.rows:
        if row.status != "measured":
            reasons.setdefault((row.provider, row.status, row.note), []).append(f"{row.config} {row.mode}")
    lines = []
    for (provider, status, note), where in reasons.items():
        places = "" if status == "unavailable" else f" at {', '.join(where)}"
        style = "dim" if status == "unavailable" else "bold red"
        lines.append(Text(f"{provider}: {status}{places}: {note}", style=style))
    return lines


def line(results: Results, config: str, mode: str) -> str:
    """One case in one line, for logs: times in milliseconds."""
    rows = [row for row in results.rows if (row.config, row.mode) == (config, mode) and row.times_ms]
    return f"{config} {mode}: " + ", ".join(f"{row.provider} {_milliseconds(row)}" for row in rows)


def _times(results: Results, shown: list[Provider]) -> list[Table | Text]:
    title = f"Milliseconds, median, {results.machine['threads']} threads"
    if any(_noisy(row) for row in results.rows if row.times_ms):
        title += f" (~ quartiles more than {NOISY:.0%} of it apart: a noisy machine)"
    return _by_provider(results, shown, title, _milliseconds)


def _speedups(results: Results, others: list[Provider]) -> list[Table | Text]:
    def cell(row: Row) -> str:
        speedup = results.speedup(row.config, row.mode, OURS, over=row.provider)
        if speedup is None:
            return ""
        # Nothing beats the limit: the other way round it reads better.
        return f"{1 / speedup:.2f} of it" if row.provider == "limit" else f"{speedup:.2f}x"

    title = "How many times faster attn_gate is than these, and its time relative to the memory limit"
    return _by_provider(results, others, title, cell)


def _kept(results: Results, shown: list[Provider]) -> list[Table | Text]:
    title = "MiB kept by autograd between forward and backward, beyond x, g and parameters"
    return _by_provider(results, shown, title, lambda row: _mebibytes(row.kept_bytes))


def _peaks(results: Results, shown: list[Provider]) -> list[Table | Text]:
    title = "MiB allocated at the peak of one call, its results included"
    return _by_provider(results, shown, title, lambda row: _mebibytes(row.peak_bytes))


def _by_provider(
    results: Results, shown: list[Provider], title: str, cell: Callable[[Row], str]
) -> list[Table | Text]:
    """Title and table: lines of mode and config, columns of providers; nothing where all would be empty."""
    lines = []
    for mode in dict.fromkeys(row.mode for row in results.rows):
        for config in results.configs:
            rows = [results.find(config.name, mode, provider.name) for provider in shown]
            lines.append((mode, config.name, ["" if row is None else cell(row) for row in rows]))
    lines = [line for line in lines if any(line[2])]
    columns = [i for i in range(len(shown)) if any(cells[i] for _, _, cells in lines)]
    if not columns:
        return []
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("", no_wrap=True)
    for i in columns:
        table.add_column(shown[i].title, justify="right", no_wrap=True)
    for before, (mode, config, cells) in zip((None, *lines), lines, strict=False):
        if before is None or before[0] != mode:
            table.add_row(Text(mode, style="bold"))
        table.add_row(f" {config}", *(cells[i] for i in columns))
    return [Text(title, style="bold"), table]


def _noisy(row: Row) -> bool:
    q1, q3 = row.quartiles_ms
    return q3 - q1 > NOISY * row.median_ms


def _milliseconds(row: Row) -> str:
    return ("~" if _noisy(row) else "") + _three_digits(row.median_ms)


def _mebibytes(count: int | None) -> str:
    return "" if count is None else _three_digits(count / 2**20)


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def provider_names() -> str:
    """For help texts."""
    return ", ".join(PROVIDERS)
