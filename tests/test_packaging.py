"""What is built and shipped: one version, a clear error from a bare checkout, clean libraries and wheel."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import attn_gate
from attn_gate._version import __version__

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("attn_gate", "bench", "triton_kernels", "csrc")
CODE = {".py", ".cpp", ".h", ".cu", ".cuh"}
needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")


def test_version_is_said_in_one_place():
    files = [ROOT / "pyproject.toml", ROOT / "setup.py", ROOT / "CMakeLists.txt"]
    for folder in FOLDERS:
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix in CODE]
    assert [path.name for path in files if f'"{__version__}"' in path.read_text()] == ["_version.py"]
    assert importlib.metadata.version("attn_gate") == __version__
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_bare_checkout_says_what_to_do(tmp_path):
    not_built = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "attn_gate", tmp_path / "attn_gate", ignore=not_built)
    env = {name: value for name, value in os.environ.items() if name != "ATTN_GATE_LIBRARY_DIR"}
    command = [sys.executable, "-c", "import attn_gate"]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("ImportError: ")
    assert "pip install" in result.stderr.splitlines()[-1]
    assert result.stderr.count("Traceback") == 1


def symbols(file: Path, *options: str) -> list[tuple[str, str]]:
    """Return (type, name) of each symbol, as nm says them."""
    listing = subprocess.run(["nm", *options, file], capture_output=True, text=True, check=True).stdout
    return re.findall(r"^[0-9a-f ]* ([A-Za-z]) (.+)$", listing, flags=re.MULTILINE)


@needs_nm
def test_kernels_of_an_instruction_set_share_nothing_with_the_others():
    """The linker keeps one copy of a weak function: perhaps the AVX-512 one, which then serves the kernels
    for machines without AVX-512 too. (Weak data, which nm marks V, holds no instructions.)"""
    objects = sorted(ROOT.glob("build/cmake-*/CMakeFiles/kernels_*.dir/**/*.o"))
    if not objects:
        pytest.skip("no build folder: this attn_gate was not built from this checkout")
    for path in objects:
        weak = [name for kind, name in symbols(path, "--demangle") if kind == "W"]
        assert not weak, f"{path.relative_to(ROOT)} has weak functions: {weak}"


@needs_nm
def test_library_uses_only_the_stable_abi():
    """An undefined C++ symbol of torch breaks with the next torch, one of Python with the next Python."""
    folder = Path(os.environ.get("ATTN_GATE_LIBRARY_DIR") or Path(attn_gate.__file__).parent)
    undefined = [name for _, name in symbols(folder / "_C.abi3.so", "--dynamic", "--undefined-only")]
    assert any(name.startswith("aoti_torch_") for name in undefined)
    assert not [name for name in undefined if re.match(r"_ZNK?(2at|3c10|5torch)|Py", name)]


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(tmp_path):
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT]
    subprocess.run(pip, check=True)
    (wheel,) = tmp_path.iterdir()
    assert re.fullmatch(rf"attn_gate-{re.escape(__version__)}-py3-none-\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {"attn_gate", f"attn_gate-{__version__}.dist-info"}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "attn_gate").rglob("*.py")}
    for folder in ("bench", "triton_kernels"):
        modules |= {f"attn_gate/{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert {"attn_gate/_C.abi3.so", "attn_gate/_build_info.json"} <= set(names)
