"""Train a small query model on clips, or on volumes with label volumes: nothing to fetch, minutes on a CPU.

python clips_and_volumes.py                 # squares and discs that move, and leave
python clips_and_volumes.py --unit volume   # boxes and balls, as a stack of label images
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from maskloss import ClipOptions, MaskCriterion, MaskTargets, PointSampling

CLASSES, FRAMES, SIZE = 2, 6, 48


class TinySegmenter(nn.Module):
    """Queries that look at all frames or slices at once: one class, and a mask in each of them.

    Args:
        queries: the number of instances that it can find.
        width: channels.
    """

    def __init__(self, queries: int = 6, width: int = 32) -> None:
        super().__init__()
        stride = (1, 2, 2)
        self.stem = nn.Sequential(
            nn.Conv3d(1, width, 3, stride=stride, padding=1), nn.GELU(),
            nn.Conv3d(width, width, 3, stride=stride, padding=1),
        )  # fmt: skip
        self.place = nn.Parameter(torch.randn(1, width, FRAMES, SIZE // 4, SIZE // 4) * 0.1)
        self.queries = nn.Parameter(torch.randn(1, queries, width))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(width, 4, 2 * width, 0.0, batch_first=True) for _ in "12"
        )
        self.classes, self.masks = nn.Linear(width, CLASSES + 1), nn.Linear(width, width)

    def forward(self, frames: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return class logits `[B, Q, C + 1]` and mask logits `[B, Q, T, h, w]` of every layer."""
        features = self.stem(frames) + self.place
        tokens = features.flatten(2).transpose(1, 2)
        queries, classes, masks = self.queries.expand(len(frames), -1, -1), [], []
        for layer in self.layers:
            queries = layer(queries, tokens)
            classes.append(self.classes(queries))
            masks.append(torch.einsum("bqc,bcthw->bqthw", self.masks(queries), features))
        return classes, masks


def draw(unit: str, generator: torch.Generator) -> tuple[Tensor, MaskTargets, Tensor]:
    """Draw a clip or a volume, `[1, T, H, W]`, of angular things (class 0) and round ones (class 1)."""
    z, y, x = torch.meshgrid(torch.arange(FRAMES), torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    number = torch.randint(1, 4, (), generator=generator)
    labels = torch.randint(CLASSES, (int(number),), generator=generator)
    ids = torch.zeros(FRAMES, SIZE, SIZE, dtype=torch.int16)
    seen = torch.randn(1, FRAMES, SIZE, SIZE, generator=generator) * 0.1
    for target, label in enumerate(labels.tolist()):
        cx, cy, cz = (
            int(torch.randint(low, high, (), generator=generator)) for low, high in ((9, 39), (9, 39), (1, 5))
        )
        across = (x - cx - (z - cz) * (2 if unit == "frame" else 0)).abs()
        down, through = (y - cy).abs(), (z - cz).abs() * (0 if unit == "frame" else 3)
        inside = torch.maximum(torch.maximum(across, down), through) < 8
        if label == 1:
            inside = across**2 + down**2 + through**2 < 81
        ids[inside] = target + 1
        seen[0, inside] += 1 - 2 * label
    # What lies behind another thing in all frames has no voxel left.
    targets = MaskTargets.from_label_map(ids, range(1, len(labels) + 1), allow_missing=True)
    return seen, targets, labels


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train; the loss of every step is the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unit", choices=("frame", "clip", "volume"), default="frame")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    clips = ClipOptions(unit=options.unit)
    model, criterion = TinySegmenter(), MaskCriterion(CLASSES, sampling=PointSampling(num_points=512), clips=clips)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    history = []
    for step in range(options.steps):
        frames, targets, labels = zip(*(draw(options.unit, generator) for _ in range(4)), strict=True)
        batch: dict[str, Any] = {"masks": MaskTargets.cat(targets), "labels": labels}
        out = criterion(*model(torch.stack(frames)), batch)
        out.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(out.total.item())
        if step % 25 == 0 or step == options.steps - 1:
            print(f"step {step:3d}  loss {history[-1]:.2f}  of masks {out.as_dict()['loss_mask']:.3f}")
    return history


if __name__ == "__main__":
    main()
