"""What is measured: the presets, and the families in which one size grows."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Protocol

from maskloss.errors import Cause, reported
from maskloss.points import PointSampling

Size = tuple[int, int]
# What others do. It is measured with both of OpenMP's ways of waiting; the better one is quoted.
PEERS = ("transformers", "rfdetr", "dense")
# Arms with stratified points: the criterion, matcher included, takes the case's number of points divided by this.
STRATIFIED = {"stratified": 1, "stratified/4": 4}


class Subject(Protocol):
    """What is measured: a step of the loss (`Case`) or of a whole model (`ModelCase`)."""

    worker: ClassVar[str]  # module that a measuring process runs
    base: ClassVar[str]  # arm that the others are compared with before anything is timed

    @property
    def name(self) -> str:
        """How the command and the tables call it."""

    def arms(self, asked: tuple[str, ...]) -> tuple[str, ...]:
        """Return the arms to measure, given those asked for."""

    def working_set(self, arm: str, item_size: int) -> int:
        """Estimate the bytes that the process of an arm needs, for logits of `item_size` bytes."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, which JSON keeps and the worker reads."""


@dataclass(frozen=True)
class Case:
    """The sizes of one step."""

    worker: ClassVar[str] = "maskloss.lab.bench.worker"
    base: ClassVar[str] = "maskloss"

    name: str  # how tables call it
    batch: int  # B, images
    queries: int  # Q, predictions per image
    targets: int  # T, targets per image
    layers: int  # L, decoder layers
    classes: int  # C, without "no object"
    logit_size: Size  # height and width of the predictions
    target_size: Size  # height and width of the targets
    points: int = PointSampling.num_points  # P, points per instance
    # smallest and largest size of an instance: the square root of its area, as a share of the image's
    extent: tuple[float, float] = (0.03, 0.5)
    # D of the mask head, whose product is then a part of the step; 0: the step begins with the logits
    channels: int = 0
    # G, groups of Q / G queries that are matched each on their own. With more than one the step is that of
    # RF-DETR: sigmoids of C classes, boxes, the encoder's proposals as the first layer, border padding and
    # features of its own in every layer where there is a head.
    groups: int = 1
    frames: int = 1  # of a clip, or slices of a volume, of predictions and targets
    unit: str = ""  # "frame" for clips, "volume" for volumes (see `ClipOptions`); "" for images

    @property
    def logit_shape(self) -> tuple[int, ...]:
        """The sizes of a prediction: `(h, w)`, with frames or slices before them where there are any."""
        return (self.frames, *self.logit_size) if self.unit else self.logit_size

    @property
    def target_shape(self) -> tuple[int, ...]:
        """The sizes of a target."""
        return (self.frames, *self.target_size) if self.unit else self.target_size

    @property
    def instances(self) -> int:
        """Matched pairs of a prediction and a target, over all images, layers and groups."""
        return self.batch * self.layers * self.groups * min(self.targets, self.queries // self.groups)

    @property
    def logit_count(self) -> int:
        """Mask logits of all layers: also the number of entries of their gradient."""
        return self.layers * self.batch * self.queries * math.prod(self.logit_shape)

    @property
    def target_count(self) -> int:
        """Target pixels of all images, as dense masks have them."""
        return self.batch * self.targets * math.prod(self.target_shape)

    def arms(self, asked: tuple[str, ...]) -> tuple[str, ...]:
        """Leave out what does not have this step: masks as factors without a head, and the others' other steps."""
        missing = {"factors"} if not self.channels else set()
        missing |= {"rfdetr"} if self.groups == 1 else set()
        missing |= {"transformers"} if self.unit else {"dense"}
        return tuple(arm for arm in asked if arm not in missing)

    def working_set(self, arm: str, item_size: int) -> int:
        """Count logits and their gradient, and the targets: bytes if bool, several float copies for Transformers."""
        return 2 * item_size * self.logit_count + self.target_count * (17 if arm in PEERS else 1)

    def least_bytes(self, item_size: int) -> int:
        """Count what every algorithm must move: logits, or factors of them, read once, and their gradient written."""
        entries = self.logit_count
        if self.channels:
            features = self.batch * self.channels * math.prod(self.logit_size)
            embeddings = self.layers * self.batch * self.queries * self.channels
            entries = embeddings + features * (self.layers if self.groups > 1 else 1)
        return 2 * item_size * entries

    def describe(self) -> str:
        """Write the sizes in one line; of a case of a family, those that all its cases have."""
        numbers = {
            "batch": f"B={self.batch}",
            "queries": f"Q={self.queries}",
            "targets": f"T={self.targets}",
            "layers": f"L={self.layers}",
            "classes": f"C={self.classes}",
            "points": f"P={self.points}",
        }
        sizes = {
            "logit_size": f"logits {' × '.join(map(str, self.logit_shape))}",
            "target_size": f"targets {' × '.join(map(str, self.target_shape))}",
        }
        grows = self.name.partition("=")[0].replace("-", "_") if "=" in self.name else ""
        if self.channels:
            numbers["channels"] = f"D={self.channels}"
        if self.groups > 1:
            numbers["groups"] = f"G={self.groups}"
        parts = [" ".join(text for field, text in numbers.items() if field != grows)]
        return ", ".join(parts + [text for field, text in sizes.items() if field != grows])

    def as_dict(self) -> dict[str, Any]:
        """Return the sizes as plain values."""
        return asdict(self)

    @property
    def smallest(self) -> Case:
        """The smallest preset of this kind, whose step loads and compiles all code."""
        kind = {"frame": "-clip", "volume": "-volume"}.get(self.unit, "-rf-detr" if self.groups > 1 else "")
        return PRESETS[f"tiny{kind}{'-head' if self.channels else ''}"]

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Case:
        """Invert `as_dict`, also after JSON has made lists of the pairs."""
        plain: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return Case(**plain)


PRESETS = {
    case.name: case
    for case in (
        Case("coco", 2, 100, 20, 10, 80, (256, 256), (1024, 1024)),
        Case("crowded", 1, 300, 200, 10, 80, (256, 256), (1024, 1024), extent=(0.012, 0.06)),
        Case("cityscapes", 1, 100, 30, 10, 19, (256, 512), (1024, 2048), extent=(0.01, 0.25)),
        Case("small", 8, 50, 8, 4, 80, (64, 64), (256, 256), points=3136),
        Case("tiny", 1, 8, 3, 2, 4, (16, 16), (64, 64), points=128, extent=(0.1, 0.5)),
        # RF-DETR's segmentation model of middle size: 13 groups of 200 queries, five decoder layers and the encoder's
        # proposals, 432 pixels; one point for 16 pixels of a mask, in the matching too.
        Case("rf-detr", 1, 2600, 20, 6, 91, (108, 108), (432, 432), points=729, groups=13),
        Case("tiny-rf-detr", 1, 12, 3, 3, 4, (32, 32), (64, 64), points=64, extent=(0.1, 0.5), groups=2),
        # Mask2Former for video; and a volume with as many points as OccFormer has.
        Case("clip", 1, 100, 10, 10, 40, (96, 160), (384, 640), frames=5, unit="frame"),
        Case(
            "volume",
            1,
            40,
            20,
            3,
            17,
            (128, 128),
            (128, 128),
            points=50176,
            extent=(0.05, 0.4),
            frames=64,
            unit="volume",
        ),
        Case("tiny-clip", 1, 8, 3, 2, 4, (16, 16), (64, 64), points=128, extent=(0.1, 0.5), frames=3, unit="frame"),
        Case("tiny-volume", 1, 8, 3, 2, 4, (16, 16), (16, 16), points=256, extent=(0.2, 0.5), frames=8, unit="volume"),
    )
}

# With the mask head: from embeddings and features to their gradients.
for _name in ("coco", "crowded", "cityscapes", "rf-detr"):
    PRESETS[f"{_name}-head"] = replace(PRESETS[_name], name=f"{_name}-head", channels=256)
for _name in ("tiny", "tiny-rf-detr"):
    PRESETS[f"{_name}-head"] = replace(PRESETS[_name], name=f"{_name}-head", channels=8)

# One image of `coco`; with 400 queries, so that up to 400 targets can be matched, where the targets grow in number.
_IMAGE = replace(PRESETS["coco"], batch=1)
_GROWTH: dict[str, tuple[Case, tuple[int, ...]]] = {
    "targets": (replace(_IMAGE, queries=400, extent=(0.012, 0.1)), (1, 10, 50, 100, 200, 400)),
    "target-size": (_IMAGE, (256, 512, 1024, 2048, 4096)),
    "queries": (_IMAGE, (50, 100, 200, 400)),
    "points": (_IMAGE, (1024, 3136, 12544, 50176)),
    "layers": (_IMAGE, (1, 3, 6, 10)),
}
FAMILIES = tuple(_GROWTH)


def family(name: str) -> list[Case]:
    """List the cases of a family; each is named after the family and its value, as in "targets=50"."""
    base, values = _GROWTH[name]
    field = name.replace("-", "_")
    cases = []
    for value in values:
        size: Any = (value, value) if field == "target_size" else value
        cases.append(replace(base, name=f"{name}={value}", **{field: size}))
    return cases


@reported("maskloss bench")
def choose(presets: list[str], families: list[str]) -> list[Case]:
    """Look up presets and families by name."""
    for kind, names, known in (("preset", presets, list(PRESETS)), ("family", families, list(FAMILIES))):
        for name in names:
            if name not in known:
                raise Cause(f"there must be a {kind} of that name", f"got {name!r}", f"take one of {', '.join(known)}")
    return [PRESETS[name] for name in presets] + [case for name in families for case in family(name)]
