"""Segmentation models of Transformers as they are described, by name or in a folder, before any weights are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maskloss.errors import Cause, require
from maskloss.lab.config import TrainConfig
from maskloss.lab.data.scenes import Source
from maskloss.lab.files import read_json
from maskloss.lab.models.families import FAMILIES, RF_DETR, Family
from maskloss.lab.models.learners import Kind
from maskloss.lab.models.pretrained import LR, MODEL_FILE, PROCESSOR_FILE, RULE, PretrainedLearner, quiet
from maskloss.lab.models.rf_detr import RfDetrLearner
from maskloss.lab.runfolder import MODEL, WEIGHTS

_WHY_NOT = {
    "videomt": "it needs videos",
    "maskformer": "its loss covers every pixel and not points",
    "detr": "its loss covers every pixel and not points",
}
# Of models that take images of any size, unless they say otherwise.
SIZE, STRIDE = 512, 32
# What OneFormer is asked to do, as text.
_TASK = "the task is instance"


@dataclasses.dataclass(frozen=True)
class Card(Kind):
    """A model of Transformers."""

    weights_file, has_unused_weights = f"{MODEL}/{WEIGHTS}", True
    name: str  # where it came from
    config: Any  # of Transformers
    processor: dict[str, Any]  # its image processor's settings; empty if it has none

    @classmethod
    def read(cls, config: TrainConfig, folder: Path | None) -> Card:
        """Read the configuration from the hub or from a folder, or that of a run from what the run has written."""
        return read_card(config.model) if folder is None else read_description(folder / MODEL)

    @property
    def size(self) -> int:
        """The side of the square that it is given."""
        if self._family.fixed_size:
            return int(self.config.image_size)
        found = self.processor.get("size")
        sides = list(found.values()) if isinstance(found, Mapping) else [found]
        whole = [side for side in sides if isinstance(side, int) and not isinstance(side, bool)]
        usual = min(whole) if whole else SIZE
        return max(self.stride, round(usual / self.stride) * self.stride)

    @property
    def stride(self) -> int:
        """What the side must be a multiple of."""
        if self.config.model_type != RF_DETR:
            return STRIDE
        # Its backbone divides the image into windows of patches.
        return int(self.config.backbone_config.patch_size * self.config.backbone_config.num_windows)

    @property
    def _family(self) -> Family:
        return FAMILIES[self.config.model_type]

    def resolve(self, config: TrainConfig, source: Source, ranks: int) -> TrainConfig:  # noqa: ARG002 (others read it)
        """Choose what was left open: by the model's configuration."""
        if source.channels != 3:
            rule, cause = "images for a pretrained model must have three channels", f"these have {source.channels}"
            raise Cause(rule, cause, "convert them")
        for option in ("grid", "norm"):
            if getattr(config, option) is not None:
                raise Cause(f"--{option} is for the compact model", f"--model is {config.model}", "leave it out")
        size = config.size or self.size
        if self._family.fixed_size and size != self.size:
            rule, cause = f"{self.name} takes images of one size", f"--size {size}, but it is {self.size}"
            raise Cause(rule, cause, "leave it out")
        if size % self.stride:
            raise Cause(f"--size must be a multiple of {self.stride} for this model", f"got {size}", "take another")
        points = config.num_points or self._usual_points(size)
        return dataclasses.replace(config, size=size, num_points=points, lr=config.lr or LR)

    def _usual_points(self, size: int) -> int:
        if self.config.model_type != RF_DETR:
            return int(self.config.train_num_points)
        side = size // self.config.mask_downsample_ratio
        # As it trains by itself: no fewer than a mask has rows.
        return int(max(side, side**2 // self.config.mask_point_sample_ratio))

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
        learner = RfDetrLearner if self.config.model_type == RF_DETR else PretrainedLearner
        return learner(config, self, class_names, class_weights, pretrained=trained)


def read_card(name: str) -> Card:
    """Read a model's configuration, and that of its image processor, from the hub or from a folder."""
    transformers = require("transformers", "transformers")
    processing = require("transformers.image_processing_base", "transformers")
    if Path(name).exists() and not (Path(name) / MODEL_FILE).is_file():
        raise Cause(RULE, f"{name} has no {MODEL_FILE}", "save_pretrained writes one")
    with quiet(name):
        config = transformers.AutoConfig.from_pretrained(name)
    if config.model_type not in FAMILIES:
        why = _WHY_NOT.get(config.model_type, f"it is a {config.model_type}")
        raise Cause(RULE, f"{name} cannot be trained here: {why}", f"supported: {', '.join(FAMILIES)}")
    try:
        processor, _ = processing.ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        processor = {}
    if config.model_type == "oneformer" and not hasattr(config, "task_tokens"):
        config.task_tokens = _task_tokens(name, config.task_seq_len)
    return Card(name, config, dict(processor))


def _task_tokens(name: str, length: int) -> list[int]:
    """Return the task as OneFormer's processor gives it to the model: numbers of its tokens, and zeros."""
    transformers = require("transformers", "transformers")
    with quiet(name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        found = tokenizer(_TASK, padding="max_length", max_length=length, truncation=True)
    return [token * known for token, known in zip(found["input_ids"], found["attention_mask"], strict=True)]


def read_description(folder: Path) -> Card:
    """Read what `save_description` wrote."""
    transformers = require("transformers", "transformers")
    content = read_json(folder / MODEL_FILE, "a run must hold the configuration of its model")
    kind = content.get("model_type")
    if kind not in FAMILIES:
        raise Cause(
            "a run must hold the configuration of its model", f"{folder} describes a {kind!r}", "it was changed"
        )
    config = transformers.AutoConfig.for_model(**content)
    processor = folder / PROCESSOR_FILE
    found = read_json(processor, "an image processor's settings must be readable") if processor.is_file() else {}
    return Card(str(folder), config, found)
