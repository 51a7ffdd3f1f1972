"""Pictures: that the points shown are those of the loss, and that everything asked for is on them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from PIL import Image

from maskloss import MaskCriterion, PointSampling, functional, plots
from maskloss.training import pictures
from maskloss.training.config import TrainConfig
from maskloss.training.digits import DigitScenes
from maskloss.training.evaluate import Prediction, evaluate, predict
from maskloss.training.run import build_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source() -> DigitScenes:
    return DigitScenes(64, 20)


@pytest.fixture(scope="module")
def model():
    return build_model(TrainConfig(), 10)


def test_the_points_shown_are_the_points_of_the_loss(source, model):
    """The loss, computed once more at the points of the snapshot, is the loss of the criterion."""
    criterion = MaskCriterion(10, sampling=PointSampling(num_points=200))
    shot = pictures.snapshot(model, criterion, source, 1, CPU)
    scene = source.held_out[shot.scene]
    assert shot.points.shape == (len(scene.labels), 200, 2) and shot.num_uncertain == 150
    with torch.no_grad():
        output = model.eval()(scene.image[None])
    truth = {"masks": scene.targets, "labels": scene.labels}
    out = criterion(output.class_logits[-1], output.mask_logits[-1], [truth], seed=pictures.SEED)
    [(queries, targets)] = out.matches.pairs()
    z = functional.point_sample(shot.logits, shot.points)
    t = functional.point_sample(scene.masks().float(), shot.points)
    torch.testing.assert_close(functional.mask_bce(z, t)[targets], out.per_instance.ce)
    torch.testing.assert_close(functional.mask_dice(z, t)[targets], out.per_instance.dice)
    assert torch.equal(shot.logits[targets], output.mask_logits[-1][0, queries])


def test_the_scene_to_follow_is_the_most_crowded_of_the_first(source):
    followed = source.held_out[pictures.telling(source.held_out)]
    assert len(followed.labels) == max(len(scene.labels) for scene in source.held_out[:16])


def test_scenes_are_shown_in_order_whatever_was_found(source):
    assert pictures.show_first(source.held_out) == list(range(pictures.SHOWN))


def test_a_run_that_found_nothing_can_be_drawn(source, model, tmp_path):
    nothing = Prediction(torch.zeros(0, 64, 64).bool(), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    predictions = [nothing] * len(source.held_out)
    scores = evaluate(source.held_out, predictions, source.class_names)
    history = [{"step": 0, "held_out": scores.as_dict()}]
    history.append({"step": 1, "total": 9.0, "loss_class": 2.0, "loss_mask": 0.7, "loss_dice": 0.9})
    shot = pictures.snapshot(model, MaskCriterion(10, sampling=PointSampling(num_points=50)), source, 1, CPU)
    files = pictures.draw_all(tmp_path, source, predictions, history, [shot], scores)
    assert list(files) == ["overview", "curves", "predictions", "points"]
    for path in files.values():
        with Image.open(path) as image:
            assert len(image.convert("L").getcolors()) > 50


def test_a_single_scene_can_be_drawn(source, model):
    scene = source.held_out[0]
    [prediction] = predict(model, [scene], CPU)
    assert len(pictures.scenes([(scene, prediction)], source.class_names).axes) == 3


@pytest.fixture
def axes():
    return plots.new_figure(3, 3).subplots()


def test_uncertain_and_uniform_points_have_their_own_colours(axes):
    points = torch.rand(40, 2)
    plots.draw_points(axes, torch.zeros(8, 8), points, 30)
    uniform, uncertain = axes.collections
    assert torch.equal(torch.from_numpy(uncertain.get_offsets().data).float(), points[:30])
    assert torch.equal(torch.from_numpy(uniform.get_offsets().data).float(), points[30:])
    assert (uncertain.get_facecolor()[0, :3] == plots.rgb(plots.ORANGE)).all()


def test_an_outline_lies_where_the_mask_ends(axes):
    target = torch.zeros(10, 20, dtype=torch.bool)
    target[2:6, 5:20] = True
    plots.draw_points(axes, torch.zeros(8, 8), torch.rand(4, 2), 3, target=target)
    [outline] = [each for each in axes.collections if hasattr(each, "levels")]
    [[path]] = [[path for path in outline.get_paths() if len(path.vertices)]]
    low, high = path.vertices.min(0), path.vertices.max(0)
    # Bilinear, so half a pixel past the centres; closed at the right edge.
    assert low.tolist() == pytest.approx([0.25, 0.2], abs=1e-6)
    assert high.tolist() == pytest.approx([1.0, 0.6], abs=1e-6)


def test_every_instance_has_its_name(axes):
    masks = torch.zeros(3, 16, 16, dtype=torch.bool)
    masks[0, :4, :4] = masks[1, 10:, 10:] = True
    plots.draw_instances(axes, torch.rand(3, 8, 8), masks, ["up", "low", "empty"], plots.COLORS[:3])
    tags = {text.get_text(): text for text in axes.texts}
    assert set(tags) == {"up", "low"}
    assert tags["up"].get_va() == "top" and tags["low"].get_va() == "bottom"


def test_names_of_curves_do_not_overlap(axes):
    curves = {"a": ([0, 1], [0.0, 0.5]), "b": ([0, 1], [0.0, 0.5]), "c": ([0, 1], [0.0, 1.0])}
    plots.draw_curves(axes, curves, title="curves")
    heights = sorted(text.xy[1] for text in axes.texts)
    assert len(axes.lines) == 3 and min(b - a for a, b in pairwise(heights)) > 0.05


def test_matplotlib_is_imported_by_need_and_pyplot_never():
    import subprocess
    import sys

    check = (
        "import sys; from maskloss import plots; assert 'matplotlib' not in sys.modules; "
        "plots.new_figure(1, 1); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], check=True, timeout=120)
