"""Universal-segmentation models of Transformers, by name or from a folder, patched by this library."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskloss.criterion import MaskCriterion
from maskloss.distributed import StepTotals
from maskloss.errors import Cause, require
from maskloss.integrations.transformers import patch
from maskloss.integrations.transformers.families import can_be_factored
from maskloss.lab.config import TrainConfig
from maskloss.lab.data.scenes import Batch, Source
from maskloss.lab.files import explain, read_json, write_json
from maskloss.lab.models.learners import Kind, Learner, Losses, Output, count_weights
from maskloss.lab.runfolder import MODEL, WEIGHTS
from maskloss.points import PointSampling
from maskloss.step import step

# What can be trained from images and masks alone, by the type in a model's configuration.
TRAINABLE = ("mask2former", "eomt", "eomt_dinov3")
_WHY_NOT = {
    "oneformer": "it needs a text for each image",
    "videomt": "it needs videos",
    "maskformer": "its loss covers every pixel and not points",
    "detr": "its loss covers every pixel and not points",
}
_RULE = "--model must be compact, or the name or the folder of a universal-segmentation model of Transformers"
LR = 1e-4
# The pretrained part is moved less than what comes after it.
BACKBONE_SHARE = 0.1
SIZE = 512
# Models that take images of one size only, and the multiple that the sides of others must be of.
_FIXED_SIZE = ("eomt", "eomt_dinov3")
STRIDE = 32
MODEL_FILE, PROCESSOR_FILE = "config.json", "preprocessor_config.json"
# ImageNet's, with which almost every backbone was trained.
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@dataclasses.dataclass(frozen=True)
class Card(Kind):
    """A model of Transformers.

    Attributes:
        name: where it came from.
        config: of Transformers.
        processor: its image processor's settings; empty if it has none.
    """

    weights_file, has_unused_weights = f"{MODEL}/{WEIGHTS}", True
    name: str
    config: Any
    processor: dict[str, Any]

    @classmethod
    def read(cls, config: TrainConfig, folder: Path | None) -> Card:
        """Read the configuration from the hub or from a folder, or that of a run from what the run has written."""
        return read_card(config.model) if folder is None else read_description(folder / MODEL)

    @property
    def size(self) -> int:
        """The side of the square that it is given."""
        if self.config.model_type in _FIXED_SIZE:
            return int(self.config.image_size)
        found = self.processor.get("size")
        sides = list(found.values()) if isinstance(found, Mapping) else [found]
        whole = [side for side in sides if isinstance(side, int) and not isinstance(side, bool)]
        return max(STRIDE, round(min(whole) / STRIDE) * STRIDE) if whole else SIZE

    def resolve(self, config: TrainConfig, source: Source, ranks: int) -> TrainConfig:  # noqa: ARG002 (others read it)
        """Choose what was left open: by the model's configuration."""
        if source.channels != 3:
            rule, cause = "images for a pretrained model must have three channels", f"these have {source.channels}"
            raise Cause(rule, cause, "convert them")
        for option in ("grid", "norm"):
            if getattr(config, option) is not None:
                raise Cause(f"--{option} is for the compact model", f"--model is {config.model}", "leave it out")
        size = config.size or self.size
        if self.config.model_type in _FIXED_SIZE and size != self.size:
            rule, cause = f"{self.name} takes images of one size", f"--size {size}, but it is {self.size}"
            raise Cause(rule, cause, "leave it out")
        if size % STRIDE:
            raise Cause(f"--size must be a multiple of {STRIDE} for this model", f"got {size}", "take another")
        points = config.num_points or int(self.config.train_num_points)
        return dataclasses.replace(config, size=size, num_points=points, lr=config.lr or LR)

    def build(
        self,
        config: TrainConfig,
        class_names: Sequence[str],
        channels: int,  # noqa: ARG002 (three, as `resolve` has checked)
        *,
        class_weights: Sequence[float] | None = None,
        trained: bool,
    ) -> PretrainedLearner:
        """Build the model."""
        return PretrainedLearner(config, self, class_names, class_weights, pretrained=trained)


def read_card(name: str) -> Card:
    """Read a model's configuration, and that of its image processor, from the hub or from a folder.

    Raises:
        Cause: no such model, or one of another kind.
    """
    transformers = require("transformers", "transformers")
    processing = require("transformers.image_processing_base", "transformers")
    if Path(name).exists() and not (Path(name) / MODEL_FILE).is_file():
        raise Cause(_RULE, f"{name} has no {MODEL_FILE}", "save_pretrained writes one")
    with _quiet(name):
        config = transformers.AutoConfig.from_pretrained(name)
    if config.model_type not in TRAINABLE:
        why = _WHY_NOT.get(config.model_type, f"it is a {config.model_type}")
        raise Cause(_RULE, f"{name} cannot be trained here: {why}", f"supported: {', '.join(TRAINABLE)}")
    try:
        processor, _ = processing.ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        processor = {}
    return Card(name, config, dict(processor))


def read_description(folder: Path) -> Card:
    """Read what `save_description` wrote."""
    transformers = require("transformers", "transformers")
    content = read_json(folder / MODEL_FILE, "a run must hold the configuration of its model")
    kind = content.get("model_type")
    if kind not in TRAINABLE:
        raise Cause(
            "a run must hold the configuration of its model", f"{folder} describes a {kind!r}", "it was changed"
        )
    config = transformers.AutoConfig.for_model(**content)
    processor = folder / PROCESSOR_FILE
    found = read_json(processor, "an image processor's settings must be readable") if processor.is_file() else {}
    return Card(str(folder), config, found)


class PretrainedLearner(Learner):
    """A model of Transformers whose losses this library computes.

    Args:
        config: resolved.
        card: of the model.
        class_names: of the data; the head is resized to them.
        class_weights: of the classes in the classification; None: all weigh alike.
        pretrained: whether to load weights; False: the caller has others.
    """

    class_layers, settings = ("class_predictor.",), ("criterion.",)

    def __init__(
        self,
        config: TrainConfig,
        card: Card,
        class_names: Sequence[str],
        class_weights: Sequence[float] | None = None,
        *,
        pretrained: bool = True,
    ) -> None:
        super().__init__()
        self.class_weights = class_weights
        transformers = require("transformers", "transformers")
        self.card = card
        wanted = card.config
        wanted.num_labels = len(class_names)
        wanted.id2label = dict(enumerate(class_names))
        wanted.label2id = {name: label for label, name in enumerate(class_names)}
        wanted.train_num_points = config.num_points
        if config.class_weight is not None:
            wanted.class_weight = config.class_weight
        if config.no_object_weight is not None:
            wanted.no_object_weight = config.no_object_weight
        auto = transformers.AutoModelForUniversalSegmentation
        with torch.random.fork_rng(devices=[]):
            # New heads get their weights from here.
            torch.manual_seed(config.seed)
            if pretrained:
                with _quiet(card.name):
                    network = auto.from_pretrained(
                        card.name, config=wanted, ignore_mismatched_sizes=True, use_safetensors=True
                    )
            else:
                network = auto.from_config(wanted)
        network = network.float()
        # A buffer, of the size of the head: a checkpoint with other classes leaves it undefined.
        weights = [1.0] * len(class_names) if class_weights is None else class_weights
        network.criterion.empty_weight = torch.tensor([*weights, wanted.no_object_weight])
        # The one place where the model is given this library's losses.
        sampling = PointSampling(
            int(wanted.train_num_points), wanted.oversample_ratio, wanted.importance_sample_ratio, config.layout
        )
        patch(network, sampling=sampling, factors=can_be_factored(network))
        self.network = network
        self.num_queries, self.num_points = int(wanted.num_queries), int(wanted.train_num_points)
        self.layout = config.layout
        self.mean: Tensor
        self.deviation: Tensor
        mean, deviation, scale = _normalization(card.processor)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1) / scale, persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation).view(-1, 1, 1) / scale, persistent=False)
        self._terms: dict[str, Tensor] = {}
        self._watch(network.criterion)

    def _watch(self, criterion: nn.Module) -> None:
        """Keep the terms of the loss, which the model adds up and drops, and measure the criterion's time."""
        original = criterion.forward

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.clock.part("loss"):
                terms = original(*args, **kwargs)
            # Copies: the model multiplies them by their weights in place.
            self._terms.update({name: each.detach().clone() for name, each in terms.items()})
            return terms

        criterion.forward = timed

    def _inputs(self, images: Tensor, windows: Tensor) -> dict[str, Tensor]:
        pixels = (images - self.mean) / self.deviation
        if self.card.config.model_type in _FIXED_SIZE:
            return {"pixel_values": pixels}
        size = images.shape[-1]
        axis = (torch.arange(size, device=images.device) + 0.5) / size
        inside_x = (axis >= windows[:, :1]) & (axis <= windows[:, :1] + windows[:, 2:3])
        inside_y = (axis >= windows[:, 1:2]) & (axis <= windows[:, 1:2] + windows[:, 3:])
        return {"pixel_values": pixels, "pixel_mask": (inside_y[:, :, None] & inside_x[:, None, :]).long()}

    def forward(self, batch: Batch, totals: StepTotals, seed: int) -> Losses:
        """Compute the losses of a batch."""
        self._terms = {}
        labels = list(batch.labels.split(list(batch.masks.num_targets)))
        with self.clock.part("model"), step(totals=totals, image_ids=batch.image_ids, seed=seed):
            out = self.network(
                **self._inputs(batch.images, batch.masks.windows), mask_labels=batch.masks, class_labels=labels
            )
        self.clock.mark_backward(out.masks_queries_logits)
        names = {"loss_cross_entropy": "loss_class"}
        terms = {_renamed(name, names): value.reshape(()) for name, value in self._terms.items()}
        return Losses(out.loss.reshape(()), terms)

    def predict(self, images: Tensor, windows: Tensor) -> Output:
        """Predict images."""
        out = self.network(**self._inputs(images, windows))
        return Output(out.class_queries_logits.float(), out.masks_queries_logits.float())

    def groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """Sort the weights; the pretrained backbone is moved less."""
        groups = []
        for backbone in (False, True):
            for decays in (True, False):
                chosen = [
                    weight
                    for name, weight in self.network.named_parameters()
                    if ("pixel_level_module.encoder" in name) == backbone and (weight.ndim > 1) == decays
                ]
                if chosen:
                    decay = config.weight_decay if decays else 0.0
                    groups.append(
                        {"params": chosen, "weight_decay": decay, "share": BACKBONE_SHARE if backbone else 1.0}
                    )
        return groups

    def mask_criterion(self) -> MaskCriterion:
        """Return a criterion with the settings of its configuration."""
        config = self.card.config
        return MaskCriterion(
            config.num_labels,
            class_weight=config.class_weight,
            mask_weight=config.mask_weight,
            dice_weight=config.dice_weight,
            no_object_weight=config.no_object_weight,
            class_weights=self.class_weights,
            sampling=PointSampling(config.train_num_points, config.oversample_ratio, config.importance_sample_ratio),
        )

    def describe(self) -> str:
        """Say what it is."""
        kind = type(self.network).__name__
        return f"{self.card.name} ({kind}), {self.num_queries} queries, {count_weights(self):,} weights"

    def save_description(self, folder: Path) -> None:
        """Write the configurations of the model and of its image processor."""
        folder.mkdir(parents=True, exist_ok=True)
        description = self.network.config.to_dict()  # type: ignore[operator, union-attr]
        write_json(folder / MODEL_FILE, {**description, "architectures": [type(self.network).__name__]})
        if self.card.processor:
            write_json(folder / PROCESSOR_FILE, self.card.processor)


def _normalization(processor: Mapping[str, Any]) -> tuple[list[float], list[float], float]:
    """Return mean, deviation, and by what images in [0, 1] are multiplied before these apply."""
    if not processor:
        return _MEAN, _STD, 1.0
    scale = 255.0 * float(processor.get("rescale_factor", 1 / 255)) if processor.get("do_rescale", True) else 255.0
    if not processor.get("do_normalize", True):
        return [0.0] * 3, [1.0] * 3, scale
    return list(processor.get("image_mean") or _MEAN), list(processor.get("image_std") or _STD), scale


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Load without reports of heads that are replaced on purpose, and say in one sentence what went wrong."""
    logging = require("transformers.utils.logging", "transformers")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, json.JSONDecodeError) as error:
        raise Cause(_RULE, f"{name}: {explain(error)}", "check the name, and the connection to the hub") from None
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
