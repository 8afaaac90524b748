"""The same network in a Lightning loop; its checkpoint fits the network with and without fused gates.

    python examples/lightning_loop.py [--fast] [--synthetic]

Needs `pip install 'attn_gate[examples]'`.
"""

from __future__ import annotations

import tempfile

import pytorch_lightning as lightning
import torch
from before_after import print_before_after
from hippocampus_data import arguments, load_volumes, training_patches
from monai.losses import DiceCELoss
from monai.networks.nets import AttentionUnet
from torch import Tensor

import attn_gate


class Segmentation(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = AttentionUnet(
            spatial_dims=3, in_channels=1, out_channels=2, channels=(16, 32, 64, 128), strides=(2, 2, 2)
        )
        self.loss = DiceCELoss(to_onehot_y=True, softmax=True)

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        value = self.loss(self(batch["image"]), batch["label"])
        self.log("loss", value, prog_bar=True)
        return value

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main() -> None:
    args = arguments(__doc__).parse_args()
    size, steps = (32, 2) if args.fast else (48, 100)

    volumes = load_volumes(args.synthetic)
    print(volumes.source)
    batches = training_patches(volumes, size, steps)
    lightning.seed_everything(0)
    module = Segmentation()
    batch = next(iter(batches))
    print_before_after(module, module.loss, batch["image"], batch["label"], turns=2 if args.fast else 9)

    print(attn_gate.fuse_gates(module))  # before fit, so that Lightning's strategy sees the fused network
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="auto", devices=1, logger=False, enable_checkpointing=False
    )
    trainer.fit(module, batches)

    with tempfile.NamedTemporaryFile(suffix=".ckpt") as file:
        trainer.save_checkpoint(file.name, weights_only=True)
        plain = Segmentation.load_from_checkpoint(file.name, map_location="cpu", weights_only=True).eval()
    image = batch["image"]
    with torch.no_grad():
        difference = (module.cpu().eval()(image) - plain(image)).abs().max().item()
    print(f"the checkpoint in a network without fused gates: logits differ by {difference:.1e} at most")
    assert difference < 1e-3


if __name__ == "__main__":
    main()
