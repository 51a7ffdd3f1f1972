"""Label maps of every kind."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lab.folders.pieces import COUNT, HEIGHT, WIDTH, case, images, instance_map, pixels, text, write

MAPS = "Label maps"


def maps(
    root: Path, change: Callable[[np.ndarray], np.ndarray] = lambda found: found, ending: str = "png", **more: Any
) -> None:
    images(root / "images")
    for number in range(COUNT):
        write(root / f"masks/{number}.{ending}", change(instance_map()), **more)


@case(
    MAPS,
    "`images/` with `masks/`, `labels/`, `gt/` …; `img_001.tif` with `mask_001.tif`; `x.tif` with `x_masks.tif`",
    "read: a number for each instance, one class",
    classes=("instance",),
)
def maps_by_any_name(root: Path) -> None:
    for number in range(COUNT):
        write(root / f"Images/img_{number:03d}.tif", pixels(number), photometric="rgb")
        write(root / f"GT/mask_{number:03d}.tif", instance_map(np.uint16))


@case(
    MAPS,
    "`imgs/train/` with `masks/train/`, and `val`; `train/images/` with `train/masks/`",
    "read; val is held out",
    classes=("instance",),
    parts=(3, 2),
)
def maps_in_parts(root: Path) -> None:
    for part, count in (("train", 3), ("val", 2)):
        for number in range(count):
            write(root / f"imgs/{part}/{number}.png", pixels(number))
            write(root / f"masks/{part}/{number}_mask.png", instance_map())


@case(MAPS, "Cellpose: `x_cp_masks.tif` or `.png` beside `x.tif`", "read", classes=("instance",))
def cellpose_masks(root: Path) -> None:
    for number in range(COUNT):
        write(root / f"{number}.tif", pixels(number), photometric="rgb")
        write(root / f"{number}_cp_masks.png", instance_map(np.uint16))
        write(root / f"{number}_flows.tif", pixels(number), photometric="rgb")


@case(
    MAPS,
    "Cellpose: `x_seg.npy`, which is a pickle",
    "read without running what the file may hold",
    classes=("instance",),
)
def cellpose_pickles(root: Path) -> None:
    for number in range(COUNT):
        write(root / f"{number}.tif", pixels(number), photometric="rgb")
        found = {
            "masks": instance_map(np.uint16),
            "outlines": instance_map(),
            "filename": f"{number}.tif",
            "est_diam": 9.5,
        }
        np.save(root / f"{number}_seg.npy", np.array(found, dtype=object), allow_pickle=True)


@case(
    MAPS,
    "a `_seg.npy` that would run a program",
    "refused, and nothing is run",
    refused=r"it would call (posix|nt)\.system, which is not done here",
)
def pickle_that_runs_a_program(root: Path) -> None:
    cellpose_pickles(root)
    with (root / "0_seg.npy").open("wb") as opened:
        np.lib.format.write_array_header_1_0(opened, {"descr": "|O", "fortran_order": False, "shape": ()})
        pickle.dump(_Program(str(root / "ran")), opened)


class _Program:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"touch '{self.path}'",)


@case(MAPS, "arrays of NumPy in `masks/`", "read", classes=("instance",))
def maps_of_numpy(root: Path) -> None:
    maps(root, lambda found: found.astype(np.int64), "npy")


@case(MAPS, "three equal channels, or an alpha channel", "read as one", classes=("instance",))
def maps_with_channels(root: Path) -> None:
    maps(root, lambda found: np.repeat(found[..., None], 3, axis=-1))


@case(
    MAPS,
    "maps stored as JPEG, lossy WebP, or JPEG in TIFF",
    "refused: between two instances there are values that nobody drew",
    refused="is JPEG, which is lossy",
)
def maps_as_jpeg(root: Path) -> None:
    maps(root, lambda found: found * 120, "jpg")


@case(MAPS, "the same under another ending", "refused", refused="is lossy WebP, which is lossy")
def maps_as_webp(root: Path) -> None:
    maps(root, lambda found: found * 120, "webp", quality=50)


@case(MAPS, "a map of another size than its image", "refused", refused=r"0\.png is 40 x 55, 0\.png is 40 x 56")
def maps_of_another_size(root: Path) -> None:
    maps(root, lambda found: found[:, 1:])


@case(
    MAPS,
    "binary maps, 0 and 255",
    "asked: `--semantic components`, `classes` or `instances`",
    refused="look like classes: all 5 maps have the values 0 and 255 only.*\n.*--semantic components",
)
def binary_maps(root: Path) -> None:
    maps(root, lambda found: (found > 0).astype(np.uint8) * 255)


@case(
    MAPS,
    "the same with `--semantic components`",
    "each connected region is an instance",
    classes=("instance",),
    options={"semantic": "components"},
)
def binary_maps_as_components(root: Path) -> None:
    binary_maps(root)


@case(
    MAPS,
    "binary maps, 0 and 1, of 1 bit a pixel",
    "asked",
    refused="look like classes: .*the pixels of one value lie apart",
)
def maps_of_one_bit(root: Path) -> None:
    maps(root, lambda found: found > 0)


@case(MAPS, "`SegmentationClass/` alone", "asked", refused="look like classes")
def classes_alone(root: Path) -> None:
    images(root / "JPEGImages", [f"{number}.jpg" for number in range(COUNT)], quality=95)
    for number in range(COUNT):
        write(root / f"SegmentationClass/{number}.png", semantic(instance_map()))


@case(
    MAPS, "semantic maps: numbers of classes, 255 for void", "asked", refused="look like classes: .*the values 1, 255"
)
def semantic_maps(root: Path) -> None:
    maps(root, semantic)


def semantic(found: np.ndarray) -> np.ndarray:
    """Both objects are of class 1, beside a strip of void."""
    changed = np.minimum(found, 1)
    changed[:, :3] = 255
    return changed


@case(
    MAPS,
    "the same with `--semantic components`",
    "each connected region is an instance of its class; void weighs nothing; "
    "names are taken from `classes.txt`, `labelmap.txt` or JSON",
    options={"semantic": "components"},
    told=["pixels of value 255 beside classes weigh nothing"],
)
def semantic_maps_as_components(root: Path) -> None:
    semantic_maps(root)
    text(root / "classes.txt", "background\nnut\n")


@case(
    MAPS,
    "the same with `--semantic classes`",
    "each class is one mask",
    options={"semantic": "classes"},
    objects=1,
    told=["pixels of value 255"],
)
def semantic_maps_as_classes(root: Path) -> None:
    semantic_maps_as_components(root)


@case(
    MAPS,
    "the same with another `--ignore-value`",
    "that value weighs nothing",
    classes=("instance",),
    options={"semantic": "instances", "ignore_value": 7},
)
def another_void(root: Path) -> None:
    def change(found: np.ndarray) -> np.ndarray:
        found[:2] = 7
        return found

    maps(root, change)


@case(
    MAPS, "Data Science Bowl 2018: a folder for each image, with a PNG for each nucleus", "read", classes=("instance",)
)
def one_file_an_instance(root: Path) -> None:
    for number in range(COUNT):
        write(root / f"stage1_train/id{number}/images/id{number}.png", pixels(number))
        for place in (1, 2):
            write(root / f"stage1_train/id{number}/masks/{place}.png", (instance_map() == place).astype(np.uint8) * 255)


@case(
    MAPS,
    "Cell Tracking Challenge: `01/t000.tif` with `01_GT/SEG/man_seg000.tif`",
    "read; frames that nobody segmented are left out and counted",
    classes=("instance",),
    told=["frames that nobody segmented: 2"],
)
def cell_tracking(root: Path) -> None:
    for number in range(COUNT + 2):
        write(root / f"01/t{number:03d}.tif", pixels(number), photometric="rgb")
        if number < COUNT:
            write(root / f"01_GT/SEG/man_seg{number:03d}.tif", instance_map(np.uint16))
            write(root / f"01_GT/TRA/man_track{number:03d}.tif", instance_map(np.uint16))


@case(
    MAPS,
    "PASCAL VOC: palette PNGs in `SegmentationObject/` and `SegmentationClass/`, borders 255",
    "read; borders weigh nothing",
    classes=("class 3",),
)
def voc(root: Path) -> None:
    for number in range(COUNT):
        write(root / f"JPEGImages/{number}.jpg", pixels(number), quality=95)
        objects = instance_map()
        objects[objects == 0] = 255 * (np.arange(WIDTH) < 2)[None].repeat(HEIGHT, 0)[objects == 0]
        classes = np.where((objects > 0) & (objects < 255), 3, objects)
        for folder, found in (("SegmentationObject", objects), ("SegmentationClass", classes)):
            one = Image.fromarray(found.astype(np.uint8)).convert("P")
            one.putpalette([0, 0, 0, 128, 0, 0] + [224, 224, 192] * 254)
            one.putdata(found.ravel().tolist())
            (root / folder).mkdir(exist_ok=True)
            one.save(root / folder / f"{number}.png")


@case(MAPS, "CVAT's segmentation masks: the same as colors, with `labelmap.txt`", "read", parts=(3, 2))
def voc_as_colors(root: Path) -> None:
    for number in range(COUNT):
        write(root / f"JPEGImages/{number}.jpg", pixels(number), quality=95)
        colors = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0]], np.uint8)
        write(root / f"SegmentationObject/{number}.png", colors[instance_map()])
        write(
            root / f"SegmentationClass/{number}.png",
            np.array([[0, 0, 0], [250, 50, 83]], np.uint8)[np.minimum(instance_map(), 1)],
        )
    text(root / "labelmap.txt", "# label:color_rgb:parts:actions\nbackground:0,0,0::\nnut:250,50,83::\n")
    text(root / "ImageSets/Segmentation/train.txt", "0\n1\n2\n")
    text(root / "ImageSets/Segmentation/val.txt", "3\n4\n")


@case(
    MAPS,
    "Cityscapes: `*_leftImg8bit.png` with `*_gtFine_instanceIds.png`",
    "read; groups are regions, val is held out",
    classes=("person", "rider", "car", "truck", "bus", "caravan", "trailer", "train", "motorcycle", "bicycle"),
    parts=(3, 2),
    regions=5,
    told=["classes without any instance"],
)
def cityscapes(root: Path) -> None:
    for part, numbers in (("train", range(3)), ("val", range(3, 5))):
        for number in numbers:
            name = f"ulm_{number:06d}_000019"
            write(root / f"leftImg8bit/{part}/ulm/{name}_leftImg8bit.png", pixels(number))
            found = np.array([7, 26000, 26001], np.int32)[instance_map()]
            found[:3] = 26
            write(root / f"gtFine/{part}/ulm/{name}_gtFine_instanceIds.png", found.astype(np.uint16))


@case(
    MAPS,
    "ADE20K: `ADE_train_00000001.jpg` with `_seg.png`; its instance challenge: `annotations_instance/`",
    "read",
    classes=("class 517",),
)
def ade20k(root: Path) -> None:
    for number in range(COUNT):
        write(root / f"images/training/ADE_train_{number:08d}.jpg", pixels(number), quality=95)
        colors = np.array([[0, 0, 0], [20, 5, 1], [20, 5, 2]], np.uint8)
        write(root / f"images/training/ADE_train_{number:08d}_seg.png", colors[instance_map()])


@case(MAPS, "ADE20K's instance challenge", "read", classes=("class 13",))
def ade20k_challenge(root: Path) -> None:
    for number in range(COUNT):
        write(root / f"images/training/ADE_train_{number:08d}.jpg", pixels(number), quality=95)
        colors = np.array([[0, 0, 0], [13, 1, 0], [13, 2, 0]], np.uint8)
        write(root / f"annotations_instance/training/ADE_train_{number:08d}.png", colors[instance_map()])


@case(MAPS, "`masks/0.jpg.png`, named after the whole name of the image", "read", classes=("instance",))
def maps_with_two_endings(root: Path) -> None:
    images(root / "images", [f"{number}.jpg" for number in range(COUNT)], quality=95)
    for number in range(COUNT):
        write(root / f"masks/{number}.jpg.png", instance_map())


@case(
    MAPS,
    "`rgb/` with `instances/`, `frames/` with `annotations/`: images in a folder of any name",
    "read, by the names of the files",
    classes=("instance",),
)
def images_in_any_folder(root: Path) -> None:
    images(root / "rgb")
    for number in range(COUNT):
        write(root / f"instances/{number}.tif", instance_map(np.int64))


@case(
    MAPS,
    "a mask file for each instance: `masks/a_1.png`, `masks/a_2.png`, or `masks/a/1.png`, of `images/a.png`",
    "read, unless the files have several values",
    classes=("instance",),
)
def masks_named_after_images(root: Path) -> None:
    images(root / "images")
    for number in range(COUNT):
        for place in (1, 2):
            write(root / f"masks/{number}_{place}.png", (instance_map() == place).astype(np.uint8) * 255)


@case(MAPS, "the same in a folder for each image", "read", classes=("instance",))
def masks_in_folders(root: Path) -> None:
    images(root / "images")
    for number in range(COUNT):
        for place in (1, 2):
            write(root / f"masks/{number}/{place}.png", (instance_map() == place).astype(np.uint8) * 255)


@case(
    MAPS,
    "a mask file for each class",
    "read as above, and told that the files have pixels in several places",
    classes=("instance",),
    objects=None,
    told=["mask files with pixels in several places, each taken for one instance"],
)
def masks_of_classes(root: Path) -> None:
    images(root / "images")
    for number in range(COUNT):
        for place in (1, 2):
            write(root / f"masks/{number}_{place}.png", (instance_map() > 0).astype(np.uint8) * 255)


RED, BLUE, WHITE = (200, 30, 90), (0, 0, 255), (255, 255, 255)


def colored(root: Path, *, void: bool = False) -> None:
    images(root / "images")
    for number in range(COUNT):
        found = np.array([(0, 0, 0), RED, BLUE], np.uint8)[instance_map()]
        if void:
            found[:3] = WHITE
        write(root / f"masks/{number}.png", found)


@case(
    MAPS,
    "semantic maps in color",
    "asked",
    refused="look like classes: they have 2 colors, #c81e5a, #0000ff",
)
def colors(root: Path) -> None:
    colored(root)


@case(
    MAPS,
    "the same with `--semantic components`, and `class_dict.csv`, `label_colors.csv` or `labelmap.txt`",
    "read; classes are called by the names of their colors, what is called void or unlabeled weighs nothing",
    options={"semantic": "components"},
    classes=("bolt", "nut"),
    told=["colors called Void weigh nothing"],
)
def colors_with_names(root: Path) -> None:
    colored(root, void=True)
    text(root / "class_dict.csv", "name,r,g,b\nbackground,0,0,0\nbolt,200,30,90\nnut,0,0,255\nVoid,255,255,255\n")


@case(
    MAPS,
    "the same without names, white with `--ignore-value 16777215` (red + 256 green + 65536 blue)",
    "read; classes are called by their colors",
    options={"semantic": "classes", "ignore_value": 0xFFFFFF},
    classes=("class #c81e5a", "class #0000ff"),
)
def colors_without_names(root: Path) -> None:
    colored(root, void=True)


@case(
    MAPS,
    "the same with `--semantic instances`",
    "each color is an instance",
    options={"semantic": "instances"},
    classes=("instance",),
)
def colors_of_instances(root: Path) -> None:
    colored(root)


@case(
    MAPS,
    "maps of classes with thousands of colors, such as a JPEG that was stored again",
    "refused",
    options={"semantic": "components"},
    refused=r"maps of classes must have few values\n.* have [0-9,]+ values",
)
def noise_in_color(root: Path) -> None:
    images(root / "images")
    drawn = np.random.default_rng(0)
    for number in range(COUNT):
        write(root / f"masks/{number}.png", drawn.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8))


@case(
    MAPS,
    "numbers with the noise of a JPEG in a PNG",
    "refused",
    refused="look like a JPEG that was stored again",
)
def noise_in_numbers(root: Path) -> None:
    def noisy(found: np.ndarray) -> np.ndarray:
        buffer = io.BytesIO()
        Image.fromarray((found > 0).astype(np.uint8) * 200).save(buffer, "JPEG", quality=75)
        return np.asarray(Image.open(buffer))

    maps(root, noisy)


@case(
    MAPS,
    "stacks of planes with stacks of labels",
    "refused: volumes are not trained on, planes are",
    refused="shape 40 x 56 x 5\n.*cut stacks into planes",
)
def stacks(root: Path) -> None:
    for number in range(COUNT):
        write(root / f"images/{number}.tif", np.stack([pixels(number)[..., 0]] * 5))
        write(root / f"masks/{number}.tif", np.stack([instance_map(np.uint16)] * 5))
