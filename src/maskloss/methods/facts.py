"""What a text on the method says, in which order: keys of sentences, with what fills their slots.

Nothing here is in any language. A language is a table from keys to sentences, such as `english.SENTENCES`. In a
sentence, `$z$` is a formula, `[@key,key]` cites works together, `{name}` is a slot and `{name%}` one that holds a
share, `{#name}` is the number of an equation, `{=name,name}` refers to equations if they are displayed, and `~` is a
space that ties two words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from maskloss.methods import formulas
from maskloss.methods.markup import Markup, amount, tex
from maskloss.methods.settings import Classification, Matching, MethodSettings, Points, Training

_SPECIAL = re.compile(r"\$(?P<latex>[^$]+)\$|\[@(?P<works>[\w,]+)\]|\{(?P<mark>[#=]?)(?P<names>[\w,]+)(?P<share>%?)\}")


@dataclass(frozen=True)
class Say:
    """A sentence or a part of one."""

    key: str  # in the table of a language
    slots: Mapping[str, Slot] = field(default_factory=dict)  # what fills its slots and those of its parts


class Formula(str):
    """An inline formula in LaTeX."""

    __slots__ = ()


# Sentences and parts that the short style leaves out.
LEFT_OUT = (
    "points.following", "points.without_importance", "points.candidates", "points.candidates.all",
    "reading.bilinear.zeros", "loss.divided", "symbol.softmax", "matching.points",
)  # fmt: skip
# None is left out; a plain text is a name that comes from outside.
Slot = Say | Formula | str | int | float | None


class Paragraph(NamedTuple):
    """A paragraph, and what is around it."""

    title: str | None  # its key
    sentences: list[Say]
    equations: list[str]  # which follow it


def write(slot: Slot, table: Mapping[str, str], markup: Markup, around: Mapping[str, Slot] | None = None) -> str:
    """Write a fact in the language of a table; `around` are the slots of what it is a part of."""
    match slot:
        case None:
            return ""
        case Say(key, slots):
            return _filled(table[key], {**(around or {}), **slots}, table, markup)
        case Formula():
            return markup.math(slot)
        case str():
            return markup.word(slot)
        case _:
            return amount(slot)


def _filled(text: str, slots: Mapping[str, Slot], table: Mapping[str, str], markup: Markup) -> str:
    def special(found: re.Match[str]) -> str:
        names = (found["names"] or "").split(",")
        if found["latex"]:
            return markup.math(found["latex"])
        if found["works"]:
            return markup.cite(tuple(found["works"].split(",")))
        if found["mark"] == "#":
            return markup.refer(names[0])
        if found["mark"] == "=":
            if names[0] not in markup.equations:
                return ""
            numbers = {f"number{i}": f"{{#{name}}}" for i, name in enumerate(names)}
            return _filled(table["equation" if len(names) == 1 else "equations"].format(**numbers), {}, table, markup)
        value = slots[names[0]]
        return markup.percent(value) if found["share"] else write(value, table, markup, slots)  # type: ignore[arg-type]

    # From left to right, which is how citations are numbered.
    return _SPECIAL.sub(special, text.replace("~", markup.form.tie))


def paragraphs(settings: MethodSettings, shown: str) -> list[Paragraph]:
    """Decide what is said; of equations, "none", "loss" or "all" are `shown`."""
    told: list[Paragraph] = []
    if settings.points is not None:
        reading = list(formulas.READING) if shown == "all" else []
        if not settings.points.importance_ratio and reading:
            reading.remove("uncertainty")
        loss = list(formulas.LOSS) if shown != "none" else []
        if settings.term.focal_gamma is None and loss:
            loss.remove("focal")
        supervision = [*_loss(settings), *_classes(settings.classification), *_others(settings)]
        told += [
            Paragraph("title.loss", _points(settings, settings.points, reading), reading),
            Paragraph(None, supervision, loss),
        ]
    version = Say("maskloss" if settings.version is None else "maskloss.version", vars(settings))
    matched = _matching(settings, settings.matching) if settings.matching else []
    told.append(Paragraph(None if told else "title.matching", [*matched, version], []))
    if settings.training is not None:
        told.append(Paragraph("title.training", _training(settings.training), []))
    return told


def _points(settings: MethodSettings, points: Points, equations: list[str]) -> list[Say]:
    ratio = points.importance_ratio
    keys = ["points.following" if ratio else "points.without_importance"]
    if not ratio:
        keys.append("points.uniform")
    else:
        keys += ["points.mixed", "points.candidates"] if ratio < 1 else ["points.uncertain", "points.candidates.all"]
    if points.count is None:
        keys.append("points.size")
    if points.layout == "stratified":
        keys.append("points.stratified")
    clips = settings.clips
    if clips is not None:
        keys.append(f"clips.{clips.frames if clips.unit == 'frame' else clips.unit}")
    if settings.valid_windows:
        keys.append("points.windows")
    keys.append(f"reading.{settings.term.target_mode}.{settings.term.padding_mode}")
    if equations:
        keys.append("coordinates.volume" if _unit(settings) == "volume" else "coordinates")
    uncertain = None if points.count is None else int(ratio * points.count)
    share = "share" if points.count is None else "share.counted"
    slots: dict[str, Slot] = {
        "what": Say("what.layers" if settings.layers_share else "what.masks"),
        "points": Formula(formulas.number_of_points(points)),
        "candidates": Formula(formulas.candidates(points)),
        "uncertainty": Say("uncertainty.shown" if "uncertainty" in equations else "uncertainty"),
        "uncertain": Say(share, {"share": ratio, "count": uncertain}),
        "uniform": Say(share, {"share": 1 - ratio, "count": (points.count or 0) - (uncertain or 0)}),
        "logits": Say("logits.loss"),
        **_space(settings),
    }
    return [Say(key, slots) for key in keys]


def _unit(settings: MethodSettings) -> str:
    """In what points are drawn: "image", or the unit of clips."""
    return "image" if settings.clips is None else settings.clips.unit


def _space(settings: MethodSettings) -> dict[str, Slot]:
    """Fill the slots of sentences on how points are read."""
    space = "volume" if _unit(settings) == "volume" else "plane"
    return {name: Say(f"{name}.{space}") for name in ("linearly", "pixel", "place")}


def _loss(settings: MethodSettings) -> list[Say]:
    term, clips, groups = settings.term, settings.clips, settings.matching.groups if settings.matching else 1
    counted = "groups" if settings.divisor == "targets" and groups > 1 else settings.divisor
    if clips is not None and clips.divide_by == "frames":
        counted = clips.frames
    slots: dict[str, Slot] = {
        "entropy": Say("name.ce" if term.focal_gamma is None else "name.focal"),
        "focal": Formula(formulas.focal(term)),
        "ce_weight": Formula(f"{formulas.WEIGHT_CE} = {tex(settings.ce_weight)}"),
        "dice_weight": Formula(f"{formulas.WEIGHT_DICE} = {tex(settings.dice_weight)}"),
        "summed": Say("summed.frames" if _unit(settings) == "frame" else "summed.instances"),
        "counted": Say(f"counted.{counted}", {"groups": groups}),
    }
    keys = ["loss", "loss.divided"]
    if term.dice != "standard":
        keys.append(f"dice.{term.dice}")
    if settings.ignore_regions:
        keys.append("ignored")
    return [Say(key, slots) for key in keys]


def _matching(settings: MethodSettings, matching: Matching) -> list[Say]:
    points, term, loss = matching.points, matching.term, settings.points
    keys = ["matching"]
    if loss is None or term != settings.term:
        keys.append(f"reading.{term.target_mode}.{term.padding_mode}")
        if term.focal_gamma is not None:
            keys.append("matching.focal")
    if term.dice != (settings.term.dice if loss is not None else "standard"):
        keys.append(f"matching.dice.{term.dice}")
    keys.append("matching.points")
    if _unit(settings) == "frame":
        keys.append("matching.frame")
    if loss is None:
        keys += ["points.windows"] * settings.valid_windows + ["ignored"] * settings.ignore_regions
    elif loss.layout == "stratified" and points.layout == "independent":
        keys.append("matching.independent")
    symbol = "symbol.softmax" if matching.classification == "softmax" else "symbol.focal"
    slots: dict[str, Slot] = {
        "per_group": Say("matching.groups", {"groups": matching.groups}) if matching.groups > 1 else None,
        "cost": Formula(formulas.cost(matching)),
        "symbol": Say(symbol) if matching.class_weight else None,
        "focal": Formula(formulas.focal(term)),
        "number": Formula(formulas.per_area(points)) if points.count is None else points.count,
        "drawn": Say(f"drawn.{points.layout}"),
        "per": Say(f"per.{_unit(settings)}"),
        "shared": Say("shared.layers" if settings.layers_share else "shared.queries"),
        "logits": Say("logits.cost"),
        **_space(settings),
    }
    return [Say(key, slots) for key in keys]


def _classes(classes: Classification | None) -> list[Say]:
    if classes is None:
        return []
    over = {None: "over.all", 1: "over.one"}.get(classes.num_classes, "over")
    slots: dict[str, Slot] = {
        "over": Say(over, {"count": classes.num_classes}),
        "no_object": classes.no_object_weight,
        "weight": classes.weight,
        "normalized": Say("classes.normalized") if classes.normalized == "devices" else None,
        "quality": Formula(formulas.quality(classes.focal_alpha)),
    }
    said, weights = [Say(f"classes.{classes.kind}", slots)], classes.class_weights
    if weights is not None and len(weights) <= 10:
        # The comma is one of a list of numbers, in any language.
        said.append(Say("class_weights.few", {"weights": ", ".join(map(amount, weights))}))
    elif weights is not None:
        said.append(Say("class_weights.many", {"least": min(weights), "most": max(weights)}))
    return said


def _others(settings: MethodSettings) -> list[Say]:
    said = [Say("boxes", vars(settings))] if settings.box_weight or settings.giou_weight else []
    return [*said, Say("contrastive", vars(settings))] if settings.contrastive_weight else said


def _training(run: Training) -> list[Say]:
    slots = vars(run) | {
        "millions": f"{run.parameters / 1e6:.3g}",
        "trained": Say("model.compact" if run.model is None else "model.named"),
        "start": Say("start.scratch" if run.pretrained is None else "start.pretrained"),
        "data": Say("data.digits") if run.digits else None,
        "input": Formula(rf"{run.size} \times {run.size}"),
        "numbers": None if run.precision == "no" else Say(f"precision.{run.precision}"),
        "backbone": _backbone(run),
        "clipped": Say("clip") if run.clip else None,
        "rise": Say("rise") if run.warmup else None,
    }
    keys = ["training", "optimizer", f"schedule.{run.schedule}"]
    if not run.digits:
        key, more = _augmentation(run)
        keys.append(key)
        slots |= more
    keys += [key for key in ("planned", "ema_decay", "best") if slots[key] is not None]
    return [Say(key, slots) for key in keys]


def _backbone(run: Training) -> Say | None:
    if run.backbone_share == 0:
        return Say("backbone.frozen")
    if run.layer_decay < 1:
        return Say("backbone.layers")
    return None if run.backbone_share == 1 else Say("backbone")


def _augmentation(run: Training) -> tuple[str, dict[str, Slot]]:
    changed, crop = run.augmentation, run.crop
    if changed is None:
        return ("crops", {"cropped": Formula(rf"{crop} \times {crop}")}) if crop else ("augmentation.none", {})
    least, most = (each if crop is None else round(each * crop) for each in (changed.smallest, changed.largest))
    side = Say("side.crop" if crop else "side.image", {"least": least, "most": most})
    return "augmentation", {"side": side, "flips": Say("flips.turns" if changed.turns else "flips")}
