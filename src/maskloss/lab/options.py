"""The arguments of `maskloss train`, `evaluate` and `predict`, and how they become what the commands take."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from maskloss._abi import LAYOUTS
from maskloss.lab.config import PRECISIONS, SCHEDULES, TrainConfig
from maskloss.lab.data.folder import NORMALIZE
from maskloss.lab.data.problems import ON_ERROR
from maskloss.lab.data.recognize import FORMATS


class Option(NamedTuple):
    """An option of `maskloss train`: how to read it, what stands for its value, and what it does."""

    kind: Callable[[str], Any]
    metavar: str
    text: str
    choices: tuple[str, ...] | None = None


# Names and defaults are those of TrainConfig; `augment` is turned into --no-augment.
OPTIONS: dict[str, dict[str, Option]] = {
    "data": {
        "data": Option(str, "FOLDER", "images with annotations; default: scenes of handwritten digits"),
        "format": Option(str, "FORMAT", "coco, panoptic or labels; default: recognized", FORMATS),
        "normalize": Option(
            str,
            "HOW",
            "auto, percentile or range: what is black and what is white; auto takes percentiles for label maps and for "
            "images of more than 8 bits",
            NORMALIZE,
        ),
        "on_error": Option(str, "WHAT", "stop or skip, at a broken image or annotation", ON_ERROR),
        "crop": Option(int, "PIXELS", "train on squares cut out of the images; default: whole images"),
        "size": Option(
            int,
            "PIXELS",
            "side of the square that the model sees; default: by the images, at most 256, or by the model",
        ),
        "held_out": Option(int, "N", "held-out scenes of digits"),
        "workers": Option(int, "N", "processes that read images; default: one for each core, at most 4"),
    },
    "model": {
        "model": Option(
            str, "NAME", "compact, or the name or the folder of a universal-segmentation model of Transformers"
        ),
        "grid": Option(int, "N", "the compact model has N x N queries; default: by the fullest image"),
        "norm": Option(
            str,
            "KIND",
            "batch or group, of the compact model; default: batch where a batch is not divided",
            ("batch", "group"),
        ),
    },
    "loss": {
        "num_points": Option(int, "N", "points per instance; default: 256, or what a pretrained model has"),
        "layout": Option(
            str, "LAYOUT", "of these points: independent, or stratified: as quiet with a quarter of them", LAYOUTS
        ),
        "class_weight": Option(float, "WEIGHT", "of the classification; default: 10, or what a pretrained model has"),
        "no_object_weight": Option(
            float, "WEIGHT", "of 'no object' in it; default: 0.4, or what a pretrained model has"
        ),
    },
    "training": {
        "steps": Option(int, "N", "optimizer steps"),
        "batch_size": Option(int, "N", "images of a step, over all processes and micro-batches"),
        "accumulate": Option(int, "N", "micro-batches of a step"),
        "lr": Option(float, "RATE", "highest learning rate; default: 0.003, or 0.0001 for a pretrained model"),
        "weight_decay": Option(float, "DECAY", "weight decay"),
        "clip": Option(float, "NORM", "the most that the gradient's norm may be; 0: any"),
        "schedule": Option(str, "KIND", "cosine, linear or constant", SCHEDULES),
        "warmup": Option(float, "SHARE", "share of the steps in which the learning rate rises"),
        "precision": Option(str, "KIND", "no, bf16 or fp16", PRECISIONS),
        "seed": Option(int, "N", "the same seed gives the same run, bit for bit on one machine"),
    },
    "run": {
        "checkpoint_every": Option(int, "STEPS", "steps between two checkpoints"),
        "evaluations": Option(int, "N", "evaluations during training"),
        "threads": Option(int, "N", "CPU threads; default: torch's choice"),
        "device": Option(str, "DEVICE", "cpu or cuda; default: cuda where there is a device"),
    },
}

TRAIN = "Train a query model on images with masks, score it on held-out images, and write a report."
TRAIN_EXAMPLES = """\
data:
  A folder is recognized by what lies in it:
    images/ and instances.json                       COCO instances; held out: instances_val.json
    annotations/instances_train2017.json, train2017/ COCO as it is distributed, with val2017/
    annotations/panoptic_train2017.json, ...         COCO panoptic, with its folder of PNG files
    images/ and masks/ (or labels/)                  label maps, PNG or TIFF, one number for each instance
    x.tif and x_masks.tif                            the same, side by side
  A folder val/ or test/ beside them is held out; without one, one image in five is.

examples:
  maskloss train                                         handwritten digits, two minutes on two cores
  maskloss train --data cells --crop 256                 label maps of large images
  maskloss train --data coco --model facebook/mask2former-swin-tiny-coco-instance --size 512
  torchrun --nproc-per-node 4 -m maskloss train --data coco --batch-size 64
  maskloss train --resume runs/2026-01-31_12-00-00       go on after Ctrl-C, or after a power cut
"""
EVALUATE = "Score a trained model on the held-out images of its data, or of other data with the same classes."
EVALUATE_EXAMPLES = """\
scores:
  AP is COCO's mask AP, by size as well; mean IoU is that of the pixels of each class. For label maps,
  TP / (TP + FP + FN) at IoU thresholds from 0.5 to 0.95 is the average precision of microscopy.

examples:
  maskloss evaluate runs/cells
  maskloss evaluate runs/cells --data other_cells --json scores.json
"""
PREDICT = "Find instances in images: label maps, COCO results, and the image with what was found drawn over it."
PREDICT_EXAMPLES = """\
writes, into the folder --out:
  NAME_masks.tif     a label map: 0 is background, every instance has a number
  NAME_overlay.png   the image with the instances
  predictions.json   COCO results with the category ids of the data; image_id counts the images from 1

Images that are larger than those trained on are cut into overlapping tiles, and the instances of neighboring
tiles are merged.

examples:
  maskloss predict runs/cells plate1.tif plate2.tif
  maskloss predict runs/coco photos --threshold 0.7 --out found
"""


def add_train(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `maskloss train`."""
    _describe(parser, TRAIN, TRAIN_EXAMPLES)
    parser.usage = "maskloss train [--data FOLDER] [--model NAME] [--out FOLDER] [options]"
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, (kind, metavar, text, choices) in options.items():
            default = defaults[name]
            shown = text if default is None else f"{text} (default: {default})"
            # Not given is not the same as the default: a run that is resumed has its own options.
            group.add_argument(
                f"--{name.replace('_', '-')}", type=kind, help=shown, metavar=metavar, choices=choices, dest=name
            )
        if title == "data":
            group.add_argument("--no-augment", action="store_true", help="show training images as they are")
    where = parser.add_argument_group("folder")
    where.add_argument("--out", type=Path, metavar="FOLDER", help="where to write; default: runs/<time>")
    where.add_argument("--overwrite", action="store_true", help="replace a run that is in the folder")
    where.add_argument(
        "--resume", type=Path, metavar="RUN", help="go on with an interrupted run; takes no options but --device"
    )
    where.add_argument("--tensorboard", action="store_true", help="write logs for TensorBoard into the folder as well")


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `maskloss evaluate`."""
    _describe(parser, EVALUATE, EVALUATE_EXAMPLES)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder that maskloss train wrote")
    parser.add_argument("--data", metavar="FOLDER", help="other data; default: those of the run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores to this file as well")
    _add_device(parser)


def add_predict(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `maskloss predict`."""
    _describe(parser, PREDICT, PREDICT_EXAMPLES)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder that maskloss train wrote")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="images, or folders of images")
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=Path("predictions"), help="default: predictions")
    parser.add_argument(
        "--threshold", type=float, metavar="SCORE", default=0.5, help="least score of what is shown (default: 0.5)"
    )
    parser.add_argument("--tile", type=int, metavar="PIXELS", help="side of the tiles; default: as in training")
    parser.add_argument(
        "--on-error",
        choices=ON_ERROR,
        default="stop",
        help="what to do at an image that cannot be read (default: stop)",
    )
    _add_device(parser)


def read_config(options: argparse.Namespace) -> tuple[TrainConfig, list[str]]:
    """Make a configuration of the options that were given; return their names as well."""
    names = [name for group in OPTIONS.values() for name in group]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.no_augment:
        given["augment"] = False
    return TrainConfig(**given), list(given)


def _describe(parser: argparse.ArgumentParser, text: str, examples: str) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = text, examples


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="DEVICE", help="cpu or cuda; default: cuda where there is a device")
