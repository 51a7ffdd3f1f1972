"""What is trained: a model with its losses, behind one face for every kind of model; and the compact kind."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from maskloss.criterion import MaskCriterion
from maskloss.distributed import StepTotals
from maskloss.errors import Cause
from maskloss.lab.config import TrainConfig
from maskloss.lab.data.scenes import Batch, Source
from maskloss.lab.models.clock import Clock
from maskloss.lab.models.compact import BATCH, GROUP, QueryNet
from maskloss.lab.runfolder import WEIGHTS
from maskloss.matcher import HungarianMatcher
from maskloss.points import PointSampling

LR = 3e-3
NUM_POINTS, CLASS_WEIGHT, NO_OBJECT_WEIGHT = 256, 10.0, 0.4
SMALLEST_GRID, LARGEST_GRID = 4, 64
# The network halves its input four times.
STRIDE = 16
# Queries for each instance of the fullest image: a query that is far from any instance learns slowly.
QUERIES_PER_INSTANCE = 2.5


class Losses(NamedTuple):
    """What a batch gives."""

    total: Tensor  # `[]`, to be differentiated
    terms: dict[str, Tensor]  # unweighted terms of each layer by name, detached


class Output(NamedTuple):
    """Predictions of the final layer."""

    class_logits: Tensor  # `[B, Q, C + 1]`, "no object" last; `[B, Q, C]` of a learner whose classification is "focal"
    mask_logits: Tensor  # `[B, Q, h, w]`


class Learner(nn.Module):
    """A model with its losses; `forward` gives the losses of a batch, `predict` the logits."""

    classification: ClassVar[str] = "softmax"  # or "focal", where there is no "no object"
    class_layers: tuple[str, ...]  # beginnings of the names of the weights whose number depends on the classes
    settings: ClassVar[tuple[str, ...]] = ()  # beginnings of the names of buffers that are not learned
    network: nn.Module  # the model itself, whose weights are saved
    num_queries: int  # Q
    num_points: int  # of each instance
    layout: str  # of these points
    class_weights: Sequence[float] | None  # of the classes in the classification; None: all weigh alike

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()  # measures the parts of a step

    def forward(self, batch: Batch, totals: StepTotals, seed: int) -> Losses:
        """Compute the losses of a batch."""
        raise NotImplementedError

    def predict(self, images: Tensor, windows: Tensor) -> Output:
        """Predict `[B, C, S, S]` in [0, 1]; images fill `windows` `[B, 4]` (left, top, width, height)."""
        raise NotImplementedError

    def groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """Sort the weights for the optimizer; norms and biases do not decay."""
        matrices = [each for each in self.network.parameters() if each.ndim > 1]
        vectors = [each for each in self.network.parameters() if each.ndim <= 1]
        return [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]

    def mask_criterion(self) -> MaskCriterion:
        """Return what computes its losses, or would if it were a criterion of this library."""
        raise NotImplementedError

    def describe(self) -> str:
        """Say in a few words what it is."""
        raise NotImplementedError

    def save_description(self, folder: Path) -> None:
        """Write what is needed, beside the configuration of the run and the weights, to build the model again."""


class Kind:
    """A kind of model, as much of it as is known before the data are read."""

    weights_file: ClassVar[str]  # where a finished run keeps the weights, in its folder
    # whether some weights may get no gradient, which torch's distributed wrapper has to be told
    has_unused_weights: ClassVar[bool]

    @property
    def size(self) -> int | None:
        """Side of the square that the model sees if nothing else is asked for; None: by the images."""
        return None

    @classmethod
    def read(cls, config: TrainConfig, folder: Path | None) -> Kind:
        """Read what is known of the model of a configuration; a run that has begun holds the model's description."""
        raise NotImplementedError

    def resolve(self, config: TrainConfig, source: Source, ranks: int) -> TrainConfig:
        """Choose what a configuration left open."""
        raise NotImplementedError

    def build(
        self,
        config: TrainConfig,
        class_names: Sequence[str],
        channels: int,
        *,
        class_weights: Sequence[float] | None = None,
        trained: bool,
    ) -> Learner:
        """Build the model of a resolved configuration; unless `trained`, the caller has other weights for it."""
        raise NotImplementedError


class Compact(Kind):
    """The compact model."""

    weights_file, has_unused_weights = WEIGHTS, False

    @classmethod
    def read(cls, config: TrainConfig, folder: Path | None) -> Compact:  # noqa: ARG003 (all is in the configuration)
        """Check the size; there is nothing to read."""
        if config.size is not None and config.size % STRIDE:
            hint = f"the model halves its input to 1/{STRIDE}"
            raise Cause(f"--size must be a multiple of {STRIDE}", f"got {config.size}", hint)
        return cls()

    def resolve(self, config: TrainConfig, source: Source, ranks: int) -> TrainConfig:
        """Choose what was left open: by the most instances of an image, and by whether a batch is divided."""
        for option in ("backbone_lr", "layer_decay", "freeze_backbone"):
            if getattr(config, option) != getattr(TrainConfig, option):
                name = option.replace("_", "-")
                raise Cause(f"--{name} is for a pretrained model", "--model is compact", "leave it out")
        wanted = math.ceil(math.sqrt(QUERIES_PER_INSTANCE * source.most_instances))
        grid = config.grid or min(LARGEST_GRID, max(SMALLEST_GRID, wanted))
        divided = ranks > 1 or config.accumulate > 1
        return dataclasses.replace(
            config,
            grid=grid,
            norm=config.norm or (GROUP if divided else BATCH),
            num_points=config.num_points or NUM_POINTS,
            class_weight=config.class_weight or CLASS_WEIGHT,
            no_object_weight=NO_OBJECT_WEIGHT if config.no_object_weight is None else config.no_object_weight,
            lr=config.lr or LR,
        )

    def build(
        self,
        config: TrainConfig,
        class_names: Sequence[str],
        channels: int,
        *,
        class_weights: Sequence[float] | None = None,
        trained: bool,  # noqa: ARG002 (it has no weights of its own)
    ) -> CompactLearner:
        """Build the model."""
        return CompactLearner(config, len(class_names), channels, class_weights)


class CompactLearner(Learner):
    """The compact model, supervised by `MaskCriterion`."""

    class_layers = ("head.label.2.", "head.classes.2.")
    network: QueryNet

    def __init__(
        self, config: TrainConfig, num_classes: int, channels: int, class_weights: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        self.class_weights = class_weights
        grid, norm, points = config.grid or SMALLEST_GRID, config.norm or BATCH, config.num_points or NUM_POINTS
        # The seed decides the weights; torch's own generator stays as it is.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            network = QueryNet(num_classes, grid, channels, norm)
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.num_queries, self.num_points, self.layout = grid**2, points, config.layout
        sampling = PointSampling(points, layout=config.layout)
        # Pixels are classified through the masks and get little gradient from it, so the classification counts more
        # in the loss than in the matching, which keeps Mask2Former's weights.
        self.criterion = MaskCriterion(
            num_classes=num_classes,
            class_weight=config.class_weight or CLASS_WEIGHT,
            no_object_weight=NO_OBJECT_WEIGHT if config.no_object_weight is None else config.no_object_weight,
            class_weights=class_weights,
            sampling=sampling,
            matcher=HungarianMatcher(num_points=sampling.num_points, layout=sampling.layout),
        )
        self.clock.wrap(self.criterion.matcher, "match", "matching")

    def forward(self, batch: Batch, totals: StepTotals, seed: int) -> Losses:
        """Compute the losses of a batch."""
        with self.clock.part("model"):
            output = self.network(batch.images)
        with self.clock.part("loss"):
            out = self.criterion(
                # Losses are computed in float32 whatever the model runs in.
                [layer.float() for layer in output.class_logits],
                output.mask_logits,
                batch.targets,
                totals=totals,
                image_ids=batch.image_ids,
                seed=seed,
            )
        self.clock.mark_backward(output.mask_logits[-1])
        return Losses(out.total, {name: each.detach() for name, each in out.as_dict().items()})

    def predict(self, images: Tensor, windows: Tensor) -> Output:  # noqa: ARG002 (other learners read them)
        """Predict images."""
        output = self.network(images)
        return Output(output.class_logits[-1], output.mask_logits[-1])

    def mask_criterion(self) -> MaskCriterion:
        """Return its criterion."""
        return self.criterion

    def describe(self) -> str:
        """Say what it is."""
        return f"the compact model, {self.num_queries} queries, {count_weights(self):,} weights"


def count_weights(learner: Learner) -> int:
    """Count the weights of a model."""
    return sum(each.numel() for each in learner.network.parameters())
