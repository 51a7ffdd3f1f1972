"""COCO and its relatives, pictures of phones, and what is held out."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lab.folders.pieces import (
    COUNT,
    HEIGHT,
    WIDTH,
    case,
    coco,
    corners,
    images,
    instance_map,
    pixels,
    runs,
    text,
    usual,
    write,
)

JSON = "COCO and its relatives"


@case(
    JSON,
    "any JSON file with `images`, `annotations` and `categories`: `instances.json`, `train.json`, `data.json`, "
    "`labels.json`, `result.json`",
    "read; the images are found by their names anywhere in the folder",
)
def coco_by_any_name(root: Path) -> None:
    images(root / "Pictures of today")
    text(root / "data.json", coco())


@case(
    JSON,
    "`annotations/instances_train2017.json` with `train2017/`, and `val2017` beside it",
    "read; val is held out",
    parts=(3, 2),
)
def coco_as_distributed(root: Path) -> None:
    for part, names in (("train2017", ["0.png", "1.png", "2.png"]), ("val2017", ["3.png", "4.png"])):
        images(root / part, names)
        text(root / f"annotations/instances_{part}.json", coco(names))
        text(root / f"annotations/captions_{part}.json", {"images": [], "annotations": [{"caption": "two nuts"}]})
        text(root / f"annotations/person_keypoints_{part}.json", coco(names))


@case(
    JSON,
    "COCO panoptic: `annotations/panoptic_train2017.json`, PNG files in a folder of that name, and `train2017/`",
    "read; every segment is an instance, those with `iscrowd` are regions",
    regions=COUNT,
)
def coco_panoptic(root: Path) -> None:
    names = [f"{number}.jpg" for number in range(COUNT)]
    images(root / "train2017", names, quality=95)
    ids = np.array([0, 70_001, 70_002], dtype=np.int64)[instance_map()]
    ids[:3] = 9
    colors = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    segments = [{"id": each, "category_id": 1, "iscrowd": int(each == 9)} for each in (70_001, 70_002, 9)]
    annotations = []
    for number in range(COUNT):
        write(root / f"annotations/panoptic_train2017/{number}.png", colors)
        annotations.append({"image_id": number + 1, "file_name": f"{number}.png", "segments_info": segments})
    text(root / "annotations/panoptic_train2017.json", coco(names) | {"annotations": annotations})


@case(
    JSON,
    "Roboflow: `train/`, `valid/`, `test/`, each with `_annotations.coco.json` and an unused category 0",
    "read: train is trained on, valid is held out, test is left alone; the category 0 is no class",
    parts=(2, 2),
    told=[
        "placeholder categories without instances left out: 1 \\('nuts-and-bolts'\\)",
        "images of the part test left alone: 2",
    ],
)
def roboflow(root: Path) -> None:
    for part in ("train", "valid", "test"):
        names = [f"{part}_{number}_jpg.rf.0f3a.jpg" for number in range(2)]
        images(root / part, names, quality=95)
        content = coco(names, first=0)
        content["categories"].insert(0, {"id": 0, "name": "nuts-and-bolts", "supercategory": "none"})
        text(root / part / "_annotations.coco.json", content)


@case(JSON, "Roboflow's export without `test/`", "read", parts=(2, 2), told=["placeholder categories"])
def roboflow_without_test(root: Path) -> None:
    roboflow(root)
    for path in (root / "test").iterdir():
        path.unlink()


@case(
    JSON,
    "Label Studio: `result.json` and `images/`",
    "read, with its prefixes, backslashes and local-file addresses",
    told=["names of images in another form"],
)
def label_studio_coco(root: Path) -> None:
    images(root / "images")
    names = ["images\\\\0.png", "images/3f2b1a90-1.png", "/data/local-files/?d=images/2.png", "images/3.png", "4.png"]
    text(root / "result.json", coco([name.replace("\\\\", "\\") for name in names], first=0))


@case(
    JSON,
    "CVAT's brush: `iscrowd: 1` on every run length",
    "counted as instances, and told; `--crowd ignore` makes them regions",
    told=["run lengths with iscrowd 1 counted as instances.*: 10"],
)
def brush_masks(root: Path) -> None:
    usual(root, coco(source=runs, iscrowd=1), "annotations/instances_default.json")


@case(JSON, "the same beside polygons", "none is lost", told=["run lengths with iscrowd 1 counted as instances.*: 5"])
def brush_masks_and_polygons(root: Path) -> None:
    content = coco()
    for annotation in content["annotations"][::2]:
        annotation.update(iscrowd=1, segmentation=runs(0))
    usual(root, content)


@case(
    JSON,
    "the same with `--crowd ignore`",
    "refused, as nothing is left to learn",
    options={"crowd": "ignore"},
    refused="annotations have iscrowd 1, and --crowd instances makes them instances",
)
def brush_masks_ignored(root: Path) -> None:
    brush_masks(root)


@case(
    JSON,
    "true crowds: a few `iscrowd: 1` among many instances",
    "regions in which nothing is asked for, counted; `--crowd instances` makes them instances",
    objects=None,
    regions=1,
    told=["annotations with iscrowd 1 made ignore regions.*: 1"],
)
def true_crowds(root: Path) -> None:
    content = coco(source=lambda number: runs(number, compressed=True))
    content["annotations"][3]["iscrowd"] = 1
    usual(root, content)


@case(
    JSON,
    "file names with backslashes, other letter case, another Unicode form, folders of a server in front",
    "the image is found, within the folder only, and the names are told",
    told=["names of images in another form.*: 4"],
)
def names_in_another_form(root: Path) -> None:
    images(root / "images", ["0.png", "Größe.png", "shot 2.png", "UPPER.PNG", "4.png"])
    names = [
        "../../srv/upload/1/0.png",
        unicodedata.normalize("NFD", "Größe.png"),
        "C:\\work\\shot 2.png",
        "upper.png",
        "4.png",
    ]
    text(root / "instances.json", coco(names))


@case(JSON, "two images of the name that an annotation gives", "refused", refused="may be (a|b)/0.png or (a|b)/0.png")
def names_that_mean_two_images(root: Path) -> None:
    images(root / "a")
    images(root / "b")
    text(root / "instances.json", coco())


@case(
    JSON,
    "an image that is not there",
    "refused, or with `--on-error skip` left out and listed",
    refused="there is no file 'lost.png'",
)
def lost_image(root: Path) -> None:
    usual(root, coco(["lost.png", "1.png", "2.png"]))


@case(
    JSON,
    "a polygon without an area beside a good one",
    "the polygon is dropped, its instance is kept, the count is told",
    told=["polygons without an area dropped, their instances kept: 2"],
)
def degenerate_polygon(root: Path) -> None:
    content = coco()
    content["annotations"][0]["segmentation"].append([20.0, 20.0, 21.0, 20.0])
    content["annotations"][3]["segmentation"].append([5, 5, 5, 5, 5, 5])
    usual(root, content)


@case(
    JSON,
    "polygons without the list around them, as lists of points, as points with names; masks as arrays of zeros and "
    "ones; lists of RLE; counts written as Python's bytes",
    "mended and told",
    told=[
        "flat polygons",
        "polygons as lists of points: 2",
        "arrays of zeros and ones",
        "lists of RLE",
        "Python's bytes",
    ],
)
def segmentations_nested_otherwise(root: Path) -> None:
    content = coco()
    pairs = [[corners(1)[place], corners(1)[place + 1]] for place in range(0, 8, 2)]
    changed = {
        0: corners(0),
        1: [pairs],
        3: [{"x": x, "y": y} for x, y in pairs],
        4: (instance_map() == 1).astype(int).tolist(),
        6: [runs(0)],
        7: {**runs(1), "counts": repr(runs(1, compressed=True)["counts"].encode())},
    }
    for place, value in changed.items():
        content["annotations"][place]["segmentation"] = value
    usual(root, content)


@case(
    JSON,
    "ids as strings; sizes and areas left out, as strings, or 0; boxes left out; lists as dicts (LIVECell)",
    "mended and told",
    told=["ids as strings", "sizes of images left out", '"annotations" as a dict'],
)
def values_of_another_type(root: Path) -> None:
    content = coco()
    for place, image in enumerate(content["images"]):
        image["id"] = str(image["id"])
        image.update(
            {0: {"height": None}, 1: {"height": str(HEIGHT), "width": f"{WIDTH}"}, 2: {"width": 0}}.get(place, {})
        )
        if place in {0, 3}:
            del image["width"], image["height"]
    for annotation in content["annotations"]:
        annotation.update(image_id=f"{annotation['image_id']}", category_id="1")
        del annotation["area"], annotation["bbox"], annotation["iscrowd"]
    content["annotations"] = {str(each["id"]): each for each in content["annotations"]}
    usual(root, content)


@case(
    JSON,
    "height and width exchanged, with polygons that fit the image",
    "mended and told",
    told=["height and width exchanged: 5"],
)
def sides_exchanged(root: Path) -> None:
    content = coco()
    for image in content["images"]:
        image.update(height=WIDTH, width=HEIGHT)
    usual(root, content)


@case(
    JSON, "annotations of another size than the image", "refused", refused=r"0\.png is 40 x 56, annotated as 80 x 112"
)
def another_size(root: Path) -> None:
    content = coco()
    content["images"][0].update(height=2 * HEIGHT, width=2 * WIDTH)
    usual(root, content)


@case(JSON, "run lengths of another size than the image", "refused", refused="has the size .*the image is 40 x 56")
def run_lengths_of_another_size(root: Path) -> None:
    usual(root, coco(source=lambda number: {"size": [WIDTH, HEIGHT], "counts": [WIDTH * HEIGHT]}))


@case(
    JSON,
    "coordinates as fractions of the image",
    "refused",
    refused="no coordinate in .* is larger than 0.89.*\n.*COCO counts pixels",
)
def fractions(root: Path) -> None:
    shares = [[each / (WIDTH, HEIGHT)[place % 2] for place, each in enumerate(corners(number))] for number in range(2)]
    usual(root, coco(source=lambda number: [shares[number]]))


@case(
    JSON,
    "a polygon outside of its image",
    "left out and told",
    told=["instances outside of their image left out: 1"],
)
def outside(root: Path) -> None:
    content = coco()
    content["annotations"].append({**content["annotations"][0], "id": 99, "segmentation": [[70, 3, 80, 3, 80, 9]]})
    usual(root, content)


@case(
    JSON,
    "a placeholder of the name of the only class",
    "left out; the class keeps its number",
    told=["placeholder categories without instances left out: 1"],
)
def placeholder_of_the_same_name(root: Path) -> None:
    content = coco()
    content["categories"].insert(0, {"id": 0, "name": "nut", "supercategory": "none"})
    usual(root, content)


@case(JSON, "two categories of one name", "merged and told", told=["categories of one name merged: 1 \\('nut'\\)"])
def one_name_twice(root: Path) -> None:
    content = coco()
    content["categories"].append({"id": 2, "name": "nut"})
    content["annotations"][5]["category_id"] = 2
    usual(root, content)


@case(
    JSON,
    "a class in one part only, or numbered otherwise there",
    "classes are known by their names, and it is told",
    classes=("nut", "bolt"),
    parts=(5, 5),
    objects=2,
    told=[
        "classes that only one part lists: 1 \\('bolt'\\)",
        "classes without an instance to learn from: 1 \\('bolt'\\)",
    ],
)
def class_in_one_part(root: Path) -> None:
    images(root / "train")
    text(root / "train.json", coco())
    names = [f"v{number}.png" for number in range(COUNT)]
    images(root / "val", names)
    other = coco(names)
    other["categories"] = [{"id": 1, "name": "bolt"}, {"id": 2, "name": "nut"}]
    for annotation in other["annotations"][1::2]:
        annotation["category_id"] = 2
    text(root / "val.json", other)


@case(
    JSON,
    "instances with a box only: `segmentation` is `[]`, `null`, `[[]]` or left out",
    "the box becomes a region in which nothing is asked for, in the loss and in the scores; it is counted",
    objects=None,
    regions=4,
    told=["instances with a box only made ignore regions of that box: 4"],
)
def box_only(root: Path) -> None:
    content = coco()
    for annotation, value in zip(content["annotations"][::2], ([], None, [[]]), strict=False):
        annotation["segmentation"] = value
    del content["annotations"][7]["segmentation"]
    usual(root, content)


@case(JSON, "no masks at all", "refused", refused="have a box only, and masks are learned from masks")
def boxes_alone(root: Path) -> None:
    usual(root, coco(source=lambda number: []))


@case(
    JSON,
    "a broken mask, with `--on-error skip`",
    "its box becomes such a region; without a box, the image is left out",
    options={"on_error": "skip"},
    objects=None,
    regions=1,
    parts=(4, 1),
    told=["broken masks made ignore regions of their boxes: 1"],
)
def broken_mask(root: Path) -> None:
    content = coco()
    content["annotations"][0]["segmentation"] = [[1, 2, 3]]
    usual(root, content)


@case(
    JSON,
    "all masks broken, with `--on-error skip`",
    "refused, with the first reasons",
    options={"on_error": "skip"},
    refused=r"were left out: .*x and y of at least three corners",
)
def all_masks_broken(root: Path) -> None:
    content = coco(source=lambda number: [[1, 2, 3]])
    for annotation in content["annotations"]:
        del annotation["bbox"]
    usual(root, content)


@case(
    JSON,
    "two files of annotations for one part",
    "refused; `--annotations` names the right one",
    refused="one file of annotations for each part",
)
def two_files(root: Path) -> None:
    usual(root)
    text(root / "instances_old.json", coco(["0.png"]))


@case(
    JSON,
    "two files of annotations for one part, with `--annotations`",
    "read",
    options={"annotations": "instances.json"},
)
def two_files_and_a_choice(root: Path) -> None:
    two_files(root)


@case(JSON, "FiftyOne: `data/` and `labels.json`; makesense: `labels_my-project_2024.json` beside the images", "read")
def fiftyone(root: Path) -> None:
    images(root / "data")
    text(root / "labels.json", coco())


@case(JSON, "VIA's export as COCO: ids as strings, flat polygons", "read", told=["flat polygons", "ids as strings"])
def via_as_coco(root: Path) -> None:
    images(root)
    content = coco(source=corners)
    for each in content["images"]:
        each["id"] = str(each["id"])
    for each in content["annotations"]:
        each["image_id"] = str(each["image_id"])
    text(root / "via_export_coco.json", content)


def changed(change: Callable[[dict[str, Any]], Any], **more: Any) -> dict[str, Any]:
    content = coco(**more)
    for annotation in content["annotations"]:
        change(annotation)
    return content


@case(
    JSON,
    "everything under one more key, keys in capitals",
    "mended and told",
    told=["everything under one more key: 1", "keys in capitals: 1"],
)
def other_keys(root: Path) -> None:
    usual(root, {"dataset": {key.capitalize(): value for key, value in coco().items()}})


@case(
    JSON,
    "annotations inside of their images",
    "mended and told",
    told=["annotations inside of their images: 1"],
)
def annotations_in_images(root: Path) -> None:
    content = coco()
    for image in content["images"]:
        image["annotations"] = [each for each in content["annotations"] if each["image_id"] == image["id"]]
    usual(root, {"images": content["images"], "categories": content["categories"]})


@case(
    JSON,
    "Detectron2's list of dicts, one for each image",
    "read, its classes without names",
    classes=("class 0",),
    told=["as Detectron2 has them"],
)
def detectron(root: Path) -> None:
    content = coco(category_id=0)
    listed = []
    for image in content["images"]:
        mine = [each for each in content["annotations"] if each["image_id"] == image["id"]]
        for each in mine:
            left, top, width, height = each["bbox"]
            each |= {"bbox": [left, top, left + width, top + height], "bbox_mode": 0}
        mine[0] |= {"segmentation": [], "bbox": mine[0]["bbox"]} if image["id"] == 1 else {}
        listed.append({"file_name": image["file_name"], "image_id": image["id"], "annotations": mine})
    listed[0]["annotations"][0]["segmentation"] = [corners(0)]
    usual(root, listed, "dicts.json")  # type: ignore[arg-type]


@case(
    JSON,
    "categories as a list or a dict of names; images and categories of annotations by their names",
    "mended and told",
    told=[
        "categories as a list of names: 1",
        "images of annotations by",
        "categories of annotations by their names: 10",
    ],
)
def by_names(root: Path) -> None:
    content = changed(lambda each: each.update(image_id=f"{each['image_id'] - 1}.png", category_id="nut"))
    usual(root, {**content, "categories": ["nut"]})


@case(
    JSON,
    "the same as a dict, numbered from 0, the file in UTF-16",
    "mended and told",
    told=["categories as a dict of names: 1"],
)
def dict_of_names(root: Path) -> None:
    images(root / "images")
    content = {**coco(category_id=0), "categories": {"0": "nut"}}
    (root / "instances.json").write_text(json.dumps(content), encoding="utf-16")


@case(
    JSON,
    "masks as text, coordinates and counts as text",
    "mended and told",
    told=["masks as text: 4", "coordinates as text: 5"],
)
def masks_as_text(root: Path) -> None:
    def source(number: int) -> Any:
        return json.dumps([corners(0)]) if number == 0 else [[str(each) for each in corners(1)]]

    content = coco(source=source)
    run = runs(0)
    run = {"size": [str(side) for side in run["size"]], "counts": [str(each) for each in run["counts"]]}
    content["annotations"][2]["segmentation"] = run
    content["annotations"][4]["segmentation"] = json.dumps(runs(0))
    usual(root, content)


@case(
    JSON,
    'masks under another key, such as "polygon" or "rle"',
    "mended and told",
    told=['masks under the key "polygon": 10'],
)
def masks_under_another_key(root: Path) -> None:
    usual(root, changed(lambda each: each.update(polygon=each.pop("segmentation"))))


PHONES = "Pictures of phones"


def turned(root: Path, orientation: int, content: dict[str, Any], suffix: str = "jpg") -> None:
    """Write images so that they show the usual ones when they are turned as their tag says."""
    back = {
        3: lambda image: image[::-1, ::-1],
        6: lambda image: np.rot90(image, 1),
        8: lambda image: np.rot90(image, -1),
    }
    for seed in range(COUNT):
        stored = np.ascontiguousarray(back[orientation](pixels(seed)))
        tag = Image.Exif()
        tag[274] = orientation
        if suffix == "tif":
            write(root / f"images/{seed}.tif", stored, extratags=[(274, "H", 1, orientation, True)])
        else:
            write(root / f"images/{seed}.{suffix}", stored, exif=tag.tobytes(), quality=95)
    text(root / "instances.json", content)


NAMES_JPG = [f"{number}.jpg" for number in range(COUNT)]


@case(
    PHONES,
    "an orientation tag (EXIF), and annotations of the picture as viewers show it",
    "the image is turned, the masks fit, and it is told",
    told=["images turned as their orientation tag .*: 5"],
)
def exif_upside_down(root: Path) -> None:
    turned(root, 3, coco(NAMES_JPG))


@case(PHONES, "the same, turned on its side", "the same", told=["images turned as their orientation tag .*: 5"])
def exif_on_its_side(root: Path) -> None:
    turned(root, 6, coco(NAMES_JPG))


@case(PHONES, "the same in a TIFF", "the same", told=["images turned as their orientation tag .*: 5"])
def exif_of_a_tiff(root: Path) -> None:
    turned(root, 8, coco([f"{number}.tif" for number in range(COUNT)]), "tif")


@case(
    PHONES,
    "the same, with annotations of the size that is stored",
    "the image is left as it is stored, and it is told",
    told=["images that their orientation tag \\(EXIF\\) turns left as stored, which has the annotated size: 5"],
)
def exif_that_nobody_followed(root: Path) -> None:
    content = coco(NAMES_JPG)
    for image in content["images"]:
        image.update(height=WIDTH, width=HEIGHT)
    for annotation in content["annotations"]:
        x, y, across, down = annotation.pop("bbox")
        # The stored image is the displayed one, turned to the left.
        left, top = y, WIDTH - x - across
        annotation["segmentation"] = [[left, top, left + down, top, left + down, top + across, left, top + across]]
    turned(root, 6, content)


DIVISION = "What is held out"


@case(DIVISION, "no parts", "one image in five, the same in every run; the run writes their names to `held_out.txt`")
def no_parts(root: Path) -> None:
    usual(root)


@case(DIVISION, "`--val 0.4`", "this share", options={"val": "0.4"}, parts=(3, 2))
def share(root: Path) -> None:
    usual(root)


@case(
    DIVISION,
    "`--val FOLDER`",
    "the images of another folder, whatever its format",
    options={"val": "{root}_others"},
    parts=(5, 3),
    classes=("nut", "instance"),
    told=["classes without an instance to learn from: 1 \\('instance'\\)"],
)
def another_folder(root: Path) -> None:
    usual(root)
    for number in range(3):
        write(Path(f"{root}_others") / f"{number}.png", pixels(number))
        write(Path(f"{root}_others") / f"{number}_masks.png", instance_map())


@case(
    DIVISION,
    "`--val FILE` with annotations",
    "the images that they name",
    options={"val": "{root}/held/later.json"},
    parts=(5, 2),
)
def another_file(root: Path) -> None:
    usual(root)
    names = ["v0.png", "v1.png"]
    images(root / "held", names)
    text(root / "held/later.json", coco(names))


@case(
    DIVISION,
    "`--val LIST.txt`, one name in each line, such as the `held_out.txt` of another run",
    "these images",
    options={"val": "{root}/list.txt"},
    parts=(3, 2),
)
def a_list(root: Path) -> None:
    usual(root)
    text(root / "list.txt", "images/3.png\n1.png\n")


@case(
    DIVISION,
    "a name in that list that is no image",
    "refused",
    options={"val": "{root}/list.txt"},
    refused="'7.png' is none",
)
def a_list_with_a_mistake(root: Path) -> None:
    usual(root)
    text(root / "list.txt", "7.png\n")


@case(DIVISION, "images elsewhere, with `--images FOLDER`", "found there", options={"images": "{root}_pictures"})
def images_elsewhere(root: Path) -> None:
    images(Path(f"{root}_pictures"))
    text(root / "instances.json", coco())
