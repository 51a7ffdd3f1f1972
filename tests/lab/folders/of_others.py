"""What else people have: other tools, other names, and objects that lie elsewhere in each image."""

from __future__ import annotations

import base64
import gzip
import io
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lab.folders.of_json import JSON
from lab.folders.of_maps import MAPS
from lab.folders.of_tools import TOOLS
from lab.folders.pieces import COUNT, HEIGHT, WIDTH, box, case, coco, corners, images, instance_map, pixels, text, write

NAMES = tuple(f"{number}.png" for number in range(COUNT))


def moved(root: Path, names: Any = NAMES, first: int = 0, **options: Any) -> None:
    """Write images whose objects lie elsewhere in each."""
    for at, name in enumerate(names, start=first):
        write(root / name, pixels(at, at), **options)


def points(number: int, at: int) -> list[list[float]]:
    flat = corners(number, at)
    return [list(pair) for pair in zip(flat[::2], flat[1::2], strict=True)]


def moved_coco(names: Any = NAMES, first: int = 0) -> dict[str, Any]:
    content = coco(names)
    for annotation in content["annotations"]:
        at, number = first + annotation["image_id"] - 1, (annotation["id"] - 1) % 2
        annotation["segmentation"], annotation["bbox"] = [corners(number, at)], box(number, at)
    return content


# ---------------------------------------------------------------------------------------------------------------- COCO


@case(
    JSON,
    "run lengths that are counted row by row, or masks that lie elsewhere than their boxes for other reasons",
    "refused",
    refused="masks must lie in their boxes.*\n.*10 of the first 10 do not",
)
def row_by_row(root: Path) -> None:
    def runs(number: int) -> dict[str, Any]:
        ends = np.flatnonzero(np.diff((instance_map() == number + 1).ravel())) + 1
        return {"size": [HEIGHT, WIDTH], "counts": np.diff([0, *ends, HEIGHT * WIDTH]).tolist()}

    images(root / "images")
    text(root / "instances.json", coco(source=runs))


@case(JSON, "`instances.json.gz`", "read")
def packed_json(root: Path) -> None:
    moved(root / "images")
    (root / "instances.json.gz").write_bytes(gzip.compress(json.dumps(moved_coco()).encode()))


@case(JSON, "`data.jsonl`: a line for each image, with its annotations", "read", classes=("class 1",))
def json_lines(root: Path) -> None:
    content = moved_coco()
    moved(root / "images")
    of_image = [[one for one in content["annotations"] if one["image_id"] == each["id"]] for each in content["images"]]
    lines = [json.dumps({**each, "annotations": some}) for each, some in zip(content["images"], of_image, strict=True)]
    text(root / "data.jsonl", "\n".join(lines) + "\n")


@case(
    JSON, "annotations in another folder, with `--annotations`", "read", options={"annotations": "{root}-more/my.json"}
)
def annotations_elsewhere(root: Path) -> None:
    moved(root)
    text(root.with_name(f"{root.name}-more") / "my.json", moved_coco())


@case(JSON, "`train/0.png` and `val/0.png`, both called `0.png` in the annotations of their part", "read", parts=(3, 2))
def same_names(root: Path) -> None:
    for part, first, count in (("train", 0, 3), ("val", 3, 2)):
        moved(root / "images" / part, NAMES[:count], first)
        text(root / f"annotations/{part}.json", moved_coco(NAMES[:count], first))


@case(
    JSON,
    "images in a format that is not read, such as HEIC",
    "refused",
    refused="in a format that is read.*\n.*0.heic is not",
)
def heic(root: Path) -> None:
    names = [f"{number}.heic" for number in range(COUNT)]
    for name in names:
        text(root / name, "ftypheic")
    text(root / "instances.json", coco(names))


@case(JSON, "JPEG 2000, `.jfif`, TGA and what else Pillow reads", "read")
def other_endings(root: Path) -> None:
    names = ["0.jp2", "1.jfif", "2.TGA", "3.webp", "4.bmp"]
    for at, name in enumerate(names):
        write(root / name, pixels(at, at), **({"quality": 95} if name == "1.jfif" else {}))
    text(root / "instances.json", moved_coco(names))


# ---------------------------------------------------------------------------------------------------------- label maps


@case(
    MAPS,
    "`A/` with `B/`, `x/` with `y/`: folders of any names, some of images and some of maps",
    "read, by what the files hold",
    classes=("instance",),
    parts=(3, 2),
)
def any_names(root: Path) -> None:
    for part, first, count in (("train", 0, 3), ("test", 3, 2)):
        for number in range(count):
            write(root / part / f"A/{number}.png", pixels(first + number, first + number))
            write(root / part / f"B/{number}.png", instance_map(at=first + number))


@case(MAPS, "`images/img_0001.png` with `masks/mask_1.png`", "read", classes=("instance",))
def numbered_otherwise(root: Path) -> None:
    for at in range(COUNT):
        write(root / f"images/img_{at:04d}.png", pixels(at, at))
        write(root / f"masks/mask_{at}.png", instance_map(at=at))


@case(
    MAPS,
    "NuInsSeg: `tissue images/`, `label masks/`, and folders of what was made of them",
    "read, and told which folders were taken",
    classes=("instance",),
    told=("'label masks' taken", "'tissue images' taken"),
)
def nuinsseg(root: Path) -> None:
    for at in range(COUNT):
        labels = instance_map(at=at)
        write(root / f"human liver/tissue images/{at}.png", pixels(at, at))
        write(root / f"human liver/label masks/{at}.tif", labels)
        write(root / f"human liver/mask binary/{at}.png", (labels > 0).astype(np.uint8) * 255)
        write(root / f"human liver/overlay/{at}.png", 255 - pixels(at, at))


@case(MAPS, "`masks/0.npz`, each with one array", "read", classes=("instance",))
def archives_of_numpy(root: Path) -> None:
    moved(root / "images")
    (root / "masks").mkdir()
    for at in range(COUNT):
        np.savez_compressed(root / f"masks/{at}.npz", instance_map(np.int64, at))


def see_through(at: int, only: int | None = None) -> np.ndarray:
    labels = instance_map(at=at)
    alpha = (labels > 0 if only is None else labels == only) * np.uint8(255)
    return np.dstack([np.full((HEIGHT, WIDTH, 3), 255, np.uint8), alpha])


@case(
    MAPS,
    "maps that are transparent where nothing is, with `--semantic components`",
    "read: the alpha channel is the map",
    options={"semantic": "components"},
    classes=("instance",),
)
def transparent(root: Path) -> None:
    moved(root / "images")
    for at in range(COUNT):
        write(root / f"masks/{at}.png", see_through(at))


@case(MAPS, "the same, a file for each instance", "read", classes=("instance",))
def transparent_each(root: Path) -> None:
    moved(root / "images")
    for at in range(COUNT):
        for only in (1, 2):
            write(root / f"masks/{at}_{only}.png", see_through(at, only))


@case(
    MAPS,
    "maps that were resized smoothly",
    "refused: at the edges there are values that nobody drew",
    refused="values that somebody drew.*\n.*were resized smoothly",
)
def resized(root: Path) -> None:
    images(root / "images")
    for at in range(COUNT):
        small = Image.fromarray(instance_map() * 90)
        large = small.resize((2 * WIDTH, 2 * HEIGHT), Image.Resampling.BILINEAR)
        write(root / f"masks/{at}.png", np.asarray(large.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)))


@case(
    MAPS,
    "a TIFF with a page for each instance",
    "refused",
    refused=f"one whole number for each pixel.*\n.*{HEIGHT} x {WIDTH} x 2",
)
def pages(root: Path) -> None:
    images(root / "images")
    for at in range(COUNT):
        both = np.stack([instance_map() == 1, instance_map() == 2]).astype(np.uint8) * 255
        write(root / f"masks/{at}.tif", both, photometric="minisblack")


@case(
    MAPS,
    "Roboflow's semantic masks: `x_mask.png` beside `x.jpg`, `_classes.csv`, with `--semantic components`",
    "read, with the names of the classes",
    options={"semantic": "components"},
    classes=("nut", "bolt"),
    parts=(3, 2),
)
def roboflow_semantic(root: Path) -> None:
    for part, numbers in (("train", range(3)), ("valid", range(3, 5))):
        for at in numbers:
            write(root / part / f"{at}.jpg", pixels(at, at), quality=95)
            write(root / part / f"{at}_mask.png", instance_map(at=at))
        text(root / part / "_classes.csv", "Pixel Value, Class\r\n0, background\r\n1, nut\r\n2, bolt\r\n")


@case(
    MAPS,
    "two sequences of the Cell Tracking Challenge, with frames of the same names and tracks beside them",
    "read",
    classes=("instance",),
)
def two_sequences(root: Path) -> None:
    for sequence, first, count in (("01", 0, 3), ("02", 3, 2)):
        for number in range(count):
            write(root / f"{sequence}/t{number:03d}.tif", pixels(first + number, first + number)[..., 0])
            labels = instance_map(np.uint16, first + number)
            write(root / f"{sequence}_GT/SEG/man_seg{number:03d}.tif", labels)
            write(root / f"{sequence}_GT/TRA/man_track{number:03d}.tif", 7 * labels)


@case(
    MAPS,
    "an archive that was not unpacked; HDF5, `.npz` of a whole data set, volumes, slides",
    "refused, with what to do",
    refused="none was found.*1 of .zip.*\n.*unpack it first",
)
def archive(root: Path) -> None:
    text(root / "data.zip", "PK")


@case(
    MAPS,
    "Kaggle's CSV of run lengths",
    "refused: some go by columns, some by rows",
    refused="run lengths may go by rows or by columns",
)
def kaggle(root: Path) -> None:
    images(root / "train")
    text(root / "train.csv", "ImageId,EncodedPixels\n0.png,12 3 40 3\n")


# --------------------------------------------------------------------------------------------------------------- tools


def studio(at: int, number: int) -> dict[str, Any]:
    percent = [[100 * x / WIDTH, 100 * y / HEIGHT] for x, y in points(number, at)]
    return {"id": f"r{number}", "type": "polygonlabels", "value": {"points": percent, "polygonlabels": ["nut"]}}


def tasks(root: Path, results: Any, **data: str) -> None:
    moved(root / "images")
    text(
        root / "export.json",
        [
            {"id": at, "data": {**data, "picture": f"s3://b/images/{at}.png"}, "annotations": [{"result": results(at)}]}
            for at in range(COUNT)
        ],
    )


@case(
    TOOLS,
    "Label Studio with a control for shapes and one for labels, and an image under any key",
    "read: a shape and its label have one id",
)
def studio_apart(root: Path) -> None:
    def results(at: int) -> list[Any]:
        found = []
        for number in range(2):
            value = studio(at, number)["value"]
            bare = {"id": f"r{number}", "type": "polygon", "value": {"points": value["points"]}}
            found += [bare, {**bare, "type": "labels", "value": {**bare["value"], "labels": ["nut"]}}]
        return found

    tasks(root, results, note="any text")


@case(
    TOOLS,
    "Label Studio: drawn while the image was turned",
    "read as it is written, and told as suspicious",
    told=("while the image was turned: are they in place",),
)
def studio_turned(root: Path) -> None:
    tasks(root, lambda at: [{**studio(at, number), "image_rotation": 90} for number in range(2)])


def labelme(root: Path, shapes: Any, **more: Any) -> None:
    for at in range(COUNT):
        text(
            root / f"{at}.json",
            {"shapes": shapes(at), "imagePath": f"{at}.png", "imageHeight": HEIGHT, "imageWidth": WIDTH, **more},
        )


def shape(at: int, number: int, kind: str = "polygon") -> dict[str, Any]:
    return {"label": "nut", "points": points(number, at), "shape_type": kind}


@case(
    TOOLS,
    "X-AnyLabeling's rotated boxes; boxes around an instance, from which its mask was made",
    "rotated boxes become regions; boxes around an instance are left out",
    objects=1,
    regions=COUNT,
    told=("boxes around an instance of their class left out: 5",),
)
def anylabeling(root: Path) -> None:
    moved(root)
    labelme(
        root,
        lambda at: [
            {**shape(at, 0, "rectangle"), "points": points(0, at)[::2]},
            shape(at, 0),
            shape(at, 1, "rotation"),
        ],
    )


@case(TOOLS, "VIA 3", "read: polygons, circles, ellipses; rectangles become regions")
def via_three(root: Path) -> None:
    moved(root)
    metadata = {
        f"{at}{number}": {"vid": str(at), "xy": [7, *corners(number, at)], "av": {"1": "0"}}
        for at in range(COUNT)
        for number in range(2)
    }
    text(
        root / "via_project.json",
        {
            "project": {},
            "config": {},
            "attribute": {"1": {"aname": "kind", "options": {"0": "nut"}}},
            "file": {str(at): {"fid": at, "fname": f"{at}.png"} for at in range(COUNT)},
            "view": {str(at): {"fid_list": [str(at)]} for at in range(COUNT)},
            "metadata": metadata,
        },
    )


@case(
    TOOLS,
    "VIA with attributes of which none is the class",
    "read as one class, and told as suspicious",
    classes=("object",),
    told=(r"attributes \(id, size\) name no class",),
)
def via_attributes(root: Path) -> None:
    moved(root)
    regions = {
        at: [
            {
                "shape_attributes": {
                    "name": "polygon",
                    "all_points_x": corners(number, at)[::2],
                    "all_points_y": corners(number, at)[1::2],
                },
                "region_attributes": {"id": str(number), "size": "7"},
            }
            for number in range(2)
        ]
        for at in range(COUNT)
    }
    text(root / "via.json", {f"{at}.png9": {"filename": f"{at}.png", "regions": regions[at]} for at in range(COUNT)})


@case(TOOLS, "Supervisely's alpha masks", "read")
def alpha_masks(root: Path) -> None:
    for at in range(COUNT):
        objects = []
        for number in range(2):
            left, top, width, height = box(number, at)
            buffer = io.BytesIO()
            Image.fromarray(np.full((height, width, 4), 255, np.uint8)).save(buffer, "PNG")
            data = base64.b64encode(zlib.compress(buffer.getvalue())).decode()
            objects.append(
                {"classTitle": "nut", "geometryType": "alpha_mask", "bitmap": {"data": data, "origin": [left, top]}}
            )
        write(root / f"ds/img/{at}.png", pixels(at, at))
        text(root / f"ds/ann/{at}.png.json", {"objects": objects, "size": {"height": HEIGHT, "width": WIDTH}})


def yolo(root: Path, after: str = "", boxes: bool = False) -> None:
    """Images of the same names in both parts, whose labels do not fit the other."""
    for part, first, count in (("train", 0, 3), ("val", 3, 2)):
        for number in range(count):
            lines = []
            for each in range(2):
                left, top, width, height = box(each, first + number)
                flat = [left + width / 2, top + height / 2, width, height] if boxes else corners(each, first + number)
                lines.append(
                    "0 "
                    + " ".join(f"{side / (WIDTH, HEIGHT)[place % 2]:.6f}" for place, side in enumerate(flat))
                    + after
                )
            write(root / f"images/{part}/{number}.png", pixels(first + number, first + number))
            text(root / f"labels/{part}/{number}.txt", "\n".join(lines))


@case(
    TOOLS,
    "YOLO: lists of images, `train.txt` and `val.txt`, with files of the same name in both parts",
    "read",
    parts=(3, 2),
)
def yolo_lists(root: Path) -> None:
    yolo(root)
    for part, count in (("train", 3), ("val", 2)):
        text(root / f"{part}.txt", "".join(f"C:\\data\\images\\{part}\\{number}.png\r\n" for number in range(count)))
    text(root / "data.yaml", "train: train.txt\nval: val.txt\nnames: {0: nut}\n")


@case(
    TOOLS,
    "YOLO: a YAML file of folders that are nested otherwise",
    "read: the folders are taken as they are called",
    parts=(3, 2),
)
def yolo_nested(root: Path) -> None:
    yolo(root)
    text(root / "data.yaml", "train: ../train/images\nval: ../valid/images\nnames: [nut]\n")


@case(TOOLS, "YOLO with keypoints behind the boxes", "refused: there are no masks", refused="10 have a box only")
def yolo_pose(root: Path) -> None:
    yolo(root, " 0.5 0.5 2 0.25 0.5 1", boxes=True)


@case(TOOLS, "Darwin of V7, both versions", "read: polygons; boxes become regions")
def darwin(root: Path) -> None:
    moved(root / "images")
    for at in range(COUNT):
        paths = [[{"x": x, "y": y} for x, y in points(number, at)] for number in range(2)]
        slot = {"width": WIDTH, "height": HEIGHT}
        head = {"item": {"name": f"{at}.png", "slots": [slot]}} if at else {"image": {"filename": "0.png", **slot}}
        objects = [{"name": "nut", "polygon": {"paths": [path]} if at else {"path": path}} for path in paths]
        text(root / f"releases/latest/annotations/{at}.json", {**head, "annotations": objects})


@case(
    TOOLS,
    "SuperAnnotate: `x.png___objects.json` or `x.png.json`",
    "read: polygons with holes, ellipses; boxes become regions",
)
def superannotate(root: Path) -> None:
    moved(root)
    for at in range(COUNT):
        instances = [
            {"type": "polygon", "className": "nut", "points": corners(number, at), "exclude": []} for number in range(2)
        ]
        text(
            root / f"{at}.png___objects.json",
            {"metadata": {"name": f"{at}.png", "height": HEIGHT, "width": WIDTH}, "instances": instances},
        )
    text(root / "classes/classes.json", [{"id": 1, "name": "nut"}])


@case(TOOLS, "Hasty's JSON", "read: polygons; boxes become regions")
def hasty(root: Path) -> None:
    moved(root / "images")
    listed = [
        {
            "image_name": f"{at}.png",
            "height": HEIGHT,
            "width": WIDTH,
            "labels": [{"class_name": "nut", "polygon": points(number, at)} for number in range(2)],
        }
        for at in range(COUNT)
    ]
    text(root / "project.json", {"label_classes": [], "images": listed})


@case(TOOLS, "Datumaro", "read: polygons, groups of them, masks; boxes become regions", parts=(3, 2))
def datumaro(root: Path) -> None:
    for part, first, count in (("train", 0, 3), ("val", 3, 2)):
        moved(root / "images" / part, NAMES[:count], first)
        items = [
            {
                "id": str(number),
                "image": {"path": f"{number}.png", "size": [HEIGHT, WIDTH]},
                "annotations": [
                    {"type": "polygon", "label_id": 0, "group": 0, "points": corners(each, first + number)}
                    for each in range(2)
                ],
            }
            for number in range(count)
        ]
        text(
            root / f"annotations/{part}.json", {"categories": {"label": {"labels": [{"name": "nut"}]}}, "items": items}
        )


@case(TOOLS, "ISAT: `x.json` beside `x.jpg`", "read")
def isat(root: Path) -> None:
    moved(root)
    for at in range(COUNT):
        objects = [{"category": "nut", "group": number + 1, "segmentation": points(number, at)} for number in range(2)]
        text(
            root / f"{at}.json",
            {
                "info": {"description": "ISAT", "name": f"{at}.png", "width": WIDTH, "height": HEIGHT},
                "objects": objects,
            },
        )


@case(
    TOOLS,
    "FiftyOne's own data set: `samples.json` and `data/`",
    "read: masks of detections, polylines; boxes become regions",
)
def fiftyone(root: Path) -> None:
    def detection(at: int, number: int) -> dict[str, Any]:
        left, top, width, height = box(number, at)
        buffer = io.BytesIO()
        np.save(buffer, np.ones((height, width), dtype=bool))
        mask = base64.b64encode(zlib.compress(buffer.getvalue())).decode()
        return {
            "label": "nut",
            "bounding_box": [left / WIDTH, top / HEIGHT, width / WIDTH, height / HEIGHT],
            "mask": {"$binary": {"base64": mask}},
        }

    moved(root / "data")
    samples = [
        {
            "filepath": f"data/{at}.png",
            "ground_truth": {"_cls": "Detections", "detections": [detection(at, number) for number in range(2)]},
        }
        for at in range(COUNT)
    ]
    text(root / "samples.json", {"samples": samples})


@case(
    TOOLS,
    "ImageScope, MoNuSeg, MoNuSAC: `Tissue Images/x.tif` and `Annotations/x.xml`",
    "read: regions as polygons; negative regions weigh nothing",
    regions=1,
)
def imagescope(root: Path) -> None:
    for at in range(COUNT):
        regions = [
            "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in points(number, at)).join(
                ("<Region NegativeROA='0'><Vertices>", "</Vertices></Region>")
            )
            for number in range(2)
        ]
        hole = "<Region NegativeROA='1'><Vertices><Vertex X='0' Y='0'/><Vertex X='3' Y='0'/><Vertex X='0' Y='3'/>"
        regions += [f"{hole}</Vertices></Region>"] if at == 0 else []
        layer = f"<Annotation><Attributes><Attribute Name='nut'/></Attributes><Regions>{''.join(regions)}</Regions>"
        write(root / f"Tissue Images/{at}.tif", pixels(at, at))
        text(root / f"Annotations/{at}.xml", f"<?xml version='1.0'?><Annotations>{layer}</Annotation></Annotations>")


@case(
    TOOLS,
    "labelme's old labels, `nut-1`, `nut-2`, which number the instances of an image",
    "read as they are, and told as suspicious",
    classes=("nut-1", "nut-2"),
    told=("numbered anew in each image: are they instances of one class.: 2",),
)
def numbered_labels(root: Path) -> None:
    moved(root)
    labelme(root, lambda at: [{**shape(at, number), "label": f"nut-{number + 1}"} for number in range(2)])


@case(
    JSON,
    "images that were enlarged after they were annotated, without their sizes in the annotations",
    "read as they are, and told as suspicious",
    told=("all polygons lie in the top left quarter of their images",),
    aligned=False,
)
def enlarged(root: Path) -> None:
    content = moved_coco()
    for at, image in enumerate(content["images"]):
        del image["height"], image["width"]
        write(root / f"{at}.png", np.kron(pixels(at, at), np.ones((2, 2, 1), np.uint8)))
    text(root / "instances.json", content)


@case(TOOLS, "PASCAL VOC's XML", "refused: it holds boxes", refused="PASCAL VOC's holds boxes")
def voc_boxes(root: Path) -> None:
    images(root / "JPEGImages")
    for at in range(COUNT):
        box = "<object><name>nut</name><bndbox><xmin>1</xmin></bndbox></object>"
        text(root / f"Annotations/{at}.xml", f"<annotation><filename>{at}.png</filename>{box}</annotation>")
