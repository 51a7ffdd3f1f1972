"""Arrays of NumPy as truth: plain ones, and the `_seg.npy` of Cellpose, which is a pickle, read without running it.

A pickle is a program: to load one means to call what it names. Here it may name the three functions by which NumPy
rebuilds arrays, and even those are stand-ins that do nothing but keep their arguments.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from maskloss.errors import Cause
from maskloss.lab.data.tiff import MOST_PIXELS, Array
from maskloss.lab.files import check_file, explain

SUFFIXES = (".npy", ".npz")
_RULE = "a file of NumPy must hold a label map, or what Cellpose writes"
_CONVERT = "write the masks as TIFF: cellpose.io.save_masks, or tifffile.imwrite"


def read_masks(path: Path) -> Array:
    """Read the masks of a `.npy` file: `[H, W]`, or what else the array holds."""
    return _read(path, pixels=True)


def read_size(path: Path) -> tuple[int, int]:
    """Read height and width of the masks of a `.npy` file."""
    shape = _read(path, pixels=False).shape
    if len(shape) < 2:
        raise Cause(_RULE, f"{path} has the shape {list(shape)}", _CONVERT)
    height, width = shape[-2:]
    return height, width


def _read(path: Path, *, pixels: bool) -> Array:
    check_file(path, _RULE)
    try:
        with _opened(path) as opened:
            array = _array(opened, path, pixels=pixels)
    except Cause:
        raise
    except Exception as error:  # noqa: BLE001 (a damaged pickle can make its reader fail in any way)
        raise Cause(_RULE, f"{path}: {explain(error)}", _CONVERT) from None
    if array.size > MOST_PIXELS:
        raise Cause(f"an image must have at most {MOST_PIXELS:,} pixels", f"{path} has {array.size:,}", "cut it")
    return array


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file of one array; a `.npz` is an archive of such files."""
    if path.suffix.lower() != ".npz":
        with path.open("rb") as opened:
            yield opened
        return
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if len(names) != 1:
            held = ", ".join(each.removesuffix(".npy") for each in names[:5])
            raise Cause(_RULE, f"{path} holds {len(names)} arrays: {held}", "write each map into a file of its own")
        with archive.open(names[0]) as inner:
            yield inner


def _array(opened: IO[bytes], path: Path, *, pixels: bool) -> Array:
    head = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(opened)[0]
    shape, _, kind = head[version](opened)
    if kind.hasobject:
        if shape != ():
            raise Cause(_RULE, f"{path} holds an array of objects", _CONVERT)
        found = _Reader(opened).load()
        # NumPy pickles the 0-dimensional array that holds the dict.
        content = found.content() if isinstance(found, _Array) else found
        if isinstance(content, list) and len(content) == 1:
            content = content[0]
        masks = content.get("masks") if isinstance(content, dict) else None
        if not isinstance(masks, _Array):
            raise Cause(_RULE, f"{path} has no masks", _CONVERT)
        return masks.array()
    if np.prod(shape, dtype=np.float64) > MOST_PIXELS:
        raise Cause(_RULE, f"{path} has the shape {shape}", "cut it into smaller images")
    if not pixels:
        return np.broadcast_to(np.zeros((), np.uint8), shape)
    opened.seek(0)
    return np.asarray(np.load(opened, allow_pickle=False))


class _Kind:
    """Stands in for `numpy.dtype`: keeps what it is made of."""

    def __init__(self, name: Any = None, *_: Any) -> None:
        self.name, self.order = name, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1] if isinstance(state, tuple) and len(state) > 1 else "<"


class _Array:
    """Stands in for `numpy.ndarray`: keeps the state by which NumPy would rebuild it."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def content(self) -> Any:
        """Return the bytes, or the list, that the array is made of."""
        return self.state[4]

    def array(self) -> Array:
        """Make an array of numbers of it."""
        _, shape, kind, fortran, data = self.state
        name = kind.name if isinstance(kind, _Kind) else None
        if not isinstance(name, str) or name[:1] not in set("biuf") or not isinstance(data, bytes):
            raise ValueError("the masks are no array of numbers")
        order = kind.order if kind.order in {"<", ">", "|", "="} else "<"
        values = np.frombuffer(data, dtype=np.dtype(order + name))
        return values.reshape([int(side) for side in shape], order="F" if fortran else "C")


def _from_buffer(data: Any, kind: Any, shape: Any, order: Any) -> _Array:
    """Stand in for what pickles of the fifth protocol name."""
    made = _Array()
    made.state = (1, shape, kind, order == "F", bytes(data))
    return made


def _no_number(*_: Any) -> None:
    """Stand in for a number of NumPy's, which nobody asks for."""


def _encode(text: str, *_: Any) -> bytes:
    """Stand in for `_codecs.encode`, by which old protocols write bytes."""
    return text.encode("latin-1")


_KNOWN: dict[str, Callable[..., Any]] = {
    "ndarray": _Array,
    "_reconstruct": _Array,
    "dtype": _Kind,
    "_frombuffer": _from_buffer,
    "scalar": _no_number,
    "encode": _encode,
}


class _Reader(pickle.Unpickler):
    """Reads a pickle that names nothing but NumPy's arrays."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in of a name."""
        if module.partition(".")[0] in {"numpy", "_codecs"} and name in _KNOWN:
            return _KNOWN[name]
        raise pickle.UnpicklingError(f"it would call {module}.{name}, which is not done here")
