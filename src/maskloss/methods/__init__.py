"""The text for the paper: what a loss computes, with the settings that it has.

    criterion = MaskCriterion(num_classes=80)
    print(methods.describe(criterion))
    print(methods.describe(criterion, lang="zh", format="latex", formulas="all"))
    print(methods.describe(criterion, style="short"))
    print(methods.bibtex(criterion))

`maskloss methods` prints the same. `facts` decides what is said, `english` and `chinese` how.
"""

from __future__ import annotations

from torch import nn

from maskloss._inputs import check_choice
from maskloss.errors import Cause, reported
from maskloss.methods import chinese, english
from maskloss.methods.facts import LEFT_OUT, Paragraph, paragraphs, write
from maskloss.methods.formulas import display
from maskloss.methods.markup import FORMATS, Markup
from maskloss.methods.references import reference_entry
from maskloss.methods.settings import MethodSettings, settings_of

__all__ = [
    "FORMATS", "FORMULAS", "LANGUAGES", "STYLES", "MethodSettings", "bibtex", "describe", "document", "settings_of",
]  # fmt: skip

LANGUAGES = {"en": english, "zh": chinese}
STYLES = ("full", "short")
FORMULAS = ("none", "loss", "all")


@reported("describe")
def describe(
    subject: nn.Module | MethodSettings,
    *,
    lang: str = "en",
    format: str = "text",  # noqa: A002 (what one calls it)
    style: str = "full",
    formulas: str | None = None,
    valid_windows: bool = False,
    ignore_regions: bool = False,
) -> str:
    """Write the paragraphs that describe a loss in a paper, and its equations.

    Args:
        subject: a `MaskLoss`, `MaskCriterion` or `HungarianMatcher`, or settings.
        lang: "en" or "zh".
        format: "text", "markdown" or "latex".
        style: "full": what is supervised, the loss, and the matching, in a paragraph each; or "short": one paragraph
            of about 80 words.
        formulas: "none", "loss" (the mask loss and its terms) or "all" (uncertainty and interpolation as well).
            Default: "loss" for the full style, "none" for the short one.
        valid_windows: say that points are drawn inside the images only, as targets with `valid` have it.
        ignore_regions: say that points in ignore regions weigh nothing, as targets with `ignore` have it.

    Returns:
        Paragraphs and equations, separated by empty lines; in plain text the works that are cited follow. Equations
        are numbered, and referred to by number.

    Raises:
        MaskLossError: an object that cannot be described; an unknown language, format, style or choice of formulas;
            equations of a matching alone, which has none.

    Example:
        >>> from maskloss import MaskLoss, PointSampling
        >>> text = describe(MaskLoss(sampling=PointSampling(num_points=4096)))
        >>> text[:24], "P = 4,096" in text, "3P = 12,288" in text
        ('Point-sampled mask loss.', True, True)
    """
    settings = settings_of(subject).with_targets(valid_windows, ignore_regions)
    return _written(settings, lang, format, style, formulas)[0]


@reported("bibtex")
def bibtex(
    subject: nn.Module | MethodSettings, *, lang: str = "en", style: str = "full", formulas: str | None = None
) -> str:
    """List the BibTeX entries of the works that `describe` cites, in the order in which they are cited.

    Args:
        subject: see `describe`.
        lang: see `describe`.
        style: see `describe`.
        formulas: see `describe`.

    Returns:
        The entries, separated by empty lines.

    Raises:
        MaskLossError: see `describe`.

    Example:
        >>> from maskloss import HungarianMatcher
        >>> [line for line in bibtex(HungarianMatcher()).splitlines() if line.startswith("@")]
        ['@inproceedings{carion2020detr,', '@article{kuhn1955hungarian,', '@misc{maskloss,']
    """
    settings = settings_of(subject)
    _, cited = _written(settings, lang, "text", style, formulas)
    return "\n\n".join(reference_entry(key, settings.version) for key in cited)


@reported("document")
def document(
    subject: nn.Module | MethodSettings, *, lang: str = "en", style: str = "full", formulas: str | None = None
) -> str:
    """Write a whole LaTeX document with the paragraphs and their references.

    Args:
        subject: see `describe`.
        lang: "en", for any engine; or "zh", which needs the class ctexart, and XeLaTeX, LuaLaTeX or Tectonic.
        style: see `describe`.
        formulas: see `describe`.

    Returns:
        The source of the document. It writes its references to maskloss.bib: run LaTeX, BibTeX, and LaTeX twice.

    Raises:
        MaskLossError: see `describe`.
    """
    settings = settings_of(subject)
    text, _ = _written(settings, lang, "latex", style, formulas)
    kind = "ctexart" if lang == "zh" else "article"
    entries = bibtex(settings, lang=lang, style=style, formulas=formulas)
    head = r"\begin{filecontents}[overwrite]{maskloss.bib}", entries, r"\end{filecontents}"
    foot = r"\bibliographystyle{plain}", r"\bibliography{maskloss}", r"\end{document}"
    return "\n".join([*head, rf"\documentclass{{{kind}}}", r"\begin{document}", text, *foot, ""])


def _written(settings: MethodSettings, lang: str, form: str, style: str, formulas: str | None) -> tuple[str, list[str]]:
    """Return the text and the keys of the works that it cites."""
    check_choice("lang", lang, tuple(LANGUAGES))
    check_choice("format", form, tuple(FORMATS))
    check_choice("style", style, STYLES)
    shown = formulas if formulas is not None else "none" if style == "short" else "loss"
    check_choice("formulas", shown, FORMULAS)
    if settings.points is None and formulas not in {None, "none"}:
        cause = f"there is only a matching, and formulas={formulas!r}"
        raise Cause("equations belong to a mask loss", cause, "leave formulas out")
    language, short = LANGUAGES[lang], style == "short"
    table = {**language.SHORT, **dict.fromkeys(LEFT_OUT, "")} if short else language.SENTENCES
    told = paragraphs(settings, shown)
    names = [name for each in told for name in each.equations]
    if short:  # one paragraph, with all equations after it
        told = [Paragraph(None, [said for each in told for said in each.sentences], names)]
    markup = Markup(FORMATS[form], settings.version, tuple(names))
    blocks = []
    for title, facts, equations in told:
        sentences = (write(fact, table, markup) for fact in facts)
        text = language.JOINER.join(text for text in sentences if text)
        text = text if title is None else markup.title(table[title], language.JOINER) + text
        displays = (markup.display(name, *display(name, settings)) for name in equations)
        blocks.append(markup.form.gap.join([text, *displays]))
    return "\n\n".join([*blocks, *markup.references()]), markup.cited
