"""Names on pictures, in any script that a font of this machine can write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskloss.errors import require

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

# Matplotlib brings it along.
_USUAL = "DejaVu Sans"
# Parts of the names of sans-serif fonts for Chinese, Japanese and Korean, which are looked at before all others.
_LIKELY = ("cjk", "sourcehan", "wqy", "pingfang", "hiragino", "yahei", "malgun", "simhei", "gothic", "nanum", "unifont")


class Lettering:
    """The names of the classes as pictures show them, and the fonts that have their letters.

    A name with letters that no font has is shown as its number. Nothing is downloaded.

    Attributes:
        names: what to write.
        note: says which names cannot be written, and what to do; None if all can.
    """

    def __init__(self, names: Sequence[str], numbers: Sequence[int]) -> None:
        letters = frozenset(letter for name in names for letter in name if letter.isprintable() and letter != " ")
        self._paths, missing = _fonts_for(letters)
        unreadable = [name for name in names if missing & set(name)]
        self.names = [
            f"class {number}" if name in unreadable else name for name, number in zip(names, numbers, strict=True)
        ]
        self.note: str | None = None
        if unreadable:
            some = ", ".join(unreadable[:3]) + (", ..." if len(unreadable) > 3 else "")
            self.note = (
                f"no font of this machine has the letters of {some}: pictures show the numbers of these classes "
                "(install a font, such as Noto Sans CJK)"
            )

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let matplotlib write with these fonts."""
        manager = require("matplotlib.font_manager", "plots")
        for path in self._paths[1:]:
            manager.fontManager.addfont(path)
        families = [_open(path).family_name for path in self._paths]
        with require("matplotlib", "plots").rc_context({"font.family": families}):
            yield

    def width(self, text: str, size: int) -> int:
        """Return how wide a text is, in pixels."""
        return round(sum(float(font.getlength(part)) for part, font in self._runs(text, size)))

    def write(self, draw: ImageDraw, at: tuple[float, float], text: str, size: int, color: Any) -> None:
        """Write a line onto a picture of Pillow's; `at` is its left and its middle."""
        x, y = at
        for part, font in self._runs(text, size):
            draw.text((x, y), part, fill=color, font=font, anchor="lm")
            x += font.getlength(part)

    def _runs(self, text: str, size: int) -> Iterator[tuple[str, Any]]:
        """Split a text by the first font that has each letter."""
        start, last = 0, 0
        places = [next((i for i, path in enumerate(self._paths) if _has(path, letter)), 0) for letter in text]
        for end, place in enumerate([*places, -1]):
            if end and place != last:
                yield text[start:end], _pillow_font(self._paths[last], size)
                start = end
            last = place


def literal(name: str) -> str:
    """Return a name as matplotlib shows it letter by letter: a dollar would begin a formula."""
    return short(name).replace("$", r"\$")


def short(name: str) -> str:
    """Return a name on one line, of 24 letters at most."""
    line = " ".join(name.split())
    return line if len(line) <= 24 else line[:23] + "…"


@lru_cache(maxsize=8)
def _fonts_for(letters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Find fonts that have some letters: their paths, the usual one first, and the letters that none of them has."""
    manager = require("matplotlib.font_manager", "plots")
    paths = [str(manager.findfont(_USUAL))]
    missing = {letter for letter in letters if not _has(paths[0], letter)}

    def order(path: str) -> tuple[bool, bool, str]:
        name = Path(path).name.lower().replace("-", "").replace("_", "")
        return not any(part in name for part in _LIKELY), "regular" not in name, path

    for path in sorted(map(str, manager.findSystemFonts()), key=order) if missing else ():
        there = {letter for letter in missing if _has(path, letter)}
        if there:
            paths.append(path)
            missing -= there
        if not missing:
            break
    return tuple(paths), frozenset(missing)


@cache
def _open(path: str) -> Any:
    """Open a font; None for one that cannot be read, or that is no outlines but bitmaps."""
    try:
        font = require("matplotlib.ft2font", "plots").FT2Font(path)
    except (OSError, RuntimeError, ValueError):
        return None
    return font if font.scalable else None


def _has(path: str, letter: str) -> bool:
    font = _open(path)
    return font is not None and bool(font.get_char_index(ord(letter)))


@lru_cache(maxsize=64)
def _pillow_font(path: str, size: int) -> Any:
    return require("PIL.ImageFont", "train").truetype(path, size)
