"""COCO annotations: read as they were made, and refused with a reason where they are wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lab.conftest import reads_little, write_panoptic
from maskloss import MaskLossError
from maskloss.lab.data import sizes
from maskloss.lab.data.folder import FolderScenes
from maskloss.lab.data.problems import by_kind

DISC_AND_BOX = [1, 0]


def open_folder(folder, **options):
    return FolderScenes(str(folder.root), 32, **options)


def all_entries(source):
    return {each[i].name: each[i] for each in (source.found.train, source.found.held_out) for i in range(len(each))}


def all_scenes(source):
    from maskloss.lab.data.folder import HeldOut

    both = [HeldOut(each, source.reading) for each in (source.found.train, source.found.held_out)]
    return {scene.name: scene for each in both for scene in each}


def test_classes_are_in_the_order_of_their_numbers(folder):
    source = open_folder(folder)
    assert source.class_names == ["box", "disc"] and source.category_ids == [3, 7]
    assert all(scene.labels.tolist() == DISC_AND_BOX for scene in all_scenes(source).values())


def test_masks_are_those_that_were_annotated(folder):
    scene = all_scenes(open_folder(folder))["0.png"]
    disc, box = scene.masks()
    y, x = torch.meshgrid(torch.arange(40), torch.arange(60), indexing="ij")
    assert torch.equal(disc, (y - 14) ** 2 + (x - 14) ** 2 < 81)
    assert torch.equal(box, (y >= 22) & (y < 32) & (x >= 20) & (x < 38))
    with Image.open(folder.root / "images" / "0.png") as image:
        assert torch.equal(scene.image, torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)


def test_crowds_are_ignored_and_kept_for_evaluation(folder):
    source = open_folder(folder, augment=False)
    scene = all_scenes(source)["4.png"]
    assert scene.crowd_labels.tolist() == [1]
    assert scene.crowd_masks().sum() == 200 and scene.crowd_masks()[0, 40:50, 10:30].all()
    assert scene.ignored.sum() == 200 and scene.targets.ignore.numel() > 0
    batch = source.batch(0, range(5), 5, 0)
    assert batch.masks.ignore.numel() > 0 or scene.name == source.held_out[0].name


def test_points_are_drawn_inside_the_image_only(folder):
    source = open_folder(folder, augment=False)
    batch = source.batch(0, range(5), 5, 0)
    shapes = {tuple(entry) for entry in source.found.train.sizes.tolist()}
    assert len(shapes) == 5
    for window, (height, width) in zip(batch.masks.windows.tolist(), _sizes_of_batch(source, 5), strict=True):
        assert window == pytest.approx([0, 0, width / max(height, width), height / max(height, width)])


def _sizes_of_batch(source, count):
    order = source._order(0, 0).tolist()
    return [source.found.train.sizes[number].tolist() for number in order[:count]]


def test_every_image_comes_up_once_an_epoch(folder):
    source = open_folder(folder, augment=False)
    seen = torch.cat([source.batch(step, range(2), 2, 0).images for step in range(5)])
    distinct = torch.unique(seen.flatten(1), dim=0)
    assert len(seen) == 10 and len(distinct) == 5


def test_one_image_in_five_is_held_out(folder):
    source = open_folder(folder)
    assert (len(source.found.train), len(source.held_out)) == (5, 1)
    assert "one image in five is held out" in dict(source.facts)["found"]


def test_cocos_own_layout(folder):
    content, root = folder.content, folder.root
    (root / "instances.json").unlink()
    parts = {"train2017": slice(0, 4), "val2017": slice(4, 6)}
    for name, part in parts.items():
        (root / name).mkdir()
        images = content["images"][part]
        for image in images:
            shutil.move(root / "images" / image["file_name"], root / name)
        ids = {image["id"] for image in images}
        mine = [each for each in content["annotations"] if each["image_id"] in ids]
        folder.save({**content, "images": images, "annotations": mine}, f"annotations/instances_{name}.json")
    (root / "images").rmdir()
    source = open_folder(folder)
    assert (len(source.found.train), len(source.held_out)) == (4, 2)
    assert "the part val held out" in dict(source.facts)["found"]


def test_panoptic(tmp_path):
    source = FolderScenes(str(write_panoptic(tmp_path / "data")), 32, augment=False)
    assert source.found.kind == "panoptic" and source.class_names == ["box", "sky"]
    scene = source.held_out[0]
    # In the order of their numbers in the map.
    sky, box = scene.masks()
    assert scene.labels.tolist() == [1, 0]
    assert box.sum() == 240 and box[8:20, 10:30].all()
    assert sky.sum() == 28 * 44 - 240 - 60
    assert scene.crowd_masks()[0, 22:28, 2:12].all()
    assert scene.ignored.sum() == 60 + 88  # the crowd, and what is void


# -------------------------------------------------------------------------------------------------- what scripts write


def test_the_same_image_twice_is_one_image_with_the_annotations_of_both(folder):
    content = folder.content
    content["images"].append({**content["images"][2], "id": "copy"})
    content["annotations"][4]["image_id"] = "copy"
    folder.save()
    scenes = all_scenes(open_folder(folder))
    assert len(scenes) == 6
    assert sorted(scenes["2.png"].labels.tolist()) == [0, 1]


def test_sizes_written_as_floats_and_flags_as_strings(folder):
    for image in folder.content["images"]:
        image["height"] = float(image["height"])
    for annotation in folder.content["annotations"]:
        annotation["iscrowd"] = str(annotation["iscrowd"])
    folder.save()
    source = open_folder(folder)
    assert int(source.found.train.counts.sum() + source.found.held_out.counts.sum()) == 12
    assert [each.kind for each in all_entries(source)["4.png"].instances] == ["object", "object", "crowd"]


def test_a_byte_order_mark(folder):
    path = folder.root / "instances.json"
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")
    assert len(all_entries(open_folder(folder))) == 6


def _set(*path_and_value):
    *path, last, value = path_and_value

    def spoil(content):
        for key in path:
            content = content[key]
        content[last] = value

    return spoil


def _drop(*path):
    def spoil(content):
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return spoil


def _append(key, value):
    return lambda content: content[key].append(value)


def _segmentation(value):
    return _set("annotations", 1, "segmentation", value)


def _counts(value):
    return _set("annotations", 0, "segmentation", "counts", value)


def test_sizes_are_compared_before_pixels_are_read(folder, monkeypatch):
    """Beyond the first thousands of images, the worker that takes an image is the first to look at its file."""
    monkeypatch.setattr(sizes, "_HEADS", 0)
    Image.fromarray(np.zeros((7000, 9000), np.uint8)).save(folder.root / "images" / "2.png")
    source = open_folder(folder)
    with pytest.raises(MaskLossError, match=r"2\.png is 7000 x 9000, expected are 48 x 48"), reads_little():
        source.batch(0, range(5), 5, 0)


def _another_size(content):
    """Of the image and of its RLE alike, so that only the file itself can tell."""
    content["images"][2]["height"] = 49
    content["annotations"][4]["segmentation"] = {"size": [49, 48], "counts": [49 * 48]}


WRONG = {
    "no categories": (_drop("categories"), 'no list "categories"'),
    "an empty list of categories": (_set("categories", []), "lists no categories"),
    "a category without an id": (_drop("categories", 0, "id"), "a category is"),
    "one category id for two names": (
        _append("categories", {"id": 7, "name": "star"}),
        "category id 7 stands for 'disc' and for 'star'",
    ),
    "an unknown category": (_set("annotations", 0, "category_id", 99), "annotation 1 of .* has the category 99"),
    "an unknown image": (_set("annotations", 0, "image_id", 99), "annotation 1 belongs to image 99"),
    "an annotation that is a list": (_set("annotations", 0, [1]), "an annotation belongs to image None"),
    "no segmentation": (_drop("annotations", 0, "segmentation"), "every annotation must have a segmentation"),
    "a polygon with three coordinates": (_segmentation([[1, 2, 3]]), "x and y of at least three corners"),
    "a polygon of strings": (_segmentation([["one"] * 6]), "x and y of at least three corners"),
    "a coordinate beyond all floats": (_segmentation([[10**400, 1, 5, 1, 5, 5]]), "three corners"),
    "a coordinate that is no number": (_segmentation([[float("nan"), 1, 5, 1, 5, 5]]), "three corners"),
    "counts with fractions": (_counts([10.7]), "whole numbers that add up"),
    "counts as strings": (_counts(["many"]), "whole numbers that add up"),
    "counts that are no numbers": (_counts([float("nan")]), "whole numbers that add up"),
    "no counts": (_counts(None), "whole numbers that add up"),
    "nested counts": (_counts([[2400]]), "whole numbers that add up"),
    "counts that do not fill the image": (_counts([2399]), "whole numbers that add up"),
    "an RLE of another size": (_set("annotations", 0, "segmentation", "size", [60, 40]), "size of an RLE"),
    "an image without a name": (_set("images", 0, "file_name", None), "file_name of image 100 is None"),
    "a number for a name": (_set("images", 0, "file_name", 7), "file_name of image 100 is 7"),
    "a name with NUL": (_set("images", 0, "file_name", "a\0.png"), "file_name of image 100"),
    "a name out of the folder": (_set("images", 0, "file_name", "../outside.png"), r"no file '\.\./outside\.png' in"),
    "an absolute name": (_set("images", 0, "file_name", "/etc/hostname"), "no file '/etc/hostname' in"),
    "an image that is not there": (_set("images", 0, "file_name", "lost.png"), "there is no file 'lost.png'"),
    "two images with one id": (_set("images", 1, "id", 100), "image id 100 stands for '0.png' and for '1.png'"),
    "a size of another image": (_another_size, r"2\.png is 48 x 48, annotated as 49 x 48"),
    "a size that is no number": (_set("images", 0, "height", "tall"), "size of '0.png'"),
    "a size below nothing": (_set("images", 0, "width", -1), "size of '0.png'"),
    "a flag that is no flag": (_set("annotations", 0, "iscrowd", "no"), "iscrowd of annotation 1"),
    "no instances": (_set("annotations", []), "no image in"),
    "a single image": (lambda content: content.update(images=content["images"][:1]), "at least two images|not listed"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(folder, case):
    spoil, message = WRONG[case]
    spoil(folder.content)
    folder.save()
    with pytest.raises(MaskLossError, match=message):
        open_folder(folder)


@pytest.mark.parametrize("case", ["an unknown category", "counts with fractions", "an image that is not there"])
def test_what_is_wrong_can_be_left_out(folder, case):
    spoil, message = WRONG[case]
    spoil(folder.content)
    folder.save()
    source = open_folder(folder, on_error="skip")
    [skipped] = source.problems.skipped
    assert re.search(message, skipped)
    assert "broken: 1" in dict(by_kind(source.findings))["left out"]
    # What is in the image of a broken annotation is not known, so the image goes too.
    assert len(all_entries(source)) == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "must be COCO instances"), ("[" * 200_000, "nested too deeply"), ("[]", "holds a list"), ("\xff", "UTF-8")],
)
def test_files_that_are_no_annotations(folder, text, message):
    (folder.root / "instances.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(MaskLossError, match=message):
        open_folder(folder)


def test_a_folder_in_place_of_the_annotations(folder):
    (folder.root / "instances.json").unlink()
    (folder.root / "instances.json").mkdir()
    with pytest.raises(MaskLossError, match=r"none was found in .*shapes, which holds 6 of \.png"):
        open_folder(folder)


@pytest.mark.parametrize("name", ["instances.json", "images/2.png"])
@pytest.mark.parametrize("kind", ["a named pipe", "a device", "a link to itself"])
def test_what_would_be_waited_for(folder, name, kind):
    path = folder.root / name
    path.unlink()
    if kind == "a named pipe":
        os.mkfifo(path)
        message = rf"{name} is a named pipe"
    elif kind == "a device":
        path.symlink_to("/dev/zero")
        message = "is a device|leads out of the folder"
    else:
        path.symlink_to(path.name)
        message = "too many levels of symbolic links|[Ss]ymlink loop|there is no file"
    with pytest.raises(MaskLossError, match=message):
        open_folder(folder)


def test_a_broken_image_stops_the_run_or_is_replaced(folder):
    names = [entry.file for entry in all_entries(open_folder(folder)).values()]
    broken = Path(next(name for name in names if name.endswith("3.png")))
    # The head is whole, so nothing is noticed before the pixels are read.
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    source = open_folder(folder)
    with pytest.raises(MaskLossError, match=r"every image must be readable.*\n.*3\.png"):
        source.batch(0, range(5), 5, 0)
    tolerant = open_folder(folder, on_error="skip")
    batch = tolerant.batch(0, range(5), 5, 0)
    assert len(batch.images) == 5 and "3.png" in batch.skipped[0]


def test_classes_that_one_file_lists(folder):
    folder.content["categories"] = [{"id": 1, "name": "disc"}, {"id": 3, "name": "box"}, {"id": 9, "name": "star"}]
    for annotation in folder.content["annotations"]:
        annotation["category_id"] = {7: 1}.get(annotation["category_id"], annotation["category_id"])
    folder.content["annotations"][1]["category_id"] = 9
    folder.save(name="instances_val.json")
    source = open_folder(folder)
    # By their names: the numbers of the two files differ.
    assert source.class_names == ["box", "disc", "star"] and source.category_ids == [3, 7, 9]
    assert all_scenes(source)["1.png"].labels.tolist() == [1, 0]
    facts = dict(by_kind(source.findings))
    assert "classes that only one part lists: 1 ('star')" in facts["mended"]
    assert "classes without an instance to learn from: 1 ('star')" in facts["suspicious"]
    assert "images in both parts" in facts["suspicious"]


def test_two_files_of_annotations(folder):
    folder.save(name="instances_b.json")
    with pytest.raises(MaskLossError, match=r"instances\.json, instances_b\.json"):
        open_folder(folder)


def test_annotations_take_memory_as_the_file_does(folder):
    """As Python objects they would take ten times as much."""
    content = folder.content
    polygon = content["annotations"][1]
    content["annotations"] += [{**polygon, "id": 100 + number} for number in range(2000)]
    folder.save()
    source = open_folder(folder)
    block = sum(len(each._block) for each in (source.found.train, source.found.held_out))
    assert block < len(json.dumps(content))
