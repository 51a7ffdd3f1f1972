"""A folder of one's own: read as it was annotated, split, and refused with a reason where it is wrong."""

from __future__ import annotations

import pytest
import torch

from maskloss import MaskLossError
from maskloss.training.folder import FolderScenes


def scenes_of(source: FolderScenes):
    return {scene.name: scene for scene in (*source._train, *source.held_out)}


def test_classes_are_in_the_order_of_their_numbers(folder):
    source = FolderScenes(str(folder.root), 32)
    assert source.class_names == ["box", "disc"]
    assert all(scene.labels.tolist() == [1, 0] for scene in scenes_of(source).values())


def test_masks_keep_the_resolution_at_which_they_were_annotated(folder):
    scene = scenes_of(FolderScenes(str(folder.root), 32))["0.png"]
    assert scene.masks().shape == (2, 40, 60)
    assert scene.targets.dense().shape == (2, 60, 60)
    disc, box = scene.masks()
    y, x = torch.meshgrid(torch.arange(40), torch.arange(60), indexing="ij")
    assert torch.equal(disc, (y - 14) ** 2 + (x - 14) ** 2 < 81)
    assert torch.equal(box, (y >= 22) & (y < 32) & (x >= 20) & (x < 38))


@pytest.mark.parametrize(("name", "height", "width"), [("0.png", 21, 32), ("1.png", 32, 21), ("2.png", 32, 32)])
def test_images_are_resized_to_fit_and_padded_with_their_mean(folder, name, height, width):
    scene = scenes_of(FolderScenes(str(folder.root), 32))[name]
    assert scene.image.shape == (3, 32, 32)
    assert scene.picture().shape == (3, height, width)
    mean = scene.picture().mean((1, 2))
    for padding in (scene.image[:, height:], scene.image[:, :, width:]):
        torch.testing.assert_close(padding, mean[:, None, None].expand_as(padding))


def test_points_are_drawn_inside_the_image_only(folder):
    scene = scenes_of(FolderScenes(str(folder.root), 32))["0.png"]
    torch.testing.assert_close(scene.targets.windows, torch.tensor([[0.0, 0.0, 1.0, 40 / 60]]))


def test_crowds_are_ignored_and_kept_for_evaluation(folder):
    scene = scenes_of(FolderScenes(str(folder.root), 32))["4.png"]
    assert scene.targets.ignore.numel() > 0
    assert scene.crowd_labels.tolist() == [1]
    assert scene.crowd_masks().sum() == 200 and scene.crowd_masks()[0, 40:50, 10:30].all()


def test_one_image_in_five_is_held_out(folder):
    source = FolderScenes(str(folder.root), 32)
    assert (len(source._train), len(source.held_out)) == (5, 1)
    assert source.held_out[0].name not in {scene.name for scene in source._train}


def test_held_out_scenes_can_have_a_file_of_their_own(folder):
    content = folder.content
    folder.save({**content, "images": content["images"][:4], "annotations": content["annotations"][:8]})
    held_out = {**content, "images": content["images"][4:], "annotations": content["annotations"][8:]}
    folder.save(held_out, "instances_val.json")
    source = FolderScenes(str(folder.root), 32)
    assert [scene.name for scene in source._train] == ["0.png", "1.png", "2.png", "3.png"]
    assert [scene.name for scene in source.held_out] == ["4.png", "5.png"]


def test_every_image_comes_up_once_an_epoch(folder):
    source = FolderScenes(str(folder.root), 32)
    seen = torch.cat([source.batch(step, 2, 0).images for step in range(5)])
    for scene in source._train:
        assert sum(torch.equal(scene.image, image) for image in seen) == 2


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(MaskLossError, match=r"there is no folder .*nowhere"):
        FolderScenes(str(tmp_path / "nowhere"), 32)


def test_annotations_that_are_not_there(tmp_path):
    with pytest.raises(MaskLossError, match=r"there is no file .*instances\.json"):
        FolderScenes(str(tmp_path), 32)


def test_annotations_that_are_not_json(tmp_path):
    (tmp_path / "instances.json").write_text("{")
    with pytest.raises(MaskLossError, match=r"annotations must be JSON"):
        FolderScenes(str(tmp_path), 32)


def _without_categories(content):
    del content["categories"]


def _unknown_category(content):
    content["annotations"][0]["category_id"] = 99


def _unknown_image(content):
    content["annotations"][0]["image_id"] = 99


def _without_masks(content):
    del content["annotations"][0]["segmentation"]


def _odd_polygon(content):
    content["annotations"][1]["segmentation"] = [[1, 2, 3]]


def _missing_image(content):
    content["images"][0]["file_name"] = "lost.png"


def _other_size(content):
    content["images"][0]["height"] = 41


def _single_image(content):
    content["images"], content["annotations"] = content["images"][:1], content["annotations"][:2]


def _no_instances(content):
    content["annotations"] = []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without_categories, r"must be COCO instances[\s\S]*KeyError 'categories'"),
        (_unknown_category, r"annotation 1 has category 99"),
        (_unknown_image, r"there is no image 99"),
        (_without_masks, r"one of 0\.png has none"),
        (_odd_polygon, r"0\.png: "),
        (_missing_image, r"there is no file .*lost\.png"),
        (_other_size, r"0\.png is 40 x 60, annotated as 41 x 60"),
        (_single_image, r"at least two images"),
        (_no_instances, r"no training image has one"),
    ],
)
def test_what_is_wrong_is_named(folder, spoil, message):
    spoil(folder.content)
    folder.save()
    with pytest.raises(MaskLossError, match=message):
        FolderScenes(str(folder.root), 32)


def test_a_file_that_is_no_image(folder):
    (folder.root / "images" / "3.png").write_text("no image")
    with pytest.raises(MaskLossError, match=r"every image must be readable[\s\S]*3\.png"):
        FolderScenes(str(folder.root), 32)


def test_both_files_must_have_the_same_categories(folder):
    folder.content["categories"] = [{"id": 7, "name": "disc"}, {"id": 3, "name": "box"}, {"id": 9, "name": "star"}]
    folder.save(name="instances_val.json")
    with pytest.raises(MaskLossError, match=r"must have the same categories"):
        FolderScenes(str(folder.root), 32)
