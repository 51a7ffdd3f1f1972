"""The model: shapes, where its queries begin, and that every part of it is trained."""

from __future__ import annotations

import pytest
import torch

from maskloss import MaskCriterion, PointSampling
from maskloss.lab.config import TrainConfig
from maskloss.lab.data.digits import DigitScenes
from maskloss.lab.data.scenes import Batch
from maskloss.lab.models.compact import QueryNet
from maskloss.lab.models.learners import CompactLearner


@pytest.fixture(scope="module")
def batch() -> Batch:
    return DigitScenes(64, 1).batch(0, range(2), 2, 0)


@pytest.mark.parametrize(
    ("size", "grid", "channels", "norm"), [(64, 4, 3, "batch"), (96, 3, 1, "group"), (32, 5, 5, "batch")]
)
def test_shapes(size, grid, channels, norm):
    output = QueryNet(7, grid, channels, norm)(torch.rand(2, channels, size, size))
    assert [each.shape for each in output.class_logits] == [(2, grid**2, 8)] * 3
    assert [each.shape for each in output.mask_logits] == [(2, grid**2, size // 2, size // 2)] * 3


def test_each_query_is_born_at_its_own_place():
    """Before training, the middle of each query's mask is where the query's place in the grid is."""
    model = QueryNet(3, 4)
    torch.nn.init.zeros_(model.head.kernel[2].weight)
    torch.nn.init.zeros_(model.head.kernel[2].bias)
    [disc, *_] = model(torch.rand(1, 3, 64, 64)).mask_logits
    y, x = (disc[0].flatten(1).argmax(1) // 32, disc[0].flatten(1).argmax(1) % 32)
    places = torch.stack([x, y], 1) / 32
    assert (places - model.anchors).abs().max() < 0.05
    assert (disc[0] > 0).flatten(1).any(1).all()


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_every_parameter_is_trained(batch, norm):
    model = QueryNet(10, 4, norm=norm)
    output = model(batch.images)
    criterion = MaskCriterion(10, sampling=PointSampling(num_points=64))
    criterion(*output, batch.targets, seed=0).total.backward()
    untouched = [name for name, each in model.named_parameters() if each.grad is None or not each.grad.abs().sum() > 0]
    # A key's bias shifts all of a query's scores alike, which the softmax takes out again; the layer's last position
    # in the middle of the image is none of the model's doing.
    assert [name for name in untouched if not name.endswith("key.bias")] == []


def test_a_query_without_a_mask_may_look_everywhere(batch):
    model = QueryNet(10, 4)
    torch.nn.init.constant_(model.head.disc.bias, -50.0)
    for each in model(batch.images).mask_logits:
        assert not (each > 0).any() and each.isfinite().all()


def test_the_seed_decides_the_weights_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    one, same, other = (CompactLearner(TrainConfig(seed=seed), 3, 3).network.state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["born.weight"], other["born.weight"])


def test_groups_are_normalized_by_image():
    """With groups, what an image gives does not depend on the others of its batch."""
    images = torch.rand(3, 3, 32, 32)
    model = QueryNet(2, 3, norm="group").train()
    torch.testing.assert_close(model(images).mask_logits[-1][:1], model(images[:1]).mask_logits[-1])
