"""`python -m attn_gate bench`: speed and memory of gates, attn_gate against what one would use instead."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from attn_gate import _library, _version

from . import report
from .case import Case
from .measure import measure_case
from .providers import PROVIDERS, Provider
from .registry import CONFIGS, MODES, select
from .results import Results

T = TypeVar("T")

REPEATS = 21
QUICK_REPEATS = 5
PACKAGES = ("onnxruntime", "openvino")

DESCRIPTION = """\
Measure the time and the memory of attention gates: attn_gate against the same gate in eager PyTorch,
torch.compile, ONNX Runtime and OpenVINO (where they are installed), and against the memory traffic that no
gate can avoid.

All take turns in one process, on the same numbers, in float32, with as many threads as PyTorch uses
(OMP_NUM_THREADS sets that). Who doesn't match the float64 reference gets no time. torch.compile compiles C++
the first time, seconds per gate, and remembers it.
"""

EPILOG = """\
examples:
  python -m attn_gate bench --quick                               all gates, few repeats: about a minute
  python -m attn_gate bench                                       the same with more repeats
  python -m attn_gate bench --config same,paper-256 --mode step   one family and one more gate, training only
  python -m attn_gate bench --provider attn_gate,eager            only these two
  python -m attn_gate bench --out before                          results.json and results.csv go there

exit code: 0 all measured; 1 something was wrong or failed; 2 wrong arguments; 130 Ctrl-C (what was
measured is kept)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_REPEATS} repeats in place of {REPEATS}")
    configs = ", ".join(CONFIGS)
    parser.add_argument(
        "--config", type=_names("config", CONFIGS), metavar="NAMES", default=CONFIGS,
        help=f"gates by name or family, separated by commas: {configs}",
    )  # fmt: skip
    default = {name: provider for name, provider in PROVIDERS.items() if provider.default}
    parser.add_argument(
        "--provider", type=_names("provider", PROVIDERS), metavar="NAMES", default=default,
        help=f"{report.provider_names()}",
    )  # fmt: skip
    modes = "; ".join(f"{name}: {what}" for name, what in MODES.items())
    parser.add_argument("--mode", type=_names("mode", MODES), metavar="NAMES", default=MODES, help=modes)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("report/bench"),
        help="for results.json and results.csv (%(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; the exit code."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    repeats = QUICK_REPEATS if args.quick else REPEATS
    results = Results(
        started=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        machine=machine(),
        settings={"quick": args.quick, "repeats": repeats},
        configs=list(args.config.values()),
    )
    load = results.machine["load"]
    if load > results.machine["cores"] / 2:
        console.print(
            f"others are using this machine (load {load:.1f}): times won't mean much", style="yellow"
        )
    try:
        measure_all(results, list(args.provider.values()), list(args.mode), repeats, args.out, console)
    except KeyboardInterrupt:
        results.interrupted = True
        results.write(args.out)
    for part in report.tables(results, args.provider.values()):
        console.print(part)
    facts = results.machine
    console.print(
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, {facts['instructions']}; "
        f"torch {facts['torch']}. Times of every repeat: {args.out / 'results.json'}",
        highlight=False, style="dim",
    )  # fmt: skip
    if results.interrupted:
        console.print("interrupted: this is what was measured until then", style="yellow")
        return 130
    return int(any(row.status in ("wrong", "failed") for row in results.rows))


def measure_all(
    results: Results,
    providers: Sequence[Provider],
    modes: Sequence[str],
    repeats: int,
    folder: Path,
    console: Console,
) -> None:
    """Add the rows of all configs to `results`, written to `folder` after each mode."""
    total = sum(repeats + sum(mode in provider.modes for provider in providers) for mode in modes) * len(
        results.configs
    )
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        for config in results.configs:
            progress.update(task, description=f"{config.name}: inputs")
            case = Case(config)
            for mode in modes:

                def advance(what: str, where: str = f"{config.name} {mode}") -> None:
                    progress.update(task, advance=1, description=f"{where}: {what}")

                progress.update(task, description=f"{config.name} {mode}: reference")
                measure_case(case, mode, providers, repeats, results.rows, advance)
                results.write(folder)
                if not console.is_terminal:
                    console.print(report.line(results, config.name, mode), soft_wrap=True, highlight=False)
            # Else its graphs, one for each gate, would hit the limit of recompilations.
            torch.compiler.reset()


def machine() -> dict[str, str | int | float]:
    """What the times depend on."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "attn_gate": _version.__version__,
    }
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "instructions": _library.cpu_isa(),
        "platform": platform.platform(),
        **versions,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [text.partition(":")[2].strip() for text in lines if text.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _names(what: str, available: Mapping[str, T]):
    """An argparse type: comma-separated names to those entries."""

    def parse(text: str) -> dict[str, T]:
        try:
            return select(what, [name.strip() for name in text.split(",")], available)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse
