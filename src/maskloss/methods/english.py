"""The paragraph in English, sentence by sentence."""

from __future__ import annotations

from maskloss.methods import formulas
from maskloss.methods.markup import Markup, amount, tex
from maskloss.methods.settings import Classification, MaskTerm, Matching, MethodSettings, Points


def paragraph(settings: MethodSettings, m: Markup) -> list[str]:
    """Write the title and the sentences that apply."""
    if settings.points is None:
        sentences = [m.title("Matching at sampled points."), *_matching(settings, m)]
    else:
        title = m.title("Mask loss with point sampling.")
        sentences = [title, *_points(settings, settings.points, m), *_loss(settings, m), *_matching(settings, m)]
    return [*sentences, *_classes(settings, m), *_others(settings), *_differences(settings, m)]


def _points(settings: MethodSettings, points: Points, m: Markup) -> list[str]:
    papers = (
        f"Following PointRend{m.cite('kirillov2020pointrend')} and Mask2Former{m.cite('cheng2022mask2former')}"
        if points.importance_ratio
        else f"As in Mask2Former{m.cite('cheng2022mask2former')}, but without importance sampling"
    )
    whose = "each decoder layer's masks" if settings.layers_share else "masks"
    size = "" if points.count is not None else f" ({m.math(formulas.SIZE)} is the size of a prediction)"
    start = f"{papers}, {whose} are compared at {m.math(formulas.number_of_points(points))} points per matched instance"
    said = [f"{start}{size}{_chosen(points, m)}."]
    if points.layout == "stratified":
        said.append(
            "Uniform draws are stratified: the sampling domain is cut into as many cells of equal area as points are "
            "drawn, with one uniform point in each."
        )
    if settings.valid_windows:
        said.append("Points are drawn inside the image only, not in the padding of the batch.")
    return said


def _chosen(points: Points, m: Markup) -> str:
    if points.importance_ratio == 0:
        return ", all of them uniform"
    uncertain, uniform = formulas.shares(points)
    most = f"{m.math(formulas.candidates(points))} uniform candidates most uncertain by {m.math('U(z) = -|z|')}"
    if points.importance_ratio == 1:
        return f": those of {most}"
    first, second = m.percent(points.importance_ratio), m.percent(round(1 - points.importance_ratio, 9))
    if not uncertain:
        return f": {first} are those of {most}, and {second} are uniform"
    return f": the {uncertain} ({first}) of {most}, and {uniform} ({second}) uniform points"


def _loss(settings: MethodSettings, m: Markup) -> list[str]:
    said = [_reading(settings.term, m)]
    focal = settings.term.focal_gamma is not None
    name = (
        f"The focal loss{m.cite('lin2017focal')} with {m.math(formulas.focal(settings.term))}"
        if focal
        else "Binary cross-entropy"
    )
    ce, dice = (
        m.math(f"{symbol} = {tex(weight)}")
        for symbol, weight in (
            (formulas.WEIGHT_CE, settings.ce_weight),
            (formulas.WEIGHT_DICE, settings.dice_weight),
        )
    )
    counted = "matched instances" if settings.divisor == "matches" else "target instances"
    said.append(
        f"{name} (mean over points) and Dice{m.cite('milletari2016vnet')}, weighted {ce} and {dice}, are "
        f"divided by {m.math('N')}, the number of {counted} in the batch over all devices."
    )
    if settings.ignore_regions:
        said.append("Points in ignored regions have weight 0.")
    return said


def _reading(term: MaskTerm, m: Markup, logits: str = "Logits") -> str:
    z, t = m.math("z"), m.math("t")
    beyond = (
        "" if term.padding_mode == "zeros" else ", with the nearest pixel beyond the border where Mask2Former has 0"
    )
    if term.target_mode == "bilinear":
        return f"{logits} {z} and targets {t} are read bilinearly, each at its own resolution{beyond}."
    return (
        f"{logits} {z} are read bilinearly and targets {t}, unlike in Mask2Former, at the nearest pixel, "
        f"each at its own resolution{beyond}."
    )


def _matching(settings: MethodSettings, m: Markup) -> list[str]:
    matching = settings.matching
    if matching is None:
        return []
    papers = m.cite("carion2020detr", "kuhn1955hungarian")
    number = (
        amount(matching.points.count)
        if matching.points.count is not None
        else m.math(formulas.per_area(matching.points))
    )
    drawn = "stratified" if matching.points.layout == "stratified" else "uniform"
    shared = "" if settings.layers_share else ", shared by all queries"
    groups = f" within each of {matching.groups} groups of queries" if matching.groups > 1 else ""
    said = [
        f"Hungarian matching{papers}{groups} minimizes {m.math(formulas.cost(matching))} at {number} {drawn} points "
        f"per image{shared}{_class_symbol(matching, m)}."
    ]
    own = settings.points is None or matching.term != settings.term
    if own:
        said.append(_reading(matching.term, m, "In the cost, logits"))
        if matching.term.focal_gamma is not None:
            said.append(
                f"Focal is the focal loss{m.cite('lin2017focal')} with {m.math(formulas.focal(matching.term))}."
            )
    if settings.points is None and settings.valid_windows:
        said.append("Points are drawn inside the image only, not in the padding of the batch.")
    if settings.points is None and settings.ignore_regions:
        said.append("Points in ignored regions have weight 0.")
    if settings.points is not None and matching.points.layout != settings.points.layout and drawn == "uniform":
        said.append("The matcher's points are independent.")
    return said


def _class_symbol(matching: Matching, m: Markup) -> str:
    if not matching.class_weight:
        return ""
    if matching.classification == "softmax":
        return f", where {m.math('p(c)')} is the class probability"
    return f", where {m.math(formulas.FOCAL_COST)} is the focal cost{m.cite('lin2017focal')} of the class"


def _classes(settings: MethodSettings, m: Markup) -> list[str]:
    classes = settings.classification
    if classes is None:
        return []
    count = f" over {amount(classes.num_classes)} classes" if classes.num_classes is not None else ""
    weight = amount(classes.weight)
    if classes.kind == "softmax":
        no_object = f"{m.quote('no object')} (weight {amount(classes.no_object_weight)})"
        joined = f"{count} and {no_object}" if count else f" including {no_object}"
        said = [f"Classification is softmax cross-entropy{joined}, weighted {weight}."]
    elif classes.kind == "focal":
        focal = m.math(formulas.FOCAL_CLASSES)
        said = [
            f"Classification is a sigmoid focal loss{m.cite('lin2017focal')}{count} with {focal} and weight {weight}, "
            f"divided by {m.math('N')} as well."
        ]
    else:
        quality = m.math(formulas.quality(classes.focal_alpha))
        said = [
            f"Classification is a sigmoid cross-entropy{count} of weight {weight}, whose target is the quality "
            f"{quality} of score {m.math('s')} and box."
        ]
    return said + _class_weights(classes)


def _class_weights(classes: Classification) -> list[str]:
    weights = classes.class_weights
    if weights is None:
        return []
    if len(weights) <= 10:
        return [f"Classes are weighted by {', '.join(map(amount, weights))}."]
    return [f"Classes are weighted individually, by {amount(min(weights))} to {amount(max(weights))}."]


def _others(settings: MethodSettings) -> list[str]:
    said = []
    if settings.box_weight or settings.giou_weight:
        said.append(
            f"Boxes add an L1 loss of weight {amount(settings.box_weight)} and a GIoU loss of weight "
            f"{amount(settings.giou_weight)}."
        )
    if settings.contrastive_weight:
        said.append(f"A contrastive loss of queries and texts has weight {amount(settings.contrastive_weight)}.")
    return said


def _differences(settings: MethodSettings, m: Markup) -> list[str]:
    """Say what is not as in Mask2Former although no option asks for it."""
    said = []
    if settings.layers_share:
        said.append("Unlike in Mask2Former, layers share the matcher's points.")
        if settings.divisor == "matches":
            said.append(f"{m.math('N')} counts matches, not targets.")
    classes = settings.classification
    if classes is not None and (classes.kind, classes.normalized) == ("softmax", "devices"):
        said.append("Classification is normalized over all devices.")
    return said
