"""Fused gates with what people use beside them; most on MONAI's AttentionUnet as it is."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from foreign import GridGate, LeeGate, seasoned
from monai.data import MetaTensor
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.networks.nets import AttentionUnet
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import attn_gate

pytestmark = pytest.mark.filterwarnings("ignore")  # deprecations of torch.jit, of quantisation, of MONAI


def unet(dims=2, training=False):
    torch.manual_seed(0)
    net = AttentionUnet(dims, 1, 2, channels=(4, 8, 16), strides=(2, 2))
    return seasoned(net).train(training)


def image(dims=2, n=2, size=16):
    return torch.randn(n, 1, *[size] * dims, generator=torch.Generator().manual_seed(1))


def both(dims=2, training=False):
    """The network as it was, and a fused copy; in training mode by moments, though its maps are small."""
    net = unet(dims, training)
    fused = copy.deepcopy(net)
    assert len(attn_gate.fuse_gates(fused, recompute=True if training else "auto").fused) == 2
    return net, fused


def operators(graph_module):
    """Names of the fused operators in a graph."""
    nodes = [n for m in graph_module.modules() if hasattr(m, "graph") for n in m.graph.nodes]
    return sorted({str(n.target).split(".")[1] for n in nodes if "attn_gate" in str(n.target)})


# ---- compilers and exporters


@pytest.mark.parametrize("dims,training", [(2, False), (3, True)])
def test_compile_without_graph_breaks(dims, training):
    net, fused = both(dims, training)
    x = image(dims)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    expected = net(x)
    torch.compiler.reset()
    found = torch.compile(fused, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(found, expected)
    assert len(graphs) == 1 and operators(graphs[0])


@pytest.mark.parametrize("kind", [LeeGate, GridGate])
def test_compiled_dynamic_shapes_and_hooks_that_come_later(kind):
    gate = seasoned(LeeGate(6, 6, 4) if kind is LeeGate else GridGate(6, 6)).eval()
    fused = copy.deepcopy(gate)
    attn_gate.fuse_gates(fused)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(operators(graph))
        return graph

    torch.compiler.reset()
    compiled = torch.compile(fused, backend=backend, dynamic=True)
    with torch.no_grad():
        for size in (16, 24, 20):
            x, g = torch.randn(2, 6, size, size), torch.randn(2, 6, size // 2, size // 2)
            args = (x, x) if kind is LeeGate else (x, g)
            torch.testing.assert_close(compiled(*args), gate(*args))
        assert len(graphs) == 1 and graphs[0]
        seen = []
        fused.psi.register_forward_hook(lambda module, args, output: seen.append(output))
        torch.compiler.reset()  # PyTorch doesn't look at hooks again in what it has compiled
        torch.testing.assert_close(compiled(*args), gate(*args))
    assert len(seen) == 1


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_inductor(training):
    gates = [seasoned(LeeGate(6, 6, 4)).train(training) for _ in range(2)]
    gates[1].load_state_dict(gates[0].state_dict())
    attn_gate.fuse_gates(gates[1], recompute=True)
    x, g = torch.randn(2, 6, 16, 16), torch.randn(2, 6, 16, 16)
    results = []
    for gate in (gates[0], torch.compile(gates[1], fullgraph=True)):
        y = gate(g, x)
        grads = torch.autograd.grad(y.square().sum(), list(gate.parameters()))
        results.append([y, *grads, *[b for b in gate.buffers() if b.is_floating_point()]])
    # The biases in front of norms in training mode have gradients of 0, up to rounding.
    scale = max(t.abs().max().item() for t in results[0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6 * scale)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_export(strict):
    net, fused = both()
    batch, side = torch.export.Dim("batch", min=2, max=8), torch.export.Dim("side", min=2, max=16)
    program = torch.export.export(
        fused, (image(),), dynamic_shapes=({0: batch, 2: 4 * side, 3: 4 * side},), strict=strict
    )
    assert operators(program.graph_module) == ["attention_gate_fwd"]
    module = program.module()
    for size in (16, 24):
        torch.testing.assert_close(module(x := image(n=3, size=size)), net(x))
    torch.export.save(program, buffer := io.BytesIO())
    loaded = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    torch.testing.assert_close(loaded(x), net(x))


@pytest.mark.slow
def test_aot_inductor(tmp_path):
    net, fused = both()
    x = image()
    with torch.no_grad():
        program = torch.export.export(fused, (x,))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "net.pt2"))
        torch.testing.assert_close(
            torch._inductor.aoti_load_package(package)(x), net(x), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("dims", [2, 3])
def test_onnx(dims, dynamo):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    if dynamo:
        pytest.importorskip("onnxscript")
    net, fused = both(dims)
    x = image(dims)
    with torch.no_grad():
        expected = net(x)
        torch.onnx.export(fused, (x,), buffer := io.BytesIO(), dynamo=dynamo, verbose=False)
    graph = onnx.load_from_string(buffer.getvalue())
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"}  # the standard's operators only
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-4, atol=1e-4)
    assert len(attn_gate.fuse_gates(fused).fused) == 2


def test_onnx_of_attention_gate_and_of_the_authors_gate():
    onnxruntime = pytest.importorskip("onnxruntime")
    x, g = torch.randn(1, 6, 8, 8), torch.randn(1, 8, 4, 4)
    theirs = seasoned(GridGate(6, 8)).eval()
    attn_gate.fuse_gates(theirs)
    for gate in (attn_gate.AttentionGate(6, 8), theirs):
        with torch.no_grad():
            expected = gate(x, g)
            torch.onnx.export(gate, (x, g), buffer := io.BytesIO(), dynamo=False, input_names=["x", "g"])
        session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
        found = session.run(None, {"x": x.numpy(), "g": g.numpy()})
        expected = expected if isinstance(expected, tuple) else (expected,)
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.as_tensor(f), e, rtol=1e-4, atol=1e-4)


def test_scripting_and_tracing_give_the_original_network(runs):
    net, fused = both()
    x = image()
    scripted, traced = torch.jit.script(fused), torch.jit.trace(fused, x, check_trace=False)
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    for module in (scripted, traced, torch.jit.load(io.BytesIO(buffer.getvalue()))):
        torch.testing.assert_close(module(x), net(x))
        graph = module.graph.str(print_source_ranges=False)  # else the folder's name is in it
        assert "attn_gate" not in graph and list(module.state_dict()) == list(net.state_dict())
    assert not runs
    fused(x)
    assert len(runs) == 2  # the network itself is still fused


# ---- training


def test_autocast_and_grad_scaler(runs):
    net, fused = both(training=True)
    x, target = image(), torch.randint(0, 2, (2, 1, 16, 16))
    trained = []
    for model in (net, fused):
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x).float(), target[:, 0])
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        trained.append(losses)
    assert len(runs) == 8 and trained[1][-1] < trained[1][0]
    assert trained[1] == pytest.approx(trained[0], rel=0.05)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_activation_checkpointing(reentrant, training, runs):
    gates = [seasoned(LeeGate(6, 6, 4)).train(training) for _ in range(2)]
    gates[1].load_state_dict(gates[0].state_dict())
    attn_gate.fuse_gates(gates[1], recompute=True)
    x, g = torch.randn(2, 6, 7, 9), torch.randn(2, 6, 7, 9)
    results = []
    for gate in gates:
        leaves = [x.clone().requires_grad_(), g.clone().requires_grad_()]
        y = checkpoint(gate, leaves[1], leaves[0], use_reentrant=reentrant)
        y.square().sum().backward()
        results.append([y, *[t.grad for t in leaves], *[p.grad for p in gate.parameters()]])
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)
    assert runs == [gates[1]] * 2  # once forward, once recomputed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training,recompute", [(False, "auto"), (True, True), (True, False)])
def test_autocast_of_a_network_in_16_bit(training, recompute, dtype, runs):
    gate = seasoned(LeeGate(16, 16, 8)).train(training).to(dtype)
    fused = copy.deepcopy(gate)
    attn_gate.fuse_gates(fused, recompute=recompute)
    for size in (8, 24):
        x, g = (torch.randn(1, 16, size, size).to(dtype) for _ in range(2))
        with torch.autocast("cpu", dtype):
            expected, found = gate(g, x), fused(g, x)
        assert found.dtype == expected.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=0.1)
    assert len(runs) == 2


@pytest.mark.parametrize("fuse", [False, True])
def test_copies_made_while_maps_are_captured(fuse):
    """The maps are those of the model alone, then and later."""
    model = unet() if fuse else attn_gate.AttentionUNet(2, 1, 1, (4, 8, 8)).eval()
    if fuse:
        attn_gate.fuse_gates(model)
    x = image()
    with attn_gate.capture_attention(model) as maps:
        model(x)
        kept = dict(maps)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for other in copies:
            other(2 * x)
    for other in copies:
        other(3 * x)
        pickle.dumps(other)
    assert len(kept) == 2 and all(maps[name] is kept[name] for name in kept)


def test_moving_averages():
    net, fused = both(training=True)
    average = AveragedModel(fused, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    optimizer = torch.optim.SGD(fused.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        fused(image()).square().mean().backward()
        optimizer.step()
        average.update_parameters(fused)
    average.eval()
    expected = copy.deepcopy(net).eval()
    expected.load_state_dict(average.module.state_dict())
    torch.testing.assert_close(average(image()), expected(image()))
    assert attn_gate.unfuse_gates(average) == 2


def test_conversion_to_synchronised_batch_norms():
    """In place, after fusing; without a process group they are batch norms."""
    net, fused = both(training=True)
    report = attn_gate.fuse_gates(fused)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    assert isinstance(converted.model[1].attention.psi[1], nn.SyncBatchNorm) and len(report.fused) == 2
    x = image()
    torch.testing.assert_close(converted(x), net(x))
    for (name, b), c in zip(net.named_buffers(), converted.buffers(), strict=True):
        torch.testing.assert_close(c, b, msg=lambda m, name=name: f"{name}: {m}")
    converted.eval()
    net.eval()
    torch.testing.assert_close(converted(x), net(x))
    assert len(attn_gate.fuse_gates(converted).fused) == 2  # also when it comes first


def test_two_processes_of_torchrun():
    """DistributedDataParallel, FSDP2 and SyncBatchNorm; see distributed_worker.py."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command.append(str(Path(__file__).with_name("distributed_worker.py")))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("of 2 done") == 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_quantised_gates_are_left_alone(when, runs):
    from torch.ao import quantization

    def quantised(net):
        net.qconfig = quantization.get_default_qconfig("fbgemm")
        prepared = quantization.prepare(net)
        prepared(*inputs)
        return quantization.convert(prepared)

    class Wrapped(nn.Module):
        def __init__(self, gate):
            super().__init__()
            self.x, self.g, self.gate = quantization.QuantStub(), quantization.QuantStub(), gate
            self.out = quantization.DeQuantStub()

        def forward(self, g, x):
            return self.out(self.gate.W_x(self.x(x))) + self.out(self.gate.W_g(self.g(g)))

    inputs = torch.randn(2, 6, 8, 8), torch.randn(2, 6, 8, 8)
    gate = seasoned(LeeGate(6, 6, 4)).eval()
    if when == "before":
        report = attn_gate.fuse_gates(gate)
    net = quantised(Wrapped(gate))
    if when == "after":
        report = attn_gate.fuse_gates(net)
    assert net(*inputs).shape == (2, 4, 8, 8)
    late = attn_gate.fuse_gates(net)
    assert not late.fused and "torch.ao.nn.quantized.modules.conv.Conv2d" in late.skipped["gate"] and not runs
    assert len(report.fused) == (when == "before")  # prepare made a copy


def test_functional_call_and_ensembles():
    net, fused = both()
    x = image()
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(model):
        return lambda parameters: torch.func.functional_call(model, parameters, (x,)).square().mean()

    found, expected = (torch.func.grad(loss(model))(parameters) for model in (fused, net))
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    ensemble = {name: torch.stack([p, 1.1 * p]) for name, p in parameters.items()}
    torch.testing.assert_close(torch.func.vmap(loss(fused))(ensemble), torch.func.vmap(loss(net))(ensemble))


# ---- MONAI and Lightning


@pytest.mark.parametrize("dims", [2, 3])
def test_sliding_window_inference(dims, runs):
    net, fused = both(dims)
    scan = image(dims, n=1, size=28)
    arguments = {"roi_size": (16,) * dims, "sw_batch_size": 2, "overlap": 0.25, "mode": "gaussian"}
    with torch.no_grad():
        expected = sliding_window_inference(scan, predictor=net, **arguments)
        torch.testing.assert_close(sliding_window_inference(scan, predictor=fused, **arguments), expected)
    assert runs


def test_meta_tensors_keep_their_affine(runs):
    net, fused = both(3)
    scan = MetaTensor(image(3), affine=torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0])))
    gate, block = net.model[1].attention, fused.model[1].attention
    g, x = (MetaTensor(torch.randn(2, 4, 6, 6, 6), affine=scan.affine) for _ in range(2))
    expected, found = gate(g=g, x=x), block(g=g, x=x)
    assert type(found) is type(expected) is MetaTensor and torch.equal(found.affine, scan.affine)
    torch.testing.assert_close(found.as_tensor(), expected.as_tensor())
    torch.testing.assert_close(fused(scan).as_tensor(), net(scan).as_tensor())
    assert len(runs) == 3


def test_a_loop_of_monai(runs):
    net, fused = both(training=True)
    x, target = image(), torch.randint(0, 2, (2, 1, 16, 16))
    trained = []
    for model in (net, fused):
        loss_function, losses = DiceCELoss(to_onehot_y=True, softmax=True), []
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for _ in range(3):
            optimizer.zero_grad()
            loss = loss_function(model(x), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        trained.append(losses)
    assert trained[1] == pytest.approx(trained[0], rel=1e-3) and len(runs) == 6


def test_a_lightning_trainer(tmp_path, runs):
    lightning = pytest.importorskip("pytorch_lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.losses = unet(training=True), []

        def training_step(self, batch, index):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.05)

    def fit(module):
        data = torch.utils.data.TensorDataset(image(n=6), torch.arange(6 * 256).view(6, 16, 16) % 2)
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2))
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return module.losses

    expected = fit(Module())
    fused = Module()
    attn_gate.fuse_gates(fused, recompute=True)  # its maps are small
    assert fit(fused) == pytest.approx(expected, rel=1e-3) and len(runs) == 12
    loaded = Module.load_from_checkpoint(tmp_path / "last.ckpt")  # one that was never fused
    torch.testing.assert_close(loaded.eval().net(image()), fused.eval().net(image()))
