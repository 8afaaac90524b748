"""attn_gate: the attention gate of Attention U-Net as fused operators, forward and backward."""

from . import functional, keras, reference
from ._version import __version__
from .autograd import AttentionGateFunction
from .capture import capture_attention
from .families import GateFamily, register_family
from .fuse import FusionReport, fuse_gates, unfuse_gates
from .memory import keep_memory
from .module import AttentionGate
from .plot import plot_attention
from .spec import GateSpec
from .triton_kernels import register as _register_triton
from .unet import AttentionUNet

_register_triton()

__all__ = [
    "AttentionGate",
    "AttentionGateFunction",
    "AttentionUNet",
    "FusionReport",
    "GateFamily",
    "GateSpec",
    "__version__",
    "capture_attention",
    "functional",
    "fuse_gates",
    "keep_memory",
    "keras",
    "plot_attention",
    "reference",
    "register_family",
    "unfuse_gates",
]
