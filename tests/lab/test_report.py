"""Pictures and the report: that the points shown are those of the loss, and that everything asked for is there."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from maskloss import MaskCriterion, PointSampling, functional
from maskloss.lab.config import TrainConfig
from maskloss.lab.data.digits import DigitScenes
from maskloss.lab.loop.metrics import Metrics
from maskloss.lab.models.clock import PARTS, Clock
from maskloss.lab.models.learners import CompactLearner
from maskloss.lab.results import report, snapshots
from maskloss.lab.results.evaluate import evaluate
from maskloss.lab.results.gallery import Gallery
from maskloss.lab.results.inference import Prediction, Predictor
from maskloss.lab.results.lettering import literal
from maskloss.lab.runfolder import Facts


@pytest.fixture(scope="module")
def source() -> DigitScenes:
    return DigitScenes(64, 12)


@pytest.fixture(scope="module")
def learner() -> CompactLearner:
    return CompactLearner(TrainConfig(num_points=200), 10, 3)


def test_the_points_shown_are_the_points_of_the_loss(source, learner):
    """The loss, computed once more at the points of the snapshot, is the loss of the criterion."""
    shot = snapshots.take(learner, source, 1)
    scene = source.held_out[shot.scene]
    assert shot.points.shape == (len(scene.labels), 200, 2) and shot.num_uncertain == 150
    learner.eval()
    with torch.no_grad():
        output = learner.predict(scene.image[None], torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    criterion = MaskCriterion(10, sampling=PointSampling(num_points=200))
    truth = {"masks": scene.targets, "labels": scene.labels}
    out = criterion(output.class_logits, output.mask_logits, [truth], seed=snapshots.SEED)
    [(queries, targets)] = out.matches.pairs()
    z = functional.point_sample(shot.logits, shot.points)
    t = functional.point_sample(scene.masks().float(), shot.points)
    torch.testing.assert_close(functional.mask_bce(z, t)[targets], out.per_instance.ce)
    torch.testing.assert_close(functional.mask_dice(z, t)[targets], out.per_instance.dice)
    torch.testing.assert_close(shot.losses[targets], torch.stack([out.per_instance.ce, out.per_instance.dice], -1))
    assert torch.equal(shot.logits[targets], output.mask_logits[0, queries])


def test_the_hardest_instances_are_those_with_the_highest_loss(source, learner):
    found = snapshots.hardest(learner, source, 1, 6)
    losses = [hard.loss for hard in found]
    assert len(found) == 6 and losses == sorted(losses, reverse=True)
    every = [snapshots.look(learner, source.probe(number), number, 1) for number in range(12)]
    highest = max(float(5 * shot.losses.sum(1).max()) for shot in every)
    assert losses[0] == pytest.approx(highest)
    assert max([hard.probe.name for hard in found].count(name) for name in {hard.probe.name for hard in found}) <= 2


def test_the_scene_to_follow_is_the_most_crowded_of_the_first(source):
    followed = source.held_out[snapshots.telling(source)]
    assert len(followed.labels) == max(len(scene.labels) for scene in source.held_out)


def test_snapshots_come_back_in_order(source, learner, tmp_path):
    for step in (100, 9):
        snapshots.write_snapshot(tmp_path / "shots", snapshots.take(learner, source, step))
    [first, second], probe, left_out = snapshots.read_snapshots(tmp_path / "shots", source, 100)
    assert (first.step, second.step) == (9, 100) and len(probe.labels) == len(first.logits) and not left_out
    assert [shot.step for shot in snapshots.read_snapshots(tmp_path / "shots", source, 50)[0]] == [9]
    torch.testing.assert_close(first.points, second.points)


def changed(name, change):
    """Write a snapshot anew with one of its tensors changed, or without it if there is no change."""

    def damage(path):
        held = load_file(path)
        tensor = held.pop(name)
        save_file(held if change is None else held | {name: change(tensor).contiguous()}, path)

    return damage


DAMAGE = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a snapshot"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "no facts": changed("facts", None),
    "no points": changed("points", None),
    "facts of floats": changed("facts", lambda held: held.float()),
    "other facts": changed("facts", lambda held: held[:2]),
    "another scene": changed("facts", lambda held: held + torch.tensor([0, 1, 0])),
    "a scene that is not there": changed("facts", lambda held: held + torch.tensor([0, 1000, 0])),
    "more uncertain points than points": changed("facts", lambda held: held + torch.tensor([0, 0, 1000])),
    "fewer instances": changed("logits", lambda held: held[:-1]),
    "flat logits": changed("logits", lambda held: held.flatten(1)),
    "nan": changed("logits", lambda held: held * float("nan")),
    "points in space": changed("points", lambda held: torch.cat([held, held], -1)),
    "losses of others": changed("losses", lambda held: held[:1]),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_ruined_snapshot_is_left_out(source, learner, tmp_path, case):
    for step in (9, 100):
        snapshots.write_snapshot(tmp_path / "shots", snapshots.take(learner, source, step))
    DAMAGE[case](tmp_path / "shots" / "step-00000009.safetensors")
    [shot], _, [told] = snapshots.read_snapshots(tmp_path / "shots", source, 100)
    assert shot.step == 100 and told.startswith("shots/step-00000009.safetensors: it is damaged")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[1]",
        "[" * 100_000,
        "\x00\xff",
        '{"total": 1.0}',
        '{"step": "2", "total": 1.0}',
        '{"step": 2, "total": "low", "loss_mask": 1.0}',
        '{"step": 2, "total": 1.0, "loss_class": [1]}',
        '{"step": 2, "total": Infinity}',
        '{"step": 2, "total": 1' + "0" * 400 + "}",
        '{"step": 2, "held_out": null}',
        '{"step": 2, "held_out": {"ap": 0.5}}',
        '{"step": 2, "held_out": {"ap": 0.5, "ap50": "good", "mean_iou": 1.0}}',
    ],
)
def test_a_ruined_line_of_metrics_is_left_out(tmp_path, line):
    good = {"step": 1, "lr": 0.1, "total": 3.0}, {"step": 3, "held_out": {"ap": None, "ap50": 0.5, "mean_iou": None}}
    texts = [json.dumps(good[0]), line, json.dumps(good[1]), '{"step": 4, "tot']
    (tmp_path / "metrics.jsonl").write_text("\n".join(texts), encoding="utf-8")
    metrics = Metrics(tmp_path, 10, writes=True)
    assert metrics.lines == list(good) and metrics.ruined == ["line 2 of metrics.jsonl"]
    assert Metrics(tmp_path, 10, writes=False).ruined == []


def test_the_report_says_what_was_left_out(source, learner, tmp_path):
    made = material(source, learner)
    made = made._replace(shots=[], probe=None, history=[], summary={**made.summary, "skipped": ["line 2 of <b>"]})
    page = report.write(tmp_path, made)[0].read_text()
    assert "What was left out" in page and "<li>line 2 of &lt;b&gt;</li>" in page


def material(source, learner, names=None, **changes):
    names = names or list(source.class_names)
    gallery = Gallery(2)
    nothing = Prediction(64, 64, [])
    for number in range(4):
        gallery.keep(number, source.held_out[number], nothing)
    scores = evaluate(Predictor(learner, 64, 64, cut=False), source.held_out[:4], names)
    facts = Facts(TrainConfig(lr=1e-3), names, list(range(1, 11)), 3, False, 64, False, 1)
    shot = snapshots.take(learner, source, 5)
    history = [
        {"step": 10, "lr": 1.0, "total": 3.0, "loss_class": 1.0, "loss_mask": 1.0, "loss_dice": 1.0},
        {"step": 10, "held_out": scores.as_dict()},
    ]
    summary = {
        "steps": 100,
        "kept": "the weights of step 80, the best of 5 evaluations",
        "data": dict(source.facts),
        "findings": [{"kind": "suspicious", "text": "a <thing>: 2"}],
        "skipped": [],
        "model": "a model",
        "training_seconds": 12.0,
        "images_per_second": 7.0,
        "time_shares": {"data": 0.1, "model": 0.5, "matching": 0.1, "loss": 0.3, "optimizer": 0.0},
        "machine": {"threads": 2},
    }
    made = report.Material(
        facts, "things", summary, scores, history, gallery.shown, [shot], source.probe(shot.scene), [], **changes
    )
    return made._replace(hardest=snapshots.hardest(learner, source, 5, 2))


def test_the_report_carries_everything_along(source, learner, tmp_path):
    made = material(source, learner)
    paths = report.write(tmp_path, made)
    page = paths[0].read_text()
    assert paths[0].name == "report.html" and all(path.is_file() for path in paths)
    # Two scenes of three pictures, two instances with one snapshot, two hard ones, two charts of the steps,
    # two of the classes; and the animation.
    assert page.count('src="data:image/png;base64,') == 6 + 4 + 4 + 2 + 2
    assert page.count('src="data:image/gif;base64,') == 1
    assert page.count("<img ") == 6 + 4 + 4 + 2 + 2 + 1
    assert "http" not in page and "$" not in page
    for text in ("loss, forward and backward <b>30.0%</b>", "large above 96 × 96", "step 5", "12 seconds"):
        assert text in page, text
    assert all(f'alt="{text}"' in page for text in ("truth", "prediction", "the instance"))
    for path in paths[1:]:
        with Image.open(path) as image:
            assert image.width > 300 and len(image.convert("L").getcolors()) > 20


def test_names_cannot_break_the_page_or_the_pictures(source, learner, tmp_path):
    names = ["$a_{$", "<script>", "a\nb", "箱", "x" * 300, "\\frac", "$", "&amp;", "_{", " "]
    page = report.write(tmp_path, material(source, learner, names))[0].read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_microscopy_has_its_own_curve(source, learner, tmp_path):
    made = material(source, learner)
    matching = {f"{0.5 + 0.05 * step:.2f}": 0.9 - 0.05 * step for step in range(10)}
    made = made._replace(evaluation=dataclasses.replace(made.evaluation, matching=matching))
    page = report.write(tmp_path, made)[0].read_text()
    assert "AP of microscopy" in page and re.search(r"<b>0\.900</b><span>microscopy AP at 0\.5", page)


def test_a_report_with_nothing_in_it(source, learner, tmp_path):
    made = material(source, learner)._replace(history=[], shown=[], shots=[], probe=None, hardest=[])
    page = report.write(tmp_path, made)[0].read_text()
    assert "What was found" not in page and "How it learned" in page


@pytest.mark.parametrize(
    ("name", "shown"), [("$x$", r"\$x\$"), ("a\nb", "a b"), ("x" * 30, "x" * 23 + "…"), ("plain", "plain")]
)
def test_names_are_shown_letter_by_letter(name, shown):
    assert literal(name) == shown


def test_the_clock_measures_what_is_inside_once():
    clock = Clock()
    with clock.part("model"):
        pass
    assert not clock.shares()
    clock.running = True
    now = iter([0.0, 1.0, 3.0, 6.0, 10.0, 11.0, 15.0])
    clock._now = lambda: next(now)
    with clock.part("model"), clock.part("loss"):
        pass
    assert clock.seconds == {"model": 6 - 2, "loss": 2}
    logits = torch.ones(2, requires_grad=True)
    clock.mark_backward(logits)
    with clock.backward():
        logits.sum().backward()
    assert clock.seconds == {"model": 4 + 4, "loss": 2 + 1}
    assert list(clock.shares()) == list(PARTS) and sum(clock.shares().values()) == pytest.approx(1)


def test_the_report_of_a_folder_can_be_repeated_and_has_no_bar_without_a_score(source, learner, tmp_path):
    made = material(source, learner)._replace(history=[], shown=[], shots=[], probe=None, hardest=[])
    facts = made.facts._replace(
        config=TrainConfig(data="my photos", lr=1e-3, augment=False, workers=0), version="1.2.3"
    )
    scores = dataclasses.replace(made.evaluation, ap_small=0.25, ap_medium=float("nan"), ap_large=float("nan"))
    page = report.write(tmp_path, made._replace(facts=facts, evaluation=scores))[0].read_text()
    assert "<pre>maskloss train --data &#39;my photos&#39; --no-augment --workers 0 --lr 0.001</pre>" in page
    assert "<dt>maskloss</dt><dd>1.2.3</dd>" in page and "prefers-color-scheme: dark" in page
    # What means something for generated scenes only.
    assert "<dt>held out</dt>" not in page and "held-out scenes of digits" not in page
    assert '<span title="small">small</span>' in page and '<span title="medium">' not in page and ">–<" not in page
    assert '<span class="kind suspicious">suspicious</span>a &lt;thing&gt;: 2' in page
