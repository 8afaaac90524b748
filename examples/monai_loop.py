"""The same network in a loop of MONAI's parts: transforms, sliding-window inference, Dice metric.

    python examples/monai_loop.py [--fast] [--synthetic]

Needs `pip install 'attn_gate[examples]'`.
"""

from __future__ import annotations

import torch
from before_after import print_before_after
from hippocampus_data import arguments, load_volumes, training_patches
from monai.data import decollate_batch
from monai.inferers import SlidingWindowInferer
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.networks.nets import AttentionUnet
from monai.transforms import AsDiscrete
from monai.utils import set_determinism

import attn_gate


def main() -> None:
    args = arguments(__doc__).parse_args()
    size, steps = (32, 2) if args.fast else (48, 100)

    volumes = load_volumes(args.synthetic)
    print(volumes.source)
    set_determinism(0)
    net = AttentionUnet(
        spatial_dims=3, in_channels=1, out_channels=2, channels=(16, 32, 64, 128), strides=(2, 2, 2)
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net.to(device)
    loss = DiceCELoss(to_onehot_y=True, softmax=True)
    batches = training_patches(volumes, size, steps)
    batch = next(iter(batches))
    image, label = batch["image"].to(device), batch["label"].to(device)
    print_before_after(net, loss, image, label, turns=2 if args.fast else 9)
    print(attn_gate.fuse_gates(net))

    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    net.train()
    for step, batch in enumerate(batches, start=1):
        optimizer.zero_grad()
        value = loss(net(batch["image"].to(device)), batch["label"].to(device))
        value.backward()
        optimizer.step()
        if step % 10 == 0 or step == steps:
            print(f"step {step} of {steps}, loss {value.item():.3f}", flush=True)

    windows = SlidingWindowInferer(roi_size=(size,) * 3, sw_batch_size=4, overlap=0.25, mode="gaussian")
    metric = DiceMetric(include_background=False)
    discrete = AsDiscrete(argmax=True, to_onehot=2), AsDiscrete(to_onehot=2)
    net.eval()
    with torch.no_grad():
        logits = windows(volumes.test["image"][None].to(device), net).cpu()
    for each in zip(decollate_batch(logits), [volumes.test["label"]], strict=True):
        metric([discrete[0](each[0])], [discrete[1](each[1])])
    print(f"Dice on the third volume, by sliding windows of {size}³: {metric.aggregate().item():.3f}")


if __name__ == "__main__":
    main()
