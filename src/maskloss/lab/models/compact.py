"""A compact query model: a small convolutional pyramid, and queries that are born at places of the image.

It is meant to learn in minutes on a CPU, so every part is there for how much it gives per second:

- batch normalization, which learns faster here than any normalization of single images; where a batch is divided
  among processes or micro-batches, groups of channels of a single image, whose result does not depend on the division,
- queries on a grid, each born as a soft disc around its place. A query of an image-wide set must first find out which
  instances are its own, and until then the matching changes from step to step; a disc is matched with what it covers
  from the first step on,
- masked attention to two levels of the pyramid, as in Mask2Former,
- a class head that reads the pixels under the query's own mask: what a thing is, is seen where it is.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, adaptive_max_pool2d, interpolate, scaled_dot_product_attention

CHANNELS = (24, 64, 128)  # of the encoder, at strides 2, 4, 8
DIM, MASK_DIM, HEADS = 64, 32, 4
LAYERS = 2
# The disc in which a query is born: its radius, and how far its center can move, in distances between queries.
DISC_RADIUS, DISC_REACH = 0.72, 1.2
BATCH, GROUP = "batch", "group"
# Channels that are normalized together by `GROUP`.
GROUP_SIZE = 8


class Output(NamedTuple):
    """Predictions of all layers, the final one last; the first is made before any attention."""

    class_logits: list[Tensor]  # per layer `[B, Q, C + 1]`, "no object" last
    mask_logits: list[Tensor]  # per layer `[B, Q, h, w]`, at half the resolution of the images


class QueryNet(nn.Module):
    """Predict masks and classes of the instances in an image."""

    def __init__(self, num_classes: int, grid: int = 4, channels: int = 3, norm: str = BATCH) -> None:
        super().__init__()
        self.grid = grid
        self.anchors: Tensor
        self.pyramid = Pyramid(channels, norm)
        self.born = nn.Linear(DIM, DIM)
        self.layers = nn.ModuleList(DecoderLayer() for _ in range(LAYERS))
        self.head = Head(num_classes, grid)
        anchor = _axis(grid)
        self.register_buffer(
            "anchors", torch.stack(torch.meshgrid(anchor, anchor, indexing="xy"), -1).flatten(0, 1), persistent=False
        )

    def forward(self, images: Tensor) -> Output:
        """Predict.

        Args:
            images: `[B, C, S, S]` in [0, 1], S a multiple of 16.
        """
        fine, middle, coarse = self.pyramid(images.contiguous(memory_format=torch.channels_last))
        places = positions(self.grid, self.grid, images)
        queries = self.born(_tokens(adaptive_avg_pool2d(coarse, self.grid)) + places)
        keys = [(level, positions(level.shape[2], level.shape[3], images)) for level in (coarse, middle)]
        output = Output([], [])
        for layer in (None, *self.layers):
            if layer is not None:
                level, where = keys[len(output.mask_logits) % 2]
                queries = layer(queries, places, _tokens(level), where, _under_mask(output.mask_logits[-1], level))
            classes, masks = self.head(queries, self.anchors, fine, middle)
            output.class_logits.append(classes)
            output.mask_logits.append(masks)
        return output


class Pyramid(nn.Module):
    """Encode an image: features at strides 2 (for masks), 4 and 8."""

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        first, second, third = CHANNELS
        self.down = nn.ModuleList(
            [
                _conv(channels, first, norm, stride=2),
                nn.Sequential(_conv(first, second, norm, stride=2), Residual(second, norm)),
                nn.Sequential(_conv(second, third, norm, stride=2), Residual(third, norm)),
                _conv(third, third, norm, stride=2),
            ]
        )
        widths = (MASK_DIM, DIM, DIM, DIM)
        self.lateral = nn.ModuleList(
            nn.Conv2d(below, width, 1) for below, width in zip((*CHANNELS, third), widths, strict=True)
        )
        self.up = nn.ModuleList(
            nn.Conv2d(above, here, 1) if above != here else nn.Identity() for here, above in pairwise(widths)
        )
        self.smooth = nn.ModuleList(_conv(width, width, norm) for width in widths[:-1])
        self.place = nn.Linear(DIM, MASK_DIM)
        self.masks = nn.Conv2d(MASK_DIM, MASK_DIM, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return features `[B, MASK_DIM, S/2, S/2]`, `[B, DIM, S/4, S/4]` and `[B, DIM, S/8, S/8]`."""
        features, sides = 2 * images - 0.5, []
        for stage, lateral in zip(self.down, self.lateral, strict=True):
            features = stage(features)
            sides.append(lateral(features))
        fine, middle, coarse, top = sides
        coarse = self.smooth[2](coarse + interpolate(top, scale_factor=2))
        middle = self.smooth[1](middle + interpolate(coarse, scale_factor=2))
        height, width = fine.shape[2:]
        place = self.place(positions(height, width, images)).T.reshape(1, MASK_DIM, height, width)
        fine = self.smooth[0](fine + interpolate(self.up[0](middle), scale_factor=2) + place)
        return self.masks(fine), middle, coarse


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        self.first = _conv(channels, channels, norm)
        self.second = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), _normalization(channels, norm)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the same shape."""
        out: Tensor = (x + self.second(self.first(x))).relu_()
        return out


class DecoderLayer(nn.Module):
    """Masked attention to the image, attention among queries, and a small network for each query."""

    def __init__(self) -> None:
        super().__init__()
        self.to_image, self.to_queries = Attention(), Attention()
        self.network = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.ReLU(inplace=True), nn.Linear(2 * DIM, DIM))
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(3))

    def forward(self, queries: Tensor, places: Tensor, level: Tensor, where: Tensor, mask: Tensor) -> Tensor:
        """Update the queries `[B, Q, DIM]` from features `[B, K, DIM]`.

        Both have places, `[Q, DIM]` and `[K, DIM]`; `mask` `[B, Q, K]` says which features a query may look at.
        """
        queries = self.norms[0](queries + self.to_image(queries + places, level + where, level, mask))
        queries = self.norms[1](queries + self.to_queries(queries + places, queries + places, queries, None))
        updated: Tensor = self.norms[2](queries + self.network(queries))
        return updated


class Attention(nn.Module):
    """Multi-head attention."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attend from `[B, Q, DIM]` to `[B, K, DIM]` where the mask `[B, Q, K]` allows it."""
        projected = (self.query(query), self.key(key), self.value(value))
        q, k, v = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in projected)
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None])
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Head(nn.Module):
    """Read a mask and a class off each query."""

    def __init__(self, num_classes: int, grid: int) -> None:
        super().__init__()
        self.reach = DISC_REACH / grid
        self.norm = nn.LayerNorm(DIM)
        self.kernel = nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU(inplace=True), nn.Linear(DIM, MASK_DIM))
        # Shift of the disc in x and y, logarithm of its radius, and a constant.
        self.disc = nn.Linear(DIM, 4)
        nn.init.zeros_(self.disc.weight)
        self.disc.bias.data = torch.tensor([0.0, 0.0, math.log(DISC_RADIUS / grid), 1.0])
        self.label = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.ReLU(inplace=True), nn.Linear(2 * DIM, num_classes))
        self.classes = nn.Sequential(
            nn.Linear(2 * DIM, 2 * DIM), nn.ReLU(inplace=True), nn.Linear(2 * DIM, num_classes + 1)
        )

    def forward(self, queries: Tensor, anchors: Tensor, fine: Tensor, middle: Tensor) -> tuple[Tensor, Tensor]:
        """Return class logits `[B, Q, C + 1]` and mask logits `[B, Q, h, w]`."""
        queries = self.norm(queries)
        masks = torch.einsum("bqc,bchw->bqhw", self.kernel(queries), fine) * (2 / math.sqrt(MASK_DIM))
        masks = masks + self._discs(queries, anchors, fine)
        # Sharper than the sigmoid, and without gradient: the pixels of a mask are to be classified, not chosen, by it.
        share = adaptive_avg_pool2d((3 * masks.detach() - 1).sigmoid(), (middle.shape[2], middle.shape[3])).flatten(2)
        seen = share @ _tokens(middle) / (share.sum(-1, keepdim=True) + 0.5)
        label = nn.functional.pad(self.label(seen), (0, 1))
        return self.classes(torch.cat([queries, seen], dim=-1)) + label, masks

    def _discs(self, queries: Tensor, anchors: Tensor, fine: Tensor) -> Tensor:
        """Return the logits of a disc for each query, `[B, Q, h, w]`: positive inside, bounded below."""
        shift_x, shift_y, radius, constant = self.disc(queries).unsqueeze(-1).unbind(2)
        height, width = fine.shape[2:]
        scale = torch.exp(-2 * radius)
        x = (_axis(width, fine) - anchors[:, :1] - self.reach * shift_x.tanh()) ** 2 * scale
        y = (_axis(height, fine) - anchors[:, 1:] - self.reach * shift_y.tanh()) ** 2 * scale
        logits: Tensor = constant[..., None] - (x[:, :, None, :] + y[..., None]).clamp(max=8)
        return logits


def positions(height: int, width: int, like: Tensor) -> Tensor:
    """Encode the places of a map as sines and cosines: `[height * width, DIM]`."""
    frequency = 1.6 ** torch.arange(DIM // 4, device=like.device) * (math.pi / 2)
    y, x = torch.meshgrid(_axis(height, like), _axis(width, like), indexing="ij")
    angles = torch.cat([x[..., None] * frequency, y[..., None] * frequency], dim=-1).flatten(0, 1)
    places: Tensor = torch.cat([angles.sin(), angles.cos()], dim=-1)
    return places


def _axis(count: int, like: Tensor | None = None) -> Tensor:
    """Return the centers of `count` pixels that span [0, 1]."""
    return (torch.arange(count, device=None if like is None else like.device) + 0.5) / count


def _under_mask(mask_logits: Tensor, level: Tensor) -> Tensor:
    """Return where each query may look, bool `[B, Q, K]`: under its mask, and everywhere if that is empty."""
    size = (level.shape[2], level.shape[3])
    inside = adaptive_max_pool2d(mask_logits.detach(), size).flatten(2) > 0
    allowed: Tensor = inside | ~inside.any(-1, keepdim=True)
    return allowed


def _tokens(level: Tensor) -> Tensor:
    return level.flatten(2).transpose(1, 2)


def _normalization(channels: int, norm: str) -> nn.Module:
    return nn.BatchNorm2d(channels) if norm == BATCH else nn.GroupNorm(channels // GROUP_SIZE, channels)


def _conv(channels_in: int, channels_out: int, norm: str, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False),
        _normalization(channels_out, norm),
        nn.ReLU(inplace=True),
    )
