"""Public data sets, and what else is left in folders of data."""

from __future__ import annotations

import base64
import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lab.folders.of_json import JSON
from lab.folders.of_maps import MAPS
from lab.folders.of_others import labelme, moved, moved_coco, points, shape
from lab.folders.of_tools import TOOLS, yolo
from lab.folders.pieces import COUNT, HEIGHT, WIDTH, case, images, instance_map, pixels, text, write
from maskloss.lab.data.readers.segmentation import encode

NAMES = ("bolt", "nut")


def binary(number: int, at: int) -> np.ndarray:
    return (instance_map(at=at) == number + 1).astype(np.uint8) * 255


# ---------------------------------------------------------------------------------------------------------------- maps


@case(
    MAPS,
    "`masks/nut/a.png`, `masks/a_nut.png`, `masks/a/nut.png`: a binary mask for each class",
    "read, with the names of the classes",
    classes=NAMES,
)
def masks_of_named_classes(root: Path) -> None:
    moved(root / "images")
    for at in range(COUNT):
        for number, name in enumerate(NAMES):
            write(root / (f"masks/{name}/{at}.png", f"masks/{at}_{name}.png")[at % 2], binary(number, at))


def masks_of_one_class(root: Path) -> None:
    moved(root / "images")
    for at in range(COUNT):
        write(root / f"masks/{at}/nut.png", (instance_map(at=at) > 0).astype(np.uint8) * 255)
        write(root / f"masks/{at}/bolt.png", np.zeros((HEIGHT, WIDTH), np.uint8))


case(MAPS, "the same, with pixels in several places", "asked", refused="masks of classes in .* have pixels in several")(
    masks_of_one_class
)
case(
    MAPS,
    "the same with `--semantic components`",
    "each connected region is an instance",
    classes=NAMES,
    options={"semantic": "components"},
)(masks_of_one_class)


def tasks(root: Path, name: str) -> None:
    moved(root / "images", [name.format(at) for at in range(COUNT)])
    for at in range(COUNT):
        for number, kind in enumerate(NAMES):
            write(root / f"masks/task-1{at}-annotation-{at}-by-me@x.org-tag-{kind}-0.png", binary(number, at))


@case(MAPS, "Label Studio's PNG files, `task-11-annotation-1-by-1-tag-nut-0.png`", "refused", refused="name tasks of")
def masks_of_tasks(root: Path) -> None:
    tasks(root, "{}.png")


@case(MAPS, "the same, with the number of the task in the name of the image", "read", classes=NAMES)
def masks_of_named_tasks(root: Path) -> None:
    tasks(root, "task-1{}.png")


@case(
    MAPS,
    "Open Images: `masks/x_m01g317_1f2e3d4c.png` of `train/x.jpg`",
    "read, with the codes of the classes",
    classes=("m01g317", "m0k4j"),
)
def open_images(root: Path) -> None:
    moved(root / "train", [f"{at}a{at}.png" for at in range(COUNT)])
    for at in range(COUNT):
        for number, code in enumerate(("m01g317", "m0k4j")):
            write(root / f"masks/{at}a{at}_{code}_{at}f2e3d4{number}.png", binary(number, at))


@case(
    MAPS,
    "KITTI, KITTI MOTS, Mapillary Vistas: 1000 or 256 times the class and a number",
    "asked",
    refused="may be 1000 or 256 times a class and a number",
)
def codes(root: Path) -> None:
    images(root / "images")
    for number in range(COUNT):
        write(root / f"instances/{number}.png", np.array([0, 1001, 2001], np.uint16)[instance_map()])


@case(
    MAPS,
    "CVPPP: `plant01_rgb.png`, `plant01_label.png` and `plant01_centers.png`",
    "read; what has no label map is left out and counted",
    classes=("instance",),
    told=["images without a label map: 5"],
)
def plants(root: Path) -> None:
    for number in range(COUNT):
        write(root / f"A1/plant0{number}_rgb.png", pixels(number))
        write(root / f"A1/plant0{number}_label.png", instance_map())
        write(root / f"A1/plant0{number}_centers.png", np.zeros((HEIGHT, WIDTH), np.uint8))


@case(
    MAPS,
    "names of maps that all end in something else: CamVid's `x_L.png`, ilastik's `x_Object Identities.tif`",
    "read",
    classes=("instance",),
)
def other_ends(root: Path) -> None:
    for number in range(COUNT):
        write(root / f"a{number}.tif", pixels(number)[..., 0])
        write(root / f"a{number}_Object Identities.tif", instance_map(np.uint32))
        write(root / f"a{number}_Probabilities.tif", pixels(number)[..., 0].astype(np.float32) / 255)


@case(MAPS, "`x.ome.tif` with `x_label.ome.tif`; `A1.PNG` with `a1.png`", "read", classes=("instance",))
def ome(root: Path) -> None:
    for number in range(COUNT):
        write(root / f"A{number}.ome.tif", pixels(number)[..., 0])
        write(root / f"a{number}_label.ome.tif", instance_map(np.uint16))


@case(
    MAPS,
    "MVTec: `test/broken/0.png` with `ground_truth/broken/0_mask.png`",
    "asked what its binary maps are; images without a defect are left out",
    refused="all 5 maps have the values 0 and 255 only",
)
def mvtec(root: Path) -> None:
    for number in range(COUNT):
        write(root / f"bottle/train/good/{number}.png", pixels(number))
        write(root / f"bottle/test/broken/{number}.png", pixels(number))
        write(root / f"bottle/ground_truth/broken/{number}_mask.png", binary(0, 0) | binary(1, 0))


@case(
    MAPS,
    "broken files of JSON or XML beside label maps, which need none",
    "read, and told",
    classes=("instance",),
    told=["broken files that nothing needed: 3 .*labels.json: it is empty; .*notes.json: .*; .*settings.xml: "],
)
def broken_files(root: Path) -> None:
    images(root / "images")
    for number in range(COUNT):
        write(root / f"masks/{number}.png", instance_map())
    text(root / "notes.json", '{"a": 1,')
    text(root / "settings.xml", "<a><b></a>")
    text(root / "labels.json", "")


# ---------------------------------------------------------------------------------------------------------------- JSON


def truncated(root: Path, name: str, content: str) -> None:
    images(root / "images")
    text(root / name, content)


@case(
    JSON,
    "a broken file that is needed: cut off, a web page, a pointer of Git LFS",
    "refused, with what it is",
    refused=r"instances\.json: it is a pointer to a file in Git LFS",
)
def pointer(root: Path) -> None:
    truncated(root, "instances.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 1\n")


@case(JSON, "the same under any name", "refused", refused=r"holds 5 of \.png, 1 of \.json; .*export\.json: Expecting")
def cut_off(root: Path) -> None:
    truncated(root, "export.json", '[{"id": 1,')


@case(
    JSON,
    "LVIS: images without names but with addresses, and classes of which not all instances are annotated",
    "read, and told as suspicious",
    told=["instances of a class are not all annotated .LVIS.: the others are taken for background: 1"],
)
def lvis(root: Path) -> None:
    moved(root / "train2017")
    content = moved_coco()
    for at, image in enumerate(content["images"]):
        image.update(coco_url=f"http://x.example/train2017/{image.pop('file_name')}", not_exhaustive_category_ids=[])
        image["not_exhaustive_category_ids"] += [1] * (at == 0)
    text(root / "lvis_v1.json", content)


@case(
    JSON,
    "polygons that all have four corners, of a data set of boxes",
    "read as they are, and told as suspicious",
    told=["all polygons have four corners: are they boxes, and no masks.: 20"],
    parts=(8, 2),
)
def boxes_as_polygons(root: Path) -> None:
    names = [f"{at}.png" for at in range(10)]
    moved(root / "images", names)
    text(root / "instances.json", moved_coco(names))


@case(JSON, "Segment Anything (SA-1B): a JSON file for each image", "read, as one class", classes=("object",))
def segment_anything(root: Path) -> None:
    moved(root)
    for at in range(COUNT):
        image = {"file_name": f"{at}.png", "height": HEIGHT, "width": WIDTH}
        masks = [{"segmentation": encode(binary(number, at))} for number in range(2)]
        text(root / f"{at}.json", {"image": image, "annotations": masks})


@case(JSON, "YouTube-VIS: videos, with a mask in each frame", "read: frames are images, and it is told")
def videos(root: Path) -> None:
    names = [f"v/{at}.png" for at in range(COUNT)]
    moved(root / "JPEGImages", names)
    video = {"id": 1, "file_names": names, "height": HEIGHT, "width": WIDTH}
    tracks = [
        {
            "id": number,
            "video_id": 1,
            "category_id": 1,
            "segmentations": [encode(binary(number, at)) for at in range(COUNT)],
        }
        for number in range(2)
    ]
    text(root / "train.json", {"videos": [video], "annotations": tracks, "categories": [{"id": 1, "name": "nut"}]})


@case(JSON, "`person_keypoints_train2017.json` alone", "read: it has masks, too")
def keypoints(root: Path) -> None:
    moved(root / "images")
    text(root / "annotations/person_keypoints_train2017.json", moved_coco())


@case(MAPS, "CVAT's export of Cityscapes, with its own classes in `label_colors.txt`", "read", classes=NAMES)
def cvat_cityscapes(root: Path) -> None:
    for number in range(COUNT):
        write(root / f"imgsFine/leftImg8bit/default/{number}_leftImg8bit.png", pixels(number))
        found = np.array([0, 1000, 2000], np.uint16)[instance_map()]
        write(root / f"gtFine/default/{number}_gtFine_instanceIds.png", found)
    text(root / "label_colors.txt", "0 0 0 background\n1 2 3 bolt\n4 5 6 nut\n")


# --------------------------------------------------------------------------------------------------------------- tools


def region(number: int, at: int) -> bytes:
    """Write a region as ImageJ does: whole numbers of pixels, or fractions of them."""
    corners, fine = points(number, at), bool(number)
    (left, top), (right, bottom) = corners[0], corners[2]
    head = struct.pack(">4sHBB4hH", b"Iout", 227, 7 * number, 0, top, left, bottom, right, len(corners))
    head += bytes(50 - len(head)) + struct.pack(">H", 128 * fine) + bytes(12)
    whole = [x - left for x, _ in corners] + [y - top for _, y in corners]
    exact = [x for x, _ in corners] + [y for _, y in corners]
    return head + struct.pack(">8h", *whole) + (struct.pack(">8f", *exact) if fine else b"")


@case(
    TOOLS,
    "ImageJ and Fiji: `x_rois.zip` or `x/RoiSet.zip`",
    "read: polygons, ovals; rectangles become regions",
    classes=("object",),
)
def imagej(root: Path) -> None:
    for at in range(COUNT):
        moved(root / (f"s{at}" if at else "."), [f"{at}.png"], at)
        with zipfile.ZipFile(root / (f"s{at}/RoiSet.zip" if at else "0_rois.zip"), "w") as archive:
            for number in range(2):
                archive.writestr(f"{number}.roi", region(number, at))


@case(
    TOOLS,
    "LabelMe of MIT, as CVAT exports it too; Roboflow's VOC with polygons",
    "read: polygons; boxes become regions",
    regions=1,
)
def labelme_xml(root: Path) -> None:
    moved(root)
    for at in range(COUNT):
        shapes = []
        for number in range(2):
            corners = points(number, at)
            if at % 2:
                polygon = "".join(f"<pt><x>{x}</x><y>{y}</y></pt>" for x, y in corners)
            else:
                polygon = "".join(f"<x{i}>{x}</x{i}><y{i}>{y}</y{i}>" for i, (x, y) in enumerate(corners, 1))
            shapes.append(f"<object><name>nut</name><polygon>{polygon}</polygon></object>")
        if at == 1:
            left, top, across, down = 1, 1, 3, 3
            edges = f"<xmin>{left}</xmin><ymin>{top}</ymin><xmax>{left + across}</xmax><ymax>{top + down}</ymax>"
            shapes.append(f"<object><name>nut</name><bndbox>{edges}</bndbox></object>")
            shapes.append("<object><name>gone</name><deleted>1</deleted><polygon/></object>")
        text(root / f"{at}.xml", f"<annotation><filename>{at}.png</filename>{''.join(shapes)}</annotation>")


@case(TOOLS, "YOLO, written by Windows' PowerShell in UTF-16", "read", parts=(3, 2))
def yolo_wide(root: Path) -> None:
    yolo(root)
    for path in (*root.rglob("*.txt"), root / "data.yaml"):
        path.write_bytes(path.read_text().encode("utf-16"))


@case(
    TOOLS,
    "YOLO with the same images as train and as val",
    "a share is held out, and it is told",
    told=["train and val of the YAML file have the same images: a share is held out: 3"],
    parts=(2, 1),
)
def yolo_once(root: Path) -> None:
    yolo(root)
    for kind in ("images", "labels"):
        for path in (root / kind / "val").iterdir():
            path.unlink()
    text(root / "data.yaml", "train: images/train\nval: images/train\nnames: [nut]\n")


# ------------------------------------------------------------------------------------------------------------ services


def inside(root: Path, damage: int | None = None) -> None:
    labelme(root, lambda at: [shape(at, 0), shape(at, 1)])
    for at in range(COUNT):
        buffer = io.BytesIO()
        Image.fromarray(pixels(at, at)).save(buffer, "PNG")
        content = json.loads((root / f"{at}.json").read_text())
        text(root / f"{at}.json", {**content, "imageData": base64.b64encode(buffer.getvalue()[:damage]).decode()})
    for path in root.rglob("*.png"):
        path.unlink()


case(TOOLS, "labelme with images in the JSON files only, as `imageData`", "read")(inside)


@case(TOOLS, "the same, cut off", "refused", refused=r"0\.json: cannot identify image file imageData")
def inside_cut_off(root: Path) -> None:
    inside(root, 9)


def named(number: int, at: int, across: float = 1, down: float = 1) -> list[dict[str, float]]:
    return [{"x": x / across, "y": y / down} for x, y in points(number, at)]


def service(root: Path, row: Callable[[int], Any]) -> list[Any]:
    moved(root / "images")
    return [row(at) for at in range(COUNT)]


def of_labelbox(root: Path, form: Callable[[int, int], Any]) -> None:
    def row(at: int) -> Any:
        objects = [{"name": "nut", **form(number, at)} for number in range(2)]
        labels = [{"annotations": {"objects": objects}}]
        size = {"height": HEIGHT, "width": WIDTH}
        return {
            "data_row": {"external_id": f"{at}.png"},
            "media_attributes": size,
            "projects": {"p": {"labels": labels}},
        }

    text(root / "export.ndjson", "\n".join(map(json.dumps, service(root, row))))


@case(TOOLS, "Labelbox's `export.ndjson`", "read: polygons; boxes become regions")
def labelbox(root: Path) -> None:
    of_labelbox(root, lambda number, at: {"polygon": named(number, at)})


@case(TOOLS, "the same with masks", "refused: they are addresses", refused="0.png has a mask that is an address")
def labelbox_masks(root: Path) -> None:
    of_labelbox(root, lambda number, at: {"mask": {"url": "https://x.example"}})


@case(TOOLS, "Encord's JSON", "read: polygons; boxes become regions")
def encord(root: Path) -> None:
    def row(at: int) -> Any:
        objects: list[Any] = [
            {
                "name": "nut",
                "shape": "polygon",
                "polygon": {str(place): each for place, each in enumerate(named(number, at, WIDTH, HEIGHT))},
            }
            for number in range(2)
        ]
        unit = {"data_title": f"{at}.png", "height": HEIGHT, "width": WIDTH, "labels": {"objects": objects}}
        return {"data_title": f"{at}.png", "data_units": {"a": unit}}

    text(root / "labels.json", service(root, row))


@case(TOOLS, "Scale's JSON", "read: polygons; boxes become regions", regions=COUNT)
def scale(root: Path) -> None:
    def row(at: int) -> Any:
        drawn: list[Any] = [{"label": "nut", "type": "polygon", "vertices": named(number, at)} for number in range(2)]
        drawn.append({"label": "nut", "type": "box", "left": 1, "top": 1, "width": 3, "height": 3})
        attached = {"attachment": f"https://x.example/{at}.png"}
        return {"params": attached, "response": {"annotations": drawn}}

    text(root / "tasks.json", service(root, row))


@case(
    TOOLS,
    "the same elsewhere, with `--annotations`",
    "read",
    regions=COUNT,
    options={"annotations": "{root}_tasks.json"},
)
def scale_elsewhere(root: Path) -> None:
    scale(root)
    (root / "tasks.json").rename(f"{root}_tasks.json")


@case(TOOLS, "Kili's JSON", "read: polygons with holes; boxes become regions")
def kili(root: Path) -> None:
    def row(at: int) -> Any:
        drawn = [
            {
                "categories": [{"name": "nut"}],
                "type": "semantic",
                "boundingPoly": [{"normalizedVertices": named(number, at, WIDTH, HEIGHT)}],
            }
            for number in range(2)
        ]
        return {"externalId": f"{at}", "labels": [{"jsonResponse": {"JOB": {"annotations": drawn}}}]}

    text(root / "data.json", service(root, row))


@case(TOOLS, "Dataloop's JSON: a file for each image", "read: polygons, masks; boxes become regions")
def dataloop(root: Path) -> None:
    moved(root / "items")
    for at in range(COUNT):
        buffer = io.BytesIO()
        alpha = binary(1, at)
        Image.fromarray(np.dstack([alpha, alpha, alpha, alpha])).save(buffer, "PNG")
        mask = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        drawn = [
            {"type": "segment", "label": "nut", "coordinates": [named(0, at)]},
            {"type": "binary", "label": "nut", "coordinates": mask},
            {"type": "class", "label": "good"},
        ]
        size = {"system": {"height": HEIGHT, "width": WIDTH}}
        text(root / f"json/{at}.json", {"filename": f"/{at}.png", "metadata": size, "annotations": drawn})


@case(TOOLS, "Scalabel, BDD100K: a JSON file of frames", "read: polygons, run lengths; boxes become regions", regions=5)
def scalabel(root: Path) -> None:
    def row(at: int) -> Any:
        labels: list[Any] = [
            {"category": "nut", "poly2d": [{"vertices": points(number, at), "types": "LLLL", "closed": True}]}
            for number in range(2)
        ]
        labels.append({"category": "nut", "box2d": {"x1": 1, "y1": 1, "x2": 4, "y2": 4}})
        return {"name": f"{at}.png", "labels": labels}

    text(root / "labels.json", service(root, row))


def feature(number: int, at: int) -> dict[str, Any]:
    ring = [*points(number, at), points(number, at)[0]]
    kind, paths = ("Polygon", [ring]) if number else ("MultiPolygon", [[ring]])
    named = {"objectType": "annotation", "classification": {"name": "nut"}}
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": paths}, "properties": named}


@case(TOOLS, "QuPath: `x.geojson`, or a list of features in `x.json`", "read: polygons with holes")
def qupath(root: Path) -> None:
    moved(root / "images")
    for at in range(COUNT):
        features = [feature(number, at) for number in range(2)]
        if at % 2:
            text(root / f"out/{at}.png.geojson", {"type": "FeatureCollection", "features": features})
        else:
            text(root / f"out/{at}.json", features)


@case(TOOLS, "GeoJSON in degrees", "refused", refused="GeoJSON must be in pixels")
def of_the_earth(root: Path) -> None:
    moved(root)
    for at in range(COUNT):
        text(root / f"{at}.geojson", {"type": "FeatureCollection", "crs": {}, "features": [feature(0, at)]})


@case(TOOLS, "HuBMAP's `polygons.jsonl`", "read")
def hubmap(root: Path) -> None:
    moved(root / "train")
    rows = [
        {"id": f"{at}", "annotations": [{"type": "nut", "coordinates": [points(number, at)]} for number in range(2)]}
        for at in range(COUNT)
    ]
    text(root / "polygons.jsonl", "\n".join(map(json.dumps, rows)))
