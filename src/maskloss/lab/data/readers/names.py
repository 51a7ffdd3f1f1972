"""Names of classes, where a folder has them in a file of their own."""

from __future__ import annotations

import codecs
import csv
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any

from maskloss.errors import Cause, MaskLossError, require
from maskloss.lab.data.tree import Tree
from maskloss.lab.files import check_file, explain

# Lists with a name in each line: the first is class 0.
LISTS = ("classes.txt", "class_names.txt", "obj.names", "predefined_classes.txt", "codes.txt", "labels.txt")
_MOST_BYTES = 1 << 22


def read_text(tree: Tree, path: str) -> str:
    """Read a text file."""
    rule = "a list must be text"
    file = tree.path(path)
    check_file(file, rule)
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise Cause(rule, f"{file} has more than {_MOST_BYTES:,} bytes", "is it the right file?")
        content = file.read_bytes()
        # Windows' PowerShell writes UTF-16.
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return content.decode("utf-16" if wide else "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise Cause(rule, f"{file}: {explain(error)}", "store it as UTF-8") from None


def listed(tree: Tree) -> list[str]:
    """Return the lines of the list of names in a folder; empty: there is none."""
    for path in tree.ending(".txt", ".names"):
        if PurePosixPath(path).name.lower() in LISTS:
            return [line.strip() for line in read_text(tree, path).splitlines() if line.strip()]
    return []


def of_values(tree: Tree) -> dict[int, str]:
    """Return the names of the values of label maps, from labelmap.txt, Roboflow's _classes.csv, JSON, or a list."""
    for path in tree.ending("labelmap.txt"):
        rows = [line.split(":") for line in read_text(tree, path).splitlines() if line.strip() and line[0] != "#"]
        return {number: row[0] for number, row in enumerate(rows)}
    for path in tree.ending("_classes.csv"):
        table = [[cell.strip() for cell in row] for row in csv.reader(read_text(tree, path).splitlines())]
        return {int(row[0]): row[1] for row in table if len(row) > 1 and row[0].isdecimal()}
    for path in tree.ending(".json"):
        if PurePosixPath(path).name.lower() in {"dataset_meta.json", "label_map.json", "labels.json", "classes.json"}:
            with suppress(MaskLossError):  # told as one of the broken files of the folder
                found = _of_json(tree.json(path))
                if found:
                    return found
    return dict(enumerate(listed(tree)))


def colors(tree: Tree) -> dict[int, str]:
    """Return the names of colors, red + 256 green + 65536 blue, from CVAT's labelmap.txt or a class_dict.csv."""
    found: dict[int, str] = {}
    for path in tree.ending("labelmap.txt"):
        for line in read_text(tree, path).splitlines():
            name, _, rest = line.partition(":")
            _color(found, name, rest.split(":")[0].split(","))
    for path in tree.ending("class_dict.csv", "label_colors.csv"):
        for row in csv.reader(read_text(tree, path).splitlines()):
            _color(found, row[0] if row else "", row[1:4])
    return found


def of_colors(tree: Tree) -> list[str]:
    """Return the names that CVAT's label_colors.txt lists behind their colors; empty: there is none."""
    for path in tree.ending("label_colors.txt"):
        rows = [line.split(maxsplit=3) for line in read_text(tree, path).splitlines()]
        return [row[3] for row in rows if len(row) == 4]
    return []


def _color(found: dict[int, str], name: str, channels: list[str]) -> None:
    if name.strip() and name[0] != "#" and len(channels) == 3 and all(each.strip().isdecimal() for each in channels):
        red, green, blue = (int(each) for each in channels)
        found[red + 256 * green + 65536 * blue] = name.strip()


def _of_json(content: Any) -> dict[int, str]:
    if isinstance(content, dict):
        content = content.get("label_map", content.get("labels", content))
    if isinstance(content, list) and all(isinstance(each, str) for each in content):
        return dict(enumerate(content))
    if isinstance(content, dict):
        return {int(each): str(name) for each, name in content.items() if str(each).isdecimal()}
    return {}


def read_yaml(tree: Tree, path: str) -> dict[str, Any]:
    """Read a YAML file that holds a dict."""
    yaml = require("yaml", "train")
    rule = "the description of a data set must be YAML"
    try:
        content = yaml.safe_load(read_text(tree, path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Cause(rule, f"{tree.path(path)}: {explain(error)}", "see the file of a YOLO data set") from None
    if not isinstance(content, dict):
        raise Cause(rule, f"{tree.path(path)} holds a {type(content).__name__}", "is it the right file?")
    return content
