"""Draw docs/images/house.svg, the packages and what they import, from the imports themselves.

python scripts/house.py            write the picture
python scripts/house.py --check    fail where the committed picture is not that of the code, or imports run in a circle

An arrow is left out where a longer way leads to the same place.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import NamedTuple

import grimp

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "house.svg"
# Title, package, and what is drawn as a panel of its own, or only starts the command line.
PANELS = (
    ("maskloss.lab: what a person runs", "maskloss.lab", ()),
    ("maskloss: what a training step needs", "maskloss", ("lab", "__main__")),
    ("maskloss.ops: the operations and their backends", "maskloss.ops", ()),
)
WIDTH, ROOM, FLOOR, GAP, TITLE, MARGIN = 960, 26, 58, 14, 44, 16
LETTER = 7.0
STYLE = """\
text { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #343a40; text-anchor: middle }
.title { font: 600 15px system-ui, sans-serif; text-anchor: start }
rect { fill: #e3f4f7; stroke: #0b7285 } .package { fill: #c5e9ef }
path { fill: none; stroke: #868e96; stroke-width: 1.2 } marker path { fill: #868e96; stroke: none }
@media (prefers-color-scheme: dark) {
  text { fill: #e9ecef } rect { fill: #12343b; stroke: #66c2d1 } .package { fill: #17505b }
  path { stroke: #adb5bd } marker path { fill: #adb5bd }
}"""


class Circle(Exception):
    """Imports that lead back to where they began."""


class Room(NamedTuple):
    """A module or package, and where it is drawn."""

    x: float
    y: float
    width: float


def imports_within(graph: grimp.ImportGraph, package: str, without: Iterable[str]) -> dict[str, set[str]]:
    """Return what each module or package directly below `package` imports of the others."""
    names = sorted(child.removeprefix(f"{package}.") for child in graph.find_children(package))
    names = [name for name in names if name not in without]
    found: dict[str, set[str]] = {name: set() for name in names}
    for importer, imported in itertools.permutations(names, 2):
        below = f"{package}.{imported}"
        modules = [f"{package}.{importer}", *graph.find_descendants(f"{package}.{importer}")]
        if any(
            target == below or target.startswith(f"{below}.")
            for module in modules
            for target in graph.find_modules_directly_imported_by(module)
        ):
            found[importer].add(imported)
    return found


def floors_of(imports: Mapping[str, set[str]]) -> dict[str, int]:
    """Put each room one floor above the highest that it imports."""
    floors: dict[str, int] = {}

    def floor_of(name: str, above: tuple[str, ...]) -> int:
        if name in above:
            raise Circle(" -> ".join([*above[above.index(name) :], name]))
        if name not in floors:
            floors[name] = 1 + max((floor_of(each, (*above, name)) for each in sorted(imports[name])), default=-1)
        return floors[name]

    for name in imports:
        floor_of(name, ())
    return floors


def without_detours(imports: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Leave out imports of what is reached through another import as well."""

    def reach(name: str) -> set[str]:
        return imports[name].union(*(reach(each) for each in imports[name]))

    return {name: {each for each in direct if not any(each in reach(other) for other in direct)}
            for name, direct in imports.items()}  # fmt: skip


def place(floors: Mapping[str, int], arrows: Mapping[str, set[str]], top: float) -> dict[str, Room]:
    """Lay out the rooms: the lowest floor first, each room above the middle of those that its arrows lead to."""
    highest = max(floors.values())
    rooms: dict[str, Room] = {}
    for floor in range(highest + 1):
        here = [name for name in floors if floors[name] == floor]
        middles = {
            name: sum(rooms[each].x for each in arrows[name]) / len(arrows[name]) if arrows[name] else WIDTH / 2
            for name in here
        }
        here.sort(key=lambda name: (middles[name], name))
        widths = [LETTER * len(name) + 26 for name in here]
        spare = WIDTH - 2 * MARGIN - sum(widths)
        gap = max(spare / (len(here) + 1), GAP)
        x = MARGIN + gap
        for name, width in zip(here, widths, strict=True):
            rooms[name] = Room(x + width / 2, top + (highest - floor) * FLOOR, width)
            x += width + gap
    return rooms


def panel(graph: grimp.ImportGraph, title: str, package: str, without: Iterable[str], top: float) -> tuple[str, float]:
    """Draw one package; return the drawing and where the next one begins."""
    imports = imports_within(graph, package, without)
    floors = floors_of(imports)
    arrows = without_detours(imports)
    rooms = place(floors, arrows, top + TITLE)
    drawn = [f'<text class="title" x="{MARGIN}" y="{top + 24:.0f}">{escape(title)}</text>']
    for name, direct in arrows.items():
        start = rooms[name]
        for each in sorted(direct):
            end = rooms[each]
            y1, y2 = start.y + ROOM, end.y - 4
            bend = (y2 - y1) / 2
            drawn.append(
                f'<path marker-end="url(#tip)" d="M{start.x:.0f} {y1:.0f} C{start.x:.0f} {y1 + bend:.0f} '
                f'{end.x:.0f} {y2 - bend:.0f} {end.x:.0f} {y2:.0f}"/>'
            )
    for name, room in rooms.items():
        kind = ' class="package"' if graph.find_children(f"{package}.{name}") else ""
        drawn.append(
            f'<rect{kind} x="{room.x - room.width / 2:.0f}" y="{room.y:.0f}" width="{room.width:.0f}" height="{ROOM}" '
            f'rx="5"/><text x="{room.x:.0f}" y="{room.y + 18:.0f}">{escape(name)}</text>'
        )
    return "\n".join(drawn), max(room.y for room in rooms.values()) + ROOM + GAP


def draw() -> str:
    """Return the picture."""
    graph = grimp.build_graph("maskloss", exclude_type_checking_imports=True)
    top, parts = 0.0, []
    for title, package, without in PANELS:
        part, top = panel(graph, title, package, without, top)
        parts.append(part)
    tip = (
        '<marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z"/></marker>'
    )
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top:.0f}" width="{WIDTH}" height="{top:.0f}">\n'
        f"<style>\n{STYLE}\n</style>\n<defs>{tip}</defs>\n{body}\n</svg>\n"
    )


def main() -> int:
    """Write the picture, or compare it."""
    try:
        picture = draw()
    except Circle as circle:
        print(f"imports run in a circle: {circle}", file=sys.stderr)  # noqa: T201
        return 1
    if "--check" not in sys.argv[1:]:
        PICTURE.write_text(picture, encoding="utf-8")
        return 0
    if PICTURE.read_text(encoding="utf-8") != picture:
        print("docs/images/house.svg is not that of the code: run python scripts/house.py", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
