"""One file a format: each recognizes what lies in a folder and yields it; nothing behind the catalog knows formats."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from maskloss.lab.data.catalog import Part
from maskloss.lab.data.options import DataOptions
from maskloss.lab.data.problems import Problems
from maskloss.lab.data.readers import (
    ade20k,
    cityscapes,
    coco,
    ctc,
    cvat,
    dsb,
    imagej,
    imagescope,
    labelme,
    labelstudio,
    objects,
    pairs,
    panoptic,
    services,
    supervisely,
    via,
    voc,
    yolo,
)  # fmt: skip
from maskloss.lab.data.tree import Tree


class Reader(NamedTuple):
    """A format."""

    name: str  # for `--format`
    # returns the parts of a data set; None: the folder holds none of this format
    find: Callable[[Tree, DataOptions, Problems], list[Part] | None]
    lies: str  # what lies in the folder
    microscopy: bool = False  # whether these are label maps, which microscopy scores in its own way


# In the order in which they are tried: those that cannot be mistaken for another come first.
READERS = (
    Reader("coco", coco.find, "COCO instances: any JSON file with images, annotations and categories"),
    Reader("panoptic", panoptic.find, "COCO panoptic: panoptic_*.json and its folder of PNG files"),
    Reader("labelstudio", labelstudio.LABEL_STUDIO.find, "Label Studio's JSON: tasks with polygons or brush masks"),
    Reader("via", via.VIA.find, "VIA: via_region_data.json, or a project"),
    Reader("supervisely", supervisely.SUPERVISELY.find, "Supervisely: img/ and ann/, a JSON file for each image"),
    Reader("labelme", labelme.LABELME.find, "labelme: x.json beside x.jpg, or with the image in it"),
    Reader("cvat", cvat.CVAT.find, "CVAT for images: annotations.xml"),
    Reader(
        "imagescope", imagescope.IMAGESCOPE.find, "ImageScope (MoNuSeg), LabelMe: an XML file of regions for each image"
    ),
    Reader("datumaro", objects.DATUMARO.find, "Datumaro: annotations/*.json with items"),
    Reader("darwin", objects.DARWIN.find, "V7's Darwin: a JSON file for each image"),
    Reader("superannotate", objects.SUPERANNOTATE.find, "SuperAnnotate: a JSON file for each image"),
    Reader("hasty", objects.HASTY.find, "Hasty: a JSON file with images and their labels"),
    Reader("isat", objects.ISAT.find, "ISAT: x.json beside x.jpg"),
    Reader("segmentanything", objects.SEGMENT_ANYTHING.find, "Segment Anything (SA-1B): a JSON file for each image"),
    Reader("fiftyone", objects.FIFTYONE.find, "FiftyOne: samples.json and data/"),
    Reader("geojson", objects.GEOJSON.find, "QuPath: a GeoJSON file for each image"),
    Reader("scalabel", services.SCALABEL.find, "Scalabel (BDD100K): a JSON file of frames with labels"),
    Reader("labelbox", services.LABELBOX.find, "Labelbox: export.ndjson with polygons"),
    Reader("encord", services.ENCORD.find, "Encord: a JSON file of label rows"),
    Reader("scale", services.SCALE.find, "Scale: a JSON file of tasks"),
    Reader("kili", services.KILI.find, "Kili: a JSON file of assets"),
    Reader("dataloop", services.DATALOOP.find, "Dataloop: a JSON file for each image"),
    Reader("voc", voc.find, "PASCAL VOC: SegmentationObject/ and SegmentationClass/"),
    Reader("cityscapes", cityscapes.find, "Cityscapes: *_leftImg8bit.png and *_instanceIds.png"),
    Reader("ade20k", ade20k.find, "ADE20K: ADE_*_seg.png, or annotations_instance/"),
    Reader("yolo", yolo.find, "YOLO: images/ and labels/ with a text file for each image; data.yaml"),
    Reader("ctc", ctc.find, "Cell Tracking Challenge: 01/ and 01_GT/SEG/man_seg*.tif", microscopy=True),
    Reader("dsb", dsb.find, "Data Science Bowl 2018: a folder for each image, with masks/", microscopy=True),
    Reader("labels", pairs.find, "label maps: images/ and masks/, or x.tif and x_masks.tif", microscopy=True),
    Reader("imagej", imagej.IMAGEJ.find, "ImageJ: x_rois.zip beside x.tif"),
)
FORMATS = tuple(reader.name for reader in READERS)
