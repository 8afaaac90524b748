"""attn_gate: the attention gate of Attention U-Net as fused operators, forward and backward."""

from . import functional, reference
from ._version import __version__
from .autograd import AttentionGateFunction
from .module import AttentionGate
from .spec import GateSpec
from .unet import AttentionUNet

__all__ = [
    "AttentionGate",
    "AttentionGateFunction",
    "AttentionUNet",
    "GateSpec",
    "__version__",
    "functional",
    "reference",
]
