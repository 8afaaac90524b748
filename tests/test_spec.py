"""GateSpec: what it accepts, what it says when it doesn't, the grids it predicts, what is fused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_gate import eager
from attn_gate.module import AttentionGate
from attn_gate.spec import CHOICES, PRESETS, GateSpec

NO_NORM = {"theta_norm": "none", "phi_norm": "none", "psi_norm": "none"}


@pytest.mark.parametrize("name", CHOICES)
def test_choices_are_closed_and_named(name):
    with pytest.raises(ValueError) as error:
        GateSpec(**{name: "cubic"})
    text = str(error.value)
    assert name in text and "'cubic'" in text and all(repr(choice) in text for choice in CHOICES[name])


@pytest.mark.parametrize(
    "fields,error,text",
    [
        ({"spatial_dims": 4}, ValueError, "spatial_dims must be one of 1, 2, 3; got 4"),
        ({"spatial_dims": True}, ValueError, "got True"),
        ({"spatial_dims": 2.0}, ValueError, "got 2.0"),
        ({"theta_kernel": 0}, ValueError, "theta_kernel must be at least 1; got 0"),
        (
            {"theta_kernel": "2"},
            TypeError,
            "theta_kernel must be an integer or one integer per axis; got '2'",
        ),
        ({"theta_kernel": None}, TypeError, "theta_kernel"),
        ({"theta_stride": (2, 2, 2)}, ValueError, "theta_stride must have one number for each of the 2 axes"),
        ({"phi_stride": (1.0, 2)}, TypeError, "phi_stride"),
        ({"phi_tail_stride": (1, 0)}, ValueError, "phi_tail_stride must be at least 1"),
        ({"theta_bias": 1}, TypeError, "theta_bias must be True or False; got 1"),
        ({"norm_groups": 0}, ValueError, "norm_groups must be an integer of at least 1; got 0"),
        ({"norm_eps": 0.0}, ValueError, "norm_eps must be more than 0 and finite"),
        ({"norm_eps": float("nan")}, ValueError, "norm_eps"),
        ({"norm_momentum": 1.5}, ValueError, "norm_momentum must be more than 0 and at most 1; got 1.5"),
        ({"norm_momentum": None}, TypeError, "norm_momentum must be a number; got None"),
    ],
)
def test_bad_values(fields, error, text):
    with pytest.raises(error) as caught:
        GateSpec(**fields)
    assert text in str(caught.value)


def test_numbers_per_axis_are_tuples():
    spec = GateSpec(spatial_dims=3, theta_kernel=[3, 1, 1], theta_stride=2, phi_tail_stride=2)
    assert (spec.theta_kernel, spec.theta_stride, spec.phi_tail_stride) == ((3, 1, 1), (2, 2, 2), (2, 2, 2))
    assert spec == GateSpec(
        spatial_dims=3, theta_kernel=(3, 1, 1), theta_stride=(2, 2, 2), phi_tail_stride=(2,) * 3
    )
    assert hash(spec) == hash(spec.replace())


def test_frozen_and_replaced_with_validation():
    spec = GateSpec()
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.activation = "gelu"
    assert spec.replace(activation="gelu").activation == "gelu"
    with pytest.raises(ValueError, match="activation"):
        spec.replace(activation="tanh")
    with pytest.raises(TypeError, match="no field 'activaton'; it has .*activation"):
        spec.replace(activaton="gelu")


def test_presets():
    paper = GateSpec.from_preset("paper", 3)
    assert paper.theta_kernel == paper.theta_stride == (2, 2, 2)
    assert (paper.theta_bias, paper.phi_bias, paper.psi_bias) == (False, True, True)
    assert (paper.phi_resize, paper.alpha_resize, paper.output) == ("linear", "linear", "none")
    keras = GateSpec.from_preset("keras")
    assert (keras.theta_kernel, keras.theta_stride, keras.alpha_resize) == ((1, 1), (2, 2), "nearest")
    assert (keras.output, keras.output_norm, keras.norm_eps) == ("conv_norm", "batch", 1e-3)
    assert keras.norm_biased_variance and keras.norm_momentum == 0.01
    same = GateSpec.from_preset("same_grid", theta_bias=False)
    assert (same.theta_norm, same.phi_norm, same.psi_norm) == ("batch",) * 3
    assert not same.theta_bias and same.phi_bias and same.norm_eps == 1e-5
    with pytest.raises(ValueError, match="preset must be one of 'paper', 'keras', 'same_grid'; got 'oktay'"):
        GateSpec.from_preset("oktay")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_grids_are_those_of_the_layers(data):
    dims = data.draw(st.integers(1, 2))
    axis = st.tuples(*(st.integers(1, 4),) * dims)
    spec = GateSpec(
        spatial_dims=dims,
        theta_kernel=data.draw(axis),
        theta_stride=data.draw(axis),
        theta_padding=data.draw(st.sampled_from(CHOICES["theta_padding"])),
        phi_kernel=data.draw(axis),
        phi_stride=data.draw(axis),
        phi_tail_stride=data.draw(st.none() | axis),
    )
    x_size, g_size = (data.draw(st.tuples(*(st.integers(4, 9),) * dims)) for _ in "xg")
    gate = AttentionGate(1, 1, 1, preset=spec)
    x, g = torch.zeros(1, 1, *x_size), torch.zeros(1, 1, *g_size)
    assert eager.project_x(spec, gate, x, g).shape[2:] == spec.theta_grid(x_size, g_size)
    assert eager.project_g(spec, gate, g).shape[2:] == spec.phi_grid(g_size)
    if spec.theta_padding == "same":
        assert spec.theta_grid(x_size, g_size) == tuple(
            -(-n // s) for n, s in zip(x_size, spec.theta_stride, strict=True)
        )


@pytest.mark.parametrize(
    "fields,unfused,plan,reason",
    [
        ({"preset": "paper"}, (), "whole", ""),
        ({"preset": "keras"}, (), "whole", ""),
        ({"preset": "same_grid"}, (), "whole", ""),
        ({"preset": "keras", "theta_padding": "same"}, (), "whole", ""),
        ({"preset": "paper", "theta_kernel": (1, 2), "theta_stride": (3, 2)}, (), "whole", ""),
        ({"preset": "paper", "theta_padding": "symmetric"}, (), "whole", ""),
        ({"preset": "same_grid"}, ("psi_norm",), "whole_logits", "psi's batch norm"),
        ({"preset": "same_grid"}, ("theta_norm",), "chain", "theta's batch norm"),
        ({"preset": "same_grid"}, ("phi_norm", "psi_norm"), "chain_logits", "phi's batch norm"),
        ({"preset": "same_grid", "phi_norm": "instance"}, (), "chain", "phi's instance norm"),
        ({"preset": "same_grid", "psi_norm": "group"}, (), "whole_logits", "psi's group norm"),
        ({"preset": "paper", "normaliser": "softmax"}, (), "whole_logits", "softmax"),
        ({"preset": "paper", "x_resize": "linear"}, (), "whole_logits", "x_resize='linear'"),
        ({"preset": "paper", "theta_kernel": 3}, (), "chain", "overlap"),
        (
            {"preset": "paper", "theta_kernel": 3, "theta_stride": 3, "theta_padding": "symmetric"},
            (),
            "chain",
            "padded",
        ),
        ({"preset": "paper", "phi_kernel": 2}, (), "chain", "phi isn't 1x1"),
        ({"preset": "paper", "phi_stride": 2}, (), "chain", "phi isn't 1x1"),
        ({"preset": "paper", "phi_tail_stride": 1, "normaliser": "range"}, (), "chain_logits", "transposed"),
        ({"preset": "paper"}, ("theta",), "chain", "theta has to run"),
        ({"preset": "paper"}, ("psi",), "apply", "psi has to run"),
        ({"preset": "paper", "combine": "multiply"}, (), "apply", "multiply"),
        ({"preset": "paper", "psi_channels": "in_channels"}, (), "eager", "one map"),
    ],
)
def test_fusion(fields, unfused, plan, reason):
    preset, overrides = fields["preset"], {k: v for k, v in fields.items() if k != "preset"}
    fusion = GateSpec.from_preset(preset, **overrides).fusion(unfused)
    assert fusion.plan == plan
    assert reason in fusion.reason and bool(reason) == bool(fusion.reason)


def test_every_preset_is_documented_by_its_difference():
    for fields in PRESETS.values():
        for name, value in fields.items():
            assert getattr(GateSpec(), name) != value, f"{name} is the default already"
