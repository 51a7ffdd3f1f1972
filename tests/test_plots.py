"""Pictures: that what they show is what the loss computes, and that everybody can tell their colors apart."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image

from maskloss import MaskCriterion, MaskLoss, MaskLossError, MaskTargets, PointSampling, _palette, plots

# What people with each kind of color blindness see of linear RGB: Machado, Oliveira and Fernandes (2009), severity 1.
VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def seen(color, vision):
    """A color as CIELAB has it, through somebody's eyes."""
    rgb = plots.rgb(color)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(VISION[vision]) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    f = np.where((xyz := xyz / [0.9505, 1, 1.089]) > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


# Of the arms of the benchmark.
ARM_COLORS = ("TEAL", "VIOLET", "ORANGE", "WINE", "SAND", "GRAY", "NAVY", "PINK")


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize(
    ("colors", "apart"),
    [
        (_palette.COLORS, 15),
        ([getattr(_palette, each) for each in ARM_COLORS], 15),
    ],
)
def test_colors_stay_apart_for_everybody(colors, apart, vision):
    for a, b in itertools.combinations(colors, 2):
        assert np.linalg.norm(seen(a, vision) - seen(b, vision)) > apart, (a, b)


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("scale", [_palette.CONFIDENCE, _palette.LOSS])
def test_scales_darken_all_the_way(scale, vision):
    lightness = [seen(color, vision)[0] for color in scale]
    assert all(a > b + 5 for a, b in itertools.pairwise(lightness))


# --------------------------------------------------------------------------------------------------------- the numbers


@pytest.fixture
def pair():
    """Two predictions that are nearly right, and their targets, of another size."""
    grid = (torch.arange(48) + 0.5) / 48
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    masks = torch.stack([torch.hypot(x - 0.4, y - 0.5) < 0.3, (x - 0.6).abs() + (y - 0.4).abs() < 0.35])
    coarse = (torch.arange(20) + 0.5) / 20
    y, x = torch.meshgrid(coarse, coarse, indexing="ij")
    logits = torch.stack(
        [22 * (0.28 - torch.hypot(x - 0.43, y - 0.5)), 18 * (0.3 - (x - 0.6).abs() - (y - 0.43).abs())]
    )
    return logits + 0.1 * torch.randn_like(logits), masks


LOSSES = {
    "defaults": {},
    "weights": {"ce_weight": 2.0, "dice_weight": 3.0},
    "focal": {"focal_alpha": 0.25, "focal_gamma": 2.0},
    "border, nearest, squares": {"padding_mode": "border", "target_mode": "nearest", "dice": "soft"},
}


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("ratio", [0.0, 0.75, 1.0])
def test_what_is_inspected_is_the_loss(pair, options, ratio):
    logits, masks = pair
    loss = MaskLoss(sampling=PointSampling(300, 3.0, ratio), backend="reference", **options)
    out = loss(logits, masks, seed=5)
    found = plots.inspect_points(logits, masks, loss=loss, seed=5)
    for each, ce, dice in zip(found, *out.per_instance, strict=True):
        assert each.ce == pytest.approx(float(ce), rel=1e-5) and each.dice == pytest.approx(float(dice), rel=1e-5)
        assert float(each.loss.mean()) == pytest.approx(each.ce, rel=1e-5)
        assert 0 <= each.ce_of_uncertain <= each.ce * (1 + 1e-6)
    assert sum(each.total for each in found) / 2 == pytest.approx(float(out.total), rel=1e-5)


def test_windows_and_ignore_regions_are_those_of_the_targets(pair):
    logits, masks = pair
    ignore = torch.zeros(48, 48, dtype=torch.bool)
    ignore[20:30, 5:40] = True
    loss = MaskLoss(sampling=PointSampling(200), backend="reference")
    window = (0.125, 0.25, 0.5, 0.75)
    targets = MaskTargets.from_masks(masks, ignore=ignore, valid=(12, 6, 36, 24))
    index = (torch.arange(2), torch.arange(2))
    out = loss(logits[None], targets, [index], seed=9, image_ids=[0])
    found = plots.inspect_points(logits, masks, loss=loss, ignore=ignore, window=window, seed=9)
    assert [each.ce for each in found] == pytest.approx(out.per_instance.ce.tolist(), rel=1e-5)
    assert [each.dice for each in found] == pytest.approx(out.per_instance.dice.tolist(), rel=1e-5)
    low, high = torch.tensor(window[:2]), torch.tensor(window[:2]) + torch.tensor(window[2:])
    for each in found:
        assert 0 < float(each.weight.sum()) < 200
        for points in (each.points, each.candidates):
            assert bool(((points >= low) & (points <= high)).all())


def test_chosen_are_the_candidates_of_smallest_logit(pair):
    sampling = PointSampling(200, 2.5, 0.6)
    for each in plots.inspect_points(*pair, loss=MaskLoss(sampling=sampling), seed=3):
        assert len(each.candidates) == sampling.num_candidates and each.num_uncertain == sampling.num_uncertain
        chosen = each.candidate_z.abs() <= each.threshold
        assert torch.equal(each.candidates[chosen], each.points[: each.num_uncertain])
        assert each.threshold == float(each.candidate_z.abs().sort().values[sampling.num_uncertain - 1])


def test_pairs_that_do_not_pair_up():
    with pytest.raises(MaskLossError, match=r"(?s)mask_logits and masks must pair up.*\[2, 4, 4\].*\[3, 8, 8\]"):
        plots.inspect_points(torch.zeros(2, 4, 4), torch.zeros(3, 8, 8))


# -------------------------------------------------------------------------------------------------------- the drawings


@pytest.fixture
def axes():
    return plots.new_figure(3, 3).subplots()


@pytest.fixture
def found(pair):
    return plots.inspect_points(*pair, loss=MaskLoss(sampling=PointSampling(400)), seed=1)[0]


def offsets(collection):
    return torch.from_numpy(np.asarray(collection.get_offsets())).float()


def scattered(axes):
    return [each for each in axes.collections if hasattr(each, "get_sizes") and len(each.get_sizes())]


def test_candidates_and_chosen_are_drawn_where_they_are(axes, found):
    plots.draw_candidates(axes, found)
    everyone, chosen = scattered(axes)
    assert torch.equal(offsets(everyone), found.candidates)
    assert torch.equal(offsets(chosen), found.points[: found.num_uncertain])
    assert (chosen.get_facecolor()[0, :3] == plots.rgb(plots.ORANGE)).all()


def test_losses_are_drawn_at_their_points_the_largest_on_top(axes, found):
    drawn = plots.draw_point_losses(axes, found)
    values = torch.from_numpy(np.asarray(drawn.get_array()))
    assert torch.equal(values, found.loss.sort().values)
    assert torch.equal(offsets(drawn)[-1], found.points[found.loss.argmax()])


def test_points_without_weight_are_crosses(axes, found):
    weight = found.weight.clone()
    weight[:7] = 0
    plots.draw_point_losses(axes, found._replace(weight=weight))
    counted, ignored = scattered(axes)
    assert torch.equal(offsets(ignored), found.points[:7]) and len(offsets(counted)) == 393


def test_the_histogram_counts_every_candidate_and_colors_the_chosen(axes, found):
    plots.draw_uncertainty(axes, found)
    bars = [(bar.get_x() + bar.get_width(), bar.get_height(), bar.get_facecolor()[:3]) for bar in axes.patches]
    chosen = sum(height for _, height, color in bars if color == tuple(plots.rgb(plots.ORANGE)))
    assert chosen == pytest.approx(found.num_uncertain / len(found.candidates), abs=2 / len(found.candidates))
    assert sum(height for _, height, _ in bars) == pytest.approx(1, abs=0.02)
    assert f"{found.threshold:.2f}" in axes.texts[0].get_text()


def test_without_candidates_there_is_nothing_to_choose(axes, pair):
    loss = MaskLoss(sampling=PointSampling(50, importance_ratio=0.0))
    [first, _] = plots.inspect_points(*pair, loss=loss)
    plots.draw_uncertainty(axes, first)
    assert not axes.patches and "uniform" in axes.texts[0].get_text()
    assert len(plots.instance_figure(first).axes) == 7


def test_bars_are_as_long_as_the_terms(axes, found):
    plots.draw_terms(axes, found)
    uncertain, uniform, dice = (bar.get_width() for bar in axes.patches)
    assert uncertain + uniform == pytest.approx(5 * found.ce) and dice == pytest.approx(5 * found.dice)
    assert uncertain == pytest.approx(5 * found.ce_of_uncertain)
    assert f"total  {found.total:.3f}" in [text.get_text() for text in axes.texts]


def test_costs_show_the_matched_first_and_frame_them(axes):
    costs = torch.tensor([[5.0, 6.0], [1.0, 7.0], [4.0, 9.0], [8.0, 2.0], [3.0, 3.5]])
    plots.draw_costs(axes, costs, (torch.tensor([1, 3]), torch.tensor([0, 1])), names=["a", "b"], chosen=1, most=4)
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"query {q}" for q in (1, 3, 4, 2)]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]
    corners = {(patch.get_x(), patch.get_y()): patch.get_edgecolor()[:3] for patch in axes.patches}
    assert set(corners) == {(-0.5, -0.5), (0.5, 0.5)}
    assert corners[0.5, 0.5] == tuple(plots.rgb(plots.ORANGE)) != corners[-0.5, -0.5]


def test_costs_that_are_not_finite_can_be_drawn(axes):
    costs = torch.tensor([[float("nan"), float("inf")], [1.0, float("-inf")]])
    plots.draw_costs(axes, costs, (torch.tensor([0, 1]), torch.tensor([1, 0])))
    assert len(axes.patches) == 2


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_whole_picture_in_every_format(found, ending, tmp_path):
    costs = plots.Costs(torch.rand(5, 2), (torch.tensor([1, 3]), torch.tensor([0, 1])), ["a", "b"], 0)
    figure = plots.instance_figure(found, image=torch.rand(3, 20, 20), costs=costs, name="a", heading="heading")
    assert len(figure.axes) == 8  # four pictures, the scale of the fourth, and three below
    path = tmp_path / f"picture.{ending}"
    figure.savefig(path)
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
    content = path.read_bytes()
    assert content.startswith(start) and len(content) < 3_000_000


def test_many_points_are_pixels_in_a_drawing_of_lines(pair, tmp_path):
    """62,720 points as outlines would make a file of many megabytes that no browser likes."""
    [first, _] = plots.inspect_points(*pair)
    plots.instance_figure(first).savefig(tmp_path / "many.svg")
    assert (tmp_path / "many.svg").stat().st_size < 3_000_000


# ------------------------------------------------------------------------------------------------------- the animation

Shot = namedtuple("Shot", "step logits points num_uncertain")  # noqa: PYI024 (as training makes them)


def shots(count=4):
    generator = torch.Generator().manual_seed(0)
    return [
        Shot(10 * n, 3.0 * n * torch.randn(2, 8, 8, generator=generator), torch.rand(2, 60, 2, generator=generator), 40)
        for n in range(1, count + 1)
    ]


@pytest.mark.parametrize("ending", ["gif", "apng", "webp"])
def test_an_animation_has_a_picture_for_each_snapshot(tmp_path, ending):
    path = plots.animate_points(shots(), tmp_path / f"points.{ending}", targets=torch.ones(2, 16, 16), seconds=0.2)
    with Image.open(path) as opened:
        assert opened.n_frames == 4
        frames = []
        for number in range(4):
            opened.seek(number)
            frames.append(np.asarray(opened.convert("RGB")).astype(int))
    assert all(np.abs(a - b).max() > 50 for a, b in itertools.pairwise(frames))
    assert (np.abs(frames[0] - (255 * plots.rgb(plots.ORANGE)).round()).max(-1) < 40).any(), "orange points are there"


def test_animations_that_cannot_be_made(tmp_path):
    with pytest.raises(MaskLossError, match=r"must end in \.gif"):
        plots.animate_points(shots(), tmp_path / "points.mp4")
    with pytest.raises(MaskLossError, match="there must be snapshots"):
        plots.animate_points([], tmp_path / "points.gif")


def test_matplotlib_is_imported_by_need_and_pyplot_never():
    check = (
        "import sys, torch; from maskloss import plots; assert 'matplotlib' not in sys.modules; "
        "one, at, points = torch.rand(4, 4), torch.rand(8), torch.rand(8, 2); found = plots.Inspection("
        "one, one, points, at, 0.5, points, 4, at, at, torch.ones(8), at, 1.0, 0.5, 5.0, 5.0); "
        "plots.instance_figure(found).savefig('/dev/null', format='png'); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


def test_the_criterion_looks_at_the_same_points(pair):
    """Through matching and all: the points of the picture are those of a training step."""
    logits, masks = pair
    criterion = MaskCriterion(2, sampling=PointSampling(150), backend="reference")
    out = criterion(
        torch.zeros(1, 2, 3), logits.flip(0)[None], [{"masks": masks, "labels": torch.tensor([0, 1])}], seed=4
    )
    [(queries, targets)] = out.matches.pairs()
    assert queries.tolist() == [0, 1] and targets.tolist() == [1, 0]
    found = plots.inspect_points(logits, masks, loss=criterion.mask_loss, seed=4)
    assert [found[n].ce for n in targets] == pytest.approx(out.per_instance.ce.tolist(), rel=1e-5)


# ------------------------------------------------------------------------------------------------- swapped arguments

LOGITS, POINTS, IMAGE = torch.zeros(2, 8, 8), torch.rand(2, 16, 2), torch.rand(3, 8, 8)
AXES = plots.new_figure(2, 2).subplots(1, 1)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: plots.points_figure(POINTS, LOGITS, 4), "points must be [N, P, 2]"),
        (lambda: plots.draw_points(AXES, POINTS[0], LOGITS[0], 4), "points must be [P, 2]"),
        (lambda: plots.draw_points(LOGITS[0], AXES, POINTS[0], 4), "axes must be axes of matplotlib"),
        (lambda: plots.draw_instances(AXES, LOGITS > 0, IMAGE, [], []), "image must be [3, h, w]"),
        (lambda: plots.draw_instances(AXES, IMAGE, IMAGE, [], []), "masks must be bool [T, H, W]"),
        (lambda: plots.draw_image(AXES, IMAGE.permute(1, 2, 0)), "image must be [3, h, w]"),
        (lambda: plots.draw_terms(LOGITS, AXES), "axes must be axes of matplotlib"),
        (lambda: plots.draw_terms(AXES, LOGITS), "found must be from inspect_points"),
        (lambda: plots.instance_figure(IMAGE), "found must be from inspect_points"),
        (lambda: plots.draw_costs(AXES, (POINTS, POINTS), LOGITS[0]), "costs must be [Q, T]"),
        (lambda: plots.draw_curves({}, AXES, title=""), "axes must be axes of matplotlib"),
        (lambda: plots.animate_points("points.gif", []), "the path comes second"),
        (lambda: plots.inspect_points(LOGITS > 0, LOGITS), "mask_logits must be float"),
        (lambda: plots.inspect_points(LOGITS, LOGITS - 1), "masks in [0, 1]"),
        (lambda: plots.draw_points(AXES, LOGITS[0], POINTS[0]), "missing a required argument: 'num_uncertain'"),
    ],
)
def test_swapped_arguments_are_told_by_name(call, text):
    with pytest.raises(MaskLossError) as caught:
        call()
    assert text in str(caught.value)
    assert "hint: " in str(caught.value)
