"""The table of what every Triton kernel takes of each GPU, with every choice of block sizes.

From a checkout, for the table isn't installed:

    python -m attn_gate.bench.triton_resources            compile all, compare with the table
    python -m attn_gate.bench.triton_resources --write    compile what the table lacks, rewrite it

A row has the name of its launch (`triton_offline`), which tells whether it is of the kernels as they are:
what a change makes of them has other names.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import sys
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from .triton_offline import TARGETS, each_launch, measure
from .triton_settings import Combination, combinations

TABLE = Path(__file__).with_name("triton_resources.csv")
# A target, and the name of a launch: what is compiled once.
Key = tuple[str, str]


@dataclass(frozen=True, order=True)
class Launch:
    """One launch for one target.

    Attributes:
        target, operator, gate, dtype, layout, kernel: which.
        choice: of the list of block sizes in triton_kernels/launch.py; 0 is also what no list serves.
        name: of the code that it compiles to.
    """

    target: str
    operator: str
    gate: str
    dtype: str
    layout: str
    kernel: str
    choice: int
    name: str

    @property
    def key(self) -> Key:
        return self.target, self.name


@dataclass(frozen=True, order=True)
class Resources(Launch):
    """What it takes.

    Attributes:
        warps: of a program; registers: of a thread; spills: bytes of stack of a thread; shared: bytes.
    """

    warps: int
    registers: int
    spills: int
    shared: int


def title(target: tuple) -> str:
    """A target in the table."""
    return f"{target[0]} {target[1]}"


def launches(target: tuple, made: Combination) -> set[Launch]:
    """All of this combination, not compiled."""
    found = set()

    def report(operator: str, kernel: str, choice: int, name: str, _: Any) -> None:
        dtype = str(made.dtype).removeprefix("torch.")
        found.add(
            Launch(title(target), operator, made.setting.name, dtype, made.layout, kernel, choice, name)
        )

    each_launch(target, made, report)
    return found


def compiled(target: tuple, made: Combination, names: Iterable[str]) -> dict[Key, tuple[int, int, int, int]]:
    """What the launches of these names take."""
    found, wanted = {}, set(names)

    def report(operator: str, kernel: str, choice: int, name: str, compile: Any) -> None:
        if name in wanted:
            wanted.remove(name)
            found[title(target), name] = measure(compile())

    each_launch(target, made, report)
    return found


def read_table() -> list[Resources]:
    """What is recorded."""
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    numbers = ("choice", "warps", "registers", "spills", "shared")
    return [Resources(**{k: int(v) if k in numbers else v for k, v in row.items()}) for row in rows]


def write_table(rows: Iterable[Resources]) -> None:
    """Replace what is recorded."""
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Resources))
        writer.writerows(astuple(row) for row in sorted(rows))


def shares(wanted: Iterable[tuple], known: Iterable[Key] = ()) -> Iterator[tuple]:
    """(target, combination, names to compile) for all launches of the targets, each name once."""
    seen = set(known)
    for target in wanted:
        for made in combinations():
            names = {launch.name for launch in launches(target, made) if launch.key not in seen}
            seen.update((title(target), name) for name in names)
            if names:
                yield target, made, names


def _work(share: tuple) -> dict[Key, tuple[int, int, int, int]]:
    torch.set_num_threads(1)
    return compiled(*share)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="compile what the table lacks and rewrite it")
    parser.add_argument("--target", nargs="+", help="only these, such as 'cuda 90'")
    parser.add_argument("--processes", type=int, default=2, help="that compile at a time (2)")
    args = parser.parse_args()
    titles = [title(target) for target in TARGETS]
    if unknown := set(args.target or ()) - set(titles):
        parser.error(f"--target must be among {titles}; got {sorted(unknown)}")
    wanted = [target for target in TARGETS if title(target) in (args.target or titles)]
    recorded = read_table() if TABLE.exists() else []
    console = Console(stderr=True)
    measured = {row.key: (row.warps, row.registers, row.spills, row.shared) for row in recorded}
    work = list(shares(wanted, measured if args.write else ()))
    found = dict(measured) if args.write else {}
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for part in track(pool.imap_unordered(_work, work), "compiling", len(work), console=console):
            found.update(part)
    rows = {
        Resources(*astuple(launch), *found[launch.key])
        for target in wanted
        for made in combinations()
        for launch in launches(target, made)
    }
    for row in sorted(rows):
        if row.spills:
            print(f"SPILLS: {row}")
    others = {row for row in recorded if row.target not in map(title, wanted)}
    if args.write:
        write_table(rows | others)
        return 0
    differing = rows.symmetric_difference(set(recorded) - others)
    for row in sorted(differing):
        print(f"{'only compiled' if row in rows else 'only recorded'}: {row}")
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
