"""`python -m attn_gate info`: what this installation is and what it can use here."""

import argparse
import importlib.metadata
import platform

import torch

from . import _library, backends
from ._version import __version__

DESCRIPTION = """\
Print the versions, what was built, and for each backend whether it can be used on this machine, or the reason
why not. Paste it into bug reports.
"""

EPILOG = """\
examples:
  python -m attn_gate info
  ATEN_CPU_CAPABILITY=avx2 python -m attn_gate info    the CPU kernels of an older instruction set
  ATTN_GATE_CUDA=OFF pip install attn_gate             an installation without CUDA kernels
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command; it takes no arguments."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG


def run(args: argparse.Namespace) -> int:
    """Print the report; return 0."""
    print_report(versions(), backends.report())
    return 0


def versions() -> dict[str, str]:
    """Return what is installed, what was built and what runs it, in the order in which `info` prints it."""
    built = _library.build_info()
    return {
        "attn_gate": __version__,
        "Python": platform.python_version(),
        "torch": f"{torch.__version__} ({_torch_device_support()})",
        "triton": _installed_version("triton"),
        "platform": platform.platform(),
        "CPU kernels": f"{_library.cpu_isa()} instructions, {torch.get_num_threads()} threads",
        "CUDA kernels": _cuda_kernels(built),
        "GPUs": _gpus(),
        "built with": f"torch {built['torch']}, {built['compiler']}",
    }


def print_report(facts: dict[str, str], backend_rows: list[tuple[str, bool, str]]) -> None:
    """Print both tables; with colours where rich is installed."""
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ModuleNotFoundError:
        _print_plain(facts, backend_rows)
        return
    about = Table(show_header=False, box=None)
    for name, value in facts.items():
        about.add_row(f"[bold]{name}", escape(value))
    table = Table("backend", "usable", "")
    for name, usable, reason in backend_rows:
        table.add_row(name, "[green]yes" if usable else "[red]no", escape(reason))
    console = Console()
    console.print(about)
    console.print(table)


def _print_plain(facts: dict[str, str], backend_rows: list[tuple[str, bool, str]]) -> None:
    for name, value in facts.items():
        print(f"{name:<14}{value}")
    print()
    for name, usable, reason in backend_rows:
        print(f"{name:<14}{'usable' if usable else 'not usable'}{': ' + reason if reason else ''}")


def _cuda_kernels(built: dict[str, str]) -> str:
    if built["why_no_cuda"]:
        return f"not built: {built['why_no_cuda']}"
    return f"for compute capability {built['cuda_architectures']}, by nvcc {built['nvcc']}"


def _torch_device_support() -> str:
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return "CPU build"


def _gpus() -> str:
    names = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        names.append(f"{torch.cuda.get_device_name(index)} (compute capability {major}.{minor})")
    return ", ".join(names) or "none"


def _installed_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
