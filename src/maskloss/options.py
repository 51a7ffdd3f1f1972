"""The options that all losses and matchers share, written and documented once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from typing_extensions import Unpack

from maskloss import _abi, _inputs
from maskloss._numbers import check_flags, check_integer, check_number
from maskloss.errors import Cause, Unexpected, describe, reported_init
from maskloss.ops import check_backend

# Mask2Former's weights, for the loss and for the matching.
CLASS_WEIGHT, MASK_WEIGHT, DICE_WEIGHT = 2.0, 5.0, 5.0
# The focal loss of classes by sigmoids, for the loss and for the matching (Lin et al., 2017).
CLASS_FOCAL_ALPHA, CLASS_FOCAL_GAMMA = 0.25, 2.0

PADDING_MODES, TARGET_MODES, DICE_KINDS = _abi.PADDING_MODES, _abi.TARGET_MODES, _abi.DICE_KINDS


@reported_init
@dataclass(frozen=True)
class MaskOptions:
    """How the mask terms of a loss or of a matching cost read their points, and which cross-entropy and Dice they use.

    `MaskLoss`, `HungarianMatcher`, `MaskCriterion` and the classes of `maskloss.integrations` take them as one group,
    `options=MaskOptions(...)`, or one by one under the same names.

    Args:
        padding_mode: what lies outside a map: "zeros" (default) or "border", its nearest pixel.
        target_mode: how targets are read: "bilinear" (default) or "nearest".
        focal_alpha: alpha of the focal loss in [0, 1]; needs `focal_gamma`. Default None: no class balance.
        focal_gamma: use the focal loss with this exponent instead of the cross-entropy. Default None: off.
        dice: "standard" (default), or a kind that is smallest at the target also where that is between 0 and 1: "soft",
            with squares in the denominator, or "semimetric", which equals "standard" where targets are 0 or 1.
        backend: "reference", "cpu" or "gpu". Default None: by device, or MASKLOSS_BACKEND.

    Raises:
        MaskLossError: an option outside its range, or `focal_alpha` without `focal_gamma`.

    Example:
        >>> MaskOptions(padding_mode="border").padding_mode
        'border'
    """

    padding_mode: str = "zeros"
    target_mode: str = "bilinear"
    focal_alpha: float | None = None
    focal_gamma: float | None = None
    dice: str = "standard"
    backend: str | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        _inputs.check_choice("padding_mode", self.padding_mode, PADDING_MODES)
        _inputs.check_choice("target_mode", self.target_mode, TARGET_MODES)
        _inputs.check_choice("dice", self.dice, DICE_KINDS)
        if self.backend is not None:
            check_backend(self.backend)
        if self.focal_alpha is not None and self.focal_gamma is None:
            raise Cause(
                "focal_alpha needs focal_gamma", "focal_gamma is None", "focal_gamma=2.0 is usual; 0.0 only weighs"
            )
        if self.focal_alpha is not None:
            check_number("focal_alpha", self.focal_alpha, 0, 1, hint="0.25 is usual")
        if self.focal_gamma is not None:
            check_number("focal_gamma", self.focal_gamma, 0, hint="2.0 is usual")

    @property
    def focal(self) -> tuple[float, float]:
        """Alpha and gamma as the operations take them: -1 switches off."""
        return (
            -1.0 if self.focal_alpha is None else float(self.focal_alpha),
            -1.0 if self.focal_gamma is None else float(self.focal_gamma),
        )

    @property
    def term(self) -> _abi.Term:
        """What the operations take."""
        return _abi.Term(self.padding_mode, self.target_mode, *self.focal, self.dice)


class MaskKeywords(TypedDict, total=False):
    """The options of `MaskOptions` as keyword arguments."""

    padding_mode: str
    target_mode: str
    focal_alpha: float | None
    focal_gamma: float | None
    dice: str
    backend: str | None


@dataclass(frozen=True)
class TargetRules:
    """How targets are understood; `MaskCriterion` documents the options.

    Attributes:
        ignore_value: the value of void pixels in dense masks and label maps.
        ignore_label: the label of targets whose class is unknown.
        drop_empty: whether a target whose mask is empty counts as one without a mask.
        no_object_label: "warn" about targets with the label "no object", "allow" them, or "error".
    """

    ignore_value: int | None = None
    ignore_label: int | None = None
    drop_empty: bool = False
    no_object_label: str = "error"

    def __post_init__(self) -> None:
        for name in ("ignore_value", "ignore_label"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), -(2**63), hint="255 and -1 are usual; None: there is none")
        check_flags(drop_empty=self.drop_empty)
        _inputs.check_choice("no_object_label", self.no_object_label, ("warn", "allow", "error"))

    def check_matcher(self, matcher: TargetRules) -> None:
        """Raise if a matcher was told something else than its criterion, whose rules hold for both."""
        for name in _RULE_NAMES:
            theirs, own = getattr(matcher, name), getattr(self, name)
            # By identity: 0 is a label and a value of pixels.
            if theirs is not None and theirs is not False and theirs != own:
                raise Cause(
                    f"matcher and criterion must have the same {name}",
                    f"the matcher has {theirs!r}, the criterion {own!r}",
                    f"give {name} to the criterion, which tells its matcher",
                )


def differing(*groups: Any) -> dict[str, Any]:
    """List the fields of groups of options that are not as they are by default, for a `repr`."""
    given = [(each, getattr(group, each.name)) for group in groups if group is not None for each in fields(group)]
    return {each.name: value for each, value in given if value != each.default}


def told(*groups: Any, **more: Any) -> str:
    """Write such fields, and what else is not None, behind other parts of a `repr`."""
    shown = {name: value for name, value in more.items() if value is not None} | differing(*groups)
    return "".join(f", {name}={value!r}" for name, value in shown.items())


class TargetKeywords(MaskKeywords, total=False):
    """The options of `MaskOptions`, and those of targets, as keyword arguments."""

    ignore_value: int | None
    ignore_label: int | None
    drop_empty: bool


_NAMES = tuple(field.name for field in fields(MaskOptions))
_RULE_NAMES = tuple(name for name in TargetKeywords.__annotations__ if name not in _NAMES)


def mask_options(options: MaskOptions | None, **kwargs: Unpack[MaskKeywords]) -> MaskOptions:
    """Take the options as a group or one by one.

    Raises:
        Unexpected: a keyword that is no option.
        Cause: both a group and single options, or something else than a group.
    """
    return all_options(options, kwargs, ())[0]


def all_options(
    options: MaskOptions | None,
    kwargs: TargetKeywords | MaskKeywords,
    rules: Sequence[str] = _RULE_NAMES,
    no_object_label: str = "error",
) -> tuple[MaskOptions, TargetRules]:
    """Take the options as a group or as keywords, and those of targets, as far as `rules` names them."""
    unknown = [name for name in kwargs if name not in (*_NAMES, *rules)]
    if unknown:
        raise Unexpected(unknown[0], (*_NAMES, *rules))
    given: dict[str, Any] = {name: value for name, value in kwargs.items() if name not in rules}
    understood: dict[str, Any] = {name: value for name, value in kwargs.items() if name in rules}
    found = TargetRules(**understood, no_object_label=no_object_label)
    if options is None:
        return MaskOptions(**given), found
    if not isinstance(options, MaskOptions):
        raise Cause("options must be a MaskOptions", f"got {describe(options)}", 'MaskOptions(padding_mode="border")')
    if given:
        raise Cause(
            "give a group of options, or single ones",
            f"options and {', '.join(given)} were given",
            "dataclasses.replace(options, ...) changes one of a group",
        )
    return options, found
