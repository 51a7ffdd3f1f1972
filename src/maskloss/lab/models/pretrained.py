"""Segmentation models of Transformers, patched by this library: Mask2Former, OneFormer, EoMT, and what all share."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from maskloss.criterion import MaskCriterion
from maskloss.distributed import StepTotals
from maskloss.errors import Cause, require
from maskloss.integrations.transformers import patch
from maskloss.integrations.transformers.families import find
from maskloss.lab.config import TrainConfig
from maskloss.lab.data.scenes import Batch
from maskloss.lab.files import explain, write_json
from maskloss.lab.models.families import FAMILIES, Described, backbone_shares
from maskloss.lab.models.learners import Learner, Losses, Output, count_weights
from maskloss.methods.sources import criterion_of_config
from maskloss.points import PointSampling
from maskloss.step import step

RULE = "--model must be compact, a run, or the name or the folder of a segmentation model of Transformers"
LR = 1e-4
MODEL_FILE, PROCESSOR_FILE = "config.json", "preprocessor_config.json"
# ImageNet's, with which almost every backbone was trained.
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class PretrainedLearner(Learner):
    """A model of Transformers whose losses this library computes."""

    settings: ClassVar[tuple[str, ...]] = ("criterion.",)
    model_class: ClassVar[str] = "AutoModelForUniversalSegmentation"

    def __init__(
        self,
        config: TrainConfig,
        card: Described,
        class_names: Sequence[str],
        class_weights: Sequence[float] | None = None,
        *,
        pretrained: bool = True,
    ) -> None:
        super().__init__()
        self.card, self.class_weights = card, class_weights
        wanted = card.config
        self.family = FAMILIES[wanted.model_type]
        self.class_layers = self.family.class_layers
        wanted.num_labels = len(class_names)
        wanted.id2label = dict(enumerate(class_names))
        wanted.label2id = {name: label for label, name in enumerate(class_names)}
        self.num_points, self.layout = config.num_points or 0, config.layout
        self.configure(config, wanted)
        with torch.random.fork_rng(devices=[]):
            # New heads get their weights from here.
            torch.manual_seed(config.seed)
            self.network = self._build(wanted, pretrained).float()
        # The one place where the model is given this library's losses.
        factors = all(family.head is not None for family, _ in find(self.network))
        patch(self.network, sampling=self.supervise(wanted), factors=factors)
        self.num_queries = int(wanted.num_queries)
        usual = self.family.share if config.backbone_lr is None else config.backbone_lr / (config.lr or LR)
        self.backbone_share = 0.0 if config.freeze_backbone else usual
        if config.freeze_backbone:
            for name, weight in self.network.named_parameters():
                weight.requires_grad_(not name.startswith(self.family.backbone))
        self.mean: Tensor
        self.deviation: Tensor
        mean, deviation, scale = _normalization(card.processor)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1) / scale, persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation).view(-1, 1, 1) / scale, persistent=False)
        self._terms: dict[str, Tensor] = {}
        self.watch()

    def _build(self, wanted: Any, pretrained: bool) -> nn.Module:
        auto = getattr(require("transformers", "transformers"), self.model_class)
        if not pretrained:
            made = auto.from_config if hasattr(auto, "from_config") else auto
            return cast("nn.Module", made(wanted))
        with quiet(self.card.name):
            return cast(
                "nn.Module",
                auto.from_pretrained(self.card.name, config=wanted, ignore_mismatched_sizes=True, use_safetensors=True),
            )

    def configure(self, config: TrainConfig, wanted: Any) -> None:
        """Write the options of a run into the model's configuration."""
        wanted.train_num_points = config.num_points
        if config.class_weight is not None:
            wanted.class_weight = config.class_weight
        if config.no_object_weight is not None:
            wanted.no_object_weight = config.no_object_weight
        if wanted.model_type == "oneformer":
            # Its text encoder and the contrastive loss are for training on texts about each image; there are none.
            wanted.is_training, wanted.contrastive_weight = False, 0.0

    def supervise(self, wanted: Any) -> PointSampling:
        """Return the points of the loss; the criterion of the model is told the weights of the classes."""
        weights = [1.0] * wanted.num_labels if self.class_weights is None else self.class_weights
        # A buffer, of the size of the head: a checkpoint with other classes leaves it undefined.
        self.network.criterion.empty_weight = torch.tensor([*weights, wanted.no_object_weight])  # type: ignore[union-attr]
        return PointSampling(
            self.num_points, wanted.oversample_ratio, wanted.importance_sample_ratio, layout=self.layout
        )

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation; a frozen backbone stays in evaluation."""
        super().train(mode)
        if not self.backbone_share:
            for beginning in self.family.backbone:
                self.network.get_submodule(beginning[:-1]).eval()
        return self

    def watch(self) -> None:
        """Keep the terms of the loss, which the model adds up and drops, and measure the criterion's time."""
        criterion: Any = self.network.criterion
        original = criterion.forward

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.clock.part("loss"):
                terms = original(*args, **kwargs)
            # Copies: the model multiplies them by their weights in place.
            self._terms.update({name: each.detach().clone() for name, each in terms.items()})
            return terms

        criterion.forward = timed

    def inputs(self, images: Tensor, windows: Tensor) -> dict[str, Tensor]:
        """Return images as the model takes them, and where in them there is an image."""
        pixels = (images - self.mean) / self.deviation
        if self.family.fixed_size:
            return {"pixel_values": pixels}
        size = images.shape[-1]
        axis = (torch.arange(size, device=images.device) + 0.5) / size
        inside_x = (axis >= windows[:, :1]) & (axis <= windows[:, :1] + windows[:, 2:3])
        inside_y = (axis >= windows[:, 1:2]) & (axis <= windows[:, 1:2] + windows[:, 3:])
        given = {"pixel_values": pixels, "pixel_mask": (inside_y[:, :, None] & inside_x[:, None, :]).long()}
        tokens = getattr(self.card.config, "task_tokens", None)
        if tokens is not None:
            given["task_inputs"] = torch.tensor(tokens, device=images.device).expand(len(images), -1)
        return given

    def forward(self, batch: Batch, totals: StepTotals, seed: int) -> Losses:
        """Compute the losses of a batch."""
        self._terms = {}
        labels = list(batch.labels.split(list(batch.masks.num_targets)))
        with self.clock.part("model"), step(totals=totals, image_ids=batch.image_ids, seed=seed):
            out = self.network(
                **self.inputs(batch.images, batch.masks.windows), mask_labels=batch.masks, class_labels=labels
            )
        self.clock.mark_backward(out.masks_queries_logits)
        names = {"loss_cross_entropy": "loss_class"}
        terms = {renamed(name, names): value.reshape(()) for name, value in self._terms.items()}
        return Losses(out.loss.reshape(()), terms)

    def predict(self, images: Tensor, windows: Tensor) -> Output:
        """Predict images."""
        out = self.network(**self.inputs(images, windows))
        return Output(out.class_queries_logits.float(), out.masks_queries_logits.float())

    def groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """Sort the weights by whether they decay and by their share of the learning rate; frozen ones are left out."""
        moved = {name: each for name, each in self.network.named_parameters() if each.requires_grad}
        shares = backbone_shares(moved, self.family, self.backbone_share, config.layer_decay)
        sorted_: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, weight in moved.items():
            sorted_.setdefault((shares[name], weight.ndim > 1), []).append(weight)
        return [
            {"params": chosen, "weight_decay": config.weight_decay if decays else 0.0, "share": share}
            for (share, decays), chosen in sorted_.items()
        ]

    def mask_criterion(self) -> MaskCriterion:
        """Return a criterion with the settings of its configuration."""
        return criterion_of_config(self.card.config, self.class_weights)

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


def renamed(name: str, names: Mapping[str, str]) -> str:
    """Return the name of a term in this library, whatever its ending."""
    for old, new in names.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


@contextlib.contextmanager
def quiet(name: str) -> Iterator[None]:
    """Load without reports of heads that are replaced on purpose, and say in one sentence what went wrong."""
    logging = require("transformers.utils.logging", "transformers")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, json.JSONDecodeError) as error:
        raise Cause(RULE, f"{name}: {explain(error)}", "check the name, and the connection to the hub") from None
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
