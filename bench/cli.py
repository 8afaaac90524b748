"""`python -m attn_gate bench`: speed and memory of gates, attn_gate against what one would use instead."""

from __future__ import annotations

import argparse
import datetime
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from . import baseline, device, machine, outputs, plan, tables
from .providers import PROVIDERS
from .registry import CONFIGS, DTYPES, MODES, select
from .results import Results, read
from .run import Run

T = TypeVar("T")

LOG_WIDTH = 200  # room for the widest table, all providers in it
_THREADS_A_CORE = 16
_MEMORY = 2**30
# Facts of the machine that rows of one file have in common.
_TO_ADD = ("device", "processor", "gpu", "cores", "torch", "attn_gate")

DESCRIPTION = """\
Measure the time and the memory of attention gates and of whole networks: attn_gate against the same in eager
PyTorch, torch.compile, ONNX Runtime and OpenVINO (where they are installed), and against the memory traffic
that no gate can avoid. The first run on a machine takes up to 10 minutes longer than later ones, which find
torch.compile's compilations in its cache.

All take turns in one process, on the same numbers, with as many threads as PyTorch uses (OMP_NUM_THREADS sets
that). Who doesn't match the float64 reference gets no time. DIR gets results.json and results.csv (described
in docs/benchmark.md), report.html with plots, and table.md.
"""

EPILOG = """\
examples:
  python -m attn_gate bench --quick                               a first look, within a minute
  python -m attn_gate bench                                       everything: 8 to 15 minutes on two cores
  python -m attn_gate bench --config lee,monai-96 --mode step     one family and one more gate, training only
  python -m attn_gate bench --config net                          whole networks
  python -m attn_gate bench --provider attn_gate,eager --dtype bfloat16
  python -m attn_gate bench --out old                             before a change, and after it:
  python -m attn_gate bench --out new --baseline old

exit code: 0 all measured; 1 something was wrong or failed (but for what eager PyTorch has wrong in channels
last too), or slower than the baseline, or nothing could be measured; 2 wrong arguments; 130 Ctrl-C (what was
measured is kept)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--quick", action="store_true", help="few gates, few repeats, nothing that compiles: within a minute")
    add(
        "--config", type=_names("config", CONFIGS), metavar="NAMES",
        help=f"gates and networks by name or family, separated by commas: {', '.join(CONFIGS)}",
    )  # fmt: skip
    add("--provider", type=_names("provider", PROVIDERS), metavar="NAMES", help=", ".join(PROVIDERS))
    modes = "; ".join(f"{name}: {what}" for name, what in MODES.items())
    add("--mode", type=_names("mode", MODES), metavar="NAMES", help=modes)
    dtypes = dict.fromkeys(DTYPES)
    add("--dtype", type=_names("dtype", dtypes), metavar="NAMES", help=", ".join(DTYPES))
    add("--device", type=_device, metavar="NAME", default="cpu", help="cpu (the default) or cuda")
    add("--threads", type=_counts, metavar="COUNTS", help="such as 1,2,4 (default: as many as PyTorch uses)")
    add(
        "--memory", type=_bytes, metavar="SIZE",
        help="the memory that the largest batch has to fit in, such as 512M (1G; not with --quick)",
    )  # fmt: skip
    add(
        "--out", type=Path, metavar="DIR", default=Path("report/bench"),
        help="(default: %(default)s); its results.json of a run before stays, under the name of its date",
    )  # fmt: skip
    add("--add", action="store_true", help="keep the rows that DIR has; those measured again are replaced")
    add(
        "--baseline", type=_results, metavar="FILE",
        help="results.json of an earlier run, or its folder: say what has become faster or slower",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; the exit code."""
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    results = Results(
        started=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        machine={},
        settings={"quick": args.quick, "memory": args.memory or _MEMORY, "command": sys.argv[1:]},
    )
    try:
        where = device.make(args.device)
        jobs = _jobs(args)
        if args.baseline is not None:
            baseline.refuse_other_device(args.device, args.baseline)
        results.machine = machine.facts(where)
        outputs.make_folder(args.out)
        _add_to_or_set_aside(results, args)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    results.machine.update(machine.rates(where))
    if results.machine["load"] > results.machine["cores"] / 2:
        load = f"load {results.machine['load']:.1f}"
        console.print(f"others are using this machine ({load}): times won't mean much", style="yellow")
    try:
        with Run(results, where, args.memory or _MEMORY, args.out, console) as running:
            running.measure(jobs)
    finally:  # after an error too: what was measured until then
        if args.baseline is not None:
            results.compared = baseline.compare(results, args.baseline)
        _write_and_show(results, args.out, console)
    if results.interrupted:
        console.print("interrupted: this is what was measured until then", style="yellow")
        return 130
    if not any(row.times_ms and row.measured >= results.started for row in results.rows):
        console.print("nothing could be measured", style="yellow")
        return 1
    return int(bool(results.failures) or baseline.is_slower(results.compared))


def _jobs(args: argparse.Namespace) -> list[plan.Job]:
    """What the arguments ask for.

    Raises:
        ValueError: there is nothing of it to measure.
    """
    if args.quick and args.memory is not None:
        raise ValueError("--memory: a quick run looks for no largest batch; leave --quick or --memory out")
    groups = plan.quick() if args.quick else plan.full()
    wanted = plan.Wanted(args.config, args.provider, args.mode, args.dtype, args.threads)
    jobs = list(plan.jobs(groups, wanted, args.device))
    if not jobs:
        raise ValueError(plan.why_nothing(wanted))
    return jobs


def _add_to_or_set_aside(results: Results, args: argparse.Namespace) -> None:
    """With --add take over what the folder has; without, keep it under another name.

    Raises:
        ValueError: --add, and what the folder has can't be read, or is from elsewhere.
    """
    if not args.add:
        outputs.set_aside(args.out)
    elif (args.out / "results.json").exists():
        try:
            earlier = read(args.out)
        except ValueError as error:
            raise ValueError(f"--add: {error}; leave --add out, or take another --out") from None
        if other := machine.differences(results.machine, earlier.machine, _TO_ADD):
            said = "; ".join(f"{name} {before} there, {now} here" for name, (before, now) in other.items())
            raise ValueError(
                f"--add: {args.out} has results of another machine or version ({said}); leave --add out, or "
                f"take another --out"
            )
        results.configs, results.rows, results.fits = earlier.configs, earlier.rows, earlier.fits


def _write_and_show(results: Results, folder: Path, console: Console) -> None:
    try:
        paths = outputs.write_all(results, folder)
    except KeyboardInterrupt:
        console.print(f"no report: interrupted; {folder / 'results.json'} has all", style="yellow")
        raise
    for part in tables.rich_tables(results):
        console.print(part)
    for part in baseline.tables(results.compared):
        console.print(part)
    console.print(f"{machine.sentence(results.machine)}. Written: {', '.join(map(str, paths))}",
                  highlight=False, style="dim", soft_wrap=True)  # fmt: skip


def _names(what: str, available: Mapping[str, T]):
    """An argparse type: comma-separated names to a list of those of `available`."""

    def parse(text: str) -> list[str]:
        try:
            return list(select(what, [name.strip() for name in text.split(",")], available))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def _device(text: str) -> str:
    (name,) = _names("device", device.DEVICES)(text)
    return name


def _counts(text: str) -> list[int]:
    counts = [int(part) if part.strip().isdigit() else 0 for part in text.split(",")]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"must be whole numbers of at least 1, such as 1,2; got {text!r}")
    most = _THREADS_A_CORE * (os.cpu_count() or 1)
    if max(counts) > most:
        raise argparse.ArgumentTypeError(f"must be at most {most}, {_THREADS_A_CORE} a core; got {text!r}")
    return counts


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([MG])(?:i?B)?", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * {"M": 2**20, "G": 2**30}[found[2].upper()]) if found else 0
    if size < 2**20:
        raise argparse.ArgumentTypeError(f"must be a size of 1M at least, such as 512M or 1.5G; got {text!r}")
    return size


def _results(text: str) -> Results:
    try:
        return read(Path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
