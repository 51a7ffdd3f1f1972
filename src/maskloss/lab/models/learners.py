"""What is trained: a model with its losses, behind one face for the compact model and for those of Transformers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maskloss.criterion import MaskCriterion
from maskloss.distributed import StepTotals
from maskloss.errors import Cause
from maskloss.lab.config import COMPACT, TrainConfig
from maskloss.lab.data.scenes import Batch
from maskloss.lab.loop.clock import Clock
from maskloss.lab.models.compact import BATCH, GROUP, QueryNet
from maskloss.matcher import HungarianMatcher
from maskloss.points import PointSampling

LR = 3e-3
NUM_POINTS, CLASS_WEIGHT, NO_OBJECT_WEIGHT = 256, 10.0, 0.4
SMALLEST_GRID, LARGEST_GRID = 4, 64
# Queries for each instance of the fullest image: a query that is far from any instance learns slowly.
QUERIES_PER_INSTANCE = 2.5


class Losses(NamedTuple):
    """What a batch gives.

    Attributes:
        total: `[]`, to be differentiated.
        terms: unweighted terms of each layer by name, detached.
    """

    total: Tensor
    terms: dict[str, Tensor]


class Output(NamedTuple):
    """Predictions of the final layer.

    Attributes:
        class_logits: `[B, Q, C + 1]`, "no object" last.
        mask_logits: `[B, Q, h, w]`.
    """

    class_logits: Tensor
    mask_logits: Tensor


class Learner(nn.Module):
    """A model with its losses; `forward` gives the losses of a batch, `predict` the logits.

    Attributes:
        network: the model itself, whose weights are saved.
        clock: measures the parts of a step.
        num_queries: Q.
        num_points: of each instance.
        layout: of these points.
    """

    network: nn.Module
    num_queries: int
    num_points: int
    layout: str
    # Whether some weights may get no gradient, which torch's distributed wrapper has to be told.
    has_unused_weights = False

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()

    def forward(self, batch: Batch, totals: StepTotals, seed: int) -> Losses:
        """Compute the losses of a batch.

        Args:
            batch: on the device of the model.
            totals: of the whole step.
            seed: of the step's points.
        """
        raise NotImplementedError

    def predict(self, images: Tensor, windows: Tensor) -> Output:
        """Predict `[B, C, S, S]` in [0, 1], of which `windows` `[B, 4]` (left, top, width, height) are images."""
        raise NotImplementedError

    def groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """Sort the weights for the optimizer; norms and biases do not decay."""
        matrices = [each for each in self.network.parameters() if each.ndim > 1]
        vectors = [each for each in self.network.parameters() if each.ndim <= 1]
        return [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]

    def describe(self) -> str:
        """Say in a few words what it is."""
        raise NotImplementedError

    def save_description(self, folder: Path) -> None:
        """Write what is needed, beside the configuration of the run and the weights, to build the model again."""


class CompactLearner(Learner):
    """The compact model, supervised by `MaskCriterion`.

    Args:
        config: resolved.
        num_classes: C.
        channels: of the images.
    """

    network: QueryNet

    def __init__(self, config: TrainConfig, num_classes: int, channels: int) -> None:
        super().__init__()
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

    def describe(self) -> str:
        """Say what it is."""
        return f"the compact model, {self.num_queries} queries, {count_weights(self):,} weights"


def count_weights(learner: Learner) -> int:
    """Count the weights of a model."""
    return sum(each.numel() for each in learner.network.parameters())


def resolve(config: TrainConfig, most_instances: int, ranks: int = 1) -> TrainConfig:
    """Choose what was left open for the compact model."""
    import dataclasses

    if config.model != COMPACT:
        return config
    wanted = math.ceil(math.sqrt(QUERIES_PER_INSTANCE * most_instances))
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


def load_weights(network: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Put saved weights into a model.

    Raises:
        Cause: names or shapes that are not those of the model, or numbers that are not finite.
    """
    rule = "saved weights must be those of the model"
    own = network.state_dict()
    missing, unknown = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"holds {unknown[0]}, which the model has not"
        raise Cause(rule, f"{where} {what}", "it belongs to another run")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise Cause(
                rule,
                f"{where} holds {name} as {list(tensor.shape)}, the model has {list(own[name].shape)}",
                "it belongs to another run",
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise Cause(rule, f"{where}: {name} holds numbers that are not finite", "go back to an older checkpoint")
    network.load_state_dict(dict(state))


Builder = Callable[[], Learner]
