"""How formulas, numbers and citations look in plain text, Markdown and LaTeX."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from decimal import Decimal

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
    (r"\^\{([^{}]*)\}", r"^\1"),
    ("-", "−"),
)


@dataclass
class Markup:
    """Plain text; the subclasses change what they write differently.

    Attributes:
        version: of maskloss, for the list of references; None where it is not known.
        equations: the names of the displayed equations, numbered in this order.
        cited: the keys of the works that were cited, in order.
    """

    version: str | None = None
    equations: tuple[str, ...] = ()
    cited: list[str] = field(default_factory=list)
    # Between two words that stay on one line; between a paragraph and its equations.
    tie: str = " "
    gap: str = "\n\n"

    def math(self, latex: str) -> str:
        """Write an inline formula, given in LaTeX."""
        for pattern, text in _PLAIN:
            latex = re.sub(pattern, text, latex)
        return latex

    def display(self, name: str, plain: str, latex: str) -> str:
        """Write a numbered formula on a line of its own, given in both forms."""
        del latex
        return f"    {plain}    ({self.refer(name)})"

    def refer(self, name: str) -> str:
        """Write the number of an equation."""
        return str(1 + self.equations.index(name))

    def title(self, text: str, joiner: str) -> str:
        """Write the title of a paragraph, and what separates it from the first sentence."""
        return text + joiner

    def percent(self, share: float) -> str:
        """Write a share as a percentage."""
        return f"{amount(round(100 * share, 9))}%"

    def word(self, text: str) -> str:
        """Write a name that comes from outside."""
        return "".join(each if each.isprintable() else "?" for each in text)

    def cite(self, keys: tuple[str, ...]) -> str:
        """Cite works by their keys."""
        self.note(keys)
        return f"[{', '.join(str(1 + self.cited.index(key)) for key in keys)}]"

    def note(self, keys: tuple[str, ...]) -> None:
        """Note works as cited."""
        self.cited += [key for key in keys if key not in self.cited]

    def references(self) -> list[str]:
        """List what was cited, where the markup does not leave that to BibTeX."""
        lines = (f"[{number}] {reference_line(key, self.version)}" for number, key in enumerate(self.cited, start=1))
        return ["\n".join(lines)]


class Markdown(Markup):
    """Markdown with formulas between dollars and citations as Pandoc has them."""

    def math(self, latex: str) -> str:
        """Write an inline formula, given in LaTeX."""
        return f"${latex}$"

    def display(self, name: str, plain: str, latex: str) -> str:
        """Write a numbered formula on a line of its own."""
        del plain
        return f"$$\n{latex} \\tag{{{self.refer(name)}}}\n$$"

    def title(self, text: str, joiner: str) -> str:
        """Write the title of a paragraph; without a space, bold would not end after a Chinese full stop."""
        del joiner
        return f"**{text}** "

    def word(self, text: str) -> str:
        """Write a name that comes from outside."""
        return re.sub(r"([\\`*_{}\[\]<>#$|~])", r"\\\1", super().word(text))

    def cite(self, keys: tuple[str, ...]) -> str:
        """Cite works by their keys."""
        self.note(keys)
        return f"[{'; '.join('@' + key for key in keys)}]"

    def references(self) -> list[str]:
        """List nothing: Pandoc does."""
        return []


# What LaTeX takes for a command, and how it is written there.
_ESCAPED = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_ESCAPED |= {each: f"\\{each}" for each in "{}_&%$#"}


@dataclass
class Latex(Markup):
    """LaTeX; needs no package beyond the format's own."""

    tie: str = "~"
    # An empty line would end the paragraph.
    gap: str = "\n"

    def math(self, latex: str) -> str:
        """Write an inline formula, given in LaTeX."""
        return f"${latex}$"

    def display(self, name: str, plain: str, latex: str) -> str:
        """Write a numbered formula on a line of its own."""
        del plain
        return f"\\begin{{equation}}\\label{{eq:maskloss-{name}}}\n{latex}\n\\end{{equation}}"

    def refer(self, name: str) -> str:
        """Refer to an equation."""
        return f"\\ref{{eq:maskloss-{name}}}"

    def title(self, text: str, joiner: str) -> str:
        """Write the title of a paragraph."""
        del joiner
        return f"\\paragraph{{{text}}} "

    def percent(self, share: float) -> str:
        """Write a share as a percentage."""
        return super().percent(share).replace("%", r"\%")

    def word(self, text: str) -> str:
        """Write a name that comes from outside."""
        return "".join(_ESCAPED.get(each, each) for each in super().word(text))

    def cite(self, keys: tuple[str, ...]) -> str:
        """Cite works by their keys."""
        self.note(keys)
        return f"\\cite{{{','.join(keys)}}}"

    def references(self) -> list[str]:
        """List nothing: BibTeX does."""
        return []


FORMATS: dict[str, type[Markup]] = {"text": Markup, "markdown": Markdown, "latex": Latex}


def amount(number: float) -> str:
    """Write a number as a paper does: 12,544 and 0.25, never 1e-05."""
    return f"{number:,}" if isinstance(number, int) else f"{Decimal(f'{number:.6g}'):,f}"


def tex(number: float) -> str:
    """Write a number inside a formula, where a comma would otherwise be followed by a space."""
    return amount(number).replace(",", "{,}")
