"""How formulas, numbers and citations look in plain text, Markdown and LaTeX."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import NamedTuple

from maskloss.methods.references import reference_line

# What the formulas inside of sentences are made of: they are written in LaTeX, and plain text is made from them.
_PLAIN = (
    (r"\\(?:mathrm|mathcal|text)\{([^{}]*)\}", r"\1"),
    (r"\\(?:lambda)", "λ"),
    (r"\\sigma", "σ"),
    (r"\\alpha", "α"),
    (r"\\gamma", "γ"),
    (r"\\lfloor ?", "⌊"),
    (r" ?\\rfloor", "⌋"),
    (r" ?\\times ?", " × "),
    (r"\\in", "∈"),
    (r" ?\\[,;] ?", " "),
    (r"\{,\}", ","),
    (r"_\{([^{}]*)\}", r"_\1"),
    (r"\^2", "²"),
    (r"\^3", "³"),
    (r"\^\{([^{}]*)\}", r"^\1"),
    ("-", "−"),
)


class Form(NamedTuple):
    """How a format writes things; `%(name)s` stands for a part."""

    display: str  # a numbered formula on a line of its own, from `plain` and `latex`, its `name` and its `number`
    refer: str  # the number of an equation, from the same
    title: str  # the title of a paragraph, from its `text` and the `joiner` of the language
    cite: tuple[str, str, str]  # what is before, between and after works that are cited together
    escaped: Mapping[str, str]  # characters that mean something else in the format, and how they are written
    tie: str = " "  # stands between two words that stay on one line
    gap: str = "\n\n"  # stands between a paragraph and its equations


TEXT = Form("    %(plain)s    (%(number)s)", "%(number)s", "%(text)s%(joiner)s", ("[", ", ", "]"), {})
# Citations as Pandoc has them. Without a space, bold would not end after a Chinese full stop.
MARKDOWN = Form(
    "$$\n%(latex)s \\tag{%(number)s}\n$$",
    "%(number)s",
    "**%(text)s** ",
    ("[@", "; @", "]"),
    {each: f"\\{each}" for each in "\\`*_{}[]<>#$|~"},
)
# Needs no package. An empty line before an equation would end the paragraph.
LATEX = Form(
    "\\begin{equation}\\label{eq:maskloss-%(name)s}\n%(latex)s\n\\end{equation}",
    "\\ref{eq:maskloss-%(name)s}",
    "\\paragraph{%(text)s} ",
    ("\\cite{", ",", "}"),
    {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {each: f"\\{each}" for each in "{}_&%$#"},
    tie="~",
    gap="\n",
)
FORMATS = {"text": TEXT, "markdown": MARKDOWN, "latex": LATEX}


@dataclass
class Markup:
    """Writes the parts of a text in a format."""

    form: Form  # the format
    version: str | None = None  # of maskloss, for the list of references; None where it is not known
    equations: tuple[str, ...] = ()  # the names of the displayed equations, numbered in this order
    cited: list[str] = field(default_factory=list)  # the keys of the works that were cited, in order

    def math(self, latex: str) -> str:
        """Write an inline formula, given in LaTeX."""
        if self.form is not TEXT:
            return f"${latex}$"
        for pattern, text in _PLAIN:
            latex = re.sub(pattern, text, latex)
        return latex

    def display(self, name: str, plain: str, latex: str) -> str:
        """Write a numbered formula on a line of its own, given in both forms."""
        number = 1 + self.equations.index(name)
        return self.form.display % {"plain": plain, "latex": latex, "name": name, "number": number}

    def refer(self, name: str) -> str:
        """Write the number of an equation."""
        return self.form.refer % {"name": name, "number": 1 + self.equations.index(name)}

    def title(self, text: str, joiner: str) -> str:
        """Write the title of a paragraph, and what separates it from the first sentence."""
        return self.form.title % {"text": text, "joiner": joiner}

    def percent(self, share: float) -> str:
        """Write a share as a percentage."""
        return amount(round(100 * share, 9)) + (r"\%" if self.form is LATEX else "%")

    def word(self, text: str) -> str:
        """Write a name that comes from outside."""
        return "".join(self.form.escaped.get(each, each) if each.isprintable() else "?" for each in text)

    def cite(self, keys: tuple[str, ...]) -> str:
        """Cite works by their keys; plain text numbers them."""
        self.cited += [key for key in keys if key not in self.cited]
        before, between, after = self.form.cite
        shown = (str(1 + self.cited.index(key)) if self.form is TEXT else key for key in keys)
        return before + between.join(shown) + after

    def references(self) -> list[str]:
        """List what was cited, where the format does not leave that to BibTeX or Pandoc."""
        if self.form is not TEXT:
            return []
        lines = (f"[{number}] {reference_line(key, self.version)}" for number, key in enumerate(self.cited, start=1))
        return ["\n".join(lines)]


def amount(number: float) -> str:
    """Write a number as a paper does: 12,544 and 0.25, never 1e-05."""
    return f"{number:,}" if isinstance(number, int) else f"{Decimal(f'{number:.6g}'):,f}"


def tex(number: float) -> str:
    """Write a number inside a formula, where a comma would otherwise be followed by a space."""
    return amount(number).replace(",", "{,}")
