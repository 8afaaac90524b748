"""Weights of Keras gates: the gates of published Keras networks, and their arrays put into AttentionGate.

    from attn_gate import AttentionGate, keras

    gate = AttentionGate(64, 128, 32, preset=keras.spec("keras_unet_collection"))
    arrays = {w.path: np.asarray(w) for w in model.weights}   # a Keras 3 model; Keras 2: w.name
    keras.load_gate_weights(gate, arrays, layers=["att_theta_x", "att_phi_g", "att_psi_f"])

Keras itself isn't needed. With h5py alone, `arrays` is read like this (nothing is unpickled):

    with h5py.File("net.h5") as file:          # also .weights.h5 of Keras 2
        arrays = {}
        file.visititems(lambda name, item: arrays.update({name: item[()]} if hasattr(item, "dtype") else {}))

    with zipfile.ZipFile("net.keras").open("model.weights.h5") as inner, h5py.File(inner) as file:
        arrays = {}
        for layer in file["layers"].values():  # numbered by class; the name of the model is an attribute
            name = layer["vars"].attrs["name"]
            arrays |= {f"{name}/{number}": array[()] for number, array in layer["vars"].items()}
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from attn_gate.module import AttentionGate
from attn_gate.spec import GateSpec

if TYPE_CHECKING:
    import numpy as np

_BATCH_NORM = {"norm_eps": 1e-3, "norm_momentum": 0.01, "norm_biased_variance": True}
_ONE_GRID = {"phi_resize": "none", "alpha_resize": "none"}
_COARSE = {"phi_resize": "none", "alpha_resize": "nearest", "theta_padding": "same", "theta_stride": 2}
_COARSE_W = {**_COARSE, **_BATCH_NORM, "output": "conv_norm"}


class Family(NamedTuple):
    """The gate of one Keras code base: what it computes, and the fields of GateSpec that say so."""

    description: str
    fields: dict[str, Any]


FAMILIES: dict[str, Family] = {
    "moleimg": Family(
        "MoleImg/Attention_UNet: 2x2 theta, 3x3 transposed convolution behind phi, nearest, 1x1, batch norm",
        {**_COARSE_W, "theta_kernel": 2, "phi_tail_stride": 1},
    ),
    "bnsreenu": Family(
        "bnsreenu/python_for_microscopists, attention_block: the gate of moleimg",
        {**_COARSE_W, "theta_kernel": 2, "phi_tail_stride": 1},
    ),
    "nabsabraham": Family(
        "nabsabraham/focal-tversky-unet: the gate of moleimg; the third one has phi_tail_stride=2",
        {**_COARSE_W, "theta_kernel": 2, "phi_tail_stride": 1},
    ),
    "robinvvinod": Family(
        "robinvvinod/unet: 3x3 theta (theta_stride: x's grid over g's), nearest, 1x1, batch norm",
        {**_COARSE_W, "theta_kernel": 3},
    ),
    "miscnn": Family(
        "MIScnn, attention_block2D/3D: the gate of robinvvinod, always with stride 2",
        {**_COARSE_W, "theta_kernel": 3},
    ),
    "keras_unet_collection": Family(
        "keras-unet-collection, attention_gate: one grid, three 1x1; its 'multiply' is combine='multiply'",
        _ONE_GRID,
    ),
    "keras_unet": Family("karolzak/keras-unet, attention_gate: one grid, three 1x1", _ONE_GRID),
    "lixiaolei1982": Family(
        "lixiaolei1982/Keras-Implementation-of-U-Net, attention_block_2d: one grid, three 1x1", _ONE_GRID
    ),
    "antspynet": Family(
        "ANTsPyNet, attentionGating: one grid, three 1x1; there x is the decoder's, g the skip connection",
        _ONE_GRID,
    ),
    "medicai": Family(
        "medicai, AttentionGate: 1x1 theta of every second voxel, nearest, no output transform", _COARSE
    ),
    "junqiangchen": Family(
        "junqiangchen/AttentionGatedVNet3D: medicai's, then 1x1 (one bias for all channels), group norm",
        {**_COARSE, "output": "conv_norm", "output_norm": "group", "norm_groups": 16},
    ),
    "nikhilroxtomar": Family(
        "nikhilroxtomar, TensorFlow attention-unet: one grid, batch norms, one map per channel of x",
        {
            **_ONE_GRID,
            **_BATCH_NORM,
            "theta_norm": "batch",
            "phi_norm": "batch",
            "psi_channels": "in_channels",
        },
    ),
}

# What these code bases call their layers, as shell patterns; all others leave the names to Keras.
_LAYER_NAMES = {
    "theta": ("*theta_x", "xl_*"),
    "phi": ("*phi_g",),
    "phi_tail": ("g_up_*",),
    "psi": ("*psi_f", "psi_*"),
    "W.0": ("q_attn_conv_*",),
    "W.1": ("q_attn_bn_*",),
}
_NORM_VARIABLES = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def spec(family: str, spatial_dims: int = 2, **overrides: Any) -> GateSpec:
    """The GateSpec of this family's gate, with any field replaced; `FAMILIES` lists and describes them.

    Raises:
        ValueError: there is no family of that name.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(map(repr, FAMILIES))}; got {family!r}")
    return GateSpec(spatial_dims=spatial_dims, **FAMILIES[family].fields).replace(**overrides)


def gate_arrays(gate: AttentionGate) -> dict[str, tuple[int, ...]]:
    """Name and shape of each array that `load_gate_weights` takes for this gate, in the order of a list."""
    return {f"{s.layer}/{s.variable}": s.shape for s in _slots(gate)}


@torch.no_grad()
def load_gate_weights(
    gate: AttentionGate,
    arrays: Mapping[str, np.ndarray] | Sequence[np.ndarray],
    *,
    layers: Mapping[str, str] | Sequence[str] | None = None,
) -> dict[str, str]:
    """Copies the weights of a Keras gate into `gate`; all of them, or on an error none.

    Kernels go from [*k, in, out] to PyTorch's [out, in, *k] (those of transposed convolutions from
    [*k, out, in] to [in, out, *k]), batch norms bring their moving mean and variance.

    Args:
        gate: the gate, made with `spec(family)`; `gate_arrays(gate)` says which arrays it takes.
        arrays: a mapping "LAYER/VARIABLE" -> array, of the gate or of the whole network. VARIABLE is Keras's
            name (kernel, bias, gamma, beta, moving_mean, moving_variance, with or without ":0") or its number
            in the layer ("vars/0"); what comes before LAYER doesn't matter. Or a sequence of arrays in the
            order of `gate_arrays(gate)`. (`Model.get_weights()` sorts layers by their depth: often another
            order, so name them where you can.)
        layers: LAYER of each layer of the gate: {"theta": "conv2d_7", ...}, or the names in the order theta,
            theta_norm, phi, phi_norm, phi_tail, psi, psi_norm, W.0, W.1, without those that the gate lacks.
            Not needed where `arrays` holds one gate whose layers are called theta, phi, ... or as
            keras-unet-collection and nabsabraham call them (whose phi has no name of its own).

    Returns:
        {name in gate.state_dict(): name in arrays (for a sequence, the index)} of all that was loaded.

    Raises:
        TypeError: gate isn't an AttentionGate; arrays, layers or a dtype are of another type.
        ValueError: an array is missing, doubled, left over in one of the gate's layers or of another shape;
            a layer isn't in arrays; a parameter is computed (torch.nn.utils.parametrize).
    """
    if not isinstance(gate, AttentionGate):
        raise TypeError(f"gate must be an attn_gate.AttentionGate; got {type(gate).__name__}")
    slots = list(_slots(gate))
    for slot in slots:
        if parametrize.is_parametrized(gate.get_submodule(slot.layer)):
            raise ValueError(f"gate.{slot.layer} computes its parameters; remove its parametrisation first")
    if isinstance(arrays, Mapping):
        chosen = _by_name(slots, arrays, layers)
    elif isinstance(arrays, Sequence) and not isinstance(arrays, (str, bytes)):
        if layers is not None:
            raise TypeError("layers must be None where arrays is a sequence, which has no names")
        if len(arrays) != len(slots):
            raise ValueError(
                f"arrays must hold {len(slots)} arrays for this gate; got {len(arrays)}.{_takes(slots)}"
            )
        chosen = [(str(i), array) for i, array in enumerate(arrays)]
    else:
        raise TypeError(
            f"arrays must map names to arrays, or be a sequence of arrays; got {type(arrays).__name__}. "
            "The text of attn_gate.keras shows how to read a file"
        )
    values = [_value(slot, name, array) for slot, (name, array) in zip(slots, chosen, strict=True)]
    for slot, value in zip(slots, values, strict=True):
        slot.target.copy_(value)
    return {f"{slot.layer}.{slot.parameter}": name for slot, (name, _) in zip(slots, chosen, strict=True)}


class _Slot(NamedTuple):
    """One array that a gate takes: a parameter or buffer, and how Keras names and shapes it."""

    layer: str
    variable: str
    parameter: str
    target: Tensor
    shape: tuple[int, ...]


def _slots(gate: AttentionGate) -> Iterator[_Slot]:
    names = ("theta", "theta_norm", "phi", "phi_norm", "phi_tail", "psi", "psi_norm", "W.0", "W.1")
    present = dict(gate.named_modules())
    for name in names:
        layer = present.get(name)
        if layer is None:
            continue
        if isinstance(layer, nn.modules.conv._ConvNd):
            weight = layer.weight
            # [a, b, *k] here is [*k, b, a] there, whichever of the two is in and which is out.
            yield _Slot(name, "kernel", "weight", weight, (*weight.shape[2:], *weight.shape[1::-1]))
            if layer.bias is not None:
                yield _Slot(name, "bias", "bias", layer.bias, tuple(layer.bias.shape))
            continue
        for variable, parameter in _NORM_VARIABLES.items():
            target = getattr(layer, parameter, None)
            if target is not None:
                yield _Slot(name, variable, parameter, target, tuple(target.shape))


def _value(slot: _Slot, name: str, array: Any) -> Tensor:
    """The array as a tensor in PyTorch's order of axes, checked."""
    import numpy as np

    array = np.asarray(array)
    what = f"arrays[{name if name.isdigit() else repr(name)}], {slot.variable} of {slot.layer},"
    if array.dtype.kind != "f":
        raise TypeError(f"{what} must hold floating-point numbers; got {array.dtype}")
    # junqiangchen's output transform has one bias for all channels.
    one_for_all = slot.layer == "W.0" and slot.variable == "bias" and array.shape in ((), (1,))
    if array.shape != slot.shape and not one_for_all:
        hint = ""
        if slot.variable == "kernel" and array.shape == tuple(slot.target.shape):
            hint = "; it looks like PyTorch's order of axes, which load_state_dict takes"
        elif slot.variable == "kernel" and array.shape[:-2] == slot.shape[:-2]:
            hint = "; does the gate have the channels of this network, are x and g swapped?"
        raise ValueError(f"{what} must have shape {slot.shape}; got {array.shape}{hint}")
    value = torch.from_numpy(np.array(array, dtype=np.float64))
    if slot.variable == "kernel":
        value = value.permute(-1, -2, *range(value.ndim - 2))
    return value


def _by_name(
    slots: list[_Slot], arrays: Mapping[str, Any], layers: Mapping[str, str] | Sequence[str] | None
) -> list[tuple[str, Any]]:
    """(name, array) for each slot."""
    tree: dict[str, dict[str, list[str]]] = {}  # layer -> variable -> its names in arrays
    for name in arrays:
        parts = [part for part in re.sub(r":\d+$", "", name).split("/") if part != "vars"]
        if len(parts) > 1:
            tree.setdefault(parts[-2], {}).setdefault(parts[-1], []).append(name)
    layer_names = _layer_names(slots, tree, layers)

    chosen = []
    for layer, layer_name in layer_names.items():
        variables = dict(tree[layer_name])
        for number, slot in enumerate(slot for slot in slots if slot.layer == layer):
            found = variables.pop(slot.variable, None) or variables.pop(str(number), [])
            if len(found) != 1:
                has = ", ".join(found) or f"only {', '.join(sum(tree[layer_name].values(), []))}"
                raise ValueError(
                    f"arrays must have one {slot.variable} in layer {layer_name!r}, which is to be {layer}; "
                    f"it has {has}.{_takes(slots)}"
                )
            chosen.append((found[0], arrays[found[0]]))
        if variables:
            left = ", ".join(sum(variables.values(), []))
            raise ValueError(f"this gate's {layer} takes no {left}.{_takes(slots)}")
    return chosen


def _layer_names(
    slots: list[_Slot],
    tree: Mapping[str, Any],
    layers: Mapping[str, str] | Sequence[str] | None,
) -> dict[str, str]:
    """For each layer of the gate the one in arrays."""
    wanted = list(dict.fromkeys(slot.layer for slot in slots))
    if isinstance(layers, (str, bytes)) or not isinstance(layers, (Mapping, Sequence, type(None))):
        raise TypeError(f"layers must be a mapping, a sequence of names or None; got {layers!r}")
    if isinstance(layers, Sequence):
        if len(layers) != len(wanted):
            raise ValueError(f"layers must name {', '.join(wanted)}, in this order; got {list(layers)}")
        layers = dict(zip(wanted, layers, strict=True))
    layers = layers or {}
    unknown = [name for name in layers if name not in wanted]
    if unknown:
        raise ValueError(f"layers names {', '.join(map(repr, unknown))}; this gate has {', '.join(wanted)}")

    names = {}
    for layer in wanted:
        if layer in layers:
            found = [layers[layer]] if layers[layer] in tree else []
        else:
            patterns = _LAYER_NAMES.get(layer, ())
            found = (
                [layer] if layer in tree else [n for n in tree if any(fnmatchcase(n, p) for p in patterns)]
            )
        if len(found) != 1:
            asked = repr(layers[layer]) if layer in layers else "that is surely this gate's"
            seen = ", ".join(found or tree) or "nothing"
            raise ValueError(
                f"arrays has no layer {asked} {layer}; it has {seen}. "
                f"Say which by layers={{{layer!r}: ...}}.{_takes(slots)}"
            )
        names[layer] = found[0]
    taken = list(names.values())
    doubled = {name for name in taken if taken.count(name) > 1}
    if doubled:
        raise ValueError(f"layers must name a layer once; got {', '.join(sorted(doubled))} more than once")
    return names


def _takes(slots: list[_Slot]) -> str:
    return " The gate takes " + ", ".join(f"{s.layer}/{s.variable} {s.shape}" for s in slots)
