"""Labeling tools with formats of their own."""

from __future__ import annotations

import base64
import csv
import io
import itertools
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lab.folders.of_json import NAMES_JPG
from lab.folders.pieces import (
    COUNT,
    HEIGHT,
    WIDTH,
    box,
    case,
    coco,
    corners,
    images,
    instance_map,
    packed,
    pixels,
    text,
    write,
)

TOOLS = "Labeling tools"


def yolo_lines(classes: int = 0) -> str:
    lines = []
    for number in range(2):
        each = corners(number)
        numbers = [value / (WIDTH, HEIGHT)[place % 2] for place, value in enumerate(each)]
        lines.append(f"{classes} " + " ".join(f"{value:.6f}" for value in numbers))
    return "\n".join(lines) + "\n"


@case(
    TOOLS,
    "YOLO: `images/` and `labels/`, with `data.yaml`",
    "read: polygons, parts and names as the YAML file says",
    parts=(3, 2),
)
def yolo(root: Path) -> None:
    for part, numbers in (("train", range(3)), ("val", range(3, 5))):
        for number in numbers:
            write(root / f"images/{part}/{number}.jpg", pixels(number), quality=95)
            text(root / f"labels/{part}/{number}.txt", yolo_lines())
    text(
        root / "data.yaml",
        "path: /home/someone/datasets/nuts\ntrain: images/train\nval: images/val\nnames:\n  0: nut\n",
    )


@case(TOOLS, "Roboflow's YOLO: `../train/images`", "read", parts=(3, 2), told=["images of the part test left alone: 1"])
def yolo_of_roboflow(root: Path) -> None:
    for part, numbers in (("train", range(3)), ("valid", range(3, 5)), ("test", range(5, 6))):
        for number in numbers:
            write(root / f"{part}/images/{number}.jpg", pixels(number), quality=95)
            text(root / f"{part}/labels/{number}.txt", yolo_lines())
    text(
        root / "data.yaml",
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 1\nnames: ['nut']\n",
    )


@case(
    TOOLS,
    "YOLO without a YAML file, with `classes.txt`; lines that are boxes",
    "read; boxes become regions",
    objects=None,
    regions=1,
    told=["instances with a box only made ignore regions"],
)
def yolo_without_yaml(root: Path) -> None:
    for number in range(COUNT):
        write(root / f"images/{number}.jpg", pixels(number), quality=95)
        text(root / f"labels/{number}.txt", yolo_lines())
    x, y, across, down = box(1)
    as_box = f"0 {(x + across / 2) / WIDTH} {(y + down / 2) / HEIGHT} {across / WIDTH} {down / HEIGHT}"
    text(root / "labels/2.txt", "\n".join([yolo_lines().splitlines()[0], as_box]))
    text(root / "classes.txt", "nut\n")


@case(TOOLS, "YOLO polygons in pixels", "refused", refused=r"has \d+, which is no fraction of the image")
def yolo_in_pixels(root: Path) -> None:
    yolo(root)
    text(root / "labels/train/0.txt", "0 " + " ".join(str(each) for each in corners(0)))


@case(
    TOOLS,
    "labelme: `x.json` beside `x.jpg`",
    "read: polygons, groups of polygons, circles, masks; rectangles become regions, `__ignore__` too",
    objects=None,
    regions=2,
    told=["instances with a box only", "shapes labeled ignore"],
)
def labelme(root: Path) -> None:
    images(root, NAMES_JPG, quality=95)
    for number in range(COUNT):
        shapes = [
            {"label": "nut", "shape_type": "polygon", "points": np.reshape(corners(each), (-1, 2)).tolist()}
            for each in range(2)
        ]
        if number == 0:
            x, y, across, down = box(0)
            end = [x + across - 1, y + down - 1]
            shapes[0] = {
                "label": "nut",
                "shape_type": "mask",
                "points": [[x, y], end],
                "mask": packed(np.ones((down, across))),
            }
        elif number == 1:
            shapes.append({"label": "nut", "shape_type": "rectangle", "points": [[1, 1], [5, 5]]})
        elif number == 2:
            shapes.append({"label": "__ignore__", "shape_type": "polygon", "points": [[1, 1], [5, 1], [5, 5]]})
        elif number == 3:
            shapes = [{**shape, "group_id": 7} for shape in shapes]
        text(
            root / f"{number}.json",
            {
                "version": "5.4.1",
                "shapes": shapes,
                "imagePath": f"{number}.jpg",
                "imageHeight": HEIGHT,
                "imageWidth": WIDTH,
            },
        )


@case(
    TOOLS,
    "labelme2coco: `annotations.json`, `JPEGImages/`, a background class",
    "read",
    told=["placeholder categories without instances left out: 1 \\('_background_'\\)"],
)
def labelme_as_coco(root: Path) -> None:
    images(root / "JPEGImages", NAMES_JPG, quality=95)
    content = coco([f"JPEGImages/{name}" for name in NAMES_JPG], first=0)
    content["categories"].insert(0, {"id": 0, "name": "_background_", "supercategory": None})
    text(root / "annotations.json", content)


@case(TOOLS, "VIA: `via_region_data.json`, or a project", "read", parts=(3, 2))
def via(root: Path) -> None:
    for part, numbers in (("train", range(3)), ("val", range(3, 5))):
        found = {}
        for number in numbers:
            write(root / part / f"{number}.jpg", pixels(number), quality=95)
            regions = [
                {
                    "shape_attributes": {
                        "name": "polygon",
                        "all_points_x": corners(each)[::2],
                        "all_points_y": corners(each)[1::2],
                    },
                    "region_attributes": {"class": "nut"},
                }
                for each in range(2)
            ]
            listed: Any = dict(enumerate(regions)) if part == "val" else regions
            found[f"{number}.jpg1234"] = {
                "filename": f"{number}.jpg",
                "size": 1234,
                "regions": listed,
                "file_attributes": {},
            }
        text(root / part / "via_region_data.json", {"_via_img_metadata": found} if part == "val" else found)


@case(
    TOOLS,
    "CVAT for images: `annotations.xml`",
    "read: polygons, masks, ellipses; boxes become regions",
    regions=1,
    told=["instances with a box only"],
)
def cvat(root: Path) -> None:
    images(root / "images")
    lines = ["<?xml version='1.0' encoding='utf-8'?>", "<annotations><version>1.1</version>"]
    for number in range(COUNT):
        lines.append(f'<image id="{number}" name="{number}.png" width="{WIDTH}" height="{HEIGHT}">')
        x, y, across, down = box(0)
        lines.append(
            f'<mask label="nut" rle="0, {across * down}" left="{x}" top="{y}" width="{across}" height="{down}"/>'
        )
        points = ";".join(f"{left:.1f},{top:.1f}" for left, top in np.reshape(corners(1), (-1, 2)))
        lines.append(f'<polygon label="nut" points="{points}" occluded="0" z_order="0"></polygon>')
        if number == 0:
            lines.append('<box label="nut" xtl="1" ytl="1" xbr="4" ybr="4"/>')
        lines.append("</image>")
    text(root / "annotations.xml", "\n".join([*lines, "</annotations>"]))


@case(TOOLS, "an XML file with entities", "refused", refused="declares entities")
def xml_with_entities(root: Path) -> None:
    cvat(root)
    path = root / "annotations.xml"
    path.write_text(path.read_text().replace("<annotations>", '<!DOCTYPE a [<!ENTITY x "y">]><annotations>'))


@case(
    TOOLS,
    "Supervisely: `img/` and `ann/`",
    "read: polygons with holes, bitmaps; rectangles become regions",
    parts=(3, 2),
)
def supervisely(root: Path) -> None:
    text(root / "meta.json", {"classes": [{"title": "nut", "shape": "polygon"}], "tags": []})
    for part, numbers in (("train", range(3)), ("val", range(3, 5))):
        for number in numbers:
            write(root / part / "img" / f"{number}.png", pixels(number))
            points = np.reshape(corners(0), (-1, 2)).tolist()
            x, y, across, down = box(1)
            buffer = io.BytesIO()
            Image.fromarray(np.full((down, across), 255, np.uint8)).save(buffer, "PNG")
            data = base64.b64encode(zlib.compress(buffer.getvalue())).decode()
            objects = [
                {"classTitle": "nut", "geometryType": "polygon", "points": {"exterior": points, "interior": []}},
                {"classTitle": "nut", "geometryType": "bitmap", "bitmap": {"data": data, "origin": [x, y]}},
            ]
            text(
                root / part / "ann" / f"{number}.png.json",
                {"size": {"height": HEIGHT, "width": WIDTH}, "objects": objects},
            )


@case(
    TOOLS,
    "Label Studio's own JSON",
    "read: polygons, brush masks, ellipses; rectangles become regions; tasks that nobody annotated are left out",
    told=["tasks that nobody annotated: 1"],
)
def label_studio_tasks(root: Path) -> None:
    images(root / "images", [f"{number}.png" for number in range(COUNT + 1)])
    tasks: list[dict[str, Any]] = []
    for number in range(COUNT):
        points = [[x / WIDTH * 100, y / HEIGHT * 100] for x, y in np.reshape(corners(0), (-1, 2)).tolist()]
        results = [
            {"type": "polygonlabels", "value": {"points": points, "polygonlabels": ["nut"]}},
            {"type": "brushlabels", "original_width": WIDTH, "original_height": HEIGHT,
             "value": {"format": "rle", "rle": brush(instance_map() == 2), "brushlabels": ["nut"]}},
        ]  # fmt: skip
        address = f"/data/upload/1/0a1b2c3d-{number}.png"
        tasks.append({"id": number, "data": {"image": address}, "annotations": [{"result": results}]})
    tasks.append({"id": COUNT, "data": {"image": f"{COUNT}.png"}, "annotations": []})
    text(root / "project-1-at-2024.json", tasks)


def brush(mask: np.ndarray) -> list[int]:
    """Write Label Studio's run lengths: one block for each run, lengths in 16 bits."""
    values = np.repeat(mask.ravel().astype(np.uint8) * 255, 4)
    edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    bits = f"{len(values):032b}" + f"{7:05b}" + "".join(f"{each - 1:04b}" for each in (3, 4, 8, 16))
    for start, end in itertools.pairwise(edges):
        bits += "1" + "11" + f"{end - start - 1:016b}" + f"{values[start]:08b}"
    bits += "0" * (-len(bits) % 8)
    return [int(bits[place : place + 8], 2) for place in range(0, len(bits), 8)]


@case(TOOLS, "the same in its short form (JSON-MIN)", "read")
def label_studio_short(root: Path) -> None:
    images(root / "images")
    tasks = []
    for number in range(COUNT):
        shapes = []
        for place in range(2):
            points = [[x / WIDTH * 100, y / HEIGHT * 100] for x, y in np.reshape(corners(place), (-1, 2)).tolist()]
            shapes.append(
                {"points": points, "polygonlabels": ["nut"], "original_width": WIDTH, "original_height": HEIGHT}
            )
        tasks.append({"id": number, "image": f"/data/upload/1/0a1b2c3d-{number}.png", "label": shapes, "annotator": 1})
    text(root / "project-1-min.json", tasks)


@case(TOOLS, "VIA's CSV", "read")
def via_table(root: Path) -> None:
    images(root / "images")
    head = "filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes"
    with io.StringIO() as lines:
        table = csv.writer(lines)
        table.writerow(head.split(","))
        for number in range(COUNT):
            for place in range(2):
                xs, ys = corners(place)[::2], corners(place)[1::2]
                shape = {"name": "polygon", "all_points_x": xs, "all_points_y": ys}
                row = [f"{number}.png", 1, "{}", 2, place, json.dumps(shape), json.dumps({"name": "nut"})]
                table.writerow(row)
        text(root / "via_export_csv.csv", lines.getvalue())


@case(TOOLS, "CVAT for video: tracks over frames", "read; frames that no track names are left out")
def cvat_video(root: Path) -> None:
    images(root / "images", [f"frame_{number:06d}.png" for number in range(COUNT)])
    tracks = ""
    for place in range(2):
        points = ";".join(f"{x},{y}" for x, y in np.reshape(corners(place), (-1, 2)).tolist())
        shapes = "".join(
            f'<polygon frame="{number}" keyframe="1" outside="0" points="{points}"></polygon>'
            for number in range(COUNT)
        )
        gone = f'<polygon frame="{COUNT - 1}" keyframe="1" outside="1" points="{points}"></polygon>'
        tracks += f'<track id="{place}" label="nut">{shapes}{gone}</track>'
    size = f"<original_size><width>{WIDTH}</width><height>{HEIGHT}</height></original_size>"
    text(root / "annotations.xml", f"<annotations><meta><task>{size}</task></meta>{tracks}</annotations>")
