"""Reading images: photographs by Pillow, microscopy by tifffile, and what brings their values to [0, 1].

An image is a numpy array `[H, W, C]`: uint8 as it is stored, everything else float32. Deep images (more than 8 bits, or
floats) have no natural range, so percentiles of each channel decide what is black and what is white.
"""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskloss.errors import Cause, require
from maskloss.lab.files import explain

Array = NDArray[Any]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".ppm", ".pgm"})
TIFF = frozenset({".tif", ".tiff"})
# What is black and what is white in an image without a natural range. A few hot pixels must not decide.
BLACK, WHITE = 1.0, 99.8
# Beyond this an image does not fit into memory several times over.
MOST_PIXELS = 1 << 28
# More planes than this are a stack, not channels.
MOST_CHANNELS = 16

_READABLE = "every image must be readable"


class _WithoutWarnings:
    """Ignores warnings while any thread is inside.

    Filters belong to the process: of two threads in `warnings.catch_warnings`, the first to leave turns warnings on
    again for the other, and the last may leave them off for good.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.simplefilter("ignore")

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._filters.__exit__(None, None, None)


_without_warnings = _WithoutWarnings()


def read_image(path: Path) -> Array:
    """Read an image: `[H, W, C]`, uint8 if it has 8 bits, else float32; gray ones have one channel.

    Raises:
        Cause: a file that is missing, broken, too large, or a stack of planes.
    """
    array = _read(path)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] > MOST_CHANNELS:
        raise Cause(
            "an image must have one plane",
            f"{path} has the shape {' x '.join(map(str, array.shape))}",
            "cut a stack into its planes; channels come first or last",
        )
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


def read_label_map(path: Path) -> NDArray[np.int32]:
    """Read a label map: `[H, W]`, 0 for the background and a number for each instance.

    Raises:
        Cause: as in `read_image`; or colors, fractions, or numbers outside [0, 2^31).
    """
    array = np.squeeze(_read(path, labels=True))
    rule = "a label map must hold one whole number for each pixel"
    if array.ndim != 2:
        raise Cause(
            rule,
            f"{path} has the shape {' x '.join(map(str, array.shape))}",
            "store one channel: 0 is background, every instance has a number",
        )
    if np.issubdtype(array.dtype, np.floating):
        whole = array.astype(np.int64)
        if not np.array_equal(whole, array):
            raise Cause(rule, f"{path} holds fractions", "store integers")
        array = whole
    if array.size and (int(array.min()) < 0 or int(array.max()) >= 2**31):
        raise Cause(rule, f"{path} holds numbers from {array.min()} to {array.max()}", "number instances from 1")
    return array.astype(np.int32)


def read_size(path: Path) -> tuple[int, int]:
    """Read height and width off the head of a file.

    Raises:
        Cause: as in `read_image`.
    """
    pillow = require("PIL.Image", "train")
    try:
        with _without_warnings, pillow.open(path) as opened:
            width, height = opened.size
            return int(height), int(width)
    except pillow.DecompressionBombError:
        raise _too_large(path) from None
    except (OSError, ValueError, SyntaxError) as error:
        if path.suffix.lower() in TIFF and path.is_file():
            # Pillow does not know every TIFF that tifffile does.
            height, width = read_image(path).shape[:2]
            return height, width
        raise _broken(path, error) from None


def to_unit(image: Array, percentile: bool) -> NDArray[np.float32]:
    """Bring an image to [0, 1]: by the range of its type, or between percentiles of each channel.

    Args:
        image: `[H, W, C]`, uint8 or float32.
        percentile: stretch 8-bit images too; deep ones always are.
    """
    if image.dtype == np.uint8 and not percentile:
        return (image / np.float32(255)).astype(np.float32)
    values = image.astype(np.float32)
    # A sample of the pixels gives the same percentiles and costs less.
    step = max(1, int((values.shape[0] * values.shape[1] / 250_000) ** 0.5))
    low, high = np.percentile(values[::step, ::step], [BLACK, WHITE], axis=(0, 1)).astype(np.float32)
    span = np.maximum(high - low, 1e-6 * np.maximum(1, np.abs(high)))
    stretched: NDArray[np.float32] = ((values - low) / span).clip(0, 1).astype(np.float32)
    return stretched


def to_channels(image: Array, channels: int, path: Path) -> Array:
    """Bring an image to the number of channels of a data set: gray is repeated, alpha is dropped, a third is added.

    Raises:
        Cause: an image with more channels than the data set has.
    """
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


def _read(path: Path, labels: bool = False) -> Array:
    if path.is_dir():
        raise Cause(_READABLE, f"{path} is a folder", "name a file")
    if path.suffix.lower() in TIFF:
        array = _read_tiff(path)
        if array is not None:
            return array
    return _read_pillow(path, labels)


def _read_tiff(path: Path) -> Array | None:
    """Read by tifffile; None where it lacks the codec, which Pillow may have."""
    tifffile = require("tifffile", "train")
    try:
        with tifffile.TiffFile(path) as opened:
            series = opened.series[0]
            if series.size > MOST_PIXELS * MOST_CHANNELS:
                raise _too_large(path)
            axes, array = series.axes, series.asarray()
    except FileNotFoundError:
        raise Cause("every image must be there", f"there is no file {path}", "check the path") from None
    except (ValueError, KeyError, NotImplementedError) as error:
        if "imagecodecs" in str(error) or "codec" in str(error).lower():
            return None
        raise _broken(path, error) from None
    except Exception as error:  # noqa: BLE001 (a broken file can make a parser fail in any way)
        raise _broken(path, error) from None
    squeezed = [axis for axis, length in zip(axes, array.shape, strict=True) if length > 1]
    array = np.squeeze(array)
    if array.ndim == 3 and squeezed[-1] not in "SC" and array.shape[0] <= MOST_CHANNELS:
        if squeezed[0] in "ZT":
            raise Cause(
                "an image must have one plane",
                f"{path} is a stack of {array.shape[0]}",
                "cut it into its planes",
            )
        array = np.moveaxis(array, 0, -1)
    return np.asarray(array)


def _read_pillow(path: Path, labels: bool) -> Array:
    pillow = require("PIL.Image", "train")
    try:
        with _without_warnings, pillow.open(path) as opened:
            if opened.size[0] * opened.size[1] > MOST_PIXELS:
                raise _too_large(path)
            # A palette in a label map is decoration: the indices are the instances.
            if labels and opened.mode == "P":
                return np.array(opened)
            if opened.mode in {"1", "L", "RGB", "F", "I"} or opened.mode.startswith("I;16"):
                array = np.array(opened)
                return array.astype(np.uint16) if opened.mode == "I;16B" else array
            return np.array(opened.convert("L" if opened.mode == "LA" else "RGB"))
    except pillow.DecompressionBombError:
        raise _too_large(path) from None
    except FileNotFoundError:
        raise Cause("every image must be there", f"there is no file {path}", "check the path") from None
    except (OSError, ValueError, SyntaxError, MemoryError) as error:
        raise _broken(path, error) from None


def _broken(path: Path, error: BaseException) -> Cause:
    if isinstance(error, FileNotFoundError):
        return Cause("every image must be there", f"there is no file {path}", "check the path")
    return Cause(_READABLE, f"{path}: {explain(error)}", "open it in a viewer: it may be damaged")


def _too_large(path: Path) -> Cause:
    return Cause(f"an image must have at most {MOST_PIXELS:,} pixels", f"{path} has more", "cut it into smaller images")
