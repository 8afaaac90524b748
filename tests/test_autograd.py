"""Derivatives of every kind, and every way in which PyTorch calls the operators."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from attn_gate import AttentionGateFunction, functional, reference
from attn_gate._library import ops
from attn_gate.cases import LAYOUTS, OPERATORS, GateCase
from attn_gate.operators import ATTENTION_GATE
from attn_gate.operators import OPERATORS as DESCRIPTIONS

SAME = GateCase("same grid", (3, 4), (3, 4), channels=2, gating=3, inter=2)
RESIZED = GateCase(
    "resized", (5, 6), (3, 2), channels=2, gating=3, inter=2, kernel=2, stride=2, activation="silu"
)
ROW = GateCase("1D", (7,), (4,), channels=2, gating=2, inter=2, stride=2, activation="softplus")
VOLUME = GateCase("3D", (3, 4, 5), (2, 3, 2), channels=2, gating=2, inter=2, stride=2, activation="gelu")
CASES = (SAME, RESIZED, ROW, VOLUME)
MAPS = {"gate": 3, "gate_logits": 2, "attention_gate": 2, "attention_logits": 2, "apply_attention": 2}

in_all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
of_all_operators = pytest.mark.parametrize("operator", OPERATORS)


def draw(case, operator, dtype=torch.float64, layout="contiguous", requires_grad=True):
    """(our function, eager PyTorch's, tensors): functions of the tensors alone, in their order."""
    tensors = case.inputs(operator, dtype, layout)
    options = case.options(operator)

    def ours(*values, **more):
        return getattr(functional, operator)(**dict(zip(tensors, values, strict=True)), **options, **more)

    def eager(*values):
        return getattr(reference, operator)(**dict(zip(tensors, values, strict=True)), **options)

    return ours, eager, [t.requires_grad_(requires_grad) for t in tensors.values()]


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def loss(function):
    """A number that depends on all outputs, with gradients that aren't constant."""
    return lambda *values: sum(
        (output.to(torch.float64) ** 2).sum() for output in as_tuple(function(*values))
    )


def gradients(function, tensors, **options):
    return torch.autograd.grad(loss(function)(*tensors), tensors, **options)


def raw(case, operator, dtype=torch.float32, layout="contiguous", store=False):
    """(description of the registered operator, its arguments)"""
    description = next(
        op for op in DESCRIPTIONS if op.name == operator.replace("apply_attention", "gate_apply")
    )
    tensors = case.inputs(operator, dtype, layout)
    if "psi_weight" in tensors:
        tensors["psi_weight"] = tensors["psi_weight"].reshape(-1)
    if "bias" in tensors:  # the kernels take it before psi's
        tensors["psi_weight"], tensors["bias"] = tensors["bias"], tensors["psi_weight"]
    options = case.options(operator)
    if "stride" in options:
        options = {**options, "stride": [case.stride] * case.axes, "store": store}
    names = ("stride", "phi_resize", "alpha_resize", "activation", "store")
    return description, [*tensors.values()], [options[name] for name in names if name in options]


# ------------------------------------------------------------------------------------------------- numerical
# derivatives


@in_all_cases
@of_all_operators
def test_first_and_second_derivatives(case, operator):
    ours, _, tensors = draw(case, operator)
    torch.autograd.gradcheck(ours, tensors, fast_mode=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(ours, tensors, fast_mode=True)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("operator", ["attention_gate", "attention_logits"])
def test_stored_or_recomputed(operator, recompute):
    ours, _, tensors = draw(RESIZED, operator)
    torch.autograd.gradcheck(lambda *values: ours(*values, recompute=recompute), tensors, fast_mode=True)
    torch.autograd.gradgradcheck(lambda *values: ours(*values, recompute=recompute), tensors, fast_mode=True)


@in_all_cases
@of_all_operators
def test_forward_mode(case, operator):
    ours, eager, tensors = draw(case, operator, requires_grad=False)
    tangents = [torch.randn_like(t) for t in tensors]
    torch.autograd.gradcheck(
        ours,
        [t.requires_grad_() for t in tensors],
        fast_mode=True,
        check_forward_ad=True,
        check_backward_ad=False,
    )
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(tensors, tangents, strict=True)]
        found = [forward_ad.unpack_dual(o).tangent for o in as_tuple(ours(*duals))]
    assert_close(found, list(as_tuple(jvp(eager, tuple(tensors), tuple(tangents))[1])))


@of_all_operators
def test_third_derivative(operator):
    ours, eager, tensors = draw(RESIZED, operator)

    def third(function):
        values = tensors
        result = loss(function)(*values)
        for _ in range(3):
            first = torch.autograd.grad(result, values[0], create_graph=True)[0]
            result = (first**2).sum()
        return result

    assert_close(third(ours), third(eager))


@of_all_operators
def test_second_derivative_of_the_registered_operator(operator):
    op, tensors, options = raw(RESIZED, operator, torch.float64)
    tensors = [t.requires_grad_() for t in tensors]
    forward = getattr(ops, f"{op.name}_fwd")

    def ours(*values):
        return as_tuple(forward(*values, *options))[: op.outputs]

    torch.autograd.gradgradcheck(ours, tensors, fast_mode=True)


@of_all_operators
def test_registered_backward_refuses_to_be_differentiated(operator):
    op, arguments = backward_call(RESIZED, operator)
    arguments = [t.requires_grad_() if isinstance(t, torch.Tensor) else t for t in arguments]
    result = as_tuple(op(*arguments))[0]
    with pytest.raises(RuntimeError, match="no derivative of its own; differentiate attn_gate::"):
        result.sum().backward()


# ------------------------------------------------------------------------------------------ which gradients,
# what is kept


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("case", [SAME, RESIZED], ids=lambda case: case.name)
@of_all_operators
def test_gradients_of_any_subset(case, operator, recompute):
    ours, _, tensors = draw(case, operator)
    more = {"recompute": recompute} if operator.startswith("attention") else {}
    full = gradients(lambda *values: ours(*values, **more), tensors)
    for wanted in itertools.product([True, False], repeat=len(tensors)):
        values = [t.detach().requires_grad_(want) for t, want in zip(tensors, wanted, strict=True)]
        result = loss(lambda *v: ours(*v, **more))(*values)
        assert result.requires_grad == any(wanted)
        if any(wanted):
            result.backward()
        for value, want, expected in zip(values, wanted, full, strict=True):
            assert (value.grad is not None) == want
            if want:
                assert_close(value.grad, expected)


@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("case", [SAME, RESIZED], ids=lambda case: case.name)
@pytest.mark.parametrize("operator", ["gate", "attention_gate"])
def test_gradients_of_one_output(case, operator, output):
    """The gradient of the other is None then."""
    ours, eager, tensors = draw(case, operator)
    found, expected = (
        torch.autograd.grad(f(*tensors)[output].sum(), tensors, allow_unused=True, materialize_grads=True)
        for f in (ours, eager)
    )
    assert_close(found, expected)


def test_one_tensor_for_two_arguments():
    """Gated by itself: both gradients count, in the first and in the second derivative."""
    ours, eager, (x, _, theta_weight, *parameters) = draw(SAME, "attention_gate")
    parameters[0] = torch.randn_like(theta_weight).requires_grad_()
    tensors = [x, theta_weight, *parameters]

    def selfish(function):
        return lambda x, *parameters: function(x, x, *parameters)

    assert_close(gradients(selfish(ours), tensors), gradients(selfish(eager), tensors))
    torch.autograd.gradgradcheck(selfish(ours), tensors, fast_mode=True)


def test_expanded_gradients():
    """sum() and mean() hand an expanded number to backward."""
    ours, eager, tensors = draw(RESIZED, "attention_gate")
    found, expected = (torch.autograd.grad(f(*tensors)[0].mean(), tensors) for f in (ours, eager))
    assert_close(found, expected)


def test_two_calls_and_two_backward_passes():
    """Nothing is left over from one call to the next."""
    ours, _, tensors = draw(RESIZED, "attention_gate")
    other = [(2 * t + 1).detach().requires_grad_() for t in tensors]
    expected = [gradients(ours, tensors), gradients(ours, other)]
    results = [loss(ours)(*tensors), loss(ours)(*other)]
    for _ in range(2):
        found = [
            torch.autograd.grad(r, v, retain_graph=True)
            for r, v in zip(results, (tensors, other), strict=True)
        ]
        assert_close(found, expected, rtol=0, atol=0)


def saved_bytes(function, held):
    """Bytes that autograd keeps for backward beyond the memory of the tensors `held`."""
    kept, known = {}, {t.untyped_storage().data_ptr() for t in held}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = function()
    del outputs
    return sum(size for address, size in kept.items() if address not in known)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("resized", [False, True])
def test_only_alpha_is_kept(resized, dtype, layout):
    size, options = (((12, 16), (5, 8)) if resized else ((6, 8), (6, 8))), {"stride": 2} if resized else {}
    case = GateCase("", *size, batch=2, channels=8, gating=8, inter=4, **options)
    ours, eager, tensors = draw(case, "attention_gate", dtype, layout)
    alpha = 2 * 6 * 8 * 4
    recomputed = saved_bytes(lambda: ours(*tensors, recompute=True), tensors)
    stored = saved_bytes(lambda: ours(*tensors, recompute=False), tensors)
    assert recomputed == alpha
    assert stored == alpha + 4 * 2 * 6 * 8 * dtype.itemsize
    assert stored <= saved_bytes(lambda: eager(*tensors), tensors)


def test_nothing_is_kept_without_gradients():
    ours, _, tensors = draw(SAME, "attention_gate", requires_grad=False)
    assert saved_bytes(lambda: ours(*tensors, recompute=False), []) == 0
    with torch.no_grad():
        _, _, tensors = draw(SAME, "attention_gate")
        assert not ours(*tensors)[0].requires_grad


@pytest.mark.parametrize("layout", LAYOUTS)
@in_all_cases
@of_all_operators
def test_inputs_are_never_written(case, operator, layout):
    ours, _, tensors = draw(case, operator, layout=layout)
    copies, versions = [t.detach().clone() for t in tensors], [t._version for t in tensors]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append((t, t.clone())) or t, lambda t: t):
        result = loss(ours)(*tensors)
    slopes = torch.autograd.grad(result, tensors, retain_graph=True)
    torch.autograd.grad(result, tensors, create_graph=True)
    assert [t._version for t in tensors] == versions
    assert_close([t.detach() for t in tensors], copies, rtol=0, atol=0)
    for t, copy in saved:
        assert_close(t, copy, rtol=0, atol=0, equal_nan=True)
    assert len({t.untyped_storage().data_ptr() for t in slopes}) == len(
        slopes
    )  # no two gradients share memory


def test_writing_to_an_input_before_backward_is_noticed():
    ours, _, tensors = draw(SAME, "attention_gate")
    result = loss(ours)(*tensors)
    with torch.no_grad():
        tensors[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


# ------------------------------------------------------------------------------------------------ registered
# operators


def backward_call(case, operator, layout="contiguous", store=False):
    """The registered backward operator of this one, and arguments for it."""
    op, tensors, options = raw(case, operator, layout=layout, store=store)
    results = as_tuple(getattr(ops, f"{op.name}_fwd")(*tensors, *options))
    slopes = [torch.randn_like(r) for r in results[: op.outputs]]
    arguments = op.backward_arguments(slopes, tensors, [results[i] for i in op.kept], options)
    return getattr(ops, f"{op.name}_bwd").default, [*arguments, (1 << op.tensors) - 1]


@pytest.mark.parametrize(
    "case,layout,store",
    [(SAME, "contiguous", False), (VOLUME, "channels_last", True), (RESIZED, "channels_last", False)],
    ids=["same grid", "3D", "resized"],
)
@of_all_operators
def test_opcheck(case, operator, layout, store):
    op, tensors, options = raw(case, operator, layout=layout, store=store)
    forward = getattr(ops, f"{op.name}_fwd").default
    torch.library.opcheck(forward, (*[t.requires_grad_() for t in tensors], *options))
    backward, arguments = backward_call(case, operator, layout, store)
    torch.library.opcheck(backward, tuple(arguments))


def test_opcheck_without_optional_tensors():
    case = GateCase("", (4, 5), (2, 3), bias=False, psi_bias=False, phi=False)
    for operator in ("gate", "gate_logits", "attention_gate"):
        tensors = case.inputs(operator)
        weight = tensors["psi_weight"].reshape(-1)
        if operator == "attention_gate":
            maps = [tensors[name] for name in ("x", "g", "theta_weight", "phi_weight")]
            arguments = (*maps, None, weight, None, [1, 1], "linear", "linear", "relu", True)
        else:
            maps = [tensors[name] for name in ("x", "theta") if name in tensors]
            modes = ("linear", "linear", "relu")[-len(maps) - 1 :]
            arguments = (*maps, None, weight, None, *modes)
        torch.library.opcheck(getattr(ops, f"{operator}_fwd").default, arguments)


# ----------------------------------------------------------------------------------------------- compile and
# export


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def same(found, expected, strides=True):
    assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not strides or [t.stride() for t in found] == [t.stride() for t in expected]


@pytest.mark.parametrize(
    "case,dynamic,layout",
    [
        (RESIZED, False, "contiguous"),
        (RESIZED, True, "channels_last"),
        (VOLUME, False, "channels_last"),
        (ROW, True, "contiguous"),
    ],
    ids=lambda value: value.name if isinstance(value, GateCase) else str(value),
)
@of_all_operators
def test_compile(case, operator, dynamic, layout):
    ours, _, tensors = draw(case, operator, torch.float32, layout)
    fast = compiled(ours, dynamic=dynamic)
    same(as_tuple(fast(*tensors)), as_tuple(ours(*tensors)))
    same(gradients(fast, tensors), gradients(ours, tensors))


def test_compile_for_any_size():
    def function(x, g, theta_weight, phi_weight, psi_weight):
        return functional.attention_gate(x, g, theta_weight, phi_weight, psi_weight, stride=2)

    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    fast = torch.compile(function, fullgraph=True, dynamic=True, backend=frames)
    for n in (
        14,
        16,
        19,
        24,
    ):  # no size equal to a number of channels: the compiler takes equal numbers for one
        case = GateCase("", (n, n + 3), (n - 1, n + 1), batch=n // 2, kernel=2, stride=2)
        tensors = [t for t in case.inputs("attention_gate").values() if t.ndim > 1]
        tensors = [t.requires_grad_() for t in tensors]
        same(as_tuple(fast(*tensors)), as_tuple(function(*tensors)))
        same(gradients(fast, tensors), gradients(function, tensors))
    assert frames.frame_count == 1


def test_compile_with_inductor():
    ours, _, tensors = draw(RESIZED, "attention_gate", torch.float32, "channels_last")
    torch._dynamo.reset()
    fast = torch.compile(ours, fullgraph=True)
    same(as_tuple(fast(*tensors)), as_tuple(ours(*tensors)))
    same(gradients(fast, tensors), gradients(ours, tensors))


def test_compiled_second_derivative_is_refused():
    ours, _, tensors = draw(RESIZED, "attention_gate", torch.float32)
    with pytest.raises(RuntimeError):
        first = gradients(compiled(ours), tensors, create_graph=True)
        torch.autograd.grad(sum(g.sum() for g in first), tensors)


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_compiled_transforms(transform):
    ours, _, tensors = draw(RESIZED, "attention_gate", torch.float32, requires_grad=False)
    if transform == "grad":
        function = grad(loss(ours), argnums=tuple(range(len(tensors))))
    elif transform == "jvp":
        function = lambda *values: jvp(ours, values, values)[1]  # noqa: E731
    else:
        function = vmap(ours, in_dims=(0, 0, *[None] * (len(tensors) - 2)))
        tensors[:2] = (torch.stack([t, 2 * t]) for t in tensors[:2])
    same(compiled(function)(*tensors), function(*tensors), strides=False)


class Net(nn.Module):
    def __init__(self, tensors):
        super().__init__()
        self.parameters_of_gate = nn.ParameterList([nn.Parameter(t.detach().clone()) for t in tensors[2:]])

    def forward(self, x, g):
        return functional.attention_gate(x, g, *self.parameters_of_gate, stride=2, activation="silu")


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_export_and_train_what_was_exported(strict, dynamic):
    _, _, tensors = draw(RESIZED, "attention_gate", torch.float32, requires_grad=False)
    net, (x, g) = Net(tensors), tensors[:2]
    any_size = {0: torch.export.Dim("batch"), 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    shapes = {"x": any_size, "g": any_size} if dynamic else None
    program = torch.export.export(net, (x, g), dynamic_shapes=shapes, strict=strict)
    assert ops.attention_gate_fwd.default in {node.target for node in program.graph.nodes}
    exported = program.module()
    if dynamic:
        x, g = torch.randn(3, 2, 9, 8), torch.randn(3, 3, 4, 7)
    for _ in range(3):
        assert_close(exported(x, g), net(x, g))
        for module in (net, exported):
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            optimizer.zero_grad()
            loss(module)(x, g).backward()
            optimizer.step()
    assert_close(list(exported.parameters()), list(net.parameters()), check_stride=False)
    assert not torch.equal(tensors[2], net.parameters_of_gate[0])


def test_the_public_function():
    """AttentionGateFunction is the whole gate's autograd function: eager, differentiated twice, compiled."""
    op, tensors, options = raw(RESIZED, "attention_gate", torch.float64)
    assert op is ATTENTION_GATE and issubclass(AttentionGateFunction, torch.autograd.Function)
    tensors = [t.requires_grad_() for t in tensors]

    def function(*values):
        return AttentionGateFunction.apply(*values, *options)[:2]

    torch.autograd.gradcheck(function, tensors, fast_mode=True)
    torch.autograd.gradgradcheck(function, tensors, fast_mode=True)
    same(gradients(compiled(function), tensors), gradients(function, tensors))


# ------------------------------------------------------------------------------------------------ torch.func


@pytest.mark.parametrize("case", [SAME, RESIZED, ROW], ids=lambda case: case.name)
@of_all_operators
def test_torch_func(case, operator):
    ours, eager, tensors = draw(case, operator, requires_grad=False)
    every = tuple(range(len(tensors)))
    tangents = tuple(torch.randn_like(t) for t in tensors)
    for transform in (
        lambda f: grad(loss(f), argnums=every)(*tensors),
        lambda f: hessian(loss(f))(*tensors),
        lambda f: jacrev(f)(*tensors),
        lambda f: jacfwd(f, argnums=1)(*tensors),
        lambda f: jvp(f, tuple(tensors), tangents),
        lambda f: jvp(grad(loss(f)), tuple(tensors), tangents),
    ):
        assert_close(transform(ours), transform(eager))


@pytest.mark.parametrize("case", [SAME, RESIZED, ROW], ids=lambda case: case.name)
@of_all_operators
def test_vmap(case, operator):
    ours, eager, tensors = draw(case, operator, requires_grad=False)
    count, maps = len(tensors), MAPS[operator]
    many = [torch.stack([t, 2 * t, -t], dim=1) for t in tensors]

    def check(mapped):
        values = [m if i in mapped else t for i, (m, t) in enumerate(zip(many, tensors, strict=True))]
        dims = tuple(1 if i in mapped else None for i in range(count))
        assert_close(vmap(ours, dims)(*values), vmap(eager, dims)(*values))

        values = [v.clone().requires_grad_() for v in values]
        assert_close(gradients(vmap(ours, dims), values), gradients(vmap(eager, dims), values))

        twice = [
            torch.stack([v.detach(), v.detach() + 1], dim=1) if i in mapped else v
            for i, v in enumerate(values)
        ]
        nested = [vmap(vmap(f, dims), dims)(*twice) for f in (ours, eager)]
        assert_close(*nested)

    check(range(count))
    check(range(maps))
    check([0])
    check([count - 1])


@of_all_operators
def test_gradients_of_each_sample(operator):
    if operator == "apply_attention":
        pytest.skip("no parameters")
    ours, eager, tensors = draw(RESIZED, operator, requires_grad=False)
    maps, parameters = tensors[: MAPS[operator]], tensors[MAPS[operator] :]

    def each(function):
        def of_sample(maps, parameters):
            return loss(function)(*[t[None] for t in maps], *parameters)

        return vmap(grad(of_sample, argnums=1), in_dims=(0, None))(maps, parameters)

    found = each(ours)
    assert_close(found, each(eager))
    assert found[0].shape == (2, *parameters[0].shape)


def test_functional_call_with_other_parameters():
    _, _, tensors = draw(RESIZED, "attention_gate", requires_grad=False)
    net = Net(tensors).double()
    other = {name: torch.randn_like(p) for name, p in net.named_parameters()}

    def function(parameters):
        return loss(lambda x, g: functional_call(net, parameters, (x, g)))(*tensors[:2])

    found = grad(function)(other)
    net.load_state_dict(other)
    loss(net)(*tensors[:2]).backward()
    assert_close(found, {name: p.grad for name, p in net.named_parameters()})


# -------------------------------------------------------------------------------------------- checkpointing,
# autocast


@pytest.mark.parametrize("reentrant", [True, False])
@of_all_operators
def test_checkpoint(operator, reentrant):
    ours, _, tensors = draw(RESIZED, operator)
    expected = gradients(ours, tensors)
    checkpoint(loss(ours), *tensors, use_reentrant=reentrant).backward()
    assert_close([t.grad for t in tensors], list(expected), rtol=0, atol=0)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@of_all_operators
def test_autocast(operator, dtype, compile):
    """Maps are rounded to autocast's dtype and nothing else, where they are small: the same as calling with
    rounded maps."""
    ours, _, tensors = draw(RESIZED, operator, torch.float32)
    rounded = [t.to(dtype) if i < MAPS[operator] else t for i, t in enumerate(tensors)]
    if operator == "apply_attention":
        rounded[1] = tensors[1]  # alpha is no map of features
    expected = as_tuple(ours(*rounded))
    slopes = torch.autograd.grad(sum(o.double().sum() for o in expected), tensors)
    function = compiled(ours) if compile else ours
    with torch.autocast("cpu", dtype):
        found = as_tuple(function(*tensors))
    assert [o.dtype for o in found] == [o.dtype for o in expected]
    assert ("logits" in operator) == (found[0].dtype == torch.float32)
    found_slopes = torch.autograd.grad(sum(o.double().sum() for o in found), tensors)
    assert all(slope.dtype == torch.float32 for slope in found_slopes)
    assert_close(found, expected, rtol=0, atol=0)
    assert_close(found_slopes, slopes, rtol=0, atol=0)


@pytest.mark.parametrize("pays", [True, False])
@pytest.mark.parametrize("operator", ["attention_gate", "attention_logits"])
def test_autocast_rounds_weights_where_bfloat16_pays(operator, pays, monkeypatch):
    """Whose gradients stay float32's."""
    monkeypatch.setattr(functional, "_BFLOAT16_PAYS", pays)
    large = GateCase("", (64, 64), (64, 64), channels=16, gating=16, inter=8)
    ours, _, tensors = draw(large, operator, torch.float32)

    def run(*tensors):
        outputs = as_tuple(ours(*tensors))
        return [*outputs, *torch.autograd.grad(sum(o.double().sum() for o in outputs), tensors)]

    with torch.autocast("cpu", torch.bfloat16):
        found = run(*tensors)
    count = 4 if pays else 2
    rounded = [t.detach().bfloat16() if i < count else t.detach() for i, t in enumerate(tensors)]
    # weights as float32 tensors of rounded numbers: their gradients aren't rounded
    expected = run(*[(t.float() if 2 <= i < 4 else t).requires_grad_() for i, t in enumerate(rounded)])
    assert found[-len(tensors) + 2].dtype == torch.float32
    assert_close([t.float() for t in found], [t.float() for t in expected], rtol=0, atol=0)
    double = [t.double() if i in (2, 3) else t for i, t in enumerate(tensors)]
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.round_weight(rounded[0], double[2]) is double[2]


def test_autocast_leaves_double_alone_and_reaches_convolutions():
    ours, _, tensors = draw(RESIZED, "attention_gate")
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(ours(*tensors), ours(*tensors), rtol=0, atol=0)
        assert ours(*tensors)[0].dtype == torch.float64
    padded = GateCase("", (6, 7), (3, 4), kernel=3).inputs("attention_gate")
    with torch.autocast("cpu", torch.bfloat16):
        y, alpha = functional.attention_gate(**padded, padding=1)
    assert (y.dtype, alpha.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gradients_have_the_dtypes_of_what_they_belong_to(dtype):
    """Parameters may be in the maps' dtype or in float32."""
    for parameters in (dtype, torch.float32):
        ours, _, tensors = draw(RESIZED, "attention_gate", dtype)
        tensors = [*tensors[:2], *[t.detach().to(parameters).requires_grad_() for t in tensors[2:]]]
        assert [g.dtype for g in gradients(ours, tensors)] == [t.dtype for t in tensors]
