"""RF-DETR of Transformers: boxes beside masks, groups of queries in training, and sigmoids for classes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from maskloss.criterion import MaskCriterion
from maskloss.distributed import StepTotals
from maskloss.errors import Cause
from maskloss.lab.config import TrainConfig
from maskloss.lab.data.scenes import Batch
from maskloss.lab.models.learners import Losses, Output
from maskloss.lab.models.pretrained import PretrainedLearner, renamed
from maskloss.points import PointSampling
from maskloss.step import step

_NAMES = {"loss_ce": "loss_class", "loss_mask_ce": "loss_mask", "loss_mask_dice": "loss_dice"}


class RfDetrLearner(PretrainedLearner):
    """RF-DETR, whose losses this library computes. The boxes to find are those of the masks."""

    classification, model_class = "focal", "RfDetrForInstanceSegmentation"
    settings = ()

    def configure(self, config: TrainConfig, wanted: Any) -> None:
        """Write the options of a run into the model's configuration."""
        for given, option in ((config.no_object_weight is not None, "no-object-weight"), (config.balance, "balance")):
            if given:
                raise Cause(f"--{option} is for a softmax over the classes", "RF-DETR has sigmoids", "leave it out")
        if config.class_weight is not None:
            wanted.class_loss_coefficient = config.class_weight

    def supervise(self, wanted: Any) -> PointSampling:  # noqa: ARG002 (others read it)
        """Return the points of the loss."""
        return PointSampling(self.num_points, layout=self.layout)

    def watch(self) -> None:
        """Measure the time of the loss."""
        self.clock.wrap(self.network, "_loss_function", "loss")

    def forward(self, batch: Batch, totals: StepTotals, seed: int) -> Losses:
        """Compute the losses of a batch."""
        labels = batch.labels.split(list(batch.masks.num_targets))
        entries = [
            {"class_labels": label, "boxes": box, "masks": masks}
            for label, box, masks in zip(labels, batch.boxes(), batch.masks, strict=True)
        ]
        with self.clock.part("model"), step(totals=totals, image_ids=batch.image_ids, seed=seed):
            out = self.network(**self.inputs(batch.images, batch.masks.windows), labels=entries)
        self.clock.mark_backward(out.pred_masks)
        terms = {renamed(name, _NAMES): value.detach().reshape(()) for name, value in out.loss_dict.items()}
        return Losses(out.loss.reshape(()), terms)

    def predict(self, images: Tensor, windows: Tensor) -> Output:
        """Predict images."""
        out = self.network(**self.inputs(images, windows))
        return Output(out.logits.float(), out.pred_masks.float())

    def mask_criterion(self) -> MaskCriterion:
        """Return a criterion with the weights of its configuration; that of the model weighs boxes too."""
        config = self.card.config
        return MaskCriterion(
            config.num_labels,
            class_weight=float(config.class_cost),
            mask_weight=float(config.mask_class_loss_coefficient),
            dice_weight=float(config.mask_dice_loss_coefficient),
            classification="focal",
            sampling=PointSampling(self.num_points, layout=self.layout),
            target_mode="nearest",
        )
