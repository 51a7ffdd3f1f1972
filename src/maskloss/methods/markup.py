"""How formulas, numbers and citations look in plain text, Markdown and LaTeX."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from maskloss.methods.references import REFERENCES

# What the formulas of the paragraph are made of; they are written in LaTeX, and plain text is made from them.
_PLAIN = (
    (r"\\(?:mathrm|mathcal|text)\{([^{}]*)\}", r"\1"),
    (r"\\(?:lambda)", "λ"),
    (r"\\sigma", "σ"),
    (r"\\alpha", "α"),
    (r"\\gamma", "γ"),
    (r"\\lfloor ?", "⌊"),
    (r" ?\\rfloor", "⌋"),
    (r" ?\\times ?", " × "),
    (r"\\log", "log"),
    (r"\\in", "∈"),
    (r" ?\\[,;] ?", " "),
    (r"\{,\}", ","),
    (r"_\{([^{}]*)\}", r"_\1"),
    (r"\^\{([^{}]*)\}", r"^\1"),
    (r"\\([{}])", r"\1"),
    ("-", "−"),
)


@dataclass
class Markup:
    """Plain text; the subclasses change what they write differently. Citations are collected as they are made."""

    chinese: bool = False
    cited: list[str] = field(default_factory=list)

    def math(self, latex: str) -> str:
        """Write an inline formula, given in LaTeX."""
        for pattern, text in _PLAIN:
            latex = re.sub(pattern, text, latex)
        return latex

    def display(self, plain: str, latex: str) -> str:
        """Write a formula on a line of its own, given in both forms."""
        del latex
        return f"    {plain}"

    def title(self, text: str) -> str:
        """Write the title of the paragraph."""
        return text

    @property
    def after_title(self) -> str:
        """What separates the title from the paragraph."""
        return "" if self.chinese and type(self) is Markup else " "

    def percent(self, share: float) -> str:
        """Write a share as a percentage."""
        return f"{amount(100 * share)}%" if self.chinese else f"{amount(100 * share)}\N{NO-BREAK SPACE}%"

    def quote(self, text: str) -> str:
        """Put a name in quotation marks."""
        return f"“{text}”"

    def cite(self, *keys: str) -> str:
        """Cite works by their keys."""
        self.cite_silently(*keys)
        numbers = ", ".join(str(1 + self.cited.index(key)) for key in keys)
        return f"[{numbers}]" if self.chinese else f" [{numbers}]"

    def references(self) -> list[str]:
        """List what was cited, where the markup does not leave that to BibTeX."""
        return ["\n".join(f"[{number}] {REFERENCES[key].line}" for number, key in enumerate(self.cited, start=1))]

    def cite_silently(self, *keys: str) -> None:
        """Note works as cited."""
        self.cited += [key for key in keys if key not in self.cited]


class Markdown(Markup):
    """Markdown with formulas between dollars and citations as Pandoc has them."""

    def math(self, latex: str) -> str:
        """Write an inline formula, given in LaTeX."""
        return f"${latex}$"

    def display(self, plain: str, latex: str) -> str:
        """Write a formula on a line of its own."""
        del plain
        return f"$$\n{latex}\n$$"

    def title(self, text: str) -> str:
        """Write the title of the paragraph."""
        return f"**{text}**"

    def cite(self, *keys: str) -> str:
        """Cite works by their keys."""
        self.cite_silently(*keys)
        return f" [{'; '.join('@' + key for key in keys)}]"

    def references(self) -> list[str]:
        """List nothing: Pandoc does."""
        return []


class Latex(Markup):
    """LaTeX; needs no package beyond the format's own."""

    def math(self, latex: str) -> str:
        """Write an inline formula, given in LaTeX."""
        return f"${latex}$"

    def display(self, plain: str, latex: str) -> str:
        """Write a formula on a line of its own."""
        del plain
        return f"\\[\n{latex}\n\\]"

    def title(self, text: str) -> str:
        """Write the title of the paragraph."""
        return f"\\paragraph{{{text}}}"

    def percent(self, share: float) -> str:
        """Write a share as a percentage."""
        return f"{amount(100 * share)}\\%" if self.chinese else f"{amount(100 * share)}\\,\\%"

    def quote(self, text: str) -> str:
        """Put a name in quotation marks."""
        return f"“{text}”" if self.chinese else f"``{text}''"

    def cite(self, *keys: str) -> str:
        """Cite works by their keys."""
        self.cite_silently(*keys)
        return f"{'' if self.chinese else '~'}\\cite{{{','.join(keys)}}}"

    def references(self) -> list[str]:
        """List nothing."""
        return []


FORMATS = {"text": Markup, "markdown": Markdown, "latex": Latex}


def amount(number: float) -> str:
    """Write a number as a paper does: 12,544 and 0.25."""
    return f"{number:,}" if isinstance(number, int) else f"{number:,.6g}".removesuffix(".0")


def tex(number: float) -> str:
    """Write a number inside a formula, where a comma would otherwise be followed by a space."""
    return amount(number).replace(",", "{,}")
