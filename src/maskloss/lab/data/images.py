"""Reading images: photographs by Pillow, microscopy by tifffile, and what brings their values to [0, 1].

An image is a numpy array `[H, W, C]`: uint8 as it is stored, everything else float32. Deep images (more than 8 bits, or
floats) have no natural range, so percentiles of each channel decide what is black and what is white.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskloss.errors import Cause, require
from maskloss.lab.files import check_file, explain

Array = NDArray[Any]

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".bmp", ".dib", ".webp", ".gif", ".jp2"}
    | {".avif", ".tga", ".ppm", ".pgm", ".pbm", ".pnm"}
)
TIFF = frozenset({".tif", ".tiff"})
_ORIENTATION = 274
_JPEG_IN_TIFF = frozenset({6, 7, 33003, 33005, 34712})
# What is black and what is white in an image without a natural range. A few hot pixels must not decide.
BLACK, WHITE = 1.0, 99.8
# Beyond this an image does not fit into memory several times over.
MOST_PIXELS = 1 << 28
# What a compressed TIFF may have beyond its pixels; much more of it would unpack into more memory than the image.
_OVERHEAD = 1 << 16
# More planes than this are a stack, not channels.
MOST_CHANNELS = 16

_READABLE = "every image must be readable"
_SMALL_ENOUGH, _CUT = f"an image must have at most {MOST_PIXELS:,} pixels", "cut it into smaller images"


class _OwnRules:
    """While any thread is inside: no warnings, and this module's limit of pixels in place of Pillow's.

    Both belong to the process. Of two threads in `warnings.catch_warnings`, the first to leave turns warnings on again
    for the other, and the last may leave them off for good.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._filters = warnings.catch_warnings()
        self._limit: int | None = None

    def __enter__(self) -> None:
        pillow: Any = require("PIL.Image", "train")
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.simplefilter("ignore")
                self._limit, pillow.MAX_IMAGE_PIXELS = pillow.MAX_IMAGE_PIXELS, MOST_PIXELS

    def __exit__(self, *_: object) -> None:
        pillow: Any = require("PIL.Image", "train")
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._filters.__exit__(None, None, None)
                pillow.MAX_IMAGE_PIXELS = self._limit


_own_rules = _OwnRules()


def read_image(path: Path, *, upright: bool = True) -> Array:
    """Read an image: `[H, W, C]`, uint8 if it has 8 bits, else float32; gray ones have one channel.

    Args:
        path: of the file.
        upright: turn it as its orientation tag says, as every viewer does; False: leave it as it is stored.
    """
    return as_image(read_pixels(path, upright=upright), path)


def as_image(array: Array, path: Path) -> Array:
    """Bring pixels `[H, W]` or `[H, W, C]` into the form that `read_image` returns; `path` is what to call them."""
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] > MOST_CHANNELS:
        raise _not_a_plane(path, array.shape)
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if not np.issubdtype(array.dtype, np.integer) and not np.issubdtype(array.dtype, np.floating):
        raise Cause(_READABLE, f"{path} holds values of type {array.dtype}", "store integers or floats")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise Cause(_READABLE, f"{path} holds values that are not finite", "replace them")
    return array


class Head(NamedTuple):
    """What the head of a file says."""

    height: int  # as stored, pixels
    width: int  # as stored, pixels
    orientation: int  # how to turn it, as in EXIF: 1 is upright

    @property
    def displayed(self) -> tuple[int, int]:
        """Height and width as every viewer shows it."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)

    @property
    def stored(self) -> tuple[int, int]:
        """Height and width without turning."""
        return self.height, self.width


def read_head(path: Path) -> Head:
    """Read the size of an image, and how it is to be turned, off the head of its file."""
    if path.suffix.lower() in TIFF and path.is_file():
        # Pillow does not know every TIFF that tifffile does, nor the other way round.
        try:
            with _tiff(path) as (series, size):
                head = Head(*size, _tiff_orientation(series))
                lost = _end(series) > series.parent.filehandle.size
        except Cause as error:
            if error.parts is None or error.parts[0] != _READABLE:
                raise
        else:
            if lost:
                raise Cause(_READABLE, f"{path} ends before its last pixel", "copy it again: it was cut off")
            return head
    with _pillow(path) as opened:
        orientation = _orientation(opened)
        # Pillow tells the size of a TIFF as it is displayed, and of everything else as it is stored.
        width, height = opened.size
        turned = opened.format == "TIFF" and orientation >= 5
        return Head(*((width, height) if turned else (height, width)), orientation)


def read_size(path: Path) -> tuple[int, int]:
    """Read height and width of an image as it is displayed off the head of its file."""
    return read_head(path).displayed


def check_lossless(path: Path) -> None:
    """Raise if a format keeps values only about: a map read from it has numbers that nobody drew."""
    lossy = None
    if path.suffix.lower() in TIFF and path.is_file():
        with contextlib.suppress(Cause), _tiff(path) as (series, _):
            lossy = "JPEG in TIFF" if int(getattr(series.keyframe, "compression", 1)) in _JPEG_IN_TIFF else None
    else:
        with _pillow(path) as opened:
            if opened.format in {"JPEG", "MPO", "JPEG2000"}:
                lossy = opened.format
            elif opened.format == "WEBP":
                with path.open("rb") as file:
                    lossy = None if b"VP8L" in file.read(64) else "lossy WebP"
    if lossy:
        raise Cause(
            "label maps must be in a format that keeps every value",
            f"{path} is {lossy}, which is lossy: between two instances it has values that stand for none",
            "export the masks again as PNG or TIFF; what is lost in a JPEG cannot be restored",
        )


def is_color(path: Path) -> bool:
    """Whether a file stores a color for each pixel, and no number or index into a palette."""
    if path.suffix.lower() in TIFF and path.is_file():
        # Pillow does not know every TIFF.
        with _tiff(path) as (series, _):
            return bool(series.axes.endswith("S") and series.shape[-1] in {3, 4})
    with _pillow(path) as opened:
        return opened.mode in {"RGB", "RGBA"}


def to_unit(image: Array, percentile: bool) -> NDArray[np.float32]:
    """Scale an image to [0, 1]: by the range of its type, or between percentiles of each channel."""
    if image.dtype == np.uint8 and not percentile:
        unit: NDArray[np.float32] = image.astype(np.float32) / np.float32(255)
        return unit
    values = image.astype(np.float32)
    # A sample of the pixels gives the same percentiles and costs less.
    step = max(1, int((values.shape[0] * values.shape[1] / 250_000) ** 0.5))
    low, high = np.percentile(values[::step, ::step], [BLACK, WHITE], axis=(0, 1)).astype(np.float32)
    span = np.maximum(high - low, 1e-6 * np.maximum(1, np.abs(high)))
    stretched: NDArray[np.float32] = ((values - low) / span).clip(0, 1).astype(np.float32)
    return stretched


def to_channels(image: Array, channels: int, path: Path) -> Array:
    """Convert an image to the number of channels of a data set: gray is repeated, alpha is dropped, a third added."""
    found = image.shape[-1]
    if found == channels:
        return image
    if channels == 3 and found == 1:
        return np.broadcast_to(image, (*image.shape[:2], 3))
    if channels == 3 and found == 2:
        return np.concatenate([image, np.zeros_like(image[..., :1])], axis=-1)
    if channels == 3 and found == 4 and image.dtype == np.uint8:
        return image[..., :3]
    raise Cause(
        "all images must have the same channels",
        f"{path} has {found}, the data set has {channels}",
        "store all images alike",
    )


def common_channels(image: Array) -> int:
    """Return the number of channels of a data set with such images: 3 where they fit."""
    found = image.shape[-1]
    return 3 if found <= 3 or (found == 4 and image.dtype == np.uint8) else found


def read_pixels(path: Path, *, labels: bool = False, upright: bool = True) -> Array:
    """Read the pixels of a file as they are: `[H, W]` or `[H, W, C]`.

    Args:
        path: of the file.
        labels: keep the numbers of a palette, which are the instances of a label map, and not its colors.
        upright: turn the image as its orientation tag says.
    """
    if path.suffix.lower() in TIFF:
        found = _read_tiff(path)
        if found is not None:
            return turn(*found) if upright else found[0]
    array, orientation = _read_pillow(path, labels)
    return turn(array, orientation) if upright else array


def turn(array: Array, orientation: int) -> Array:
    """Turn stored pixels `[H, W, ...]` as an orientation tag says, so that they are upright."""
    if orientation >= 5:
        array = array.swapaxes(0, 1)
    flip_y, flip_x = orientation in {3, 4, 7, 8}, orientation in {2, 3, 6, 7}
    return array[:: -1 if flip_y else 1, :: -1 if flip_x else 1]


def _end(series: Any) -> int:
    """Return where the last pixel of a TIFF ends in its file."""
    pages = [page for page in series.pages if page is not None]
    return max(
        (sum(piece) for page in pages for piece in zip(page.dataoffsets, page.databytecounts, strict=False)), default=0
    )


def _orientation(opened: Any) -> int:
    """Return the orientation that a file asks for; 1 where the tag is missing or makes no sense."""
    if opened.format == "PNG" and not {"exif", "Raw profile type exif"} & set(opened.info):
        # Pillow would decode all pixels to see whether a tag follows them.
        return 1
    found = opened.getexif().get(_ORIENTATION, 1)
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _tiff_orientation(series: Any) -> int:
    tag = series.keyframe.tags.get(_ORIENTATION)
    found = 1 if tag is None else int(tag.value)
    return found if 1 <= found <= 8 else 1


@contextlib.contextmanager
def _tiff(path: Path) -> Iterator[tuple[Any, tuple[int, int]]]:
    """Open the first series of a TIFF, and say height and width of its plane before any pixel is read."""
    tifffile = require("tifffile", "train")
    # Its warnings of a damaged file are for whoever asked for logs, not for the terminal.
    logger = logging.getLogger("tifffile")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    check_file(path, _READABLE)
    try:
        with tifffile.TiffFile(path) as opened:
            series = opened.series[0]
            yield series, _plane(path, series.axes, series.shape)
    except Cause:
        raise
    except Exception as error:  # noqa: BLE001 (a broken file can make a parser fail in any way)
        raise _broken(path, error) from None


def _plane(path: Path, axes: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return height and width."""
    sides = [(axis, length) for axis, length in zip(axes, shape, strict=True) if length > 1]
    lengths = [length for _, length in sides]
    if len(sides) == 3 and sides[0][0] in "ZT" and sides[-1][0] not in "SC":
        raise Cause("an image must have one plane", f"{path} is a stack of {lengths[0]}", "cut it into its planes")
    channels = [length for length in lengths if length <= MOST_CHANNELS]
    if len(sides) > 3 or (len(sides) == 3 and not channels):
        raise _not_a_plane(path, shape)
    if len(sides) == 3:
        lengths = lengths[1:] if _channels_first(sides) else lengths[:2]
    # What is one pixel high or wide was dropped above.
    height, width = lengths if len(lengths) == 2 else (shape[axes.find("Y")], shape[axes.find("X")])
    _check_pixels(path, height, width)
    return height, width


def _channels_first(sides: Sequence[tuple[str, int]]) -> bool:
    return len(sides) == 3 and sides[-1][0] not in "SC" and sides[0][1] <= MOST_CHANNELS


def _read_tiff(path: Path) -> tuple[Array, int] | None:
    """Read by tifffile, with the orientation; None where it lacks the codec, which Pillow may have."""
    with _tiff(path) as (series, _):
        stored = sum(sum(page.databytecounts) for page in series.pages if page is not None)
        if stored > 2 * series.nbytes + _OVERHEAD:
            raise Cause(_READABLE, f"{path} has {stored:,} bytes for {series.nbytes:,}", "it may be damaged")
        orientation = _tiff_orientation(series)
        try:
            array = series.asarray()
        except (ValueError, KeyError, NotImplementedError) as error:
            if "imagecodecs" in str(error) or "codec" in str(error).lower():
                return None
            raise
        sides = [(axis, length) for axis, length in zip(series.axes, series.shape, strict=True) if length > 1]
    array = np.squeeze(array)
    return np.asarray(np.moveaxis(array, 0, -1) if _channels_first(sides) else array), orientation


class _File(io.BufferedReader):
    """A file of which no more is read at once than it has: what a damaged one announces takes no memory."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._path, self._size = path, os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(-1 if size is None else min(size, self._size))

    def __repr__(self) -> str:
        return repr(str(self._path))


@contextlib.contextmanager
def _pillow(path: Path) -> Iterator[Any]:
    """Open an image by its head, and check how many pixels it says it has."""
    pillow = require("PIL.Image", "train")
    check_file(path, _READABLE)
    try:
        with _own_rules, _File(path) as file, pillow.open(file) as opened:
            _check_pixels(path, opened.size[1], opened.size[0])
            yield opened
    except Cause:
        raise
    except pillow.DecompressionBombError as error:
        raise Cause(_SMALL_ENOUGH, f"{path}: {explain(error)}", _CUT) from None
    except (OSError, ValueError, SyntaxError, MemoryError) as error:
        raise _broken(path, error) from None


def _read_pillow(path: Path, labels: bool) -> tuple[Array, int]:
    with _pillow(path) as opened:
        orientation = 1 if opened.format == "TIFF" else _orientation(opened)
        # A palette in a label map is decoration: the indices are the instances.
        if (labels and opened.mode == "P") or opened.mode in {"1", "L", "RGB", "F", "I"} or opened.mode[:4] == "I;16":
            array = np.array(opened)
            return array.astype(np.uint16) if opened.mode == "I;16B" else array, orientation
        if labels and opened.mode in {"LA", "RGBA"}:
            return np.array(opened), orientation
        return np.array(opened.convert("L" if opened.mode == "LA" else "RGB")), orientation


def _check_pixels(path: Path, height: int, width: int) -> None:
    if height * width > MOST_PIXELS:
        raise Cause(_SMALL_ENOUGH, f"{path} has {height:,} x {width:,} = {height * width:,}", _CUT)


def _not_a_plane(path: Path, shape: Sequence[int]) -> Cause:
    return Cause(
        "an image must have one plane",
        f"{path} has the shape {' x '.join(map(str, shape))}",
        "cut a stack into its planes; channels come first or last",
    )


def _broken(path: Path, error: BaseException) -> Cause:
    what = "it is empty" if not path.stat().st_size else explain(error)
    return Cause(_READABLE, f"{path}: {what}", "open it in a viewer: it may be damaged")
