"""The formulas that all languages share: inline ones in LaTeX, displayed ones in LaTeX and in plain text."""

from __future__ import annotations

from maskloss.methods.markup import amount, tex
from maskloss.methods.settings import Matching, MethodSettings, Points
from maskloss.options import MaskOptions

MASK, CE, DICE = (rf"\mathcal{{L}}_{{\mathrm{{{name}}}}}" for name in ("mask", "ce", "dice"))
WEIGHT_CE, WEIGHT_DICE = r"\lambda_{\mathrm{ce}}", r"\lambda_{\mathrm{dice}}"
# Displayed equations in the order of the text.
READING, LOSS = ("uncertainty", "coordinates", "interpolation"), ("total", "ce", "focal", "dice")


def number_of_points(points: Points) -> str:
    """Say what P is."""
    return f"P = {per_area(points) if points.count is None else tex(points.count)}"


def per_area(points: Points) -> str:
    """Say how many points a prediction of h x w pixels has."""
    return rf"\lfloor hw / {points.area} \rfloor"


def quality(alpha: float) -> str:
    """Write the quality of a box as a target for its class."""
    return rf"s^{{{tex(alpha)}}} \mathrm{{IoU}}^{{{tex(1 - alpha)}}}"


def candidates(points: Points) -> str:
    """Say how many candidates there are."""
    share = "P" if points.oversample_ratio == 1 else f"{tex(points.oversample_ratio)}P"
    if points.count is None:
        return share
    count = tex(int(points.oversample_ratio * points.count))
    # int(k P) differs from k P where that is no whole number.
    exact = (points.oversample_ratio * points.count).is_integer() if points.oversample_ratio % 1 else True
    return f"{share} = {count}" if exact else rf"\lfloor {share} \rfloor = {count}"


def cost(matching: Matching) -> str:
    """Write the matching cost, without terms of weight 0."""
    name = "Focal" if matching.term.focal_gamma is not None else "BCE"
    classes = r"-{}p(c)" if matching.classification == "softmax" else r"{}\mathcal{{F}}(c)"
    terms = (
        (matching.class_weight, classes),
        (matching.mask_weight, rf"{{}}\mathrm{{{{{name}}}}}"),
        (matching.dice_weight, r"{}\mathrm{{Dice}}"),
        (matching.box_weight, r"{}\mathrm{{L1}}"),
        (matching.giou_weight, r"-{}\mathrm{{GIoU}}"),
    )
    first, *others = [form.format("" if weight == 1 else tex(weight) + r"\,") for weight, form in terms if weight]
    return first + "".join(f" - {each[1:]}" if each.startswith("-") else f" + {each}" for each in others)


def focal(term: MaskOptions) -> str:
    """Write the parameters of the focal loss."""
    alpha = "" if term.focal_alpha is None else rf"\alpha = {tex(term.focal_alpha)}, \; "
    return rf"{alpha}\gamma = {tex(term.focal_gamma or 0)}"


def display(name: str, settings: MethodSettings) -> tuple[str, str]:
    """Write a displayed equation in plain text and in LaTeX."""
    weighted = settings.ignore_regions
    w, w_plain = (r"w_{np}\,", "w_np ") if weighted else ("", "")
    mean = r"\frac{1}{\max(\sum_p w_{np}, 1)}" if weighted else r"\frac{1}{P}"
    mean_plain = "1/max(Σ_p w_np, 1)" if weighted else "1/P"
    area, area_plain = rf"\sum_p {w}\sigma(z)", f"Σ_p {w_plain}σ(z)"
    soft, common, common_plain = settings.term.dice == "soft", rf"{area}\, t", f"{area_plain} t"
    if settings.term.dice == "semimetric":
        common, common_plain = rf"\sum_p {w}\min(\sigma(z), t)", f"Σ_p {w_plain}min(σ(z), t)"
    unit = settings.clips.unit if settings.clips else "image"
    # N is the number of terms where it counts matches; frames have terms of their own.
    terms = r"\sum_{n=1}^{N}" if settings.divisor == "matches" else r"\sum_{n}"
    if unit == "frame":
        terms = r"\sum_{n, f}"
    terms_plain = "Σ_nf" if unit == "frame" else "Σ_n"
    mean_of = rf"\frac{{1}}{{N}} {terms} {mean} \sum_{{p=1}}^{{P}} {w}"
    written = {
        "uncertainty": ("U(z) = −|z|", "U(z) = -|z|"),
        **_interpolation(settings.term.padding_mode == "border", volumes=unit == "volume"),
        "total": (
            "L_mask = λ_ce L_ce + λ_dice L_dice",
            rf"{MASK} = {WEIGHT_CE} {CE} + {WEIGHT_DICE} {DICE}",
        ),
        "ce": (
            f"L_ce = −1/N {terms_plain} {mean_plain} Σ_p {w_plain}[t log σ(z) + (1 − t) log(1 − σ(z))]",
            rf"{CE} = -{mean_of}\left[ t \log \sigma(z) + (1 - t) \log (1 - \sigma(z)) \right]",
        ),
        "dice": (
            f"L_dice = 1/N {terms_plain} [1 − (2 {common_plain} + 1) / "
            f"({area_plain}{'²' * soft} + Σ_p {w_plain}t{'²' * soft} + 1)]",
            rf"{DICE} = \frac{{1}}{{N}} {terms} \left[ 1 - "
            rf"\frac{{2 {common} + 1}}{{{area}{'^2' * soft} + \sum_p {w}t{'^2' * soft} + 1}} \right]",
        ),
    }
    if settings.term.focal_gamma is not None:
        # On two lines, which fit into a column.
        written["ce"] = f"L_ce = 1/N {terms_plain} {mean_plain} Σ_p {w_plain}f(z, t)", f"{CE} = {mean_of}f(z, t)"
        written["focal"] = _focal_at_a_point(settings.term.focal_alpha, settings.term.focal_gamma)
    return written[name]


def _interpolation(border: bool, *, volumes: bool) -> dict[str, tuple[str, str]]:
    """Write where a point lies among the pixels, to which border padding clamps it, and the value there."""
    axes = (("u", "x", "w", "j"), ("v", "y", "h", "i"), ("s", "q", "d", "k"))[: 2 + volumes]
    place, place_tex = "{1} {2} − 1/2", r"{1} {2} - \frac{{1}}{{2}}"
    if border:
        place, place_tex = f"min(max({place}, 0), {{2}} − 1)", rf"\min(\max({place_tex}, 0), {{2}} - 1)"
    near = " ".join(f"max(0, 1 − |{to} − {index}|)" for to, *_, index in reversed(axes))
    near_tex = " ".join(rf"\max(0, 1 - |{to} - {index}|)" for to, *_, index in reversed(axes))
    point, below = ", ".join(of for _, of, *_ in axes), "".join(index for *_, index in reversed(axes))
    return {
        "coordinates": (
            ",  ".join(f"{{0}} = {place}".format(*axis) for axis in axes),
            r", \qquad ".join(f"{{0}} = {place_tex}".format(*axis) for axis in axes),
        ),
        "interpolation": (
            f"z({point}) = Σ_{below} z_{below} {near}",
            rf"z({point}) = \sum_{{{', '.join(below)}}} z_{{{below}}} {near_tex}",
        ),
    }


def _focal_at_a_point(alpha: float | None, gamma: float) -> tuple[str, str]:
    on, off = ("", "") if alpha is None else (amount(alpha), amount(round(1 - alpha, 9)))
    g = amount(gamma)
    plain = f"f(z, t) = −{on} (1 − σ(z))^{g} t log σ(z) − {off} σ(z)^{g} (1 − t) log(1 − σ(z))"
    return (
        plain.replace("− (", "−(").replace("−  σ", "− σ"),
        rf"f(z, t) = -{on}(1 - \sigma(z))^{{{g}}}\, t \log \sigma(z)"
        rf" - {off}\,\sigma(z)^{{{g}}} (1 - t) \log (1 - \sigma(z))",
    )
