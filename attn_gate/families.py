"""The attention gates that other libraries ship, each described by the names of its layers.

A GateFamily names the three convolutions. What can be read from them (kernels, strides, biases, norms) is
read by `read_structure`; what can't (activation, resize, order of arguments) is found by `attn_gate.probe`,
which tries the values of OPTIONS against the gate's own forward. A class name is never looked at.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from attn_gate.checks import check_choice
from attn_gate.engine import CONVOLUTIONS
from attn_gate.reference import ACTIVATIONS
from attn_gate.spec import CHOICES, GateSpec

# What a gate's layers don't show; the likeliest value first. "resize" is that of phi and alpha.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "resize": ("linear", "align_corners", "nearest"),
    "x_resize": ("none",),
    "activation": tuple(ACTIVATIONS),
    "normaliser": CHOICES["normaliser"],
    "combine": CHOICES["combine"],
}
_CHOICES = {key: CHOICES["alpha_resize" if key == "resize" else key] for key in OPTIONS}


@dataclass(frozen=True, kw_only=True)
class GateFamily:
    """Where the layers of a gate are: attribute names, dotted where they are nested.

    Attributes:
        name: of the family, for reports.
        x: the layers on the skip connection, which the map weighs: a convolution, or a container of one with
            a norm behind it.
        g: those on the gating signal.
        psi: those on their activated sum: a convolution, a norm if there is one, the normaliser if it is a
            module.
        out: those behind the product, or None. A gate that lacks this attribute has none.
        options: values to try for the keys of OPTIONS, where they differ from those.

    Example:
        attn_gate.register_family(GateFamily(name="mine", x="proj_skip", g="proj_gate", psi="score"))
    """

    name: str
    x: str
    g: str
    psi: str
    out: str | None = None
    options: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    def __post_init__(self) -> None:
        for name in ("name", "x", "g", "psi", "out"):
            value = getattr(self, name)
            if (not isinstance(value, str) or not value) and not (name == "out" and value is None):
                raise TypeError(f"{name} of a GateFamily must be a non-empty string; got {value!r}")
        options = tuple(self.options.items() if isinstance(self.options, dict) else self.options)
        for key, values in options:
            if key not in OPTIONS:
                raise ValueError(f"options of a GateFamily are {', '.join(OPTIONS)}; got {key!r}")
            if isinstance(values, str) or not isinstance(values, Collection) or not values:
                raise TypeError(f"options[{key!r}] of a GateFamily must be values to try; got {values!r}")
            for value in values:
                check_choice(f"options[{key!r}] of a GateFamily", value, _CHOICES[key])
        object.__setattr__(self, "options", tuple((key, tuple(values)) for key, values in options))


FAMILIES: list[GateFamily] = [
    # MONAI's AttentionBlock, LeeJunHyun's Attention_block and its copies, swapped constructors included.
    GateFamily(name="MONAI, LeeJunHyun", x="W_x", g="W_g", psi="psi"),
    GateFamily(name="sfczekalski, bio-image-unet", x="W_x", g="W_gate", psi="psi"),
    GateFamily(name="BiaPy", x="w_x", g="w_g", psi="psi"),
    GateFamily(name="FastEstimator", x="enc_layers", g="dec_layers", psi="attn_layers"),
    # Left alone, for its map per channel: its norms folded and its sum in place, all in PyTorch, gave 1.0 to
    # 1.3 times eager's speed in eval mode.
    GateFamily(name="nikhilroxtomar", x="Ws", g="Wg", psi="output"),
    # The authors' GridAttentionBlock and those made from it: sononet's TORR, ivadomed (aligned corners),
    # CA-Net, A-ESRGAN, Advanced_nnUNet.
    GateFamily(name="Oktay (grid attention)", x="theta", g="phi", psi="psi", out="W"),
    GateFamily(
        name="PyMIC",
        x="conv1_l",
        g="conv1_h",
        psi="conv2",
        options=(("x_resize", ("linear", "align_corners")),),
    ),
]


def register_family(family: GateFamily) -> None:
    """Lets fuse_gates look for this family too, before the ones it knows.

    Raises:
        TypeError: family is no GateFamily.
    """
    if not isinstance(family, GateFamily):
        raise TypeError(f"family must be a GateFamily; got {type(family).__name__}")
    if family not in FAMILIES:
        FAMILIES.insert(0, family)


class Layers(NamedTuple):
    """The layers of a gate, as `eager.Parts` asks for them; or, in a Structure, their paths."""

    theta: Any
    phi: Any
    psi: Any
    phi_tail: Any
    theta_norm: Any
    phi_norm: Any
    psi_norm: Any
    W: Any


class Structure(NamedTuple):
    """What the layers of a gate show: `spec` with the likeliest of what they don't, their paths, channels."""

    spec: GateSpec
    paths: Layers
    channels: tuple[int, int]  # of x and of g


class Unreadable(Exception):
    """A gate's layers aren't those of a GateSpec; the message says which, and why."""


def has_layers(family: GateFamily, module: nn.Module) -> bool:
    """Whether the module has layers by the names of this family."""
    paths = (family.x, family.g, family.psi)
    return all(find_layer(module, path) is not None for path in paths)


def guess_families(module: nn.Module) -> Iterator[GateFamily]:
    """What the layers of a module might be if it is a gate by other names: the long tail of copies.

    Two children that project to as many channels, one that makes one map of those, perhaps one more behind
    the product; which is which, where shapes leave that open, is for `attn_gate.probe` to find.
    """
    stems: dict[str, nn.Module] = {}
    if not 3 <= len(module._modules) <= 8:
        return
    for name, child in module.named_children():
        found = [layer for _, layer in leaves(child) if any(True for _ in layer.parameters())]
        if found and (len(found) > 2 or not isinstance(found[0], tuple(CONVOLUTIONS.values()))):
            return
        if found:
            stems[name] = found[0]
    if len(stems) not in (3, 4):
        return
    for x, g, psi, *out in itertools.permutations(stems):
        projections = stems[x].out_channels, stems[g].out_channels
        if stems[psi].out_channels == 1 and projections == (stems[psi].in_channels,) * 2:
            if not out or stems[out[0]].in_channels == stems[out[0]].out_channels == stems[x].in_channels:
                yield GateFamily(name="by its layers", x=x, g=g, psi=psi, out=out[0] if out else None)


def read_structure(family: GateFamily, module: nn.Module) -> Structure:
    """What the layers of the module show.

    Raises:
        Unreadable: they aren't those of a gate that GateSpec describes.
    """
    theta, theta_norm, theta_fields = _projection(module, "theta", family.x)
    phi, phi_norm, phi_fields = _projection(module, "phi", family.g)
    psi, psi_norm, psi_fields = _projection(module, "psi", family.psi)
    convs = [find_layer(module, path) for path in (theta, phi, psi)]
    dims = {conv.weight.ndim - 2 for conv in convs}
    if len(dims) > 1:
        raise Unreadable("its convolutions differ in their number of axes")
    inter = convs[2].in_channels
    if not inter or {conv.out_channels for conv in convs[:2]} != {inter}:
        made = " and ".join(str(conv.out_channels) for conv in convs[:2])
        raise Unreadable(f"the projections make {made} channels, psi takes {inter}")
    if convs[2].out_channels not in (1, convs[0].in_channels):
        raise Unreadable(f"psi makes {convs[2].out_channels} maps, not one, nor one per channel of x")
    if convs[2].kernel_size + convs[2].stride != (1,) * 2 * len(convs[2].stride):
        raise Unreadable(f"psi's kernel is {convs[2].kernel_size}, stride {convs[2].stride}: not 1x1")

    out = None if find_layer(module, family.out) is None else family.out
    output: dict[str, Any] = {}
    if out is not None and not isinstance(find_layer(module, out), nn.Identity):
        _, norm, _ = _projection(module, "W", out)
        output = {"output": "conv" if norm is None else "conv_norm"}
        if norm is not None:
            output["output_norm"] = norm_kind(find_layer(module, norm))
    else:
        out = None
    paths = Layers(theta, phi, psi, None, theta_norm, phi_norm, psi_norm, out)
    _refuse_other_parameters(module, [path for path in paths if path is not None])
    several = convs[2].out_channels != 1
    spec = GateSpec(
        spatial_dims=dims.pop(),
        **theta_fields,
        **phi_fields,
        **psi_fields,
        **output,
        psi_channels="in_channels" if several else 1,
    )
    return Structure(spec, paths, (convs[0].in_channels, convs[1].in_channels))


def find_layer(module: nn.Module, path: str | None) -> nn.Module | None:
    """The layer at a dotted path, the module itself at an empty one; None where there is none.

    Only a module's own children count: what a wrapper passes on from the module that it wraps are that one's.
    """
    if path is None:
        return None
    for name in path.split(".") if path else ():
        children = getattr(module, "_modules", {})
        module = children[name] if name in children else None
    return module


def norm_kind(norm: Any) -> str | None:
    """ "batch" | "instance" | "group" for a norm layer, None for everything else."""
    kinds = ((_BatchNorm, "batch"), (_InstanceNorm, "instance"), (nn.GroupNorm, "group"))
    return next((kind for cls, kind in kinds if isinstance(norm, cls)), None)


def leaves(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, layer) of a container's layers in order; a parametrised layer, which has children, is one."""
    layers = (*CONVOLUTIONS.values(), _BatchNorm, _InstanceNorm, nn.GroupNorm)
    if isinstance(module, layers) or not any(True for _ in module.children()):
        yield path, module
        return
    for name, child in module.named_children():
        yield from leaves(child, f"{path}.{name}" if path else name)


def _projection(module: nn.Module, part: str, path: str) -> tuple[str, str | None, dict[str, Any]]:
    """Paths of the convolution and of its norm, and the fields of GateSpec that they show."""
    found = list(leaves(find_layer(module, path), path))
    convs = [(p, layer) for p, layer in found if isinstance(layer, tuple(CONVOLUTIONS.values()))]
    norms = [(p, layer) for p, layer in found if norm_kind(layer)]
    if len(convs) != 1 or found[0] != convs[0] or len(norms) > 1 or (norms and found[1] != norms[0]):
        kinds = ", ".join(_class_name(layer) for _, layer in found)
        raise Unreadable(f"{path} isn't a convolution with at most one norm behind it, but {kinds}")
    where, conv = convs[0]
    if any(is_lazy(p) for p in conv.parameters()):
        raise Unreadable(f"the parameters of {where} aren't made yet: run the model once, then fuse")
    if conv.groups != 1 or any(d != 1 for d in conv.dilation) or conv.padding_mode != "zeros":
        raise Unreadable(f"{where} is grouped, dilated or padded by other things than zeros")
    norm, kind = (norms[0][0], norm_kind(norms[0][1])) if norms else (None, "none")
    bias = conv.bias is not None
    if part == "psi":
        return where, norm, {"psi_bias": bias, "psi_norm": kind}
    if part == "W":
        return where, norm, {}
    fields = {"kernel": conv.kernel_size, "stride": conv.stride, "bias": bias, "norm": kind}
    padded = conv.padding == "same" or any(n != 0 for n in conv.padding if not isinstance(n, str))
    symmetric = tuple((k - 1) // 2 for k in conv.kernel_size)
    if padded and (part == "phi" or conv.padding not in (symmetric, "same")):
        raise Unreadable(f"{where} has padding {conv.padding}")
    if padded:
        fields["padding"] = "symmetric"
    return where, norm, {f"{part}_{name}": value for name, value in fields.items()}


def _class_name(layer: nn.Module) -> str:
    """With its module where that isn't PyTorch's of layers: a quantised Conv2d is called Conv2d too."""
    cls = type(layer)
    return (
        cls.__name__ if cls.__module__.startswith("torch.nn.modules") else f"{cls.__module__}.{cls.__name__}"
    )


def _refuse_other_parameters(module: nn.Module, paths: list[str]) -> None:
    own = {id(t) for path in paths for t in _tensors(find_layer(module, path))}
    names = [name for name, t in module.named_parameters() if id(t) not in own]
    names += [name for name, t in module.named_buffers() if id(t) not in own]
    if names:
        raise Unreadable(f"it has more parameters or buffers than its family: {', '.join(names[:3])}")


def _tensors(module: nn.Module) -> Iterator[Any]:
    yield from module.parameters()
    yield from module.buffers()
