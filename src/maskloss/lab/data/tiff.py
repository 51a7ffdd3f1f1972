"""TIFFs, whole or a piece of one, read from the tiles or strips that it touches.

A piece has a name of its own, `slide.tif#4096,0,2048x2048.tif`, so that whatever reads an image reads it too.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskloss.errors import Cause, require
from maskloss.lab.files import check_file, explain, in_truth

Array = NDArray[Any]

SUFFIXES = frozenset({".tif", ".tiff"})
# Beyond this an image does not fit into memory several times over.
MOST_PIXELS = 1 << 28
# What a compressed TIFF may have beyond its pixels; much more of it would unpack into more memory than the image.
_OVERHEAD = 1 << 16
# More planes than this are a stack, not channels.
MOST_CHANNELS = 16
# To read a piece, no more than this is unpacked at once.
_MOST_AT_ONCE = 1 << 26
_ORIENTATION = 274
_PIECE = re.compile(r"(.+)#(\d+),(\d+),(\d+)x(\d+)\.tif")

READABLE = "every image must be readable"
SMALL_ENOUGH = f"an image must have at most {MOST_PIXELS:,} pixels"
_WHOLE = "an image that is read in pieces must be one page in tiles or strips"


class Window(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def window_of(path: Path) -> tuple[Path, Window | None]:
    """Return the file of a path, and the piece of it that is meant; None: all of it."""
    found = _PIECE.fullmatch(path.name)
    if found is None:
        return path, None
    top, left, height, width = (int(number) for number in found.groups()[1:])
    return path.with_name(found[1]), Window(top, left, height, width)


def windows(path: Path, side: int) -> list[tuple[str, Window]]:
    """Cut an image into pieces of about this side, and return what to put behind its name for each.

    Raises:
        Cause: no TIFF, or one of which no piece can be read by itself.
    """
    if not is_tiff(path):
        raise Cause(SMALL_ENOUGH, f"{path} has more, and is no TIFF", "TIFFs are read in pieces: convert it, in tiles")
    with opened(path) as (series, (height, width)):
        page = series.keyframe
        if len(series.pages) > 1 or orientation_of(series) != 1:
            raise Cause(_WHOLE, f"{path} has several, or is to be turned", "write it once more, in tiles")
        segment = int(np.prod(page.chunks)) if not page.is_memmappable else 0
        if segment > _MOST_AT_ONCE:
            raise Cause(
                _WHOLE, f"the strips or tiles of {path} have {segment:,} values", "write it in tiles of 256 x 256"
            )
    rows, columns = (np.linspace(0, length, -(-length // side) + 1).round().astype(int) for length in (height, width))
    return [
        (f"#{top},{left},{bottom - top}x{right - left}.tif", Window(top, left, bottom - top, right - left))
        for top, bottom in zip(rows[:-1].tolist(), rows[1:].tolist(), strict=True)
        for left, right in zip(columns[:-1].tolist(), columns[1:].tolist(), strict=True)
    ]


def is_tiff(path: Path) -> bool:
    """Whether a path is that of a TIFF, or of a piece of one, by its name."""
    return path.suffix.lower() in SUFFIXES and window_of(path)[0].is_file()


def end_of(series: Any) -> int:
    """Return where the last pixel of a TIFF ends in its file."""
    pages = [page for page in series.pages if page is not None]
    return max(
        (sum(piece) for page in pages for piece in zip(page.dataoffsets, page.databytecounts, strict=False)), default=0
    )


def orientation_of(series: Any) -> int:
    """Return how a TIFF is to be turned, as in EXIF: 1 is upright."""
    tag = series.keyframe.tags.get(_ORIENTATION)
    found = 1 if tag is None else int(tag.value)
    return found if 1 <= found <= 8 else 1


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[Any, tuple[int, int]]]:
    """Open the first series of a TIFF, and say height and width of its plane, or of the piece, before any is read."""
    tifffile = require("tifffile", "train")
    # Its warnings of a damaged file are for whoever asked for logs, not for the terminal.
    logger = logging.getLogger("tifffile")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    source, window = window_of(path)
    check_file(source, READABLE)
    try:
        with tifffile.TiffFile(source) as file:
            series = file.series[0]
            size = _plane(source, series.axes, series.shape)
            if window is None:
                yield series, size
            elif window.top + window.height > size[0] or window.left + window.width > size[1]:
                raise Cause(
                    READABLE, f"{path} lies outside of {source}, which is {size[0]} x {size[1]}", "see the name"
                )
            else:
                yield series, (window.height, window.width)
    except Cause:
        raise
    except Exception as error:  # noqa: BLE001 (a broken file can make a parser fail in any way)
        raise broken(source, error) from None


def _plane(path: Path, axes: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return height and width."""
    sides = [(axis, length) for axis, length in zip(axes, shape, strict=True) if length > 1]
    lengths = [length for _, length in sides]
    if len(sides) == 3 and sides[0][0] in "ZT" and sides[-1][0] not in "SC":
        raise Cause("an image must have one plane", f"{path} is a stack of {lengths[0]}", "cut it into its planes")
    channels = [length for length in lengths if length <= MOST_CHANNELS]
    if len(sides) > 3 or (len(sides) == 3 and not channels):
        raise not_a_plane(path, shape)
    if len(sides) == 3:
        lengths = lengths[1:] if _channels_first(sides) else lengths[:2]
    # What is one pixel high or wide was dropped above.
    height, width = lengths if len(lengths) == 2 else (shape[axes.find("Y")], shape[axes.find("X")])
    return height, width


def _channels_first(sides: Sequence[tuple[str, int]]) -> bool:
    return len(sides) == 3 and sides[-1][0] not in "SC" and sides[0][1] <= MOST_CHANNELS


def read(path: Path) -> tuple[Array, int] | None:
    """Read by tifffile, with the orientation; None where it lacks the codec, which Pillow may have."""
    with opened(path) as (series, size):
        check_pixels(path, *size)
        stored = sum(sum(page.databytecounts) for page in series.pages if page is not None)
        if stored > 2 * series.nbytes + _OVERHEAD:
            raise Cause(READABLE, f"{path} has {stored:,} bytes for {series.nbytes:,}", "it may be damaged")
        orientation, window = orientation_of(series), window_of(path)[1]
        try:
            array = series.asarray() if window is None else _read_window(series, window)
        except (ValueError, KeyError, NotImplementedError) as error:
            lacking = "imagecodecs" in str(error) or "codec" in str(error).lower()
            if lacking and window is not None:
                raise Cause(
                    READABLE, f"{path}: {explain(error)}", "pip install imagecodecs reads it in pieces"
                ) from None
            if lacking:
                return None
            raise
        sides = [(axis, length) for axis, length in zip(series.axes, series.shape, strict=True) if length > 1]
    if window is not None:
        return array, orientation
    array = np.squeeze(array)
    return np.asarray(np.moveaxis(array, 0, -1) if _channels_first(sides) else array), orientation


def _read_window(series: Any, window: Window) -> Array:
    """Read a piece of a page, `[H, W]` or `[H, W, C]`, from the segments that it touches."""
    page, file = series.keyframe, series.keyframe.parent.filehandle
    top, left, height, width = window
    # As tifffile shapes a page: separate channels, slices, rows, columns, channels of a pixel.
    planes, _, rows, columns, samples = page.shaped
    if page.is_memmappable:
        whole = file.memmap_array(page.parent.byteorder + page.dtype.char, page.shaped, page.dataoffsets[0])
        found = np.array(whole[:, 0, top : top + height, left : left + width])
    else:
        down, across = page.chunks[-3:-1] if samples > 1 else page.chunks[-2:]
        wide = -(-columns // across)
        every = wide * -(-rows // down)
        touched = [
            plane * every + row * wide + column
            for plane in range(planes)
            for row in range(top // down, -(-(top + height) // down))
            for column in range(left // across, -(-(left + width) // across))
        ]
        found = np.zeros((planes, height, width, samples), page.dtype)
        for index in touched:
            file.seek(page.dataoffsets[index])
            # Of a segment without bytes all is 0.
            data = file.read(page.databytecounts[index]) or None
            segment, (plane, _, y, x, _), _ = page.decode(data, index, jpegtables=page.jpegtables)
            if segment is not None:
                above, before = max(0, top - y), max(0, left - x)
                part = segment[0, above : top + height - y, before : left + width - x]
                y, x = y + above - top, x + before - left
                found[plane, y : y + part.shape[0], x : x + part.shape[1]] = part
    found = np.moveaxis(found, 0, -1).reshape(height, width, samples * planes) if planes > 1 else found[0]
    return found[..., 0] if found.shape[-1] == 1 else found


def check_pixels(path: Path, height: int, width: int) -> None:
    """Raise if an image is too large to be read at once."""
    if height * width > MOST_PIXELS:
        hint = "cut it into smaller images; a TIFF is read in pieces with --crop, or --tile of predict"
        raise Cause(SMALL_ENOUGH, f"{path} has {height:,} x {width:,} = {height * width:,}", hint)


def not_a_plane(path: Path, shape: Sequence[int]) -> Cause:
    """Make an error of the shape of an array."""
    return Cause(
        "an image must have one plane",
        f"{path} has the shape {' x '.join(map(str, shape))}",
        "cut a stack into its planes; channels come first or last",
    )


def broken(path: Path, error: BaseException) -> Cause:
    """Make an error of what a parser says."""
    what, hint = in_truth(path) or (explain(error), "open it in a viewer: it may be damaged")
    return Cause(READABLE, f"{path}: {what}", hint)
