"""Trains MONAI's AttentionUnet, its gates fused, to find the hippocampus in 3D MRI.

    python examples/hippocampus.py                          # minutes on two cores
    python examples/hippocampus.py --fast                   # does it run here?
    torchrun --nproc-per-node 2 examples/hippocampus.py     # two processes, gradients averaged

Needs `pip install 'attn_gate[examples]'`. The MRI is fetched on the first run (see hippocampus_data.py). What
this network predicts says nothing about any person.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from before_after import print_before_after
from hippocampus_data import arguments, load_volumes, training_patches
from monai.losses import DiceCELoss
from monai.networks.nets import AttentionUnet
from picture import draw
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import attn_gate


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, help="training steps (default: 200, with --fast 2)")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder for picture and weights")
    args = parser.parse_args()
    size, steps = (32, 2) if args.fast else (48, 200)
    steps = args.steps or steps

    processes = int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets these
    rank = int(os.environ.get("RANK", 0))
    if processes > 1:
        dist.init_process_group("gloo")
    if rank > 0:
        dist.barrier()  # the first process fetches the data, and measures undisturbed
    volumes = load_volumes(args.synthetic)

    torch.manual_seed(0)
    net = AttentionUnet(
        spatial_dims=3, in_channels=1, out_channels=2, channels=(16, 32, 64, 128), strides=(2, 2, 2)
    )
    if torch.cuda.is_available():
        net.to(f"cuda:{rank % torch.cuda.device_count()}")
    device = next(net.parameters()).device
    loss = DiceCELoss(to_onehot_y=True, softmax=True)
    batches = training_patches(volumes, size, steps, seed=rank)
    if rank == 0:
        print(volumes.source)
        batch = next(iter(batches))
        image, label = batch["image"].to(device), batch["label"].to(device)
        print_before_after(net, loss, image, label, turns=2 if args.fast else 9)
        if processes > 1:
            dist.barrier()

    report = attn_gate.fuse_gates(net)
    model = DistributedDataParallel(net) if processes > 1 else net
    if rank == 0:
        print(report)
    train(model, batches, loss, device, talks=rank == 0)

    if processes > 1:
        weights = torch.nn.utils.parameters_to_vector(net.parameters())
        everybodys = [torch.empty_like(weights) for _ in range(processes)]
        dist.all_gather(everybodys, weights.detach())
        assert all(torch.equal(weights, other) for other in everybodys), "the processes have drifted apart"
        if rank == 0:
            print(f"all {processes} processes have the same weights")
    if rank == 0:
        show(net.cpu(), volumes, args.out)
    if processes > 1:
        dist.destroy_process_group()


def train(model: torch.nn.Module, batches, loss, device: torch.device, talks: bool) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=len(batches) + 1)
    model.train()
    start = time.perf_counter()
    for step, batch in enumerate(batches, start=1):
        optimizer.zero_grad()
        value = loss(model(batch["image"].to(device)), batch["label"].to(device))
        value.backward()
        optimizer.step()
        schedule.step()
        if talks and (step % 10 == 0 or step == len(batches)):
            seconds = time.perf_counter() - start
            print(f"step {step} of {len(batches)}, loss {value.item():.3f}, {seconds:.0f} s", flush=True)


def show(net: torch.nn.Module, volumes, out: Path) -> None:
    """Dice on the volume that training never saw, a picture of it, and the weights."""
    image, label = volumes.test["image"], volumes.test["label"]
    net.eval()
    with torch.no_grad(), attn_gate.capture_attention(net) as maps:
        prediction = net(image[None]).argmax(1)
    print(f"Dice on the third volume: {dice(prediction, label):.3f}")
    draw(out / "hippocampus.png", image[0], label[0], prediction[0], maps, volumes.source)
    attn_gate.unfuse_gates(net)
    torch.save(net.state_dict(), out / "hippocampus.pt")  # as of a network that was never fused
    print(f"wrote {out / 'hippocampus.png'} and {out / 'hippocampus.pt'}")


def dice(a: Tensor, b: Tensor) -> float:
    """2 |a ∩ b| / (|a| + |b|)."""
    return (2 * (a * b).sum() / (a.sum() + b.sum())).item()


if __name__ == "__main__":
    main()
