"""Volumes, and clips as one unit, against `grid_sample` in five dimensions; the CPU's kernels against the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, grid_sample

from maskloss import (
    ClipOptions,
    HungarianMatcher,
    MaskCriterion,
    MaskFactors,
    MaskLoss,
    MaskLossError,
    MaskTargets,
    PointSampling,
)
from maskloss._abi import ALL_TARGETS, CANDIDATES, MATCHER, RANDOM
from maskloss.ops.reference.volumes import sample_volumes
from maskloss.points import draw_layout3, instance_keys, slabs_of, uniform_points
from maskloss.step import Step
from maskloss.targets.collate import collate

VOLUME, CLIP = ClipOptions(unit="volume"), ClipOptions(unit="clip")
P = 50
UNIFORM = PointSampling(num_points=P, importance_ratio=0.0)
D, H, W = 5, 14, 17


def labels_of(count: int, seed: int = 0, size: tuple[int, int, int] = (D, H, W)) -> Tensor:
    """A label volume as microscopy has them."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, count + 1, (2, 3, 3), generator=generator).to(torch.float32)
    fine = torch.nn.functional.interpolate(coarse[None, None], size, mode="nearest")[0, 0]
    fine.view(-1)[: count + 1] = torch.arange(count + 1.0)
    return fine.to(torch.int32).to(torch.uint16)


def region(size: tuple[int, int, int] = (D, H, W)) -> Tensor:
    """Void voxels, a box with a part of every slice but the last."""
    void = torch.zeros(size, dtype=torch.bool)
    void[: max(size[0] - 1, 1), 3:10, 2:13] = True
    return void


def counting(points: Tensor) -> Tensor:
    """Which points `[..., P, 3]` lie in no void voxel, 1 or 0."""
    x, y, z = (points[..., axis].mul((W, H, D)[axis]).long() for axis in range(3))
    return (~region()[z, y, x]).to(points.dtype)


class Setup:
    def __init__(self, dtype: torch.dtype = torch.float32, depth: int = 4, counts: tuple[int, ...] = (3, 2)) -> None:
        generator = torch.Generator().manual_seed(5)
        self.maps = [labels_of(count, seed) for seed, count in enumerate(counts)]
        self.ids = [list(range(1, count + 1)) for count in counts]
        self.packed = MaskTargets.from_label_map(self.maps, self.ids)
        self.with_void = MaskTargets.from_label_map(self.maps, self.ids, ignore=region())
        self.labels = [torch.arange(count) % 2 for count in counts]
        self.classes = [torch.randn(len(counts), 4, 3, generator=generator).to(dtype) for _ in range(2)]
        self.logits = [
            (2 * torch.randn(len(counts), 4, d, *size, generator=generator)).to(dtype).requires_grad_()
            for d, size in ((depth, (6, 9)), (depth, (8, 7)))
        ]

    @property
    def targets(self) -> dict[str, Any]:
        return {"masks": self.packed, "labels": self.labels}


def read(volumes: Tensor, points: Tensor, linear: bool, **options: Any) -> Tensor:
    """Read volumes `[n, d, h, w]` at points `[n, P, 3]`, (x, y, z), with PyTorch's own sampler."""
    options["align_corners"] = False
    if linear:
        grid = 2 * points[:, :, None, None] - 1
        return grid_sample(volumes[:, None], grid, **options)[:, 0, :, 0, 0]
    frame = (points[..., 2] * volumes.shape[1]).long()
    plane = [
        grid_sample(v[:, None], 2 * p[None, None, :, :2].expand(len(v), -1, -1, -1) - 1, **options)
        for v, p in zip(volumes, points, strict=True)
    ]
    every = torch.stack([each[:, 0, 0] for each in plane])
    return every.gather(1, frame[:, None])[:, 0]


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("linear", [True, False])
def test_reading_is_that_of_grid_sample(linear: bool, padding: str) -> None:
    volumes = torch.randn(3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    points = torch.rand(3, 40, 3, dtype=torch.float64)
    mine, theirs = sample_volumes(volumes, points, linear, padding), read(volumes, points, linear, padding_mode=padding)
    torch.testing.assert_close(mine, theirs)
    for one, other in zip(
        torch.autograd.grad(mine.square().sum(), volumes),
        torch.autograd.grad(theirs.square().sum(), volumes),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("layout", ["independent", "stratified"])
def test_points_are_uniform_and_their_own(layout: str) -> None:
    keys = instance_keys(torch.tensor(3), torch.arange(40), torch.zeros(40, dtype=torch.int64))
    layers = torch.zeros(40, dtype=torch.int64)
    points = draw_layout3(layout, keys, 300, layers, RANDOM)
    assert points.shape == (40, 300, 3)
    assert ((points >= 0) & (points < 1)).all()
    spread = 1 / math.sqrt(12 * 12000)
    assert ((points.flatten(0, 1).mean(0) - 0.5).abs() < 5 * spread).all()
    correlation = torch.corrcoef(points.flatten(0, 1).T)
    assert ((correlation - torch.eye(3)).abs() < 0.05).all()
    assert not torch.equal(points, draw_layout3(layout, keys, 300, layers, CANDIDATES))
    if layout == "independent":
        assert torch.equal(points[..., :2], uniform_points(keys, 300, layers, RANDOM))


@pytest.mark.parametrize("cells", [1, 2, 7, 8, 27, 100, 300])
def test_strata_are_boxes_of_equal_volume(cells: int) -> None:
    """Each point lies in a box of its own: its slab, row and cell are counted from the number of points alone."""
    keys = instance_keys(torch.tensor(1), torch.arange(64), torch.zeros(64, dtype=torch.int64))
    points = draw_layout3("stratified", keys, cells, torch.zeros(64, dtype=torch.int64), RANDOM).double()
    slabs = slabs_of(cells)
    assert slabs**3 <= cells < (slabs + 1) ** 3
    volumes = []
    for i in range(cells):
        slab = next(s for s in range(slabs) if (s + 1) * cells // slabs > i)
        behind, beyond = slab * cells // slabs, (slab + 1) * cells // slabs
        count, own = beyond - behind, i - behind
        rows = math.isqrt(count)
        row = next(r for r in range(rows) if (r + 1) * count // rows > own)
        first, last = row * count // rows, (row + 1) * count // rows
        low = torch.tensor([(own - first) / (last - first), first / count, behind / cells])
        high = torch.tensor([(own - first + 1) / (last - first), last / count, beyond / cells])
        mine = points[:, i]
        assert ((mine >= low - 2**-23) & (mine <= high + 2**-23)).all()
        assert (mine.std(0) > 0.15 * (high - low)).all()
        volumes.append((high - low).prod())
    torch.testing.assert_close(torch.stack(volumes), torch.full((cells,), 1 / cells))


@pytest.mark.parametrize("clips", [VOLUME, CLIP], ids=["volume", "clip"])
@pytest.mark.parametrize("edges", [{}, {"padding_mode": "border", "target_mode": "nearest"}], ids=["", "nearest"])
def test_loss_at_uniform_points(backend: str, clips: ClipOptions, edges: dict[str, Any]) -> None:
    """Both terms and the gradient against `grid_sample`; the kernels in float32, for which they are compiled anyway."""
    dtype = torch.float64 if backend == "reference" else torch.float32
    setup = Setup(dtype, depth=4 if clips is VOLUME else D)
    pairs = [(torch.tensor([2, 0, 3]), torch.tensor([1, 0, 2])), (torch.tensor([1, 3]), torch.tensor([1, 0]))]
    logits = setup.logits[0]
    loss = MaskLoss(sampling=UNIFORM, clips=clips, backend=backend, **edges)
    out = loss(logits, setup.with_void, pairs, seed=4)
    images = torch.tensor([0, 0, 0, 1, 1])
    keys = instance_keys(torch.tensor(4), images, torch.cat([t for _, t in pairs]))
    points = draw_layout3("independent", keys, P, torch.zeros_like(images), RANDOM).to(dtype)
    linear = clips is VOLUME
    padding, mode = edges.get("padding_mode", "zeros"), edges.get("target_mode", "bilinear")
    z = read(torch.cat([logits[b, q] for b, (q, _) in enumerate(pairs)]), points, linear, padding_mode=padding)
    dense = torch.cat([setup.packed.dense(b)[t].to(dtype) for b, (_, t) in enumerate(pairs)])
    t = read(dense, points, linear, padding_mode=padding, mode=mode)
    w = counting(points)
    ce = (binary_cross_entropy_with_logits(z, t, reduction="none") * w).sum(1) / w.sum(1)
    s, t = z.sigmoid() * w, t * w
    dice = 1 - (2 * (s * t).sum(1) + 1) / (s.sum(1) + t.sum(1) + 1)
    # `grid_sample` rounds positions in its own precision, the library in float64.
    close = {} if backend == "reference" else {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(out.per_instance.ce, ce, **close)
    torch.testing.assert_close(out.per_instance.dice, dice, **close)
    torch.testing.assert_close(out.total, ce.sum() + dice.sum(), **close)
    given = loss(logits, setup.with_void, pairs, points=points.float())
    torch.testing.assert_close(given.total, out.total)
    torch.testing.assert_close(*(torch.autograd.grad(each.total, logits, retain_graph=True) for each in (given, out)))
    for one, other in zip(
        torch.autograd.grad(out.total, logits), torch.autograd.grad((ce + dice).sum(), logits), strict=True
    ):
        torch.testing.assert_close(one, other, **close)


@pytest.mark.parametrize("unit", ["frame", "clip", "volume"])
def test_void_voxels_change_nothing(backend: str, unit: str) -> None:
    """Neither what is predicted there nor what is annotated: equal matches and losses, and no gradient."""
    generator = torch.Generator().manual_seed(3)
    classes, logits = torch.randn(1, 4, 3, generator=generator), torch.randn(1, 4, D, H, W, generator=generator)
    # A point beside the region reads the next voxel of it, and in a volume that of the next slice.
    inner = torch.zeros_like(region())
    inner[: D - 2 if unit == "volume" else D - 1, 4:9, 3:12] = True
    options: dict[str, Any] = {"clips": ClipOptions(unit=unit), "backend": backend}
    criterion = MaskCriterion(2, sampling=UNIFORM, ignore_value=255, **options)
    found = []
    for perturbed in (False, True):
        masks = MaskTargets.from_label_map(labels_of(3), [1, 2, 3]).dense().to(torch.uint8)
        drawn = logits.clone()
        if perturbed:
            masks[:, inner] = 1 - masks[:, inner]
            drawn[..., inner] = -9 * drawn[..., inner]
        masks[0, region()] = 255
        entry = {"masks": masks, "labels": torch.tensor([0, 1, 1])}
        out = criterion(classes, drawn.requires_grad_(), [entry], seed=1)
        [gradient] = torch.autograd.grad(out.total, drawn)
        assert not gradient[..., inner].any() and gradient.any()
        found.append((out.matches.index, out.total, gradient))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_clip_of_one_frame_with_void_is_the_image(backend: str) -> None:
    """Where points are independent they are the image's, whatever the unit."""
    setup, pairs = Setup(), [(torch.tensor([2, 0]), torch.tensor([1, 0])), (torch.tensor([1]), torch.tensor([1]))]
    masks, logits = [setup.packed.dense(image)[:, 2] for image in range(2)], setup.logits[0].detach()[:, :, 2]
    void, sampling = region()[0], PointSampling(num_points=P)
    image = MaskLoss(sampling=sampling, backend=backend)
    clip = MaskLoss(sampling=sampling, backend=backend, clips=CLIP)
    found = (
        image(logits, MaskTargets.from_masks(masks, ignore=void), pairs, seed=1),
        clip(
            logits[:, :, None],
            MaskTargets.from_masks([each[:, None] for each in masks], ignore=void[None]),
            pairs,
            seed=1,
        ),
    )
    torch.testing.assert_close(*(each.per_instance.ce for each in found))
    torch.testing.assert_close(*(each.per_instance.dice for each in found))


@pytest.mark.parametrize("clips", [VOLUME, CLIP], ids=["volume", "clip"])
def test_gradcheck(clips: ClipOptions) -> None:
    setup = Setup(torch.float64, depth=D, counts=(2,))
    pairs = [(torch.tensor([1, 0]), torch.tensor([0, 1]))]
    loss = MaskLoss(sampling=PointSampling(num_points=12), clips=clips, backend="reference", focal_gamma=1.5)
    logits = setup.logits[0].detach()[:, :2, :, :2, :3].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, setup.packed, pairs, seed=1).total, logits)


@pytest.mark.parametrize("layout", ["independent", "stratified"])
@pytest.mark.parametrize("clips", [VOLUME, CLIP], ids=["volume", "clip"])
def test_matching_costs(backend: str, layout: str, clips: ClipOptions) -> None:
    dtype = torch.float64 if backend == "reference" else torch.float32
    setup = Setup(dtype, depth=4 if clips is VOLUME else D)
    weights = {"class_weight": 0.0, "mask_weight": 1.0, "dice_weight": 10.0}
    matcher = HungarianMatcher(**weights, num_points=P, layout=layout, clips=clips, backend=backend)
    targets = {"masks": MaskTargets.cat([setup.with_void[0], setup.packed[1]]), "labels": setup.labels}
    begun = Step.begin(collate(targets), setup.logits, seed=5)
    found = matcher.costs(torch.stack(setup.classes), setup.logits, begun)
    ids = torch.arange(2)
    keys = instance_keys(torch.tensor(5), ids, torch.full_like(ids, ALL_TARGETS))
    points = draw_layout3(layout, keys, P, torch.zeros_like(ids), MATCHER).to(dtype)
    for layer, logits in enumerate(setup.logits):
        for image in range(2):
            dense = setup.packed.dense(image).to(dtype)
            z = read(logits[image].detach(), points[image].expand(4, -1, -1), clips is VOLUME)
            t = read(dense, points[image].expand(len(dense), -1, -1), clips is VOLUME)
            pair_z, pair_t = z[:, None].expand(-1, len(t), -1), t.expand(len(z), -1, -1)
            w = torch.ones(P, dtype=dtype) if image else counting(points[0])
            ce = (binary_cross_entropy_with_logits(pair_z, pair_t, reduction="none") * w).sum(2) / w.sum()
            s, pair_t = pair_z.sigmoid() * w, pair_t * w
            dice = 1 - (2 * (s * pair_t).sum(2) + 1) / (s.sum(2) + pair_t.sum(2) + 1)
            close = {} if backend == "reference" else {"atol": 1e-3, "rtol": 1e-4}
            torch.testing.assert_close(found[layer, image, :, : len(t)], ce + 10 * dice, **close)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, pytest.param(torch.float64, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("encoding", ["labels", "bits", "values"])
@pytest.mark.parametrize("clips", [VOLUME, CLIP], ids=["volume", "clip"])
def test_kernels_choose_and_compute_as_the_reference(dtype: torch.dtype, encoding: str, clips: ClipOptions) -> None:
    setup = Setup(dtype, depth=3 if clips is VOLUME else D)
    if encoding != "labels":
        dense = [setup.packed.dense(image).float() for image in range(2)]
        setup.packed = MaskTargets.from_masks(
            dense, soft=encoding == "values", valid=(1, 2, H - 2, W - 4), ignore=region()
        )
    sampling = PointSampling(num_points=P, layout="stratified" if dtype == torch.float32 else "independent")
    others: dict[str, dict[str, Any]] = {
        "bits": {"focal_alpha": 0.3, "focal_gamma": 2.0},
        "values": {"dice": "soft" if clips is VOLUME else "semimetric"},
    }
    found = []
    for backend in ("reference", "cpu"):
        options: dict[str, Any] = {"backend": backend, "sampling": sampling, "clips": clips, **others.get(encoding, {})}
        out = MaskCriterion(2, **options)(setup.classes, setup.logits, setup.targets, seed=2)
        found.append((out.matches.index, out.per_instance.ce, *torch.autograd.grad(out.total, setup.logits)))
        assert out.per_instance.ce.shape == (10,)
    tolerance = (
        {"atol": 1e-5, "rtol": 1e-4} if dtype in (torch.float32, torch.float64) else {"atol": 1e-3, "rtol": 1e-2}
    )
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("clips", [VOLUME, CLIP], ids=["volume", "clip"])
@pytest.mark.parametrize("weigh", ["as expected", "half", "otherwise"])
def test_gradients_that_come_early(clips: ClipOptions, weigh: str) -> None:
    """Also of queries that share a target, and beside a layer without a gradient."""
    pairs = [(torch.tensor([2, 0, 1]), torch.tensor([1, 0, 1])), (torch.tensor([1, 3]), torch.tensor([1, 1]))]
    found = []
    for backend in ("reference", "cpu"):
        setup = Setup(depth=4 if clips is VOLUME else D)
        setup.logits[0].requires_grad_(False)
        out = MaskCriterion(2, sampling=PointSampling(num_points=P), clips=clips, backend=backend)(
            setup.classes, setup.logits, setup.targets, matches=[pairs, pairs], seed=2
        )
        terms = {"as expected": out.total, "half": out.total / 2, "otherwise": out.loss_dice.sum() - out.loss_mask[1]}
        terms[weigh].backward()
        assert setup.logits[0].grad is None
        found.append(setup.logits[1].grad)
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("shape", [(1, 6, 9), (3, 1, 9), (3, 6, 1), (1, 1, 1)])
def test_volumes_of_one_voxel_along_an_axis(shape: tuple[int, int, int]) -> None:
    """Nothing beside them is read, and nothing is added there."""
    found = []
    for backend in ("reference", "cpu"):
        setup = Setup(counts=(2,))
        logits = torch.randn(1, 4, *shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = MaskCriterion(2, sampling=PointSampling(num_points=P), clips=VOLUME, backend=backend)(
            setup.classes[0], logits, setup.targets, seed=2
        )
        out.total.backward()
        found.append((out.matches.index, out.per_instance.ce, logits.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_strided_logits_and_factors() -> None:
    """Views are read as they are; factors are formed."""
    setup = Setup()
    criterion = MaskCriterion(2, sampling=UNIFORM, clips=VOLUME)
    turned = [each.detach().permute(0, 1, 4, 3, 2).contiguous().permute(0, 1, 4, 3, 2) for each in setup.logits]
    assert not turned[0].is_contiguous()
    losses = [criterion(setup.classes, each, setup.targets, seed=1).total for each in (setup.logits, turned)]
    assert torch.equal(*losses)
    factors = MaskFactors(torch.randn(2, 4, 3), torch.randn(2, 3, 4, 6, 5))
    both = [criterion(setup.classes[0], each, setup.targets, seed=1).total for each in (factors, factors.dense())]
    assert torch.equal(*both)


def test_given_points_off_a_clip(backend: str) -> None:
    """The nearest frame counts, however far away a point is."""
    setup, loss = Setup(depth=D, counts=(2,)), MaskLoss(sampling=UNIFORM, clips=CLIP, backend=backend)
    points = torch.rand(2, P, 3, generator=torch.Generator().manual_seed(1))
    found = []
    for low, high in ((0.0, 1 - 2**-24), (-3.0, 1.5), (-math.inf, 1e30), (math.nan, math.inf)):
        points[0, :, 2], points[1, :, 2] = low, high
        found.append(loss(setup.logits[0], setup.packed, [(torch.arange(2),) * 2], points=points).per_instance.ce)
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize("early", [True, False], ids=["early", "in the backward pass"])
def test_gradients_of_views(early: bool) -> None:
    """The gradient has no gaps between rows and slices, whatever the logits have."""
    setup = Setup(counts=(2,))
    logits = setup.logits[0].detach()
    wide = torch.nn.functional.pad(logits, (0, 4, 0, 3))[..., : logits.shape[3], : logits.shape[4]]
    turned = logits.transpose(2, 3).contiguous().transpose(2, 3)
    loss, pairs, found = MaskLoss(sampling=PointSampling(num_points=P), clips=VOLUME), [(torch.arange(2),) * 2], []
    for view in (logits, wide, turned):
        leaf = view.detach().requires_grad_()
        out = loss(leaf, setup.packed, pairs, seed=1)
        (out.total if early else out.per_instance.dice.sum()).backward()
        found.append(leaf.grad)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_volumes_without_instances_and_with_a_nan(backend: str) -> None:
    setup = Setup(counts=(0,))
    criterion = MaskCriterion(2, sampling=UNIFORM, clips=VOLUME, backend=backend)
    out = criterion(setup.classes, setup.logits, setup.targets)
    out.total.backward()
    assert out.loss_mask.sum() == 0
    setup = Setup(counts=(2,))
    broken = setup.logits[0].detach().clone()
    broken[0, 1] = float("nan")
    loss = MaskLoss(sampling=PointSampling(num_points=P), clips=VOLUME, backend=backend)
    pairs = [(torch.tensor([1, 0]), torch.tensor([0, 1]))]
    broken.requires_grad_()
    weighed = loss(broken, setup.packed, pairs, instance_weights=torch.tensor([0.0, 1.0]))
    weighed.total.backward()
    assert weighed.total.isfinite()
    assert broken.grad.isfinite().all()
    assert loss(broken, setup.packed, pairs).total.isnan()


def test_what_volumes_do_not_have() -> None:
    setup = Setup()
    with pytest.raises(MaskLossError, match="frames and divide_by belong"):
        ClipOptions(unit="clip", frames="present")
    with pytest.raises(MaskLossError, match="the same frames"):
        MaskCriterion(2, sampling=UNIFORM, clips=CLIP)(setup.classes, setup.logits, setup.targets)
    with pytest.raises(MaskLossError, match="the same unit of clips"):
        MaskCriterion(2, clips=VOLUME, matcher=HungarianMatcher())
    pairs = [(torch.tensor([0]), torch.tensor([0]))] * 2
    with pytest.raises(MaskLossError, match=r"points must be float \[N, P, 3\](.|\n)*\(x, y, z\)"):
        MaskLoss(clips=VOLUME)(setup.logits[0], setup.packed, pairs, points=torch.rand(2, 4, 2))
    with pytest.raises(MaskLossError, match="2 instances but points"):
        MaskLoss(clips=VOLUME)(setup.logits[0], setup.packed, pairs, points=torch.rand(2 * D, 4, 3))
    with pytest.raises(MaskLossError, match=r"at least one pixel(.|\n)*\[1, 0, 8, 8\]"):
        MaskLoss(clips=VOLUME)(torch.zeros(1, 0, 8, 8), torch.ones(1, D, 8, 8), matches=None)


@pytest.mark.skipif(torch.__version__ < (2, 7), reason="PyTorch 2.6 compiles no step into one graph")
def test_compiled() -> None:
    setup = Setup()
    criterion = MaskCriterion(2, sampling=PointSampling(num_points=20), clips=VOLUME)
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    found = []
    for each in (criterion, compiled):
        out = each(setup.classes, setup.logits, setup.targets, seed=1)
        found.append((out.total, *torch.autograd.grad(out.total, setup.logits)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
