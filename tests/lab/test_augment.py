"""Augmentation: what is done to an image is done to its masks, and nothing is computed on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from maskloss.lab.data import truth
from maskloss.lab.data.augment import LARGEST, SMALLEST, random_view, recolor
from maskloss.lab.data.catalog import Entry, Instance, Map
from maskloss.lab.data.images import Head
from maskloss.lab.data.maps import NUMBERS
from maskloss.lab.data.readers.segmentation import encode
from maskloss.lab.data.scenes import fit
from maskloss.lab.data.truth import Loaded, View

HEIGHT, WIDTH = 37, 52


@pytest.fixture
def loaded() -> Loaded:
    """An image whose pixels say where they are, with its label map."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    labels = ((y // 9) * 6 + x // 9 + 1).astype(np.int32)
    ids = [int(number) for number in np.unique(labels)]
    instances = [Instance(number, number % 3) for number in ids]
    entry = Entry("a.png", HEIGHT, WIDTH, instances, Map("a_masks.png", NUMBERS))
    return Loaded(np.stack([labels, y, x], axis=-1).astype(np.float32), entry, labels)


VIEWS = [
    View(3, 5, 20, 33, turn, flip_y, flip_x)
    for turn in (False, True)
    for flip_y in (False, True)
    for flip_x in (False, True)
]


@pytest.mark.parametrize("view", VIEWS)
def test_masks_move_with_the_image(loaded, view):
    frame = (40, 40)
    packed = loaded.pack(view, frame)
    image = view.apply(loaded.image)
    assert image.shape[:2] == view.size
    covered = np.zeros(view.size, dtype=bool)
    for mask, label in zip(packed.masks.dense().numpy(), packed.labels.tolist(), strict=True):
        assert not mask[view.size[0] :].any() and not mask[:, view.size[1] :].any()
        inside = mask[: view.size[0], : view.size[1]]
        [number] = np.unique(image[inside][:, 0])
        assert number % 3 == label and np.array_equal(inside, image[..., 0] == number)
        covered |= inside
    assert covered.all()
    window = torch.tensor([[0, 0, view.size[1] / 40, view.size[0] / 40]])
    torch.testing.assert_close(packed.masks.windows, window)


@pytest.mark.parametrize("view", VIEWS)
def test_run_lengths_move_as_label_maps_do(loaded, view):
    codec = pytest.importorskip("pycocotools.mask")
    ids = [each.source for each in loaded.entry.instances]
    runs = [codec.encode(np.asfortranarray((loaded.map == number).astype(np.uint8))) for number in ids]
    instances = [
        Instance({"size": run["size"], "counts": run["counts"].decode()}, number % 3)
        for run, number in zip(runs, ids, strict=True)
    ]
    same = loaded._replace(entry=loaded.entry._replace(instances=instances, map=None), map=None)
    ours, theirs = same.pack(view, (40, 40)), loaded.pack(view, (40, 40))
    assert ours.masks.encoding == "bits" and theirs.masks.encoding == "labels"
    assert torch.equal(ours.masks.dense(), theirs.masks.dense()) and torch.equal(ours.labels, theirs.labels)


def test_slivers_at_the_edge_weigh_nothing(loaded):
    view = View(0, 0, 10, 10)
    packed = loaded.pack(view, (10, 10))
    # The four cells: 9 x 9, 9 x 1, 1 x 9, and a single pixel, which is left out.
    assert packed.masks.dense().sum((1, 2)).tolist() == [81, 9, 9]
    assert packed.masks.ignore.numel() > 0
    whole = loaded.pack(View.whole(HEIGHT, WIDTH), (HEIGHT, WIDTH))
    assert len(whole.labels) == len(loaded.entry.instances) and not whole.masks.ignore.numel()


@pytest.mark.parametrize("crop", [None, 24])
@pytest.mark.parametrize("turns", [False, True])
def test_views_stay_inside_the_image_and_the_frame(crop, turns):
    sides = []
    for seed in range(200):
        view, frame = random_view(HEIGHT, WIDTH, crop, turns, torch.Generator().manual_seed(seed))
        assert view.top >= 0 and view.top + view.height <= HEIGHT
        assert view.left >= 0 and view.left + view.width <= WIDTH
        assert view.size[0] <= frame[0] and view.size[1] <= frame[1] and frame[0] == frame[1]
        assert turns or not (view.turn or view.flip_y)
        sides.append(frame[0] / (crop or WIDTH))
    assert SMALLEST - 0.05 < min(sides) < 0.7 and 1.2 < max(sides) < LARGEST + 0.05


def test_colors_change_and_stay_in_range():
    image = torch.rand(3, 9, 9)
    one, other = (recolor(image, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert one.min() >= 0 and one.max() <= 1
    assert not torch.equal(one, image) and not torch.equal(one, other)


@pytest.mark.parametrize(("height", "width", "rows", "columns"), [(40, 60, 21, 32), (60, 40, 32, 21), (7, 7, 32, 32)])
def test_images_are_fitted_and_padded_with_their_mean(height, width, rows, columns):
    image = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    square = fit(image, max(height, width), 32)
    shown = square[:, :rows, :columns]
    mean = shown.mean((1, 2))
    for padding in (square[:, rows:], square[:, :, columns:]):
        torch.testing.assert_close(padding, mean[:, None, None].expand_as(padding))
    assert abs(float(shown.mean()) - image.mean()) < 4


def test_an_image_with_a_wrong_size_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(truth, "read_head", lambda path: Head(5, 6, 1))
    with pytest.raises(ValueError, match="is 5 x 6, expected are 6 x 6"):
        truth.load(Entry("a.png", 6, 6, []))


@pytest.mark.parametrize("encoding", ["map", "run lengths"])
def test_more_instances_than_queries(loaded, encoding):
    """The smallest are left out, and weigh nothing instead of being background."""
    if encoding == "run lengths":
        masks = [(loaded.map == each.source, each.label) for each in loaded.entry.instances]
        instances = [Instance(encode(mask), label) for mask, label in masks]
        loaded = loaded._replace(entry=loaded.entry._replace(instances=instances, map=None), map=None)
    view = View(0, 0, 20, 20)
    whole, some = loaded.pack(view, (20, 20)), loaded.pack(view, (20, 20), 4)
    areas = whole.masks.dense().sum((1, 2))
    assert sorted(areas.tolist()) == [4, 18, 18, 18, 18, 81, 81, 81, 81]
    assert torch.equal(some.masks.dense(), whole.masks.dense()[areas == 81])
    assert torch.equal(some.labels, whole.labels[areas == 81])
    bits = np.unpackbits(some.masks.ignore.numpy().reshape(20, -1), axis=1, count=20, bitorder="little")
    assert np.array_equal(bits.astype(bool), whole.masks.dense()[areas < 81].any(0).numpy())
