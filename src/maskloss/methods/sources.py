"""Where settings come from: options by name, or the configuration of a Transformers model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from maskloss._numbers import check_number
from maskloss.clips import ClipOptions
from maskloss.criterion import MaskCriterion
from maskloss.errors import Cause, describe, reported, require
from maskloss.loss import MaskLoss
from maskloss.matcher import HungarianMatcher
from maskloss.methods.settings import NOT_DESCRIBED, Classification, Matching, MethodSettings, Points, settings_of
from maskloss.options import MaskOptions
from maskloss.points import PointSampling

# What a text can be about.
SUBJECTS = {"criterion": MaskCriterion, "loss": MaskLoss, "matcher": HungarianMatcher}
TARGETS = ("valid_windows", "ignore_regions")
# What constructors take as a group is listed one by one.
GROUPS: dict[str, type[Any]] = {"sampling": PointSampling, "clips": ClipOptions, "options": MaskOptions}
# Options whose value is a list of numbers; it may have this many.
_LISTS, _LONGEST_LIST = frozenset({"class_weights"}), 100_000
# No option makes sense beyond it, and some would ask for memory.
_LARGEST = 10_000_000


def option_names(subject: str = "criterion") -> dict[str, Any]:
    """List the options of a subject by name, with their defaults; those of its groups are among them."""
    listed = _defaults(SUBJECTS[subject]) | dict.fromkeys(TARGETS, False)
    return {name: default for name, default in listed.items() if name not in NOT_DESCRIBED | {"matcher"}}


def matcher_options() -> dict[str, Any]:
    """List the options of the matcher by name, with their defaults."""
    return {name: default for name, default in _defaults(HungarianMatcher).items() if name not in NOT_DESCRIBED}


@reported("methods")
def settings_from(options: Mapping[str, Any], subject: str = "criterion") -> MethodSettings:
    """Make settings from options by name.

    Args:
        options: names and values of the options of `MaskCriterion` (or `MaskLoss`, `HungarianMatcher`), those of
            `PointSampling`, `ClipOptions` and `MaskOptions` among them or under "sampling", "clips" and "options",
            "matcher" with a mapping of its options, and "valid_windows" and "ignore_regions". None stands for the
            default.
        subject: what the text is about: "criterion" (default), "loss" or "matcher".

    Returns:
        The settings; what is not given has its default. Without "num_classes" the text does not name their number.

    Raises:
        MaskLossError: an unknown option, one that is given twice, or a value outside its range.

    Example:
        >>> settings_from({"num_points": 4096, "mask_weight": 2.0}).points.count
        4096
    """
    given = dict(options)
    known = option_names(subject)
    own_matcher = _mapping("matcher", given.pop("matcher", {})) if subject == "criterion" else {}
    for group in GROUPS.keys() & inspect.signature(SUBJECTS[subject]).parameters.keys():
        members = _mapping(group, given.pop(group, {}))
        twice = [name for name in members if name in given]
        if twice:
            raise Cause("every option must be given once", f"{twice[0]} is also in {group}", "leave one of them out")
        given |= members
    given = _checked(given, known, subject)
    own_matcher = _checked(own_matcher, matcher_options(), "matcher")
    targets = {name: given.pop(name, False) for name in TARGETS}
    return _of_module(given, own_matcher, subject).with_targets(**targets)


def _mapping(name: str, value: object) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise Cause(f"{name} must be a mapping of options", f"got {describe(value)}", f"{name}: {{num_points: 4096}}")
    return value


def _checked(given: Mapping[Any, Any], known: Mapping[str, Any], subject: str) -> dict[str, Any]:
    """Check names, and values as far as their kind; the constructors check the rest.

    Values come from files, where anything may stand for a number.
    """
    unknown = [name for name in given if name not in known]
    if unknown:
        raise Cause(
            f"every option must be one of the {subject}",
            f"unknown: {describe(unknown[0])}",
            f"known: {', '.join(known)}",
        )
    for name, value in given.items():
        wanted = "true or false" if name in TARGETS else "a list of numbers" if name in _LISTS else "a number or a word"
        if value is not None and not _is_of_kind(name, value):
            raise Cause(f"{name} must be {wanted}", f"got {describe(value)}", f"numbers reach up to {_LARGEST:,}")
    return {name: value for name, value in given.items() if value is not None}


def _is_of_kind(name: str, value: object) -> bool:
    if name in TARGETS:
        return isinstance(value, bool)
    if name in _LISTS:
        return isinstance(value, list) and 0 < len(value) <= _LONGEST_LIST and all(map(_is_usable, value))
    return _is_usable(value) or (isinstance(value, str) and len(value) <= 40)


def _is_usable(value: object) -> bool:
    # The comparison first: it holds for integers that no float can hold.
    return type(value) in {int, float} and -_LARGEST <= value <= _LARGEST  # type: ignore[operator]


def _of_module(given: dict[str, Any], own_matcher: Mapping[str, Any], subject: str) -> MethodSettings:
    if subject != "criterion":
        return settings_of(_made(SUBJECTS[subject], given))
    counted = "num_classes" in given
    if not counted:
        given = {**given, "num_classes": len(given.get("class_weights", (0,)))}
    matcher = None
    if own_matcher:
        inherited = {name: given[name] for name in matcher_options() if name in given}
        matcher = _made(HungarianMatcher, inherited | dict(own_matcher))
    settings = settings_of(_made(MaskCriterion, {**given, "matcher": matcher}))
    if not counted and settings.classification is not None:
        settings = replace(settings, classification=replace(settings.classification, num_classes=None))
    return settings


@reported("methods")
def settings_of_model(model: str) -> MethodSettings:
    """Read the settings of a model of Transformers, with maskloss computing its loss, from its configuration.

    Args:
        model: a folder with config.json, or the name of a model on the Hugging Face Hub.

    Returns:
        The settings.

    Raises:
        MaskLossError: a model of another family, one that cannot be found, or values that are no numbers.
        MissingExtraError: Transformers is not installed (extra `transformers`).
    """
    return settings_of_config(_read_config(model))


def _read_config(model: str) -> Any:
    transformers = require("transformers", "transformers")
    try:
        return transformers.AutoConfig.from_pretrained(model)
    except Exception as error:  # noqa: BLE001 (a damaged file can make Transformers raise anything)
        text = " ".join(str(error).split()) or type(error).__name__
        raise Cause(
            "the model must have a configuration that Transformers can read",
            f"{model}: {text if len(text) <= 160 else text[:157] + '...'}",
            "a newer Transformers may know the model"
            if Path(model).exists()
            else "name a folder with config.json, or a model on the Hub",
        ) from None


# Types of configurations of the families that share one criterion; OneFormer adds a contrastive term.
_UNIVERSAL = ("mask2former", "oneformer", "eomt", "eomt_dinov3", "videomt")


def settings_of_config(config: Any) -> MethodSettings:
    """Read the settings from a configuration of Transformers.

    Raises:
        MaskLossError: a configuration of a model whose loss maskloss does not compute, or values that are no numbers.
    """
    kind = getattr(config, "model_type", type(config).__name__)
    if kind in _UNIVERSAL:
        return _of_universal(config)
    if kind == "rf_detr":
        return _of_rf_detr(config)
    from maskloss.integrations.transformers.families import supported

    raise Cause("the model must be of a supported family", f"it is {describe(kind)}", f"supported: {supported()}")


def _number(config: Any, name: str, least: float = 0.0) -> float:
    return check_number(name, getattr(config, name, None), least, _LARGEST, hint="see the config.json of the model")


def _count(config: Any, name: str) -> int:
    return int(_number(config, name, 1))


def criterion_of_config(config: Any, class_weights: Sequence[float] | None = None) -> MaskCriterion:
    """Make a criterion with the settings of a configuration of Mask2Former or its kin."""
    oversample, importance = (_number(config, name) for name in ("oversample_ratio", "importance_sample_ratio"))
    return MaskCriterion(
        _count(config, "num_labels"),
        class_weight=_number(config, "class_weight"),
        mask_weight=_number(config, "mask_weight"),
        dice_weight=_number(config, "dice_weight"),
        no_object_weight=_number(config, "no_object_weight"),
        class_weights=class_weights,
        sampling=PointSampling(_count(config, "train_num_points"), oversample, importance),
    )


def _of_universal(config: Any) -> MethodSettings:
    found = settings_of(criterion_of_config(config))
    assert found.classification is not None
    return replace(
        found,
        classification=replace(found.classification, normalized="device"),
        divisor="targets",
        contrastive_weight=_number(config, "contrastive_weight") if hasattr(config, "contrastive_weight") else 0.0,
    )


def _of_rf_detr(config: Any) -> MethodSettings:
    from maskloss.integrations.transformers import rf_detr

    area = _count(config, "mask_point_sample_ratio")
    mask_weight = _number(config, "mask_class_loss_coefficient")
    dice_weight = _number(config, "mask_dice_loss_coefficient")
    term = MaskOptions(target_mode="nearest")
    return MethodSettings(
        points=Points(None, area, rf_detr.OVERSAMPLE_RATIO, rf_detr.IMPORTANCE_RATIO),
        ce_weight=mask_weight,
        dice_weight=dice_weight,
        term=term,
        classification=Classification(
            kind="quality",
            weight=_number(config, "class_loss_coefficient"),
            num_classes=_count(config, "num_labels"),
            normalized="device",
            focal_alpha=_number(config, "focal_alpha"),
        ),
        matching=Matching(
            class_weight=_number(config, "class_cost"),
            mask_weight=mask_weight,
            dice_weight=dice_weight,
            points=Points(None, area),
            classification="focal",
            term=term,
            box_weight=_number(config, "bbox_cost"),
            giou_weight=_number(config, "giou_cost"),
            groups=_count(config, "group_detr"),
        ),
        divisor="targets",
        box_weight=_number(config, "bbox_loss_coefficient"),
        giou_weight=_number(config, "giou_loss_coefficient"),
    )


def _defaults(kind: type[Any]) -> dict[str, Any]:
    """List the options of a constructor, those of groups one by one, and their defaults; None where there is none."""
    parameters = inspect.signature(kind).parameters
    listed = {name: None if each.default is each.empty else each.default for name, each in parameters.items()}
    for name in parameters.keys() & GROUPS.keys():
        del listed[name]
    listed.pop("kwargs")
    return listed | {
        each.name: each.default for name, group in GROUPS.items() if name in parameters for each in fields(group)
    }


def _made(kind: type[Any], given: dict[str, Any]) -> Any:
    """Call a constructor with options one by one."""
    given = dict(given)
    for name in GROUPS.keys() & inspect.signature(kind).parameters.keys():
        members = {each.name: given.pop(each.name) for each in fields(GROUPS[name]) if each.name in given}
        if members:
            given[name] = GROUPS[name](**members)
    return kind(**given)
