"""Which GPUs the CUDA kernels that were built can run on."""

from __future__ import annotations


def why_not(built: str, capability: tuple[int, int]) -> str:
    """Why kernels built for these don't run on a GPU of this compute capability; empty where they do.

    built: as TORCH_CUDA_ARCH_LIST has it, such as "8.0 9.0+PTX". Machine code runs on GPUs of its major
    version from its minor version on ("9.0a" on that one alone), PTX on all from its version on.
    """
    if any(_runs(entry, capability) for entry in built.split()):
        return ""
    major, minor = capability
    return (
        f"the CUDA kernels were built for compute capability {built}, this GPU has {major}.{minor}: rebuild "
        f'attn_gate with TORCH_CUDA_ARCH_LIST="{major}.{minor}"'
    )


def _runs(entry: str, capability: tuple[int, int]) -> bool:
    number, _, ptx = entry.partition("+")  # no regular expression: torch.compile traces this
    kind = number[-1] if number[-1] in "af" else ""
    major, minor = number.rstrip("af").split(".")
    version = (int(major), int(minor))
    if kind == "a":
        return capability == version
    if capability[0] == version[0] and capability >= version:
        return True
    return bool(ptx) and not kind and capability >= version
