"""`python -m attn_gate COMMAND`: finds the command's module and runs it.

A command is a module with `add_arguments(parser)`, which also sets the parser's description and epilog, and
`run(args) -> int`, which returns the exit code. Only the module of the chosen command is imported, so that
`info` works where the extras of `demo` aren't installed.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from ._version import __version__


class Command(NamedTuple):
    module: str
    extra: str | None  # the extra of pyproject.toml that installs what it needs
    help: str


COMMANDS = {
    "info": Command("attn_gate.info", None, "versions, backends, and for each that can't be used the reason"),
    "verify": Command("attn_gate.verify", None, "compare every gate and backend with the float64 reference"),
    "bench": Command("attn_gate.bench.cli", "bench", "speed and memory against eager and torch.compile"),
    "demo": Command("attn_gate.demo.cli", "demo", "train an Attention U-Net on CT images, eager and fused"),
}

# What the extras install, by the name that is imported.
EXTRA_MODULES = {"matplotlib", "numpy", "onnx", "onnxruntime", "onnxscript", "pydicom", "rich"}

EPILOG = """\
examples:
  python -m attn_gate info             which backends can this machine use, and why not the others?
  python -m attn_gate verify           are they right, here?
  python -m attn_gate bench --quick    are they fast, here?
  python -m attn_gate demo             what does a gate learn to look at?
  python -m attn_gate demo --help      all about one command
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (`sys.argv[1:]` by default) and return the exit code: 0 good, 1 the command
    found something wrong, 2 it could not run (wrong arguments, a missing extra), 130 interrupted."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser, subparsers = _parsers()
    name = argv[0] if argv else None
    if name not in COMMANDS:
        parser.parse_args(argv)  # answers --help and --version, and leaves on anything unknown
        parser.print_help()
        return 2
    command = COMMANDS[name]
    try:
        module = importlib.import_module(command.module)
        module.add_arguments(subparsers[name])
        return module.run(parser.parse_args(argv))
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if command.extra is None or missing not in EXTRA_MODULES:
            raise
        print(
            f"attn_gate {name} needs {missing}, which is not installed: "
            f'pip install "attn_gate[{command.extra}]"',
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Make the parser and, by command, its sub-parsers, which have no arguments yet."""
    parser = argparse.ArgumentParser(
        prog="python -m attn_gate",
        description="Fused attention gates for PyTorch.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"attn_gate {__version__}")
    group = parser.add_subparsers(title="commands", metavar="COMMAND")
    subparsers = {
        name: group.add_parser(name, help=command.help, formatter_class=argparse.RawDescriptionHelpFormatter)
        for name, command in COMMANDS.items()
    }
    return parser, subparsers
