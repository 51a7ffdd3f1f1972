"""What a text on the method says, in which order: keys of sentences, with what fills their slots.

Nothing here is in any language. A language is a table from keys to sentences, such as `english.SENTENCES`; a sentence
that is empty there is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from maskloss.methods import formulas
from maskloss.methods.markup import Markup, amount, tex
from maskloss.methods.settings import Classification, Matching, MethodSettings, Points, Training
from maskloss.options import MaskOptions


class Math(NamedTuple):
    """An inline formula in LaTeX."""

    latex: str


class Percent(NamedTuple):
    """A share as a percentage."""

    share: float


class Cite(NamedTuple):
    """Works that are cited together, by their keys."""

    keys: tuple[str, ...]


class Number(NamedTuple):
    """The number of a displayed equation."""

    name: str


@dataclass(frozen=True)
class Say:
    """A sentence or a part of one: its key in the table of a language, and what fills the slots."""

    key: str
    slots: Mapping[str, Slot] = field(default_factory=dict)


# None is left out.
Slot = Say | Math | Percent | Cite | Number | str | int | float | None


def say(key: str, **slots: Slot) -> Say:
    """Make a `Say`."""
    return Say(key, slots)


class Paragraph(NamedTuple):
    """A title's key, sentences, and the equations that follow them."""

    title: str | None
    sentences: list[Say]
    equations: list[str]


def write(slot: Slot, table: Mapping[str, str], markup: Markup) -> str:
    """Write a fact in the language of a table; `{name}` is a slot, and `~` a space that ties two words."""
    match slot:
        case None:
            return ""
        case Say(key, slots):
            text = table[key].replace("~", markup.form.tie)
            # From left to right, which is how citations are numbered.
            return re.sub(r"\{(\w+)\}", lambda found: write(slots[found[1]], table, markup), text)
        case Math(latex):
            return markup.math(latex)
        case Percent(share):
            return markup.percent(share)
        case Cite(keys):
            return markup.cite(keys)
        case Number(name):
            return markup.refer(name)
        case str():
            return markup.word(slot)
        case _:
            return amount(slot)


def paragraphs(settings: MethodSettings, shown: str) -> list[Paragraph]:
    """Decide what is said.

    Args:
        settings: what it is about.
        shown: which equations are displayed, "none", "loss" or "all".
    """
    told: list[Paragraph] = []
    if settings.points is not None:
        reading = list(formulas.READING) if shown == "all" else []
        if not settings.points.importance_ratio and reading:
            reading.remove("uncertainty")
        loss = list(formulas.LOSS) if shown != "none" else []
        if settings.term.focal_gamma is None and loss:
            loss.remove("focal")
        told += [
            Paragraph("title.loss", _points(settings, settings.points, reading), reading),
            Paragraph(None, [*_loss(settings, loss), *_classes(settings), *_others(settings)], loss),
        ]
    matched = _matching(settings, settings.matching) if settings.matching else []
    told.append(Paragraph(None if told else "title.matching", [*matched, _version(settings)], []))
    if settings.training is not None:
        told.append(Paragraph("title.training", _training(settings.training), []))
    return told


def _equation(key: str, names: list[str], *wanted: str) -> Say | None:
    """Refer to equations that are displayed."""
    numbers: dict[str, Slot] = {f"number{i}": Number(name) for i, name in enumerate(wanted)}
    return Say(key, numbers) if wanted[0] in names else None


def _points(settings: MethodSettings, points: Points, equations: list[str]) -> list[Say]:
    pointrend, mask2former = "kirillov2020pointrend", "cheng2022mask2former"
    papers = (pointrend, mask2former) if points.importance_ratio else (mask2former,)
    slots: dict[str, Slot] = {
        "what": say("what.layers" if settings.layers_share else "what.masks"),
        "pointrend": Cite((pointrend,)),
        "mask2former": Cite((mask2former,)),
        "papers": Cite(papers),
        "number": Math(formulas.number_of_points(points)),
    }
    said = [Say("points.following" if points.importance_ratio else "points.without_importance", slots)]
    said += _drawn(points, slots, equations)
    if points.count is None:
        said.append(say("points.size", size=Math(formulas.SIZE)))
    if points.layout == "stratified":
        said.append(say("points.stratified"))
    if settings.clips is not None:
        clips = settings.clips
        said.append(say(f"clips.{clips.frames if clips.unit == 'frame' else clips.unit}"))
    if settings.valid_windows:
        said.append(say("points.windows"))
    volumes = settings.clips is not None and settings.clips.unit == "volume"
    said.append(_reading(settings.term, "loss", volumes=volumes))
    return [*said, _coordinates()] if equations else said


def _drawn(points: Points, slots: Mapping[str, Slot], equations: list[str]) -> list[Say]:
    ratio, count = points.importance_ratio, points.count
    if not ratio:
        return [Say("points.uniform", slots)]
    apart = _equation("of_equation", equations, "uncertainty")
    slots = {
        **slots,
        "uncertainty": say("uncertainty", u=Math("U(z)" if apart else formulas.UNCERTAINTY), equation=apart),
        "candidates": Math(formulas.candidates(points)),
        "z": Math("z"),
    }
    if ratio == 1:
        return [Say("points.uncertain", slots), Say("points.candidates.all", slots)]
    if count is None:
        slots["uncertain"] = say("share", share=Percent(ratio))
        slots["uniform"] = say("share", share=Percent(1 - ratio))
    else:
        uncertain = int(ratio * count)
        slots["uncertain"] = say("share.counted", share=Percent(ratio), count=uncertain)
        slots["uniform"] = say("share.counted", share=Percent(1 - ratio), count=count - uncertain)
    return [Say("points.mixed", slots), Say("points.candidates", slots)]


def _reading(term: MaskOptions, whose: str, *, volumes: bool = False) -> Say:
    key = "reading.volume" if volumes else f"reading.{term.target_mode}.{term.padding_mode}"
    return say(key, logits=say(f"logits.{whose}"), z=Math("z"), t=Math("t"))


def _coordinates() -> Say:
    return say(
        "coordinates",
        point=Math(r"(x, y) \in [0, 1]^2"),
        h=Math("h"),
        w=Math("w"),
        number0=Number("coordinates"),
        number1=Number("interpolation"),
    )


def _loss(settings: MethodSettings, equations: list[str]) -> list[Say]:
    if settings.term.focal_gamma is None:
        entropy = say("name.ce", equation=_equation("equation", equations, "ce"))
    else:
        entropy = say(
            "name.focal",
            lin=Cite(("lin2017focal",)),
            parameters=Math(formulas.focal(settings.term)),
            equation=_equation("equations", equations, "ce", "focal"),
        )
    by_frame = settings.clips is not None and settings.clips.divide_by == "frames"
    slots = {
        "total": _equation("equation", equations, "total"),
        "entropy": entropy,
        "vnet": Cite(("milletari2016vnet",)),
        "dice": _equation("equation", equations, "dice"),
        "ce_weight": Math(f"{formulas.WEIGHT_CE} = {tex(settings.ce_weight)}"),
        "dice_weight": Math(f"{formulas.WEIGHT_DICE} = {tex(settings.dice_weight)}"),
        "n": Math("N"),
        "counted": say(f"counted.{'frames' if by_frame else settings.divisor}", n=Math("N")),
    }
    said = [Say("loss", slots), Say("loss.divided", slots)]
    if settings.term.dice != "standard":
        said.append(say(f"dice.{settings.term.dice}", wang=Cite(("wang2023dice",))))
    return [*said, _ignored()] if settings.ignore_regions else said


def _ignored() -> Say:
    return say("ignored", w=Math("w_{np}"))


def _matching(settings: MethodSettings, matching: Matching) -> list[Say]:
    points, term = matching.points, matching.term
    slots = {
        "papers": Cite(("carion2020detr", "kuhn1955hungarian")),
        "groups": say("matching.groups", groups=matching.groups) if matching.groups > 1 else None,
        "cost": Math(formulas.cost(matching)),
        "symbol": _class_symbol(matching),
        "number": Math(formulas.per_area(points)) if points.count is None else points.count,
        "drawn": say(f"drawn.{points.layout}"),
        "shared": say("shared.layers" if settings.layers_share else "shared.queries"),
    }
    said = [Say("matching", slots)]
    if settings.points is None or term != settings.term:
        volumes = settings.clips is not None and settings.clips.unit == "volume"
        said.append(_reading(term, "cost", volumes=volumes))
        if term.focal_gamma is not None:
            said.append(say("matching.focal", lin=Cite(("lin2017focal",)), parameters=Math(formulas.focal(term))))
    if term.dice != (settings.term.dice if settings.points is not None else "standard"):
        said.append(say(f"matching.dice.{term.dice}", wang=Cite(("wang2023dice",))))
    said.append(Say("matching.points", slots))
    if settings.clips is not None:
        said.append(say(f"matching.{settings.clips.unit}"))
    if settings.points is None:
        said += [say("points.windows")] if settings.valid_windows else []
        said += [_ignored()] if settings.ignore_regions else []
    elif settings.points.layout == "stratified" and points.layout == "independent":
        said.append(say("matching.independent"))
    return said


def _class_symbol(matching: Matching) -> Say | None:
    if not matching.class_weight:
        return None
    if matching.classification == "softmax":
        return say("symbol.softmax", p=Math("p(c)"))
    return say("symbol.focal", f=Math(formulas.FOCAL_COST), lin=Cite(("lin2017focal",)))


def _classes(settings: MethodSettings) -> list[Say]:
    classes = settings.classification
    if classes is None:
        return []
    over = say("over.all") if classes.num_classes is None else say("over", count=classes.num_classes)
    if classes.kind == "softmax":
        said = say(
            "classes.softmax",
            over=over,
            no_object=classes.no_object_weight,
            weight=classes.weight,
            normalized=say("classes.normalized") if classes.normalized == "devices" else None,
        )
    elif classes.kind == "focal":
        parameters = Math(formulas.FOCAL_CLASSES)
        said = say(
            "classes.focal",
            lin=Cite(("lin2017focal",)), over=over, parameters=parameters, weight=classes.weight, n=Math("N"),
        )  # fmt: skip
    else:
        quality = Math(formulas.quality(classes.focal_alpha))
        said = say("classes.quality", over=over, weight=classes.weight, quality=quality, s=Math("s"))
    return [said, *_class_weights(classes)]


def _class_weights(classes: Classification) -> list[Say]:
    weights = classes.class_weights
    if weights is None:
        return []
    if len(weights) <= 10:
        # The comma is one of a list of numbers, in any language.
        return [say("class_weights.few", weights=", ".join(map(amount, weights)))]
    return [say("class_weights.many", least=min(weights), most=max(weights))]


def _others(settings: MethodSettings) -> list[Say]:
    said = []
    if settings.box_weight or settings.giou_weight:
        said.append(say("boxes", l1=settings.box_weight, giou=settings.giou_weight))
    if settings.contrastive_weight:
        said.append(say("contrastive", weight=settings.contrastive_weight))
    return said


def _version(settings: MethodSettings) -> Say:
    cited = Cite(("maskloss",))
    if settings.version is None:
        return say("maskloss", maskloss=cited)
    return say("maskloss.version", maskloss=cited, version=settings.version)


def _training(run: Training) -> list[Say]:
    start = say("start.scratch") if run.pretrained is None else say("start.pretrained", name=run.pretrained)
    said = [
        say(
            "training",
            model=say("model.compact") if run.model is None else say("model.named", name=run.model),
            queries=run.queries,
            parameters=run.parameters,
            start=start,
            data=say("data.digits") if run.digits else None,
            size=Math(rf"{run.size} \times {run.size}"),
            steps=run.steps,
            batch=run.batch_size,
            precision=None if run.precision == "no" else say(f"precision.{run.precision}"),
        ),
        say(
            "optimizer",
            adamw=Cite(("loshchilov2019adamw",)),
            lr=run.lr,
            backbone=_backbone(run),
            decay=run.weight_decay,
            clip=say("clip", norm=run.clip) if run.clip else None,
        ),
        say(f"schedule.{run.schedule}", rise=say("rise", share=Percent(run.warmup)) if run.warmup else None),
    ]
    if not run.digits:
        said.append(_augmentation(run))
    if run.planned is not None:
        said.append(say("planned", planned=run.planned, steps=run.steps))
    if run.ema_decay is not None:
        said.append(say("average", decay=run.ema_decay))
    if run.best is not None:
        said.append(say("kept", step=run.best))
    return said


def _backbone(run: Training) -> Say | None:
    if run.backbone_share == 0:
        return say("backbone.frozen")
    if run.layer_decay < 1:
        return say("backbone.layers", share=run.backbone_share, decay=run.layer_decay)
    return None if run.backbone_share == 1 else say("backbone", share=run.backbone_share)


def _augmentation(run: Training) -> Say:
    changed = run.augmentation
    if changed is None and run.crop is None:
        return say("augmentation.none")
    if changed is None:
        return say("crops", size=Math(rf"{run.crop} \times {run.crop}"))
    sides = (changed.smallest, changed.largest)
    least, most = sides if run.crop is None else (round(each * run.crop) for each in sides)
    return say(
        "augmentation",
        side=say("side.crop" if run.crop else "side.image", least=least, most=most),
        flips=say("flips.turns" if changed.turns else "flips"),
    )
