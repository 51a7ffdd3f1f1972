"""Where settings come from: options by name, a file, a training run, a Transformers configuration."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from maskloss.criterion import MaskCriterion
from maskloss.errors import Cause, reported, require
from maskloss.loss import MaskLoss
from maskloss.matcher import HungarianMatcher
from maskloss.methods.settings import (
    NOT_DESCRIBED,
    Classification,
    MaskTerm,
    Matching,
    MethodSettings,
    Points,
    settings_of,
)
from maskloss.points import PointSampling

# What a paragraph can be about.
SUBJECTS = {"criterion": MaskCriterion, "loss": MaskLoss, "matcher": HungarianMatcher}
TARGETS = ("valid_windows", "ignore_regions")


def option_names(subject: str = "criterion") -> dict[str, Any]:
    """List the options of a subject by name, with their defaults; those of the sampling are among them."""
    listed = _defaults(SUBJECTS[subject])
    if listed.pop("sampling", 0) is None:
        listed |= {each.name: each.default for each in fields(PointSampling)}
    listed |= dict.fromkeys(TARGETS, False)
    return {name: default for name, default in listed.items() if name not in NOT_DESCRIBED | {"matcher"}}


def matcher_options() -> dict[str, Any]:
    """List the options of the matcher by name, with their defaults."""
    return {name: default for name, default in _defaults(HungarianMatcher).items() if name not in NOT_DESCRIBED}


@reported("methods")
def settings_from(options: Mapping[str, Any], subject: str = "criterion") -> MethodSettings:
    """Make settings from options by name.

    Args:
        options: names and values of the options of `MaskCriterion` (or `MaskLoss`, `HungarianMatcher`), those of
            `PointSampling` among them or under "sampling", "matcher" with a mapping of its options, and "valid_windows"
            and "ignore_regions".
        subject: what the paragraph is about: "criterion" (default), "loss" or "matcher".

    Returns:
        The settings; what is not given has its default. Without "num_classes" the paragraph does not name their number.

    Raises:
        MaskLossError: an unknown option, or a value outside its range.

    Example:
        >>> settings_from({"num_points": 4096, "mask_weight": 2.0}).points.count
        4096
    """
    given = dict(options)
    targets = {name: bool(given.pop(name)) for name in TARGETS if name in given}
    known = option_names(subject)
    own_matcher = given.pop("matcher", {}) if subject == "criterion" else {}
    nested = given.pop("sampling", {}) if subject != "matcher" else {}
    for name, value in (("matcher", own_matcher), ("sampling", nested)):
        if not isinstance(value, Mapping):
            raise Cause(f"{name} must be a mapping of options", f"got {value!r}", f"{name}: {{num_points: 4096}}")
    given |= nested
    _refuse_unknown(given, known, subject)
    _refuse_unknown(own_matcher, matcher_options(), "matcher")
    if subject == "matcher":
        settings = settings_of(HungarianMatcher(**given))
    else:
        drawn = {each.name: given.pop(each.name) for each in fields(PointSampling) if each.name in given}
        settings = _of_module(given, PointSampling(**drawn), own_matcher, subject)
    return settings.with_targets(targets.get("valid_windows", False), targets.get("ignore_regions", False))


def _of_module(
    given: dict[str, Any], sampling: PointSampling, own_matcher: Mapping[str, Any], subject: str
) -> MethodSettings:
    if subject == "loss":
        return settings_of(MaskLoss(sampling=sampling, **given))
    counted = "num_classes" in given
    classes = given.pop("num_classes", None) or len(given.get("class_weights") or (0,))
    criterion = MaskCriterion(classes, sampling=sampling, **given)
    if own_matcher:
        inherited = {name: given[name] for name in matcher_options() if name in given}
        inherited["num_points"] = sampling.num_points
        criterion = MaskCriterion(
            classes, sampling=sampling, **given, matcher=HungarianMatcher(**(inherited | dict(own_matcher)))
        )
    settings = settings_of(criterion)
    if not counted and settings.classification is not None:
        settings = replace(settings, classification=replace(settings.classification, num_classes=None))
    return settings


def options_of_file(path: Path) -> dict[str, Any]:
    """Read options by name from a JSON or YAML file.

    Raises:
        MaskLossError: a file that is not there, or does not hold a mapping.
        MissingExtraError: a YAML file, and PyYAML is not installed (extra `methods`).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise Cause("the configuration must be readable", f"{path}: {error.strerror}", "name a file") from None
    content = _parsed(path, text)
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise Cause(
            "the configuration must be a mapping of option names",
            f"{path} holds {type(content).__name__}",
            "num_points: 12544",
        )
    return content


def _parsed(path: Path, text: str) -> Any:
    if path.suffix in {".yaml", ".yml"}:
        yaml = require("yaml", "methods")
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise Cause("the configuration must be YAML", f"{path}: {error}", "indent with spaces") from None
    try:
        return json.loads(text)
    except ValueError as error:
        raise Cause("the configuration must be JSON", f"{path}: {error}", "YAML files end in .yaml") from None


@reported("methods")
def settings_of_model(model: str) -> MethodSettings:
    """Read the settings of a model of Transformers, with maskloss computing its loss, from its configuration.

    Args:
        model: a folder with config.json, or the name of a model on the Hugging Face Hub.

    Returns:
        The settings.

    Raises:
        MaskLossError: a model of another family, or one that cannot be found.
        MissingExtraError: Transformers is not installed (extra `transformers`).
    """
    from maskloss.integrations.transformers.options import method_options, read_config

    return settings_of_options(method_options(read_config(model)))


def settings_of_options(options: Mapping[str, Any]) -> MethodSettings:
    """Bring what the integration reads from a model's configuration into the form of the paragraph."""
    term = MaskTerm(target_mode=options["target_mode"])
    area, count = options["area_per_point"], options["num_points"]
    return MethodSettings(
        points=Points(count, area, options["oversample_ratio"], options["importance_ratio"]),
        ce_weight=options["mask_weight"],
        dice_weight=options["dice_weight"],
        term=term,
        classification=Classification(
            kind=options["classification"],
            weight=options["class_weight"],
            no_object_weight=options["no_object_weight"],
            num_classes=options["num_classes"],
            normalized="device",
            focal_alpha=options["focal_alpha"],
        ),
        matching=Matching(
            class_weight=options["class_cost"],
            mask_weight=options["mask_weight"],
            dice_weight=options["dice_weight"],
            points=Points(options["matcher_points"], area),
            classification="softmax" if options["classification"] == "softmax" else "focal",
            term=term,
            box_weight=options["box_cost"],
            giou_weight=options["giou_cost"],
            groups=options["groups"],
        ),
        divisor="targets",
        contrastive_weight=options["contrastive_weight"],
        box_weight=options["box_weight"],
        giou_weight=options["giou_weight"],
    )


def _defaults(kind: type[Any]) -> dict[str, Any]:
    """List the options of a constructor and their defaults; None where there is none."""
    listed = inspect.signature(kind).parameters.values()
    return {each.name: None if each.default is each.empty else each.default for each in listed}


def _refuse_unknown(given: Mapping[str, Any], known: Mapping[str, Any], subject: str) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise Cause(
            f"every option must be one of the {subject}", f"unknown: {', '.join(unknown)}", f"known: {', '.join(known)}"
        )
