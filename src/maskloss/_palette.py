"""The colors of every picture, in one place: they stay apart for every common kind of color blindness."""

from __future__ import annotations

import colorsys

# Text, what is beside the point, and lines that should hardly be seen.
INK, GRAY, PALE = "#343a40", "#868e96", "#dee2e6"
# Predictions and what is good; points that were chosen and what stands out. Soft ones lie beside the strong ones.
TEAL, TEAL_SOFT, ORANGE = "#0b7285", "#66c2d1", "#e8590c"
SAND, SAND_SOFT, SOFT = "#b08968", "#ddc7ae", "#ced4da"
VIOLET, VIOLET_SOFT, ORANGE_SOFT = "#5f3dc4", "#b4a2e6", "#f5b08c"
WINE, WINE_SOFT = "#7a1d2e", "#cc98a3"
NAVY, NAVY_SOFT = "#1b2a5c", "#97a3cc"
PINK, PINK_SOFT = "#d65fd6", "#eec3ee"
# From "surely not" to "surely": the probability of a mask.
CONFIDENCE = ("#ffffff", "#c5e9ef", "#3bb0c4", TEAL)
# From a small to a large loss at a point; darker as it grows.
LOSS = ("#f8e3b0", "#f5a300", "#d9480f", "#7a1d2e", "#33071f")
# Instances. Bright enough for dark pictures, dark enough for white paper.
COLORS = ("#f5a300", "#66d0ff", "#0fa37a", "#f7ec59", "#4c74e6", "#d9480f", "#b86bb0", "#ced4da")
# Between the hues of two classes that follow each other: the golden angle, so that none comes again.
_TURN = 0.381966
# Curves.
LINES = (TEAL, ORANGE, "#4c74e6", "#b86bb0", GRAY)


def class_color(number: int) -> str:
    """Return the color of a class: none is that of another one, however many there are."""
    if number < len(COLORS):
        return COLORS[number]
    lightness, saturation = ((0.6, 0.9), (0.4, 0.8), (0.78, 0.7), (0.5, 0.45))[number % 4]
    red, green, blue = colorsys.hls_to_rgb(_TURN * number % 1, lightness, saturation)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"
