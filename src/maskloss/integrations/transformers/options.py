"""What a model's configuration in Transformers says about its loss, with maskloss computing it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maskloss.errors import Cause, require
from maskloss.integrations.transformers import rf_detr
from maskloss.integrations.transformers.families import supported

# Types of configurations of the families that share one criterion; OneFormer adds a contrastive term.
_UNIVERSAL = ("mask2former", "oneformer", "eomt", "eomt_dinov3", "videomt")
_RF_DETR = "rf_detr"


def read_config(model: str) -> Any:
    """Read a configuration from a folder with config.json, or by its name on the Hugging Face Hub.

    Raises:
        MaskLossError: none was found, or Transformers does not know its type.
        MissingExtraError: Transformers is not installed (extra `transformers`).
    """
    transformers = require("transformers", "transformers")
    try:
        return transformers.AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        local = Path(model).exists()
        raise Cause(
            "the model must have a configuration that Transformers can read",
            f"{model}: {first}",
            "a newer Transformers may know the model"
            if local
            else "name a folder with config.json, or a model on the Hub",
        ) from None


def method_options(config: Any) -> dict[str, Any]:
    """Read the settings of the loss, each under the name that a paragraph knows it by.

    Raises:
        MaskLossError: a configuration of a model whose loss maskloss does not compute.
    """
    kind = getattr(config, "model_type", type(config).__name__)
    if kind in _UNIVERSAL:
        found = _universal(config)
    elif kind == _RF_DETR:
        found = _rf_detr(config)
    else:
        raise Cause("the model must be of a supported family", f"it is {kind}", f"supported: {supported()}")
    return found | {"num_classes": config.num_labels}


def _universal(config: Any) -> dict[str, Any]:
    return {
        "num_points": config.train_num_points,
        "area_per_point": None,
        "matcher_points": config.train_num_points,
        "oversample_ratio": config.oversample_ratio,
        "importance_ratio": config.importance_sample_ratio,
        "mask_weight": config.mask_weight,
        "dice_weight": config.dice_weight,
        "class_weight": config.class_weight,
        "class_cost": config.class_weight,
        "no_object_weight": config.no_object_weight,
        "classification": "softmax",
        "focal_alpha": 0.25,
        "target_mode": "bilinear",
        "box_cost": 0.0,
        "giou_cost": 0.0,
        "box_weight": 0.0,
        "giou_weight": 0.0,
        "groups": 1,
        "contrastive_weight": getattr(config, "contrastive_weight", 0.0),
    }


def _rf_detr(config: Any) -> dict[str, Any]:
    return {
        "num_points": None,
        "area_per_point": config.mask_point_sample_ratio,
        "matcher_points": None,
        "oversample_ratio": rf_detr.OVERSAMPLE_RATIO,
        "importance_ratio": rf_detr.IMPORTANCE_RATIO,
        "mask_weight": config.mask_class_loss_coefficient,
        "dice_weight": config.mask_dice_loss_coefficient,
        "class_weight": config.class_loss_coefficient,
        "class_cost": config.class_cost,
        "no_object_weight": 0.0,
        "classification": "quality",
        "focal_alpha": config.focal_alpha,
        "target_mode": "nearest",
        "box_cost": config.bbox_cost,
        "giou_cost": config.giou_cost,
        "box_weight": config.bbox_loss_coefficient,
        "giou_weight": config.giou_loss_coefficient,
        "groups": config.group_detr,
        "contrastive_weight": 0.0,
    }
