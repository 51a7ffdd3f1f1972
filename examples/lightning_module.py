"""Train a Mask2Former of Transformers in a Lightning module, and log every term of its loss.

    python lightning_module.py --images train2017 --annotations instances_train2017.json

Needs `pip install "maskloss[coco,transformers]" lightning pillow`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import lightning
import torch
from coco_folder import CocoFolder, collate
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Mask2FormerForUniversalSegmentation

from maskloss.integrations.transformers import patch


class Segmenter(lightning.LightningModule):
    """A Mask2Former whose loss maskloss computes.

    Args:
        model: a checkpoint's name or folder.
        names: of the classes.
        rate: learning rate.
    """

    def __init__(self, model: str, names: Sequence[str], rate: float = 5e-5) -> None:
        super().__init__()
        self.model = Mask2FormerForUniversalSegmentation.from_pretrained(
            model,
            id2label=dict(enumerate(names)),
            label2id={name: label for label, name in enumerate(names)},
            ignore_mismatched_sizes=True,
        )
        self.rate = rate
        patch(self.model)
        self.model.criterion.register_forward_hook(self._log_terms)

    def training_step(self, batch: dict[str, Any], _: int) -> Tensor:
        """Compute the loss of a batch."""
        loss: Tensor = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True, batch_size=len(batch["pixel_values"]))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=self.rate, weight_decay=0.05)

    def _log_terms(self, _: torch.nn.Module, __: Any, losses: dict[str, Tensor]) -> None:
        # Copies: the model goes on to multiply the terms by their weights, in place.
        self.log_dict({name: value.detach().clone() for name, value in losses.items()}, batch_size=1)


def main(arguments: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Train; the logged values of the last step are the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", required=True, help="folder of the images")
    parser.add_argument("--annotations", required=True, help="COCO annotation file")
    parser.add_argument("--model", default="facebook/mask2former-swin-tiny-coco-instance", help="where to start from")
    parser.add_argument("--size", type=int, default=512, help="side of the images, pixels")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="auto", help="auto, cpu or gpu")
    options = parser.parse_args(arguments)

    data = CocoFolder(options.images, options.annotations, options.size)
    loader = DataLoader(
        data, options.batch, shuffle=True, collate_fn=collate, num_workers=options.workers, drop_last=True
    )
    trainer = lightning.Trainer(
        max_steps=options.steps,
        accelerator=options.device,
        gradient_clip_val=0.01,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Segmenter(options.model, data.names), loader)
    return dict(trainer.callback_metrics)


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name} {value:.3f}")
