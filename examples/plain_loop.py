"""Train a small query model of your own with MaskCriterion: no other library, no data to fetch, half a minute on a CPU.

python plain_loop.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from maskloss import MaskCriterion, MaskTargets, PointSampling, step_totals

CLASSES, SIZE = 2, 64


class TinySegmenter(nn.Module):
    """Queries that look at an image twice; each look is a decoder layer with predictions of its own.

    Args:
        queries: the number of instances that it can find in an image.
        width: channels.
    """

    def __init__(self, queries: int = 8, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 5, stride=2, padding=2), nn.GELU(), nn.Conv2d(width, width, 3, stride=2, padding=1)
        )
        self.place = nn.Parameter(torch.randn(1, width, SIZE // 4, SIZE // 4) * 0.1)
        self.queries = nn.Parameter(torch.randn(1, queries, width))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(width, 4, 2 * width, 0.0, batch_first=True) for _ in "12"
        )
        self.classes, self.masks = nn.Linear(width, CLASSES + 1), nn.Linear(width, width)

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return class logits `[B, Q, C + 1]` and mask logits `[B, Q, h, w]` of every layer."""
        features = self.stem(images) + self.place
        tokens = features.flatten(2).transpose(1, 2)
        queries, classes, masks = self.queries.expand(len(images), -1, -1), [], []
        for layer in self.layers:
            queries = layer(queries, tokens)
            classes.append(self.classes(queries))
            masks.append(torch.einsum("bqc,bchw->bqhw", self.masks(queries), features))
        return classes, masks


def batch(size: int, generator: torch.Generator) -> tuple[Tensor, list[dict[str, Any]]]:
    """Draw images of squares (class 0) and discs (class 1), and their targets."""
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    images, targets = torch.randn(size, 3, SIZE, SIZE, generator=generator) * 0.1, []
    for image in images:
        labels = torch.randint(CLASSES, (int(torch.randint(1, 4, (), generator=generator)),), generator=generator)
        masks = []
        for label in labels.tolist():
            cx, cy = torch.randint(12, SIZE - 12, (2,), generator=generator).tolist()
            dx, dy = (x - cx).abs(), (y - cy).abs()
            masks.append((torch.maximum(dx, dy) < 9) if label == 0 else (dx**2 + dy**2 < 100))
            image[label, masks[-1]] += 1
        targets.append({"masks": MaskTargets.from_masks(torch.stack(masks)), "labels": labels})
    return images, targets


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train; the loss of every step is the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--micro-batches", type=int, default=2, help="batches per step, whose gradients add up")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model, criterion = TinySegmenter(), MaskCriterion(CLASSES, sampling=PointSampling(num_points=512))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    history = []
    for step in range(options.steps):
        micro_batches = [batch(4, generator) for _ in range(options.micro_batches)]
        # Counted over the whole step first, so that its gradient is that of one large batch.
        counts = [[len(target["labels"]) for target in targets] for _, targets in micro_batches]
        totals = step_totals(counts, num_queries=8)
        loss = 0.0
        for images, targets in micro_batches:
            out = criterion(*model(images), targets, totals=totals)
            out.total.backward()
            loss += out.total.item()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss)
        if step % 25 == 0 or step == options.steps - 1:
            print(f"step {step:3d}  loss {loss:.2f}  of masks {out.as_dict()['loss_mask']:.3f}")
    return history


if __name__ == "__main__":
    main()
