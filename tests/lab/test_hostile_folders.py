"""Damaged folders: whatever a file holds, the command ends in one sentence, never in another error."""

from __future__ import annotations

import base64
import contextlib
import copy
import gzip
import json
import random
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.folders import CASES
from lab.folders.of_others import fiftyone
from lab.folders.of_public import feature, region
from lab.folders.pieces import instance_map, pixels, write
from maskloss import MaskLossError
from maskloss.lab.data.folder import FolderScenes, HeldOut
from maskloss.lab.data.options import DataOptions
from maskloss.lab.data.problems import Problems
from maskloss.lab.data.readers import coco, imagej
from maskloss.lab.data.readers.matching import find_pairs
from maskloss.lab.data.readers.segmentation import number
from maskloss.lab.data.tree import Tree
from maskloss.lab.files import read_xml

WRONG = (
    None, "", [], {}, -1, 0, 1e308, float("inf"), float("nan"), "x", True, 10**30, [[]], [None], {"a": 1}, 1.5, [1, 2],
    "\0", "../..", [[1, 2], [3, 4]],
)  # fmt: skip
PIECES = (b" ", b"nan", b"-1", b'"', b"\xff", b"1e99", b":", b"\n", b"<", b"99999999999")
TEXTS = frozenset({".csv", ".json", ".txt", ".xml", ".yaml"})
NAMES = [name for name, case in CASES.items() if not case.refused and name != "broken_files"]


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value[:6]) if isinstance(value, list) else ()
    for key, each in inner:
        yield from paths(each, (*path, key))


def damaged(path: Path, drawn: random.Random) -> bytes:
    """Put a wrong value into a JSON file, or leave one out; change some bytes of any other file."""
    if path.suffix == ".json":
        content = copy.deepcopy(json.loads(path.read_bytes()))
        *way, last = drawn.choice(list(paths(content)))
        place = content
        for key in way:
            place = place[key]
        if drawn.random() < 0.25:
            del place[last]
        else:
            place[last] = drawn.choice(WRONG)
        return json.dumps(content).encode()
    content = bytearray(path.read_bytes())
    for _ in range(drawn.randint(1, 4)):
        where = drawn.randrange(len(content) + 1)
        content[where : where + drawn.randrange(2)] = drawn.choice(PIECES)
    return bytes(content)


@pytest.mark.parametrize("name", NAMES)
def test_a_sentence_or_a_data_set(tmp_path, name):
    drawn = random.Random(name)
    case, root = CASES[name], tmp_path / "data"
    case.make(root)
    options = {key: each.format(root=root) if isinstance(each, str) else each for key, each in case.options.items()}
    options.pop("on_error", None)
    files = [path for path in sorted(root.rglob("*")) if path.suffix in TEXTS]
    for _ in range(9 if files else 0):
        path = drawn.choice(files)
        before = path.read_bytes()
        path.write_bytes(damaged(path, drawn))
        on_error = drawn.choice(["stop", "skip"])
        # Any other error fails the test.
        with contextlib.suppress(MaskLossError):
            source = FolderScenes(str(root), 32, on_error=on_error, options=DataOptions(**options))
            count = len(source.found.train)
            assert source.facts and len(source.batch(0, range(count), count, 0).images) == count
            assert len(list(HeldOut(source.found.held_out, source.reading))) == len(source.held_out)
        path.write_bytes(before)


@pytest.mark.parametrize("mask", [b"", b"PK\x03\x04abc", b"\x80\x04."])
def test_a_mask_of_fiftyone_that_is_no_array(tmp_path, mask):
    fiftyone(tmp_path)
    content = json.loads((tmp_path / "samples.json").read_text())
    packed = base64.b64encode(zlib.compress(mask)).decode()
    content["samples"][0]["ground_truth"]["detections"][0]["mask"]["$binary"]["base64"] = packed
    (tmp_path / "samples.json").write_text(json.dumps(content))
    with pytest.raises(MaskLossError, match="objects must be as FiftyOne writes them"):
        FolderScenes(str(tmp_path), 32)


def test_a_broken_file_among_those_of_a_tool_costs_its_image_and_is_told(tmp_path):
    CASES["superannotate"].make(tmp_path)
    last = tmp_path / "4.png___objects.json"
    assert last.is_file()
    last.write_text("{")
    with pytest.raises(MaskLossError, match=rf"must be JSON\n.*{last.name}"):
        FolderScenes(str(tmp_path), 32)
    source = FolderScenes(str(tmp_path), 32, on_error="skip")
    assert len(source.problems.skipped) == 1
    assert "images that no file of annotations lists: 1" in "\n".join(map(str, source.findings))


def test_a_first_image_without_regions(tmp_path):
    CASES["imagescope"].make(tmp_path)
    (tmp_path / "Annotations/0.xml").write_text("<Annotations/>")
    source = FolderScenes(str(tmp_path), 32)
    assert source.found.kind == "imagescope" and source.num_training + len(source.held_out) == 5


@pytest.mark.parametrize(
    ("text", "encoding", "said"),
    [
        ('<?xml version="1.0" encoding="gb2312"?><a/>', "gb2312", "multi-byte encodings are not supported"),
        ('<?xml version="1.0" encoding="utf-16"?><!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', "utf-16", "entities"),
    ],
)
def test_xml_in_other_encodings(tmp_path, text, encoding, said):
    path = tmp_path / "0.xml"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(MaskLossError, match=said):
        read_xml(path, "a file must be XML")


def test_a_frame_of_a_video_that_is_no_number(tmp_path):
    text = '<annotations><track label="nut"><box frame="x" xtl="1" ytl="1" xbr="5" ybr="5"/></track></annotations>'
    (tmp_path / "annotations.xml").write_text(text)
    with pytest.raises(MaskLossError, match="the folder must hold images with annotations"):
        FolderScenes(str(tmp_path), 32)


def test_archives_of_regions(tmp_path, monkeypatch):
    """Words of names stay whole; what is damaged, or unpacks to too much, is no archive without these regions."""
    CASES["imagej"].make(tmp_path)
    (tmp_path / "0.png").rename(tmp_path / "thyroid_0.png")
    path = (tmp_path / "0_rois.zip").rename(tmp_path / "thyroid_0_rois.zip")
    assert len(FolderScenes(str(tmp_path), 32).found.train) == 4
    monkeypatch.setattr(imagej, "_MOST_BYTES", 100)
    with pytest.raises(MaskLossError, match=r"thyroid_0_rois\.zip unpacks to more than 100 bytes"):
        FolderScenes(str(tmp_path), 32, options=DataOptions(annotations=path.name))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.roi", region(0, 0))
    content = path.read_bytes()
    start = content.index(b"0.roi") + len(b"0.roi")
    path.write_bytes(content[:start] + b"\xff" * 6 + content[start + 6 :])
    with pytest.raises(MaskLossError, match=r"thyroid_0_rois\.zip: Error -3 while decompressing"):
        FolderScenes(str(tmp_path), 32, options=DataOptions(annotations=path.name))


def test_voc_with_images_in_two_parts_and_without_objects(tmp_path):
    CASES["voc"].make(tmp_path)
    for part, stems in (("train", "0\n1\n2"), ("val", "3\n4"), ("test", "3\n4")):
        path = tmp_path / f"ImageSets/Segmentation/{part}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(stems)
    (tmp_path / "Annotations").mkdir(exist_ok=True)
    (tmp_path / "Annotations/0.xml").write_text("<annotation><size><width>56</width></size></annotation>")
    source = FolderScenes(str(tmp_path), 32)
    assert (source.found.kind, len(source.found.train), len(source.held_out)) == ("voc", 3, 2)


def test_what_nobody_annotated_is_left_out_and_of_several_annotations_one_is_taken(tmp_path):
    CASES["labelbox"].make(tmp_path)
    path = tmp_path / "export.ndjson"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["projects"]["p"]["labels"] = []
    rows[1]["projects"]["p"]["labels"] *= 2
    path.write_text("\n".join(map(json.dumps, rows)))
    source = FolderScenes(str(tmp_path), 32)
    parts = source.found.train, source.found.held_out
    assert sorted(len(part[place].objects) for part in parts for place in range(len(part))) == [2] * 4
    told = "\n".join(map(str, source.findings))
    assert "images that nobody annotated: 1" in told and "several annotations, the last taken: 1" in told


def test_open_lines_enclose_nothing(tmp_path):
    CASES["scalabel"].make(tmp_path)
    path = tmp_path / "labels.json"
    content = json.loads(path.read_text())
    for frame in content:
        frame["labels"][0]["poly2d"][0]["closed"] = False
    path.write_text(json.dumps(content))
    source = FolderScenes(str(tmp_path), 32)
    assert len(source.found.train[0].objects) == 1
    assert "shapes that enclose nothing (open lines): 5" in "\n".join(map(str, source.findings))


def test_geojson_in_degrees_without_a_reference_system(tmp_path):
    CASES["of_the_earth"].make(tmp_path)
    for at in range(5):
        one = feature(1, at)
        one["geometry"]["coordinates"] = [[[x / 1000, y / 1000] for x, y in one["geometry"]["coordinates"][0]]]
        (tmp_path / f"{at}.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [one]}))
    with pytest.raises(MaskLossError, match="GeoJSON must be in pixels"):
        FolderScenes(str(tmp_path), 32)


def test_text_of_other_forms(tmp_path):
    """A compressed file of a tool, names in another encoding, a number beyond all bounds."""
    CASES["label_studio_tasks"].make(tmp_path / "tasks")
    for path in (tmp_path / "tasks").rglob("*.json"):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert FolderScenes(str(tmp_path / "tasks"), 32).found.kind == "labelstudio"
    CASES["yolo_once"].make(tmp_path / "yolo")
    (tmp_path / "yolo/data.yaml").write_bytes("train: images/train\nnames: [螺母]\n".encode("gbk"))
    with pytest.raises(MaskLossError, match=r"data\.yaml: it is not text in UTF-8"):
        FolderScenes(str(tmp_path / "yolo"), 32)
    assert number(10**400) is None and number("1e400") is None and number("2") == 2.0


def test_files_that_are_not_the_data_do_not_stay_in_memory(tmp_path):
    for at in range(9):
        (tmp_path / f"{at}.json").write_text("[]")
    tree = Tree(tmp_path)
    assert coco.find(tree, DataOptions(), Problems()) is None
    assert len(tree._read) == 6


@pytest.mark.parametrize("name", ["cvat/annotations.xml", "yolo_once/data.yaml", "imagej/s1/RoiSet.zip"])
def test_files_of_annotations_that_are_no_json_can_be_named(tmp_path, name):
    case, _, annotations = name.partition("/")
    CASES[case].make(tmp_path)
    source = FolderScenes(str(tmp_path), 32, on_error="look", options=DataOptions(annotations=annotations))
    assert source.found.kind == case.partition("_")[0]


@pytest.mark.parametrize(("case", "name"), [("encord", "labels.json"), ("scale", "tasks.json")])
def test_images_that_a_service_has_not_finished_are_left_out(tmp_path, case, name):
    CASES[case].make(tmp_path)
    content = json.loads((tmp_path / name).read_text())
    if case == "encord":
        content[0]["data_units"]["a"]["labels"] = {}
    else:
        del content[0]["response"]
    (tmp_path / name).write_text(json.dumps(content))
    source = FolderScenes(str(tmp_path), 32)
    assert len(source.found.train) + len(source.held_out) == 4
    assert "images that nobody annotated: 1" in "\n".join(map(str, source.findings))


def test_a_file_of_all_images_is_found_among_many_of_one_each(tmp_path):
    CASES["cvat"].make(tmp_path)
    (tmp_path / "Annotations").mkdir()
    for at in range(5):
        box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox>"
        text = f"<annotation><object><name>nut</name>{box}</object></annotation>"
        (tmp_path / f"Annotations/{at}.xml").write_text(text)
    assert FolderScenes(str(tmp_path), 32).found.kind == "cvat"


@pytest.mark.parametrize("names", ["a zz b x", "train_a train_z val_a val_x", "a/1 a/2 b/3 b/1"])
def test_folders_of_files_of_the_same_names_are_paired_by_more_than_their_order(tmp_path, names):
    """Folders of images and of maps, in turn, which nothing but their own names could tell."""
    folders = names.split()
    for at in range(3):
        for place, folder in enumerate(folders):
            moved = 3 * (place // 2)
            write(tmp_path / folder / f"{at}.png", instance_map(at=moved) if place % 2 else pixels(at, moved))
    if names == "a zz b x":
        with pytest.raises(MaskLossError, match="none was found"):
            FolderScenes(str(tmp_path), 32)
        return
    pairs = find_pairs(Tree(tmp_path), Problems())
    order = dict(zip(folders[::2], folders[1::2], strict=True))
    assert len(pairs) == 6
    assert all(pair.map == f"{order[pair.image[:-6]]}/{pair.image[-5:]}" for pair in pairs)


@pytest.mark.parametrize("field", ["ground_truth", "mine"])
def test_fields_of_predictions_beside_those_of_annotations(tmp_path, field):
    fiftyone(tmp_path)
    content = json.loads((tmp_path / "samples.json").read_text())
    for sample in content["samples"]:
        sample["predictions"] = copy.deepcopy(sample["ground_truth"])
        sample[field] = sample.pop("ground_truth")
    content["samples"][0][field]["detections"] = []
    (tmp_path / "samples.json").write_text(json.dumps(content))
    source = FolderScenes(str(tmp_path), 32)
    told, usual = "\n".join(map(str, source.findings)), field == "ground_truth"
    parts = source.found.train, source.found.held_out
    counts = sorted(len(part[place].objects) for part in parts for place in range(len(part)))
    assert counts == ([0, 2, 2, 2, 2] if usual else [2, 4, 4, 4, 4])
    assert ("several fields of objects, ground_truth taken: 5" in told) is usual
    assert ("joined (predictions, mine): are predictions among them?: 4" in told) is not usual


def test_copies_of_the_images_of_supervisely(tmp_path):
    CASES["supervisely"].make(tmp_path)
    images = [path for path in tmp_path.rglob("*") if path.parent.name == "img"]
    for path in images:
        (path.parent.parent / "preview").mkdir(exist_ok=True)
        (path.parent.parent / "preview" / path.name).write_bytes(path.read_bytes())
    source = FolderScenes(str(tmp_path), 32)
    files = [*source.found.train.files, *source.found.held_out.files]
    assert files and {Path(file).parent.name for file in files} == {"img"}
