"""What more points in the boxes of small targets would bring: the numbers of docs/stratified.md.

    python benchmarks/small_targets.py loss        noise of an instance's loss, small and thin targets
    python benchmarks/small_targets.py matching    how often a small target goes to an empty query

A share of the uniform points is drawn in the box of the target, and the rest anywhere. A point weighs the inverse of
its density, so that means over uniform points stay as they are. All frames are 644 x 644.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits

from maskloss import PointSampling, functional

FRAME, STRIDE = 644, 4
# Height and width of targets.
SHAPES = ((5, 5), (31, 31), (2, 40))
SHARES = (0.25,)


def some_corners(height: int, width: int, count: int) -> Tensor:
    """Draw where rectangles begin: top and left, `[count, 2]`."""
    return torch.stack([torch.randint(FRAME - height, (count,)), torch.randint(FRAME - width, (count,))], 1)


def masks_of(corners: Tensor, height: int, width: int) -> Tensor:
    """Fill rectangles: float `[count, FRAME, FRAME]`."""
    masks = torch.zeros(len(corners), FRAME, FRAME)
    for mask, (top, left) in zip(masks, corners.tolist(), strict=True):
        mask[top : top + height, left : left + width] = 1
    return masks


def boxes_of(corners: Tensor, height: int, width: int) -> Tensor:
    """Return left, top, width and height as fractions `[count, 4]`, with a margin of one pixel of the prediction."""
    low = ((corners - STRIDE) / FRAME).clamp(min=0)
    high = ((corners + torch.tensor([height, width]) + STRIDE) / FRAME).clamp(max=1)
    return torch.cat([low.flip(1), (high - low).flip(1)], 1)


def into_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """Move uniform points `[..., P, 2]` into boxes `[..., 4]`."""
    return boxes[..., None, :2] + points * boxes[..., None, 2:]


def weights_of(points: Tensor, boxes: Tensor, share: float) -> Tensor:
    """Invert the density at points `[N, P, 2]`, of which a share lies in boxes `[N, B, 4]`, equally many in each."""
    offset = (points[:, :, None] - boxes[:, None, :, :2]) / boxes[:, None, :, 2:]
    inside = ((offset >= 0) & (offset <= 1)).all(-1)
    density = (inside / (boxes[..., 2] * boxes[..., 3])[:, None]).mean(-1)
    return 1 / (1 - share + share * density)


def losses(z: Tensor, t: Tensor, w: Tensor) -> Tensor:
    """Both losses `[2, N]`."""
    s = z.sigmoid()
    ce = (w * binary_cross_entropy_with_logits(z, t, reduction="none")).mean(-1)
    return torch.stack([ce, 1 - (2 * (w * s * t).sum(-1) + 1) / ((w * (s + t)).sum(-1) + 1)])


def configurations() -> Iterator[tuple[str, str, float]]:
    yield "independent", "independent", 0.0
    yield "stratified", "stratified", 0.0
    for share in SHARES:
        yield f"box_share={share}", "independent", share


def measure_loss(num_points: int, count: int, draws: int) -> None:
    print("target    importance  layout           BCE mean    BCE std    Dice mean   Dice std")
    for shape in SHAPES:
        corners = some_corners(*shape, count)
        masks, boxes = masks_of(corners, *shape), boxes_of(corners, *shape)
        # A prediction that is a pixel off and not sure of itself.
        logits = 8 * avg_pool2d(masks.roll((2, 1), (1, 2)), STRIDE) - 4 + torch.randn(count, 1, 1)
        for alpha in (0.0, 0.75):
            for name, layout, share in configurations():
                sampling = PointSampling(num_points, importance_ratio=alpha, layout=layout)
                moved, found = int(share * sampling.num_random), []
                for seed in range(draws):
                    points = functional.uncertain_points(logits, sampling=sampling, seed=seed)
                    w, uniform = torch.ones(count, num_points), slice(sampling.num_uncertain, None)
                    if share:
                        points[:, num_points - moved :] = into_boxes(points[:, num_points - moved :], boxes)
                        w[:, uniform] = weights_of(points[:, uniform], boxes[:, None], moved / sampling.num_random)
                    z, t = (functional.point_sample(maps, points) for maps in (logits, masks))
                    found.append(losses(z, t, w))
                every = torch.stack(found).double()
                mean, spread = every.mean((0, 2)), every.var(0).mean(-1).sqrt()
                numbers = f"{mean[0]:.3e}   {spread[0]:.2e}   {mean[1]:.4f}      {spread[1]:.2e}"
                print(f"{shape[0]:2} x {shape[1]:2}   {alpha:4}        {name:15}  {numbers}", flush=True)


def measure_matching(num_points: int, targets: int, draws: int) -> None:
    """Compare the costs of a perfect query and of one that predicts nothing, which gets what costs the same."""
    print("target    targets  layout           goes to the empty query")
    for size in (3, 5, 9):
        for others in (1, targets):
            for name, layout, share in configurations():
                lost = 0
                for seed in range(draws):
                    corners = some_corners(size, size, others)
                    boxes = boxes_of(corners, size, size)
                    sampling = PointSampling(num_points, importance_ratio=0.0, layout=layout)
                    points = functional.uncertain_points(torch.zeros(1, 2, 2), sampling=sampling, seed=seed)
                    w = torch.ones(1, num_points)
                    if share:
                        # The matcher's points belong to the image: its targets have equal parts of the share.
                        each = int(share * num_points) // others
                        moved = points[0, : each * others].view(others, each, 2)
                        points[0, : each * others] = into_boxes(moved, boxes).flatten(0, 1)
                        w = weights_of(points, boxes[None], each * others / num_points)
                    t = functional.point_sample(masks_of(corners[:1], size, size), points)
                    perfect, empty = (5 * each for each in (losses(12 * t - 6, t, w), losses(0 * t - 6, t, w)))
                    lost += bool(empty.sum() <= perfect.sum())
                print(f"{size:2} x {size:2}   {others:4}     {name:15}  {100 * lost / draws:5.1f} %", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("loss", "matching"))
    parser.add_argument("--points", type=int, default=12544)
    parser.add_argument("--instances", type=int, default=4)
    parser.add_argument("--targets", type=int, default=20, help="targets of an image, for matching")
    parser.add_argument("--draws", type=int, default=200)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.what == "loss":
        measure_loss(options.points, options.instances, options.draws)
    else:
        measure_matching(options.points, options.targets, options.draws)


if __name__ == "__main__":
    main()
