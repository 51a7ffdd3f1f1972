"""Clips: one query for an instance in T frames. T = 1 is the image; T > 1 are the formulas of Mask2Former for video."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, grid_sample, logsigmoid

from maskloss import (
    ClipOptions,
    HungarianMatcher,
    MaskCriterion,
    MaskFactors,
    MaskLoss,
    MaskLossError,
    MaskLossTypeError,
    MaskTargets,
    PointSampling,
    StepTotals,
    ops,
    step,
    step_totals,
)
from maskloss._abi import ALL_TARGETS, IGNORE_OFFSET, IGNORE_SIZE, MATCHER, Draw, Job, Term
from maskloss.clips import matches_of_planes
from maskloss.integrations.detr import HungarianMatcher as DetrMatcher
from maskloss.integrations.detr import SetCriterion
from maskloss.integrations.layerwise import LayerMasks
from maskloss.points import draw_layout, instance_keys
from maskloss.step import Step
from maskloss.targets.clips import planes
from maskloss.targets.collate import collate
from support.batches import group

FEW = PointSampling(num_points=40)
T, H, W = 3, 20, 28


def blobs(count: int, frames: int = T, seed: int = 0, height: int = H, width: int = W) -> Tensor:
    """Masks `[N, T, H, W]` that move, each away in one frame if there are several."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(count, frames, height, width, dtype=torch.bool)
    for n in range(count):
        top, left = torch.randint(0, height // 2, (2,), generator=generator).tolist()
        for t in range(frames):
            if frames == 1 or (n + t) % frames:
                masks[n, t, top : top + 7 + t, left + 2 * t : left + 2 * t + 9] = True
    return masks


def region(frames: int = T, height: int = H, width: int = W) -> Tensor:
    """Void pixels `[T, H, W]`, others in each frame."""
    void = torch.zeros(frames, height, width, dtype=torch.bool)
    for t in range(frames):
        void[t, 3 * t : 3 * t + 9, 5 * t : 5 * t + 14] = True
    return void


class Setup:
    """Two clips, of three and of no instances, and the predictions of two layers of different sizes."""

    def __init__(
        self, frames: int = T, dtype: torch.dtype = torch.float32, counts: tuple[int, ...] = (3, 0, 2)
    ) -> None:
        generator = torch.Generator().manual_seed(7)
        self.masks = [blobs(count, frames, seed) for seed, count in enumerate(counts)]
        self.labels = [torch.arange(count) % 2 for count in counts]
        batch, queries = len(counts), 5
        shapes = ((6, 9), (10, 14))
        self.classes = [torch.randn(batch, queries, 3, generator=generator).to(dtype) for _ in shapes]
        self.logits = [
            (3 * torch.randn(batch, queries, frames, *shape, generator=generator)).to(dtype).requires_grad_()
            for shape in shapes
        ]

    @property
    def targets(self) -> list[dict[str, Any]]:
        return [{"masks": m, "labels": n} for m, n in zip(self.masks, self.labels, strict=True)]

    def with_void(self) -> MaskTargets:
        """The targets of all clips, of which the first has void pixels."""
        void = [region(self.masks[0].shape[1])] + [None] * (len(self.masks) - 1)
        pairs = zip(self.masks, void, strict=True)
        return MaskTargets.cat([MaskTargets.from_masks(masks, ignore=each) for masks, each in pairs])


def read(planes: Tensor, points: Tensor) -> Tensor:
    """Read planes `[n, h, w]` at points `[n, P, 2]`."""
    return grid_sample(planes[:, None], 2 * points[:, None] - 1, align_corners=False)[:, 0, 0]


def counting(void: Tensor, points: Tensor) -> Tensor:
    """Which points `[n, P, 2]` count: those that lie in no void pixel of `[n, H, W]`."""
    x, y = (points[..., axis].mul(void.shape[2 - axis]).long() for axis in (0, 1))
    return ~void.flatten(1).gather(1, y * void.shape[2] + x)


def dense_terms(logits: Tensor, masks: Tensor, points: Tensor, void: Tensor) -> tuple[Tensor, Tensor]:
    """The video criterion's terms of `[N, T, h, w]` at points `[N * T, P, 2]`: summed over planes, `[N, T]` each."""
    z = read(logits.flatten(0, 1), points)
    t = read(masks.flatten(0, 1).to(z.dtype), points)
    w = counting(void.flatten(0, 1), points)
    ce = (binary_cross_entropy_with_logits(z, t, reduction="none") * w).sum(1) / w.sum(1)
    s = z.sigmoid() * w
    dice = 1 - (2 * (s * t).sum(1) + 1) / (s.sum(1) + (t * w).sum(1) + 1)
    return ce.view(logits.shape[:2]), dice.view(logits.shape[:2])


@pytest.mark.parametrize("factored", [False, True])
def test_one_frame_is_the_image(backend: str, factored: bool) -> None:
    """Bit for bit: matches, losses and gradients; one of them has void pixels."""
    setup = Setup(frames=1)
    void = [region(1), None, None]
    found = []
    for clip in (True, False):
        criterion = MaskCriterion(2, sampling=FEW, backend=backend)
        logits: Any = setup.logits if clip else [layer.squeeze(2) for layer in setup.logits]
        leaves = setup.logits
        if factored:
            rows = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
            pixels = torch.randn(3, 4, 1, 9, 11, generator=torch.Generator().manual_seed(2)).requires_grad_()
            shared = pixels if clip else pixels.squeeze(2)
            logits, leaves = [MaskFactors(rows, shared, bias=0.5)] * 2, [rows, pixels]
        targets = []
        for entry, hidden in zip(setup.targets, void, strict=True):
            masks = entry["masks"] if clip else entry["masks"].squeeze(1)
            ignore = hidden if clip or hidden is None else hidden[0]
            targets.append({**entry, "masks": MaskTargets.from_masks(masks, ignore=ignore)})
        out = criterion(setup.classes, logits, targets, seed=3)
        grads = torch.autograd.grad(out.total, leaves)
        found.append((out.total, out.matches.index, out.per_instance.ce.flatten(), *grads))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_loss_of_video_at_the_same_points(backend: str) -> None:
    """Against the formula of Mask2Former for video, written with `grid_sample`, and its gradient."""
    setup = Setup(dtype=torch.float64)
    pairs = [(torch.tensor([4, 0, 2]), torch.tensor([1, 0, 2])), (torch.tensor([], dtype=torch.int64),) * 2]
    pairs.append((torch.tensor([3, 1]), torch.tensor([0, 1])))
    points = torch.rand(5 * T, 30, 2, dtype=torch.float64)
    logits = setup.logits[1]
    out = MaskLoss(backend=backend)(logits, setup.with_void(), pairs, points=points)
    picked = torch.cat([logits[b, q] for b, (q, _) in enumerate(pairs)])
    wanted = torch.cat([setup.masks[b][t] for b, (_, t) in enumerate(pairs)])
    void = torch.stack([region()] * 3 + [torch.zeros_like(region())] * 2)
    ce, dice = dense_terms(picked, wanted, points, void)
    torch.testing.assert_close(out.per_instance.ce, ce)
    torch.testing.assert_close(out.per_instance.dice, dice)
    torch.testing.assert_close(out.total, 5 * ce.sum() / 5 + 5 * dice.sum() / 5)
    for one, other in zip(
        torch.autograd.grad(out.total, logits), torch.autograd.grad((ce + dice).sum(), logits), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("unit", ["frame", "volume"])
def test_pairs_of_predictions_and_targets(unit: str) -> None:
    """As with matches that say the same; masks with frames never belong to logits without."""
    setup = Setup(counts=(3,))
    loss, masks = MaskLoss(sampling=FEW, clips=ClipOptions(unit=unit), backend="reference"), setup.masks[0]
    chosen = setup.logits[0][0, :3]
    out = loss(chosen, masks, seed=1)
    same = loss(setup.logits[0], MaskTargets.from_masks([masks]), [(torch.arange(3), torch.arange(3))], seed=1)
    assert torch.equal(out.total, same.total)
    assert out.per_instance.ce.shape == ((3, T) if unit == "frame" else (3,))
    for logits, options in ((chosen[:, 0], {}), (chosen, {"best_of": True})):
        with pytest.raises(MaskLossError, match="the same frames"):
            loss(logits, masks, **options)
    with pytest.raises(MaskLossError, match="must pair up"):
        loss(chosen[:2], masks)


@pytest.mark.parametrize("focal", [False, True])
def test_matching_costs_over_all_frames(backend: str, focal: bool) -> None:
    """One set of points for the frames of a clip, both terms over T * P points."""
    setup = Setup(dtype=torch.float64)
    options: dict[str, Any] = {"focal_alpha": 0.25, "focal_gamma": 2.0} if focal else {}
    weights = {"class_weight": 0.0, "mask_weight": 1.0, "dice_weight": 10.0}
    matcher = HungarianMatcher(**weights, num_points=50, backend=backend, **options)
    logits = [layer.detach() for layer in setup.logits]
    begun = Step.begin(collate({"masks": setup.with_void(), "labels": setup.labels}), logits, seed=5)
    found = matcher.costs(torch.stack(setup.classes), logits, begun)
    ids = torch.arange(3)
    keys = instance_keys(torch.tensor(5), ids, torch.full_like(ids, ALL_TARGETS))
    points = draw_layout("independent", keys, 50, torch.zeros_like(ids), MATCHER).double()
    for layer, clips in enumerate(logits):
        for clip, masks in enumerate(setup.masks):
            at = points[clip].expand(T, -1, -1)
            z = torch.stack([read(query, at).flatten() for query in clips[clip]])
            if not len(masks):
                continue
            t = torch.stack([read(mask.double(), at).flatten() for mask in masks])
            pair_z, pair_t = z[:, None].expand(-1, len(t), -1), t.expand(len(z), -1, -1)
            ce = binary_cross_entropy_with_logits(pair_z, pair_t, reduction="none")
            s = pair_z.sigmoid()
            if focal:
                # The cost is linear in t, between its values where t is 0 and 1.
                on, off = -0.25 * (1 - s) ** 2 * logsigmoid(pair_z), -0.75 * s**2 * logsigmoid(-pair_z)
                ce = on * pair_t + off * (1 - pair_t)
            w = torch.ones(T * 50) if clip else counting(region(), at).flatten()
            ce, s = (ce * w).sum(2) / w.sum(), s * w
            dice = 1 - (2 * (s * pair_t).sum(2) + 1) / (s.sum(2) + (pair_t * w).sum(2) + 1)
            torch.testing.assert_close(found[layer, clip, :, : len(t)], ce + 10 * dice)


def test_matching_costs_of_planes_that_are_copied() -> None:
    """The CPU copies planes of half precision before it reads them, large ones in bands of rows."""
    masks = MaskTargets.from_masks([torch.rand(count, T, H, W) > 0.5 for count in (2, 1)])
    logits = [torch.randn(2, 3, T, *size).bfloat16() for size in ((90, 120), (7, 9))]
    job = Job(group(planes(masks)), Draw(torch.tensor([4, 5]), torch.tensor(3), 40), Term())
    found, wanted = (ops.match_cost(logits, (2, 1), job, backend) for backend in ("cpu", "reference"))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("encoding", ["bits", "labels", "values"])
def test_kernels_against_the_reference(encoding: str) -> None:
    """The criterion on the CPU's kernels and on the reference, for every encoding."""
    setup = Setup(counts=(3, 2))
    if encoding == "labels":
        maps = [torch.zeros(T, H, W, dtype=torch.int32) for _ in setup.masks]
        for drawn, masks in zip(maps, setup.masks, strict=True):
            for n, mask in enumerate(masks):
                drawn[mask] = n + 1
        packed = MaskTargets.from_label_map(maps, [[1, 2, 3], [1, 2]], ignore=region())
    else:
        dense = [masks.float() for masks in setup.masks]
        packed = MaskTargets.from_masks(dense, soft=encoding == "values", ignore=region())
    assert packed.encoding == encoding
    targets = {"masks": packed, "labels": setup.labels}
    found = []
    for backend in ("reference", "cpu"):
        out = MaskCriterion(2, sampling=FEW, backend=backend)(setup.classes, setup.logits, targets, seed=1)
        found.append((out.total, out.per_instance.dice, *torch.autograd.grad(out.total, setup.logits)))
        assert out.per_instance.ce.shape == (10, T)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("size", [(6, 9), (3, 4)])
def test_factors_are_the_dense_logits(shared: bool, size: tuple[int, int]) -> None:
    """Masks as products, formed a few instances at a time, with gradients to embeddings, features and biases."""
    setup = Setup()
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randn(3, 5, 4, generator=generator).requires_grad_() for _ in range(2)]
    pixels = torch.randn(3, 4, T, *size, generator=generator).requires_grad_()
    other = pixels if shared else torch.randn(3, 4, T, 8, 7, generator=generator).requires_grad_()
    bias = torch.randn(3, 5, generator=generator).requires_grad_()
    leaves = [*rows, pixels, bias] + ([] if shared else [other])
    # Planes of two instances fit at a time.
    factors = [
        MaskFactors(row, features, bias, scratch_mb=2.1 * T * 54 * 4 / 2**20)
        for row, features in zip(rows, (pixels, other), strict=True)
    ]
    assert factors[0].ndim == 5
    assert factors[0].shape == (3, 5, T, *size)
    criterion = MaskCriterion(2, sampling=FEW, backend="cpu")
    found = []
    for logits in (factors, [each.dense() for each in factors]):
        out = criterion(setup.classes, logits, setup.targets, seed=2)
        found.append((out.matches.index, out.per_instance.ce, *torch.autograd.grad(out.total, leaves)))
    for one, wanted in zip(*found, strict=True):
        torch.testing.assert_close(one, wanted)


def test_points_are_those_of_each_clip_and_plane() -> None:
    """The loss of a clip doesn't depend on the clips beside it."""
    setup = Setup(counts=(2, 3))
    criterion = MaskCriterion(2, sampling=FEW)
    both = criterion(setup.classes, setup.logits, setup.targets, seed=9)
    alone = criterion(
        [each[1:] for each in setup.classes],
        [each[1:] for each in setup.logits],
        setup.targets[1:],
        seed=9,
        image_ids=[1],
    )
    mine = both.matches.index[:, 1] == 1
    torch.testing.assert_close(both.per_instance.ce[mine], alone.per_instance.ce, rtol=0, atol=0)


def test_frames_that_count_and_what_divides(backend: str) -> None:
    setup = Setup(counts=(3, 2))
    parts = {}
    for frames in ("all", "present"):
        for divide_by in ("instances", "frames"):
            clips = ClipOptions(frames=frames, divide_by=divide_by)
            criterion = MaskCriterion(2, sampling=FEW, clips=clips, backend=backend)
            parts[frames, divide_by] = criterion(setup.classes, setup.logits, setup.targets, seed=1)
    out = parts["all", "instances"]
    ce = out.per_instance.ce.view(2, 5, T)
    packed = MaskTargets.from_masks(setup.masks)
    present = packed.present[out.matches.target_rows(packed.first_rows)].view(2, 5, T)
    assert present.sum() == 2 * 5 * (T - 1)
    wanted = {
        ("all", "instances"): ce.sum((1, 2)) / 5,
        ("all", "frames"): ce.mean((1, 2)),
        ("present", "instances"): (ce * present).sum((1, 2)) / 5,
        ("present", "frames"): (ce * present).sum((1, 2)) / present.sum((1, 2)),
    }
    for which, value in wanted.items():
        torch.testing.assert_close(parts[which].loss_mask, value)
        assert torch.equal(parts[which].loss_class, out.loss_class)


def test_absent_frames_do_not_bring_in_their_nan() -> None:
    setup = Setup(counts=(2,))
    logits = [layer.detach().clone() for layer in setup.logits]
    present = MaskTargets.from_masks(setup.masks).present
    pairs = [(torch.tensor([0, 1]), torch.tensor([0, 1]))]
    for layer in logits:
        layer[0, :2][~present] = float("nan")
        layer.requires_grad_()
    criterion = MaskCriterion(2, sampling=FEW, clips=ClipOptions(frames="present"))
    out = criterion(setup.classes, logits, setup.targets, matches=pairs)
    out.total.backward()
    assert out.total.isfinite()
    assert all(layer.grad.isfinite().all() for layer in logits)


def test_presence_can_be_told() -> None:
    """Annotations may say that an instance is there where its mask is empty, behind another one."""
    setup = Setup(counts=(2,))
    packed = MaskTargets.from_masks(setup.masks[0])
    everywhere = packed.with_presence(torch.ones(2, T, dtype=torch.bool))
    some, all_frames = ClipOptions(frames="present"), ClipOptions()
    losses = [
        MaskCriterion(2, sampling=FEW, clips=clips)(
            setup.classes, setup.logits, {"masks": masks, "labels": setup.labels}, seed=0
        ).total
        for masks, clips in ((everywhere, some), (packed, all_frames), (packed, some))
    ]
    torch.testing.assert_close(losses[0], losses[1])
    assert losses[2] < losses[1]
    with pytest.raises(MaskLossError, match=r"presence must be bool \[2, 3\]"):
        packed.with_presence(torch.ones(2, 2, dtype=torch.bool))


def test_instance_weights_and_totals_of_a_step() -> None:
    """Micro-batches of clips add up to the batch."""
    setup = Setup(counts=(3, 2))
    packed = [MaskTargets.from_masks(masks) for masks in setup.masks]
    weights = [torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.5, 1.0])]
    for clips in (ClipOptions(), ClipOptions(divide_by="frames"), ClipOptions(frames="present", divide_by="frames")):
        criterion = MaskCriterion(2, sampling=FEW, clips=clips)
        whole = criterion(setup.classes, setup.logits, setup.targets, seed=1, instance_weights=weights)
        told = weights
        if clips.frames == "present":
            told = [each * masks.present.sum(1) for each, masks in zip(weights, packed, strict=True)]
        totals = step_totals([[3], [2]], 5, instance_weights=[[each] for each in told])
        parts = []
        for clip in range(2):
            own = slice(clip, clip + 1)
            with step(totals=totals, image_ids=[clip], seed=1):
                out = criterion(
                    [each[own] for each in setup.classes],
                    [each[own] for each in setup.logits],
                    setup.targets[own],
                    instance_weights=weights[own],
                )
            parts.append(out.loss_mask)
        torch.testing.assert_close(sum(parts), whole.loss_mask)
    with pytest.raises(MaskLossError, match=r"totals\.instance_weight"):
        criterion(setup.classes, setup.logits, setup.targets, totals=StepTotals(5.0, 10.0))
    # A micro-batch without targets, whose masks say nothing of frames.
    nothing, empty = [(torch.empty(0, dtype=torch.int64),) * 2], MaskTargets.from_masks([torch.zeros(0, 8, 8)])
    with step(totals=totals):
        assert MaskLoss(sampling=FEW, clips=clips)(setup.logits[0][:1], empty, nothing).total == 0


def test_groups_of_queries() -> None:
    setup = Setup(counts=(2, 1))
    queries = [torch.cat([each, each.flip(1)], 1)[:, :6] for each in setup.classes]
    logits = [torch.cat([each, each.flip(1)], 1)[:, :6] for each in setup.logits]
    out = MaskCriterion(2, sampling=FEW, groups=3)(queries, logits, setup.targets, seed=1)
    assert len(out.matches) == 2 * 3 * 3
    assert out.per_instance.ce.shape == (18, T)
    torch.testing.assert_close(out.loss_mask, out.per_instance.ce.view(2, -1).sum(1) / 9)


def test_planes_of_matches() -> None:
    setup = Setup(counts=(2, 1))
    out = MaskCriterion(2, sampling=FEW)(setup.classes, setup.logits, setup.targets)
    planes = matches_of_planes(out.matches, T)
    query, target = planes.index[:, 2:].unbind(1)
    assert torch.equal(query // T, out.matches.index[:, 2].repeat_interleave(T))
    assert torch.equal(query % T, target % T)
    assert planes.layer_sizes == (9, 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.logits.__setitem__(0, s.logits[0][:, :, :2]), "must agree in batch size"),
        (lambda s: setattr(s, "logits", [each[:, :, :2] for each in s.logits]), "the same frames"),
        (lambda s: setattr(s, "logits", [each[:, :, 0] for each in s.logits]), "the same frames"),
        (lambda s: setattr(s, "masks", [m[:, 0] for m in s.masks]), "the same frames"),
        (lambda s: s.masks.__setitem__(0, s.masks[0][:, :2]), "one number of frames"),
        (lambda s: s.masks.__setitem__(0, s.masks[0][:, 0]), r"images, or clips|must be \[N, T, H, W\]"),
        (lambda s: setattr(s, "logits", [each[None] for each in s.logits]), r"must be \[B, Q, h, w\]"),
    ],
)
def test_what_does_not_fit(change: Any, message: str) -> None:
    setup = Setup(counts=(3, 2))
    change(setup)
    with pytest.raises(MaskLossError, match=message):
        MaskCriterion(2, sampling=FEW)(setup.classes, setup.logits, setup.targets)


def test_options() -> None:
    with pytest.raises(MaskLossError, match="frames must be one of all, present"):
        ClipOptions(frames="some")
    with pytest.raises(MaskLossError, match="divide_by must be one of"):
        ClipOptions(divide_by="planes")
    with pytest.raises(MaskLossTypeError, match="it takes unit, frames, divide_by"):
        ClipOptions(clips="frame")  # type: ignore[call-arg]
    with pytest.raises(MaskLossError, match="clips must be ClipOptions"):
        MaskLoss(clips="present")  # type: ignore[arg-type]
    with pytest.raises(MaskLossError, match=r"ignore region must be bool \[T, H, W\](.|\n)*masks are 3 x 20 x 28"):
        MaskTargets.from_masks(blobs(1), ignore=torch.zeros(H, W, dtype=torch.bool))
    with pytest.raises(MaskLossError, match=r"label maps \[T, H, W\] of integers"):
        MaskTargets.from_label_map(torch.zeros(T, H, W))


def test_stored_as_tall_masks() -> None:
    """Nothing dense is kept, and joining, selecting, moving and looking at it keep frames and presence."""
    masks = [blobs(3), blobs(0), blobs(2, seed=1, height=11, width=17)]
    packed = MaskTargets.from_masks(masks)
    assert repr(packed).startswith("MaskTargets(5 masks in 3 clips of 3 frames, bits, 2 sizes")
    assert packed.nbytes < sum(each.numel() for each in masks) / 8
    wanted = torch.cat([each.flatten(2).any(2) for each in masks])
    assert torch.equal(packed.present, wanted)
    for image, dense in enumerate(masks):
        assert torch.equal(packed.dense(image), dense)
        assert torch.equal(packed[image].dense(), dense)
    again = MaskTargets.cat(list(packed)).select([[2, 0], [], [1]])
    assert torch.equal(again.present, wanted[[2, 0, 4]])
    assert torch.equal(again.dense(0), masks[0][[2, 0]])
    assert again.to("cpu") is again
    with pytest.raises(MaskLossError, match="one number of frames"):
        MaskTargets.cat([packed, MaskTargets.from_masks(blobs(1, 2))])


def test_padded_clips_and_their_windows() -> None:
    masks = blobs(2)
    packed = MaskTargets.from_masks([masks, masks.float()], canvas=(H + 4, W + 3), valid=(0, 0, H, W))
    assert packed.dense(1).shape == (2, T, H + 4, W + 3)
    assert torch.equal(packed.dense(0)[:, :, :H, :W], masks)
    torch.testing.assert_close(packed.windows[1], torch.tensor([0, 0, W / (W + 3), H / (H + 4)]))
    labels = masks[0].to(torch.uint8) + 2 * masks[1].to(torch.uint8) * ~masks[0]
    padded = MaskTargets.from_label_map(labels, [0, 2], canvas=(H + 4, W + 3))
    assert not padded.dense()[0, :, H:].any()
    assert torch.equal(padded.dense()[1, :, :H, :W], labels == 2)
    lowest = torch.where(masks[0], -128, 0).to(torch.int8)  # an id like any other, and not what lies beside the frame
    padded = MaskTargets.from_label_map(lowest, [-128], canvas=(H + 4, W + 3))
    assert torch.equal(padded.dense()[0, :, :H, :W], masks[0])
    assert not padded.dense()[0, :, H:].any()


@pytest.mark.parametrize("canvas", [None, (H + 4, W + 3)])
def test_void_pixels_of_clips_in_every_form(canvas: tuple[int, int] | None) -> None:
    """As a region, as a value of masks and as one of label maps: the same is stored, also on a canvas."""
    masks, void = blobs(2) & ~region(), region()
    masks[1] &= ~masks[0]
    values, labels = masks.to(torch.uint8), (masks[0] + 2 * masks[1]).to(torch.uint8)
    values[0, void], labels[void] = 255, 255
    packed = [
        MaskTargets.from_masks(masks, ignore=void.numpy(), canvas=canvas),
        MaskTargets.from_masks(values, ignore_value=255, canvas=canvas),
        MaskTargets.from_label_map(labels, ignore_value=255, canvas=canvas),
    ]
    for each in packed:
        assert torch.equal(each.ignore, packed[0].ignore)
        assert torch.equal(each.images[:, IGNORE_SIZE:], packed[0].images[:, IGNORE_SIZE:]) or each is packed[2]
        assert torch.equal(each.dense(), packed[0].dense())
        assert torch.equal(planes(each).table[:, IGNORE_OFFSET], planes(packed[0]).table[:, IGNORE_OFFSET])
    soft = torch.zeros(1, 2, 4, 4)
    soft[0, 0, 1], soft[0, 1, 2] = 255, 0.5
    assert MaskTargets.from_masks(soft, ignore_value=255).present.tolist() == [[False, True]]
    with pytest.raises(MaskLossError, match="ignore_value must be no target's id"):
        MaskTargets.from_label_map(labels, [1, 255], ignore_value=255)
    with pytest.raises(MaskLossError, match="integer masks must be 0 or 1"):
        MaskTargets.from_masks(values)


# ------------------------------------------------------------------------------------ Mask2Former's own code for video


def video_targets(setup: Setup) -> list[dict[str, Any]]:
    """As Mask2Former's own code prepares them: float masks, and numbers of instances, -1 where one is away."""
    found = []
    for masks, labels in zip(setup.masks, setup.labels, strict=True):
        ids = torch.arange(len(masks))[:, None].expand(-1, T).clone()
        ids[~masks.flatten(2).any(2)] = -1
        found.append({"masks": masks.float(), "labels": labels, "ids": ids})
    return found


def video_criterion(**options: Any) -> SetCriterion:
    matcher = DetrMatcher(2.0, 5.0, 5.0, 40)
    weights = {f"{name}{layer}": 1.0 for name in ("loss_ce", "loss_mask", "loss_dice") for layer in ("", "_0")}
    return SetCriterion(2, matcher, weights, 0.1, ["labels", "masks"], 40, **options)


def test_set_criterion_for_video() -> None:
    """The dicts of Mask2Former's own code for video, and its terms: summed over frames, divided by instances."""
    setup = Setup()
    layers = [
        {"pred_logits": each, "pred_masks": masks} for each, masks in zip(setup.classes, setup.logits, strict=True)
    ]
    criterion = video_criterion(video=True)
    with step(seed=4):
        losses = criterion(layers[1] | {"aux_outputs": layers[:1]}, video_targets(setup))
        found = MaskCriterion(2, sampling=FEW)(setup.classes[::-1], setup.logits[::-1], setup.targets)
        pairs = criterion.matcher(layers[1], video_targets(setup))
    for layer, suffix in enumerate(("", "_0")):
        torch.testing.assert_close(losses[f"loss_mask{suffix}"], found.loss_mask[layer])
        torch.testing.assert_close(losses[f"loss_dice{suffix}"], found.loss_dice[layer])
        torch.testing.assert_close(losses[f"loss_ce{suffix}"], found.loss_class[layer])
    for mine, theirs in zip(pairs, found.matches.pairs(0), strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])


def test_label_maps_of_clips_stand_in_targets() -> None:
    """With void pixels, which the criteria find by their value in either form; and differ from pixels outside."""
    setup = Setup()
    drawn = {"pred_logits": setup.classes[0], "pred_masks": setup.logits[0]}
    maps, dense, outside = [], [], []
    for masks, labels in zip(setup.masks, setup.labels, strict=True):
        numbers = torch.arange(1, len(masks) + 1)
        painted = (masks * numbers[:, None, None, None]).amax(0) if len(masks) else torch.zeros(T, H, W)
        painted[region()] = 255
        maps.append({"masks": painted.to(torch.uint8), "ids": numbers, "labels": labels})
        inside = painted == numbers[:, None, None, None]
        outside.append({"masks": inside, "labels": labels})
        dense.append({"masks": inside.byte().masked_fill(region(), 255), "labels": labels})
    options = {"ignore_value": 255}
    with step(seed=4):
        found, wanted = (video_criterion(video=True, **options)(drawn, targets) for targets in (maps, dense))
        whole = MaskCriterion(2, sampling=FEW, ignore_value=255)(setup.classes[0], setup.logits[0], maps)
        pairs = [(torch.arange(len(each)), torch.arange(len(each))) for each in setup.labels]
        layers = [LayerMasks(sampling=FEW, ignore_value=255)(drawn, targets, pairs, 5.0) for targets in (maps, dense)]
        other = video_criterion(video=True)(drawn, outside)
    for one, same in ((found, wanted), layers):
        for name, value in same.items():
            assert torch.equal(one[name], value), name
    torch.testing.assert_close(whole.loss_dice[0], wanted["loss_dice"])
    assert other["loss_mask"] != wanted["loss_mask"]


def test_set_criterion_is_told_which_it_gets() -> None:
    setup = Setup()
    outputs = {"pred_logits": setup.classes[0], "pred_masks": setup.logits[0]}
    with pytest.raises(MaskLossError, match=r"must be \[B, Q, h, w\] where video=False"):
        video_criterion()(outputs, video_targets(setup))
    outputs["pred_masks"] = setup.logits[0][:, :, 0]
    with pytest.raises(MaskLossError, match=r"must be \[B, Q, T, h, w\] where video=True"):
        video_criterion(video=True)(outputs, [{**t, "masks": t["masks"][:, 0]} for t in setup.targets])
    with pytest.raises(MaskLossError, match="video must be True or False"):
        video_criterion(video=5)


@pytest.mark.parametrize("unit", ["frame", "clip", "volume"])
@pytest.mark.parametrize("nothing", [None, torch.zeros(0), torch.zeros(0, 16, 16)], ids=["None", "[0]", "[0, H, W]"])
def test_a_batch_of_clips_without_a_target(unit: str, nothing: Tensor | None) -> None:
    """As mappers leave it, and as usual with one clip in a batch: nothing says that these are clips."""
    class_logits, logits = torch.randn(1, 6, 4, requires_grad=True), torch.randn(1, 6, 5, 8, 8, requires_grad=True)
    criterion = MaskCriterion(3, clips=ClipOptions(unit=unit), sampling=PointSampling(64))
    entry = {"labels": torch.zeros(0, dtype=torch.int64)}
    out = criterion(class_logits, logits, [entry | {"masks": nothing}], seed=0)
    empty = criterion(class_logits, logits, [entry | {"masks": torch.zeros(0, 5, 16, 16)}], seed=0)
    assert torch.equal(out.total, empty.total)
    assert out.loss_mask.tolist() == out.loss_dice.tolist() == [0.0]
    out.total.backward()
    assert logits.grad is not None and not logits.grad.any()


def test_volumes_need_slices() -> None:
    loss = MaskLoss(clips=ClipOptions(unit="volume"), sampling=PointSampling(64))
    masks, pairs = torch.rand(2, 16, 16) > 0.5, [(torch.tensor([0, 1]), torch.tensor([0, 1]))]
    with pytest.raises(MaskLossError, match="volumes need targets with a dimension of slices"):
        loss(torch.randn(1, 6, 5, 8, 8), MaskTargets.from_masks(masks), pairs)
