"""Run by test_works_with.py under torchrun: fused gates in DistributedDataParallel and FSDP2, and with
synchronised batch norms, by gloo.

Every process trains on its half of a batch; the result is compared with one process that takes all of it, by
networks that aren't fused.
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from foreign import GridGate, LeeGate, seasoned
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

import attn_gate
from attn_gate import patch


class Net(nn.Module):
    """Both kinds of gates; batch norms frozen, so that halves of a batch are independent."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, 2, 1)
        self.grid = seasoned(GridGate(3, 6))
        self.lee = seasoned(LeeGate(3, 3, 2))
        self.eval()

    def forward(self, x):
        y, alpha = self.grid(x, self.conv(x))
        return self.lee(g=y, x=x) * alpha


def losses(net, optimizer, x, steps=3):
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


def counted():
    calls, run = [], patch.FusedGate.run
    patch.FusedGate.run = lambda *args: calls.append(args[1]) or run(*args)
    return calls


def check(kind, calls):
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    net, x = Net(), torch.randn(4, 3, 9, 12)
    alone = copy.deepcopy(net)
    expected = losses(alone, torch.optim.SGD(alone.parameters(), 0.1), x)

    calls.clear()
    report = attn_gate.fuse_gates(net)
    assert list(report.fused) == ["grid", "lee"], report.skipped
    if kind == "ddp":
        wrapped = DistributedDataParallel(net)
    else:
        mesh = init_device_mesh("cpu", (world,))
        for gate in (net.grid, net.lee):
            fully_shard(gate, mesh=mesh)
        wrapped = fully_shard(net, mesh=mesh)
        assert isinstance(net.lee, LeeGate) and len(report.fused) == 2
    found = losses(wrapped, torch.optim.SGD(wrapped.parameters(), 0.1), x.chunk(world)[rank])
    dist.all_reduce(found)
    torch.testing.assert_close(found / world, expected, rtol=1e-5, atol=1e-6)
    assert len(calls) == 6, len(calls)

    state = net.state_dict()
    assert list(state) == list(alone.state_dict())
    for name, value in alone.state_dict().items():
        mine = state[name].full_tensor() if hasattr(state[name], "full_tensor") else state[name]
        torch.testing.assert_close(mine, value, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")

    assert attn_gate.unfuse_gates(net) == 2
    wrapped(x.chunk(world)[rank]).sum().backward()
    assert len(calls) == 6
    if kind == "fsdp2":
        late = attn_gate.fuse_gates(net)
        assert not late.fused and "before fully_shard" in late.skipped["lee"]


def synchronised(self, x):
    """What nn.SyncBatchNorm computes on a GPU; it takes no tensors on the CPU."""
    dims = (0, *range(2, x.ndim))
    sums = torch.stack(
        [x.sum(dims), x.square().sum(dims), torch.full_like(self.weight, x.numel() / x.shape[1])]
    )
    total, squares, n = all_reduce(sums)
    mean, var = total / n, squares / n - (total / n).square()
    with torch.no_grad():
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * n / (n - 1), self.momentum)
    wide = (1, -1, *[1] * (x.ndim - 2))
    scale = self.weight * torch.rsqrt(var + self.eps)
    return (x - mean.view(wide)) * scale.view(wide) + self.bias.view(wide)


def check_synchronised_batch_norms(calls):
    """Statistics of all processes: the norms are called, and nothing takes those of one process for them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    alone = seasoned(LeeGate(6, 6, 4)).train()
    gate = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(alone))
    x, g, slope = torch.randn(3, 4, 6, 9, 8).unbind()
    leaves = [t.clone().requires_grad_() for t in (g, x)]
    y = alone(*leaves)
    y.backward(slope)

    assert attn_gate.fuse_gates(gate, recompute=True).fused
    nn.SyncBatchNorm.forward, forward = synchronised, nn.SyncBatchNorm.forward
    calls.clear()
    mine = [t.chunk(world)[rank].clone().requires_grad_() for t in (g, x)]
    found = gate(*mine)
    found.backward(slope.chunk(world)[rank])
    nn.SyncBatchNorm.forward = forward
    assert len(calls) == 1
    part = [t.chunk(world)[rank] for t in (y, leaves[0].grad, leaves[1].grad)]
    torch.testing.assert_close([found, *[t.grad for t in mine]], part, rtol=1e-4, atol=1e-5)
    for p, q in zip(gate.parameters(), alone.parameters(), strict=True):
        dist.all_reduce(p.grad)
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(list(gate.buffers()), list(alone.buffers()))


def main():
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    calls = counted()
    for kind in ("ddp", "fsdp2"):
        check(kind, calls)
    check_synchronised_batch_norms(calls)
    print(f"rank {dist.get_rank()} of {dist.get_world_size()} done", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
