"""Draw the logo: a mask, and the points at which it is supervised, dense where its edge is."""

from __future__ import annotations

import math
import random
from pathlib import Path

STATIC = Path(__file__).parent.parent / "_static"
COLORS = {"logo.svg": ("#0b7285", "#e8590c"), "logo-dark.svg": ("#66d9e8", "#ffa94d")}


def radius(angle: float) -> float:
    """Where the edge of the mask is, in a picture 128 units wide."""
    return 38 + 6 * math.cos(3 * angle + 0.6) + 3.5 * math.sin(2 * angle)


def outline(steps: int = 72) -> str:
    turns = [2 * math.pi * step / steps for step in range(steps)]
    return "M" + "L".join(f"{64 + radius(a) * math.cos(a):.1f} {64 + radius(a) * math.sin(a):.1f}" for a in turns) + "Z"


def points(count: int = 62, apart: float = 7.4) -> list[tuple[float, float]]:
    """Draw points that keep their distance: three in four close to the edge, the others anywhere."""
    draw = random.Random(4)
    kept: list[tuple[float, float]] = []
    while len(kept) < count:
        angle = draw.uniform(0, 2 * math.pi)
        if len(kept) < 0.75 * count:
            reach = radius(angle) + draw.gauss(0, 2.2)
            x, y = 64 + reach * math.cos(angle), 64 + reach * math.sin(angle)
        else:
            x, y = draw.uniform(8, 120), draw.uniform(8, 120)
        space = apart if len(kept) >= 0.75 * count else 0.62 * apart
        if all(math.dist((x, y), other) > space for other in kept):
            kept.append((x, y))
    return kept


def main() -> None:
    for name, (body, dots) in COLORS.items():
        circles = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.1"/>' for x, y in points())
        STATIC.joinpath(name).write_text(
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 128 128" role="img" aria-label="maskloss">'
            f'<path d="{outline()}" fill="{body}" fill-opacity=".22" stroke="{body}" stroke-width="2.5"/>'
            f'<g fill="{dots}">{circles}</g></svg>\n'
        )


if __name__ == "__main__":
    main()
