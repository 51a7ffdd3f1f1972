"""Work spaces of the kernels, one for each thread, kept from call to call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

# A scratch array is kept for the next call up to this size; larger ones (planes of many megapixels) are
# given back, so that one unusual batch does not stay in memory.
_KEEP_BYTES = 64 << 20

Dtypes = tuple[type[np.floating[Any]], type[np.floating[Any]]]
Sizes = tuple[int, int, int]

# Work spaces that no thread is using: last in, first out, for what a core has in its cache.
_spaces: list[dict[str, np.ndarray[Any, Any]]] = []


@contextmanager
def scratch(dtypes: Dtypes, sizes: Sizes) -> Iterator[list[np.ndarray[Any, Any]]]:
    """A work space for one thread: an array of `dtypes[0]`, one of `dtypes[1]`, one of int32, of `sizes` elements."""
    try:
        space = _spaces.pop()
    except IndexError:
        space = {}
    arrays = []
    kinds: tuple[type[np.generic], ...] = (*dtypes, np.int32)
    for name, kind, size in zip(("values", "points", "integers"), kinds, sizes, strict=True):
        attribute = f"{name}_{np.dtype(kind).char}"
        array = space.get(attribute)
        if array is None or array.size < size:
            array = np.empty(size, kind)
            if array.nbytes <= _KEEP_BYTES:
                space[attribute] = array
        arrays.append(array[:size])
    try:
        yield arrays
    finally:
        _spaces.append(space)
