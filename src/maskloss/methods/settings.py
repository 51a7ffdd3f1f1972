"""What the text on the method has to know: the settings of a loss and of a training run, in one form."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import nn

from maskloss import __version__
from maskloss.clips import ClipOptions
from maskloss.criterion import MaskCriterion
from maskloss.errors import Cause, reported
from maskloss.loss import MaskLoss
from maskloss.matcher import HungarianMatcher
from maskloss.options import MaskOptions
from maskloss.points import PointSampling

# Options of the constructors that a paragraph leaves out: every backend and every solver computes the same, and what
# is unknown or empty belongs to the data.
NOT_DESCRIBED = frozenset({"assignment", "backend", "ignore_label", "drop_empty"})
_DEFAULT_TERM = MaskOptions()


@dataclass(frozen=True)
class Points:
    """How many points there are, and how they are chosen."""

    count: int | None  # P; None where it follows from the size of the predicted masks
    area: int | None = None  # P is one point for this many pixels of a predicted mask; None where `count` is given
    oversample_ratio: float = PointSampling.oversample_ratio  # candidates per point
    importance_ratio: float = PointSampling.importance_ratio  # share of uncertain points
    layout: str = "independent"  # "independent", or "stratified": one point in each of as many cells of equal area


@dataclass(frozen=True)
class Classification:
    """The classification beside the masks."""

    # "softmax", "focal" (sigmoids), or "quality": sigmoids whose target is the quality of the box
    kind: str = "softmax"
    weight: float = 2.0  # in the total
    no_object_weight: float = 0.1  # of "no object" in a softmax
    num_classes: int | None = None  # C; None where it is not known
    class_weights: tuple[float, ...] | None = None  # of the single classes; None: all 1
    normalized: str = "devices"  # over all "devices", or on each "device" alone
    focal_alpha: float = 0.25  # of the focal loss, or the share of the score in the quality


@dataclass(frozen=True)
class Matching:
    """The cost of the matching: weights, points and how masks are read."""

    class_weight: float  # weight of the class term
    mask_weight: float  # weight of the masks' cross-entropy
    dice_weight: float  # weight of Dice
    points: Points  # uniform points of an image
    classification: str = "softmax"  # "softmax" or "focal"
    term: MaskOptions = _DEFAULT_TERM  # how the mask terms are computed
    box_weight: float = 0.0  # weight of the L1 distance of boxes, 0 for none
    giou_weight: float = 0.0  # weight of the boxes' GIoU, 0 for none
    groups: int = 1  # into how many groups the queries are split, each matched on its own


class Augmentation(NamedTuple):
    """How training images are changed."""

    smallest: float  # side of the smallest square crop, as a share of the image's longer side or of `Training.crop`
    largest: float  # side of the largest one, alike
    turns: bool = False  # whether images are also flipped vertically and turned by 90 degrees


@dataclass(frozen=True)
class Training:
    """How a run trained its model."""

    model: str | None  # its name; None: the compact model of `maskloss train`
    pretrained: str | None  # whose weights it began with; None: its own
    queries: int  # their number
    parameters: int  # their number
    size: int  # side of the square that the model sees, pixels
    crop: int | None  # side of the crops of the images, pixels; None: whole images
    augmentation: Augmentation | None  # None: there is none
    digits: bool  # whether it trained on the scenes of handwritten digits that maskloss makes
    steps: int  # optimizer steps
    batch_size: int  # images of a step
    lr: float  # highest learning rate of AdamW
    backbone_share: float  # the backbone's learning rate as a share of it
    weight_decay: float  # of AdamW, on matrices and kernels
    clip: float  # largest norm of the gradient; 0: any
    schedule: str  # how the learning rate falls, "cosine", "linear" or "constant"
    warmup: float  # share of the steps in which it rises
    precision: str  # "no", "bf16" or "fp16"
    # the steps that the schedule was made for, where training ended before; None: all were taken
    planned: int | None = None
    layer_decay: float = 1.0  # of the learning rate, from a block of the backbone to the one before it
    ema_decay: float | None = None  # of the average of the weights, at most; None: the weights themselves are used
    best: int | None = None  # the step whose weights were kept for their score on held-out images; None: the last


@dataclass(frozen=True)
class MethodSettings:
    """Everything that the text says.

    Attributes:
        points: of the mask loss; None: there is no mask loss, only a matching.
        ce_weight: weight of the masks' cross-entropy.
        dice_weight: weight of Dice.
        term: how the mask terms are computed.
        classification: None: masks only.
        matching: None: the pairs are given.
        divisor: what both mask terms are divided by: the number of "matches" or of "targets".
        valid_windows: points are drawn only where there is an image, not in its padding.
        ignore_regions: points in marked regions weigh nothing.
        contrastive_weight: of OneFormer's contrastive loss of queries and texts, 0 for none.
        box_weight: of the boxes' L1 distance in the loss, 0 for none.
        giou_weight: of the boxes' GIoU in the loss, 0 for none.
        clips: what the mask terms of clips or volumes are made of; None: of images.
        version: of maskloss; None where it is not known.
        training: the run; None where there is none.
    """

    points: Points | None
    ce_weight: float = 5.0
    dice_weight: float = 5.0
    term: MaskOptions = _DEFAULT_TERM
    classification: Classification | None = None
    matching: Matching | None = None
    divisor: str = "matches"
    valid_windows: bool = False
    ignore_regions: bool = False
    contrastive_weight: float = 0.0
    box_weight: float = 0.0
    giou_weight: float = 0.0
    clips: ClipOptions | None = None
    version: str | None = __version__
    training: Training | None = None

    @property
    def layers_share(self) -> bool:
        """Whether there are decoder layers, and so whether they share the matcher's points."""
        return self.matching is not None and self.points is not None

    def with_targets(self, valid_windows: bool, ignore_regions: bool) -> MethodSettings:
        """Say what the targets have beside their masks."""
        return replace(
            self,
            valid_windows=self.valid_windows or valid_windows,
            ignore_regions=self.ignore_regions or ignore_regions,
        )


@reported("settings_of")
def settings_of(module: nn.Module | MethodSettings) -> MethodSettings:
    """Read the settings of a module.

    Args:
        module: a `MaskLoss`, a `MaskCriterion` or a `HungarianMatcher`; settings are returned as they are.

    Returns:
        The settings. Windows and ignore regions belong to the targets, and are not known to a module.

    Raises:
        MaskLossError: any other object.

    Example:
        >>> settings_of(MaskLoss(dice_weight=2)).dice_weight
        2.0
    """
    if isinstance(module, MethodSettings):
        return module
    if isinstance(module, MaskLoss):
        return _of_loss(module)
    if isinstance(module, HungarianMatcher):
        ignores = module.rules.ignore_value is not None
        return MethodSettings(None, matching=_of_matcher(module), clips=module.clips, ignore_regions=ignores)
    if isinstance(module, MaskCriterion):
        return replace(
            _of_loss(module.mask_loss),
            classification=_of_classes(module),
            matching=_of_matcher(module.matcher),
            ignore_regions=module.rules.ignore_value is not None,
        )
    raise Cause(
        "only losses of maskloss can be described",
        f"got {type(module).__name__}",
        "give a MaskLoss, a MaskCriterion or a HungarianMatcher",
    )


def _of_loss(loss: MaskLoss) -> MethodSettings:
    drawn, term = loss.sampling, _without_backend(loss.options)
    points = Points(drawn.num_points, None, drawn.oversample_ratio, drawn.importance_ratio, drawn.layout)
    return MethodSettings(points, loss.ce_weight, loss.dice_weight, term, clips=loss.clips)


def _without_backend(options: MaskOptions) -> MaskOptions:
    # Two terms that differ in nothing else are the same to a reader.
    return replace(options, backend=None)


def _of_matcher(matcher: HungarianMatcher) -> Matching:
    weights = (matcher.class_weight, matcher.mask_weight, matcher.dice_weight)
    points, term = Points(matcher.num_points, layout=matcher.layout), _without_backend(matcher.options)
    return Matching(*weights, points, matcher.classification, term, groups=matcher.groups)


def _of_classes(criterion: MaskCriterion) -> Classification:
    weights = criterion.class_weights
    return Classification(
        kind=criterion.classification,
        weight=criterion.class_weight,
        no_object_weight=criterion.no_object_weight,
        num_classes=criterion.num_classes,
        class_weights=None if weights is None else tuple(round(float(each), 6) for each in weights),
    )
