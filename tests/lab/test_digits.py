"""Scenes of digits: what is in them, that they can be drawn again, and that held-out digits stay apart."""

from __future__ import annotations

import pytest
import torch

from maskloss.lab.data.digits import FEWEST, MOST, DigitScenes, split


@pytest.fixture(scope="module")
def scenes() -> DigitScenes:
    return DigitScenes(size=64, held_out=30)


def test_every_digit_is_either_trained_on_or_held_out():
    train, held_out = split(1797)
    assert not set(train.tolist()) & set(held_out.tolist())
    assert sorted(train.tolist() + held_out.tolist()) == list(range(1797))


def test_every_class_is_on_both_sides(scenes):
    for part in scenes.split:
        assert scenes._labels[part].bincount(minlength=10).min() > 20


def test_scenes_are_made_of_the_given_digits_only(scenes):
    some = scenes.split.held_out[:7]
    drawn = scenes.draw(some, 50, torch.Generator().manual_seed(0))
    assert set(drawn.which[drawn.present].tolist()) == set(some.tolist())
    assert torch.equal(drawn.labels, scenes._labels[drawn.which])


def test_training_never_draws_a_held_out_digit(scenes, monkeypatch):
    used = []
    draw = scenes.draw
    monkeypatch.setattr(scenes, "draw", lambda digits, *rest: used.append(digits) or draw(digits, *rest))
    scenes.batch(3, range(4), 4, 0)
    assert len(used) == 1 and not set(used[0].tolist()) & set(scenes.split.held_out.tolist())


def test_a_scene_holds_several_visible_digits_that_share_no_pixel(scenes):
    drawn = scenes.draw(scenes.split.train, 300, torch.Generator().manual_seed(0))
    counts = drawn.present.sum(1)
    assert counts.min() == FEWEST and counts.max() == MOST
    assert drawn.masks.sum(1).max() == 1
    area = drawn.masks.flatten(2).sum(2)
    assert area[drawn.present].min() >= 10
    assert area[~drawn.present].max() == 0
    assert drawn.images.min() >= 0 and drawn.images.max() <= 1


def test_digits_overlap(scenes):
    """What lies below is cut out, so its visible area is smaller than that of the same digit on top."""
    generator = torch.Generator().manual_seed(0)
    drawn = scenes.draw(scenes.split.train, 300, generator)
    lowest = drawn.masks[drawn.present[:, 4], 0].flatten(1).sum(1).float().mean()
    top = drawn.masks[drawn.present[:, 4], 4].flatten(1).sum(1).float().mean()
    assert lowest < 0.95 * top


def test_a_digit_is_brighter_than_the_noise_around_it(scenes):
    drawn = scenes.draw(scenes.split.train, 100, torch.Generator().manual_seed(0))
    inside = drawn.masks.any(1)
    brightest = drawn.images.amax(1)
    assert brightest[inside].mean() > brightest[~inside].mean() + 0.3


def test_a_batch_is_a_function_of_seed_and_step(scenes):
    first, again = (scenes.batch(5, range(4), 4, 1) for _ in range(2))
    assert torch.equal(first.images, again.images) and torch.equal(first.labels, again.labels)
    assert torch.equal(first.masks.data, again.masks.data)
    for other in (scenes.batch(6, range(4), 4, 1), scenes.batch(5, range(4), 4, 2)):
        assert not torch.equal(first.images, other.images)


def test_the_parts_of_a_step_are_those_of_the_whole(scenes):
    whole, second = scenes.batch(5, range(4), 4, 1), scenes.batch(5, range(2, 4), 4, 1)
    assert torch.equal(whole.images[2:], second.images)
    assert second.image_ids.tolist() == [2, 3]
    assert whole.masks.num_targets[2:] == second.masks.num_targets


def test_held_out_scenes_are_the_same_in_every_run(scenes):
    for mine, other in zip(scenes.held_out, DigitScenes(64, 30).held_out, strict=True):
        assert torch.equal(mine.image, other.image) and torch.equal(mine.masks(), other.masks())


@pytest.mark.parametrize("size", [32, 96])
def test_scenes_have_the_size_that_was_asked_for(size):
    batch = DigitScenes(size, 1).batch(0, range(2), 2, 0)
    assert batch.images.shape == (2, 3, size, size)
    assert batch.masks.dense(0).shape[1:] == (size, size)
