"""`python -m attn_gate bench`: speed and memory of gates, attn_gate against what one would use instead."""

from __future__ import annotations

import argparse
import datetime
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

DESCRIPTION = """\
Measure the time and the memory of attention gates and of whole networks: attn_gate against the same in eager
PyTorch, torch.compile, ONNX Runtime and OpenVINO (where they are installed), and against the memory traffic
that no gate can avoid.

All take turns in one process, on the same numbers, with as many threads as PyTorch uses (OMP_NUM_THREADS sets
that). Who doesn't match the float64 reference gets no time. DIR gets results.json and results.csv (described
in docs/benchmark.md), report.html with plots, and table.md.
"""

EPILOG = """\
examples:
  python -m attn_gate bench --quick                               a first look, within a minute
  python -m attn_gate bench                                       everything: a quarter of an hour
  python -m attn_gate bench --config lee,monai-96 --mode step     one family and one more gate, training only
  python -m attn_gate bench --config net                          whole networks
  python -m attn_gate bench --provider attn_gate,eager --dtype bfloat16
  python -m attn_gate bench --out old                             before a change, and after it:
  python -m attn_gate bench --out new --baseline old

exit code: 0 all measured; 1 something was wrong or failed (but for what eager PyTorch has wrong in channels
last too), or slower than the baseline; 2 wrong arguments; 130 Ctrl-C (what was measured is kept)
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
        "--memory", type=_bytes, metavar="SIZE", default=2**30,
        help="the memory that the largest batch has to fit in, such as 512M (default: 1G)",
    )  # fmt: skip
    add("--out", type=Path, metavar="DIR", default=Path("report/bench"), help="(default: %(default)s)")
    add("--add", action="store_true", help="keep the rows that DIR has; those measured again are replaced")
    add(
        "--baseline", type=_results, metavar="FILE",
        help="results.json of an earlier run, or its folder: say what has become faster or slower",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; the exit code."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        where = device.make(args.device)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    groups = plan.quick() if args.quick else plan.full()
    wanted = plan.Wanted(args.config, args.provider, args.mode, args.dtype, args.threads)
    jobs = list(plan.jobs(groups, wanted, args.device))
    results = Results(
        started=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        machine=machine.facts(where),
        settings={"quick": args.quick, "memory": args.memory, "command": sys.argv[1:]},
    )
    if args.add and (args.out / "results.json").exists():
        earlier = read(args.out)
        results.configs, results.rows, results.fits = earlier.configs, earlier.rows, earlier.fits
    if results.machine["load"] > results.machine["cores"] / 2:
        load = f"load {results.machine['load']:.1f}"
        console.print(f"others are using this machine ({load}): times won't mean much", style="yellow")
    with Run(results, where, args.memory, args.out, console) as running:
        running.measure(jobs)
    if args.baseline is not None:
        results.compared = baseline.compare(results, args.baseline)
    for part in tables.rich_tables(results):
        console.print(part)
    for part in baseline.tables(results.compared):
        console.print(part)
    paths = outputs.write_all(results, args.out)
    console.print(f"{machine.sentence(results.machine)}. Written: {', '.join(map(str, paths))}",
                  highlight=False, style="dim", soft_wrap=True)  # fmt: skip
    if results.interrupted:
        console.print("interrupted: this is what was measured until then", style="yellow")
        return 130
    return int(bool(results.failures) or baseline.is_slower(results.compared))


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
    return counts


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([MG])(?:i?B)?", text.strip(), re.IGNORECASE)
    if not found or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"must be a size such as 512M or 1.5G; got {text!r}")
    return int(float(found[1]) * {"M": 2**20, "G": 2**30}[found[2].upper()])


def _results(text: str) -> Results:
    try:
        return read(Path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
