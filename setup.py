"""Drives CMake and packs what it builds. Metadata is in pyproject.toml, the sources are in CMakeLists.txt.

Never imports torch: `pip install .` builds in an isolated environment where `import torch` fails, although
the user's own torch is only a folder away. Its headers and one library are all we need, so we look for that
folder.
"""

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from hashlib import sha256
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
BUILT_FILES = ("_C.abi3.so", "_C_cuda.abi3.so", "_build_info.json")

# Top-level folders of the repository that are installed inside attn_gate: as a top-level package
# `triton_kernels` would clash with Triton's own of that name, `bench` with everybody's.
MAPPED = {"attn_gate.triton_kernels": "triton_kernels", "attn_gate.bench": "bench"}


def find_torch() -> Path | None:
    """Return the folder of the installed torch package, also from inside pip's isolated build environment.

    There `find_spec` sees only the build requirements, but sysconfig still names the user's own
    site-packages, because the interpreter is the same.
    """
    candidates = []
    if os.environ.get("ATTN_GATE_TORCH_DIR"):
        candidates.append(Path(os.environ["ATTN_GATE_TORCH_DIR"]))
    spec = importlib.util.find_spec("torch")
    if spec and spec.submodule_search_locations:
        candidates.append(Path(spec.submodule_search_locations[0]))
    candidates += [Path(sysconfig.get_path(scheme)) / "torch" for scheme in ("platlib", "purelib")]
    return next((folder for folder in candidates if (folder / "version.py").is_file()), None)


def runs(program: str) -> bool:
    """Tell whether `program --version` works.

    Being on the PATH is not enough: a script of another environment can lie there and fail inside pip's
    isolated one.
    """
    try:
        return subprocess.run([program, "--version"], capture_output=True).returncode == 0
    except OSError:
        return False


class CMakeBuild(build_ext):
    """`build_ext` that lets CMake build, then puts the libraries where they belong."""

    def run(self):
        build_dir = self.build_with_cmake()
        in_place = self.inplace or self.editable_mode  # `pip install -e .`: beside the package's Python files
        target = HERE / "attn_gate" if in_place else Path(self.build_lib) / "attn_gate"
        target.mkdir(parents=True, exist_ok=True)
        for name in BUILT_FILES:
            # Remove first: a process that has the old library mapped keeps its copy intact, and a library
            # that this build doesn't make (CUDA switched off since) must not stay behind.
            (target / name).unlink(missing_ok=True)
            if (build_dir / name).exists():
                shutil.copy2(build_dir / name, target / name)

    def build_with_cmake(self) -> Path:
        """Configure and build; return the build folder, kept to make the next install incremental."""
        torch_dir = find_torch()
        if torch_dir is None:
            raise SystemExit(
                f"attn_gate: no torch found in {sysconfig.get_path('platlib')}: run `pip install torch` "
                "(2.10 or newer) first, then install attn_gate again"
            )
        cuda = os.environ.get("ATTN_GATE_CUDA", "AUTO")
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
        tag = sha256(f"{torch_dir} {cuda} {archs}".encode()).hexdigest()[:8]
        build_dir = HERE / "build" / f"cmake-{tag}"
        configure = [
            *("cmake", "-S", str(HERE), "-B", str(build_dir)),
            *(f"-DATTN_GATE_TORCH_DIR={torch_dir}", f"-DATTN_GATE_CUDA={cuda}"),
            # Said anew each time: the ninja of the last build may have gone with its temporary environment.
            *("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}"),
        ]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build_dir), "-j", jobs], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"attn_gate: the build failed, see the messages above ({error})") from None
        return build_dir

    # setuptools asks these to copy or list the outputs of compilers that it ran itself; run() has done it.
    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


class AnyPythonWheel(bdist_wheel):
    """Tags the wheel py3-none-PLATFORM: the libraries link against no Python."""

    def run(self):
        # setuptools never empties this folder: a module deleted since the last build would be packed too.
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


def packages() -> list[str]:
    found = find_packages(include=["attn_gate", "attn_gate.*"])
    for name, folder in MAPPED.items():
        found += [name, *(f"{name}.{sub}" for sub in find_packages(folder))]
    return found


def build_inputs() -> list[str]:
    sources = (path for path in HERE.glob("csrc/**/*") if path.is_file())
    return ["CMakeLists.txt", *(str(path.relative_to(HERE)) for path in sources)]


setup(
    packages=packages(),
    package_dir=MAPPED,
    # CMake owns the sources. `depends` puts them into the source distribution.
    ext_modules=[Extension("attn_gate._C", sources=[], depends=build_inputs())],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
    # Nobody needs cmake or ninja of the system: what doesn't run here comes as a wheel, for the build only.
    setup_requires=[tool for tool in ("cmake", "ninja") if find_torch() and not runs(tool)],
)
