"""The paragraph for the paper: what a loss computes, with the settings that it has.

    criterion = MaskCriterion(num_classes=80)
    print(methods.describe(criterion))
    print(methods.describe(criterion, lang="zh", format="latex"))
    print(methods.bibtex(criterion))

`maskloss methods` prints the same.
"""

from __future__ import annotations

from torch import nn

from maskloss._inputs import check_choice
from maskloss.errors import reported
from maskloss.methods import chinese, english, formulas
from maskloss.methods.markup import FORMATS, Markup
from maskloss.methods.references import REFERENCES
from maskloss.methods.settings import MethodSettings, settings_of

__all__ = ["FORMATS", "LANGUAGES", "MethodSettings", "bibtex", "describe", "document", "settings_of"]

LANGUAGES = {"en": english.paragraph, "zh": chinese.paragraph}


@reported("describe")
def describe(
    subject: nn.Module | MethodSettings,
    *,
    lang: str = "en",
    format: str = "text",  # noqa: A002 (what one calls it)
    valid_windows: bool = False,
    ignore_regions: bool = False,
) -> str:
    """Write the paragraph that describes a loss in a paper, and its formulas.

    Args:
        subject: a `MaskLoss`, `MaskCriterion` or `HungarianMatcher`, or settings.
        lang: "en" or "zh".
        format: "text", "markdown" or "latex".
        valid_windows: say that points are drawn inside the images only, as targets with `valid` have it.
        ignore_regions: say that points in ignore regions weigh nothing, as targets with `ignore` have it.

    Returns:
        The paragraph; for a mask loss its two formulas; in plain text the works that are cited. Separated by empty
        lines.

    Raises:
        MaskLossError: an object that cannot be described, an unknown language or format.

    Example:
        >>> from maskloss import MaskLoss, PointSampling
        >>> text = describe(MaskLoss(sampling=PointSampling(num_points=4096)))
        >>> text[:30], "P = 4,096" in text, "3P = 12,288" in text
        ('Mask loss with point sampling.', True, True)
    """
    settings = settings_of(subject).with_targets(valid_windows, ignore_regions)
    return _written(settings, lang, format)[0]


@reported("bibtex")
def bibtex(subject: nn.Module | MethodSettings) -> str:
    """List the BibTeX entries of the works that `describe` cites, in the order in which they are cited.

    Args:
        subject: see `describe`.

    Returns:
        The entries, separated by empty lines.

    Raises:
        MaskLossError: an object that cannot be described.

    Example:
        >>> from maskloss import HungarianMatcher
        >>> [line for line in bibtex(HungarianMatcher()).splitlines() if line.startswith("@")]
        ['@inproceedings{carion2020detr,', '@article{kuhn1955hungarian,']
    """
    _, cited = _written(settings_of(subject), "en", "text")
    return "\n\n".join(REFERENCES[key].bibtex for key in cited)


@reported("document")
def document(subject: nn.Module | MethodSettings, *, lang: str = "en") -> str:
    """Write a whole LaTeX document with the paragraph and its references.

    Args:
        subject: see `describe`.
        lang: "en", for any engine; or "zh", which needs the class ctexart, and XeLaTeX, LuaLaTeX or Tectonic.

    Returns:
        The source of the document; it writes its references to maskloss.bib, for BibTeX.

    Raises:
        MaskLossError: an object that cannot be described, or an unknown language.
    """
    settings = settings_of(subject)
    text, _ = _written(settings, lang, "latex")
    kind = "ctexart" if lang == "zh" else "article"
    return "\n".join(
        [
            r"\begin{filecontents}[overwrite]{maskloss.bib}",
            bibtex(settings),
            r"\end{filecontents}",
            rf"\documentclass{{{kind}}}",
            r"\begin{document}",
            text,
            r"\bibliographystyle{plain}",
            r"\bibliography{maskloss}",
            r"\end{document}",
            "",
        ]
    )


def _written(settings: MethodSettings, lang: str, form: str) -> tuple[str, list[str]]:
    """Return the text and the keys that it cites."""
    check_choice("lang", lang, tuple(LANGUAGES))
    check_choice("format", form, tuple(FORMATS))
    markup: Markup = FORMATS[form](chinese=lang == "zh")
    title, *sentences = LANGUAGES[lang](settings, markup)
    joined = ("" if lang == "zh" else " ").join(sentences)
    parts = [f"{title}{markup.after_title}{joined}"]
    if settings.points is not None:
        parts += formulas.displays(settings, markup)
    return "\n\n".join([*parts, *markup.references()]), markup.cited
