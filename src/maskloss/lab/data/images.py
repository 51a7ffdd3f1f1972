"""Reading images: photographs by Pillow, microscopy by tifffile, and what brings their values to [0, 1].

An image is a numpy array `[H, W, C]`: uint8 as it is stored, everything else float32. Deep images (more than 8 bits, or
floats) have no natural range, so percentiles of each channel decide what is black and what is white.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskloss.errors import Cause, require
from maskloss.lab.data import tiff
from maskloss.lab.data.tiff import (
    MOST_CHANNELS,
    MOST_PIXELS,
    READABLE,
    SMALL_ENOUGH,
    Array,
    broken,
    check_pixels,
    not_a_plane,
)
from maskloss.lab.files import check_file, explain, read_json

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".bmp", ".dib", ".webp", ".gif", ".jp2"}
    | {".avif", ".tga", ".ppm", ".pgm", ".pbm", ".pnm"}
)
_ORIENTATION = 274
_JPEG_IN_TIFF = frozenset({6, 7, 33003, 33005, 34712})
# What is black and what is white in an image without a natural range. A few hot pixels must not decide.
BLACK, WHITE = 1.0, 99.8


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
        raise not_a_plane(path, array.shape)
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if not np.issubdtype(array.dtype, np.integer) and not np.issubdtype(array.dtype, np.floating):
        raise Cause(READABLE, f"{path} holds values of type {array.dtype}", "store integers or floats")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise Cause(READABLE, f"{path} holds values that are not finite", "replace them")
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
    if tiff.is_tiff(path):
        # Pillow does not know every TIFF that tifffile does, nor the other way round.
        try:
            with tiff.opened(path) as (series, size):
                head = Head(*size, tiff.orientation_of(series))
                lost = tiff.end_of(series) > series.parent.filehandle.size
        except Cause as error:
            if error.parts is None or error.parts[0] != READABLE:
                raise
        else:
            if lost:
                raise Cause(READABLE, f"{path} ends before its last pixel", "copy it again: it was cut off")
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
    if tiff.is_tiff(path):
        with contextlib.suppress(Cause), tiff.opened(path) as (series, _):
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
    if tiff.is_tiff(path):
        # Pillow does not know every TIFF.
        with tiff.opened(path) as (series, _):
            return bool(series.axes.endswith("S") and series.shape[-1] in {3, 4})
    with _pillow(path) as opened:
        return opened.mode in {"RGB", "RGBA"}


def to_unit(image: Array, percentile: bool, sample: Array | None = None) -> NDArray[np.float32]:
    """Scale an image to [0, 1]: by the range of its type, or between percentiles of each channel.

    `sample` is what the percentiles are taken of, `[h, w, C]`, where the image is a part of a larger one.
    """
    if image.dtype == np.uint8 and not percentile:
        unit: NDArray[np.float32] = image.astype(np.float32) / np.float32(255)
        return unit
    values = image.astype(np.float32)
    pixels = values if sample is None else sample.astype(np.float32)
    # A sample of the pixels gives the same percentiles and costs less.
    step = max(1, int((pixels.shape[0] * pixels.shape[1] / 250_000) ** 0.5))
    low, high = np.percentile(pixels[::step, ::step], [BLACK, WHITE], axis=(0, 1)).astype(np.float32)
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
    if path.suffix.lower() in tiff.SUFFIXES:
        found = tiff.read(path)
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


def _orientation(opened: Any) -> int:
    """Return the orientation that a file asks for; 1 where the tag is missing or makes no sense."""
    if opened.format == "PNG" and not {"exif", "Raw profile type exif"} & set(opened.info):
        # Pillow would decode all pixels to see whether a tag follows them.
        return 1
    found = opened.getexif().get(_ORIENTATION, 1)
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


class _File(io.BufferedReader):
    """A file of which no more is read at once than it has: what a damaged one announces takes no memory."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._path, self._size = path, os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(-1 if size is None else min(size, self._size))

    def __repr__(self) -> str:
        return repr(str(self._path))


class _Inside(io.BytesIO):
    """An image that a JSON file holds."""

    def __repr__(self) -> str:
        return "imageData"


def _content(path: Path) -> Any:
    """Open the file of an image, or what labelme has put into its JSON file."""
    if path.suffix.lower() != ".json":
        return _File(path)
    packed = read_json(path, READABLE).get("imageData")
    return _Inside(base64.b64decode(packed if isinstance(packed, str) else ""))


@contextlib.contextmanager
def _pillow(path: Path) -> Iterator[Any]:
    """Open an image by its head, and check how many pixels it says it has."""
    pillow = require("PIL.Image", "train")
    check_file(path, READABLE)
    try:
        with _own_rules, _content(path) as file, pillow.open(file) as opened:
            check_pixels(path, opened.size[1], opened.size[0])
            yield opened
    except Cause:
        raise
    except pillow.DecompressionBombError as error:
        raise Cause(SMALL_ENOUGH, f"{path}: {explain(error)}", "cut it into smaller images") from None
    except (OSError, ValueError, SyntaxError, MemoryError) as error:
        raise broken(path, error) from None


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
