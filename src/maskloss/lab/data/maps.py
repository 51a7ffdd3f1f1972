"""Files that say for each pixel what it belongs to: label maps, colors, classes, Cellpose's files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maskloss.errors import Cause
from maskloss.lab.data import npy
from maskloss.lab.data.images import check_lossless, is_color, read_head, read_pixels, read_size
from maskloss.lab.data.tiff import Array

# How a number is made of a pixel: its value; its color, red + 256 green + 65536 blue; or the number of the connected
# region of equal values, or of equal colors, that it lies in, counted class by class.
NUMBERS, COLORS, COMPONENTS, COLORED_COMPONENTS = "numbers", "colors", "components", "colored components"
READINGS = (NUMBERS, COLORS, COMPONENTS, COLORED_COMPONENTS)
REGIONAL, COLORED = frozenset({COMPONENTS, COLORED_COMPONENTS}), frozenset({COLORS, COLORED_COMPONENTS})
# A piece of fewer pixels is a stray, no second object; a value in this many strays is scattered.
_STRAY, _PIECES = 8, 2
_RULE = "a label map must hold one whole number for each pixel"


def read_map(path: Path, reading: str = NUMBERS, void: tuple[int, ...] = ()) -> NDArray[np.int32]:
    """Read a map: `[H, W]`, 0 for the background."""
    if path.suffix.lower() in npy.SUFFIXES:
        values = _whole_numbers(npy.read_masks(path), path)
    else:
        check_lossless(path)
        pixels = read_pixels(path, labels=reading not in COLORED)
        values = _colors(pixels, path) if reading in COLORED else _whole_numbers(pixels, path)
    return components(values, void)[0] if reading in REGIONAL else values


def has_colors(path: Path) -> bool:
    """Whether a map has colors that are not gray, so that they can be no numbers."""
    if path.suffix.lower() in npy.SUFFIXES or not is_color(path):
        return False
    check_lossless(path)
    pixels = read_pixels(path, labels=True)
    return pixels.ndim == 3 and bool((pixels[..., :1] != pixels[..., 1:3]).any())


def map_size(path: Path) -> tuple[int, int]:
    """Read height and width of a map off the head of its file."""
    return npy.read_size(path) if path.suffix.lower() in npy.SUFFIXES else read_size(path)


def components(values: NDArray[np.int32], void: tuple[int, ...] = ()) -> tuple[NDArray[np.int32], dict[int, int]]:
    """Number the connected regions of equal values, diagonal neighbors included.

    Returns:
        The numbers, `[H, W]`, and the value of each.
    """
    from scipy.ndimage import label

    numbers = np.zeros(values.shape, dtype=np.int32)
    value_of: dict[int, int] = {}
    for value in np.unique(values):
        if value == 0 or int(value) in void:
            numbers[values == value] = -1 if value else 0
            continue
        regions, count = label(values == value, structure=np.ones((3, 3), dtype=np.int8))
        numbers[regions > 0] = regions[regions > 0] + len(value_of)
        value_of.update({len(value_of) + each + 1: int(value) for each in range(count)})
    return numbers, value_of


def _whole_numbers(array: Array, path: Path) -> NDArray[np.int32]:
    array = _one_channel(np.squeeze(array) if array.ndim > 2 else array)
    if array.ndim != 2:
        raise Cause(
            _RULE,
            f"{path} has the shape {' x '.join(map(str, array.shape))}",
            "store one channel: 0 is background, every instance has a number; volumes are not trained on, cut stacks "
            "into planes, images and labels alike",
        )
    if array.dtype.kind not in "buif":
        raise Cause(_RULE, f"{path} holds values of type {array.dtype}", "store integers")
    low, high = (array.min(), array.max()) if array.size else (0, 0)
    if array.dtype.kind == "f" and not (np.isfinite([low, high]).all() and np.array_equal(np.rint(array), array)):
        raise Cause(_RULE, f"{path} holds fractions", "store integers")
    if low < 0 or high >= 2**31:
        raise Cause(_RULE, f"{path} holds numbers from {low} to {high}", "number instances from 1")
    return array.astype(np.int32)


def _one_channel(array: Array) -> Array:
    """Drop channels that say the same; where all is of one color, the alpha channel is the map."""
    if array.ndim != 3 or array.shape[-1] not in {2, 3, 4}:
        return array
    alpha = None if array.shape[-1] == 3 else array[..., -1]
    colors = array if alpha is None else array[..., :-1]
    gray = colors[..., 0]
    if (colors != colors[..., :1]).any():
        return array
    if alpha is None or alpha.min() == alpha.max():
        return gray
    if gray.min() == gray.max():
        return alpha
    # Two channels that differ are two planes.
    return array if array.shape[-1] == 2 else np.where(alpha > 0, gray, 0)


def _colors(array: Array, path: Path) -> NDArray[np.int32]:
    if array.ndim == 2 and array.dtype == np.uint8:
        # Gray is a color.
        array = np.repeat(array[..., None], 3, axis=-1)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] not in {3, 4}:
        shape = " x ".join(map(str, array.shape))
        raise Cause("a map of colors must be a color PNG", f"{path} is {shape} {array.dtype}", "store 8 bits a channel")
    red, green, blue = (array[..., channel].astype(np.int32) for channel in range(3))
    numbers = red + 256 * green + 65536 * blue
    # What is transparent has no color.
    return np.where(array[..., 3] > 0, numbers, 0) if array.shape[-1] == 4 and array[..., 3].any() else numbers


def fitting_size(image: Path, mapped: Path) -> tuple[int, int]:
    """Return the size of a map, before any pixel is read: a small file may hold a large map."""
    head, found = read_head(image), map_size(mapped)
    if found not in (head.displayed, head.stored):
        height, width = head.displayed
        raise Cause(
            "a label map must have the size of its image",
            f"{mapped.name} is {found[0]} x {found[1]}, {image.name} is {height} x {width}",
            "store both at the same resolution",
        )
    return found


def count_apart(labels: NDArray[np.int32], values: list[int]) -> tuple[int, int]:
    """Count the values with pixels in several places, and those in pieces of a few pixels or in thin lines."""
    from scipy.ndimage import find_objects, label

    apart = scattered = 0
    ranks = np.searchsorted(np.array([0, *values]), labels)
    for place, box in enumerate(find_objects(ranks), start=1):
        if box is not None:
            regions, _ = label(ranks[box] == place, structure=np.ones((3, 3), dtype=np.int8))
            pieces = np.bincount(regions.ravel())[1:]
            apart += int((pieces >= _STRAY).sum() > 1)
            own = ranks[box] == place
            block = own[:-1, :-1] & own[1:, :-1] & own[:-1, 1:] & own[1:, 1:]
            line = pieces.sum() >= _STRAY and not block.any()
            scattered += int(line or (len(pieces) >= _PIECES and pieces.mean() < _STRAY))
    return apart, scattered
