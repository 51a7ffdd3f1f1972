"""Names on pictures: any script that a font has, and numbers for what none has."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from maskloss import plots
from maskloss.lab.results import lettering
from maskloss.lab.results.inference import Instance
from maskloss.lab.results.lettering import Lettering
from maskloss.lab.results.pictures import overlay

NAMES = ["cell", "细胞", "ネコ", "고양이"]


@pytest.fixture
def no_other_fonts(monkeypatch):
    """As on a machine that has no font but matplotlib's."""
    from matplotlib import font_manager

    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    lettering._fonts_for.cache_clear()
    yield
    lettering._fonts_for.cache_clear()


def test_names_that_no_font_has_become_numbers(no_other_fonts):
    letters = Lettering(NAMES, [1, 5, 7, 9])
    assert letters.names == ["cell", "class 5", "class 7", "class 9"]
    assert letters.note is not None and "the letters of 细胞, ネコ, 고양이:" in letters.note


def test_what_the_usual_font_has_needs_no_other(monkeypatch):
    from matplotlib import font_manager

    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: pytest.fail("looked for fonts"))
    names = ["Zelle", "Ядро", "κύτταρο", "a\tb"]
    letters = Lettering(names, [1, 2, 3, 4])
    assert letters.names == names and letters.note is None


def test_a_font_of_the_machine_is_found_and_one_that_is_broken_is_not_taken(monkeypatch, tmp_path):
    """DejaVu Sans Mono stands for the font of a machine; the usual font is said to lack its letters."""
    from matplotlib import font_manager

    broken, other = tmp_path / "a cjk regular.ttf", font_manager.findfont("DejaVu Sans Mono")
    broken.write_bytes(b"no font")
    usual, has = font_manager.findfont("DejaVu Sans"), lettering._has
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(broken), str(other)])
    monkeypatch.setattr(lettering, "_has", lambda path, letter: has(path, letter) and (path != usual or letter < "a"))
    lettering._fonts_for.cache_clear()
    try:
        letters = Lettering(["AB", "xyz"], [1, 2])
        assert letters.note is None and letters._paths == (str(usual), str(other))
        assert [part for part, _ in letters._runs("ABxyzC", 12)] == ["AB", "xyz", "C"]
        with letters.used():
            figure = plots.new_figure(2, 1)
            text = figure.text(0.1, 0.5, "ABxyz")
            assert text.get_fontfamily() == ["DejaVu Sans", "DejaVu Sans Mono"]
    finally:
        lettering._fonts_for.cache_clear()


def test_chinese_japanese_and_korean_where_the_machine_has_a_font():
    letters = Lettering(NAMES, [1, 2, 3, 4])
    if letters.note is not None:
        pytest.skip(letters.note)
    assert letters.names == NAMES
    for name in NAMES:
        drawn = Image.new("L", (letters.width(name, 20), 30))
        letters.write(ImageDraw.Draw(drawn), (0, 15), name, 20, 255)
        assert np.asarray(drawn).any()


def test_overlays_have_names_and_scores_where_there_is_room():
    letters = Lettering(["cat", "dog"], [1, 2])
    image = torch.full((3, 600, 600), 0.5)
    mask = np.ones((200, 300), dtype=bool)
    one = Instance(50, 60, mask, 0, 0.93)
    named, scored = overlay(image, [one], letters), overlay(image, [one._replace(score=0.5)], letters)
    bare = overlay(image, [one], Lettering(["cat"], [1]), scores=False)
    assert named.shape == (600, 600, 3) and not np.array_equal(named, scored)
    # The name lies in the upper left corner of the instance; below it nothing differs.
    differs = (named != bare).any(2)
    assert differs[50:75, 60:140].any() and not differs[80:].any()
    # Of many small ones none has room.
    small = [Instance(20 * row, 20 * column, mask[:9, :9], 1, 0.9) for row in range(20) for column in range(20)]
    many, plain = overlay(image, small, letters), overlay(image, small, letters, scores=False)
    assert np.array_equal(many, plain)


def test_small_images_are_enlarged_and_names_stay_inside():
    letters = Lettering(["a name of some length", "dog"], [1, 2])
    corner = Instance(38, 27, np.ones((2, 3), dtype=bool), 0, 0.9)
    assert overlay(torch.zeros(3, 40, 30), [corner], letters).shape == (520, 390, 3)
