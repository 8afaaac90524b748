"""Compiles the CUDA kernels for the host, and the test extension around them: needs g++, CUDA headers."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11
import torch
from filelock import FileLock

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

# For each kind of build: what is compiled how.
FLAGS = {
    "plain": ["-O2"],
    "sanitized": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "races": ["-O1", "-g", "-fsanitize=thread", "-DON_HOST_RACES"],
    "trace": ["-O1", "-g", "-fsanitize=thread", "-DON_HOST_TRACE"],
}


@functools.cache
def cuda_headers() -> Path | None:
    """The include folder of a CUDA toolkit; any from 11.8 on."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc:
        homes.append(str(Path(nvcc).resolve().parent.parent))
    homes += map(str, sorted(Path("/usr/local").glob("cuda-*"), reverse=True))
    folders = [Path(home) / "include" for home in homes if home]
    # NVIDIA's header wheels, which a CUDA build of torch brings along
    site = Path(sysconfig.get_path("purelib")) / "nvidia"
    folders += [site / "cuda_runtime" / "include", *sorted(site.glob("cu*/include"), reverse=True)]
    needed = ("cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h", "crt/host_defines.h")
    return next((f for f in folders if all((f / name).exists() for name in needed)), None)


def why_not() -> str:
    """Why the kernels can't be compiled for the host here; empty where they can."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    if platform.machine() != "x86_64" or sys.platform != "linux":
        return "CUDA kernels run on the host on x86-64 Linux only"
    if cuda_headers() is None:
        return "no CUDA headers were found (a CUDA toolkit; CUDA_HOME names it)"
    return ""


def build(kind: str = "plain", csrc: Path = ROOT / "csrc") -> Path:
    """The extension's file, compiled where it isn't yet: the folder's name says what it was compiled from."""
    sources = sorted(
        p for p in [*csrc.rglob("*"), *HERE.iterdir()] if p.suffix in (".cu", ".cuh", ".cpp", ".h")
    )
    sources = [p for p in sources if "cpu" not in p.parts]
    said = [kind, *FLAGS[kind], torch.__version__, sys.version, str(cuda_headers())]
    digest = hashlib.sha256("\0".join(said + [p.read_text() for p in sources]).encode()).hexdigest()[:12]
    name = f"attn_gate_on_host_{kind}"
    folder = ROOT / "build" / "cuda_on_host" / digest
    library = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # two processes of pytest want it at once
        if not library.exists():
            _compile(library, kind, csrc)
    return library


def _compile(library: Path, kind: str, csrc: Path) -> None:
    folder, name = library.parent, library.name.split(".")[0]
    torch_home = Path(torch.__file__).parent
    includes = [csrc, HERE, pybind11.get_include(), sysconfig.get_path("include")]
    system = [cuda_headers(), torch_home / "include"]
    common = [
        *("g++", "-std=c++17", "-fPIC", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
        *(
            "-DATTN_GATE_CUDA_ON_HOST",
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
            f"-DON_HOST_MODULE={name}",
        ),
        *(f"-I{path}" for path in includes),
        *(part for path in system for part in ("-isystem", str(path))),
    ]
    units = [csrc / "cuda" / "forward.cu", csrc / "cuda" / "backward.cu", csrc / "cuda" / "ops.cpp"]
    units += [HERE / "cuda_on_host.cpp", HERE / "module.cpp"] + (
        [HERE / "trace.cpp"] if kind == "trace" else []
    )
    objects, running = [], []
    for unit in units:
        # Only the kernels are checked: what runs them knows what it does.
        flags = FLAGS[kind] if unit.suffix == ".cu" or kind == "plain" else _unchecked(kind)
        objects.append(folder / f"{unit.stem}.o")
        command = [*common, *flags, "-x", "c++", "-c", str(unit), "-o", str(objects[-1])]
        running.append((command, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
        if len(running) == 2:
            _finish(running)
    _finish(running)
    scratch = folder / f"{os.getpid()}.so"
    link = ["g++", "-shared", *map(str, objects), f"-L{torch_home / 'lib'}", "-ltorch_cpu", "-ldl"]
    # The trace takes the place of ThreadSanitizer's runtime.
    link += [flag for flag in FLAGS[kind] if flag.startswith("-fsanitize") and kind != "trace"]
    running = [(link, subprocess.Popen([*link, "-o", str(scratch)], stderr=subprocess.PIPE, text=True))]
    _finish(running)
    scratch.rename(library)
    for path in objects:
        path.unlink()


def _unchecked(kind: str) -> list[str]:
    """Flags without the instrumentation, but with what the machinery must know of it."""
    flags = [flag for flag in FLAGS[kind] if not flag.startswith(("-fsanitize", "-fno-sanitize"))]
    return [*flags, "-D__SANITIZE_ADDRESS__"] if kind == "sanitized" else flags


def _finish(running: list) -> None:
    failed = ""
    for command, process in running:
        _, messages = process.communicate()
        if process.returncode:
            failed += f"{' '.join(map(str, command))}\n{messages}"
    running.clear()
    if failed:
        raise RuntimeError(f"the CUDA kernels do not compile for the host:\n{failed}")


@functools.cache
def load(kind: str = "plain", csrc: Path = ROOT / "csrc") -> ModuleType:
    """The extension, compiled and imported."""
    path = build(kind, csrc)
    spec = importlib.util.spec_from_file_location(f"attn_gate_on_host_{kind}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
