"""`python -m attn_gate demo`: trains a small Attention U-Net on real CT, eager and fused, and reports."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from attn_gate.demo import dicom, synthetic
from attn_gate.demo.errors import DemoError
from attn_gate.demo.experiments import Demo
from attn_gate.demo.fetch import SCANS, NotFetched, cache_dir, fetch_wheel

DESCRIPTION = """\
Train a small Attention U-Net on lung CT of four patients, once with eager PyTorch gates and once with
fused ones, and write a report: what the gates learn to look at, whether both compute the same, what each
costs.

The CT scans (26 MB) are fetched once, with pip, and kept in your cache folder; without network the demo says
so and draws synthetic images instead. Takes about five minutes on two cores, with --fast less than one.
"""

EPILOG = """\
examples:
  python -m attn_gate demo                    all four patients; the report is report/report.html
  python -m attn_gate demo --fast             one patient, few steps: does it run here?
  python -m attn_gate demo --synthetic        no download: images drawn by a program
  python -m attn_gate demo --steps 500        longer training, better contours

exit code: 0 finished; 1 something went wrong, which one line says; 130 stopped by Ctrl-C (the report then
shows what was finished)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.add_argument(
        "--out", type=Path, default=Path("report"), metavar="DIR", help="for the report (default: report/)"
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help=f"where the CT scans are kept or put (default: {cache_dir()})",
    )
    parser.add_argument("--synthetic", action="store_true", help="synthetic images; nothing is fetched")
    parser.add_argument("--fast", action="store_true", help="one patient and few steps, under a minute")
    parser.add_argument(
        "--steps",
        type=_positive,
        metavar="N",
        help="training steps of each run (default: by this machine's speed)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo; the exit code."""
    console = Console()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        scans, source, is_synthetic = _images(args, console)
        demo = Demo(scans, source, is_synthetic, args.out, console, steps=args.steps, fast=args.fast)
        return demo.run()
    except DemoError as error:
        print(f"attn_gate demo: {error}", file=sys.stderr)
    except OSError as error:
        print(f"attn_gate demo: {error.strerror or error}: {error.filename or args.out}", file=sys.stderr)
    return 1


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"takes a whole number of at least 1; got {text!r}")
    return int(text)


def _images(args: argparse.Namespace, console: Console) -> tuple[list[dicom.Scan], str, bool]:
    """Scans, what must be said wherever they are shown, and whether they are synthetic."""
    count = 1 if args.fast else 4
    if not args.synthetic:
        try:
            with console.status("fetching the CT scans (26 MB, once)"):
                wheel = fetch_wheel(args.data)
            source = f"{dicom.SOURCE}, {dicom.LICENCE}; resampled to 2 mm"
            console.print(f"[dim]{source}", highlight=False)
            return dicom.read_scans(wheel, count), source, False
        except NotFetched as error:
            console.print(
                f"[yellow]The CT scans could not be fetched[/]: {error}\n"
                "Going on with [bold]synthetic[/] images, labelled as such. For the CT scans, run again with "
                f"network, or put {SCANS.name} into the folder that --data names.",
                highlight=False,
            )
    console.print(f"[dim]{synthetic.SOURCE}", highlight=False)
    return synthetic.synthetic_scans(count), synthetic.SOURCE, True
