"""Keras's weights in AttentionGate: the numbers of Keras, which tests/data/make_keras_gates.py stored."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch.nn.utils import parametrizations

from attn_gate import AttentionGate, keras
from attn_gate.judge import judge

np = pytest.importorskip("numpy")

# The layers as Keras named them, in the order of gate_arrays.
MOLEIMG = ("conv2d", "conv2d_1", "conv2d_transpose", "conv2d_2", "conv2d_3", "batch_normalization")
ROBINVVINOD = ("conv2d", "conv2d_1", "conv2d_2", "conv2d_3", "batch_normalization")
ROBINVVINOD_3D = ("conv3d", "conv3d_1", "conv3d_2", "conv3d_3", "batch_normalization")
THREE, THREE_3D = MOLEIMG[:2] + ("conv2d_2",), ROBINVVINOD_3D[:3]
# case: fields beside the family's, layers (None where the names tell)
CASES = {
    "moleimg": ({}, MOLEIMG),
    "bnsreenu": ({}, MOLEIMG),
    "nabsabraham": ({"phi_tail_stride": 2}, {"phi": "conv2d"}),
    "nabsabraham 3D": ({}, {"phi": "conv3d"}),
    "robinvvinod": ({}, ROBINVVINOD),
    "robinvvinod stride 4": ({"theta_stride": 4}, ROBINVVINOD),
    "miscnn 3D": ({}, ROBINVVINOD_3D),
    "keras_unet_collection": ({}, None),
    "keras_unet_collection multiply": ({"combine": "multiply"}, None),
    "keras_unet_collection gelu": ({"activation": "gelu"}, None),
    "keras_unet": ({}, THREE),
    "lixiaolei1982": ({}, THREE),
    "antspynet 3D": ({}, THREE_3D),
    "medicai": ({}, THREE),
    "medicai 3D": ({}, THREE_3D),
    "junqiangchen 3D": ({}, ("conv3d_1", "conv3d_2", "conv3d_3", "conv3d", "group_normalization")),
    "nikhilroxtomar": (
        {},
        ("conv2d_1", "batch_normalization_1", "conv2d", "batch_normalization", "conv2d_2"),
    ),
}


@functools.cache
def file() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "data" / "keras_gates.npz", allow_pickle=False) as found:
        return dict(found)


def stored(prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): a for name, a in file().items() if name.startswith(prefix)}


def arrays_of(case: str) -> dict[str, np.ndarray]:
    names = {in_file(case, name): name for name in ("conv3d/bias",)}
    return {names.get(name, name): a for name, a in stored(f"{case}/arrays/").items()}


def in_file(case: str, name: str) -> str:
    """junqiangchen's one bias for all channels is there a layer of its own, behind the layer "conv3d"."""
    return "one_bias/bias" if case.startswith("junqiangchen") and name == "conv3d/bias" else name


def gate_of(case: str) -> AttentionGate:
    """A gate for the case, with PyTorch's random weights."""
    channels = map(int, stored(f"{case}/")["channels"])
    spec = keras.spec(case.split()[0], stored(f"{case}/")["x"].ndim - 2, **CASES[case][0])
    return AttentionGate(*channels, preset=spec)


def channels_first(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.moveaxis(array, -1, 1).copy())


def test_every_family_has_a_case_and_a_description():
    assert {case.split()[0] for case in CASES} == set(keras.FAMILIES)
    assert set(CASES) == {name.partition("/")[0] for name in file()} - {"files"}
    assert all(family.description for family in keras.FAMILIES.values())


def results(case: str, mode: str, dtype: torch.dtype, backend: str = "auto") -> tuple[dict, dict]:
    """What the gate computes and what Keras has: y, all gradients, statistics after a training step."""
    given = stored(f"{case}/")
    gate = gate_of(case).to(dtype).train(mode == "train")
    gate.backend = backend
    loaded = keras.load_gate_weights(gate, arrays_of(case), layers=CASES[case][1])
    x, g = (channels_first(given[name]).to(dtype).requires_grad_() for name in ("x", "g"))
    y = gate(x, g)
    y.backward(channels_first(given["slope"]).to(dtype))

    found = {"y": y, "d x": x.grad, "d g": g.grad}
    expected = {name: channels_first(given[f"{mode}/{name}"]) for name in found}
    for name, t in gate.named_parameters():
        found[f"d {name}"] = t.grad.permute(*range(2, t.ndim), 1, 0) if t.ndim > 2 else t.grad
        expected[f"d {name}"] = given[f"{mode}/d {in_file(case, loaded[name])}"]
    for name in loaded.keys() - dict(gate.named_parameters()) if mode == "train" else ():
        found[name] = gate.get_buffer(name)
        expected[name] = given[f"train/moving/{loaded[name]}"]
    if case.startswith("junqiangchen"):
        found["d W.0.bias"] = found["d W.0.bias"].sum(0, keepdim=True)
    return found, {name: torch.as_tensor(a).double() for name, a in expected.items()}


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("case", CASES)
def test_numbers_of_keras(case, mode, backend):
    """Keras normalises in float32 whatever the dtype, so its numbers are judged, by ours in float64."""
    exact, of_keras = results(case, mode, torch.float64, backend)
    eager, _ = results(case, mode, torch.float32, "eager")
    assert not [j for j in judge(of_keras, eager, exact, torch.float32) if not j.ok]
    found, _ = results(case, mode, torch.float32, backend)
    assert not [j for j in judge(found, eager, exact, torch.float32) if not j.ok]


def test_a_sequence_in_layer_order():
    gate, other = gate_of("moleimg"), gate_of("moleimg")
    arrays = arrays_of("moleimg")
    names = list(keras.load_gate_weights(gate, arrays, layers=MOLEIMG).values())
    assert list(keras.load_gate_weights(other, [arrays[name] for name in names]).values()) == [
        str(i) for i in range(14)
    ]
    for name, t in gate.state_dict().items():
        assert torch.equal(t, other.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["h5", "keras"])
def test_names_as_h5py_reads_them_from_saved_models(kind):
    gate, other = gate_of("nabsabraham"), gate_of("nabsabraham")
    keras.load_gate_weights(gate, arrays_of("nabsabraham"), layers={"phi": "conv2d"})
    read = stored(f"files/{kind}/")
    keras.load_gate_weights(other, read, layers={"phi": "conv2d"})
    colon = {f"{name}:0": a for name, a in read.items()}  # Keras 2
    third = gate_of("nabsabraham")
    keras.load_gate_weights(third, colon, layers={"phi": "conv2d"})
    for name, t in gate.state_dict().items():
        assert torch.equal(t, other.state_dict()[name]) and torch.equal(t, third.state_dict()[name]), name


def test_one_gate_of_a_whole_network():
    arrays = {f"up_{n}_{k}": a * n for n in (1, 2) for k, a in arrays_of("keras_unet_collection").items()}
    arrays |= {"conv2d/kernel": np.zeros((3, 3, 1, 8), np.float32), "optimizer/iteration": np.zeros(())}
    gate = gate_of("keras_unet_collection")
    with pytest.raises(ValueError, match="up_1_att_theta_x, up_2_att_theta_x. Say which by layers="):
        keras.load_gate_weights(gate, arrays)
    names = [f"up_2_att_{part}" for part in ("theta_x", "phi_g", "psi_f")]
    assert keras.load_gate_weights(gate, arrays, layers=names)["psi.bias"] == "up_2_att_psi_f/bias"
    expected = arrays["up_2_att_phi_g/kernel"][0, 0].T
    assert np.array_equal(gate.phi.weight[:, :, 0, 0].detach(), expected)


def test_gate_arrays_lists_names_and_shapes():
    gate = AttentionGate(4, 6, 2, preset=keras.spec("robinvvinod", 3))
    assert keras.gate_arrays(gate) == {
        "theta/kernel": (3, 3, 3, 4, 2), "theta/bias": (2,),
        "phi/kernel": (1, 1, 1, 6, 2), "phi/bias": (2,),
        "psi/kernel": (1, 1, 1, 2, 1), "psi/bias": (1,),
        "W.0/kernel": (1, 1, 1, 4, 4), "W.0/bias": (4,),
        "W.1/gamma": (4,), "W.1/beta": (4,), "W.1/moving_mean": (4,), "W.1/moving_variance": (4,),
    }  # fmt: skip


def broken(**changes):
    """Arrays of the gate of robinvvinod, by the gate's own names, changed by one."""
    shapes = keras.gate_arrays(AttentionGate(4, 6, 2, preset=keras.spec("robinvvinod")))
    arrays = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    for name, value in changes.items():
        arrays[name.replace("__", "/")] = value
    return {name: a for name, a in arrays.items() if a is not None}


TAKES = r"The gate takes theta/kernel \(3, 3, 4, 2\), theta/bias \(2,\), phi/kernel"
# arrays, layers, what the error says (a ValueError but for the last four)
WRONG = {
    "no arrays": ([], None, "must hold 12 arrays for this gate; got 0. " + TAKES),
    "bias missing": (
        broken(phi__bias=None),
        None,
        "one bias in layer 'phi', .* it has only phi/kernel. " + TAKES,
    ),
    "channels": (
        broken(phi__kernel=np.ones((1, 1, 5, 2))),
        None,
        r"phi/kernel'\], kernel of phi, must have shape \(1, 1, 6, 2\); got \(1, 1, 5, 2\); does the gate",
    ),
    "axes": (broken(theta__kernel=np.ones((2, 4, 3, 3))), None, r"got \(2, 4, 3, 3\); .*PyTorch's order"),
    "one too many": (broken(phi__gamma=np.ones(2)), None, "this gate's phi takes no phi/gamma. " + TAKES),
    "the last one": (broken(**{"W.1__moving_variance": np.ones(3)}), None, r"\(4,\); got \(3,\)"),
    "two of a name": (broken(other__phi__bias=np.ones(2)), None, "it has phi/bias, other/phi/bias"),
    "few layers": (broken(), ["theta", "phi"], "must name theta, phi, psi, W.0, W.1, in this order"),
    "no such layer": (broken(), {"psi": "conv2d_9"}, "no layer 'conv2d_9' psi; it has theta, phi"),
    "no such part": (broken(), {"gamma": "phi"}, "layers names 'gamma'; this gate has theta, phi, psi"),
    "one layer twice": (broken(), {"psi": "phi"}, "must name a layer once; got phi more than once"),
    "a path": ("weights.h5", None, "arrays must map names to arrays, or be a sequence.*got str.*how to"),
    "objects": (broken(phi__bias=np.array([None] * 2)), None, "must hold floating-point.*; got object"),
    "a string of layers": (broken(), "phi", "layers must be a mapping, a sequence of names or None"),
    "names for a sequence": ([np.ones(1)] * 12, ["a"], "layers must be None where arrays is a sequence"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_errors_say_what_is_wrong_and_leave_the_gate_as_it_was(wrong):
    arrays, layers, message = WRONG[wrong]
    error = TypeError if wrong in list(WRONG)[-4:] else ValueError
    gate = AttentionGate(4, 6, 2, preset=keras.spec("robinvvinod"))
    before = {name: t.clone() for name, t in gate.state_dict().items()}
    with pytest.raises(error, match=message):
        keras.load_gate_weights(gate, arrays, layers=layers)
    for name, t in gate.state_dict().items():
        assert torch.equal(t, before[name]), name


def test_other_gates_and_families_are_refused():
    with pytest.raises(TypeError, match="gate must be an attn_gate.AttentionGate; got Identity"):
        keras.load_gate_weights(torch.nn.Identity(), {})
    with pytest.raises(ValueError, match="family must be one of 'moleimg', .*; got 'unet'"):
        keras.spec("unet")
    gate = AttentionGate(4, 6, 2, preset=keras.spec("robinvvinod"))
    parametrizations.weight_norm(gate.phi)
    with pytest.raises(ValueError, match="gate.phi computes its parameters; remove its parametrisation"):
        keras.load_gate_weights(gate, broken())


def test_loading_reaches_the_folded_weights_of_a_gate_that_has_run():
    gate = AttentionGate(4, 6, 2, preset=keras.spec("robinvvinod")).eval()
    x, g = torch.randn(1, 4, 8, 8), torch.randn(1, 6, 4, 4)
    with torch.no_grad():
        gate(x, g)
        keras.load_gate_weights(gate, broken())
        gate_again = AttentionGate(4, 6, 2, preset=keras.spec("robinvvinod"), backend="eager").eval()
        gate_again.load_state_dict(gate.state_dict())
        torch.testing.assert_close(gate(x, g), gate_again(x, g))
