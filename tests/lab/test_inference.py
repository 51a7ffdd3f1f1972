"""From logits to instances: cutting, tiles, merging, label maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from maskloss.lab.models.learners import Learner, Output
from maskloss.lab.results import inference
from maskloss.lab.results.inference import Instance, Prediction, Predictor, Tile, merge


def blob(top, left, height, width, score=0.9, label=0) -> Instance:
    return Instance(top, left, np.ones((height, width), dtype=bool), label, score)


A, B = Tile(0, 0, 40, 40), Tile(0, 30, 40, 70)


def test_an_instance_that_both_tiles_see_is_one():
    merged = merge([(A, [blob(5, 31, 8, 7, 0.8)]), (B, [blob(5, 31, 8, 7, 0.9)])])
    assert [(each.box, each.score) for each in merged] == [((5, 31, 13, 38), 0.9)]


def test_an_instance_across_the_edge_is_joined():
    """The left tile sees 20 columns of it, the right one its last 25; they share 10."""
    merged = merge([(A, [blob(5, 20, 8, 20)]), (B, [blob(5, 30, 8, 15)])])
    assert [each.box for each in merged] == [(5, 20, 13, 45)]
    assert merged[0].mask.all()


def test_a_sliver_at_the_edge_belongs_to_what_it_was_cut_off():
    """The tile saw two columns of an instance, and took them for something flat."""
    merged = merge([(A, [blob(5, 38, 3, 2, 0.6)]), (B, [blob(5, 38, 12, 12, 0.9)])])
    assert [each.box for each in merged] == [(5, 38, 17, 50)]


def test_what_was_cut_gives_way_to_what_is_whole():
    """At its edge the left tile took two neighbors for one; the right tile sees both of them whole."""
    wholes = [blob(5, 33, 8, 4, 0.7), blob(5, 37, 8, 8, 0.6)]
    merged = merge([(A, [blob(5, 32, 8, 8, 0.9)]), (B, wholes)])
    assert [each.box for each in merged] == [each.box for each in wholes]


def test_the_edge_of_the_image_cuts_nothing():
    """Both tiles end where the image ends: what touches that edge is whole, and found twice it is one."""
    merged = merge([(A, [blob(32, 31, 8, 7, 0.8)]), (B, [blob(32, 31, 8, 8, 0.9)])])
    assert [each.box for each in merged] == [(32, 31, 40, 39)]


def test_neighbors_and_other_classes_stay_apart():
    neighbors = merge([(A, [blob(5, 31, 8, 4)]), (B, [blob(5, 35, 8, 4)])])
    assert len(neighbors) == 2
    classes = merge([(A, [blob(5, 31, 8, 7, label=0)]), (B, [blob(5, 31, 8, 7, label=1)])])
    assert len(classes) == 2
    same_tile = merge([(A, [blob(5, 31, 8, 7), blob(5, 31, 8, 7)]), (B, [])])
    assert len(same_tile) == 2


def test_an_instance_over_three_tiles_is_one():
    third = Tile(0, 60, 40, 100)
    merged = merge([(A, [blob(9, 0, 6, 40)]), (B, [blob(9, 30, 6, 40)]), (third, [blob(9, 60, 6, 40)])])
    assert [each.box for each in merged] == [(9, 0, 15, 100)]


def test_a_label_map_numbers_the_best_first_and_leaves_out_what_is_covered():
    instances = [blob(0, 0, 4, 4, 0.9), blob(0, 1, 4, 4, 0.8), blob(6, 6, 2, 2, 0.7), blob(6, 0, 2, 2, 0.4)]
    labels, numbers = Prediction(8, 8, instances).label_map()
    assert sorted(np.unique(labels)) == [0, 1, 2] and numbers == [1, 0, 2, 0]
    assert (labels[:4, :4] == 1).all() and (labels[6:, 6:] == 2).all() and not labels[:4, 4].any()
    assert Prediction(8, 8, instances).label_map(0.3)[1] == [1, 0, 2, 3]


class Threshold(Learner):
    """Finds every bright blob, by its color: a model whose answers do not depend on where a tile begins."""

    def __init__(self) -> None:
        super().__init__()
        self.network = torch.nn.Linear(1, 1)
        self.num_queries, self.seen = 6, []

    def predict(self, images, windows):
        self.seen.append(images.shape)
        values = torch.arange(1, self.num_queries + 1).view(1, -1, 1, 1) / 10
        masks = 10 - 400 * (images[:, :1] - values).abs()
        classes = torch.tensor([8.0, 0.0]).expand(len(images), self.num_queries, 2)
        return Output(classes, masks)


@pytest.mark.parametrize(("height", "width", "tiles"), [(32, 32, 1), (48, 40, 1), (64, 32, 3), (96, 80, 12)])
def test_large_images_are_cut(height, width, tiles):
    predictor = Predictor(Threshold(), 32, 32, cut=False)
    cut = predictor.tiles(height, width)
    assert len(cut) == tiles
    covered = np.zeros((height, width), dtype=int)
    for top, left, bottom, right in cut:
        assert 0 <= top < bottom <= height and 0 <= left < right <= width
        covered[top:bottom, left:right] += 1
    assert covered.min() >= 1
    assert len(Predictor(Threshold(), 32, 32, cut=True).tiles(48, 40)) == 4


def test_tiles_find_what_lies_across_their_edges():
    """Blobs all over an image of 96 x 80; each is found once and whole."""
    image = torch.zeros(3, 96, 80)
    boxes = [(5, 5, 12, 20), (28, 20, 40, 50), (50, 60, 90, 75), (70, 2, 80, 46)]
    for value, (top, left, bottom, right) in enumerate(boxes, start=1):
        image[:, top:bottom, left:right] = value / 10
    [prediction] = Predictor(Threshold(), 32, 32, cut=False)([image])
    assert (prediction.height, prediction.width) == (96, 80)
    found = sorted(each.box for each in prediction.instances if each.score >= 0.5)
    assert found == sorted(boxes)


def test_images_of_several_sizes_at_once_and_the_model_stays_in_training():
    learner = Threshold().train()
    images = [torch.rand(3, 20, 30), torch.rand(3, 70, 30), torch.rand(3, 32, 32)]
    predictions = Predictor(learner, 32, 32, cut=False)(images)
    assert [(each.height, each.width) for each in predictions] == [(20, 30), (70, 30), (32, 32)]
    assert learner.training and {shape[1:] for shape in learner.seen} == {(3, 32, 32)}


def test_boxes_are_found_by_where_they_lie():
    random = np.random.default_rng(0)
    corners = random.integers(0, 200, (60, 2))
    boxes = [
        (top, left, top + down, left + across)
        for (top, left), (down, across) in zip(corners.tolist(), random.integers(1, 50, (60, 2)).tolist(), strict=True)
    ]
    grid = inference._Grid(boxes, 32)
    for number in range(60):
        expected = [other for other in range(number) if inference._overlap(boxes[number], boxes[other])]
        assert grid.near(number) == expected
        grid.add(number)


def test_an_image_is_cut_into_tiles_once(monkeypatch):
    predictor, calls = Predictor(Threshold(), 32, 32, cut=True), []
    cut = predictor.tiles
    monkeypatch.setattr(predictor, "tiles", lambda *size: calls.append(size) or cut(*size))
    predictor([torch.zeros(3, 96, 96)])
    assert calls == [(96, 96)]
